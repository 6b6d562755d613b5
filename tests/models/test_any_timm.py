"""The contract of the traced adapter, over timm's files: one small network of each, six by default and the others thoroughly."""

import copy
import re
from pathlib import Path

import pytest
import timm
import torch
from network_contract import check_bits
from tape import Tape
from torch import Tensor, nn
from torch.nn.attention import SDPBackend, sdpa_kernel
from torch.utils.flop_counter import FlopCounterMode

from eectl.core.capture import Capture
from eectl.core.errors import EectlError
from eectl.exits.costs import measure_costs
from eectl.models.adapters.feature_views import Facts
from eectl.models.adapters.layer_groups import own_groups
from eectl.models.adapters.traced import Traced, adapt
from eectl.models.backbone import Backbone, Hidden
from eectl.models.build import attach_exits, build_backbone
from eectl.models.recompute import RecomputedBlocks
from eectl.recipe.recipe import BackboneSection

NUM_OUTPUTS = 5
BY_DEFAULT = {  # parallel branches, tokens that come late, maps that are joined, three scales, channels last, flags in its code
    "crossvit": ("crossvit_tiny_240", 3),
    "convit": ("convit_tiny", 12),
    "densenet": ("densenet121", 4),
    "edgenext": ("edgenext_xx_small", 12),
    "vgg": ("vgg11", 7),
    "fasternet": ("fasternet_t0", 13),
}
SMALL = ("^test_", "atto", "femto", "pico", "nano", "xxs|xx_small", "tiny", "_ti", "_t0", "_xs|x_small|_005", "_t", "mini")
SMALL += ("_m0|_b0|_s0|_0", "_s", "18", ".")
SHALLOW = {"beit", "deepseek_vit", "gemma4_vit", "qwen3_vit"}  # whose smallest network is large: three blocks are enough


RESULTS = {"convnextv2_atto": 12, "mobilevit_xxs": 10, "efficientformerv2_s0": 14, "pvt_v2_b0": 8, "eva02_tiny_patch14_224": 12}


def smallest(file: str) -> str:
    """Return the name of a small network of one of timm's files."""
    names = timm.list_models(module=file)
    return next(name for kind in SMALL for name in names if re.search(kind, name))


OTHERS = [
    pytest.param(file, marks=pytest.mark.thorough)
    for file in timm.list_modules()
    if file not in BY_DEFAULT and timm.list_models(module=file)
]


def build(name: str, args: dict[str, object]) -> tuple[Backbone, int]:
    """Build a network for the smallest images that it takes, by the traced adapter."""
    own = timm.get_pretrained_cfg(name)
    for size in (64, 96, 128, 224, own.input_size[-1] if own else 256):
        try:
            torch.manual_seed(0)
            spec = BackboneSection(name=f"timm/{name}", args=args)
            backbone = build_backbone(spec, input_shape=(3, size, size), num_outputs=NUM_OUTPUTS)
        except EectlError as error:
            fault = error
        else:
            for classifier in backbone.classifiers:  # some start at zero, and say nothing of what comes before them
                for parameter in backbone.net.get_submodule(classifier).parameters():
                    nn.init.normal_(parameter)
            return backbone, size
    raise fault


@pytest.fixture(scope="module", params=[*BY_DEFAULT, *OTHERS])
def case(request: pytest.FixtureRequest) -> tuple[Backbone, int]:
    name = BY_DEFAULT[request.param][0] if request.param in BY_DEFAULT else smallest(request.param)
    return build(name, {"depth": 3} if request.param in SHALLOW else {})


@pytest.fixture
def backbone(case: tuple[Backbone, int]) -> Backbone:
    return copy.deepcopy(case[0])


@pytest.fixture
def images(case: tuple[Backbone, int]) -> Tensor:
    return torch.randn(5, 3, case[1], case[1], generator=torch.Generator().manual_seed(1))


def documented() -> dict[str, list[str]]:
    """The page of timm's networks: network, image size and blocks of each file."""
    page = (Path(__file__).parents[2] / "docs/reference/timm.md").read_text()
    return {
        file: [name, size, blocks] for file, name, size, blocks in re.findall(r"\| `(.*)` \| `(.*)` \| (\d+) \| (\d+) \|", page)
    }


def test_the_documentation_names_files_that_there_are() -> None:
    assert len(documented()) == 98 and documented().keys() <= set(timm.list_modules())


def test_the_documentation_counts_the_blocks(case: tuple[Backbone, int], request: pytest.FixtureRequest) -> None:
    backbone, size = case
    file = request.node.callspec.params["case"]
    if file not in documented():
        pytest.skip(f"{file} is newer than the page")
    depth = documented()[file][-1] if file in SHALLOW else str(backbone.depth)
    assert documented()[file] == [backbone.name.removeprefix("timm/"), str(size), depth]


