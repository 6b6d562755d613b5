"""Policies under which toy rows leave at every exit, and small networks of all kinds with batches for them."""

import pytest
import torch
from small_networks import CASES, DROPS, NUM_OUTPUTS, Case, build_noisy, rows_for

from eectl.exits.criteria import CRITERIA
from eectl.exits.policy import NEVER, Policy, choose
from eectl.models.build import attach_ensembles, attach_exits

TRACED = {  # networks that keep what follows from their weights, fold images into rows, or are cut across two tensors
    "timm-efficientformer2": Case("timm/efficientformerv2_s0", DROPS, (3, 32, 32), 14, set(), set()),
    "timm-mobilevit": Case("timm/mobilevit_xxs", DROPS, (3, 32, 32), 10, set(), set()),
    "timm-tnt": Case(
        "timm/tnt_s_legacy_patch16_224",
        {"depth": 2, "embed_dim": 24, "num_heads_outer": 3, "inner_dim": 8, "num_heads_inner": 2},
        (3, 32, 32),
        2,
        set(),
        set(),
    ),
}


def thresholds_for(name, scores):
    """Thresholds, one per exit, at which some rows leave at each exit and some at none; not the same at all."""
    if name == "patience":
        return (NEVER, *(1.0 for _ in scores[2:]))
    finite = scores[:-1].masked_fill(scores[:-1].isinf(), -9.0)
    return tuple(float(torch.quantile(row, 0.5 + 0.1 * (index % 3))) for index, row in enumerate(finite))


def spread(scores, share):
    """Thresholds midway between two rows, at which this share of the rows that reach an exit leaves there."""
    here = torch.ones(scores.shape[1], dtype=torch.bool)
    thresholds = []
    for row in scores[:-1]:
        ranked = row[here].sort(descending=True).values
        place = int(share * len(ranked))
        thresholds.append(float(ranked[place - 1 : place + 1].mean()))
        here &= row <= thresholds[-1]
    return tuple(thresholds)


def decided(model, batches):
    """The logits [exit, row, class] of all rows, a policy that lets 0.3 of those at an exit go, and each row's exit by it."""
    parts = [[output.logits for output in model(part)] for part in batches]
    logits = torch.stack([torch.cat(each) for each in zip(*parts, strict=True)])
    scores = CRITERIA["margin"].scores(logits)
    policy = Policy(CRITERIA["margin"], spread(scores, 0.3))
    return logits, policy, choose(scores, policy.thresholds)


def real_networks():
    """By name: an entry of CASES or TRACED, the blocks that exits follow, the kind of their heads, and their ensemble."""
    return {
        "resnet": ("cifar", (1, 4, 6), "auto", None),
        "ztw": ("cifar", (1, 4, 6), "ztw", "geometric"),
        "gpf": ("vit", (0, 1), "gpf-6", None),
        "msdnet": ("msdnet", (2, 4, 6), "auto", None),
        "swin": ("timm-swin", (0, 1), "auto", None),
        "bert": ("bert", (1, 3, 4), "auto", None),
        "bert-gpf": ("bert", (1, 3), "gpf-6", None),
        "deberta": ("deberta-v3", (1, 3), "auto", None),
        "roberta": ("roberta", (1, 3), "linear", None),
        "mlp": ("timm-vit", (0, 1), "mlp-8", None),
        "ztw-arithmetic": ("vit", (0, 1), "ztw-arithmetic", "arithmetic"),
        "gpf-lancopku": ("cifar", (1, 4), "gpf-lancopku-6", None),
        "kept-biases": ("timm-efficientformer2", (8, 11), "auto", None),
        "folded-rows": ("timm-mobilevit", (5, 7), "auto", None),
        "rows-of-rows": ("timm-tnt", (0,), "auto", None),
    }


REAL_NETWORKS = [
    pytest.param(name, marks=pytest.mark.thorough if name in ("kept-biases", "folded-rows") else []) for name in real_networks()
]
"""Their names, to be a test's parameters."""


def batches_for(case):
    """Nineteen rows in batches of eight; texts of 9 tokens in the first, of 5 in the second and of 7 in the third."""
    generator = torch.Generator().manual_seed(3)
    if len(case.shape) == 3:
        return torch.randn(19, *case.shape, generator=generator).split(8)
    rows = torch.cat([rows_for(case)] * 5)[:19]
    rows[:, 0] = torch.where(rows[:, 1] == 1, torch.randint(2, 40, rows[:, 0].shape, generator=generator), rows[:, 0])
    return rows[:8], rows[8:16, :, :5].clone(), rows[16:, :, :7].clone()


def build_network(name):
    """One of them in eval mode, and its batches in the memory layout that it likes."""
    case_name, after, heads, ensemble = real_networks()[name]
    case = (CASES | TRACED)[case_name]
    backbone = build_noisy(case.name, case.args, case.shape)
    model = attach_exits(backbone, after=after, heads=heads, num_outputs=NUM_OUTPUTS, input_shape=case.shape).eval()
    model = attach_ensembles(model, ensemble, num_outputs=NUM_OUTPUTS).eval() if ensemble else model
    batches = batches_for(case)
    if backbone.prefers_channels_last:
        model.to(memory_format=torch.channels_last)
        batches = [batch.contiguous(memory_format=torch.channels_last) for batch in batches]
    return model, batches
