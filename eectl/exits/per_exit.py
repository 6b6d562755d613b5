"""The search for a threshold of each exit: those that do best within a cost budget on rows whose scores are known.

Arithmetic on scores and outcomes, no files and no network. One shared threshold, `sweep`'s, is the floor. There are too many
combinations to try them all, so what is found is good and not proven best. It works in numpy on one thread: the steps are small,
and waking a second thread for each costs more than it brings.
"""

from collections.abc import Callable, Sequence
from dataclasses import dataclass

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from eectl.exits.policy import ALWAYS, NEVER, BudgetPolicy, CostTable, choose, out_of_reach
from eectl.exits.sweep import pick, sweep
from eectl.models.losses import Task

Thresholds = tuple[float, ...]
_Floats = NDArray[np.float64]
_Ints = NDArray[np.int64]
_Flags = NDArray[np.bool_]

_LOWEST, _HIGHEST, _PER_OCTAVE = -8, 5, 2  # the ladder of prices: powers of 2 around the natural one, and steps between
_HALVINGS = 5  # of the gap between the two prices around a budget
_MOST_ROUNDS = 30  # over all exits; a handful is usual
_QUANTILES = (0.25, 0.5, 0.75)  # where an exit is moved to by force


def pick_per_exit(
    scores: Tensor, outcome: Tensor, costs: CostTable, budgets: Sequence[float], *, task: Task
) -> list[BudgetPolicy]:
    """Return for each budget the best thresholds found within it, the cheapest of equally good ones.

    On these rows they are never worse than `sweep.pick`'s shared threshold, and a larger budget never does worse than a smaller
    one. Same rows, same thresholds: nothing is random.

    Args:
        scores: [exit, row].
        outcome: [exit, row].
        costs: What a row costs that leaves at each exit, rising with the exit.
        budgets: % of the plain backbone's cost, in any order.
        task: Says whether a larger outcome is better.
    """
    num_exits, num_rows = scores.shape
    sign = 1 if task.higher_is_better else -1
    caps = [_cap(costs.limit(budget), num_rows) for budget in budgets]
    shared = pick(sweep(scores, outcome, costs.exits), budgets, costs, task=task)
    found = {entry.thresholds for entry in shared if entry.thresholds is not None}
    if found and num_exits > 1:
        found |= _Search(scores, sign * outcome, costs.exits, caps).run(sorted(found))
    states = [_measure(each, scores, sign * outcome, costs.exits) for each in sorted(found)]
    chosen = []
    for budget, cap in zip(budgets, caps, strict=True):
        within = (state for state in states if state.cost <= cap)
        best = max(within, key=lambda state: (state.gain, -state.cost), default=None)
        if best is None:
            chosen.append(out_of_reach(budget))
        else:
            chosen.append(BudgetPolicy(budget, best.thresholds, sign * best.gain / num_rows, best.cost / num_rows))
    return chosen


def _cap(most: float, num_rows: int) -> int:
    """Return the largest sum of costs whose mean over the rows is, as a float, not over `most`."""
    cap = int(most * num_rows) + 1
    while cap / num_rows > most:
        cap -= 1
    return cap


@dataclass(frozen=True)
class _State:
    """Thresholds with the sums of gains and costs that they give."""

    thresholds: Thresholds
    gain: float = -np.inf
    cost: int = 0


def _measure(thresholds: Thresholds, scores: Tensor, gains: Tensor, exit_costs: Sequence[int]) -> _State:
    """Return what thresholds give, by the rule that stops rows in earnest."""
    exits = choose(scores, thresholds).long()
    left = torch.bincount(exits, minlength=len(scores)).tolist()
    cost = sum(count * int(each) for count, each in zip(left, exit_costs, strict=True))
    return _State(thresholds, float(gains.gather(0, exits[None]).sum()), cost)


@dataclass(frozen=True)
class _Cuts:
    """Every distinct threshold of one exit while the others stay, cheapest first: `gains` and `costs` are sums over all rows.

    `scores` are those of the rows that reach the exit and can leave there, rising. Cut i lets the first `counts[i]` of them pass;
    as things stand, `num_pass` do.
    """

    scores: NDArray[np.float32]
    counts: NDArray[np.intp]
    num_pass: int
    gains: _Floats
    costs: _Ints

    def threshold(self, index: int) -> float:
        """Return the lowest threshold that makes the cut: the best score of the rows that pass."""
        count = int(self.counts[index])
        return ALWAYS if count == 0 else NEVER if count == len(self.scores) else float(self.scores[count - 1])


