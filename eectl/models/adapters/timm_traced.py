"""Ask timm for facts of its networks, for the traced adapter: groups of layers, classifiers, widths.

The groups are those that timm makes for learning rates by layer: stem, blocks, head.
"""

from collections.abc import Mapping, Sequence
from typing import Any

from timm.layers._fx import get_notrace_functions
from timm.models._manipulate import MATCH_PREV_GROUP, group_with_matcher
from torch import nn

from eectl.models.adapters.feature_views import Facts
from eectl.models.adapters.layer_groups import own_groups
from eectl.models.adapters.traced import adapt
from eectl.models.backbone import Backbone

_AFTER_PREVIOUS = (MATCH_PREV_GROUP[0] - 1,)  # instead of `with the group before`


def adapt_timm(net: Any, input_shape: Sequence[int]) -> Backbone:
    """Return a network of timm's as a backbone; its flags and torch's generators stay as they are.

    Raises:
        CannotTraceError: where it cannot be traced or cut, with the reason alone.
    """
    facts = Facts(
        groups=layer_groups(net),
        functions=get_notrace_functions(),  # type: ignore[no-untyped-call]
        classifiers=_classifiers(net),
        widths=frozenset(info["num_chs"] for info in getattr(net, "feature_info", None) or () if "num_chs" in info),
        prefix=getattr(net, "num_prefix_tokens", 0),
        output_fmt=str(getattr(net, "output_fmt", "NCHW")),
    )
    return adapt(net, input_shape, facts)


def layer_groups(net: Any) -> dict[str, int]:
    """Return the number of each parameter's group; the last is the head, with the layers between it and the last block."""
    try:
        matcher = net.group_matcher(coarse=False)
        groups: dict[str, int] = group_with_matcher(net.named_parameters(), matcher, reverse=True)
    except (AttributeError, AssertionError, NotImplementedError, TypeError, ValueError):
        return own_groups(net)
    if len(set(groups.values())) < 3:
        return own_groups(net)
    if isinstance(matcher, dict):
        _set_head_apart(groups, group_with_matcher(net.named_parameters(), _set_apart(matcher), reverse=True))
    return groups


def _set_head_apart(groups: dict[str, int], apart: Mapping[str, int]) -> None:
    """Move layers that learn with the last block, but run after it, to the head."""
    last = max(groups.values())
    for group in (last, last - 1):
        names = [name for name in groups if groups[name] == group]
        late = [name for name in names if apart[name] > min(apart[each] for each in names)]
        if late:
            groups.update({name: last + 1 for name in groups if name in late or groups[name] > group})
            return


def _set_apart(matcher: Mapping[str, Any]) -> dict[str, Any]:
    """Return a matcher whose groups are not joined with those before them."""
    return {
        group: [(name, _AFTER_PREVIOUS if suffix == MATCH_PREV_GROUP else suffix) for name, suffix in patterns]
        if isinstance(patterns, (tuple, list))
        else patterns
        for group, patterns in matcher.items()
    }


def _classifiers(net: Any) -> list[str]:
    """Return the names of the layers whose size is the number of outputs."""
    heads = net.get_classifier()
    wanted = [head for head in (heads if isinstance(heads, (tuple, list, nn.ModuleList)) else [heads]) if head is not None]
    return [name for name, module in net.named_modules() if any(module is head for head in wanted)]
