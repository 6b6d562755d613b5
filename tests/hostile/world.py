"""Real files of every kind that eectl reads, made by its own commands, so small that a command takes a fraction of a second.

What is damaged in them, and what must hold afterwards, is the business of others.
"""

import gzip
import importlib
import io
import json
import os
import pkgutil
import signal
import sys
import tarfile
from pathlib import Path

import numpy as np
from PIL import Image
from running import ROOT
from running import eectl as run
from safetensors.torch import save_file
from toy_text import make_rows, write_csv, write_jsonl, write_tokenizer

import eectl


def words(text: str) -> tuple[str, ...]:
    """Return the words of a command line."""
    return tuple(text.split())


SMALL = words("--set data.limit=120 --set exits.after=[1] --set batch_size=32 -q --device cpu")
SHORT = words("--epochs 1 --regime joint")
STOPPED = words("--epochs 3 --regime mixed --resume")
TEXTS = words(
    "--backbone hf/./tiny --text text --target mood --set data.tokenizer=./tiny --set exits.after=[1] --set data.max_length=12 "
    "--set batch_size=16 -q --device cpu"
)
DECODER = words(
    "--data texts.csv --text text --target mood --set data.tokenizer=./tiny --set exits.after=[0] --set data.max_length=12 "
    "--set batch_size=16 -q --device cpu"
)
LABELS = words("--task multilabel --target tags")
PHOTOS = words(
    "--backbone resnet20 --set data.image_size=12 --set data.test=0.25 --set exits.after=[1] --set batch_size=8 "
    "--set data.workers=0 -q --device cpu"
)
LISTED = words("--data listed") + LABELS + PHOTOS
TINY_BERT = {"vocab_size": 18, "hidden_size": 16, "num_hidden_layers": 1, "num_attention_heads": 2, "intermediate_size": 16,
             "max_position_embeddings": 16}  # fmt: skip
TINY_DECODER = {"vocab_size": 18, "hidden_size": 16, "num_hidden_layers": 2, "num_attention_heads": 2, "num_key_value_heads": 2,
                "intermediate_size": 16, "max_position_embeddings": 16, "pad_token_id": 0}  # fmt: skip
TINY_VIT = {"hidden_size": 16, "num_hidden_layers": 2, "num_attention_heads": 2, "intermediate_size": 16, "image_size": 12,
            "patch_size": 4}  # fmt: skip
EYE = words(
    "--data photos --backbone hf/./eye --set data.test=0.25 --set exits.after=[0] --set batch_size=8 --set data.workers=0 "
    "-q --device cpu"
)
CANARY = "open('canary', 'w').write('code of a folder ran')\nclass Config: pass\n"
LAZY = [
    *("timm", "transformers.models.bert", "fvcore.nn", "torch.utils.flop_counter", "sklearn.datasets", "sklearn.model_selection"),
    *(f"matplotlib.backends.backend_{name}" for name in ("agg", "pdf", "svg")),
    *("pyarrow.parquet", "pyarrow.compute", "pyarrow.ipc"),
]


def import_all() -> None:
    """Import eectl whole and what it imports late, so that children of this process need not."""
    for module in pkgutil.walk_packages(eectl.__path__, "eectl."):
        if module.name != "eectl.__main__":
            importlib.import_module(module.name)
    for name in LAZY:
        importlib.import_module(name)


def make_world(folder: Path) -> Path:
    """Fill an empty folder; returns it. Takes some seconds.

    `run/` is a finished run on digits with its policy, evaluation and bench; `half/` one that was stopped in its second phase,
    and `whole/` the same undisturbed; `photos/` holds classes of images and `photos-run/` a run on them; `texts.*` are tables
    and `text-run/` a run on them, `tiny/` its encoder and tokenizer; `decoder-run/` one with `decoder/`, which is cut layer by
    layer; `labels/` is a data set with files of labels, `idx/` one in arrays. `pictures.parquet`, `saved/train.arrow` and
    `shards/train-0.tar` hold the photos in other forms, `listed/` beside a file with the labels of each; `listed-run/` is a run
    on those and its policy.
    """
    _digits(folder)
    _half_a_run(folder)
    _photos(folder)
    _listed(folder)
    _stored(folder)
    _texts(folder)
    _labelled(folder / "labels")
    _indexed(folder / "idx")
    return folder


