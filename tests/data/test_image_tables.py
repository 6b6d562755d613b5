"""The datasets library's images and texts and images in Parquet, against its own decoding and the same rows in files."""

import json
import socket
from pathlib import Path

import datasets
import numpy as np
import pyarrow
import pytest
import torch
from PIL import Image
from pyarrow import parquet
from toy_pictures import CLASSES, encoded, picture
from toy_text import make_rows, write_csv, write_tokenizer

from eectl.core.errors import EectlError
from eectl.data import data_info, load_data, outline
from eectl.recipe.data_section import DataSection

CPU = torch.device("cpu")
MOODS = ("down", "level", "up")
FEATURES = {"photo": datasets.Image(), "colour": datasets.ClassLabel(names=list(CLASSES))}


def table(numbers, **more):
    columns = {"photo": [picture(number, number % 3) for number in numbers], "colour": [number % 3 for number in numbers]}
    return datasets.Dataset.from_dict({**columns, **more}, features=datasets.Features(FEATURES))


@pytest.fixture(scope="module", autouse=True)
def _silence():
    datasets.disable_progress_bars()
    yield
    datasets.enable_progress_bars()


@pytest.fixture(scope="module")
def rows():
    return datasets.DatasetDict({"train": table(range(60)), "test": table(range(1000, 1012))})


@pytest.fixture(scope="module")
def saved(rows, tmp_path_factory):
    """What the library writes of the same rows: save_to_disk, Parquet in parts, Arrow files of its cache, one split alone."""
    root = tmp_path_factory.mktemp("saved")
    rows.save_to_disk(str(root / "both"))
    rows["train"].save_to_disk(str(root / "alone"))
    for name in ("parts", "parts/data"):
        (root / name).mkdir()
    for part in range(2):
        half = rows["train"].select(range(30 * part, 30 * part + 30))
        half.to_parquet(str(root / f"parts/data/train-{part:05}-of-00002.parquet"))
    rows["test"].to_parquet(str(root / "parts/data/test-00000-of-00001.parquet"))
    (root / "arrow").mkdir()
    for name in rows:
        with pyarrow.ipc.new_stream(str(root / f"arrow/toy-{name}.arrow"), rows[name].data.table.schema) as writer:
            writer.write_table(rows[name].data.table)
    (root / "own").mkdir()
    rows["train"].to_parquet(str(root / "own/train.parquet"))
    rows["test"].to_parquet(str(root / "own/test.parquet"))
    return root


def load(name, **changes):
    return load_data(DataSection(name=name, **{"workers": 0, **changes}), device=CPU)


def refused(name, **changes):
    with pytest.raises(EectlError) as caught:
        load(name, **changes)
    assert "\n" not in str(caught.value)
    return str(caught.value)


def pixels(split):
    return {
        image.numpy().tobytes(): int(label)
        for image, label in zip(split.rows(torch.arange(len(split))), split.labels, strict=True)
    }


def decoded(part):
    return {np.asarray(row["photo"]).transpose(2, 0, 1).tobytes(): row["colour"] for row in part}


@pytest.mark.parametrize("in_memory", [True, False])
@pytest.mark.parametrize("form", ["both", "parts", "arrow", "own"])
def test_rows_are_those_that_the_library_reads(rows, saved, form, in_memory):
    name = {"name": "folder", "root": saved / form} if form == "own" else {"name": f"hfds/{saved / form}"}
    data = load(**name, in_memory=in_memory)
    assert data.info.classes == CLASSES and data.info.input_shape == (3, 16, 20) and data.notes == ()
    assert {name: len(split) for name, split in data.splits.items()} == {
        "train": 48,
        "validation": 6,
        "calibration": 6,
        "test": 12,
    }
    training = [pixels(data.splits[name]) for name in ("train", "validation", "calibration")]
    assert training[0] | training[1] | training[2] == decoded(rows["train"])
    assert pixels(data.splits["test"]) == decoded(rows["test"])
    assert len(np.unique(np.concatenate([split.ids for split in data.splits.values()]))) == 72
    assert data_info(DataSection(**name)) == data.info
    assert outline(DataSection(**name)).labels["train"].tolist() == data.splits["train"].labels.tolist()


