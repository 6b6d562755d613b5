"""The contract of every adapter: a bitwise view of the library's network, whose every tensor belongs to the part that uses it."""

import copy

import pytest
import torch
from network_contract import check_bits, check_rebuilding
from small_networks import CASES, NETWORKS, NUM_OUTPUTS, SMALL_MSDNET, WINDOWS, Case, build_noisy, rows_for
from torch import Tensor, nn
from torch.nn.attention import SDPBackend, sdpa_kernel
from torch.utils.flop_counter import FlopCounterMode

from eectl.core.errors import EectlError
from eectl.exits.costs import measure_costs
from eectl.exits.criteria import CRITERIA
from eectl.exits.policy import Policy, choose
from eectl.exits.router import early_exit
from eectl.models.backbone import Backbone, Hidden, dry_run
from eectl.models.build import attach_exits, build_backbone
from eectl.models.multi_exit import MultiExitModel
from eectl.recipe.recipe import BackboneSection


@pytest.fixture(scope="module", params=NETWORKS)
def case(request: pytest.FixtureRequest) -> Case:
    return CASES[request.param]


@pytest.fixture(scope="module")
def shared(case: Case) -> Backbone:
    """Built once for all tests of a case."""
    return build_noisy(case.name, case.args, case.shape)


@pytest.fixture
def backbone(shared: Backbone) -> Backbone:
    return copy.deepcopy(shared)


@pytest.fixture
def images(case: Case) -> Tensor:
    return rows_for(case)


def library(net: nn.Module, inputs: Tensor) -> Tensor:
    """The library's own forward pass."""
    if inputs.ndim == 4:
        return net(inputs)
    ids, mask, types = inputs.unbind(1)
    return net(
        input_ids=ids, attention_mask=mask, **({} if "DistilBert" in type(net).__name__ else {"token_type_ids": types})
    ).logits


@pytest.fixture
def model(case: Case, backbone: Backbone) -> MultiExitModel:
    torch.manual_seed(2)
    return attach_exits(backbone, after=[0, case.depth - 1], heads="auto", num_outputs=NUM_OUTPUTS, input_shape=case.shape)


def run(backbone: Backbone, part: int, given: Hidden) -> Hidden:
    """Part -1 is the stem, which is given images; part `depth` the head, which gives logits."""
    if part == -1:
        return backbone.stem(given.x)
    return Hidden(backbone.head(given)) if part == backbone.depth else backbone.block(part, given)


def trace(backbone: Backbone, images: Tensor) -> list[Hidden]:
    """The images, and what the stem, each block and the head make of them."""
    passed = [Hidden(images)]
    for part in range(-1, backbone.depth + 1):
        passed.append(run(backbone, part, passed[-1]))
    return passed


def same(one: Hidden, other: Hidden) -> bool:
    flat = [(hidden.x,) if isinstance(hidden.x, Tensor) else hidden.x for hidden in (one, other)]
    return len(flat[0]) == len(flat[1]) and all(map(torch.equal, *flat))


def copied(hidden: Hidden) -> Hidden:
    return Hidden(hidden.x.clone() if isinstance(hidden.x, Tensor) else tuple(x.clone() for x in hidden.x))


@pytest.mark.parametrize("training", [False, True], ids=["eval", "train"])
def test_pieces_equal_the_librarys_forward_bitwise(backbone: Backbone, images: Tensor, training: bool) -> None:
    check_bits(backbone, images, library, training=training)


def test_depth_and_owners_of_the_ends(case: Case, backbone: Backbone) -> None:
    assert backbone.depth == case.depth
    for name, _ in backbone.net.named_parameters():
        part = backbone.locate(name)
        owned = {-1: case.stem, case.depth: case.head}.get(part, set(backbone.block_names[min(max(part, 0), case.depth - 1)]))
        assert any(name == own or name.startswith(own + ".") for own in owned), (name, part)


