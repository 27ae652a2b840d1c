"""Diagnostics against hand calculations, and every integrator against what its table says of it."""

from __future__ import annotations

import json
import math

import pytest
import torch

import hjepa_fast as hf
from hjepa_fast import diagnostics
from hjepa_fast.diagnostics import (
    check,
    convergence_order,
    energy_drift,
    gradient_check,
    plain_words,
    reversal_error,
    separability_defect,
    step_jacobian,
    symplecticity_defect,
    volume_defect,
)
from hjepa_fast.pipeline.check import check_figure, summary, table
from hjepa_fast.schemes import SCHEMES, Properties
from hjepa_fast.testing import make_hnn, make_separable_hnn, make_states

Z = make_states(3, 4)


def general(factor: float = 2.0, seed: int = 0) -> hf.LatentHNN:
    """A network that is far from separable, its dynamics fast enough that errors of high order are above rounding."""
    return scaled(make_hnn(4, (16,), "tanh", seed=seed), factor)


def separable() -> hf.LatentHNN:
    """An ordinary network that happens to be T(p) + V(q)."""
    return scaled(make_separable_hnn(2, 8), 6.0)


def scaled(hnn: hf.LatentHNN, factor: float) -> hf.LatentHNN:
    with torch.no_grad():
        hnn.net[-1].weight.mul_(factor)
    return hnn


def oscillator(d: int = 1, stiffness: float = 1.0) -> hf.SeparableHNN:
    """H = (p^2 + k q^2) / 2."""
    hnn = hf.SeparableHNN(2 * d, (1,), quadratic=True).double()
    with torch.no_grad():
        for parameter in hnn.parameters():
            parameter.zero_()
        hnn.stiffness.fill_(stiffness)
    return hnn


KINDS = {"any H": (general, "general"), "separable H": (separable, "separable")}
CLAIMS = [pytest.param(name, kind, id=f"{name}, {kind}") for name in SCHEMES for kind in KINDS]


def case(name, kind):
    make, properties = KINDS[kind]
    return make(), getattr(SCHEMES[name], properties)


@pytest.mark.parametrize(("name", "kind"), CLAIMS)
def test_every_integrator_has_the_order_stated(name, kind):
    hnn, stated = case(name, kind)
    n_steps = (16, 24, 32) if stated.order < 6 else (4, 5, 6, 8)
    found = convergence_order(hnn, Z, 2.0 if stated.order < 6 else 3.0, n_steps, integrator=name)
    assert found.used.all()
    assert found.slope == pytest.approx(stated.order, abs=0.1)


@pytest.mark.parametrize(("name", "kind"), CLAIMS)
def test_every_integrator_is_as_symplectic_and_reversible_as_stated(name, kind):
    hnn, stated = case(name, kind)
    defect = symplecticity_defect(hnn, Z, 1.0, integrator=name).max()
    volume = volume_defect(hnn, Z, 1.0, integrator=name).max()
    reversal = reversal_error(hnn, Z, 0.25, 20, integrator=name).max()
    if stated.symplectic:
        assert defect < 1e-12
        assert volume < 1e-12
    else:
        assert defect > 1e-6
    if stated.reversible:
        assert reversal < 1e-12
    else:
        assert reversal > 1e-8


def test_the_published_step_is_what_its_network_makes_of_it():
    """By example, the table aside: not symplectic, of order 1; and both for a separable network."""
    assert symplecticity_defect(general(), Z, 0.5).min() > 1e-4
    assert symplecticity_defect(separable(), Z, 0.5).max() < 1e-12
    assert convergence_order(general(), Z, 2.0, (16, 32, 64)).slope == pytest.approx(1, abs=0.1)
    assert convergence_order(separable(), Z, 2.0, (16, 32, 64)).slope == pytest.approx(2, abs=0.1)


@pytest.mark.parametrize("integrator", ["leapfrog", "euler"])
@pytest.mark.parametrize("backend", ["auto", "torch", "reference"])
def test_jacobians_match_autograd(integrator, backend, monkeypatch):
    monkeypatch.setattr(diagnostics, "_ROWS", 5)  # neither a divisor of the rows nor of a state's
    hnn, z = make_hnn(4, (7, 5)), make_states(2, 3, 4)
    found = step_jacobian(hnn, z, 0.4, integrator=integrator, backend=backend)

    def step(x):
        return hf.rollout(hnn, x, 0.4, 1, integrator=integrator, backend="reference").states[1]

    expected = torch.stack([torch.autograd.functional.jacobian(step, x) for x in z.reshape(-1, 4)])
    torch.testing.assert_close(found, expected.reshape(2, 3, 4, 4), rtol=1e-12, atol=1e-13)
    assert step_jacobian(hnn, z[:0], 0.4).shape == (0, 3, 4, 4)


