"""The shipped recipes: each validates, builds at full size, says what the paper's Appendix E says, and takes real steps.

Synthetic data of a recipe's own input shape goes through the loop's own step; the Makefile's tables name what is there.
"""

import csv
import json
import math
import re
import shutil
import subprocess
from pathlib import Path

import numpy as np
import pytest
import torch

from eectl.core.distributed import World
from eectl.core.progress import Display
from eectl.data import DataInfo, Dataset, Split, data_info
from eectl.data.images import MemoryImages
from eectl.recipe.reading import make_recipe, read_recipe, shipped_recipes
from eectl.recipe.recipe import Recipe
from eectl.recipe.regimes import REGIMES
from eectl.recipe.schema import EDITOR_COMMENT
from eectl.recipe.yaml_text import parse_yaml
from eectl.training.dry_run import plan
from eectl.training.feed import training_data
from eectl.training.loop import Journal, run_phase
from eectl.training.network import first_network, planned_phases, resolve, with_exits
from eectl.training.phase import phase_settings
from eectl.training.run_folder import RunFolder
from eectl.training.running import make_execution

ROOT = Path(__file__).parents[2]
RECIPES = sorted(shipped_recipes())
QUICK = (
    "digits",
    "cifar100-vit-t",
    "fashion-mnist-msdnet",
    "stsb-bert",
    "folder",
    "text",
)
CPU = torch.device("cpu")
OFFLINE = ("backbone.pretrained=false",)  # CI has no network: a hub's name becomes its architecture in full size
# What a test's own copy of a big network leaves out: depth and width, never its input shape, exits' number or kind.
SMALLER = {
    "20newsgroups-bert": {"hidden_size": 32, "num_attention_heads": 2, "intermediate_size": 64, "vocab_size": 500},
    "stsb-bert": {"hidden_size": 32, "num_attention_heads": 2, "intermediate_size": 64, "vocab_size": 500},
    "cifar100-vit-b": {"dim": 96, "mlp_dim": 192},
    "imagenet-vit-s": {"dim": 96, "mlp_dim": 192},
    "imagenet-vit-t": {"dim": 96, "mlp_dim": 192},
    "imagenette-vit-t": {"dim": 96, "mlp_dim": 192},
    "sentence-source-minilm": {"hidden_size": 32, "num_attention_heads": 2, "intermediate_size": 64, "vocab_size": 500},
    "text": {"hidden_size": 32, "num_attention_heads": 2, "intermediate_size": 64, "vocab_size": 500},
    "sentence-valence-minilm": {"hidden_size": 32, "num_attention_heads": 2, "intermediate_size": 64, "vocab_size": 500},
    "sentence-valence-modernbert": {"vocab_size": 500},
}
TEMPLATES = ("folder", "text")  # for data of one's own
OURS = [
    name for name in RECIPES if name in ("digits", *TEMPLATES) or name.startswith(("cifar10-", "fashion-mnist-", "sentence-"))
]
# Hand-typed from the paper: learning rate, weight decay, batch size, patience, exits, blocks of the backbone.
# Appendix E.1 to E.8; None where the paper gives no value.
APPENDIX_E = {
    "cifar100-resnet34": (5e-4, 0.0, 128, 50, [2, 4, 6, 8, 10, 12, 14], 16),
    "cifar100-msdnet": (1e-3, 0.0, 512, 50, list(range(18)), 19),
    "cifar100-vit-t": (5e-4, 0.0, 256, 30, [0, 1, 2, 3, 4, 5, 6], 7),
    "tinyimagenet-resnet50": (1e-3, 0.0, 256, 50, list(range(1, 15)), 16),
    "imagenet-vit-t": (5e-4, 0.0, 2048, 25, list(range(1, 11)), 12),
    "20newsgroups-bert": (5e-5, 1e-2, 32, 3, [1, 3, 5, 7, 9, 11, 13, 15, 17, 19, 21], 24),
    "stsb-bert": (1e-5, 1e-4, 16, 3, [1, 3, 5, 7, 9, 11, 13, 15, 17, 19, 21], 24),
    "cifar100-vit-b": (2e-5, 3e-2, None, 30, [3, 5, 7, 9], 12),
}
# Multiply-adds of the plain backbones: convolutions, linear layers and attention products (counted by hand in the notes on §4).
MACS = {
    "cifar100-resnet34": 1159.4e6,
    "tinyimagenet-resnet50": 5191.6e6,
    # the trunk without BatchNorm's elements (tests/models/test_msdnet.py), and the last classifier on 200 channels of 8×8
    "cifar100-msdnet": 47_602_688 + 200 * 128 * 9 * 16 + 128 * 128 * 9 * 4 + 128 * 100,
    "cifar100-vit-t": 194.9e6,
    "imagenet-vit-t": 1.254e9,
    "imagenet-vit-s": 4.599e9,
    "cifar100-vit-b": 17.56e9,
}


