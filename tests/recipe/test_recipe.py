"""Recipes: what reads back, and what is refused with which words."""

import pytest

from eectl.core.errors import EectlError
from eectl.recipe.reading import dump_recipe, make_recipe, read_recipe, shipped_recipes
from eectl.recipe.recipe import Recipe
from eectl.recipe.yaml_text import parse_yaml


def test_yaml_numbers_and_words_are_read_as_written():
    value = parse_yaml("a: 1e-4\nb: no\nc: [1, 2.5, -3e2, .5]\nd: true\ne: 5E3\nf: 12", where="x")
    assert value == {"a": 1e-4, "b": "no", "c": [1, 2.5, -300.0, 0.5], "d": True, "e": 5000.0, "f": 12}
    assert [type(v) for v in (value["a"], value["f"])] == [float, int]


def test_a_key_twice_is_refused_with_its_line():
    with pytest.raises(EectlError, match=r"r\.yaml:3:3: key 'lr' stands twice"):
        parse_yaml("optimizer:\n  lr: 1\n  lr: 2\n", where="r.yaml")


@pytest.mark.parametrize("text", ["a: [1", "a: b: c", "\x00", "a: &x [*x]"])
def test_broken_yaml_names_the_file(text):
    with pytest.raises(EectlError, match=r"^r\.yaml"):
        make_recipe(parse_yaml(text, where="r.yaml"), where="r.yaml")


def test_all_mistakes_come_at_once():
    bad = {
        "optimzer": {},
        "optimizer": {"lr": -1},
        "exits": {"after": [1, 1]},
        "epochs": "x",
        "data": {"augment": {"mixpu": 1}},
        "regime": "disjont",
        "phases": {3: {"epoch": 1}},
    }
    with pytest.raises(EectlError) as caught:
        make_recipe(bad, where="r.yaml")
    lines = str(caught.value).splitlines()
    assert len(lines) == 7
    for part in [
        "r.yaml: optimzer: no such key (did you mean 'optimizer'?)",
        "r.yaml: optimizer.lr: is -1; input should be greater than or equal to 1e-12",
        "r.yaml: exits: after has a block twice: [1, 1]",
        "r.yaml: epochs: is 'x'; input should be a valid integer",
        "r.yaml: data.augment.mixpu: no such key (did you mean 'mixup'?)",
        "r.yaml: regime: is 'disjont'; no such regime (did you mean 'disjoint'?)",
        "r.yaml: phases[3].epoch: no such key (did you mean 'epochs'?)",
    ]:
        assert any(line.startswith(part) for line in lines), part


def test_changes_reach_inner_keys_and_do_not_touch_the_rest():
    recipe = make_recipe({}, where="x", changes=["optimizer.lr=1e-4", "data.augment.flip=true", "phases.3.epochs=7"])
    assert (recipe.optimizer.lr, recipe.data.augment.flip, recipe.phases[3].epochs) == (1e-4, True, 7)
    assert recipe.optimizer.betas == Recipe().optimizer.betas


def test_after_and_placement_replace_each_other_in_changes():
    recipe = make_recipe({"exits": {"placement": "every-2"}}, where="x", changes=["exits.after=[1, 2]"])
    assert recipe.exits.after == (1, 2)
    assert recipe.exits.placement is None


@pytest.mark.parametrize("change", ["lr", "=3", "optimizer.lr.x=3", "epochs=[1", "nope=1"])
def test_bad_changes(change):
    with pytest.raises(EectlError):
        make_recipe({"optimizer": {"lr": 0.1}}, where="x", changes=[change])


def test_a_recipe_reads_back_equal():
    recipe = make_recipe({"exits": {"after": [1, 3]}, "phases": {3: {"lr": 0.5}}, "loss_weights": [1, 2, 3]}, where="x")
    assert make_recipe(parse_yaml(dump_recipe(recipe), where="y"), where="y") == recipe


def test_unknown_recipes_name_the_nearest():
    with pytest.raises(EectlError, match="did you mean 'digits'"):
        read_recipe("digit")
    with pytest.raises(EectlError, match=r"none\.yaml: cannot be read"):
        read_recipe("none.yaml")


@pytest.mark.parametrize("name", shipped_recipes())
def test_shipped_recipes_validate(name):
    assert read_recipe(name).batch_size > 0


@pytest.mark.parametrize(
    ("data", "said"),
    [
        ({"name": "hfds/x"}, "hfds/OWNER/NAME"),
        ({"name": "hfds/../x/y/z"}, None),
        ({"name": "hfds/https://x/y"}, "hfds/OWNER/NAME"),
        ({"name": "hfds/a/b", "root": "x"}, "hfds/a/b needs none"),
        ({"name": "hfds/a/b", "tokenizer": "x"}, "tokenizer is for text"),
        ({"name": "hfds/a/b", "kind": "texts", "image_size": 8, "tokenizer": "x"}, "image_size is for images"),
        ({"name": "hfds/a/b", "kind": "texts"}, "texts need one"),
        ({"name": "digits", "kind": "images"}, "kind is for hfds/NAME"),
        ({"name": "folder", "shards": {"train": "a.tar"}}, "shards is for wds"),
        ({"name": "cifar10", "image": "a"}, "image is for hfds/NAME"),
        ({"name": "cifar10", "target": "a"}, "target is for data of your own"),
        ({"name": "wds", "shards": {"train": []}}, "at least 1"),
        ({"name": "wds", "shards": {"buffer": 0}}, "greater than or equal to 1"),
        ({"name": "wds", "shards": {"train": "a", "damaged": "ignore"}}, "'error' or 'skip'"),
        ({"epoch_rows": 0}, "greater than or equal to 1"),
        ({"epoch_rows": 10**9}, "less than or equal to 100000000"),
    ],
)
def test_where_data_comes_from_is_looked_at_before_anything_is_read(data, said):
    if said is None:
        assert make_recipe({"data": data}, where="r").data.name == data["name"]
        return
    with pytest.raises(EectlError, match=said):
        make_recipe({"data": data}, where="r")


@pytest.mark.parametrize(
    ("data", "is_text"),
    [
        ({"name": "hfds/a/b"}, False),
        ({"name": "hfds/a/b", "image": "photo", "target": "kind", "variant": "small"}, False),
        ({"name": "hfds/a/b", "text": "sentence", "tokenizer": "t"}, True),
        ({"name": "hfds/./folder", "kind": "texts", "tokenizer": "t"}, True),
        ({"name": "wds", "shards": {"train": ["a-{0..3}.tar"], "test": "b.tar"}, "epoch_rows": 5}, False),
    ],
)
def test_a_recipe_says_by_itself_whether_its_data_are_texts_and_reads_back_so(data, is_text):
    recipe = make_recipe({"data": data}, where="r")
    assert recipe.data.is_text == is_text and make_recipe(recipe.plain(), where="r") == recipe
