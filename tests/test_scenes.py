"""The smooth scenes: their law, their videos, their states as latents, and the truth that models are measured against."""

from __future__ import annotations

import dataclasses
import math

import numpy as np
import pytest
import torch
from scipy.integrate import solve_ivp
from scipy.special import ellipk

from hjepa_fast.errors import UsageError
from hjepa_fast.pipeline import scenes
from hjepa_fast.pipeline.config import VideoConfig
from hjepa_fast.pipeline.truth import Truth

NAMES = ("pendulum", "springs", "orbit")


def scene_of(name: str, **changes: object) -> scenes.Scene:
    found = scenes.of(VideoConfig(scene=name, **changes))  # type: ignore[arg-type]
    assert found is not None
    return found


def crossings(x: np.ndarray, v: np.ndarray) -> np.ndarray:
    """Times at which a motion in steps of 1 crosses zero upwards, by cubic Hermite interpolation."""
    found = []
    for i in np.flatnonzero((x[:-1] < 0) & (x[1:] >= 0)):
        c = [x[i], v[i], 3 * (x[i + 1] - x[i]) - 2 * v[i] - v[i + 1], 2 * (x[i] - x[i + 1]) + v[i] + v[i + 1]]
        found.append(i + next(r.real for r in np.roots(c[::-1]) if abs(r.imag) < 1e-12 and 0 <= r.real <= 1))
    return np.array(found)


# the law


@pytest.mark.parametrize("name", NAMES)
@pytest.mark.parametrize("changes", [{}, {"n_balls": 3, "radius": (8.0, 14.0, 11.0)}])
def test_pull_is_minus_the_gradient_of_the_potential(name, changes):
    if changes and name != "springs":
        changes = {"radius": (12.0,) if name == "pendulum" else (12.0, 19.0)}
    scene = scene_of(name, **changes)
    q, _ = scene.start(np.random.default_rng(1))
    h = 1e-5
    slopes = [(scene.potential(q + h * e) - scene.potential(q - h * e)) / (2 * h) for e in np.eye(scene.n)]
    np.testing.assert_allclose(scene.pull(q), -np.array(slopes), atol=1e-8, rtol=1e-6)


@pytest.mark.parametrize("name", NAMES)
def test_energy_is_kept_over_a_thousand_steps(name):
    scene = scene_of(name)
    q, p = scene.start(np.random.default_rng(3))
    H = scene.energy(*scene.path(np.stack([q, 0.9 * q]), np.stack([p, p]), 4001))
    assert np.abs(H / H[0] - 1).max() < 1e-11


@pytest.mark.parametrize("name", NAMES)
@pytest.mark.parametrize("drag", [0.0, 0.01, 1.0])
def test_the_motion_is_an_independent_integrators(name, drag):
    """DOP853 of scipy at its tightest tolerance; a push that is held adds to p' as it says."""
    scene = scene_of(name, drag=drag, force=0.02)
    q, p = scene.start(np.random.default_rng(2))
    push = 0.5 * scene.push * np.ones(scene.push_dim)
    found = scene.path(q, p, 401, np.tile(push, (401, 1)))

    def law(t, y):
        v = y[scene.n :] / scene.masses
        return np.concatenate([v, scene.pull(y[: scene.n]) - drag * y[scene.n :] + scene.masses * np.resize(push, scene.n)])

    true = solve_ivp(law, (0, 400), np.concatenate([q, p]), method="DOP853", rtol=3e-14, atol=1e-13).y[:, -1]
    scale = np.abs(found[0]).max()
    np.testing.assert_allclose(np.concatenate([found[0][-1], found[1][-1]]), true, atol=1e-9 * scale)


def test_the_pendulums_period_is_the_elliptic_integrals():
    scene = scene_of("pendulum")
    for amplitude in (1e-4, 1.0, 2.2):
        q, p = scene.path(np.array([-amplitude]), np.zeros(1), 400)
        period = np.diff(crossings(q[:, 0], p[:, 0])).mean()
        assert period == pytest.approx(4 * ellipk(math.sin(amplitude / 2) ** 2) / scene.frequency, rel=1e-5)
    assert 2 * math.pi / scene.frequency == pytest.approx(52)
    assert 10 < 52 / 4 < 4 * ellipk(math.sin(1.1) ** 2) / scene.frequency / 4 < 20  # periods in steps of 4 frames


def test_bodies_without_hold_and_softening_obey_keplers_third_law():
    scene = dataclasses.replace(scene_of("orbit", radius=(15.0, 20.0)), hold=0.0, softening=0.0)
    gravity = scene.attraction * (scene.masses[0] + scene.masses[2])
    for axis, eccentricity in ((60.0, 0.0), (80.0, 0.3), (110.0, 0.25)):
        apart = axis * (1 - eccentricity)  # at the closest, by vis-viva
        speed = math.sqrt(gravity * (2 / apart - 1 / axis))
        shares = np.array([-scene.masses[2], scene.masses[0]]) / (scene.masses[0] + scene.masses[2])
        q = np.array([shares[0] * apart, 0, shares[1] * apart, 0])
        p = scene.masses * np.array([0, shares[0] * speed, 0, shares[1] * speed])
        q, p = scene.path(q, p, 400)
        v = p / scene.masses
        period = np.diff(crossings((q[:, 3] - q[:, 1]), (v[:, 3] - v[:, 1]))).mean()
        assert period**2 == pytest.approx(4 * math.pi**2 * axis**3 / gravity, rel=1e-4)


# the truth


@pytest.mark.parametrize("name", NAMES)
def test_truth_in_the_units_of_latents(name):
    scene = scene_of(name)
    q, p = scene.draw(np.random.default_rng(0), 41, None)
    std = torch.tensor([3.0] * scene.n + [0.25] * scene.n, dtype=torch.float64)
    z = torch.from_numpy(np.concatenate([q, p], axis=1)) / std
    truth = Truth(scene, torch.zeros(2 * scene.n), std, 4)
    np.testing.assert_allclose(truth.energy(z), scene.energy(q, p), rtol=1e-13)
    path = truth.rollout(z[[0, 4]], 9)
    assert path.shape == (2, 10, 2 * scene.n)
    assert path.dtype == torch.float64
    torch.testing.assert_close(path[0], z[0:40:4], rtol=1e-11, atol=1e-11)
    torch.testing.assert_close(path[1], z[4:44:4], rtol=1e-11, atol=1e-11)
    np.testing.assert_allclose(truth.positions(z), scene.positions(q))
    assert truth.conservative
    assert truth.energy(z.reshape(1, 41, -1).float()).shape == (1, 41)
    assert truth.energy(torch.full((3, 2 * scene.n), math.nan)).isnan().all()
    with pytest.raises(UsageError, match=f"have {2 * scene.n} numbers, found"):
        truth.energy(z[..., :-1])
