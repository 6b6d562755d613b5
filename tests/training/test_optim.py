"""The learning rate against torch's own schedulers, early stopping against the paper's words."""

import time

import pytest
import torch

from eectl.recipe.optimizer_section import OptimizerSection, ScheduleSection
from eectl.training.optim import EarlyStopper, ParameterGroup, learning_rate, make_optimizer, set_rate


def torchs(scheduler, steps):
    optimizer = torch.optim.SGD([torch.zeros(1, requires_grad=True)], lr=0.3)
    scheduler = scheduler(optimizer)
    rates = []
    for _ in range(steps):
        rates.append(optimizer.param_groups[0]["lr"])
        optimizer.step()
        scheduler.step()
    return rates


def ours(steps, schedule, **kwargs):
    return [learning_rate(step, base=0.3, schedule=schedule, **kwargs) for step in range(steps)]


@pytest.mark.parametrize("factor", [1, 2, 3])
def test_cosine_with_restarts_is_torchs(factor):
    schedule = ScheduleSection(name="cosine-restarts", cycle=2, cycle_factor=factor, min_lr=0.01)
    expected = torchs(lambda o: torch.optim.lr_scheduler.CosineAnnealingWarmRestarts(o, 10, factor, 0.01), 75)
    assert ours(75, schedule, steps_per_epoch=5, epochs=15) == pytest.approx(expected)


def test_a_cycle_of_one_step_takes_no_longer_late_in_a_run():
    schedule = ScheduleSection(name="cosine-restarts", cycle=1e-3, cycle_factor=1)
    begun = time.process_time()
    assert learning_rate(10**11, base=0.3, schedule=schedule, steps_per_epoch=5, epochs=10**9) == 0.3
    assert time.process_time() - begun < 1


def test_cosine_is_torchs():
    schedule = ScheduleSection(name="cosine", min_lr=0.02)
    expected = torchs(lambda o: torch.optim.lr_scheduler.CosineAnnealingLR(o, 40, 0.02), 40)
    assert ours(40, schedule, steps_per_epoch=4, epochs=10) == pytest.approx(expected)


def test_warm_up_rises_to_the_base_and_shifts_the_rest():
    rates = ours(12, ScheduleSection(name="cosine", warmup=2), steps_per_epoch=4, epochs=3)
    assert rates[:8] == pytest.approx([0.3 * k / 8 for k in range(1, 9)])
    assert rates[8] == pytest.approx(0.3)
    assert rates[10] == pytest.approx(0.15)
    assert ours(3, ScheduleSection(name="constant"), steps_per_epoch=4, epochs=3) == [0.3] * 3


def follow(stopper, evaluations):
    """(was it an improvement, does it stop) for every evaluation."""
    return [(stopper.update(values), stopper.should_stop) for values in evaluations]


def test_any_exit_that_improves_keeps_training_alive():
    history = [{1: 0.5, 2: 0.7}, {1: 0.6, 2: 0.6}, {1: 0.4, 2: 0.7}, {1: 0.6, 2: 0.71}, {1: 0.1, 2: 0.1}, {1: 0.6, 2: 0.71}]
    assert follow(EarlyStopper(2, higher_is_better=True), history) == [
        (True, False),
        (True, False),  # exit 1 improved
        (False, False),  # a tie is no improvement
        (True, False),
        (False, False),
        (False, True),
    ]


def test_losses_improve_downwards_and_state_comes_back():
    stopper = EarlyStopper(3, higher_is_better=False)
    assert follow(stopper, [{1: 2.0}, {1: 1.5}, {1: 1.6}]) == [(True, False), (True, False), (False, False)]
    again = EarlyStopper(3, higher_is_better=False)
    again.restore(stopper.state())
    assert again == stopper
    assert follow(again, [{1: 1.5}, {1: 1.7}]) == [(False, False), (False, True)]
    assert again.best == {1: 1.5}


def test_nan_is_never_an_improvement():
    stopper = EarlyStopper(1, higher_is_better=True)
    stopper.update({1: 0.2})
    assert follow(stopper, [{1: float("nan")}]) == [(False, True)]
    fresh = EarlyStopper(2, higher_is_better=False)
    assert follow(fresh, [{1: float("nan")}, {1: 3.0}, {1: 2.0}]) == [(False, False), (True, False), (True, False)]


def test_lion_is_that_of_its_paper():
    """Chen et al. 2023, algorithm 2; its betas are its authors' unless the recipe has others."""
    settings = OptimizerSection(name="lion", lr=0.01, weight_decay=0.1)
    assert settings.betas == (0.9, 0.99) and OptimizerSection(name="lion", betas=(0.5, 0.6)).betas == (0.5, 0.6)
    assert OptimizerSection().betas == (0.9, 0.999)
    generator = torch.Generator().manual_seed(0)
    parameter = torch.nn.Parameter(torch.randn(4, 3, generator=generator))
    by_hand, momentum = parameter.detach().clone(), torch.zeros(4, 3)
    optimizer = make_optimizer([ParameterGroup([parameter], 0.1)], settings)
    for step in range(6):
        rate, gradient = 0.01 * (step + 1), torch.randn(4, 3, generator=generator)
        set_rate(optimizer, rate)
        parameter.grad = gradient.clone()
        optimizer.step()
        by_hand -= rate * ((0.9 * momentum + 0.1 * gradient).sign() + 0.1 * by_hand)
        momentum = 0.99 * momentum + 0.01 * gradient
        torch.testing.assert_close(parameter.detach(), by_hand, rtol=1e-5, atol=1e-6)
