"""A checkpoint as a network to use: load it with a policy, hand it images or texts, export it. Measures nothing."""

from collections.abc import Callable, Iterable, Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from itertools import islice
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from eectl.core.console import silent
from eectl.core.distributed import pick_device
from eectl.core.errors import EectlError, out_of_memory
from eectl.core.precision import FLOAT32, autocast, note_on_precision, resolve_precision
from eectl.data.splits import DataInfo
from eectl.deploy.answering import Answering
from eectl.deploy.answers import AnswerList, RowAnswer
from eectl.deploy.inputs import ImageInputs, RawInputs, text_inputs
from eectl.deploy.routes import Routed, Routes
from eectl.exits.costs import measure_costs
from eectl.exits.policy import Policies, Policy, policies_for, read_policies
from eectl.models.checkpoint import Checkpoint, load_checkpoint
from eectl.models.multi_exit import MultiExitModel

WINDOW = 8  # batches of texts among which rows are sorted by length
FEW = 8  # inputs that are not worth threads


def load(
    checkpoint: str | Path,
    *,
    policy: str | Path | None = None,
    budget: float | None = None,
    device: str = "auto",
    precision: str | None = None,
    tokenizer: str | Path | None = None,
) -> "Model":
    """Load a checkpoint to use it on new inputs, with early exit where a policy is given.

    Args:
        checkpoint: A .safetensors file that `eectl train` wrote.
        policy: Thresholds from `eectl calibrate-thresholds`; default: the plain network answers, at its last exit.
        budget: Which of the policy's budgets to keep, in % of the plain backbone's cost; default: the only one there is.
        device: auto (a GPU where there is one), cpu, cuda, cuda:N or mps.
        precision: auto, float32, tf32 or bf16; default: what the checkpoint was trained in. Whether a GPU multiplies float32 in
            TF32 is torch's own setting for the whole process, and is left as it is.
        tokenizer: A folder, or a hub id in the cache, that stands in for the recipe's; texts only.

    Raises:
        EectlError: For a file that is not a checkpoint or not a policy of it, a budget that the policy lacks or that is out of
            reach, a precision that the device does not have, and a tokenizer that is not there.

    Example, with a checkpoint of the digits:

    >>> model = load("model.safetensors", policy="policy.json", budget=50)
    >>> model.classes[:3], model.task
    (('0', '1', '2'), 'classification')
    >>> len(model.exits) == len(model.costs)
    True
    """
    path = Path(checkpoint)
    chosen = None if policy is None else _choose_policy(Path(policy), budget)
    if chosen is None and budget is not None:
        raise EectlError(
            f"a budget of {budget:g}% needs a policy: run eectl calibrate-thresholds {path} --budgets {budget:g} -o policy.json"
        )
    place = pick_device(device)
    loaded = load_checkpoint(path)
    if chosen is not None and policy is not None:
        about = loaded.about
        facts: dict[str, Any] = {"num_exits": len(about.spec.after) + 1, "splits": about.splits, "path": Path(policy)}
        labels = about.spec.num_outputs if about.task == "multilabel" else None
        chosen[0].check(loaded.digest, **facts, num_labels=labels)
    wish = precision or loaded.about.precision
    resolve_precision(wish, place)
    words = None if tokenizer is None else str(tokenizer)
    return Model(loaded, policy=chosen, precision=wish, tokenizer=words).to(place)


def _choose_policy(path: Path, budget: float | None) -> tuple[Policies, float]:
    """Read a policy file and return it with the budget to keep; raises EectlError where that is not clear, or out of reach."""
    policies = read_policies(path) if budget is None else policies_for(path, (float(budget),))
    if budget is None and len(policies.budgets) != 1:
        there = ", ".join(f"{entry.budget:g}" for entry in policies.budgets)
        raise EectlError(
            f"{path} has thresholds for several budgets ({there}); say which: budget={policies.budgets[0].budget:g} (--budget)"
        )
    entry = policies.budgets[0]
    if entry.thresholds is None:
        least = policies.exit_costs[0] / policies.plain_cost
        reached = [f"{each.budget:g}" for each in read_policies(path).budgets if each.thresholds is not None]
        raise EectlError(
            f"{path}: a budget of {entry.budget:g}% is out of reach, since leaving at the first exit costs {least:.1%}; "
            + (f"within reach: {', '.join(reached)}" if reached else "calibrate for larger ones")
        )
    return policies, entry.budget


