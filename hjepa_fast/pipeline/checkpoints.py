"""Checkpoints without pickle: one safetensors file, its facts as JSON in the metadata and in a file beside it."""

from __future__ import annotations

import dataclasses
import itertools
import json
import math
import re
import warnings
import zipfile
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from ..errors import CheckpointError, HJEPAError, UsageError
from ..integrators import DT_BOUNDS, Bounds, SymplecticIntegrator
from ..models import LatentHNN
from ..names import Integrator
from . import files, untrusted, zoo
from .config import TrainConfig, shown

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
    control_scale: Tensor | None = None
    """[m]: what a recorded control is divided by; None for a model without a port."""


def save(path: Path, checkpoint: Checkpoint) -> None:
    """Write a checkpoint atomically, and its facts as readable JSON beside it."""
    tensors = {f"model/{name}": tensor for name, tensor in checkpoint.model.items()}
    tensors |= {f"optimizer/{name}": tensor for name, tensor in checkpoint.optimizer.items()}
    tensors |= {"data/mean": checkpoint.mean, "data/std": checkpoint.std}
    if checkpoint.control_scale is not None:
        tensors["data/control_scale"] = checkpoint.control_scale
    facts = {"format": FORMAT, **checkpoint.facts}
    files.save_tensors(path, tensors, {"hjepa_fast": json.dumps(facts, allow_nan=False)})
    files.write_json(path.with_suffix(".json"), facts)


def load(path: Path) -> Checkpoint:
    """Read a checkpoint.

    Raises
    ------
    CheckpointError
        It is missing, unreadable, not one of this package's, or holds what does not fit: facts of another kind, statistics
        of another size than the latents', numbers that are not finite.
    MissingDependencyError
        pydantic is not installed.
    """
    from . import schemas

    path = Path(path)
    try:
        tensors, metadata = files.load_tensors(path, "checkpoint")
    except HJEPAError as error:
        raise CheckpointError(str(error)) from error
    if "hjepa_fast" not in metadata:
        raise CheckpointError(f"{path} was not written by hjepa_fast: it lacks the metadata 'hjepa_fast'")
    try:
        facts = untrusted.parse_json(metadata["hjepa_fast"], str(path))
    except HJEPAError as error:
        raise CheckpointError(str(error)) from error
    found = facts.get("format") if isinstance(facts, dict) else None
    if type(found) is not int or found != FORMAT:
        raise CheckpointError(f"{path} has checkpoint format {shown(found)}, this version reads {FORMAT}")
    model = facts.get("model")
    if isinstance(model, str) and model in zoo.MODELS:  # what the first versions did not write, as it was then
        spec = zoo.MODELS[model]
        facts = {"hamiltonian": spec.hamiltonian, "integrator": spec.integrator, **facts}
    facts = schemas.checkpoint_facts(facts, str(path), CheckpointError)

    def part(prefix: str) -> dict[str, Tensor]:
        return {name.removeprefix(prefix): tensor for name, tensor in tensors.items() if name.startswith(prefix)}

    _check_tensors(tensors, path)
    data, shape = part("data/"), (facts["latent_dim"],)
    if not {"mean", "std"} <= data.keys():
        raise CheckpointError(f"{path} lacks the statistics data/mean and data/std")
    if data["mean"].shape != shape or data["std"].shape != shape or not (data["std"] > 0).all():
        raise CheckpointError(
            f"{path}: expected data/mean and positive data/std of shape {list(shape)}, as latent_dim says; "
            f"found {list(data['mean'].shape)} and {list(data['std'].shape)}"
        )
    scale, size = data.get("control_scale"), facts["control_dim"]
    if size and (scale is None or tuple(scale.shape) != (size,) or not (scale > 0).all()):
        found = "absent" if scale is None else list(scale.shape)
        raise CheckpointError(
            f"{path}: expected positive data/control_scale of shape [{size}], as control_dim says; found {found}"
        )
    checkpoint = Checkpoint(facts, part("model/"), data["mean"], data["std"], part("optimizer/"), scale if size else None)
    _check_optimizer(checkpoint, path)
    return checkpoint


def _check_tensors(tensors: dict[str, Tensor], path: Path) -> None:
    for name, tensor in tensors.items():
        plain = tensor.layout == torch.strided and tensor.is_floating_point() and not tensor.is_meta and not tensor.is_nested
        # an expanded tensor of a few bytes says that it is as large as it likes
        if not plain or tensor.numel() * tensor.element_size() > tensor.untyped_storage().nbytes():
            raise CheckpointError(f"{path}: {name} is no plain floating-point tensor, found {tensor.dtype}, {tensor.layout}")
        if not tensor.isfinite().all():
            raise CheckpointError(f"{path}: {name} holds numbers that are not finite")


