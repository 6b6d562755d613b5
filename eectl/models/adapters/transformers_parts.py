"""transformers' sequence classifiers as Backbones: an adapter per layout, and a table of the model types that have one.

Blocks are half-layers, as the paper counts them (methods §4.5): 2k is the attention of layer k and 2k + 1 its feed-forward part,
so odd numbers are whole layers. It runs the library's own modules; building networks and reading files is from_transformers'.
"""

import inspect
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from typing import Any, ClassVar

import torch
from torch import Tensor

from eectl.core.errors import EectlError
from eectl.models.backbone import Backbone, Feature, Hidden

SIZES = """vocab_size hidden_size num_hidden_layers num_attention_heads intermediate_size hidden_act hidden_dropout_prob
    attention_probs_dropout_prob max_position_embeddings type_vocab_size initializer_range layer_norm_eps pad_token_id"""


@dataclass(frozen=True)
class TextFeature(Feature):
    """Tokens [row, token, channel], the class token first; `mask` [row, token] is True for real tokens."""

    x: Tensor
    mask: Tensor

    def pooled(self) -> Tensor:
        """[row, channel]: the mean over real tokens."""
        weight = self.mask.to(self.x.dtype)[:, :, None]
        return (self.x * weight).sum(dim=1) / weight.sum(dim=1).clamp(min=1)

    def map(self) -> Tensor:
        raise EectlError("exits.head: this kind pools over height and width, which text does not have; take linear or mlp-WIDTH")

    def cls(self) -> Tensor:
        return self.x[:, 0]


