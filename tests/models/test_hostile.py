"""Checkpoints and folders that were damaged, or made to do harm: one line, soon, in little memory, and nothing of theirs runs."""

import copy
import json
import resource
import time
from dataclasses import asdict

import pytest
import torch

from eectl.core.errors import EectlError
from eectl.core.tensor_files import digest, write_tensors
from eectl.data.splits import DataInfo
from eectl.models.build import attach_exits, build_backbone, build_model, model_spec
from eectl.models.checkpoint import About, load_checkpoint, read_about, save_checkpoint
from eectl.recipe.recipe import BackboneSection, ModelSpec, Recipe

CLASSES = tuple("abc")
PHASE = {
    "phase": 2,
    "title": "everything",
    "regime": "joint",
    "exits": [1, 2],
    "heads": [1],
    "epochs": 2,
    "restored_epoch": 1,
    "stopped_by": "epochs",
    "validation": {"score": [0.5, 0.5], "loss": [1.0, None]},
    "seed": 0,
}


@pytest.fixture(scope="module")
def whole(tmp_path_factory):
    """A sound checkpoint: its path, its weights, and all that it says."""
    section = BackboneSection(name="resnet20")
    backbone = build_backbone(section, input_shape=(1, 8, 8), num_outputs=3)
    model = attach_exits(backbone, after=[4], heads="sdn", num_outputs=3, input_shape=(1, 8, 8))
    spec = model_spec(model, section, input_shape=(1, 8, 8), num_outputs=3)
    info = asdict(DataInfo("digits", CLASSES, (1, 8, 8), (0.5,), (0.5,)))
    splits = {name: {"size": 9, "fingerprint": name} for name in ("train", "validation")}
    about = About(spec, Recipe().model_dump(mode="json"), info, splits, [{"attached": [4], "head": "sdn"}, PHASE])
    path = tmp_path_factory.mktemp("checkpoint") / "m.safetensors"
    weights = save_checkpoint(path, model, about)
    versions = {"torch": "2", "eectl": "0"}
    said = {
        "kind": "checkpoint",
        "schema": 1,
        "weights": weights,
        "versions": versions,
        **json.loads(json.dumps(about.to_json())),
    }
    return path, model.state_dict(), said


def changed(said, place, value):
    """What a header says with one value, at a dotted place, changed; `...` takes it out."""
    said = copy.deepcopy(said)
    *above, last = [int(part) if part.isdecimal() else part for part in place.split(".")]
    target = said
    for part in above:
        target = target[part]
    if value is ...:
        del target[last]
    else:
        target[last] = value
    return said


def test_a_sound_checkpoint_is_read(whole, tmp_path):
    path, tensors, said = whole
    write_tensors(tmp_path / "m", tensors, said)
    assert load_checkpoint(tmp_path / "m").digest == load_checkpoint(path).digest
    assert read_about(tmp_path / "m").untrained == []


HEADERS = [
    ("weights", ..., "weights"),
    ("weights", 3, "weights"),
    ("versions", "2", "versions"),
    ("versions", {"torch": 2}, "versions.torch"),
    ("model", ..., "model"),
    ("model.num_outputs", 10**8, "num_outputs|outputs"),
    ("model.num_outputs", True, "num_outputs"),
    ("model.num_outputs", "3", "num_outputs"),
    ("model.heads", [], "heads"),
    ("model.after", [4, 5], "heads for 2 exits"),
    ("model.after", [-1], "after"),
    ("model.input_shape", [1], "input_shape"),
    ("model.input_shape", [1, 8, 9], "data of"),
    ("model.surprise", 1, "surprise"),
    ("recipe", [], "recipe"),
    ("recipe.regime", ..., "recipe.regime"),
    ("recipe.seed", "0", "recipe.seed"),
    ("recipe.data", {"name": "nothing"}, "recipe.data"),
    ("recipe.eval_batch_size", 0, "eval_batch_size"),
    ("recipe.eval_batch_size", 10**20, "digits|eval_batch_size"),
    ("recipe.channels_last", "maybe", "channels_last"),
    ("data.task", "segmentation", "data.task"),
    ("data.classes", [["a"], "b", "c"], "data.classes.0"),
    ("data.classes", ["a", "b"], "3 outputs for data of 2"),
    ("data.mean", [0.5, 0.5], "2 means"),
    ("data.std", [0.0], "data.std"),
    ("splits", {"train": 3}, "splits.train"),
    ("splits.train.size", -1, "splits.train.size"),
    ("history", [7], "history.0"),
    ("history.1.validation", {"score": [0.5], "loss": [0.5, 1]}, "1 scores and 2 losses"),
    ("history.1.restored_epoch", None, "history.1"),
    ("history", [PHASE] * 10_001, "history"),
    ("parent", 5, "parent"),
]


@pytest.mark.parametrize(("place", "value", "words"), HEADERS, ids=[f"{place}={value!s:.20}" for place, value, _ in HEADERS])
def test_a_header_that_says_nonsense(whole, tmp_path, place, value, words):
    """With a digest that is right: whoever writes such a file computes it too."""
    _, tensors, said = whole
    write_tensors(tmp_path / "m", tensors, changed(said, place, value))
    started = time.process_time()
    with pytest.raises(EectlError, match=words) as error:
        load_checkpoint(tmp_path / "m")
    assert "\n" not in str(error.value) and len(str(error.value)) < 700 and str(error.value).startswith(str(tmp_path / "m"))
    assert time.process_time() - started < 5


