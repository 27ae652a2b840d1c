"""Mechanical systems written into networks, against their exact solutions and SciPy's."""

from __future__ import annotations

import math

import numpy as np
import pytest
import torch
from scipy.integrate import solve_ivp
from scipy.special import ellipk

import hjepa_fast as hf
from hjepa_fast.diagnostics import energy_drift
from hjepa_fast.schemes import SCHEMES, for_separable
from hjepa_fast.testing import make_hnn


def exact(velocity, z0, t_end):
    """SciPy's solution of z' = velocity(z) at t_end."""
    solution = solve_ivp(lambda _, z: velocity(z), (0, t_end), z0, method="DOP853", rtol=1e-12, atol=1e-13)
    return torch.tensor(solution.y[:, -1])


def velocity_of(hnn):
    """The network's own equations of motion, by autograd."""

    def velocity(z):
        x = torch.tensor(z).requires_grad_()
        hq, hp = torch.autograd.grad(hnn(x).sum(), x)[0].chunk(2)
        return torch.cat((hp, -hq)).numpy()

    return velocity


def float64(values):
    return torch.tensor(values, dtype=torch.float64)


def end(hnn, z0, t_end, n_steps, name):
    return hf.rollout(hnn, float64(z0), t_end / n_steps, n_steps, integrator=name, states="final").states


def assert_solves(hnn, z0, solution, t_end, n_steps, name, tolerance):
    """The error after n_steps is small, and falls with dt as the integrator's order says, down to `tolerance`."""
    kind = "separable" if isinstance(hnn, hf.SeparableHNN) else "general"
    order = getattr(SCHEMES[name], kind).order
    first, second = ((end(hnn, z0, t_end, n, name) - solution).abs().max().item() for n in (n_steps, 2 * n_steps))
    assert second < 0.1
    assert second < max(first / 2 ** (order - 0.3), tolerance)


def wave_network(directions, phases, amplitudes) -> hf.LatentHNN:
    """H = sum_i amplitudes[i] sin(directions[i] . z + phases[i])."""
    hnn = hf.LatentHNN(len(directions[0]), (len(directions),), "sin").double()
    with torch.no_grad():
        hnn.net[0].weight.copy_(float64(directions))
        hnn.net[0].bias.copy_(float64(phases))
        hnn.net[2].weight.copy_(float64([amplitudes]))
        hnn.net[2].bias.zero_()
    return hnn


E = 0.02
"""Polynomials are written as sines of E times their argument: exact up to a relative E^2."""


def square(direction, factor):
    """factor (d . z)^2, up to a constant: -2 cos(E x) / E^2 = -2 / E^2 + x^2 - ..."""
    return [([E * x for x in direction], -math.pi / 2, 2 * factor / E**2)]


def cube(direction, factor):
    """factor (d . z)^3: (2 sin(E x) - sin(2 E x)) / E^3 = x^3 - ..."""
    return [
        ([E * x for x in direction], 0.0, 2 * factor / E**3),
        ([2 * E * x for x in direction], 0.0, -factor / E**3),
    ]


def network_of(waves) -> hf.LatentHNN:
    return wave_network(*map(list, zip(*waves, strict=True)))


# --- separable networks


def oscillator(stiffness) -> hf.SeparableHNN:
    hnn = hf.SeparableHNN(2 * len(stiffness), (1,), quadratic=True).double()
    with torch.no_grad():
        for parameter in hnn.parameters():
            parameter.zero_()
        hnn.stiffness.copy_(float64(stiffness))
    return hnn


EXPLICIT = [name for name in SCHEMES if for_separable(SCHEMES[name])]
"""The integrators that take a `SeparableHNN`."""


@pytest.mark.parametrize("name", EXPLICIT)
def test_harmonic_oscillator(name):
    stiffness, t = (1.0, 6.25), 1.0
    w, q, p = np.sqrt(stiffness), np.array([1.0, -0.5]), np.array([0.3, 0.8])
    solution = np.concatenate((q * np.cos(w * t) + p / w * np.sin(w * t), p * np.cos(w * t) - q * w * np.sin(w * t)))
    assert_solves(oscillator(stiffness), [*q, *p], torch.tensor(solution), t, 30, name, 1e-12)


