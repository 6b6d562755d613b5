"""The five questions and what the user can set of each: names, defaults, help texts and limits. No torch.

`eectl analyze` makes its commands from this, and `analyses.analyze` checks what it is given against it.
"""

import math
from collections.abc import Mapping
from dataclasses import dataclass, field, fields
from typing import Any

from eectl.core.errors import EectlError, closest, lookup
from eectl.recipe.choices import MOVED_CHOICES, SPLIT_CHOICES, VIEW_CHOICES, described, listed

MOST_NUMBER = 10**8  # of what an option counts or measures, unless the option says less


def _option(default: Any, text: str, *, choices: tuple[str, ...] = (), what: str = "", most: int = MOST_NUMBER) -> Any:
    """Make a field with a help text; `choices` are the values it may have, up to `most`, `what` is how a message calls it."""
    return field(default=default, metadata={"help": text, "choices": choices, "what": what, "most": most})


def _split(default: str) -> Any:
    return _option(default, listed(SPLIT_CHOICES), choices=tuple(SPLIT_CHOICES), what="split")


def _view() -> Any:
    return _option("auto", f"{listed(VIEW_CHOICES)} or auto", choices=("auto", *VIEW_CHOICES), what="--view")


@dataclass(frozen=True)
class Settings:
    """Options of a question; each question adds fields. Raises EectlError for values that it does not take."""

    def __post_init__(self) -> None:
        for each in fields(self):
            value = getattr(self, each.name)
            if each.metadata["choices"]:
                lookup(dict.fromkeys(each.metadata["choices"]), value, what=each.metadata["what"])
            elif not _fits(value, each.default):
                known = {bool: "True or False", int: "a whole number", float: "a number"}[type(each.default)]
                raise EectlError(f"{each.name} is {value!r}; it takes {known}")
            elif isinstance(value, (int, float)) and not -MOST_NUMBER <= value <= each.metadata["most"]:
                raise EectlError(f"{each.name} is {value!r:.60}; at most {each.metadata['most']:,}")
        self.check()

    def check(self) -> None:
        """Raise EectlError for values that give no answer."""

    @property
    def splits(self) -> tuple[str, ...]:
        """The splits that the question reads."""
        raise NotImplementedError


def _fits(value: Any, default: Any) -> bool:
    """Say whether a value is of its default's kind; a whole number is a number, True is not."""
    kinds = (int, float) if isinstance(default, float) else (type(default),)
    return isinstance(value, kinds) and isinstance(value, bool) == isinstance(default, bool)


def check_count(count: int, least: int, *, option: str, why: str) -> None:
    """Raise EectlError where a setting is below what the question needs."""
    if count < least:
        raise EectlError(f"{option} {count}: at least {least}; {why}")


@dataclass(frozen=True)
class SplitSettings(Settings):
    """Settings of a question about the rows of one `split`."""

    split: str = _split("test")

    @property
    def splits(self) -> tuple[str, ...]:
        """The splits that the question reads."""
        return (self.split,)


@dataclass(frozen=True)
class DominanceSettings(SplitSettings):
    """Settings of gradient dominance; with `tracked` nothing is measured and only the runs' metrics are read."""

    split: str = _split("train")
    samples: int = _option(2000, "how many rows are looked at, in whole batches")
    train_mode: bool = _option(False, "BatchNorm on the batch's statistics and dropout on, as in training")
    tracked: bool = _option(False, "draw what train --track gradient-dominance left beside the checkpoints")

    def check(self) -> None:
        """Raise EectlError for values that give no answer."""
        if not self.tracked:
            check_count(self.samples, 2, option="--samples", why="a gradient is taken over a batch")

    @property
    def splits(self) -> tuple[str, ...]:
        """The splits that the question reads."""
        return () if self.tracked else (self.split,)


@dataclass(frozen=True)
class ConnectivitySettings(Settings):
    """Settings of mode connectivity."""

    points: int = _option(11, "networks on each line, both ends included", most=1001)
    samples: int = _option(1000, "how many rows of train, and of test, each of them sees")
    bn_samples: int = _option(1000, "train rows for BatchNorm's statistics at each point")
    reestimate: bool = _option(True, "take BatchNorm's statistics anew at each point, ends included")
    orders: int = _option(5, "random orders in which matching is tried; the best is kept")

    def check(self) -> None:
        """Raise EectlError for values that give no answer."""
        check_count(self.points, 3, option="--points", why="the two ends and what lies between")
        check_count(self.samples, 1, option="--samples", why="a loss is a mean over rows")
        check_count(self.orders, 1, option="--orders", why="matching runs at least once")

    @property
    def splits(self) -> tuple[str, ...]:
        """The splits that the question reads."""
        return ("train", "test")


@dataclass(frozen=True)
class RankSettings(SplitSettings):
    """Settings of the numerical rank."""

    samples: int = _option(10_000, "how many rows are looked at")
    features: int = _option(2_000, "at most this many of a block's numbers, the same for every network")
    view: str = _view()
    tolerance: float = _option(1e-3, "count eigenvalues of the covariance above this share of the largest")

    def check(self) -> None:
        """Raise EectlError for values that give no answer."""
        check_count(self.samples, 2, option="--samples", why="a covariance needs two rows")
        check_count(self.features, 2, option="--features", why="a rank needs two features")
        if not 0 < self.tolerance < 1:
            raise EectlError(f"--tolerance {self.tolerance:g}: a share of the largest eigenvalue, between 0 and 1, such as 1e-3")


