"""H = T(p) + V(q): values, gradients, and the promise that leapfrog keeps for it."""

from __future__ import annotations

import itertools

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import nn
from torch.utils._pytree import tree_map_only

import hjepa_fast as hf
from hjepa_fast import hamiltonian, ops
from hjepa_fast.backends import cpp, reference
from hjepa_fast.backends import torch as torch_backend
from hjepa_fast.hamiltonian import SumHamiltonian, Term
from hjepa_fast.hidden_space import coupling, machine
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


EXPLICIT = [name for name in SCHEMES if for_separable(SCHEMES[name])]
FUSED = ("torch", "cpp")
MEMORY = ("store", "recompute", "checkpoint", "reversible")


@pytest.mark.parametrize("name", NETWORKS)
@pytest.mark.parametrize("integrator", ["leapfrog", "euler"])
@pytest.mark.parametrize("states", ["all", "final"])
def test_values_and_gradients_match_the_reference(name, integrator, states):
    hnn = make(name)
    z0 = make_states(3, 6).requires_grad_()
    for shape in ((), (5,), (3, 1), (3, 5)):
        dt = (make_states(*shape, seed=4) * 0.2 + 0.4).requires_grad_()
        options = {"integrator": integrator, "states": states}
        expected = gradients(hnn, z0, dt, 5, backend="reference", **options)
        for backend, memory in itertools.product(FUSED, MEMORY):
            found = gradients(hnn, z0, dt, 5, backend=backend, memory=memory, **options)
            assert_all_close(found, expected, rtol=1e-11, atol=1e-12)


@pytest.mark.parametrize("backend", FUSED)
@pytest.mark.parametrize("integrator", EXPLICIT)
@pytest.mark.parametrize("name", ["kinetic |p|^2/2", "two MLPs"])
def test_every_explicit_integrator(name, integrator, backend):
    hnn, z0 = make(name), make_states(3, 6).requires_grad_()
    dt = torch.tensor([0.2, 0.3], dtype=torch.float64, requires_grad=True)
    expected = gradients(hnn, z0, dt, 2, integrator=integrator, backend="reference")
    found = gradients(hnn, z0, dt, 2, integrator=integrator, backend=backend)
    assert_all_close(found, expected, rtol=1e-10, atol=1e-11)


MODULES = {"softplus": nn.Softplus(beta=1.5), "tanh": nn.Tanh(), "silu": nn.SiLU(), "gelu": nn.GELU()}


@pytest.mark.parametrize("backend", FUSED)
@settings(max_examples=60, deadline=None)
@given(data=st.data())
def test_odd_shapes_match_the_reference(backend, data):
    """Any widths, depths and activations of V and of T, batch, number of steps, latent size, layout of z0 and shape of dt."""
    draw = data.draw
    d, batch, n_steps = draw(st.integers(1, 19)), draw(st.integers(0, 9)), draw(st.integers(0, 5))
    widths = st.lists(st.integers(1, 37), max_size=3)
    hnn = hf.SeparableHNN(2 * d, draw(widths), draw(st.one_of(st.none(), widths)))
    generator = torch.Generator().manual_seed(draw(st.integers(0, 9)))
    for net in (hnn.potential, hnn.kinetic or []):
        activation = MODULES[draw(st.sampled_from(sorted(MODULES)))]
        for i, layer in enumerate(net):
            if not isinstance(layer, nn.Linear):
                net[i] = activation
                continue
            for parameter in layer.parameters():
                nn.init.normal_(parameter, std=layer.in_features**-0.5, generator=generator)
    hnn = hnn.double()
    z0 = make_states(2 * d, batch).T if draw(st.booleans()) else make_states(batch, 2 * d)
    shape = draw(st.sampled_from([(), (n_steps,), (batch, 1), (batch, n_steps)]))
    z0, dt = z0.requires_grad_(), (make_states(*shape, seed=3) * 0.3).requires_grad_()
    options = {
        "integrator": draw(st.sampled_from(["leapfrog", "euler", "symplectic-euler"])),
        "states": draw(st.sampled_from(["all", "final"])),
    }
    found = gradients(hnn, z0, dt, n_steps, backend=backend, memory=draw(st.sampled_from(MEMORY)), **options)
    assert_all_close(found, gradients(hnn, z0, dt, n_steps, backend="reference", **options), rtol=1e-9, atol=1e-10)


