"""A small network of every adapter, with noise in its tensors, and rows that it takes."""

from typing import NamedTuple

import pytest
import torch
from torch import Tensor

from eectl.models.backbone import Backbone
from eectl.models.build import build_backbone
from eectl.recipe.recipe import BackboneSection

NUM_OUTPUTS = 5


class Case(NamedTuple):
    """A small network of one adapter, its blocks, and the parts that its stem and head own."""

    name: str
    args: dict[str, object]
    shape: tuple[int, ...]
    depth: int
    stem: set[str]
    head: set[str]


SMALL_TIMM = {"patch_size": 4, "embed_dim": 24, "depth": 3, "num_heads": 3}
RANDOM_TIMM = SMALL_TIMM | {
    "drop_rate": 0.1,
    "pos_drop_rate": 0.1,
    "proj_drop_rate": 0.1,
    "attn_drop_rate": 0.1,
    "drop_path_rate": 0.2,
}
ONE_EACH = {"layers": [1, 1, 1, 1], "drop_rate": 0.2, "drop_path_rate": 0.2}
CNN_STEM = {"conv1", "bn1"}
VIT_STEM = {"patch_embed", "pos_embed", "cls_token"}
DROPS = {"drop_rate": 0.2, "drop_path_rate": 0.2}
WINDOWS = {"depths": [2, 1], "num_heads": [2, 2], "embed_dim": 8, "window_size": 4, "patch_size": 2} | DROPS
TEXT = {
    **{"vocab_size": 40, "hidden_size": 32, "num_hidden_layers": 3, "num_attention_heads": 4, "intermediate_size": 48},
    "max_position_embeddings": 16,
}
NARROW = {"embedding_size": 16, "hidden_dropout_prob": 0.1, "attention_probs_dropout_prob": 0.1}
RELATIVE = {"relative_attention": True, "pos_att_type": ["p2c", "c2p"], "position_biased_input": False}
DISTIL = {"vocab_size": 40, "dim": 32, "n_layers": 2, "n_heads": 4, "hidden_dim": 48, "max_position_embeddings": 9}
SMALL_MSDNET = {"blocks": 3, "base": 2, "step": 2, "channels": 4, "growth": 2}  # 2 scales in, 6 layers, 2 transitions

