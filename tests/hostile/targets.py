"""What is damaged and which command then reads it: a table with one line for each pair, and how an answer is compared.

A new reader or command is one more line. Nothing is run here.
"""

import json
import zlib
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from importlib.util import find_spec
from pathlib import Path
from random import Random
from typing import Any

from hostile.mutators import (
    damage_bytes,
    damage_config,
    damage_image,
    damage_json,
    damage_lines,
    damage_option,
    damage_recipe,
    damage_setting,
    damage_shard,
    damage_table,
    damage_tensors,
)
from hostile.sealing import seal_json, seal_tensors
from hostile.world import DECODER, EYE, LABELS, LISTED, PHOTOS, SHORT, SMALL, STOPPED, TEXTS, words

HAS_LOGS = find_spec("tensorboard") is not None  # only then a run logs to a tracker unasked
OPTION = "VALUE"  # stands in a line for the value of an option that is damaged


@dataclass(frozen=True)
class Target:
    """A file, or an option's value, that is damaged, and the line that reads it.

    Attributes:
        kind: what is damaged, as the table of results calls it.
        source: the file in the world's folder; for an option its text.
        line: the command, run from that folder; where it has the word `-` it reads the file from stdin.
        damage: what makes other bytes of the file's.
        needs: further files and folders that the line reads.
        writes: files and folders that it may make or change; a folder's name ends with a slash.
        seal: changes the file so that its digests are right: its schema alone can refuse it.
        answer: what the line gave, from its folder and its stdout; None: an accepted file may give another answer.
        many: the line may say several lines of `eectl: `: a recipe's mistakes, or inputs that cannot be read.
    """

    kind: str
    source: str
    line: tuple[str, ...]
    damage: Callable[[bytes, Random], bytes]
    needs: tuple[str, ...] = ()
    writes: tuple[str, ...] = ()
    seal: Callable[[Path, Random], bool] | None = None
    answer: Callable[[Path, str], Any] | None = None
    many: bool = False

    @property
    def name(self) -> str:
        """The kind and the command, for tables and reproductions."""
        return f"{self.kind}: {' '.join(self.line)}"

    @property
    def key(self) -> str:
        """A short name, the same wherever in the table the target stands."""
        return f"{self.kind.replace(' ', '-')}-{zlib.crc32(f'{self.name} {self.source}'.encode()):08x}"


def printed(_folder: Path, out: str) -> str:
    """Take what the line printed as its answer."""
    return out


def weights_of(path: str) -> Callable[[Path, str], Any]:
    """Take the weights in a checkpoint as the answer."""

    def answer(folder: Path, _out: str) -> str:
        from eectl.core.tensor_files import digest, read_any_tensors

        return digest(read_any_tensors(folder / path)[0])

    return answer


def written(path: str) -> Callable[[Path, str], Any]:
    """Take a JSON file that the line writes as the answer."""
    return lambda folder, _out: json.loads((folder / path).read_text())


MODEL, POLICY, TEST = "run/model.safetensors", "run/policy.json", "test.safetensors"
CPU = ("--device", "cpu")
PICTURES = "photos/red"


def _checkpoint() -> list[Target]:
    def target(line: str, *needs: str, **more: Any) -> Target:
        return Target("checkpoint", MODEL, words(line), damage_tensors, needs, seal=seal_tensors, **more)

    return [
        target(f"info {MODEL}", answer=printed),
        target(f"info {MODEL} --json"),  # shows the file's own words, whatever they are
        target(f"flops {MODEL}", answer=printed),
        target(f"evaluate {MODEL} --policy {POLICY} --device cpu", POLICY, answer=printed),
        target(f"evaluate {MODEL} --predictions {TEST} --device cpu", TEST, answer=printed),
        target(f"calibrate-thresholds {MODEL} -o p.json --device cpu", writes=("p.json",), answer=written("p.json")),
        target(f"bench {MODEL} --batch-size 2 --rows 4 --seconds 0.01 --device cpu"),
        target(f"predict {MODEL} {PICTURES}/00.png --device cpu", f"{PICTURES}/00.png", answer=printed, many=True),
        target(f"attach-heads {MODEL} --after 2 -o h.safetensors", writes=("h.safetensors",), answer=weights_of("h.safetensors")),
        target(f"train --from {MODEL} --phase 3 --dry-run --device cpu", many=True),  # mistakes of the recipe that it holds
        target(f"train --from {MODEL} --phase 3 --epochs 1 -o t -q --device cpu", writes=("t/",),
               answer=weights_of("t/model.safetensors"), many=True),
        target(f"analyze numerical-rank {MODEL} -o rank --device cpu -q", writes=("rank/",)),
        target(f"report {MODEL}", "run/evaluation.json", answer=printed),
        Target("checkpoint", "decoder-run/model.safetensors", words("flops decoder-run/model.safetensors"), damage_tensors,
               seal=seal_tensors, answer=printed),
    ]  # fmt: skip