@pytest.mark.parametrize("backend", FUSED)
@pytest.mark.parametrize("states", ["all", "final"])
@pytest.mark.parametrize("size", [1, 5], ids=["scalar", "by coordinate"])
def test_learnable_masses(size, states, backend):
    """T = (s p) . p / 2 with s of any values, and its gradient, by the operator itself."""
    hnn = hf.SeparableHNN(10, (7, 4), activation="tanh").double()
    V = hamiltonian.from_module(hnn).terms[0]
    s = (make_states(size, seed=8).abs() + 0.5).requires_grad_()
    H = SumHamiltonian((V, Term("p", stiffness=s)), 10)
    z0, dt = make_states(4, 10).requires_grad_(), torch.full((1, 3), 0.3, dtype=torch.float64, requires_grad=True)
    expected = reference.rollout(H, z0, dt, 3, "leapfrog", 1.0)
    expected = (expected if states == "all" else expected[:, -1:]), H.energy(expected)
    if states == "final":
        expected = expected[0], H.energy(reference.rollout(H, z0, dt, 3, "leapfrog", 1.0))
    for how, memory in itertools.product(("dense", "pair") if size == 1 else ("pair",), MEMORY):
        found = torch.ops.hjepa_fast.rollout(
            z0, H.tensors, dt, 3, ops.text_of(H.terms), ops.softplus_of(H.terms), "leapfrog", how, states == "all", True,
            memory, 1e-14, 50, True, 1.0, backend, "",
        )[:2]  # fmt: skip
        grads = []
        for out in (found, expected):
            weighted = sum((x * make_states(*x.shape, seed=6)).sum() for x in out)
            grads.append(torch.autograd.grad(weighted, [z0, dt, s, *hnn.parameters()], retain_graph=True))
        assert_all_close([*found, *grads[0]], [*expected, *grads[1]], rtol=1e-11, atol=1e-12)


@pytest.mark.parametrize("backend", FUSED)
@pytest.mark.parametrize("frozen", ["potential", "kinetic"])
def test_frozen_terms_get_no_gradient(frozen, backend):
    hnn, z0 = make("two MLPs"), make_states(3, 6)
    expected = gradients(hnn, z0, 0.3, 3, backend="reference")
    named = dict(zip(dict(hnn.named_parameters()), expected[2:], strict=True))
    getattr(hnn, frozen).requires_grad_(False)
    found = gradients(hnn, z0, 0.3, 3, backend=backend)
    assert_all_close(found[2:], [g for name, g in named.items() if not name.startswith(frozen)], rtol=1e-11, atol=1e-12)


@pytest.mark.parametrize("backend", FUSED)
def test_the_backend_asked_for_runs(backend, monkeypatch):
    calls = []
    for name, module in (("torch", torch_backend), ("cpp", cpp)):
        run = module.run
        monkeypatch.setattr(module, "run", lambda *args, n=name, f=run: calls.append(n) or f(*args))
    hf.rollout(make("two MLPs"), make_states(3, 6), 0.2, 2, backend=backend)
    assert calls == [backend]
    hf.rollout(make("two MLPs"), make_states(3, 6), 0.2, 2)
    assert calls[1] == ("cpp" if cpp.available() else "torch")


@pytest.mark.parametrize("name", ["kinetic |p|^2/2", "two MLPs"])
def test_final_states_cost_one_row(name, monkeypatch):
    """With states="final" and the dense coupling only one row of a sample is multiplied to the latent size."""
    rows = []
    product = torch_backend.product
    monkeypatch.setattr(coupling, "forced", "dense")
    monkeypatch.setattr(
        torch_backend, "product", lambda x, W, *rest: (rows.append(x.shape[:-1]) if rest else None) or product(x, W, *rest)
    )
    hf.rollout(make(name), make_states(3, 6), 0.2, 50, states="final", backend="torch")
    assert set(rows) <= {(3, 1)}