CASES = {
    "cifar": Case("resnet20", {}, (3, 8, 8), 9, CNN_STEM, {"fc"}),
    "msdnet": Case("msdnet", SMALL_MSDNET, (3, 12, 8), 9, set(), {"classifier"}),
    "msdnet-standard": Case(
        "msdnet", SMALL_MSDNET | {"stem": "standard", "prune": "min", "bottleneck": False}, (1, 32, 32), 9, set(), {"classifier"}
    ),
    "resnet": Case("resnet18", {}, (3, 32, 32), 8, CNN_STEM, {"fc"}),
    "resnet-small-grey": Case("resnet18", {"stem": "small"}, (1, 9, 8), 8, CNN_STEM, {"fc"}),
    "vit": Case(
        "vit",
        {"patch_size": 4, "dim": 16, "mlp_dim": 24, "depth": 3, "heads": 2, "dropout": 0.1, "attention_dropout": 0.1},
        (3, 8, 8),
        3,
        {"class_token", "conv_proj", "encoder.pos_embedding"},
        {"encoder.ln", "heads"},
    ),
    "timm-resnet": Case("timm/resnet18", ONE_EACH, (3, 32, 32), 4, CNN_STEM, {"fc"}),
    "timm-bottleneck": Case("timm/resnet50.a1_in1k", ONE_EACH, (1, 32, 24), 4, CNN_STEM, {"fc"}),
    "timm-deep-stem": Case("timm/resnet18d", ONE_EACH, (3, 32, 32), 4, CNN_STEM, {"fc"}),
    "timm-vit": Case("timm/vit_tiny_patch16_224", RANDOM_TIMM, (3, 8, 12), 3, VIT_STEM, {"norm", "head"}),
    "timm-dynamic": Case(
        "timm/vit_tiny_patch16_224", RANDOM_TIMM | {"dynamic_img_size": True}, (1, 8, 8), 3, VIT_STEM, {"norm", "head"}
    ),
    "timm-distilled": Case(
        "timm/deit_tiny_distilled_patch16_224",
        RANDOM_TIMM,
        (3, 8, 8),
        3,
        VIT_STEM | {"dist_token"},
        {"norm", "head", "head_dist"},
    ),
    "timm-no-class-token": Case(
        "timm/vit_medium_patch16_reg4_gap_256",
        RANDOM_TIMM,
        (3, 8, 8),
        3,
        {"patch_embed", "pos_embed", "reg_token"},
        {"fc_norm", "head"},
    ),
    "timm-pre-norm": Case("timm/vit_base_patch16_clip_224", SMALL_TIMM, (3, 8, 8), 3, VIT_STEM | {"norm_pre"}, {"norm", "head"}),
    "timm-attention-pool": Case(
        "timm/vit_base_patch16_siglip_224", SMALL_TIMM, (3, 8, 8), 3, {"patch_embed", "pos_embed"}, {"norm", "attn_pool", "head"}
    ),
    "timm-hybrid": Case("timm/vit_tiny_r_s16_p8_224", {"depth": 2, "embed_dim": 24}, (3, 64, 64), 2, VIT_STEM, {"norm", "head"}),
    "timm-convnext": Case(
        "timm/convnext_atto", {"depths": [2, 1, 1, 1], "dims": [8, 12, 16, 24]} | DROPS, (3, 64, 64), 5, {"stem"}, {"head"}
    ),
    "timm-convnext-norm-first": Case(
        "timm/convnext_atto",
        {"depths": [1, 1, 1, 1], "dims": [8, 8, 8, 8], "head_norm_first": True},
        (1, 64, 32),
        4,
        {"stem"},
        {"norm_pre", "head"},
    ),
    "timm-swin": Case("timm/swin_tiny_patch4_window7_224", WINDOWS, (3, 16, 32), 3, {"patch_embed"}, {"norm", "head"}),
    "timm-swin2": Case("timm/swinv2_tiny_window8_256", WINDOWS, (1, 16, 16), 3, {"patch_embed"}, {"norm", "head"}),
    "timm-efficientnet": Case(
        "timm/test_efficientnet", DROPS, (3, 64, 32), 5, {"conv_stem", "bn1"}, {"conv_head", "bn2", "classifier"}
    ),
    "timm-mobilenetv3": Case(
        "timm/mobilenetv3_small_050", DROPS, (3, 64, 32), 12, {"conv_stem", "bn1"}, {"conv_head", "classifier"}
    ),
    "timm-mobilenetv4": Case(
        "timm/mobilenetv4_conv_small_035", DROPS, (1, 32, 32), 17, {"conv_stem", "bn1"}, {"conv_head", "norm_head", "classifier"}
    ),
    "timm-regnet": Case("timm/regnety_002", DROPS, (3, 32, 32), 13, {"stem"}, {"head"}),
    "timm-mixer": Case(
        "timm/mixer_s32_224",
        {"mlp_ratio": [0.1, 0.1], "proj_drop_rate": 0.1} | DROPS,
        (3, 32, 64),
        8,
        {"stem"},
        {"norm", "head"},
    ),
    "timm-byob": Case("timm/test_byobnet", DROPS, (3, 32, 32), 4, {"stem"}, {"head"}),
    "timm-nfnet": Case("timm/test_nfnet", DROPS, (3, 32, 32), 4, {"stem"}, {"final_conv", "head"}),
    "timm-resnetv2": Case("timm/resnetv2_18", ONE_EACH, (3, 32, 32), 4, {"stem"}, {"norm", "head"}),
    "bert": Case("hf/bert", TEXT, (3, 9), 6, {"bert.embeddings"}, {"bert.pooler", "classifier"}),
    "roberta": Case("hf/roberta", TEXT | {"type_vocab_size": 1}, (3, 9), 6, {"roberta.embeddings"}, {"classifier"}),
    "xlm-roberta": Case("hf/xlm-roberta", TEXT, (3, 9), 6, {"roberta.embeddings"}, {"classifier"}),
    "camembert": Case("hf/camembert", TEXT, (3, 9), 6, {"roberta.embeddings"}, {"classifier"}),
    "distilbert": Case("hf/distilbert", DISTIL, (3, 9), 4, {"distilbert.embeddings"}, {"pre_classifier", "classifier"}),
    "electra": Case("hf/electra", TEXT | NARROW, (3, 9), 6, {"electra.embeddings", "electra.embeddings_project"}, {"classifier"}),
    "albert": Case(
        "hf/albert",
        TEXT | NARROW,
        (3, 9),
        6,
        {"albert.embeddings", "albert.encoder.embedding_hidden_mapping_in"},
        {"albert.pooler", "classifier"},
    ),
    "albert-groups": Case(
        "hf/albert",
        TEXT | NARROW | {"num_hidden_groups": 2, "inner_group_num": 2},
        (3, 9),
        12,
        {"albert.embeddings", "albert.encoder.embedding_hidden_mapping_in"},
        {"albert.pooler", "classifier"},
    ),
    "deberta": Case("hf/deberta", TEXT | RELATIVE, (3, 9), 6, {"deberta.embeddings"}, {"pooler", "classifier"}),
    "deberta-v2": Case(
        "hf/deberta-v2", TEXT | {"type_vocab_size": 2}, (3, 9), 6, {"deberta.embeddings"}, {"pooler", "classifier"}
    ),
    "deberta-v3": Case(
        "hf/deberta-v2",
        TEXT | RELATIVE | {"position_buckets": 4, "norm_rel_ebd": "layer_norm", "share_att_key": True},
        (3, 9),
        6,
        {"deberta.embeddings"},
        {"pooler", "classifier"},
    ),
}

