"""torch.func, dual numbers and second derivatives, against nested autograd (backend="reference") and finite differences."""

from __future__ import annotations

import functools
import warnings
import weakref

import pytest
import torch
import torch.autograd.forward_ad as forward_ad
from torch import nn
from torch.func import functional_call, grad, hessian, jacfwd, jacrev, jvp, stack_module_state, vjp, vmap
from torch.utils._pytree import tree_leaves, tree_map

import hjepa_fast as hf
from hjepa_fast.errors import ConvergenceError
from hjepa_fast.testing import make_hnn, make_states

Z, V = make_states(3, 4), make_states(3, 4, seed=5)
DT = torch.tensor([[0.1], [0.05], [0.02]], dtype=torch.float64)
SINE = nn.Sequential(nn.Linear(4, 5), hf.activations.Sin(), nn.Linear(5, 1))
NETWORKS = {
    "general": make_hnn(4, (6, 5)),
    "separable": hf.SeparableHNN(4, (6,), (5,), quadratic=True).double(),
    "sum": hf.SumHNN(hf.Term(SINE, "z", factor=0.7), hf.Quadratic("q", nn.Parameter(torch.tensor([0.5, 0.3])))).double(),
}
FUSED = [b for b in ("torch", "cpp") if hf.available_backends()[b] == "available"]
pytestmark = pytest.mark.filterwarnings("error", "ignore:.*torch.jit.script.*:DeprecationWarning")


class Rolled(nn.Module):
    """States and energies of a rollout, as a function of the parameters too."""

    def __init__(self, H: nn.Module, integrator: str = "leapfrog", backend: str = "auto", memory: str = "store") -> None:
        super().__init__()
        self.H = H
        self.run = functools.partial(hf.rollout, energy=True, integrator=integrator, backend=backend, memory=memory)

    def forward(self, z, dt):
        out = self.run(self.H, z, dt, 2)
        return out.states, out.energy


def as_function(module):
    """f(parameters, *arguments), a loss of it, parameters, and a direction of these."""
    parameters = {name: p.detach() for name, p in module.named_parameters()}
    direction = {name: make_states(*p.shape, seed=len(name)) for name, p in parameters.items()}

    def f(parameters, *args):
        return functional_call(module, parameters, args)

    def loss(parameters, *args):
        return sum((x.square() + x.sin()).sum() for x in tree_leaves(f(parameters, *args)))

    return f, loss, parameters, direction


def compare(found, wanted, rtol=1e-10, atol=1e-10):
    for x, y in zip(tree_leaves(found), tree_leaves(wanted), strict=True):
        torch.testing.assert_close(x, y, rtol=rtol, atol=atol)


def dual(f, primals, tangents):
    with forward_ad.dual_level():
        duals = [tree_map(forward_ad.make_dual, x, t) for x, t in zip(primals, tangents, strict=True)]
        return tree_map(lambda x: forward_ad.unpack_dual(x).tangent, f(*duals))


@pytest.mark.parametrize(
    ("kind", "integrator"),
    [
        *[(kind, "leapfrog") for kind in NETWORKS], ("separable", "implicit-leapfrog"), ("separable", "rk4"),
        ("separable", "tao"), ("general", "tao"), ("general", "rk4"), ("general", "implicit-leapfrog"),
        ("sum", "implicit-midpoint"), ("general", "symplectic-euler"),
    ],
)  # fmt: skip
def test_first_and_second_derivatives(kind, integrator):
    """By every way there is to a derivative in all of z0, dt and the parameters."""
    f, loss, P, direction = as_function(Rolled(NETWORKS[kind], integrator, FUSED[-1]))
    g, oracle, _, _ = as_function(Rolled(NETWORKS[kind], integrator, "reference"))
    at, along = (P, Z, DT), (direction, V, torch.ones_like(DT))
    tangents = jvp(g, at, along)[1]
    for found in (jvp(f, at, along)[1], dual(f, at, along)):
        compare(found, tangents)
    compare(grad(loss, (0, 1, 2))(*at), grad(oracle, (0, 1, 2))(*at))
    wanted = jvp(grad(oracle, (0, 1, 2)), at, along)[1]
    compare(jvp(grad(loss, (0, 1, 2)), at, along)[1], wanted)
    compare(grad(lambda *x: jvp(loss, x, along)[1], (0, 1, 2))(*at), wanted)
    leaves = [x.clone().requires_grad_() for x in tree_leaves(at)]
    again = (dict(zip(P, leaves, strict=False)), *leaves[-2:])
    first = torch.autograd.grad(loss(*again), leaves, create_graph=True)
    scalar = sum((a * b).sum() for a, b in zip(first, tree_leaves(along), strict=True))
    compare(torch.autograd.grad(scalar, leaves), wanted)


