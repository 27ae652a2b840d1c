"""Bit-reversible rollouts: back to the same bits, and apart from the rounding the same dynamics as in floating point."""

from __future__ import annotations

import itertools

import numpy as np
import pytest
import torch

import hjepa_fast as hf
from hjepa_fast import bit_reversible
from hjepa_fast.bit_reversible import INTEGRATORS, BitReversible
from hjepa_fast.schemes import SCHEMES, for_separable
from hjepa_fast.testing import make_states
from test_separable import NETWORKS, make


@pytest.mark.parametrize(("integrator", "n_steps"), [("leapfrog", 3000), ("symplectic-euler", 2000), ("yoshida4", 600)])
def test_thousands_of_steps_back_to_the_same_bits(integrator, n_steps):
    hnn = make("quadratic")
    with torch.no_grad():
        hnn.stiffness.abs_()  # a negative one is an instability
    lattice = BitReversible(hnn, 0.1, integrator=integrator)
    start = lattice.encode(make_states(3, 6))
    there = lattice.rollout(start, n_steps)
    assert there.dtype == torch.int64
    assert (there != start).all()
    assert torch.equal(lattice.rollout(there, -n_steps), start)


@pytest.mark.parametrize("name", NETWORKS)
def test_every_network_back_to_the_same_bits(name):
    lattice = BitReversible(make(name), 0.1)
    start = lattice.encode(make_states(3, 6))
    there = lattice.rollout(start, 50)
    assert (there != start).any(dim=0).all()
    assert torch.equal(lattice.rollout(there, -50), start)


@pytest.mark.parametrize("integrator", INTEGRATORS)
@pytest.mark.parametrize("bits", [3, 50])
def test_every_integrator_on_coarse_and_fine_lattices(integrator, bits):
    """With 3 bits most of every move is rounding, and reversal must not mind."""
    lattice = BitReversible(make("two MLPs, quadratic"), 0.3, integrator=integrator, bits=bits)
    start = lattice.encode(make_states(5, 6))
    assert torch.equal(lattice.rollout(lattice.rollout(start, 10), -10), start)
    assert torch.equal(lattice.rollout(lattice.rollout(start, -10), 10), start)


def test_floating_point_does_not_return():
    hnn, z0 = make("two MLPs"), make_states(3, 6)
    with torch.no_grad():
        there = hf.leapfrog(hnn, z0, 0.1, 500)[:, -1]
        back = hf.leapfrog(hnn, there, -0.1, 500)[:, -1]
    torch.testing.assert_close(back, z0, rtol=0, atol=1e-6)
    assert not torch.equal(back, z0)


def test_steps_forward_retrace_the_path_when_the_momentum_is_turned():
    """Time reversal by the physics instead of by undoing: T is even and rounding is odd."""
    lattice = BitReversible(make("kinetic |p|^2/2"), 0.1)
    start = lattice.encode(make_states(4, 6))
    turn = torch.tensor([1, 1, 1, -1, -1, -1])
    assert torch.equal(turn * lattice.rollout(turn * lattice.rollout(start, 700), 700), start)


def test_negative_dt_is_a_step_back():
    hnn = make("two MLPs")
    ahead, back = (BitReversible(hnn, dt, integrator="yoshida4") for dt in (0.2, -0.2))
    start = ahead.encode(make_states(4, 6))
    assert torch.equal(back.rollout(start, 50), ahead.rollout(start, -50))


@pytest.mark.parametrize("dt", [0.5, -0.5, 0.37])
def test_against_python_integers(dt):
    """V = w q + k q^2 / 2, T = p^2 / 2 by hand. With dt = 1/2 many moves lie halfway between two integers."""
    hnn, bits, n_steps = hf.SeparableHNN(2, (), quadratic=True).double(), 4, 30
    with torch.no_grad():
        w, k = hnn.potential[0].weight.fill_(0.25).item(), hnn.stiffness.fill_(0.75).item()
    lattice = BitReversible(hnn, dt, bits=bits)
    starts = [list(pair) for pair in itertools.product(range(-9, 10), repeat=2)]
    ends = []
    for q, p in starts:
        for _ in range(n_steps):
            p -= round((w + k * q / 2**bits) * dt / 2 * 2**bits)
            q += round(p * dt)
            p -= round((w + k * q / 2**bits) * dt / 2 * 2**bits)
        ends.append([q, p])
    assert lattice.rollout(torch.tensor(starts), n_steps).tolist() == ends
    assert len(set(map(tuple, ends))) == len(starts)  # a bijection: no two starts meet


def test_follows_leapfrog():
    hnn, z0 = make("two MLPs, quadratic"), make_states(2, 3, 6)
    lattice = BitReversible(hnn, 0.1)
    found = lattice.decode(lattice.rollout(lattice.encode(z0), 50))
    with torch.no_grad():
        torch.testing.assert_close(found, hf.leapfrog(hnn, z0, 0.1, 50)[..., -1, :], rtol=0, atol=1e-9)


