"""H = T(p) + V(q): values, gradients, and the promise that leapfrog keeps for it."""

from __future__ import annotations

import numpy as np
import pytest
import torch
from torch.utils._pytree import tree_map_only

import hjepa_fast as hf
from hjepa_fast import separable
from hjepa_fast.schemes import SCHEMES, for_separable
from hjepa_fast.testing import make_states
from test_ops import assert_all_close, gradients

NETWORKS = {
    "kinetic |p|^2/2": {"potential_dims": (7, 5)},
    "two MLPs": {"potential_dims": (6,), "kinetic_dims": (5, 4), "activation": "tanh"},
    "quadratic": {"potential_dims": (6,), "quadratic": True},
    "two MLPs, quadratic": {"potential_dims": (4, 3), "kinetic_dims": (6,), "activation": "gelu", "quadratic": True},
    "linear": {"potential_dims": (), "kinetic_dims": ()},
}


def make(name, dtype=torch.float64, latent_dim=6):
    torch.manual_seed(2)
    hnn = hf.SeparableHNN(latent_dim, **NETWORKS[name]).to(dtype)
    for parameter in hnn.parameters():
        torch.nn.init.normal_(parameter, std=0.5)
    return hnn


@pytest.mark.parametrize("name", NETWORKS)
@pytest.mark.parametrize("integrator", ["leapfrog", "euler"])
@pytest.mark.parametrize("states", ["all", "final"])
def test_values_and_gradients_match_the_reference(name, integrator, states):
    hnn = make(name)
    z0 = make_states(3, 6).requires_grad_()
    for shape in ((), (5,), (3, 1), (3, 5)):
        dt = (make_states(*shape, seed=4) * 0.2 + 0.4).requires_grad_()
        found, expected = (
            gradients(hnn, z0, dt, 5, integrator=integrator, states=states, backend=backend)
            for backend in ("auto", "reference")
        )
        assert_all_close(found, expected, rtol=1e-11, atol=1e-12)


def test_energy_is_what_forward_computes():
    hnn, z0 = make("two MLPs, quadratic"), make_states(3, 6)
    out = hf.rollout(hnn, z0, 0.2, 4, energy=True)
    torch.testing.assert_close(out.energy, hnn(out.states).squeeze(-1))
    torch.testing.assert_close(hf.energy(hnn, z0), hnn(z0).squeeze(-1))


def test_a_step_costs_two_gradients(monkeypatch):
    """The last kick of a step and the first of the next share grad V: n + 1 gradients of V and n of T, not 2n and n."""
    counted = {"V": 0, "T": 0}
    hnn = make("two MLPs")
    evaluate = separable.evaluate_term

    def count(term, x):
        counted["V" if term.weights[0] is hnn.potential[0].weight else "T"] += 1
        return evaluate(term, x)

    monkeypatch.setattr(separable, "evaluate_term", count)
    from hjepa_fast import hamiltonian

    H = hamiltonian.from_module(hnn)
    separable.forward(
        H.V, H.T, make_states(3, 6), torch.full((1, 9), 0.2, dtype=torch.float64), for_separable(SCHEMES["leapfrog"]), False
    )
    assert counted == {"V": 10, "T": 9}


def jacobian(hnn, z, dt):
    return torch.autograd.functional.jacobian(lambda x: hf.leapfrog(hnn, x, dt, 1)[1], z)


@pytest.mark.parametrize("name", NETWORKS)
def test_leapfrog_is_symplectic_and_reversible(name):
    hnn, z = make(name), make_states(6)
    omega = torch.tensor(np.kron([[0, 1], [-1, 0]], np.eye(3)))
    for dt in (0.25, 1.0):
        J = jacobian(hnn, z, dt)
        assert (J.T @ omega @ J - omega).abs().max() < 1e-13
        there = hf.leapfrog(hnn, z, dt, 6)[-1]
        back = hf.leapfrog(hnn, there, -dt, 6)[-1]
        torch.testing.assert_close(back, z, rtol=1e-11, atol=1e-11)


