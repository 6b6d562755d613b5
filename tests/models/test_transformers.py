"""Text encoders: masks, names and weights, what a checkpoint needs to rebuild one, and what is said of names that do not work."""

import json
import shutil
from dataclasses import asdict
from pathlib import Path

import pytest
import torch
import transformers
from safetensors.torch import load_file, save_file
from torch import Tensor

from eectl.core.errors import EectlError
from eectl.data.splits import DataInfo
from eectl.exits.costs import measure_costs
from eectl.models.adapters.transformers_parts import ADAPTERS, TextFeature
from eectl.models.backbone import Backbone
from eectl.models.build import attach_exits, build_backbone, model_spec
from eectl.models.checkpoint import About, load_checkpoint, save_checkpoint
from eectl.models.multi_exit import MultiExitModel
from eectl.recipe.recipe import BackboneSection, Recipe

SMALL = {
    **{"vocab_size": 40, "hidden_size": 32, "num_hidden_layers": 2, "num_attention_heads": 4, "intermediate_size": 48},
    "max_position_embeddings": 16,
}
DISTIL = {"vocab_size": 40, "dim": 32, "n_layers": 2, "n_heads": 4, "hidden_dim": 48, "max_position_embeddings": 16}
RELATIVE = {"relative_attention": True, "pos_att_type": ["p2c", "c2p"], "position_biased_input": False}
FAMILIES = {
    **dict.fromkeys(("bert", "roberta", "xlm-roberta", "camembert"), SMALL),
    "distilbert": DISTIL,
    **dict.fromkeys(("albert", "electra"), SMALL | {"embedding_size": 16}),
    **dict.fromkeys(("deberta", "deberta-v2"), SMALL | RELATIVE),
}


def build(name: str, *, max_length: int = 8, num_outputs: int = 3, **section: object) -> Backbone:
    torch.manual_seed(0)
    return build_backbone(BackboneSection(name=name, **section), input_shape=(3, max_length), num_outputs=num_outputs).eval()


def text(*lengths: int, width: int) -> Tensor:
    """Rows of these real lengths, padded to `width`."""
    rows = torch.zeros(len(lengths), 3, width, dtype=torch.int64)
    for row, length in zip(rows, lengths, strict=True):
        row[0] = torch.randint(2, 40, (width,), generator=torch.Generator().manual_seed(length))
        row[1, :length] = 1
    return rows


def library_encoder(model_type: str, folder: Path, *, head: str = "AutoModel", **options: object) -> torch.nn.Module:
    """What transformers itself saves: config.json and model.safetensors."""
    torch.manual_seed(1)
    config = transformers.AutoConfig.for_model(model_type, **FAMILIES[model_type], **options)
    net = getattr(transformers, head).from_config(config)
    net.save_pretrained(folder)
    return net.eval()


def test_every_family_is_tried() -> None:
    assert FAMILIES.keys() == ADAPTERS.keys()


@pytest.mark.parametrize("family", FAMILIES)
def test_padding_changes_nothing(family: str) -> None:
    """Neither what it holds nor, within rounding, how much there is of it; both for logits and for features."""
    backbone = build(f"hf/{family}", args=FAMILIES[family])
    rows = text(3, 8, width=8)
    other = rows.clone()
    other[0, 0, 3:] = torch.tensor([7, 5, 30, 2, 9])
    with torch.inference_mode():
        hidden = [backbone.block(0, backbone.stem(each)) for each in (rows, other, rows[:1, :, :3])]
        pooled = [backbone.feature(each).pooled()[0] for each in hidden]
        assert torch.equal(backbone(rows), backbone(other))
        torch.testing.assert_close(backbone(rows)[:1], backbone(rows[:1, :, :3]), rtol=1e-4, atol=1e-5)
    assert torch.equal(pooled[0], pooled[1])
    torch.testing.assert_close(pooled[0], pooled[2], rtol=1e-4, atol=1e-5)


def test_a_rows_logits_do_not_depend_on_its_neighbours_padding() -> None:
    backbone = build("hf/bert", args=SMALL)
    rows = text(8, 5, 7, width=8)
    with torch.inference_mode():
        beside_itself, beside_a_short_one = backbone(rows[[0, 0]]), backbone(rows[[0, 1]])
    assert torch.equal(beside_itself[0], beside_a_short_one[0])


def test_the_example_is_of_real_tokens() -> None:
    """Costs are those of a full row, and a row of padding alone has no softmax."""
    assert build("hf/bert", args=SMALL).example((3, 4)).tolist() == [[[0] * 4, [1] * 4, [0] * 4]]