def info_of(recipe: Recipe) -> DataInfo:
    """The facts of a recipe's data; files of a user's own are not here, so theirs are typed."""
    if recipe.data.name == "folder":
        return DataInfo("folder", ("cat", "dog", "fox"), (3, 64, 64), (0.5,) * 3, (0.25,) * 3)
    if recipe.data.name != "text":
        return data_info(recipe.data)
    task = recipe.data.task
    classes = ("editorial", "movie", "product", "tweet") if task == "classification" else ()
    return DataInfo("text", classes, (3, recipe.data.max_length), (), (), task=task, kind="text")


def shipped(name: str, *changes: str) -> Recipe:
    """A shipped recipe with a network that needs no download."""
    recipe = read_recipe(name)
    offline = list(OFFLINE)
    if recipe.backbone.name.startswith("hf/") and recipe.backbone.pretrained:
        offline.append("backbone.name=hf/bert")  # bert-base-uncased is the default size of the architecture
    return read_recipe(name, changes=[*offline, *changes])


@pytest.mark.parametrize("name", RECIPES)
def test_the_first_comment_is_a_command_that_names_it(name):
    editor, first = shipped_recipes()[name].splitlines()[:2]
    assert editor == EDITOR_COMMENT
    assert first.startswith("# eectl train") and (name in first or name == "digits")
    plain = make_recipe(parse_yaml(shipped_recipes()[name], where=name), where=name)
    assert plain == read_recipe(name)


@pytest.mark.parametrize("name", sorted(APPENDIX_E))
def test_a_recipe_says_what_appendix_e_says(name):
    recipe = read_recipe(name)
    rate, decay, batch, patience, after, depth = APPENDIX_E[name]
    assert (recipe.optimizer.name, recipe.schedule.name) == ("adamw", "cosine-restarts")
    assert (recipe.optimizer.lr, recipe.optimizer.weight_decay, recipe.patience) == (rate, decay, patience)
    assert batch is None or recipe.batch_size == batch
    assert list(recipe.exits.after or ()) == after
    assert recipe.metric == ("loss" if name == "stsb-bert" else "score")
    assert not recipe.phases and recipe.optimizer.lr == rate
    assert max(after) < depth
    assert recipe.data.validation == 0.1


def test_the_networks_and_augmentations_of_appendix_e():
    vit = {"patch_size": 4, "dim": 256, "mlp_dim": 256, "depth": 7, "heads": 8}
    assert read_recipe("cifar100-vit-t").backbone.args == vit
    vit = {"patch_size": 16, "dim": 192, "mlp_dim": 768, "depth": 12, "heads": 3}
    assert read_recipe("imagenet-vit-t").backbone.args == vit
    assert read_recipe("cifar100-vit-b").backbone.pretrained and read_recipe("cifar100-vit-b").backbone.name == "vit_b_16"
    for name in ("cifar100-resnet34", "cifar100-msdnet", "cifar100-vit-t", "tinyimagenet-resnet50", "imagenet-vit-t"):
        augment = read_recipe(name).data.augment
        assert augment.mixup > 0 and augment.cutmix > 0, name
    mixed = read_recipe("cifar100-vit-b").data.augment
    assert mixed.mixup > 0 and (mixed.cutmix, mixed.trivial, mixed.erasing) == (0, False, 0)


