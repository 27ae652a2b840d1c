"""Gradients, vector fields and step residuals: values and derivatives against nested autograd, in every backend."""

from __future__ import annotations

import pytest
import torch
from torch import nn

import hjepa_fast as hf
from hjepa_fast.backends import cpp
from hjepa_fast.matching import STEPS
from hjepa_fast.testing import make_hnn, make_states

BACKENDS = [
    "torch",
    pytest.param("cpp", marks=pytest.mark.skipif(not cpp.available(), reason=cpp.why_not() or "built")),
]
NETWORKS = {
    "one layer": lambda: make_hnn(4, (7,), "tanh"),
    "three layers": lambda: make_hnn(6, (33, 18, 5)),
    "wide": lambda: make_hnn(10, (70, 130), "gelu"),
    "linear": lambda: make_hnn(4, ()),
    "without biases": lambda: nn.Sequential(nn.Linear(4, 9, bias=False), nn.SiLU(), nn.Linear(9, 1, bias=False)).double(),
    "separable": lambda: hf.SeparableHNN(6, (8, 5), (7,), "sin").double(),
    "separable, |p|^2 / 2": lambda: hf.SeparableHNN(4, (9,), quadratic=True).double(),
}


def nested(hnn: nn.Module, z: torch.Tensor) -> torch.Tensor:
    x = z if z.requires_grad else z.clone().requires_grad_()
    return torch.autograd.grad(hnn(x).sum(), x, create_graph=True)[0]


def derivatives(found: torch.Tensor, cotangent: torch.Tensor, wrt: list[torch.Tensor]) -> list[torch.Tensor]:
    grads = torch.autograd.grad((found * cotangent).sum(), wrt, allow_unused=True)
    return [torch.zeros_like(x) if g is None else g for g, x in zip(grads, wrt, strict=True)]


@pytest.mark.parametrize("rows", [(), (1,), (3,), (50,), (2, 131)])
@pytest.mark.parametrize("kind", NETWORKS)
@pytest.mark.parametrize("backend", BACKENDS)
def test_gradient_and_its_derivatives(backend, kind, rows):
    hnn = NETWORKS[kind]()
    d2 = next(p for p in hnn.parameters() if p.ndim == 2).shape[1] * (2 if isinstance(hnn, hf.SeparableHNN) else 1)
    z, cotangent = make_states(*rows, d2).requires_grad_(), make_states(*rows, d2, seed=7)
    found, expected = hf.gradient(hnn, z, backend=backend), nested(hnn, z)
    torch.testing.assert_close(found, expected, rtol=1e-12, atol=1e-13)
    wrt = [z, *hnn.parameters()]
    for x, y in zip(derivatives(found, cotangent, wrt), derivatives(expected, cotangent, wrt), strict=True):
        torch.testing.assert_close(x, y, rtol=1e-11, atol=1e-12)
    Hq, Hp = expected.chunk(2, dim=-1)
    torch.testing.assert_close(hf.vector_field(hnn, z, backend=backend), torch.cat((Hp, -Hq), dim=-1))


@pytest.mark.parametrize("backend", BACKENDS)
def test_only_what_is_asked_for_is_differentiated(backend):
    hnn, z = make_hnn(4, (6, 5)), make_states(5, 4)
    hnn.net[0].weight.requires_grad_(False)
    hf.gradient(hnn, z, backend=backend).sum().backward()
    assert hnn.net[0].weight.grad is None
    assert hnn.net[2].weight.grad.any()
    hnn.requires_grad_(False)
    assert not hf.gradient(hnn, z, backend=backend).requires_grad
    z.requires_grad_()
    (g,) = torch.autograd.grad(hf.gradient(hnn, z, backend=backend).square().sum(), z)
    (expected,) = torch.autograd.grad(nested(hnn, z).square().sum(), z)
    torch.testing.assert_close(g, expected)


@pytest.mark.parametrize("isa", [0, 1, 2, 3])
@pytest.mark.parametrize("rows", [1, 7, 64, 301])
def test_float32_by_instruction_set(isa, rows, monkeypatch):
    """At most twice the error of nested autograd in float32, or a few units of rounding."""
    if not cpp.available():
        pytest.skip(cpp.why_not())
    if isa > torch.ops.hjepa_fast_cpp.isa():
        pytest.skip("this processor lacks the instruction set")
    monkeypatch.setattr(cpp, "isa", isa)
    exact, hnn = make_hnn(10, (70, 130), "tanh"), make_hnn(10, (70, 130), "tanh", dtype=torch.float32)
    z, cotangent = make_states(rows, 10), make_states(rows, 10, seed=7)

    def all_of(f, net, dtype):
        x = z.to(dtype).requires_grad_()
        found = f(net, x)
        return [found.detach(), *derivatives(found, cotangent.to(dtype), [x, *net.parameters()])]

    wanted = all_of(nested, exact, torch.float64)
    ours = all_of(lambda net, x: hf.gradient(net, x, backend="cpp"), hnn, torch.float32)
    eager = all_of(nested, hnn, torch.float32)
    for x, y, w in zip(ours, eager, wanted, strict=True):
        scale = w.abs().max()
        assert (x - w).abs().max() <= 2 * (y - w).abs().max() + 4e-7 * scale