def test_the_feature_is_a_masked_mean() -> None:
    x = torch.tensor([[[2.0], [4.0], [99.0]], [[3.0], [3.0], [9.0]]])
    feature = TextFeature(x, torch.tensor([[True, True, False], [True, True, True]]))
    assert feature.pooled().tolist() == [[3.0], [5.0]]
    assert feature.cls().tolist() == [[2.0], [3.0]]


@pytest.mark.parametrize("family", FAMILIES)
@pytest.mark.parametrize("way", ["pretrained", "weights"])
def test_an_encoder_without_a_head_is_loaded(family: str, way: str, tmp_path: Path) -> None:
    """Its names lack the library's prefix; the tokens after the last layer are then the library's, bit for bit."""
    encoder = library_encoder(family, tmp_path)
    assert not any(key.startswith(encoder.base_model_prefix) for key in load_file(tmp_path / "model.safetensors"))
    start = {"pretrained": True} if way == "pretrained" else {"weights": tmp_path / "model.safetensors"}
    backbone = build(f"hf/{tmp_path}", **start)
    rows = text(8, 5, width=8)
    with torch.inference_mode():
        hidden = backbone.stem(rows)
        for index in range(backbone.depth):
            hidden = backbone.block(index, hidden)
        assert torch.equal(hidden.x, encoder(input_ids=rows[:, 0], attention_mask=rows[:, 1]).last_hidden_state)
    has_pooler = family in ("bert", "albert")
    assert backbone.fresh and all(backbone.locate(key) == backbone.depth for key in backbone.fresh)
    assert any("pooler" in key for key in backbone.fresh) == (not has_pooler and any("pooler" in n for n in backbone.head_names))


@pytest.mark.parametrize("way", ["pretrained", "weights"])
@pytest.mark.parametrize("family", ["bert", "roberta", "deberta-v2"])
def test_a_language_models_weights_are_loaded_without_its_head(family: str, way: str, tmp_path: Path) -> None:
    library = library_encoder(family, tmp_path, head="AutoModelForMaskedLM").state_dict()
    start = {"pretrained": True} if way == "pretrained" else {"weights": tmp_path / "model.safetensors"}
    backbone = build(f"hf/{tmp_path}", **start)
    shared = [key for key in backbone.net.state_dict() if key in library]
    assert len(shared) > 20 and set(backbone.net.state_dict()) - set(shared) == set(backbone.fresh)
    assert all(torch.equal(tensor, library[key]) for key, tensor in backbone.net.state_dict().items() if key in shared)


@pytest.mark.parametrize("way", ["pretrained", "weights"])
def test_a_classifier_of_the_same_size_is_kept_and_another_is_fresh(way: str, tmp_path: Path) -> None:
    library = library_encoder("roberta", tmp_path, head="AutoModelForSequenceClassification", num_labels=3).state_dict()
    start = {"pretrained": True} if way == "pretrained" else {"weights": tmp_path / "model.safetensors"}
    same, other = (build(f"hf/{tmp_path}", num_outputs=count, **start) for count in (3, 1))
    assert same.fresh == ()
    assert torch.equal(same.net.classifier.out_proj.weight, library["classifier.out_proj.weight"])
    assert other.fresh == ("classifier.out_proj.weight", "classifier.out_proj.bias")
    assert torch.equal(other.net.classifier.dense.weight, library["classifier.dense.weight"])
    assert other(text(8, 5, width=8)).shape == (2, 1)


def test_half_precision_weights_become_float32(tmp_path: Path) -> None:
    library_encoder("bert", tmp_path)
    half = {key: tensor.half() for key, tensor in load_file(tmp_path / "model.safetensors").items()}
    save_file(half, tmp_path / "model.safetensors", metadata={"format": "pt"})
    config = json.loads((tmp_path / "config.json").read_text())
    (tmp_path / "config.json").write_text(json.dumps(config | {"dtype": "float16", "torch_dtype": "float16"}))
    for pretrained in (True, False):
        backbone = build(f"hf/{tmp_path}", pretrained=pretrained)
        assert {parameter.dtype for parameter in backbone.parameters()} == {torch.float32}


def test_a_folder_without_pretrained_gives_its_configuration_and_fresh_weights(tmp_path: Path) -> None:
    encoder = library_encoder("electra", tmp_path, hidden_dropout_prob=0.3)
    backbone = build(f"hf/{tmp_path}", args={"attention_probs_dropout_prob": 0.2})
    assert backbone.net.electra.encoder.layer[0].output.dropout.p == 0.3
    assert backbone.net.electra.encoder.layer[0].attention.self.dropout.p == 0.2
    weight = "encoder.layer.0.intermediate.dense.weight"
    assert not torch.equal(backbone.net.electra.get_parameter(weight), encoder.get_parameter(weight))