def test_defects_of_one_step_by_hand():
    """Forward Euler on the oscillator is [[1, h], [-k h, 1]], of determinant 1 + k h^2, which is also J^T Omega J's factor."""
    hnn, z, h, k = oscillator(1, 2.0), make_states(5, 2), 0.3, 2.0
    J = step_jacobian(hnn, z, h, integrator="euler")
    expected = torch.tensor([[1, h], [-k * h, 1]], dtype=torch.float64)
    torch.testing.assert_close(J, expected.expand(5, 2, 2))
    torch.testing.assert_close(symplecticity_defect(hnn, z, h, integrator="euler"), J.new_full((5,), k * h * h))
    torch.testing.assert_close(volume_defect(hnn, z, h, integrator="euler"), J.new_full((5,), k * h * h))
    assert symplecticity_defect(hnn, z, h).max() < 1e-15


def test_a_volume_that_changes_its_orientation_is_no_volume_kept():
    """|det J - 1| of a reflection is 2."""
    J = torch.diag(torch.tensor([1.0, -1.0], dtype=torch.float64))
    assert diagnostics._determinant_defect(J) == 2


def test_separability_against_the_hessian():
    hnn, z = make_hnn(6, (7, 5)), make_states(2, 6)
    hessians = torch.stack([torch.autograd.functional.hessian(lambda x: hnn(x).squeeze(), x) for x in z])
    mixed = hessians[:, :3, 3:].square().sum((1, 2)) * 2
    expected = (mixed / hessians.square().sum((1, 2))).sqrt()
    torch.testing.assert_close(separability_defect(hnn, z, n_vectors=3000), expected, rtol=0.03, atol=0)
    assert separability_defect(separable(), Z).max() == 0
    assert separability_defect(oscillator(), make_states(2, 2)).max() == 0
    assert separability_defect(make_hnn(4, ()), Z).tolist() == [0, 0, 0]


def test_energy_of_forward_euler_on_the_oscillator_grows_as_calculated():
    """H grows by the factor 1 + h^2 in every step, up to where float64 ends."""
    z, h = torch.tensor([[1.0, 0.0], [0.0, 2.0]], dtype=torch.float64), 0.5
    t = torch.arange(201, dtype=torch.float64)
    drift = energy_drift(oscillator(), z, h, 200, integrator="euler")
    torch.testing.assert_close(drift.mean, 1.25 * ((1 + h * h) ** t - 1), rtol=1e-12, atol=1e-14)
    torch.testing.assert_close(drift.maximum, 2 * ((1 + h * h) ** t - 1), rtol=1e-12, atol=1e-14)
    assert drift.growth > 1e10
    assert drift.slope > 1 / 200
    assert drift.diverged_at is None
    lost = energy_drift(oscillator(), z, h, 3500, integrator="euler")
    assert lost.growth == math.inf
    expected = math.log(torch.finfo(torch.float64).max / 2) / math.log(1 + h * h)
    assert lost.diverged_at == pytest.approx(expected, abs=5)


def test_energy_of_leapfrog_on_the_oscillator_stays():
    """It keeps (1 - h^2 / 4) q^2 + p^2, so from (1, 0) the energy error is (1 - q^2) h^2 / 8, on average h^2 / 16."""
    z, h = torch.tensor([[1.0, 0.0]], dtype=torch.float64), 0.2
    drift = energy_drift(oscillator(), z, h, 2000)
    assert drift.mean.max() == pytest.approx(h * h / 8, rel=1e-3)
    assert drift.mean.mean() == pytest.approx(h * h / 16, rel=1e-2)
    assert drift.growth == pytest.approx(1, abs=0.1)
    assert abs(drift.slope) < 1e-4
    assert drift.path > 3


def test_a_path_tells_a_round_from_a_way_out():
    z = torch.tensor([[1.0, 0.0]], dtype=torch.float64)
    once = energy_drift(oscillator(), z, 2 * math.pi / 400, 400)
    assert once.path == pytest.approx(20 * math.sin(math.pi / 20), rel=1e-3)  # a regular polygon's perimeter
    out = energy_drift(oscillator(1, 0.0), torch.tensor([[0.0, 1.0]], dtype=torch.float64), 0.1, 100)
    assert out.path == pytest.approx(1)
    still = energy_drift(oscillator(), torch.zeros(1, 2, dtype=torch.float64), 0.1, 40)
    assert (still.path, still.growth, still.slope) == (math.inf, 1.0, 0.0)


