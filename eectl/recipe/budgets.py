"""Cost budgets as the user writes them: percentages of the plain backbone's cost. Imports no torch."""

import math
from collections.abc import Iterable

from eectl.core.errors import EectlError

DEFAULT_BUDGETS = "25,50,75,100"
DEFAULT_BATCH_SIZES = "1,32,256"  # of `eectl bench`
MOST_BUDGET = 1000.0


def parse_budgets(budgets: str | float | Iterable[float]) -> tuple[float, ...]:
    """Return budgets as rising percentages of the plain backbone's cost.

    Args:
        budgets: A text such as `25,50,75,100`, one number, or several.

    Raises:
        EectlError: something in it is not a percentage over 0, or stands twice.
    """
    if isinstance(budgets, str):
        text, parts = budgets, budgets.split(",")
    else:
        parts = [f"{each:.15g}" for each in ([budgets] if isinstance(budgets, int | float) else budgets)]
        text = ",".join(parts)
    found: list[float] = []
    for part in parts or [""]:
        try:
            budget = float(part)
        except ValueError:
            budget = math.nan
        if not 0 < budget <= MOST_BUDGET:
            raise EectlError(
                f"--budgets {text}: '{part.strip()}' is not a budget; give percentages of the plain backbone's cost, "
                f"over 0 and up to {MOST_BUDGET:g}, such as {DEFAULT_BUDGETS}"
            )
        if budget in found:
            raise EectlError(f"--budgets {text}: {budget:g} stands twice; give each budget once")
        found.append(budget)
    return tuple(sorted(found))
