"""The tables that `evaluate`, `calibrate-thresholds` and `flops` print. Computes only shares, differences and units."""

from collections.abc import Sequence
from typing import TYPE_CHECKING

from rich.console import Console
from rich.table import Table

from eectl.core.console import make_console, make_table, print_table, score_text
from eectl.evaluation.measures import ERRORS, IN_PERCENT, MEASURES
from eectl.evaluation.results import BudgetResult, Evaluation, ExitResult
from eectl.exits.criteria import Criterion, criterion_named
from eectl.exits.policy import ALWAYS, COSTS, NEVER, BudgetPolicy, Policies
from eectl.models.losses import TASKS, Task

if TYPE_CHECKING:
    from eectl.exits.costs import Costs

_SAVES_NOTHING = 0.99  # an exit at this share of the plain backbone's cost is pointed out
_OUT_OF_REACH = "- out of reach: even if every row leaves as early as it can, the mean cost is over the budget."
_BUDGETS_ACROSS = 7  # columns of budgets that fit 80 characters
_MILLISECOND = 1_000_000  # in nanoseconds
_EXPLAINED = {
    "balanced": "balanced: the mean of the classes' accuracies; macro-F1: that of their F1 scores.",
    "map": "F1: the mean over rows of the F1 of a row's labels; mAP and macro-F1: means over labels.",
    "kappa": "MAE: in levels; kappa: Cohen's, with quadratic weights.",
}
_BESIDE = {"regression": ("pearson", "spearman"), "multilabel": ("map", "macro_f1"), "ordinal": ("mae", "kappa")}  # the score
METRIC_NAMES = {"balanced": "balanced accuracy"}  # of what thresholds are chosen by; else it is the task's score


def show_evaluation(result: Evaluation) -> None:
    """Print budgets, exits and where rows leave, and a sentence for everything that should not be overlooked."""
    console, criterion = make_console(), criterion_named(result.criterion)
    title = f"{result.split} split, {result.num_rows:,} rows, {result.criterion}, {result.protocol} thresholds"
    title += "" if result.search == "shared" else f", {result.search}"
    title += "" if result.precision == "float32" else f", {result.precision}"
    title += "" if result.metric == "score" else f", chosen by {METRIC_NAMES[result.metric]}"
    print_table(console, title, _budget_table(result, criterion))
    _show_thresholds(console, result.budgets, criterion)
    print_table(console, "every row at one exit", _exit_table(result))
    _show_other_measures(console, result)
    for start in range(0, len(result.budgets), _BUDGETS_ACROSS):
        part = result.budgets[start : start + _BUDGETS_ACROSS]
        print_table(console, "rows that leave at each exit, by budget", _leave_table(len(result.exits), part))
    for sentence in evaluation_notes(result):
        console.print(sentence, markup=False)


def evaluation_notes(result: Evaluation) -> list[str]:
    """Return what a reader of the tables must know: the yardstick, the protocol, overshot budgets, exits that are of no use."""
    unit = "" if TASKS[result.task].predicts_number else ", in points"
    notes = [f"plain: the network's own head without the attached ones; drop: what is lost against it{unit} (- is gained)."]
    if result.measured is not None:
        notes.append(_time_note(result.measured))
    notes += [_EXPLAINED[name] for name in _EXPLAINED if name in _columns(result)]
    if result.protocol == "paper":
        notes.append(f"The authors' protocol: thresholds were chosen on the {result.split} split that they are scored on.")
    over = [(entry.budget, entry.mean_cost / result.plain_cost) for entry in result.budgets if entry.is_over and entry.mean_cost]
    if over:
        costs = ", ".join(f"{share:.2%} for {budget_name(budget)}" for budget, share in over)
        notes.append(f"! over budget on the {result.split} split (the thresholds were chosen on another): {costs}.")
    if any(entry.value is None for entry in result.budgets):
        notes.append(_OUT_OF_REACH)
    notes += weak_exits(result)
    if result.dead:
        dead = f"Dead {_exits(result.dead)}"
        notes.append(f"{dead}: no row leaves there under any of the budgets, and every row that passes pays for the head.")
    return notes