@dataclass(frozen=True)
class InformationSettings(SplitSettings):
    """Settings of mutual information."""

    samples: int = _option(5_000, "how many rows are looked at; time grows with their square")
    dimensions: int = _option(8, "random directions that activations are projected to", most=4096)
    noise: float = _option(0.3, "variance of the noise, as a share of the activations' mean variance")
    view: str = _view()

    def check(self) -> None:
        """Raise EectlError for values that give no answer."""
        check_count(self.samples, 3, option="--samples", why="information is about which of the rows it was")
        check_count(self.dimensions, 1, option="--dimensions", why="activations are projected to that many")
        if not (0 < self.noise < math.inf):
            raise EectlError(f"--noise {self.noise:g}: a share of the activations' variance above 0, such as 0.3")


@dataclass(frozen=True)
class LandscapeSettings(SplitSettings):
    """Settings of the loss landscape."""

    split: str = _split("train")
    points: int = _option(21, "points a side, an odd number: the weights lie in the middle", most=1001)
    span: float = _option(1.0, "how far to go to each side; 1: as far as each filter's own norm")
    dimensions: int = _option(2, "1 for a line, 2 for a plane")
    only: str = _option(
        "all",
        f"which weights move: {described(MOVED_CHOICES)}",
        choices=tuple(MOVED_CHOICES),
        what="--only",
    )
    reestimate: bool = _option(False, "BatchNorm statistics anew at every point, from as many training rows")
    samples: int = _option(500, "how many rows each loss is the mean of")

    def check(self) -> None:
        """Raise EectlError for values that give no answer."""
        check_count(self.samples, 1, option="--samples", why="a loss is the mean over them")
        check_count(self.points, 3, option="--points", why="the weights lie in the middle")
        if self.points % 2 == 0:
            raise EectlError(
                f"--points {self.points}: an odd number, so that one is the weights themselves; try {self.points + 1}"
            )
        if not 0 < self.span < math.inf:
            raise EectlError(f"--span {self.span:g}: above 0; 1 goes as far as the filters' own norms")
        if self.dimensions not in (1, 2):
            raise EectlError(f"--dimensions {self.dimensions}: 1 (lines) or 2 (a plane)")

    @property
    def splits(self) -> tuple[str, ...]:
        """The splits that the question reads; BatchNorm's statistics come from train."""
        return tuple(dict.fromkeys((self.split, "train"))) if self.reestimate else (self.split,)


@dataclass(frozen=True)
class Question:
    """One of the questions: its settings, the help of its command, and which checkpoints it takes.

    `least` is the fewest checkpoints, `needs_exits` says that each must have attached exits.
    """

    settings: type[Settings]
    text: str
    least: int = 1
    needs_exits: bool = False


def make_settings(name: str, options: Mapping[str, Any]) -> Settings:
    """Make a question's settings from its options by name; raises EectlError for options that it does not have."""
    form = lookup(QUESTIONS, name, what="question").settings
    known = [each.name for each in fields(form)]
    for option in options:
        if option not in known:
            raise EectlError(f"{name} has no option '{option}'{closest(option, known)}; it has {', '.join(known)}")
    return form(**options)


QUESTIONS: dict[str, Question] = {
    "gradient-dominance": Question(
        DominanceSettings,
        """Compare each exit's gradient with the sum that moves the shared weights (paper's Figure 2).

        Example: eectl analyze gradient-dominance joint/model.safetensors mixed/model.safetensors -o dominance
        """,
        needs_exits=True,
    ),
    "mode-connectivity": Question(
        ConnectivitySettings,
        """Measure losses on the line between each two networks, as they are and with their units matched (paper's Figure 3).

        Example: eectl analyze mode-connectivity joint-0/model.safetensors joint-1/model.safetensors -o connectivity
        """,
        least=2,
    ),
    "numerical-rank": Question(
        RankSettings,
        """Count the dimensions that each block's activations fill (paper's Figure 4).

        Views: flattened (auto, of images), pooled over space or tokens, class-token (auto, of texts).
        Example: eectl analyze numerical-rank disjoint/model.safetensors mixed/model.safetensors -o rank
        """,
    ),
    "mutual-information": Question(
        InformationSettings,
        """Estimate what each block's activations say about the input and the label (paper's Figure 5), in nats.

        Views: pooled over space or tokens (auto, of images), class-token (auto, of texts), flattened.
        Example: eectl analyze mutual-information joint/model.safetensors mixed/model.safetensors -o information
        """,
    ),
    "loss-landscape": Question(
        LandscapeSettings,
        """Show how the exits' losses rise along random filter-normalised directions, the same for all exits (paper's Figure 6).

        Example: eectl analyze loss-landscape joint/model.safetensors disjoint/model.safetensors -o landscape
        """,
    ),
}
