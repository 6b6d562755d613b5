"""Read and write the files that one command makes and another reads: JSON and safetensors, each with a kind and a schema number.

A file is written under another name and then renamed, so it is never there half-written. What files mean is not known here. No
torch at import.
"""

import contextlib
import hashlib
import json
import math
import os
import tempfile
from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any, TypeVar

from eectl.core.errors import EectlError

if TYPE_CHECKING:
    from torch import Tensor

METADATA_KEY = "eectl"


@contextlib.contextmanager
def replacing(path: Path) -> Iterator[Path]:
    """Yield a temporary path beside `path` to write to; it then replaces `path` in one step, or on failure leaves it as it was.

    Missing folders are made. Raises EectlError where nothing can be written there or the disk is full.
    """
    with writing(path):
        temporary = make_beside(path)
        try:
            yield temporary
            put_in_place(temporary, path)
        finally:
            temporary.unlink(missing_ok=True)


@contextlib.contextmanager
def writing(path: Path) -> Iterator[None]:
    """Turn an OSError of the block into an EectlError that `path` cannot be written."""
    try:
        yield
    except OSError as error:
        raise EectlError(
            f"{path}: cannot be written ({error.strerror or error}); nothing was changed; free some space or name another place"
        ) from error


def make_beside(path: Path) -> Path:
    """Make an empty file in the folder of `path`, under a name of its own that begins with a dot; returns its path."""
    path.parent.mkdir(parents=True, exist_ok=True)
    handle, name = tempfile.mkstemp(dir=path.parent, prefix=f".{path.name}.", suffix=".tmp")
    os.close(handle)
    return Path(name)


def put_in_place(temporary: Path, path: Path) -> None:
    """Replace `path` by a file that has been written, in one step and on the disk, with the usual permissions."""
    with open(temporary, "rb") as written:
        os.fsync(written.fileno())
    os.chmod(temporary, 0o666 & ~_umask())
    os.replace(temporary, path)


def _umask() -> int:
    mask = os.umask(0)
    os.umask(mask)
    return mask


def check_outputs(outputs: Sequence[Path | None], *, inputs: Sequence[Path | None], overwrite: bool) -> None:
    """Raise EectlError where an output exists without `--overwrite`, is one of the inputs, or is named twice; None is no file."""
    given = [path.resolve() for path in inputs if path is not None]
    seen: set[Path] = set()
    for path in outputs:
        if path is None:
            continue
        if path.resolve() in given:
            raise EectlError(f"{path} is read by this command and cannot be written by it; give the output another name")
        if path.resolve() in seen:
            raise EectlError(f"{path} is named for two outputs; give each its own name")
        if path.exists() and not overwrite:
            raise EectlError(f"{path} exists; give another name, or --overwrite to replace it")
        seen.add(path.resolve())


def clean_json(value: Any) -> Any:
    """Return `value` with None in place of NaN and infinities, which JSON does not have."""
    if isinstance(value, float) and not math.isfinite(value):
        return None
    if isinstance(value, Mapping):
        return {str(key): clean_json(item) for key, item in value.items()}
    if isinstance(value, (list, tuple)):
        return [clean_json(item) for item in value]
    return value


def write_json(path: Path, value: Mapping[str, Any]) -> None:
    """Write a JSON object in one step; raises EectlError where it cannot be written."""
    with replacing(path) as temporary:
        temporary.write_text(json.dumps(clean_json(value), indent=2) + "\n", encoding="utf-8")


def read_json(path: Path, *, kind: str, schema: int) -> dict[str, Any]:
    """Return the JSON object in `path`; raises EectlError where it cannot be read, or is of another kind or a newer schema."""
    try:
        value = json.loads(path.read_text(encoding="utf-8"))
    except OSError as error:
        raise unreadable(path, error) from error
    except ValueError as error:
        raise EectlError(f"{path}: not JSON, or cut short ({error}); write it again") from error
    check_kind(path, value, kind=kind, schema=schema)
    return dict(value)


def check_kind(path: Path, value: Any, *, kind: str, schema: int) -> None:
    """Raise EectlError unless `value` is a mapping whose `kind` is this one and whose `schema` is not newer than this one."""
    found = value.get("kind") if isinstance(value, Mapping) else None
    if found != kind:
        says = f"says it is {_with_article(found)}" if isinstance(found, str) else "does not say what it is"
        raise EectlError(f"{path}: not {_with_article(kind)} of eectl's (it {says})")
    number = value.get("schema")
    if not isinstance(number, int) or number > schema:
        raise EectlError(f"{path}: {kind} schema {number}, this eectl reads up to {schema}; upgrade eectl")


def _with_article(kind: str) -> str:
    return f"a{'n' * kind.startswith(tuple('aeiou'))} {kind}"


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


def unreadable(path: Path, error: OSError) -> EectlError:
    """Return the error for a file that the system cannot read."""
    return EectlError(f"{path}: cannot be read ({error.strerror or error})")


def digest(tensors: "Mapping[str, Tensor]") -> str:
    """Return a SHA-256 over names, types, shapes and bytes: equal weights have equal digests, in whatever file they lie."""

    import torch

    total = hashlib.sha256()
    for name in sorted(tensors):
        tensor = tensors[name].detach().cpu().contiguous()
        total.update(f"{name} {tensor.dtype} {tuple(tensor.shape)}\n".encode())
        total.update(tensor.reshape(-1).view(torch.uint8).numpy().data)
    return total.hexdigest()


_Form = TypeVar("_Form")


def as_path(path: str | Path | None) -> Path | None:
    """Return a path that a caller gave as text or as a Path, None where none was given."""
    return None if path is None else Path(path)


def read_as(form: type[_Form], path: Path, *, kind: str, schema: int, again: str) -> _Form:
    """Read a dataclass from a JSON file.

    Args:
        form: the dataclass.
        path: the file.
        kind: the kind that it must be of.
        schema: the newest schema that can be read.
        again: the command that writes such a file, for messages.

    Raises:
        EectlError: where the file cannot be read, or for the first field that does not fit.
    """
    from pydantic import TypeAdapter, ValidationError

    try:
        return TypeAdapter(form).validate_python(read_json(path, kind=kind, schema=schema))
    except ValidationError as error:
        first = error.errors(include_url=False)[0]
        place = ".".join(map(str, first["loc"]))
        raise EectlError(f"{path}: {place}: {first['msg']}; write it again with {again}") from error