@pytest.mark.parametrize(("name", "length"), [("20newsgroups-bert", 512), ("stsb-bert", 128)])
def test_the_lengths_of_texts_are_appendix_es(name, length):
    recipe = read_recipe(name)
    assert recipe.data.max_length == length and recipe.backbone.pretrained


@pytest.mark.parametrize("name", RECIPES)
def test_every_assumed_value_is_marked_and_every_number_is_the_papers(name):
    text = shipped_recipes()[name]
    if name in APPENDIX_E:
        assert "# assumed" in text.split("\ndata:")[1]
    published = {(row["table"], row["regime"], row["budget_percent"]): row for row in published_rows()}
    tables = re.findall(r"^# Table (\d+), .*:\n#( .*)\n((?:#   .*\n)+)", text, re.M)
    for table, header, lines in tables:
        budgets = [word for word in header.replace(" %", "").split() if word]
        for line in lines.splitlines():
            regime, *cells = re.split(r"\s{2,}", line.removeprefix("#").strip())
            assert len(cells) == len(budgets), line
            for budget, cell in zip(budgets, cells, strict=True):
                row = published[table, regime, budget]
                assert cell == (row["mean"] or "-") + (f" ±{row['std']}" if row["std"] else ""), (table, regime, budget)
    assert bool(tables) == (name not in OURS)


def published_rows():
    """The paper's numbers: the package's own copy."""
    with (ROOT / "eectl" / "reports" / "published.csv").open() as file:
        return list(csv.DictReader(file))


# --- building ----------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("name", RECIPES)
def test_a_recipe_builds_at_full_size_with_its_exits(name):
    """On the meta device, so that nothing is drawn and nothing is large; ModernBERT, which asks for numbers, is small."""
    recipe = shipped(name)
    info = info_of(recipe)
    with torch.device("cpu" if recipe.backbone.name == "hf/modernbert" else "meta"):
        network = first_network(recipe, info)
        resolved = resolve(recipe, network)
        network = with_exits(network, resolved.exits, seed=0)
    for regime in REGIMES:
        phases = planned_phases(resolved.model_copy(update={"regime": regime, "phase": None}))
        assert {number for phase in phases for number in phase.scored} <= set(range(1, network.model.num_exits + 1))
    assert network.model.num_exits == len(resolved.exits.after or ()) + 1
    if name in APPENDIX_E:
        assert network.model.backbone.depth == APPENDIX_E[name][-1]
        assert list(network.model.after) == APPENDIX_E[name][-2]


@pytest.mark.parametrize("name", sorted(MACS))
def test_the_plain_backbone_costs_what_the_paper_measures(name):
    recipe = shipped(name, "exits.after=[0]")
    assert plan(recipe).priced.costs.plain == pytest.approx(MACS[name], rel=1e-3)


# --- two steps ---------------------------------------------------------------------------------------------------------


def synthetic(recipe: Recipe, info: DataInfo, *, rows: int) -> Dataset:
    """Random inputs of the recipe's shape and random targets, in memory: the train split alone."""
    generator = torch.Generator().manual_seed(0)
    if info.kind == "text":
        length = info.input_shape[-1]
        ids = torch.randint(1, 500, (rows, length), generator=generator)
        real = torch.arange(length).expand(rows, -1) < torch.linspace(length / 4, length, rows)[:, None]
        inputs = torch.stack([ids * real, real.long(), torch.zeros_like(ids)], dim=1)
    else:
        inputs = torch.randint(0, 256, (rows, *info.input_shape), dtype=torch.uint8, generator=generator)
    regression = info.task == "regression"
    targets = torch.rand(rows, generator=generator) * 5 if regression else torch.arange(rows) % len(info.classes)
    ids = np.arange(rows, dtype=np.uint64)
    train = Split("train", MemoryImages(inputs), targets, ids, device=CPU)
    validation = Split("validation", MemoryImages(inputs[:1]), targets[:1], ids[:1], device=CPU)
    return Dataset(info, {"train": train, "validation": validation}, augment=recipe.data.augment)


