"""Text from one end to the other: training, thresholds, evaluation and what is printed, for classes and for numbers."""

import json
import math
from types import SimpleNamespace

import pytest
import torch
from running import eectl
from safetensors.torch import load_file
from toy_text import TOY, WORDS, make_rows, naive_read, write_csv, write_tokenizer

from eectl.data.text import load_tokenizer
from eectl.exits.criteria import find_criterion
from eectl.exits.policy import choose
from eectl.models import build as models
from eectl.models.checkpoint import load_checkpoint, read_about
from eectl.models.losses import TASKS

ROWS = {"train": make_rows(300, seed=1), "test": make_rows(60, seed=2)}


@pytest.fixture(scope="module", autouse=True)
def toy():
    models.BACKBONES[TOY.name] = TOY.build
    yield
    del models.BACKBONES[TOY.name]


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    """A data folder, and a recipe for each task."""
    folder = tmp_path_factory.mktemp("text")
    tokenizer = write_tokenizer(folder / "tokenizer")
    (folder / "data").mkdir()
    for name, rows in ROWS.items():
        write_csv(folder / "data" / f"{name}.csv", rows)
    for task, target in (("regression", "score"), ("classification", "mood")):
        data = f"{{name: text, root: '{folder}/data', target: {target}, task: {task}, tokenizer: '{tokenizer}', max_length: 20}}"
        (folder / f"{task}.yaml").write_text(
            f"data: {data}\nbackbone: {{name: {TOY.name}}}\nexits: {{after: [0, 1, 2]}}\nregime: joint\nepochs: 6\npatience: 6\n"
            "batch_size: 16\neval_batch_size: 17\noptimizer: {lr: 0.02}\n"
        )
    return folder


@pytest.fixture(scope="module", params=["regression", "classification"])
def trained(request, folder, toy):
    """The task, and the folder of a run of it."""
    from eectl.recipe.reading import read_recipe
    from eectl.training.train import train

    train(read_recipe(str(folder / f"{request.param}.yaml")), out=folder / request.param, device="cpu", quiet=True)
    return request.param, folder / request.param


def test_training_keeps_the_best_of_every_exit(trained):
    task, run_folder = trained
    about = read_about(run_folder / "model.safetensors")
    log = [json.loads(line) for line in (run_folder / "metrics.jsonl").read_text().splitlines()]
    best = min if task == "regression" else max
    entry = about.history[-1]
    for number in (1, 2, 3, 4):
        assert entry["best"][str(number)] == best(row["validation_score"][number - 1] for row in log)
    assert (about.task, about.spec.num_outputs) == ((task, 1) if task == "regression" else (task, 3))
    if task == "regression":
        spread = torch.tensor([row["score"] for row in ROWS["train"]]).var().item()
        assert log[-1]["validation_score"][3] < 0.5 * spread  # it learns: the toy sums up words
        assert log[0]["validation_score"] == pytest.approx(log[0]["validation_loss"])


