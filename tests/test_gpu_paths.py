"""What a rollout of CUDA tensors asks of the device, watched on the CPU: nothing is read back, and few kernels are launched."""

from __future__ import annotations

from itertools import pairwise
from typing import Any

import pytest
import torch
from torch.utils._python_dispatch import TorchDispatchMode

import hjepa_fast as hf
from hjepa_fast import ops
from hjepa_fast.activations import NAMES, Activation, Mixed
from hjepa_fast.errors import ConvergenceError
from hjepa_fast.hidden_space import fixed_point, network, rollout
from hjepa_fast.schemes import SCHEMES
from hjepa_fast.state_space import ops as state_ops
from hjepa_fast.state_space import system
from hjepa_fast.testing import make_hnn, make_mechanical, make_states

aten = torch.ops.aten
READS = {aten._local_scalar_dense, aten.nonzero, aten.equal, aten.masked_select, aten.lift_fresh}
"""Operators that wait for a GPU: numbers to the host, sizes that depend on them, the host's numbers to the device."""
OWN = {
    torch.ops.hjepa_fast.rollout.default: ops._rollout,
    torch.ops.hjepa_fast.rollout_backward.default: ops._rollout_backward,
    torch.ops.hjepa_fast.states_rollout.default: state_ops._rollout,
    torch.ops.hjepa_fast.states_rollout_backward.default: state_ops._backward,
    torch.ops.hjepa_fast.states_gradient.default: state_ops._gradient,
}
"""The library's operators, and what runs in them."""


class Watched(TorchDispatchMode):
    """Collects what is read back, and every operator that launches a kernel."""

    def __init__(self) -> None:
        super().__init__()
        self.reads: list[str] = []
        self.launched: list[str] = []

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        kwargs = kwargs or {}
        if func in OWN:
            with self:
                return OWN[func](*args, **kwargs)
        if func.namespace == "aten":
            with self:  # what is made of other operators
                parts = func.decompose(*args, **kwargs)
            if parts is not NotImplemented:
                return parts
        indices = args[1] if func is aten.index.Tensor else ()
        by_mask = any(x is not None and x.dtype == torch.bool for x in indices)
        if func.overloadpacket in READS or by_mask:
            self.reads.append(str(func))
        found = func(*args, **kwargs)
        name = func.overloadpacket.__name__
        tensors = [x for x in (found if isinstance(found, (tuple, list)) else [found]) if isinstance(x, torch.Tensor)]
        nothing = func.is_view or "empty" in name or name in ("detach", "_unsafe_view")
        if not nothing and (any(x.numel() for x in tensors) or func.namespace != "aten" or name.startswith("_foreach")):
            self.launched.append(name)
        return found


@pytest.fixture(autouse=True)
def _as_on_a_device(monkeypatch):
    monkeypatch.setattr(rollout, "waits", lambda x: True)
    monkeypatch.setattr(system, "waits", lambda x: True)


def watched(hnn: torch.nn.Module, n_steps: int = 5, **options: Any) -> Watched:
    z0, dt = make_states(3, 6).requires_grad_(), torch.tensor(0.1, dtype=torch.float64, requires_grad=True)
    with Watched() as mode:
        out = hf.rollout(hnn, z0, dt, n_steps, energy=True, backend="torch", **options)
        total = out.states.square().sum() + out.energy.square().sum()
        torch.autograd.grad(total, [z0, dt, *hnn.parameters()])
    assert {"mm", "addmm"} & set(mode.launched), "the operators were not looked into"
    return mode


NETWORKS = {
    "one": lambda: make_hnn(6, (5, 4)),
    "separable": lambda: hf.SeparableHNN(6, (5, 4)).double(),
    "quadratic": lambda: hf.SeparableHNN(6, (5, 4), quadratic=True).double(),
    "mechanical": lambda: make_mechanical(3, (5, 4)),
}


EXPLICIT = [name for name in SCHEMES if not SCHEMES[name].implicit]
# of a mechanical system Tao's method is nested autograd
FUSED = [(name, network) for name in EXPLICIT for network in NETWORKS if (name, network) != ("tao", "mechanical")]


@pytest.mark.parametrize(("integrator", "network"), FUSED)
def test_explicit_rollouts_read_nothing_back(integrator, network):
    for memory in ("store", "checkpoint"):
        assert watched(NETWORKS[network](), integrator=integrator, memory=memory).reads == []


@pytest.mark.parametrize("network", ["one", "mechanical"])
def test_implicit_rollouts_read_back_only_whether_all_have_converged(network, monkeypatch):
    options = {"integrator": "implicit-midpoint", "n_steps": 2, "max_evaluations": 12}
    hnn = NETWORKS[network]()
    asked = watched(hnn, unconverged="flag", **options).reads
    assert 0 < len(asked) < 4 * 12
    assert set(asked) == {"aten._local_scalar_dense.default"}
    # to raise an error is to look once more each way
    assert len(watched(hnn, unconverged="raise", **options).reads) == len(asked) + 2
    monkeypatch.setattr(fixed_point, "capturing", lambda x: True)
    assert watched(hnn, unconverged="flag", **options).reads == []


