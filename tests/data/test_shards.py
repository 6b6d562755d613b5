"""Shards: what is read of them against tarfile and the same pictures in folders, and what is refused, by name."""

import gzip
import io
import json
import os
import pickle
import signal
import tarfile
from pathlib import Path

import numpy as np
import pytest
import torch
from toy_pictures import CLASSES, add, encoded, picture, write_shard, write_shards

from eectl.core.errors import EectlError, Interrupted
from eectl.core.tensor_files import read_any_tensors
from eectl.data import data_info, load_data, outline, train_batches
from eectl.data.images import FileImages
from eectl.data.shard_files import expand_ranges
from eectl.data.shards import load_shards
from eectl.recipe.data_section import DataSection
from eectl.training.train import train
from tests.conftest import small_recipe

CPU = torch.device("cpu")
HUGE = b"\x80" + bytes(3) + (2**62).to_bytes(8, "big")  # a size in base 256


@pytest.fixture
def root(tmp_path):
    return write_shards(tmp_path / "shards")


def load(root, **changes):
    return load_data(DataSection(name="wds", root=root, **{"workers": 0, "in_memory": False, **changes}), device=CPU)


def refused(root, **changes):
    with pytest.raises(EectlError) as caught:
        load(root, **changes)
    assert "\n" not in str(caught.value)
    return str(caught.value)


def pixels_by_number(split):
    return {
        image.numpy().tobytes(): int(label)
        for image, label in zip(split.rows(torch.arange(len(split))), split.labels, strict=True)
    }


def expected(numbers):
    return {np.asarray(picture(n, n % 3)).transpose(2, 0, 1).tobytes(): n % 3 for n in numbers}


@pytest.mark.parametrize("in_memory", [True, False])
@pytest.mark.parametrize("form", [tarfile.USTAR_FORMAT, tarfile.GNU_FORMAT, tarfile.PAX_FORMAT])
def test_rows_are_those_that_were_written(tmp_path, form, in_memory):
    long = "a/" + "very-" * 40 + "long/" if form != tarfile.USTAR_FORMAT else "a/b/"
    for shard in range(2):
        write_shard(tmp_path / f"train-{shard}.tar", range(shard * 30, shard * 30 + 30), form=form, folder=long)
    write_shard(tmp_path / "test-0.tar", range(100, 112), form=form)
    data = load(tmp_path, in_memory=in_memory)
    assert data.info.classes == ("0", "1", "2") and data.info.input_shape == (3, 16, 20) and data.notes == ()
    assert {name: len(split) for name, split in data.splits.items()} == {
        "train": 48,
        "validation": 6,
        "calibration": 6,
        "test": 12,
    }
    training = [pixels_by_number(data.splits[name]) for name in ("train", "validation", "calibration")]
    assert training[0] | training[1] | training[2] == expected(range(60))
    assert pixels_by_number(data.splits["test"]) == expected(range(100, 112))
    ids = np.concatenate([split.ids for split in data.splits.values()])
    assert len(np.unique(ids)) == 72


def test_worker_processes_and_crops_give_the_same_pixels(root):
    changes = {"image_size": 12, "augment": {"resized_crop": (0.3, 1.0)}}
    alone, others = (load(root, workers=workers, **changes).splits["train"] for workers in (0, 2))
    for one, other in zip(*(train_batches(each, batch_size=7, seed=1, epoch=2) for each in (alone, others)), strict=True):
        assert torch.equal(one.inputs, other.inputs) and torch.equal(one.targets, other.targets)


def test_every_split_may_have_shards_of_its_own_and_names_may_be_given(tmp_path):
    write_shard(tmp_path / "x/part-08.tar", range(0, 30))
    write_shard(tmp_path / "x/part-09.tar", range(30, 60))
    write_shard(tmp_path / "x/part-10.tar", range(60, 72))
    write_shard(tmp_path / "x/other.tar", range(80, 92))
    write_shard(tmp_path / "x/last.tar", range(100, 112))
    shards = {"train": "part-{08..09}.tar", "validation": "part-10.tar", "calibration": "oth*.tar", "test": ["last.tar"]}
    data = load(tmp_path / "x", shards=shards)
    assert {name: len(split) for name, split in data.splits.items()} == {
        "train": 60,
        "validation": 12,
        "calibration": 12,
        "test": 12,
    }
    assert pixels_by_number(data.splits["calibration"]) == expected(range(80, 92))
    pattern = load(f"{tmp_path}/x/part-{{08..09}}.tar", test=0.2)
    assert sum(len(split) for split in pattern.splits.values()) == 60 and len(pattern.splits["test"]) == 12
    assert "validation part-10.tar" not in refused(tmp_path / "x", shards={**shards, "test": "part-10.tar"})
    assert "part-10.tar: this shard is in two splits" in refused(tmp_path / "x", shards={**shards, "test": "part-10.tar"})
    assert "part-11.tar: there is no such shard" in refused(tmp_path / "x", shards={"train": "part-{08..11}.tar"})
    assert "no shard has such a name" in refused(tmp_path / "x", shards={"train": "nothing*.tar"})
    assert "is an address" in refused(tmp_path / "x", shards={"train": "https://somewhere/part-{08..11}.tar"})
    assert "would look through all folders" in refused(tmp_path / "x", shards={"train": "**/part-*.tar"})
    assert "no train*.tar or train/*.tar in it" in refused(tmp_path / "x")


