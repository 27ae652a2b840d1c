"""Friction and control, against textbook code; and what they promise."""

from __future__ import annotations

import math

import pytest
import torch
from torch import nn

import hjepa_fast as hf
from hjepa_fast import diagnostics, driven
from hjepa_fast.backends import cpp
from hjepa_fast.testing import make_hnn, make_states, make_two_networks

D, M = 3, 2
MODELS = {
    "general": lambda: make_hnn(2 * D, (7, 5)),
    "separable": lambda: make_two_networks(2 * D, (7,), (5,)),
    "quadratic": lambda: hf.Separable([nn.Linear(D, 7), nn.Softplus(), nn.Linear(7, 1)], quadratic=torch.rand(D)),
}


def make(name="general", friction=None, control_dim=M, per_dimension=False, g=0.4):
    torch.manual_seed(0)
    return hf.PortHNN(MODELS[name](), control_dim, friction, per_dimension, initial_friction=g).double()


def textbook(model, z, dt, n, control=None):
    """A rollout by leapfrog with nested autograd, and the moves around each step written out."""

    def field(z):
        z = z if z.requires_grad else z.detach().requires_grad_()
        return torch.autograd.grad(model.H(z).sum(), z, create_graph=True)[0].chunk(2, dim=-1)

    def friction(q, p, h):
        g = nn.functional.softplus(model.raw_friction)
        if model.kind == "conformal":
            return torch.exp(-g * h / 2) * p
        return p - h / 2 * g * field(torch.cat((q, p), -1))[1]

    if control is not None:
        lead = control.shape[:-1] if control.ndim <= z.ndim else control.shape[:-2]
        z = z.expand(*torch.broadcast_shapes(lead, z.shape[:-1]), 2 * D)
    states = [z]
    for t in range(n):
        h = dt if isinstance(dt, float) or dt.ndim == 0 else dt[..., t : t + 1] if dt.shape[-1] > 1 else dt
        u = None if control is None else control if control.ndim <= z.ndim else control[..., t, :]
        q, p = z.chunk(2, dim=-1)
        if model.kind:
            p = friction(q, p, h)
        if u is not None:
            p = p + h / 2 * u @ model.port.T
        p = p - h / 2 * field(torch.cat((q, p), -1))[0]
        q = q + h * field(torch.cat((q, p), -1))[1]
        p = p - h / 2 * field(torch.cat((q, p), -1))[0]
        if u is not None:
            p = p + h / 2 * u @ model.port.T
        if model.kind:
            p = friction(q, p, h)
        z = torch.cat((q, p), -1)
        states.append(z)
    return torch.stack(states, dim=-2)


CONTROLS = {
    "none": (None, (4,)),
    "held": (lambda n: make_states(4, M, seed=7), (4,)),
    "one for all": (lambda n: make_states(M, seed=7), (4,)),
    "per step": (lambda n: make_states(4, n, M, seed=7), (4,)),
    "many for one state": (lambda n: make_states(5, n, M, seed=7), (1,)),
    "one state": (lambda n: make_states(n, M, seed=7), ()),
}


@pytest.mark.parametrize("name", MODELS)
@pytest.mark.parametrize("backend", ["cpp", "torch", "reference"])
@pytest.mark.parametrize(
    ("friction", "per_dimension"), [(None, False), ("conformal", False), ("conformal", True), ("rayleigh", True)]
)
@pytest.mark.parametrize("control", CONTROLS)
def test_states_energies_and_gradients(name, backend, friction, per_dimension, control):
    model, n = make(name, friction, per_dimension=per_dimension), 3
    make_control, lead = CONTROLS[control]
    results = []
    for textbooks in (False, True):
        z0 = make_states(*lead, 2 * D).requires_grad_()
        u = None if make_control is None else make_control(n).requires_grad_()
        dt = torch.tensor(0.2, dtype=torch.float64, requires_grad=True)
        if textbooks:
            states = textbook(model, z0, dt, n, u)
            H = model.H(states).squeeze(-1)
        else:
            out = hf.rollout(model, z0, dt, n, control=u, energy=True, backend=backend)
            states, H = out.states, out.energy
        wanted = [z0, dt, *([] if u is None else [u]), *model.parameters()]
        loss = (states * torch.linspace(0.5, 1.5, states.numel()).reshape(states.shape)).sum() + H.square().sum()
        results.append((states, H, *torch.autograd.grad(loss, wanted, allow_unused=True)))
    for k, (a, b) in enumerate(zip(*results, strict=True)):
        if a is not None or b is not None:
            torch.testing.assert_close(a, b, rtol=1e-10 if k < 2 else 1e-9, atol=1e-11 if k < 2 else 1e-10)


