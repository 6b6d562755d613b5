"""Starting from a checkpoint on the hub: a server of our own with the hub's answers, its library's cache, and offline."""

import hashlib
from collections import Counter
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from threading import Thread

import pytest
from huggingface_hub import constants
from running import eectl, refused

from eectl.core.errors import EectlError
from eectl.core.hub import HubFile, fetch, local_path, parse_address
from eectl.models.checkpoint import read_about
from eectl.recipe.reading import dump_recipe, make_recipe, parse_yaml
from eectl.training.find_recipe import find_recipe
from eectl.training.train import train
from tests.training.test_train import same, weights

COMMITS = {"main": "1" * 40, "v1": "2" * 40}
COMMITS |= {commit: commit for commit in COMMITS.values()}


@pytest.fixture(scope="module")
def made(tmp_path_factory):
    from tests.conftest import small_recipe

    folder = tmp_path_factory.mktemp("made") / "run"
    train(small_recipe("regime=disjoint", "phase=1", "epochs=1"), out=folder, device="cpu", quiet=True)
    return folder / "model.safetensors"


@pytest.fixture
def hub(made, tmp_path, monkeypatch):
    """A hub with the repository lab/net, of which each revision has model.safetensors; what was asked of it, by method."""
    asked, content = Counter(), made.read_bytes()

    class Handler(BaseHTTPRequestHandler):
        def answer(self, *, body):
            asked[self.command] += 1
            _, owner, name, _, revision, *rest = self.path.partition("?")[0].split("/")
            fault = ""
            if (owner, name) != ("lab", "net"):
                fault = "RepoNotFound"
            elif revision not in COMMITS:
                fault = "RevisionNotFound"
            elif rest != ["model.safetensors"]:
                fault = "EntryNotFound"
            self.send_response(404 if fault else 200)
            self.send_header("X-Error-Code", fault) if fault else None
            self.send_header("X-Repo-Commit", COMMITS.get(revision, "1" * 40))
            self.send_header("ETag", f'"{hashlib.sha256(content).hexdigest()}"')
            self.send_header("Content-Length", "0" if fault else str(len(content)))
            self.end_headers()
            if body and not fault:
                self.wfile.write(content)

        def do_HEAD(self):
            self.answer(body=False)

        def do_GET(self):
            self.answer(body=True)

        def log_message(self, *_):
            pass

    server = ThreadingHTTPServer(("127.0.0.1", 0), Handler)
    Thread(target=server.serve_forever, daemon=True).start()
    monkeypatch.setattr(constants, "ENDPOINT", f"http://127.0.0.1:{server.server_port}")
    monkeypatch.setattr(constants, "HUGGINGFACE_CO_URL_TEMPLATE", constants.ENDPOINT + "/{repo_id}/resolve/{revision}/{filename}")
    monkeypatch.setattr(constants, "HF_HUB_CACHE", str(tmp_path / "cache"))
    monkeypatch.setattr(constants, "HF_HUB_OFFLINE", False)
    yield asked
    server.shutdown()
    server.server_close()


def test_addresses():
    assert parse_address("hf://lab/net") == HubFile("lab/net", "model.safetensors", None)
    assert parse_address("hf://lab/net/a/b.safetensors@refs/pr/1") == HubFile("lab/net", "a/b.safetensors", "refs/pr/1")
    for text in (
        "hf://lab",
        "hf://lab/net/../x.safetensors",
        "hf://lab/net/x.bin",
        "hf://lab/net@",
        "hf://l b/net",
        "hf:///lab/net",
    ):
        with pytest.raises(ValueError, match="hf://OWNER/NAME"):
            parse_address(text)
    for text in ("hf://lab/net", "hf://lab/net/a/b.safetensors@v1"):
        assert str(parse_address(text)) == text


HOSTILE = (
    *("hf://../x", "hf:///etc/passwd", "hf://a/b/../../c", "hf://a/b/../../c.safetensors", "hf://a/..", "hf://./x", "hf://~/x"),
    *("hf://a/b\0", "hf://a/b\nc", "hf://a/b@main\n", "hf://" + "a" * 300 + "/b", "hf://a/" + "b" * 300, "hf://a/b" + "/c" * 300),
    *("hf://a/b@" + "c" * 300, "hf://a/b@", "hf://a/b@..", "hf://a/b@../../x", "hf://a/b@-x", "hf://a/b@x y", "hf://a/b@x@y"),
    *("hf://a/b@x?y", "hf://a/b@%2e%2e", "hf://a/b#c", "hf://a/b?revision=c", "hf://user:secret@host/b", "hf://a:80/b"),
    *("hf:a/b", "hf:/a/b", "HF://a/b", "http://127.0.0.1:9/a/b", "https://huggingface.co/a/b", "file:///etc/passwd", "s3://a/b"),
    *("hf://a--b/c", "hf://a/b--c", "hf://a/b.git", "hf://a/b.", "hf://a-/b", "hf://é/b", "hf://a\\b/c", "hf://"),
)