def test_ranges_are_written_out():
    assert expand_ranges("a-{098..101}.tar") == ["a-098.tar", "a-099.tar", "a-100.tar", "a-101.tar"]
    assert expand_ranges("{0..1}/{2..3}") == ["0/2", "0/3", "1/2", "1/3"] and expand_ranges("plain") == ["plain"]
    for pattern in ("{3..1}", "{0..999999999}", "{0..999}{0..999}"):
        with pytest.raises(EectlError, match=r"data.shards"):
            expand_ranges(pattern)


def test_classes_come_from_cls_or_json_and_numbers_get_the_names_of_a_file(tmp_path):
    write_shard(tmp_path / "json/train-0.tar", range(30), as_json=True)
    data = load(tmp_path / "json", target="kind")
    assert data.info.classes == ("blue", "green", "red")
    assert "no key 'label' among kind" in refused(tmp_path / "json")
    write_shard(tmp_path / "cls/train-0.tar", range(30))
    (tmp_path / "cls/classes.txt").write_text("\n".join(CLASSES))
    data = load(tmp_path / "cls")
    assert data.info.classes == CLASSES == data_info(DataSection(name="wds", root=tmp_path / "cls", workers=0)).classes
    assert pixels_by_number(data.splits["train"]).items() <= expected(range(30)).items()
    (tmp_path / "cls/classes.txt").write_text("red\ngreen")
    assert "names 2 classes, and the shards have class 2" in refused(tmp_path / "cls")


def test_the_copies_law_holds(root):
    write_shard(root / "test-001.tar", range(6))  # six pictures that are also trained on
    data = load(root)
    with pytest.raises(
        EectlError, match=r"of the 18 images in test are also in train \(train-000.tar/0000\d.png = test-001.tar/0000"
    ):
        data.copies.check()
    dropped = load(root, copies="drop", validation=0.2, calibration=0.2)
    assert sum(len(split) for split in dropped.splits.values()) == 60 - 6 + 18
    assert outline(DataSection(name="wds", root=root)).copies.overlaps == data.copies.overlaps


def cut(path, size):
    path.write_bytes(path.read_bytes()[:size])


def test_a_shard_that_is_cut_short_is_named_with_the_member_or_used_as_far_as_it_goes(root):
    path = root / "train-002.tar"
    with tarfile.open(path) as archive:
        members = archive.getmembers()
    places = {
        "in a picture": (members[20].offset_data + 10, members[20].name),
        "in a header": (members[20].offset + 100, f"the header after {members[19].name}"),
        "between members": (members[20].offset, f"the header after {members[19].name}"),
        "before a label": (members[21].offset, f"the header after {members[20].name}"),
    }
    whole = path.read_bytes()
    for size, named in places.values():
        path.write_bytes(whole[:size])
        assert f"train-002.tar: cut short at {named}; fetch it again" in refused(root)
        data = load(root, shards={"damaged": "skip"})
        assert sum(len(split) for name, split in data.splits.items() if name != "test") in (45 + 9, 45 + 10)
        assert any("train-002.tar: cut short" in note for note in data.notes)
    path.write_bytes(b"")
    assert "cut short at its first byte" in refused(root)
    assert any("the 0 rows before it are used" in note for note in load(root, shards={"damaged": "skip"}).notes)
    assert "damaged" not in load(write_shards(root.parent / "other")).notes


