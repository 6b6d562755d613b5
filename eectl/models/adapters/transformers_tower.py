"""The adapter of any text classifier of transformers whose layers run in a row, as `tower` runs them; a block is a layer.

Builds no network.
"""

import inspect
from dataclasses import dataclass, replace
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from eectl.models.adapters.tower import (
    ROWS,
    CannotBeCutError,
    Layout,
    Recorded,
    finish,
    layers_at_the_end,
    layout_on_meta,
    look_for_layers,
    reasons_for,
    record,
    run_layer,
    while_looked_at,
)
from eectl.models.adapters.transformers_parts import TextBackbone, TextFeature
from eectl.models.backbone import Feature, Hidden

_TOKENS = 8  # of the texts that a network is looked at with


@dataclass(frozen=True)
class LastTokenFeature(TextFeature):
    """Tokens of a text that is read from left to right: its last real token knows all others."""

    def cls(self) -> Tensor:
        return self.x[torch.arange(len(self.x), device=self.x.device), _last_real(self.mask)]


class TowerBackbone(TextBackbone):
    """The adapter of networks with a tower: a list of like layers that run one after another.

    The hidden state's `mask` are the texts themselves, [row, token, 3], from which the layers' arguments follow; they are found
    once for a batch, and again once rows have left it.

    Raises:
        CannotBeCutError: where the network does not run so. It is looked at with two short texts, except on the device meta.
    """

    net: Any

    def __init__(self, net: Any) -> None:
        net.config.use_cache = False
        is_xlnet = net.config.model_type == "xlnet"  # which takes any types, and has no table of them
        self._ends_with_class = is_xlnet and net.config.summary_type == "last"
        self._takes_types = is_xlnet or (bool(getattr(net.config, "type_vocab_size", 0)) and _accepts(net, "token_type_ids"))
        self._pads_with: int | None = None
        if hasattr(net, "score") or net.config.model_type in _LAST_TOKEN:  # finds the last real token by the padding
            self._pads_with = _padding_of(net.config.get_text_config())
        if net.config.is_encoder_decoder:
            raise CannotBeCutError("it is an encoder and a decoder, which runs once the encoder is through")
        on_meta = next(net.parameters()).is_meta
        if on_meta:
            self._layout = layout_on_meta(net)
        else:
            texts = _example_texts(net)
            with reasons_for("texts"):
                self._layout, expected = look_for_layers(net, self._arguments(self._laid_out(texts)), check=_check_form)
        layout = self._layout
        super().__init__(net, block_names=layout.blocks, head_names=layout.after, classifiers=layers_at_the_end(net, layout))
        self.vocabulary = getattr(net.config.get_text_config(), "vocab_size", None)
        if not on_meta:
            with reasons_for("texts"), while_looked_at(net):
                found = self(texts.transpose(1, 2))
                self._check_tokens_mix(texts)
            if not torch.equal(found, expected.logits):
                raise CannotBeCutError("its layers depend on more than the hidden state of the layer before")

    @property
    def max_tokens(self) -> int | None:
        """The length of the longest row that its table of positions has room for; None where it has no such table."""
        for name, module in self.net.named_modules():
            if isinstance(module, nn.Embedding) and name.rpartition(".")[2] in _POSITIONS:
                first = 0 if module.padding_idx is None else module.padding_idx + 1
                most: int = getattr(self.net.config, "max_position_embeddings", module.num_embeddings)
                return min(most, module.num_embeddings - first)
        return None

    def stem(self, inputs: Tensor) -> Hidden:
        texts = self._laid_out(inputs.transpose(1, 2))
        x, recorded = record(self.net, self._layout, self._arguments(texts))
        return Hidden(x, texts, recorded)

    def block(self, index: int, hidden: Hidden) -> Hidden:
        assert isinstance(hidden.x, Tensor)
        recorded = self._known(hidden)
        return replace(hidden, x=run_layer(self.net, self._layout, recorded, index, hidden.x), known=recorded)

    def head(self, hidden: Hidden) -> Tensor:
        assert isinstance(hidden.x, Tensor) and hidden.mask is not None
        x = _last_real_at_the_end(hidden.x, hidden.mask[:, :, 1]) if self._ends_with_class else hidden.x  # texts may be joined
        logits: Tensor = finish(self.net, self._layout, self._known(hidden), x, self._arguments(hidden.mask)).logits
        return logits

    def feature(self, hidden: Hidden) -> Feature:
        assert isinstance(hidden.x, Tensor) and hidden.mask is not None
        mask = hidden.mask[:, :, 1].bool()
        more = hidden.x.shape[1] - mask.shape[1]  # windows of attention are filled up
        mask = F.pad(mask, (0, more)) if more else mask
        reads_last = self._pads_with is not None or self._ends_with_class
        return (LastTokenFeature if reads_last else TextFeature)(hidden.x, mask)

    def _laid_out(self, texts: Tensor) -> Tensor:
        """Return texts [row, token, 3] as the library's tokenizer lays them out.

        XLNet reads the last token as the class token, whose type is 2; padding comes first.
        """
        if not self._ends_with_class:
            return texts
        ids, mask, types = _last_real_at_the_end(texts, texts[:, :, 1]).unbind(dim=2)
        return torch.stack([ids, mask, torch.cat([types[:, :-1], torch.full_like(types[:, -1:], 2)], dim=1)], dim=2)

    def _arguments(self, texts: Tensor) -> dict[str, Any]:
        """Return the arguments of the library's forward for texts [row, token, 3]."""
        ids, mask, types = texts.unbind(dim=2)
        if self._pads_with is not None:
            ids = ids.where(mask.bool(), self._pads_with)
        return {"input_ids": ids, "attention_mask": mask} | ({"token_type_ids": types} if self._takes_types else {})

    def _check_tokens_mix(self, texts: Tensor) -> None:
        """Raise CannotBeCutError where the first token changes no other: an attention that has no kernel here gives zeros."""
        others = texts.clone()
        others[:, 0, 0] = (others[:, 0, 0] + 1) % 2
        states = []
        for each in (texts, others):
            *_, hidden = self.hidden_states(each.transpose(1, 2))
            assert isinstance(hidden.x, Tensor)
            states.append(hidden.x[:, 1:_TOKENS])
        if torch.equal(*states):
            raise CannotBeCutError("its tokens do not read each other: its attention gives zeros without a kernel of its own")

    def _known(self, hidden: Hidden) -> Recorded:
        """Return what the layers are called with: as noted before, or found anew where rows have left or come."""
        if isinstance(hidden.known, Recorded):
            return hidden.known
        assert hidden.mask is not None
        return record(self.net, self._layout, self._arguments(hidden.mask))[1]