def pendulum() -> hf.SeparableHNN:
    """H = p^2 / 2 - cos q: the potential is one unit, sin(q - pi / 2)."""
    hnn = hf.SeparableHNN(2, (1,), activation="sin").double()
    with torch.no_grad():
        hnn.potential[0].weight.fill_(1)
        hnn.potential[0].bias.fill_(-math.pi / 2)
        hnn.potential[2].weight.fill_(1)
        hnn.potential[2].bias.zero_()
    return hnn


@pytest.mark.parametrize("name", EXPLICIT)
@pytest.mark.parametrize("z0", [[1.2, 0.0], [0.0, 2.3]], ids=["swings", "turns over"])
def test_pendulum(name, z0):
    solution = exact(lambda z: np.array([z[1], -np.sin(z[0])]), z0, 3.0)
    assert_solves(pendulum(), z0, solution, 3.0, 40, name, 1e-11)


def test_pendulum_returns_after_its_period():
    """4 K(sin^2(q0 / 2)), and the energy is that of H."""
    q0 = 2.0
    period = 4 * ellipk(math.sin(q0 / 2) ** 2)
    out = hf.rollout(pendulum(), float64([q0, 0.0]), period / 400, 400, integrator="yoshida6", energy=True)
    torch.testing.assert_close(out.states[-1], out.states[0], rtol=0, atol=1e-8)
    torch.testing.assert_close(out.energy, torch.full_like(out.energy, -math.cos(q0)), rtol=0, atol=1e-8)
    half = out.states[200]
    torch.testing.assert_close(half, float64([-q0, 0.0]), rtol=0, atol=1e-8)


def test_kepler_orbit_of_a_fitted_potential():
    """-1 / |q| is not a network's; 300 sines are fitted to its force where the orbit goes, and give nearly the ellipse."""
    hnn = hf.SeparableHNN(4, (300,), activation="sin").double()
    first, last = hnn.potential[0], hnn.potential[2]
    generator = torch.Generator().manual_seed(0)
    radius = torch.linspace(0.7, 1.3, 20, dtype=torch.float64)
    angle = torch.linspace(0, 2 * math.pi, 41, dtype=torch.float64)[:-1]
    r, phi = torch.cartesian_prod(radius, angle).unbind(1)
    q = torch.stack((r * phi.cos(), r * phi.sin()), dim=1)
    with torch.no_grad():
        first.weight.copy_(5 * torch.randn(300, 2, generator=generator, dtype=torch.float64))
        first.bias.copy_(6.3 * torch.rand(300, generator=generator, dtype=torch.float64))
        # grad V is linear in the last layer
        gradients = (q @ first.weight.T + first.bias).cos()[:, None, :] * first.weight.T
        gradients, force = gradients.flatten(0, 1), (q / r[:, None] ** 3).flatten()
        last.weight.copy_(torch.linalg.lstsq(gradients, force, rcond=1e-8, driver="gelsd").solution[None])
        last.bias.zero_()
        assert (gradients @ last.weight[0] - force).abs().max() < 1e-3

    e, period = 0.2, 2 * math.pi
    z0 = [1 - e, 0.0, 0.0, math.sqrt((1 + e) / (1 - e))]  # at the pericentre, the great half axis being 1
    own = exact(velocity_of(hnn), z0, period)
    for name in ("leapfrog", "yoshida4"):
        assert_solves(hnn, z0, own, period, 200, name, 1e-6)
    t = period * np.arange(101) / 100
    anomaly = t.copy()
    for _ in range(40):  # Kepler's equation
        anomaly = t + e * np.sin(anomaly)
    ellipse = np.stack((np.cos(anomaly) - e, math.sqrt(1 - e * e) * np.sin(anomaly)), axis=1)
    states = hf.rollout(hnn, float64(z0), period / 200, 200, integrator="yoshida4").states.detach().numpy()
    np.testing.assert_allclose(states[::2, :2], ellipse, rtol=0, atol=0.01)
    momentum = states[:, 0] * states[:, 3] - states[:, 1] * states[:, 2]
    np.testing.assert_allclose(momentum, math.sqrt(1 - e * e), rtol=1e-3)


# --- networks that are not separable


def waves() -> hf.LatentHNN:
    """H = sin(q + p) + 0.7 sin(2 q - p + 0.4), known by heart."""
    return wave_network([[1.0, 1.0], [2.0, -1.0]], [0.0, 0.4], [1.0, 0.7])


