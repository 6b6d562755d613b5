"""Training regimes as data: a regime is a function of the number of exits that returns phases. No torch, no loop.

Exits are numbered 1..K; exit K is the network's own head. They cut the backbone into K segments: segment k is what lies
after exit k-1 up to exit k, segment 1 holds the stem and segment K the network's own head. A phase says which segments and
which attached heads (1..K-1) train, and cycles a list of loss sets by step. Sources: paper §2 and appendix A; `branch-wise`
trains the segment (not the whole prefix), `mixed-gradual` counts the network's own head as its first exit.
"""

from collections.abc import Callable, Iterable
from dataclasses import dataclass, replace

from eectl.core.errors import EectlError, lookup
from eectl.recipe.choices import REGIME_CHOICES, in_order


@dataclass(frozen=True)
class Phase:
    """One stage of training: what trains, and which exits' losses drive it.

    `number` is what `--phase` takes; `segments` and `heads` are what trains, everything else is frozen, BatchNorm statistics
    included; `losses` holds the exits of each loss set, and step s uses set s mod len(losses). `combine` says that the ensembles
    train, and they alone.
    """

    number: int
    title: str
    segments: frozenset[int]
    heads: frozenset[int]
    losses: tuple[frozenset[int], ...]
    combine: bool = False

    @property
    def scored(self) -> frozenset[int]:
        """The exits whose losses some step uses; early stopping watches these."""
        return frozenset().union(*self.losses)

    def needs_heads(self, num_exits: int) -> bool:
        """Return whether any exit other than the network's own head takes part."""
        return bool(self.heads) or self.scored != {num_exits}


def _span(first: int, last: int) -> frozenset[int]:
    return frozenset(range(first, last + 1))


def _phase(number: int, title: str, segments: Iterable[int], heads: Iterable[int], *losses: Iterable[int]) -> Phase:
    return Phase(number, title, frozenset(segments), frozenset(heads), tuple(frozenset(loss) for loss in losses))


def _backbone(k: int) -> Phase:
    return _phase(1, "backbone", _span(1, k), (), {k})


def _everything(k: int) -> Phase:
    return _phase(2, "everything", _span(1, k), _span(1, k - 1), _span(1, k))


def _heads_only(k: int) -> Phase:
    return _phase(3, "heads on the frozen backbone", (), _span(1, k - 1), _span(1, k - 1))


def _disjoint(k: int) -> tuple[Phase, ...]:
    return _backbone(k), _heads_only(k)


def _joint(k: int) -> tuple[Phase, ...]:
    return (_everything(k),)


def _mixed(k: int) -> tuple[Phase, ...]:
    return _backbone(k), _everything(k)


def _branch_wise(k: int) -> tuple[Phase, ...]:
    return tuple(_phase(i, f"segment and exit {i} of {k}", {i}, {i} - {k}, {i}) for i in range(1, k + 1))


def _separate(k: int) -> tuple[Phase, ...]:
    return tuple(_phase(i, f"up to exit {i} of {k}", _span(1, i), _span(1, i) - {k}, _span(1, i)) for i in range(1, k + 1))


def _alternating(k: int) -> tuple[Phase, ...]:
    return (_phase(2, "last exit and all exits in turn", _span(1, k), _span(1, k - 1), {k}, _span(1, k)),)


def _mixed_gradual(k: int) -> tuple[Phase, ...]:
    return tuple(
        _phase(i, f"the last {i} of {k} exits", _span(1, k), _span(k + 1 - i, k) - {k}, _span(k + 1 - i, k))
        for i in range(1, k + 1)
    )


REGIMES: dict[str, Callable[[int], tuple[Phase, ...]]] = in_order(
    REGIME_CHOICES,
    {
        "disjoint": _disjoint,
        "joint": _joint,
        "mixed": _mixed,
        "branch-wise": _branch_wise,
        "separate": _separate,
        "alternating": _alternating,
        "mixed-gradual": _mixed_gradual,
    },
)
STAGED = ("branch-wise", "separate", "mixed-gradual")


def _ensembles(regime: str, k: int) -> Phase:
    """Return the phase of the ensembles, after all others: number 4, or the stage after a staged regime's last."""
    number = k + 1 if regime in STAGED else 4
    return replace(_phase(number, "ensembles on frozen heads", (), (), _span(1, k - 1)), combine=True)


def regime_phases(regime: str, num_exits: int, *, combine: bool = False) -> tuple[Phase, ...]:
    """Return the phases of a regime for a network with `num_exits` exits, its own head included.

    With `combine`, for heads whose logits are combined (ZTW), the ensembles have a phase of their own at the end.
    """
    phases = lookup(REGIMES, regime, what="regime")(num_exits)
    return (*phases, _ensembles(regime, num_exits)) if combine else phases


def phase_numbered(regime: str, num_exits: int, number: int, *, place: str = "", combine: bool = False) -> Phase:
    """Return the phase that `--phase number` means.

    The regime's own phases come first; beside them the paper's 1 (backbone), 2 (everything) and 3 (heads only) are always
    there, so phases can be chained by hand. Staged regimes count their stages and have no others. `place` is named by errors.
    """
    own = {phase.number: phase for phase in regime_phases(regime, num_exits, combine=combine)}
    if regime not in STAGED:
        own = {1: _backbone(num_exits), 2: _everything(num_exits), 3: _heads_only(num_exits)} | own
    if number not in own:
        only = f"; phase {number} trains the ensembles of ztw exits" if number == _ensembles(regime, num_exits).number else ""
        raise EectlError(
            f"{place or f'--phase {number}'}: regime {regime} with {num_exits} exits takes phases {min(own)}–{max(own)}{only}"
        )
    return own[number]