def test_a_single_split_is_for_training_and_rows_that_were_chosen_stay_so(rows, saved, tmp_path):
    data = load(f"hfds/{saved / 'alone'}", test=0.2)
    assert {name: len(split) for name, split in data.splits.items()} == {
        "train": 36,
        "validation": 6,
        "calibration": 6,
        "test": 12,
    }
    chosen = rows["train"].shuffle(seed=1).select(range(40))
    datasets.DatasetDict({"train": chosen}).save_to_disk(str(tmp_path / "chosen"))
    data = load(f"hfds/{tmp_path / 'chosen'}")
    found = [pixels(split) for split in data.splits.values()]
    assert found[0] | found[1] | found[2] == decoded(chosen)


def odd_pictures(count):
    """Transparent, turned, 16 bits deep and grey pictures, as the bytes of their files, with their endings."""
    for number in range(count):
        image = picture(number, number % 3, size=(24, 24))
        kind = number % 4
        if kind == 0:
            image.putalpha(Image.fromarray(np.full((24, 24), 128, dtype=np.uint8)))
            yield encoded(image), "png"
        elif kind == 1:
            exif = Image.Exif()
            exif[0x0112] = 6
            yield encoded(image, "JPEG", exif=exif), "jpg"
        elif kind == 2:
            deep = np.random.default_rng(number).integers(0, 65536, (24, 24), dtype=np.uint16)
            yield encoded(Image.fromarray(deep)), "png"
        else:
            yield encoded(image.convert("L"), "WEBP", lossless=True), "webp"


def test_odd_pictures_become_what_they_become_as_files(tmp_path):
    cells = list(odd_pictures(40))
    for number, (content, ending) in enumerate(cells):
        path = tmp_path / f"files/{'ab'[number % 5 > 2]}/{number:02}.{ending}"
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_bytes(content)
    labels = ["ab"[number % 5 > 2] for number in range(40)]
    parquet.write_table(pyarrow.table({"image": [content for content, _ in cells], "label": labels}), tmp_path / "rows.parquet")
    changes = {"image_size": 12, "background": "black", "in_memory": True}
    files, cells = (load("folder", root=tmp_path / root, **changes) for root in ("files", "rows.parquet"))
    assert cells.info.classes == files.info.classes == ("a", "b")
    both = [{}, {}]
    for found, data in zip(both, (files, cells), strict=True):
        for split in data.splits.values():
            found |= pixels(split)
    assert both[0] == both[1] and len(both[0]) == 40


def write(path, images, labels, **more):
    path.parent.mkdir(parents=True, exist_ok=True)
    parquet.write_table(pyarrow.table({"image": images, "label": labels, **more}), path)
    return path


def test_columns_are_found_or_named(tmp_path):
    images = [encoded(picture(number, number % 3)) for number in range(30)]
    labels = [number % 3 for number in range(30)]
    path = write(tmp_path / "a.parquet", images, labels, depth=images, kind=labels)
    assert "2 columns that may hold the images ('image', 'depth'); set data.image" in refused("folder", root=path)
    assert load("folder", root=path, image="depth", target="kind").info.classes == ("0", "1", "2")
    assert "no column 'lable'" in refused("folder", root=path, image="image", target="lable")
    assert "column 'kind' holds int64, not the bytes" in refused("folder", root=path, image="kind")
    assert "no column 'imgae' (did you mean 'image'?)" in refused("folder", root=path, image="imgae")
    parquet.write_table(pyarrow.table({"image": images, "a": labels, "b": labels}), path)
    assert "no column 'label', and 2 others may be the target" in refused("folder", root=path)
    parquet.write_table(pyarrow.table({"a": labels, "label": labels}), path)
    assert "no column of images among 'a', 'label'" in refused("folder", root=path)
    with pytest.raises(EectlError, match=r"no train.parquet in"):
        load("folder", root=tmp_path, target="kind")


