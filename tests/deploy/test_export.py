"""What `eectl.load` gives goes through PyTorch's own exporters, and what they give says what the network says."""

import pytest
import torch
from conftest import small_recipe
from toy_text import make_rows, write_tokenizer

import eectl
from eectl.models.build import build_model
from eectl.models.checkpoint import About, save_checkpoint
from eectl.recipe.recipe import ModelSpec

pytestmark = pytest.mark.filterwarnings("ignore")
BATCH = torch.export.Dim("batch")
VIT = {"patch_size": 4, "depth": 3, "heads": 2, "dim": 16, "mlp_dim": 32}
BERT = {
    "vocab_size": 40, "hidden_size": 16, "num_hidden_layers": 2, "num_attention_heads": 2, "intermediate_size": 32,
    "max_position_embeddings": 32,
}  # fmt: skip
CASES = {
    "cnn": ({"name": "resnet20"}, (3, 16, 16), (1, 4), ("sdn", "sdn")),
    "vit": ({"name": "vit", "args": VIT}, (3, 16, 16), (0, 1), ("linear", "linear")),
    "bert": ({"name": "hf/bert", "args": BERT}, (3, 24), (1, 2), ("linear", "mlp-8")),
}


@pytest.fixture(scope="module", params=CASES)
def case(request, tmp_path_factory):
    """A model from a checkpoint of random weights, and five prepared inputs for it."""
    backbone, shape, after, heads = CASES[request.param]
    folder = tmp_path_factory.mktemp(request.param)
    spec = ModelSpec.model_validate(
        {"backbone": backbone, "input_shape": shape, "num_outputs": 7, "after": after, "heads": heads}
    )
    is_text = len(shape) == 2
    data = {"name": "text", "tokenizer": write_tokenizer(folder), "max_length": 24} if is_text else {"name": "cifar10"}
    recipe = small_recipe(data=data, backbone=backbone).model_dump(mode="json")
    facts = {"name": data["name"], "classes": list("abcdefg"), "input_shape": shape, "kind": "text" if is_text else "image"}
    about = facts | {"mean": [0.5] * 3, "std": [0.2] * 3, "task": "classification"}
    torch.manual_seed(0)
    save_checkpoint(folder / "m.safetensors", build_model(spec), About(spec, recipe, about, {}, []))
    model = eectl.load(folder / "m.safetensors", device="cpu")
    if is_text:
        return model, model.preprocess([row["text"] for row in make_rows(5)])
    return model, model.preprocess(torch.randint(0, 256, (5, *shape), dtype=torch.uint8))


def check(got, want, rows=5):
    assert len(got) == len(want)
    for one, other in zip(got, want, strict=True):
        assert torch.allclose(torch.as_tensor(one), other[:rows], atol=1e-4)


def test_export(case):
    model, inputs = case
    program = torch.export.export(model, (inputs,), dynamic_shapes={"inputs": {0: BATCH}})
    check(program.module()(inputs), model(inputs))
    check(program.module()(inputs[:3]), model(inputs), rows=3)


def test_trace(case):
    model, inputs = case
    traced = torch.jit.trace(model, inputs)
    check(traced(inputs), model(inputs))
    check(traced(inputs[:3]), model(inputs), rows=3)


@pytest.mark.slow
def test_onnx(case, tmp_path):
    pytest.importorskip("onnxscript")
    runtime = pytest.importorskip("onnxruntime")
    model, inputs = case
    path = str(tmp_path / "m.onnx")
    torch.onnx.export(model, (inputs,), path, dynamic_shapes={"inputs": {0: BATCH}}, verbose=False)
    session = runtime.InferenceSession(path)
    (name,) = (each.name for each in session.get_inputs())
    check(session.run(None, {name: inputs.numpy()}), model(inputs))
    check(session.run(None, {name: inputs[:3].numpy()}), model(inputs), rows=3)
