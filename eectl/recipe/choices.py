"""Every name that a user can choose, with one line on each: the table that the command line and the code behind it both read.

Help texts, completions, the recipe's schema and the error messages are made from it, so it imports nothing that is heavy. The
functions and classes behind the names lie in tables of their own, which `in_order` checks against this one. In a name, `N` and
`WIDTH` stand for a whole number that the user fills in.
"""

import re
from collections.abc import Iterable, Mapping
from typing import Literal, TypeVar

T = TypeVar("T")
TaskName = Literal["classification", "regression", "multilabel", "ordinal"]  # the names of TASK_CHOICES

REGIME_CHOICES = {
    "disjoint": "the backbone first, then the exits on the frozen backbone",
    "joint": "backbone and exits together from the start",
    "mixed": "the backbone first, then backbone and exits together",
    "branch-wise": "one segment and its exit after the other, what lies before them frozen",
    "separate": "up to exit 1, then up to exit 2, and so on, all that lies before it included",
    "alternating": "everything, with the loss of the last exit and of all exits in turn",
    "mixed-gradual": "the last exit first, then one exit more in each stage, from the back",
}
PHASE_CHOICES = {
    "1": "backbone",
    "2": "everything",
    "3": "heads on the frozen backbone",
}
HEAD_CHOICES = {
    "linear": "one linear layer on pooled features",
    "mlp-WIDTH": "two linear layers with WIDTH units between them",
    "sdn": "Shallow-Deep Networks: max and average pooling, mixed, and a linear layer",
    "ztw": "Zero Time Waste: each exit reads the one before it; geometric ensembles",
    "ztw-arithmetic": "the same with arithmetic ensembles",
    "gpf": "Global Past-Future: reads earlier exits and imitates later ones",
    "gpf-WIDTH": "the same with states of WIDTH numbers",
    "gpf-lancopku": "Global Past-Future as its authors' code has it",
    "gpf-lancopku-WIDTH": "the same with states of WIDTH numbers",
}
AUTO_HEAD = "auto: sdn on CNNs, linear on transformers"
PLACEMENT_CHOICES = {
    "every-N": "after every N-th block",
    "dense-sparse": "close together at first, then far apart (paper, section 4.6)",
    "sparse-dense": "far apart at first, then close together (paper, section 4.6)",
}
CRITERION_CHOICES = {
    "max-softmax": "the largest class probability",
    "entropy": "1 − entropy / log(classes)",
    "margin": "the largest class probability minus the second",
    "patience": "how many exits in a row predict the same class",
    "difference": "minus the change since the exit before, of several targets the largest; never at the first",
    "mean-confidence": "how sure the labels are on average: the mean of max(p, 1 − p); for multilabel",
    "level-confidence": "the probability of the level that is predicted; for ordinal",
}
CRITERION_FAMILIES = {"difference-N": "minus the largest of the last N changes between exits; never before there are so many"}
TASK_CHOICES = {
    "classification": "the target is one of some classes; scored by accuracy",
    "regression": "the target is a number, or several; scored by mean squared error",
    "multilabel": "any number of labels may apply; scored by the F1 of each row's labels",
    "ordinal": "the target is one of some classes that have an order; scored by accuracy",
}
DEFAULT_CRITERION = {
    "classification": "max-softmax",
    "regression": "difference",
    "multilabel": "mean-confidence",
    "ordinal": "level-confidence",
}  # by task
LOSS_CHOICES = {
    "cross-entropy": "softmax over the classes",
    "bce": "each class against all others, binary cross-entropy with targets 0 and 1, as timm's --bce-loss",
}
WEIGHTING_CHOICES = {
    "auto": "what the heads' authors use: linear for gpf, else uniform",
    "uniform": "all exits alike",
    "linear": "exit k weighs k",
    "increasing": "from 1 − slope at the first exit to 1 + slope at the last",
    "decreasing": "from 1 + slope at the first exit to 1 − slope at the last",
    "sdn-ramp": "Shallow-Deep Networks: attached exits grow from 0.01 to their share of the cost",
    "equilibrium": "a plain sum, with gradients rescaled so that each exit moves a shared block equally",
    "l2w": "a small network learns a weight for each row and exit",
}
IMAGE_CHOICES = {
    "digits": "scikit-learn's 1,797 handwritten digits, 8×8 grey; part of that library, so nothing is downloaded",
    "mnist": "MNIST, 28×28 grey",
    "fashion-mnist": "Fashion-MNIST, 28×28 grey",
    "cifar10": "CIFAR-10, 32×32 colour",
    "cifar100": "CIFAR-100, 32×32 colour",
    "tinyimagenet": "TinyImageNet, 200 classes, 64×64 colour",
    "imagenette": "Imagenette, 10 classes of ImageNet, colour",
    "imagenet": "ImageNet-1k, colour",
    "folder": "images of your own, one folder a class, or in a column of Parquet",
    "wds": "images of your own in shards, the tar archives of WebDataset",
}
TEXT_CHOICES = {
    "text": "texts of your own: CSV, TSV, JSONL or Parquet",
    "20newsgroups": "20 Newsgroups, split by date",
    "glue/cola": "GLUE: is a sentence acceptable English",
    "glue/sst2": "GLUE: is a sentence of a film review positive",
    "glue/mrpc": "GLUE: do two sentences mean the same",
    "glue/qqp": "GLUE: do two questions ask the same",
    "glue/stsb": "GLUE: how similar are two sentences, from 0 to 5 (regression)",
    "glue/mnli": "GLUE: does a premise entail a hypothesis, three classes",
    "glue/qnli": "GLUE: does a sentence answer a question",
    "glue/rte": "GLUE: does a premise entail a hypothesis, two classes",
    "glue/wnli": "GLUE: does a sentence follow with its pronoun replaced",
}
HUB_PREFIX = "hfds/"
HUB_CHOICES = {
    "hfds/NAME": "images or texts of the datasets library: OWNER/NAME on the Hugging Face hub, or ./FOLDER; needs the extra "
    "eectl[text]",
}
KIND_CHOICES = {
    "images": "a column of images",
    "texts": "a column of texts, or two of pairs",
}
DAMAGE_CHOICES = {
    "error": "nothing is trained, and the message names the shard and the member",
    "skip": "what is whole in it is used, and a note names it",
}
FILE_CHOICES = {
    ".csv": "comma-separated, with a header",
    ".tsv": "tab-separated, with a header and without quotes",
    ".jsonl": "one JSON object a line",
    ".parquet": "Apache Parquet; needs the extra eectl[text]",
}
SPLIT_CHOICES = {
    "train": "the rows that weights are learned from",
    "validation": "the rows that early stopping watches",
    "calibration": "the rows that thresholds are chosen on",
    "test": "the rows that results are reported on",
}
COPY_CHOICES = {
    "error": "nothing is trained where the test split shares over 1 % of its rows, or of the other split's if that is smaller",
    "drop": "they are left out everywhere but in test, and else stay in calibration, then validation",
    "keep": "they are used as they are, and a note counts them",
}
METRIC_CHOICES = {
    "score": "accuracy, or mean squared error",
    "balanced": "accuracy with all classes counted alike: the mean of each class's accuracy",
    "loss": "the loss; thresholds are then chosen by the score",
}
MEASURE_CHOICES = {
    "balanced": "the mean of the classes' accuracies",
    "macro_f1": "the mean of the classes' F1 scores",
    "micro_f1": "the F1 of all labels of all rows together",
    "f1": "of two classes the F1 of the second, the positive one",
    "auroc": "the area under the ROC curve; of over two classes the mean of each against all others",
    "mcc": "the Matthews correlation of classes, as GLUE scores CoLA",
    "map": "the mean over labels of their average precision",
    "pearson": "Pearson's correlation of numbers; of several targets the mean",
    "spearman": "Spearman's correlation of numbers; of several targets the mean",
    "mae": "the mean absolute error, of levels in levels; of several targets the mean",
    "r2": "the share of the variance that is explained; of several targets the mean",
    "kappa": "Cohen's kappa of levels with quadratic weights",
}
SEARCH_CHOICES = {
    "shared": "one threshold for all exits",
    "per-exit": "one threshold for each exit; better on the calibration split, and more likely to overfit a small one",
}
COST_CHOICES = {
    "macs": "budgets are percentages of the plain backbone's multiply-adds",
    "latency": "budgets are percentages of its time, as eectl bench measured it; latency:BATCH picks one of several batch sizes",
}
PROTOCOL_CHOICES = {
    "calibrated": "thresholds from the calibration split",
    "paper": "the authors' rule: thresholds chosen on the test split itself",
}
LOOKUP_CHOICES = {
    "per-seed": "each seed with its own thresholds",
    "average-first": "the authors' rule: one threshold of their grid for the mean over seeds, chosen on the test split",
}
QUESTION_CHOICES = {
    "gradient-dominance": "which exit's gradient moves the shared weights (Figure 2)",
    "mode-connectivity": "the losses on the line between two networks (Figure 3)",
    "numerical-rank": "how many dimensions each block's activations fill (Figure 4)",
    "mutual-information": "what each block's activations tell of the input and the label (Figure 5)",
    "loss-landscape": "how the losses rise around the weights (Figure 6)",
}
TRACK_CHOICES = {"gradient-dominance": QUESTION_CHOICES["gradient-dominance"]}
TRACKER_CHOICES = {
    "tensorboard": "event files in the run's folder",
    "wandb": "Weights & Biases, offline in the run's folder unless WANDB_MODE says otherwise",
    "mlflow": "files in the run's folder unless MLFLOW_TRACKING_URI names another store",
    "trackio": "trackio's local store",
    "none": "nothing",
}
VIEW_CHOICES = {
    "flattened": "all numbers of a block's output; for images",
    "pooled": "the mean over space or tokens",
    "class-token": "the first token; for transformers",
}
MOVED_CHOICES = {
    "all": "every weight",
    "backbone": "the backbone's weights",
    "heads": "the weights of the attached exits and of the network's own head",
}
DECAY_CHOICES = {
    "norms": "the numbers of normalisation layers, and all other vectors that are no biases",
    "biases": "all biases",
    "positions": "position embeddings, class and other special tokens, tables of relative positions, and what a network of timm "
    "says itself",
}
PRECISION_CHOICES = {
    "auto": "bf16 on a GPU that has it, else float32",
    "float32": "32 bits everywhere",
    "tf32": "float32, multiplied in TF32 by a GPU that has it",
    "bf16": "bfloat16 where that is safe (autocast), losses in float32",
}
DEVICE_CHOICES = {
    "auto": "a GPU where there is one, else the CPU",
    "cpu": "the CPU",
    "cuda": "the GPU; cuda:N picks one",
    "mps": "an Apple GPU",
}
MOST_IN_A_NAME = 65_536  # the largest N or WIDTH
_EXAMPLES = {"WIDTH": ("1024", "2048"), "N": ("1", "2", "3")}