def test_tangents_are_those_of_finite_differences():
    f = Rolled(NETWORKS["general"], "implicit-midpoint")
    wanted = [(a - b) / 2e-5 for a, b in zip(f(Z + 1e-5 * V, DT), f(Z - 1e-5 * V, DT), strict=True)]
    compare(jvp(lambda z: f(z, DT), (Z,), (V,))[1], [x.detach() for x in wanted], rtol=1e-7, atol=1e-8)


@pytest.mark.parametrize("integrator", ["leapfrog", "implicit-midpoint"])
@pytest.mark.parametrize("backend", FUSED)
def test_what_is_mapped_over(backend, integrator):
    """States, step sizes, parameters, and cotangents: the innermost, the outermost and any axis."""
    f, loss, P, _ = as_function(Rolled(NETWORKS["general"], integrator, backend))
    g, oracle, _, _ = as_function(Rolled(NETWORKS["general"], integrator, "reference"))
    many = tree_map(lambda t: torch.stack((t, 1.1 * t), dim=-1), P)
    for h, k in ((f, g), (grad(loss, (0, 1, 2)), grad(oracle, (0, 1, 2)))):
        wanted = [k(P, z, dt) for z, dt in zip(Z, DT, strict=True)]
        compare(vmap(h, (None, 0, 0))(P, Z, DT), tree_map(lambda *x: torch.stack(x), *wanted))
        compare(
            vmap(h, (None, 1, None), 0)(P, torch.stack((Z, V), 1), DT), vmap(k, (None, 1, None))(P, torch.stack((Z, V), 1), DT)
        )
        compare(
            vmap(h, (None, None, 0))(P, Z, torch.stack((DT, 2 * DT))), vmap(k, (None, None, 0))(P, Z, torch.stack((DT, 2 * DT)))
        )
        compare(
            vmap(vmap(h, (None, 0, None)), (-1, None, 0))(many, Z, DT[:2]),
            vmap(vmap(k, (None, 0, None)), (-1, None, 0))(many, Z, DT[:2]),
        )
    compare(f(P, Z, DT), vjp(f, P, Z, DT)[0])


@pytest.mark.parametrize("by", [jacrev, jacfwd, functools.partial(jacrev, chunk_size=1)])
def test_jacobians(by):
    f, _, P, _ = as_function(Rolled(NETWORKS["general"]))
    g, _, _, _ = as_function(Rolled(NETWORKS["general"], backend="reference"))
    compare(by(f, (0, 1, 2))(P, Z[0], DT[0]), jacrev(g, (0, 1, 2))(P, Z[0], DT[0]))
    compare(vmap(by(f, 1), (None, 0, 0))(P, Z, DT), vmap(jacrev(g, 1), (None, 0, 0))(P, Z, DT))


@pytest.mark.parametrize("by", [lambda f: jacfwd(jacfwd(f)), lambda f: jacrev(jacrev(f)), lambda f: jacrev(jacfwd(f)), hessian])
def test_hessians(by):
    """Of a function that is mapped over, in which tangents of tangents must not be lost."""

    def loss(z, backend):
        states = hf.rollout(NETWORKS["general"], z, 0.3, 2, backend=backend).states
        return states.sin().sum() + hf.gradient(NETWORKS["sum"], z, backend=backend).sin().sum()

    compare(*[vmap(by(functools.partial(loss, backend=b)))(Z) for b in ("auto", "reference")])


