"""Time a Hamiltonian of your own by pytest-benchmark, beside plain PyTorch:

    pytest examples/bench_own_model.py --benchmark-only --benchmark-group-by=group

Copy it, and put in your network and sizes.
"""

import pytest
import torch
from torch import nn

import hjepa_fast as hf

BATCH, STEPS, DT = 256, 20, 0.1


def eager(H, z, n_steps):
    """Kick, drift, kick by nested autograd."""
    z = z.requires_grad_()
    for _ in range(n_steps):
        q, p = z.chunk(2, dim=-1)
        for take, c in ((0, -DT / 2), (1, DT), (0, -DT / 2)):
            z = torch.cat((q, p), dim=-1)
            half = torch.autograd.grad(H(z).sum(), z, create_graph=True)[0].chunk(2, dim=-1)[take]
            q, p = (q, p + c * half) if take == 0 else (q + c * half, p)
        z = torch.cat((q, p), dim=-1)
    return z


def fused(H, z, n_steps):
    return hf.rollout(H, z, DT, n_steps, states="final").states


@pytest.fixture(params=[eager, fused], ids=lambda function: function.__name__)
def rolled(request):
    network = nn.Sequential(nn.Linear(4, 200), nn.Tanh(), nn.Linear(200, 200), nn.Tanh(), nn.Linear(200, 1))
    return request.param, network, torch.randn(BATCH, 4)


@pytest.mark.benchmark(group="rollout")
def test_rollout(benchmark, rolled):
    function, H, z0 = rolled
    found = benchmark(lambda: function(H, z0.clone(), STEPS).detach())
    torch.testing.assert_close(found, eager(H, z0.clone(), STEPS).detach())


@pytest.mark.benchmark(group="training step")
def test_training_step(benchmark, rolled):
    function, H, z0 = rolled

    def step():
        H.zero_grad()
        function(H, z0.clone(), STEPS).square().mean().backward()
        return H[0].weight.grad

    found = benchmark(step)
    expected = torch.autograd.grad(eager(H, z0.clone(), STEPS).square().mean(), H[0].weight)[0]
    torch.testing.assert_close(found, expected, rtol=1e-4, atol=1e-6)
