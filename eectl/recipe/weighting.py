"""The weight of each exit's loss, as plain numbers: named schemes, or a list. The losses are in models/losses.py; no torch.

`equilibrium` and `l2w` are more than numbers: what they do to gradients and rows lies in `models/equilibrium.py` and `l2w.py`.
"""

from collections.abc import Callable, Sequence

from eectl.core.errors import EectlError
from eectl.recipe.choices import WEIGHTING_CHOICES


def exit_weights(
    weights: str | Sequence[float],
    *,
    num_exits: int,
    taking_part: Sequence[int],
    slope: float = 0.4,
    shares: Sequence[float] = (),
    progress: float = 1.0,
) -> list[float]:
    """Return the weight of each exit in `taking_part` (numbers from 1, rising) of a network with `num_exits` = K exits.

    A list has one number per exit of the network. Lists, `uniform`, `linear`, `increasing` and `decreasing` weigh an exit by its
    place in the whole network, then scale those that take part to a sum of 1: two exits keep their ratio whoever else takes part.
    `slope` is that of `increasing` and `decreasing`. `l2w` starts from, and stays around, `uniform`.

    `equilibrium` and `sdn-ramp` are plain sums, as in their sources. `sdn-ramp` needs `shares`, the C_k of the K-1 attached
    exits, and `progress`, e/E: see `ramp`. `auto` counts as `uniform`: whoever knows the heads resolves it first.
    Raises EectlError for a list of another length, or one with nothing left.
    """
    assert not isinstance(weights, str) or weights in WEIGHTINGS, weights
    if not isinstance(weights, str):
        return _listed(weights, num_exits, taking_part)
    if weights == "equilibrium":
        return [1.0] * len(taking_part)
    if weights == "sdn-ramp":
        return ramp(shares, progress, num_exits=num_exits, taking_part=taking_part)
    scheme = SCALED.get(weights, _uniform)
    chosen = [scheme(k, num_exits, slope) for k in taking_part]
    return [weight / sum(chosen) for weight in chosen]


def _listed(weights: Sequence[float], num_exits: int, taking_part: Sequence[int]) -> list[float]:
    if len(weights) != num_exits:
        raise EectlError(
            f"loss_weights: {len(weights)} numbers for {num_exits} exits; give one per exit, the last one's included"
        )
    chosen = [float(weights[k - 1]) for k in taking_part]
    if sum(chosen) <= 0:
        raise EectlError(f"loss_weights: the exits {list(taking_part)} that train in this phase all have weight 0")
    return [weight / sum(chosen) for weight in chosen]


def ramp(shares: Sequence[float], progress: float, *, num_exits: int, taking_part: Sequence[int]) -> list[float]:
    """Return the weights of Shallow-Deep Networks (Kaya et al., 2019): τ_k = min(C_k, 0.01 + C_k · e/E), and 1 for the last exit.

    `shares` are the C_k, each attached exit's share of the backbone's cost (0.15, 0.30 … 0.90 in the source, whose exits lie at
    those shares); `progress` is e/E, the epoch counted from 1 over the length of the ramp, above 1 once that is over. Where the
    network's own head takes no part there is nothing to protect: every exit then weighs 1, as in the source's training of
    internal classifiers alone.
    """
    if num_exits not in taking_part:
        return [1.0] * len(taking_part)
    if not shares:
        shares = [1.0] * (num_exits - 1)  # only whether the weights exist is asked, not what they are
    return [1.0 if k == num_exits else min(shares[k - 1], 0.01 + progress * shares[k - 1]) for k in taking_part]


def _uniform(_number: int, _num_exits: int, _slope: float) -> float:
    """Weigh all exits alike, which gives the mean: the default everywhere except GPF."""
    return 1.0


def _linear(number: int, _num_exits: int, _slope: float) -> float:
    """Weigh exit k by k, as PABEE (Zhou et al., 2020), GPF (Liao et al., 2021) and BERxiT's `weight-linear` do."""
    return float(number)


def _increasing(number: int, num_exits: int, slope: float) -> float:
    """Rise from 1 - slope to 1 + slope in even steps, after Han et al., 2022, who do not publish their slope: 0.4 is assumed."""
    return 1 - slope + 2 * slope * (number - 1) / max(num_exits - 1, 1)


def _decreasing(number: int, num_exits: int, slope: float) -> float:
    """Fall from 1 + slope to 1 - slope in even steps."""
    return _increasing(num_exits + 1 - number, num_exits, slope)


SCALED: dict[str, Callable[[int, int, float], float]] = {
    "uniform": _uniform,
    "linear": _linear,
    "increasing": _increasing,
    "decreasing": _decreasing,
}
WEIGHTINGS = tuple(WEIGHTING_CHOICES)