PORT = hf.PortHNN(make_hnn(4, (5,)), control_dim=1, friction="rayleigh").double()
READ = hf.Hamiltonian([nn.Linear(4, 5), nn.Linear(5, 2)], torch.sin, order="pq", output=1, scale=2.0, factor=1.5).double()


class Matched(nn.Module):
    def __init__(self, H: nn.Module, what: str, backend: str) -> None:
        super().__init__()
        self.H, self.what, self.backend = H, what, backend

    def forward(self, z):
        if self.what == "gradient":
            return hf.gradient(self.H, z, backend=self.backend)
        if self.what == "energy":
            return hf.energy(self.H, z)
        if self.what == "odeint":
            return hf.odeint(self.H, z, [0.0, 0.1, 0.3], 0.1, backend=self.backend)[-1]
        options = {"backend": self.backend}
        if self.H is PORT:
            options["control"] = z[..., :1] * 0 + 0.5
        if self.what == "field":
            return hf.vector_field(self.H, z, **options)
        return hf.step_residual(self.H, z, z.sin(), DT[0], scheme=self.what, **options)


@pytest.mark.parametrize(
    ("H", "what"),
    [
        (NETWORKS["general"], "gradient"), (READ, "gradient"), (NETWORKS["general"], "field"), (NETWORKS["sum"], "field"),
        (PORT, "field"), (NETWORKS["general"], "energy"), (READ, "odeint"), (NETWORKS["separable"], "implicit-midpoint"),
        (PORT, "leapfrog"), (make_hnn(4, ()), "field"),
    ],
)  # fmt: skip
def test_gradients_fields_and_residuals(H, what):
    f, loss, P, direction = as_function(Matched(H, what, "auto"))
    g, oracle, _, _ = as_function(Matched(H, what, "reference"))
    at, along = (P, Z), (direction, V)
    for found in (jvp(f, at, along)[1], dual(f, at, along)):
        compare(found, jvp(g, at, along)[1])
    compare(vmap(grad(loss, (0, 1)), (None, 0))(*at), vmap(grad(oracle, (0, 1)), (None, 0))(*at))
    compare(jvp(grad(loss, (0, 1)), at, along)[1], jvp(grad(oracle, (0, 1)), at, along)[1])
    compare(vmap(jacfwd(f, 1), (None, 0))(*at), vmap(jacfwd(g, 1), (None, 0))(*at))
    many = tree_map(lambda t: torch.stack((t, 1.1 * t)), P)
    compare(vmap(f, (0, None))(many, Z), vmap(g, (0, None))(many, Z))


@pytest.mark.parametrize("backend", FUSED)
def test_a_penalty_on_gradients_of_the_field(backend):
    """Ordinary autograd, three derivatives deep, with a frozen layer."""
    hnn, z = make_hnn(4, (6, 5)), Z.clone().requires_grad_()
    hnn.net[2].weight.requires_grad_(False)
    wrt = [p for p in hnn.parameters() if p.requires_grad][:-1]
    found = []
    for b in (backend, "reference"):
        field = hf.vector_field(hnn, z, backend=b)
        (slope,) = torch.autograd.grad(field.square().sum(), z, create_graph=True)
        (curve,) = torch.autograd.grad(slope.square().sum(), z, create_graph=True)
        found.append(torch.autograd.grad((slope * curve).sum(), [z, *wrt]))
    compare(*found)
    assert torch.autograd.gradgradcheck(lambda z: hf.gradient(hnn, z, backend=backend), z)


def test_members_of_one_class_and_of_many_samples():
    """The published modules by name, with a learnable step size, against one call and one backward pass each."""
    members = [hf.SymplecticIntegrator(make_hnn(4, (6,), seed=seed), 0.5) for seed in range(3)]
    first = members[0]
    _, loss, parameters, _ = as_function(first)
    per_sample = vmap(grad(loss), (None, 0))(parameters, Z)
    for i, z in enumerate(Z):
        first.zero_grad()
        loss(dict(first.named_parameters()), z).backward()
        for name, p in first.named_parameters():
            torch.testing.assert_close(per_sample[name][i], torch.zeros_like(p) if p.grad is None else p.grad)
    stacked, _ = stack_module_state(members)
    found = vmap(lambda parameters: functional_call(first, parameters, (Z,)))(stacked)
    torch.testing.assert_close(found, torch.stack([member(Z) for member in members]))
    found.square().sum().backward()
    for i, member in enumerate(members):
        member.zero_grad()
        member(Z).square().sum().backward()
        for name, p in member.named_parameters():
            if p.grad is not None:
                torch.testing.assert_close(stacked[name].grad[i], p.grad)


