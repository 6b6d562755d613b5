"""The panel Train of `eectl --help`: train and attach-heads. Heavy imports stay inside the commands."""

from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import typer

from eectl.cli.options import (
    MOST_COUNT,
    Checkpoint,
    DataRoot,
    Device,
    Overwrite,
    Quiet,
    among,
    complete_files,
    complete_recipes_and_files,
    say,
    whole,
)
from eectl.core.seeds import MOST_SEED
from eectl.recipe.budgets import DEFAULT_BUDGETS
from eectl.recipe.choices import (
    AUTO_HEAD,
    FILE_CHOICES,
    HEAD_CHOICES,
    PHASE_CHOICES,
    PLACEMENT_CHOICES,
    PRECISION_CHOICES,
    REGIME_CHOICES,
    TASK_CHOICES,
    TRACK_CHOICES,
    TRACKER_CHOICES,
    completions,
    described,
    listed,
)

if TYPE_CHECKING:
    from eectl.recipe.recipe import Recipe

PHASES = listed(f"{number} {title}" for number, title in PHASE_CHOICES.items())


def train(
    recipe: Annotated[
        str | None,
        typer.Argument(metavar="[RECIPE]", help="a YAML file or a shipped recipe's name; default: that of --from, else digits",
                       autocompletion=complete_recipes_and_files, show_default=False),
    ] = None,
    regime: Annotated[str | None, typer.Option(help=listed(REGIME_CHOICES),
                                               autocompletion=among(*REGIME_CHOICES), show_default=False)] = None,
    phase: Annotated[int | None, typer.Option(parser=whole(1, MOST_COUNT), help=f"run one phase: {PHASES}; staged regimes "
                                              "count their stages",
                                              show_default=False)] = None,
    start: Annotated[str | None, typer.Option("--from", help="a checkpoint to start from: a file, or hf://OWNER/NAME on the hub",
                                              autocompletion=complete_files, show_default=False)] = None,
    out: Annotated[Path | None, typer.Option("--out", "-o", help="the run's folder; default: runs/RECIPE-REGIME[-phase-N]-seed-S",
                                             show_default=False)] = None,
    changes: Annotated[list[str] | None, typer.Option("--set", metavar="KEY=VALUE", help="change the recipe, such as "
                                                      "optimizer.lr=1e-4; may be repeated", show_default=False)] = None,
    seed: Annotated[int | None, typer.Option(parser=whole(0, MOST_SEED), help="seed of weights, order and augmentation",
                                             show_default=False)] = None,
    epochs: Annotated[int | None, typer.Option(parser=whole(0, MOST_COUNT), help="at most this many per phase",
                                               show_default=False)] = None,
    pretrained: Annotated[bool, typer.Option("--pretrained", help="start from the weights that torchvision or timm publish; "
                                             "that library downloads them")] = False,
    data: Annotated[Path | None, typer.Option(help="data of your own: a folder of images by class or in shards, a file of "
                                              f"texts ({listed(FILE_CHOICES)}), or hfds/OWNER/NAME", show_default=False)] = None,
    text: Annotated[list[str] | None, typer.Option(help="the column with the text; twice for pairs of texts", metavar="COLUMN",
                                                   show_default=False)] = None,
    target: Annotated[list[str] | None, typer.Option(help="the column to predict; several times for several numbers or labels",
                                                     metavar="COLUMN", show_default=False)] = None,
    task: Annotated[str | None, typer.Option(help=described(TASK_CHOICES), autocompletion=among(*TASK_CHOICES),
                                             show_default=False)] = None,
    backbone: Annotated[str | None, typer.Option(help="the network, such as resnet20, timm/resnet18 or hf/./FOLDER",
                                                 show_default=False)] = None,
    weights: Annotated[Path | None, typer.Option(help="start from the network's weights in this .safetensors file",
                                                 autocompletion=complete_files, show_default=False)] = None,
    device: Device = "auto",
    precision: Annotated[str | None, typer.Option(help=f"what to train in: {listed(PRECISION_CHOICES)}",
                                                  autocompletion=among(*PRECISION_CHOICES), show_default=False)] = None,
    deterministic: Annotated[bool | None, typer.Option("--deterministic", help="the same bits from a seed, on a GPU too",
                                                       show_default=False)] = None,
    data_root: DataRoot = None,
    download: Annotated[bool, typer.Option("--download", help="fetch the data set if it is missing")] = False,
    resume: Annotated[bool, typer.Option("--resume", help="go on where the run in --out stopped, or start it")] = False,
    overwrite: Overwrite = False,
    dry_run: Annotated[bool, typer.Option("--dry-run", help="show what the recipe amounts to and a rough time, and stop; needs "
                                          "no network")] = False,
    find_lr: Annotated[bool, typer.Option("--find-lr", help="try learning rates from 1e-7 to 10 in 100 steps and show where the "
                                          "loss falls fastest; trains no network; -o is then a plot, or a folder for lr.csv and "
                                          "lr.png")] = False,
    full: Annotated[bool, typer.Option("--full", help="with --dry-run: the whole recipe")] = False,
    track: Annotated[str | None, typer.Option(help=f"measure {listed(TRACK_CHOICES)} on the way, into metrics.jsonl",
                                              autocompletion=among(*TRACK_CHOICES), show_default=False)] = None,
    track_every: Annotated[int | None, typer.Option(parser=whole(1, MOST_COUNT), help="on every N-th batch; default: as a tenth "
                                                    "of the time allows", metavar="N", show_default=False)] = None,
    track_to: Annotated[list[str] | None, typer.Option(help="log the numbers of metrics.jsonl to an experiment tracker: "
                                                       f"{described(TRACKER_CHOICES)}; may be repeated; default: tensorboard "
                                                       "where it is installed", metavar="NAME", show_default=False,
                                                       autocompletion=among(*TRACKER_CHOICES))] = None,
    quiet: Quiet = False,
) -> None:  # fmt: skip
    """Train a regime, or one phase of it, into a run folder.

    Example: eectl train digits --regime disjoint --phase 1 -o runs/backbone
    Data of your own: eectl train --data photos --backbone timm/resnet18 --weights resnet18.safetensors
    """
    from eectl.training.experiment_logs import choose_trackers
    from eectl.training.find_recipe import find_recipe

    given: dict[str, Any] = {"regime": regime, "phase": phase, "seed": seed, "epochs": epochs, "data_root": data_root}
    given |= {"start": start, "pretrained": pretrained or None, "data": data, "text": text or None, "target": target or None}
    given |= {"task": task, "backbone": backbone, "weights": weights}
    given |= {"precision": precision, "deterministic": deterministic}
    if find_lr:
        _check_alone(dry_run=dry_run, resume=resume, track=track is not None, download=download)
        found = find_recipe(recipe, changes=changes or (), given=given)
        for note in found.notes:
            say(note)
        _show_rates(found.recipe, recipe, out=out, device=device, overwrite=overwrite, quiet=quiet)
        return
    if dry_run:
        choose_trackers(track_to)
        found = find_recipe(recipe, changes=changes or (), given=given)
        for note in found.notes:
            say(note)
        _show_plan(found.recipe, device=device, full=full)
        return
    from eectl.training.tables import show_training, weak_exits_in_training
    from eectl.training.train import train as run

    done = run(
        recipe, out=out, changes=changes or (), device=device, download=download, resume=resume, overwrite=overwrite, track=track,
        track_every=track_every, track_to=track_to, quiet=quiet, **given | {"pretrained": pretrained},
    )  # fmt: skip
    if done is not None:
        show_training(done.path, done.about)
        for line in weak_exits_in_training(done.about):
            say(f"note: {line}")
        say(f"next: {_next_after_training(done.path, has_exits=bool(done.about.spec.after))}")