def test_cells_that_will_not_do_are_named_with_their_rows(saved, tmp_path):
    good, labels = [encoded(picture(number, number % 2)) for number in range(30)], [number % 2 for number in range(30)]
    path = tmp_path / "train.parquet"
    write(path, [*good[:-1], None], labels)
    assert "train.parquet: row 30: no picture in column 'image'" in refused("folder", root=path)
    named = pyarrow.array([{"bytes": None, "path": "/etc/passwd"}, *({"bytes": each, "path": "x"} for each in good[1:])])
    write(path, named, labels)
    assert "row 1: no picture in column 'image', at most a path, and no file is opened" in refused("folder", root=path)
    write(path, [b"no picture", *good[1:]], labels)
    assert "train.parquet: row 1: not an image" in refused("folder", root=path, image_size=8)
    write(path, good, [0] * 30)
    assert "column 'label' has the one class '0'" in refused("folder", root=path)
    write(path, good, [None, *labels[1:]])
    assert "row 1: column 'label' is empty" in refused("folder", root=path)
    write(path, good, labels)
    write(tmp_path / "test.parquet", good[:4], [0, 1, 7, 0])
    assert "test.parquet: row 3: column 'label' is '7', which is not among the 2" in refused("folder", root=tmp_path)
    (tmp_path / "train").mkdir()
    assert "train.parquet and train/ mean the same split" in refused("folder", root=tmp_path)


def test_a_split_whose_classes_are_hidden_is_left_out_with_a_note_and_unused_classes_are_named(tmp_path):
    features = datasets.Features({"image": datasets.Image(), "label": datasets.ClassLabel(names=["a", "none", "b"])})

    def part(numbers, labels):
        return datasets.Dataset.from_dict({"image": [picture(n, 0) for n in numbers], "label": labels}, features=features)

    hidden = datasets.DatasetDict({"train": part(range(30), [0, 2] * 15), "test": part(range(90, 94), [-1] * 4)})
    hidden.save_to_disk(str(tmp_path / "hidden"))
    data = load(f"hfds/{tmp_path / 'hidden'}")
    assert data.info.classes == ("a", "b") and "test" not in data.splits
    assert any("the classes of its test split are not told" in note for note in data.notes)
    assert any("no training row is of class none" in note for note in data.notes)
    assert data.splits["train"].labels.unique().tolist() == [0, 1]
    some = datasets.DatasetDict({"train": part(range(30), [0, 2] * 15), "test": part(range(90, 94), [0, -1, 2, 0])})
    some.save_to_disk(str(tmp_path / "some"))
    assert "test: row 2: column 'label' is not told" in refused(f"hfds/{tmp_path / 'some'}")


def test_the_copies_law_holds(tmp_path):
    both = datasets.DatasetDict({"train": table(range(60)), "test": table([*range(1000, 1006), 1, 2, 3])})
    both.save_to_disk(str(tmp_path))
    for in_memory in (True, False):
        with pytest.raises(EectlError, match=r"of the 9 images in test are also in train"):
            load(f"hfds/{tmp_path}", in_memory=in_memory).copies.check()