def test_locate_names_the_part_that_uses_each_tensor(backbone: Backbone, images: Tensor) -> None:
    """Changing a tensor changes what its part makes of the same input; changing all tensors of later parts does not."""
    backbone.eval()
    tensors = {**dict(backbone.net.named_parameters()), **dict(backbone.net.named_buffers())}
    owned: dict[int, list[str]] = {part: [] for part in range(-1, backbone.depth + 1)}
    for name, tensor in tensors.items():
        if tensor.is_floating_point():
            owned[backbone.locate(name)].append(name)
    with torch.no_grad():
        passed = trace(backbone, images)
        for part in range(backbone.depth, -2, -1):
            given, made = passed[part + 1 : part + 3]
            assert same(run(backbone, part, given), made), part
            for name in owned[part]:
                kept = tensors[name].clone()
                tensors[name].add_(1 + torch.rand_like(kept))
                assert not same(run(backbone, part, given), made), name
                tensors[name].copy_(kept)
            for name in owned[part]:
                tensors[name].add_(1)


@pytest.mark.parametrize("training", [False, True], ids=["eval", "train"])
def test_a_part_leaves_its_input_as_it_was(backbone: Backbone, images: Tensor, training: bool) -> None:
    """Exits read what the next block is given; an operation in place there would change what their gradients need."""
    backbone.train(training)
    given = Hidden(images)
    for part in range(-1, backbone.depth + 1):
        before = copied(given)
        made = run(backbone, part, given)
        assert same(given, before), part
        given = made


