"""Every backend against hand calculation, NumPy, finite differences, SciPy and orders of convergence."""

from __future__ import annotations

import functools
import math

import numpy as np
import pytest
import torch
from scipy.integrate import solve_ivp
from torch import nn

import hjepa_fast as hf
from hjepa_fast import activations
from hjepa_fast.testing import make_hnn, make_separable_hnn, make_states

INTEGRATORS = ("leapfrog", "euler")


@pytest.fixture(params=["reference", "torch", "cpp"])
def roll(request):
    """`hf.rollout` on each backend."""
    return functools.partial(hf.rollout, backend=request.param)


def numpy_gradient(hnn: nn.Module, z: np.ndarray) -> np.ndarray:
    """grad H of a softplus MLP, written out with the chain rule in NumPy: z [2d] to [2d]."""
    layers = [layer for layer in hnn.net if isinstance(layer, nn.Linear)]
    weights = [layer.weight.detach().numpy() for layer in layers]
    biases = [layer.bias.detach().numpy() for layer in layers]
    slopes, x = [], z
    for weight, bias in zip(weights[:-1], biases[:-1], strict=True):
        a = weight @ x + bias
        x = np.logaddexp(0, a)
        slopes.append(1 / (1 + np.exp(-a)))
    g = weights[-1][0]
    for weight, slope in zip(weights[-2::-1], slopes[::-1], strict=True):
        g = (g * slope) @ weight
    return g


def numpy_field(hnn: nn.Module, z: np.ndarray) -> np.ndarray:
    d = len(z) // 2
    g = numpy_gradient(hnn, z)
    return np.concatenate([g[d:], -g[:d]])


def test_one_leapfrog_step_by_hand(roll):
    """H = tanh(q + 2p) at q = 0.1, p = 0.2, dt = 0.5, worked out with the quotient 1 - tanh^2 alone."""
    net = nn.Sequential(nn.Linear(2, 1), nn.Tanh(), nn.Linear(1, 1)).double()
    with torch.no_grad():
        net[0].weight.copy_(torch.tensor([[1.0, 2.0]]))
        net[2].weight.fill_(1.0)
        net[0].bias.zero_(), net[2].bias.zero_()
    slope = lambda q, p: 1 - math.tanh(q + 2 * p) ** 2  # noqa: E731
    q0, p0 = 0.1, 0.2
    p1 = p0 - 0.25 * slope(q0, p0)
    q1 = q0 + 0.5 * 2 * slope(q0, p1)
    p2 = p1 - 0.25 * slope(q1, p1)
    states = roll(net, torch.tensor([[q0, p0]], dtype=torch.float64), 0.5, 1).states
    torch.testing.assert_close(states[0], torch.tensor([[q0, p0], [q1, p2]], dtype=torch.float64), rtol=1e-15, atol=1e-15)


def test_one_euler_step_by_hand(roll):
    net = nn.Sequential(nn.Linear(4, 1)).double()  # H = w z: a constant field
    z0 = make_states(3, 4)
    w = net[0].weight[0]
    expected = z0 + 0.3 * torch.cat((w[2:], -w[:2]))
    torch.testing.assert_close(roll(net, z0, 0.3, 1, integrator="euler").states[:, 1], expected)


@pytest.mark.parametrize("widths", [(5,), (7, 6), (6, 5, 4)])
def test_steps_match_numpy(roll, widths):
    hnn, d, dt = make_hnn(6, widths), 3, 0.4
    z = make_states(6)
    expected = {"leapfrog": [z.numpy()], "euler": [z.numpy()]}
    for _ in range(4):
        q, p = np.split(expected["leapfrog"][-1], 2)
        p = p - dt / 2 * numpy_gradient(hnn, np.concatenate([q, p]))[:d]
        q = q + dt * numpy_gradient(hnn, np.concatenate([q, p]))[d:]
        p = p - dt / 2 * numpy_gradient(hnn, np.concatenate([q, p]))[:d]
        expected["leapfrog"].append(np.concatenate([q, p]))
        expected["euler"].append(expected["euler"][-1] + dt * numpy_field(hnn, expected["euler"][-1]))
    for name in INTEGRATORS:
        states = roll(hnn, z, dt, 4, integrator=name).states
        np.testing.assert_allclose(states.detach().numpy(), np.stack(expected[name]), rtol=1e-12, atol=1e-13)


def order(roll, hnn: nn.Module, integrator: str, z0: torch.Tensor) -> float:
    """Slope of log error against log dt at time 1, against SciPy's high-order solver."""
    exact = solve_ivp(lambda t, z: numpy_field(hnn, z), (0, 1), z0.numpy(), method="DOP853", rtol=1e-13, atol=1e-13).y[:, -1]
    steps = np.array([32, 64, 128, 256])
    errors = []
    for n in steps:
        with torch.no_grad():
            end = roll(hnn, z0, 1 / n, int(n), integrator=integrator).states[-1]
        errors.append(np.linalg.norm(end.numpy() - exact))
    return -np.polyfit(np.log(steps), np.log(errors), 1)[0]


def test_orders_of_convergence(roll):
    """Algorithm 1 has order 2 for a separable H, and only order 1 for a general one."""
    separable, general = make_separable_hnn(3, 8), make_hnn(6, (12, 10))
    z0 = make_states(6)
    assert order(roll, separable, "leapfrog", z0) == pytest.approx(2, abs=0.1)
    assert order(roll, general, "leapfrog", z0) == pytest.approx(1, abs=0.1)
    assert order(roll, general, "euler", z0) == pytest.approx(1, abs=0.1)