SIX = ("cifar", "vit", "timm-swin", "timm-efficientnet", "msdnet", "bert")
"""Those that stand for all where time is short: each adapter module, and NCHW maps, tokens, NHWC windows, scales and texts."""

NETWORKS = [pytest.param(name, marks=[] if name in SIX else pytest.mark.thorough) for name in CASES]
"""The names of all cases, to be a test's parameters; tests/conftest.py leaves out the marked ones unless all are asked for."""


def build_noisy(name: str, args: dict[str, object], shape: tuple[int, ...]) -> Backbone:
    """Every tensor gets noise, so that zero-initialised classifiers and residual branches hide nothing."""
    torch.manual_seed(0)
    backbone = build_backbone(BackboneSection(name=name, args=args), input_shape=shape, num_outputs=NUM_OUTPUTS)
    with torch.no_grad():
        for parameter in backbone.parameters():
            parameter.add_(0.1 * torch.randn_like(parameter))
        for name, buffer in backbone.named_buffers():
            if name.endswith("running_mean"):
                buffer.copy_(0.1 * torch.randn_like(buffer))
    return backbone


def rows_for(case: Case) -> Tensor:
    """Four rows of `case.shape`; of text, three are padded, with the network's padding id."""
    generator = torch.Generator().manual_seed(1)
    if len(case.shape) == 3:
        return torch.randn(4, *case.shape, generator=generator)
    return texts(case.shape[1], padding=1 if "roberta" in case.name or "camembert" in case.name else 0)


def texts(length: int, *, padding: int = 0) -> Tensor:
    """Rows of `length`, 2, 5 and `length` − 1 real tokens, the second half of each of type 1 where the network has types."""
    rows = torch.zeros(4, 3, length, dtype=torch.int64)
    rows[:, 0] = torch.randint(2, 40, (4, length), generator=torch.Generator().manual_seed(1))
    for row, real in zip(rows, (length, 2, 5, length - 1), strict=True):
        row[1, :real] = 1
        row[0, real:] = padding
    return rows
