"""Read and write .safetensors files, with one JSON object beside the tensors.

What they mean is not known here. No torch at import.
"""

import contextlib
import hashlib
import json
import stat
import struct
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import TYPE_CHECKING, Any

from eectl.core.errors import EectlError
from eectl.core.files import MOST_BYTES, reading, replacing
from eectl.core.json_files import DIGEST, check_kind, check_seal, parse_json, sealed

if TYPE_CHECKING:
    from torch import Tensor

METADATA_KEY = "eectl"
# under one of these a file says what its tensors hash to: a checkpoint, whose network that names, and any other
WEIGHTS, TENSORS = "weights", "tensors"


def write_tensors(path: Path, tensors: "Mapping[str, Tensor]", metadata: Mapping[str, Any], *, overwrite: bool = True) -> None:
    """Write tensors (on any device, shared or strided) and one JSON object as a .safetensors file, in one step.

    The object is kept with its digest and with that of the tensors, unless it holds the latter already, as `weights`.
    """
    from safetensors import SafetensorError
    from safetensors.torch import save_file

    flat = {name: tensor.detach().cpu().contiguous().clone() for name, tensor in tensors.items()}
    own = {} if WEIGHTS in metadata else {TENSORS: digest(flat)}
    with replacing(path, overwrite=overwrite) as temporary:
        try:
            save_file(flat, temporary, metadata=as_metadata({**metadata, **own}))
        except SafetensorError as error:
            raise OSError(str(error)) from error


def as_metadata(value: Mapping[str, Any]) -> dict[str, str]:
    """Return a JSON object and its digest as the metadata of a .safetensors file, which can only hold text."""
    return {"format": "pt", METADATA_KEY: json.dumps(sealed(value))}


def read_tensors(
    path: Path, *, kind: str, schema: int, again: str = "write it again", needs_digests: bool = False
) -> "tuple[dict[str, Tensor], dict[str, Any]]":
    """Return the tensors (on the CPU) and the JSON object of a .safetensors file that eectl wrote.

    Args:
        path: the file.
        kind: the kind that it must be of.
        schema: the newest schema that can be read.
        again: what to do about a damaged file, for messages.
        needs_digests: whether a file without digests is refused; older ones of some kinds have none.

    Raises:
        EectlError: where it is missing, damaged, of another kind or a newer schema, or written by something else.
    """
    with _opened(path, again=again) as file:
        found = file.metadata() or {}
        metadata = _own_metadata(path, found, kind=kind, schema=schema, again=again)
        if needs_digests and not {DIGEST, TENSORS} <= set(parse_json(found[METADATA_KEY], where=path)):
            raise damaged(path, TENSORS, again)
        tensors = {name: file.get_tensor(name) for name in file.keys()}  # noqa: SIM118
    for name in (WEIGHTS, TENSORS):
        if name in metadata and metadata[name] != digest(tensors):
            raise damaged(path, name, again)
    metadata.pop(TENSORS, None)
    return tensors, metadata


def damaged(path: Path, name: str, again: str) -> EectlError:
    """Return the error for weights or tensors, as `name` says, that are not those that were saved; `again` says what to do."""
    return EectlError(f"{path}: the {name} are not those that were saved; the file was altered or damaged, {again}")


def read_metadata(path: Path, *, kind: str, schema: int, again: str = "write it again") -> dict[str, Any]:
    """Return only the JSON object of such a file, without reading its tensors; raises EectlError as `read_tensors` does."""
    with _opened(path, framework="numpy", again=again) as file:  # safetensors imports torch where a file is opened for it
        metadata = _own_metadata(path, file.metadata() or {}, kind=kind, schema=schema, again=again)
    metadata.pop(TENSORS, None)
    return metadata


def _own_metadata(path: Path, metadata: Mapping[str, str], *, kind: str, schema: int, again: str) -> dict[str, Any]:
    if METADATA_KEY not in metadata:
        raise EectlError(f"{path}: a safetensors file that eectl did not write; plain weights go in with backbone.weights")
    value = parse_json(metadata[METADATA_KEY], where=f"{path}: its header", again=again)
    check_kind(path, value, kind=kind, schema=schema)
    check_seal(value, where=path, again=again)
    return {key: item for key, item in value.items() if key != DIGEST}


def read_any_tensors(path: Path) -> "tuple[dict[str, Tensor], dict[str, str]]":
    """Return the tensors (on the CPU) and the metadata of any .safetensors file; raises EectlError where it is not one."""
    with _opened(path, again="write it again") as file:
        return {name: file.get_tensor(name) for name in file.keys()}, file.metadata() or {}  # noqa: SIM118


@contextlib.contextmanager
def _opened(path: Path, *, framework: str = "pt", again: str) -> Iterator[Any]:
    """Open a file with safetensors; raises EectlError where it is missing, cut short or something else."""
    from safetensors import SafetensorError, safe_open

    with reading(path):
        mode = path.stat().st_mode
        if stat.S_ISDIR(mode):
            raise EectlError(f"{path}: a folder; name a .safetensors file in it, such as {path / 'model.safetensors'}")
        if not stat.S_ISREG(mode):
            raise EectlError(f"{path}: not a file; name a .safetensors file")
        with open(path, "rb") as start:  # says what is wrong in the system's words, which safetensors does not
            length = start.read(8)
        if len(length) == 8 and MOST_BYTES < struct.unpack("<Q", length)[0] <= path.stat().st_size:
            raise EectlError(f"{path}: its header has more than {MOST_BYTES >> 20} MiB, which no network's has; {again}")
        try:
            with safe_open(path, framework=framework) as file:
                yield file
        except SafetensorError as error:
            raise EectlError(f"{path}: not a safetensors file, or cut short ({error!s:.200}); {again}") from error


def digest(tensors: "Mapping[str, Tensor]") -> str:
    """Return a SHA-256 over names, types, shapes and bytes: equal weights have equal digests, in whatever file they lie."""

    import torch

    total = hashlib.sha256()
    for name in sorted(tensors):
        tensor = tensors[name].detach().cpu().contiguous()
        total.update(f"{name} {tensor.dtype} {tuple(tensor.shape)}\n".encode())
        total.update(tensor.reshape(-1).view(torch.uint8).numpy().data)
    return total.hexdigest()