@pytest.mark.parametrize(
    ("name", "args", "shape"),
    [
        ("timm/vit_tiny_patch16_224", {"depth": 10**6}, (1, 16, 16)),  # most of the time is its list of drop rates
        ("timm/vit_tiny_patch16_224", {"embed_dim": 3 * 10**5}, (1, 16, 16)),
        ("vit", {"depth": 10**6}, (1, 32, 32)),
        ("msdnet", {"blocks": 10**6}, (1, 32, 32)),
        ("hf/bert", {"num_hidden_layers": 10**6}, (3, 8)),
        ("hf/bert", {"vocab_size": 10**9}, (3, 8)),
    ],
)
def test_a_network_is_built_as_large_as_its_weights_and_no_larger(whole, tmp_path, name, args, shape):
    _, tensors, said = whole
    said = changed(changed(said, "model.backbone.name", name), "model.backbone.args", args)
    said = changed(changed(said, "model.input_shape", list(shape)), "data.input_shape", list(shape))
    if len(shape) == 2:
        said = changed(changed(changed(said, "data.kind", "text"), "data.mean", []), "data.std", [])
    write_tensors(tmp_path / "m", tensors, said)
    load_library(name)
    before, started = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss, time.process_time()
    with pytest.raises(EectlError) as error:
        load_checkpoint(tmp_path / "m")
    assert "\n" not in str(error.value) and "m: " in str(error.value)
    assert time.process_time() - started < 10  # twice what it may take on a machine that does nothing else
    assert resource.getrusage(resource.RUSAGE_SELF).ru_maxrss - before < 1_000_000  # kilobytes


def load_library(name):
    """Import what builds a network, whose time is not the file's fault."""
    with pytest.raises(EectlError):
        build_backbone(BackboneSection(name=name, args={"no such": 1}), input_shape=(3, 8), num_outputs=2)
    with pytest.raises(EectlError):
        build_backbone(BackboneSection(name=name, args={"no such": 1}), input_shape=(3, 8, 8), num_outputs=2)


def test_weights_of_other_shapes_are_one_line(whole, tmp_path):
    _, tensors, said = whole
    name = next(iter(tensors))
    said = {key: value for key, value in said.items() if key != "weights"}
    for odd in ({**tensors, name: tensors[name].flatten()}, {**tensors, "more": torch.zeros(1)}):
        write_tensors(tmp_path / "m", odd, {**said, "weights": digest(odd)})
        with pytest.raises(EectlError, match="do not fit resnet20 as it is built here"):
            load_checkpoint(tmp_path / "m")


def test_code_beside_a_configuration_does_not_run(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    folder = tmp_path / "evil"
    folder.mkdir()
    (folder / "evil.py").write_text("open('ran', 'w')\nfrom transformers import BertConfig as Config, BertModel as Model\n")
    small = {"hidden_size": 16, "num_attention_heads": 2, "num_hidden_layers": 1, "architectures": ["Model"]}
    for kind in ("x", "bert"):
        config = {"model_type": kind, "auto_map": {"AutoConfig": "evil.Config", "AutoModel": "evil.Model"}} | small
        (folder / "config.json").write_text(json.dumps(config))
        try:
            build_backbone(BackboneSection(name="hf/./evil"), input_shape=(3, 8), num_outputs=2)
        except EectlError as error:
            assert "\n" not in str(error)
        else:
            assert kind == "bert"
        assert not (tmp_path / "ran").exists()


def test_a_checkpoint_names_no_folder(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    (tmp_path / "mine").mkdir()
    (tmp_path / "mine" / "config.json").write_text('{"model_type": "bert"}')
    for name in ("hf/mine", "hf/./mine", "hf/someone/network"):
        spec = ModelSpec(backbone=BackboneSection(name=name), input_shape=(3, 8), num_outputs=2)
        with pytest.raises(EectlError, match="unknown kind of network"):
            build_model(spec)


@pytest.mark.parametrize(
    "config",
    [
        '{"model_type": 5}',
        '[{"model_type": "bert"}]',
        '{"model_type": "bert", "hidden_size": "wide"}',
        '{"model_type": "bert", "hidden_size": -4}',
        '{"model_type": "bert", "hidden_size": 100000000}',
        '{"model_type": "bert", "num_hidden_layers": 1000000}',
        '{"model_type": "bert", "x": ' + "[" * 100_000 + "]" * 100_000 + "}",
        '{"model_type": "bert", "hidden_act": {"a": 1}}',
        '{"model_type": "bert", "vocab_size": NaN}',
    ],
    ids=lambda text: text[:60],
)
def test_a_configuration_that_says_nonsense(tmp_path, config):
    (tmp_path / "config.json").write_text(config)
    with pytest.raises(EectlError):
        build_backbone(BackboneSection(name="hf/no-such"), input_shape=(3, 8), num_outputs=2)  # imports the library
    started, before = time.process_time(), resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
    with pytest.raises(EectlError) as error:
        build_backbone(BackboneSection(name=f"hf/{tmp_path}"), input_shape=(3, 8), num_outputs=2)
    assert "\n" not in str(error.value) and len(str(error.value)) < 1000
    assert time.process_time() - started < 8
    assert resource.getrusage(resource.RUSAGE_SELF).ru_maxrss - before < 1_000_000  # kilobytes
