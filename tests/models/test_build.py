"""The doors: names, options, images, weights and positions, and what they say when something is wrong."""

import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import save_file

from eectl.core.errors import EectlError
from eectl.models.backbone import Backbone
from eectl.models.build import BACKBONES, attach_exits, build_backbone, model_spec
from eectl.models.multi_exit import blocks_of
from eectl.recipe.recipe import BackboneSection

TINY_VIT = {"patch_size": 4, "dim": 8, "mlp_dim": 8, "depth": 2, "heads": 2}
TINY_TIMM = {"patch_size": 4, "embed_dim": 12, "depth": 2, "num_heads": 3}


def build(name: str, shape: tuple[int, int, int] = (3, 8, 8), num_outputs: int = 4, **section: Any) -> Backbone:
    return build_backbone(BackboneSection(name=name, **section), input_shape=shape, num_outputs=num_outputs)


@pytest.mark.process
def test_naming_backbones_imports_no_torch() -> None:
    program = "import sys; from eectl.models.build import BACKBONES; print('vit' in BACKBONES, 'torch' in sys.modules)"
    assert subprocess.run([sys.executable, "-c", program], capture_output=True, text=True, check=True).stdout == "True False\n"


@pytest.mark.process
def test_only_the_library_that_is_needed_is_imported() -> None:
    program = """
import sys
from eectl.models.build import build_backbone
from eectl.recipe.recipe import BackboneSection
build_backbone(BackboneSection(name="resnet20"), input_shape=(3, 8, 8), num_outputs=2)
print("timm" in sys.modules, "torchvision" in sys.modules)
"""
    assert subprocess.run([sys.executable, "-c", program], capture_output=True, text=True, check=True).stdout == "False False\n"


@pytest.mark.parametrize("name", [name for name in BACKBONES if name != "vit_h_14"])  # 14 does not divide 64
def test_every_known_backbone_builds(name: str) -> None:
    with torch.device("meta"):
        backbone = build(name, (3, 64, 64))
    assert backbone.name == name
    assert backbone.prefers_channels_last == (backbone.default_head == "sdn") == name.startswith(("resnet", "msdnet"))


def test_building_draws_from_the_global_generator() -> None:
    def weights(seed: int) -> torch.Tensor:
        torch.manual_seed(seed)
        return next(build("resnet20").parameters())

    assert torch.equal(weights(0), weights(0))
    assert not torch.equal(weights(0), weights(1))


@pytest.mark.parametrize(
    ("name", "shape", "args", "says"),
    [
        ("resnet", (3, 8, 8), {}, "'resnet'.*resnet20.*timm/NAME"),
        (
            "resnet18",
            (3, 8, 8),
            {"stm": "small"},
            r"backbone.args.stm: .*'stem'.*resnet18",
        ),
        ("resnet18", (3, 8, 8), {"stem": "smal"}, "backbone.args.stem is 'smal'.*standard.*small"),
        ("resnet20", (3, 8, 8), {"stem": "small"}, "resnet20 takes no options"),
        ("vit", (3, 8, 8), {"dim": 10}, "dim is 10 .*heads 8"),
        ("vit", (3, 8, 8), {"depth": True}, "backbone.args.depth is True.*1"),
        ("vit", (3, 8, 8), {"dropout": 1}, "backbone.args.dropout is 1;.*0.*1"),
        ("vit", (3, 30, 30), {}, "4,.*30×30.*data.image_size=32"),
        ("vit_b_16", (1, 8, 8), {}, "data.image_size=16"),
        ("vit", (3, 8, 12), {}, "square.*8×12"),
        ("timm/resnet81", (3, 8, 8), {}, r"'resnet81'.*resnet18"),
        ("timm/densenet121", (3, 8, 8), {}, "densenet121.*8×8.*data.image_size"),
        ("timm/vit_tiny_patch16_224", (3, 8, 8), {}, "8×8.*data.image_size"),
        ("timm/vit_tiny_patch16_224", (3, 16, 16), {"depht": 1}, "backbone.args.depht: .*'depth'"),
        ("timm/vit_tiny_patch16_224", (3, 16, 16), {"img_size": 8}, "backbone.args.img_size: "),
        ("timm/vit_tiny_patch16_224", (3, 16, 16), {"num_heads": 5}, "cannot be built with .*num_heads.*divisible by num_heads"),
        ("timm/vit_tiny_patch16_224", (3, 16, 16), {"depth": 0}, "no block"),
        ("timm/vit_tiny_patch16_224", (3, 16, 16), {"norm_layer": "x"}, "cannot be built"),
        ("timm/vit_tiny_r_s16_p8_224", (3, 16, 16), {}, "timm/vit_tiny_r_s16_p8_224.*16×16"),
        ("timm/resnetblur18", (3, 8, 8), {}, "8×8.*data.image_size.*64"),
        (
            "timm/regnety_002",
            (3, 8, 8),
            {"cfg": 1},
            "backbone.args.cfg: .*output_stride, global_pool, drop_rate",
        ),
        ("timm/mixer_s32_224", (3, 64, 64), {"num_blocks": 2}, "{'num_blocks': 2} .*'num_blocks'"),
        ("timm/swin_tiny_patch4_window7_224", (3, 2, 2), {}, "2×2.*data.image_size"),
        ("timm/resnet18.bogus", (3, 8, 8), {}, "Invalid pretrained tag"),
    ],
)
def test_mistakes_in_the_recipe(name: str, shape: tuple[int, int, int], args: dict[str, Any], says: str) -> None:
    with pytest.raises(EectlError, match=says):
        build(name, shape, args=args)


