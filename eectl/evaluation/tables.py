"""What a result looks like: tables and JSON-able data. Computes only shares and units, and knows no verb."""

from collections.abc import Sequence
from typing import TYPE_CHECKING

from rich.console import Console
from rich.table import Table

from eectl.core.console import make_console, make_table, print_table, score_text
from eectl.evaluation.results import BudgetResult, Evaluation, ExitResult
from eectl.exits.policy import ALWAYS, COSTS, NEVER, BudgetPolicy, Policies
from eectl.models.losses import TASKS

if TYPE_CHECKING:
    from eectl.exits.costs import Costs

_SAVES_NOTHING = 0.99  # an exit at this share of the plain backbone's cost is pointed out
_OUT_OF_REACH = "- out of reach: even if every row leaves as early as it can, the mean cost is over the budget."
_BUDGETS_ACROSS = 7  # columns of budgets that fit 80 characters
_UNITS = {"macs": "MACs", "latency": "µs/row"}  # the columns' names, by what a cost is


def show_evaluation(result: Evaluation) -> None:
    """Budgets, exits and where rows leave, and a sentence for everything that should not be overlooked."""
    console = make_console()
    title = f"{result.split} split, {result.num_rows:,} rows, {result.criterion}, {result.protocol} thresholds"
    title += "" if result.search == "shared" else f", {result.search}"
    print_table(console, title, _budget_table(result))
    _show_thresholds(console, result.budgets)
    print_table(console, "every row at one exit", _exit_table(result))
    for start in range(0, len(result.budgets), _BUDGETS_ACROSS):
        part = result.budgets[start : start + _BUDGETS_ACROSS]
        print_table(console, "rows that leave at each exit, by budget", _leave_table(len(result.exits), part))
    for sentence in evaluation_notes(result):
        console.print(sentence, markup=False)


def evaluation_notes(result: Evaluation) -> list[str]:
    """What a reader of the tables must know: the protocol, overshot budgets, exits that nobody uses."""
    notes = []
    if result.measured is not None:
        notes.append(_time_note(result.measured))
    if result.protocol == "paper":
        notes.append(f"The authors' protocol: thresholds were chosen on the {result.split} split that they are scored on.")
    over = [(entry.budget, entry.mean_cost / result.plain_cost) for entry in result.budgets if entry.is_over and entry.mean_cost]
    if over:
        costs = ", ".join(f"{share:.2%} for {budget_name(budget)}" for budget, share in over)
        notes.append(f"! over budget on the {result.split} split (the thresholds were chosen on another): {costs}.")
    if any(entry.value is None for entry in result.budgets):
        notes.append(_OUT_OF_REACH)
    if result.dead:
        exits = f"exit{'s' * (len(result.dead) > 1)} {', '.join(map(str, result.dead))}"
        notes.append(f"Dead {exits}: no row leaves there under any of the budgets, and every row that passes pays for the head.")
    return notes


def _budget_table(result: Evaluation) -> Table:
    correlates = result.task == "regression"  # two columns, for which the cost makes room: the share says it
    more = ("Pearson", "Spearman") if correlates else (f"mean {_UNITS[result.cost]}",)
    threshold = () if _differ(result.budgets) else ("threshold",)
    columns = "budget", f"{TASKS[result.task].score_name} ± s.e.", *more, _share_of(result.cost), "", *threshold
    table = make_table(*columns)
    for entry in result.budgets:
        if entry.value is None or entry.error is None or entry.mean_cost is None:
            table.add_row(budget_name(entry.budget), "-", *("-" for _ in more), "-", "", *("-" for _ in threshold))
            continue
        value, share = score_text(entry.value, entry.error, result.task), entry.mean_cost / result.plain_cost
        mark = "!" if entry.is_over else ""
        words = [shared_threshold(entry.thresholds or ()) for _ in threshold]
        middle = _correlations(entry) if correlates else [cost_text(entry.mean_cost, result.cost)]
        table.add_row(budget_name(entry.budget), value, *middle, f"{100 * share:.1f}", mark, *words)
    return table


def _exit_table(result: Evaluation) -> Table:
    more = ("Pearson", "Spearman") if result.task == "regression" else ()
    table = make_table("exit", f"{TASKS[result.task].score_name} ± s.e.", *more, _UNITS[result.cost], _share_of(result.cost))
    for entry in result.exits:
        share = f"{100 * entry.cost / result.plain_cost:.1f}"
        value = score_text(entry.value, entry.error, result.task)
        table.add_row(str(entry.number), value, *_correlations(entry), cost_text(entry.cost, result.cost), share)
    return table