@pytest.mark.parametrize("training", [False, True], ids=["eval", "train"])
def test_the_pieces_give_the_librarys_bits(backbone: Backbone, images: Tensor, training: bool) -> None:
    check_bits(backbone, images, lambda net, rows: net(rows), training=training)


def test_fewer_rows_go_on_after_every_block(backbone: Backbone, images: Tensor) -> None:
    """Another row leaves after each of the first blocks; those that stay are as if the others had never been there."""
    backbone.eval()
    with torch.no_grad():
        expected, kept = backbone.net(images), torch.arange(5)
        hidden = backbone.stem(images)
        for index in range(backbone.depth):
            hidden = backbone.block(index, hidden)
            assert backbone.feature(hidden).pooled().ndim == backbone.feature(hidden).cls().ndim == 2
            if len(kept) > 1:
                order = torch.arange(len(kept))[1:].flip(0)
                hidden, kept = hidden.take(order), kept[order]
        torch.testing.assert_close(backbone.head(hidden), expected[kept], rtol=1e-3, atol=1e-4)


def test_costs_add_up_to_pytorchs(case: tuple[Backbone, int], backbone: Backbone, images: Tensor) -> None:
    shape = images.shape[1:]
    model = attach_exits(backbone, after=[0], heads="auto", num_outputs=NUM_OUTPUTS, input_shape=shape)
    plain = measure_costs(model.requires_grad_(False), shape).plain
    missed: list[int] = []  # by torch's counter: LSTMs multiply by all their matrices at each step

    def matrices(lstm: nn.LSTM) -> int:
        return sum(weight.numel() for weight in lstm.parameters() if weight.ndim == 2)

    with torch.no_grad(), sdpa_kernel(SDPBackend.MATH), FlopCounterMode(display=False) as counter:
        lstms = [module for module in backbone.modules() if isinstance(module, nn.LSTM)]
        for lstm in lstms:
            lstm.register_forward_hook(lambda lstm, given, _: missed.append(given[0].shape[:-1].numel() * matrices(lstm)))
        backbone.eval().net(images[:1])
    assert counter.get_total_flops() + 2 * sum(missed) == pytest.approx(2 * plain, rel=1e-3)


def test_frozen_blocks_stay_bit_equal(backbone: Backbone, images: Tensor) -> None:
    """As phase 3 has it: only the heads train."""
    model = attach_exits(backbone, after=[0], heads="auto", num_outputs=NUM_OUTPUTS, input_shape=images.shape[1:])
    model.set_trainable((), {1})
    model.train_parts((), {1})
    before = copy.deepcopy(backbone.state_dict())
    output = model(images)[0]
    assert output is not None
    output.logits.square().sum().backward()
    torch.optim.SGD([p for p in model.parameters() if p.requires_grad], lr=0.1).step()
    assert all(torch.equal(tensor, before[key]) for key, tensor in backbone.state_dict().items())


def test_autocast_and_channels_last_do_what_they_do_to_the_library(backbone: Backbone, images: Tensor) -> None:
    backbone.eval().to(memory_format=torch.channels_last)
    rows = images[:2].contiguous(memory_format=torch.channels_last)
    with torch.no_grad():
        assert torch.equal(backbone(rows), backbone.net(rows))
        with torch.autocast("cpu", torch.bfloat16):
            assert torch.equal(backbone(rows), backbone.net(rows))


def test_blocks_that_run_again_have_the_librarys_gradients(backbone: Backbone, images: Tensor) -> None:
    twin = copy.deepcopy(backbone.net)
    recomputed = RecomputedBlocks(backbone)
    torch.manual_seed(3)
    twin.train()(images).square().sum().backward()
    torch.manual_seed(3)
    hidden = backbone.train().stem(images)
    for index in range(backbone.depth):
        hidden = recomputed.block(index, hidden)
    backbone.head(hidden).square().sum().backward()
    found = dict(backbone.net.named_parameters())
    for name, parameter in twin.named_parameters():
        torch.testing.assert_close(found[name].grad, parameter.grad, rtol=1e-4, atol=1e-5, msg=name)


@pytest.mark.parametrize(("name", "depth"), [*BY_DEFAULT.values(), *RESULTS.items()])
def test_block_numbers_are_pinned(name: str, depth: int) -> None:
    size = 240 if name.startswith("crossvit") else 64
    with torch.device("meta"):
        backbone = build_backbone(BackboneSection(name=f"timm/{name}"), input_shape=(3, size, size), num_outputs=2)
    assert isinstance(backbone, Traced) and backbone.depth == depth


def test_other_images_are_refused_with_both_sizes() -> None:
    backbone = build_backbone(BackboneSection(name="timm/vgg11"), input_shape=(3, 64, 64), num_outputs=2)
    with pytest.raises(EectlError, match=r"3×64×64.*3×32×32"):
        backbone(torch.zeros(1, 3, 32, 32))