@pytest.mark.parametrize("places", [[], [2], [0, 1, 2], [4, 0, 1, 3], [3, 3, 2, 1], [*range(0, 200, 2)]], ids=str)
def test_places_are_picked_alike(places, monkeypatch):
    x = torch.randn(3, 2, 200)
    assert torch.equal(system.picked(x, places), x[..., places])


def test_where_a_graph_is_captured_all_evaluations_are_made(monkeypatch):
    """With the same numbers."""
    hnn, z0 = make_hnn(6, (5, 4)), make_states(3, 6)
    options = {"integrator": "implicit-midpoint", "backend": "torch", "unconverged": "flag"}
    expected = hf.rollout(hnn, z0, 0.1, 3, **options)
    monkeypatch.setattr(fixed_point, "capturing", lambda x: True)
    found = hf.rollout(hnn, z0, 0.1, 3, **options)
    assert torch.equal(found.states, expected.states)
    assert torch.equal(found.solve.converged, expected.solve.converged)


def test_what_must_read_back_is_refused_in_a_capture(monkeypatch):
    hnn, z0 = make_hnn(6, (5, 4)), make_states(3, 6).requires_grad_()
    options = {"integrator": "implicit-leapfrog", "backend": "torch"}
    held = hf.rollout(hnn, z0, 0.1, 3, memory="reversible", unconverged="flag", **options).states.sum()
    monkeypatch.setattr(fixed_point, "capturing", lambda x: True)
    with pytest.raises(hf.errors.HJEPAError, match='unconverged="raise" reads from the device.*use "flag"'):
        hf.rollout(hnn, z0, 0.1, 3, **options)
    with pytest.raises(hf.errors.HJEPAError, match='memory="reversible" reads from the device.*use "checkpoint"'):
        held.backward()


def test_inexact_gradients_are_told_where_that_does_not_wait(monkeypatch):
    solver = rollout.Solver(1e-6, 9)
    residual = torch.tensor([1e-9, 1e-3])
    with pytest.raises(ConvergenceError, match="did not converge for 1 of 2 samples"):
        rollout.check_adjoint(solver, residual, must_converge=True)
    rollout.check_adjoint(solver, residual, must_converge=False)
    monkeypatch.setattr(rollout, "waits", fixed_point.waits)
    with pytest.warns(UserWarning, match="gradients are inexact"):
        rollout.check_adjoint(solver, residual, must_converge=False)


@pytest.mark.parametrize(
    "activation", [*map(Activation, NAMES), Activation("softplus", 2.5, 3.0), Activation("elu", 0.7)], ids=str
)
def test_a_cotangent_goes_back_through_an_activation(activation):
    a = torch.linspace(-4, 4, 41, dtype=torch.float64, requires_grad=True)
    g = torch.randn(41, dtype=torch.float64)
    (expected,) = torch.autograd.grad((activation(a) * g).sum(), a)
    torch.testing.assert_close(activation.pull(a.detach(), g), expected, rtol=1e-12, atol=1e-12)


@pytest.mark.parametrize("need_sums", [True, False])
@pytest.mark.parametrize("widths", [(5,), (5, 4), (6, 5, 3)], ids=str)
def test_an_energys_cotangent_goes_back(widths, need_sums):
    """Against autograd, with another activation after each layer."""
    weights = [torch.randn(m, n, dtype=torch.float64, requires_grad=True) for n, m in pairwise((*widths, 1))]
    biases = [torch.randn(len(w), dtype=torch.float64, requires_grad=True) for w in weights]
    activation = Mixed(tuple(Activation(name) for name in ("softplus", "tanh", "gelu")[: len(widths)]))
    a, gE = torch.randn(7, widths[0], dtype=torch.float64, requires_grad=True), torch.randn(7, dtype=torch.float64)
    value = (network.energy(network.Tail(weights, biases, activation), a) * gE).sum()
    expected = torch.autograd.grad(value, [a, *weights, *biases])
    tail = network.Tail([w.detach() for w in weights], [b.detach() for b in biases], activation)
    sums = network.Gradients.zeros(torch.zeros(1, dtype=torch.float64), tail)
    found = network.energy_adjoint(tail, a.detach(), gE, sums if need_sums else None)
    totals = [found, *sums.weights, *sums.biases] if need_sums else [found]
    for x, y in zip(totals, expected, strict=False):
        torch.testing.assert_close(x, y, rtol=1e-12, atol=1e-12)
