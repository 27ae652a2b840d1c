"""A call that is like one before it takes a plan: the same numbers, the same refusals."""

from __future__ import annotations

import gc
import weakref

import pytest
import torch
from torch import nn

import hjepa_fast as hf
from hjepa_fast import hamiltonian, plan
from hjepa_fast.backends import cpp
from hjepa_fast.hidden_space import coupling
from hjepa_fast.testing import make_hnn, make_separable_hnn, make_states, make_two_networks

MODELS = {
    "general": lambda dtype: make_hnn(4, (7, 5), dtype=dtype),
    "two networks": lambda dtype: make_two_networks(4, (7, 5), (6,), dtype=dtype),
    "|p|^2/2 + k|q|^2/2 + V": lambda dtype: hf.SeparableHNN(4, (7, 5), quadratic=True).to(dtype),
    "a network of q or p": lambda dtype: make_separable_hnn(2, 5, dtype=dtype),
}


@pytest.fixture(autouse=True)
def by_pair(monkeypatch):
    monkeypatch.setattr(coupling, "forced", "pair")


@pytest.fixture
def planned(monkeypatch):
    """How many calls took a plan."""
    seen = []

    def recall(H, key, recall=plan.recall):
        found = recall(H, key)
        seen.append(found is not None)
        return found

    monkeypatch.setattr(plan, "recall", recall)
    return seen


def results(hnn, z0, dt, n, **settings):
    """Everything that a call gives: states, energies, and gradients of z0, dt and every parameter."""
    z0 = z0.clone().requires_grad_()
    dt = dt.clone().requires_grad_() if isinstance(dt, torch.Tensor) else dt
    out = hf.rollout(hnn, z0, dt, n, **settings)
    parts = [x for x in (out.states, out.energy) if x is not None]
    weights = [torch.linspace(0.5, 1.5, x.numel(), dtype=x.dtype).reshape(x.shape) for x in parts]
    wanted = [z0, *([dt] if isinstance(dt, torch.Tensor) else []), *hnn.parameters()]
    grads = torch.autograd.grad(sum((x * w).sum() for x, w in zip(parts, weights, strict=True)), wanted)
    return [x.detach() for x in parts] + list(grads)


STEPS = {
    "a number": 0.1,
    "0-d": torch.tensor(0.1),
    "per step": torch.tensor([0.1, 0.2, 0.05]),
    "per sample": torch.linspace(0.1, 0.2, 2).reshape(2, 1, 1).expand(2, 3, 1),
}


@pytest.mark.parametrize("name", MODELS)
@pytest.mark.parametrize("backend", ["cpp", "torch"])
@pytest.mark.parametrize("memory", ["store", "recompute"])
@pytest.mark.parametrize("dt", STEPS)
def test_second_call_gives_what_the_first_gave(name, backend, memory, dt, planned):
    hnn, z0 = MODELS[name](torch.float64), make_states(2, 3, 4)
    for states, energy in (("all", False), ("final", False), ("all", True)):
        for integrator in ("leapfrog", "symplectic-euler" if isinstance(hnn, hf.SeparableHNN) else "euler"):
            settings = dict(states=states, energy=energy, integrator=integrator, backend=backend, memory=memory)
            first = results(hnn, z0, STEPS[dt], 3, **settings)
            assert planned[-1] is False
            second = results(hnn, z0, STEPS[dt], 3, **settings)
            # energies of terms that no evaluation gives are taken from the states, which no plan does
            assert planned[-1] or (energy and isinstance(hnn, hf.SeparableHNN))
            for a, b in zip(first, second, strict=True):
                torch.testing.assert_close(a, b, rtol=1e-13, atol=1e-14)
            with torch.no_grad():
                for _ in range(2):
                    out = hf.rollout(hnn, z0, STEPS[dt], 3, **settings)
                torch.testing.assert_close(out.states, first[0], rtol=1e-13, atol=1e-14)
                assert (out.energy is not None) is energy
                assert not out.states.requires_grad


