"""Mechanical systems with M(q) and angles, against textbook code by nested autograd; and what they promise."""

from __future__ import annotations

import copy
import warnings
from itertools import pairwise

import pytest
import torch
from torch import nn

import hjepa_fast as hf
from hjepa_fast import diagnostics
from hjepa_fast.backends import cpp
from hjepa_fast.errors import NotFusedError
from hjepa_fast.state_space import ops as state_ops
from hjepa_fast.testing import make_states

INTEGRATORS = ("leapfrog", "implicit-leapfrog", "implicit-midpoint", "symplectic-euler", "yoshida4", "euler", "rk4")
BACKENDS = ["torch", pytest.param("cpp", marks=pytest.mark.skipif(not cpp.available(), reason=cpp.why_not() or "built"))]


def net(inputs, outputs, *widths, activation=nn.Tanh):
    sizes = (inputs, *widths, outputs)
    layers = [x for m, n in pairwise(sizes) for x in (nn.Linear(m, n), activation() if m == inputs else nn.Softplus())]
    return nn.Sequential(*layers[:-1])


def heads():
    return hf.Cholesky([nn.Linear(4, 6), (nn.Linear(6, 2), nn.Linear(6, 1))], "tanh", diagonal="raw")


MODELS = {
    "cholesky": lambda: hf.MechanicalHNN(net(5, 1, 7, 5), hf.Cholesky(net(5, 6, 6, 5), epsilon=0.1), (0, 2)),
    "raw": lambda: hf.MechanicalHNN(hf.Term(net(4, 1, 7), "q", factor=0.5), heads(), (1, 0)),
    "diagonal": lambda: hf.MechanicalHNN(net(4, 1, 7, 5, activation=nn.SiLU), hf.Diagonal(net(4, 3, 20)), (1,)),
    "constant": lambda: hf.MechanicalHNN(net(3, 1, 7), hf.Cholesky(2), (1,)),
    "no potential": lambda: hf.MechanicalHNN(None, hf.Cholesky(net(2, 3, 6))),
    "linear": lambda: hf.MechanicalHNN(net(4, 1), hf.Diagonal(net(4, 3)), (2,)),
    "no mass": lambda: hf.MechanicalHNN(net(4, 1, 7), None, (0,)),
    "one angle": lambda: hf.MechanicalHNN(net(2, 1, 7), hf.Diagonal(net(2, 1, 5), diagonal="raw"), (0,)),
    "constant diagonal": lambda: hf.MechanicalHNN(net(2, 1, 7), hf.Diagonal(1, epsilon=0.2), (0,)),
}


def make(name, dtype=torch.float64):
    torch.manual_seed(1)
    model = MODELS[name]().to(dtype)
    with torch.no_grad():
        for p in model.parameters():
            p.add_(torch.randn_like(p) * 0.2)
    return model


class Textbook(nn.Module):
    """The same H, entry by entry."""

    def __init__(self, model):
        super().__init__()
        self.model = model

    def forward(self, z):
        model, d = self.model, self.model.d
        q, p = z[..., :d], z[..., d:]
        plain = [q[..., i] for i in range(d) if i not in model.angles]
        angles = sorted(model.angles)
        x = torch.stack([*plain, *[torch.cos(q[..., i]) for i in angles], *[torch.sin(q[..., i]) for i in angles]], dim=-1)
        H = torch.zeros_like(q[..., 0])
        if model.V is not None:
            H = H + model.V.net(x)[..., 0] * (0.5 if model.V.factor else 1.0)
        mass = model.mass
        if mass is None:
            return H + sum(p[..., i] ** 2 for i in range(d)) / 2
        if mass.entries is not None:
            y = mass.entries.expand(*q.shape[:-1], -1)
        else:
            y = mass.net(x) if mass.heads is None else torch.cat([head(mass.net(x)) for head in mass.heads], dim=-1)
        positive = torch.log1p(torch.exp(y)) if mass.diagonal == "softplus" else y
        if isinstance(mass, hf.Diagonal):
            return H + sum((positive[..., i] + mass.epsilon) * p[..., i] ** 2 for i in range(d)) / 2
        L = [[positive[..., i] if i == j else None for j in range(d)] for i in range(d)]
        k = d
        for i in range(d):
            for j in range(i):
                L[i][j] = y[..., k]
                k += 1
        w = [sum(L[i][j] * p[..., i] for i in range(j, d)) for j in range(d)]
        return H + sum(x * x for x in w) / 2 + mass.epsilon * sum(p[..., i] ** 2 for i in range(d)) / 2


