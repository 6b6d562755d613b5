"""Logs of a run as experiment trackers keep them: one thin adapter for each, which imports its library when it is made.

Each stays on this machine unless the user's environment says otherwise by that tracker's own variables, and sends no usage or
crash reports. What is logged and when, and what becomes of faults, is `experiment_logs`'s.
"""

import os
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager, redirect_stdout
from dataclasses import dataclass
from pathlib import Path
from time import time
from typing import Any, Protocol
from uuid import uuid4

from eectl.recipe.choices import TRACKER_CHOICES, in_order
from eectl.recipe.reading import flatten

PROJECT = "eectl"  # where the environment names no other
LONGEST = 500  # characters of a hyperparameter's text; some trackers refuse more
EVENTS = ".eectl"  # the ending of our event files
MOST_PARAMS = 100  # in one message to MLflow


@dataclass(frozen=True)
class LoggedRun:
    """The run that a log is of: the run's folder, its resolved recipe as plain data, and how far it was logged before.

    `key` is what the tracker's run was called when it was logged before, empty for a new one; `step` the last that is logged.
    """

    folder: Path
    recipe: Mapping[str, Any]
    key: str = ""
    step: int = 0

    @property
    def settings(self) -> dict[str, Any]:
        """The recipe's keys with dots and their values, as numbers, truth values and texts."""
        flat = flatten(self.recipe)
        return {key: value if isinstance(value, bool | int | float) else str(value)[:LONGEST] for key, value in flat.items()}


class ExperimentLog(Protocol):
    """A tracker's log of a run that is under way."""

    key: str  # what it goes on by after a resume
    place: str  # where it is, for the user

    def log(self, step: int, values: Mapping[str, float]) -> None:
        """Add numbers by name at a step of the run, counted over all phases."""

    def close(self, *, finished: bool) -> None:
        """End the log; the run came to its end, or was stopped."""


class TensorBoardLog:
    """Event files in the run's folder; those of a run that this one replaces go.

    Events after the last step that counts are purged, as TensorBoard's readers know it.
    """

    def __init__(self, run: LoggedRun) -> None:
        from torch.utils.tensorboard import SummaryWriter
        from torch.utils.tensorboard.summary import hparams

        folder = run.folder / "tensorboard"
        self.key, self.place = "", f"{folder}; tensorboard --logdir {folder}"
        make: Any = SummaryWriter  # which is not typed
        if not run.step:
            for old in folder.glob(f"events.out.tfevents.*{EVENTS}"):
                old.unlink()
        self._writer = make(str(folder), purge_step=run.step + 1, filename_suffix=EVENTS)
        if not run.step:
            for summary in hparams(run.settings, {}):  # type: ignore[no-untyped-call]
                self._writer.file_writer.add_summary(summary, 0)
        self._writer.flush()

    def log(self, step: int, values: Mapping[str, float]) -> None:
        """Add scalars and bring them to the file."""
        for name, value in values.items():
            self._writer.add_scalar(name, value, step)
        self._writer.flush()

    def close(self, *, finished: bool) -> None:  # noqa: ARG002 (event files do not say)
        """Close the event file."""
        self._writer.close()


class WandbLog:
    """A run of Weights & Biases, offline in the run's folder unless WANDB_MODE says otherwise."""

    def __init__(self, run: LoggedRun) -> None:
        os.environ.setdefault("WANDB_ERROR_REPORTING", "false")
        import wandb

        self.key = run.key or uuid4().hex[:8]
        mode = os.environ.get("WANDB_MODE", "offline")
        quiet = {"console": "off", "silent": True, "disable_git": True, "disable_code": True, "x_disable_stats": True}
        with _without_stdout():
            self._run: Any = wandb.init(
                project=os.environ.get("WANDB_PROJECT", PROJECT),
                dir=str(run.folder),
                mode=mode,
                id=self.key,
                name=run.folder.name,
                resume="allow",
                config=dict(run.recipe),
                settings=wandb.Settings(**quiet, x_disable_meta=True),
            )
        sync = f"; wandb sync {run.folder / 'wandb'}/*-{self.key} sends it" if mode == "offline" else ""
        self.place = f"run {self.key}, {mode}, in {run.folder / 'wandb'}{sync}"

    def log(self, step: int, values: Mapping[str, float]) -> None:
        """Hand the numbers to wandb's own process, which writes them when this one is killed too."""
        self._run.log(dict(values), step=step)

    def close(self, *, finished: bool) -> None:
        """Wait until all is written."""
        with _without_stdout():
            self._run.finish(exit_code=0 if finished else 1)


