"""Networks and integrator modules: published sizes, layouts and checkpoints."""

from __future__ import annotations

import pickle
import warnings
from fractions import Fraction

import numpy as np
import pytest
import torch
from torch import nn

import hjepa_fast as hf
from hjepa_fast.testing import make_hnn, make_states


def count(module: nn.Module) -> int:
    return sum(p.numel() for p in module.parameters())


def test_published_parameter_counts():
    assert count(hf.LatentHNN()) == 919_041
    assert count(hf.BaselineMLP()) == 1_312_768


def test_published_state_dict_keys():
    keys = {f"net.{i}.{kind}" for i in (0, 2, 4, 6) for kind in ("weight", "bias")}
    assert set(hf.LatentHNN().state_dict()) == keys
    for kind in (hf.SymplecticIntegrator, hf.EulerIntegrator):
        module = kind(hf.LatentHNN(8, (4, 4, 4)))
        assert set(module.state_dict()) == {"dt"} | {f"hnn.{key}" for key in keys}
        assert module.dt.shape == ()


def test_initialisation_is_xavier_with_half_gain():
    torch.manual_seed(0)
    hnn = hf.LatentHNN()
    for layer in hnn.net[::2]:
        expected = 0.5 * (2 / (layer.in_features + layer.out_features)) ** 0.5
        if layer.weight.numel() > 10_000:
            assert layer.weight.std().item() == pytest.approx(expected, rel=0.02)
        assert not layer.bias.any()


def test_dt_is_learned_within_its_bounds():
    hnn, z = make_hnn(4, (6,)), make_states(3, 4)
    module = hf.SymplecticIntegrator(hnn, dt=0.5)
    module.step(z).square().sum().backward()
    assert module.dt.grad.abs() > 0
    for outside, bound in ((-1.0, 0.1), (5.0, 2.0)):
        with torch.no_grad():
            module.dt.fill_(outside)
        torch.testing.assert_close(module.rollout(z, 3), hf.leapfrog(hnn, z, bound, 3))


@pytest.mark.parametrize("kind", [hf.SymplecticIntegrator, hf.EulerIntegrator])
def test_a_step_size_below_the_published_clamp_is_used_with_bounds_that_hold_it(kind):
    hnn, z = make_hnn(4, (6,)), make_states(3, 4)
    with pytest.raises(ValueError, match=r"from 0\.1 to 2, found 0\.01\. Give dt_bounds=\(low, high\).*dt_bounds=None"):
        kind(hnn, dt=0.01)
    for bounds in ((0.001, 0.5), (0.0, float("inf")), None):
        module = kind(hnn, dt=0.01, dt_bounds=bounds)
        states = module.rollout(z, 4)
        torch.testing.assert_close(states, hf.rollout(hnn, z, 0.01, 4, integrator=module.integrator).states)
        states.square().sum().backward()
        assert module.dt.grad.abs() > 0
        assert module.state_dict().keys() == {"dt", *(f"hnn.{name}" for name in hnn.state_dict())}


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
def test_bounds_hold_their_own_ends(dtype):
    """0.7 as float32 is less than 0.7, and 0.3 is more: a dt at a bound lies within it in either precision."""
    hnn, z = make_hnn(4, (6,), dtype=dtype), make_states(3, 4, dtype=dtype)
    for dt, bounds in ((0.7, (0.7, 1.0)), (0.3, (0.1, 0.3))):
        module = hf.SymplecticIntegrator(hnn, dt=dt, dt_bounds=bounds)
        module.rollout(z, 2).square().sum().backward()
        assert module.dt.grad.abs() > 0


