"""Costs against hand counts, the paper's numbers and PyTorch's own counter."""

import copy
import warnings
from collections.abc import Sequence

import pytest
import torch
from torch import Tensor, nn
from torch.nn.attention import SDPBackend, sdpa_kernel
from torch.utils.flop_counter import FlopCounterMode

from eectl.core.errors import EectlError
from eectl.exits.costs import COUNTED, UNCOUNTED, Costs, measure_costs
from eectl.models.backbone import Backbone, Feature, Hidden, MapFeature
from eectl.models.build import attach_exits, build_backbone
from eectl.models.heads import ExitHead, ExitOutput
from eectl.models.multi_exit import MultiExitModel
from eectl.recipe.recipe import BackboneSection


def build(
    name: str,
    shape: tuple[int, int, int],
    *,
    num_outputs: int = 10,
    after: Sequence[int] = (0, 1),
    head: str = "auto",
    **args: object,
) -> MultiExitModel:
    backbone = build_backbone(BackboneSection(name=name, args=args), input_shape=shape, num_outputs=num_outputs)
    return attach_exits(backbone, after=after, heads=head, num_outputs=num_outputs, input_shape=shape)


def oracle(model: MultiExitModel, shape: tuple[int, int, int], exits: Sequence[int] | None = None, *, plain: bool = False) -> int:
    """PyTorch's count (2 per multiply-add), with every fused attention off."""
    model = copy.deepcopy(model).requires_grad_(False)
    model.eval()
    images = torch.zeros(1, *shape)
    torch.backends.mha.set_fastpath_enabled(False)
    try:
        with torch.no_grad(), sdpa_kernel(SDPBackend.MATH), FlopCounterMode(display=False) as counter:
            model.backbone.net(images) if plain else model(images, exits=exits)
    finally:
        torch.backends.mha.set_fastpath_enabled(True)
    return counter.get_total_flops() // 2


CASES = [
    ("resnet20", (3, 32, 32), {}),
    ("resnet18", (1, 20, 28), {"stem": "small"}),
    ("resnet50", (3, 40, 40), {}),
    ("vit", (3, 16, 16), {"depth": 3}),
    ("timm/resnet26d", (3, 40, 32), {}),
    ("timm/seresnet50", (3, 32, 32), {}),
    ("timm/vit_tiny_patch16_224", (3, 32, 48), {"depth": 3}),
    ("timm/deit_tiny_distilled_patch16_224", (3, 32, 32), {"depth": 2}),
    ("timm/vit_medium_patch16_reg4_gap_256", (3, 32, 32), {"depth": 2}),
    ("timm/vit_base_patch16_siglip_224", (3, 32, 32), {"depth": 2}),
    ("timm/vit_tiny_r_s16_p8_224", (3, 128, 128), {"depth": 2}),
]


@pytest.mark.parametrize(("name", "shape", "args"), CASES, ids=[name for name, _, _ in CASES])
@pytest.mark.parametrize("head", ["sdn", "mlp-20"])
def test_pytorchs_counter_agrees(name: str, shape: tuple[int, int, int], args: dict[str, object], head: str) -> None:
    model = build(name, shape, head=head, **args)
    costs = measure_costs(model, shape)
    assert costs.exits == tuple(oracle(model, shape, range(1, k + 1)) for k in (1, 2, 3))
    assert costs.plain == oracle(model, shape, plain=True)
    assert costs.exits[-1] == costs.plain + sum(costs.heads)
    assert costs.shares == tuple(cost / costs.plain for cost in costs.exits)


def test_vit_by_hand() -> None:
    """Per layer and n tokens of width d: 4nd² (projections) + 2n²d (attention) + 2ndm (MLP)."""
    n, d, m, classes = 5, 12, 20, 3
    model = build(
        "vit", (3, 8, 8), num_outputs=classes, after=[0], head="linear", patch_size=4, dim=d, mlp_dim=m, depth=2, heads=3
    )
    stem = 4 * d * 3 * 4 * 4
    layer = 4 * n * d * d + 2 * n * n * d + 2 * n * d * m
    head = d * classes
    costs = measure_costs(model, (3, 8, 8))
    assert costs.heads == (head,)
    assert costs.exits == (stem + layer + head, stem + 2 * layer + 2 * head)
    assert costs.plain == stem + 2 * layer + head
    assert costs.parameters == sum(p.numel() for p in model.backbone.parameters())
    assert costs.head_parameters == (d * classes + classes,)


