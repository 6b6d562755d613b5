"""Passes that run a whole network on every row: the plain backbone, and all exits with the policy's choice among them.

The second gives early exit's answers without any routing, which is faster where little would be saved. On a GPU each is one
program for each shape of inputs.
"""

from collections.abc import Iterable, Iterator

import torch
from torch import Tensor

from eectl.core.capture import Capture, recorder_for
from eectl.exits.policy import Policy, choose
from eectl.exits.router import Answers
from eectl.exits.stages import in_bucket
from eectl.models.backbone import Backbone
from eectl.models.multi_exit import MultiExitModel


class PlainPass:
    """The backbone without exits; it must be in eval mode. Call it under torch.inference_mode().

    Args:
        capture: records the program; default: the device's recorder.
    """

    def __init__(self, backbone: Backbone, *, capture: Capture | None = None) -> None:
        self._backbone = backbone
        self._capture = capture or Capture(recorder_for(next(backbone.parameters()).device), plain_calls=1)
        self._run = self._capture.function(self._logits)

    def __call__(self, inputs: Tensor) -> Tensor:
        """Return the network's logits [row, class]."""
        if self._capture.recorder is None:
            return self._run(inputs)
        return self._run(_bucketed(inputs, self._backbone)).clone()

    def _logits(self, inputs: Tensor) -> Tensor:
        logits: Tensor = self._backbone(inputs)
        return logits


class FullPass:
    """A network under a policy, all of whose exits run on all rows, and then each row's is chosen; see router.Answerer.

    The network must be in eval mode and stay there. Call it under torch.inference_mode().

    Args:
        capture: records the program; default: the device's recorder.
    """

    def __init__(self, model: MultiExitModel, policy: Policy, *, capture: Capture | None = None) -> None:
        assert not any(module.training for module in model.modules())
        assert len(policy.thresholds) == model.num_exits - 1
        self._model, self._policy = model, policy
        self._capture = capture or Capture(recorder_for(next(model.parameters()).device), plain_calls=1)
        self._run = self._capture.function(self._answer)

    def __call__(self, inputs: Tensor) -> tuple[Tensor, Tensor]:
        """Return the logits [row, class] of the exit that the policy chooses for each row, and its index [row], from 0."""
        assert len(inputs)
        if self._capture.recorder is None:
            return self._run(inputs)
        logits, exits = self._run(_bucketed(inputs, self._model.backbone))
        return logits.clone(), exits.clone()

    def stream(self, batches: Iterable[Tensor], *, batch_size: int) -> Iterator[Answers]:
        """Yield each batch's answers, its rows numbered on from those before; batches of more rows are cut."""
        start = 0
        for batch in batches:
            for part in torch.split(batch, batch_size):
                yield Answers(torch.arange(start, start + len(part), device=part.device), *self(part))
                start += len(part)

    def _answer(self, inputs: Tensor) -> tuple[Tensor, Tensor]:
        outputs = [output.logits for output in self._model(inputs) if output is not None]
        score = self._policy.criterion.score
        scores = [score(each, outputs[:index]) for index, each in enumerate(outputs[:-1])]
        last = torch.zeros(len(inputs), device=inputs.device)
        exits = choose(torch.stack([*scores, last]), self._policy.thresholds)
        logits = outputs[-1]
        for index, each in reversed(list(enumerate(outputs[:-1]))):
            logits = torch.where((exits == index)[:, None], each, logits)
        return logits, exits


def _bucketed(inputs: Tensor, backbone: Backbone) -> Tensor:
    return in_bucket(inputs, longest=getattr(backbone, "max_tokens", None))