@pytest.mark.parametrize("name", MODELS)
@pytest.mark.parametrize("friction", ["conformal", "rayleigh"])
@pytest.mark.parametrize(
    ("integrator", "backend", "memory", "path"),
    [
        ("leapfrog", "cpp", "recompute", 0),
        ("leapfrog", "torch", "recompute", 0),
        ("leapfrog", "cpp", "checkpoint", 0),
        ("leapfrog", "cpp", "store", 1),
        ("leapfrog", "cpp", "store", 2),
        ("euler", "cpp", "store", 0),
        ("rk4", "cpp", "store", 0),
        ("yoshida4", "cpp", "store", 0),
    ],
)
def test_in_one_program_as_step_by_step(name, friction, integrator, backend, memory, path, monkeypatch):
    """Friction and force as lines of a rollout's program, against fused steps with the moves between them."""
    monkeypatch.setattr(cpp, "path", path)
    model, results = make(name, friction, per_dimension=True), []
    for fused in (True, False):
        z0, u = make_states(5, 2 * D).requires_grad_(), make_states(5, 6, M, seed=7).requires_grad_()
        dt = torch.linspace(0.05, 0.1, 6, dtype=torch.float64).requires_grad_()
        if not fused:
            monkeypatch.setattr(driven, "can_be_driven", lambda *_: False)
            memory = "store"
        states = hf.rollout(model, z0, dt, 6, control=u, integrator=integrator, backend=backend, memory=memory).states
        loss = (states * torch.linspace(0.5, 1.5, states.numel()).reshape(states.shape)).sum()
        results.append((states, *torch.autograd.grad(loss, [z0, dt, u, *model.parameters()])))
    monkeypatch.undo()
    for a, b in zip(*results, strict=True):
        torch.testing.assert_close(a, b, rtol=1e-10, atol=1e-11)


@pytest.mark.parametrize("dt", [torch.tensor([0.1, 0.3, 0.2]), torch.linspace(0.1, 0.3, 4)[:, None], torch.rand(4, 3) / 5])
def test_step_sizes(dt):
    model, z0, u = make(friction="conformal"), make_states(4, 2 * D), make_states(4, 3, M, seed=7)
    states = hf.rollout(model, z0, dt.double(), 3, control=u).states
    torch.testing.assert_close(states, textbook(model, z0, dt.double().expand(4, -1), 3, u))
    last = hf.rollout(model, z0, dt.double(), 3, control=u, states="final").states
    assert torch.equal(last, states[:, -1])


@pytest.mark.parametrize("friction", [None, "conformal", "rayleigh"])
@pytest.mark.parametrize("backend", ["cpp", "torch", "reference"])
def test_vector_field_and_residual(friction, backend):
    model, z, u = make(friction=friction), make_states(4, 2 * D), make_states(4, M, seed=7)
    x = z.clone().requires_grad_()
    Hq, Hp = torch.autograd.grad(model.H(x).sum(), x)[0].chunk(2, dim=-1)
    p_dot = -Hq + u @ model.port.T
    if friction:
        p_dot = p_dot - model.friction * (z[:, D:] if friction == "conformal" else Hp)
    torch.testing.assert_close(hf.vector_field(model, z, control=u, backend=backend), torch.cat((Hp, p_dot), -1))
    torch.testing.assert_close(hf.gradient(model, z, backend=backend), torch.cat((Hq, Hp), -1))
    torch.testing.assert_close(hf.energy(model, z), model(z).squeeze(-1))
    for scheme in ("implicit-midpoint", "leapfrog", "euler"):
        z1 = hf.rollout(model, z, 0.1, 1, control=u, states="final").states if scheme == "leapfrog" else z
        residual = hf.step_residual(model, z, z1, 0.1, scheme=scheme, control=u, backend=backend)
        expected = torch.zeros_like(z) if scheme == "leapfrog" else -0.1 * torch.cat((Hp, p_dot), -1)
        torch.testing.assert_close(residual, expected, atol=1e-13, rtol=1e-7)


