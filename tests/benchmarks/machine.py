"""What a benchmark says of the machine and the versions, without names of hosts, people or folders. No torch at import."""

import os
import platform
import subprocess
import sys
from importlib import metadata
from pathlib import Path
from typing import Any

from eectl import __version__

PACKAGES = ("torch", "torchvision", "timm", "transformers", "typer", "numpy", "earlyon")


def machine() -> dict[str, Any]:
    """The machine and the versions; of torch's threads and GPU where the benchmark has imported torch."""
    found: dict[str, Any] = {
        "cpu": _cpu_model(),
        "cores": len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count(),
        "ram_gb": round(os.sysconf("SC_PAGE_SIZE") * os.sysconf("SC_PHYS_PAGES") / 1e9, 1),
        "system": f"{platform.system()} {platform.machine()}",
        "python": platform.python_version(),
        "versions": {name: _version(name) for name in PACKAGES if _version(name)},
        "eectl": _eectl_version(),
        "load": round(os.getloadavg()[0], 2),
    }
    torch = sys.modules.get("torch")
    if torch is not None:
        found["threads"] = torch.get_num_threads()
        found["gpu"] = torch.cuda.get_device_name() if torch.cuda.is_available() else None
    return found


def _cpu_model() -> str:
    try:
        lines = Path("/proc/cpuinfo").read_text().splitlines()
    except OSError:
        return platform.processor()
    return next((line.split(":", 1)[1].strip() for line in lines if line.startswith("model name")), platform.machine())


def _version(name: str) -> str | None:
    try:
        return metadata.version(name)
    except metadata.PackageNotFoundError:
        return None


def _eectl_version() -> str:
    folder = str(Path(__file__).parent)
    line = ["git", "-C", folder, "describe", "--always", "--dirty"]
    commit = subprocess.run(line, capture_output=True, text=True)
    return f"{__version__} {commit.stdout.strip()}".strip()