@pytest.mark.parametrize("backend", FUSED)
@pytest.mark.parametrize("name", ["kinetic |p|^2/2", "two MLPs"])
def test_less_memory(name, backend):
    """What is kept for the backward pass: less from mode to mode, and with checkpoints far less than in proportion."""

    def kept(memory, n_steps):  # of either coupling
        sizes = []
        with torch.autograd.graph.saved_tensors_hooks(lambda t: sizes.append(t.numel()) or t, lambda t: t):
            hf.rollout(make(name), make_states(40, 6), 0.01, n_steps, states="final", memory=memory, backend=backend)
        return sum(sizes)

    store, recompute, checkpoint = (kept(memory, 100) for memory in MEMORY[:3])
    assert store > recompute > 2 * checkpoint
    assert kept("checkpoint", 400) < 2.5 * checkpoint


def test_energy_is_what_forward_computes():
    hnn, z0 = make("two MLPs, quadratic"), make_states(3, 6)
    out = hf.rollout(hnn, z0, 0.2, 4, energy=True)
    torch.testing.assert_close(out.energy, hnn(out.states).squeeze(-1))
    torch.testing.assert_close(hf.energy(hnn, z0), hnn(z0).squeeze(-1))


@pytest.mark.parametrize("how", ["dense", "pair"])
@pytest.mark.parametrize("with_energy", [True, False])
def test_a_step_costs_two_gradients(with_energy, how, monkeypatch):
    """The last kick of a step and the first of the next share grad V: n + 1 gradients of V and n of T, not 2n and n."""
    counted = {2: 0, 3: 0}
    evaluate = machine.evaluate

    def count(tail, a):
        counted[len(tail.weights)] += 1
        return evaluate(tail, a)

    monkeypatch.setattr(machine, "evaluate", count)
    monkeypatch.setattr(coupling, "forced", how)
    hnn = hf.SeparableHNN(6, (5, 4), (5, 4, 3)).double()
    with torch.no_grad():
        hf.rollout(hnn, make_states(3, 6), 0.2, 9, energy=with_energy, backend="torch")
    assert counted == {2: 10, 3: 9}


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


@pytest.mark.parametrize("name", ["kinetic |p|^2/2", "two MLPs", "quadratic", "linear"])
@pytest.mark.parametrize(
    ("backend", "memory", "every_state"), [("cpp", "store", True), ("torch", "checkpoint", False), ("cpp", "recompute", False)]
)
def test_opcheck_and_compile(name, backend, memory, every_state):
    hnn = make(name, torch.float32)
    z0 = make_states(3, 6, dtype=torch.float32).requires_grad_()
    states = "all" if every_state else "final"

    def loss_of(z0):
        out = hf.rollout(hnn, z0, 0.3, 4, energy=True, states=states, memory=memory, backend=backend)
        return out.states.square().mean() + out.energy.sum()

    expected = torch.autograd.grad(loss_of(z0), [z0, *hnn.parameters()])
    compiled = torch.compile(loss_of, fullgraph=True, backend="aot_eager", dynamic=True)
    assert_all_close(torch.autograd.grad(compiled(z0), [z0, *hnn.parameters()]), expected)

    H = hamiltonian.from_module(hnn)
    for how in ("dense", "pair") if name != "quadratic" else ("pair",):
        arguments = (
            z0, list(H.tensors), torch.full((1, 1), 0.3), 4, ops.text_of(H.terms), ops.softplus_of(H.terms), "leapfrog", how,
            every_state, True, memory, 1e-6, 50, True, 1.0, backend, "",
        )  # fmt: skip
        torch.library.opcheck(torch.ops.hjepa_fast.rollout.default, arguments)

        detached = tree_map_only(torch.Tensor, lambda t: t.detach(), arguments)
        path, H_path, tape, kept, *_ = torch.ops.hjepa_fast.rollout(*detached)
        torch.library.opcheck(
            torch.ops.hjepa_fast.rollout_backward.default,
            (torch.randn_like(path), torch.randn_like(H_path), tape, kept, *detached[:3], True, *detached[3:]),
            test_utils=("test_schema", "test_faketensor", "test_aot_dispatch_dynamic"),
        )


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
