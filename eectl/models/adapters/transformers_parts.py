"""The adapters of transformers' text classifiers, one for each layout, and the table of model types that have one.

Blocks are half-layers, as the paper counts them (methods §4.5): block 2k is the attention of layer k, block 2k + 1 its
feed-forward part, so an exit after an odd block follows a whole layer. Adapters run the library's modules; `transformers` builds
the networks.
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
    """Tokens `x` [row, token, channel] of texts, the class token first; `mask` [row, token] is True for real tokens."""

    x: Tensor
    mask: Tensor

    def pooled(self) -> Tensor:
        """Return [row, channel]: the mean over real tokens."""
        weight = self.mask.to(self.x.dtype)[:, :, None]
        return (self.x * weight).sum(dim=1) / weight.sum(dim=1).clamp(min=1)

    def map(self) -> Tensor:
        raise EectlError("exits.head: this kind pools over height and width, which text does not have; take linear or mlp-WIDTH")

    def cls(self) -> Tensor:
        return self.x[:, 0]


def library_names(net: Any, weights: Mapping[str, Tensor]) -> dict[str, Tensor]:
    """Put the library's prefix before an encoder's names, and drop the pooler and the heads of other tasks."""
    prefix, own = f"{net.base_model_prefix}.", net.state_dict()
    bare = not any(name.startswith(prefix) for name in weights)
    named = {name if name in own or not bare else prefix + name: tensor for name, tensor in weights.items()}
    others = (f"{prefix}pooler.", f"{prefix}embeddings.position_ids")
    return {
        name: tensor for name, tensor in named.items() if name in own or (name.startswith(prefix) and not name.startswith(others))
    }


class TextBackbone(Backbone):
    """The base of all text classifiers of transformers: the encoder's name, rows of texts, and names of weights."""

    net: Any

    @property
    def base(self) -> Any:
        """The encoder in the library's network."""
        return self.net.base_model

    @property
    def max_tokens(self) -> int | None:
        """The length of the longest row that it has positions for; None where positions are only relative."""
        return None

    def example(self, input_shape: Sequence[int]) -> Tensor:
        """Return one row [1, 3, token] that is full of real tokens, with ids and types 0."""
        row = torch.zeros(1, *input_shape, dtype=torch.int64, device=next(self.parameters()).device)
        row[:, 1] = 1
        return row

    def own_names(self, weights: Mapping[str, Tensor]) -> dict[str, Tensor]:
        return library_names(self.net, weights)

    def feature(self, hidden: Hidden) -> Feature:
        assert isinstance(hidden.x, Tensor) and hidden.mask is not None
        return TextFeature(hidden.x, hidden.mask)