class MlflowLog:
    """A run of MLflow, as files in the run's folder unless MLFLOW_TRACKING_URI names another store."""

    def __init__(self, run: LoggedRun) -> None:
        for name in ("MLFLOW_DISABLE_TELEMETRY", "MLFLOW_ALLOW_FILE_STORE"):
            os.environ.setdefault(name, "true")
        from mlflow import MlflowClient
        from mlflow.entities import Param

        uri = os.environ.get("MLFLOW_TRACKING_URI") or (run.folder.absolute() / "mlflow").as_uri()
        self._client: Any = MlflowClient(tracking_uri=uri)
        if run.key:
            self.key = str(self._client.get_run(run.key).info.run_id)
            self._client.update_run(self.key, status="RUNNING")
        else:
            name = os.environ.get("MLFLOW_EXPERIMENT_NAME", PROJECT)
            experiment = self._client.get_experiment_by_name(name)
            number = experiment.experiment_id if experiment else self._client.create_experiment(name)
            self.key = str(self._client.create_run(number, run_name=run.folder.name).info.run_id)
            params = [Param(key, str(value)) for key, value in run.settings.items()]
            for first in range(0, len(params), MOST_PARAMS):
                self._client.log_batch(self.key, params=params[first : first + MOST_PARAMS])
        self.place = f"run {self.key} in {uri}"

    def log(self, step: int, values: Mapping[str, float]) -> None:
        """Store the numbers at once."""
        from mlflow.entities import Metric

        now = int(time() * 1000)
        self._client.log_batch(self.key, metrics=[Metric(name, value, now, step) for name, value in values.items()])

    def close(self, *, finished: bool) -> None:
        """Say how the run ended."""
        self._client.set_terminated(self.key, status="FINISHED" if finished else "KILLED")


class TrackioLog:
    """A run of trackio, in its local store; TRACKIO_SPACE_ID or TRACKIO_SERVER_URL name another."""

    def __init__(self, run: LoggedRun) -> None:
        os.environ.setdefault("HF_HUB_DISABLE_TELEMETRY", "1")
        import trackio

        self.key = run.key or uuid4().hex[:8]
        project, name = os.environ.get("TRACKIO_PROJECT", PROJECT), f"{run.folder.name}-{self.key}"
        with _without_stdout():
            self._run: Any = trackio.init(
                project=project,
                name=name,
                config=run.settings,
                resume="allow",
                embed=False,
                auto_log_gpu=False,
                auto_log_cpu=False,
            )
        self.place = f"run {name}; trackio show --project {project}"

    def log(self, step: int, values: Mapping[str, float]) -> None:
        """Hand the numbers to trackio's thread, which stores them within a second."""
        self._run.log(dict(values), step=step)

    def close(self, *, finished: bool) -> None:  # noqa: ARG002 (trackio does not say)
        """Wait until all is stored."""
        import trackio

        with _without_stdout():
            trackio.finish()


@contextmanager
def _without_stdout() -> Iterator[None]:
    """Keep what a library prints off stdout, which is for results."""
    with open(os.devnull, "w", encoding="utf-8") as nothing, redirect_stdout(nothing):
        yield


LOG_ADAPTERS: dict[str, Callable[[LoggedRun], ExperimentLog] | None] = in_order(
    TRACKER_CHOICES,
    {"tensorboard": TensorBoardLog, "wandb": WandbLog, "mlflow": MlflowLog, "trackio": TrackioLog, "none": None},
)
