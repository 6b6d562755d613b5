"""Published image data sets that come as folders of files, each in the layout of its own archive: nothing is moved by hand.

Reads names; decoding is `images`' business. The official validation images are the test split, as in the paper.
"""

import re
import tarfile
import zlib
from pathlib import Path

from eectl.core.errors import EectlError
from eectl.core.files import read_text, reading
from eectl.data.folder import IMAGENET_MEAN, IMAGENET_STD, check_same_classes, class_files, class_names, file_part
from eectl.data.images import StoredImages
from eectl.recipe.data_section import DataSection

TINY_LAYOUT = (
    "expected, as the archive tiny-imagenet-200.zip (http://cs231n.stanford.edu/tiny-imagenet-200.zip) unpacks: "
    "tiny-imagenet-200/{wnids.txt, words.txt, train/<wnid>/images/*.JPEG, val/val_annotations.txt, val/images/*.JPEG}"
)
IMAGENET_LAYOUT = (
    "expected, as torchvision's ImageNet unpacks ILSVRC2012_img_train.tar and ILSVRC2012_img_val.tar (image-net.org): "
    "train/<wnid>/*.JPEG and val/<wnid>/*.JPEG, 1000 wnids such as n01440764"
)
IMAGENETTE_FOLDERS = {"full": "imagenette2", "320px": "imagenette2-320", "160px": "imagenette2-160"}
WNID = re.compile(r"n\d{8}")


def load_tinyimagenet(spec: DataSection, download: bool) -> StoredImages:
    """Return TinyImageNet as its archive unpacks, from `data.root` or tiny-imagenet-200 in it.

    The official validation images, which val_annotations.txt labels, are the test split.

    Classes are in the order of their sorted wnids and named by words.txt. Raises EectlError for another layout.
    """
    root = spec.folder
    root = root if (root / "wnids.txt").is_file() else root / "tiny-imagenet-200"
    for name in ("wnids.txt", "words.txt", "train", "val/val_annotations.txt", "val/images"):
        if not (root / name).exists():
            advice = "; --download cannot fetch it, torchvision does not have it" if download else ""
            raise EectlError(f"data.root is '{spec.root}': {root / name} is not there{advice}; {TINY_LAYOUT}")
    wnids = tuple(sorted(_lines(root / "wnids.txt")))
    words = dict(line.split("\t", 1) for line in _lines(root / "words.txt") if "\t" in line)
    if len(wnids) < 2:
        raise EectlError(f"{root / 'wnids.txt'}: {len(wnids)} class(es); {TINY_LAYOUT}")
    check_same_classes(root / "train", wnids, root / "wnids.txt", layout=TINY_LAYOUT)
    files = {"train": class_files(root / "train", wnids), "test": _annotated(root / "val", wnids)}
    shape = spec.channels or 3, spec.image_size or 64, spec.image_size or 64
    parts = {name: file_part(found, root, shape, spec, resize=spec.image_size is not None) for name, found in files.items()}
    return StoredImages(tuple(words.get(wnid, wnid) for wnid in wnids), TINY_MEAN, TINY_STD, parts)


def _lines(path: Path) -> list[str]:
    return [line for line in read_text(path).splitlines() if line.strip()]


def _annotated(val: Path, wnids: tuple[str, ...]) -> list[tuple[Path, int]]:
    """Return TinyImageNet's validation images, sorted by name, with the classes that val_annotations.txt gives them."""
    numbers = {wnid: number for number, wnid in enumerate(wnids)}
    files = []
    for line_number, line in enumerate(_lines(val / "val_annotations.txt"), 1):
        name, _, rest = line.partition("\t")
        wnid = rest.split("\t")[0]
        path = val / "images" / name
        with reading(path):
            is_there = name == path.name and path.is_file()
        if wnid not in numbers or not is_there:
            fault = f"{path} is not there" if wnid in numbers else f"'{wnid}' is not among the {len(wnids)} of wnids.txt"
            raise EectlError(f"{val / 'val_annotations.txt'}:{line_number}: {fault}; {TINY_LAYOUT}")
        files.append((path, numbers[wnid]))
    return sorted(files)


def load_imagenette(spec: DataSection, download: bool) -> StoredImages:
    """Return Imagenette in torchvision's layout, in the form `data.variant`; its validation images are the test split.

    `data.root` is its folder, or holds it.

    Without a variant the one that is there is taken, and 160px downloaded. Raises EectlError for another layout.
    """
    folder = _imagenette_folder(spec, download)
    layout = f"expected: {folder.name}/{{train,val}}/<wnid>/*.JPEG with the wnids {', '.join(IMAGENETTE)}"
    return _wnid_folders(folder, tuple(IMAGENETTE), tuple(IMAGENETTE.values()), spec, layout=layout)