def _check_optimizer(checkpoint: Checkpoint, path: Path) -> None:
    found: dict[str, dict[str, tuple[int, ...]]] = {}
    for key, tensor in checkpoint.optimizer.items():
        parameter, _, name = key.rpartition("/")
        found.setdefault(parameter, {})[name] = tuple(tensor.shape)
    for parameter, shapes in found.items():
        shape = tuple(checkpoint.model[parameter].shape) if parameter in checkpoint.model else None
        if shapes != {"step": (), "exp_avg": shape, "exp_avg_sq": shape}:
            raise CheckpointError(f"{path}: optimizer/{parameter} does not fit its parameter: {shapes}, expected {shape}")


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
        if (kind["integrator"] is None) != (own.integrator is None):
            raise UsageError(f"{facts['model']} has integrator {kind['integrator']!r}")
        recorded = facts.get("train", {})
        settings = TrainConfig(**{f.name: recorded[f.name] for f in dataclasses.fields(TrainConfig) if f.name in recorded})
        _refuse_more_than_is_there(settings, checkpoint)
        port = facts.get("friction"), settings.friction_per_dimension, facts.get("control_dim", 0)
        spec = zoo.with_port(zoo.with_network(dataclasses.replace(own, **kind), settings), *port)
        bounds = settings.dt_bounds
        model = zoo.assemble(spec, facts["latent_dim"], _inside(bounds), seed=0, dt_bounds=bounds)
    except (UsageError, ValueError) as error:
        raise CheckpointError(f"{source} cannot be used: {error}") from error
    load_state(model, checkpoint.model, source)
    return model


