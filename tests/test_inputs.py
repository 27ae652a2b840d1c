"""Controls and conditions that a Hamiltonian reads, against nested autograd of H(z, u, c) as it is written."""

from __future__ import annotations

import itertools

import pytest
import torch
from torch import nn

import hjepa_fast as hf
from hjepa_fast.testing import make_states

D, M, C, B = 3, 2, 4, 5


def layers(*widths):
    return [nn.Linear(a, b) for a, b in itertools.pairwise(widths)]


def general():
    return hf.LatentHNN(2 * D, (7, 5), "tanh", control_dim=M, condition_dim=C)


def in_other_order():
    n = 2 * D + M + C
    return hf.Hamiltonian(
        layers(n, 7, 2), "softplus", order="pq", output=1, scale=torch.rand(n) + 0.5, shift=torch.randn(n), factor=0.7,
        control_dim=M, condition_dim=C,
    )  # fmt: skip


def separable():
    V = hf.Term(layers(D + M + C, 7, 1), "q", "tanh", control_dim=M, condition_dim=C)
    T = hf.Term(layers(D + C, 6, 5, 1), "p", "softplus", condition_dim=C)
    return hf.SumHNN(hf.Separable(V=V, T=T, quadratic=torch.rand(D)), hf.Quadratic("p", 0.3))


MODELS = {"general": general, "in_other_order": in_other_order, "separable": separable}


def make(name):
    torch.manual_seed(3)
    return MODELS[name]().double()


class Under(nn.Module):
    """H(z) of what was written as H(z, u, c)."""

    def __init__(self, H, u, c):
        super().__init__()
        self.H, self.u, self.c = H, u, c

    def forward(self, z):
        return self.H(z, self.u, self.c)


def given(shared=False, steps=0):
    torch.manual_seed(4)
    z = make_states(B, 2 * D)
    u, c = torch.randn(*([] if shared else [B]), *([steps] if steps else []), M), torch.randn(*([] if shared else [B]), C)
    return [x.double().requires_grad_() for x in (z, u, c)]


def same(found, wanted, tensors, tolerance=1e-9):
    assert found.shape == wanted.shape
    assert (found - wanted).abs().max() < 1e-10
    weights = torch.randn_like(wanted)
    one, other = (
        torch.autograd.grad((x * weights).sum(), tensors, allow_unused=True, retain_graph=True) for x in (found, wanted)
    )
    for g, expected in zip(one, other, strict=True):
        expected = torch.zeros_like(tensors[0]).sum() if expected is None else expected
        assert ((0 if g is None else g) - expected).abs().max() <= tolerance * max(1, expected.abs().max())


@pytest.mark.parametrize("name", MODELS)
@pytest.mark.parametrize("backend", ["cpp", "torch"])
@pytest.mark.parametrize(
    ("integrator", "memory", "shared"),
    [
        ("leapfrog", "store", False),
        ("leapfrog", "recompute", True),
        ("leapfrog", "checkpoint", False),
        ("implicit-leapfrog", "store", False),
        ("implicit-midpoint", "reversible", False),
        ("rk4", "store", False),
        ("tao", "store", True),
    ],
)
def test_rollouts(name, backend, integrator, memory, shared):
    H, (z, u, c), dt = make(name), given(shared), torch.tensor(0.1, dtype=torch.float64, requires_grad=True)
    found = hf.rollout(H, z, dt, 3, integrator=integrator, memory=memory, backend=backend, control=u, condition=c, energy=True)
    wanted = hf.rollout(Under(H, u, c), z, dt, 3, integrator=integrator, backend="reference").states
    same(found.states, wanted, [z, u, c, dt, *H.parameters()])
    energies = torch.stack([H(x, u, c)[:, 0] for x in wanted.unbind(1)], dim=1)
    same(found.energy, energies, [z, u, c, dt, *H.parameters()])


@pytest.mark.parametrize("name", MODELS)
@pytest.mark.parametrize("coupling", ["dense", "pair"])
def test_both_couplings(name, coupling, monkeypatch):
    from hjepa_fast.hidden_space import coupling as couplings

    monkeypatch.setattr(couplings, "forced", coupling)
    H, (z, u, c) = make(name), given()
    wanted = hf.rollout(Under(H, u, c), z, 0.1, 3, backend="reference").states
    same(hf.rollout(H, z, 0.1, 3, control=u, condition=c).states, wanted, [z, u, c, *H.parameters()])


@pytest.mark.parametrize("name", MODELS)
@pytest.mark.parametrize("integrator", ["leapfrog", "implicit-midpoint"])
def test_a_control_for_each_step(name, integrator):
    H, (z, u, c) = make(name), given(steps=3)
    path = [z]
    for t in range(3):
        path.append(
            hf.rollout(
                Under(H, u[:, t], c), path[-1], 0.1, 1, integrator=integrator, backend="reference", states="final"
            ).states
        )
    found = hf.rollout(H, z, 0.1, 3, integrator=integrator, control=u, condition=c, energy=True)
    same(found.states, torch.stack(path, 1), [z, u, c, *H.parameters()])
    energies = [H(x, u[:, min(t, 2)], c)[:, 0] for t, x in enumerate(path)]
    same(found.energy, torch.stack(energies, 1), [z, u, c, *H.parameters()])
    assert hf.rollout(H, z, 0.1, 3, integrator=integrator, control=u, condition=c, states="final").states.equal(
        found.states[:, -1]
    )