@pytest.mark.parametrize(
    ("dt", "bounds", "error", "message"),
    [
        (2.5, (0.1, 2.0), ValueError, "from 0.1 to 2, found 2.5"),
        (1.0, (2.0, 1.0), ValueError, r"low < high, or None for no clamp; found \(2.0, 1.0\)"),
        (1.0, (1.0, 1.0), ValueError, "low < high"),
        (1.0, (float("nan"), 1.0), ValueError, "low < high"),
        (1.0, (0.1, None), ValueError, "low < high"),
        (1.0, (0.1, 1.0, 2.0), ValueError, "low < high"),
        (1.0, "02", ValueError, "low < high"),
        (1.0, 2.0, ValueError, "low < high"),
        (float("nan"), None, ValueError, "dt must be finite, found nan"),
        (float("inf"), (0.1, float("inf")), ValueError, "dt must be finite, found inf"),
        (10**400, None, ValueError, "dt must be finite, found an int of 1329 bits"),
        ("0.5", None, TypeError, "dt must be a number, found str"),
        (None, None, TypeError, "dt must be a number, found NoneType"),
        (torch.ones(2), None, TypeError, "dt must be a number"),
    ],
)
def test_step_sizes_and_bounds_that_cannot_be_are_named(dt, bounds, error, message):
    with pytest.raises(error, match=message):
        hf.SymplecticIntegrator(hf.LatentHNN(4, (3,)), dt, dt_bounds=bounds)


def test_a_loaded_step_size_outside_its_bounds_is_said():
    free = hf.SymplecticIntegrator(hf.LatentHNN(4, (3,)), 0.05, dt_bounds=None)
    published = hf.SymplecticIntegrator(hf.LatentHNN(4, (3,)))
    with pytest.warns(UserWarning, match=r"loaded dt, 0\.05, lies outside dt_bounds, 0\.1 to 2"):
        published.load_state_dict(free.state_dict())
    with pytest.warns(UserWarning, match="loaded dt, 0.05"):
        torch.nn.ModuleDict({"a": published}).load_state_dict({f"a.{k}": v for k, v in free.state_dict().items()}, assign=True)
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        free.load_state_dict(free.state_dict())
        for bound in (0.1, 2.0):  # reached in training, and used as they are
            published.load_state_dict(free.state_dict() | {"dt": torch.tensor(bound)})


def test_an_integrator_says_whether_its_step_is_symplectic():
    hnn = hf.LatentHNN(4, (3,))
    assert "integrator='leapfrog' (symplectic only for a separable H), dt_bounds=(0.1, 2.0)" in repr(
        hf.SymplecticIntegrator(hnn)
    )
    assert "integrator='euler' (not symplectic)" in repr(hf.EulerIntegrator(hnn))
    assert "integrator='implicit-leapfrog', dt_bounds=None" in repr(
        hf.SymplecticIntegrator(hnn, integrator="implicit-leapfrog", dt_bounds=None)
    )
    assert "symplectic only for a separable H" in hf.SymplecticIntegrator.__doc__.split("Parameters")[0]


def test_integrators_pickled_before_they_had_bounds_keep_the_published_ones():
    module = hf.SymplecticIntegrator(hf.LatentHNN(4, (3,)))
    del module.__dict__["dt_bounds"]
    again = pickle.loads(pickle.dumps(module))
    with torch.no_grad():
        again.dt.fill_(3.0)
    assert again.step_size == 2.0


@pytest.mark.parametrize(("kind", "name"), [(hf.SymplecticIntegrator, "leapfrog"), (hf.EulerIntegrator, "euler")])
def test_modules_are_the_functions(kind, name):
    hnn, z = make_hnn(4, (6,)), make_states(3, 4)
    module = kind(hnn, dt=0.3)
    expected = hf.rollout(hnn, z, 0.3, 4, integrator=name).states
    torch.testing.assert_close(module.rollout(z, 4), expected)
    torch.testing.assert_close(module.step(module.step(z)), expected[:, 2])
    assert module.dt.dtype == torch.float64


def test_baseline_rollouts():
    z = torch.randn(3, 6)
    plain, residual = hf.BaselineMLP(6, (5,)), hf.BaselineMLP(6, (5,), residual=True)
    residual.load_state_dict(plain.state_dict())
    torch.testing.assert_close(residual(z), z + plain(z))
    states = plain.rollout(z, 3)
    assert states.shape == (3, 4, 6)
    torch.testing.assert_close(states[:, 3], plain(plain(plain(z))))