def test_without_a_batch_or_with_its_own_shape():
    hnn = MODELS["general"](torch.float32)
    for shape in ((4,), (1, 4), (2, 1, 4)):
        z0 = make_states(*shape, dtype=torch.float32)
        for states in ("all", "final"):
            first, second = (hf.rollout(hnn, z0, 0.1, 2, states=states, energy=True) for _ in range(2))
            assert torch.equal(first.states, second.states)
            assert torch.equal(first.energy, second.energy)


def test_every_change_of_a_parameter_is_seen():
    hnn, z0 = MODELS["general"](torch.float64), make_states(2, 4)
    with torch.no_grad():
        hf.leapfrog(hnn, z0, 0.1, 2)
        weight = hnn.net[0].weight
        for change in (
            lambda: weight.mul_(1.5),
            lambda: weight.data.copy_(weight * 1.1),
            lambda: setattr(weight, "data", weight.data * 0.9),
            lambda: setattr(weight, "data", (weight.data * 0.9).T.contiguous().T),
            lambda: setattr(hnn.net[0], "weight", nn.Parameter(weight * 2)),
            lambda: setattr(hnn, "net", make_hnn(4, (7, 5), seed=4).net),
        ):
            before = hf.leapfrog(hnn, z0, 0.1, 2)
            change()
            for _ in range(2):
                after = hf.leapfrog(hnn, z0, 0.1, 2)
                assert not torch.equal(before, after)
                torch.testing.assert_close(after, hf.rollout(hnn, z0, 0.1, 2, backend="reference").states)


def test_stiffness_of_its_own_storage_is_followed():
    hnn, z0 = MODELS["|p|^2/2 + k|q|^2/2 + V"](torch.float64), make_states(2, 4)
    for _ in range(3):
        with torch.no_grad():
            hnn.stiffness.data = hnn.stiffness * 1.5
        for _ in range(2):
            expected = hf.rollout(hnn, z0, 0.1, 2, backend="reference").states
            torch.testing.assert_close(hf.leapfrog(hnn, z0, 0.1, 2), expected)


@pytest.mark.parametrize(
    ("call", "error"),
    [
        (dict(n_steps=True), TypeError),
        (dict(n_steps=1.0), TypeError),
        (dict(dt=float("nan")), ValueError),
        (dict(dt=float("inf")), ValueError),
        (dict(dt="0.1"), TypeError),
        (dict(max_evaluations=True), TypeError),
        (dict(integrator=["leapfrog"]), ValueError),
        (dict(tolerance=True), TypeError),
        (dict(dt=torch.ones(5)), ValueError),
        (dict(z0=torch.ones(3)), ValueError),
        (dict(z0=torch.ones(2, 4, dtype=torch.float64)), TypeError),
    ],
)
def test_what_was_refused_still_is(call, error):
    hnn = MODELS["general"](torch.float32)
    settings = dict(z0=make_states(2, 4, dtype=torch.float32), dt=0.1, n_steps=1, max_evaluations=1)
    for _ in range(2):
        hf.rollout(hnn, **settings)
    with pytest.raises(error):
        hf.rollout(hnn, **{**settings, **call})


def test_hooks_transforms_and_autocast_take_the_long_way(planned):
    hnn, z0 = MODELS["general"](torch.float32), make_states(2, 4, dtype=torch.float32)
    for _ in range(2):
        expected = hf.leapfrog(hnn, z0, 0.1, 2)
    assert planned == [False, True]
    with torch.autocast("cpu", torch.bfloat16):
        torch.testing.assert_close(hf.leapfrog(hnn, z0, 0.1, 2), expected)
    assert planned[-1] is False
    found = torch.vmap(lambda z: hf.leapfrog(hnn, z, 0.1, 2))(z0)
    torch.testing.assert_close(found, expected)
    with torch.autograd.forward_ad.dual_level():
        dual = torch.autograd.forward_ad.make_dual(z0, torch.ones_like(z0))
        states = hf.leapfrog(hnn, dual, 0.1, 2)
        assert torch.autograd.forward_ad.unpack_dual(states).tangent is not None
    handle = hnn.net[1].register_forward_hook(lambda *_: None)
    with pytest.warns(UserWarning, match="hook"):
        hf.leapfrog(hnn, z0, 0.1, 2)
    handle.remove()
    assert not any(planned[2:])