def test_measuring_from_end_to_end(trained, tmp_path):
    task, run_folder = trained
    path = run_folder / "model.safetensors"
    policy, saved, plot = tmp_path / "policy.json", tmp_path / "test.safetensors", tmp_path / "curve.svg"
    _, err = eectl("calibrate-thresholds", path, "--budgets", "80,95,150", "-o", policy)
    assert "test texts are longer than 20 tokens and were cut; data.max_length keeps more" in err
    out, _ = eectl("evaluate", path, "--policy", policy, "--json", "--save-predictions", saved, "--plot", plot)
    result = json.loads(out)
    predictions = SimpleNamespace(**load_file(saved))
    model, tokenizer = load_checkpoint(path).model, load_tokenizer(str(run_folder.parent / "tokenizer"))
    for row, text in enumerate(ROWS["test"]):  # the split's own order, whatever the order of batches, and no trace of padding
        ids, types = naive_read(tokenizer, text["text"])
        if len(ids) <= 20:
            with torch.no_grad():
                outputs = model(torch.tensor([[ids, [1] * len(ids), types]]))
            expected = torch.stack([output.logits[0] for output in outputs])
            torch.testing.assert_close(predictions.logits[:, row], expected, rtol=1e-4, atol=1e-5)
    labels = [text["score" if task == "regression" else "mood"] for text in ROWS["test"]]
    if task == "classification":
        assert predictions.labels.tolist() == [["down", "level", "up"].index(label) for label in labels]
        assert result["exits"][0]["pearson"] is None
        return
    assert predictions.labels.tolist() == labels
    errors = (predictions.logits[:, :, 0] - torch.tensor(labels)).square()
    assert [entry["value"] for entry in result["exits"]] == pytest.approx(errors.mean(1).tolist())
    criterion = find_criterion("difference", task=TASKS["regression"], num_exits=4)
    for entry in result["budgets"]:
        if entry["thresholds"] is None:
            continue
        exits = choose(criterion.scores(predictions.logits), entry["thresholds"])
        outputs = predictions.logits[exits, torch.arange(60), 0]
        assert entry["value"] == pytest.approx((outputs - predictions.labels).square().mean().item())
        assert entry["pearson"] == pytest.approx(
            torch.corrcoef(torch.stack([outputs, predictions.labels]))[0, 1].item(), abs=1e-5
        )
    chosen = [entry["value"] for entry in json.loads(policy.read_text())["budgets"] if entry["value"] is not None]
    assert len(chosen) >= 2 and chosen == sorted(chosen, reverse=True)  # a larger budget has no larger error
    assert "MSE, lower is better" in plot.read_text()
    out, _ = eectl("evaluate", path, "--policy", policy, "--predictions", saved)
    assert "MSE ± s.e." in out and "Pearson" in out and "Spearman" in out
    assert f"{result['exits'][3]['pearson']:.4f}" in out and f"{result['exits'][3]['value']:.4g} ±" in out
    out, _ = eectl("info", path)
    assert "3×20 inputs, a number (regression)" in out and "validation MSE" in out
    assert f"{read_about(path).history[-1]['validation']['score'][0]:.4g}" in out
    eectl("evaluate", path, "--criterion", "difference-2", "--budgets", "100", "--json")
    _, err = eectl("evaluate", path, "--protocol", "paper", code=1)
    assert err == "eectl: the paper names no exit criterion for regression; use --protocol calibrated\n"


def test_plans_without_training(folder, tmp_path):
    """Hand count: blocks are 8·8 a token, heads 8 a row; texts count at their full length."""
    out, _ = eectl("train", folder / "regression.yaml", "--dry-run")
    assert "regression" in out and "exit 1–4" in out
    out, _ = eectl("flops", folder / "regression.yaml", "--json")
    costs = [entry["cost"] for entry in json.loads(out)["exits"]]
    assert costs == [64 * 20 + 8, 2 * (64 * 20 + 8), 3 * (64 * 20 + 8), 3 * (64 * 20 + 8) + 8]
    changes = ["--set", "data={name: glue/mnli, tokenizer: nowhere, max_length: 40}", "--data-root", tmp_path / "empty"]
    out, _ = eectl("flops", folder / "regression.yaml", *changes, "--json")
    assert json.loads(out)["plain"] == 3 * 64 * 40 + 8 * 3
    out, _ = eectl("flops", folder / "classification.yaml", "--json")
    assert json.loads(out)["plain"] == 3 * 64 * 20 + 8 * 3