class OwnHNN(nn.Module):
    """What a user would write: the MLP as .net, one output."""

    def __init__(self, scale: float = 1.0):
        super().__init__()
        self.net = nn.Sequential(
            nn.Linear(4, 6), nn.GELU("tanh"), nn.Linear(6, 5, bias=False), nn.GELU("tanh"), nn.Linear(5, 1)
        )
        self.scale = scale

    def forward(self, z):
        return self.net(z) * self.scale


class Unscaled(OwnHNN):
    def forward(self, z):
        return self.net(z)


class TakesPairs(OwnHNN):
    forward_is_net = True

    def forward(self, q, p):
        return self.net(torch.cat((q, p), -1))


@pytest.mark.parametrize("make", [Unscaled, TakesPairs, lambda: OwnHNN().net])
def test_own_modules_are_hamiltonians(make):
    module, z = make(), torch.randn(2, 4)
    net = getattr(module, "net", module)
    torch.testing.assert_close(hf.leapfrog(module, z, 0.1, 2), hf.leapfrog(net, z, 0.1, 2))
    hf.leapfrog(module, z, 0.1, 2).sum().backward()
    assert net[2].weight.grad.any()


def test_numbers_of_numpy_are_numbers():
    hnn, z = make_hnn(4, (3,)), make_states(2, 4)
    expected = hf.leapfrog(hnn, z, 0.5, 2)
    for dt in (np.float32(0.5), np.float64(0.5), Fraction(1, 2)):
        torch.testing.assert_close(hf.leapfrog(hnn, z, dt, np.int64(2)), expected)


def sequential(*layers: nn.Module) -> nn.Sequential:
    return nn.Sequential(*layers)


@pytest.mark.parametrize(
    ("module", "error", "message"),
    [
        (nn.Linear(4, 1), TypeError, "found Linear"),
        (hf.SymplecticIntegrator(hf.LatentHNN(4, (3,))), TypeError, "pass its .hnn"),
        (sequential(), TypeError, "no layers"),
        (sequential(nn.Linear(4, 3), nn.ReLU(), nn.Linear(3, 1)), TypeError, "layer 1 .* smooth activation .* found ReLU"),
        (sequential(nn.Linear(4, 3), nn.Linear(3, 1)), TypeError, "layer 1 .* found Linear"),
        (sequential(nn.LayerNorm(4), nn.Tanh(), nn.Linear(4, 1)), TypeError, "layer 0 .* must be nn.Linear, found LayerNorm"),
        (sequential(nn.Linear(4, 3), nn.Tanh()), TypeError, "start and end with nn.Linear"),
        (sequential(nn.Linear(4, 2)), ValueError, "one output, Sequential has 2"),
        (sequential(nn.Linear(5, 1)), ValueError, "even size; Sequential takes 5"),
        (sequential(nn.Linear(4, 3).double(), nn.Tanh(), nn.Linear(3, 1)), ValueError, "share one dtype, found .*float32"),
    ],
)  # fmt: skip
def test_what_is_no_hamiltonian_is_named(module, error, message):
    with pytest.raises(error, match=message):
        hf.rollout(module, torch.randn(2, 4), 0.1, 1, backend="torch")


