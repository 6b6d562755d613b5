"""The contract of the adapter for transformers' image classifiers, type by type; four by default, all with --thorough."""

import copy
from pathlib import Path
from typing import Any, NamedTuple

import pytest
import torch
from network_contract import check_bits, check_gradients, check_leaving, check_phase_3, check_rebuilding, documented
from small_networks import NUM_OUTPUTS, build_noisy
from torch import Tensor
from torch.nn.attention import SDPBackend, sdpa_kernel
from torch.utils.flop_counter import FlopCounterMode
from transformers import AutoConfig, AutoModel, AutoModelForImageClassification
from transformers.models.auto.modeling_auto import MODEL_FOR_IMAGE_CLASSIFICATION_MAPPING_NAMES

from eectl.core.errors import EectlError
from eectl.exits.costs import measure_costs
from eectl.models.adapters.args_and_weights import NotOnThisMachineError
from eectl.models.backbone import Backbone
from eectl.models.build import attach_exits, build_backbone
from eectl.models.multi_exit import MultiExitModel
from eectl.recipe.recipe import BackboneSection


class Case(NamedTuple):
    """A small network of one type: its options, how many blocks it has, and how the first one's output lies in the image.

    `tokens` is (special tokens, patches along a side); None where it is a map, and (0, 0) where tokens are out of order.
    """

    args: dict[str, Any]
    depth: int
    tokens: tuple[int, int] | None


SIDE = 64
VIT: dict[str, Any] = {
    "hidden_size": 32,
    "num_hidden_layers": 3,
    "num_attention_heads": 4,
    "intermediate_size": 48,
    "patch_size": 16,
}
DINO = {key: value for key, value in VIT.items() if key != "intermediate_size"}
SWIN = {"embed_dim": 16, "depths": [1, 1, 2], "num_heads": [2, 4, 4], "window_size": 4, "patch_size": 4}
WIDTHS = {"hidden_sizes": [8, 16, 24, 32], "depths": [1, 1, 1, 1]}
LEVIT_STEPS = [["Subsample", 8, 2, 4, 2, 2], ["Subsample", 8, 3, 4, 2, 2]]
HGNET = {"stem_channels": [3, 8, 16], "stage_in_channels": [16, 16, 24, 32], "stage_mid_channels": [8, 8, 8, 8]}
HGNET |= {"stage_out_channels": [16, 24, 32, 40], "stage_num_blocks": [1, 1, 1, 1], "stage_numb_of_layers": [2, 2, 2, 2]}

