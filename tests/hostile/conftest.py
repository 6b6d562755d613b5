"""The world of real files, made once for all tests of this folder, whichever process runs them."""

import fcntl
from pathlib import Path

import pytest
from hostile.world import import_all, make_world


@pytest.fixture(scope="session")
def world(tmp_path_factory: pytest.TempPathFactory, request: pytest.FixtureRequest) -> Path:
    import_all()
    shared = tmp_path_factory.getbasetemp()
    if hasattr(request.config, "workerinput"):
        shared = shared.parent
    folder = shared / "hostile-world"
    with open(shared / "hostile-world.lock", "w") as lock:
        fcntl.flock(lock, fcntl.LOCK_EX)
        if not folder.exists():
            made = shared / "hostile-world-in-the-making"
            made.mkdir()
            make_world(made)
            made.rename(folder)
    return folder
