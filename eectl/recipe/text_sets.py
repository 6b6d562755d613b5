"""The columns, classes and task of published text data sets, known before a file is read. Reads nothing; no torch."""

from dataclasses import dataclass

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


def is_text(name: str) -> bool:
    """Return whether the data set called `name` holds texts, and not images."""
    return name == "text" or name in TEXT_SETS


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
