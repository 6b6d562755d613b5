"""Files between steps: whole or not at all, and clear words for what cannot be read."""

import json
import os
import resource
import signal
import struct
from dataclasses import dataclass
from pathlib import Path

import pytest
import torch
from running import in_child
from safetensors.torch import save_file

from eectl.core import files
from eectl.core.errors import EectlError, visible
from eectl.core.files import replacing, replacing_all
from eectl.core.json_files import json_text, read_as, read_json, sealed, write_json
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


def test_no_flipped_bit_of_a_file_is_read(tmp_path):
    """Whatever single bit is turned: the file is refused, or (in its spaces and in a digest's own name) says what it said."""
    tensors = {"w": torch.arange(5.0), "n": torch.arange(3)}
    write_tensors(tmp_path / "x.safetensors", tensors, {"kind": "k", "schema": 1, "note": "epoch 12"})
    (tmp_path / "x.json").write_text(json_text(sealed({"kind": "k", "schema": 1, "values": [1, 0.25, None], "name": "a"})))
    for path, read in [(tmp_path / "x.safetensors", read_tensors), (tmp_path / "x.json", read_json)]:
        whole, refused = path.read_bytes(), 0
        said = read(path, kind="k", schema=1)
        for position, bit in ((position, bit) for position in range(len(whole)) for bit in (0, 3, 6)):
            path.write_bytes(whole[:position] + bytes([whole[position] ^ 1 << bit]) + whole[position + 1 :])
            try:
                found = read(path, kind="k", schema=1)
            except EectlError:
                refused += 1
                continue
            assert str(_without_digest(found)) == str(_without_digest(said))
        assert refused > 2 * len(whole)


def _without_digest(found):
    """What a file says, without a digest whose name was damaged."""
    if isinstance(found, tuple):
        return [_without_digest(part) for part in found]
    return {key: item for key, item in found.items() if not (isinstance(item, str) and len(item) == 64)}


def test_a_hostile_json_file_costs_little(tmp_path):
    deep, wide = "[" * 500_000, '{"kind": "k", "schema": 1, "a": ' + "[" * 100 + "]" * 100 + "}"
    for text, words in [
        (deep, "deep"),
        (wide, "64 levels"),
        ('{"kind": "k", "schema": 1, "schema": 1}', "stands twice"),
        ('{"kind": "k", "schema": true}', "schema True"),
        ('{"kind": "k", "schema": 1, "a": NaN}', "NaN is no number"),
        ('{"kind": "k", "schema": 1, "a": 1e400}', "too large"),
        ('{"kind": "k", "schema": 1, "a": ' + "9" * 5000 + "}", "5000 digits"),
        (" " * (2**24 + 1), "larger than 16 MiB"),
    ]:
        (tmp_path / "x").write_text(text)
        with pytest.raises(EectlError, match=words) as error:
            read_json(tmp_path / "x", kind="k", schema=1)
        assert "\n" not in str(error.value) and len(str(error.value)) < 500
    for path, words in [("/dev/zero", "a device"), (str(tmp_path), "a folder"), (str(tmp_path / "x" / "y"), "cannot be read")]:
        with pytest.raises(EectlError, match=words):
            read_json(Path(path), kind="k", schema=1)


def test_a_pipe_without_a_writer_is_not_waited_for(tmp_path):
    os.mkfifo(tmp_path / "pipe")
    with pytest.raises(EectlError, match="cut short"):
        read_json(tmp_path / "pipe", kind="k", schema=1)
    reader, writer = os.pipe()
    os.write(writer, json_text({"kind": "k", "schema": 1, "a": 2}).encode())
    os.close(writer)
    assert read_json(Path(f"/dev/fd/{reader}"), kind="k", schema=1)["a"] == 2
    os.close(reader)


def test_a_header_of_gigabytes_is_not_read(tmp_path):
    path = tmp_path / "x.safetensors"
    with open(path, "wb") as file:
        file.write(struct.pack("<Q", 2**25) + b'{"a":' + b" " * 100)
        file.truncate(2**26)  # with a hole: it takes no room
    with pytest.raises(EectlError, match="more than 16 MiB"):
        read_tensors(path, kind="k", schema=1)


def test_files_come_all_or_none(tmp_path):
    old, new = tmp_path / "old.txt", tmp_path / "new.txt"
    old.write_text("before")
    with pytest.raises(RuntimeError), replacing_all([old, new]) as temporaries:
        for temporary in temporaries:
            temporary.write_text("after")
        raise RuntimeError
    (tmp_path / "folder").mkdir()
    with pytest.raises(EectlError, match="directory"), replacing_all([old, tmp_path / "folder"]) as temporaries:
        temporaries[0].write_text("after")
    assert old.read_text() == "before" and sorted(p.name for p in tmp_path.iterdir()) == ["folder", "old.txt"]
    with replacing_all([old, new]) as temporaries:
        for temporary in temporaries:
            temporary.write_text("after")
    assert (old.read_text(), new.read_text()) == ("after", "after")


