"""The command line: parse, call one verb, print. Heavy imports stay inside the commands, so --help and TAB are quick."""

import os
import signal
import sys
from pathlib import Path
from types import FrameType
from typing import TYPE_CHECKING, Annotated

import typer

from eectl import __version__
from eectl.cli.explain import analyze
from eectl.cli.options import (
    BatchSize,
    Budgets,
    Checkpoint,
    Criterion,
    DataRoot,
    Device,
    Json,
    Out,
    Overwrite,
    Quiet,
    among,
    complete_files,
    starting_with,
)
from eectl.core.errors import EectlError, Interrupted

if TYPE_CHECKING:
    from eectl.recipe.recipe import Recipe

app = typer.Typer(
    name="eectl",
    help="Train, calibrate, measure and explain multi-exit neural networks.",
    no_args_is_help=True,
    pretty_exceptions_enable=False,
    context_settings={"help_option_names": ["-h", "--help"]},
)

HEADS = ("linear", "mlp-1024", "mlp-2048", "sdn", "ztw", "ztw-arithmetic", "gpf", "gpf-lancopku")
PLACEMENTS = ("every-1", "every-2", "every-3", "dense-sparse", "sparse-dense")
BUDGETS = "25,50,75,100"


def _regimes(incomplete: str) -> list[str]:
    from eectl.recipe.regimes import REGIMES

    return starting_with(REGIMES, incomplete)


def _recipes(incomplete: str) -> list[str]:
    from eectl.recipe.reading import shipped_recipes

    return starting_with(shipped_recipes(), incomplete)


def _published(incomplete: str) -> list[str]:
    """The paper's tables, and their variants as TABLE:VARIANT."""
    from eectl.reports.published import published_tables

    tables = published_tables().values()
    names = [name for each in tables for name in (each.number, *(f"{each.number}:{one}" for one in each.variants if one))]
    return starting_with(names, incomplete)


def _runs(incomplete: str) -> list[str]:
    """Run folders, checkpoints and evaluations that begin like this."""
    base = Path(incomplete)
    folder = base if incomplete.endswith("/") else base.parent
    names = (f"{path}/" if path.is_dir() else str(path) for path in sorted(folder.glob("*")) if folder.is_dir())
    return [name for name in names if name.startswith(incomplete) and name.endswith(("/", ".safetensors", ".json"))]


def _recipes_and_files(incomplete: str) -> list[str]:
    return _recipes(incomplete) + complete_files(incomplete)


def main() -> None:
    """Run the program; a user's mistake becomes one line on stderr and exit code 1, a bug keeps its traceback."""

    def stop(number: int, frame: FrameType | None) -> None:
        if _imports(frame):  # a library's C code would swallow an exception, or abort; and nothing is begun yet
            _say_stopped(Interrupted(number))
            os._exit(Interrupted(number).exit_code)
        raise Interrupted(number)

    for number in (signal.SIGINT, signal.SIGTERM):  # while nothing is saved; training notes signals in its own way
        if signal.getsignal(number) != signal.SIG_IGN:
            signal.signal(number, stop)
    try:
        app(prog_name="eectl")
    except EectlError as error:
        rank = os.environ.get("RANK", "0")
        process = "" if rank == "0" else f" [process {rank}]"
        for line in str(error).splitlines():
            print(f"eectl{process}: {line}", file=sys.stderr)
        sys.exit(error.exit_code)
    except Interrupted as caught:
        _say_stopped(caught)
        sys.exit(caught.exit_code)


def _imports(frame: FrameType | None) -> bool:
    """Whether a module is being imported there."""
    while frame is not None and "importlib._bootstrap" not in frame.f_code.co_filename:
        frame = frame.f_back
    return frame is not None


def _say_stopped(caught: Interrupted) -> None:
    if os.environ.get("RANK", "0") == "0":
        print(f"eectl: stopped by {caught}{caught.hint}", file=sys.stderr, flush=True)


def _say(text: str) -> None:
    print(text, file=sys.stderr)


def _version(wanted: bool) -> None:
    if wanted:
        print(f"eectl {__version__}")
        raise typer.Exit


app.add_typer(analyze, rich_help_panel="Explain")


@app.callback()
def _common(
    version: Annotated[
        bool, typer.Option("--version", callback=_version, is_eager=True, help="Show the version and exit.")
    ] = False,
) -> None:
    pass


