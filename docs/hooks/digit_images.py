"""Writes a few of scikit-learn's digits as PNG files: something to classify where there are no pictures."""

import sys
from pathlib import Path

import numpy as np
from PIL import Image
from sklearn.datasets import load_digits


def write(folder: Path, *, count: int = 10) -> list[Path]:
    """Write the first `count` digits into `folder` as NUMBER-DIGIT.png; returns the paths."""
    folder.mkdir(parents=True, exist_ok=True)
    bundle = load_digits()
    paths = [folder / f"{number}-{label}.png" for number, label in enumerate(bundle.target[:count])]
    for path, pixels in zip(paths, bundle.images, strict=False):
        Image.fromarray(np.rint(pixels * (255 / 16)).astype(np.uint8)).save(path)
    return paths


if __name__ == "__main__":
    write(Path(sys.argv[1]))
