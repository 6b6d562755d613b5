"""Move a network's weights along filter-normalised random directions. Knows no data and no loss.

Li et al., Visualizing the Loss Landscape of Neural Nets (arXiv 1712.09913): a filter's noise gets the filter's own norm.
"""

import contextlib
from collections.abc import Callable, Iterable, Iterator, Sequence

import torch
from torch import Tensor, nn

from eectl.core.errors import lookup
from eectl.core.seeds import derive_seed
from eectl.models.multi_exit import MultiExitModel
from eectl.recipe.choices import MOVED_CHOICES, in_order

Move = Callable[..., None]


def moved_names(model: MultiExitModel, only: str) -> tuple[str, ...]:
    """Name the parameters that move, tied ones once.

    `only` is `all`, `heads` (the attached ones and the network's own) or `backbone` (the rest). Raises EectlError for another
    word.
    """
    wanted = lookup(PARTS, only, what="--only")
    return tuple(name for name, _ in model.named_parameters() if _is_head(model, name) in wanted)


def _is_head(model: MultiExitModel, name: str) -> bool:
    """Say whether a parameter belongs to a head; the network's own head is one."""
    own = name.removeprefix("backbone.net.")
    return own == name or model.backbone.locate(own) == model.backbone.depth


def raw_noise(shape: Sequence[int], *, seed: int, direction: int, name: str) -> Tensor:
    """Draw Gaussian noise, float32 on the CPU, from these four things alone: networks with the same names share it."""
    generator = torch.Generator().manual_seed(derive_seed(seed, "loss-landscape", direction, name))
    return torch.randn(tuple(shape), generator=generator)


def filter_normalised(noise: Tensor, weight: Tensor) -> Tensor:
    """Scale noise so that every slice along dimension 0 has the norm of the weight's; return 0 for biases and norms' scales.

    The result has the weight's type and device. Tensors of one dimension do not move, as Li et al. chose: a filter would be a
    single number there.
    """
    if weight.dim() < 2:
        return torch.zeros_like(weight)
    filters = noise.double().flatten(1)
    norms = torch.linalg.vector_norm(weight.detach().cpu().double().flatten(1), dim=1, keepdim=True)
    own = torch.linalg.vector_norm(filters, dim=1, keepdim=True).clamp(min=torch.finfo(torch.float64).tiny)
    scaled: Tensor = (filters * (norms / own)).view(weight.shape).to(weight)
    return scaled


@contextlib.contextmanager
def random_plane(model: nn.Module, names: Iterable[str], *, seed: int, dimensions: int) -> Iterator[Move]:
    """Give `move(x, …)`, which puts the named parameters at θ + x·δ + …, one coefficient per direction; 0, … is θ bitwise.

    Always computed from θ, never step by step. On leaving, every parameter and buffer is as it was, bitwise.
    """
    wanted = set(names)
    parameters = {name: parameter for name, parameter in model.named_parameters() if name in wanted}
    origins = {name: parameter.detach().clone() for name, parameter in parameters.items()}
    buffers = {name: buffer.detach().clone() for name, buffer in model.named_buffers()}
    directions = [
        {
            name: filter_normalised(raw_noise(origin.shape, seed=seed, direction=number, name=name), origin)
            for name, origin in origins.items()
            if origin.dim() >= 2
        }
        for number in range(dimensions)
    ]

    @torch.no_grad()
    def move(*coefficients: float) -> None:
        assert len(coefficients) == dimensions
        for name, origin in origins.items():
            place = origin
            for coefficient, direction in zip(coefficients, directions, strict=True):
                if coefficient and name in direction:  # adding 0·δ could turn −0 into 0
                    place = place + coefficient * direction[name]
            parameters[name].copy_(place)

    try:
        yield move
    finally:
        move(*[0.0] * dimensions)
        with torch.no_grad():
            for name, buffer in model.named_buffers():
                buffer.copy_(buffers[name])


PARTS: dict[str, tuple[bool, ...]] = in_order(  # whether a weight that moves is a head's
    MOVED_CHOICES, {"all": (False, True), "backbone": (False,), "heads": (True,)}
)
