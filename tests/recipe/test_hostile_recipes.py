"""Recipes that are hostile, damaged or only odd: what is refused, in which words and how fast, and that the rest reads back."""

import math
import os
import time

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from eectl.core.errors import EectlError
from eectl.recipe.reading import dump_recipe, make_recipe, read_recipe
from eectl.recipe.recipe import ModelSpec, Recipe
from eectl.recipe.yaml_text import dump_yaml, inline_yaml, parse_yaml

LARGE = "9" * 5000


def refusal(text):
    """The lines that a recipe of this text is refused with, within five seconds; an assertion fails where it is taken."""
    begun = time.process_time()
    with pytest.raises(EectlError) as caught:
        value = parse_yaml(text, where="r.yaml")
        make_recipe({} if value is None else value, where="r.yaml")
    assert time.process_time() - begun < 5
    lines = str(caught.value).splitlines()
    assert all(line.startswith("r.yaml") and len(line) < 600 and line.isprintable() for line in lines), lines
    return lines


# --- what is a number, and what is not ------------------------------------------------------------------------------------


def test_scalars_are_those_of_yaml_1_2():
    text = (
        "[017, 0x10, 0o17, 1_0, 1:30, 2024-01-01, 2024-01-01 10:00:00, yes, no, on, off, １２, 1e5, 1.5, -3, +4, .5, 5., 0, -0]"
    )
    assert parse_yaml(text, where="x") == [
        *("017", "0x10", "0o17", "1_0", "1:30", "2024-01-01", "2024-01-01 10:00:00", "yes", "no", "on", "off", "１２"),
        *(1e5, 1.5, -3, 4, 0.5, 5.0, 0, 0),
    ]
    assert parse_yaml("[~, null, Null, NULL, '', 'null', true, TRUE, False]", where="x") == [
        *(None, None, None, None, "", "null", True, True, False)
    ]
    low, high, other = parse_yaml("[-.inf, .INF, .nan]", where="x")
    assert (low, high) == (-math.inf, math.inf) and math.isnan(other)


@pytest.mark.parametrize(
    "written", ["017", "0x10", "0o17", "1_0", "1:30", "１２", "true", "'3'", "3.5", "[3]", "1" + "0" * 30, LARGE]
)
def test_only_a_whole_number_of_a_size_is_a_count(written):
    (line,) = refusal(f"epochs: {written}")
    assert line.startswith("r.yaml: epochs: is ") and "input should be" in line


# --- the form of a document ---------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("text", "words"),
    [
        ("[1, 2]: 3", "r.yaml:1:1: a key is a name or a whole number"),
        ("{a: 1}: 3", "r.yaml:1:1: a key is a name or a whole number"),
        ("? [a]\n: b", "a key is a name or a whole number"),
        ("true: 1", "a key is a name or a whole number"),
        ("null: 1", "a key is a name or a whole number"),
        ("1.5: 1", "a key is a name or a whole number"),
        ("<<: {epochs: 3}", "r.yaml: <<: no such key"),
        ("a: &x [1]\nb: *x", "r.yaml:2:4: aliases (*name) are not taken"),
        ("epochs: !!int '3'", "r.yaml:1:9: tags (tag:yaml.org,2002:int) are not taken"),
        ("epochs: !!binary aGVsbG8=", "tags ("),
        ("a: !!python/object/apply:os.system [ls]", "tags (tag:yaml.org,2002:python/object/apply:os.system) are not taken"),
        ("a: !\x9bx 3", "not YAML"),
        ("epochs: 3\n---\nepochs: 4", "r.yaml:2:1: a second document begins"),
        ("a: 3\x00", "not YAML"),
        ("a: \ud800", "not YAML"),
        ("a: [1", "r.yaml:"),
        ("epochs: 1e999", "r.yaml:1:9: 1e999 is too large a number"),
        ("backbone: {args: {x: [" + "9" * 320 + ".0]}}", "is too large a number"),
        ("[" * 20_000, "r.yaml:1:"),
        ("{a: " * 20_000, "more than 32 deep are not taken"),
        ("- " * 20_000, "more than 32 deep are not taken"),
        ("? " * 20_000, "a key is a name or a whole number"),
        ("x: 1\n" * 200_000, "1,000,000 characters; a recipe has at most 262,144"),
        ('"\\x1b[31mred": 3', "r.yaml: \\x1b[31mred: no such key"),
        ('"\\u202eevil": 3', "r.yaml: \\u202eevil: no such key"),
        ('epochs: "\\x1b[31mred"', r"epochs: is '\x1b[31mred'; input should be"),
        ("a" * 200_000 + "\n: 3", "r.yaml"),
        (f"? {'a' * 200_000}\n: 3", "no such key"),
    ],
)
def test_what_a_document_may_not_be(text, words):
    (line,) = refusal(text)
    assert words in line


