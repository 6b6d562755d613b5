"""Print a plan, a finished run and a checkpoint as tables on stdout. No torch: `eectl info` reads no weights."""

from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

from eectl.core.console import make_console, make_table, print_table, score_text, show_text
from eectl.models.checkpoint import About
from eectl.recipe.choices import listed
from eectl.recipe.data_section import describe_outputs
from eectl.recipe.optimizer_section import OptimizerSection
from eectl.recipe.reading import dump_recipe
from eectl.recipe.recipe import SCORE_NAMES, Recipe, phase_change
from eectl.recipe.regimes import Phase
from eectl.recipe.weighting import exit_weights
from eectl.recipe.yaml_text import dump_yaml

if TYPE_CHECKING:
    from eectl.training.find_lr import RateTest

SHOWN_RATES = 16  # steps of a range test, but one


def show_recipe(recipe: Recipe, *, full: bool) -> None:
    """Print as YAML what a recipe says that the defaults do not, or with `full` all of it."""
    if full:
        show_text(dump_recipe(recipe))
        return
    own = _differences(recipe.plain(), Recipe().plain())
    print("# what differs from the defaults; --full shows the whole recipe")
    show_text(dump_yaml(own))


def _differences(value: Mapping[str, Any], default: Mapping[str, Any]) -> dict[str, Any]:
    """Return what stands in `value` and not so in `default`, section by section."""
    found: dict[str, Any] = {}
    for key, item in value.items():
        other = default.get(key)
        if isinstance(item, Mapping) and isinstance(other, Mapping):
            found |= {key: own} if (own := _differences(item, other)) else {}
        elif item != other:
            found[key] = item
    return found


def show_rows(rows: Mapping[str, int], classes: Sequence[str], by_class: Mapping[str, Sequence[int]]) -> None:
    """Print the rows of each split, the classes, and the rows of each class in each split where `by_class` knows them."""
    console = make_console()
    console.print("rows: " + ", ".join(f"{name} {count:,}" for name, count in rows.items()), markup=False)
    if "test" not in rows:
        console.print("there is no test split: evaluate will have nothing to measure on", markup=False)
    numbered = list(classes) == [str(number) for number in range(len(classes))]
    names = "" if numbered or not classes else f": {_classes_text(classes)}"
    console.print(f"classes: {len(classes) or 'none, the target is a number'}{names}", markup=False, soft_wrap=True)
    for name, counts in by_class.items():
        console.print(f"  {name + ':':13}{_counts_text(counts, classes)}", markup=False, soft_wrap=True)