def listed(names: Iterable[str]) -> str:
    """Return the names in a row, such as `disjoint, joint, mixed`."""
    return ", ".join(names)


def described(choices: Mapping[str, str]) -> str:
    """Return the names with their lines in a row, such as `shared: one for all exits; per-exit: one each`."""
    return "; ".join(f"{name}: {line}" for name, line in choices.items())


def completions(names: Iterable[str]) -> tuple[str, ...]:
    """Return the names that a shell offers: those with `N` or `WIDTH` in them become a few examples."""
    found: dict[str, None] = {}
    for name in names:
        stem, _, variable = name.rpartition("-")
        found |= dict.fromkeys(f"{stem}-{value}" for value in _EXAMPLES[variable]) if variable in _EXAMPLES else {name: None}
    return tuple(found)


def number_in(name: str, stem: str) -> int | None:
    """Return the number that the user filled in after `stem`, as in mlp-1024; None where there is none from 1 to 65,536."""
    found = re.fullmatch(r"[1-9][0-9]{0,4}", name.removeprefix(stem)) if name.startswith(stem) else None
    number = None if found is None else int(found[0])
    return number if number is not None and number <= MOST_IN_A_NAME else None


def is_choice(name: str, choices: Iterable[str]) -> bool:
    """Return whether `name` is one of the choices, where N and WIDTH stand for a number from 1 to 65,536."""
    for choice in choices:
        stem, dash, variable = choice.rpartition("-")
        if number_in(name, stem + dash) is not None if variable in _EXAMPLES else name == choice:
            return True
    return False


def in_order(choices: Iterable[str], table: Mapping[str, T]) -> dict[str, T]:
    """Return what lies behind each of the `choices`, in their order; an assertion fails where `table` has others."""
    names = list(choices)
    assert set(names) == set(table), f"differ from eectl/recipe/choices.py: {', '.join(sorted(set(names) ^ set(table)))}"
    return {name: table[name] for name in names}
