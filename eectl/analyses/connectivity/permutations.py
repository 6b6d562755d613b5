"""Find which units of a network can change places without changing what it computes, and permute them.

Nothing here is written for a network or a library: `tracing` watches the operations. What it finds is put to the test by
`check_unchanged` before anyone builds on it. Finding the best permutations is `matching`'s.
"""

from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from copy import deepcopy
from dataclasses import dataclass

import torch
from torch import Tensor

from eectl.analyses.connectivity.aten_rules import RULES
from eectl.analyses.connectivity.axis_labels import Label, segment_size
from eectl.analyses.connectivity.tracing import Tracer, plain_attention
from eectl.core.errors import EectlError
from eectl.models.multi_exit import MultiExitModel

Weights = dict[str, Tensor]
TOLERANCE = 1e-3  # of the outputs' spread; sums in another order differ by less than 1e-5 of it, wrong permutations by 1e-1


@dataclass(frozen=True)
class Piece:
    """A part of a tensor in which every axis is a number of several digits.

    `starts` and `sizes` are where it lies on each axis; `digits` are (group or None, size) for all axes in turn, slowest first.
    """

    starts: tuple[int, ...]
    sizes: tuple[int, ...]
    digits: tuple[tuple[int | None, int], ...]

    def of(self, tensor: Tensor) -> Tensor:
        """Return this part of a tensor, an axis per digit; a view where that can be."""
        for axis, (start, size) in enumerate(zip(self.starts, self.sizes, strict=True)):
            tensor = tensor.narrow(axis, start, size)
        return tensor.reshape([size for _, size in self.digits])

    def put(self, tensor: Tensor, part: Tensor) -> None:
        """Write such a part back into a tensor."""
        for axis, (start, size) in enumerate(zip(self.starts, self.sizes, strict=True)):
            tensor = tensor.narrow(axis, start, size)
        tensor.copy_(part.reshape(self.sizes))

    def places(self, group: int) -> list[int]:
        """Return which digits a group permutes."""
        return [place for place, (mine, _) in enumerate(self.digits) if mine == group]


@dataclass(frozen=True)
class Specification:
    """Groups of units that can be permuted, each by a permutation of its own.

    `sizes` and `names` are the groups'; `pieces` say for each tensor of the state dict where they are in it (none: nowhere).
    `learned` are the parameters, without buffers and without second names of one tensor; `unknown` the operations that no rule
    knew, which pinned what they read.
    """

    sizes: tuple[int, ...]
    names: tuple[str, ...]
    pieces: Mapping[str, tuple[Piece, ...]]
    learned: tuple[str, ...]
    unknown: tuple[str, ...]

    def identity(self) -> list[Tensor]:
        """Return the permutations that move nothing: int64 [unit] per group."""
        return [torch.arange(size) for size in self.sizes]

    def shuffled(self, generator: torch.Generator, groups: Sequence[int] | None = None) -> list[Tensor]:
        """Draw a random permutation of each group, or of these `groups` alone."""
        wanted = range(len(self.sizes)) if groups is None else groups
        return [
            torch.randperm(size, generator=generator) if group in wanted else torch.arange(size)
            for group, size in enumerate(self.sizes)
        ]

    def apply(self, weights: Mapping[str, Tensor], permutations: Sequence[Tensor]) -> Weights:
        """Return permuted tensors: the i-th unit of group g is unit `permutations[g][i]` of the given ones."""
        moved = {}
        for name, tensor in weights.items():
            moved[name] = tensor.clone()
            for piece in self.pieces.get(name, ()):
                part = piece.of(tensor)
                for place, (group, _) in enumerate(piece.digits):
                    if group is not None:
                        part = part.index_select(place, permutations[group].to(part.device))
                piece.put(moved[name], part)
        return moved


def find_permutations(model: MultiExitModel, inputs: Tensor) -> Specification:
    """Find the groups of units of a network in evaluation mode, from one row of inputs [1, …] that goes to every exit."""
    model = deepcopy(model).to(memory_format=torch.contiguous_format)  # channels last, some operations set strides by hand
    inputs = inputs.contiguous()
    tensors = model.state_dict(keep_vars=True)
    with torch.no_grad(), plain_attention():
        tracer = Tracer(tensors, RULES)
        with tracer:
            outputs = model(inputs)
        for output in outputs:
            tracer.pin(tracer.get(output.logits))
        for tensor in tensors.values():
            if id(tensor) not in tracer.read:
                tracer.pin(tracer.get(tensor))
    return _specify(model, tracer, tensors)