def test_rows_can_leave_after_any_block(case: Case, backbone: Backbone, images: Tensor) -> None:
    backbone.eval()
    with torch.no_grad():
        passed = trace(backbone, images)
        for start in {0, case.depth // 2, case.depth - 1}:
            hidden = passed[start + 2].take(torch.tensor([2, 0]))
            for part in range(start + 1, case.depth + 1):
                hidden = run(backbone, part, hidden)
            torch.testing.assert_close(hidden.x, passed[-1].x[[2, 0]], rtol=1e-3, atol=1e-4)


def test_pytorchs_counter_agrees_on_costs(case: Case, model: MultiExitModel) -> None:
    """It counts 2 per multiply-add; with every fused attention off, as it does not see them."""
    costs = measure_costs(model, case.shape)
    model.eval().requires_grad_(False)
    fused = torch.backends.mha.get_fastpath_enabled()
    torch.backends.mha.set_fastpath_enabled(False)
    try:
        for exits, expected in (({1}, costs.exits[0]), ({1, 2, 3}, costs.exits[2]), (None, costs.plain)):
            with sdpa_kernel(SDPBackend.MATH), FlopCounterMode(display=False) as counter:
                images = model.backbone.example(case.shape)
                library(model.backbone.net, images) if exits is None else model(images, exits=exits)
            assert counter.get_total_flops() == 2 * expected
    finally:
        torch.backends.mha.set_fastpath_enabled(fused)


def test_modules_of_a_block_are_the_blocks(backbone: Backbone) -> None:
    for index, names in enumerate(backbone.block_names):
        for name in names:
            inner = [f"{name}.{child}" for child, _ in backbone.net.get_submodule(name).named_modules() if child]
            assert {backbone.locate(module) for module in (name, *inner)} == {index}
    assert backbone.locate("") == -1


def test_a_copy_is_independent(backbone: Backbone, images: Tensor) -> None:
    backbone.eval()
    twin = copy.deepcopy(backbone)
    expected = backbone(images)
    with torch.no_grad():
        for parameter in twin.parameters():
            parameter.zero_()
    assert torch.equal(backbone(images), expected)
    assert not torch.equal(twin(images), expected)


def test_features_have_the_widths_that_heads_learn(case: Case, backbone: Backbone, images: Tensor) -> None:
    backbone.eval()
    with torch.no_grad():
        examples = [backbone.feature(hidden) for hidden in dry_run(backbone, case.shape)]
        hidden = backbone.stem(images)
        for index, example in enumerate(examples):
            hidden = backbone.block(index, hidden)
            feature = backbone.feature(hidden)
            for view in ("pooled", "cls", "map")[: len(case.shape)]:
                assert getattr(feature, view)().shape[1:] == getattr(example, view)().shape[1:]
            if len(case.shape) == 3:
                assert torch.allclose(feature.pooled(), feature.map().mean(dim=(2, 3)), atol=1e-5)


@pytest.mark.parametrize(
    ("name", "args"),
    [
        ("timm/vit_tiny_patch16_224", {"patch_size": 8, "embed_dim": 12, "depth": 1}),
        ("timm/swin_tiny_patch4_window7_224", WINDOWS),
        ("timm/test_efficientnet", {}),
        ("timm/resnet18", {}),
        ("resnet20", {}),
        ("msdnet", SMALL_MSDNET),
    ],
)
def test_maps_are_height_by_width(name: str, args: dict[str, object]) -> None:
    backbone = build_backbone(BackboneSection(name=name, args=args), input_shape=(3, 16, 32), num_outputs=2)
    height, width = backbone.feature(dry_run(backbone, (3, 16, 32))[0]).map().shape[2:]
    assert width == 2 * height


@pytest.mark.parametrize("kind", ["linear", "mlp-7", "sdn"])
def test_every_kind_of_head_fits(case: Case, backbone: Backbone, images: Tensor, kind: str) -> None:
    if kind == "sdn" and len(case.shape) == 2:
        with pytest.raises(EectlError, match=r"^exits\.head: .*linear"):
            attach_exits(backbone, after=[0], heads=kind, num_outputs=NUM_OUTPUTS, input_shape=case.shape)
        return
    model = attach_exits(backbone, after=[0], heads=kind, num_outputs=NUM_OUTPUTS, input_shape=case.shape)
    first, last = model(images)
    assert first.logits.shape == last.logits.shape == (4, NUM_OUTPUTS)


def test_exit_gradients_stop_at_its_block(model: MultiExitModel, images: Tensor) -> None:
    output = model(images, exits={1})[0]
    output.logits.square().sum().backward()
    graded = {model.part(name) for name, parameter in model.named_parameters() if parameter.grad is not None}
    assert graded == {("segment", 1), ("head", 1)}
    assert all(p.grad is not None for n, p in model.named_parameters() if model.part(n) in graded)


def test_unwanted_exits_and_later_blocks_do_not_run(model: MultiExitModel, images: Tensor) -> None:
    model.eval()
    every = model(images)
    in_one = [names[0] for names in model.backbone.block_names[1:] if names]  # shared parts run in several blocks
    calls: list[int] = []
    for name in in_one:
        model.backbone.net.get_submodule(name).register_forward_hook(lambda *_: calls.append(1))
    first = model(images, exits={1})
    assert first[1:] == [None, None]
    assert in_one and not calls
    assert torch.equal(first[0].logits, every[0].logits)
    assert torch.equal(model(images, exits={3})[2].logits, every[2].logits)
    assert torch.equal(every[2].logits, library(model.backbone.net, images))


def test_rows_leave_where_the_offline_choice_says(model: MultiExitModel, images: Tensor) -> None:
    """Thresholds midway between two rows' scores, so that some leave at each exit that is passed."""
    model.eval()
    with torch.inference_mode():
        logits = torch.stack([output.logits for output in model(images)])
        scores = CRITERIA["max-softmax"].scores(logits)
        thresholds = [float(row.sort().values[2:].mean()) for row in scores[:-1]]
        taken = choose(scores, thresholds)
        found, exits = early_exit(model, images, Policy(CRITERIA["max-softmax"], tuple(thresholds)))
    assert exits.tolist() == taken.tolist() and len(set(taken.tolist())) > 1
    torch.testing.assert_close(found, logits[taken, torch.arange(len(images))], rtol=1e-3, atol=1e-4)


@pytest.mark.parametrize(("segments", "heads"), [((), (1, 2)), ((1,), ()), ((2,), (2,)), ((3,), ()), ((1, 2, 3), ())])
def test_frozen_parts_stay_bit_equal(
    model: MultiExitModel, images: Tensor, segments: tuple[int, ...], heads: tuple[int, ...]
) -> None:
    """Buffers included; what trains moves. Dropout is on exactly in the parts that train."""
    model.set_trainable(segments, heads)
    model.train_parts(segments, heads)
    before = copy.deepcopy(model.state_dict())
    optimizer = torch.optim.AdamW([p for p in model.parameters() if p.requires_grad], lr=0.1, weight_decay=0.1)
    sum(output.logits.square().sum() for output in model(images)).backward()
    optimizer.step()
    moved = {model.part(name) for name, tensor in model.state_dict().items() if not torch.equal(tensor, before[name])}
    assert moved == {("segment", k) for k in segments} | {("head", k) for k in heads}
    for name, module in model.named_modules():
        if isinstance(module, (nn.Dropout, nn.modules.batchnorm._BatchNorm)):
            kind, number = model.part(name)
            assert module.training == (number in {"segment": segments, "head": heads}[kind]), name


def test_a_spec_rebuilds_the_network(case: Case, model: MultiExitModel, images: Tensor) -> None:
    check_rebuilding(model, images, BackboneSection(name=case.name, args=case.args))


def saved_encoder(model_type: str) -> nn.Module:
    import transformers

    config = transformers.AutoConfig.for_model(model_type, num_labels=1000)
    return transformers.AutoModelForSequenceClassification.from_config(config)


def test_parameter_names_are_the_librarys() -> None:
    """The keys that the libraries' own published weights have."""
    import timm
    import torchvision

    with torch.device("meta"):
        for name, library in {
            "resnet50": torchvision.models.resnet50(),
            "vit_b_32": torchvision.models.vit_b_32(image_size=64),
            "timm/resnet18d": timm.create_model("resnet18d"),
            "timm/deit_tiny_distilled_patch16_224": timm.create_model("deit_tiny_distilled_patch16_224", img_size=64),
            "timm/swin_tiny_patch4_window7_224": timm.create_model("swin_tiny_patch4_window7_224", img_size=64),
            "timm/mobilenetv3_small_050": timm.create_model("mobilenetv3_small_050"),
            **{f"hf/{name}": saved_encoder(name) for name in ("bert", "distilbert", "electra")},
        }.items():
            shape = (3, 64) if name.startswith("hf/") else (3, 64, 64)
            ours = build_backbone(BackboneSection(name=name), input_shape=shape, num_outputs=1000)
            expected = {key: tensor.shape for key, tensor in library.state_dict().items()}
            assert {key: tensor.shape for key, tensor in ours.net.state_dict().items()} == expected


@pytest.mark.parametrize(
    ("name", "depth"),
    {
        **{"resnet20": 9, "resnet32": 15, "resnet44": 21, "resnet56": 27},
        **{"resnet18": 8, "resnet34": 16, "resnet50": 16, "resnet101": 33, "resnet152": 50},
        **{"vit": 7, "vit_b_16": 12, "vit_b_32": 12, "vit_l_16": 24, "vit_l_32": 24},
        **{"msdnet": 19, "timm/resnet26": 8, "timm/vit_tiny_patch16_224": 12},
        **{"timm/convnext_tiny": 18, "timm/convnextv2_atto": 12, "timm/swin_tiny_patch4_window7_224": 12},
        **{"timm/swinv2_tiny_window8_256": 12, "timm/efficientnet_b0": 16, "timm/mobilenetv2_100": 17},
        **{"timm/mobilenetv3_large_100": 16, "timm/hardcorenas_a": 12, "timm/regnety_002": 13, "timm/regnetz_005": 21},
        **{"timm/mixer_s32_224": 8, "timm/gmlp_s16_224": 30, "timm/resmlp_12_224": 12, "timm/repvgg_a0": 21},
        **{
            "hf/modernbert": 22,
            "hf/mpnet": 12,
            "hf/gte": 12,
            "hf/bert": 24,
            "hf/roberta": 24,
            "hf/distilbert": 12,
            "hf/albert": 24,
            "hf/electra": 24,
            "hf/deberta-v2": 48,
        },
        **{"timm/resnetv2_50": 16, "timm/nfnet_f0": 12, "timm/resnest14d": 4, "timm/skresnet18": 8, "timm/res2net50_26w_4s": 16},
    }.items(),
)
def test_block_numbers_are_pinned(name: str, depth: int) -> None:
    with torch.device("meta"):
        shape = (3, 64) if name.startswith("hf/") else (3, 64, 64)
        assert build_backbone(BackboneSection(name=name), input_shape=shape, num_outputs=10).depth == depth


def test_a_downsampling_layer_belongs_to_the_block_after_it() -> None:
    spec = BackboneSection(name="timm/swin_tiny_patch4_window7_224", args=WINDOWS)
    backbone = build_backbone(spec, input_shape=(3, 16, 16), num_outputs=2)
    assert [backbone.locate(name) for name in ("layers.0.blocks.1", "layers.1.downsample.norm", "layers.1.blocks.0")] == [1, 2, 2]


def test_a_stage_without_blocks_is_its_downsampling_layer() -> None:
    backbone = build_noisy("timm/convnext_atto", {"depths": [1, 0, 2, 1], "dims": [8, 8, 8, 8]}, (3, 32, 32)).eval()
    assert [name for name, _ in backbone.net.named_parameters() if backbone.locate(name) == 1] == [
        f"stages.1.downsample.{name}" for name in ("0.weight", "0.bias", "1.weight", "1.bias")
    ]
    assert backbone.depth == 5
    images = torch.randn(2, 3, 32, 32)
    assert torch.equal(backbone(images), backbone.net(images))


@pytest.mark.parametrize("training", [False, True], ids=["eval", "train"])
@pytest.mark.parametrize(
    "name",
    [
        *("skresnet18", "convnextv2_atto"),
        *(
            pytest.param(name, marks=pytest.mark.thorough)
            for name in ("resnest14d", "hardcorenas_a", "mobilenetv2_035", "resmlp_12_224", "gmlp_s16_224")
        ),
    ],
)
def test_networks_of_the_same_modules_need_no_adapter(name: str, training: bool) -> None:
    backbone = build_noisy(f"timm/{name}", {}, (3, 32, 32)).train(training)
    twin, images = copy.deepcopy(backbone.net), torch.randn(2, 3, 32, 32)
    expected = twin(images)
    assert expected.std() > 0
    assert torch.equal(backbone(images), expected)


def test_resnet20_is_he_et_als_with_projections() -> None:
    """Their 0.27 M parameters (269,722 with option A), and a 1×1 convolution and BatchNorm at each of two changes of shape."""
    backbone = build_backbone(BackboneSection(name="resnet20"), input_shape=(3, 32, 32), num_outputs=10)
    projections = (16 * 32 + 2 * 32) + (32 * 64 + 2 * 64)
    assert sum(p.numel() for p in backbone.parameters()) == 269_722 + projections


@pytest.mark.parametrize(("name", "width"), [("resnet18", 512), ("test_efficientnet", 64), ("mobilenetv3_small_050", 288)])
def test_timms_head_dropout_follows_the_head_and_not_the_stem(name: str, width: int) -> None:
    spec = BackboneSection(name=f"timm/{name}", args={"drop_rate": 0.5})
    backbone = build_backbone(spec, input_shape=(3, 32, 32), num_outputs=NUM_OUTPUTS)
    model = attach_exits(backbone, after=[0], heads="auto", num_outputs=NUM_OUTPUTS, input_shape=(3, 32, 32))
    hidden = Hidden(torch.randn(4, width, 1, 1))
    model.train_parts(segments={1}, heads={1})
    assert torch.equal(backbone.head(hidden), backbone.head(hidden))
    model.train_parts(segments={2}, heads=())
    assert not torch.equal(backbone.head(hidden), backbone.head(hidden))