def weak_exits(result: Evaluation) -> list[str]:
    """Return a sentence for each exit that later ones, which cost more, do worse than."""
    sign = 1 if TASKS[result.task].higher_is_better else -1
    best, weak = result.exits[0], dict[int, list[int]]()
    for entry in result.exits[1:]:
        if sign * entry.value >= sign * best.value:
            best = entry
        elif entry.cost > best.cost:
            weak.setdefault(best.number, []).append(entry.number)
    return [
        f"! {_exits(numbers)} {'is' if len(numbers) == 1 else 'are'} worse than exit {better}, which costs less."
        for better, numbers in weak.items()
    ]


def _exits(numbers: Sequence[int]) -> str:
    """Return `exit 3`, or `exits 3, 4`."""
    return f"exit{'s' * (len(numbers) > 1)} {', '.join(map(str, numbers))}"


def _budget_table(result: Evaluation, criterion: Criterion) -> Table:
    task = TASKS[result.task]
    measures = _columns(result)  # they take the place of the cost: its share is there
    more = [MEASURES[name] for name in measures] or (f"mean {_unit(result.cost, result.plain_cost)}",)
    threshold = () if _differ(result.budgets) else (criterion.symbol,)
    share_of = "% plain" if measures else "% of plain"  # so that 80 columns do
    table = make_table("budget", f"{task.score_name} ± s.e.", "drop", *more, share_of, *threshold)
    plain = result.plain
    middle = _measures(plain, measures) if measures else [cost_text(result.plain_cost, result.cost, result.plain_cost)]
    value = score_text(plain.value, plain.error, result.task)
    table.add_row("plain", value, "", *middle, f"{100:.1f}  ", *("" for _ in threshold))
    for entry in result.budgets:
        if entry.value is None or entry.error is None or entry.mean_cost is None:
            table.add_row(budget_name(entry.budget), "-", "-", *("-" for _ in more), "-  ", *("-" for _ in threshold))
            continue
        value, drop = score_text(entry.value, entry.error, result.task), drop_text(entry.value, plain.value, task)
        share = f"{100 * entry.mean_cost / result.plain_cost:.1f} {'!' if entry.is_over else ' '}"
        words = [shared_threshold(entry.thresholds or (), criterion.sign) for _ in threshold]
        middle = _measures(entry, measures) if measures else [cost_text(entry.mean_cost, result.cost, result.plain_cost)]
        table.add_row(budget_name(entry.budget), value, drop, *middle, share, *words)
    return table


def _exit_table(result: Evaluation) -> Table:
    task = TASKS[result.task]
    more = _columns(result)
    table = make_table(
        "exit",
        f"{task.score_name} ± s.e.",
        *(MEASURES[name] for name in more),
        _unit(result.cost, result.plain_cost),
        "% of plain",
    )
    for entry in result.exits:
        share = f"{100 * entry.cost / result.plain_cost:.1f}"
        value = score_text(entry.value, entry.error, result.task)
        cost = cost_text(entry.cost, result.cost, result.plain_cost)
        table.add_row(str(entry.number), value, *_measures(entry, more), cost, share)
    return table


def _columns(result: Evaluation) -> tuple[str, ...]:
    """Return the measures that are shown beside the score, entries of MEASURES.

    Of classes only where thresholds were chosen by one, or it is further from an exit's accuracy than chance explains.
    """
    if result.task != "classification":
        return _BESIDE[result.task]
    apart = any(entry.balanced is not None and abs(entry.balanced - entry.value) > entry.error for entry in result.exits)
    return ("balanced", "macro_f1") if apart or result.metric == "balanced" else ()


def _measures(entry: BudgetResult | ExitResult, names: Sequence[str]) -> list[str]:
    """Return the measures with these names as text, `-` where one is not defined, as for an exit that gives one value."""
    return [_measure_text(entry.measure(name), name) for name in names]


