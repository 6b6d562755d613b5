"""Toys for exits: a three-block backbone that counts the rows of every block, plain and cascading heads, made-up outputs."""

import torch
from torch import nn

from eectl.exits.criteria import find_criterion
from eectl.exits.policy import CostTable
from eectl.exits.scores import Provenance, keeps_outputs, reduce_rows, scored_from
from eectl.models.backbone import Backbone, Feature, Hidden
from eectl.models.checkpoint import Origin
from eectl.models.heads import ExitHead, ExitOutput
from eectl.models.losses import TASKS
from eectl.models.multi_exit import MultiExitModel

WIDTH = 6
TOY_COSTS = CostTable((20, 45, 110), 100)
TOY_ORIGIN = Origin(
    {"regime": "joint", "seed": 0, "data": {"name": "toy"}, "backbone": {"name": "toy"}}, (0, 1), ("linear", "linear")
)


class Rows(Feature):
    def __init__(self, x):
        self.x = x

    def pooled(self):
        return self.x

    def map(self):
        return self.x[:, :, None, None]


class CountingBackbone(Backbone):
    def __init__(self, num_outputs):
        net = nn.ModuleDict({f"b{i}": nn.Linear(WIDTH, WIDTH) for i in range(3)} | {"fc": nn.Linear(WIDTH, num_outputs)})
        super().__init__(net, block_names=[[f"b{i}"] for i in range(3)], head_names=["fc"], classifiers=["fc"])
        self.runs = []  # (block, rows) of every call

    def stem(self, inputs):
        return Hidden(inputs)

    def block(self, index, hidden):
        self.runs.append((index, len(hidden.x)))
        return Hidden(self.net[f"b{index}"](hidden.x).tanh() + hidden.x)

    def head(self, hidden):
        return self.net["fc"](hidden.x)

    def feature(self, hidden):
        return Rows(hidden.x)


class PlainHead(ExitHead):
    def __init__(self, num_outputs):
        super().__init__()
        self.fc = nn.Linear(WIDTH, num_outputs)

    def reads(self, feature):
        return feature.cls()

    def says(self, read, earlier):  # noqa: ARG002
        return ExitOutput(self.fc(read))


class CascadeHead(PlainHead):
    """Adds half of the previous exit's logits and its state."""

    uses_earlier = True

    def says(self, read, earlier):
        logits = self.fc(read)
        if earlier:
            assert len(earlier[-1].logits) == len(logits), "the earlier outputs must be those of the rows that are left"
            logits = logits + 0.5 * earlier[-1].logits + earlier[-1].state
        return ExitOutput(logits, state=logits.mean(dim=1, keepdim=True))


def toy_model(head=PlainHead, *, num_outputs=4, after=(0, 1), seed=0):
    torch.manual_seed(seed)
    model = MultiExitModel(CountingBackbone(num_outputs), [head(num_outputs) for _ in after], after=after)
    for parameter in model.parameters():
        parameter.data.mul_(2.5)
    return model.eval()


def toy_outputs(*, num_exits=3, num_rows=200, num_classes=4, seed=0, task="classification"):
    """Logits and labels whose exits get better with depth, coarse enough to have ties."""
    generator = torch.Generator().manual_seed(seed)
    if task == "regression":
        labels = torch.rand(num_rows, generator=generator) * 5
        noise = torch.randn(num_exits, num_rows, 1, generator=generator)
        return labels[:, None] + noise / torch.arange(1, num_exits + 1)[:, None, None], labels
    if task == "multilabel":  # of a label for every class, each in about a third of the rows
        several = (torch.rand(num_rows, num_classes, generator=generator) < 0.35).float()
        noise = torch.randint(-8, 9, (num_exits, num_rows, num_classes), generator=generator)
        return 2 * several - 1 + noise / torch.arange(2, num_exits + 2)[:, None, None], several
    if task == "ordinal":  # the logits of an attempt at each level but the first
        labels = torch.randint(num_classes, (num_rows,), generator=generator)
        noise = torch.randint(-4, 5, (num_exits, num_rows, num_classes - 1), generator=generator)
        passes = torch.arange(num_classes - 1) < labels[:, None]
        return 2.0 * passes - 1 + noise / torch.arange(2, num_exits + 2)[:, None, None], labels
    labels = torch.randint(num_classes, (num_rows,), generator=generator)
    logits = torch.randint(4, (num_exits, num_rows, num_classes), generator=generator).float()
    logits[:, torch.arange(num_rows), labels] += torch.arange(num_exits)[:, None]
    return logits, labels


def score(logits, labels, *, criterion=None, split="test", fingerprint="f", task="classification"):
    """What a criterion sees in outputs [exit, row, class]."""
    rule = find_criterion(criterion, task=TASKS[task], num_exits=len(logits))
    sizes = dict(zip(("num_exits", "num_rows", "num_outputs"), logits.shape, strict=True))
    table = reduce_rows(logits, labels, criterion=rule, keep=keeps_outputs(TASKS[task], **sizes))
    return scored_from(table, labels, Provenance(split, fingerprint, "digest", TASKS[task]), criterion=rule)


def toy_scored(*, criterion=None, seed=0, split="test", task="classification", **sizes):
    """The same of toy outputs."""
    fingerprint = f"fingerprint of {split} {seed}"
    outputs = toy_outputs(seed=seed, task=task, **sizes)
    return score(*outputs, criterion=criterion, split=split, fingerprint=fingerprint, task=task)