@pytest.mark.parametrize(
    ("name", "shape", "classes", "args", "macs"),
    [
        ("vit", (3, 32, 32), 100, {}, 194_867_712),  # ViT-T for CIFAR-100: 194.9 M
        ("vit", (3, 224, 224), 1000, {"patch_size": 16, "dim": 192, "mlp_dim": 768, "depth": 12, "heads": 3}, 1_253_683_200),
        ("vit", (3, 224, 224), 1000, {"patch_size": 16, "dim": 384, "mlp_dim": 1536, "depth": 12, "heads": 6}, 4_598_882_304),
        # The ResNets' 1161.5 M and 5219 M hold 2 operations per BatchNorm element: 2,048,000 and 27,459,584.
        ("resnet34", (3, 32, 32), 100, {"stem": "small"}, 1_161_496_576 - 2_048_000),
        ("resnet50", (3, 64, 64), 200, {"stem": "small"}, 5_219_106_816 - 27_459_584),
    ],
    ids=["vit-t-cifar", "vit-t-imagenet", "vit-s-imagenet", "resnet34", "resnet50"],
)
def test_the_papers_networks(name: str, shape: tuple[int, int, int], classes: int, args: dict[str, object], macs: int) -> None:
    assert measure_costs(build(name, shape, num_outputs=classes, after=[], **args), shape).plain == macs


# --- hand-counted toys -------------------------------------------------------------------------------------------------


class Net(nn.Module):
    """Two scales and a mask through three blocks; every operation that is counted, once."""

    def __init__(self) -> None:
        super().__init__()
        self.first = nn.Conv2d(2, 6, 3, groups=2, padding=1)
        self.second = nn.ConvTranspose2d(6, 4, 2, stride=2)
        self.third = nn.Linear(4, 4)
        self.fc = nn.Linear(4, 3)


class Toy(Backbone):
    def __init__(self) -> None:
        super().__init__(Net(), block_names=[("first",), ("second",), ("third",)], head_names=["fc"], classifiers=["fc"])

    def stem(self, inputs: Tensor) -> Hidden:
        return Hidden((inputs, inputs * 2), mask=inputs[:, 0, 0] > 0)

    def block(self, index: int, hidden: Hidden) -> Hidden:
        fine, coarse = hidden.x
        if index == 0:
            fine = self.net.first(fine)
        elif index == 1:
            fine = self.net.second(fine)
        else:
            coarse = coarse.flatten(2)  # [1, 2, 16]
            coarse = torch.einsum("bij,bkj->bik", coarse, coarse) @ torch.ones(2, 5)  # 2·16·2, then 2·2·5
            fine = self.net.third(fine.flatten(2).mT).mT.reshape(fine.shape)
        return Hidden((fine, coarse), hidden.mask)

    def head(self, hidden: Hidden) -> Tensor:
        return self.net.fc(hidden.x[0].mean(dim=(2, 3)))

    def feature(self, hidden: Hidden) -> Feature:
        assert hidden.mask is not None and hidden.mask.dtype == torch.bool
        return MapFeature(hidden.x[0])


class Cascade(ExitHead):
    """Reads the exit before it, attends across lengths, and keeps a state that no logit depends on."""

    uses_earlier = True

    def __init__(self, width: int, earlier: int) -> None:
        super().__init__()
        self.fc = nn.Linear(width + earlier, 3)
        self.state = nn.Linear(3, 7)

    def reads(self, feature: Feature) -> Tensor:
        return feature.pooled()

    def says(self, read: Tensor, earlier: Sequence[ExitOutput | None]) -> ExitOutput:
        x = torch.cat([read, *(output.logits for output in earlier if output)], dim=1)
        query, keys = torch.ones(1, 2, 3, 4), torch.ones(1, 2, 5, 4)
        shift = nn.functional.scaled_dot_product_attention(query, keys, torch.ones(1, 2, 5, 6)).mean()
        logits = self.fc(x + shift)
        return ExitOutput(logits, self.state(logits))


def toy() -> MultiExitModel:
    return MultiExitModel(Toy(), [Cascade(6, 0), Cascade(4, 3)], after=[0, 1])


