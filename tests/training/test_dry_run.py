"""A plan: offline, with the rows that loading would give, and a time of the right order."""

import pytest
import torch

from eectl.core.errors import EectlError
from eectl.data import load_data
from eectl.recipe.data_section import DataSection
from eectl.recipe.published_rows import published_parts, split_sizes
from eectl.recipe.reading import read_recipe
from eectl.training import dry_run
from eectl.training.dry_run import estimate_time, flops, plan


@pytest.mark.parametrize("changes", [[], ["data.limit=300"], ["data.validation=0.07", "data.calibration=0.21"]])
def test_rows_are_those_that_loading_gives(changes):
    data = read_recipe("digits", changes=changes).data
    loaded = load_data(data, device=torch.device("cpu"))
    assert split_sizes(data, published_parts("digits")) == {name: len(split) for name, split in loaded.splits.items()}


def test_a_stored_validation_part_is_not_carved():
    data = DataSection(name="folder")
    assert split_sizes(data, {"train": 100, "validation": 30}) == {"train": 90, "validation": 30, "calibration": 10}


@pytest.mark.parametrize("name", ["20newsgroups-bert", "stsb-bert"])
def test_a_network_on_the_hub_is_planned_as_its_type_is(name, monkeypatch, tmp_path):
    monkeypatch.setenv("HF_HOME", str(tmp_path))
    recipe = read_recipe(name, changes=["data.max_length=16"])
    with torch.device("meta"):
        network, notes = dry_run._planned_network(recipe, dry_run.data_info(recipe.data))
    assert network.model.backbone.depth == 24
    assert "google-bert/bert-base-uncased is not on this machine" in notes[0] and "bert" in notes[0]


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        (["backbone.name=hf/no-one/bert", "backbone.pretrained=false"], r"hf/no-one/bert is not a model type.*"),
        (["backbone.name=hf/no-one/minilm"], r"hf/no-one/minilm is not on this machine.*no model type.*hf/\./FOLDER"),
        (
            ["backbone.name=hf/no-one/bert", "backbone.args={hidden_sise: 8}"],
            r".* transformers' bert .*, where backbone\.args\.hidden_sise: no such.*",
        ),
    ],
)
def test_a_network_on_the_hub_that_cannot_be_planned_is_one_line(changes, message):
    recipe = read_recipe("20newsgroups-bert", changes=changes)
    with torch.device("meta"), pytest.raises(EectlError, match=f"^{message}$"):
        dry_run._planned_network(recipe, dry_run.data_info(recipe.data))


def test_an_estimate_follows_the_rate_the_rows_and_what_trains(small, monkeypatch):
    planned = plan(small("regime=disjoint", "data.augment={}", "cache_features=0"))
    monkeypatch.setattr(dry_run, "_measure_rate", lambda *_: (1000.0, 1))
    backbone, heads = estimate_time(planned, device="cpu").seconds
    costs, train, validation = planned.priced.costs, planned.rows["train"], planned.rows["validation"]
    own = costs.exits[-1] - costs.plain  # all attached heads
    assert own == sum(costs.heads)
    assert backbone == pytest.approx((train * (3 * costs.plain + own) + validation * costs.exits[-1]) / 1000)
    up_to = costs.exits[-2] - own
    assert heads == pytest.approx((train * (up_to + 3 * own) + validation * costs.exits[-1]) / 1000)
    kept = plan(small("regime=disjoint", "data.augment={}"))
    assert estimate_time(kept, device="cpu").seconds[1] == pytest.approx((train * 3 * own + validation * own) / 1000)


@pytest.mark.parametrize("last", [0, 3, 8])
def test_an_estimate_leaves_out_the_backward_pass_of_frozen_blocks(small, monkeypatch, last):
    """Counted by hand: ResNet-20 on digits of 8×8 pixels in one channel; frozen blocks are not run backwards."""
    stem = 64 * 16 * 9
    blocks = [64 * 16 * 16 * 9 * 2] * 3
    for width, pixels in ((32, 16), (64, 4)):
        blocks += [pixels * (width // 2 * width * 9 + width * width * 9 + width // 2 * width)] + [pixels * width**2 * 9 * 2] * 2
    monkeypatch.setattr(dry_run, "_measure_rate", lambda *_: (1000.0, 1))
    free, frozen = (
        sum(estimate_time(plan(small("regime=joint", *changes)), device="cpu").seconds)
        for changes in ([], [f"freeze_until={last}"])
    )
    rows = plan(small("regime=joint")).rows["train"]
    assert free - frozen == pytest.approx(rows * 2 * (stem + sum(blocks[: last + 1])) / 1000)


def test_flops_is_what_the_command_prints(small):
    found = flops("digits", changes=["exits.after=[1]"]).to_json()
    assert found["kind"] == "costs" and [entry["after"] for entry in found["exits"]] == [1, None]
