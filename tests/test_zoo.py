"""Public repositories' models and losses, in their own layouts, by this library: the same numbers."""

from __future__ import annotations

import warnings

import pytest
import torch

import hjepa_fast as hf
from bench import zoo

ROWS, STEPS = 7, 3


def exactly(name, n_steps=STEPS):
    return zoo.Training.of(name, ROWS, min(n_steps, zoo.ZOO[name].n_steps)).to(torch.float64)


def value_and_gradients(loss, parameters):
    value = loss()
    return [value, *torch.autograd.grad(value, parameters, materialize_grads=True)]


@pytest.mark.parametrize("name", zoo.ZOO)
def test_loss_and_gradients_are_those_of_nested_autograd(name):
    training = exactly(name)
    expected = value_and_gradients(training.textbook, training.parameters)
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        found = value_and_gradients(training.fused, training.parameters)
    torch.testing.assert_close(found[0], expected[0], rtol=1e-10, atol=0)
    size, without = max(g.abs().max() for g in expected[1:]), []
    for (which, _), a, b in zip(training.replica.named_parameters(), found[1:], expected[1:], strict=True):
        torch.testing.assert_close(a, b, rtol=1e-9, atol=1e-9 * size, msg=lambda text, which=which: f"{which}: {text}")
        if not b.any():
            without.append(which)
    # one for each network of H that has a bias at its end, which only shifts H
    assert len(without) <= 2
    assert all(which.endswith(".bias") for which in without)


def test_a_module_that_gives_the_field_of_its_net_is_its_net():
    training = exactly("torchdyn")
    x = training.batch[0]
    torch.testing.assert_close(hf.vector_field(training.replica, x), training.replica(x.clone()))


def test_friction_around_the_kicks_is_not_friction_in_them():
    """physics-world-models and `PortHNN` differ, and less the shorter a step is."""
    differences = []
    for dt, n in ((0.1, 4), (0.05, 8)):
        found = []
        for name in ("physics-world-models-latent", "physics-world-models-port"):
            training = zoo.Training.of(name, ROWS, n).to(torch.float64)
            training.replica.dt = dt
            start = torch.linspace(-1, 1, ROWS * 32).double().reshape(ROWS, 1, 32)
            states = start.expand(-1, n + 1, -1).clone().requires_grad_()
            loss = training.replica.fused(training.H, states, torch.ones(ROWS, n, dtype=torch.long))
            # d loss / d target_n = 2 (target_n - state_n) / size
            (g,) = torch.autograd.grad(loss, states)
            found.append(states[:, -1] - g[:, -1] * (states[:, 1:].numel() / 2))
        differences.append((found[0] - found[1]).abs().max().item())
    assert 0.3 < differences[1] / differences[0] < 0.7
