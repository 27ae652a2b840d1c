"""The models of the comparison, by name."""

from __future__ import annotations

import dataclasses
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any, cast

import torch
from torch import Tensor, nn

from ..api import choose_backend
from ..errors import UsageError
from ..integrators import DT_BOUNDS, Bounds, EulerIntegrator, SymplecticIntegrator
from ..models import GAIN, BaselineMLP, LatentHNN, SeparableHNN
from ..names import Backend, Integrator
from ..ports import PortHNN
from ..schemes import SCHEMES
from .config import OWN_INTEGRATOR, DataConfig, TrainConfig

Model = SymplecticIntegrator | BaselineMLP
"""A trainable model: `.rollout(z0 [B, d], n_steps)` gives [B, n_steps + 1, d]."""

MLP, SEPARABLE = "mlp", "separable"
"""Kinds of H: any H(z), or T(p) + V(q)."""


@dataclass(frozen=True)
class ModelSpec:
    """One row of the table that is trained. `hamiltonian` and `integrator` are None for an unconstrained predictor."""

    title: str
    hamiltonian: str | None = None
    integrator: Integrator | None = None
    energy_loss: bool = False
    residual: bool = False
    lacks: str | None = None
    """ "friction" or "control": what this model has not and the full model has, to which it is equal else."""
    friction: str | None = None
    per_dimension: bool = False
    control_dim: int = 0
    widths: tuple[int, ...] | None = None
    """Of the hidden layers; None for those of the model's class, which are the published ones."""
    activation: str | None = None
    """As `widths`."""
    gain: float = GAIN
    sub_steps: int = 1
    learn_dt: bool = True


MODELS = {
    "hnn": ModelSpec("HNN (full)", MLP, "leapfrog", energy_loss=True),
    "hnn-no-energy": ModelSpec("HNN (no energy loss)", MLP, "leapfrog"),
    "hnn-euler": ModelSpec("HNN (Euler)", MLP, "euler", energy_loss=True),
    "hnn-implicit": ModelSpec("HNN (implicit leapfrog)", MLP, "implicit-leapfrog", energy_loss=True),
    "hnn-separable": ModelSpec("Separable HNN", SEPARABLE, "leapfrog", energy_loss=True),
    "baseline": ModelSpec("Baseline MLP"),
    "baseline-residual": ModelSpec("Residual MLP", residual=True),
    "hnn-no-friction": ModelSpec("HNN (no friction)", MLP, "leapfrog", energy_loss=True, lacks="friction"),
    "hnn-no-control": ModelSpec("HNN (no control)", MLP, "leapfrog", energy_loss=True, lacks="control"),
}
FULL_MODEL = "hnn"
"""The model whose H measures the energy of predictors that have none of their own, and whose integrator can be chosen."""
SEPARABLE_WIDTHS = (384, 384, 192)
"""Hidden layers of T and of V: two networks, together within a tenth of a `LatentHNN`'s number of parameters."""


def check_models(names: tuple[str, ...]) -> None:
    """Every name must be a known model, and at least one given.

    Raises
    ------
    UsageError
        It is not; the message lists the known ones.
    """
    unknown = [name for name in names if name not in MODELS]
    if unknown or not names:
        raise UsageError(f"unknown model {', '.join(unknown) or '(none given)'}; known: {', '.join(MODELS)}")


def chosen(names: Sequence[str] | None, train: TrainConfig, data: DataConfig) -> list[str]:
    """The models to train: those named, or by default all, of which those without friction or control only beside one with it.

    Raises
    ------
    UsageError
        None are named, an unknown one is, or one that lacks what no model of these settings has.
    """
    given = {"friction": train.friction != "none", "control": data.control != "none"}
    if names is None:
        return [name for name, spec in MODELS.items() if spec.lacks is None or given[spec.lacks]]
    check_models(tuple(names))
    for name in names:
        lacks = MODELS[name].lacks
        if lacks and not given[lacks]:
            raise UsageError(f"{name} is there to be compared with a model that has {lacks}: it needs --{lacks}, found none")
    return list(names)


def spec_of(name: str, integrator: str = OWN_INTEGRATOR) -> ModelSpec:
    """What a model is; the full model, and what lacks one thing beside it, with another integrator, if one is named.

    Raises
    ------
    UsageError
        An unknown model or integrator.
    """
    check_models((name,))
    if integrator != OWN_INTEGRATOR and integrator not in SCHEMES:
        raise UsageError(f"integrator must be {OWN_INTEGRATOR} or one of {', '.join(SCHEMES)}; found {integrator!r}")
    own = MODELS[name]
    if (name != FULL_MODEL and own.lacks is None) or integrator in (OWN_INTEGRATOR, own.integrator):
        return own
    return dataclasses.replace(own, title=f"{own.title[:-1]}, {integrator})", integrator=cast(Integrator, integrator))


def spec_in(name: str, config: TrainConfig, control_dim: int) -> ModelSpec:
    """What a model is in a run: as `spec_of`, with the network, friction and control that the settings give it.

    Raises
    ------
    UsageError
        An unknown model or integrator.
    """
    spec = with_network(spec_of(name, config.integrator), config)
    friction = None if config.friction == "none" or spec.lacks == "friction" else config.friction
    return with_port(
        spec, friction, friction is not None and config.friction_per_dimension, 0 if spec.lacks == "control" else control_dim
    )


def with_network(spec: ModelSpec, config: TrainConfig) -> ModelSpec:
    """A model with the network and the step of a training's settings."""
    return dataclasses.replace(
        spec,
        widths=config.widths,
        activation=None if config.activation == "published" else config.activation,
        gain=config.gain,
        sub_steps=config.sub_steps,
        learn_dt=config.learn_dt,
    )