@pytest.mark.parametrize("name", [pytest.param(name, marks=[] if name in QUICK else pytest.mark.thorough) for name in RECIPES])
def test_a_recipe_takes_two_steps_of_the_loop(name, tmp_path):
    """An epoch of two batches of joint training: everything moves, every loss is finite, the optimizer is the recipe's."""
    changes = [f"backbone.args.{key}={value}" for key, value in SMALLER.get(name, {}).items()]
    recipe = shipped(name, "regime=joint", "batch_size=2", "epochs=1", *changes)
    info = info_of(recipe)
    data = synthetic(recipe, info, rows=4)
    network = first_network(recipe, info)
    recipe = resolve(recipe, network)
    network = with_exits(network, recipe.exits, seed=0)
    (phase,) = planned_phases(recipe)
    rows = training_data(data)
    folder = RunFolder(tmp_path)
    folder.saved_at = math.inf  # no resume states: they are large, and tested elsewhere
    settings = phase_settings(recipe, phase, network.model, rows, num_processes=1)
    before = {key: value.clone() for key, value in network.model.named_parameters()}
    entry = run_phase(
        network.model,
        settings,
        rows,
        execution=make_execution(recipe, network.model.backbone, CPU),
        world=World(0, 1, CPU),
        journal=Journal(folder, Display(quiet=True), {}),
    )
    assert (entry["steps"], entry["epochs"]) == (2, 1)
    (row,) = (json.loads(line) for line in (tmp_path / "metrics.jsonl").read_text().splitlines())
    assert len(row["train_loss"]) == network.model.num_exits and all(0 < loss < 100 for loss in row["train_loss"])
    assert 0 < row["lr"] <= recipe.optimizer.lr == read_recipe(name).optimizer.lr
    moved = (key for key in before if not key.endswith(".mix"))  # a pooled head's blend is nothing to maps of 4×4 and below
    after = dict(network.model.named_parameters())
    still = [key for key in moved if torch.equal(after[key], before[key])]
    assert not still, still


# --- the tables --------------------------------------------------------------------------------------------------------


def make(*words: str) -> list[str]:
    """The commands that `make -n` prints, one a line."""
    if shutil.which("make") is None:
        pytest.skip("there is no make on this machine")
    command = ["make", "-n", "-f", str(ROOT / "recipes" / "Makefile"), "OUT=o", "EECTL=eectl", *words]
    done = subprocess.run(command, capture_output=True, text=True, cwd=ROOT / "tests", timeout=60)
    assert done.returncode == 0 and not done.stderr, done.stderr
    return [line.strip() for line in done.stdout.replace("\\\n", " ").splitlines() if line.startswith("eectl")]


def option(line: str, name: str) -> str | None:
    found = re.search(rf"{name} (\S+)", line)
    return found and found[1]


@pytest.mark.process
@pytest.mark.parametrize("number", range(1, 21))
def test_a_table_is_made_of_its_recipes_regimes_and_seeds(number):
    lines = make(f"table-{number}", "SEEDS=0 5")
    trains = [line for line in lines if line.startswith("eectl train")]
    folders = [option(line, "-o") for line in trains]
    assert len(set(folders)) == len(folders) and lines[-1].startswith("eectl report")
    made: set[str] = set()
    for line in lines:
        for path in re.findall(r"(?:--from|calibrate-thresholds|evaluate|--policy) (o/\S+)", line):
            assert path in made, f"{line}: {path} is made later or never"
        reads = line.split("--published")[0].split()[2:] if line.startswith("eectl report") else []
        assert set(reads) <= made
        target = option(line, "-o") or ""
        made |= {target, f"{target}/model.safetensors"}
    for line in trains:
        assert line.split()[2] in RECIPES and option(line, "--regime") in REGIMES and option(line, "--seed") in ("0", "5")
        start = option(line, "--from")
        assert start is None or f"backbone-{option(line, '--seed')}/" in start
    assert sum("--phase 1" in line for line in trains) == 2 * len({line.split()[2] for line in trains})


