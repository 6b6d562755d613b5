"""Take BatchNorm's statistics anew: networks whose weights were moved or averaged compute nonsense with the stored ones."""

from collections.abc import Iterable

import torch
from torch import Tensor, nn
from torch.nn.modules.batchnorm import _BatchNorm

from eectl.analyses.question import Context, Subject, check_split, sample_batches, sample_rows
from eectl.analyses.settings import check_count
from eectl.core.seeds import derive_seed


def batch_norms(model: nn.Module) -> list[_BatchNorm]:
    """Return the layers that keep statistics of what passes them."""
    return [module for module in model.modules() if isinstance(module, _BatchNorm) and module.running_mean is not None]


@torch.no_grad()
def reestimate(model: nn.Module, batches: Iterable[Tensor]) -> None:
    """Set BatchNorm's statistics to the mean over these batches; everything else stays in eval mode, so dropout is off."""
    norms = batch_norms(model)
    momenta = [norm.momentum for norm in norms]
    for norm in norms:
        norm.reset_running_stats()
        norm.momentum = None  # PyTorch's word for the plain mean over batches
        norm.train()
    for inputs in batches:
        model(inputs)
    for norm, momentum in zip(norms, momenta, strict=True):
        norm.momentum = momentum
        norm.eval()


def norm_batches(subject: Subject, count: int, context: Context, *, option: str = "--samples") -> list[Tensor]:
    """Read the inputs, not yet prepared, of `count` training rows in whole batches; none for a network without BatchNorm.

    Raises EectlError, which names `option`, where a batch would have one row.
    """
    if not batch_norms(subject.session.checkpoint.model):
        return []
    split = check_split(subject.session, "train")
    rows = sample_rows(split, count, context.seed)
    size = min(context.rows_at_once(subject), len(rows))
    check_count(size, 2, option=option if len(rows) < 2 else "--batch-size", why="BatchNorm takes no statistics of one row")
    generator = torch.Generator().manual_seed(derive_seed(context.seed, "batch-norm"))
    shuffled = rows[torch.randperm(len(rows), generator=generator)]  # a folder's rows come by class
    return [batch.inputs for batch in sample_batches(split, shuffled[: len(rows) // size * size], size)]