@app.command(rich_help_panel="Train")
def train(
    recipe: Annotated[
        str | None,
        typer.Argument(metavar="[RECIPE]", help="a YAML file or a shipped recipe's name; none: that of --from, else digits",
                       autocompletion=_recipes_and_files, show_default=False),
    ] = None,
    regime: Annotated[str | None, typer.Option(help="disjoint, joint, mixed, branch-wise, separate, alternating, mixed-gradual",
                                               autocompletion=_regimes, show_default=False)] = None,
    phase: Annotated[int | None, typer.Option(min=1, help="run one phase: 1 backbone, 2 everything, 3 heads on the frozen "
                                              "backbone; staged regimes count their stages", show_default=False)] = None,
    start: Annotated[Path | None, typer.Option("--from", help="a checkpoint to start from", autocompletion=complete_files,
                                               show_default=False)] = None,
    out: Annotated[Path | None, typer.Option("--out", "-o", help="the run's folder; none: runs/RECIPE-REGIME[-phase-N]-seed-S",
                                             show_default=False)] = None,
    changes: Annotated[list[str] | None, typer.Option("--set", metavar="KEY=VALUE", help="change the recipe, such as "
                                                      "optimizer.lr=1e-4; may be repeated", show_default=False)] = None,
    seed: Annotated[int | None, typer.Option(help="seed of weights, order and augmentation", show_default=False)] = None,
    epochs: Annotated[int | None, typer.Option(help="at most this many per phase", show_default=False)] = None,
    pretrained: Annotated[bool, typer.Option("--pretrained", help="start from the weights that torchvision or timm publish; "
                                             "that library downloads them")] = False,
    device: Device = "auto",
    data_root: DataRoot = None,
    download: Annotated[bool, typer.Option("--download", help="fetch the data set if it is missing")] = False,
    resume: Annotated[bool, typer.Option("--resume", help="go on where the run in --out stopped, or start it")] = False,
    overwrite: Overwrite = False,
    dry_run: Annotated[bool, typer.Option("--dry-run", help="show the recipe, the phases and the costs, and stop")] = False,
    track: Annotated[str | None, typer.Option(help="measure gradient-dominance on the way, into metrics.jsonl",
                                              autocompletion=among("gradient-dominance"), show_default=False)] = None,
    track_every: Annotated[int | None, typer.Option(min=1, help="on every N-th batch; none: as a tenth of the time allows",
                                                    metavar="N", show_default=False)] = None,
    quiet: Quiet = False,
) -> None:  # fmt: skip
    """Train a regime, or one phase of it, into a run folder.

    Example: eectl train digits --regime disjoint --phase 1 -o runs/backbone
    """
    given = {"regime": regime, "phase": phase, "seed": seed, "epochs": epochs, "data.root": data_root, "init": start}
    given["backbone.pretrained"] = pretrained or None
    extra = [f"{key}={_yaml_text(value)}" for key, value in given.items() if value is not None]
    name, full = _find_recipe(recipe, start, [*(changes or []), *extra])
    if dry_run:
        from eectl.evaluation.tables import show_costs
        from eectl.training.dry_run import plan
        from eectl.training.tables import show_phases, show_recipe

        planned = plan(full)
        show_recipe(planned.recipe)
        show_phases(
            planned.recipe,
            planned.phases,
            default_weights=planned.default_weights,
            shares=planned.priced.costs.backbone_shares,
        )
        show_costs(planned.priced.costs, after=planned.priced.spec.after)
        return
    part = "" if full.phase is None else f"-phase-{full.phase}"
    folder = out or Path("runs") / f"{name}-{full.regime}{part}-seed-{full.seed}"
    from eectl.training.tables import show_training
    from eectl.training.train import train as run

    done = run(
        full, out=folder, device=device, resume=resume, overwrite=overwrite, download=download, quiet=quiet, track=track,
        track_every=track_every,
    )  # fmt: skip
    if done is not None:
        show_training(done.path, done.about)
        _say(f"next: {_next_after_training(done.path, has_exits=bool(done.about.spec.after))}")


def _yaml_text(value: object) -> str:
    import json

    return json.dumps(str(value) if isinstance(value, Path) else value)


def _find_recipe(recipe: str | None, start: Path | None, changes: list[str]) -> "tuple[str, Recipe]":
    """The recipe and a name for its runs: the one that is named, that of the checkpoint to start from, or digits."""
    from eectl.recipe.reading import make_recipe, read_recipe

    if recipe is None and start is not None:
        from eectl.models.checkpoint import read_about

        own = {key: value for key, value in read_about(start).recipe.items() if key not in ("phase", "init")}
        return start.stem, make_recipe(own, where=f"{start} (its recipe)", changes=changes)
    return Path(recipe or "digits").stem, read_recipe(recipe or "digits", changes=changes)


