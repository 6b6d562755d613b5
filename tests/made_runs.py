"""Made-up runs whose numbers are easy to check by hand, and their files."""

from eectl.evaluation.results import BudgetResult, Curve, Evaluation, ExitResult, write_evaluation
from eectl.models.checkpoint import Origin
from eectl.recipe.reading import make_recipe
from eectl.reports.compare import Run

PLAIN = 1000


def made(
    values,
    *,
    regime="joint",
    seed=0,
    recipe=(),
    budgets=(25.0, 50.0, None),
    shares=(0.2, 0.45, 1.1),
    grid=None,
    curve=None,
    after=(1, 3),
    heads=("linear", "linear"),
    name=None,
    label=None,
    task="classification",
    **fields,
):
    """A run with a value and a share of the plain cost per budget (None: out of reach); `grid`, `curve` have (share, value)."""
    full = make_recipe({"regime": regime, "seed": seed}, where="test", changes=recipe).model_dump(mode="json")
    entries = [
        BudgetResult(budget) if value is None else BudgetResult(budget, (0.5, 0.5), value, 0.01, share * PLAIN, (5, 3, 2))
        for budget, value, share in zip(budgets, values, shares, strict=True)
    ]
    facts = {
        "checkpoint": f"{regime} {seed}", "task": task, "criterion": "max-softmax", "protocol": "calibrated", "split": "test",
        "num_rows": 10, "plain_cost": PLAIN, "exits": (ExitResult(1, 0.5, 0.1, 200),), "budgets": tuple(entries), "dead": (),
        "search": "shared", "cost": "macs", "measured": None,
        "curve": curve_of(curve or [(0.2, 0.5), (1.1, 0.9)]), "grid": grid and curve_of(grid), "fingerprint": "f" * 64,
    }  # fmt: skip
    evaluation = Evaluation(**(facts | fields), origin=Origin(full, tuple(after), tuple(heads)))
    return Run(name or f"runs/{regime}-{seed}", evaluation, label)


def curve_of(points):
    """A curve from (share of the plain cost, value)."""
    return Curve(
        tuple(index / 10 for index in range(len(points))),
        tuple(share * PLAIN for share, _ in points),
        tuple(value for _, value in points),
    )


def save(run, path):
    """The run's evaluation as `path`."""
    write_evaluation(path, run.evaluation)
    return path