def _resume() -> list[Target]:
    line = ("train", "digits", *SMALL, *STOPPED, "-o", "half")
    rest = {"needs": ("half",), "writes": ("half/",), "answer": weights_of("half/model.safetensors"), "many": True}
    return [
        Target("resume state", "half/resume/state.safetensors", line, damage_tensors, seal=seal_tensors, **rest),
        Target("metrics.jsonl", "half/metrics.jsonl", line, damage_lines, **rest),
        Target("recipe of a run", "half/recipe.yaml", line, damage_recipe, **rest),
        Target("phase checkpoint", "half/phase-1.safetensors", line, damage_tensors, **rest),
        *(
            [Target("how far trackers are", "half/resume/logs.json", line, damage_json, **rest)]
            if find_spec("tensorboard")
            else ()
        ),
    ]


def _measured() -> list[Target]:
    def predictions(line: str, source: str = TEST, **more: Any) -> Target:
        return Target("predictions", source, words(line), damage_tensors, (MODEL, POLICY), seal=seal_tensors, **more)

    def policy(line: str, *needs: str, **more: Any) -> Target:
        return Target("policy", POLICY, words(line), damage_json, (MODEL, *needs), seal=seal_json, **more)

    def evaluation(line: str, **more: Any) -> Target:
        return Target("evaluation", "run/evaluation.json", words(line), damage_json, seal=seal_json, **more)

    calibrated = f"calibrate-thresholds {MODEL} --predictions calibration.safetensors -o p.json --device cpu"
    timed = (
        f"calibrate-thresholds {MODEL} --cost latency:4 --bench run/bench.json --predictions calibration.safetensors -o p.json"
    )
    return [
        predictions(f"evaluate {MODEL} --policy {POLICY} --predictions {TEST} --device cpu", answer=printed),
        predictions(calibrated, "calibration.safetensors", writes=("p.json",), answer=written("p.json")),
        policy(f"evaluate {MODEL} --policy {POLICY} --predictions {TEST} --device cpu", TEST, answer=printed),
        policy(f"predict {MODEL} --policy {POLICY} --budget 50 {PICTURES} --device cpu", PICTURES, answer=printed, many=True),
        policy(f"bench {MODEL} --policy {POLICY} --batch-size 2 --rows 4 --seconds 0.01 --device cpu"),
        evaluation("report run", answer=printed),
        evaluation("report run/evaluation.json --format json", answer=printed),
        evaluation("report run -o t.md -o t.csv -o t.tex -o c.svg", writes=("t.md", "t.csv", "t.tex", "c.svg"), answer=printed),
        Target("bench", "run/bench.json", (*words(timed), *CPU), damage_json, (MODEL, "calibration.safetensors"), ("p.json",),
               seal=seal_json, answer=written("p.json")),
    ]  # fmt: skip


def _recipes() -> list[Target]:
    def recipe(source: str, line: str, *needs: str) -> Target:
        return Target("recipe", source, words(line), damage_recipe, needs, many=True)

    photos = "--data-root photos --backbone resnet20 --set data.image_size=12 --set data.workers=0"
    texts = "--data texts.csv --text text --target mood --backbone hf/./tiny --set data.tokenizer=./tiny --set data.max_length=12"
    return [
        recipe("digits.yaml", "train digits.yaml --dry-run --device cpu"),
        recipe("digits.yaml", "train digits.yaml --dry-run --full --device cpu"),
        recipe("digits.yaml", "flops digits.yaml"),
        recipe("folder.yaml", f"train folder.yaml {photos} --dry-run --device cpu", "photos"),
        recipe("text.yaml", f"train text.yaml {texts} --set exits.after=[1] --dry-run --device cpu", "texts.csv", "tiny"),
    ]