def _refuse_more_than_is_there(settings: TrainConfig, checkpoint: Checkpoint) -> None:
    """Widths that a file names are not built where it holds no such network: they may be as large as it likes."""
    if settings.widths is None:
        return
    needed = sum(a * b for a, b in itertools.pairwise((checkpoint.facts["latent_dim"] // 2, *settings.widths)))
    found = sum(tensor.numel() for tensor in checkpoint.model.values())
    if needed > found:
        raise UsageError(f"widths {shown(settings.widths)} need at least {needed:,} weights, found {found:,}")


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


def load_published(
    path: Path, integrator: Integrator = "leapfrog", dt_bounds: Bounds | None = DT_BOUNDS
) -> SymplecticIntegrator:
    """Load a checkpoint of the published notebook: a pickle with `integrator_state_dict` or `hnn_state_dict`.

    It is read with `weights_only=True`, so nothing in it is executed; what lies beside the state dicts (settings, numpy
    numbers, paths, optimizers) is passed over, its classes being neither imported nor called. The state dict of an
    integrator or of a network alone is read as well. What wrappers put into the names of parameters, as `_orig_mod.` of
    torch.compile and `module.` of DataParallel, is taken off. Widths are taken from the tensors. Where both are there,
    `integrator_state_dict` counts, since it also holds the learned dt; without it, dt is 1.0.

    Parameters
    ----------
    path : Path
    integrator, dt_bounds
        As for `SymplecticIntegrator`; they are not in the file.

    Raises
    ------
    CheckpointError
        Missing, unreadable, not such a checkpoint, or its tensors are not an MLP Hamiltonian's.
    """
    path = Path(path)
    content = _read_pickle(path)
    if isinstance(content, _PassedOver):
        raise CheckpointError(f"{path} holds a whole object of class {content.name}, which is not executed. {_SAVE_AGAIN}")
    if not isinstance(content, dict):
        raise CheckpointError(
            f"{path} holds neither hnn_state_dict nor integrator_state_dict, found: {type(content).__name__}. {_SAVE_AGAIN}"
        )
    state = _published_state(content, path)
    _check_tensors(state, path)
    weights = [t for name, t in state.items() if name.startswith("hnn.net.") and name.endswith(".weight") and t.ndim == 2]
    widths = [w.shape[0] for w in weights[:-1]]
    if not weights or weights[0].shape[1] % 2 or weights[-1].shape[0] != 1 or 0 in (weights[0].shape[1], *widths):
        found = shown([f"{name} {list(tensor.shape)}" for name, tensor in state.items()])
        raise CheckpointError(f"{path} holds no MLP Hamiltonian: expected hnn.net.0.weight [h, 2d], found {found}")
    hnn = LatentHNN(weights[0].shape[1], widths).to(torch.promote_types(weights[0].dtype, torch.float32))
    try:
        module = SymplecticIntegrator(hnn, dt=_inside(dt_bounds), integrator=integrator, dt_bounds=dt_bounds)
    except (TypeError, ValueError) as error:
        raise UsageError(str(error)) from error
    load_state(module, state, path)
    return module


_SAVE_AGAIN = "Save it again with torch.save({'integrator_state_dict': integrator.state_dict()}, path)"
_WRAPPERS = ("_orig_mod", "module", "_fsdp_wrapped_module", "_checkpoint_wrapped_module")
"""Names that torch.compile, DataParallel and their like put before a module's own."""


_COMMON = (
    "argparse.Namespace",
    "collections.defaultdict",
    *(f"builtins.{kind}" for kind in ("dict", "float", "int", "list")),  # what a defaultdict makes
    "pathlib.PosixPath",
    "pathlib.WindowsPath",
    "numpy.dtype",
    "numpy.ndarray",
    *(f"numpy.{core}.multiarray.{name}" for core in ("core", "_core") for name in ("scalar", "_reconstruct")),
)
"""What people keep beside tensors; files of PyTorch before 1.6 do not say beforehand what they hold."""


class _PassedOver:
    """Takes the place of an object whose class is not torch's: made of anything, it does nothing."""

    name = ""

    def __new__(cls, *args: Any, **kwargs: Any) -> _PassedOver:
        return super().__new__(cls)

    def __init__(self, *args: Any, **kwargs: Any) -> None: ...

    def __setstate__(self, state: Any) -> None: ...


def _empty_dict(*args: Any) -> dict[Any, Any]:
    return {}


def _read_pickle(path: Path) -> Any:
    from torch.serialization import get_unsafe_globals_in_checkpoint, safe_globals

    try:
        if zipfile.is_zipfile(path):
            with zipfile.ZipFile(path) as archive:
                sizes = sum(entry.file_size for entry in archive.infolist())
            if sizes > 2 * path.stat().st_size + 2**20:
                raise CheckpointError(f"{path} unpacks to {sizes:,} bytes, more than torch.save writes")
            names = get_unsafe_globals_in_checkpoint(path)
        else:
            names = list(_COMMON)
        known: dict[str, Any] = {"collections.defaultdict": _empty_dict}
        inert: list[Any] = [(known.get(name) or type("PassedOver", (_PassedOver,), {"name": name}), name) for name in names]
        with safe_globals(inert), warnings.catch_warnings():
            warnings.simplefilter("ignore")  # of pickle protocols: what cannot be read raises
            return torch.load(path, map_location="cpu", weights_only=True)
    except FileNotFoundError as error:
        raise CheckpointError(f"checkpoint not found: {path}") from error
    except CheckpointError:
        raise
    except Exception as error:  # a damaged pickle can raise anything
        reason = str(error).rpartition("WeightsUnpickler error: ")[2].strip().partition("\n")[0]
        if found := re.match(r"Unsupported global: GLOBAL (\S+)", reason):
            reason = f"it holds an object of class {found[1]}"
        raise CheckpointError(
            f"{path} cannot be read as a checkpoint of plain tensors: {reason or type(error).__name__}. {_SAVE_AGAIN}"
        ) from error


def _published_state(content: dict[Any, Any], path: Path) -> dict[str, Tensor]:
    """The integrator's state dict, whatever it was saved as."""
    if content.get("integrator_state_dict") is not None:
        return _unwrapped(content["integrator_state_dict"], path)
    if content.get("hnn_state_dict") is not None:
        state = _unwrapped(content["hnn_state_dict"], path)
    elif content and all(isinstance(key, str) and isinstance(value, Tensor) for key, value in content.items()):
        state = _unwrapped(content, path)
        if "hnn.net.0.weight" in state:
            return state
        if "net.0.weight" not in state:
            state = {}
    else:
        state = {}
    if not state:
        found = ", ".join(
            ascii(key)[1:60].strip("'") if isinstance(key, str) else type(key).__name__ for key in list(content)[:20]
        )
        raise CheckpointError(f"{path} holds neither hnn_state_dict nor integrator_state_dict, found: {found}. {_SAVE_AGAIN}")
    return {"dt": torch.tensor(1.0)} | {f"hnn.{name}": tensor for name, tensor in state.items()}


def _unwrapped(state: Any, path: Path) -> dict[str, Tensor]:
    """A state dict with the names that its modules have without wrappers."""
    found: dict[str, Tensor] = {}
    for key, value in state.items() if isinstance(state, dict) else [(None, state)]:
        if not isinstance(key, str) or not isinstance(value, Tensor):
            what = f"class {value.name}" if isinstance(value, _PassedOver) else type(value).__name__
            raise CheckpointError(
                f"{path} cannot be read as a checkpoint of plain tensors: expected a state dict of tensors by name, "
                f"found {what} at {shown(key) if isinstance(key, str) else type(key).__name__}. {_SAVE_AGAIN}"
            )
        name = ".".join(part for part in key.split(".") if part not in _WRAPPERS)
        if name in found:
            raise CheckpointError(f"{path} holds {shown(name)} twice, with and without the names of wrappers")
        if name != "n_averaged":  # the counter of torch.optim.swa_utils.AveragedModel
            found[name] = value
    return found


def _inside(bounds: Any) -> float:
    """Any step size that bounds let through, until it is loaded."""
    low, high = (-math.inf, math.inf) if bounds is None else bounds
    return low if math.isfinite(low) else high if math.isfinite(high) else 1.0