@pytest.mark.parametrize("memory", ["recompute", "checkpoint", "reversible"])
def test_memory(memory):
    _, loss, P, _ = as_function(Rolled(NETWORKS["general"], "implicit-midpoint", memory=memory))
    _, oracle, _, _ = as_function(Rolled(NETWORKS["general"], "implicit-midpoint", "reference"))
    compare(vmap(grad(loss), (None, 0, 0))(P, Z, DT), vmap(grad(oracle), (None, 0, 0))(P, Z, DT))


@pytest.mark.parametrize("kind", NETWORKS)
def test_batches_of_gradients(kind):
    """is_grads_batched and vectorize=True, which map by other means than torch.func."""
    z, dt = Z.clone().requires_grad_(), DT.clone().requires_grad_()
    wrt = [z, dt, *NETWORKS[kind].parameters()]
    for call in (
        lambda b: Rolled(NETWORKS[kind], backend=b)(z, dt)[0],
        lambda b: dt * hf.gradient(NETWORKS[kind], z, backend=b),
    ):
        cotangents = make_states(2, *call("auto").shape)
        found = torch.autograd.grad(call("auto"), wrt, cotangents, is_grads_batched=True, allow_unused=True)
        each = [torch.autograd.grad(call("reference"), wrt, g, allow_unused=True, materialize_grads=True) for g in cotangents]
        for x, *wanted in zip(found, *each, strict=True):
            compare(torch.zeros(2, *wanted[0].shape).double() if x is None else x, torch.stack(wanted))
    f = Rolled(NETWORKS[kind])
    both = [torch.autograd.functional.jacobian(lambda z: f(z, DT)[0], Z, vectorize=how) for how in (True, False)]
    compare(*both)


def test_a_tangent_of_a_cotangent_is_not_lost():
    hnn, z = NETWORKS["general"], Z.clone().requires_grad_()
    for y in (hf.leapfrog(hnn, z, 0.1, 2), hf.gradient(hnn, z)):
        with forward_ad.dual_level():
            g = forward_ad.make_dual(torch.ones_like(y), y.detach())
            found = forward_ad.unpack_dual(torch.autograd.grad(y, z, g, retain_graph=True)[0]).tangent
        compare(found, torch.autograd.grad(y, z, y.detach()))


def test_any_module_and_its_implicit_steps():
    """By nested autograd, where there is nothing fused."""

    class Pendulum(nn.Module):
        def forward(self, z):
            return z[..., 2:].square().sum(-1) / 2 - z[..., :2].cos().sum(-1)

    f = Rolled(Pendulum(), "implicit-midpoint", "reference")
    compare(vmap(lambda z: f(z, 0.1))(Z), f(Z, 0.1))
    rows = vmap(jacrev(lambda z: f(z, 0.1)[0][-1]))(Z)
    compare(torch.einsum("bij,bj->bi", rows, V), jvp(lambda z: f(z, 0.1)[0][:, -1], (Z,), (V,))[1])


def test_what_else_comes_with_a_rollout():
    def of(z):
        out = hf.rollout(NETWORKS["general"], z, 0.1, 3, integrator="implicit-midpoint")
        return (*out.solve, hf.rollout(NETWORKS["general"], z, 0.1, 3, integrator="tao").distance)

    compare(vmap(of)(Z), of(Z))


