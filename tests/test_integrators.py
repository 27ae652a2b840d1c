"""Every integrator: values and gradients against the oracle, convergence, reversible memory, Tao's copies."""

from __future__ import annotations

import warnings

import pytest
import torch

import hjepa_fast as hf
from hjepa_fast.api import INTEGRATORS
from hjepa_fast.errors import ConvergenceError
from hjepa_fast.hidden_space import memory, outline
from hjepa_fast.schemes import SCHEMES, for_separable, inverse
from hjepa_fast.testing import make_hnn, make_states
from test_ops import assert_all_close, gradients

FUSED = ("torch", "cpp")
IMPLICIT = [name for name, scheme in SCHEMES.items() if scheme.implicit]
REVERSIBLE = [name for name, scheme in SCHEMES.items() if scheme.general.reversible]
TOLERANCE = {"rtol": 1e-12, "atol": 1e-12}


@pytest.mark.parametrize("backend", FUSED)
@pytest.mark.parametrize("memory", ["store", "recompute", "checkpoint"])
@pytest.mark.parametrize("integrator", INTEGRATORS)
def test_values_and_gradients_match_the_oracle(integrator, memory, backend):
    hnn = make_hnn(6, (5, 4), "tanh")
    z0 = make_states(3, 6).requires_grad_()
    dt = torch.linspace(0.2, 0.4, 5, dtype=torch.float64).requires_grad_()
    options = {"integrator": integrator}
    expected = gradients(hnn, z0, dt, 5, backend="reference", **options)
    assert_all_close(gradients(hnn, z0, dt, 5, backend=backend, memory=memory, **options), expected, **TOLERANCE)


@pytest.mark.parametrize("backend", FUSED)
@pytest.mark.parametrize("integrator", ["implicit-leapfrog", "implicit-midpoint", "tao", "rk4"])
def test_final_state_alone_and_steps_of_each_sample(integrator, backend):
    hnn, z0 = make_hnn(6, (5, 4)), make_states(4, 6).requires_grad_()
    dt = torch.linspace(-0.2, 0.4, 4, dtype=torch.float64)[:, None].requires_grad_()
    options = {"integrator": integrator, "states": "final"}
    for with_energy in (True, False):
        expected, found = (hf.rollout(hnn, z0, dt, 3, energy=with_energy, backend=b, **options) for b in ("reference", backend))
        values = [x.states.square().sum() + (x.energy.sin().sum() if with_energy else 0) for x in (expected, found)]
        inputs = [z0, dt, *hnn.parameters()]
        expected, found = (torch.autograd.grad(v, inputs, allow_unused=True, materialize_grads=True) for v in values)
        assert_all_close(found, expected, **TOLERANCE)


@pytest.mark.parametrize("backend", FUSED)
@pytest.mark.parametrize("integrator", IMPLICIT)
def test_gradcheck(integrator, backend):
    """Finite differences, of dt as well."""
    hnn, z0 = make_hnn(4, (5,)), make_states(2, 4).requires_grad_()
    dt = torch.tensor(0.35, dtype=torch.float64, requires_grad=True)

    def f(z0, dt, *parameters):
        return hf.rollout(hnn, z0, dt, 2, integrator=integrator, energy=True, backend=backend)[:2]

    torch.autograd.gradcheck(f, (z0, dt, *hnn.parameters()))


@pytest.mark.parametrize("hidden", [(), (7,), (33, 20)])
@pytest.mark.parametrize("batch", [0, 1, 2, 37])
@pytest.mark.parametrize("integrator", ["implicit-leapfrog", "implicit-midpoint", "tao"])
def test_shapes(integrator, batch, hidden):
    """Also a linear H, which no equation of a point depends on, an empty batch and no steps."""
    hnn, z0 = make_hnn(6, hidden), make_states(batch, 6)
    for n_steps in (0, 3):
        expected = hf.rollout(hnn, z0, 0.3, n_steps, integrator=integrator, energy=True, backend="reference")
        for backend in FUSED:
            found = hf.rollout(hnn, z0, 0.3, n_steps, integrator=integrator, energy=True, backend=backend)
            assert_all_close(found[:2], expected[:2], **TOLERANCE)