def rolled(model, oracle, z, n=2, **kwargs):
    """States, energies, and the gradients of a loss of both."""
    z = z.clone().requires_grad_()
    dt = torch.tensor(0.1, dtype=z.dtype, requires_grad=True)
    if oracle:
        kwargs = {"integrator": kwargs["integrator"], "backend": "reference"}
    out = hf.rollout(Textbook(model) if oracle else model, z, dt, n, energy=True, **kwargs)
    weights = torch.linspace(0.5, 1.5, out.states.numel(), dtype=z.dtype).reshape(out.states.shape)
    loss = (out.states * weights).sum() + out.energy.square().sum()
    return [out.states, out.energy, *torch.autograd.grad(loss, [z, dt, *model.parameters()], materialize_grads=True)]


def assert_equal(found, wanted):
    for k, (a, b) in enumerate(zip(found, wanted, strict=True)):
        torch.testing.assert_close(a, b, rtol=1e-10 if k < 2 else 1e-9, atol=1e-11 if k < 2 else 1e-10)


CASES = [(name, integrator) for name in MODELS for integrator in (INTEGRATORS if name == "cholesky" else ("rk4", "leapfrog"))]


@pytest.mark.parametrize(("name", "integrator"), [*CASES, ("raw", "implicit-leapfrog")])
def test_states_energies_and_gradients(name, integrator, monkeypatch):
    model = make(name)
    z = make_states(3, 2 * model.d)
    n = 1 if integrator == "yoshida4" else 2
    wanted = rolled(model, True, z, n, integrator=integrator)
    monkeypatch.setattr(state_ops, "NARROW", 0)  # so that layers this small are kept in C++ too
    for backend in ("torch", *(["cpp"] if cpp.available() else [])):
        for memory in ("store", "recompute", "checkpoint"):
            assert_equal(rolled(model, False, z, n, integrator=integrator, backend=backend, memory=memory), wanted)


@pytest.mark.parametrize("backend", BACKENDS)
@pytest.mark.parametrize("name", MODELS)
def test_gradient_and_its_adjoint(name, backend):
    model = make(name)
    z = make_states(2, 3, 2 * model.d).requires_grad_()
    g = torch.autograd.grad(Textbook(model)(z).sum(), z, create_graph=True)[0]
    found = hf.gradient(model, z, backend=backend)
    torch.testing.assert_close(found, g, rtol=1e-10, atol=1e-12)
    wanted = [z, *model.parameters()]
    own, expected = (torch.autograd.grad(x.square().sum(), wanted, materialize_grads=True) for x in (found, g))
    assert_equal(own, expected)
    torch.testing.assert_close(
        hf.vector_field(model, z, backend=backend), torch.cat((g[..., model.d :], -g[..., : model.d]), -1)
    )
    torch.testing.assert_close(hf.energy(model, z), Textbook(model)(z))
    torch.testing.assert_close(model(z).squeeze(-1), Textbook(model)(z))


@pytest.mark.parametrize("backend", BACKENDS)
def test_gradcheck_and_many_rows(backend):
    """By finite differences; and tiles of rows of every size agree with single rows."""
    model = make("cholesky")
    z = make_states(2, 6).requires_grad_()

    def roll(z, dt):
        return hf.rollout(model, z, dt, 2, integrator="implicit-midpoint", energy=True, backend=backend)[:2]

    assert torch.autograd.gradcheck(roll, (z, torch.full((2, 2), 0.1, dtype=torch.float64, requires_grad=True)))
    many = make_states(131, 6)
    dt = torch.linspace(0.05, 0.15, 131, dtype=torch.float64)[:, None].requires_grad_()
    states = hf.rollout(model, many, dt, 3, integrator="implicit-leapfrog", backend=backend).states
    g = torch.autograd.grad(states.sum(), dt)[0]
    for i in (0, 64, 130):
        own = dt[i].detach().requires_grad_()
        one = hf.rollout(model, many[i], own, 3, integrator="implicit-leapfrog", backend="torch").states
        torch.testing.assert_close(states[i], one, rtol=1e-12, atol=1e-12)
        torch.testing.assert_close(g[i], torch.autograd.grad(one.sum(), own)[0], rtol=1e-9, atol=1e-10)