def test_low_precision_and_no_rows():
    hnn, z = make_hnn(4, (6,), dtype=torch.bfloat16), Z.bfloat16()
    field = functools.partial(hf.vector_field, hnn)
    found = vmap(field)(z), jvp(field, (z,), (z,))[1], vmap(jacfwd(field))(z)
    assert all(x.dtype == torch.bfloat16 for x in found)
    compare(found[2], vmap(jacrev(field))(z), rtol=0.02, atol=0.02)
    f, x = Rolled(make_hnn(4, (6,), dtype=torch.float32)), Z.float().requires_grad_()

    def curve():
        (slope,) = torch.autograd.grad(f(x, 0.1)[0].sin().sum(), x, create_graph=True)
        return torch.autograd.grad(slope.square().sum(), x)

    with torch.autocast("cpu", torch.bfloat16):
        mapped = vmap(lambda z: f(z, 0.1))(Z.float()), jvp(lambda z: f(z, 0.1), (Z.float(),), (V.float(),))[1]
        curved = curve()
    compare(curved, curve(), rtol=1e-6, atol=1e-6)
    compare(mapped, (f(Z.float(), 0.1), jvp(lambda z: f(z, 0.1), (Z.float(),), (V.float(),))[1]), rtol=1e-6, atol=1e-6)
    f, none = Rolled(NETWORKS["general"]), Z[:0]
    assert vmap(grad(lambda z: f(z, 0.1)[0].sum()))(torch.zeros(2, 0, 4).double()).shape == (2, 0, 4)
    assert jvp(lambda z: f(z, 0.1)[0], (none,), (none,))[1].shape == (0, 3, 4)
    start = hf.rollout(NETWORKS["general"], Z, 0.1, 0, energy=True)
    of_start = jvp(lambda z: hf.rollout(NETWORKS["general"], z, 0.1, 0, energy=True)[:2], (Z,), (V,))[1]
    compare(of_start, (V[:, None], jvp(lambda z: hf.energy(NETWORKS["general"], z)[:, None], (Z,), (V,))[1]))
    assert start.states.shape == (3, 1, 4)


def test_in_a_graph_it_is_left_to_the_eager_code_and_never_wrong():
    hnn = make_hnn(4, (6,))
    tangent = functools.partial(jvp, lambda z: hf.leapfrog(hnn, z, 0.1, 2))
    for whole in (lambda z: tangent((z,), (V,))[1], vmap(lambda z: hf.gradient(hnn, z))):
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")  # PyTorch's own, of graph breaks
            torch._dynamo.reset()
            with pytest.raises(torch._dynamo.exc.Unsupported, match="rules in Python"):
                torch.compile(whole, backend="eager", fullgraph=True)(Z)
            torch._dynamo.reset()
            compare(torch.compile(whole, backend="eager")(Z), whole(Z))


def test_errors():
    hnn = NETWORKS["general"]
    for kind in ("sin", "quadratic"):
        implicit = functools.partial(hf.rollout, make_hnn(4, (6,), kind), n_steps=2, integrator="implicit-midpoint")
        with pytest.raises(
            ConvergenceError, match="plain iterations did not solve an implicit step, as derivatives by forward"
        ):
            jvp(lambda z, run=implicit: run(z, dt=20.0, unconverged="flag").states, (Z,), (V,))
    with pytest.raises(ValueError, match="t cannot be mapped over"):
        vmap(lambda t: hf.odeint(hnn, Z, t, 0.1))(torch.tensor([[0.0, 0.1], [0.0, 0.2]]))
    with pytest.raises(ValueError, match="takes one member at least, found none"):
        vmap(lambda b: functional_call(Rolled(hnn), {"H.net.0.bias": b}, (Z, 0.1)))(torch.zeros(0, 6).double())


def test_nothing_of_a_transform_is_remembered():
    hnn = make_hnn(4, (6,))
    want = hf.leapfrog(hnn, Z, 0.1, 2)
    f, loss, P, direction = as_function(Rolled(hnn))
    jvp(f, (P, Z, DT), (direction, V, DT))
    vmap(grad(loss), (None, 0, 0))(P, Z, DT)
    doubled = {name: 2 * p for name, p in Rolled(hnn).named_parameters()}
    freed = weakref.ref(doubled["H.net.0.weight"])
    functional_call(Rolled(hnn), doubled, (Z, DT))
    del doubled
    assert freed() is None
    torch.testing.assert_close(hf.leapfrog(hnn, Z, 0.1, 2), want, rtol=0, atol=0)
