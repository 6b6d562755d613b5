"""How fast is the search for thresholds? All distinct thresholds and all budgets, beside the authors' sweep of 100.

From a predictions file of 50,000 rows × 12 exits × 1,000 classes with made-up logits. The grid is our own plain version of the
authors' arithmetic (and theirs with --peer), each timed once with all of its 100 thresholds.
"""

import tempfile
import time
from collections.abc import Callable, Sequence
from pathlib import Path
from statistics import median

import torch
from measuring import begin, interleave, options, report, summary
from synthetic import map_predictions, write_predictions
from torch import Tensor

from eectl.evaluation.predictions import read_scored
from eectl.exits.criteria import CRITERIA
from eectl.exits.per_exit import pick_per_exit
from eectl.exits.policy import CostTable
from eectl.exits.sweep import pick, sweep
from eectl.models.losses import TASKS

BUDGETS = (25.0, 50.0, 75.0, 100.0)
TASK = TASKS["classification"]


def read_bytes(path: Path) -> None:
    """What reading alone takes."""
    buffer = bytearray(2**24)
    with path.open("rb", buffering=0) as file:
        while file.readinto(buffer):
            pass


def read_and_reduce(path: Path) -> tuple[Tensor, Tensor]:
    """The predictions file as scores and outcomes [exit, row]: what every search starts from."""
    scored = read_scored(path, criterion=CRITERIA["max-softmax"])
    return scored.scores, scored.outcome


def grid(probabilities: Sequence[Tensor], labels: Tensor, thresholds: Sequence[float], costs: Sequence[int]) -> list:
    """The authors' arithmetic in our words: for each threshold walk the exits, collect outputs, count hits and costs."""
    found = []
    for threshold in thresholds:
        exit_at = torch.full_like(labels, len(probabilities) - 1)
        outputs = probabilities[-1].clone()
        waiting = torch.ones_like(labels, dtype=torch.bool)
        for number, each in enumerate(probabilities[:-1]):
            leaves = (each.max(dim=1).values > threshold) & waiting
            exit_at[leaves], outputs[leaves] = number, each[leaves]
            waiting &= ~leaves
        hits = int((outputs.argmax(dim=1) == labels).sum())
        left = exit_at.bincount(minlength=len(costs)).tolist()
        found.append((hits, sum(count * cost for count, cost in zip(left, costs, strict=True))))
    return found


def authors(checkout: str, logits: Tensor, labels: Tensor, num_thresholds: int, costs: Sequence[int]) -> None:
    """Theirs as it is."""
    from peer import import_peer

    class Cost(int):
        total = int.__int__

    evaluate = import_peer(checkout, "eval").evaluate_earlyexiting_classification
    evaluate(torch.nn.Identity(), list(logits), labels, [Cost(cost) for cost in costs], num_thresholds)


def main(arguments: list[str] | None = None) -> dict:
    chosen = options(
        __doc__.splitlines()[0], arguments, repeats=3,
        peer={"help": "a checkout of kamadforge/early-exit-benchmark"},
        rows={"type": int, "default": 50_000}, classes={"type": int, "default": 1_000}, exits={"type": int, "default": 12},
        thresholds={"type": int, "default": 100, "help": "of the grid (default 100)"},
    )  # fmt: skip
    begin(chosen)
    rows, exits, classes = (500, 4, 20) if chosen.quick else (chosen.rows, chosen.exits, chosen.classes)
    costs = [10_000 * (number + 1) for number in range(exits)]
    table = CostTable(tuple(costs), costs[-1])
    with tempfile.TemporaryDirectory() as folder:
        path = Path(folder) / "predictions.safetensors"
        write_predictions(path, rows=rows, exits=exits, classes=classes)
        scores, outcome = read_and_reduce(path)

        def search() -> None:
            pick(sweep(scores, outcome, costs), BUDGETS, table, task=TASK)

        functions = {
            "read the bytes": lambda: read_bytes(path),
            "read and reduce": lambda: read_and_reduce(path) and None,
            "sweep and all budgets": search,
            "per-exit thresholds": lambda: pick_per_exit(scores, outcome, table, BUDGETS, task=TASK) and None,
        }
        logits, labels = map_predictions(path, exits, rows, classes)
        grids: dict[str, Callable[[int], object]] = {
            "grid": lambda count: grid(
                [each.softmax(dim=1) for each in logits], labels, torch.linspace(0, 1, count).tolist(), costs
            )
        }
        if chosen.peer:
            grids["authors' grid"] = lambda count: authors(chosen.peer, logits, labels, count, costs)
        samples = interleave(functions, repeats=chosen.repeats)
        for key, run in grids.items():  # once: minutes each
            run(1)
            started = time.perf_counter()
            run(chosen.thresholds)
            samples[key] = [time.perf_counter() - started]
        points = sweep(scores, outcome, costs)
        shared = torch.linspace(0, 1, 100)[5::19].tolist()
        expected = grid([each.softmax(dim=1) for each in logits], labels, shared, costs)
        found = [(int(points.totals[index]), int(points.costs[index])) for index in map(points.at, shared)]
    after_reading = [
        max(reduced - read, 0.0) + searched
        for read, reduced, searched in zip(*(samples[key] for key in list(functions)[:3]), strict=True)
    ]
    results = {
        "logits": [exits, rows, classes],
        "distinct_thresholds": len(points),
        "seconds": {key: summary(each) for key, each in samples.items()} | {"after reading": summary(after_reading)},
        "grid_thresholds": chosen.thresholds,
        "times_as_fast": {key: samples[key][0] / median(after_reading) for key in grids},
        "thresholds_compared": len(shared),
        "same_hits_and_costs": found == expected,
    }
    return report("sweep", chosen, results)


if __name__ == "__main__":
    main()
