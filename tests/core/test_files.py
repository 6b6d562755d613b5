"""Files between steps: whole or not at all, and clear words for what cannot be read."""

import json
import os
import resource

import pytest
import torch
from safetensors.torch import save_file

from eectl.core.errors import EectlError
from eectl.core.files import replacing
from eectl.core.json_files import read_json, write_json
from eectl.core.tensor_files import digest, read_tensors, write_tensors


def test_tensors_come_back_bit_for_bit(tmp_path):
    base = torch.randn(4, 6)
    tensors = {"strided": base.t(), "shared": base, "again": base, "count": torch.tensor(3), "half": base.bfloat16()}
    write_tensors(tmp_path / "x.safetensors", tensors, {"kind": "k", "schema": 1, "note": [1, float("nan")]})
    read, metadata = read_tensors(tmp_path / "x.safetensors", kind="k", schema=1)
    assert all(torch.equal(read[name], tensors[name]) and read[name].dtype == tensors[name].dtype for name in tensors)
    assert metadata == {"kind": "k", "schema": 1, "note": [1, None]}
    assert [p.name for p in tmp_path.iterdir()] == ["x.safetensors"]


def test_a_failed_write_leaves_the_old_file(tmp_path):
    path = tmp_path / "x.json"
    write_json(path, {"a": 1})
    with pytest.raises(RuntimeError), replacing(path) as temporary:
        temporary.write_text("half")
        raise RuntimeError
    assert json.loads(path.read_text()) == {"a": 1}
    assert list(tmp_path.iterdir()) == [path]


def test_a_full_disk_leaves_the_old_file_and_one_line(tmp_path):
    """A file size limit stands for the full disk: the write fails in the middle, as ENOSPC does."""
    path = tmp_path / "x.safetensors"
    write_tensors(path, {"w": torch.zeros(2)}, {"kind": "k", "schema": 1})
    before = path.read_bytes()
    child = os.fork()
    if child == 0:
        resource.setrlimit(resource.RLIMIT_FSIZE, (4096, 4096))
        import signal

        signal.signal(signal.SIGXFSZ, signal.SIG_IGN)
        try:
            write_tensors(path, {"w": torch.zeros(10_000)}, {"kind": "k", "schema": 1})
        except EectlError as error:
            os._exit(0 if "cannot be written" in str(error) else 3)
        except BaseException:
            os._exit(4)
        os._exit(5)
    assert os.waitstatus_to_exitcode(os.waitpid(child, 0)[1]) == 0
    assert path.read_bytes() == before
    assert list(tmp_path.iterdir()) == [path]


def test_what_cannot_be_read(tmp_path):
    path = tmp_path / "x.safetensors"
    with pytest.raises(EectlError, match="cannot be read"):
        read_tensors(path, kind="k", schema=1)
    with pytest.raises(EectlError, match="a folder"):
        read_tensors(tmp_path, kind="k", schema=1)
    write_tensors(path, {"w": torch.zeros(100)}, {"kind": "k", "schema": 2})
    with pytest.raises(EectlError, match=r"schema 2.*up to 1"):
        read_tensors(path, kind="k", schema=1)
    with pytest.raises(EectlError, match="not a policy"):
        read_tensors(path, kind="policy", schema=1)
    whole = path.read_bytes()
    for size in (0, 4, 40, len(whole) - 1):
        path.write_bytes(whole[:size])
        with pytest.raises(EectlError, match="cut short"):
            read_tensors(path, kind="k", schema=2)
    path.write_bytes(b"hello, this is no such file")
    with pytest.raises(EectlError, match="not a safetensors file"):
        read_tensors(path, kind="k", schema=2)
    save_file({"w": torch.zeros(1)}, path)
    with pytest.raises(EectlError, match="eectl did not write"):
        read_tensors(path, kind="k", schema=2)


def test_json_kinds(tmp_path):
    path = tmp_path / "p.json"
    for text, words in [("{", "cut short"), ("[1]", "not a policy"), ('{"kind": "other"}', "says it is an other")]:
        path.write_text(text)
        with pytest.raises(EectlError, match=words):
            read_json(path, kind="policy", schema=1)


def test_the_digest_sees_every_bit():
    weights = {"a": torch.zeros(3), "b": torch.ones(2, dtype=torch.int64)}
    same = digest(weights)
    assert digest(dict(reversed(weights.items()))) == same
    for change in [{"a": torch.tensor([0.0, -0.0, 0.0])}, {"a": torch.zeros(3, 1)}, {"a": torch.zeros(3).half()}]:
        assert digest(weights | change) != same
    assert digest({"c": weights["a"], "b": weights["b"]}) != same