@pytest.mark.skipif(not cpp.available(), reason=cpp.why_not() or "built")
@pytest.mark.parametrize("isa", [0, 1, 2])
def test_float32_on_every_instruction_set(isa, monkeypatch):
    monkeypatch.setattr(cpp, "isa", isa)
    torch.manual_seed(0)
    model = hf.MechanicalHNN(net(4, 1, 50, 40), hf.Cholesky(net(4, 3, 40, 50)), (0, 1)).double()
    z = make_states(70, 4)
    wanted = rolled(model, False, z, n=3, integrator="rk4", backend="torch")
    found = rolled(copy.deepcopy(model).float(), False, z.float(), n=3, integrator="rk4", backend="cpp")
    for a, b in zip(found, wanted, strict=True):
        torch.testing.assert_close(a.double(), b, rtol=1e-4, atol=2e-5 * b.abs().max().item())


@pytest.mark.parametrize("integrator", ["implicit-midpoint", "implicit-leapfrog", "symplectic-euler", "yoshida4"])
def test_the_symplectic_form_is_kept(integrator):
    model, z = make("cholesky"), make_states(3, 6)
    assert diagnostics.symplecticity_defect(model, z, 0.1, integrator=integrator).max() < 1e-13
    assert diagnostics.symplecticity_defect(model, z, 0.1, integrator="rk4").max() > 1e-9
    if integrator != "symplectic-euler":
        assert diagnostics.reversal_error(model, z, 0.1, 20, integrator=integrator).max() < 1e-11


def test_a_pendulum_keeps_its_energy():
    V = nn.Sequential(nn.Linear(2, 1))
    with torch.no_grad():
        V[0].weight.copy_(torch.tensor([[-1.0, 0.0]]))
        V[0].bias.zero_()
    model = hf.MechanicalHNN(V, None, (0,)).double()  # H = p^2 / 2 - cos q
    z = torch.tensor([[1.0, 0.0], [3.0, 0.5]], dtype=torch.float64)
    out = hf.rollout(model, z, 0.05, 2000, integrator="implicit-midpoint", energy=True)
    torch.testing.assert_close(out.energy[:, 0], 0.5 * z[:, 1] ** 2 - torch.cos(z[:, 0]))
    assert (out.energy - out.energy[:, :1]).abs().max() < 2e-3
    assert out.solve.converged.all()


def test_what_reduces_to_terms():
    """Without angles and with a constant diagonal mass it is V(q) and a quadratic form, with all that there is for those."""
    torch.manual_seed(0)
    for mass in (None, hf.Diagonal(3), hf.Diagonal(3, diagonal="raw", epsilon=0.5)):
        model = hf.MechanicalHNN(net(3, 1, 7), mass).double()
        if mass is not None:
            with torch.no_grad():
                mass.entries.add_(torch.linspace(0.1, 0.9, 3))
        z = make_states(4, 6)
        for integrator in ("leapfrog", "implicit-midpoint"):
            assert_equal(rolled(model, False, z, integrator=integrator), rolled(model, True, z, integrator=integrator))
        hf.rollout(model, z.requires_grad_(), 0.1, 4, memory="reversible")
        hf.rollout(model, z, 0.1, 4, integrator="tao")
        assert diagnostics.symplecticity_defect(model, z, 0.1).max() < 1e-13