def _counts_text(counts: Sequence[int], classes: Sequence[str]) -> str:
    """Return how many rows each class has; of many classes the smallest, the median and the largest."""
    if len(counts) <= SHOWN_COUNTS:
        return ", ".join(f"{name} {count:,}" for name, count in zip(classes, counts, strict=True))
    order = sorted(range(len(counts)), key=counts.__getitem__)
    places = {"smallest": order[0], "median": order[len(order) // 2], "largest": order[-1]}
    return ", ".join(f"{word} {classes[place]} {counts[place]:,}" for word, place in places.items())


def show_times(recipe: Recipe, phases: Sequence[Phase], seconds: Sequence[float], how: str) -> None:
    """Print how long each phase may take, roughly: `seconds` an epoch, for as many epochs as the recipe allows."""
    console = make_console()
    console.print("time, a rough estimate", style="bold", markup=False)
    for phase, each in zip(phases, seconds, strict=True):
        epochs = phase_change(recipe, phase).epochs or recipe.epochs
        most = f"at most {_duration(each * epochs)} for {epochs} epochs" if epochs > 1 else "one epoch"
        console.print(f"  phase {phase.number}: {_duration(each)} an epoch, {most}", markup=False)
    console.print(f"  {how}", markup=False)


def show_rates(test: "RateTest") -> None:
    """Print a learning-rate range test: some of its steps, and the rate at which the loss falls fastest."""
    table = make_table("learning rate", "loss", "smoothed")
    last = len(test.rates) - 1
    for step in sorted({round(place * last / SHOWN_RATES) for place in range(SHOWN_RATES + 1)}):
        table.add_row(f"{test.rates[step]:.2g}", f"{test.losses[step]:.4g}", f"{test.smoothed[step]:.4g}")
    print_table(make_console(), f"learning-rate range test of phase {test.phase}", table)
    if test.suggestion is None:
        print("the loss never falls: no learning rate stands out")
    else:
        print(f"the loss falls fastest at lr {test.suggestion:.2g}; take this or less")


def _duration(seconds: float) -> str:
    """Return a time with two digits and a unit: `0.4 s`, `12 min`, `3.5 h`, `6.1 days`."""
    for limit, unit, size in ((90, "s", 1), (5400, "min", 60), (172800, "h", 3600)):
        if seconds < limit:
            return f"{seconds / size:.2g} {unit}"
    return f"{seconds / 86400:,.0f} days"


def show_phases(
    recipe: Recipe, phases: tuple[Phase, ...], *, default_weights: str = "uniform", shares: Sequence[float] = ()
) -> None:
    """Print what each phase trains, what it leaves frozen, on which losses and with which optimizer.

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
        optimizer = recipe.optimizer.changed(lr=change.lr, weight_decay=change.weight_decay)
        kept = "" if recipe.freeze_until is None else f"; the stem and blocks 0–{recipe.freeze_until} never"
        lines = {
            "trains": "ensembles" if phase.combine else _parts(phase.segments, phase.heads, num_exits) + kept,
            "frozen": _parts(everything - phase.segments, everything - phase.heads - {num_exits}, num_exits),
            "losses": ", then ".join("exit " + spans(exits) for exits in phase.losses),
            "weights": ", then ".join(_weights(recipe, weighting, sorted(exits), num_exits, shares) for exits in phase.losses),
            "with": f"{optimizer.name}, lr {optimizer.lr:g}, weight decay {_decay(optimizer)}, {recipe.schedule.name}"
            + (f", batch size {change.batch_size}" if change.batch_size else "")
            + (f" in {change.accumulate} pieces" if change.accumulate else "")
            + (f", layer decay {optimizer.layer_decay:g}" if optimizer.layer_decay < 1 else ""),
            "for": f"at most {change.epochs or recipe.epochs} epochs, patience {change.patience or recipe.patience}",
        }
        console.print(f"phase {phase.number}: {phase.title}", markup=False)
        for name, text in lines.items():
            console.print(f"  {name:8}{text}", markup=False, soft_wrap=True)


def _decay(optimizer: OptimizerSection) -> str:
    excluded = ", ".join(optimizer.decay.exclude)
    return f"{optimizer.decay.value:g}" + (f" (not of {excluded})" if excluded else "")


def _weights(
    recipe: Recipe, weighting: str | Sequence[float], exits: Sequence[int], num_exits: int, shares: Sequence[float]
) -> str:
    """Return in words how the exits of a loss are weighted."""
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
    """Return segments and heads in words."""
    words = []
    if segments:
        words.append("backbone" if len(segments) == num_exits else f"segment {spans(segments)}")
    if heads:
        words.append(f"head {spans(heads)}")
    return ", ".join(words) or "nothing"


def spans(numbers: "set[int] | frozenset[int]") -> str:
    """Return numbers as runs: `1–3, 5`."""
    runs: list[list[int]] = []
    for number in sorted(numbers):
        if runs and number == runs[-1][1] + 1:
            runs[-1][1] = number
        else:
            runs.append([number, number])
    return ", ".join(str(first) if first == last else f"{first}–{last}" for first, last in runs)


def show_training(path: Path, about: About) -> None:
    """Print the result of a run: each exit on the validation split, at the weights that were kept."""
    entry = _last_phase(about)
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


def _last_phase(about: About) -> Mapping[str, Any]:
    return [entry for entry in about.history if "phase" in entry][-1]


def weak_exits_in_training(about: About) -> list[str]:
    """Return a line for each trained exit that is worse on the validation split than an exit before it.

    Accuracies and F1 must differ by more than a standard error of one of them, mean squared errors by more than 2 %: smaller
    differences are no news.
    """
    scores, name = _last_phase(about)["validation"]["score"], SCORE_NAMES[about.task]
    rows, lines = about.splits["validation"]["size"], []
    best = 1
    for number, score in enumerate(scores, 1):
        other = scores[best - 1]
        if number in about.untrained or score is None or other is None:
            continue
        if about.task == "regression":
            worse, better = score > 1.02 * other, score < other
        else:
            worse, better = other - score > (score * (1 - score) / rows) ** 0.5, score > other
        if worse:
            pair = (f"exit {each} ({name} {score_text(scores[each - 1], None, about.task)})" for each in (number, best))
            lines.append(f"{' is worse than '.join(pair)}, which costs less")
        best = number if better else best
    return lines


def _ensembles(kind: str | None) -> str:
    return "" if kind is None else f", in {kind} ensembles"


SHOWN_ARGS = 4  # a text network's configuration has 14; they are in `eectl info --json`
SHOWN_CLASSES = 20
SHOWN_COUNTS = 10


def _args_text(args: Mapping[str, Any]) -> str:
    """Return a network's options in words, of a long configuration what shapes it most."""
    if len(args) > SHOWN_ARGS:
        sizes = {"num_hidden_layers": "layers", "hidden_size": "wide", "num_attention_heads": "attention heads"}
        told = [f"{args[key]} {word}" for key, word in sizes.items() if key in args]
        return f" ({', '.join([*told, f'{len(args)} options in all'])}; --json)"
    return f" {dict(args)}" if args else ""


def _classes_text(classes: Sequence[str]) -> str:
    names = ", ".join(classes[:SHOWN_CLASSES])
    return names if len(classes) <= SHOWN_CLASSES else f"{names}, … ({len(classes)} in all; --json)"


def _preprocessing_text(about: About) -> str:
    """Return in words how stored images or texts become what the network takes."""
    data, spec = about.data, about.data_spec
    if data.get("kind") == "text":
        columns = " and ".join(spec.text)
        return f"column {columns}, tokens of {spec.tokenizer}, cut to {about.spec.input_shape[-1]}"
    channels, height, width = about.spec.input_shape
    if spec.image_size is None:
        size = f"{height}×{width} as stored"
    else:
        size = f"short side to {spec.resize or spec.image_size}, centre {height}×{width}, {spec.interpolation}"
    colour = "grey" if channels == 1 else "RGB"
    mean, std = (" ".join(f"{value:.4g}" for value in data[name]) for name in ("mean", "std"))
    return f"{colour}, {size}; (pixel / 255 - {mean}) / {std}"


def show_info(path: Path, metadata: Mapping[str, Any], about: About) -> None:
    """Print a checkpoint's network, data, preprocessing and history."""
    console = make_console()
    spec, data = about.spec, about.data
    shape = "×".join(map(str, spec.input_shape))
    outputs = describe_outputs(about.task, spec.num_outputs)
    lines = {
        "network": f"{spec.backbone.name}{_args_text(spec.backbone.args)}, {shape} inputs, {outputs}",
        "exits": f"{spec.heads[0]} after blocks {', '.join(map(str, spec.after))}{_ensembles(spec.combine)}"
        if spec.after
        else "none attached",
        "data": f"{data['name']}, " + ", ".join(f"{name} {split['size']:,}" for name, split in about.splits.items()),
        "classes": _classes_text(data["classes"])
        if data["classes"]
        else f"none; the target is {listed(about.data_spec.targets)}",
        "inputs": _preprocessing_text(about),
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