def _correlations(entry: BudgetResult | ExitResult) -> list[str]:
    """Pearson's and Spearman's coefficients where there are any, `-` where an exit gives one value for all rows."""
    return [f"{each:.4f}" if each == each else "-" for each in (entry.pearson, entry.spearman) if each is not None]


def _leave_table(num_exits: int, budgets: Sequence[BudgetResult]) -> Table:
    table = make_table("exit", *(budget_name(entry.budget) for entry in budgets))
    for index in range(num_exits):
        cells = ["-" if entry.left is None else f"{entry.left[index]:,}" if entry.left[index] else "·" for entry in budgets]
        table.add_row(str(index + 1), *cells)
    return table


def show_calibration(policies: Policies) -> None:
    """The thresholds chosen for each budget, and what they give where they were chosen."""
    console = make_console()
    threshold = () if _differ(policies.budgets) else ("threshold",)
    score_name = TASKS[policies.task].score_name
    columns = "budget", *threshold, score_name, f"mean {_UNITS[policies.cost]}", _share_of(policies.cost)
    table = make_table(*columns)
    for entry in policies.budgets:
        if entry.thresholds is None or entry.value is None or entry.mean_cost is None:
            table.add_row(budget_name(entry.budget), *("-" for _ in columns[1:]))
            continue
        share = f"{100 * entry.mean_cost / policies.plain_cost:.1f}"
        value = score_text(entry.value, None, policies.task)
        words = [shared_threshold(entry.thresholds) for _ in threshold]
        table.add_row(budget_name(entry.budget), *words, value, cost_text(entry.mean_cost, policies.cost), share)
    title = f"{policies.search} thresholds of {policies.criterion}, chosen on {policies.num_rows:,} rows ({policies.split} split)"
    print_table(console, title, table)
    _show_thresholds(console, policies.budgets)
    if policies.measured is not None:
        console.print(_time_note(policies.measured), markup=False)
    if any(entry.thresholds is None for entry in policies.budgets):
        console.print(_OUT_OF_REACH, markup=False)


def _differ(entries: Sequence[BudgetPolicy | BudgetResult]) -> bool:
    """Whether some budget has thresholds that differ between exits, which takes a table of its own."""
    return any(len(set(entry.thresholds or ())) > 1 for entry in entries)


def _show_thresholds(console: Console, entries: Sequence[BudgetPolicy | BudgetResult]) -> None:
    """Where exits have thresholds of their own, a row per exit and a column per budget; unlimited, without any, is left out."""
    entries = [entry for entry in entries if entry.budget is not None]
    if not _differ(entries):
        return
    num_attached = max(len(entry.thresholds or ()) for entry in entries)
    for start in range(0, len(entries), _BUDGETS_ACROSS):
        part = entries[start : start + _BUDGETS_ACROSS]
        table = make_table("exit", *(budget_name(entry.budget) for entry in part))
        for index in range(num_attached):
            cells = ["-" if entry.thresholds is None else threshold_text(entry.thresholds[index]) for entry in part]
            table.add_row(str(index + 1), *cells)
        print_table(console, "thresholds of each exit, by budget", table)


def _share_of(cost: str) -> str:
    return "% of plain" if cost == "macs" else f"% of plain {COSTS[cost]}"


def _time_note(measured: str) -> str:
    return f"Costs are time, of rows in full batches, measured on {measured}; budgets are % of the plain backbone's time there."


def show_costs(costs: "Costs", *, after: Sequence[int]) -> None:
    """MACs of a row that leaves at each exit, heads passed on the way included; exits follow the blocks `after`."""
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
    """A count with three digits and a unit: `41.2 M`; below 1,000 as it is."""
    if count < 999.5:
        return f"{count:.3g}"
    units = " kMGTP"
    power = next(power for power in range(1, len(units)) if count / 1000**power < 999.5 or power == len(units) - 1)
    return f"{count / 1000**power:#.3g}".rstrip(".") + f" {units[power]}"


def budget_name(budget: float | None) -> str:
    """`25%`, or `unlimited`."""
    return "unlimited" if budget is None else f"{budget:g}%"


def cost_text(cost: float, unit: str) -> str:
    """MACs with three digits and a unit, or nanoseconds as microseconds."""
    return human(cost) if unit == "macs" else f"{cost / 1000:#.4g}".rstrip(".")


def threshold_text(threshold: float) -> str:
    """A threshold; `always` and `never` for the two ends."""
    return "always" if threshold == ALWAYS else "never" if threshold == NEVER else f"{threshold:.4g}"


def shared_threshold(thresholds: Sequence[float]) -> str:
    """The one threshold of all attached exits, if there are any."""
    return threshold_text(thresholds[0]) if thresholds else "none"