def _digits(folder: Path) -> None:
    run("train", "digits", *SMALL, *SHORT, "-o", "run", cwd=folder)
    model = "run/model.safetensors"
    run("calibrate-thresholds", model, "--save-predictions", "calibration.safetensors", cwd=folder)
    run("evaluate", model, "--policy", "run/policy.json", "-o", "run/evaluation.json", "--save-predictions", "test.safetensors",
          cwd=folder)  # fmt: skip
    run("bench", model, "--policy", "run/policy.json", "--batch-size", "4", "--rows", "8", "--seconds", "0.01", "-o",
          "run/bench.json", cwd=folder)  # fmt: skip
    (folder / "digits.yaml").write_bytes((folder / "run/recipe.yaml").read_bytes())
    for name in ("folder", "text"):
        (folder / f"{name}.yaml").write_bytes((ROOT / "recipes" / f"{name}.yaml").read_bytes())


def _half_a_run(folder: Path) -> None:
    """Stop a run where the rows of its second phase begin, in a process of its own, as a signal would."""
    line = ("train", "digits", *SMALL, *STOPPED)
    child = os.fork()
    if child == 0:
        opened = []

        def stop(event, arguments):
            if event == "open" and str(arguments[0]).endswith("metrics.jsonl") and arguments[1] == "a":
                opened.append(event)
                if len(opened) == 5:
                    os.kill(os.getpid(), signal.SIGTERM)  # SIGINT is ignored where a shell started this in the background

        sys.addaudithook(stop)
        try:
            run(*line, "-o", "half", cwd=folder, code=143)
        except BaseException as fault:  # a child must never go on with the tests of its parent
            print(f"the run that was to be stopped: {fault!r}", file=sys.stderr)
            os._exit(1)
        os._exit(0)
    assert os.waitstatus_to_exitcode(os.waitpid(child, 0)[1]) == 0
    assert (folder / "half/resume/state.safetensors").is_file()
    run(*line, "-o", "whole", cwd=folder)


def _photos(folder: Path) -> None:
    draw = np.random.default_rng(0)
    for channel, name in enumerate(("red", "green")):
        (folder / "photos" / name).mkdir(parents=True)
        for number in range(12):
            pixels = draw.integers(0, 90, (14, 12, 3), dtype=np.uint8)
            pixels[:, :, channel] += 150
            Image.fromarray(pixels).save(folder / "photos" / name / f"{number:02}.png")
    run("train", "--data", "photos", *PHOTOS, *SHORT, "-o", "photos-run", cwd=folder)
    _eye(folder / "eye")


def _eye(folder: Path) -> None:
    """Make a published image network of transformers."""
    import transformers

    config = transformers.AutoConfig.for_model("vit", **TINY_VIT)
    config.save_pretrained(folder)
    save_file(transformers.AutoModelForImageClassification.from_config(config).state_dict(), folder / "model.safetensors")
    sizes = {"size": {"shortest_edge": 14}, "crop_size": {"height": 12, "width": 12}, "do_center_crop": True, "resample": 3}
    constants = {"image_mean": [0.5, 0.4, 0.3], "image_std": [0.2, 0.2, 0.2]}
    processor = {"image_processor_type": "ViTImageProcessor"} | sizes | constants
    (folder / "preprocessor_config.json").write_text(json.dumps(processor))
    (folder / "canary.py").write_text(CANARY)


def _listed(folder: Path) -> None:
    """Copy the photos beside a file that says of each which of two labels it has."""
    (folder / "listed").mkdir()
    rows = []
    for number, path in enumerate(sorted((folder / "photos").glob("*/*.png"))):
        (folder / "listed" / f"{number}.png").write_bytes(path.read_bytes())
        tags = [path.parent.name, *(["even"] if number % 2 == 0 else [])]
        rows.append({"file_name": f"{number}.png", "tags": "|".join(tags)})
    write_csv(folder / "listed" / "metadata.csv", rows)
    run("train", *LISTED, *SHORT, "-o", "listed-run", cwd=folder)
    run("calibrate-thresholds", "listed-run/model.safetensors", "--budgets", "80", "--device", "cpu", cwd=folder)


