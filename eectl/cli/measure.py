"""The panel Measure of `eectl --help`: calibrate-thresholds, evaluate, report, bench and flops. Heavy imports stay inside."""

from pathlib import Path
from typing import Annotated

import typer

from eectl.cli.options import (
    MOST_COUNT,
    BatchSize,
    Budgets,
    Checkpoint,
    Criterion,
    DataRoot,
    Device,
    Json,
    Out,
    Overwrite,
    Paper,
    Precision,
    among,
    complete_published,
    complete_recipes_and_files,
    complete_runs,
    decimal,
    say,
    whole,
)
from eectl.core.errors import EectlError
from eectl.core.seeds import MOST_SEED
from eectl.recipe.budgets import DEFAULT_BATCH_SIZES, DEFAULT_BUDGETS, MOST_SECONDS
from eectl.recipe.choices import (
    COST_CHOICES,
    LOOKUP_CHOICES,
    MEASURE_CHOICES,
    PROTOCOL_CHOICES,
    SEARCH_CHOICES,
    described,
    listed,
)


def calibrate_thresholds(
    checkpoint: Checkpoint,
    budgets: Budgets = DEFAULT_BUDGETS,
    criterion: Criterion = None,
    thresholds: Annotated[str, typer.Option(help=described(SEARCH_CHOICES),
                                            autocompletion=among(*SEARCH_CHOICES))] = "shared",
    metric: Annotated[str | None, typer.Option(help="what thresholds are chosen by: score, or balanced accuracy; default: what "
                                               "the recipe says", autocompletion=among("score", "balanced"),
                                               show_default=False)] = None,
    cost: Annotated[str, typer.Option(help=described(COST_CHOICES),
                                      autocompletion=among(*COST_CHOICES))] = "macs",
    bench: Annotated[Path | None, typer.Option(help="the times for --cost latency; default: bench.json beside the checkpoint",
                                               show_default=False)] = None,
    out: Out = None,
    predictions: Annotated[Path | None, typer.Option(help="predictions of the calibration split, instead of a pass over it",
                                                     show_default=False)] = None,
    save_predictions: Annotated[Path | None, typer.Option(help="keep the predictions of the calibration split",
                                                          show_default=False)] = None,
    device: Device = "auto",
    precision: Precision = None,
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
    from eectl.evaluation.calibrate import calibrate
    from eectl.evaluation.tables import show_calibration

    path = out or checkpoint.with_name("policy.json")
    policies = calibrate(
        checkpoint, budgets=budgets, criterion=criterion, thresholds=thresholds, metric=metric, cost=cost, bench=bench, out=path,
        predictions=predictions, save_predictions=save_predictions, device=device, precision=precision, data_root=data_root,
        batch_size=batch_size, overwrite=overwrite, say=say,
    )  # fmt: skip
    if policies is None:
        return
    if json:
        show_json(policies.to_json())
    else:
        show_calibration(policies)
    say(f"next: eectl evaluate {checkpoint} --policy {path}")


def evaluate(
    checkpoint: Checkpoint,
    budgets: Annotated[str | None, typer.Option(help=f"% of the plain backbone's cost; default: the policy's, "
                                                f"or {DEFAULT_BUDGETS}",
                                                show_default=False)] = None,
    policy: Annotated[Path | None, typer.Option(help="thresholds from calibrate-thresholds; default: calibrate first",
                                                show_default=False)] = None,
    criterion: Criterion = None,
    protocol: Annotated[str, typer.Option(help=described(PROTOCOL_CHOICES),
                                          autocompletion=among(*PROTOCOL_CHOICES))] = "calibrated",
    out: Annotated[Path | None, typer.Option("--out", "-o", help="write the evaluation, for eectl report", metavar="FILE.json",
                                             show_default=False)] = None,
    plot: Annotated[Path | None, typer.Option(help="draw accuracy (or MSE) against cost into this .png, .pdf or .svg",
                                              show_default=False)] = None,
    paper: Paper = False,
    predictions: Annotated[Path | None, typer.Option(help="predictions of the test split, instead of a pass over it",
                                                     show_default=False)] = None,
    save_predictions: Annotated[Path | None, typer.Option(help="keep the predictions of the test split",
                                                          show_default=False)] = None,
    device: Device = "auto",
    precision: Precision = None,
    data_root: DataRoot = None,
    batch_size: BatchSize = None,
    overwrite: Overwrite = False,
    json: Json = False,
) -> None:  # fmt: skip
    """Report accuracy (or MSE) at cost budgets on the test split.

    Example: eectl evaluate model.safetensors --budgets 25,50,75,100 --plot curve.png
    """
    from eectl.core.console import show_json
    from eectl.evaluation.evaluate import evaluate as evaluate_checkpoint
    from eectl.evaluation.tables import show_evaluation

    result = evaluate_checkpoint(
        checkpoint, budgets=budgets, policy=policy, criterion=criterion, protocol=protocol, out=out, plot=plot, paper=paper,
        predictions=predictions, save_predictions=save_predictions, device=device, precision=precision, data_root=data_root,
        batch_size=batch_size, overwrite=overwrite, say=say,
    )  # fmt: skip
    if result is None:
        return
    if json:
        show_json(result.to_json())
    else:
        show_evaluation(result)
    if out is not None:
        say(f"next: eectl report {out}, with the evaluations of other seeds and regimes")


def report(
    runs: Annotated[list[Path] | None, typer.Argument(metavar="RUN…", help="run folders with an evaluation.json, folders of runs "
                                                      "at any depth, checkpoints beside an evaluation, or evaluation files",
                                                      autocompletion=complete_runs, show_default=False)] = None,
    lookup: Annotated[str, typer.Option(help=described(LOOKUP_CHOICES),
                                        autocompletion=among(*LOOKUP_CHOICES))] = "per-seed",
    published: Annotated[str | None, typer.Option(metavar="TABLE[:VARIANT]", help="the paper's numbers to stand below ours",
                                                  autocompletion=complete_published, show_default=False)] = None,
    measure: Annotated[str | None, typer.Option(help=f"show this in place of the score: {listed(MEASURE_CHOICES)}",
                                                autocompletion=among(*MEASURE_CHOICES), show_default=False)] = None,
    list_published: Annotated[bool, typer.Option("--list-published", help="show the paper's tables and stop")] = False,
    label: Annotated[list[str] | None, typer.Option(metavar="PATTERN=TEXT", help="call the runs whose names fit so; may be "
                                                    "repeated", show_default=False)] = None,
    form: Annotated[str, typer.Option("--format", help="table, markdown, latex, csv or json, on stdout",
                                      autocompletion=among("table", "markdown", "latex", "csv", "json"))] = "table",
    out: Annotated[list[Path] | None, typer.Option("--out", "-o", help="write a .md, .tex, .csv or .json table, or a .png, "
                                                   ".pdf or .svg plot; may be repeated", show_default=False)] = None,
    paper: Paper = False,
    overwrite: Overwrite = False,
    json: Json = False,
) -> None:  # fmt: skip
    """Gather runs into one table: mean ± std over seeds at each budget, a row per setting and regime.

    A folder without an evaluation.json is searched for runs.
    Example: eectl report runs/* --published 10 -o table.tex -o curves.pdf
    """
    from eectl.reports.tables import check_form, show_comparison, show_published

    if list_published:
        from eectl.reports.published import published_tables

        show_published(list(published_tables().values()))
        return
    if not runs:
        raise EectlError("report: name the runs, such as runs/* or their folder; or --list-published for the paper's tables")
    check_form(form)
    from eectl.reports.report import report as report_runs

    comparison = report_runs(
        runs, lookup=lookup, published=published, measure=measure, label=label or (), out=out or (), paper=paper,
        overwrite=overwrite, say=say,
    )  # fmt: skip
    show_comparison(comparison, form="json" if json else form)


def bench(
    checkpoint: Checkpoint,
    budgets: Annotated[str | None, typer.Option(help=f"% of the plain backbone's cost; default: the policy's, "
                                                f"or {DEFAULT_BUDGETS}",
                                                show_default=False)] = None,
    batch_size: Annotated[str, typer.Option(help="rows at once, one size or several")] = DEFAULT_BATCH_SIZES,
    policy: Annotated[Path | None, typer.Option(help="thresholds from calibrate-thresholds; default: calibrate first",
                                                show_default=False)] = None,
    criterion: Criterion = None,
    rows: Annotated[int | None, typer.Option(parser=whole(1, MOST_COUNT), help="test rows to time; default: twice the largest "
                                             "batch, 256 at least", show_default=False)] = None,
    seconds: Annotated[float, typer.Option(parser=decimal(0.01, MOST_SECONDS), help="about how long the plain backbone is timed "
                                           "at each batch size")] = 2.0,
    seed: Annotated[int, typer.Option(parser=whole(0, MOST_SEED), help="which rows are drawn")] = 0,
    out: Annotated[Path | None, typer.Option("--out", "-o", help="write the measurements", metavar="FILE.json",
                                             show_default=False)] = None,
    device: Device = "auto",
    precision: Precision = None,
    data_root: DataRoot = None,
    overwrite: Overwrite = False,
    json: Json = False,
) -> None:  # fmt: skip
    """Time early exit against the plain backbone on this device, on rows of the test split.

    Example: eectl bench model.safetensors --policy policy.json --batch-size 1,32,256 -o bench.json
    """
    from eectl.core.console import show_json
    from eectl.evaluation.bench import bench as bench_checkpoint
    from eectl.evaluation.bench_tables import show_bench

    result = bench_checkpoint(
        checkpoint, budgets=budgets, batch_size=batch_size, policy=policy, criterion=criterion, rows=rows, seconds=seconds,
        seed=seed, out=out, device=device, precision=precision, data_root=data_root, overwrite=overwrite, say=say,
    )  # fmt: skip
    if json:
        show_json(result.to_json())
    else:
        show_bench(result)
    if out is not None:
        cost = "latency" if len(result.measured) == 1 else f"latency:{result.measured[0].batch_size}"
        say(f"next: eectl calibrate-thresholds {checkpoint} --cost {cost} --bench {out}")


def flops(
    source: Annotated[str, typer.Argument(metavar="CKPT|RECIPE", help="a checkpoint, a YAML file or a shipped recipe's name",
                                          autocompletion=complete_recipes_and_files, show_default=False)],
    changes: Annotated[list[str] | None, typer.Option("--set", metavar="KEY=VALUE", help="change the recipe",
                                                      show_default=False)] = None,
    data_root: DataRoot = None,
    json: Json = False,
) -> None:  # fmt: skip
    """Print what each exit costs: multiply-adds (MACs) of one input, heads passed on the way included."""
    from eectl.core.console import show_json
    from eectl.evaluation.tables import show_costs
    from eectl.training.dry_run import flops as count

    measured = count(source, changes=changes or (), data_root=data_root)
    if json:
        show_json(measured.to_json())
    else:
        show_costs(measured.costs, after=measured.spec.after)