def test_a_list_of_mistakes_is_short_and_quick():
    lines = refusal("".join(f"optimizer{number}: 1\n" for number in range(12_000)))
    assert lines[0] == "r.yaml: optimizer0: no such key (did you mean 'optimizer'?)"
    assert len(lines) == 21 and lines[-1] == "r.yaml: and 11,980 more mistakes"
    lines = refusal("exits: {after: [" + "true, " * 40_000 + "]}")
    assert len(lines) == 21 and lines[0].startswith("r.yaml: exits.after[0]: is True;")


@pytest.mark.parametrize(
    "name", ["/dev/zero", "folder.yaml", "n" * 300 + ".yaml", "loop.yaml", "no/such.yaml", "long", "nul\0.yaml"]
)
def test_what_is_no_file(name, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    (tmp_path / "folder.yaml").mkdir()
    (tmp_path / "loop.yaml").symlink_to("loop.yaml")
    with pytest.raises(EectlError) as caught:
        read_recipe("n" * 100_000 if name == "long" else name)
    assert "\n" not in str(caught.value)


def test_a_file_that_is_not_text(tmp_path):
    path = tmp_path / "r.yaml"
    path.write_bytes(os.urandom(4096) + b"\xff")
    with pytest.raises(EectlError, match="not UTF-8"):
        read_recipe(str(path))


# --- the value of each key ----------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("text", "line"),
    [
        ("data: {augment: {crop: true}}", "data.augment.crop: is True; input should be a valid integer"),
        ("data: {augment: {flip: 1}}", "data.augment.flip: is 1; input should be a valid boolean"),
        ("data: {augment: {rotation: true}}", "data.augment.rotation: is True; input should be a valid number"),
        ("data: {augment: {mixup: 1e-300}}", "data.augment.mixup: is 1e-300; input should be 0 (off), or from 0.001"),
        ("data: {augment: {cutmix: 1e300}}", "data.augment.cutmix: is 1e+300; input should be less than or equal to 1000"),
        ("data: {augment: {resized_crop: [.nan, 1]}}", "data.augment.resized_crop[0]: is nan; input should be a finite number"),
        ("data: {normalize: [[.nan], [1]]}", "data.normalize[0][0]: is nan; input should be a finite number"),
        ("data: {normalize: [[.inf], [1]]}", "data.normalize[0][0]: is inf; input should be a finite number"),
        ("data: {normalize: [[], []]}", "data.normalize: is [[], []]; 0 means and 0 deviations"),
        ("data: {normalize: [[0, 0], [1, 1]]}", "2 means and 2 deviations; give one of each for grey images, three for colour"),
        ("data: {normalize: [[0], [1, 1, 1]]}", "1 means and 3 deviations"),
        ("data: {normalize: [[0], [1]], channels: 3}", "data: normalize has 1 means, and channels is 3"),
        ("data: {normalize: [[0], [0]]}", "data.normalize[1][0]: is 0; input should be greater than or equal to 1e-12"),
        ("data: {channels: true}", "data.channels: is True; input should be a whole number"),
        ("data: {channels: 1.0}", "data.channels: is 1.0; input should be a whole number"),
        ("data: {image_size: 1000000}", "data.image_size: is 1000000; input should be less than or equal to 8192"),
        ("data: {image_size: true}", "data.image_size: is True"),
        ("data: {split_seed: -1}", "data.split_seed: is -1; input should be greater than or equal to 0"),
        ("data: {workers: 1000000}", "data.workers: is 1000000"),
        ("data: {max_length: 1000000000}", "data.max_length: is 1000000000; input should be less than or equal to 65536"),
        ("data: {validation: true}", "data.validation: is True"),
        ("data: {validation: '0.1'}", "data.validation: is '0.1'; input should be a valid number"),
        ("data: {limit: true}", "data.limit: is True; give a number of training rows"),
        ("data: {limit: {test: true}}", "data.limit.test: is True"),
        ("data: {in_memory: 1}", "data.in_memory: is 1; input should be a valid boolean, or 'auto'"),
        ('data: {root: "a\\0b"}', "data.root: is 'a\\x00b'; a NUL character stands in it"),
        ("data: {root: 2024}", "data.root: is 2024; a path is a text; put it in quotes"),
        ("data: {root: ''}", "data.root: is ''; a path has 1 to 4,096 characters"),
        ('init: "a\\0b"', "init: is 'a\\x00b'; a NUL character"),
        (f"data: {{root: {'d/' * 5000}}}", "a path has 1 to 4,096 characters, not 10,000"),
        ("data: {name: text, text: [a, 1], tokenizer: x}", "data.text[1]: is 1; input should be a valid string"),
        (f"backbone: {{name: {'n' * 5000}}}", "backbone.name: is 'nnn"),
        ('backbone: {name: "hf/a\\0b"}', "backbone.name: is 'hf/a\\x00b'; a NUL character"),
        ("backbone: {pretrained: 1}", "backbone.pretrained: is 1"),
        ("backbone: {args: {x: .inf}}", "backbone.args: x: is inf; finite numbers are taken"),
        ("backbone: {args: {x: [1, .nan]}}", "backbone.args: x[1]: is nan; finite numbers are taken"),
        ("backbone: {args: {x: 99999999999999999999}}", "backbone.args: x: a number beyond ±2^53"),
        ("backbone: {args: {3: 1}}", "backbone.args: the key 3 is no text"),
        ("backbone: {args: {a: {3: 1}}}", "backbone.args: a: the key 3 is no text"),
        ("backbone: {args: {x: " + "[" * 20 + "]" * 20 + "}}", "backbone.args: lists and mappings more than 16 deep"),
        ("backbone: {args: {x: [" + "1, " * 20_000 + "]}}", "backbone.args: more than 10,000 values"),
        (f"backbone: {{args: {{x: {'n' * 5000}}}}}", "backbone.args: x: a text of 5,000 characters"),
        ("exits: {after: [true, 3]}", "exits.after[0]: is True"),
        ("exits: {after: [1.0]}", "exits.after[0]: is 1.0"),
        ("exits: {after: [100000]}", "exits.after[0]: is 100000; input should be less than 10000"),
        (
            "exits: {after: [" + "1, " * 20_000 + "]}",
            "exits.after: is [1, 1, 1, 1, 1, 1, 1, 1, ...]; tuple should have at most 1000",
        ),
        ("exits: {placement: every-0}", "exits.placement: is 'every-0'; no such placement"),
        (f"exits: {{placement: every-{'9' * 4000}}}", "no such placement"),
        ("exits: {placement: every-２}", "exits.placement: is 'every-２'; no such placement"),
        ("exits: {placement: every-2, head: mlp-2000000000}", "exits.head: is 'mlp-2000000000'; no such head"),
        ("exits: {placement: every-2, head: liner}", "no such head (did you mean 'linear'?)"),
        ("optimizer: {lr: 1e300}", "optimizer.lr: is 1e+300; input should be less than or equal to 1000"),
        ("optimizer: {lr: true}", "optimizer.lr: is True"),
        ("optimizer: {lr: '0.1'}", "optimizer.lr: is '0.1'; input should be a valid number, in decimal and without quotes"),
        ("optimizer: {weight_decay: 1e300}", "optimizer.weight_decay: is 1e+300"),
        ("optimizer: {clip_norm: .inf}", "optimizer.clip_norm: is inf"),
        ("optimizer: {betas: [0.9, .nan]}", "optimizer.betas[1]: is nan"),
        ("schedule: {cycle: 1e-300}", "schedule.cycle: is 1e-300"),
        ("schedule: {cycle_factor: true}", "schedule.cycle_factor: is True"),
        ("schedule: {warmup: 1e300}", "schedule.warmup: is 1e+300"),
        ("distillation: {temperature: 1e-300}", "distillation.temperature: is 1e-300"),
        ("l2w: {hidden: 1000000000}", "l2w.hidden: is 1000000000"),
        ("loss_weights: [1e308, 1]", "loss_weights[0]: is 1e+308; input should be less than or equal to 1000000"),
        ("loss_weights: [true]", "loss_weights[0]: is True"),
        ("loss_weights: true", "loss_weights: is True"),
        ("eval_batch_size: 100000000000000000000", "eval_batch_size: is 100000000000000000000; input should be less than"),
        ("eval_batch_size: 0", "eval_batch_size: is 0; input should be greater than or equal to 1"),
        ("batch_size: true", "batch_size: is True"),
        ("phases: {0: {}}", "phases[0]: is 0; input should be greater than or equal to 1"),
        ("phases: {x: {}}", "phases: 'x' is not the number of a phase"),
        ("phases: {３: {}}", "phases: '３' is not the number of a phase"),
        ("phases: {3: {}, '3': {}}", "phases: phase 3 stands twice"),
        ("phases: {3: {lr: 1e300}}", "phases[3].lr: is 1e+300"),
        ("deterministic: 1", "deterministic: is 1"),
        ("compile: yes", "compile: is 'yes'; input should be a valid boolean, or 'auto'"),
        ("cache_features: 1e300", "cache_features: is 1e+300"),
        ("seed: true", "seed: is True"),
        ("seed: 4294967296", "seed: is 4294967296"),
    ],
)
def test_what_a_key_may_not_be(text, line):
    (said,) = refusal(text)
    assert line in said