@pytest.mark.parametrize("family", FAMILIES)
def test_a_checkpoint_rebuilds_without_folder_and_network(family: str, tmp_path: Path) -> None:
    folder = tmp_path / "library"
    library_encoder(family, folder, pad_token_id=3)
    section = BackboneSection(name=f"hf/{folder}", pretrained=True)
    torch.manual_seed(0)
    backbone = build_backbone(section, input_shape=(3, 8), num_outputs=3)
    model = attach_exits(backbone, after=[1], heads="mlp-6", num_outputs=3, input_shape=(3, 8)).eval()
    spec = model_spec(model, section, input_shape=(3, 8), num_outputs=3)
    assert spec.backbone.name == f"hf/{family}" and not spec.backbone.pretrained and str(folder) not in spec.model_dump_json()
    data = DataInfo("text", ("a", "b", "c"), spec.input_shape, (), (), kind="text")
    save_checkpoint(tmp_path / "net.safetensors", model, About(spec, Recipe().model_dump(mode="json"), asdict(data), {}, []))
    for file in folder.iterdir():
        file.unlink()
    again = load_checkpoint(tmp_path / "net.safetensors").model
    rows = text(8, 5, width=8)
    for expected, found in zip(model(rows), again(rows), strict=True):
        assert torch.equal(expected.logits, found.logits)


def test_shared_layers_belong_to_the_first_blocks_that_run_them() -> None:
    """ALBERT's one group: a frozen first segment freezes every layer, and a trained one changes what the others compute."""
    backbone = build("hf/albert", args=FAMILIES["albert"] | {"num_hidden_layers": 3})
    group = "albert.encoder.albert_layer_groups.0.albert_layers.0"
    assert [backbone.locate(f"{group}.{name}") for name in ("attention.query.weight", "ffn.weight")] == [0, 1]
    assert backbone.block_names[2:] == ((), (), (), ())
    model = MultiExitModel(backbone)
    assert {model.part(name) for name, _ in model.named_parameters()} == {("segment", 1)}


@pytest.mark.parametrize("length", [8, 128])
def test_berts_costs_by_hand(length: int) -> None:
    """BERT-base, 768 wide: four projections and two products of attention, two layers of 3,072; pooler and classifier read one
    token. Embeddings cost nothing.
    """
    attention = 4 * length * 768**2 + 2 * length**2 * 768
    feed_forward = 2 * length * 768 * 3072
    head = 768**2 + 768 * 20
    backbone = build("hf/bert", max_length=length, num_outputs=20, args={"num_hidden_layers": 2})
    model = attach_exits(backbone, after=[0, 1], heads="linear", num_outputs=20, input_shape=(3, length))
    costs = measure_costs(model, (3, length))
    assert costs.plain == 2 * (attention + feed_forward) + head
    assert costs.exits[:2] == (attention + 768 * 20, attention + feed_forward + 2 * 768 * 20)


@pytest.mark.parametrize(
    ("name", "max_length", "args", "limit"),
    [
        ("bert", 17, {}, 16),
        ("roberta", 15, {}, 14),
        ("roberta", 14, {"pad_token_id": 2}, 13),
        ("deberta-v2", 500, RELATIVE, None),
    ],
)
def test_texts_longer_than_the_positions(name: str, max_length: int, args: dict[str, object], limit: int | None) -> None:
    """RoBERTa's positions start behind its padding id; relative ones have no end."""
    if limit is None:
        assert build(f"hf/{name}", max_length=max_length, args=SMALL | args)(text(max_length, width=max_length)).isfinite().all()
        return
    with pytest.raises(EectlError, match=rf"^data\.max_length is {max_length}.*hf/{name} .*{limit}"):
        build(f"hf/{name}", max_length=max_length, args=SMALL | args)
    backbone = build(f"hf/{name}", max_length=limit, args=SMALL | args)
    assert backbone(text(limit, width=limit)).isfinite().all()
    with pytest.raises((IndexError, RuntimeError)):  # the limit is the network's, not only ours
        backbone(text(limit + 1, width=limit + 1))