CASES = {
    "beit": Case(VIT | {"use_relative_position_bias": True}, 3, (1, 4)),
    "bit": Case({"embedding_size": 16, "hidden_sizes": [16, 32, 48, 64], "depths": [1, 1, 1, 1], "num_groups": 4}, 4, None),
    "clip": Case(VIT, 3, (1, 4)),
    "convnext": Case(WIDTHS | {"drop_path_rate": 0.2}, 4, None),
    "convnextv2": Case(WIDTHS, 4, None),
    "data2vec-vision": Case(VIT, 3, (1, 4)),
    "deit": Case(VIT, 3, (2, 4)),
    "dinov2": Case(DINO, 3, (1, 4)),
    "dinov2_with_registers": Case(DINO | {"hidden_dropout_prob": 0.1, "drop_path_rate": 0.2}, 3, (5, 4)),
    "donut-swin": Case(SWIN, 3, (0, 8)),
    "efficientnet": Case({"width_coefficient": 0.25, "depth_coefficient": 0.25, "hidden_dim": 320}, 7, None),
    "focalnet": Case({"embed_dim": 16, "depths": [1, 1, 1, 1], "hidden_sizes": [16, 24, 32, 40]}, 4, (0, 8)),
    "hgnet_v2": Case({"embedding_size": 16, "hidden_sizes": [16, 24, 32, 40], "depths": [1, 1, 1, 1]} | HGNET, 4, None),
    "hiera": Case({"embed_dim": 16, "num_heads": [1, 2, 4, 8], "depths": [1, 1, 1, 1]}, 4, (0, 0)),
    "ijepa": Case(VIT, 3, (0, 4)),
    "levit": Case(
        {"hidden_sizes": [16, 24, 32], "num_attention_heads": [2, 3, 4], "depths": [1, 1, 1], "key_dim": [8, 8, 8]}
        | {"down_ops": LEVIT_STEPS},
        3,
        (0, 2),
    ),
    "metaclip_2": Case(VIT, 3, (1, 4)),
    "mobilenet_v1": Case({"depth_multiplier": 0.25}, 26, None),
    "mobilenet_v2": Case({"depth_multiplier": 0.25}, 16, None),
    "mobilevit": Case({"hidden_sizes": [16, 24, 32], "neck_hidden_sizes": [8, 8, 12, 16, 24, 32, 64]}, 5, None),
    "mobilevitv2": Case({"width_multiplier": 0.25}, 5, None),
    "regnet": Case(WIDTHS | {"embedding_size": 8, "groups_width": 8}, 4, None),
    "resnet": Case(WIDTHS | {"embedding_size": 8}, 4, None),
    "segformer": Case(WIDTHS, 4, None),
    "siglip": Case(VIT, 3, (0, 4)),
    "swiftformer": Case({"depths": [1, 1, 1, 1], "embed_dims": [8, 16, 24, 32]}, 7, None),
    "swin": Case(SWIN | {"drop_path_rate": 0.2}, 3, (0, 8)),
    "swinv2": Case(SWIN, 3, (0, 8)),
    "textnet": Case({"stem_out_channels": 8, "hidden_sizes": [8, 8, 16, 24, 32]}, 4, None),
    "vit": Case(VIT | {"hidden_dropout_prob": 0.1, "attention_probs_dropout_prob": 0.1}, 3, (1, 4)),
    "vit_msn": Case(VIT, 3, (1, 4)),
}
REFUSED = {  # by the reason that is given
    **dict.fromkeys(("imagegpt", "shieldgemma2", "siglip2"), "does not run on images alone"),
    **dict.fromkeys(("poolformer", "pvt"), "do not run once each"),
    "pp_lcnet": "gives no logits",
    "pvt_v2": "do not hand on one hidden state",
    "timm_wrapper": "lie in no list",
}
LEFT = {"cvt", "dinat", "perceiver"}
"""The first does not build with this library's version, the second needs a library, the third may be cut into its latents."""
FOUR = ("vit", "dinov2_with_registers", "swin", "convnext")
"""Class tokens, registers and random depth, stages that say the size of their maps, and maps."""
TYPES = [pytest.param(name, marks=[] if name in FOUR else pytest.mark.thorough) for name in CASES]


@pytest.fixture(scope="module", params=TYPES)
def model_type(request: pytest.FixtureRequest) -> str:
    return request.param


@pytest.fixture(scope="module")
def shared(model_type: str) -> Backbone:
    """Built once for all tests of a type."""
    return build_noisy(f"hf/{model_type}", CASES[model_type].args, (3, SIDE, SIDE))


@pytest.fixture
def backbone(shared: Backbone) -> Backbone:
    return copy.deepcopy(shared)


@pytest.fixture
def model(backbone: Backbone) -> MultiExitModel:
    torch.manual_seed(2)
    return attach_exits(backbone, after=[0, 1], heads="auto", num_outputs=NUM_OUTPUTS, input_shape=(3, SIDE, SIDE))


@pytest.fixture
def rows() -> Tensor:
    return torch.randn(4, 3, SIDE, SIDE, generator=torch.Generator().manual_seed(1))


def library(net: Any, images: Tensor) -> Tensor:
    return net(pixel_values=images).logits


def test_the_documentation_lists_the_types() -> None:
    taken, refused = documented("images")
    assert taken == {*CASES} and refused >= {*REFUSED} and not refused & taken


def test_every_type_of_the_library_is_named() -> None:
    assert {*CASES, *REFUSED, *LEFT} == set(MODEL_FOR_IMAGE_CLASSIFICATION_MAPPING_NAMES)
    assert len(CASES) + len(REFUSED) + len(LEFT) == len({*CASES, *REFUSED, *LEFT})


@pytest.mark.parametrize("training", [False, True], ids=["eval", "train"])
def test_pieces_equal_the_librarys_forward_bitwise(backbone: Backbone, rows: Tensor, training: bool, model_type: str) -> None:
    check_bits(backbone, rows, library, training=training)
    assert backbone.depth == CASES[model_type].depth