def _next_after_training(path: Path, *, has_exits: bool) -> str:
    if has_exits:
        return f"eectl calibrate-thresholds {path} --budgets {BUDGETS} -o {path.with_name('policy.json')}"
    return f"eectl attach-heads {path} --placement every-2 -o {path.with_name('heads.safetensors')}"


@app.command("attach-heads", rich_help_panel="Train")
def attach_heads(
    checkpoint: Checkpoint,
    out: Annotated[Path, typer.Option("--out", "-o", help="the checkpoint to write", show_default=False)],
    after: Annotated[str | None, typer.Option(metavar="BLOCKS", help="blocks that an exit follows, such as 2,4,6",
                                              show_default=False)] = None,
    placement: Annotated[str | None, typer.Option(help="every-N, dense-sparse or sparse-dense", show_default=False,
                                                  autocompletion=among(*PLACEMENTS))] = None,
    head: Annotated[str, typer.Option(help="linear, mlp-WIDTH, sdn, ztw, ztw-arithmetic, gpf, gpf-WIDTH, gpf-lancopku, "
                                           "gpf-lancopku-WIDTH; auto: sdn on CNNs, linear on transformers",
                                      autocompletion=among("auto", *HEADS))] = "auto",
    seed: Annotated[int | None, typer.Option(help="seed of the heads' weights; none: the recipe's", show_default=False)] = None,
    overwrite: Overwrite = False,
) -> None:  # fmt: skip
    """Put untrained exits on the backbone of a checkpoint.

    Example: eectl attach-heads runs/backbone/model.safetensors --after 2,4,6 -o heads.safetensors
    """
    from eectl.training.attach import attach_heads as attach

    network = attach(checkpoint, after=after, placement=placement, head=head, out=out, seed=seed, overwrite=overwrite)
    blocks = ", ".join(map(str, network.spec.after))
    _say(f"{out}: untrained {network.spec.heads[0]} exits after blocks {blocks}")
    depth = network.model.backbone.depth
    if network.spec.after[-1] == depth - 1:
        _say(f"exit {len(network.spec.after)} follows the last block, {depth - 1}: leaving there saves nothing")
    _say(f"next: eectl train --phase 3 --from {out} -o {out.with_suffix('')}-trained")


@app.command("calibrate-thresholds", rich_help_panel="Measure")
def calibrate_thresholds(
    checkpoint: Checkpoint,
    budgets: Budgets = BUDGETS,
    criterion: Criterion = None,
    thresholds: Annotated[str, typer.Option(help="shared: one for all exits; per-exit: one each, better on the calibration split "
                                            "and readier to overfit a small one",
                                            autocompletion=among("shared", "per-exit"))] = "shared",
    cost: Annotated[str, typer.Option(help="macs; or latency: budgets are % of the plain backbone's time as eectl bench measured "
                                      "it, latency:BATCH where it did so at several batch sizes",
                                      autocompletion=among("macs", "latency"))] = "macs",
    bench: Annotated[Path | None, typer.Option(help="the times for --cost latency; none: bench.json beside the checkpoint",
                                               show_default=False)] = None,
    out: Out = None,
    predictions: Annotated[Path | None, typer.Option(help="predictions of the calibration split, instead of a pass over it",
                                                     show_default=False)] = None,
    save_predictions: Annotated[Path | None, typer.Option(help="keep the predictions of the calibration split",
                                                          show_default=False)] = None,
    device: Device = "auto",
    data_root: DataRoot = None,
    batch_size: BatchSize = None,
    overwrite: Overwrite = False,
    json: Json = False,
) -> None:  # fmt: skip
    """Choose exit thresholds for cost budgets on the calibration split.

    Without -o the policy goes to policy.json beside the checkpoint. Evaluate takes it as it is, whatever the thresholds or costs.
    Example: eectl calibrate-thresholds model.safetensors --budgets 25,50,75,100 -o policy.json
    """
    from eectl.core.console import show_json
    from eectl.evaluation.calibrate import calibrate_checkpoint
    from eectl.evaluation.tables import show_calibration

    path = out or checkpoint.with_name("policy.json")
    policies = calibrate_checkpoint(
        checkpoint, budgets=budgets, criterion=criterion, search=thresholds, cost=cost, bench=bench, out=path,
        predictions=predictions, save_to=save_predictions, device=device, data_root=data_root, batch_size=batch_size,
        overwrite=overwrite, say=_say,
    )  # fmt: skip
    if policies is None:
        return
    if json:
        show_json(policies.to_json())
    else:
        show_calibration(policies)
    _say(f"next: eectl evaluate {checkpoint} --policy {path}")


