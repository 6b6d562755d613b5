"""Data of one's own without YAML: what the flags of train mean as recipe keys, and what they answer where they do not fit."""

import csv
import json

import numpy as np
import pytest
from PIL import Image
from running import eectl, refused
from safetensors.numpy import save_file

from eectl.core.errors import EectlError
from eectl.recipe.data_paths import kind_of, not_a_recipe
from eectl.recipe.own_data import own_data, usual_size
from eectl.recipe.reading import make_recipe, read_recipe
from eectl.recipe.recipe import Recipe


@pytest.fixture
def photos(tmp_path):
    """Images of odd sizes, class folders directly in the root, 20 of each of three classes."""
    draw = np.random.default_rng(0)
    for channel, name in enumerate(("cat", "dog", "fox")):
        (tmp_path / "photos" / name).mkdir(parents=True)
        for number in range(20):
            pixels = draw.integers(0, 90, (*draw.integers(20, 60, 2), 3), dtype=np.uint8)
            pixels[..., channel] += 120
            Image.fromarray(pixels).save(tmp_path / "photos" / name / f"{number}.png")
    return tmp_path / "photos"


@pytest.fixture
def reviews(tmp_path):
    with (tmp_path / "reviews.csv").open("w", newline="") as file:
        csv.writer(file).writerows([["review", "stars"], *([f"text {number}", number % 3] for number in range(60))])
    return tmp_path / "reviews.csv"


def recipe_of(given, *changes: str) -> Recipe:
    return read_recipe(given.recipe, changes=[*given.changes, *changes])


def test_a_folder_of_images_is_the_folder_recipe_with_these_keys(photos):
    given = own_data(data=photos, backbone="timm/resnet18", weights="resnet18.safetensors")
    recipe, template = recipe_of(given), read_recipe("folder")
    assert (given.recipe, given.name) == ("folder", "photos")
    assert (recipe.data.name, recipe.data.root, recipe.data.image_size) == ("folder", photos, 224)
    assert recipe.backbone.model_dump(mode="json") == {
        "name": "timm/resnet18",
        "args": {},
        "pretrained": False,
        "weights": "resnet18.safetensors",
        "drop_path": None,
        "dropout": None,
    }
    assert (recipe.optimizer, recipe.exits, recipe.epochs) == (template.optimizer, template.exits, template.epochs)
    assert any("224" in note and "data.image_size" in note for note in given.notes)


def test_a_file_of_texts_is_the_text_recipe_with_these_keys(reviews):
    given = own_data(data=reviews, text="review", target="stars", task="regression", backbone="hf/bert")
    recipe = recipe_of(given)
    assert (given.recipe, given.name, given.notes) == ("text", "reviews", ())
    data = recipe.data
    assert (data.name, data.root, data.text, data.target, data.task) == ("text", reviews, ("review",), "stars", "regression")
    assert (recipe.backbone.name, recipe.backbone.pretrained, data.tokenizer) == ("hf/bert", False, "bert")
    pairs = recipe_of(own_data(data=reviews, text=["a", "b"], target="c, d: 'e'"))
    assert (pairs.data.text, pairs.data.target) == (("a", "b"), "c, d: 'e'")
    assert pairs.backbone == read_recipe("text").backbone


def test_what_the_user_sets_goes_before_what_is_chosen(photos):
    given = own_data(data=photos, backbone="resnet20", changes=["data.image_size=48"])
    assert recipe_of(given, "data.image_size=48").data.image_size == 48 and not given.notes
    assert recipe_of(own_data(data=photos, backbone="resnet20")).data.image_size == 32


def test_a_named_recipe_is_kept_but_for_what_the_flags_say(photos):
    given = own_data("fashion-mnist-resnet20", data=photos)
    named = read_recipe("fashion-mnist-resnet20")
    recipe = read_recipe("fashion-mnist-resnet20", changes=given.changes)
    assert given.recipe == "fashion-mnist-resnet20" and recipe.optimizer == named.optimizer and recipe.exits == named.exits
    assert (recipe.data.name, recipe.data.root, recipe.data.image_size) == ("folder", photos, 32)
    assert own_data("digits").changes == () and own_data().recipe is None


def test_a_checkpoints_recipe_takes_the_place_of_a_shipped_one(photos):
    given = own_data(data=photos, has_start=True)
    assert given.recipe is None and not given.notes
    assert [change.partition("=")[0] for change in given.changes] == ["data.name", "data.root"]


def test_a_folder_with_weights_is_started_from_them(tmp_path, reviews, monkeypatch):
    monkeypatch.chdir(tmp_path)
    (tmp_path / "encoder").mkdir()
    given = {"data": reviews, "backbone": "hf/./encoder"}
    assert not recipe_of(own_data(**given)).backbone.pretrained
    save_file({"x": np.zeros(1)}, tmp_path / "encoder" / "model.safetensors")
    assert recipe_of(own_data(**given)).backbone.pretrained
    assert recipe_of(own_data(**given)).data.tokenizer == "./encoder"
    other = recipe_of(own_data(**given, weights="w.safetensors")).backbone
    assert (other.pretrained, str(other.weights)) == (False, "w.safetensors")