@pytest.mark.parametrize("integrator", INTEGRATORS)
def test_follows_the_floating_point_method_to_the_last_bit_of_the_lattice(integrator):
    """Against the same kicks and drifts with gradients from autograd; the difference falls as 2^-bits."""
    hnn, z0, n_steps = make("two MLPs, quadratic"), make_states(4, 6), 30
    z = z0.clone().requires_grad_()
    for _, stage in itertools.product(range(n_steps), for_separable(SCHEMES[integrator])):
        Hq, Hp = torch.autograd.grad(hnn(z).sum(), z)[0].chunk(2, dim=1)
        z = (z + 0.1 * torch.cat((stage.drift * Hp, -stage.kick * Hq), dim=1)).detach().requires_grad_()
    errors = []
    for bits in (16, 28, 40):
        lattice = BitReversible(hnn, 0.1, integrator=integrator, bits=bits)
        errors.append((lattice.decode(lattice.rollout(lattice.encode(z0), n_steps)) - z).abs().max().item())
    assert errors[-1] < 1e-9
    assert np.polyfit((16, 28, 40), np.log2(errors), 1)[0] == pytest.approx(-1, abs=0.2)


def test_energy_stays():
    """The same promise as in floating point: after 4000 steps the energy's error is what it was after 500."""
    hnn, z0 = make("quadratic"), make_states(8, 6)
    with torch.no_grad():
        hnn.stiffness.abs_().add_(0.5)
        lattice = BitReversible(hnn, 0.2)
        n, errors = lattice.encode(z0), []
        for _ in range(400):
            n = lattice.rollout(n, 10)
            errors.append((hf.energy(hnn, lattice.decode(n)) - hf.energy(hnn, z0)).abs().max().item())
    assert max(errors) < 1.5 * max(errors[:50]) < 0.5


def test_a_step_costs_two_gradients(monkeypatch):
    """The last kick of a step and the first of the next add the same integers."""
    calls = []
    evaluate = bit_reversible.evaluate_term
    monkeypatch.setattr(bit_reversible, "evaluate_term", lambda term, x: calls.append(term) or evaluate(term, x))
    lattice = BitReversible(make("two MLPs"), 0.1)
    n = lattice.encode(make_states(2, 6))
    for n_steps in (9, -9):
        calls.clear()
        lattice.rollout(n, n_steps)
        assert len(calls) == 10 + 9


def test_shapes_layouts_and_splitting():
    lattice = BitReversible(make("quadratic"), 0.1)
    n = lattice.encode(make_states(2, 3, 6))
    kept = n.clone()
    expected = lattice.rollout(n, 20)
    assert torch.equal(n, kept)
    assert expected.shape == n.shape
    assert torch.equal(lattice.rollout(n.reshape(6, 6), 20), expected.reshape(6, 6))
    assert torch.equal(lattice.rollout(n.permute(2, 1, 0).contiguous().permute(2, 1, 0), 20), expected)
    assert torch.equal(lattice.rollout(lattice.rollout(n, 13), 7), expected)
    assert torch.equal(lattice.rollout(n, 0), n)
    assert lattice.rollout(n[0, 0], 5).shape == (6,)
    assert lattice.rollout(n[:0], 5).shape == (0, 3, 6)
    assert lattice.encode(make_states(0, 6)).shape == lattice.decode(lattice.encode(make_states(0, 6))).shape == (0, 6)


def test_encode_and_decode():
    lattice = BitReversible(make("quadratic"), 0.1, bits=20)
    z = make_states(50, 6) * 100
    n = lattice.encode(z)
    assert lattice.quantum == 2**-20
    assert lattice.decode(n).dtype == torch.float64
    assert (lattice.decode(n) - z).abs().max() <= lattice.quantum / 2
    assert torch.equal(lattice.encode(lattice.decode(n)), n)
    assert torch.equal(lattice.encode(-z), -n)
    assert lattice.encode(torch.full((6,), 2.0**42)).tolist() == [2**62] * 6  # the largest there is
    for dtype in (torch.float32, torch.bfloat16):
        assert torch.equal(lattice.decode(lattice.encode(z.to(dtype).div(128).round())), z.to(dtype).div(128).round().double())


def test_parameters_are_read_once_and_computed_with_in_float64():
    hnn = make("two MLPs, quadratic", torch.bfloat16)
    lattice = BitReversible(hnn, 0.1)
    n = lattice.encode(make_states(2, 6))
    expected = BitReversible(hnn.double(), 0.1).rollout(n, 10)
    with torch.no_grad():
        hnn.potential[0].weight.zero_()
        hnn.stiffness.zero_()
    assert torch.equal(lattice.rollout(n, 10), expected)


def flat(stiffness=0.0):
    """V = k q^2 / 2, T = p^2 / 2 with d = 2."""
    hnn = hf.SeparableHNN(4, (), quadratic=True).double()
    with torch.no_grad():
        hnn.potential[0].weight.zero_()
        hnn.stiffness.fill_(stiffness)
    return hnn