@pytest.mark.parametrize(
    ("name", "args", "size", "says"),
    [
        ("mobilvit_xxs", {}, 64, r"timm has no 'mobilvit_xxs' \(nearest: mobilevit_xxs, .*\); timm\.list_models\(\) lists"),
        ("qqqqqqqqqqqq", {}, 64, r"timm has no 'qqqqqqqqqqqq'; timm\.list_models\(\) lists what it has"),
        (
            "test_vit",
            {"depth": 0},
            64,
            r"timm/test_vit cannot be cut into blocks: it has no block.*near it are timm/test_vit\d, ",
        ),
        ("vgg11", {}, 8, r"timm/vgg11 does not run on images of 8×8 \(.*\); set data\.image_size, 64 is enough for most"),
    ],
)
def test_what_cannot_be_built_is_one_line_with_the_way_out(name: str, args: dict[str, object], size: int, says: str) -> None:
    with pytest.raises(EectlError, match=f"^{says}") as error:
        build_backbone(BackboneSection(name=f"timm/{name}", args=args), input_shape=(3, size, size), num_outputs=2)
    assert len(str(error.value).splitlines()) == 1


class Counts(nn.Module):
    """Three layers whose code uses the number of rows, flags and sizes as networks do."""

    def __init__(self) -> None:
        super().__init__()
        self.stem = nn.Linear(12, 4)
        self.blocks = nn.ModuleList(nn.Linear(4, 4) for _ in range(3))
        self.bias = nn.Parameter(torch.randn(4, 4))
        self.head = nn.Linear(4, NUM_OUTPUTS)

    def forward(self, x: Tensor) -> Tensor:
        rows, _, height, width = x.shape
        x = self.stem(x.reshape(rows, height * width * 3))
        bias = self.bias.mean(0).expand(rows, -1)
        for block in self.blocks:
            x = torch.relu_(block(x) + bias).view(rows, 4)
            if self.training:
                x = x + 1
        return self.head(x)


def test_a_number_of_rows_is_asked_for_where_it_is_used() -> None:
    torch.manual_seed(0)
    net = Counts()
    backbone = adapt(net, (3, 2, 2), Facts(own_groups(net), (), ("head",)))
    images = torch.randn(4, 3, 2, 2)
    for training in (False, True):
        assert torch.equal(backbone.train(training)(images), net(images))
    backbone.eval()
    hidden = backbone.block(0, backbone.stem(images)).take(torch.tensor([3, 1]))
    for index in range(1, backbone.depth):
        hidden = backbone.block(index, hidden)
    torch.testing.assert_close(backbone.head(hidden), net(images[[3, 1]]))


def test_what_a_network_keeps_from_its_weights_follows_them(images_of_grey: Tensor) -> None:
    """timm's EfficientFormerV2 keeps its attention biases in eval mode, and forgets them in train() alone."""
    spec = BackboneSection(name="timm/efficientformerv2_s0")
    backbone = build_backbone(spec, input_shape=(1, 32, 32), num_outputs=NUM_OUTPUTS).eval()
    with torch.no_grad():
        backbone(images_of_grey)
        for name, parameter in backbone.named_parameters():
            if name.endswith("attention_biases"):
                parameter += torch.arange(parameter.numel()).view_as(parameter) / 10
        expected = copy.deepcopy(backbone.net).eval()(images_of_grey)
        assert torch.equal(backbone(images_of_grey), expected)
    for _ in range(2):
        backbone(images_of_grey).sum().backward()


def test_each_piece_that_is_recorded_holds_all_that_follows_from_its_weights() -> None:
    """Recorded for two numbers of rows, as early exit does; what one recording keeps is gone or old when the other runs."""
    spec = BackboneSection(name="timm/efficientformerv2_s0")
    backbone = build_backbone(spec, input_shape=(1, 64, 64), num_outputs=NUM_OUTPUTS).eval()
    with torch.no_grad():
        for name, parameter in backbone.named_parameters():
            if name.endswith("gamma"):  # of layers that add little at first
                parameter.fill_(1.0)
        hidden = backbone.stem(torch.randn(2, 1, 64, 64))
        for index in range(9):
            hidden = backbone.block(index, hidden)
        piece = Capture(Tape(), plain_calls=1).function(lambda tensor: backbone.block(9, Hidden(tensor)).x)
        one = hidden.x[:1].clone()
        for given in (hidden.x, hidden.x, one, one):
            piece(given)
        for name, parameter in backbone.named_parameters():
            if name.endswith("attention_biases"):
                parameter += torch.arange(parameter.numel()).view_as(parameter) / 10
        expected = copy.deepcopy(backbone.net.get_submodule("stages.2.blocks.5")).train().eval()(one)
        assert torch.equal(piece(one), expected)


@pytest.fixture
def images_of_grey() -> Tensor:
    return torch.randn(2, 1, 32, 32, generator=torch.Generator().manual_seed(1))