_Aim = Callable[[_Cuts], int]


def _at_price(price: float) -> _Aim:
    """Aim at the cut with the largest gain − price · cost, the cheapest of equals."""
    return lambda cuts: int((cuts.gains - price * cuts.costs).argmax())


def _within(cap: int) -> _Aim:
    """Aim at the best cut whose cost is at most `cap`, the cheapest of equals; where there is none, at the cheapest of all."""

    def best(cuts: _Cuts) -> int:
        num_within = int(np.searchsorted(cuts.costs, cap, side="right"))  # costs rise: the more pass, the dearer
        return int(cuts.gains[:num_within].argmax()) if num_within else 0

    return best


_Ladder = list[tuple[float, _State]]  # what coordinate ascent reached at each price; prices rise, so costs fall


class _Search:
    """Coordinate ascent with exact scans, from many starts; whatever is passed on the way and fits a budget is remembered."""

    def __init__(self, scores: Tensor, gains: Tensor, exit_costs: Sequence[int], caps: Sequence[int]) -> None:
        assert not scores[:-1].isposinf().any(), "no threshold holds such a row back"
        self._num_attached, self._caps = len(scores) - 1, caps
        self._scores = np.nan_to_num(scores.numpy(), nan=-np.inf, neginf=-np.inf)  # NaN never fires, nor does −inf
        self._gains: _Floats = gains.numpy()
        self._costs: _Ints = np.array([int(each) for each in exit_costs], dtype=np.int64)
        self._orders, self._sorted = [], []
        for own in self._scores[:-1]:
            order = np.argsort(own, kind="stable")
            order = order[int((own <= ALWAYS).sum()) :]  # without those that never fire
            self._orders.append(order)
            self._sorted.append(own[order])
        self._best = [_State(()) for _ in caps]

    def run(self, starts: Sequence[Thresholds]) -> set[Thresholds]:
        """Return the best thresholds for each of the caps that any reach."""
        for start in starts:
            for cap in self._caps:
                self._ascend(start, _within(cap))
        for ladder in (self._climb(reverse=False), self._climb(reverse=True)):
            for cap in self._caps:
                self._refine(ladder, cap)
        self._polish()
        self._force()
        self._polish()
        return {state.thresholds for state in self._best if state.gain > -np.inf}

    def _climb(self, *, reverse: bool) -> _Ladder:
        """Ascend at each price of the ladder, from where the one before it ended.

        Dear prices make cheap settings, so rising prices start with no row leaving early, falling ones with all at the first
        exit. The two end in different places. The natural price is what choosing among the exits can gain per unit of cost.
        """
        spread = self._gains.max(axis=0) - self._gains.min(axis=0)
        natural = float(spread.mean()) / max(int(self._costs[-1] - self._costs[0]), 1)
        steps = range(_LOWEST * _PER_OCTAVE, _HIGHEST * _PER_OCTAVE + 1)
        prices = [natural * 2 ** (step / _PER_OCTAVE) for step in steps]
        ladder = []
        state = _State((ALWAYS if reverse else NEVER,) * self._num_attached)
        for price in reversed(prices) if reverse else prices:
            state = self._ascend(state.thresholds, _at_price(price))
            ladder.append((price, state))
        return ladder[::-1] if reverse else ladder

    def _refine(self, ladder: _Ladder, cap: int) -> None:
        """Close in on the price at which the cost reaches `cap`, between the two of the ladder around it."""
        over = [index for index, (_, state) in enumerate(ladder) if state.cost > cap]
        if not over or over[-1] + 1 == len(ladder):
            return
        (low, dear), (high, cheap) = ladder[over[-1] : over[-1] + 2]
        for _ in range(_HALVINGS):
            price = (low * high) ** 0.5
            both = [self._ascend(state.thresholds, _at_price(price)) for state in (dear, cheap)]
            state = max(both, key=lambda each: each.gain - price * each.cost)
            if state.cost > cap:
                low, dear = price, state
            else:
                high, cheap = price, state

    def _polish(self) -> None:
        """Spend what is left of each budget, by coordinate ascent within it from the best so far, until nothing gets better."""
        for index, cap in enumerate(self._caps):
            before = None
            while self._best[index] != before and self._best[index].gain > -np.inf:
                before = self._best[index]
                self._ascend(before.thresholds, _within(cap))

    def _force(self) -> None:
        """Move one exit of the best so far to a few other places, and let each of the others answer once."""
        for index, cap in enumerate(self._caps):
            if self._best[index].gain == -np.inf:
                continue
            for exit_index, own in enumerate(self._sorted):
                places = [float(own[int(part * len(own))]) for part in _QUANTILES if len(own)]
                for place in (NEVER, ALWAYS, *places):
                    moved = list(self._best[index].thresholds)
                    moved[exit_index] = place
                    self._ascend(tuple(moved), _within(cap), fixed=exit_index, rounds=1)

    def _ascend(self, start: Thresholds, aim: _Aim, *, fixed: int | None = None, rounds: int = _MOST_ROUNDS) -> _State:
        """Set one exit after the other to its best cut by `aim`, the others as they are, until a round changes nothing."""
        state = _State(start)
        fires = [own > np.float32(each) for own, each in zip(self._scores, start, strict=False)]
        for _ in range(rounds):
            before = state.thresholds
            later, gain, cost = self._afterwards(fires)
            state = _State(before, gain, cost)
            here = np.ones(self._scores.shape[1], dtype=np.bool_)  # the rows that reach the exit
            for index in range(self._num_attached):
                if index != fixed:
                    cuts = self._scan(index, here, later[index], state)
                    self._remember(state.thresholds, index, cuts)
                    best = aim(cuts)
                    if cuts.counts[best] != cuts.num_pass:
                        state = _changed(state.thresholds, index, cuts, best)
                        fires[index] = self._scores[index] > np.float32(state.thresholds[index])
                here &= ~fires[index]
            if state.thresholds == before:
                break
        return state

    def _afterwards(self, fires: Sequence[_Flags]) -> tuple[list[tuple[_Floats, _Ints]], float, int]:
        """Return what every row gains and costs if it passes an attached exit, [row] each; and the sums over all rows."""
        gain, cost = self._gains[-1], np.full(self._gains.shape[1], self._costs[-1])
        later = []
        for index in reversed(range(self._num_attached)):
            later.append((gain, cost))
            gain = np.where(fires[index], self._gains[index], gain)
            cost = np.where(fires[index], self._costs[index], cost)
        return later[::-1], float(gain.sum()), int(cost.sum())

    def _scan(self, index: int, here: _Flags, later: tuple[_Floats, _Ints], state: _State) -> _Cuts:
        """Return all cuts of exit `index` for the rows that are `here`: one cumulative sum in the order of their scores.

        Rows of equal score move together. `state` is how things stand, `later` what each row gains and costs if it passes.
        """
        places = here.take(self._orders[index]).nonzero()[0]
        rows, scores = self._orders[index].take(places), self._sorted[index].take(places)
        gains = np.concatenate([[0.0], (later[0].take(rows) - self._gains[index].take(rows)).cumsum()])
        costs = np.concatenate([[0], (later[1].take(rows) - self._costs[index]).cumsum()])
        new = (scores[1:] != scores[:-1]).nonzero()[0] + 1
        counts = np.concatenate([[0], new, [len(scores)]]) if len(scores) else np.zeros(1, dtype=np.intp)
        num_pass = int(np.searchsorted(scores, np.float32(state.thresholds[index]), side="right"))
        gain, cost = state.gain - float(gains[num_pass]), state.cost - int(costs[num_pass])
        return _Cuts(scores, counts, num_pass, gains.take(counts) + gain, costs.take(counts) + cost)

    def _remember(self, thresholds: Thresholds, index: int, cuts: _Cuts) -> None:
        """Keep the best of an exit's cuts for each cap, where it beats what is known."""
        for place, cap in enumerate(self._caps):
            best, known = _within(cap)(cuts), self._best[place]
            gain, cost = float(cuts.gains[best]), int(cuts.costs[best])
            if cost <= cap and (gain, -cost) > (known.gain, -known.cost):
                self._best[place] = _changed(thresholds, index, cuts, best)


def _changed(thresholds: Thresholds, index: int, cuts: _Cuts, cut: int) -> _State:
    """Return the thresholds with that of exit `index` at one of its cuts."""
    changed = (*thresholds[:index], cuts.threshold(cut), *thresholds[index + 1 :])
    return _State(changed, float(cuts.gains[cut]), int(cuts.costs[cut]))