def _imagenette_folder(spec: DataSection, download: bool) -> Path:
    root = spec.folder
    if root.name in IMAGENETTE_FOLDERS.values() and spec.variant is None:
        return root
    names = [IMAGENETTE_FOLDERS[spec.variant]] if spec.variant else list(IMAGENETTE_FOLDERS.values())
    root = root.parent if root.name in names else root
    if download and not any((root / name).is_dir() for name in names):
        _download_imagenette(spec.variant or "160px", root)
    there = [root / name for name in names if (root / name).is_dir()]
    if not there:
        layout = f"expected in it: {' or '.join(names)}, as the archive unpacks, with {{train,val}}/<wnid>/*.JPEG"
        raise EectlError(f"data.root is '{spec.root}': no Imagenette there; {layout}; or give --download")
    if len(there) > 1:
        found = " and ".join(folder.name for folder in there)
        raise EectlError(f"data.root is '{spec.root}': holds {found}; set data.variant to one of {', '.join(IMAGENETTE_FOLDERS)}")
    return there[0]


def _download_imagenette(variant: str, root: Path) -> None:
    """Let torchvision download Imagenette into its own layout below `root`."""
    from torchvision import datasets

    try:
        root.mkdir(parents=True, exist_ok=True)
        datasets.Imagenette(root, size=variant, download=True)
    except (RuntimeError, OSError) as error:
        raise _not_fetched("imagenette", root, error) from error


def download_archive(name: str, url: str, root: Path, *, file: str, checksum: str) -> None:
    """Download a published archive and unpack it below `root`, and nowhere else."""
    download_file(name, url, root, file=file, checksum=checksum)
    try:
        with tarfile.open(root / file) as archive:
            archive.extractall(root, filter="data")
    except (OSError, EOFError, tarfile.TarError, zlib.error) as error:
        raise EectlError(f"{root / file}: cannot be unpacked ({error}); take it away and try again") from error


def download_file(name: str, url: str, folder: Path, *, file: str, checksum: str) -> None:
    """Let torchvision download a published file into `folder` and compare its MD5 checksum; one that is there stays."""
    from torchvision.datasets.utils import download_url

    try:
        folder.mkdir(parents=True, exist_ok=True)
        download_url(url, folder, filename=file, md5=checksum)
    except (RuntimeError, OSError, ValueError) as error:
        raise _not_fetched(name, folder, error) from error


def _not_fetched(name: str, folder: Path, error: Exception) -> EectlError:
    reason = " ".join(str(error).split())
    return EectlError(f"{name} cannot be downloaded into {folder} ({reason}); put it there by hand, or try again")


def load_imagenet(spec: DataSection, download: bool) -> StoredImages:
    """Return ImageNet-1k as torchvision's ImageNet unpacks it into `data.root`; its validation images are the test split.

    Classes are named by wnid.

    Its meta.bin is a pickle and is not read. Raises EectlError for another layout or number of classes.
    """
    root = spec.folder
    train = root / "train"
    if not train.is_dir():
        advice = "; --download cannot fetch it, image-net.org asks for an account" if download else ""
        raise EectlError(f"data.root is '{spec.root}': {train} is not there{advice}; {IMAGENET_LAYOUT}")
    wnids = tuple(name for name in class_names(train) if WNID.fullmatch(name))
    if len(wnids) != 1000:
        fault = f"{len(wnids)} class folders named by a wnid, not 1000 (for some of them take data.name=folder)"
        raise EectlError(f"{train}: {fault}; {IMAGENET_LAYOUT}")
    return _wnid_folders(root, wnids, wnids, spec, layout=IMAGENET_LAYOUT)


def _wnid_folders(
    root: Path, wnids: tuple[str, ...], classes: tuple[str, ...], spec: DataSection, *, layout: str
) -> StoredImages:
    """Return {train,val}/<wnid>/* with images of any size, which become squares of 224 unless `image_size` says otherwise."""
    shape = spec.channels or 3, spec.image_size or 224, spec.image_size or 224
    parts = {}
    for name, folder in {"train": root / "train", "test": root / "val"}.items():
        if not folder.is_dir():
            raise EectlError(f"{folder} is not there; {layout}")
        check_same_classes(folder, wnids, root, layout=layout)
        parts[name] = file_part(class_files(folder, wnids), root, shape, spec, resize=True)
    return StoredImages(classes, IMAGENET_MEAN, IMAGENET_STD, parts)


TINY_MEAN, TINY_STD = (0.4802, 0.4481, 0.3975), (0.2302, 0.2265, 0.2262)  # the authors' datasets.py
IMAGENETTE = {  # wnid → name, as torchvision's
    "n01440764": "tench",
    "n02102040": "English springer",
    "n02979186": "cassette player",
    "n03000684": "chain saw",
    "n03028079": "church",
    "n03394916": "French horn",
    "n03417042": "garbage truck",
    "n03425413": "gas pump",
    "n03445777": "golf ball",
    "n03888257": "parachute",
}