@pytest.mark.parametrize(
    ("name", "size"),
    [
        *(("resnet20", 32), ("resnet56", 32), ("msdnet", 32), ("resnet18", 224), ("vit_b_16", 224), ("timm/resnet18", 224)),
        *(
            ("timm/vit_base_patch16_384", 384),
            ("timm/vit_tiny_patch16_224.augreg_in21k", 224),
            ("timm/deit3_small_patch16_384", 384),
        ),
    ],
)
def test_a_network_has_a_usual_size(name, size):
    assert usual_size(name) == size


def test_kinds_of_data_are_told_by_their_names(photos, reviews, tmp_path):
    assert kind_of(photos) == ("folder", "photos") and kind_of(reviews) == ("text", "reviews")
    (tmp_path / "tables").mkdir()
    reviews.rename(tmp_path / "tables" / "train.csv")
    assert kind_of(tmp_path / "tables") == ("text", "tables")
    (tmp_path / "a.zip").write_text("")
    for path, fault in (("nowhere", "no such folder or file"), ("a.zip", r"'\.zip'")):
        with pytest.raises(EectlError, match=rf"--data .*{path}: .*{fault}.*\.csv"):
            kind_of(tmp_path / path)


def test_shards_and_what_the_datasets_library_has_are_told_by_their_names_too(tmp_path, monkeypatch):
    for name in ("flat/train-000.tar", "deep/train/0.tar", "both/dataset_dict.json", "alone/state.json", "plain/train.arrow"):
        (tmp_path / name).parent.mkdir(parents=True)
        (tmp_path / name).write_text("")
    monkeypatch.chdir(tmp_path)
    assert kind_of("flat") == ("wds", "flat") and kind_of("deep") == ("wds", "deep")
    assert kind_of("flat/train-{000..009}.tar") == ("wds", "flat")
    assert kind_of("both") == ("hfds/./both", "both") and kind_of(tmp_path / "alone") == (f"hfds/{tmp_path}/alone", "alone")
    assert kind_of("hfds/./plain") == ("hfds/./plain", "plain") and kind_of("hfds/someone/colours") == (
        "hfds/someone/colours",
        "colours",
    )
    shards, saved = recipe_of(own_data(data="flat", backbone="resnet20")), recipe_of(own_data(data="both", backbone="resnet20"))
    assert (shards.data.name, str(shards.data.root), shards.data.image_size) == ("wds", "flat", 32)
    assert (saved.data.name, saved.data.is_text, saved.data.image_size) == ("hfds/./both", False, 32)
    pairs = recipe_of(own_data(data="both", text=["a", "b"], target="c", backbone="hf/bert"))
    assert (pairs.data.name, pairs.data.is_text, pairs.data.text, pairs.data.tokenizer) == (
        "hfds/./both",
        True,
        ("a", "b"),
        "bert",
    )


def test_data_lies_in_one_place(photos):
    with pytest.raises(EectlError, match=r"--data .*photos.*--data-root"):
        own_data(data=photos, changes=['data.root="elsewhere"'])


def test_data_given_as_a_recipe_is_answered_with_the_line_to_type(photos, reviews, tmp_path):
    with pytest.raises(EectlError, match=f"eectl train --data {photos} --backbone"):
        read_recipe(str(photos))
    with pytest.raises(EectlError, match=f"eectl train --data {reviews} --text COLUMN --target COLUMN --backbone"):
        read_recipe(str(reviews))
    (tmp_path / "run").mkdir()
    (tmp_path / "run" / "recipe.yaml").write_text("{}")
    assert f"{tmp_path}/run/recipe.yaml" in (not_a_recipe(str(tmp_path / "run")) or "")
    assert not_a_recipe("digits") is None
    assert not_a_recipe(str(tmp_path / "run" / "recipe.yaml")) is None


def test_data_that_needs_no_folder_takes_none(monkeypatch, capsys):
    err = refused("train", "digits", "--data-root", "somewhere")
    assert "somewhere" in err and "digits" in err and "--data-root" in err and len(err.splitlines()) == 1
    with pytest.raises(EectlError, match="--data-root x: digits"):
        make_recipe({}, where="x").data.at("x")
    assert make_recipe({}, where="x").data.at(None) == make_recipe({}, where="x").data


def test_photos_are_trained_on_and_measured(photos, tmp_path, monkeypatch, capsys):
    monkeypatch.chdir(tmp_path)
    line = ["train", "--data", "photos", "--backbone", "resnet20", "--epochs", "1", "--device", "cpu"]
    line += ["--set", "exits.after=[1]", "--regime", "joint"]
    _, err = eectl(*line)
    assert "data.test=0.15" in err and err.index("data.test=0.15") < err.index("phase 2")
    assert "32 pixels" in err
    assert (tmp_path / "runs" / "photos-joint-seed-0" / "model.safetensors").is_file()
    _, err = eectl(*line, "--set", "data.test=0.2", "-o", "tested")
    assert "data.test" not in err
    out, _ = eectl("evaluate", "tested/model.safetensors", "--device", "cpu", "--json")
    assert json.loads(out)["num_rows"] == 12