@pytest.mark.parametrize("name", MODELS)
@pytest.mark.parametrize("backend", ["cpp", "torch", "reference"])
def test_gradient_field_and_residual(name, backend):
    H, (z, u, c) = make(name), given()
    (g,) = torch.autograd.grad(H(z, u, c).sum(), z, create_graph=True)
    tensors = [z, u, c, *H.parameters()]
    same(hf.gradient(H, z, control=u, condition=c, backend=backend), g, tensors)
    field = torch.cat((g[:, D:], -g[:, :D]), dim=1)
    same(hf.vector_field(H, z, control=u, condition=c, backend=backend), field, tensors)
    z1 = z.detach() + 0.1
    found = hf.step_residual(H, z, z1, 0.1, scheme="euler", control=u, condition=c, backend=backend)
    same(found, z1 - z - 0.1 * field, tensors)
    same(hf.energy(H, z, control=u, condition=c), H(z, u, c)[:, 0], tensors)


@pytest.mark.parametrize("friction", [None, "conformal", "rayleigh"])
def test_friction_and_a_port_around_it(friction):
    """The control moves p through the port and enters H as well."""
    torch.manual_seed(5)
    model = hf.PortHNN(general(), M, friction).double()
    z, u, c = given(steps=3)
    path = [z]
    for t in range(3):
        H, h = Under(model.H, u[:, t], c), 0.1

        def rub(z, H=H, h=h):
            q, p = z.chunk(2, dim=1)
            if friction == "conformal":
                return torch.cat((q, torch.exp(-model.friction * h / 2) * p), 1)
            Hp = torch.autograd.grad(H(z).sum(), z, create_graph=True)[0][:, D:]
            return torch.cat((q, p - h / 2 * model.friction * Hp), 1)

        push = torch.cat((torch.zeros(B, D).double(), h / 2 * u[:, t] @ model.port.T), 1)
        x = (rub(path[-1]) if friction else path[-1]) + push
        x = hf.rollout(H, x, h, 1, backend="reference", states="final").states + push
        path.append(rub(x) if friction else x)
    found = hf.rollout(model, z, 0.1, 3, control=u, condition=c).states
    same(found, torch.stack(path, 1), [z, u, c, *model.parameters()])


def test_many_plans_from_one_state():
    H, (z, _, c) = make("general"), given()
    plans = torch.randn(6, 3, M, dtype=torch.float64)
    found = hf.rollout(H, z[:1], 0.1, 3, control=plans, condition=c[0]).states
    assert found.shape == (6, 4, 2 * D)
    for i in (0, 5):
        one = hf.rollout(H, z[:1], 0.1, 3, control=plans[i : i + 1], condition=c[:1]).states
        assert torch.allclose(found[i], one[0], atol=1e-13)
    held = hf.leapfrog(H, z[:1], 0.1, 3, control=plans[:, 0], condition=c[0])
    assert torch.allclose(held[2], hf.leapfrog(H, z[0], 0.1, 3, control=plans[2, 0], condition=c[0]), atol=1e-13)


@pytest.mark.parametrize("name", MODELS)
def test_held(name):
    H, (_, u, c) = make(name), given(shared=True)
    z = make_states(B, 2 * D)
    held = hf.Held(H, u if H.control_dim else None, c)
    assert torch.allclose(held(z), H(z, u, c))
    assert torch.allclose(hf.leapfrog(held, z, 0.1, 3), hf.leapfrog(H, z, 0.1, 3, u, c), atol=1e-12)
    integrator = "leapfrog" if name == "separable" else "implicit-midpoint"
    assert hf.diagnostics.symplecticity_defect(held, z, 0.1, integrator=integrator).max() < 1e-12

    hf.energy(held, z).sum().backward()
    assert next(H.parameters()).grad is not None


@pytest.mark.parametrize("name", MODELS)
@pytest.mark.parametrize("steps", [0, 3])
def test_function_transforms(name, steps):
    H, (z, u, c) = make(name), [x.detach() for x in given(steps=steps)]

    def end(z, u, c, backend="auto"):
        return hf.rollout(H, z, 0.1, 3, control=u, condition=c, states="final", backend=backend).states

    expected = end(z, u, c)
    torch.testing.assert_close(torch.func.vmap(end)(z, u, c), expected)
    conditions = torch.stack((c, c + 1))
    found = torch.func.vmap(lambda c: end(z, u, c))(conditions)
    torch.testing.assert_close(found, torch.stack([end(z, u, x) for x in conditions]))
    states = torch.stack((z, z + 1))
    torch.testing.assert_close(torch.func.vmap(lambda z: end(z, u, c))(states), torch.stack([end(x, u, c) for x in states]))
    wanted = torch.func.jacrev(lambda c: end(z, u, c, "reference"))(c)
    torch.testing.assert_close(torch.func.jacfwd(lambda c: end(z, u, c))(c), wanted)
    torch.testing.assert_close(torch.func.jacrev(lambda c: end(z, u, c))(c), wanted)


