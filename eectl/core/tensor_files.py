"""Read and write .safetensors files, with one JSON object beside the tensors.

What they mean is not known here. No torch at import.
"""

import contextlib
import hashlib
import json
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import TYPE_CHECKING, Any

from eectl.core.errors import EectlError
from eectl.core.files import replacing, unreadable
from eectl.core.json_files import check_kind, clean_json

if TYPE_CHECKING:
    from torch import Tensor

METADATA_KEY = "eectl"


def write_tensors(path: Path, tensors: "Mapping[str, Tensor]", metadata: Mapping[str, Any]) -> None:
    """Write tensors (on any device, shared or strided) and one JSON object as a .safetensors file, in one step."""
    from safetensors import SafetensorError
    from safetensors.torch import save_file

    flat = {name: tensor.detach().cpu().contiguous().clone() for name, tensor in tensors.items()}
    with replacing(path) as temporary:
        try:
            save_file(flat, temporary, metadata=as_metadata(metadata))
        except SafetensorError as error:
            raise OSError(str(error)) from error


def as_metadata(value: Mapping[str, Any]) -> dict[str, str]:
    """Return a JSON object as the metadata of a .safetensors file, which can only hold text."""
    return {"format": "pt", METADATA_KEY: json.dumps(clean_json(value))}


def read_tensors(path: Path, *, kind: str, schema: int) -> "tuple[dict[str, Tensor], dict[str, Any]]":
    """Return the tensors (on the CPU) and the JSON object of a .safetensors file that eectl wrote.

    Raises EectlError where it is missing, cut short, of another kind or a newer schema, or written by something else.
    """
    with _opened(path) as file:
        metadata = _own_metadata(path, file.metadata() or {}, kind=kind, schema=schema)
        return {name: file.get_tensor(name) for name in file.keys()}, metadata  # noqa: SIM118


def read_metadata(path: Path, *, kind: str, schema: int) -> dict[str, Any]:
    """Return only the JSON object of such a file, without reading its tensors; raises EectlError as `read_tensors` does."""
    with _opened(path, framework="numpy") as file:  # safetensors imports torch where a file is opened for it
        return _own_metadata(path, file.metadata() or {}, kind=kind, schema=schema)


def _own_metadata(path: Path, metadata: Mapping[str, str], *, kind: str, schema: int) -> dict[str, Any]:
    if METADATA_KEY not in metadata:
        raise EectlError(f"{path}: a safetensors file that eectl did not write; plain weights go in with backbone.weights")
    try:
        value = json.loads(metadata[METADATA_KEY])
    except ValueError as error:
        raise EectlError(f"{path}: its header is damaged ({error}); write it again") from error
    check_kind(path, value, kind=kind, schema=schema)
    return dict(value)


def read_any_tensors(path: Path) -> "tuple[dict[str, Tensor], dict[str, str]]":
    """Return the tensors (on the CPU) and the metadata of any .safetensors file; raises EectlError where it is not one."""
    with _opened(path) as file:
        return {name: file.get_tensor(name) for name in file.keys()}, file.metadata() or {}  # noqa: SIM118


@contextlib.contextmanager
def _opened(path: Path, *, framework: str = "pt") -> Iterator[Any]:
    """Open a file with safetensors; raises EectlError where it is missing, cut short or something else."""
    from safetensors import SafetensorError, safe_open

    if path.is_dir():
        raise EectlError(f"{path}: a folder; name a .safetensors file in it, such as {path / 'model.safetensors'}")
    try:
        with open(path, "rb"):
            pass  # says what is wrong in the system's words, which safetensors does not
        with safe_open(path, framework=framework) as file:
            yield file
    except OSError as error:
        raise unreadable(path, error) from error
    except SafetensorError as error:
        raise EectlError(f"{path}: not a safetensors file, or cut short ({error}); write it again") from error


def digest(tensors: "Mapping[str, Tensor]") -> str:
    """Return a SHA-256 over names, types, shapes and bytes: equal weights have equal digests, in whatever file they lie."""

    import torch

    total = hashlib.sha256()
    for name in sorted(tensors):
        tensor = tensors[name].detach().cpu().contiguous()
        total.update(f"{name} {tensor.dtype} {tuple(tensor.shape)}\n".encode())
        total.update(tensor.reshape(-1).view(torch.uint8).numpy().data)
    return total.hexdigest()