def test_float32_converges_to_rounding():
    exact, low = make_hnn(16, (32, 24)), make_hnn(16, (32, 24), dtype=torch.float32)
    z0 = make_states(9, 16, dtype=torch.float32)
    expected = hf.rollout(exact, z0.double(), 0.3, 20, integrator="implicit-leapfrog").states
    for backend in FUSED:
        out = hf.rollout(low, z0, 0.3, 20, integrator="implicit-leapfrog", backend=backend)
        assert out.solve.converged.all()
        assert (out.solve.residual <= 4 * torch.finfo(torch.float32).eps).all()
        # each of the 20 steps may be off by its tolerance, and carries on what came before
        torch.testing.assert_close(out.states.double(), expected, rtol=3e-5, atol=3e-5)


def stiff():
    """A network whose curvature is far too large for dt = 1."""
    hnn = make_hnn(6, (8, 8), "tanh")
    with torch.no_grad():
        for p in hnn.parameters():
            p.mul_(5)
    return hnn


@pytest.mark.parametrize("backend", FUSED)
@pytest.mark.parametrize("integrator", ["implicit-leapfrog", "implicit-midpoint", "symplectic-euler"])
def test_what_does_not_converge_is_said(integrator, backend):
    hnn, z0 = stiff(), make_states(5, 6)
    options = {"integrator": integrator, "backend": backend, "max_evaluations": 12}
    with pytest.raises(ConvergenceError, match=r"did not converge to 8\.9e-16 in 12 .* largest residual is .* smaller dt"):
        hf.rollout(hnn, z0, 1.0, 3, **options)
    out = hf.rollout(hnn, z0, 1.0, 3, unconverged="flag", **options)
    assert not out.solve.converged.all()
    assert torch.equal(out.solve.converged, out.solve.residual <= 4 * torch.finfo(torch.float64).eps)
    assert (out.solve.evaluations <= 24).all()
    assert out.solve.evaluations.max() >= 12
    out = hf.rollout(hnn, z0, 0.002, 3, integrator=integrator, backend=backend)
    assert out.solve.converged.all()


def test_the_reference_says_so_too():
    with pytest.raises(ConvergenceError, match="dt is too large"):
        hf.rollout(stiff(), make_states(5, 6), 1.0, 3, integrator="implicit-leapfrog", backend="reference")


@pytest.mark.parametrize("backend", FUSED)
def test_samples_do_not_depend_on_each_other(backend):
    """Not on how many iterations the others take, nor on others that are not finite."""
    hnn, z0 = make_hnn(6, (9, 8)), make_states(7, 6)
    alone = torch.cat([hf.rollout(hnn, z[None], 0.5, 6, integrator="implicit-leapfrog", backend=backend).states for z in z0])
    z0[3, 1], z0[5, 0] = torch.nan, torch.inf
    others = [0, 1, 2, 4, 6]
    out = hf.rollout(hnn, z0, 0.5, 6, integrator="implicit-leapfrog", backend=backend)
    torch.testing.assert_close(out.states[others], alone[others], rtol=1e-14, atol=1e-14)
    assert not out.states[[3, 5], -1].isfinite().any(dim=1).all()
    assert out.solve.converged[others].all()
    assert not out.solve.converged[[3, 5]].any()


@pytest.mark.parametrize("backend", FUSED)
@pytest.mark.parametrize("states", ["all", "final"])
@pytest.mark.parametrize("integrator", REVERSIBLE)
def test_reversible_memory_gives_the_stored_gradients(integrator, states, backend, monkeypatch):
    monkeypatch.setattr(outline, "CHUNK", 3)
    monkeypatch.setattr(outline, "MOST_ANCHORS", 2)
    hnn, z0 = make_hnn(6, (5, 4)), make_states(3, 6).requires_grad_()
    dt = torch.full((14,), 0.3, dtype=torch.float64, requires_grad=True)
    options = {"integrator": integrator, "states": states, "backend": backend}
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        found = gradients(hnn, z0, dt, 14, memory="reversible", **options)
    expected = gradients(hnn, z0, dt, 14, memory="store", **options)
    assert_all_close(found, expected, rtol=1e-11, atol=1e-11)