@pytest.mark.parametrize(
    ("key", "value"),
    [
        *(("exits.after", "[true]"), ("phases.９.epochs", "3"), ("phases." + LARGE + ".epochs", "3"), ("a." * 5000 + "b", "3")),
        *(("epochs", "017"), ("epochs", "[" * 5000), ("epochs.x", "3"), ("data.root", "a\0b"), ("epochs", "3\n---\n4")),
    ],
)
def test_what_set_may_not_be(key, value):
    with pytest.raises(EectlError) as caught:
        make_recipe({}, where="r.yaml", changes=[f"{key}={value}"])
    assert len(str(caught.value)) < 1000 and "\n" not in str(caught.value)


def test_changes_leave_what_they_were_given_as_it_was():
    given = {"optimizer": {"lr": 0.1}, "phases": {3: {"epochs": 1}}}
    recipe = make_recipe(given, where="x", changes=["optimizer.lr=0.2", "phases.3.epochs=2", "exits.after=[1]"])
    assert (recipe.optimizer.lr, recipe.phases[3].epochs, recipe.exits.after) == (0.2, 2, (1,))
    assert given == {"optimizer": {"lr": 0.1}, "phases": {3: {"epochs": 1}}}


@pytest.mark.parametrize(
    ("change", "place"),
    [
        *(({"num_outputs": 10**8}, "num_outputs"), ({"num_outputs": True}, "num_outputs"), ({"after": [True]}, "after")),
        *(({"input_shape": [3, 10**6, 10**6]}, "input_shape"), ({"input_shape": [60_000, 60_000, 60_000]}, "input_shape")),
        *(({"heads": ["mlp-2000000000"]}, "heads"), ({"heads": ["auto"]}, "heads"), ({"after": [10**6]}, "after")),
        *(
            ({"combine": "x"}, "combine"),
            ({"after": [1] * 2000}, "after"),
            ({"backbone": {"args": {"depth": 10**17}}}, "backbone"),
        ),
    ],
)
def test_what_a_checkpoint_may_not_say_of_its_network(change, place):
    plain = {"backbone": {"name": "resnet20"}, "input_shape": [3, 32, 32], "num_outputs": 10, "after": [1], "heads": ["mlp-64"]}
    assert ModelSpec.model_validate(plain).num_outputs == 10
    with pytest.raises(ValueError, match=place):
        ModelSpec.model_validate(plain | change)