def test_inside_a_port_and_at_given_times():
    model = make("cholesky")
    port = hf.PortHNN(model, 2, "rayleigh").double()
    z, u = make_states(4, 6), make_states(4, 3, 2, seed=3)
    found = hf.rollout(port, z, 0.1, 3, control=u, integrator="implicit-midpoint").states
    oracle = copy.deepcopy(port)
    oracle.H = Textbook(oracle.H)
    wanted = hf.rollout(oracle, z, 0.1, 3, control=u, integrator="implicit-midpoint", backend="reference").states
    torch.testing.assert_close(found, wanted, rtol=1e-10, atol=1e-11)
    torch.testing.assert_close(
        hf.odeint(model, z, [0.0, 0.1, 0.2], integrator="rk4"),
        hf.rollout(model, z, 0.1, 2, integrator="rk4").states.transpose(0, 1),
    )
    z1 = hf.rollout(model, z, 0.1, 1, integrator="implicit-midpoint", states="final").states
    assert hf.step_residual(model, z, z1, 0.1).abs().max() < 1e-13


def test_in_a_compiled_graph():
    model = make("raw", torch.float32)
    z = make_states(4, 4).float()

    def loss(z):
        out = hf.rollout(model, z, 0.1, 3, integrator="implicit-midpoint", energy=True)
        return out.states.square().sum() + out.energy.sum() + hf.vector_field(model, z).square().sum()

    compiled = torch.compile(loss, fullgraph=True, backend="aot_eager")
    grads = [torch.autograd.grad(f(z), list(model.parameters())) for f in (compiled, loss)]
    for a, b in zip(*grads, strict=True):
        torch.testing.assert_close(a, b, rtol=1e-4, atol=1e-5)


def test_operators_are_registered_soundly():
    model = make("cholesky")
    form, z = model._read().form, make_states(2, 6).requires_grad_()
    parameters = [t.detach().requires_grad_() for t in model._read().tensors]
    for memory in ("store", "checkpoint"):
        attributes = state_ops.Attributes(
            2, form.text(), form.numbers(), "implicit-midpoint", False, True, memory, 1e-15, 50, True, "torch"
        )
        dt = torch.full((1, 1), 0.1, dtype=torch.float64)
        torch.library.opcheck(torch.ops.hjepa_fast.states_rollout, (z, parameters, dt, *attributes))
    torch.library.opcheck(torch.ops.hjepa_fast.states_gradient, (z, parameters, form.text(), form.numbers(), "torch"))


@pytest.mark.parametrize("backend", BACKENDS)
def test_shapes_dtypes_and_edges(backend):
    model = make("cholesky")
    z = make_states(2, 3, 6).transpose(0, 1)
    assert hf.rollout(model, z[:0], 0.1, 2, energy=True, backend=backend).energy.shape == (0, 2, 3)
    out = hf.rollout(model, z.clone().requires_grad_(), 0.1, 0, energy=True, backend=backend)
    assert torch.equal(out.states, z[..., None, :])
    (out.energy.sum() + out.states.sum()).backward()
    last = hf.rollout(model, z, 0.1, 3, states="final", backend=backend).states
    torch.testing.assert_close(last, hf.rollout(model, z, 0.1, 3, backend=backend).states[..., -1, :])
    low = copy.deepcopy(model).bfloat16()
    out = hf.rollout(low, z.bfloat16(), 0.1, 2, integrator="implicit-midpoint", energy=True, backend=backend)
    out.energy.sum().backward()
    assert out.states.dtype == low.mass.net[0].weight.grad.dtype == torch.bfloat16
    broken = z.clone()
    broken[0, 0, 0] = torch.nan
    found = hf.rollout(model, broken, 0.1, 2, integrator="implicit-midpoint", backend=backend).states
    wanted = hf.rollout(model, z, 0.1, 2, integrator="implicit-midpoint", backend=backend).states
    torch.testing.assert_close(found[1:], wanted[1:])
    with torch.inference_mode():
        torch.testing.assert_close(hf.rollout(model, z, 0.1, 2, backend=backend).states, hf.leapfrog(model, z, 0.1, 2))
    frozen = copy.deepcopy(model)
    frozen.V.requires_grad_(False)
    hf.rollout(frozen, z, 0.1, 2, backend=backend).states.sum().backward()
    assert all((p.grad is None) == name.startswith("V") for name, p in frozen.named_parameters())