@pytest.mark.parametrize("address", HOSTILE, ids=lambda address: ascii(address)[:40])
def test_of_a_hostile_address_nothing_is_asked(hub, small, tmp_path, address):
    """Given as --from and in a recipe; whatever lies outside the cache is never looked for."""
    with pytest.raises(EectlError) as error:
        train(small(), start=address, out=tmp_path / "run", device="cpu")
    said = str(error.value)
    assert len(said.splitlines()) == 1 and len(said) < 1000 and said.isprintable()
    with pytest.raises(EectlError) as error:
        train(make_recipe(small().plain() | {"init": address}, where="test"), out=tmp_path / "run", device="cpu")
    assert len(str(error.value).splitlines()) == 1 and str(error.value).isprintable()
    assert not hub and not (tmp_path / "cache").exists() and not (tmp_path / "run" / "model.safetensors").exists()


def test_names_that_the_hubs_library_refuses_are_refused_before_it_is_asked():
    """What is an address for both, and what is for neither."""
    from huggingface_hub.errors import HFValidationError
    from huggingface_hub.utils import validate_repo_id

    parts = ("a", "a.b", "a-b", "_a", "a_", "a--b", "a..b", ".a", "a.", "-a", "a-", "a.git", "a" * 96, "a" * 97, "a b", "é")
    for repository in (f"{owner}/{name}" for owner in parts for name in parts):
        try:
            parse_address(f"hf://{repository}")
        except ValueError:
            continue
        try:
            validate_repo_id(repository)
        except HFValidationError as error:
            pytest.fail(f"{repository}: {error}")


def test_a_run_starts_from_it_and_records_the_commit(hub, made, small, tmp_path):
    recipe = small("regime=disjoint", "phase=3", "epochs=1")
    train(recipe, start="hf://lab/net", out=tmp_path / "run", device="cpu", quiet=True)
    train(recipe, start=made, out=tmp_path / "local", device="cpu", quiet=True)
    model = tmp_path / "run" / "model.safetensors"
    assert same(weights(model), weights(tmp_path / "local" / "model.safetensors"))
    assert read_about(model).recipe["init"] == f"hf://lab/net@{COMMITS['main']}"
    assert f"init: hf://lab/net@{COMMITS['main']}" in (tmp_path / "run" / "recipe.yaml").read_text()
    assert read_about(model).parent == read_about(tmp_path / "local" / "model.safetensors").parent
    before = hub.copy()
    train(tmp_path / "run" / "recipe.yaml", out=tmp_path / "again", device="cpu", quiet=True)
    assert hub == before  # of a commit that is in the cache nothing is asked
    assert same(weights(model), weights(tmp_path / "again" / "model.safetensors"))


def test_its_recipe_is_the_one_that_goes_on(hub):
    found = find_recipe(given={"start": "hf://lab/net@v1", "regime": "joint"})
    assert str(found.recipe.init) == f"hf://lab/net@{COMMITS['v1']}" and found.folder.name == "net-joint-seed-0"
    assert found.recipe.batch_size == 32 and hub["GET"] == 1
    assert make_recipe(parse_yaml(dump_recipe(found.recipe), where="x"), where="x") == found.recipe


def test_what_was_fetched_is_there_offline_and_else_that_is_said(hub, tmp_path, monkeypatch):
    path, pinned = fetch("hf://lab/net")
    assert local_path(pinned) == path and local_path(path) == path
    monkeypatch.setattr(constants, "HF_HUB_OFFLINE", True)
    assert fetch("hf://lab/net") == (path, pinned)
    with pytest.raises(EectlError, match=r"hf://lab/net@v1: it is not in the cache .* HF_HUB_OFFLINE is set"):
        fetch("hf://lab/net@v1")
    monkeypatch.setattr(constants, "HF_HUB_CACHE", str(tmp_path / "other"))
    with pytest.raises(EectlError, match="not in the cache of the hub's library; run the command again"):
        local_path(pinned)


@pytest.mark.parametrize(
    ("address", "fault"),
    [
        ("hf://lab/nets", "there is no such repository on the hub, or it is private"),
        ("hf://lab/net@v9", "the repository has no revision v9"),
        ("hf://lab/net/other.safetensors", "the repository has no file other.safetensors"),
        ("hf://lab", "an address on the hub is written as hf://OWNER/NAME"),
    ],
)
@pytest.mark.usefixtures("hub")
def test_what_is_not_there_is_one_line(tmp_path, address, fault):
    said = refused("train", "digits", "--from", address, "-o", tmp_path / "run", "--device", "cpu")
    assert fault in said and len(said.splitlines()) == 1 and not (tmp_path / "run").exists()


def test_a_recipe_may_name_one(small):
    recipe = small("init=hf://lab/net@v1")
    assert recipe.init == "hf://lab/net@v1"
    for text in ("hf://lab", "hf:/lab/net"):
        with pytest.raises(EectlError, match=r"init: .*an address on the hub is written as hf://OWNER/NAME"):
            small(f"init={text}")


def test_the_plan_needs_what_was_fetched(hub):
    out, _ = eectl("train", "--from", "hf://lab/net", "--phase", "3", "--dry-run", "--device", "cpu")
    assert f"hf://lab/net@{COMMITS['main']}" in out and hub["GET"] == 1
