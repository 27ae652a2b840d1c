"""An ensemble of Hamiltonians, trained and rolled out together by `torch.vmap`; its spread says where it has seen no data."""

import torch
from torch.func import functional_call, stack_module_state

import hjepa_fast as hf

DT = 0.2


def oscillator(z0, n_steps):
    """The exact motion of H = (q^2 + p^2) / 2: [..., 2] to [..., n_steps + 1, 2]."""
    t = DT * torch.arange(n_steps + 1)
    q, p = z0[..., :1], z0[..., 1:]
    return torch.stack((q * t.cos() + p * t.sin(), p * t.cos() - q * t.sin()), dim=-1)


def on_circle(radius):
    angle = 2 * torch.pi * torch.rand(radius.shape)
    return torch.stack((radius * angle.cos(), radius * angle.sin()), dim=-1)


def main(n_members=8, n_epochs=250, n_steps=8):
    torch.manual_seed(0)
    members = [hf.SymplecticIntegrator(hf.LatentHNN(latent_dim=2, hidden_dims=(64, 64)), dt=DT) for _ in range(n_members)]
    parameters, _ = stack_module_state(members)
    del parameters["dt"]  # what is not given is the first member's: DT, and not trained

    def rollout(own, z0):
        """One member's states [n, n_steps + 1, 2] from z0 [n, 2]."""
        return functional_call(members[0], own, (z0, n_steps))

    # each member has a sample of its own, of radii between 0.5 and 1
    z0 = on_circle(0.5 + 0.5 * torch.rand(n_members, 128))
    truth = oscillator(z0, n_steps)
    optimizer = torch.optim.Adam(parameters.values(), lr=3e-3)
    for _ in range(n_epochs):
        errors = (torch.vmap(rollout)(parameters, z0) - truth).square().mean(dim=(1, 2, 3))
        optimizer.zero_grad()
        errors.sum().backward()  # no parameter is shared: each member gets its own gradient
        optimizer.step()

    spread = {}
    for radius in (0.75, 1.5, 3.0):
        with torch.no_grad():
            states = torch.vmap(rollout, in_dims=(0, None))(parameters, on_circle(torch.full((64,), radius)))
        spread[radius] = states[:, :, -1].std(dim=0).square().sum(dim=-1).mean().sqrt().item() / radius
    return errors.detach(), spread


if __name__ == "__main__":
    errors, spread = main()
    print("mean squared errors of the members:", " ".join(f"{error:.0e}" for error in errors))
    for radius, value in spread.items():
        print(f"radius {radius}: after 8 steps the members are {value:.1%} of it apart")