def test_overflow_is_named():
    lattice = BitReversible(flat(), 1.0)
    z = torch.tensor([[0.0, 0.0, 0.0, 0.0], [0.0, 0.0, 1.0, -8000.0]], dtype=torch.float64)
    n = lattice.encode(z)
    assert lattice.decode(lattice.rollout(n, 500))[1].tolist() == [500.0, -4e6, 1.0, -8000.0]
    with pytest.raises(OverflowError, match=r"q\[1\] of sample 1 is -4.2\d*e\+06 after 530 steps, beyond 4.1943e\+06, .* 40 "):
        lattice.rollout(n, 530)
    with pytest.raises(OverflowError, match=r"q\[1\] of sample 1 is"):
        lattice.rollout(n, 2097)  # once around: 8000 x 2097 = 2^24 - 1216, and 2^24 is 2^64 quanta
    with pytest.raises(
        OverflowError, match=r"step 1 would change q\[1\] of sample 1 by -9000 at once, beyond 8192, .* smaller dt"
    ):
        lattice.rollout(lattice.encode(z * 9 / 8), 5)
    with pytest.raises(OverflowError, match=r"would change [qp]\[0\] of sample 0"):
        BitReversible(flat(-4.0), 1.0).rollout(torch.tensor([1, 0, 0, 0]), 1000)
    with pytest.raises(OverflowError, match=r"p\[0\] of sample 0 is -8.38861e\+06 after 0 steps"):
        lattice.rollout(torch.tensor([0, 0, -(2**63), 0]), 0)


def test_a_gradient_that_is_not_finite_is_named():
    hnn = flat()
    with torch.no_grad():
        hnn.potential[0].weight[0, 1] = torch.nan
    lattice = BitReversible(hnn, 0.1)
    with pytest.raises(FloatingPointError, match=r"would change p\[1\] of sample 0 in step 1 is nan"):
        lattice.rollout(torch.zeros(3, 4, dtype=torch.int64), 5)
    with torch.no_grad():
        hnn.potential[0].weight[0, 1] = 1e300  # finite, but not a lattice point away
    with pytest.raises(OverflowError, match=r"change p\[1\] of sample 0 by .* at once"):
        BitReversible(hnn, 0.1).rollout(torch.zeros(3, 4, dtype=torch.int64), 5)


def test_encode_refuses_what_the_lattice_has_no_point_for():
    lattice = BitReversible(flat(), 0.1)
    with pytest.raises(OverflowError, match=r"at most 4.1943e\+06 with 40 fractional bits, found 5e\+06"):
        lattice.encode(torch.tensor([0, 0, -5e6, 1]))
    for value in (torch.nan, torch.inf):
        with pytest.raises(ValueError, match=f"must be finite, found {value}"):
            lattice.encode(torch.tensor([0, value, 0, 0]))
    with pytest.raises(TypeError, match="floating-point tensor, found torch.int64"):
        lattice.encode(torch.zeros(4, dtype=torch.int64))
    with pytest.raises(ValueError, match=r"\[\.\.\., 4\] .* found \[2, 6\]"):
        lattice.encode(torch.zeros(2, 6))


def test_arguments_that_cannot_be_used_are_named():
    lattice = BitReversible(flat(), 0.1)
    n = torch.zeros(2, 4, dtype=torch.int64)
    for function in (lattice.decode, lambda n: lattice.rollout(n, 1)):
        with pytest.raises(TypeError, match="n must be int64, found torch.float64; encode"):
            function(n.double())
        with pytest.raises(ValueError, match=r"\[\.\.\., 4\] .* found \[2, 3\]"):
            function(n[:, :3])
        with pytest.raises(TypeError, match="must be a tensor, found list"):
            function([0, 0, 0, 0])
        with pytest.raises(ValueError, match="one device, found meta and cpu"):
            function(n.to("meta"))
    for n_steps in (2.0, True, torch.tensor(2)):
        with pytest.raises(TypeError, match="n_steps must be an int"):
            lattice.rollout(n, n_steps)
    for integrator in ("euler", "implicit-midpoint", "rk4"):
        with pytest.raises(ValueError, match=f'"{integrator}" is not bit-reversible.*leapfrog.*symplectic-euler.*yoshida4'):
            BitReversible(flat(), 0.1, integrator=integrator)
    with pytest.raises(ValueError, match="integrator must be one of .* found 'verlet'"):
        BitReversible(flat(), 0.1, integrator="verlet")
    with pytest.raises(TypeError, match="a SeparableHNN, .* found LatentHNN"):
        BitReversible(hf.LatentHNN(4, (3,)), 0.1)
    for dt, error in ((float("nan"), ValueError), ("1", TypeError), (torch.tensor(0.1), TypeError)):
        with pytest.raises(error, match="dt must be"):
            BitReversible(flat(), dt)
    for bits, error in ((0, ValueError), (63, ValueError), (40.0, TypeError)):
        with pytest.raises(error, match="bits must be"):
            BitReversible(flat(), 0.1, bits=bits)