def test_without_friction_and_control_it_is_the_fused_rollout():
    model, z0 = make(), make_states(4, 2 * D)
    out = hf.rollout(model, z0, 0.2, 4, integrator="implicit-midpoint", energy=True, memory="reversible")
    expected = hf.rollout(model.H, z0, 0.2, 4, integrator="implicit-midpoint", energy=True)
    assert torch.equal(out.states, expected.states)
    torch.testing.assert_close(
        hf.rollout(model, z0, 0.2, 4, control=torch.zeros(M).double()).states, hf.leapfrog(model.H, z0, 0.2, 4)
    )


@pytest.mark.parametrize(
    ("name", "integrator"), [("separable", "leapfrog"), ("general", "implicit-midpoint"), ("general", "implicit-leapfrog")]
)
def test_the_symplectic_form_contracts_by_the_friction(name, integrator):
    model, z, dt = make(name, "conformal", control_dim=0), make_states(3, 2 * D), 0.3
    contraction = (model.friction * dt).item()
    found = diagnostics.symplecticity_defect(model, z, dt, integrator=integrator, contraction=contraction)
    assert found.max() < 1e-12
    assert diagnostics.symplecticity_defect(model, z, dt, integrator=integrator).min() > 1e-2
    J = diagnostics.step_jacobian(model, z, dt, integrator=integrator)
    torch.testing.assert_close(
        torch.linalg.det(J), torch.full((3,), math.exp(-contraction * D), dtype=torch.float64), rtol=1e-11, atol=0
    )


def test_order_two_with_friction_and_control():
    """A symmetric step: errors fall by four where dt is halved."""
    for friction in ("conformal", "rayleigh"):
        model, z0, u = make("separable", friction), make_states(4, 2 * D), make_states(4, M, seed=7)
        with torch.no_grad():
            ends = [hf.rollout(model, z0, 1.0 / n, n, control=u, states="final").states for n in (8, 16, 256)]
        ratio = ((ends[0] - ends[2]).norm() / (ends[1] - ends[2]).norm()).item()
        assert (3.5 < ratio < 4.5) if friction == "conformal" else ratio > 1.8


def test_rayleigh_friction_takes_energy_out():
    model, z0 = make("separable", "rayleigh", control_dim=0, g=1.0), make_states(6, 2 * D)
    assert diagnostics.energy_growth(model, z0, 0.02, 200).max() <= 1e-9
    assert diagnostics.energy_growth(model.H, z0, 0.02, 200).max() > 1e-9  # what the step without friction does
    driven = make("separable", "rayleigh", g=1e-3)
    assert diagnostics.energy_growth(driven, z0, 0.02, 20, control=torch.full((M,), 5.0).double()).max() > 1e-3


@pytest.mark.parametrize("friction", [None, "conformal", "rayleigh"])
def test_power_balance(friction):
    model, z, u = make(friction=friction), make_states(6, 2 * D), make_states(M, seed=7)
    rate, supplied, lost = diagnostics.power_balance(model, z, u)
    torch.testing.assert_close(rate, supplied - lost, rtol=0, atol=1e-13)
    assert (lost >= 0).all() if friction == "rayleigh" else friction or not lost.any()
    assert supplied.abs().max() > 0
    rate, supplied, lost = diagnostics.power_balance(model, z)
    torch.testing.assert_close(rate, -lost, rtol=0, atol=1e-13)