def _options() -> list[Target]:
    def option(text: str, line: str, *needs: str, writes: tuple[str, ...] = ()) -> Target:
        return Target("option", text, words(line), damage_option, needs, writes, many=True)

    keys = [
        *(
            "optimizer.lr=0.001",
            "exits.after=[1]",
            "exits.head=linear",
            "loss_weights=[1, 2]",
            "epochs=2",
            "patience=1",
            "seed=1",
        ),
        *("data.limit=100", "data.augment={crop: 1, mixup: 0.2}", "data.image_size=8", "data.split_seed=1", "eval_batch_size=20"),
        *("data.normalize={mean: [0.5], std: [0.2]}", "schedule={name: cosine}", "phases={3: {lr: 0.001}}", "precision=float32"),
        *("backbone.name=resnet20", "backbone.args={width: 1}", "backbone.drop_path=0.1", "backbone.dropout=0.1"),
        *("data.augment={rand_augment: {ops: 2, magnitude: 9}, repeats: 3}", "data.augment={auto_augment: svhn}"),
        "data.augment={three_augment: true, color_jitter: 0.3}",
    ]
    sets = [
        Target("--set", each, ("train", "digits", *SMALL, "--dry-run", "--set", OPTION), damage_setting, many=True)
        for each in keys
    ]
    small = "{num_hidden_layers: 2, hidden_size: 16, num_attention_heads: 2, pad_token_id: 0, num_key_value_heads: 2}"
    networks = {  # what is damaged alone: without a size, a network is as large as published ones are
        "rope_parameters={rope_type: linear, factor: 2.0, rope_theta: 100.0}": ("hf/llama", small),
        "hidden_size=16": ("hf/llama", small),
        "pad_token_id=0": ("hf/qwen3", small),
        "layer_types=[full_attention, sliding_attention]": ("hf/modernbert", small.replace(", num_key_value_heads: 2", "")),
        "num_experts_per_tok=1": ("hf/qwen3_moe", small),
        "attention_window=4": ("hf/longformer", small.replace(", num_key_value_heads: 2", "")),
        "n_head=2": ("hf/gpt2", "{n_layer: 2, n_embd: 16, n_head: 2, pad_token_id: 0}"),
    }
    sets += [
        Target("--set", f"backbone.args.{option}", ("train", "--backbone", name, *DECODER, "--set", f"backbone.args={args}",
               "--dry-run", "--set", OPTION), damage_setting, ("texts.csv", "tiny"), many=True)
        for option, (name, args) in networks.items()
    ]  # fmt: skip
    small = "{num_hidden_layers: 2, hidden_size: 16, num_attention_heads: 2, intermediate_size: 16, patch_size: 4}"
    stages = "{embed_dim: 8, depths: [1, 1], num_heads: [1, 2], window_size: 2, patch_size: 2}"
    networks = {
        "patch_size=4": ("hf/vit", small),
        "image_size=8": ("hf/dinov2", small.replace("intermediate_size: 16, ", "")),
        "num_channels=1": ("hf/siglip", small),
        "depths=[1, 1]": ("hf/swin", stages),
        "hidden_sizes=[8, 8]": ("hf/convnext", "{hidden_sizes: [8, 8], depths: [1, 1], num_stages: 2, patch_size: 2}"),
    }
    sets += [
        Target("--set", f"backbone.args.{option}", ("train", "digits", "--backbone", name, *SMALL, "--set", "exits.after=[0]",
               "--set", f"backbone.args={args}", "--dry-run", "--set", OPTION), damage_setting, many=True)
        for option, (name, args) in networks.items()
    ]  # fmt: skip
    others = [
        option("25,50,75", f"evaluate {MODEL} --predictions {TEST} --budgets {OPTION} --device cpu", MODEL, TEST),
        option("25,50", f"calibrate-thresholds {MODEL} --budgets {OPTION} -o p.json --device cpu", MODEL, writes=("p.json",)),
        option("max-softmax", f"evaluate {MODEL} --predictions {TEST} --criterion {OPTION} --device cpu", MODEL, TEST),
        option("1,3", f"attach-heads {MODEL} --after {OPTION} -o h.safetensors", MODEL, writes=("h.safetensors",)),
        option("every-2", f"attach-heads {MODEL} --placement {OPTION} -o h.safetensors", MODEL, writes=("h.safetensors",)),
        option("linear", f"attach-heads {MODEL} --after 1 --head {OPTION} -o h.safetensors", MODEL, writes=("h.safetensors",)),
        option("1", f"attach-heads {MODEL} --after 1 --seed {OPTION} -o h.safetensors", MODEL, writes=("h.safetensors",)),
        option("2", f"bench {MODEL} --batch-size {OPTION} --rows 4 --seconds 0.01 --device cpu", MODEL),
        option("4", f"bench {MODEL} --batch-size 2 --rows {OPTION} --seconds 0.01 --device cpu", MODEL),
        option("0", f"bench {MODEL} --batch-size 2 --rows 4 --seed {OPTION} --seconds 0.01 --device cpu", MODEL),
        option("cpu", f"evaluate {MODEL} --predictions {TEST} --device {OPTION}", MODEL, TEST),
        option("float32", f"evaluate {MODEL} --predictions {TEST} --precision {OPTION} --device cpu", MODEL, TEST),
        option("macs", f"calibrate-thresholds {MODEL} --cost {OPTION} -o p.json --device cpu", MODEL, "run/bench.json",
               writes=("p.json",)),
        option("photos", f"train --data {OPTION} --backbone resnet20 --dry-run --device cpu", "photos"),
        option("run", f"report {OPTION}", "run/evaluation.json"),
        option("10", f"report run --published {OPTION}", "run/evaluation.json"),
        option("mcc", f"report run --measure {OPTION}", "run/evaluation.json"),
        option("run=x", f"report run --label {OPTION}", "run/evaluation.json"),
        option("50", f"predict {MODEL} --policy {POLICY} --budget {OPTION} {PICTURES}/00.png --device cpu", MODEL, POLICY,
               PICTURES),
        option("2", f"predict {MODEL} --top {OPTION} {PICTURES}/00.png --device cpu", MODEL, PICTURES),
        option(MODEL, f"info {OPTION}", MODEL),
        option("digits", f"flops {OPTION}"),
        option("joint", f"train digits --dry-run --device cpu --regime {OPTION}"),
        option("0", f"train digits --dry-run --device cpu --seed {OPTION}"),
        option("none", f"train digits --dry-run --device cpu --track-to {OPTION}"),
        option("1", f"train digits --dry-run --device cpu --epochs {OPTION}"),
        option("run/evaluation.json", f"report {OPTION}", "run/evaluation.json"),
    ]  # fmt: skip
    return [*sets, *others]


