"""Files by parts: byte for byte what safetensors writes, read at any place, and never half a file under the final name."""

import os
import resource
import signal

import pytest
import torch
from safetensors.torch import save_file

from eectl.core.errors import EectlError
from eectl.core.tensor_files import TENSORS, as_metadata, digest, read_tensors, write_tensors
from eectl.core.tensor_parts import join_parts, new_parts, open_parts

LAYOUT = {"entries": ("F32", (2, 5, 3)), "labels": ("I64", (5,))}
ABOUT = {"kind": "k", "schema": 1, "note": "ä"}


def umask():
    mask = os.umask(0)
    os.umask(mask)
    return mask


def tensors():
    return {"entries": torch.randn(2, 5, 3), "labels": torch.arange(5) - 2}


def write_all(path, values, *, about=ABOUT):
    with new_parts(path, LAYOUT, about) as (parts, temporary):
        parts.write("labels", values["labels"])
        with join_parts(temporary, of=path) as others:  # as another process does
            others.write("entries", values["entries"][1, 3:], at=(1, 3))
        parts.write("entries", values["entries"][0])
        parts.write("entries", values["entries"][1, :3], at=(1,))


def test_the_file_is_what_safetensors_writes(tmp_path):
    values = tensors()
    write_all(tmp_path / "parts.safetensors", values)
    read, about = read_tensors(tmp_path / "parts.safetensors", kind="k", schema=1)
    assert about == ABOUT and all(torch.equal(read[name], values[name]) for name in values)
    write_all(tmp_path / "parts.safetensors", values, about={})
    save_file(values, tmp_path / "whole.safetensors", metadata=as_metadata({TENSORS: digest(values)}))
    parts, whole = ((tmp_path / f"{name}.safetensors").read_bytes() for name in ("parts", "whole"))
    assert len(parts) == len(whole) and parts[-160:] == whole[-160:]  # 2·5·3·4 + 5·8 bytes of tensors, in the same order
    assert (tmp_path / "parts.safetensors").stat().st_mode & 0o777 == 0o666 & ~umask()
    assert len(list(tmp_path.iterdir())) == 2


def test_reading_at_a_place(tmp_path):
    values = tensors()
    write_tensors(tmp_path / "x", values, ABOUT)
    with open_parts(tmp_path / "x") as parts:
        assert parts.layout == LAYOUT
        rows, labels = torch.empty(2, 3), torch.empty(5, dtype=torch.int64)
        parts.read("entries", rows, at=(1, 2))
        parts.read("labels", labels)
        assert torch.equal(rows, values["entries"][1, 2:4]) and torch.equal(labels, values["labels"])
        os.truncate(tmp_path / "x", (tmp_path / "x").stat().st_size - 1)
        with pytest.raises(EectlError, match="cut short"):
            parts.read("entries", rows, at=(1, 3))


def test_a_failure_leaves_the_old_file(tmp_path):
    path = tmp_path / "x.safetensors"
    path.write_text("old")
    with pytest.raises(OSError, match="not ours"), new_parts(path, LAYOUT, ABOUT) as (parts, _):
        parts.write("labels", torch.arange(5))
        assert path.read_text() == "old"
        raise OSError("not ours")  # an error of the block, not of this file: it stays what it is
    assert path.read_text() == "old" and list(tmp_path.iterdir()) == [path]


def test_what_cannot_be_written(tmp_path):
    (tmp_path / "file").write_text("")
    with (
        pytest.raises(EectlError, match=r"x: cannot be written \(File exists\)"),
        new_parts(tmp_path / "file" / "x", LAYOUT, ABOUT),
    ):
        pass
    with (
        pytest.raises(EectlError, match=r"x: .*\(No such file or directory\)"),
        join_parts(tmp_path / "gone", of=tmp_path / "x"),
    ):
        pass


def set_limit(size):
    signal.signal(signal.SIGXFSZ, signal.SIG_IGN)
    resource.setrlimit(resource.RLIMIT_FSIZE, (size, size))


@pytest.mark.parametrize("limit", [10, 300, None])
def test_a_full_disk_leaves_the_old_file_and_one_line(tmp_path, limit):
    """A file size limit stands for the full disk: in the header, at full size (over 300 bytes), or as the tensors come."""
    path = tmp_path / "x.safetensors"
    path.write_text("old")
    child = os.fork()
    if child == 0:
        try:
            if limit is not None:
                set_limit(limit)
            with new_parts(path, LAYOUT, ABOUT) as (parts, _):
                set_limit(300)
                parts.write("entries", torch.ones(2, 5, 3))
        except EectlError as error:
            os._exit(0 if "x.safetensors: cannot be written" in str(error) else 3)
        except BaseException:
            os._exit(4)
        os._exit(5)
    assert os.waitstatus_to_exitcode(os.waitpid(child, 0)[1]) == 0
    assert path.read_text() == "old" and list(tmp_path.iterdir()) == [path]