@pytest.mark.process
def test_every_variant_of_a_table_builds_at_full_size():
    lines = make(*(f"table-{number}" for number in range(1, 21)), "SEEDS=0")
    variants = {(line.split()[2], *re.findall(r"--set (\S+)", line)) for line in lines if "--set" in line}
    assert len(variants) == 1 + 6 + 4 + 2 * 2  # gpf, placements, weightings, two sizes on two data sets
    for name, *flags in sorted(variants):
        recipe = shipped(name, *flags)
        assert recipe != shipped(name)
        with torch.device("meta"):
            network = first_network(recipe, data_info(recipe.data))
            resolved = resolve(recipe, network)
            network = with_exits(network, resolved.exits, seed=0)
        assert network.spec.heads == (resolved.exits.head,) * len(network.model.after), flags
        planned_phases(resolved)


@pytest.mark.process
def test_a_tables_rows_are_those_that_the_paper_prints():
    """Every (regime, variant) of every published table is a run of that table's target, and the report labels it so."""
    rows: dict[str, set[str]] = {}
    for row in published_rows():
        rows.setdefault(row["table"], set()).add(row["regime"])
    for table, wanted in rows.items():
        report = next(line for line in make(f"table-{table}", "SEEDS=0") if f"--published {table} " in line)
        labels = dict(re.findall(r"--label '\*/([^/']+)/\*=([^']*)'", report))
        runs = re.findall(r"o/[^/]+/([^/]+)/([a-z-]+)-0/", report)
        made = {f"{regime.capitalize()} {labels[variant]}".strip() for variant, regime in runs}
        assert made == wanted, table


@pytest.mark.process
def test_disjoint_and_mixed_and_every_variant_share_phase_1():
    lines = make("table-7", "SEEDS=3")
    shared = "o/tinyimagenet-resnet50/backbone-3"
    assert [line for line in lines if f"-o {shared}" in line] == [
        f"eectl train tinyimagenet-resnet50 --regime disjoint --phase 1 --seed 3  --resume -o {shared}"
    ]
    assert sum(f"--from {shared}/model.safetensors" in line for line in lines) == 14
    assert {line.split("--regime ")[1][:18].strip() for line in lines if f"--from {shared}" in line} == {
        "disjoint --phase 3",
        "mixed --phase 2 --",
    }
    plain = "o/tinyimagenet-resnet50/plain/joint-3"
    assert f"eectl train tinyimagenet-resnet50 --regime joint  --seed 3      --resume -o {plain}" in lines


@pytest.mark.process
@pytest.mark.parametrize(("table", "criterion"), [(15, "patience"), (17, "entropy")])
def test_a_criterion_measures_the_networks_of_table_10(table, criterion):
    lines = make(f"table-{table}", "SEEDS=0")
    trains = [line for line in lines if line.startswith("eectl train")]
    assert len(trains) == 4 and set(trains) <= set(make("table-10", "SEEDS=0"))
    assert sum(f"--criterion {criterion}" in line for line in lines) == 3
    assert f"o/cifar100-vit-t/plain/mixed-0/{criterion}/evaluation.json" in lines[-1]


@pytest.mark.process
def test_the_papers_rule_needs_no_policy():
    paper = make("table-18", "SEEDS=0", "RESULT=paper")
    assert not any("policy" in line for line in paper)
    assert sum("--protocol paper --budgets 35,50,75,100 " in line for line in paper) == 3


@pytest.mark.process
def test_the_readme_maps_every_table_to_what_is_there():
    text = (ROOT / "recipes" / "README.md").read_text()
    rows = dict(re.findall(r"^\| (\d+) \| (.*) \|$", text, re.M))
    assert sorted(map(int, rows)) == list(range(1, 21))
    for number, row in rows.items():
        used = {line.split()[2] for line in make(f"table-{number}", "SEEDS=0") if line.startswith("eectl train")}
        assert set(re.findall(r"`([a-z0-9-]+)`", row.split("|")[0])) == used, number
    assert set(re.findall(r"^\| `([a-z0-9-]+)` \|", text, re.M)) == set(RECIPES)


@pytest.mark.process
@pytest.mark.parametrize("path", ["my-own.yaml", "folder/my-own.yaml"])
def test_a_recipe_of_ones_own_is_chained_alike(path):
    lines = make(f"RECIPE={path}", "SEEDS=1")
    assert lines[0] == f"eectl train {path} --regime disjoint --phase 1 --seed 1  --resume -o o/my-own/backbone-1"
    assert sum(line.startswith(f"eectl train {path} ") for line in lines) == 4
