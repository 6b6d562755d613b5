"""`eectl predict`: answers for files, folders and columns of text, written as they come, in bounded memory."""

import os
import sys
from collections import Counter
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager, nullcontext
from dataclasses import dataclass
from itertools import islice
from pathlib import Path
from typing import Any

from eectl.core.console import make_console, silent
from eectl.core.errors import EectlError
from eectl.core.files import check_outputs
from eectl.core.precision import FLOAT32, settings
from eectl.core.progress import make_bar
from eectl.deploy.model import Model, load
from eectl.deploy.rows_in import STDIN, RowIn, check_texts, image_rows, read_images, read_texts
from eectl.deploy.rows_out import RowOut, check_rows_file, writing_rows
from eectl.models.checkpoint import read_about

KIND, SCHEMA = "prediction", 1


@dataclass(frozen=True)
class Predicted:
    """The result of `predict`: the rows, where they were not written or handed on, what could not be read, and who left where.

    `left[k-1]` is the number of inputs that left at exit k; `mean_cost` is a share of the plain backbone's cost, None for no
    input. `budget` is the policy's, in % of that cost; None: the plain network answered. It computed in `precision`. `full_sizes`
    are the batch sizes at which all exits ran and the policy chose among them, as that was faster than early exit.
    """

    checkpoint: str
    task: str
    classes: tuple[str, ...]
    budget: float | None
    rows: tuple[RowOut, ...]
    failed: tuple[str, ...]
    left: tuple[int, ...]
    mean_cost: float | None
    precision: str = FLOAT32
    full_sizes: tuple[int, ...] = ()

    @property
    def num_rows(self) -> int:
        """The inputs that were answered."""
        return sum(self.left)

    def to_json(self) -> dict[str, Any]:
        """Return JSON-able data: kind, schema, and all there is."""
        about = {"checkpoint": self.checkpoint, "task": self.task, "classes": list(self.classes), "budget": self.budget}
        counts = {"num_rows": self.num_rows, "left": list(self.left), "mean_cost": self.mean_cost, "failed": list(self.failed)}
        ways = {"precision": self.precision, "full_sizes": list(self.full_sizes)}
        return {"kind": KIND, "schema": SCHEMA, **about, **ways, **counts, "rows": [row.to_json() for row in self.rows]}