@pytest.mark.parametrize("name", SCHEMES)
def test_two_plane_waves(name):
    def velocity(z):
        a, b = np.cos(z[0] + z[1]), 0.7 * np.cos(2 * z[0] - z[1] + 0.4)
        return np.array([a - b, -a - 2 * b])

    z0 = [0.3, -0.2]
    assert_solves(waves(), z0, exact(velocity, z0, 1.5), 1.5, 40, name, 1e-11)


def magnetic(B: float) -> hf.LatentHNN:
    """A charge in a magnetic field, H = (p1 + B q2 / 2)^2 / 2 + (p2 - B q1 / 2)^2 / 2: two units."""
    return network_of([*square([0, B / 2, 1, 0], 0.5), *square([-B / 2, 0, 0, 1], 0.5)])


@pytest.mark.parametrize("name", SCHEMES)
def test_charge_in_a_magnetic_field(name):
    """It runs in a circle of radius |v| / B, at the rate B."""
    B, t, velocity = 1.5, 2.0, np.array([0.6, -0.3])
    q0 = np.array([0.2, 0.1])

    def state(t):
        c, s = math.cos(B * t), math.sin(B * t)
        v = np.array([[c, s], [-s, c]]) @ velocity
        q = q0 + np.array([[s, 1 - c], [c - 1, s]]) @ velocity / B
        return torch.tensor([*q, v[0] - B * q[1] / 2, v[1] + B * q[0] / 2])

    torch.testing.assert_close(
        torch.tensor(velocity_of(magnetic(B))(state(0).numpy())[:2]), torch.tensor(velocity), atol=1e-4, rtol=0
    )
    assert_solves(magnetic(B), state(0).tolist(), state(t), t, 40, name, 2 * E**2)


def test_only_a_symplectic_step_keeps_the_circle():
    """The published step on this H, the simplest that is not separable, gains energy without end."""
    z0 = float64([[0.2, 0.1, 0.6, -0.3]])
    kept = energy_drift(magnetic(1.5), z0, 0.1, 4000, integrator="implicit-leapfrog")
    lost = energy_drift(magnetic(1.5), z0, 0.1, 4000, integrator="leapfrog")
    H0 = hf.energy(magnetic(1.5), z0) - hf.energy(magnetic(1.5), 0 * z0)
    assert kept.path > 3
    assert kept.maximum.max() < 0.02 * H0
    assert kept.growth < 1.5
    assert lost.maximum.max() > H0
    assert lost.growth > 3


def henon_heiles() -> hf.LatentHNN:
    """H = |p|^2 / 2 + |q|^2 / 2 + x^2 y - y^3 / 3, with x^2 y = ((x + y)^3 - (x - y)^3 - 2 y^3) / 6."""
    return network_of(
        [
            *(wave for i in range(4) for wave in square(np.eye(4)[i].tolist(), 0.5)),
            *cube([1, 1, 0, 0], 1 / 6),
            *cube([1, -1, 0, 0], -1 / 6),
            *cube([0, 1, 0, 0], -1 / 3 - 1 / 3),
        ]
    )


@pytest.mark.parametrize("name", SCHEMES)
def test_henon_heiles(name):
    def velocity(z):
        x, y, px, py = z
        return np.array([px, py, -x - 2 * x * y, -y - x * x + y * y])

    z0 = [0.1, 0.3, 0.35, -0.1]
    hnn = henon_heiles()
    np.testing.assert_allclose(velocity_of(hnn)(np.array(z0)), velocity(z0), atol=1e-4)
    assert_solves(hnn, z0, exact(velocity, z0, 4.0), 4.0, 40, name, 4 * E**2)


@pytest.mark.parametrize("name", [name for name in SCHEMES if SCHEMES[name].general.order > 1])
def test_henon_heiles_network_against_its_own_equations(name):
    z0 = [0.1, 0.3, 0.35, -0.1]
    own = exact(velocity_of(henon_heiles()), z0, 4.0)
    order = SCHEMES[name].general.order
    n_steps = {2: 2000, 4: 200, 6: 100}[order]
    torch.testing.assert_close(end(henon_heiles(), z0, 4.0, n_steps, name), own, rtol=0, atol=1e-6)


@pytest.mark.parametrize("name", SCHEMES)
def test_a_random_network_against_its_own_equations(name):
    """Nothing known about H but its gradients."""
    hnn, z0 = make_hnn(4, (9, 7), "tanh"), [0.5, -0.4, 0.2, 0.7]
    assert_solves(hnn, z0, exact(velocity_of(hnn), z0, 3.0), 3.0, 20, name, 1e-11)