def test_pieces_of_the_energy_drift_are_one_rollout():
    for integrator in SCHEMES:
        drift = energy_drift(general(), Z, 0.1, 45, integrator=integrator)
        H = hf.rollout(general(), Z, 0.1, 45, integrator=integrator, energy=True).energy
        torch.testing.assert_close(drift.mean, (H - H[:, :1]).abs().mean(0), rtol=1e-9, atol=1e-12)


@pytest.mark.parametrize("hnn", [make_hnn(4, (7, 5)), hf.SeparableHNN(4, (5,), (6,), quadratic=True), make_hnn(4, ())])
@pytest.mark.parametrize("integrator", ["leapfrog", "symplectic-euler", "euler"])
def test_gradients_pass_and_wrong_ones_do_not(hnn, integrator, monkeypatch):
    assert max(gradient_check(hnn, Z, 0.3, 4, integrator=integrator)) < 1e-8
    right = diagnostics.rollout

    def wrong(network, z0, *arguments, **options):
        return right(network, z0 * 1.01 - 0.01 * z0.detach(), *arguments, **options)

    monkeypatch.setattr(diagnostics, "rollout", wrong)
    found = gradient_check(hnn, Z, 0.3, 4, integrator=integrator)
    assert found.z0 == pytest.approx(0.01 / 1.01, rel=1e-6)
    assert max(found.dt, found.weights) < 1e-8


def test_errors_that_are_rounding_show_no_order():
    found = convergence_order(general(), Z, 0.02, (8, 16), integrator="yoshida6")
    assert not found.used.any()
    assert math.isnan(found.slope)
    assert found.errors.max() < 1e-12


def test_measuring_changes_nothing_and_any_precision_is_taken():
    """A float32 network is measured as its float64 copy, unless asked for; its parameters, states and modes stay."""
    hnn, z = make_hnn(4, (7, 5), dtype=torch.float32), make_states(3, 4, dtype=torch.float32).requires_grad_()
    before = [p.clone() for p in hnn.parameters()]
    with torch.no_grad():
        reports = check(hnn, z, 0.3, integrators=["implicit-leapfrog"], n_steps=20)
    assert reports[0]["symplectic"].value < 1e-14
    assert all(torch.equal(a, b) and b.requires_grad and b.grad is None for a, b in zip(before, hnn.parameters(), strict=True))
    assert z.grad is None
    rounded = symplecticity_defect(make_separable_hnn(2, 6), Z, 0.3, dtype=torch.float32)
    assert rounded.dtype == torch.float64
    assert 1e-10 < rounded.max() < 1e-5
    assert energy_drift(hnn, z, 0.3, 20, dtype=torch.float32).rounding > 1e-6


def test_check_of_a_network_that_is_not_separable():
    reports = check(general(), Z, 0.2, n_steps=100)
    assert [report.integrator for report in reports] == ["leapfrog", "implicit-leapfrog"]
    published, implicit = reports
    assert {v.name: v.outcome for v in implicit.verdicts} | {"energy": None} == {
        name: None if name == "energy" else "passed"
        for name in ("symplectic", "volume", "reversible", "order", "energy", "gradients")
    }
    for name in ("symplectic", "volume", "reversible", "energy"):
        assert published[name].outcome == "not claimed"
    assert not published.failed
    assert published.claimed.order == 1
    words = plain_words(published)
    for part in (
        "H is not separable: d2H/dqdp makes up 0.", "One step is not symplectic", "It is not reversible", "1 being stated",
        "separable H only, so not here", 'use integrator="implicit-leapfrog"',
    ):  # fmt: skip
        assert part in words
    assert "symplectic for any H, use" not in plain_words(implicit)
    assert "One step is symplectic" in plain_words(implicit)


def test_check_of_separable_networks():
    for hnn, z in ((separable(), Z), (oscillator(2, 1.5), Z)):
        (report,) = check(hnn, z, 0.2, integrators=["leapfrog"], n_steps=400)
        assert report.claimed == Properties(2, symplectic=True, reversible=True)
        assert all(report[name].outcome == "passed" for name in ("symplectic", "volume", "reversible", "order", "gradients"))
        assert report["energy"].outcome != "failed"
        assert "H is separable" in plain_words(report)
    assert report["energy"].outcome == "passed"


def test_check_takes_step_size_and_integrator_of_a_module():
    module = hf.EulerIntegrator(general().float(), dt=0.25)
    reports = check(module, Z[:1], n_steps=20)
    assert [report.integrator for report in reports] == ["euler", "implicit-leapfrog"]
    assert all(report.dt == 0.25 for report in reports)
    assert [r.integrator for r in check(module, Z[0], 0.1, integrators=["rk4"], n_steps=20)] == ["rk4"]