def predict(
    checkpoint: str | Path,
    inputs: str | Path | Sequence[str | Path],
    *,
    policy: str | Path | None = None,
    budget: float | None = None,
    top: int = 1,
    out: str | Path | None = None,
    text: str | Sequence[str] = (),
    batch_size: int | None = None,
    device: str = "auto",
    precision: str | None = None,
    tokenizer: str | Path | None = None,
    overwrite: bool = False,
    quiet: bool = True,
    each: Callable[[Sequence[RowOut], Model], None] | None = None,
    say: Callable[[str], None] = silent,
) -> Predicted:
    """Answer files: images, folders of them, or texts in a column of CSV, TSV, JSONL or Parquet; in their order.

    Args:
        checkpoint: A .safetensors file that `eectl train` wrote.
        inputs: Files and folders; `-` reads stdin: a text a line (a tab between the two of a pair), or the path of an image.
        policy: Thresholds from `eectl calibrate-thresholds`; default: the plain network answers, at its last exit.
        budget: Which of the policy's budgets to keep, in % of the plain backbone's cost; default: the only one there is.
        top: How many of the likeliest classes each row gets.
        out: A .jsonl or .csv file to write the rows to; they are then not returned.
        text: The columns of the texts; default: the recipe's.
        batch_size: Rows at once; default: the recipe's.
        device: auto (a GPU where there is one), cpu, cuda, cuda:N or mps.
        precision: auto, float32, tf32 or bf16; default: what the checkpoint was trained in.
        tokenizer: A folder, or a hub id in the cache, that stands in for the recipe's.
        overwrite: Replace `out` where it exists.
        quiet: Show no progress bar on stderr.
        each: Takes the rows of each batch as they come, and the model; they are then not returned.
        say: Takes what belongs on stderr, such as a line for each input that cannot be read.

    Raises:
        EectlError: For a request that cannot be met as a whole. An input that cannot be read is said, and listed in `failed`.

    Example, with a checkpoint of the digits:

    >>> found = predict("model.safetensors", "images/", policy="policy.json", budget=50)
    >>> [row.shown["file"] for row in found.rows], found.rows[0].answer.label in found.classes
    (['images/a.png', 'images/b.png'], True)
    """
    if int(os.environ.get("WORLD_SIZE", "1")) > 1:
        raise EectlError(
            f"predict runs in one process, and torchrun started {os.environ['WORLD_SIZE']}; start it without torchrun"
        )
    given = [inputs] if isinstance(inputs, (str, Path)) else list(inputs)
    sources = [str(source) for source in given]
    if not sources:
        raise EectlError("predict: name files, a folder, or - for stdin")
    if sources.count(STDIN) > 1:
        raise EectlError("predict: - stands twice, and stdin is read once")
    target = None if out is None else Path(out)
    if target is not None:
        check_rows_file(target)
        others = [Path(source) for source in sources if source != STDIN]
        policy_file = None if policy is None else Path(policy)
        check_outputs([target], inputs=[Path(checkpoint), policy_file, *others], overwrite=overwrite)
    rows, total = _rows(Path(checkpoint), sources, (text,) if isinstance(text, str) else tuple(text))
    model = load(checkpoint, policy=policy, budget=budget, device=device, precision=precision, tokenizer=tokenizer)
    for note in model.notes:
        say(f"note: {note}")
    model.say = say
    size = model.check_request(batch_size, top)
    kept: list[RowOut] = []
    failed: list[str] = []
    left: Counter[int] = Counter()
    cost = 0.0
    writing = nullcontext() if target is None else writing_rows(target, overwrite=overwrite)
    set_up = settings(model.precision, model.device)
    with set_up, _bar(total, model.inputs.noun, quiet=quiet) as advance, writing as write:
        for chunk in _chunks(rows, model.window(size)):
            answered = _answer(model, chunk, size, top, failed=failed, say=say)
            left.update(row.answer.exit for row in answered)
            cost += sum(row.answer.cost for row in answered)
            if write is not None:
                for row in answered:
                    write(row)
            if each is not None:
                each(answered, model)
            if write is None and each is None:
                kept += answered
            advance(len(chunk))
    for note in model.inputs.notes:
        say(f"note: {note}")
    counts = tuple(left[number] for number in range(1, len(model.exits) + 1))
    mean = cost / sum(counts) if sum(counts) else None
    about = model.digest, model.task, model.classes, model.budget
    return Predicted(*about, tuple(kept), tuple(failed), counts, mean, model.precision, model.full_sizes)


def _rows(checkpoint: Path, sources: Sequence[str], text: tuple[str, ...]) -> tuple[Iterator[RowIn], int | None]:
    """Return the rows to answer and, where it is known, their number; raises EectlError, before the network is loaded, where
    they are not what it takes."""
    spec = read_about(checkpoint).data_spec
    if not spec.is_text:
        if text:
            raise EectlError(f"--text {text[0]}: {checkpoint} takes images, which lie in no column; leave it out")
        files = image_rows(sources)
        return read_images(files), None if STDIN in files else len(files)
    columns = text or spec.text
    if len(columns) != len(spec.text):
        wanted = "one column" if len(spec.text) == 1 else "two columns"
        raise EectlError(f"--text {', '.join(text)}: {checkpoint} takes {wanted}; name as many")
    check_texts(sources, columns)
    return read_texts(sources, columns), None


def _answer(
    model: Model, chunk: Sequence[RowIn], size: int, top: int, *, failed: list[str], say: Callable[[str], None]
) -> list[RowOut]:
    """Answer the rows of a chunk that can be read; the others are said, and added to `failed`."""
    there = iter(model.read([(row.where, row.value) for row in chunk if not isinstance(row.value, EectlError)]))
    good = []
    for row in chunk:
        value = row.value if isinstance(row.value, EectlError) else next(there)
        if isinstance(value, EectlError):
            failed.append(str(value))
            say(str(value))
        else:
            good.append((row, value))
    answers = model.answer([value for _, value in good], batch_size=size, top=top)
    return [RowOut(row.shown, answer) for (row, _), answer in zip(good, answers, strict=True)]


def _chunks(rows: Iterator[RowIn], size: int) -> Iterator[list[RowIn]]:
    while chunk := list(islice(rows, size)):
        yield chunk


@contextmanager
def _bar(total: int | None, noun: str, *, quiet: bool) -> Iterator[Callable[[int], None]]:
    """Show how many inputs are answered, on a terminal; stdout, which may be a file, stays as it is."""
    if quiet or not sys.stderr.isatty():
        yield lambda _: None
        return
    with make_bar(make_console(stderr=True, soft_wrap=True)) as bar:
        task = bar.add_task(noun, total=total)
        yield lambda count: bar.advance(task, count)
