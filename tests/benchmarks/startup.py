"""How long does the program take to start, and what does each command import? Beside typer, torch and earlyon alone."""

import sys
import tempfile
from functools import partial
from importlib.util import find_spec
from pathlib import Path

from measuring import EECTL, interleave, options, report, run, run_child, summary

HEAVY = {"torch", "torchvision", "timm", "transformers", "fvcore", "sklearn", "scipy", "datasets", "matplotlib"}
TAB = {"_EECTL_COMPLETE": "complete_bash", "COMP_WORDS": "eectl train fash", "COMP_CWORD": "2"}


def main(arguments: list[str] | None = None) -> dict:
    chosen = options(__doc__.splitlines()[0], arguments, repeats=10)
    with tempfile.TemporaryDirectory() as name:
        folder = Path(name)
        small = ["--regime", "joint", "--epochs", "1", "--device", "cpu", "--set", "data.limit=100", "-q", "-o", "run"]
        run([sys.executable, "-m", "eectl", "train", "digits", *small], cwd=folder)
        checkpoint = str(folder / "run" / "model.safetensors")
        lines: dict[str, tuple[list[str], dict[str, str]]] = {
            "eectl --version": (["--version"], {}),
            "eectl --help": (["--help"], {}),
            "eectl train --help": (["train", "--help"], {}),
            "completion": ([], TAB),
            "eectl recipes": (["recipes"], {}),
            "eectl info CKPT": (["info", checkpoint], {}),
            "eectl flops CKPT": (["flops", checkpoint], {}),
            "eectl flops digits": (["flops", "digits"], {}),
            "eectl flops fashion-mnist-vit-t": (["flops", "fashion-mnist-vit-t"], {}),
        }
        if chosen.quick:
            lines = {key: lines[key] for key in ("eectl --help", "eectl info CKPT")}
        imports = {}
        for key, (words, variables) in lines.items():
            imports[key] = sorted(HEAVY.intersection(run_child(EECTL, words, **variables)["modules"]))
        functions = {
            key: partial(run, [sys.executable, "-m", "eectl", *words], **variables) for key, (words, variables) in lines.items()
        }
        others = {"python": "pass", "import typer": "import typer", "import torch": "import torch"}
        if find_spec("earlyon"):
            others["earlyon --help"] = "import sys; sys.argv = ['earlyon', '--help']; from earlyon.cli import main; main()"
        functions |= {key: partial(run, [sys.executable, "-c", code]) for key, code in others.items()}
        samples = interleave(functions, repeats=chosen.repeats)
    return report("startup", chosen, {"seconds": {key: summary(each) for key, each in samples.items()}, "imports": imports})


if __name__ == "__main__":
    main()