def _measure_text(value: float | None, name: str) -> str:
    if value is None:
        return "-"
    return f"{100 * value:.2f}" if name in IN_PERCENT else f"{value:.4g}" if name in ERRORS else f"{value:.4f}"


def _show_other_measures(console: Console, result: Evaluation) -> None:
    """Print what else is measured, at each budget and exit, and of several targets each target at each budget.

    Of many classes of one size the accuracy says it all.
    """
    shown = _columns(result)
    names = [name for name in MEASURES if name not in shown and result.plain.measures.get(name) is not None]
    rows: list[tuple[str, BudgetResult | ExitResult]] = [("plain", result.plain)]
    rows += [(budget_name(entry.budget), entry) for entry in result.budgets if entry.value is not None]
    rows += [(f"exit {entry.number}", entry) for entry in result.exits]
    if names and (result.task != "classification" or "f1" in names or shown):
        table = make_table("", *(MEASURES[name] for name in names))
        for label, entry in rows:
            table.add_row(label, *_measures(entry, names))
        print_table(console, "also measured", table)
    if result.plain.by_target:
        kinds = list(next(iter(result.plain.by_target.values())))
        table = make_table("target", "", *(MEASURES.get(name, "MSE") for name in kinds))
        for target in result.plain.by_target:
            for label, entry in rows[: len(rows) - len(result.exits)]:
                found = entry.by_target.get(target, {})
                table.add_row(target, label, *(_measure_text(found.get(name), name) for name in kinds))
        print_table(console, "each target, by budget", table)


def _leave_table(num_exits: int, budgets: Sequence[BudgetResult]) -> Table:
    table = make_table("exit", *(budget_name(entry.budget) for entry in budgets))
    for index in range(num_exits):
        cells = ["-" if entry.left is None else f"{entry.left[index]:,}" if entry.left[index] else "·" for entry in budgets]
        table.add_row(str(index + 1), *cells)
    return table


def show_calibration(policies: Policies) -> None:
    """Print the thresholds chosen for each budget, and what they give where they were chosen."""
    console, criterion = make_console(), policies.criterion
    threshold = () if _differ(policies.budgets) else (criterion.symbol,)
    unit = _unit(policies.cost, policies.plain_cost)
    name = METRIC_NAMES.get(policies.metric, policies.task.score_name)
    columns = "budget", *threshold, name, f"mean {unit}", "% of plain"
    table = make_table(*columns)
    for entry in policies.budgets:
        if entry.thresholds is None or entry.value is None or entry.mean_cost is None:
            table.add_row(budget_name(entry.budget), *("-" for _ in columns[1:]))
            continue
        share = f"{100 * entry.mean_cost / policies.plain_cost:.1f}"
        value = score_text(entry.value, None, policies.task.name)
        words = [shared_threshold(entry.thresholds, criterion.sign) for _ in threshold]
        cost = cost_text(entry.mean_cost, policies.cost, policies.plain_cost)
        table.add_row(budget_name(entry.budget), *words, value, cost, share)
    title = f"{policies.search} thresholds of {criterion.name}, chosen on {policies.num_rows:,} rows ({policies.split} split)"
    print_table(console, title, table)
    _show_thresholds(console, policies.budgets, criterion)
    if policies.measured is not None:
        console.print(_time_note(policies.measured), markup=False)
    if any(entry.thresholds is None for entry in policies.budgets):
        console.print(_OUT_OF_REACH, markup=False)


def _differ(entries: Sequence[BudgetPolicy | BudgetResult]) -> bool:
    """Return whether some budget has thresholds that differ between exits, which takes a table of its own."""
    return any(len(set(entry.thresholds or ())) > 1 for entry in entries)