@app.command(rich_help_panel="Measure")
def evaluate(
    checkpoint: Checkpoint,
    budgets: Annotated[str | None, typer.Option(help=f"% of the plain backbone's cost; none: the policy's, or {BUDGETS}",
                                                show_default=False)] = None,
    policy: Annotated[Path | None, typer.Option(help="thresholds from calibrate-thresholds; none: calibrate first",
                                                show_default=False)] = None,
    criterion: Criterion = None,
    protocol: Annotated[str, typer.Option(help="calibrated, or paper: the authors' rule, thresholds chosen on the test split",
                                          autocompletion=among("calibrated", "paper"))] = "calibrated",
    out: Annotated[Path | None, typer.Option("--out", "-o", help="write the evaluation, for eectl report", metavar="FILE.json",
                                             show_default=False)] = None,
    plot: Annotated[Path | None, typer.Option(help="draw accuracy (or MSE) against cost into this .png, .pdf or .svg",
                                              show_default=False)] = None,
    predictions: Annotated[Path | None, typer.Option(help="predictions of the test split, instead of a pass over it",
                                                     show_default=False)] = None,
    save_predictions: Annotated[Path | None, typer.Option(help="keep the predictions of the test split",
                                                          show_default=False)] = None,
    device: Device = "auto",
    data_root: DataRoot = None,
    batch_size: BatchSize = None,
    overwrite: Overwrite = False,
    json: Json = False,
) -> None:  # fmt: skip
    """Report accuracy (or MSE) at cost budgets on the test split.

    Example: eectl evaluate model.safetensors --budgets 25,50,75,100 --plot curve.png
    """
    from eectl.core.console import show_json
    from eectl.evaluation.evaluate import evaluate_checkpoint
    from eectl.evaluation.tables import show_evaluation

    result = evaluate_checkpoint(
        checkpoint, budgets=budgets, policy=policy, criterion=criterion, protocol=protocol, out=out, plot=plot,
        predictions=predictions, save_to=save_predictions, device=device, data_root=data_root, batch_size=batch_size,
        overwrite=overwrite, say=_say,
    )  # fmt: skip
    if result is None:
        return
    if json:
        show_json(result.to_json())
    else:
        show_evaluation(result)
    if out is not None:
        _say(f"next: eectl report {out}, with the evaluations of other seeds and regimes")


@app.command(rich_help_panel="Measure")
def report(
    runs: Annotated[list[Path] | None, typer.Argument(metavar="RUN…", help="run folders with an evaluation.json, checkpoints "
                                                      "beside one, or evaluation files", autocompletion=_runs,
                                                      show_default=False)] = None,
    lookup: Annotated[str, typer.Option(help="per-seed, or average-first: the authors' rule, one threshold of their grid for "
                                        "the mean over seeds, chosen on the test split",
                                        autocompletion=among("per-seed", "average-first"))] = "per-seed",
    published: Annotated[str | None, typer.Option(metavar="TABLE[:VARIANT]", help="the paper's numbers to stand below ours",
                                                  autocompletion=_published, show_default=False)] = None,
    list_published: Annotated[bool, typer.Option("--list-published", help="show the paper's tables and stop")] = False,
    label: Annotated[list[str] | None, typer.Option(metavar="PATTERN=TEXT", help="call the runs whose names fit so; may be "
                                                    "repeated", show_default=False)] = None,
    form: Annotated[str, typer.Option("--format", help="table, markdown, latex, csv or json, on stdout",
                                      autocompletion=among("table", "markdown", "latex", "csv", "json"))] = "table",
    out: Annotated[list[Path] | None, typer.Option("--out", "-o", help="write a .md, .tex, .csv or .json table, or a .png, "
                                                   ".pdf or .svg plot; may be repeated", show_default=False)] = None,
    overwrite: Overwrite = False,
    json: Json = False,
) -> None:  # fmt: skip
    """Gather runs into one table: mean ± std over seeds at each budget, a row per setting and regime.

    Example: eectl report runs/* --published 10 -o table.tex -o curves.pdf
    """
    from eectl.reports.tables import check_form, show_comparison, show_published

    if list_published:
        from eectl.reports.published import published_tables

        show_published(list(published_tables().values()))
        return
    if not runs:
        raise EectlError("report: name the runs, such as runs/*; or --list-published for the paper's tables")
    check_form(form)
    from eectl.reports.report import summarize

    comparison = summarize(
        runs, how=lookup, published=published, label=label or [], outputs=out or [], overwrite=overwrite, say=_say
    )
    show_comparison(comparison, form="json" if json else form)