@pytest.mark.parametrize("name", ["resnet18", "resnet20", "msdnet", "timm/resnet18", "timm/test_efficientnet"])
def test_cnns_take_images_down_to_one_pixel(name: str) -> None:
    backbone = build(name, (1, 1, 1)).eval()
    assert backbone(torch.zeros(2, 1, 1, 1)).shape == (2, 4)


def test_positions_are_checked_and_sorted() -> None:
    backbone = build("resnet20")

    def attach(after: list[int], heads: str | list[str] = "auto") -> Any:
        return attach_exits(backbone, after=after, heads=heads, num_outputs=4, input_shape=(3, 8, 8))

    with pytest.raises(EectlError, match=r"exits.after\[2\] is 9.*resnet20.*0–8"):
        attach([0, 1, 9])
    with pytest.raises(EectlError, match=r"exits.after\[0\] is -1"):
        attach([-1])
    with pytest.raises(EectlError, match=r"exits.after\[1\] is 3"):
        attach([3, 3])
    with pytest.raises(EectlError, match=r"2 .*1 exits"):
        attach([3], ["sdn", "sdn"])
    model = attach([8, 0, 3], ["linear", "auto", "mlp-3"])
    assert model.after == (0, 3, 8)
    spec = model_spec(model, BackboneSection(name="resnet20", pretrained=True), input_shape=(3, 8, 8), num_outputs=4)
    assert spec.heads == ("sdn", "mlp-3", "linear")
    assert not spec.backbone.pretrained
    assert model([torch.zeros(2, 3, 8, 8)][0])[1].logits.shape == (2, 4)
    assert attach([]).num_exits == 1


def test_placements() -> None:
    assert blocks_of("every-2", 9) == (2, 4, 6)
    assert blocks_of("dense-sparse", 16) == (1, 2, 3, 4, 5, 6, 7, 11)
    assert blocks_of("every-1", 4) == (1, 2)
    with pytest.raises(EectlError, match="no exit on a network of 9 blocks"):
        blocks_of("every-8", 9)
    with pytest.raises(EectlError, match="unknown placement 'every-x'"):
        blocks_of("every-x", 9)


FROM_FILE = [("resnet20", {}), ("resnet18", {}), ("vit", TINY_VIT), ("timm/deit_tiny_distilled_patch16_224", TINY_TIMM)]