@pytest.mark.parametrize(
    ("call", "error", "message"),
    [
        (lambda h, z: hf.leapfrog(h, z.tolist(), 0.1, 1), TypeError, "z0 must be a tensor, found list"),
        (lambda h, z: hf.leapfrog(h, z[:, :3], 0.1, 1), ValueError, r"\[..., 4\] .* found \[2, 3\]"),
        (lambda h, z: hf.leapfrog(h, z.half(), 0.1, 1), TypeError, "found torch.float16"),
        (lambda h, z: hf.leapfrog(h, z.double(), 0.1, 1), TypeError, "found torch.float64 and torch.float32"),
        (lambda h, z: hf.leapfrog(h, z.to("meta"), 0.1, 1), ValueError, "one device, found meta and cpu"),
        (lambda h, z: hf.leapfrog(h, z, 0.1, -1), ValueError, "n_steps must be >= 0, found -1"),
        (lambda h, z: hf.leapfrog(h, z, 0.1, 1.5), TypeError, "n_steps must be an int, found float 1.5"),
        (lambda h, z: hf.leapfrog(h, z, "1", 1), TypeError, "dt must be a number or a tensor, found str"),
        (lambda h, z: hf.leapfrog(h, z, float("nan"), 1), ValueError, "dt must be finite, found nan"),
        (lambda h, z: hf.leapfrog(h, z, 10**400, 1), ValueError, "dt must be finite, found an int of 1329 bits"),
        (lambda h, z: hf.leapfrog(h, z, 1e300, 1), ValueError, "dt must be finite in torch.float32, found 1e\\+300"),
        (lambda h, z: hf.leapfrog(h, z, 0.1, 10**30), ValueError, "n_steps must be below 2\\^31, found an int of 100 bits"),
        (lambda h, z: hf.rollout(h, z, 0.1, 1, energy="yes"), TypeError, "energy must be True or False, found 'yes'"),
        (lambda h, z: hf.leapfrog(h.to(torch.complex64), z, 0.1, 1), TypeError, "found torch.float32 and torch.complex64"),
        (
            lambda h, z: hf.SymplecticIntegrator(h.to(torch.complex64)),
            TypeError,
            "floating-point parameters, found torch.compl",
        ),
        (
            lambda h, z: hf.leapfrog(nn.Sequential(nn.Linear(6, 1), nn.ELU()), z, 0.1, 0),
            ValueError,
            r"Sequential cannot be called with states \[2, 4\] torch.float32: ",
        ),
        (lambda h, z: hf.SymplecticIntegrator(None), TypeError, "hnn must be an nn.Module, found NoneType"),
        (lambda h, z: hf.SymplecticIntegrator(nn.Sequential())(z), TypeError, "Sequential has no layers"),
        (lambda h, z: hf.leapfrog(h, z, 1j, 1), TypeError, "dt must be a number or a tensor, found complex"),
        (lambda h, z: hf.leapfrog(h, z, 0.1, "3"), TypeError, "n_steps must be an int, found str '3'"),
        (lambda h, z: hf.rollout(h, z, 0.1, 1, tolerance="x"), TypeError, "tolerance must be a number, found str"),
        (lambda h, z: hf.rollout(h, z, 0.1, 1, integrator="tao", omega=None), TypeError, "omega must be a number, found None"),
        (lambda h, z: hf.rollout(h, z, 0.1, 1, max_evaluations=0), ValueError, "max_evaluations must be positive, found 0"),
        (lambda h, z: hf.rollout(h, z, 0.1, 1, integrator=["leapfrog"]), ValueError, r"one of .* found \['leapfrog'\]"),
        (lambda h, z: hf.available_backends(3), TypeError, "z0 must be a tensor .* found 3"),
        (lambda h, z: hf.leapfrog(h, z, torch.ones(3), 2), ValueError, r"broadcast to \[2, 2\]; found \[3\]"),
        (lambda h, z: hf.leapfrog(h, z, torch.ones(1, 2, 2), 2), ValueError, r"found \[1, 2, 2\]"),
        (lambda h, z: hf.leapfrog(h, z, torch.tensor(1), 2), TypeError, "floating-point tensor, found torch.int64"),
        (
            lambda h, z: hf.rollout(h, z, 0.1, 1, integrator="verlet"),
            ValueError,
            "one of leapfrog, implicit-leapfrog, .*; found 'verlet'",
        ),
        (lambda h, z: hf.rollout(h, z, 0.1, 1, backend="fast"), ValueError, "backend must be one of .* found 'fast'"),
        (lambda h, z: hf.LatentHNN(5), ValueError, "even and positive .* found 5"),
        (lambda h, z: hf.LatentHNN(4, (3,), "relu"), ValueError, "found 'relu'"),
        (lambda h, z: hf.LatentHNN(4, (0,)), ValueError, "positive, found"),
    ],
)
def test_bad_arguments_are_named(call, error, message):
    with pytest.raises(error, match=message):
        call(hf.LatentHNN(4, (3,)), torch.randn(2, 4))
