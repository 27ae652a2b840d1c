"""Swing a damped pendulum up by model predictive control: plans are made by gradients through rollouts of a learned port.

H, friction and a port for a torque are learned from random torques first. Then, at each step, a few gradient steps improve a
plan of torques [horizon, 1] through `hf.leapfrog(..., control=plan)`, and its first torque is applied.
"""

import torch

import hjepa_fast as hf

DT, FRICTION, STRONGEST = 0.1, 0.05, 0.9  # a torque of 1 would hold the pendulum level


def plant(z, u, sub_steps=20):
    """The true pendulum [..., 2] under a torque [..., 1] for one step of DT, by small leapfrog steps."""
    q, p = z.unbind(-1)
    h, u = DT / sub_steps, u[..., 0]
    for _ in range(sub_steps):
        p = p + h / 2 * (u - q.sin() - FRICTION * p)
        q = q + h * p
        p = p + h / 2 * (u - q.sin() - FRICTION * p)
    return torch.stack((q, p), dim=-1)


def learn(n_steps):
    torch.manual_seed(0)
    model = hf.PortHNN(hf.SeparableHNN(2, (64, 64)), control_dim=1, friction="conformal")
    optimizer = torch.optim.AdamW(model.parameters(), lr=2e-3)
    for _ in range(n_steps):
        z, u = torch.rand(256, 2) * torch.tensor([9.0, 6.0]) - 3, STRONGEST * (2 * torch.rand(256, 1) - 1)
        error = hf.leapfrog(model, z, DT, 1, control=u)[:, -1] - plant(z, u)
        optimizer.zero_grad()
        error.square().mean().backward()
        optimizer.step()
    return model.requires_grad_(False)


def main(n_training=1500, n_steps=120, horizon=40, n_plan=12):
    model = learn(n_training)
    z, plan = torch.zeros(2), torch.full((horizon, 1), 0.3)
    for _ in range(n_steps):
        plan = torch.cat((plan[1:], plan[-1:])).requires_grad_()
        optimizer = torch.optim.Adam([plan], lr=0.1)
        for _ in range(n_plan):
            states = hf.leapfrog(model, z, DT, horizon, control=STRONGEST * plan.tanh())
            cost = 1 + states[:, 0].cos() + 0.05 * states[:, 1].square()  # 0 at rest above the pivot
            optimizer.zero_grad()
            cost.sum().backward()
            optimizer.step()
        z, plan = plant(z, STRONGEST * plan[0].tanh().detach()), plan.detach()
    return model.friction.item(), z


if __name__ == "__main__":
    friction, (q, p) = main()
    print(f"friction learned: {friction:.3f} (true: {FRICTION})")
    print(f"after 12 units of time the pendulum is at height {-q.cos().item():.3f} of 1, its speed {p.item():.3f}")