def test_gradients_are_the_librarys(backbone: Backbone, rows: Tensor) -> None:
    check_gradients(backbone, rows, library)


def test_rows_leave_where_the_offline_choice_says(model: MultiExitModel, rows: Tensor) -> None:
    check_leaving(model, rows)


def test_pytorchs_counter_agrees_on_costs(model: MultiExitModel) -> None:
    costs = measure_costs(model, (3, SIDE, SIDE))
    model.eval().requires_grad_(False)
    with sdpa_kernel(SDPBackend.MATH), FlopCounterMode(display=False) as counter:
        model.backbone.net(pixel_values=model.backbone.example((3, SIDE, SIDE)))
    expected = counter.get_total_flops() / 2
    assert costs.plain == pytest.approx(expected, rel=1e-3)
    assert 0 < costs.exits[0] < costs.exits[1] < costs.plain + sum(costs.heads)


def test_heads_read_the_tokens_that_lie_where_they_say(backbone: Backbone, model_type: str) -> None:
    """A white patch changes its own place of the map most; the class token is the first, and patches are all but special ones."""
    tokens, images = CASES[model_type].tokens, torch.zeros(2, 3, SIDE, SIDE)
    images[1, :, :8, -8:] = 1
    with torch.no_grad():
        hidden = backbone.eval().stem(images)
        feature = backbone.feature(hidden)
    assert isinstance(hidden.x, Tensor)
    if tokens == (0, 0):
        with pytest.raises(EectlError, match=r"^exits\.head: "):
            feature.map()
        assert torch.equal(feature.pooled(), hidden.x.mean(1))
        return
    change = (feature.map()[1] - feature.map()[0]).abs().sum(0)
    row, column = divmod(int(change.flatten().argmax()), change.shape[1])
    assert row <= change.shape[0] // 4 and column >= 3 * change.shape[1] // 4 - 1
    if tokens is None:
        assert feature.is_map and torch.equal(feature.pooled(), hidden.x.mean((2, 3)))
        return
    prefix, side = tokens
    with torch.no_grad():
        later = backbone.block(0, hidden)
    assert isinstance(later.x, Tensor)
    feature = backbone.feature(later)
    assert later.x.shape[1] == prefix + side * side and feature.map().shape[2:] == (side, side)
    assert torch.equal(feature.map()[0, :, 1, 0], later.x[0, prefix + side])
    assert torch.equal(feature.pooled(), later.x[:, prefix:].mean(1))
    assert torch.equal(feature.cls(), later.x[:, 0] if prefix else later.x.mean(1))


@pytest.mark.parametrize("name", ["vit", "beit", "dinov2"])
def test_blocks_give_the_librarys_hidden_states(name: str, rows: Tensor) -> None:
    backbone = build_noisy(f"hf/{name}", CASES[name].args, (3, SIDE, SIDE)).eval()
    with torch.no_grad():
        expected = backbone.net(pixel_values=rows, output_hidden_states=True).hidden_states
        found = [hidden.x for hidden in backbone.hidden_states(rows)]
    assert len(found) == len(expected) - 1 == 3
    assert all(torch.equal(own, theirs) for own, theirs in zip(found, expected[1:], strict=True))


def test_heads_alone_train_and_the_network_stays_as_it_is(model: MultiExitModel, rows: Tensor) -> None:
    check_phase_3(model, rows)


def test_an_exits_gradient_stops_at_its_block(model: MultiExitModel, rows: Tensor) -> None:
    model(rows, exits={1})[0].logits.square().sum().backward()
    graded = {model.part(name) for name, parameter in model.named_parameters() if parameter.grad is not None}
    assert graded <= {("segment", 1), ("head", 1)} and ("head", 1) in graded


def test_a_spec_rebuilds_the_network(model: MultiExitModel, model_type: str, rows: Tensor) -> None:
    check_rebuilding(model, rows, BackboneSection(name=f"hf/{model_type}", args=CASES[model_type].args))


