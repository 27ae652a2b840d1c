"""A drop-in: the training loop of a latent Hamiltonian, before and after one line is changed.

`eager_leapfrog` is how such models are usually written, three nested autograd passes a step. `hf.leapfrog` gives the same
states and the same gradients.
"""

import time

import torch
from torch import nn

import hjepa_fast as hf


def eager_leapfrog(H, z, dt, n_steps):
    """H-JEPA's step in plain PyTorch: kick, drift, kick."""

    def derivatives(q, p):
        z = torch.cat((q, p), dim=-1)
        return torch.autograd.grad(H(z).sum(), z, create_graph=True)[0].chunk(2, dim=-1)

    q, p = z.requires_grad_().chunk(2, dim=-1)
    states = [z]
    for _ in range(n_steps):
        p = p - dt / 2 * derivatives(q, p)[0]
        q = q + dt * derivatives(q, p)[1]
        p = p - dt / 2 * derivatives(q, p)[0]
        states.append(torch.cat((q, p), dim=-1))
    return torch.stack(states, dim=1)


def train(rollout, windows, n_epochs):
    """Fit H [latent_dim -> 1] to windows [n, T + 1, latent_dim]; the loss of each epoch."""
    torch.manual_seed(0)
    H = nn.Sequential(nn.Linear(windows.shape[-1], 128), nn.Softplus(), nn.Linear(128, 128), nn.Softplus(), nn.Linear(128, 1))
    optimizer = torch.optim.AdamW(H.parameters(), lr=1e-3)
    losses = []
    for _ in range(n_epochs):
        states = rollout(H, windows[:, 0].clone(), 0.1, windows.shape[1] - 1)
        loss = (states - windows).square().mean()
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
        losses.append(loss.item())
    return losses


def main(n_epochs=30):
    windows = torch.randn(32, 16, 64, generator=torch.Generator().manual_seed(1)).cumsum(1) / 4
    runs = {}
    for name, rollout in (("plain PyTorch", eager_leapfrog), ("hf.leapfrog", hf.leapfrog)):
        started = time.perf_counter()
        runs[name] = train(rollout, windows, n_epochs), time.perf_counter() - started
    return runs


if __name__ == "__main__":
    for name, (losses, seconds) in main().items():
        print(f"{name:14} loss {losses[0]:.6f} to {losses[-1]:.6f} in {seconds:.2f} s")