def _specify(model: MultiExitModel, tracer: Tracer, tensors: Mapping[str, Tensor]) -> Specification:
    """Collect what is free after the trace, group by group."""
    learned = tuple(name for name, _ in model.named_parameters())
    labels = {name: _settled(tracer, tensor) for name, tensor in tensors.items()}
    labels = {name: _settled(tracer, tensor) for name, tensor in tensors.items()}  # resolving the others may have pinned some
    sizes: dict[int, int] = {}
    names: dict[int, str] = {}
    for name in learned:
        for variable, size in (factor for label in labels[name] for segment in label for factor in segment):
            if variable is not None:
                sizes[variable] = size
                names.setdefault(variable, name)
    numbers = {variable: number for number, variable in enumerate(sizes)}
    return Specification(
        sizes=tuple(sizes.values()),
        names=tuple(f"{names[variable]} ({size})" for variable, size in sizes.items()),
        pieces={name: pieces for name, own in labels.items() if (pieces := _pieces(own, numbers))},
        learned=learned,
        unknown=tuple(sorted(tracer.unknown)),
    )


def _settled(tracer: Tracer, tensor: Tensor) -> list[Label]:
    return [tracer.labels.resolve(label) for label in tracer.get(tensor)]


def _pieces(labels: Sequence[Label], numbers: Mapping[int, int]) -> tuple[Piece, ...]:
    """Return every combination of the axes' segments in which something moves."""
    pieces = [Piece((), (), ())]
    for label in labels:
        grown, start = [], 0
        for segment in label:
            size = segment_size(segment)
            digits = tuple((numbers.get(variable) if variable is not None else None, own) for variable, own in segment)
            grown += [Piece((*p.starts, start), (*p.sizes, size), (*p.digits, *digits)) for p in pieces]
            start += size
        pieces = grown
    return tuple(piece for piece in pieces if any(group is not None for group, _ in piece.digits))


@contextmanager
def holding(model: MultiExitModel, weights: Mapping[str, Tensor]) -> Iterator[MultiExitModel]:
    """Give the network other weights inside the context."""
    own = {name: tensor.clone() for name, tensor in model.state_dict().items()}
    model.load_state_dict(dict(weights))
    try:
        yield model
    finally:
        model.load_state_dict(own)


@torch.no_grad()
def logits_of(model: MultiExitModel, inputs: Tensor) -> Tensor:
    """Return all exits' logits [exit, row, class] in float32."""
    return torch.stack([output.logits.float() for output in model(inputs)])


def check_specification(model: MultiExitModel, spec: Specification, inputs: Tensor, *, seed: int) -> float:
    """Check that random permutations of all groups leave every exit's logits on `inputs` as they are.

    Returns the largest difference, in standard deviations of the logits. Where it is more than TOLERANCE, the groups are tried
    one by one, and EectlError names the first that changes what the network computes.
    """
    generator = torch.Generator().manual_seed(seed)
    weights = {name: tensor.clone() for name, tensor in model.state_dict().items()}
    plain = logits_of(model, inputs)

    def error(permutations: Sequence[Tensor]) -> float:
        with holding(model, spec.apply(weights, permutations)):
            return difference(plain, logits_of(model, inputs))

    whole = error(spec.shuffled(generator))
    if whole <= TOLERANCE:
        return whole
    for group, name in enumerate(spec.names):
        alone = error(spec.shuffled(generator, [group]))
        if not alone <= TOLERANCE:
            raise EectlError(f"permuting the units of {name} changed an exit's logits by {alone:.1e} of their spread; {_REPORT}")
    raise EectlError(f"permuting all units together changed an exit's logits by {whole:.1e} of their spread; {_REPORT}")


_REPORT = "this network's units cannot be matched yet, please report it"


def check_unchanged(first: Tensor, second: Tensor, *, label: str) -> None:
    """Raise EectlError where a permuted network's logits are not those of the original."""
    found = difference(first, second)
    if not found <= TOLERANCE:
        raise EectlError(f"{label}: matching its units changed an exit's logits by {found:.1e} of their spread; {_REPORT}")


def difference(first: Tensor, second: Tensor) -> float:
    """Return the largest difference of logits [exit, row, class], in standard deviations of the exit's logits."""
    spread = first.flatten(1).std(dim=1).clamp(min=1e-6)
    return float(((first - second).abs().flatten(1).amax(dim=1) / spread).max())
