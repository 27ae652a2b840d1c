"""A rollout inside a compiled graph: one graph for forward and loss, for every batch size, exported too.

A rollout is an operator that `torch.compile` does not look into; what stands around it is compiled, here an encoder and a
decoder. `loss.backward()` and the optimizer's step stay outside; PyTorch compiles the backward pass with the forward one.
"""

import torch
from torch import nn

import hjepa_fast as hf


class WorldModel(nn.Module):
    """Observations [n, size] to predicted ones [n, n_steps + 1, size]."""

    def __init__(self, size, latent_dim=32):
        super().__init__()
        self.encode = nn.Sequential(nn.Linear(size, 64), nn.GELU(), nn.Linear(64, latent_dim))
        self.hnn = hf.LatentHNN(latent_dim, hidden_dims=(128, 128))
        self.decode = nn.Linear(latent_dim, size)
        self.dt = nn.Parameter(torch.tensor(0.5))

    def forward(self, x, n_steps: int):
        states = hf.rollout(self.hnn, self.encode(x), self.dt, n_steps, integrator="implicit-midpoint").states
        return self.decode(states)


def loss_of(model, x, target):
    return (model(x, target.shape[1] - 1) - target).square().mean()


def main(batches=(32, 17, 48), backend="inductor"):
    torch.manual_seed(0)
    model = WorldModel(size=100)
    compiled = torch.compile(loss_of, fullgraph=True, dynamic=True, backend=backend)
    optimizer = torch.optim.AdamW(model.parameters(), lr=1e-3)
    differences = []
    for n in batches:  # dynamic=True: another size is not another graph
        x, target = torch.randn(n, 100), torch.randn(n, 9, 100)
        loss = compiled(model, x, target)
        differences.append(abs(loss.item() - loss_of(model, x, target).item()))
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()

    x = torch.randn(8, 100)
    n = torch.export.Dim("n", min=2, max=4096)
    program = torch.export.export(model, (x, 8), dynamic_shapes=({0: n}, None))
    wide = torch.randn(64, 100)
    with torch.no_grad():
        differences.append((program.module()(wide, 8) - model(wide, 8)).abs().max().item())
    return differences


if __name__ == "__main__":
    *losses, exported = main()
    print("compiled and eager losses differ by", " ".join(f"{d:.1e}" for d in losses))
    print(f"the exported model, at a batch that it was not exported with, by {exported:.1e}")
