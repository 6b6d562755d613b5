"""The peers' early exits on our backbones, rigged so that an equal share of the rows leaves at each of their own exits.

`exits` [row] are those at which the rows are sure enough, from 0: where each would leave if it were alone.

Nothing of theirs is copied or changed: earlyon (PyPI) wraps the library's network with its own heads; of a checkout of
kamadforge/early-exit-benchmark come the heads and the forward pass that stops.
"""

from collections.abc import Callable, Sequence

import torch
from peer import around
from torch import Tensor, nn
from torch.nn import functional as F

from eectl.exits.policy import choose
from eectl.models.multi_exit import MultiExitModel

THRESHOLD = 0.5


class Earlyon:
    """earlyon's wrapper: one row stops alone; of a batch all rows stop where the last of them is sure."""

    def __init__(
        self, model: MultiExitModel, num_outputs: int, inputs: Tensor, spread: Callable[[Sequence[Tensor]], tuple[float, ...]]
    ) -> None:
        from earlyon.models.custom import custom_ee

        backbone = model.backbone
        names = [backbone.block_names[index][-1] for index in model.after]
        self._net = custom_ee(backbone.net, names, num_outputs, input_shape=(1, *inputs.shape[1:])).eval()
        with torch.inference_mode():
            passes = [self._net(part, mode="training") for part in inputs.split(32)]
            confidences = [torch.cat(each).softmax(dim=1).amax(dim=1) for each in zip(*passes, strict=True)]
            thresholds = spread(confidences)
            self._net.config.confidence_thresholds = list(thresholds)
            self.exits = choose(torch.stack(confidences), thresholds)
            self(inputs[:1])  # counts operations the first time

    def __call__(self, inputs: Tensor) -> object:
        return self._net(inputs) if len(inputs) == 1 else self._net.forward_inference_batched(inputs)


class AuthorsExits:
    """The authors' network in threshold mode: one threshold for all exits, so each head's own scale is rigged.

    The last exit is made sure of every row, as their pass fails where a row is sure nowhere.
    """

    def __init__(self, checkout: str, model: MultiExitModel, num_outputs: int, inputs: Tensor) -> None:
        self._net = around(checkout, model, num_outputs, tuple(inputs.shape[1:])).to(inputs.device)
        self._net.eval()
        linears = [[part for part in head.modules() if isinstance(part, nn.Linear)][-1] for head in self._net.head_modules()]
        with torch.inference_mode():
            passes = [self._net(part) for part in inputs.split(32)]
            logits = [torch.cat(each) for each in zip(*passes, strict=True)]
            self.exits = torch.full((len(inputs),), len(linears), device=inputs.device)
            for number, linear in enumerate(linears):
                here = self.exits == len(linears)
                scale = _scale(logits[number][here], round(len(inputs) / len(logits)))
                linear.weight.mul_(scale)
                linear.bias.mul_(scale)
                sure = F.softmax(logits[number] * scale, dim=-1).amax(dim=1) > THRESHOLD
                self.exits[here & sure] = number
            own = model.backbone.net.get_submodule(model.backbone.classifiers[0])
            own.bias[0] = 1e9  # a product would not do: torchvision's ViT begins with zeros
        self._net.set_threshold(THRESHOLD)

    def __call__(self, inputs: Tensor) -> object:
        return self._net(inputs)


def _scale(logits: Tensor, wanted: int) -> float:
    """By what to multiply these logits [row, class] so that about `wanted` rows are surer than the threshold."""
    low, high = -6.0, 6.0
    for _ in range(40):
        middle = (low + high) / 2
        sure = int((F.softmax(logits * 10**middle, dim=-1).amax(dim=1) > THRESHOLD).sum())
        low, high = (middle, high) if sure < wanted else (low, middle)
    return float(10**high)
