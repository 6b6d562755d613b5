"""Texts as a network takes them: tokenised once, kept as ragged ids on the device, padded batch by batch.

Which files texts come from is `text_sources`' business.
"""

import hashlib
import stat
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from functools import partial
from itertools import chain
from pathlib import Path
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from eectl.core.errors import EectlError, visible
from eectl.core.files import reading
from eectl.data.carving import choose_rows, row_groups, without_copies, without_test
from eectl.data.copies import Contents, Copies, hashed
from eectl.data.splits import DataInfo, Dataset, Ids, Split, send_all
from eectl.data.text_sources import StoredTexts, TextPart, stored_texts, text_classes
from eectl.recipe.data_paths import expand
from eectl.recipe.data_section import DataSection

PLANES = 3  # token ids, attention mask, token type ids
PAD_TO = 8  # batches are padded to a multiple of this, which matrix units like
CHUNK = 4096  # texts that are tokenised at a time
_CLASS_TYPE = 2  # of a class token at the end, which XLNet's tokenizer gives; a network knows that token by its place
_TOKENIZER_FILES = (".json", ".txt", ".model", ".jinja")
_MOST_BYTES = 256 * 2**20  # of one of them; those of 250,000 words have 35 MB


class Texts:
    """The tokens of all texts of a split, one text after the other: int32 ids and uint8 types [Σ lengths], on the device.

    `lengths` int64 [N] stay on the CPU. Rows are padded with `padding` to the longest of a batch, to a multiple of 8, and to at
    most `max_length` tokens.
    """

    def __init__(
        self, ids: Tensor, types: Tensor, lengths: Tensor, *, padding: int, max_length: int, device: torch.device
    ) -> None:
        self.lengths = lengths
        self._padding, self._max_length, self._device = padding, max_length, device
        starts = torch.cat([torch.zeros(1, dtype=torch.int64), lengths.cumsum(0)[:-1]])
        self._ids, self._types, self._starts, self._ends = (
            tensor.to(device) for tensor in (ids, types, starts, starts + lengths)
        )

    def read(
        self,
        batches: Sequence[Tensor],
        *,
        draw: int | None = None,  # noqa: ARG002 (nothing is drawn)
        visits: Sequence[Tensor] | None = None,  # noqa: ARG002
    ) -> Iterator[Tensor]:
        """Yield int64 [n, 3, token] on the device for each tensor of rows: token ids, attention mask, token type ids."""
        for rows, index in zip(batches, send_all(batches, self._device), strict=True):
            longest = int(self.lengths[rows].max()) if len(rows) else 0
            width = min(-(-longest // PAD_TO) * PAD_TO, self._max_length)
            places = self._starts[index, None] + torch.arange(width, device=self._device)
            real = places < self._ends[index, None]
            places = places.clamp(max=len(self._ids) - 1)
            ids = torch.where(real, self._ids[places].long(), self._padding)
            yield torch.stack([ids, real.long(), self._types[places] * real], dim=1)


@dataclass(frozen=True)
class Encoded:
    """The tokens of some texts, on the CPU: ids int32 and types uint8 [Σ lengths], lengths int64 [N]; `num_cut` were too long."""

    ids: NDArray[np.int32]
    types: NDArray[np.uint8]
    lengths: NDArray[np.int64]
    num_cut: int

    def digest(self) -> bytes:
        """Return a hash that changes with the tokenizer and with the length at which texts are cut."""
        return hashlib.sha256(self.ids.tobytes() + self.types.tobytes() + self.lengths.tobytes()).digest()


def load_text(spec: DataSection, *, device: torch.device, download: bool = False) -> Dataset:
    """Return a text data set, split and tokenised, with its tokens on `device`.

    Classification splits are stratified by class, those of a regression by the tenth that the target lies in. Ids are of texts
    and targets; a fingerprint is of the tokens too, so that another tokenizer is noticed. Raises EectlError for anything missing
    or broken.
    """
    source = stored_texts(spec, download)
    tokenizer = load_tokenizer(spec.tokenizer or "", download=download)
    chosen, copies = _choose(source, spec)
    splits: dict[str, Split] = {}
    cut: dict[str, int] = {}
    largest = padding = padding_id(tokenizer)
    for name, part in chosen.items():
        encoded = encode(tokenizer, part.texts, max_length=spec.max_length)
        splits[name] = _split(name, part, encoded, padding, spec, device)
        cut[name], largest = encoded.num_cut, max(largest, int(encoded.ids.max()))
    info = DataInfo(spec.name, source.classes, (PLANES, spec.max_length), (), (), spec.task, "text", largest, _targets(spec))
    notes = (*source.notes, *without_test(spec, splits), *_notes(cut, splits, spec.max_length))
    return Dataset(info, splits, notes, copies=copies)


def outline_text(spec: DataSection) -> tuple[dict[str, NDArray[Any]], Copies]:
    """Return the targets [row] of each split, and the copies among them, without tokenising any text."""
    chosen, copies = _choose(stored_texts(spec, False), spec)
    return {name: part.targets for name, part in chosen.items()}, copies


def _choose(source: StoredTexts, spec: DataSection) -> tuple[dict[str, TextPart], Copies]:
    """Return the texts of each split, and the copies among them."""
    groups = {name: row_groups(name, part.targets, spec, noun="texts") for name, part in source.parts.items()}
    classes = () if spec.task == "multilabel" else source.classes  # a row is of no one class
    chosen = choose_rows(groups, spec, classes, noun="texts")
    taken = {name: _take(source.parts[part], rows) for name, (part, rows) in chosen.items()}
    contents = {
        name: Contents(hashed(map(_text_key, taken[name].texts)), taken[name].targets, partial(_name, part, rows))
        for name, (part, rows) in chosen.items()
    }
    kept, copies = without_copies(contents, spec, classes, noun="texts")
    return {name: _take(part, kept[name]) for name, part in taken.items()}, copies


def _name(part: str, rows: NDArray[np.int64], row: int) -> str:
    """Return the name of a split's row in messages."""
    return f"{part} row {int(rows[row]) + 1}"


def text_info(spec: DataSection) -> DataInfo:
    """Return a text data set's facts; where its classes are not known, the target column of the training file is read."""
    return DataInfo(spec.name, text_classes(spec), (PLANES, spec.max_length), (), (), spec.task, "text", None, _targets(spec))


def _targets(spec: DataSection) -> tuple[str, ...]:
    """Return the columns of a regression."""
    return spec.targets if spec.task == "regression" else ()


def load_tokenizer(name: str, *, download: bool = False) -> Any:
    """Return the tokenizer in a folder, or that of a hub id: from the library's cache, or from the hub if `download` allows it.

    Raises EectlError where there is none.
    """
    folder = expand(name)
    if name.startswith((".", "/", "~")) and not folder.is_dir():
        raise EectlError(f"data.tokenizer: '{name}': no such folder; name one with tokenizer.json, or a hub id")
    if folder.is_dir():
        _check_files(folder)
    from transformers import AutoTokenizer

    place = str(folder) if folder.is_dir() else name
    try:
        with _quiet():
            return AutoTokenizer.from_pretrained(place, local_files_only=not download, trust_remote_code=False)
    except Exception as error:  # tokenizers raises that very class
        if folder.is_dir():
            there = ", ".join(sorted(path.name for path in folder.iterdir())[:4]) or "nothing"
            raise EectlError(
                f"data.tokenizer: '{name}' holds no tokenizer (tokenizer.json, …), but {there}, or a damaged one "
                f"({_reason(error)})"
            ) from error
        advice = "the hub has none by that name, or cannot be reached" if download else "it is not in the hub's cache"
        raise EectlError(
            f"data.tokenizer: '{name}' is no folder, and {advice}; name a folder with tokenizer.json"
            + ("" if download else ", or give --download")
        ) from error


def _check_files(folder: Path) -> None:
    """Raise EectlError where a file in a tokenizer's folder is a device, or larger than a tokenizer's are: all of it is read."""
    with reading(folder):
        for path in sorted(folder.iterdir()):
            mode, size = path.stat().st_mode, path.stat().st_size
            if path.suffix in _TOKENIZER_FILES and not stat.S_ISDIR(mode) and (not stat.S_ISREG(mode) or size > _MOST_BYTES):
                fault = f"larger than {_MOST_BYTES >> 20} MiB" if stat.S_ISREG(mode) else "not a file, but a device"
                raise EectlError(f"data.tokenizer: {path} is {fault}; name a folder with a tokenizer")


@contextmanager
def _quiet() -> Iterator[None]:
    """Silence what transformers says of a folder that is not quite as it expects."""
    from transformers.utils import logging

    level = logging.get_verbosity()
    logging.set_verbosity_error()
    try:
        yield
    finally:
        logging.set_verbosity(level)


def _reason(error: Exception) -> str:
    return visible(" ".join(str(error).split()))[:120] or type(error).__name__


def encode(tokenizer: Any, texts: Sequence[tuple[str, ...]], *, max_length: int) -> Encoded:
    """Tokenise texts, or pairs of texts, with special tokens; those over `max_length` are cut, pairs at the longer text.

    Types are 0 and 1; that of a class token at the end, 2 of XLNet's tokenizer, becomes 0.

    Raises EectlError for a tokenizer that makes nothing of a text.
    """
    ids: list[list[int]] = []
    types: list[list[int]] = []
    num_cut = 0
    for start in range(0, len(texts), CHUNK):
        chunk = texts[start : start + CHUNK]
        new_ids, new_types = _tokens(tokenizer, chunk, None)
        long = [row for row, tokens in enumerate(new_ids) if len(tokens) > max_length]
        if long:  # the library cuts without saying how many
            cut_ids, cut_types = _tokens(tokenizer, [chunk[row] for row in long], max_length)
            for row, row_ids, row_types in zip(long, cut_ids, cut_types, strict=True):
                new_ids[row], new_types[row] = row_ids, row_types
        num_cut += len(long)
        ids += new_ids
        types += new_types
    lengths = np.array([len(tokens) for tokens in ids], dtype=np.int64)
    if not lengths.all():
        raise EectlError(f"data.tokenizer: makes no token of the text {texts[int(lengths.argmin())]}; it adds none of its own")
    size = int(lengths.sum())
    try:
        flat = np.fromiter(chain.from_iterable(ids), dtype=np.int32, count=size)
        kinds = np.fromiter(chain.from_iterable(types), dtype=np.uint8, count=size)
    except OverflowError as error:
        raise EectlError(f"data.tokenizer: gives token ids of 2^31 or more, or types over 255 ({error}); take another") from error
    ends = lengths.cumsum() - 1
    kinds[ends] *= kinds[ends] != _CLASS_TYPE
    if flat.min() < 0 or kinds.max() > 1:
        raise EectlError("data.tokenizer: gives token ids below 0, or types other than 0 and 1; take another")
    return Encoded(flat, kinds, lengths, num_cut)


def padding_id(tokenizer: Any) -> int:
    """Return the token that short texts are filled up with, 0 where the tokenizer names none; raises EectlError below 0."""
    padding = int(tokenizer.pad_token_id or 0)
    if padding < 0:
        raise EectlError(f"data.tokenizer: gives the padding token {padding}; take another")
    return padding


def _tokens(tokenizer: Any, texts: Sequence[tuple[str, ...]], max_length: int | None) -> tuple[list[list[int]], list[list[int]]]:
    """Return the ids and types of each text, cut where there is a `max_length`."""
    columns = [list(column) for column in zip(*texts, strict=True)]
    try:
        encoded = tokenizer(
            *columns,
            truncation=max_length is not None,  # longest first: pairs lose tokens at the longer text
            max_length=max_length,
            return_attention_mask=False,
            return_token_type_ids=True,
            verbose=False,
        )
        return encoded["input_ids"], encoded["token_type_ids"]
    except MemoryError:
        raise
    except Exception as error:  # tokenizers raises that very class
        raise EectlError(f"data.tokenizer: cannot read the texts ({_reason(error)}); take another") from error


def _take(part: TextPart, rows: NDArray[np.int64]) -> TextPart:
    return TextPart([part.texts[row] for row in rows.tolist()], part.targets[rows])


def _split(name: str, part: TextPart, encoded: Encoded, padding: int, spec: DataSection, device: torch.device) -> Split:
    lengths = torch.from_numpy(encoded.lengths)
    flat = torch.from_numpy(encoded.ids), torch.from_numpy(encoded.types)
    texts = Texts(*flat, lengths, padding=padding, max_length=spec.max_length, device=device)
    labels = torch.from_numpy(part.targets)
    labels = labels.float() if labels.is_floating_point() else labels
    ids = text_ids(part)
    epoch_rows = spec.epoch_rows if name == "train" else None
    return Split(name, texts, labels, ids, device=device, lengths=lengths, read_as=encoded.digest(), epoch_rows=epoch_rows)


def text_ids(part: TextPart) -> Ids:
    """Return the 64-bit ids of texts: BLAKE2b over a row's texts and its target."""
    return hashed(_text_key((*row, repr(target))) for row, target in zip(part.texts, part.targets.tolist(), strict=True))


def _text_key(columns: Sequence[str]) -> bytes:
    return "\0".join(columns).encode("utf-8", "surrogatepass")


def _notes(cut: dict[str, int], splits: dict[str, Split], max_length: int) -> tuple[str, ...]:
    if not any(cut.values()):
        return ()
    by_split = ", ".join(f"{number:,} of {len(splits[name]):,} {name}" for name, number in cut.items() if number)
    return (f"{by_split} texts are longer than {max_length} tokens and were cut; data.max_length keeps more",)