class BertBackbone(Backbone):
    """BERT and the layouts that follow it: embeddings → half-layers → pooler, dropout and classifier.

    Inputs are [row, 3, token] in int64: token ids, attention mask (1 = real), token types. The mask travels as `Hidden.mask`
    [row, token], True = real, and every attention block gets it: the library leaves it out where no row of the batch is padded,
    which takes a look at the device and makes a row's last bits depend on its neighbours. On a CPU PyTorch's attention gives
    the same bits with a mask of all True as with none; on CUDA it may pick another kernel for it.

    The attention is what the library picks by itself: PyTorch's fused one, which does not store the [token, token] scores, or
    where it has not taken that up (DeBERTa; ELECTRA in transformers 4) its own.

    `options` are what `backbone.args` takes. A part that several blocks use is owned by the first of them: it trains, and is
    frozen, with that block alone.
    """

    options: ClassVar[tuple[str, ...]] = (*SIZES.split(), "classifier_dropout")
    layers: ClassVar[str] = "encoder.layer"
    halves: ClassVar[tuple[tuple[str, ...], tuple[str, ...]]] = (("attention",), ("intermediate", "output"))
    ends: ClassVar[tuple[str, ...]] = ("{base}.pooler", "dropout", "classifier")
    """What the library runs after the last layer; `{base}` is its name for the encoder."""

    net: Any

    def __init__(self, net: Any) -> None:
        prefix = net.base_model_prefix
        ends = [name.format(base=prefix) for name in self.ends]
        names = [tuple(f"{prefix}.{name}" for name in used) for used in self._used(net)]
        layers = dict.fromkeys(name.rpartition(".")[0] for name, _ in net.named_parameters())
        last = [layer for layer in layers if layer.startswith(tuple(ends))]
        super().__init__(net, block_names=_owned_once(names), head_names=ends, classifiers=last)
        self.vocabulary = int(net.config.vocab_size)

    @property
    def base(self) -> Any:
        """The encoder in the library's network."""
        return self.net.base_model

    @property
    def max_tokens(self) -> int | None:
        """The longest row that there are positions for; None where positions are relative alone."""
        return int(self.net.config.max_position_embeddings)

    def example(self, input_shape: Sequence[int]) -> Tensor:
        """[1, 3, token]: as many real tokens as fit, ids and types 0."""
        row = torch.zeros(1, *input_shape, dtype=torch.int64, device=next(self.parameters()).device)
        row[:, 1] = 1
        return row

    def own_names(self, weights: Mapping[str, Tensor]) -> dict[str, Tensor]:
        """An encoder's weights get the library's prefix; the pooler and heads of other tasks, which this network lacks, go."""
        prefix, own = f"{self.net.base_model_prefix}.", self.net.state_dict()
        bare = not any(name.startswith(prefix) for name in weights)
        named = {name if name in own or not bare else prefix + name: tensor for name, tensor in weights.items()}
        others = (f"{prefix}pooler.", f"{prefix}embeddings.position_ids")
        return {
            name: tensor
            for name, tensor in named.items()
            if name in own or (name.startswith(prefix) and not name.startswith(others))
        }

    def stem(self, inputs: Tensor) -> Hidden:
        ids, mask, types = inputs.unbind(dim=1)
        return Hidden(self._embed(ids, mask, types), mask.bool())

    def block(self, index: int, hidden: Hidden) -> Hidden:
        assert hidden.mask is not None
        layer = self._layer(index // 2)
        x = self._feed(layer, hidden.x) if index % 2 else self._attend(layer, hidden.x, hidden.mask)
        return replace(hidden, x=x)

    def head(self, hidden: Hidden) -> Tensor:
        logits: Tensor = self.net.classifier(self.net.dropout(self.base.pooler(hidden.x)))
        return logits

    def feature(self, hidden: Hidden) -> Feature:
        assert isinstance(hidden.x, Tensor) and hidden.mask is not None
        return TextFeature(hidden.x, hidden.mask)

    def _used(self, net: Any) -> list[tuple[str, ...]]:
        """The modules of the encoder that each block uses, in the order of the blocks."""
        count = len(net.base_model.get_submodule(self.layers))
        return [tuple(f"{self.layers}.{k}.{name}" for name in half) for k in range(count) for half in self.halves]

    def _embed(self, ids: Tensor, mask: Tensor, types: Tensor) -> Any:  # noqa: ARG002
        return self.base.embeddings(input_ids=ids, token_type_ids=types)

    def _layer(self, number: int) -> Any:
        return self.base.get_submodule(self.layers)[number]

    def _attend(self, layer: Any, x: Any, mask: Tensor) -> Any:
        return layer.attention(x, self._for_scores(x, mask))[0]

    def _for_scores(self, x: Any, mask: Tensor) -> Tensor:
        """The mask [row, 1, 1, token] as the library's attention takes it: True = real, or what is added to the scores."""
        real = mask[:, None, None, :]
        if self.net.config._attn_implementation == "sdpa":
            return real
        return torch.zeros_like(real, dtype=x.dtype).masked_fill(~real, torch.finfo(x.dtype).min)

    def _feed(self, layer: Any, x: Any) -> Any:
        return layer.feed_forward_chunk(x)


class RobertaBackbone(BertBackbone):
    """RoBERTa, XLM-R and CamemBERT, whose classifier takes the tokens; positions are counted from the padding id on."""

    ends = ("classifier",)

    @property
    def max_tokens(self) -> int | None:
        return int(self.net.config.max_position_embeddings - self.net.config.pad_token_id - 1)

    def head(self, hidden: Hidden) -> Tensor:
        logits: Tensor = self.net.classifier(hidden.x)
        return logits


class ElectraBackbone(BertBackbone):
    """ELECTRA's discriminator: its embeddings may be narrower than its layers; its classifier takes the tokens."""

    options = (*BertBackbone.options, "embedding_size")
    ends = ("classifier",)

    def _embed(self, ids: Tensor, mask: Tensor, types: Tensor) -> Any:
        x = super()._embed(ids, mask, types)
        return self.base.embeddings_project(x) if hasattr(self.base, "embeddings_project") else x

    def head(self, hidden: Hidden) -> Tensor:
        logits: Tensor = self.net.classifier(hidden.x)
        return logits


class DistilBertBackbone(BertBackbone):
    """DistilBERT: no token types, no pooler."""

    options = (
        *("vocab_size", "max_position_embeddings", "sinusoidal_pos_embds", "n_layers", "n_heads", "dim", "hidden_dim", "dropout"),
        *("attention_dropout", "activation", "initializer_range", "seq_classif_dropout", "pad_token_id"),
    )
    layers = "transformer.layer"
    halves = (("attention", "sa_layer_norm"), ("ffn", "output_layer_norm"))
    ends = ("pre_classifier", "dropout", "classifier")

    def _embed(self, ids: Tensor, mask: Tensor, types: Tensor) -> Any:  # noqa: ARG002
        return self.base.embeddings(ids)

    def _attend(self, layer: Any, x: Any, mask: Tensor) -> Any:
        mask = self._for_scores(x, mask)
        if "query" in inspect.signature(layer.attention.forward).parameters:  # transformers 4
            return layer.sa_layer_norm(layer.attention(x, x, x, mask)[0] + x)
        return layer.sa_layer_norm(layer.attention(x, attention_mask=mask)[0] + x)

    def _feed(self, layer: Any, x: Any) -> Any:
        return layer.output_layer_norm(layer.ffn(x) + x)

    def head(self, hidden: Hidden) -> Tensor:
        assert isinstance(hidden.x, Tensor)
        logits: Tensor = self.net.classifier(self.net.dropout(self.net.pre_classifier(hidden.x[:, 0]).relu()))
        return logits


class AlbertBackbone(BertBackbone):
    """ALBERT, whose layers share weights: a group of layers runs many times (with `num_hidden_groups` 1, in every layer).

    The first two blocks that run a layer own it; the others own nothing and change with it. With one group, segments after the
    first have nothing to train: a regime that trains segment by segment trains the encoder in its first stage and heads in the
    others.
    """

    options = (*SIZES.split(), "embedding_size", "num_hidden_groups", "inner_group_num", "classifier_dropout_prob")
    halves = (("attention",), ("ffn", "ffn_output", "activation", "dropout", "full_layer_layer_norm"))

    def _used(self, net: Any) -> list[tuple[str, ...]]:
        places = _albert_places(net.config)
        prefixes = [f"encoder.albert_layer_groups.{group}.albert_layers.{inner}" for group, inner in places]
        return [tuple(f"{prefix}.{name}" for name in half) for prefix in prefixes for half in self.halves]

    def _embed(self, ids: Tensor, mask: Tensor, types: Tensor) -> Any:
        return self.base.encoder.embedding_hidden_mapping_in(super()._embed(ids, mask, types))

    def _layer(self, number: int) -> Any:
        group, inner = _albert_places(self.net.config)[number]
        return self.base.encoder.albert_layer_groups[group].albert_layers[inner]

    def _feed(self, layer: Any, x: Any) -> Any:
        return layer.full_layer_layer_norm(layer.ff_chunk(x) + x)

    def head(self, hidden: Hidden) -> Tensor:
        assert isinstance(hidden.x, Tensor)
        pooled = self.base.pooler_activation(self.base.pooler(hidden.x[:, 0]))
        logits: Tensor = self.net.classifier(self.net.dropout(pooled))
        return logits


class DebertaBackbone(BertBackbone):
    """DeBERTa, and DeBERTa-v2 and v3, which have their own attention and mask.

    Every layer reads the same relative positions; block 0 owns them. A convolution after layer 0, as v2's largest networks have
    it, reads the embeddings once more, and is refused.
    """

    options = tuple(
        f"""{SIZES} relative_attention max_relative_positions position_biased_input pos_att_type pooler_dropout
        pooler_hidden_act cls_dropout position_buckets share_att_key norm_rel_ebd talking_head conv_kernel_size""".split()
    )
    ends = ("pooler", "dropout", "classifier")

    def __init__(self, net: Any) -> None:
        super().__init__(net)
        if getattr(net.base_model.encoder, "conv", None) is not None:
            raise EectlError(
                "backbone.args.conv_kernel_size: a DeBERTa with a convolution has no adapter; take one without, or 0"
            )

    @property
    def max_tokens(self) -> int | None:
        return super().max_tokens if self.net.config.position_biased_input else None

    def _used(self, net: Any) -> list[tuple[str, ...]]:
        encoder = net.base_model.encoder
        shared = tuple(f"encoder.{name}" for name in ("rel_embeddings", "LayerNorm") if hasattr(encoder, name))
        return [used + shared if block % 2 == 0 else used for block, used in enumerate(super()._used(net))]

    def _embed(self, ids: Tensor, mask: Tensor, types: Tensor) -> Any:
        return self.base.embeddings(input_ids=ids, token_type_ids=types, mask=mask)

    def _attend(self, layer: Any, x: Any, mask: Tensor) -> Any:
        encoder = self.base.encoder
        return layer.attention(
            x,
            encoder.get_attention_mask(mask),
            relative_pos=encoder.get_rel_pos(x),
            rel_embeddings=encoder.get_rel_embedding(),
        )[0]

    def _feed(self, layer: Any, x: Any) -> Any:
        return layer.output(layer.intermediate(x), x)

    def head(self, hidden: Hidden) -> Tensor:
        logits: Tensor = self.net.classifier(self.net.dropout(self.net.pooler(hidden.x)))
        return logits


def _albert_places(config: Any) -> list[tuple[int, int]]:
    """The group, and the layer in it, that each layer of an ALBERT runs."""
    per_group = config.num_hidden_layers / config.num_hidden_groups
    groups = [int(number / per_group) for number in range(config.num_hidden_layers)]
    return [(group, inner) for group in groups for inner in range(config.inner_group_num)]


def _owned_once(used: Sequence[tuple[str, ...]]) -> list[tuple[str, ...]]:
    """Each name at its first use alone."""
    seen: set[str] = set()
    owned = []
    for names in used:
        owned.append(tuple(name for name in names if name not in seen))
        seen |= set(names)
    return owned


ADAPTERS: dict[str, type[BertBackbone]] = {  # transformers' model type → our adapter
    "bert": BertBackbone,
    **dict.fromkeys(("roberta", "xlm-roberta", "camembert"), RobertaBackbone),
    "distilbert": DistilBertBackbone,
    "albert": AlbertBackbone,
    "electra": ElectraBackbone,
    **dict.fromkeys(("deberta", "deberta-v2"), DebertaBackbone),
}