def test_leapfrog_is_of_order_two():
    hnn, z0 = make("two MLPs"), make_states(6)
    exact = hf.leapfrog(hnn, z0, 1 / 4096, 4096)[-1]
    steps = np.array([16, 32, 64, 128])
    errors = [(hf.leapfrog(hnn, z0, 1 / n, int(n))[-1] - exact).norm().item() for n in steps]
    assert -np.polyfit(np.log(steps), np.log(errors), 1)[0] == pytest.approx(2, abs=0.1)


def test_energy_stays_over_many_steps():
    """A harmonic oscillator with a small anharmonic potential: the energy error after 5000 steps is that after 500."""
    hnn = make("quadratic")
    with torch.no_grad():
        hnn.stiffness.abs_().add_(0.5)
        H = hf.rollout(hnn, make_states(8, 6), 0.2, 5000, energy=True).energy
    drift = (H - H[:, :1]).abs()
    assert drift.amax() < 1.5 * drift[:, :500].amax() < 0.5


def test_opcheck_and_compile():
    hnn = make("two MLPs, quadratic", torch.float32)
    z0 = make_states(3, 6, dtype=torch.float32).requires_grad_()

    def loss_of(z0):
        out = hf.rollout(hnn, z0, 0.3, 4, energy=True)
        return out.states.square().mean() + out.energy.sum()

    expected = torch.autograd.grad(loss_of(z0), [z0, *hnn.parameters()])
    compiled = torch.compile(loss_of, fullgraph=True, backend="aot_eager", dynamic=True)
    assert_all_close(torch.autograd.grad(compiled(z0), [z0, *hnn.parameters()]), expected)

    from hjepa_fast import hamiltonian

    H = hamiltonian.from_module(hnn)
    V, T = H.V, H.T
    arguments = (
        z0, list(V.weights), list(V.biases), list(T.weights), list(T.biases), V.stiffness, T.stiffness,
        torch.full((1, 1), 0.3), 4, "leapfrog", *V.activation, *T.activation, True,
    )  # fmt: skip
    torch.library.opcheck(torch.ops.hjepa_fast.rollout_separable.default, arguments)

    detached = tree_map_only(torch.Tensor, lambda t: t.detach(), arguments)
    states, H_path = torch.ops.hjepa_fast.rollout_separable(*detached)
    torch.library.opcheck(
        torch.ops.hjepa_fast.rollout_separable_backward.default,
        (torch.randn_like(states), torch.randn_like(H_path), states, *detached),
        test_utils=("test_schema", "test_faketensor", "test_aot_dispatch_dynamic"),
    )


def test_a_second_derivative_is_refused_by_name():
    hnn, z0 = make("quadratic"), make_states(3, 6).requires_grad_()
    (first,) = torch.autograd.grad(hf.leapfrog(hnn, z0, 0.3, 2).sum(), z0, create_graph=True)
    with pytest.raises(RuntimeError, match="second derivative .* not supported"):
        first.sum().backward()


def test_integrator_module_and_low_precision():
    hnn = make("quadratic", torch.bfloat16)
    module = hf.SymplecticIntegrator(hnn, dt=0.3)
    z0 = make_states(3, 6, dtype=torch.bfloat16)
    states = module.rollout(z0, 5)
    assert states.dtype == torch.bfloat16
    exact = hf.leapfrog(make("quadratic", torch.bfloat16).double(), z0.double(), module.dt.item(), 5)
    torch.testing.assert_close(states.double(), exact, rtol=2**-8, atol=2**-8)  # rounded once, at the end
    with torch.inference_mode():
        assert torch.equal(module.rollout(z0, 5), states)


def test_bad_sizes_are_named():
    with pytest.raises(ValueError, match="even and positive .* found 5"):
        hf.SeparableHNN(5)
    with pytest.raises(ValueError, match=r"\[\.\.\., 6\] .* found \[2, 4\]"):
        hf.leapfrog(make("linear"), torch.zeros(2, 4, dtype=torch.float64), 0.1, 1)
