"""Files on the Hugging Face hub, written as `hf://OWNER/NAME[/FILE][@REVISION]`. The network is used only in `fetch`; no torch.

The hub's own library fetches and keeps them, so its settings hold: HF_HOME, HF_HUB_OFFLINE, HF_ENDPOINT and the user's login.
"""

import re
from dataclasses import dataclass
from pathlib import Path

from eectl.core.errors import EectlError, one_line

SCHEME = "hf://"
DEFAULT_FILE = "model.safetensors"
FORM = "hf://OWNER/NAME, hf://OWNER/NAME/FILE.safetensors or either with @REVISION"
_PART = r"[A-Za-z0-9_][A-Za-z0-9._-]{0,95}"
_NAME = r"[A-Za-z0-9_](?:[A-Za-z0-9._-]{0,94}[A-Za-z0-9_])?"  # as the hub has them, with what `parse_address` refuses beside
_ADDRESS = re.compile(rf"hf://({_NAME}/{_NAME})((?:/{_PART}){{1,8}})?(?:@([A-Za-z0-9_][A-Za-z0-9._/-]{{0,199}}))?")


@dataclass(frozen=True)
class HubFile:
    """A file of a repository on the hub, at a revision: a branch, a tag or a commit; None is the main branch."""

    repository: str
    file: str
    revision: str | None

    @property
    def name(self) -> str:
        """The repository's name without its owner."""
        return self.repository.partition("/")[2]

    def __str__(self) -> str:
        file = "" if self.file == DEFAULT_FILE else f"/{self.file}"
        return f"{SCHEME}{self.repository}{file}" + (f"@{self.revision}" if self.revision else "")


def is_hub_address(text: object) -> bool:
    """Return whether a text is meant for an address on the hub."""
    return isinstance(text, str) and text.startswith(SCHEME)


def parse_address(text: str) -> HubFile:
    """Return the file that an address names; raises ValueError for one that is not written as FORM."""
    found = _ADDRESS.fullmatch(text)
    if found is None or ".." in text or "--" in found[1] or found[1].endswith(".git"):
        raise ValueError(f"an address on the hub is written as {FORM}")
    file = (found[2] or f"/{DEFAULT_FILE}")[1:]
    if not file.endswith(".safetensors"):
        raise ValueError(f"{file} is no .safetensors file; an address on the hub is written as {FORM}")
    return HubFile(found[1], file, found[3])


def fetch(address: str) -> tuple[Path, str]:
    """Return where the file of an address lies, fetched where it is not in the cache, and its address with the commit.

    Raises:
        EectlError: there is no such repository, revision or file, or neither the cache has it nor the hub can be asked.
    """
    from huggingface_hub import errors as faults
    from huggingface_hub import hf_hub_download

    # OSError among them, and the faults of the library that it talks through, which has changed over time
    parents: list[type] = [*faults.HfHubHTTPError.__mro__, faults.EntryNotFoundError]
    known = tuple(kind for kind in parents if issubclass(kind, Exception) and kind is not Exception)
    wanted = parse_address(address)
    try:
        path = Path(hf_hub_download(wanted.repository, wanted.file, revision=wanted.revision))
    except known as error:
        reasons = {
            faults.GatedRepoError: "the repository asks for an agreement; accept it on the hub and run `hf auth login`",
            faults.RepositoryNotFoundError: "there is no such repository on the hub, or it is private and needs `hf auth login`",
            faults.RevisionNotFoundError: f"the repository has no revision {wanted.revision}; without @REVISION it is main",
            faults.LocalEntryNotFoundError: "it is not in the cache of the hub's library, and the hub cannot be asked: there is "
            "no connection, or HF_HUB_OFFLINE is set",
            faults.EntryNotFoundError: f"the repository has no file {wanted.file}; name one, as hf://OWNER/NAME/FILE",
        }
        other = f"the hub gave no file: {one_line(str(error))[:200]}; try again later"
        reason = next((text for kind, text in reasons.items() if isinstance(error, kind)), other)
        raise EectlError(f"{address}: {reason}") from error
    commit = path.parts[path.parts.index("snapshots") + 1]
    return path, str(HubFile(wanted.repository, wanted.file, commit))


def local_path(start: Path | str) -> Path:
    """Return where a file lies that a recipe names by a path, or by an address with its commit that was fetched before.

    Raises:
        EectlError: it is no longer in the cache.
    """
    if not is_hub_address(start):
        return Path(start)
    from huggingface_hub import try_to_load_from_cache

    wanted = parse_address(str(start))
    found = try_to_load_from_cache(wanted.repository, wanted.file, revision=wanted.revision)
    if not isinstance(found, str):
        raise EectlError(f"{start}: it is not in the cache of the hub's library; run the command again to fetch it")
    return Path(found)