def test_implicit_steps_that_do_not_converge():
    model, z = make("cholesky"), make_states(3, 6)
    with pytest.raises(hf.errors.ConvergenceError, match="did not converge.*dt is too large"):
        hf.rollout(model, z, 0.5, 2, integrator="implicit-midpoint", max_evaluations=2)
    out = hf.rollout(model, z, 0.5, 2, integrator="implicit-midpoint", max_evaluations=2, unconverged="flag")
    assert not out.solve.converged.any()
    assert (out.solve.evaluations == 2).all()


def test_derivatives_that_are_not_there():
    model, z = make("raw"), make_states(3, 4).requires_grad_()
    for found, message in (
        (hf.rollout(model, z, 0.1, 1).states, "second derivative"),
        (hf.gradient(model, z), "a third through its gradient"),
    ):
        g = torch.autograd.grad(found.square().sum(), z, create_graph=True)[0]
        with pytest.raises(RuntimeError, match=message):
            g.sum().backward()
        with pytest.raises(RuntimeError, match="one by one"):
            torch.autograd.grad(found, z, torch.ones(2, *found.shape).double(), is_grads_batched=True)


def test_momentum_of_velocities():
    model = make("cholesky")
    q, p = make_states(4, 3), make_states(4, 3, seed=2)
    torch.testing.assert_close(model.momentum(q, model.velocity(q, p)), p)
    torch.testing.assert_close(model.velocity(q, p), hf.gradient(model, torch.cat((q, p), 1))[:, 3:])
    assert hf.MechanicalHNN(net(3, 1, 4)).inverse_mass(torch.zeros(2, 3)).shape == (2, 3, 3)
    singular = hf.MechanicalHNN(net(2, 1, 4), hf.Cholesky(2, diagonal="raw"))
    with torch.no_grad():
        singular.mass.entries[1] = 0
    for value in (0.0, torch.nan):
        with torch.no_grad():
            singular.mass.entries[1] = value
        with pytest.raises(ValueError, match="M\\^-1\\(q\\) must be positive definite.*in 2 of 2 states"):
            singular.momentum(torch.zeros(2, 2), torch.ones(2, 2))


class Doubled(hf.Cholesky):
    def forward(self, x):
        return 2 * super().forward(x)


@pytest.mark.parametrize(
    ("build", "error", "message"),
    [
        (
            lambda: hf.MechanicalHNN(net(4, 1, 5), hf.Cholesky(net(4, 5, 5)), (0, 1)),
            ValueError,
            r"3, 6, 10.*found 5; 3 for d = 2",
        ),
        (lambda: hf.MechanicalHNN(net(4, 2, 5)), ValueError, "one output, .* has 2"),
        (lambda: hf.MechanicalHNN(net(4, 1, 5), hf.Cholesky(2)), ValueError, "V must take 2 numbers.*found 4"),
        (
            lambda: hf.MechanicalHNN(net(3, 1, 5), hf.Cholesky(net(2, 3, 5)), (1,)),
            ValueError,
            "mass network must take 3.*found 2",
        ),
        (lambda: hf.MechanicalHNN(net(4, 1, 5), None, (3, 0)), ValueError, r"d = 2 here; found \(0, 3\)"),
        (lambda: hf.MechanicalHNN(net(4, 1, 5), None, (0, 0)), ValueError, r"different coordinates, found \(0, 0\)"),
        (lambda: hf.MechanicalHNN(net(4, 1, 5), None, 0), TypeError, "sequence of coordinates.*found 0"),
        (lambda: hf.MechanicalHNN(net(4, 1, 5), None, (-1,)), ValueError, "found -1"),
        (lambda: hf.MechanicalHNN(None), ValueError, "without V has a mass.*found neither"),
        (lambda: hf.MechanicalHNN(net(2, 1, 5), nn.Linear(2, 3)), TypeError, "found Linear"),
        (
            lambda: hf.MechanicalHNN(net(2, 1, 5), hf.Cholesky(2).double()),
            ValueError,
            "share one dtype, found torch.float32, torch.f",
        ),
        (lambda: hf.MechanicalHNN(nn.Sequential(nn.Linear(2, 3), nn.ReLU(), nn.Linear(3, 1))), TypeError, "found ReLU"),
        (lambda: hf.MechanicalHNN(net(2, 1, 5), Doubled(2)), TypeError, "forward of its own"),
        (lambda: hf.MechanicalHNN(net(2, 1, 5), activation="tanh"), ValueError, "sequence of layers"),
        (lambda: hf.MechanicalHNN(hf.Term(net(2, 1, 5), "p")), ValueError, "reads p"),
        (lambda: hf.MechanicalHNN(hf.Term(net(3, 1, 5), "q", condition_dim=1)), ValueError, "of q alone"),
        (lambda: hf.Cholesky(2, diagonal="square"), ValueError, "softplus, raw; found 'square'"),
        (lambda: hf.Cholesky(2, epsilon=-1.0), ValueError, "found -1.0"),
        (lambda: hf.Diagonal(0), ValueError, "found 0"),
        (lambda: hf.Diagonal(2.5), TypeError, "found float"),
        (lambda: hf.Diagonal(net(2, 2, 3), "tanh"), ValueError, "holds its activations"),
    ],
)
def test_what_cannot_be_built(build, error, message):
    with pytest.raises(error, match=message):
        build()