@pytest.mark.parametrize(
    ("name", "section", "message"),
    [
        (
            "hf/gpt2",
            {"args": {"n_embd": 16, "n_layer": 1, "n_head": 2, "eos_token_id": None}},
            r"hf/gpt2 .*backbone\.args\.pad_token_id.*",
        ),
        ("hf/t5", {}, r"hf/t5 takes no exits: .*a decoder.*bert, roberta.*"),
        ("hf/gemma3", {}, r"hf/gemma3 takes no exits: .*vision_config.*"),
        (
            "hf/flaubert",
            {"args": {"vocab_size": 40, "emb_dim": 32, "n_layers": 2, "n_heads": 4}},
            r"hf/flaubert takes no exits: .*",
        ),
        ("hf/vit", {}, r"hf/vit .*type vit.*no text classifier.*"),
        ("hf/brt", {}, r"hf/brt .*'bert'.*--pretrained.*"),
        ("hf/./nowhere", {"pretrained": True}, r"backbone\.name: .*\./nowhere.*"),
        ("hf/bert", {"pretrained": True}, r"backbone\.pretrained: hf/bert .*backbone\.weights"),
        ("hf/bert", {"args": {"hidden_sise": 3}}, r"backbone\.args\.hidden_sise: .*'hidden_size'.*"),
        ("hf/bert", {"args": {"num_labels": 3}}, r"backbone\.args\.num_labels: .*"),
        ("hf/bert", {"args": {"hidden_size": "wide"}}, r"hf/bert .*'hidden_size': 'wide'.*"),
        ("hf/bert", {"args": {"hidden_size": 33}}, r"hf/bert .*'hidden_size': 33.*attention heads.*"),
        ("hf/bert", {"args": {"num_hidden_layers": 0}}, r"backbone\.args: .*'num_hidden_layers': 0.* hf/bert .*block"),
        ("hf/deberta-v2", {"args": SMALL | {"conv_kernel_size": 3}}, r"backbone\.args\.conv_kernel_size: .*"),
        ("resnet20", {}, r"backbone\.name: resnet20 .*hf/NAME"),
    ],
)
def test_what_does_not_work_is_one_line(name: str, section: dict[str, object], message: str) -> None:
    with pytest.raises(EectlError, match=f"^{message}$"):
        build(name, **section)


def test_an_encoder_takes_no_images() -> None:
    with pytest.raises(EectlError, match=r"^hf/bert .*no image classifier .*types that take exits"):
        build_backbone(BackboneSection(name="hf/bert"), input_shape=(3, 8, 8), num_outputs=2)


def test_folders_that_do_not_work_are_one_line(tmp_path: Path) -> None:
    name = f"hf/{tmp_path}"
    with pytest.raises(EectlError, match=r"backbone\.name: .*config\.json"):
        build(name)
    (tmp_path / "config.json").write_text("{")
    with pytest.raises(EectlError, match=r"config\.json: "):
        build(name)
    library_encoder("bert", tmp_path)
    there = r"\(%d of its %d tensors are there\): "
    with pytest.raises(EectlError, match=there % (38, 41) + r"of another shape bert\.embeddings\.word_embeddings\.weight$"):
        build(name, pretrained=True, args={"vocab_size": 41})
    with pytest.raises(EectlError, match=there % (39, 57) + r"no bert\.encoder\.layer\.2\..*13 more$"):
        build(name, pretrained=True, args={"num_hidden_layers": 3})
    library_encoder("electra", tmp_path / "other")
    shutil.copy(tmp_path / "other" / "model.safetensors", tmp_path)
    shapes = r"of another shape bert\.embeddings\.word_embeddings\.weight, .*; unexpected embeddings_project\.bias, .*"
    with pytest.raises(EectlError, match=rf"^backbone\.pretrained: .*bert with.*{there % (32, 41)}{shapes}$"):
        build(name, pretrained=True)
    library_encoder("bert", tmp_path)
    weights = tmp_path / "model.safetensors"
    weights.write_bytes(weights.read_bytes()[:1000])
    with pytest.raises(EectlError, match=r"weights of hf/.*safetensors"):
        build(name, pretrained=True)
    weights.rename(tmp_path / "pytorch_model.bin")
    with pytest.raises(EectlError, match=r"pytorch_model\.bin.*model\.safetensors"):
        build(name, pretrained=True)
    (tmp_path / "pytorch_model.bin").unlink()
    with pytest.raises(EectlError, match=r"no weights.*model\.safetensors"):
        build(name, pretrained=True)


def test_loading_prints_nothing(tmp_path: Path, capfd: pytest.CaptureFixture[str]) -> None:
    library_encoder("bert", tmp_path)
    capfd.readouterr()
    build(f"hf/{tmp_path}", pretrained=True)
    assert capfd.readouterr() == ("", "")
