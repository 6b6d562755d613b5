"""Promises about a backbone that is cut from a library's network; `library` runs the library's own forward pass of a network."""

import copy
import re
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch
from small_networks import NUM_OUTPUTS
from torch import Tensor

from eectl.exits.criteria import CRITERIA
from eectl.exits.policy import Policy, choose
from eectl.exits.router import Router, early_exit, rows_in_order
from eectl.models.backbone import Backbone
from eectl.models.build import build_model, model_spec
from eectl.models.multi_exit import MultiExitModel
from eectl.recipe.recipe import BackboneSection, ModelSpec

Library = Callable[[Any, Tensor], Tensor]


def documented(kind: str) -> tuple[set[str], set[str]]:
    """The types of transformers that its page says are taken, of texts or images, and those that it says are refused."""
    page = (Path(__file__).parents[1] / "docs/reference/transformers.md").read_text()
    rows = {row.split("|")[1].strip(): set(re.findall(r"`(.*?)`", row)) for row in page.splitlines() if row.startswith("|")}
    taken = set().union(*(types for what, types in rows.items() if what.startswith(f"{kind}, ")))
    return taken, set().union(*(types for what, types in rows.items() if what.startswith("refused: ")))


def check_bits(backbone: Backbone, rows: Tensor, library: Library, *, training: bool) -> None:
    """The same logits, and the same statistics of BatchNorm after them."""
    backbone.train(training)
    twin = copy.deepcopy(backbone.net)
    torch.manual_seed(3)
    expected = library(twin, rows)
    torch.manual_seed(3)
    found = backbone(rows)
    assert expected.shape == (len(rows), NUM_OUTPUTS) and expected.std() > 0
    assert torch.equal(found, expected)
    assert all(torch.equal(tensor, twin.state_dict()[key]) for key, tensor in backbone.net.state_dict().items())


def check_gradients(backbone: Backbone, rows: Tensor, library: Library) -> None:
    """Of every parameter: what is noted of the library's pass keeps its graph."""
    twin = copy.deepcopy(backbone.net)
    for run, net in ((lambda: library(twin, rows), twin), (lambda: backbone(rows), backbone.net)):
        torch.manual_seed(3)
        net.train()
        run().square().sum().backward()
    expected = {name: parameter.grad for name, parameter in twin.named_parameters() if parameter.grad is not None}
    found = {name: parameter.grad for name, parameter in backbone.net.named_parameters() if parameter.grad is not None}
    assert found.keys() == expected.keys()
    for name, gradient in expected.items():
        torch.testing.assert_close(found[name], gradient, rtol=1e-4, atol=1e-6, msg=name)


def check_leaving(model: MultiExitModel, rows: Tensor) -> None:
    """Some leave at each exit, so that what layers are called with is found anew for fewer rows; also from a queue."""
    model.eval()
    with torch.inference_mode():
        logits = torch.stack([output.logits for output in model(rows)])
        scores = CRITERIA["max-softmax"].scores(logits)
        thresholds = tuple(float(row.sort().values[2:].mean()) for row in scores[:-1])
        policy = Policy(CRITERIA["max-softmax"], thresholds)
        taken = choose(scores, thresholds)
        queued = rows_in_order(list(Router(model, policy).stream(rows.split(2), batch_size=2)))
        for found, exits in (early_exit(model, rows, policy), queued):
            assert exits.tolist() == taken.tolist() and len(set(taken.tolist())) > 1
            torch.testing.assert_close(found, logits[taken, torch.arange(len(rows))], rtol=1e-3, atol=1e-4)


def check_phase_3(model: MultiExitModel, rows: Tensor) -> None:
    """The heads of exits 1 and 2 move, and nothing else."""
    model.set_trainable((), (1, 2))
    model.train_parts((), (1, 2))
    before = copy.deepcopy(model.state_dict())
    optimizer = torch.optim.AdamW([p for p in model.parameters() if p.requires_grad], lr=0.1, weight_decay=0.1)
    sum(output.logits.square().sum() for output in model(rows)).backward()
    optimizer.step()
    moved = {model.part(name) for name, tensor in model.state_dict().items() if not torch.equal(tensor, before[name])}
    assert moved == {("head", 1), ("head", 2)}


def check_rebuilding(model: MultiExitModel, rows: Tensor, section: BackboneSection) -> None:
    """From what a checkpoint holds: the same names, and with the same weights the same bits."""
    spec = model_spec(model, section, input_shape=rows.shape[1:], num_outputs=NUM_OUTPUTS)
    again = build_model(ModelSpec.model_validate_json(spec.model_dump_json()))
    assert list(again.state_dict()) == list(model.state_dict())
    again.load_state_dict(model.state_dict())
    model.eval(), again.eval()
    for expected, found in zip(model(rows), again(rows), strict=True):
        assert torch.equal(expected.logits, found.logits)