def test_bfloat16():
    hnn, z = make_hnn(8, (32, 16), dtype=torch.bfloat16), make_states(20, 8).bfloat16()
    exact = make_hnn(8, (32, 16))
    exact.load_state_dict(hnn.state_dict())
    for backend in ("auto", "torch"):
        found = hf.gradient(hnn, z, backend=backend)
        assert found.dtype == torch.bfloat16
        expected = nested(exact, z.double())
        assert (found.double() - expected).abs().max() <= 0.02 * expected.abs().max()
        found.sum().backward()
        assert all(p.grad.dtype == torch.bfloat16 for p in hnn.parameters() if p.grad is not None)


@pytest.mark.parametrize("backend", BACKENDS)
def test_the_operators_are_pytorchs(backend):
    hnn = make_hnn(6, (5, 4), dtype=torch.float32)
    layers = [layer for layer in hnn.net if isinstance(layer, nn.Linear)]
    weights, biases = [x.weight.detach() for x in layers], [x.bias.detach() for x in layers]
    z = make_states(3, 6, dtype=torch.float32)
    parameters = [[p.clone().requires_grad_() for p in part] for part in (weights, biases)]
    options = ("softplus", [1.0, 20.0], backend)
    torch.library.opcheck(torch.ops.hjepa_fast.gradient, (z.clone().requires_grad_(), *parameters, True, *options))
    tape = torch.ops.hjepa_fast.gradient(z, weights, biases, True, *options)[2]
    torch.library.opcheck(
        torch.ops.hjepa_fast.gradient_backward,
        (torch.ones_like(z), torch.ones(3), tape, z, weights, biases, True, *options),
        test_utils=("test_schema", "test_faketensor", "test_aot_dispatch_dynamic"),
    )


@pytest.mark.parametrize("kind", ["three layers", "separable"])
def test_a_loss_of_matching_in_one_graph(kind):
    hnn, z, target = NETWORKS[kind](), make_states(9, 6), make_states(9, 6, seed=4)

    def loss(z):
        return (hf.vector_field(hnn, z) - target).square().mean()

    torch.compile(loss, fullgraph=True, backend="aot_eager")(z).backward()
    found = [p.grad.clone() for p in hnn.parameters() if p.grad is not None]
    hnn.zero_grad()
    loss(z).backward()
    for x, p in zip(found, (p for p in hnn.parameters() if p.grad is not None), strict=True):
        torch.testing.assert_close(x, p.grad)


def test_gradcheck():
    hnn, z = make_hnn(4, (5, 3), "tanh"), make_states(3, 4).requires_grad_()
    assert torch.autograd.gradcheck(lambda z: hf.gradient(hnn, z), z)
    quadratic = hf.SeparableHNN(4, (5,), quadratic=True).double()
    assert torch.autograd.gradcheck(lambda z: hf.gradient(quadratic, z), z)


@pytest.mark.parametrize("backend", ["reference", *BACKENDS])
def test_without_gradients_and_in_inference_mode(backend):
    hnn, z = make_hnn(4, (6,)), make_states(3, 4)
    expected = nested(hnn, z).detach()
    for mode in (torch.no_grad, torch.inference_mode):
        with mode():
            found = hf.gradient(hnn, z + 0, backend=backend)
        assert not found.requires_grad
        torch.testing.assert_close(found, expected)


def test_no_rows_and_any_strides():
    hnn = make_hnn(4, (6,))
    assert hf.gradient(hnn, make_states(2, 0, 4)).shape == (2, 0, 4)
    hf.gradient(hnn, make_states(0, 4).requires_grad_()).sum().backward()
    z = make_states(4, 3)
    torch.testing.assert_close(hf.gradient(hnn, z.T), nested(hnn, z.T.contiguous()).detach())


class Scaled(nn.Module):
    def __init__(self):
        super().__init__()
        self.net, self.scale = make_hnn(4, (6,)).net, nn.Parameter(torch.tensor(1.0).double())

    def forward(self, z):
        return self.scale * self.net(z)


def test_a_module_that_is_more_than_its_layers_is_run_as_it_is():
    module, z = Scaled(), make_states(3, 4)
    with pytest.warns(UserWarning, match="nested autograd"):
        found = hf.gradient(module, z)
    torch.testing.assert_close(found, nested(module, z))
    found.sum().backward()
    assert module.scale.grad.abs() > 0


