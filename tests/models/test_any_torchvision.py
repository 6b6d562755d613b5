"""Any classifier of torchvision's through the traced adapter: the smallest of each family, four by default."""

import copy

import pytest
import torch
from torch import Tensor, nn

from eectl.core.errors import EectlError
from eectl.models.backbone import Backbone
from eectl.models.build import build_backbone
from eectl.recipe.recipe import BackboneSection

DEPTHS = {"alexnet": 4, "squeezenet1_1": 8, "shufflenet_v2_x0_5": 17, "mobilenet_v3_small": 12}
THOROUGH = {
    "convnext_tiny": 21,
    "densenet121": 7,
    "efficientnet_b0": 17,
    "googlenet": 11,
    "inception_v3": 15,
    "maxvit_t": 12,
    "mnasnet0_5": 19,
    "mobilenet_v2": 18,
    "regnet_y_400mf": 16,
    "resnet18": 8,
    "swin_t": 15,
    "swin_v2_t": 15,
    "vgg11": 7,
    "vit_b_16": 12,
}
SIZES = {"inception_v3": 96, "maxvit_t": 224, "alexnet": 96}
CASES = [*DEPTHS.items(), *(pytest.param(*each, marks=pytest.mark.thorough) for each in THOROUGH.items())]


def build(name: str, channels: int = 1) -> tuple[Backbone, Tensor]:
    torch.manual_seed(0)
    shape = (channels, SIZES.get(name, 64), SIZES.get(name, 64))
    backbone = build_backbone(BackboneSection(name=f"torchvision/{name}"), input_shape=shape, num_outputs=5)
    for classifier in backbone.classifiers:  # a ViT's starts at zero
        for parameter in backbone.net.get_submodule(classifier).parameters():
            nn.init.normal_(parameter)
    return backbone, torch.randn(4, *shape)


@pytest.mark.parametrize(("name", "depth"), CASES)
def test_the_librarys_bits_and_fewer_rows_after_every_block(name: str, depth: int) -> None:
    backbone, images = build(name)
    assert backbone.depth == depth
    for training in (True, False):
        twin = copy.deepcopy(backbone.train(training).net)
        torch.manual_seed(3)
        expected = twin(images)
        torch.manual_seed(3)
        assert torch.equal(backbone(images), expected) and expected.std() > 0
    with torch.no_grad():
        kept, hidden = torch.arange(4), backbone.stem(images)
        for index in range(backbone.depth):
            hidden = backbone.block(index, hidden)
            if len(kept) > 1:
                hidden, kept = hidden.take(torch.arange(1, len(kept))), kept[1:]
        torch.testing.assert_close(backbone.head(hidden), backbone.net(images)[kept], rtol=1e-3, atol=1e-4)


def test_other_channels_keep_the_librarys_own_filters() -> None:
    grey, colour = (build("squeezenet1_1", channels)[0].net.features[0].weight for channels in (1, 3))
    assert torch.equal(grey, colour[:, :1])


def test_an_unknown_name_and_options_are_refused() -> None:
    with pytest.raises(EectlError, match="mobilenet_v2"):
        build("mobilenetv2")
    with pytest.raises(EectlError, match="no such option"):
        build_backbone(BackboneSection(name="torchvision/alexnet", args={"droput": 0.1}), input_shape=(3, 64, 64), num_outputs=2)
    with pytest.raises(EectlError, match="image_size"):
        build_backbone(BackboneSection(name="torchvision/maxvit_t"), input_shape=(3, 64, 64), num_outputs=2)
