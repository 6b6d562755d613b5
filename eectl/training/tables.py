"""What a plan, a finished run and a checkpoint look like: tables on stdout. Results of measuring are `report`'s.

No torch: `eectl info` reads no weights.
"""

from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from eectl.core.console import make_console, make_table, print_table, score_text
from eectl.models.checkpoint import About
from eectl.recipe.reading import dump_recipe
from eectl.recipe.recipe import SCORE_NAMES, Recipe, phase_change
from eectl.recipe.regimes import Phase
from eectl.recipe.weighting import exit_weights


def show_recipe(recipe: Recipe) -> None:
    """The recipe as YAML."""
    print(dump_recipe(recipe), end="")


def show_phases(
    recipe: Recipe, phases: tuple[Phase, ...], *, default_weights: str = "uniform", shares: Sequence[float] = ()
) -> None:
    """What each phase trains, what it leaves frozen, on which losses and with which optimizer.

    `default_weights` is what the heads take for `loss_weights: auto`, `shares` the attached exits' shares of the backbone's cost.
    """
    weighting = default_weights if recipe.loss_weights == "auto" else recipe.loss_weights
    num_exits = len(recipe.exits.after or ()) + 1
    everything = set(range(1, num_exits + 1))
    console = make_console()
    count = f"{len(phases)} phase{'s' if len(phases) > 1 else ''}"
    console.print(f"{recipe.regime}: {count}, {num_exits} exits, the last is the network's own head", style="bold", markup=False)
    for phase in phases:
        change = phase_change(recipe, phase)
        rate, optimizer = change.lr or recipe.optimizer.lr, recipe.optimizer
        decay = optimizer.weight_decay if change.weight_decay is None else change.weight_decay
        lines = {
            "trains": "ensembles" if phase.combine else _parts(phase.segments, phase.heads, num_exits),
            "frozen": _parts(everything - phase.segments, everything - phase.heads - {num_exits}, num_exits),
            "losses": ", then ".join("exit " + spans(exits) for exits in phase.losses),
            "weights": ", then ".join(_weights(recipe, weighting, sorted(exits), num_exits, shares) for exits in phase.losses),
            "with": f"{optimizer.name}, lr {rate:g}, weight decay {decay:g}, {recipe.schedule.name}"
            + (f", batch size {change.batch_size}" if change.batch_size else ""),
            "for": f"at most {change.epochs or recipe.epochs} epochs, patience {change.patience or recipe.patience}",
        }
        console.print(f"phase {phase.number}: {phase.title}", markup=False)
        for name, text in lines.items():
            console.print(f"  {name:8}{text}", markup=False, soft_wrap=True)


def _weights(
    recipe: Recipe, weighting: str | Sequence[float], exits: Sequence[int], num_exits: int, shares: Sequence[float]
) -> str:
    """How the exits of a loss are weighted, in words."""
    if exits == [num_exits]:
        return "1"
    numbers = exit_weights(weighting, num_exits=num_exits, taking_part=exits, slope=recipe.weight_slope, shares=shares)
    name = weighting if isinstance(weighting, str) else "as listed"
    ending = ""
    if weighting == "sdn-ramp" and num_exits in exits:
        ending = f" after {recipe.ramp_epochs} epochs" if recipe.ramp_epochs else " at the last epoch"
    elif weighting == "l2w":
        ending = f" times what is learned for each row, within ±{2 * recipe.l2w.epsilon:g} of 1"
    teacher = recipe.distillation.teacher
    lesson = f"; distillation from {teacher} × {recipe.distillation.weight:g}" if teacher != "none" and len(exits) > 1 else ""
    return f"{name}: {' '.join(f'{number:.3g}' for number in numbers)}{ending}{lesson}"


def _parts(segments: "set[int] | frozenset[int]", heads: "set[int] | frozenset[int]", num_exits: int) -> str:
    """Segments and heads in words."""
    words = []
    if segments:
        words.append("backbone" if len(segments) == num_exits else f"segment {spans(segments)}")
    if heads:
        words.append(f"head {spans(heads)}")
    return ", ".join(words) or "nothing"


def spans(numbers: "set[int] | frozenset[int]") -> str:
    """Numbers as runs: `1–3, 5`."""
    runs: list[list[int]] = []
    for number in sorted(numbers):
        if runs and number == runs[-1][1] + 1:
            runs[-1][1] = number
        else:
            runs.append([number, number])
    return ", ".join(str(first) if first == last else f"{first}–{last}" for first, last in runs)


def show_training(path: Path, about: About) -> None:
    """The result of a run: each exit on the validation split, at the weights that were kept."""
    entry = [entry for entry in about.history if "phase" in entry][-1]
    why = "patience ran out" if entry["stopped_by"] == "patience" else "the cap was reached"
    title = f"phase {entry['phase']} ({entry['title']}): epoch {entry['restored_epoch']} of {entry['epochs']} kept, {why}"
    table = make_table("exit", "after block", f"validation {SCORE_NAMES[about.task]}", "validation loss")
    blocks = [str(block) for block in about.spec.after] + ["own head"]
    for number, (block, score, loss) in enumerate(
        zip(blocks, entry["validation"]["score"], entry["validation"]["loss"], strict=True), 1
    ):
        table.add_row(str(number), block, score_text(score, None, about.task), f"{loss:.4f}")
    console = make_console()
    print_table(console, title, table)
    console.print(str(path), markup=False, soft_wrap=True)


def _ensembles(kind: str | None) -> str:
    return "" if kind is None else f", in {kind} ensembles"


def show_info(path: Path, metadata: Mapping[str, Any], about: About) -> None:
    """A checkpoint's network, data and history."""
    console = make_console()
    spec, data = about.spec, about.data
    shape = "×".join(map(str, spec.input_shape))
    args = f" {dict(spec.backbone.args)}" if spec.backbone.args else ""
    outputs = "a number out (regression)" if about.task == "regression" else f"{spec.num_outputs} classes"
    lines = {
        "network": f"{spec.backbone.name}{args}, {shape} inputs, {outputs}",
        "exits": f"{spec.heads[0]} after blocks {', '.join(map(str, spec.after))}{_ensembles(spec.combine)}"
        if spec.after
        else "none attached",
        "data": f"{data['name']}, " + ", ".join(f"{name} {split['size']:,}" for name, split in about.splits.items()),
        "weights": metadata["weights"],
        "parent": about.parent or "none",
        "made with": ", ".join(f"{name} {number}" for name, number in metadata["versions"].items()),
    }
    for name, text in lines.items():
        console.print(f"{name:>9}  {text}", markup=False, soft_wrap=True)
    if about.untrained:
        console.print(f"{'untrained':>9}  exits {', '.join(map(str, about.untrained))}", markup=False)
    table = make_table("step", "epochs", "stopped by", "exits", f"validation {SCORE_NAMES[about.task]}", "seed")
    for entry in about.history:
        if "attached" in entry:
            table.add_row(f"{entry['head']} exits after {', '.join(map(str, entry['attached']))}", "", "", "", "", "")
            continue
        if "combined" in entry:
            table.add_row(f"{entry['combined'] or 'no'} ensembles", "", "", "", "", "")
            continue
        scores = " ".join(score_text(score, None, about.task) for score in entry["validation"]["score"])
        epochs = f"{entry['restored_epoch']} of {entry['epochs']}"
        step = f"phase {entry['phase']}: {entry['title']} ({entry['regime']})"
        table.add_row(step, epochs, entry["stopped_by"], spans(set(entry["exits"])), scores, str(entry["seed"]))
    print_table(console, f"history of {path.name}", table)