_LAST_TOKEN = ("ctrl", "modernbert-decoder")
"""Classifiers of the last real token that the library does not call `score`."""
_POSITIONS = ("position_embeddings", "wpe", "embed_positions", "positions_embed", "position_embedding")


def _padding_of(config: Any) -> int:
    """Return a decoder's padding token: where its configuration has none, that of the end of a text, which is set there.

    The table of embeddings was made without it, so that its row is one like any other.
    """
    if config.pad_token_id is None:
        ends = config.eos_token_id if isinstance(config.eos_token_id, (list, tuple)) else [config.eos_token_id]
        end = next((end for end in ends if isinstance(end, int) and 0 <= end < config.vocab_size), None)
        if end is None:
            raise CannotBeCutError(
                "it reads a text's last token, and neither a padding token nor one of the end of a text says which that is; set "
                "backbone.args.pad_token_id to the tokenizer's"
            )
        config.pad_token_id = end
    return int(config.pad_token_id)


def _last_real(mask: Tensor) -> Tensor:
    """Return the place of each row's last real token."""
    return (torch.arange(mask.shape[1], device=mask.device) * mask).argmax(dim=1)


def _last_real_at_the_end(x: Tensor, mask: Tensor) -> Tensor:
    """Return [row, token, …] with each row turned round until its last real token is the last; tokens come first in memory."""
    places = torch.arange(mask.shape[1], device=mask.device)[:, None] + _last_real(mask) + 1
    turned = x.transpose(0, 1)
    return turned.gather(0, (places % mask.shape[1])[:, :, None].expand_as(turned)).transpose(0, 1)


def _accepts(net: nn.Module, name: str) -> bool:
    return name in inspect.signature(net.forward).parameters


def _example_texts(net: Any) -> Tensor:
    """Return two short texts [row, token, 3], the second padded, with ids that every vocabulary has."""
    config, device = net.config.get_text_config(), next(net.parameters()).device
    texts = torch.zeros(ROWS, _TOKENS, 3, dtype=torch.int64, device=device)
    texts[:, :, 0] = torch.arange(ROWS * _TOKENS, device=device).view(ROWS, _TOKENS) % getattr(
        config, "vocab_size", ROWS * _TOKENS
    )
    texts[:, :, 1] = 1
    padding = getattr(config, "pad_token_id", None) or 0
    texts[1, _TOKENS // 2 :, 0], texts[1, _TOKENS // 2 :, 1] = padding, 0
    return texts


def _check_form(layout: Layout) -> None:
    """Raise CannotBeCutError unless hidden states are [row, token, channel], or [token, row, channel]."""
    shape = layout.shape
    if len(shape) != 3 or ROWS not in shape[:2]:
        raise CannotBeCutError("its hidden state has no dimensions of rows and tokens")
    if shape[0] * shape[1] < ROWS * _TOKENS:
        raise CannotBeCutError("its hidden states are fewer than the text has tokens")