def test_a_second_derivative_and_a_changed_weight():
    hnn, z0 = MODELS["general"](torch.float64), make_states(2, 4).requires_grad_()
    hf.leapfrog(hnn, z0, 0.1, 2)
    out = hf.leapfrog(hnn, z0, 0.1, 2).sum()
    (g,) = torch.autograd.grad(out, z0, create_graph=True)
    (found,) = torch.autograd.grad(g.sin().sum(), z0)
    (g,) = torch.autograd.grad(hf.rollout(hnn, z0, 0.1, 2, backend="reference").states.sum(), z0, create_graph=True)
    torch.testing.assert_close(found, torch.autograd.grad(g.sin().sum(), z0)[0])
    out = hf.leapfrog(hnn, z0, 0.1, 2).sum()
    with torch.no_grad():
        hnn.net[2].weight.add_(1)
    with pytest.raises(RuntimeError, match="modified by an inplace"):
        out.backward()


def test_saved_tensors_that_were_replaced_are_the_ones_used():
    hnn, z0 = MODELS["general"](torch.float64), make_states(2, 4)
    expected = results(hnn, z0, 0.1, 2)
    with torch.autograd.graph.saved_tensors_hooks(lambda x: x.clone(), lambda x: x):
        for _ in range(2):
            for a, b in zip(expected, results(hnn, z0, 0.1, 2), strict=True):
                torch.testing.assert_close(a, b, rtol=1e-13, atol=1e-14)


def test_frozen_parameters_have_no_gradients():
    hnn, z0 = MODELS["two networks"](torch.float64), make_states(2, 4)
    hnn.requires_grad_(False)
    for _ in range(2):
        assert not hf.leapfrog(hnn, z0, 0.1, 2).requires_grad
    hnn.potential[0].weight.requires_grad_(True)
    for _ in range(2):
        hnn.zero_grad()
        hf.leapfrog(hnn, z0, 0.1, 2).sum().backward()
        assert [p.grad is not None for p in hnn.parameters()].count(True) == 1


def test_plans_are_few_and_do_not_keep_a_model_alive():
    hnn, z0 = MODELS["general"](torch.float32), make_states(2, 4, dtype=torch.float32)
    for n in range(1, 2 * plan._MOST):
        hf.leapfrog(hnn, z0, 0.1, n)
    H = hamiltonian.from_module(hnn)
    assert 0 < len(H.plans) <= plan._MOST
    weight = weakref.ref(hnn.net[0].weight)
    del H, hnn
    gc.disable()  # a plan must not need the collector to go
    try:
        assert weight() is None
    finally:
        gc.enable()


def test_the_number_of_threads_is_that_of_the_call(monkeypatch):
    hnn, z0 = MODELS["general"](torch.float32), make_states(2, 4, dtype=torch.float32)
    seen = []

    def program_forward(*args, run=torch.ops.hjepa_fast_cpp.program_forward):
        seen.append(args[-1] & 0xFFFF)
        return run(*args)

    monkeypatch.setattr(torch.ops.hjepa_fast_cpp, "program_forward", program_forward)
    before = torch.get_num_threads()
    try:
        for n in (1, 2, 1):
            torch.set_num_threads(n)
            hf.rollout(hnn, z0, 0.1, 1, backend="cpp")
    finally:
        torch.set_num_threads(before)
    assert cpp.available()
    assert seen == [1, 2, 1]