def test_what_came_meanwhile_is_not_replaced(tmp_path):
    path = tmp_path / "x"
    with pytest.raises(EectlError, match="came into being"), replacing(path, overwrite=False) as temporary:
        temporary.write_text("ours")
        path.write_text("theirs")
    assert path.read_text() == "theirs" and list(tmp_path.iterdir()) == [path]
    with replacing(tmp_path / "y", overwrite=False) as temporary:
        temporary.write_text("ours")
    assert (tmp_path / "y").read_text() == "ours" and len(list(tmp_path.iterdir())) == 2


def test_the_next_process_removes_what_a_killed_one_left(tmp_path):
    path, other = tmp_path / "x", tmp_path / "y"
    child = os.fork()
    if child == 0:
        with replacing(path) as temporary, replacing(other):
            temporary.write_text("half")
            os.kill(os.getpid(), signal.SIGKILL)
    os.waitpid(child, 0)
    assert len(list(tmp_path.iterdir())) == 2
    with replacing(path) as mine:
        with replacing(path) as second:  # a process that is still at work keeps its own
            second.write_text("second")
        mine.write_text("whole")
    assert path.read_text() == "whole"
    assert [p.name[:3] for p in tmp_path.iterdir() if p != path] == [".y."]  # of another file: not ours to judge


def test_everything_reaches_the_disk_before_and_after_the_renaming(tmp_path, monkeypatch):
    seen = []
    monkeypatch.setattr(files, "sync", lambda handle: seen.append(str(Path(f"/proc/self/fd/{handle}").readlink())))
    with replacing(tmp_path / "x") as temporary:
        temporary.write_text("whole")
    assert seen == [str(temporary), str(tmp_path)]


def test_a_name_of_any_bytes_is_read_back(tmp_path):
    (tmp_path / "x").write_text(json_text(sealed({"kind": "k", "schema": 1, "name": "a\udc80b"})))

    @dataclass
    class Named:
        name: str

    assert read_as(Named, tmp_path / "x", kind="k", schema=1, again="train").name == "a?b"


def test_steering_characters_are_written_out():
    assert visible("a\x1b[2J\x9b\x07\u202eb\n\tcé≥") == "a\\x1b[2J\\x9b\\x07\\u202eb\n\tcé≥"


def test_outputs_that_will_not_do_are_named_before_any_work(tmp_path, monkeypatch):
    """Asked of a user without root's rights, of whom a folder is closed, and of links that lead back to themselves."""
    monkeypatch.chdir(tmp_path)
    Path("closed").mkdir()
    Path("folder").mkdir()
    Path("file").touch()
    os.mkfifo("pipe")
    Path("loop").symlink_to("loop")
    Path("again").symlink_to("again")
    Path("zero").symlink_to("/dev/zero")
    Path("nowhere").symlink_to("nothing")
    Path("closed").chmod(0o555)
    cases = {
        "closed/x": "Permission denied",
        "closed/deep/x": "Permission denied",
        "loop": "symbolic link",
        "loop/x": "symbolic link",
        "file/x": "Not a directory",
        "file/deep/x": "Not a directory",
        "n" * 300: "shorter name",
        "folder": "not a file, but a folder",
        "pipe": "not a file",
        "zero": "not a file, but a device",
    }

    def refusal(name, *, overwrite=True):
        try:
            files.check_outputs([Path(name)], inputs=[Path("again")], overwrite=overwrite)
        except EectlError as error:
            return str(error)
        return ""

    for name, words in cases.items():
        said = in_child(lambda name=name: refusal(name))
        assert words in said and said.count("\n") == 0, (name, said)
    assert "symbolic link" in refusal("loop") and refusal("new/deep/x") == refusal("nowhere") == refusal("file") == ""
    assert "--overwrite" in refusal("nowhere", overwrite=False)  # a link of the user's would be replaced
    Path("closed").chmod(0o755)


def test_small_files_are_written_all_or_none(tmp_path):
    first, second = tmp_path / "a", tmp_path / "deep" / "b"
    files.write_all({first: "\udcff é\r\n", second: b"\0"})
    assert (first.read_bytes(), second.read_bytes()) == (b"\\udcff \xc3\xa9\r\n", b"\0")

    def write():
        try:
            files.write_all({first: "new", second: bytes(5000)})
        except EectlError as error:
            return str(error)

    said = in_child(write, most_bytes=4096)
    assert "cannot be written (File too large)" in said and str(second) in said
    assert first.read_bytes().startswith(b"\\udcff") and second.read_bytes() == b"\0"
    assert sorted(path.name for path in tmp_path.rglob("*")) == ["a", "b", "deep"]
