"""States at given times, against the exact solution and against rollouts."""

from __future__ import annotations

import pytest
import torch
from torch import nn

import hjepa_fast as hf
from hjepa_fast.testing import make_hnn, make_states, make_two_networks


def oscillator():
    """H = (|p|^2 + |q|^2) / 2: a rotation."""
    return hf.SumHNN(hf.Quadratic("q", torch.ones(2).double()), hf.Quadratic("p", torch.ones(2).double()))


def rotated(z0, t):
    q, p = z0.chunk(2, dim=-1)
    return torch.cat((torch.cos(t) * q + torch.sin(t) * p, torch.cos(t) * p - torch.sin(t) * q), dim=-1)


@pytest.mark.parametrize("dense", [False, True])
def test_the_exact_solution_at_uneven_times(dense):
    z0, t = make_states(5, 4), torch.tensor([0.0, 0.1, 0.35, 1.0, 3.0]).double()
    errors = []
    for dt in (0.02, 0.01):
        found = hf.odeint(oscillator(), z0, t, dt, dense=dense)
        assert found.shape == (5, 5, 4)
        errors.append((found - rotated(z0, t[:, None, None])).abs().max().item())
    assert errors[0] < 3e-4
    assert 3.5 < errors[0] / errors[1] < 4.5
    assert torch.equal(found[0], z0)


def test_backwards_in_time_and_back_again():
    hnn, z0 = make_two_networks(4, (7,), (5,)), make_states(3, 4)
    there = hf.odeint(hnn, z0, [0.0, 0.5, 1.5], 0.1)
    back = hf.odeint(hnn, there[-1], [1.5, 0.5, 0.0], 0.1)
    torch.testing.assert_close(back.flip(0), there, rtol=1e-12, atol=1e-12)


def test_steps_of_one_size_are_those_of_a_rollout():
    hnn, z0 = make_hnn(4, (7, 5)), make_states(2, 3, 4)
    t = torch.arange(11).double() * 0.1
    states = hf.rollout(hnn, z0, 0.1, 10, integrator="implicit-leapfrog").states
    for found in (hf.odeint(hnn, z0, t), hf.odeint(hnn, z0, t, 0.1), hf.odeint(hnn, z0, t, 0.1, dense=True)):
        torch.testing.assert_close(found.movedim(0, -2), states, rtol=1e-11, atol=1e-11)
    torch.testing.assert_close(hf.odeint(hnn, z0, t[::5], 0.1), states.movedim(-2, 0)[::5], rtol=1e-11, atol=1e-11)


@pytest.mark.parametrize("dense", [False, True])
def test_every_sample_at_its_own_times(dense):
    hnn, z0 = make_hnn(4, (7, 5)), make_states(3, 4)
    t = torch.tensor([[0.0, 0.3, 0.5], [1.0, 1.2, 2.0], [0.0, 0.1, 1.5]]).double()
    found = hf.odeint(hnn, z0, t, 0.01, dense=dense)
    for i in range(3):
        torch.testing.assert_close(found[:, i], hf.odeint(hnn, z0[i], t[i], 0.01, dense=dense), rtol=1e-4, atol=1e-4)


@pytest.mark.parametrize("dense", [False, True])
def test_gradients(dense):
    hnn, z0 = make_hnn(4, (5,)), make_states(2, 4).requires_grad_()
    t = torch.tensor([0.0, 0.13, 0.4]).double().requires_grad_()
    weight = hnn.net[0].weight

    def run(z0, t, w):
        with torch.no_grad():
            weight.copy_(w)
        return hf.odeint(hnn, z0, t, 0.21, dense=dense)

    assert torch.autograd.gradcheck(lambda z0, t: hf.odeint(hnn, z0, t, 0.21, dense=dense), (z0, t), atol=1e-6)
    found = hf.odeint(hnn, z0, t, 0.21, dense=dense).square().sum()
    (g,) = torch.autograd.grad(found, weight)
    direction, base = make_states(*weight.shape, seed=9), weight.detach().clone()
    ends = [run(z0.detach(), t.detach(), base + e * direction).square().sum() for e in (1e-5, -1e-5)]
    run(z0.detach(), t.detach(), base)
    torch.testing.assert_close((g * direction).sum(), (ends[0] - ends[1]) / 2e-5, rtol=1e-5, atol=1e-6)


def test_with_friction_and_a_control():
    model = hf.PortHNN(make_hnn(4, (7,)), 1, "conformal").double()
    z0, u = make_states(3, 4), make_states(3, 2, 1, seed=5)
    found = hf.odeint(model, z0, [0.0, 0.2, 0.3], 0.1, control=u)
    expected = hf.rollout(model, z0, 0.1, 3, integrator="implicit-leapfrog", control=u[:, [0, 0, 1]]).states[:, [0, 2, 3]]
    torch.testing.assert_close(found.movedim(0, 1), expected, rtol=1e-11, atol=1e-11)
    held = hf.odeint(model, z0, [0.0, 0.2, 0.3], 0.1, control=u[:, 0], dense=True)
    assert held.shape == (3, 3, 4)


def test_one_time_is_the_start():
    hnn, z0 = make_hnn(4, (7,)), make_states(3, 4)
    assert torch.equal(hf.odeint(hnn, z0, [0.3]), z0[None])


@pytest.mark.parametrize(
    ("call", "error", "message"),
    [
        (dict(t=[0.0, 0.1, 0.1]), ValueError, "increase, or decrease"),
        (dict(t=[0.0, 0.2, 0.1]), ValueError, "increase, or decrease"),
        (dict(t=[0.0, float("inf")]), ValueError, "finite"),
        (dict(t=[]), ValueError, r"found \[0\]"),
        (dict(t=torch.arange(3)), TypeError, "int64"),
        (dict(t=torch.zeros(2, 3)), ValueError, r"\[T\] or \[3, 'T'\].*found \[2, 3\]"),
        (dict(dt=0.0), ValueError, "found 0.0"),
        (dict(dense=True), ValueError, "takes dt"),
        (dict(control=torch.ones(1)), ValueError, "no port"),
        (dict(z0=0.1), TypeError, "found float"),
    ],
)
def test_what_is_refused(call, error, message):
    settings = dict(z0=make_states(3, 4), t=[0.0, 0.1])
    with pytest.raises(error, match=message):
        hf.odeint(make_hnn(4, (7,)), **{**settings, **call})


def test_a_sequential_of_ones_own():
    net = nn.Sequential(nn.Linear(2, 8), nn.Tanh(), nn.Linear(8, 1))
    assert hf.odeint(net, torch.randn(5, 2), torch.linspace(0, 1, 11), 0.05).shape == (11, 5, 2)