@app.command(rich_help_panel="Measure")
def bench(
    checkpoint: Checkpoint,
    budgets: Annotated[str | None, typer.Option(help=f"% of the plain backbone's cost; none: the policy's, or {BUDGETS}",
                                                show_default=False)] = None,
    batch_size: Annotated[str, typer.Option(help="rows at once, one size or several")] = "1,32,256",
    policy: Annotated[Path | None, typer.Option(help="thresholds from calibrate-thresholds; none: calibrate first",
                                                show_default=False)] = None,
    criterion: Criterion = None,
    rows: Annotated[int | None, typer.Option(min=1, help="test rows to measure on; none: twice the largest batch, 256 at least",
                                             show_default=False)] = None,
    seconds: Annotated[float, typer.Option(min=0.01, help="about how long the plain backbone is timed at each batch size")] = 2.0,
    seed: Annotated[int, typer.Option(help="which rows are drawn")] = 0,
    out: Annotated[Path | None, typer.Option("--out", "-o", help="write the measurements", metavar="FILE.json",
                                             show_default=False)] = None,
    device: Device = "auto",
    data_root: DataRoot = None,
    overwrite: Overwrite = False,
    json: Json = False,
) -> None:  # fmt: skip
    """Time early exit against the plain backbone on this device, on rows of the test split.

    Example: eectl bench model.safetensors --policy policy.json --batch-size 1,32,256 -o bench.json
    """
    from eectl.core.console import show_json
    from eectl.evaluation.bench import bench_checkpoint
    from eectl.evaluation.bench_tables import show_bench

    result = bench_checkpoint(
        checkpoint, budgets=budgets, batch_sizes=batch_size, policy=policy, criterion=criterion, rows=rows, seconds=seconds,
        seed=seed, out=out, device=device, data_root=data_root, overwrite=overwrite, say=_say,
    )  # fmt: skip
    if json:
        show_json(result.to_json())
    else:
        show_bench(result)
    if out is not None:
        _say(f"next: eectl calibrate-thresholds {checkpoint} --cost latency --bench {out}")


@app.command(rich_help_panel="Measure")
def flops(
    source: Annotated[str, typer.Argument(metavar="CKPT|RECIPE", help="a checkpoint, a YAML file or a shipped recipe's name",
                                          autocompletion=_recipes_and_files, show_default=False)],
    changes: Annotated[list[str] | None, typer.Option("--set", metavar="KEY=VALUE", help="change the recipe",
                                                      show_default=False)] = None,
    data_root: DataRoot = None,
    json: Json = False,
) -> None:  # fmt: skip
    """Print what each exit costs: multiply-adds (MACs) of one input, heads passed on the way included."""
    from eectl.core.console import show_json
    from eectl.evaluation.tables import costs_json, show_costs
    from eectl.training.dry_run import costs_of

    measured = costs_of(source, changes=changes or [], data_root=data_root)
    if json:
        show_json(costs_json(measured.costs, after=measured.spec.after))
    else:
        show_costs(measured.costs, after=measured.spec.after)


@app.command(rich_help_panel="Look")
def info(checkpoint: Checkpoint, json: Json = False) -> None:
    """Say what a checkpoint holds and how it came about."""
    from eectl.core.console import show_json
    from eectl.models.checkpoint import read_about, read_metadata
    from eectl.training.tables import show_info

    metadata = read_metadata(checkpoint)
    if json:
        show_json(metadata)
    else:
        show_info(checkpoint, metadata, read_about(checkpoint))


@app.command(rich_help_panel="Look")
def recipes(
    name: Annotated[str | None, typer.Argument(help="print this one", autocompletion=_recipes, show_default=False)] = None,
) -> None:
    """List the shipped recipes, or print one."""
    from eectl.core.errors import lookup
    from eectl.recipe.reading import shipped_recipes

    texts = shipped_recipes()
    if name is not None:
        print(lookup(texts, name, what="recipe"), end="")
        return
    width = max(map(len, texts))
    for each, text in texts.items():
        print(f"{each:{width}}  {text.splitlines()[0].lstrip('# ')}")