def test_the_run_starts_from_a_checkpoint_of_its_own_task_only(trained, folder, tmp_path):
    task, run_folder = trained
    other = {"regression": "classification", "classification": "regression"}[task]
    start = run_folder / "model.safetensors"
    _, err = eectl("train", folder / f"{other}.yaml", "--from", start, "-o", tmp_path / "out", "--device", "cpu", code=1)
    is_for, has = ("a number (regression)", "3 classes") if task == "regression" else ("3 classes", "a number (regression)")
    assert err == f"eectl: {start}: a network for {is_for}, but text has {has}\n" and not (tmp_path / "out").exists()
    _, err = eectl("train", folder / f"{task}.yaml", "--from", start, "--set", "data.max_length=30", "-o", tmp_path / "out",
                   "--device", "cpu", code=1)  # fmt: skip
    assert err.endswith("a network for 3×20 inputs, but text gives 3×30; set data.max_length=20\n")


def test_another_tokenizer_or_text_is_noticed(trained, folder, tmp_path):
    _, run_folder = trained
    (tmp_path / "data").mkdir()
    for name, rows in ROWS.items():
        write_csv(tmp_path / "data" / f"{name}.csv", rows)
    again = ["evaluate", run_folder / "model.safetensors", "--data-root", tmp_path / "data"]
    eectl(*again)
    write_csv(tmp_path / "data" / "train.csv", [ROWS["train"][1], ROWS["train"][0], *ROWS["train"][2:]])
    _, err = eectl(*again, code=1)
    assert err.endswith("point --data-root at the same texts, and take the same tokenizer\n")


REFUSED = [
    ("regression", ["label_smoothing=0.1"], "label_smoothing is for classes, and data.task is regression; set it to 0"),
    ("regression", ["data.augment={mixup: 0.8}"], "data: augment is for images, and text holds text; leave it out"),
    ("classification", ["data.image_size=32", "data.workers=2"], "data: image_size, workers are for images, and text holds text"),
    ("regression", ["data.name=mnist"], "data: tokenizer, max_length are for text, and mnist holds images; leave them out"),
    ("regression", ["data.max_length=2"], "data.max_length: is 2; input should be greater than or equal to 3"),
    ("regression", ["data.text=[a, b, c]"], "data.text: is "),
    ("regression", ["data.strip=[quotes]"], "data: strip is for 20newsgroups, and this is text; leave it out"),
    ("regression", ["channels_last=true"], "channels_last is for images, and text holds text; leave it out"),
    (
        "regression",
        ["data.tokenizer=null"],
        "data.tokenizer: texts need one; name a folder or a hub id, or take a backbone hf/NAME",
    ),
    (
        "regression",
        ["backbone.name=resnet20"],
        "backbone.name: resnet20 takes images, and the data are texts; texts need hf/NAME",
    ),
    (
        "regression",
        ["backbone.args={vocabulary: 17}"],
        "gives token ids up to 17, and toy-text takes those below 17; name the tok",
    ),
    ("regression", ["data.target=mood"], "train.csv: row 1: column 'mood' is "),
    ("regression", ["data.text=body"], "train.csv: no column 'body'; it has 'text', 'score', 'mood'"),
    ("regression", ["data.root=/nowhere"], "data.root is '/nowhere': no such folder; expected: train.csv"),
]


@pytest.mark.parametrize(("task", "changes", "message"), REFUSED, ids=[f"{task} {changes[0]}" for task, changes, _ in REFUSED])
def test_refused_before_anything_is_written(folder, tmp_path, task, changes, message):
    sets = [word for change in changes for word in ("--set", change)]
    out, err = eectl("train", folder / f"{task}.yaml", *sets, "-o", tmp_path / "out", "--device", "cpu", code=1)
    assert out == "" and len(err.splitlines()) == 1 and message in err
    assert not (tmp_path / "out").exists()


def test_the_tokenizer_is_that_of_the_backbone_unless_named():
    from eectl.recipe.reading import make_recipe

    recipe = make_recipe({"data": {"name": "text"}, "backbone": {"name": "hf/./folder"}}, where="t")
    assert recipe.data.tokenizer == "./folder"
    named = make_recipe({"data": {"name": "text", "tokenizer": "x"}, "backbone": {"name": "hf/./folder"}}, where="t")
    assert named.data.tokenizer == "x"
    assert make_recipe({"data": {"name": "digits"}, "backbone": {"name": "hf/x"}}, where="t").data.tokenizer is None