def test_times():
    H, (z, u, c) = make("separable"), given()
    t = torch.tensor([0.0, 0.1, 0.3], dtype=torch.float64)
    found = hf.odeint(H, z, t, 0.1, integrator="leapfrog", control=u, condition=c)
    assert torch.allclose(found[1:], hf.leapfrog(H, z, 0.1, 3, u, c)[:, [1, 3]].movedim(1, 0), atol=1e-12)
    dense = hf.odeint(H, z, t, 0.1, integrator="leapfrog", control=u, condition=c, dense=True)
    assert torch.allclose(found, dense, atol=1e-12)


def test_in_a_compiled_graph_and_in_float32():
    H, (z, u, c) = make("general").float(), [x.detach().float() for x in given(steps=2)]
    u = u.requires_grad_()

    def loss(z, u, c):
        return hf.leapfrog(H, z, 0.1, 2, u, c).square().sum()

    found, wanted = torch.compile(loss, fullgraph=True, backend="aot_eager")(z, u, c), loss(z, u, c)
    assert torch.allclose(found, wanted, rtol=1e-5)
    one, other = torch.autograd.grad(found, u)[0], torch.autograd.grad(wanted, u)[0]
    assert torch.allclose(one, other, rtol=1e-4, atol=1e-5)


x = torch.ones


@pytest.mark.parametrize(
    ("call", "error", "message"),
    [
        (lambda H, z: hf.leapfrog(H, z, 0.1, 2), ValueError, "takes a control of 2 numbers, and none was given"),
        (lambda H, z: hf.leapfrog(H, z, 0.1, 2, x(2).double()), ValueError, "takes a condition of 4 numbers"),
        (lambda H, z: hf.leapfrog(H, z, 0.1, 2, x(3).double(), x(4).double()), ValueError, r"found \[3\]"),
        (lambda H, z: hf.leapfrog(H, z, 0.1, 2, x(5, 3, 2).double(), x(4).double()), ValueError, r"\[..., 2, 2\].*\[5, 3, 2\]"),
        (lambda H, z: hf.leapfrog(H, z, 0.1, 2, x(2), x(4).double()), TypeError, "share one dtype"),
        (lambda H, z: hf.leapfrog(H, z, 0.1, 2, x(2).double(), x(3, 4).double()), ValueError, "agree in their leading sizes"),
        (lambda H, z: hf.leapfrog(H, z[:1], 0.1, 2, x(2, 2).double(), x(3, 4).double()), ValueError, r"\[2\], \[3\]"),
        (lambda H, z: hf.energy(H, z), ValueError, "none was given"),
        (lambda H, z: hf.gradient(H, z, control=x(2).double()), ValueError, "condition"),
        (lambda H, z: hf.BitReversible(H, 0.1), (TypeError, ValueError), "control|reversible"),
        (lambda H, z: hf.diagnostics.symplecticity_defect(H, z, 0.1), ValueError, "none was given"),
        (lambda H, z: hf.leapfrog(hf.SumHNN(H), z, 0.1, 2), ValueError, "SumHNN takes a control"),
        (lambda H, z: hf.leapfrog(hf.PortHNN(H, 3).double(), z, 0.1, 2, x(3).double()), ValueError, "sizes 3 and 2"),
        (lambda H, z: H(z), ValueError, "none was given"),
        (lambda H, z: H(z, x(3).double(), x(4).double()), ValueError, r"\[..., 2\], found \[3\]"),
        (lambda H, z: hf.Held(H, x(2)), ValueError, "takes a condition of 4"),
        (lambda H, z: hf.Held(H, x(2), x(1, 4)), ValueError, r"condition must be a tensor \[4\], found \[1, 4\]"),
        (lambda H, z: hf.Held(hf.LatentHNN(4, (3,)), x(2)), ValueError, "nothing to hold"),
        (lambda H, z: hf.LatentHNN(4, (3,), control_dim=-1), ValueError, "found -1"),
        (lambda H, z: hf.LatentHNN(4, (3,))(z, x(2)), ValueError, "no port or control_dim"),
        (lambda H, z: hf.energy(hf.LatentHNN(6, (3,)).double(), z, condition=x(2)), ValueError, "no condition_dim"),
        (lambda H, z: hf.Hamiltonian(layers(7, 4, 1), control_dim=2), ValueError, "takes 5 beside a control of 2"),
        (lambda H, z: hf.SumHNN(H, hf.Term(layers(4, 3, 1), "q", control_dim=1)), ValueError, r"control_dim, found \[1, 2\]"),
    ],
)  # fmt: skip
def test_what_is_refused(call, error, message):
    H, (z, *_) = make("general"), given()
    with pytest.raises(error, match=message):
        call(H, z.detach())