def test_damaged_files_are_one_line(saved, tmp_path):
    path = tmp_path / "train.parquet"
    whole = (saved / "own/train.parquet").read_bytes()
    for content in (whole[: len(whole) // 2], b"", b"PAR1" + b"x" * 50 + b"PAR1", whole[:5000] + bytes(4000) + whole[9000:]):
        path.write_bytes(content)
        assert "train.parquet" in refused("folder", root=tmp_path)
    big = [bytes(2**20)] * 200
    parquet.write_table(pyarrow.table({"image": big, "label": [0, 1] * 100}), path)
    assert "over 16 times the bytes of the file" in refused("folder", root=tmp_path)
    stream = (saved / "arrow/toy-train.arrow").read_bytes()
    (tmp_path / "arrow").mkdir()
    for content in (stream[: len(stream) // 2], b"", b"ARROW1" + stream):
        (tmp_path / "arrow/toy-train.arrow").write_bytes(content)
        assert "toy-train.arrow: not Arrow, or cut short" in refused(f"hfds/{tmp_path / 'arrow'}")


def cut_stream(path, batches):
    """Cut a stream of Arrow's after so many batches, between two messages."""
    content = path.read_bytes()
    source = pyarrow.py_buffer(content)
    file = pyarrow.BufferReader(source)
    reader = pyarrow.ipc.open_stream(file)
    for _ in range(batches):
        reader.read_next_batch()
    assert (
        pyarrow.ipc.open_stream(content[: file.tell()]).read_all().num_rows < pyarrow.ipc.open_stream(source).read_all().num_rows
    )
    path.write_bytes(content[: file.tell()])


def test_a_stream_that_is_cut_between_batches_is_no_shorter_data_set(rows, saved, tmp_path, monkeypatch):
    """The library itself reads the batches that are left, in silence."""
    many = datasets.concatenate_datasets([rows["train"]] * 40)  # over 1,000 rows: several batches
    datasets.DatasetDict({"train": many}).save_to_disk(str(tmp_path / "saved"))
    path = tmp_path / "saved/train/data-00000-of-00001.arrow"
    cut_stream(path, 1)
    assert "data-00000-of-00001.arrow: not Arrow, or cut short" in refused(f"hfds/{tmp_path / 'saved'}")
    (tmp_path / "plain").mkdir()
    with pyarrow.ipc.new_stream(str(tmp_path / "plain/train.arrow"), rows["train"].data.table.schema) as writer:
        writer.write_table(rows["train"].data.table, max_chunksize=20)
    whole = (tmp_path / "plain/train.arrow").read_bytes()
    assert load(f"hfds/{tmp_path / 'plain'}").info.classes == CLASSES
    cut_stream(tmp_path / "plain/train.arrow", 2)
    assert "train.arrow: not Arrow, or cut short" in refused(f"hfds/{tmp_path / 'plain'}")
    for size in range(len(whole) - 8, len(whole)):
        (tmp_path / "plain/train.arrow").write_bytes(whole[:size])
        assert "train.arrow: not Arrow, or cut short" in refused(f"hfds/{tmp_path / 'plain'}")


@pytest.mark.parametrize("share", [0.02, 0.3, 0.6, 0.95, 0.999])
def test_a_parquet_file_that_is_cut_anywhere_is_named(saved, tmp_path, share):
    whole = (saved / "own/train.parquet").read_bytes()
    (tmp_path / "train.parquet").write_bytes(whole[: int(share * len(whole))])
    for place in ({"name": "folder", "root": tmp_path}, {"name": f"hfds/{tmp_path}"}):
        assert "train.parquet: not Parquet, or cut short" in refused(**place)


def test_a_part_that_is_missing_is_named(saved, tmp_path):
    for number in (0, 2):
        path = tmp_path / f"train-{number:05}-of-00003.parquet"
        path.write_bytes((saved / "own/train.parquet").read_bytes())
    assert "train-00000-of-00003.parquet: one of 3 parts, and part 1 is missing" in refused(f"hfds/{tmp_path}")
    assert "one of 3 parts, and part 1 is missing" in refused("folder", root=tmp_path)


def test_offsets_that_point_anywhere_are_refused_before_a_cell_is_read(tmp_path):
    offsets = np.array([0, 10, 2**31 - 100, 30], dtype=np.int32)
    cells = pyarrow.Array.from_buffers(pyarrow.binary(), 3, [None, pyarrow.py_buffer(offsets), pyarrow.py_buffer(bytes(40))])
    batch = pyarrow.record_batch([cells, pyarrow.array(["a", "b", "a"])], names=["image", "label"])
    with pyarrow.ipc.new_stream(str(tmp_path / "train.arrow"), batch.schema) as writer:
        writer.write_batch(batch)
    assert "train.arrow: not Arrow, or cut short" in refused(f"hfds/{tmp_path}")


def test_a_description_that_names_other_files_or_is_damaged_is_refused(rows, saved, tmp_path):
    rows.save_to_disk(str(tmp_path / "x"))
    path = tmp_path / "x/train/state.json"
    state = json.loads(path.read_text())
    for files in ([{"filename": "../../both/train/data-00000-of-00001.arrow"}], [], None, [{"filename": "/etc/passwd"}]):
        path.write_text(json.dumps({**state, "_data_files": files}))
        assert "names no files, or others than those beside it" in refused(f"hfds/{tmp_path / 'x'}")
    path.write_text("{")
    assert "state.json" in refused(f"hfds/{tmp_path / 'x'}")
    assert "no such folder" in refused(f"hfds/{tmp_path / 'y'}")
    (tmp_path / "y").mkdir()
    assert "no data set in it (nothing); expected: dataset_dict.json" in refused(f"hfds/{tmp_path / 'y'}")
    assert "data.variant is 'fine', and hfds/" in refused(f"hfds/{saved / 'both'}", variant="fine")


def test_what_the_library_wrote_beside_the_columns_may_be_damaged(tmp_path):
    images, labels = [encoded(picture(number, number % 2)) for number in range(30)], [number % 2 for number in range(30)]
    for about in (b"{", b"[]", b'{"info": 3}', b"[" * 10**5, b"\xff"):
        meta = pyarrow.table({"image": images, "label": labels}).replace_schema_metadata({b"huggingface": about})
        parquet.write_table(meta, tmp_path / "train.parquet")
        assert "beside the columns is damaged" in refused("folder", root=tmp_path)
    names = b'{"info": {"features": {"label": {"_type": "ClassLabel", "names": ["one"]}}}}'
    parquet.write_table(meta.replace_schema_metadata({b"huggingface": names}), tmp_path / "train.parquet")
    assert "row 2: column 'label' is 1, and its 1 classes count from 0" in refused("folder", root=tmp_path)


def test_the_network_is_not_used_unless_a_download_is_asked_for(monkeypatch, tmp_path):
    used = []

    def refuse(*address):
        used.append(address)
        raise OSError("no network in this test")

    monkeypatch.setattr(socket.socket, "connect", refuse)
    monkeypatch.setattr(socket, "getaddrinfo", refuse)
    before = datasets.config.HF_HUB_OFFLINE
    assert "is not in the cache of the datasets library" in refused("hfds/nobody/nothing-of-that-name")
    assert "give --download" in refused("hfds/nobody/nothing-of-that-name")
    assert before == datasets.config.HF_HUB_OFFLINE and not used
    monkeypatch.chdir(tmp_path)
    (tmp_path / "nobody/here").mkdir(parents=True)
    (tmp_path / "nobody/here/here.py").write_text("open('ran', 'w')")
    assert "hfds/./nobody/here names it" in refused("hfds/nobody/here")
    assert not (tmp_path / "ran").exists()


def test_a_data_set_in_the_librarys_cache_is_read_without_the_network(rows, saved, monkeypatch, tmp_path):
    """The cache as the library lays it out for OWNER/NAME: made by its own Parquet reader, and put under that name."""
    files = {name: str(saved / f"own/{name}.parquet") for name in rows}
    made = datasets.load_dataset_builder("parquet", data_files=files, cache_dir=str(tmp_path / "made"))
    made.download_and_prepare()
    place = tmp_path / "cache/somebody___colours/default/0.0.0/0123456789abcdef"
    place.parent.mkdir(parents=True)
    Path(made.cache_dir).rename(place)
    for path in place.glob("parquet-*.arrow"):
        path.rename(path.with_name(path.name.replace("parquet-", "colours-")))
    about = json.loads((place / "dataset_info.json").read_text())
    about |= {"builder_name": "parquet", "dataset_name": "colours", "config_name": "default"}
    (place / "dataset_info.json").write_text(json.dumps(about))
    monkeypatch.setattr(datasets.config, "HF_DATASETS_CACHE", tmp_path / "cache")
    monkeypatch.setattr(socket.socket, "connect", lambda *_: pytest.fail("the network was used"))
    data = load("hfds/somebody/colours", in_memory=True)
    found = [pixels(data.splits[name]) for name in ("train", "validation", "calibration")]
    assert found[0] | found[1] | found[2] == decoded(rows["train"])
    path = place / "colours-train.arrow"
    path.write_bytes(path.read_bytes()[:-8])
    assert "colours-train.arrow: not Arrow, or cut short" in refused("hfds/somebody/colours")


@pytest.fixture(scope="module")
def texts(tmp_path_factory):
    """The same texts as CSV and as the library saves them."""
    root = tmp_path_factory.mktemp("texts")
    kinds = {
        "sentence": datasets.Value("string"),
        "score": datasets.Value("float32"),
        "mood": datasets.ClassLabel(names=list(MOODS)),
    }
    both = {}
    for name, count, seed in (("train", 120, 0), ("test", 30, 1)):
        made = make_rows(count, seed=seed)
        write_csv(root / f"{name}.csv", made)
        columns = {
            "sentence": [row["text"] for row in made],
            "score": [row["score"] for row in made],
            "mood": [row["mood"] for row in made],
        }
        both[name] = datasets.Dataset.from_dict(columns, features=datasets.Features(kinds))
    datasets.DatasetDict(both).save_to_disk(str(root / "saved"))
    write_tokenizer(root / "tokenizer")
    return root


def tokens(data):
    return {name: (split.labels.tolist(), split.rows(torch.arange(len(split))).tolist()) for name, split in data.splits.items()}


@pytest.mark.parametrize("task", ["classification", "regression"])
def test_texts_are_those_of_a_table_with_the_same_rows(texts, task):
    rest = {
        "tokenizer": str(texts / "tokenizer"),
        "copies": "keep",
        "task": task,
        "target": "score" if task == "regression" else "mood",
    }
    library = load_data(DataSection(name=f"hfds/{texts / 'saved'}", text="sentence", **rest), device=CPU)
    csv = load_data(DataSection(name="text", root=texts, **rest), device=CPU)
    assert tokens(library) == tokens(csv) and library.info.classes == csv.info.classes
    found = load_data(DataSection(name=f"hfds/{texts / 'saved'}", kind="texts", **{**rest, "target": "label"}), device=CPU)
    assert tokens(found) == tokens(library)
    assert data_info(DataSection(name=f"hfds/{texts / 'saved'}", kind="texts", **rest)).classes == csv.info.classes


def test_texts_where_images_were_meant_and_the_other_way_round(texts, saved):
    said = refused(f"hfds/{texts / 'saved'}")
    assert "no column of images among 'sentence', 'score', 'mood'" in said and "set data.kind=texts" in said
    with pytest.raises(EectlError, match="no column 'text', and 0 others hold texts"):
        load_data(DataSection(name=f"hfds/{saved / 'both'}", kind="texts", tokenizer=str(texts / "tokenizer")), device=CPU)
    with pytest.raises(EectlError, match=r"no column 'sentance'.*did you mean 'sentence'"):
        load_data(DataSection(name=f"hfds/{texts / 'saved'}", text="sentance", tokenizer=str(texts / "tokenizer")), device=CPU)