@pytest.mark.parametrize("form", [tarfile.USTAR_FORMAT, tarfile.GNU_FORMAT, tarfile.PAX_FORMAT])
def test_a_shard_that_is_cut_anywhere_is_whole_or_refused(tmp_path, form):
    """At each block and beside it: in headers, names that take blocks of their own, contents, padding and zeros at the end."""
    folder = "" if form == tarfile.USTAR_FORMAT else "long-" * 30 + "/"
    path = write_shard(tmp_path / "train-0.tar", range(8), form=form, folder=folder)
    whole = path.read_bytes()
    with tarfile.open(path) as archive:
        end = max(512 * -(-(each.offset_data + each.size) // 512) for each in archive.getmembers())
    spec = DataSection(name="wds", root=tmp_path)
    for size in sorted({block + more for block in range(0, len(whole) + 1, 512) for more in (-1, 0, 1, 100)}):
        if not 0 <= size <= len(whole):
            continue
        path.write_bytes(whole[:size])
        if size >= end + 512:  # a block of zeros ends an archive
            assert len(load_shards(spec, False).parts["train"].labels) == 8
            continue
        with pytest.raises(EectlError, match=r"train-0.tar: (cut short at|not a tar archive, or cut short)"):
            load_shards(spec, False)


def test_what_follows_the_end_of_an_archive_is_not_lost_in_silence(root):
    path, other = root / "train-002.tar", root / "train-003.tar"
    whole = path.read_bytes()
    path.write_bytes(whole + other.read_bytes())  # cat a.tar b.tar, of which readers see the first alone
    assert "train-002.tar: cut short at 00044.cls, where its archive ends with" in refused(root)
    with tarfile.open(other) as archive:
        place = archive.getmembers()[20].offset
    path.write_bytes(whole[:place] + bytes(2**21))  # a download that filled its file with zeros first, and was stopped
    assert "train-002.tar: cut short at 00039.cls, where its archive ends with" in refused(root)
    notes = load(root, shards={"damaged": "skip"}).notes
    assert any("00039.cls, where its archive ends with" in note and "the 9 rows before it are used" in note for note in notes)
    path.write_bytes(whole + bytes(2**19))  # a writer with large records
    assert sum(len(split) for split in load(root).splits.values()) == 72


def test_a_shard_that_becomes_shorter_while_it_is_read_is_named(root):
    data = load(root, image_size=16)
    cut(root / "test-000.tar", 3000)
    with pytest.raises(EectlError, match=r"test-000.tar: cut short at .*\.png since it was looked through"):
        data.splits["test"].rows(torch.arange(12))


def hostile(path, *members):
    with tarfile.open(path, "w") as archive:
        for name, content, fields in members:
            add(archive, name, content, **fields)


GOOD = [
    (f"{n}.{end}", content, {})
    for n in range(4)
    for end, content in (("png", encoded(picture(n, n % 3))), ("cls", b"%d" % (n % 2)))
]
BAD = {
    "link": [("a.png", b"", {"type": tarfile.SYMTYPE, "linkname": "/etc/passwd"})],
    "hard link": [("a.png", b"", {"type": tarfile.LNKTYPE, "linkname": "0.png"})],
    "device": [("a.png", b"", {"type": tarfile.CHRTYPE})],
    "pipe": [("a.png", b"", {"type": tarfile.FIFOTYPE})],
    "holes": [("a.png", b"", {"type": tarfile.GNUTYPE_SPARSE}), ("a.cls", b"1", {})],
    "no class": [("a.png", encoded(picture(0, 0)), {})],
    "two pictures": [("a.png", encoded(picture(0, 0)), {}), ("a.jpg", b"x", {}), ("a.cls", b"1", {})],
    "twice": [("a.png", encoded(picture(0, 0)), {}), ("a.PNG", b"", {}), ("a.cls", b"1", {})],
    "empty class": [("a.png", encoded(picture(0, 0)), {}), ("a.cls", b" ", {})],
    "class of control characters": [("a.png", encoded(picture(0, 0)), {}), ("a.cls", b"\x1b[31m", {})],
    "not UTF-8": [("a.png", encoded(picture(0, 0)), {}), ("a.cls", b"\xff\xfe", {})],
    "long class": [("a.png", encoded(picture(0, 0)), {}), ("a.cls", b"1" * (2**20 + 1), {})],
    "no object": [("a.png", encoded(picture(0, 0)), {}), ("a.json", b"[1, 2]", {})],
    "deep JSON": [("a.png", encoded(picture(0, 0)), {}), ("a.json", b"[" * 10**5, {})],
    "list of classes": [("a.png", encoded(picture(0, 0)), {}), ("a.json", b'{"label": [1]}', {})],
}


@pytest.mark.parametrize("kind", BAD)
def test_what_a_row_cannot_be_is_refused_by_name(tmp_path, kind):
    hostile(tmp_path / "train-0.tar", *GOOD, *BAD[kind])
    said = refused(tmp_path)
    assert "train-0.tar: a." in said or "train-0.tar: a.PNG" in said


def test_pickles_names_that_climb_and_members_of_other_types_are_let_lie(tmp_path):
    class Bomb:
        def __reduce__(self):
            return os.system, (f"touch {tmp_path}/ran",)

    others = [
        ("0.pyd", pickle.dumps(Bomb()), {}),
        ("0.pickle", pickle.dumps(Bomb()), {}),
        ("../../up.txt", b"x", {}),
        ("/abs.txt", b"x", {}),
    ]
    rows = [
        (f"/../{n}.{end}", content, {})
        for n in range(30)
        for end, content in (("png", encoded(picture(n, n % 3))), ("cls", b"%d" % (n % 3)))
    ]
    folder = [("d", b"", {"type": tarfile.DIRTYPE})]
    hostile(tmp_path / "train-0.tar", *folder, *rows, *others)
    data = load(tmp_path)
    assert (
        sum(map(len, data.splits.values())) == 30
        and not (tmp_path / "ran").exists()
        and not (tmp_path.parent / "up.txt").exists()
    )


@pytest.mark.parametrize("where", ["size of a picture", "negative size", "size of a header"])
def test_sizes_that_cannot_be_are_refused_at_once(tmp_path, where):
    hostile(tmp_path / "train-0.tar", *GOOD)
    content = bytearray((tmp_path / "train-0.tar").read_bytes())
    with tarfile.open(tmp_path / "train-0.tar") as archive:
        start = archive.getmembers()[2].offset
    content[start + 124 : start + 136] = (-512).to_bytes(12, "big", signed=True) if where == "negative size" else HUGE
    if where == "size of a header":
        content[start + 156 : start + 157] = b"x"
    content[start + 148 : start + 156] = b" " * 8
    content[start + 148 : start + 156] = b"%06o\0 " % sum(content[start : start + 512])
    (tmp_path / "train-0.tar").write_bytes(content)
    assert "train-0.tar" in refused(tmp_path)


def test_other_files_are_no_shards(tmp_path):
    path = write_shard(tmp_path / "train-0.tar", range(9))
    path.write_bytes(gzip.compress(path.read_bytes()))
    assert "compressed with gzip" in refused(tmp_path)
    path.write_bytes(b"no archive" * 100)
    assert "not a tar archive" in refused(tmp_path)
    with tarfile.open(path, "w") as archive:
        add(archive, "readme.txt", b"nothing here")
    assert "no rows in it" in refused(tmp_path)
    hostile(path, *[each for each in GOOD if each[0][0] in "02"])
    assert "the one class '0'" in refused(tmp_path)
    bomb = io.BytesIO()
    hostile_png = encoded(picture(0, 0))
    bomb.write(hostile_png[:16] + (60_000).to_bytes(4, "big") * 2 + hostile_png[24:])
    write_shard(tmp_path / "train-1.tar", range(10, 60))
    hostile(path, ("a.png", bomb.getvalue(), {}), ("a.cls", b"1", {}))
    with pytest.raises(EectlError, match=r"train-0.tar/a.png: "):
        for split in load(tmp_path, image_size=8).splits.values():
            split.rows(torch.arange(len(split)))


def test_a_class_that_was_not_trained_is_named_with_its_row(root):
    hostile(root / "test-001.tar", ("zz.png", encoded(picture(5000, 1)), {}), ("zz.cls", b"9", {}))
    assert "test-001.tar: zz.png: target 'label' is '9', which is not among the 3 classes (0, 1, 2)" in refused(root)


@pytest.mark.slow
def test_a_run_that_is_stopped_within_an_epoch_goes_on_to_the_same_weights(root, tmp_path, monkeypatch):
    """Epochs are neither passes nor whole numbers of them, rows are drawn from a buffer and crops from the files."""
    epochs = {"epoch_rows": 28, "shards": {"buffer": 7}}
    data = {"name": "wds", "root": str(root), "workers": 0, "in_memory": False, "image_size": 12, **epochs,
            "augment": {"resized_crop": [0.4, 1.0], "flip": True}}  # fmt: skip
    changes = [f"data={json.dumps(data)}", "batch_size=4", "epochs=3", "patience=3", "regime=joint", "exits.after=[1]"]
    train(small_recipe(*changes), out=tmp_path / "whole", device="cpu")
    decode, seen = FileImages.decode, []

    def stopping(self, *arguments, **more):
        seen.append(1)
        if len(seen) == 28 + 6 + 14:  # an epoch, its validation, and half of the next
            os.kill(os.getpid(), signal.SIGINT)
        return decode(self, *arguments, **more)

    monkeypatch.setattr(FileImages, "decode", stopping)
    with pytest.raises(Interrupted):
        train(small_recipe(*changes), out=tmp_path / "half", device="cpu")
    monkeypatch.undo()
    train(small_recipe(*changes), out=tmp_path / "half", device="cpu", resume=True)
    one, other = (read_any_tensors(Path(tmp_path, name, "model.safetensors"))[0] for name in ("whole", "half"))
    assert one.keys() == other.keys() and all(torch.equal(one[name], other[name]) for name in one)