def _data() -> list[Target]:
    learn = ("train", "--data")
    answer_texts = ("predict", "text-run/model.safetensors")

    def table(kind: str, *line: str) -> Target:
        return Target(kind, f"texts.{kind}", line, _TABLES[kind], ("text-run/model.safetensors", "tiny"), many=True)

    def image(*line: str, writes: tuple[str, ...] = ()) -> Target:
        needs = ("photos", "photos-run/model.safetensors")
        return Target("image", f"{PICTURES}/03.png", line, damage_image, needs, writes, many=True)

    def encoder(kind: str, name: str, *line: str) -> Target:
        needs = ("texts.csv", "text-run/model.safetensors", "tiny")
        return Target(kind, f"tiny/{name}", line, damage_config, needs, many=True)

    def labels(name: str) -> Target:
        line = "--set data.name=tinyimagenet --set data.root=labels --set data.workers=0"
        line += " --set data.validation=0.25 --set data.calibration=0.25"
        return Target(
            "label file",
            f"labels/{name}",
            ("train", "digits", *words(line), *SMALL, *SHORT, "-o", "r"),
            damage_table,
            ("labels",),
            ("r/",),
            many=True,
        )

    def arrays(name: str) -> Target:
        line = words("--set data.name=mnist --set data.root=idx --set data.validation=0.2 --set data.calibration=0.2")
        return Target(
            "idx", f"idx/{name}", ("train", "digits", *line, *SMALL, *SHORT, "-o", "r"), damage_bytes, ("idx",), ("r/",)
        )

    def stored(kind: str, source: str, damage: Callable[[bytes, Random], bytes], *line: str) -> list[Target]:
        run = ("train", *line, *PHOTOS, *SHORT)
        return [
            Target(kind, source, (*run, "--dry-run"), damage, many=True),
            Target(kind, source, (*run, "-o", "r"), damage, (), ("r/",), many=True),
        ]

    files = [("config.json", "config.json"), ("tokenizer", "tokenizer.json"), ("tokenizer", "tokenizer_config.json")]
    return [
        *(table(kind, *learn, f"texts.{kind}", *TEXTS, "--dry-run") for kind in _TABLES),
        *(table(kind, *answer_texts, f"texts.{kind}", "--text", "text", *CPU) for kind in _TABLES),
        Target("stdin", "texts.tsv", (*answer_texts, "-", *CPU), damage_table, (answer_texts[1], "tiny"), many=True),
        *(arrays(name) for name in ("train-images-idx3-ubyte.gz", "train-labels-idx1-ubyte.gz", "t10k-labels-idx1-ubyte")),
        *(labels(name) for name in ("wnids.txt", "words.txt", "val/val_annotations.txt")),
        Target(
            "weights",
            "tiny/model.safetensors",
            (*learn, "texts.csv", *TEXTS, *SHORT, "--weights", "tiny/model.safetensors", "-o", "r"),
            damage_tensors,
            ("texts.csv", "tiny"),
            ("r/",),
            many=True,
        ),
        image(*learn, "photos", *PHOTOS, *SHORT, "--dry-run"),
        image(*learn, "photos", *PHOTOS, *SHORT, "-o", "r", writes=("r/",)),
        Target(
            "listed images", "listed/metadata.csv", ("train", *LISTED, *SHORT, "--dry-run"), damage_table, ("listed",), many=True
        ),
        Target(
            "policy",
            "listed-run/policy.json",
            words("predict listed-run/model.safetensors --policy listed-run/policy.json listed/0.png --device cpu"),
            damage_json,
            ("listed-run/model.safetensors", "listed"),
            seal=seal_json,
            answer=printed,
            many=True,
        ),
        image("evaluate", "photos-run/model.safetensors", *CPU),
        *stored("Parquet of images", "pictures.parquet", damage_bytes, "folder", "--data-root", "pictures.parquet"),
        *stored("Arrow of images", "saved/train.arrow", damage_bytes, "--data", "hfds/./saved"),
        *stored("shard", "shards/train-0.tar", damage_shard, "--data", "shards"),
        *stored("labels in Arrow", "saved/train.arrow", damage_bytes, "--data", "hfds/./saved", *LABELS),
        *stored("labels in shards", "shards/train-0.tar", damage_bytes, "--data", "shards", *LABELS),
        image("predict", "photos-run/model.safetensors", "photos", *CPU),
        *(encoder(*file, *learn, "texts.csv", *TEXTS, "--dry-run") for file in files),
        Target(
            "config.json",
            "decoder/config.json",
            ("train", "--backbone", "hf/./decoder", *DECODER, "--dry-run"),
            damage_config,
            ("texts.csv", "tiny", "decoder"),
            many=True,
        ),
        *(
            Target("config.json", f"eye/{name}", ("train", *EYE, "--dry-run"), damage_config, ("photos", "eye"), many=True)
            for name in ("config.json", "preprocessor_config.json")
        ),
        *(encoder(*file, *answer_texts, "texts.csv", "--text", "text", *CPU) for file in files),
    ]


_TABLES: Mapping[str, Callable[[bytes, Random], bytes]] = {
    "csv": damage_table,
    "tsv": damage_table,
    "jsonl": damage_lines,
    "parquet": damage_bytes,
}


def all_targets() -> list[Target]:
    """Return every line of the table."""
    return [*_checkpoint(), *_resume(), *_measured(), *_recipes(), *_options(), *_data()]