@pytest.mark.filterwarnings("ignore:.*cannot go through the fused operators")
def test_transforms():
    hnn, z = make_hnn(4, (6,)), make_states(3, 4)
    H = torch.func.vmap(torch.func.jacrev(lambda z: hf.gradient(hnn, z)))(z)
    expected = torch.func.vmap(torch.func.hessian(lambda z: hnn(z).squeeze()))(z)
    torch.testing.assert_close(H, expected)


# Residuals of steps


def after(hnn: nn.Module, z0: torch.Tensor, dt: float | torch.Tensor, scheme: str) -> torch.Tensor:
    return hf.rollout(hnn, z0, dt, 1, integrator=scheme, states="final", backend="reference").states


@pytest.mark.parametrize("scheme", STEPS)
@pytest.mark.parametrize("kind", ["three layers", "separable"])
def test_a_step_of_the_network_has_no_residual(kind, scheme):
    hnn, z0 = NETWORKS[kind](), make_states(2, 5, 6)
    dt = 0.05 + 0.1 * torch.rand(2, 5, 1, dtype=torch.float64)
    for step in (0.1, torch.tensor(0.1, dtype=torch.float64), dt):
        residual = hf.step_residual(hnn, z0, after(hnn, z0, step, scheme), step, scheme=scheme)
        assert residual.shape == z0.shape
        torch.testing.assert_close(residual, torch.zeros_like(z0), rtol=0, atol=1e-13)


@pytest.mark.parametrize("scheme", STEPS)
def test_derivatives_of_residuals(scheme):
    hnn = make_hnn(4, (5, 3), "tanh")
    z0, z1 = make_states(3, 4).requires_grad_(), make_states(3, 4, seed=2).requires_grad_()
    dt = torch.tensor(0.3, dtype=torch.float64, requires_grad=True)
    assert torch.autograd.gradcheck(lambda *x: hf.step_residual(hnn, *x, scheme=scheme), (z0, z1, dt))
    hf.step_residual(hnn, z0, z1, dt, scheme=scheme).square().sum().backward()
    assert all(p.grad.any() for p in list(hnn.parameters())[:-1])  # H does not depend on z through its last bias


@pytest.mark.parametrize(
    ("call", "error", "message"),
    [
        (lambda h, z: hf.gradient(h, z.tolist()), TypeError, "z must be a tensor, found list"),
        (lambda h, z: hf.gradient(h, z[:, :3]), ValueError, r"z must be \[..., 4\] .* found \[2, 3\]"),
        (lambda h, z: hf.gradient(h, z.float()), TypeError, "found torch.float32 and torch.float64"),
        (lambda h, z: hf.gradient(h, z, backend="fast"), ValueError, "backend must be one of .* found 'fast'"),
        (lambda h, z: hf.gradient(h, z, backend="triton"), RuntimeError, "Triton|triton"),
        (lambda h, z: hf.step_residual(h, z, z, 0.1, scheme="rk4"), ValueError, "scheme must be one of .* found 'rk4'"),
        (lambda h, z: hf.step_residual(h, z, z[:1], 0.1), ValueError, r"one shape, found \[2, 4\] and \[1, 4\]"),
        (lambda h, z: hf.step_residual(h, z, None, 0.1), TypeError, "must be tensors, found Tensor and NoneType"),
        (lambda h, z: hf.step_residual(h, z, z.float(), 0.1), TypeError, "share one dtype and device"),
        (lambda h, z: hf.step_residual(h, z, z, float("inf")), ValueError, "dt must be finite, found inf"),
        (lambda h, z: hf.step_residual(h, z, z, torch.ones(3)), ValueError, r"broadcast to \[2, 1\]; found \[3\]"),
    ],
)
def test_bad_arguments_are_named(call, error, message):
    if "riton" in message and torch.cuda.is_available():
        pytest.skip("Triton can be there")
    with pytest.raises(error, match=message):
        call(make_hnn(4, (3,)), make_states(2, 4))


@pytest.mark.parametrize("inside", [True, False])
@pytest.mark.parametrize("d", [3, 40])
@pytest.mark.parametrize("batch", [1, 7, 150])
def test_both_ways_of_summing_up_weights_gradients(inside, d, batch, monkeypatch):
    """By the extension, transposed for few columns, or from factors in chunks: to the sum that autograd forms."""
    monkeypatch.setattr(cpp, "_SMALL_WEIGHTS", 10**9 if inside else 0)
    monkeypatch.setattr(cpp, "_CHUNK_ROWS", 64)
    hnn, z, y = make_hnn(2 * d, (17, 9, 33)), make_states(batch, 2 * d), make_states(batch, 2 * d, seed=5)
    found, expected = (
        torch.autograd.grad((hf.gradient(hnn, z, backend=backend) * y).sum(), list(hnn.parameters())[:-1], allow_unused=True)
        for backend in ("cpp", "reference")
    )
    for a, b in zip(found, expected, strict=True):
        torch.testing.assert_close(a, b, rtol=1e-11, atol=1e-12)