def test_a_naive_epoch(folder):
    """One epoch of plain SGD on the MSE of all exits, written out, over the batches that the loop sees."""
    from eectl.core.seeds import derive_seed
    from eectl.data import load_data, train_batches
    from eectl.recipe.reading import read_recipe
    from eectl.training.network import first_network, with_exits
    from eectl.training.train import train

    changes = ["optimizer={name: sgd, lr: 0.05, momentum: 0}", "schedule.name=constant", "epochs=1"]
    recipe = read_recipe(str(folder / "regression.yaml"), changes=changes)
    done = train(recipe, out=folder / "naive", device="cpu", quiet=True)
    data = load_data(recipe.data, device=torch.device("cpu"))
    model = with_exits(first_network(recipe, data.info), recipe.exits, seed=0).model.train()
    seed = derive_seed(0, "order", 2)
    for batch in train_batches(data.splits["train"], batch_size=16, seed=seed, epoch=0):
        rows = batch.rows.tolist()
        outputs = [output.logits[:, 0] for output in model(batch.inputs)]
        targets = torch.tensor([data.splits["train"].labels[row].item() for row in rows])
        loss = sum((output - targets).square().mean() for output in outputs) / 4
        model.zero_grad()
        loss.backward()
        with torch.no_grad():
            for parameter in model.parameters():
                parameter -= 0.05 * parameter.grad
    for name, tensor in load_checkpoint(done.path).model.state_dict().items():
        torch.testing.assert_close(tensor, model.state_dict()[name], rtol=1e-4, atol=1e-5)
    assert len(WORDS) == 14 and math.isfinite(loss.item())


def test_runs_of_one_encoder_stand_in_one_table_however_they_began(folder, tmp_path):
    """A chain's last phase knows the encoder by its configuration, a run in one go by its folder: still one network."""
    from transformers import BertConfig, BertForSequenceClassification

    small = {"hidden_size": 16, "num_hidden_layers": 2, "num_attention_heads": 2, "intermediate_size": 16}
    size = len(load_tokenizer(str(folder / "tokenizer")))
    BertForSequenceClassification(BertConfig(vocab_size=size, num_labels=3, **small)).save_pretrained(tmp_path / "encoder")
    recipe = tmp_path / "small.yaml"
    data = (folder / "classification.yaml").read_text().splitlines()[0]
    recipe.write_text(
        f"{data}\nbackbone: {{name: 'hf/{tmp_path}/encoder', pretrained: true}}\nexits: {{after: [1]}}\nepochs: 1\n"
        "batch_size: 64\neval_batch_size: 30\n"
    )
    train = ("train", recipe, "--set", "data.limit=100", "-q")
    eectl(*train, "--regime", "disjoint", "--phase", "1", "-o", tmp_path / "backbone")
    eectl(
        *train,
        "--regime",
        "disjoint",
        "--phase",
        "3",
        "--from",
        tmp_path / "backbone/model.safetensors",
        "-o",
        tmp_path / "disjoint",
    )
    eectl(*train, "--regime", "joint", "-o", tmp_path / "joint")
    eectl(*train, "--regime", "joint", "--set", "backbone.pretrained=false", "-o", tmp_path / "random")
    for name in ("disjoint", "joint", "random"):
        eectl("evaluate", tmp_path / name / "model.safetensors", "-o", tmp_path / name / "evaluation.json")
    out, _ = eectl("report", tmp_path / "disjoint", tmp_path / "joint", "--json")
    assert [row["label"] for row in json.loads(out)["rows"]] == ["", ""]
    out, _ = eectl("report", tmp_path / "random", tmp_path / "joint", "--json")
    assert [row["label"] for row in json.loads(out)["rows"]] == ["start=random", "start=published"]