def _show_thresholds(console: Console, entries: Sequence[BudgetPolicy | BudgetResult], criterion: Criterion) -> None:
    """Print a row per exit and a column per budget where exits have thresholds of their own; unlimited has none."""
    entries = [entry for entry in entries if entry.budget is not None]
    if not _differ(entries):
        return
    num_attached = max(len(entry.thresholds or ()) for entry in entries)
    what = "thresholds" if criterion.sign == 1 else criterion.symbol
    for start in range(0, len(entries), _BUDGETS_ACROSS):
        part = entries[start : start + _BUDGETS_ACROSS]
        table = make_table("exit", *(budget_name(entry.budget) for entry in part))
        for index in range(num_attached):
            cells = [
                "-" if entry.thresholds is None else threshold_text(entry.thresholds[index], criterion.sign) for entry in part
            ]
            table.add_row(str(index + 1), *cells)
        print_table(console, f"{what} of each exit, by budget", table)


def _time_note(measured: str) -> str:
    return f"Costs are time, of rows in full batches, measured on {measured}; budgets are % of the plain backbone's time there."


def show_costs(costs: "Costs", *, after: Sequence[int]) -> None:
    """Print the MACs of a row that leaves at each exit, heads passed on the way included; exits follow the blocks `after`."""
    console = make_console()
    table = make_table("exit", "after block", "MACs", "% of plain", "% in heads", "head parameters")
    blocks, weights = [*map(str, after), "own head"], [*map(human, costs.head_parameters), "-"]
    for index, cost in enumerate(costs.exits):
        share = f"{100 * costs.shares[index]:.1f}"
        in_heads = f"{100 * sum(costs.heads[: index + 1]) / cost:.1f}"
        table.add_row(str(index + 1), blocks[index], human(cost), share, in_heads, weights[index])
    print_table(console, f"cost of one row; the plain backbone takes {human(costs.plain)} MACs", table)
    backbone, heads = human(costs.parameters), human(sum(costs.head_parameters))
    console.print(f"parameters: {backbone} in the backbone, {heads} in attached heads", markup=False)
    for number in (number for number, share in enumerate(costs.shares[:-1], 1) if share >= _SAVES_NOTHING):
        console.print(
            f"! exit {number} saves nothing: it costs {costs.shares[number - 1]:.1%} of the plain backbone", markup=False
        )


def human(count: float) -> str:
    """Return a count with three digits and a unit: `41.2 M`; below 1,000 as it is."""
    if count < 999.5:
        return f"{count:.3g}"
    units = " kMGTP"
    power = next(power for power in range(1, len(units)) if count / 1000**power < 999.5 or power == len(units) - 1)
    return f"{count / 1000**power:#.3g}".rstrip(".") + f" {units[power]}"


def budget_name(budget: float | None) -> str:
    """Return `25%`, or `unlimited`."""
    return "unlimited" if budget is None else f"{budget:g}%"


def drop_text(value: float, plain: float, task: Task) -> str:
    """Return how much worse a score is than the plain backbone's: accuracies in points, errors of a regression as they are."""
    drop = plain - value if task.higher_is_better else value - plain
    return f"{drop + 0.0:.2g}" if task.predicts_number else f"{round(100 * drop, 2) + 0.0:.2f}"  # + 0.0: no -0.00


def _unit(kind: str, plain_cost: float) -> str:
    """Return the name of the unit in which costs are shown: MACs, or ms; µs where the plain backbone takes less than 1 ms."""
    return COSTS[kind] if kind == "macs" else "ms/row" if plain_cost >= _MILLISECOND else "µs/row"


def cost_text(cost: float, kind: str, plain_cost: float) -> str:
    """Return a cost with its digits in the unit that `_unit` names: MACs with K, M or G, nanoseconds as ms or µs."""
    if kind == "macs":
        return human(cost)
    time = cost / (_MILLISECOND if plain_cost >= _MILLISECOND else 1000)
    return f"{time:,.0f}" if time >= 999.95 else f"{time:#.4g}"


def threshold_text(threshold: float, sign: int = 1) -> str:
    """Return a threshold times `sign`, a criterion's; `always` and `never` for the two ends."""
    return "always" if threshold == ALWAYS else "never" if threshold == NEVER else f"{sign * threshold + 0.0:.4g}"


def shared_threshold(thresholds: Sequence[float], sign: int = 1) -> str:
    """Return the one threshold of all attached exits, if there are any."""
    return threshold_text(thresholds[0], sign) if thresholds else "none"
