"""The columns, classes and task of published text data sets, known before a file is read. Reads nothing; no torch."""

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

from eectl.recipe.choices import HUB_PREFIX

GLUE_PREFIX = "glue/"


@dataclass(frozen=True)
class TextSet:
    """A published data set: its `text` columns (two for sentence pairs), its `target` column and its class names.

    No classes: the target is a number, and the task regression.
    """

    text: tuple[str, ...]
    target: str
    classes: tuple[str, ...]

    @property
    def task(self) -> str:
        """`classification` or `regression`."""
        return "classification" if self.classes else "regression"


def is_text(name: str, kind: str | None = None) -> bool:
    """Return whether the data set called `name` holds texts, and not images; of one of the datasets library `kind` says it."""
    return kind == "texts" if name.startswith(HUB_PREFIX) else name == "text" or name in TEXT_SETS


def kind_asked(data: Mapping[str, Any]) -> str | None:
    """Return the kind of a data section in plain data: what it says, or what columns of the datasets library it asks for."""
    kind = data.get("kind")
    if kind is not None or not str(data.get("name")).startswith(HUB_PREFIX):
        return None if kind is None else str(kind)
    return "texts" if data.get("text") is not None else "images"


NEWSGROUPS = (
    *("alt.atheism", "comp.graphics", "comp.os.ms-windows.misc", "comp.sys.ibm.pc.hardware", "comp.sys.mac.hardware"),
    *("comp.windows.x", "misc.forsale", "rec.autos", "rec.motorcycles", "rec.sport.baseball", "rec.sport.hockey"),
    *("sci.crypt", "sci.electronics", "sci.med", "sci.space", "soc.religion.christian", "talk.politics.guns"),
    *("talk.politics.mideast", "talk.politics.misc", "talk.religion.misc"),
)
_PAIR, _ENTAILMENT = ("sentence1", "sentence2"), ("entailment", "not_entailment")
# GLUE's columns and classes are those of the `datasets` library (nyu-mll/glue), in the order of its labels from 0.
TEXT_SETS: dict[str, TextSet] = {
    "20newsgroups": TextSet(("text",), "group", NEWSGROUPS),
    "glue/cola": TextSet(("sentence",), "label", ("unacceptable", "acceptable")),
    "glue/sst2": TextSet(("sentence",), "label", ("negative", "positive")),
    "glue/mrpc": TextSet(_PAIR, "label", ("not_equivalent", "equivalent")),
    "glue/qqp": TextSet(("question1", "question2"), "label", ("not_duplicate", "duplicate")),
    "glue/stsb": TextSet(_PAIR, "label", ()),
    "glue/mnli": TextSet(("premise", "hypothesis"), "label", ("entailment", "neutral", "contradiction")),
    "glue/qnli": TextSet(("question", "sentence"), "label", _ENTAILMENT),
    "glue/rte": TextSet(_PAIR, "label", _ENTAILMENT),
    "glue/wnli": TextSet(_PAIR, "label", ("not_entailment", "entailment")),
}