@pytest.mark.parametrize("name", [pytest.param(name, marks=[] if name == "pvt" else pytest.mark.thorough) for name in REFUSED])
def test_what_cannot_be_cut_is_refused_with_its_reason(name: str) -> None:
    args = {"pvt": {"hidden_sizes": [8, 16, 40, 64]}, "pvt_v2": {"hidden_sizes": [8, 16, 40, 64]}}.get(name, {})
    args |= {"imagegpt": {"n_layer": 1}, "shieldgemma2": VIT, "siglip2": VIT, "poolformer": WIDTHS}.get(name, {})
    with pytest.raises(EectlError, match=rf"^hf/{name} takes no exits: .*{REFUSED[name]}.*; types that take exits are vit.*$"):
        build_backbone(BackboneSection(name=f"hf/{name}", args=args), input_shape=(3, SIDE, SIDE), num_outputs=2)


@pytest.mark.parametrize("shape", [(3, 32, 32), (1, 48, 32)])
def test_a_model_type_takes_images_as_the_data_has_them(shape: tuple[int, ...]) -> None:
    for name in ("vit", "siglip", "convnext") if shape[1] == shape[2] else ("vit", "convnext"):  # SigLIP is for squares
        backbone = build_noisy(f"hf/{name}", CASES[name].args, shape).eval()
        rows = torch.randn(2, *shape)
        with torch.no_grad():
            assert torch.equal(backbone(rows), backbone.net(pixel_values=rows).logits)
            if name != "convnext":
                feature = backbone.feature(backbone.stem(rows))
                assert feature.map().shape[2:] == (shape[1] // 16, shape[2] // 16)


def test_a_published_encoder_is_loaded(tmp_path: Path) -> None:
    """Weights of an encoder and of a classifier of other classes; images of another size or of grey are refused in one line."""
    config = AutoConfig.for_model("vit", **VIT, image_size=SIDE)
    torch.manual_seed(1)
    encoder, classifier = AutoModel.from_config(config), AutoModelForImageClassification.from_config(config)
    for number, net in enumerate((encoder, classifier)):
        folder = tmp_path / str(number)
        net.save_pretrained(folder)
        section = BackboneSection(name=f"hf/{folder}", pretrained=True)
        backbone = build_backbone(section, input_shape=(3, SIDE, SIDE), num_outputs=NUM_OUTPUTS)
        assert set(backbone.fresh) == {"classifier.weight", "classifier.bias"}
        own = net.state_dict()
        kept = {key: tensor for key, tensor in backbone.net.state_dict().items() if key not in backbone.fresh}
        assert len(kept) > 40
        assert all(torch.equal(tensor, own.get(key, own.get(key.removeprefix("vit.")))) for key, tensor in kept.items())
        name, args = backbone.rebuilds_as or ("", {})
        assert name == "hf/vit" and args["image_size"] == SIDE
        for shape in ((3, 32, 32), (1, SIDE, SIDE)):
            with pytest.raises(EectlError, match=r"^hf/.* takes no exits: .*does not run on images alone \(.*$"):
                build_backbone(section, input_shape=shape, num_outputs=NUM_OUTPUTS)


@pytest.mark.parametrize(
    ("name", "shape", "message"),
    [
        ("vitt", (3, 32, 32), r"hf/vitt .*'vit'.*"),
        ("bert", (3, 32, 32), r"hf/bert .*no image classifier.*"),
        ("vit", (3, 9), r"hf/vit .*no text classifier.*"),
    ],
)
def test_what_does_not_work_is_one_line(name: str, shape: tuple[int, ...], message: str) -> None:
    with pytest.raises(EectlError, match=f"^{message}$"):
        build_backbone(BackboneSection(name=f"hf/{name}"), input_shape=shape, num_outputs=2)


def test_a_network_that_is_not_here_is_of_the_type_that_its_name_says() -> None:
    for name, model_type in (("no-one/vit-base-patch16-224", "vit"), ("no-one/dinov2-small", "dinov2")):
        with pytest.raises(NotOnThisMachineError) as error:
            build_backbone(BackboneSection(name=f"hf/{name}"), input_shape=(3, SIDE, SIDE), num_outputs=2)
        assert error.value.model_type == model_type


def test_sizes_that_fill_the_memory_are_refused() -> None:
    for name, option, value in (("vit", "hidden_size", 10**9), ("swin", "depths", [10**9, 1]), ("vit", "image_size", 10**9)):
        args = CASES[name].args | {option: value}
        with pytest.raises(EectlError, match=rf"hf/{name}"):
            build_backbone(BackboneSection(name=f"hf/{name}", args=args), input_shape=(3, SIDE, SIDE), num_outputs=2)