class Model(nn.Module):
    """A network with what it needs to be used: its classes, how inputs are prepared, and when it leaves early.

    Called on prepared inputs it gives every exit's logits [row, class], a list, the network's own head last (regression: one
    column). So it exports: `torch.export.export(model, (x,))`, `torch.onnx.export(model, (x,), path, dynamo=True)`, and
    `torch.jit.trace(model, x)`, which takes no lists and gets a tuple. What is exported has all exits and no policy. It is in
    eval mode, and no parameter asks for a gradient.

    Attributes:
        network: The backbone with its exits.
        classes: Their names in the order of the logits, or those of levels or labels; empty for regression.
        task: classification, regression, multilabel or ordinal.
        policy: The criterion and thresholds in force; None: the plain network answers.
        budget: The budget that these keep, in % of the plain backbone's cost.
        say: Takes a line that says why a GPU is slower than it could be; default: it goes nowhere.
    """

    def __init__(
        self,
        checkpoint: Checkpoint,
        *,
        policy: tuple[Policies, float] | None = None,
        precision: str = FLOAT32,
        tokenizer: str | None = None,
    ) -> None:
        super().__init__()
        about = checkpoint.about
        self.network: MultiExitModel = checkpoint.model
        self.path = checkpoint.path
        self.digest = checkpoint.digest
        self.task = about.task
        self.classes = tuple(map(str, about.data["classes"]))
        targets = about.data_spec.targets if self.task == "regression" else ()
        self._answering = Answering(self.task, self.classes, targets, None if policy is None else policy[0].decisions)
        self.input_shape = tuple(about.spec.input_shape)
        self.default_batch_size = about.eval_batch_size
        self.text_columns = about.data_spec.text
        self.is_text = about.data_spec.is_text
        if tokenizer is not None and not self.is_text:
            raise EectlError(f"{checkpoint.path} takes images, which need no tokenizer; leave it out")
        self._wish = precision
        self._precision: str | None = None  # what the device makes of it, once asked
        self._made = {f"{self.path} was trained": about.precision}
        self.policy: Policy | None = None
        self.budget: float | None = None
        if policy is None:
            self._costs = measure_costs(self.network, self.input_shape).shares
        else:
            chosen, self.budget = policy
            self._made["the policy was made"] = chosen.precision
            (entry,) = (each for each in chosen.budgets if each.budget == self.budget)
            self.policy = Policy(chosen.criterion, entry.thresholds or ())
            self._costs = tuple(cost / chosen.plain_cost for cost in chosen.exit_costs)
        self.inputs = self._inputs(checkpoint, tokenizer)
        self._channels_last = not self.is_text and checkpoint.channels_last
        self._routes: Routes | None = None
        self.say: Callable[[str], None] = silent
        self.eval().requires_grad_(False)

    def _inputs(self, checkpoint: Checkpoint, tokenizer: str | None) -> RawInputs:
        """Return how inputs are read, and lay a convolutional network's weights as its inputs lie."""
        spec = checkpoint.about.data_spec
        if self.is_text:
            vocabulary = self.network.backbone.vocabulary
            return text_inputs(spec, vocabulary=vocabulary, tokenizer=tokenizer, where=checkpoint.path)
        if checkpoint.channels_last:
            self.network.to(memory_format=torch.channels_last)
        data = checkpoint.about.data
        info = DataInfo(data["name"], self.classes, self.input_shape, tuple(data["mean"]), tuple(data["std"]), self.task)
        return ImageInputs(info, spec, checkpoint.channels_last)

    @property
    def device(self) -> torch.device:
        """The device on which the network lies; `model.to("cuda")` moves it."""
        return next(self.network.parameters()).device

    @property
    def precision(self) -> str:
        """The precision in which `predict` computes on the network's device: float32, tf32 or bf16.

        `model(x)` computes as the caller's own autocast says.
        """
        if self._precision is None:
            self._precision = resolve_precision(self._wish, self.device)
        return self._precision

    @property
    def notes(self) -> tuple[str, ...]:
        """Notes for the user: that training or the policy's scores had another precision."""
        used = self.precision
        return tuple(note for what, made in self._made.items() for note in note_on_precision(what, made, used))

    @property
    def exits(self) -> tuple[int, ...]:
        """The block that each exit follows, from 0; the last exit is the network's own head, after the last block."""
        return *self.network.after, self.network.backbone.depth - 1

    @property
    def costs(self) -> tuple[float, ...]:
        """The cost of leaving at each exit, heads on the way included, as shares of the plain backbone's cost without exits.

        Multiply-adds, or, under a policy that was calibrated on measured times, times.
        """
        return self._costs

    def forward(self, inputs: Tensor) -> list[Tensor]:
        """Return every exit's logits of prepared inputs, the network's own head last.

        Args:
            inputs: What `preprocess` gives: images [row, channel, height, width] in normalised float32, texts [row, 3, token].

        Raises:
            EectlError: For raw pixels, and inputs of another shape than the network was made for.
        """
        tracing = torch.jit.is_tracing()  # type: ignore[attr-defined, no-untyped-call]
        if not tracing and not torch.compiler.is_compiling():
            self._check(inputs)
        logits = [output.logits for output in self.network(inputs)]
        return tuple(logits) if tracing else logits  # type: ignore[return-value]

    def _check(self, inputs: Tensor) -> None:
        """Raise EectlError for inputs that are not prepared, or not for this network."""
        ways = "model.predict(inputs) prepares them itself, model.preprocess(inputs) gives what model(x) takes"
        if not isinstance(inputs, Tensor):
            raise EectlError(f"model(x) takes a tensor of prepared inputs, not a {type(inputs).__name__}; {ways}")
        is_prepared = inputs.dtype == torch.int64 if self.is_text else inputs.is_floating_point()
        if not is_prepared:
            kind = str(inputs.dtype).removeprefix("torch.")
            wanted = "int64 token ids, masks and types" if self.is_text else "normalised floats"
            raise EectlError(f"model(x) takes {wanted}, and these are raw ({kind}); {ways}")
        fits = inputs.ndim == 3 and inputs.shape[1] == 3 if self.is_text else tuple(inputs.shape[1:]) == self.input_shape
        if not fits:
            shape = "row, 3, token" if self.is_text else ", ".join(map(str, ("row", *self.input_shape)))
            raise EectlError(f"model(x) takes inputs of shape [{shape}], and these are {list(inputs.shape)}; {ways}")

    def preprocess(self, inputs: Any) -> Tensor:
        """Prepare raw inputs for `model(x)`, on the network's device, one row each, in order.

        Args:
            inputs: As `predict` takes them.

        Raises:
            EectlError: For an input that cannot be read, which it names.
        """
        read = self.read([(f"inputs[{index}]", value) for index, value in enumerate(self.inputs.split(inputs))])
        values = [_or_raise(each) for each in read]
        if not values:
            raise EectlError(f"no {self.inputs.noun} to prepare; give one at least")
        ((rows, batch),) = self.inputs.batches(values, size=len(values), device=self.device)
        return batch[torch.tensor(rows, device=batch.device).argsort()] if self.is_text else batch

    def predict(self, inputs: Any, *, batch_size: int | None = None, top: int = 1) -> AnswerList:
        """Answer new inputs, each at the exit where the policy lets it go; without a policy at the last.

        Args:
            inputs: One input or several, mixed as they come, an iterator too. Images: paths, PIL images, uint8 arrays
                [height, width, channel] or [height, width], uint8 tensors [channel, height, width]. Texts: strings, or tuples of
                two for a network of pairs.
            batch_size: Rows at once; default: the recipe's.
            top: How many of the likeliest classes each answer has in `top`.

        Raises:
            EectlError: For an input that cannot be read, which it names, and pixels that are no uint8.

        Example, with a checkpoint of the digits:

        >>> import numpy as np
        >>> model = load("model.safetensors", policy="policy.json", budget=50)
        >>> answers = model.predict([np.zeros((8, 8), dtype=np.uint8), np.full((8, 8), 255, dtype=np.uint8)])
        >>> len(answers), answers[0].label in model.classes, all(0 < p <= 1 for p in answers.probabilities)
        (2, True, True)
        """
        size = self.check_request(batch_size, top)
        named = ((f"inputs[{index}]", value) for index, value in enumerate(self.inputs.split(inputs)))
        rows: list[RowAnswer] = []
        for chunk in _chunks(named, self.window(size)):
            rows += self.answer([_or_raise(each) for each in self.read(chunk)], batch_size=size, top=top)
        return AnswerList(tuple(rows))

    def check_request(self, batch_size: int | None, top: int) -> int:
        """Return the batch size, the recipe's where none is given; raises EectlError for one below 1, or a `top` out of range."""
        if top < 1 or (top > 1 and top > len(self.classes)):
            allowed = f"1 to {len(self.classes)}, its classes" if self.classes else "1, since it gives numbers (regression)"
            raise EectlError(f"top is {top}; for this network it may be {allowed}")
        if batch_size is not None and batch_size < 1:
            raise EectlError(f"batch_size is {batch_size}; it must be 1 or more")
        return batch_size or self.default_batch_size

    def window(self, batch_size: int) -> int:
        """Return how many inputs are held and answered at a time: a batch of images, some of texts, sorted by length."""
        return batch_size * WINDOW if self.is_text else batch_size

    def read(self, named: Sequence[tuple[str, Any]]) -> list[Any]:
        """Read inputs, each with the name that messages give it, in threads; an EectlError stands for one that cannot be read."""

        def one(item: tuple[str, Any]) -> Any:
            try:
                return self.inputs.read(item[1], where=item[0])
            except EectlError as error:
                return error

        with self.inputs.reading():
            if self.is_text or len(named) < FEW:
                return [one(item) for item in named]
            with ThreadPoolExecutor() as threads:
                return list(threads.map(one, named))

    @torch.inference_mode()
    def answer(self, values: Sequence[Any], *, batch_size: int, top: int = 1) -> list[RowAnswer]:
        """Answer inputs that `read` gave, in order."""
        if any(module.training for module in self.modules()):
            raise EectlError("the model is in training mode, in which a row's answer depends on its batch; call model.eval()")
        answers: list[RowAnswer | None] = [None] * len(values)
        if not values:
            return []
        try:
            with autocast(self.precision, self.device):
                for rows, batch in self.inputs.batches(values, size=batch_size, device=self.device):
                    for row, answer in zip(rows, self._said(*self._route(batch), top), strict=True):
                        answers[row] = answer
        except torch.OutOfMemoryError as error:
            raise out_of_memory(self.device, "--batch-size ", batch_size) from error
        return [answer for answer in answers if answer is not None]

    def _route(self, batch: Tensor) -> Routed:
        if self._routes is None:
            self._routes = Routes(self.network, self.policy, channels_last=self._channels_last, say=self.say)
        return self._routes(batch)

    @property
    def full_sizes(self) -> tuple[int, ...]:
        """The batch sizes at which all exits ran and the policy chose among them, as that was faster than early exit."""
        return () if self._routes is None else self._routes.full_sizes

    def _said(self, logits: Tensor, exits: Tensor | None, top: int) -> Iterator[RowAnswer]:
        """Make answers of logits [row, class]; raises EectlError where a network that diverged gives no numbers."""
        logits = logits.float().cpu()
        if not logits.isfinite().all():
            raise EectlError(
                f"{self.path}: outputs are not finite, so training diverged; train again with a smaller optimizer.lr"
            )
        last = len(self.exits)
        numbers = [last] * len(logits) if exits is None else [index + 1 for index in exits.tolist()]
        costs = [1.0] * len(logits) if exits is None else [self.costs[number - 1] for number in numbers]
        return self._answering.answers(logits, numbers, costs, top=top)

    def _apply(self, fn: Callable[..., Any], recurse: bool = True) -> "Model":
        """Forget what was learned of another device when the network moves."""
        self._routes, self._precision = None, None
        super()._apply(fn, recurse)  # type: ignore[no-untyped-call]
        return self


def _or_raise(read: Any) -> Any:
    if isinstance(read, EectlError):
        raise read
    return read


def _chunks(items: Iterable[tuple[str, Any]], size: int) -> Iterator[list[tuple[str, Any]]]:
    """Take `size` items at a time from an iterator."""
    rest = iter(items)
    while chunk := list(islice(rest, size)):
        yield chunk