@pytest.mark.parametrize("friction", ["conformal", "rayleigh", None])
@pytest.mark.parametrize("kind", ["held", "per step"])
def test_energy_balance(friction, kind):
    """By sums of `power_balance`; and exact motion balances, with an error of order 2."""
    model, n, dt = make(friction=friction, per_dimension=friction == "rayleigh"), 6, 0.3
    states, u = make_states(4, n + 1, 2 * D), make_states(4, n, M, seed=5) if kind == "per step" else make_states(4, M, seed=5)
    found = diagnostics.energy_balance(model, states, dt, u)
    H = model.H(states).squeeze(-1)
    supplied = lost = torch.zeros(4, dtype=torch.float64)
    for t in range(n):
        now = u[:, t] if kind == "per step" else u
        ends = [diagnostics.power_balance(model, states[:, t + k], now) for k in (0, 1)]
        supplied = supplied + dt * sum(end.supplied for end in ends) / 2
        lost = lost + dt * sum(end.lost for end in ends) / 2
        torch.testing.assert_close(found.supplied[:, t + 1], supplied)
        torch.testing.assert_close(found.lost[:, t + 1], lost)
        torch.testing.assert_close(found.error[:, t + 1], H[:, t + 1] - H[:, 0] - supplied + lost)
    assert all(part[:, 0].abs().max() == 0 for part in found)
    worst = []
    for steps in (40, 80):
        path = hf.rollout(model, states[:, 0], 1 / steps, steps, control=u[:, :1].expand(-1, steps, -1) if u.ndim == 3 else u)
        control = u[:, 0] if u.ndim == 3 else u
        worst.append(diagnostics.energy_balance(model, path.states, 1 / steps, control).error.abs().max().item())
    if friction is None:  # the published step is of order 1 for this H, and with friction its error is the larger part too
        assert worst[0] < 0.05
    assert worst[1] < 0.7 * worst[0]


def test_energy_balance_is_the_drift_without_friction_and_differentiable_with_it():
    model, states, u = make(), make_states(2, 4, 2 * D), make_states(2, 3, M, seed=5)
    for hnn, control in ((model.H, None), (model, None)):
        found = diagnostics.energy_balance(hnn, states, 0.1, control)
        torch.testing.assert_close(found.error, model.H(states).squeeze(-1) - model.H(states[:, :1]).squeeze(-1))
        assert found.supplied.abs().max() == found.lost.abs().max() == 0
    assert diagnostics.energy_balance(make(friction="rayleigh"), states[:, :1], 0.1).error.tolist() == [[0.0], [0.0]]
    model, dt = make(friction="rayleigh"), torch.tensor(0.1, dtype=torch.float64)
    parameters = [states, dt, u, model.raw_friction, model.port]
    for x in parameters[:3]:
        x.requires_grad_()
    assert torch.autograd.gradcheck(lambda z, h, v, *_: diagnostics.energy_balance(model, z, h, v).error, parameters)
    with pytest.raises(ValueError, match=r"states must be \[\.\.\., n_steps \+ 1, 2d\], found \[6\]"):
        diagnostics.energy_balance(model, states[0, 0], 0.1)
    with pytest.raises(ValueError, match=r"dt must be .*broadcast to \[2, 3\]; found \[2\]"):
        diagnostics.energy_balance(model, states, torch.ones(2, dtype=torch.float64))
    per_sample = diagnostics.energy_balance(model, states, torch.tensor([[0.1], [0.2]], dtype=torch.float64))
    torch.testing.assert_close(per_sample.lost[1], 2 * diagnostics.energy_balance(model, states, 0.1).lost[1])
    with pytest.raises(ValueError, match="no port or control_dim for it"):
        diagnostics.energy_balance(model.H, states, 0.1, u)
    with pytest.raises(ValueError, match=r"energy_balance is of an H\(z\), found LatentHNN, whose H reads a control"):
        diagnostics.energy_balance(hf.LatentHNN(2 * D, (4,), control_dim=M).double(), states, 0.1, u)
    with pytest.raises(ValueError, match=r"control must be .* found \[2, 2, 2\]"):
        diagnostics.energy_balance(model, states, 0.1, u[:, :2])


def test_friction_is_never_negative_and_is_learned():
    model = make(friction="conformal", per_dimension=True)
    assert model.friction.shape == (D,)
    torch.testing.assert_close(model.friction, torch.full((D,), 0.4).double(), rtol=1e-7, atol=0)
    with torch.no_grad():
        model.raw_friction.fill_(-50)
    assert (model.friction >= 0).all()
    model = make("separable", "conformal", control_dim=0, g=0.01)
    z0 = make_states(32, 2 * D)
    with torch.no_grad():
        wanted = hf.rollout(make("separable", "conformal", control_dim=0, g=0.5), z0, 0.1, 10).states
    optimizer = torch.optim.Adam([model.raw_friction], lr=0.2)
    for _ in range(120):
        optimizer.zero_grad()
        (hf.rollout(model, z0, 0.1, 10).states - wanted).square().mean().backward()
        optimizer.step()
    assert abs(model.friction.item() - 0.5) < 0.02