@pytest.mark.parametrize("backend", FUSED)
@pytest.mark.parametrize("states", ["all", "final"])
def test_reversal_that_lost_accuracy_is_noticed_and_repeated(states, backend, monkeypatch):
    monkeypatch.setattr(outline, "CHUNK", 3)
    monkeypatch.setattr(memory, "_LOST", 0.001)  # less than rounding: every interval fails its check
    hnn, z0 = make_hnn(6, (5, 4)), make_states(3, 6).requires_grad_()
    options = {"integrator": "implicit-leapfrog", "states": states, "backend": backend}
    with pytest.warns(UserWarning, match=r'"reversible" rebuilt step \d+ of 14 only to .* computed again from a kept state'):
        found = gradients(hnn, z0, 0.3, 14, memory="reversible", **options)
    expected = gradients(hnn, z0, 0.3, 14, memory="store", **options)
    assert_all_close(found, expected, rtol=1e-12, atol=1e-12)


def kept_bytes(hnn, z0, n_steps, memory):
    total = [0]

    def pack(t):
        total[0] += t.numel() * t.element_size()
        return t

    with torch.autograd.graph.saved_tensors_hooks(pack, lambda t: t):
        hf.rollout(hnn, z0, 0.1, n_steps, integrator="implicit-leapfrog", states="final", memory=memory)
    return total[0]


def test_reversible_memory_does_not_grow_with_the_number_of_steps():
    hnn, z0 = make_hnn(6, (5, 4)), make_states(3, 6).requires_grad_()
    few, many = (kept_bytes(hnn, z0, n, "reversible") for n in (128, 1024))
    assert few == many
    assert kept_bytes(hnn, z0, 1024, "checkpoint") > 1.5 * many


def taos_copies(hnn, z0, dt, n_steps, omega):
    """|(q, p) - (x, y)| after each step, every flow written out."""

    def gradient(q, p):
        z = torch.cat((q, p), dim=1).requires_grad_()
        return torch.autograd.grad(hf.energy(hnn, z).sum(), z)[0].chunk(2, dim=1)

    def a(c):
        nonlocal p, x
        Hq, Hp = gradient(q, y)
        p, x = p - c * Hq, x + c * Hp

    def b(c):
        nonlocal q, y
        Hq, Hp = gradient(x, p)
        q, y = q + c * Hp, y - c * Hq

    q, p = z0.chunk(2, dim=1)
    x, y = q, p
    angle = torch.tensor(2 * omega * dt, dtype=z0.dtype)
    distances = []
    for _ in range(n_steps):
        a(dt / 2)
        b(dt / 2)
        sq, sp, dq, dp = q + x, p + y, q - x, p - y
        dq, dp = angle.cos() * dq + angle.sin() * dp, angle.cos() * dp - angle.sin() * dq
        q, p, x, y = (sq + dq) / 2, (sp + dp) / 2, (sq - dq) / 2, (sp - dp) / 2
        b(dt / 2)
        a(dt / 2)
        distances.append(torch.cat((q - x, p - y), dim=1).norm(dim=1))
    return torch.stack(distances, dim=1)


def test_taos_copies_are_bound():
    hnn, z0 = make_hnn(6, (16, 12)), make_states(8, 6)
    loose, bound = (hf.rollout(hnn, z0, 0.1, 2000, integrator="tao", omega=omega).distance for omega in (0.0, 20.0))
    assert bound.max() < 0.5 * loose.max()
    torch.testing.assert_close(bound[:, :20], taos_copies(hnn, z0, 0.1, 20, 20.0), rtol=1e-8, atol=1e-14)
    assert hf.rollout(hnn, z0, 0.1, 2).distance is None


@pytest.mark.parametrize("integrator", IMPLICIT)
def test_training_step_compiles(integrator):
    hnn, z0 = make_hnn(6, (5, 4), dtype=torch.float32), make_states(3, 6, dtype=torch.float32)

    def loss_of(z0):
        out = hf.rollout(hnn, z0, 0.2, 3, integrator=integrator, energy=True)
        return out.states.square().mean() + out.energy.sum(), out.solve.evaluations

    expected = torch.autograd.grad(loss_of(z0)[0], list(hnn.parameters()), allow_unused=True)
    torch._dynamo.reset()
    loss, evaluations = torch.compile(loss_of, fullgraph=True, backend="aot_eager")(z0)
    assert evaluations.dtype == torch.int32
    assert_all_close(torch.autograd.grad(loss, list(hnn.parameters())), expected)