def test_hand_counted_pieces() -> None:
    """Images of 2×4×4: several scales, a mask, a grouped and a transposed convolution, products, a cascade, cross lengths."""
    blocks = [6 * 9 * 1 * 16, 16 * 6 * 4 * 4, 64 * 4 * 4 + 2 * 16 * 2 + 2 * 2 * 5]
    attention = 2 * 3 * 5 * (4 + 6)
    heads = (6 * 3 + 3 * 7 + attention, (4 + 3) * 3 + 3 * 7 + attention)
    costs = measure_costs(toy(), (2, 4, 4))
    assert costs == Costs(
        exits=(blocks[0] + heads[0], sum(blocks[:2]) + sum(heads), sum(blocks) + 4 * 3 + sum(heads)),
        heads=heads,
        plain=sum(blocks) + 4 * 3,
        parameters=(6 * 9 + 6) + (6 * 4 * 4 + 4) + (4 * 4 + 4) + (4 * 3 + 3),
        head_parameters=(6 * 3 + 3 + 3 * 7 + 7, 7 * 3 + 3 + 3 * 7 + 7),
        blocks=(blocks[0], blocks[0] + blocks[1], sum(blocks)),
    )


def test_what_nothing_reads_is_counted() -> None:
    """It is computed all the same: a pooler's layer, and a last state that no module makes."""

    class Wasteful(Toy):
        def head(self, hidden: Hidden) -> Tensor:
            self.net.third(torch.ones(5, 4))
            torch.ones(3, 7) @ torch.ones(7, 2)
            return super().head(hidden)

    assert (
        measure_costs(MultiExitModel(Wasteful()), (2, 4, 4)).plain - measure_costs(toy(), (2, 4, 4)).plain == 5 * 16 + 3 * 7 * 2
    )


@pytest.mark.parametrize(
    ("operation", "name"),
    [
        (torch.cdist, "aten::cdist"),
        (lambda x, y: torch.fft.fft(x).real + y, "aten::fft_fft"),
        (torch.linalg.solve, "linalg_solve"),
    ],
    ids=["cdist", "fft", "solve"],
)
def test_an_unknown_operation_is_an_error(operation: object, name: str) -> None:
    class Strange(ExitHead):
        def reads(self, feature: Feature) -> Tensor:
            return feature.map()[:, 0]

        def says(self, read: Tensor, earlier: Sequence[ExitOutput | None]) -> ExitOutput:  # noqa: ARG002
            x = read + torch.eye(4)
            return ExitOutput(operation(x, x).mean(dim=(1, 2))[:, None])

    model = MultiExitModel(Toy(), [Strange()], after=[0])
    with pytest.raises(EectlError, match=rf"the cost of .*{name}.* in exit 1 is not known"):
        measure_costs(model, (2, 4, 4))
    assert torch.backends.mha.get_fastpath_enabled()


@pytest.mark.parametrize("fused", [True, False])
def test_nothing_is_left_changed_and_nothing_is_printed(fused: bool, capfd: pytest.CaptureFixture[str]) -> None:
    model = build("vit", (3, 8, 8), depth=2, dropout=0.1)
    model.train_parts(segments={1}, heads={2})
    modes = {name: module.training for name, module in model.named_modules()}
    before, state = copy.deepcopy(model.state_dict()), torch.get_rng_state()
    torch.backends.mha.set_fastpath_enabled(fused)
    try:
        with warnings.catch_warnings():
            warnings.simplefilter("error")
            measure_costs(model, (3, 8, 8))
        assert torch.backends.mha.get_fastpath_enabled() is fused
    finally:
        torch.backends.mha.set_fastpath_enabled(True)
    assert {name: module.training for name, module in model.named_modules()} == modes
    assert all(torch.equal(tensor, before[key]) for key, tensor in model.state_dict().items())
    assert torch.equal(torch.get_rng_state(), state)
    assert all(p.grad is None and p.requires_grad for p in model.parameters())
    assert capfd.readouterr() == ("", "")


def test_no_operation_is_both_counted_and_not() -> None:
    assert not COUNTED.keys() & UNCOUNTED


def test_the_backbones_shares_leave_heads_out():
    costs = Costs(exits=(30, 70, 115), heads=(10, 5), plain=100, parameters=0, head_parameters=(0, 0))
    assert costs.backbone_shares == (0.2, 0.55)
    assert Costs(exits=(100,), heads=(), plain=100, parameters=0, head_parameters=()).backbone_shares == ()