def test_implicit_steps_say_how_well_they_were_solved():
    model, z0 = make(friction="conformal"), make_states(2, 4, 2 * D)
    out = hf.rollout(model, z0, 0.1, 5, integrator="implicit-midpoint", unconverged="flag")
    assert out.solve.converged.shape == (2, 4, 5)
    assert out.solve.converged.all()


def test_in_a_compiled_graph_and_in_float32():
    model, z0, u = make(friction="rayleigh").float(), make_states(4, 2 * D).float(), make_states(4, 2, M, seed=7).float()
    run = torch.compile(lambda z, u: hf.rollout(model, z, 0.1, 2, control=u).states, fullgraph=True, backend="aot_eager")
    torch.testing.assert_close(run(z0, u), hf.rollout(model, z0, 0.1, 2, control=u).states)


@pytest.mark.parametrize(
    ("call", "error", "message"),
    [
        (lambda m, z: hf.rollout(m.H, z, 0.1, 2, control=torch.ones(M)), ValueError, "no port"),
        (lambda m, z: hf.rollout(hf.PortHNN(m.H, 0, "conformal"), z, 0.1, 2, control=torch.ones(M)), ValueError, "no port"),
        (lambda m, z: hf.rollout(m, z, 0.1, 2, control=torch.ones(3).double()), ValueError, r"\[\.\.\., 2\] held.*found \[3\]"),
        (
            lambda m, z: hf.rollout(m, z, 0.1, 2, control=torch.ones(4, 3, M).double()),
            ValueError,
            r"\[\.\.\., 2, 2\].*\[4, 3, 2\]",
        ),
        (
            lambda m, z: hf.rollout(m, z, 0.1, 2, control=torch.ones(5, 2, M).double()),
            ValueError,
            r"leading sizes.*\[5\] and \[4\]",
        ),
        (lambda m, z: hf.rollout(m, z, 0.1, 2, control=torch.ones(M)), TypeError, "float32"),
        (lambda m, z: hf.rollout(m, z, 0.1, 2, control=[1.0, 2.0]), TypeError, "found list"),
        (lambda m, z: hf.rollout(m, z, 0.1, 2, control=torch.ones(M).double(), memory="reversible"), ValueError, "reversible"),
        (lambda m, z: hf.rollout(m, z, 0.1, 2, control=torch.ones(M).double(), integrator="tao"), ValueError, "tao"),
        (lambda m, z: hf.vector_field(m.H, z, control=torch.ones(M).double()), ValueError, "no port"),
        (lambda m, z: hf.vector_field(m, z, control=torch.ones(3).double()), ValueError, r"found \[3\]"),
        (lambda m, z: hf.BitReversible(m, 0.1), TypeError, "bit-reversible; found PortHNN"),
        (lambda m, z: hf.PortHNN(m.H, -1), ValueError, "control_dim"),
        (lambda m, z: hf.PortHNN(m.H, 1, "viscous"), ValueError, "conformal, rayleigh; found 'viscous'"),
        (lambda m, z: hf.PortHNN(m.H, 1, "rayleigh", initial_friction=-0.1), ValueError, "found -0.1"),
        (lambda m, z: hf.PortHNN(m.H, 1, latent_dim=8), ValueError, "must be 6.*found 8"),
        (lambda m, z: diagnostics.power_balance(m.H, z), TypeError, "found LatentHNN"),
    ],
)
def test_what_is_refused(call, error, message):
    with pytest.raises(error, match=message):
        call(make(friction="conformal"), make_states(4, 2 * D))


def test_nothing_takes_the_friction_for_nothing():
    """Where a function works with H alone it says so, rather than leave the friction out."""
    model, z0 = make(friction="conformal", control_dim=0), make_states(4, 2 * D)
    integrator = hf.SymplecticIntegrator(model, 0.1)
    torch.testing.assert_close(integrator.rollout(z0, 3), textbook(model, z0, 0.1, 3), rtol=1e-6, atol=1e-7)

    class Wrapped(nn.Module):
        def __init__(self):
            super().__init__()
            self.inner = model

        def forward(self, z):
            return self.inner(z)

    with pytest.raises(TypeError, match="holds a Hamiltonian with friction"):
        hf.rollout(Wrapped(), z0, 0.1, 1)
    with pytest.raises(TypeError, match="pass its .H"):
        hf.rollout(hf.SumHNN(model, hf.Quadratic("q")), z0, 0.1, 1)