# --- what reads back ----------------------------------------------------------------------------------------------------------

ODD = [
    *("017", "0x1F", "1_000", "1:30", "1e5", ".5", "-3", "true", "No", "null", "~", "", " a ", "a\tb", "\x1b[31m", "2024-01-01"),
    *("<<", "=", "\x85", "\u2028x", "\ufeff", "#x", "a: b", "a #b", "- a", "[a]", "'", '"', "\\", "!x", "&x", "*x", "%x", "@x"),
    *("`x", "|", ">", "?", ":", "-", "---", "...", "\U0001f600", ".inf", ".nan", "0o17", "a\nb", "\n", "x" * 200, "a b " * 60),
]
characters = st.characters(exclude_categories=("Cs",), exclude_characters="\0")
words = st.one_of(st.sampled_from(ODD), st.text(characters, max_size=60))
names = words.filter(bool)
numbers = st.one_of(st.integers(-(2**53), 2**53), st.floats(allow_nan=False, allow_infinity=False))
scalars = st.one_of(st.none(), st.booleans(), numbers, words)
free = st.recursive(
    scalars, lambda inner: st.one_of(st.lists(inner, max_size=4), st.dictionaries(words, inner, max_size=4)), max_leaves=20
)


def some(**keys):
    """A section in which each of these keys may stand or not."""
    return st.fixed_dictionaries({}, optional=keys)