class BertBackbone(TextBackbone):
    """The adapter of BERT: embeddings → half-layers → pooler, dropout and classifier. Those of similar layouts derive from it.

    Every attention block gets the mask. The library leaves it out where no row of the batch is padded: that waits for the device,
    and a row's last bits then depend on the rows beside it. On a CPU PyTorch's attention gives the same bits with a mask of all
    True as with none; on CUDA it may pick another kernel.

    The attention is the one that the library chooses: PyTorch's fused one, which does not store the [token, token] scores, or the
    library's own where it has no other (DeBERTa; ELECTRA in transformers 4).

    A module that several blocks use belongs to the first of them: it trains, and is frozen, with that block.

    Attributes:
        options: the keys that `backbone.args` takes.
        layers: the name of the list of layers in the encoder.
        halves: the names of a layer's modules that its attention block and its feed-forward block use.
        ends: the names of the modules that run after the last layer; `{base}` stands for the library's name of the encoder.
    """

    options: ClassVar[tuple[str, ...]] = (*SIZES.split(), "classifier_dropout")
    layers: ClassVar[str] = "encoder.layer"
    halves: ClassVar[tuple[tuple[str, ...], tuple[str, ...]]] = (("attention",), ("intermediate", "output"))
    ends: ClassVar[tuple[str, ...]] = ("{base}.pooler", "dropout", "classifier")

    def __init__(self, net: Any) -> None:
        prefix = net.base_model_prefix
        ends = [name.format(base=prefix) for name in self.ends]
        names = [tuple(f"{prefix}.{name}" for name in used) for used in self._used(net)]
        layers = dict.fromkeys(name.rpartition(".")[0] for name, _ in net.named_parameters())
        last = [layer for layer in layers if layer.startswith(tuple(ends))]
        super().__init__(net, block_names=_owned_once(names), head_names=ends, classifiers=last)
        self.vocabulary = int(net.config.vocab_size)

    @property
    def max_tokens(self) -> int | None:
        return int(self.net.config.max_position_embeddings)

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

    def _used(self, net: Any) -> list[tuple[str, ...]]:
        """Return the modules of the encoder that each block uses."""
        count = len(net.base_model.get_submodule(self.layers))
        return [tuple(f"{self.layers}.{k}.{name}" for name in half) for k in range(count) for half in self.halves]

    def _embed(self, ids: Tensor, mask: Tensor, types: Tensor) -> Any:  # noqa: ARG002
        return self.base.embeddings(input_ids=ids, token_type_ids=types)

    def _layer(self, number: int) -> Any:
        return self.base.get_submodule(self.layers)[number]

    def _attend(self, layer: Any, x: Any, mask: Tensor) -> Any:
        return layer.attention(x, self._for_scores(x, mask))[0]

    def _for_scores(self, x: Any, mask: Tensor) -> Tensor:
        """Return the mask [row, 1, 1, token] as the library's attention takes it: True = real, or numbers to add to scores."""
        real = mask[:, None, None, :]
        if self.net.config._attn_implementation == "sdpa":
            return real
        return torch.zeros_like(real, dtype=x.dtype).masked_fill(~real, torch.finfo(x.dtype).min)

    def _feed(self, layer: Any, x: Any) -> Any:
        return layer.feed_forward_chunk(x)


class RobertaBackbone(BertBackbone):
    """The adapter of RoBERTa, XLM-R and CamemBERT: their classifier takes all tokens, positions start after the padding id."""

    ends = ("classifier",)

    @property
    def max_tokens(self) -> int | None:
        return int(self.net.config.max_position_embeddings - self.net.config.pad_token_id - 1)

    def head(self, hidden: Hidden) -> Tensor:
        logits: Tensor = self.net.classifier(hidden.x)
        return logits


class ElectraBackbone(BertBackbone):
    """The adapter of ELECTRA's discriminator: its embeddings may be narrower than its layers, its classifier takes all tokens."""

    options = (*BertBackbone.options, "embedding_size")
    ends = ("classifier",)

    def _embed(self, ids: Tensor, mask: Tensor, types: Tensor) -> Any:
        x = super()._embed(ids, mask, types)
        return self.base.embeddings_project(x) if hasattr(self.base, "embeddings_project") else x

    def head(self, hidden: Hidden) -> Tensor:
        logits: Tensor = self.net.classifier(hidden.x)
        return logits


class DistilBertBackbone(BertBackbone):
    """The adapter of DistilBERT, which has no token types and no pooler."""

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
    """The adapter of ALBERT, whose layers share weights: one group of weights serves many layers, by default all.

    The first two blocks that use a group own it; later ones own nothing and change with it. With one group, segments after the
    first have nothing to train: a regime that trains segment by segment trains the encoder in its first stage, and only heads in
    later ones.
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
    """The adapter of DeBERTa, DeBERTa-v2 and v3, which have their own attention and mask.

    All layers read the same relative positions, which belong to block 0. Networks with a convolution after layer 0, as the
    largest of v2 have, are refused: it reads the embeddings once more.
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
    """Return, for each layer of an ALBERT, the group of weights and the layer in it that it runs."""
    per_group = config.num_hidden_layers / config.num_hidden_groups
    groups = [int(number / per_group) for number in range(config.num_hidden_layers)]
    return [(group, inner) for group in groups for inner in range(config.inner_group_num)]


def _owned_once(used: Sequence[tuple[str, ...]]) -> list[tuple[str, ...]]:
    """Return the names that each block uses, less those that an earlier block uses."""
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