def test_what_stands_around_it_is_seen():
    class Doubled(hf.PortHNN):
        def forward(self, z):
            return 2 * super().forward(z)

    hooked, z0 = make(friction="conformal"), make_states(4, 2 * D)
    handle = hooked.register_forward_hook(lambda module, given, out: 2 * out)
    for model, message in ((Doubled(MODELS["general"](), 0, "conformal").double(), "forward of its own"), (hooked, "hook")):
        for call in (
            lambda m: hf.rollout(m, z0, 0.1, 1),
            lambda m: hf.gradient(m, z0),
            lambda m: hf.vector_field(m, z0),
            lambda m: hf.energy(m, z0),
        ):
            with pytest.raises(TypeError, match=message):
                call(model)
    handle.remove()
    hf.rollout(hooked, z0, 0.1, 1)


@pytest.mark.parametrize("friction", [None, "conformal", "rayleigh"])
@pytest.mark.parametrize("name", ["general", "quadratic"])
def test_function_transforms(name, friction):
    model, z0 = make(name, friction, per_dimension=True), make_states(2, 2 * D)
    u = make_states(3, 2, 4, M, seed=7)

    def end(u, backend="auto", z0=z0):
        return hf.rollout(model, z0, 0.1, 4, control=u, states="final", backend=backend).states

    torch.testing.assert_close(torch.func.vmap(end)(u), torch.stack([end(x) for x in u]))
    every = torch.func.vmap(lambda z: end(u[0, 0], z0=z))(z0)  # a state at a time under one control
    torch.testing.assert_close(every, end(u[0, :1].expand(2, -1, -1)))
    forward, reverse = torch.func.jacfwd(end)(u[0]), torch.func.jacrev(end)(u[0])
    torch.testing.assert_close(forward, reverse)
    torch.testing.assert_close(reverse, torch.func.jacrev(lambda u: end(u, "reference"))(u[0]))
    found = []
    for backend in ("auto", "reference"):
        x = u[0].clone().requires_grad_()
        wanted = [x, *model.parameters()]
        (g,) = torch.autograd.grad(end(x, backend).square().sum(), x, create_graph=True)
        found.append(torch.autograd.grad(g.square().sum(), wanted, allow_unused=True, materialize_grads=True))
    torch.testing.assert_close(*found, rtol=1e-8, atol=1e-10)


def kicks_of_a_textbook(model, z, dt, n, u):
    """Leapfrog of q' = Hp, p' = -Hq - friction + G u, all of a kick at one point."""

    def slope(q, p):
        at = torch.cat((q, p), -1)  # q may be a function of p
        Hq, Hp = torch.autograd.grad(model.H(at).sum(), at, create_graph=True)[0].chunk(2, dim=-1)
        return -Hq - model.friction * (p if model.kind == "conformal" else Hp), Hp

    path = [z]
    for t in range(n):
        q, p = path[-1].chunk(2, dim=-1)
        force = u[:, t] @ model.port.T
        p = p + dt / 2 * (slope(q, p)[0] + force)
        q = q + dt * slope(q, p)[1]
        p = p + dt / 2 * (slope(q, p)[0] + force)
        path.append(torch.cat((q, p), -1))
    return torch.stack(path, 1)


@pytest.mark.parametrize("name", MODELS)
@pytest.mark.parametrize("friction", ["conformal", "rayleigh"])
@pytest.mark.parametrize("backend", ["cpp", "torch"])
def test_friction_and_force_in_the_kicks(name, friction, backend):
    torch.manual_seed(0)
    model = hf.PortHNN(MODELS[name](), M, friction, True, initial_friction=0.4, splitting="kicks").double()
    z0, u = make_states(4, 2 * D).requires_grad_(), make_states(4, 3, M, seed=7).requires_grad_()
    dt = torch.tensor(0.2, dtype=torch.float64, requires_grad=True)
    found = hf.rollout(model, z0, dt, 3, control=u, backend=backend).states
    wanted = kicks_of_a_textbook(model, z0, dt, 3, u)
    torch.testing.assert_close(found, wanted, rtol=1e-10, atol=1e-11)
    weights = torch.linspace(0.5, 1.5, found.numel(), dtype=torch.float64).reshape(found.shape)
    wanted_of = [z0, u, dt, *model.parameters()]
    one, other = (
        torch.autograd.grad((x * weights).sum(), wanted_of, allow_unused=True, materialize_grads=True) for x in (found, wanted)
    )
    for a, b in zip(one, other, strict=True):
        torch.testing.assert_close(a, b, rtol=1e-9, atol=1e-10)
    forward = torch.func.jacfwd(lambda u: hf.rollout(model, z0, 0.2, 3, control=u, backend=backend).states[:, -1].sum(0))
    expected = torch.autograd.functional.jacobian(lambda u: kicks_of_a_textbook(model, z0, 0.2, 3, u)[:, -1].sum(0), u)
    torch.testing.assert_close(forward(u.detach()), expected, rtol=1e-8, atol=1e-9)


