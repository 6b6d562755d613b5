"""Which parameters of a network share a learning rate and a weight decay: by their layer, and by what kind of number they are."""

import re
from fnmatch import fnmatchcase

from torch import nn

from eectl.models.multi_exit import MultiExitModel
from eectl.recipe.optimizer_section import OptimizerSection
from eectl.training.optim import ParameterGroup

BACKBONE = "backbone.net."  # what the names of the library's own parameters begin with
POSITIONS = re.compile(
    r"pos_?emb|position_?emb|embed_positions|\bwpe\b|rel_pos|relative_position|relative_attention|rel_embeddings|"
    r"distance_embedding|attention_biases|(cls|class|dist|reg|register|mask)_tokens?\b|class_embedding"
)


def parameter_groups(model: MultiExitModel, settings: OptimizerSection) -> list[ParameterGroup]:
    """Return the parameters that train, by learning rate and weight decay, in the order of the network; one group by default.

    The order is a function of the recipe and the network alone, as a resume state numbers parameters by it.
    """
    decay, kinds = settings.decay, decay_kinds(model)
    groups: dict[tuple[float, float], list[nn.Parameter]] = {}
    for name, parameter in model.named_parameters():
        if parameter.requires_grad:
            decays = kinds[name].isdisjoint(decay.exclude)
            key = layer_scale(model, name, settings.layer_decay), decay.value if decays else 0.0
            groups.setdefault(key, []).append(parameter)
    return [ParameterGroup(parameters, weight_decay, scale) for (scale, weight_decay), parameters in groups.items()]


def layer_scale(model: MultiExitModel, name: str, layer_decay: float) -> float:
    """Return what a parameter's learning rate is multiplied by: 1 in the network's head, in attached exits and in ensembles."""
    if not name.startswith(BACKBONE):
        return 1.0
    backbone = model.backbone
    return float(layer_decay ** (backbone.depth - backbone.locate(name.removeprefix(BACKBONE))))


def decay_kinds(model: MultiExitModel) -> dict[str, set[str]]:
    """Return for each parameter, by name, the kinds that `weight_decay.exclude` knows it by; most are of none.

    A vector is of `norms` or `biases`, and a bias beside a vector of weights, as norms have, of both: so that the two together
    leave out what timm does. Names say what is of `positions`, timm's own lists (`no_weight_decay`) among them.
    """
    listed = getattr(model.backbone.net, "no_weight_decay", None)
    patterns = tuple(listed()) if callable(listed) else ()
    dimensions = {name: parameter.dim() for name, parameter in model.named_parameters()}
    found: dict[str, set[str]] = {}
    for name, number in dimensions.items():
        own = name.removeprefix(BACKBONE)
        kinds = found[name] = set()
        if POSITIONS.search(own) or any(fnmatchcase(own, pattern) for pattern in patterns):
            kinds.add("positions")
        is_bias = name.endswith("bias")
        if is_bias:
            kinds.add("biases")
        if number <= 1 and (not is_bias or dimensions.get(f"{name.removesuffix('bias')}weight", 2) <= 1):
            kinds.add("norms")
    return found
