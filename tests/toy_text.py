"""Toys for text: a word-level tokenizer, files in several formats, and a three-block network that reads tokens under a mask."""

import csv
import json
import random
from types import SimpleNamespace

import torch
from tokenizers import Tokenizer, models, pre_tokenizers, processors
from torch import nn
from transformers import PreTrainedTokenizerFast

from eectl.models.backbone import Backbone, Feature, Hidden

WORDS = ["good", "bad", "fine", "poor", "the", "film", "was", "very", "not", "and", "a", "plot", "with", "cast"]
VALUES = {"good": 1.0, "bad": -1.0, "fine": 0.5, "poor": -0.5}
WIDTH = 8


def write_tokenizer(folder, *, extra=0):
    """[PAD] 0, [UNK] 1, [CLS] 2, [SEP] 3, then WORDS and `extra` more; pairs get token types 0 and 1, as BERT's."""
    names = ["[PAD]", "[UNK]", "[CLS]", "[SEP]", *WORDS, *(f"more{i}" for i in range(extra))]
    tokenizer = Tokenizer(models.WordLevel({name: index for index, name in enumerate(names)}, unk_token="[UNK]"))
    tokenizer.pre_tokenizer = pre_tokenizers.Whitespace()
    tokenizer.post_processor = processors.TemplateProcessing(
        single="[CLS] $A [SEP]", pair="[CLS] $A [SEP] $B:1 [SEP]:1", special_tokens=[("[CLS]", 2), ("[SEP]", 3)]
    )
    fast = PreTrainedTokenizerFast(
        tokenizer_object=tokenizer, pad_token="[PAD]", unk_token="[UNK]", cls_token="[CLS]", sep_token="[SEP]"
    )
    fast.save_pretrained(folder)
    return str(folder)


def make_rows(count, *, seed=0, longest=20):
    """Sentences of 2 to `longest` words, the sum of their words' values, and whether it is above, at or below 0."""
    draw = random.Random(seed)
    rows = []
    for _ in range(count):
        words = [draw.choice(WORDS) for _ in range(draw.randint(2, longest))]
        value = sum(VALUES.get(word, 0.0) for word in words)
        mood = "up" if value > 0 else "down" if value < 0 else "level"
        rows.append({"text": " ".join(words), "score": value, "mood": mood})
    return rows


def write_csv(path, rows, delimiter=","):
    with path.open("w", newline="", encoding="utf-8") as file:
        writer = csv.DictWriter(file, list(rows[0]), delimiter=delimiter)
        writer.writeheader()
        writer.writerows(rows)


def write_jsonl(path, rows):
    path.write_text("".join(json.dumps(row) + "\n" for row in rows), encoding="utf-8")


def naive_read(tokenizer, *texts):
    """Ids and types of one row, without padding, by splitting at spaces."""
    ids, types = [2], [0]
    for kind, text in enumerate(texts):
        words = [tokenizer.convert_tokens_to_ids(word) for word in text.split()]
        ids, types = ids + words + [3], types + [kind] * (len(words) + 1)
    return ids, types


class Masked(Feature):
    """The mean over real tokens."""

    def __init__(self, hidden):
        self.hidden = hidden

    def pooled(self):
        mask = self.hidden.mask[:, :, None].to(self.hidden.x.dtype)
        return (self.hidden.x * mask).sum(1) / mask.sum(1)

    def map(self):
        raise NotImplementedError


class TokenNet(Backbone):
    """An embedding, three linear blocks with a residual, and a linear head on the mean of the real tokens."""

    def __init__(self, num_outputs, vocabulary):
        net = nn.ModuleDict({f"b{i}": nn.Linear(WIDTH, WIDTH) for i in range(3)})
        net["embed"], net["fc"] = nn.Embedding(vocabulary, WIDTH), nn.Linear(WIDTH, num_outputs)
        super().__init__(net, block_names=[[f"b{i}"] for i in range(3)], head_names=["fc"], classifiers=["fc"])
        self.vocabulary = vocabulary

    def example(self, input_shape):
        device = next(self.parameters()).device
        return torch.tensor([0, 1, 0], device=device)[None, :, None].expand(1, *input_shape).contiguous()

    def stem(self, inputs):
        ids, mask, types = inputs.unbind(1)
        return Hidden(self.net["embed"](ids) + types[:, :, None].float(), mask)

    def block(self, index, hidden):
        return Hidden(hidden.x + self.net[f"b{index}"](hidden.x).relu(), hidden.mask)

    def head(self, hidden):
        return self.net["fc"](Masked(hidden).pooled())

    def feature(self, hidden):
        return Masked(hidden)


def build(name, args, *, input_shape, num_outputs, pretrained):
    assert len(input_shape) == 2 and not pretrained
    return TokenNet(num_outputs, args.get("vocabulary", 4 + len(WORDS)))


TOY = SimpleNamespace(name="toy-text", build=lambda: build)