class OwnForce(hf.PortHNN):
    """A force and a friction of one's own."""

    given, rub = 3, 0.2

    @property
    def friction(self):
        return torch.tensor(self.rub, dtype=torch.float64)

    def force(self, control):
        return control[..., :1].expand(*control.shape[:-1], self.given) * 2


@pytest.mark.parametrize("backend", ["cpp", "torch", "reference"])
@pytest.mark.parametrize("integrator", ["leapfrog", "implicit-midpoint"])
def test_a_subclass_has_its_own_force_and_friction_or_is_refused(backend, integrator):
    model = OwnForce(MODELS["general"](), M, "rayleigh").double()
    z, u = make_states(4, 2 * D), make_states(4, 3, M, seed=7)

    def roll():
        return hf.rollout(model, z, 0.1, 3, control=u, backend=backend, integrator=integrator).states

    twin = hf.PortHNN(model.H, M, "rayleigh", initial_friction=0.2).double()
    twin.port.data = torch.tensor([[2.0, 0.0]] * D, dtype=torch.float64)
    torch.testing.assert_close(roll(), hf.rollout(twin, z, 0.1, 3, control=u, integrator=integrator).states, atol=1e-7, rtol=0)
    field = hf.vector_field(model, z, control=u[:, 0])
    torch.testing.assert_close(field, hf.vector_field(twin, z, control=u[:, 0]), atol=1e-7, rtol=0)
    for given in (1, 2, 2 * D):
        model.given = given
        with pytest.raises(ValueError, match=rf"OwnForce.force must give \[.*, 3\].*found \[.*{given}\]"):
            roll()
    model.given = D
    for rub, message in ((-0.1, "must not be negative, found -0.1"), ([0.1, 0.2], r"must be \[\] or \[3\], found \[2\]")):
        model.rub = rub
        with pytest.raises(ValueError, match=message):
            roll()
        with pytest.raises(ValueError, match=message):
            hf.vector_field(model, z)
    without = OwnForce(MODELS["general"](), M).double()
    with pytest.raises(ValueError, match="has a friction and no kind of it"):
        hf.rollout(without, z, 0.1, 2, backend=backend, integrator=integrator)


def test_under_autocast_everything_is_float32():
    model = hf.PortHNN(hf.LatentHNN(2 * D, (7,), control_dim=M), M, "conformal")
    z, u = make_states(4, 2 * D).float(), make_states(4, 3, M, seed=7).float()
    expected = hf.rollout(model, z.bfloat16().float(), 0.1, 3, control=u.bfloat16().float()).states
    with torch.autocast("cpu", dtype=torch.bfloat16):
        found = hf.rollout(model, z.bfloat16(), 0.1, 3, control=u.bfloat16()).states
    assert found.dtype == torch.float32
    torch.testing.assert_close(found, expected)


@pytest.mark.parametrize(
    "options", [{"integrator": "rk4"}, {"integrator": "implicit-midpoint"}, {"backend": "reference"}, {"memory": "reversible"}]
)
def test_what_kicks_cannot_take(options):
    model = hf.PortHNN(MODELS["general"](), 0, "rayleigh", splitting="kicks").double()
    with pytest.raises(ValueError, match='splitting="kicks" takes an explicit integrator.*found integrator'):
        hf.rollout(model, make_states(2, 2 * D), 0.1, 2, **options)
    with pytest.raises(ValueError, match="symmetric, kicks; found 'all'"):
        hf.PortHNN(MODELS["general"](), splitting="all")