def test_a_claim_that_does_not_hold_fails(monkeypatch):
    """Forward Euler, said to be what it is not."""
    claims = Properties(2, symplectic=True, reversible=True)
    monkeypatch.setitem(SCHEMES, "euler", SCHEMES["euler"]._replace(separable=claims))
    (report,) = check(oscillator(), make_states(3, 2), 0.2, integrators=["euler"], n_steps=400)
    assert [v.name for v in report.failed] == ["symplectic", "volume", "reversible", "order", "energy"]
    assert "That contradicts what is claimed of euler: symplectic, volume" in plain_words(report)
    assert "FAILED" in table([report])


def test_a_step_without_a_solution_is_a_finding():
    (report,) = check(general(3.0, seed=1), Z, 40.0, integrators=["implicit-midpoint"], n_steps=20)
    assert "symplectic" in {v.name for v in report.failed}
    assert "did not converge" in report["symplectic"].sentence
    words = plain_words(report)
    assert "take a smaller dt" in words
    text = json.dumps(summary([report]), allow_nan=False)
    assert json.loads(text)["integrators"][0]["verdicts"][0]["value"] is None
    check_figure([report], "no solution")


def test_growth_below_the_jumps_of_softplus_is_not_held_against_a_method():
    """PyTorch's softplus is linear from 20 on, 2e-9 below itself; with that moved out of reach, the growth is gone."""
    hnn, z = make_hnn(4, (8, 8)), make_states(8, 4)
    (jumps,) = check(hnn, z, 0.1, integrators=["yoshida6"], n_steps=1000)
    assert jumps.drift.growth > 100
    assert 1e-11 < jumps.drift.mean[-1] < 1e-8
    assert jumps["energy"].outcome == "not measured"
    assert "the jumps of softplus at its threshold, 2.1e-09" in jumps["energy"].sentence
    for module in hnn.net:
        if isinstance(module, torch.nn.Softplus):
            module.threshold = 40
    assert energy_drift(hnn, z, 0.1, 1000, integrator="yoshida6").growth < 3


def test_a_divergence_is_said():
    (report,) = check(oscillator(1, 1.0), make_states(2, 2), 3.0, integrators=["leapfrog"], n_steps=1000)
    assert report["energy"].outcome == "failed"
    assert "its energy is not finite from step" in report["energy"].sentence
    json.dumps(summary([report]), allow_nan=False)
    check_figure([report], "diverges")


def test_figures_and_tables_of_every_integrator():
    names = [name for name in SCHEMES if SCHEMES[name].general.order < 6]
    reports = check(general(), Z, 0.2, integrators=names, n_steps=20)
    assert not [(report.integrator, report.failed) for report in reports if report.failed]
    lines = table(reports).splitlines()
    assert len(lines) == len(names) + 1
    assert [line.split()[0] for line in lines[1:]] == names
    figure = check_figure(reports, "every integrator")
    assert [axis.get_title() for axis in figure.axes[:2]] == ["energy drift", "order"]
    assert len(figure.axes[0].lines) == len(names)


@pytest.mark.parametrize(
    ("call", "error", "message"),
    [
        (lambda: check(general(), Z), ValueError, "dt is needed: only a SymplecticIntegrator has a step size"),
        (lambda: check(general(), Z, 0.0), ValueError, "dt must be finite and not 0, found 0.0"),
        (
            lambda: check(general(), Z, 0.1, integrators=["verlet"]),
            ValueError,
            "integrator must be one of leapfrog, .*'verlet'",
        ),
        (lambda: check(general(), Z[:0], 0.1), ValueError, r"at least one state is needed, found z0 \[0, 4\]"),
        (lambda: check(general(), Z[:, :3], 0.1), ValueError, r"z must be \[\.\.\., 4\] .* found \[3, 3\]"),
        (lambda: check(hf.BaselineMLP(4), Z, 0.1), ValueError, r"one number a state, BaselineMLP gives \[3, 4\]"),
        (lambda: energy_drift(general(), Z, 0.1, 19), ValueError, "at least 20 .* found 19"),
        (lambda: energy_drift(general(), Z, 0.1, 30.0), TypeError, "n_steps must be an int"),
        (lambda: convergence_order(general(), Z, 1.0, (8,)), ValueError, r"two or more rising .* found \(8,\)"),
        (lambda: convergence_order(general(), Z, 1.0, (8, 8)), ValueError, r"found \(8, 8\)"),
        (lambda: step_jacobian(general(), [0.0] * 4, 0.1), TypeError, "z must be a tensor, found list"),
    ],
)
def test_what_cannot_be_measured_is_named(call, error, message):
    with pytest.raises((error, TypeError) if "smooth" in message else error, match=message):
        call()
