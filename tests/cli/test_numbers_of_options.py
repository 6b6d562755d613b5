"""Numbers that options take: decimal, in the digits 0 to 9, and of a range; said before anything is opened."""

import pytest
from running import refused

from eectl.core.errors import EectlError
from eectl.evaluation.bench import bench, parse_batch_sizes
from eectl.training.attach import attach_heads

OPTIONS = [
    *(("train", option) for option in ("--seed", "--epochs", "--phase", "--track-every")),
    *(("bench x.safetensors", option) for option in ("--seed", "--rows", "--seconds")),
    *(("evaluate x.safetensors", "--batch-size"), ("calibrate-thresholds x.safetensors", "--batch-size")),
    *(("predict x.safetensors a.png", option) for option in ("--top", "--budget", "--batch-size")),
    *(("attach-heads x.safetensors -o y.safetensors --after 1", "--seed"),),
    *(("analyze numerical-rank x.safetensors -o y", option) for option in ("--seed", "--samples", "--tolerance", "--batch-size")),
    *(("analyze loss-landscape x.safetensors -o y", option) for option in ("--points", "--span", "--dimensions")),
]


@pytest.mark.parametrize(("command", "option"), OPTIONS)
def test_what_is_no_number(command, option, tmp_path):
    for written in ("1_0", "１２", "nan", "inf", "0x10", "017", "1e390", "9" * 5000, "1" + "0" * 39, "", "true"):
        said = refused(*command.split(), option, written, cwd=tmp_path, code=2)
        assert f"'{option}'" in said and "is not a" in said and "Traceback" not in said
    assert not list(tmp_path.iterdir())


@pytest.mark.parametrize("written", ["1_0", "１２", "nan", "1e2", "0", "-1", "100001", "032", "1,1", ""])
def test_batch_sizes(written):
    with pytest.raises(EectlError, match=r"^--batch-size .*(is not a batch size; give whole numbers from 1|stands twice)"):
        parse_batch_sizes(written)


@pytest.mark.parametrize("written", ["1_0", "１", "01", "1.0", "true", "", "1,", "9" * 5000])
def test_blocks(written, tmp_path):
    with pytest.raises(EectlError, match=r"^--after .*is not a block; give block numbers from 0"):
        attach_heads("x.safetensors", out=tmp_path / "y.safetensors", after=written + "," * (not written))


def test_values_that_python_gives(tmp_path):
    asked = {"out": tmp_path / "y.safetensors"}
    for seed in (-1, 2**32, True, 1.5):
        with pytest.raises(EectlError, match="seed is"):
            attach_heads("x.safetensors", after=[1], seed=seed, **asked)
        with pytest.raises(EectlError, match="seed is"):
            bench("x.safetensors", seed=seed)
    with pytest.raises(EectlError, match=r"after\[0\]: is 1000000000; input should be less than 10000"):
        attach_heads("x.safetensors", after=[10**9], **asked)
    with pytest.raises(EectlError, match="no such head"):
        attach_heads("x.safetensors", after=[1], head="mlp-2000000000", **asked)
    for seconds in (0, -1, float("nan"), float("inf"), 1e390):
        with pytest.raises(EectlError, match="--seconds"):
            bench("x.safetensors", seconds=seconds)
