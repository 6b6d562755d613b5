"""Cost budgets as the user writes them: percentages of the plain backbone's cost. Imports no torch."""

from collections.abc import Iterable

from eectl.core.numbers import decimal_number, number_list

DEFAULT_BUDGETS = "25,50,75,100"
DEFAULT_BATCH_SIZES = "1,32,256"  # of `eectl bench`
MOST_SECONDS = 86_400  # of `eectl bench` for a batch size: a day
MOST_BUDGET = 1000.0


def parse_budgets(budgets: str | float | Iterable[float]) -> tuple[float, ...]:
    """Return budgets as rising percentages of the plain backbone's cost.

    Args:
        budgets: A text such as `25,50,75,100`, one number, or several.

    Raises:
        EectlError: something in it is not a percentage over 0, or stands twice.
    """
    allowed = f"percentages of the plain backbone's cost, over 0 and up to {MOST_BUDGET:g}, such as {DEFAULT_BUDGETS}"
    return tuple(sorted(number_list(budgets, _budget, option="--budgets", what="budget", allowed=allowed)))


def _budget(value: object) -> float | None:
    budget = decimal_number(value)
    if budget is None or not 0 < budget <= MOST_BUDGET:
        return None
    return budget if isinstance(value, str) else float(f"{budget:.15g}")  # as it is written: 0.1 + 0.2 is 0.3