def _stored(folder: Path) -> None:
    """Store the photos' files in a Parquet and an Arrow file and in a shard."""
    import pyarrow

    files = sorted((folder / "photos").glob("*/*.png"))
    rows = [
        {"image": {"bytes": path.read_bytes(), "path": path.name}, "label": path.parent.name, "tags": [path.parent.name, "all"]}
        for path in files
    ]
    _write_parquet(folder / "pictures.parquet", rows)
    table = pyarrow.Table.from_pylist(rows)
    for name in ("saved", "shards"):
        (folder / name).mkdir()
    with pyarrow.ipc.new_stream(str(folder / "saved/train.arrow"), table.schema) as writer:
        writer.write_table(table)
    with tarfile.open(folder / "shards/train-0.tar", "w") as archive:
        for number, row in enumerate(rows):
            tags = json.dumps({"tags": row["tags"], "share": number / 2}).encode()
            for ending, content in (("png", row["image"]["bytes"]), ("cls", row["label"].encode()), ("json", tags)):
                member = tarfile.TarInfo(f"{number:02}.{ending}")
                member.size = len(content)
                archive.addfile(member, io.BytesIO(content))


def _texts(folder: Path) -> None:
    import transformers

    rows = make_rows(60, longest=6)
    write_csv(folder / "texts.csv", rows)
    write_csv(folder / "texts.tsv", rows, delimiter="\t")
    write_jsonl(folder / "texts.jsonl", rows)
    _write_parquet(folder / "texts.parquet", rows)
    write_tokenizer(folder / "tiny")
    config = transformers.AutoConfig.for_model("bert", **TINY_BERT)
    config.save_pretrained(folder / "tiny")
    save_file(transformers.AutoModel.from_config(config).state_dict(), folder / "tiny/model.safetensors")
    transformers.AutoConfig.for_model("gemma3_text", **TINY_DECODER, head_dim=8).save_pretrained(folder / "decoder")
    for name in ("tiny", "decoder"):
        (folder / name / "canary.py").write_text(CANARY)
    run("train", "--data", "texts.csv", *TEXTS, *SHORT, "-o", "text-run", cwd=folder)
    run("train", "--backbone", "hf/./decoder", *DECODER, *SHORT, "-o", "decoder-run", cwd=folder)


def _labelled(folder: Path) -> None:
    """Make TinyImageNet as its archive unpacks, with two classes; its files of labels are texts."""
    wnids = ("n01443537", "n02002724")
    draw = np.random.default_rng(0)
    names = [f"train/{wnid}/images/{wnid}_{number}.JPEG" for wnid in wnids for number in range(6)]
    for name in [*names, *(f"val/images/val_{number}.JPEG" for number in range(4))]:
        (folder / name).parent.mkdir(parents=True, exist_ok=True)
        Image.fromarray(draw.integers(0, 250, (64, 64, 3), dtype=np.uint8)).save(folder / name)
    (folder / "val/val_annotations.txt").write_text(
        "".join(f"val_{each}.JPEG\t{wnids[each % 2]}\t0\t0\t9\t9\n" for each in range(4))
    )
    (folder / "wnids.txt").write_text("".join(f"{wnid}\n" for wnid in wnids))
    (folder / "words.txt").write_text("".join(f"{wnid}\tname of {wnid}\n" for wnid in wnids))


def _indexed(folder: Path) -> None:
    """Make MNIST as it is published, with 100 images in each part."""
    folder.mkdir()
    draw = np.random.default_rng(0)
    for part in ("train", "t10k"):
        images, labels = draw.integers(0, 250, (100, 28, 28), dtype=np.uint8), np.arange(100, dtype=np.uint8) % 10
        for name, array in ((f"{part}-images-idx3-ubyte", images), (f"{part}-labels-idx1-ubyte", labels)):
            head = bytes((0, 0, 8, array.ndim)) + np.array(array.shape, ">u4").tobytes()
            content = head + array.tobytes()
            if part == "train":
                (folder / f"{name}.gz").write_bytes(gzip.compress(content, mtime=0))
            else:
                (folder / name).write_bytes(content)


def _write_parquet(path: Path, rows: list[dict[str, object]]) -> None:
    import pyarrow
    import pyarrow.parquet

    pyarrow.parquet.write_table(pyarrow.Table.from_pylist(rows), path)