def with_port(spec: ModelSpec, friction: str | None, per_dimension: bool, control_dim: int) -> ModelSpec:
    """A model with friction and control around its H, if it has one, and a title that says so.

    Raises
    ------
    UsageError
        An integrator that cannot have them.
    """
    if spec.hamiltonian is None or not (friction or control_dim):
        return spec
    if spec.integrator == "tao":
        raise UsageError(f"{spec.title}: integrator tao is not there with friction or a control; choose another --integrator")
    added = ", ".join(word for word, there in (("friction", friction), ("control", control_dim)) if there)
    return dataclasses.replace(
        spec, title=f"{spec.title} + {added}", friction=friction, per_dimension=per_dimension, control_dim=control_dim
    )


def port_of(model: Model | None) -> PortHNN | None:
    """The friction and control around a model's H, if there are any."""
    hnn = model.hnn if isinstance(model, SymplecticIntegrator) else None
    return hnn if isinstance(hnn, PortHNN) else None


def without_port(model: SymplecticIntegrator) -> SymplecticIntegrator:
    """The model's H alone, without friction and control, under its integrator, with the dt that it uses."""
    port = port_of(model)
    if port is None:
        return model
    return SymplecticIntegrator(
        port.H,
        model.step_size.item(),
        dt_bounds=None,
        integrator=model.integrator,
        backend=model.backend,
        sub_steps=model.sub_steps,
    )


def takes_control(model: Model | None) -> bool:
    """Whether a model has a port."""
    port = port_of(model)
    return port is not None and port.control_dim > 0


def states(model: Model, z0: Tensor, n_steps: int, control: Tensor | None = None) -> Tensor:
    """A rollout [B, n_steps + 1, d] from z0 [B, d], under a control [B, n_steps, m] if the model has a port for it."""
    if control is None or not takes_control(model):
        return model.rollout(z0, n_steps)
    assert isinstance(model, SymplecticIntegrator)
    return model.trajectory(z0, n_steps, control=control).states


def title(name: str, model: Model) -> str:
    """A model's name for people, which says what the full model's integrator is if it is not its own."""
    spec, port = spec_of(name, model.integrator if isinstance(model, SymplecticIntegrator) else OWN_INTEGRATOR), port_of(model)
    return spec.title if port is None else with_port(spec, port.kind, False, port.control_dim).title


def build(
    name: str, latent_dim: int, dt: float, seed: int, backend: Backend = "auto", integrator: str = OWN_INTEGRATOR
) -> Model:
    """A fresh model; models of one kind get the same initial weights from one seed.

    Raises
    ------
    UsageError
        An unknown name, or what `assemble` refuses.
    """
    return assemble(spec_of(name, integrator), latent_dim, dt, seed, backend)


def check_backend(backend: str, device: torch.device | str) -> None:
    """A backend that is asked for by name must be there for the device.

    Raises
    ------
    UsageError
        It is not; the message says why.
    """
    try:
        choose_backend(backend, torch.empty(1, 2, device=device))
    except RuntimeError as error:
        raise UsageError(str(error)) from error


def assemble(
    spec: ModelSpec, latent_dim: int, dt: float, seed: int, backend: Backend = "auto", dt_bounds: Bounds | None = DT_BOUNDS
) -> Model:
    """A fresh model of a specification.

    Raises
    ------
    UsageError
        An odd latent size for a Hamiltonian, an unknown kind of H, an integrator that is not there for it, or a step size
        outside its bounds.
    """
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(seed)
        given: dict[str, Any] = {} if spec.activation is None else {"activation": spec.activation}
        if spec.integrator is None:
            given |= {} if spec.widths is None else {"hidden_dims": spec.widths}
            return BaselineMLP(latent_dim, residual=spec.residual, **given)
        if latent_dim % 2:
            raise UsageError(f"a Hamiltonian needs latents of even size (z = [q, p]), found {latent_dim}")
        usable = _usable(spec.hamiltonian)
        if spec.integrator not in usable:
            raise UsageError(
                f"{spec.title}: integrator {spec.integrator!r} is not there for a {spec.hamiltonian} H; "
                f"expected one of {', '.join(usable)}"
            )
        hnn: nn.Module
        given |= {} if spec.gain == GAIN else {"gain": spec.gain}
        if spec.hamiltonian == SEPARABLE:
            widths = spec.widths or SEPARABLE_WIDTHS
            hnn = SeparableHNN(latent_dim, widths, widths, **given)
        else:
            given |= {} if spec.widths is None else {"hidden_dims": spec.widths}
            hnn = LatentHNN(latent_dim, **given)
        if spec.friction or spec.control_dim:
            hnn = PortHNN(hnn, spec.control_dim, spec.friction, spec.per_dimension)
            if hnn.port is not None:  # so that it starts as the model without a control does, not with a random force
                nn.init.zeros_(hnn.port)
        try:
            options: dict[str, Any] = {"dt_bounds": dt_bounds, "backend": backend, "sub_steps": spec.sub_steps}
            if spec.integrator == "euler":
                model: SymplecticIntegrator = EulerIntegrator(hnn, dt, **options)
            else:
                model = SymplecticIntegrator(hnn, dt, integrator=spec.integrator, **options)
        except ValueError as error:
            raise UsageError(str(error)) from error
        model.dt.requires_grad_(spec.learn_dt)
        return model


def _usable(hamiltonian: str | None) -> list[str]:
    """Integrators that a kind of H can be rolled out with."""
    if hamiltonian not in (MLP, SEPARABLE):
        raise UsageError(f"unknown kind of Hamiltonian {hamiltonian!r}; known: {MLP}, {SEPARABLE}")
    return list(SCHEMES)
