"""Set torch up as the recipe wants it for training, and say in one line the faults that a user can mend."""

from collections.abc import Iterator
from contextlib import contextmanager

import torch

from eectl.core.distributed import World
from eectl.core.errors import EectlError, out_of_memory
from eectl.core.precision import not_deterministic, resolve_precision, settings
from eectl.recipe.recipe import Recipe


@contextmanager
def set_up(recipe: Recipe, world: World) -> Iterator[None]:
    """Set torch up for the recipe's precision, and for the same bits each time where it asks for them."""
    precision = resolve_precision(recipe.precision, world.device)
    with settings(precision, world.device, deterministic=recipe.deterministic, training=True):
        yield


@contextmanager
def explained(recipe: Recipe, world: World) -> Iterator[None]:
    """Turn what a user can mend into an EectlError that says what to change.

    That is a full memory, a batch too small for BatchNorm, and an operation that has no deterministic form.
    """
    try:
        yield
    except ValueError as error:
        if "more than 1 value per channel" not in str(error):
            raise
        raise EectlError(
            f"batch_size {recipe.batch_size} and accumulate {recipe.accumulate} leave a process one image at a time, of which "
            f"BatchNorm takes no statistics; raise batch_size{' or lower accumulate' if recipe.accumulate > 1 else ''}"
        ) from error
    except torch.OutOfMemoryError as error:
        ways = f"accumulate={2 * recipe.accumulate}", f"eval_batch_size={max(recipe.eval_batch_size // 2, 1)}"
        also = "".join(f", --set {way}" for way in ways) + ", or --set precision=bf16"
        note = "; ".join(["over all processes", *getattr(error, "__notes__", ())])  # what CUDA graphs hold
        raise out_of_memory(world.device, "--set batch_size=", recipe.batch_size, note=note, also=also) from error
    except RuntimeError as error:
        found = not_deterministic(error) if recipe.deterministic else None
        if found is None:
            raise
        raise found from error