def test_explicit_for_a_separable_hamiltonian():
    """The implicit leapfrog method is then the leapfrog method, stage by stage."""
    leapfrog = for_separable(SCHEMES["leapfrog"])
    assert for_separable(SCHEMES["implicit-leapfrog"]) == leapfrog
    assert for_separable(SCHEMES["implicit-midpoint"]) is None
    hnn, z0 = hf.SeparableHNN(6, (5,), (4,)).double(), make_states(3, 6)
    for integrator in INTEGRATORS:
        expected = hf.rollout(hnn, z0, 0.3, 4, integrator=integrator, energy=True, backend="reference")
        out = hf.rollout(hnn, z0, 0.3, 4, integrator=integrator, energy=True)
        assert_all_close(out[:2], expected[:2], **TOLERANCE)
        solved = SCHEMES[integrator].implicit and not for_separable(SCHEMES[integrator])
        assert (out.solve is not None) == solved
        assert (out.distance is not None) == (integrator == "tao")


@pytest.mark.parametrize("integrator", REVERSIBLE)
def test_the_inverse_of_a_reversible_scheme_is_itself(integrator):
    stages = SCHEMES[integrator].stages
    for a, b in zip(inverse(stages), stages, strict=True):
        assert a[:4] == pytest.approx(b[:4], abs=1e-14)
    assert inverse(SCHEMES["symplectic-euler"].stages) != SCHEMES["symplectic-euler"].stages


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"memory": "reversible"}, 'needs a reversible integrator, one of implicit-leapfrog, .*; found "leapfrog"'),
        ({"tolerance": 1e-20}, "one unit of rounding .* found 1e-20"),
        ({"tolerance": 2.0}, "found 2.0"),
        ({"max_evaluations": 0}, "max_evaluations must be positive, found 0"),
        ({"unconverged": "ignore"}, "unconverged must be one of raise, flag; found 'ignore'"),
        ({"integrator": "tao", "omega": float("nan")}, "omega must be finite, found nan"),
    ],
)
def test_bad_options_are_named(options, message):
    with pytest.raises(ValueError, match=message):
        hf.rollout(make_hnn(6, (5,)), make_states(3, 6), 0.1, 2, **options)


def confining_hnn(d: int, width: int) -> hf.LatentHNN:
    """H = sum softplus(A z) + softplus(-A z) grows in every direction, so orbits stay, and mixes q with p."""
    hnn = hf.LatentHNN(2 * d, (2 * width,)).double()
    A = make_states(width, 2 * d, seed=3)
    with torch.no_grad():
        hnn.net[0].weight.copy_(torch.cat((A, -A)))
        hnn.net[0].bias.zero_()
        hnn.net[2].weight.fill_(0.5)
    return hnn


@pytest.mark.parametrize("integrator", [name for name in SCHEMES if SCHEMES[name].general.symplectic])
def test_energy_stays_over_ten_thousand_steps(integrator):
    hnn, z0 = confining_hnn(2, 6), make_states(4, 4)
    with torch.no_grad():
        out = hf.rollout(hnn, z0, 0.2, 10_000, integrator=integrator, energy=True, states="final")
        drift = (out.energy - out.energy[:, :1]).abs()
    early, late = drift[:, :1000].amax(dim=1), drift[:, -1000:].amax(dim=1)
    assert (late < 2 * early).all()
    assert (late < 0.1 * out.energy[:, 0]).all()


@pytest.mark.parametrize("integrator", ["leapfrog", "euler"])
def test_energy_does_not_stay_without_symplecticity(integrator):
    hnn, z0 = confining_hnn(2, 6), make_states(4, 4)
    with torch.no_grad():
        out = hf.rollout(hnn, z0, 0.2, 10_000, integrator=integrator, energy=True, states="final")
    drift = (out.energy - out.energy[:, :1]).abs()
    assert drift[:, -1].mean() > 5 * drift[:, :100].amax(dim=1).mean()