def _check_alone(**others: bool) -> None:
    """Raise EectlError for what --find-lr does not go with."""
    from eectl.core.errors import EectlError

    for name, is_given in others.items():
        if is_given:
            raise EectlError(f"--find-lr and --{name.replace('_', '-')} do not go together; leave one out")


def _show_rates(recipe: "Recipe", asked: str | None, *, out: Path | None, device: str, overwrite: bool, quiet: bool) -> None:
    from eectl.training.find_lr import find_lr
    from eectl.training.tables import show_rates

    test = find_lr(recipe, out=out, device=device, overwrite=overwrite, quiet=quiet)
    show_rates(test)
    for path in test.files:
        say(f"written: {path}")
    if test.suggestion is not None:
        say(f"next: eectl train {asked or 'digits'} --set optimizer.lr={test.suggestion:.2g}")


def _show_plan(recipe: "Recipe", *, device: str, full: bool) -> None:
    from eectl.evaluation.tables import show_costs
    from eectl.training.dry_run import estimate_time, plan
    from eectl.training.tables import show_phases, show_recipe, show_rows, show_times

    planned = plan(recipe)
    for note in planned.notes:
        say(f"note: {note}")
    costs = planned.priced.costs
    show_recipe(planned.recipe, full=full)
    show_rows(planned.rows, planned.classes, planned.by_class)
    show_phases(planned.recipe, planned.phases, default_weights=planned.default_weights, shares=costs.backbone_shares)
    show_costs(costs, after=planned.priced.spec.after)
    times = estimate_time(planned, device=device)
    show_times(planned.recipe, planned.phases, times.seconds, times.how)


def _next_after_training(path: Path, *, has_exits: bool) -> str:
    if has_exits:
        return f"eectl calibrate-thresholds {path} --budgets {DEFAULT_BUDGETS} -o {path.with_name('policy.json')}"
    return f"eectl attach-heads {path} --placement every-2 -o {path.with_name('heads.safetensors')}"


def attach_heads(
    checkpoint: Checkpoint,
    out: Annotated[Path, typer.Option("--out", "-o", help="the checkpoint to write", show_default=False)],
    after: Annotated[str | None, typer.Option(metavar="BLOCKS", help="blocks that an exit follows, such as 2,4,6",
                                              show_default=False)] = None,
    placement: Annotated[str | None, typer.Option(help=listed(PLACEMENT_CHOICES), show_default=False,
                                                  autocompletion=among(*completions(PLACEMENT_CHOICES)))] = None,
    head: Annotated[str, typer.Option(help=f"{listed(HEAD_CHOICES)}; {AUTO_HEAD}",
                                      autocompletion=among("auto", *completions(HEAD_CHOICES)))] = "auto",
    seed: Annotated[int | None, typer.Option(parser=whole(0, MOST_SEED), help="seed of the new weights; default: the recipe's",
                                             show_default=False)] = None,
    overwrite: Overwrite = False,
) -> None:  # fmt: skip
    """Put untrained exits on the backbone of a checkpoint.

    Example: eectl attach-heads runs/backbone/model.safetensors --after 2,4,6 -o heads.safetensors
    """
    from eectl.training.attach import attach_heads as attach

    made = attach(checkpoint, out=out, after=after, placement=placement, head=head, seed=seed, overwrite=overwrite)
    spec = made.about.spec
    say(f"{out}: untrained {spec.heads[0]} exits after blocks {', '.join(map(str, spec.after))}")
    if spec.after[-1] == made.depth - 1:
        say(f"exit {len(spec.after)} follows the last block, {made.depth - 1}: leaving there saves nothing")
    say(f"next: eectl train --phase 3 --from {out} -o {out.with_suffix('')}-trained")
