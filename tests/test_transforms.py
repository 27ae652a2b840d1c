"""torch.func and dual numbers: right by nested autograd, refused by name elsewhere, never without a tangent."""

from __future__ import annotations

import warnings

import pytest
import torch
import torch.autograd.forward_ad as forward_ad
from torch.func import functional_call, grad, hessian, jacfwd, jacrev, jvp, stack_module_state, vjp, vmap

import hjepa_fast as hf
from hjepa_fast.testing import make_hnn, make_states

Z, V = make_states(3, 4), make_states(3, 4, seed=5)
NETWORKS = {
    "general": make_hnn(4, (8, 6)),
    "separable": hf.SeparableHNN(4, (8,), (5,), quadratic=True).double(),
}
EXPLICIT = ("leapfrog", "euler", "rk4", "tao")
IMPLICIT = ("implicit-leapfrog", "implicit-midpoint")


def flow(kind: str, integrator: str = "leapfrog", backend: str = "auto"):
    def end(z: torch.Tensor, dt: float | torch.Tensor = 0.1) -> torch.Tensor:
        options = {"integrator": integrator, "states": "final", "backend": backend}
        return hf.rollout(NETWORKS[kind], z, dt, 4, **options).states

    return end


def central(f, x, v, h=1e-5):
    return (f(x + h * v) - f(x - h * v)).detach() / (2 * h)


def jacobian(f, z):
    """By reverse mode through the fused operators, one row at a time."""
    x = z.clone().requires_grad_()
    y = f(x)
    return torch.stack([torch.autograd.grad(y[i], x, retain_graph=True)[0] for i in range(len(y))])


def dual(f, x, v):
    with forward_ad.dual_level():
        tangent = forward_ad.unpack_dual(f(forward_ad.make_dual(x, v))).tangent
    assert tangent is not None
    return tangent


@pytest.mark.parametrize("integrator", EXPLICIT + IMPLICIT)
@pytest.mark.parametrize("kind", NETWORKS)
@pytest.mark.filterwarnings("ignore:.*cannot go through the fused operators")
def test_forward_mode(kind, integrator):
    f = flow(kind, integrator, "reference" if kind == "separable" else "auto")
    wanted = central(f, Z, V)
    for found in (jvp(f, (Z,), (V,))[1], dual(f, Z, V), torch.einsum("bibj,bj->bi", jacfwd(f)(Z), V)):
        torch.testing.assert_close(found, wanted, rtol=1e-7, atol=1e-8)
    dt = torch.tensor(0.1, dtype=torch.float64)
    of_dt = jvp(lambda dt: f(Z, dt), (dt,), (torch.ones_like(dt),))[1]
    torch.testing.assert_close(of_dt, central(lambda dt: f(Z, dt), dt, 1.0), rtol=1e-7, atol=1e-8)


@pytest.mark.parametrize("integrator", EXPLICIT)
@pytest.mark.filterwarnings("ignore:.*cannot go through the fused operators")
def test_batches_and_jacobians(integrator):
    f = flow("general", integrator)
    J = torch.stack([jacobian(f, z) for z in Z])
    torch.testing.assert_close(vmap(f)(Z), f(Z))
    for found in (vmap(jacrev(f))(Z), vmap(jacfwd(f))(Z), torch.stack([jacrev(f, chunk_size=1)(z) for z in Z])):
        torch.testing.assert_close(found, J)
    torch.testing.assert_close(vjp(f, Z)[1](V)[0], torch.einsum("bij,bi->bj", J, V))
    H = hessian(lambda z: f(z).square().sum())(Z[0])
    torch.testing.assert_close(H, H.mT)


@pytest.mark.filterwarnings("ignore:.*cannot go through the fused operators")
def test_parameters_of_one_module_and_of_many():
    members = [hf.SymplecticIntegrator(make_hnn(4, (6,), seed=seed), 0.5) for seed in range(3)]
    first = members[0]
    parameters = {name: p.detach() for name, p in first.named_parameters()}

    def loss(parameters, z):
        return functional_call(first, parameters, (z,)).square().sum()

    per_sample = vmap(grad(loss), (None, 0))(parameters, Z)
    for i, z in enumerate(Z):
        first.zero_grad()
        first(z).square().sum().backward()
        for name, p in first.named_parameters():
            torch.testing.assert_close(per_sample[name][i], p.grad)
    stacked, _ = stack_module_state(members)
    found = vmap(lambda parameters: functional_call(first, parameters, (Z,)))(stacked)
    torch.testing.assert_close(found, torch.stack([member(Z) for member in members]))


def test_auto_says_what_it_takes():
    with pytest.warns(UserWarning, match=r"torch.func.vmap of torch.func.grad cannot go .* Nested autograd is used") as record:
        vmap(jacrev(flow("general")))(Z)
    assert record[0].filename == __file__
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        jvp(flow("general", backend="reference"), (Z,), (V,))
        vmap(lambda dt: flow("general")(Z))(torch.zeros(2))  # nothing that the rollout takes is transformed


@pytest.mark.parametrize("backend", ["torch", "cpp"])
@pytest.mark.parametrize("kind", NETWORKS)
def test_a_fused_backend_refuses(kind, backend):
    if hf.available_backends()[backend] != "available":
        pytest.skip(f'backend "{backend}" is not built')
    f = flow(kind, backend=backend)
    for transformed in (lambda: jvp(f, (Z,), (V,)), lambda: vmap(f)(Z), lambda: jacrev(f)(Z[0]), lambda: dual(f, Z, V)):
        with pytest.raises(RuntimeError, match='cannot go through the fused operators.*use backend="reference"'):
            transformed()


@pytest.mark.parametrize("kind", NETWORKS)
def test_batches_of_gradients_are_refused(kind):
    z = Z.clone().requires_grad_()
    states = flow(kind)(z)
    with pytest.raises(RuntimeError, match="has no rule for batches of gradients"):
        torch.autograd.grad(states, z, torch.randn(5, *states.shape, dtype=states.dtype), is_grads_batched=True)


@pytest.mark.filterwarnings("ignore:.*cannot go through the fused operators")
def test_an_implicit_step_under_vmap_is_refused():
    with pytest.raises(RuntimeError, match="vmap cannot go through an implicit integrator"):
        vmap(flow("general", "implicit-midpoint"))(Z)