@pytest.mark.parametrize(
    ("call", "error", "message"),
    [
        (lambda m, z: hf.rollout(m, z, 0.1, 2, memory="reversible"), ValueError, "reversible.*mechanical"),
        (lambda m, z: hf.rollout(m, z, 0.1, 2, integrator="tao", backend="torch"), NotFusedError, "tao.*found"),
        (lambda m, z: hf.rollout(m, z[:, :4], 0.1, 2), ValueError, r"\[\.\.\., 6\].*found \[3, 4\]"),
        (lambda m, z: hf.rollout(m, z.float(), 0.1, 2), TypeError, "share one dtype"),
        (lambda m, z: hf.BitReversible(m, 0.1), TypeError, "found MechanicalHNN"),
        (lambda m, z: hf.rollout(hf.SumHNN(m, hf.Quadratic("q")), z, 0.1, 2, backend="torch"), NotFusedError, "adds something"),
    ],
)
def test_what_cannot_be_run(call, error, message):
    with pytest.raises(error, match=message):
        call(make("cholesky"), make_states(3, 6))


def test_what_stands_around_it_is_seen():
    """A hook, a replaced forward and a subclass are run by nested autograd, exactly, or refused by name."""
    z = make_states(3, 6)

    class Shifted(hf.MechanicalHNN):
        def forward(self, z):
            return super().forward(z) + z[..., :1] ** 2

    def hooked():
        model = make("cholesky")
        model.mass.register_forward_hook(lambda module, given, out: 2 * out)
        return model

    def subclassed():
        torch.manual_seed(0)
        return Shifted(net(5, 1, 7), hf.Cholesky(net(5, 6, 6)), (0, 2)).double()

    for build in (hooked, subclassed):
        model = build()
        with pytest.raises(NotFusedError):
            hf.rollout(model, z, 0.1, 2, backend="torch")
        with pytest.warns(UserWarning, match="nested autograd"):
            found = hf.vector_field(model, z)
        x = z.clone().requires_grad_()
        Hq, Hp = torch.autograd.grad(model(x).sum(), x)[0].chunk(2, dim=-1)
        torch.testing.assert_close(found, torch.cat((Hp, -Hq), -1))
    sums, plain = hf.SumHNN(make("cholesky"), hf.Quadratic("q")), make("cholesky")
    with pytest.warns(UserWarning, match="adds something"):
        torch.testing.assert_close(hf.gradient(sums, z)[:, :3], hf.gradient(plain, z)[:, :3] + z[:, :3])
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        hf.rollout(plain, z, 0.1, 1)


def test_a_class_of_ones_own_says_what_it_is():
    class Own(nn.Module):
        def __init__(self):
            super().__init__()
            self.M, self.U = net(2, 3, 6), net(2, 1, 6)

        def hamiltonian_terms(self):
            return hf.MechanicalHNN(self.U, hf.Cholesky(self.M))

    own = Own().double()
    z = make_states(3, 4)
    hf.rollout(own, z, 0.1, 2).states.sum().backward()
    assert all(p.grad is not None for p in own.parameters())
