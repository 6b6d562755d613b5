"""The names that each library has for the rates of `backbone.drop_path` and `backbone.dropout`. Imports none of them."""

from collections.abc import Collection, Mapping
from typing import Any

from eectl.core.errors import EectlError

# Of a library's constructor, or of transformers' configurations; a network takes some of them.
DROP_PATH = ("drop_path_rate", "stochastic_depth_prob")
DROPOUT = (
    *("drop_rate", "dropout"),
    *("hidden_dropout_prob", "attention_probs_dropout_prob", "hidden_dropout", "attention_dropout", "resid_pdrop", "embd_pdrop"),
    *("attn_pdrop", "resid_dropout", "embed_dropout", "embedding_dropout", "mlp_dropout", "dropout_rate"),
)
RATES = {"drop_path": (DROP_PATH, "drop path (stochastic depth)"), "dropout": (DROPOUT, "dropout")}


def dropout_args(name: str, takes: Collection[str], rates: Mapping[str, float | None]) -> dict[str, Any]:
    """Return the arguments that give a network these rates.

    Args:
        name: of the network, for messages.
        takes: the names of what it takes.
        rates: by `drop_path` and `dropout`; None: the network's own.

    Raises:
        EectlError: the network has no such thing.
    """
    found: dict[str, Any] = {}
    for key, rate in rates.items():
        names, what = RATES[key]
        known = [each for each in names if each in takes]
        if rate is not None and not known:
            raise EectlError(f"backbone.{key} is {rate:g}, and {name} has no {what}; leave it out")
        found |= {} if rate is None else dict.fromkeys(known, rate)
    return found
