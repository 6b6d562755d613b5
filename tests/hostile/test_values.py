"""Any JSON value at any place of an artefact, its digest right: refused in a line, or read as what is written back."""

import json
from pathlib import Path

import pytest
from hostile.mutators import METADATA_KEY
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from eectl.core.errors import EectlError
from eectl.core.json_files import json_text, sealed
from eectl.core.tensor_files import read_any_tensors
from eectl.evaluation.results import read_evaluation, write_evaluation
from eectl.exits.policy import read_policies, write_policies
from eectl.models.checkpoint import About, about_in
from eectl.recipe.reading import dump_recipe, make_recipe, parse_yaml

NUMBERS = st.integers(-(10**25), 10**25) | st.floats() | st.sampled_from([0, 1, -1, 10**8, 2**31, 2**63, 1e300])
VALUES = st.recursive(
    st.none() | st.booleans() | NUMBERS | st.text(max_size=20),
    lambda inner: st.lists(inner, max_size=4) | st.dictionaries(st.text(max_size=8), inner, max_size=4),
    max_leaves=12,
)
QUICK = settings(
    max_examples=60, derandomize=True, deadline=5000, database=None,
    suppress_health_check=[HealthCheck.function_scoped_fixture, HealthCheck.too_slow],
)  # fmt: skip


def places(value):
    """Every container in a value with each of its keys, in order."""
    if isinstance(value, dict | list):
        for key in list(value) if isinstance(value, dict) else range(len(value)):
            yield value, key
            yield from places(value[key])


def changed(text, data):
    """The JSON object with a drawn value in a drawn place, or that place taken out."""
    value = json.loads(text)
    found = list(places(value))
    holder, key = found[data.draw(st.integers(0, len(found) - 1), label="place")]
    if data.draw(st.booleans(), label="is taken out"):
        del holder[key]
    else:
        holder[key] = data.draw(VALUES, label="value")
    return value


def one_line(error):
    """Whether a message is a single line that can be read at a glance."""
    return len(str(error).splitlines()) == 1 and len(str(error)) < 2000


@pytest.mark.parametrize(("name", "read", "write"), [
    ("policy.json", read_policies, write_policies),
    ("evaluation.json", read_evaluation, write_evaluation),
])  # fmt: skip
def test_a_json_file_is_refused_or_read_as_it_is_written(world, tmp_path, name, read, write):
    text, path, again = (world / "run" / name).read_text(), tmp_path / name, tmp_path / f"again-{name}"
    refused = []

    @QUICK
    @given(st.data())
    def check(data):
        path.write_text(json_text(sealed(changed(text, data))))
        try:
            found = read(path)
        except EectlError as error:
            assert one_line(error), error
            refused.append(error)
            return
        write(again, found)
        assert read(again) == found

    check()
    assert len(refused) > 15


def test_what_a_checkpoint_says_is_refused_or_taken(world):
    text = read_any_tensors(world / "run/model.safetensors")[1][METADATA_KEY]
    refused = []

    @QUICK
    @given(st.data())
    def check(data):
        try:
            assert isinstance(about_in(Path("x"), changed(text, data)), About)
        except EectlError as error:
            assert one_line(error), error
            refused.append(error)

    check()
    assert len(refused) > 15


def test_a_recipe_is_refused_or_reads_back_as_it_is(world):
    text = json.dumps(parse_yaml((world / "digits.yaml").read_text(), where="digits.yaml"))
    refused = []

    @QUICK
    @given(st.data())
    def check(data):
        try:
            recipe = make_recipe(changed(text, data), where="x", changes=())
        except EectlError as error:
            assert all(0 < len(line) < 2000 for line in str(error).splitlines()), error
            refused.append(error)
            return
        assert make_recipe(parse_yaml(dump_recipe(recipe), where="y"), where="y", changes=()) == recipe

    check()
    assert len(refused) > 15