@pytest.mark.parametrize("integrator", INTEGRATORS)
@pytest.mark.parametrize("activation", activations.NAMES)
def test_gradients_match_finite_differences(roll, integrator, activation):
    """z0, dt and every parameter, through states and energy, in float64."""
    hnn = make_hnn(4, (5, 3), activation)
    names = [name for name, _ in hnn.named_parameters()]

    def outputs(z0, dt, *parameters):
        values = dict(zip(names, parameters, strict=True))
        net = nn.Sequential(*[type(layer)(4, 4) if isinstance(layer, nn.Linear) else layer for layer in hnn.net])
        for index in (0, 2, 4):  # plain tensors in place of parameters, so that gradcheck can perturb them
            for kind in ("weight", "bias"):
                del net[index]._parameters[kind]
                setattr(net[index], kind, values[f"net.{index}.{kind}"])
            net[index].out_features, net[index].in_features = net[index].weight.shape
        out = roll(net, z0, dt, 3, integrator=integrator, energy=True)
        return out.states, out.energy

    z0 = make_states(2, 4).requires_grad_()
    dt = torch.tensor(0.3, dtype=torch.float64, requires_grad=True)
    parameters = [p.detach().clone().requires_grad_() for p in hnn.parameters()]
    assert torch.autograd.gradcheck(outputs, (z0, dt, *parameters), atol=1e-7, rtol=1e-5)


def test_step_sizes_per_step_and_per_sample(roll):
    hnn, z0 = make_hnn(4, (6,)), make_states(3, 4)
    per_step = torch.tensor([0.1, 0.4], dtype=torch.float64)
    by_hand = roll(hnn, roll(hnn, z0, 0.1, 1).states[:, 1], 0.4, 1).states[:, 1]
    torch.testing.assert_close(roll(hnn, z0, per_step, 2).states[:, 2], by_hand)
    per_sample = torch.tensor([[0.1], [0.2], [0.3]], dtype=torch.float64)
    together = roll(hnn, z0, per_sample, 2).states
    for i in range(3):
        torch.testing.assert_close(together[i], roll(hnn, z0[i], per_sample[i], 2).states)
    both = per_sample * torch.tensor([1.0, 2.0], dtype=torch.float64)
    torch.testing.assert_close(roll(hnn, z0, both, 2).states[1], roll(hnn, z0[1], both[1], 2).states)


def test_shapes_strides_and_empty(roll):
    hnn = make_hnn(4, (6,))
    z0 = make_states(2, 3, 4)
    out = roll(hnn, z0, 0.1, 5, energy=True)
    assert out.states.shape == (2, 3, 6, 4)
    assert out.energy.shape == (2, 3, 6)
    torch.testing.assert_close(out.states[1, 2], roll(hnn, z0[1, 2], 0.1, 5).states)
    strided = make_states(4, 6)[:, ::2].T  # [3, 4], neither contiguous nor dense
    torch.testing.assert_close(roll(hnn, strided, 0.1, 2).states, roll(hnn, strided.contiguous(), 0.1, 2).states)
    assert roll(hnn, z0[:0], 0.1, 2).states.shape == (0, 3, 3, 4)
    assert torch.equal(roll(hnn, z0, 0.1, 0).states, z0.unsqueeze(-2))
    torch.testing.assert_close(out.energy, hnn(out.states).squeeze(-1))
    torch.testing.assert_close(hf.energy(hnn, z0), hnn(z0).squeeze(-1))


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_low_precision_follows_float64(roll, dtype):
    hnn, z0 = make_hnn(8, (16, 8)), make_states(5, 8)
    exact = roll(hnn, z0, 0.2, 5).states
    low = roll(hnn.to(dtype), z0.to(dtype), 0.2, 5).states
    assert low.dtype == dtype
    assert (low.double() - exact).abs().max() < 40 * torch.finfo(dtype).eps


def test_without_gradients_and_in_inference_mode(roll):
    hnn, z0 = make_hnn(4, (6,)), make_states(3, 4)
    expected = roll(hnn, z0, 0.2, 3).states
    assert expected.requires_grad
    with torch.no_grad():
        assert not (states := roll(hnn, z0, 0.2, 3).states).requires_grad
        assert torch.equal(states, expected)
    with torch.inference_mode():
        assert torch.equal(roll(hnn, z0.clone(), 0.2, 3).states, expected)
        made_inside = hf.LatentHNN(4, (6,)).double()
        assert roll(made_inside, z0, 0.2, 3).states.shape == (3, 4, 4)


def test_nan_stays_in_its_row(roll):
    hnn, z0 = make_hnn(4, (6,)), make_states(3, 4)
    poisoned = z0.clone()
    poisoned[1, 2] = float("nan")
    states = roll(hnn, poisoned, 0.2, 3).states
    assert states[1, 1:].isnan().all()
    torch.testing.assert_close(states[[0, 2]], roll(hnn, z0, 0.2, 3).states[[0, 2]])


@pytest.mark.parametrize("backend", ["torch", "cpp"])
def test_a_network_that_was_first_used_in_inference_mode_trains(backend):
    """What stands in for a missing bias, or for T = |p|^2 / 2, is not remembered from there."""
    without_bias = torch.nn.Sequential(torch.nn.Linear(4, 6, bias=False), torch.nn.Tanh(), torch.nn.Linear(6, 1, bias=False))
    for hnn in (hf.SeparableHNN(4, (6,)), without_bias):
        z0 = make_states(3, 4, dtype=torch.float32)
        with torch.inference_mode():
            hf.rollout(hnn, z0, 0.1, 2, backend=backend)
        hf.rollout(hnn, z0, 0.1, 2, backend=backend).states.sum().backward()
        assert all(p.grad is not None for p in hnn.parameters())
