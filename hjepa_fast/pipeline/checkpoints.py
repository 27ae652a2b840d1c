"""Checkpoints without pickle: one safetensors file, its facts as JSON in the metadata and in a file beside it."""

from __future__ import annotations

import dataclasses
import json
import pickle
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from ..errors import CheckpointError, HJEPAError, UsageError
from ..integrators import SymplecticIntegrator
from ..models import LatentHNN
from . import files, zoo

FORMAT = 1


@dataclass(frozen=True)
class Checkpoint:
    """What a checkpoint file holds."""

    facts: dict[str, Any]
    """Model name, kind of its H, integrator, latent size, configuration, epoch, history, encoder."""
    model: dict[str, Tensor]
    """State dict of the model."""
    mean: Tensor
    std: Tensor
    optimizer: dict[str, Tensor]
    """Optimizer state as `<parameter>/<name>`, empty in a checkpoint that only serves prediction."""


def save(path: Path, checkpoint: Checkpoint) -> None:
    """Write a checkpoint atomically, and its facts as readable JSON beside it."""
    tensors = {f"model/{name}": tensor for name, tensor in checkpoint.model.items()}
    tensors |= {f"optimizer/{name}": tensor for name, tensor in checkpoint.optimizer.items()}
    tensors |= {"data/mean": checkpoint.mean, "data/std": checkpoint.std}
    facts = {"format": FORMAT, **checkpoint.facts}
    files.save_tensors(path, tensors, {"hjepa_fast": json.dumps(facts)})
    files.write_json(path.with_suffix(".json"), facts)


def load(path: Path) -> Checkpoint:
    """Read a checkpoint.

    Raises
    ------
    CheckpointError
        It is missing, unreadable, or not one of this package's.
    """
    path = Path(path)
    try:
        tensors, metadata = files.load_tensors(path, "checkpoint")
    except HJEPAError as error:
        raise CheckpointError(str(error)) from error
    try:
        facts = json.loads(metadata["hjepa_fast"])
    except (KeyError, json.JSONDecodeError) as error:
        raise CheckpointError(f"{path} was not written by hjepa_fast: it lacks the metadata 'hjepa_fast'") from error
    if facts.get("format") != FORMAT:
        raise CheckpointError(f"{path} has checkpoint format {facts.get('format')}, this version reads {FORMAT}")
    spec = zoo.MODELS.get(facts.get("model"))
    if spec:  # what the first versions did not write, as it was then
        facts = {"hamiltonian": spec.hamiltonian, "integrator": spec.integrator, **facts}

    def part(prefix: str) -> dict[str, Tensor]:
        return {name.removeprefix(prefix): tensor for name, tensor in tensors.items() if name.startswith(prefix)}

    data = part("data/")
    if not {"mean", "std"} <= data.keys():
        raise CheckpointError(f"{path} lacks the statistics data/mean and data/std")
    return Checkpoint(facts, part("model/"), data["mean"], data["std"], part("optimizer/"))


def restore(checkpoint: Checkpoint, source: Path) -> zoo.Model:
    """The trained model of a checkpoint, on the CPU, with the integrator and the kind of H that it was trained with.

    Raises
    ------
    CheckpointError
        Its tensors do not fit the model it names, or this version has no such model, integrator or H.
    """
    facts = checkpoint.facts
    try:
        own = zoo.spec_of(facts["model"])
        kind = {key: facts.get(key, getattr(own, key)) for key in ("hamiltonian", "integrator")}
        model = zoo.assemble(dataclasses.replace(own, **kind), facts["latent_dim"], dt=1.0, seed=0)
    except UsageError as error:
        raise CheckpointError(f"{source} cannot be used: {error}") from error
    load_state(model, checkpoint.model, source)
    return model


def load_state(model: nn.Module, state: dict[str, Tensor], source: Path) -> None:
    """`model.load_state_dict`, with an error that names the file, the key and both shapes.

    Raises
    ------
    CheckpointError
        Missing or unexpected keys, or a tensor of another shape.
    """
    expected = {name: tuple(tensor.shape) for name, tensor in model.state_dict().items()}
    found = {name: tuple(tensor.shape) for name, tensor in state.items()}
    for name in sorted(expected.keys() | found.keys()):
        if expected.get(name) != found.get(name):
            raise CheckpointError(
                f"{source} does not fit {type(model).__name__}: {name} is {_shape(found.get(name))} in the file, "
                f"{_shape(expected.get(name))} in the model"
            )
    model.load_state_dict(state)


def _shape(shape: tuple[int, ...] | None) -> str:
    return "absent" if shape is None else str(list(shape))


def load_published(path: Path, integrator: str = "leapfrog") -> SymplecticIntegrator:
    """Load a checkpoint of the published notebook: a pickle with `integrator_state_dict` or `hnn_state_dict`.

    It is read with `weights_only=True`, so nothing in it is executed. Widths are taken from its tensors. Where both
    are there, `integrator_state_dict` counts, since it also holds the learned dt; without it, dt is 1.0.

    Raises
    ------
    CheckpointError
        Missing, unreadable, not such a checkpoint, or its tensors are not an MLP Hamiltonian's.
    """
    path = Path(path)
    try:
        content = torch.load(path, map_location="cpu", weights_only=True)
    except FileNotFoundError as error:
        raise CheckpointError(f"checkpoint not found: {path}") from error
    except (OSError, RuntimeError, EOFError, pickle.UnpicklingError) as error:
        raise CheckpointError(f"{path} cannot be read as a checkpoint of plain tensors: {error}") from error
    if not isinstance(content, dict) or not {"hnn_state_dict", "integrator_state_dict"} & content.keys():
        found = ", ".join(map(str, content)) if isinstance(content, dict) else type(content).__name__
        raise CheckpointError(f"{path} holds neither hnn_state_dict nor integrator_state_dict, found: {found}")
    state = content.get("integrator_state_dict")
    if state is None:
        state = {"dt": torch.tensor(1.0)} | {f"hnn.{name}": t for name, t in content["hnn_state_dict"].items()}
    weights = [t for name, t in state.items() if name.startswith("hnn.net.") and name.endswith(".weight") and t.ndim == 2]
    if not weights or weights[0].shape[1] % 2:
        raise CheckpointError(f"{path} holds no MLP Hamiltonian: expected hnn.net.0.weight [h, 2d], found {list(state)}")
    hnn = LatentHNN(weights[0].shape[1], [w.shape[0] for w in weights[:-1]])
    module = SymplecticIntegrator(hnn, integrator=integrator)
    load_state(module, state, path)
    return module