share = st.floats(0.001, 0.49)
rates = st.floats(1e-12, 1e3)
counts = st.integers(1, 10**9)
augment = some(
    resized_crop=st.just([0.25, 1]),
    trivial=st.booleans(),
    crop=st.integers(0, 8192),
    contrast=st.floats(0, 0.99),
    mixup=st.one_of(st.just(0), st.floats(1e-3, 1e3)),
)
mean = st.lists(st.floats(-1e3, 1e3), min_size=3, max_size=3)
deviation = st.lists(st.floats(1e-6, 1e6), min_size=3, max_size=3)
folder = st.fixed_dictionaries(
    {"name": st.just("folder")},
    optional={
        "root": names,
        "image_size": st.integers(1, 8192),
        "normalize": st.one_of(st.just("imagenet"), st.tuples(mean, deviation).map(list)),
        "validation": share,
        "calibration": share,
        "split_seed": st.integers(0, 10**18),
        "limit": st.one_of(counts, some(train=counts, test=counts)),
        "in_memory": st.one_of(st.booleans(), st.just("auto")),
        "augment": augment,
    },
)
text = st.fixed_dictionaries(
    {"name": st.just("text"), "tokenizer": names},
    optional={
        "text": st.one_of(names, st.lists(names, min_size=1, max_size=2)),
        "target": names,
        "max_length": st.integers(3, 65_536),
    },
)
recipes = some(
    data=st.one_of(folder, text),
    backbone=some(name=names, args=st.dictionaries(words, free, max_size=5), weights=names),
    init=names,
    exits=st.one_of(
        st.fixed_dictionaries({"after": st.lists(st.integers(0, 9999), unique=True, max_size=8)}),
        st.fixed_dictionaries({"placement": st.sampled_from(["every-3", "dense-sparse"])}),
    ),
    loss_weights=st.one_of(st.sampled_from(["auto", "sdn-ramp"]), st.lists(st.floats(0, 1e6), max_size=5)),
    optimizer=some(lr=rates, weight_decay=st.floats(0, 1e3), clip_norm=st.one_of(st.none(), st.floats(1e-6, 1e6))),
    phases=st.dictionaries(st.integers(1, 99_999), some(epochs=counts, lr=rates), max_size=4),
    epochs=counts,
    compile=st.one_of(st.booleans(), st.just("auto")),
    seed=st.integers(0, 2**32 - 1),
)


@settings(max_examples=150, deadline=None)
@given(st.dictionaries(st.one_of(words, st.integers()), free, max_size=6))
def test_plain_data_reads_back(value):
    assert parse_yaml(dump_yaml(value), where="x") == value
    line = inline_yaml(value)
    assert parse_yaml(line, where="x") == value and len(line.splitlines()) == 1


@settings(max_examples=150, deadline=None)
@given(recipes)
def test_recipes_read_back_equal(value):
    recipe = make_recipe(value, where="x")
    text = dump_recipe(recipe)
    assert make_recipe(parse_yaml(text, where="y"), where="y") == recipe
    assert make_recipe(recipe.plain(), where="plain") == recipe
    assert dump_recipe(make_recipe(parse_yaml(text, where="y"), where="y")) == text


def test_what_was_not_set_is_not_written_and_none_in_args_is():
    recipe = make_recipe({"backbone": {"args": {"x": None, "y": (1, 2), "z": {"w": None}}}}, where="x")
    read = parse_yaml(dump_recipe(recipe), where="x")
    assert read["backbone"] == {"name": "resnet20", "args": {"x": None, "y": [1, 2], "z": {"w": None}}, "pretrained": False}
    assert "init" not in read and Recipe.model_validate(read) == recipe