@pytest.mark.parametrize(("name", "args"), FROM_FILE)
@pytest.mark.parametrize("prefix", ["", "backbone.net."])
def test_weights_from_a_file(tmp_path: Path, name: str, args: dict[str, Any], prefix: str) -> None:
    source = build(name, args=args)
    file = tmp_path / "w.safetensors"
    extra = {"exits.0.fc.weight": torch.zeros(1)} if prefix else {}
    save_file({prefix + key: tensor.clone() for key, tensor in source.net.state_dict().items()} | extra, file)
    same = build(name, args=args, weights=file)
    assert same.fresh == ()
    assert all(torch.equal(tensor, source.state_dict()[key]) for key, tensor in same.state_dict().items())

    other = build(name, args=args, weights=file, num_outputs=7)
    classifiers = [f"{owner}.{kind}" for owner in source.classifiers for kind in ("weight", "bias")]
    assert sorted(other.fresh) == sorted(classifiers)
    loaded = {key for key, tensor in other.net.state_dict().items() if key not in other.fresh}
    assert all(torch.equal(other.net.state_dict()[key], source.net.state_dict()[key]) for key in loaded)
    assert other.net.state_dict()[other.fresh[0]].shape[0] == 7


def test_weights_without_a_classifier_leave_it_fresh(tmp_path: Path) -> None:
    state = {key: tensor for key, tensor in build("resnet20").net.state_dict().items() if not key.startswith("fc.")}
    save_file(state, tmp_path / "w.safetensors")
    assert build("resnet20", weights=tmp_path / "w.safetensors").fresh == ("fc.weight", "fc.bias")


def test_weights_that_do_not_fit(tmp_path: Path) -> None:
    file = tmp_path / "w.safetensors"
    save_file(build("resnet20").net.state_dict(), file)
    with pytest.raises(EectlError, match=r"w.safetensors: conv1.weight .*16×3×3×3.*16×1×3×3.* 3 channels"):
        build("resnet20", (1, 8, 8), weights=file)
    with pytest.raises(EectlError, match=r"resnet32.*layer1.3.conv1.weight, .*\d+ more$"):
        build("resnet32", weights=file)
    save_file({**build("resnet20").net.state_dict(), "stray": torch.zeros(1)}, file)
    with pytest.raises(EectlError, match="unexpected stray"):
        build("resnet20", weights=file)
    save_file(build("vit", args=TINY_VIT).net.state_dict(), file)
    with pytest.raises(EectlError, match=r"pos_embedding .*1×5×8.*1×17×8.*data.image_size"):
        build("vit", (3, 16, 16), args=TINY_VIT, weights=file)
    with pytest.raises(EectlError, match="cannot be read"):
        build("resnet20", weights=tmp_path / "none.safetensors")


@pytest.mark.parametrize(
    ("name", "says"),
    [
        ("resnet20", "resnet20.*backbone.weights"),
        ("vit", "vit .*backbone.weights"),
        ("vit_b_16", "data.image_size=224"),
    ],
)
def test_published_weights_that_are_not_there(name: str, says: str) -> None:
    with pytest.raises(EectlError, match=says):
        build(name, (3, 64, 64), pretrained=True)


def test_a_download_that_fails_is_one_line(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    monkeypatch.setenv("TORCH_HOME", str(tmp_path))
    monkeypatch.setenv("https_proxy", "http://127.0.0.1:9")
    with pytest.raises(EectlError, match=r"resnet18 .*backbone\.weights"):
        build("resnet18", pretrained=True)


def test_published_weights_load_from_torchvisions_cache(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    """A file of the published kind: 1,000 classes under torchvision's names, with the check sum of its name."""
    from torchvision.models import ResNet18_Weights, resnet18

    monkeypatch.setenv("TORCH_HOME", str(tmp_path))
    library = resnet18()
    cached = tmp_path / "hub" / "checkpoints" / Path(ResNet18_Weights.DEFAULT.url).name
    cached.parent.mkdir(parents=True)
    torch.save(library.state_dict(), cached)
    backbone = build("resnet18", pretrained=True)
    assert backbone.fresh == ("fc.weight", "fc.bias")
    assert torch.equal(backbone.net.layer4[1].conv2.weight, library.layer4[1].conv2.weight)
    with pytest.raises(EectlError, match=r"resnet18: conv1.weight .*64×3×7×7.*64×3×3×3"):
        build("resnet18", pretrained=True, args={"stem": "small"})
