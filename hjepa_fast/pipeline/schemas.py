"""What files hold: a schema for each, checked where the file is read. Import inside functions: pydantic is not light."""

from __future__ import annotations

from collections.abc import Collection
from typing import Annotated, Any

from torch import Tensor

from ..errors import HJEPAError, MissingDependencyError, UsageError
from .config import DataConfig, TrainConfig, coerce_known, is_line, shown

try:
    from pydantic import AfterValidator, BaseModel, ConfigDict, Field, ValidationError
except ImportError as error:
    raise MissingDependencyError("reading runs and latents needs pydantic: pip install 'hjepa_fast[pipeline]'") from error

MOST_DIMENSIONS = 2**16
"""Of a latent."""


def _line(text: str) -> str:
    if not is_line(text):
        raise ValueError("expected a line of text without control characters")
    return text


Line = Annotated[str, Field(max_length=1000), AfterValidator(_line)]
Number = Annotated[float, Field(allow_inf_nan=False)]
Positive = Annotated[int, Field(ge=1, le=10**9)]


class _Schema(BaseModel):
    """Types are as they are in JSON, without conversion; what a later version adds is let through."""

    model_config = ConfigDict(strict=True, extra="allow", protected_namespaces=())


class Encoding(_Schema):
    """How latents were made."""

    model: Line
    clip_frames: Annotated[int, Field(ge=1, le=4096)]
    clip_stride: Annotated[int, Field(ge=1, le=10**6)] | None = None
    revision: Line | None = None
    commit: Line | None = None
    dtype: Line | None = None
    weights_sha256: Line | None = None
    config_sha256: Line | None = None
    scene: dict[str, Any] | None = None  # of the encoder "state", read by `scenes.read`
    source: Annotated[str, Field(max_length=1000)] | None = None  # a file's name, whatever its characters
    source_sha256: Line | None = None


class LatentFacts(_Schema):
    """Of a latent file; its numbers are text in the file."""

    provenance: Encoding
    label: Line
    fps: Annotated[float, Field(gt=0, allow_inf_nan=False)]
    n_frames: Positive


class Control(_Schema):
    """What acted on the system in a video, a row a frame."""

    about: Annotated[str, Field(max_length=1000)] = ""
    control: Annotated[
        list[Annotated[list[Number], Field(min_length=1, max_length=1000)]], Field(min_length=1, max_length=10**6)
    ]


class VideoSettings(_Schema):
    """What a generated video was made with, as far as it is used again."""

    size: Annotated[int, Field(ge=2, le=8192)]
    fps: Annotated[int, Field(ge=1, le=1000)]


class Epoch(_Schema):
    """A row of a training's history."""

    epoch: Positive
    lr: Number
    energy_weight: Number
    train_loss: Number
    train_mse: Number
    train_energy: Number
    test_mse: Number
    dt: Number | None
    seconds: Number


class CheckpointFacts(_Schema):
    """Of a checkpoint."""

    model: Line
    latent_dim: Annotated[int, Field(ge=1, le=MOST_DIMENSIONS)]
    encoder: Line
    hamiltonian: Line | None = None
    integrator: Line | None = None
    friction: Line | None = None
    control_dim: Annotated[int, Field(ge=0, le=1000)] = 0
    encoding: Encoding | None = None
    train: dict[str, Any] = Field(default_factory=dict)
    data: dict[str, Any] = Field(default_factory=dict)
    data_fingerprint: Line = ""
    epoch: Annotated[int, Field(ge=0, le=10**9)] = 0
    history: list[Epoch] = Field(default_factory=list)


class Inputs(_Schema):
    """The folders that a run uses."""

    videos: Line | None
    latents: Line


class Step(_Schema):
    """How long a latent step is."""

    frames: Annotated[int, Field(ge=1, le=10**6)] | None
    seconds: Annotated[float, Field(gt=0, allow_inf_nan=False)] | None


class Motion(_Schema):
    """Of a run's comparison with the true motion."""

    horizons: Annotated[list[Positive], Field(min_length=1, max_length=1000)]
    conservative: bool
    energy_scale: Annotated[float, Field(gt=0, allow_inf_nan=False)]


class MotionRow(_Schema):
    """A model beside the true motion; by numbers of steps."""

    error: dict[str, Number | None]
    lost: dict[str, int]
    energy_drift: Number | None


class SummaryRow(_Schema):
    """A model in a run's summary."""

    name: Line
    title: Line
    mse_mean: Number | None
    mse_std: Number | None
    drift_mean: Number | None
    drift_std: Number | None
    mse_relative: Number | None
    energy_std: Number | None
    drift_extended_mean: Number | None
    epochs_done: Annotated[int, Field(ge=0, le=10**9)] | None = None
    epochs_asked: Positive | None = None
    finished: bool = True
    motion: MotionRow | None = None


class IntegratorRow(_Schema):
    """An integrator in a run's summary."""

    integrator: Line
    trained: bool


class Summary(_Schema):
    """What figures use of a run's summary."""

    encoder: Line
    split: Line
    standardized: bool
    n_test: Positive
    n_steps: Positive
    extended_steps: Positive
    extended_windows: Positive
    models: Annotated[list[SummaryRow], Field(min_length=1, max_length=1000)]
    integrators: Annotated[list[IntegratorRow], Field(max_length=1000)]
    missing: Annotated[list[Line], Field(max_length=1000)] | None = None
    checkpoints: dict[str, Line] = Field(default_factory=dict)
    arrays_sha256: Line | None = None
    step: Step | None = None
    motion: Motion | None = None


class EncoderConfig(_Schema):
    """What an encoder's config.json may ask to be built."""

    model_type: Line
    hidden_size: Annotated[int, Field(ge=1, le=16384)] = 1024
    num_hidden_layers: Annotated[int, Field(ge=1, le=256)] = 24
    num_attention_heads: Annotated[int, Field(ge=1, le=1024)] = 16
    mlp_ratio: Annotated[float, Field(gt=0, le=64)] = 4.0
    crop_size: Annotated[int, Field(ge=1, le=4096)] = 256
    patch_size: Annotated[int, Field(ge=1, le=4096)] = 16
    tubelet_size: Annotated[int, Field(ge=1, le=1024)] = 2
    frames_per_clip: Annotated[int, Field(ge=1, le=4096)] = 64
    in_chans: Annotated[int, Field(ge=3, le=3)] = 3
    pred_hidden_size: Annotated[int, Field(ge=1, le=16384)] = 384
    pred_num_hidden_layers: Annotated[int, Field(ge=0, le=256)] = 12
    pred_num_attention_heads: Annotated[int, Field(ge=1, le=1024)] = 12
    pred_num_mask_tokens: Annotated[int, Field(ge=0, le=1024)] = 10
    pred_mlp_ratio: Annotated[float, Field(gt=0, le=64)] = 4.0
    num_pooler_layers: Annotated[int, Field(ge=0, le=256)] = 3


def check(schema: type[_Schema], value: Any, source: str, error: type[HJEPAError] = HJEPAError) -> dict[str, Any]:
    """`value` if it fits `schema`, with the defaults of what it lacks at its first level.

    Raises
    ------
    HJEPAError, or `error`
        It does not; the message starts with `source` and says where, what was expected and what was found.
    """
    try:
        checked = schema.model_validate(value)
    except ValidationError as failure:
        first = failure.errors(include_url=False)[0]
        place = ".".join(map(str, first["loc"]))[:200]
        found = "" if first["type"] == "missing" else f", found {shown(first['input'])}"
        raise error(f"{source}: {place + ': ' if place else ''}{first['msg']}{found}") from None
    return {name: getattr(checked, name) for name in schema.model_fields if name not in value} | value


def check_arrays(summary: dict[str, Any], arrays: dict[str, Tensor], known: Collection[str], source: str) -> None:
    """A run's arrays must be those that its summary speaks of; `known` are the names that a model can have.

    Raises
    ------
    HJEPAError
        They are not; the message names the first that is missing or of another shape.
    """
    names, compared = ([row[key] for row in summary[part]] for part, key in (("models", "name"), ("integrators", "integrator")))
    if unknown := [name for name in names if name not in known]:
        raise HJEPAError(f"{source}: unknown model {shown(unknown[0])}; known: {', '.join(known)}")
    if compared and not any(row["trained"] for row in summary["integrators"]):
        raise HJEPAError(f"{source}: no integrator is the one that the network was trained with")
    wanted = ["true/example", *(f"{name}/{key}" for name in names for key in ("step_mse", "example"))]
    wanted += [f"{name}/{key}" for name in names if f"{name}/energy" in arrays for key in ("energy_true", "energy_extended")]
    wanted += [f"{name}/{key}" for name in names if f"{name}/change" in arrays for key in ("change", "change_true")]
    wanted += [f"integrators/{name}/energy" for name in compared]
    if summary.get("motion"):
        wanted += ["true/motion", "true/motion_energy"]
        wanted += [f"{name}/{key}" for name in names for key in ("motion", "motion_error", "motion_energy")]
        steps = {str(step) for step in summary["motion"]["horizons"]}
        for row in summary["models"]:
            found = row.get("motion") or {"error": {}, "lost": {}}
            if not steps <= found["error"].keys() & found["lost"].keys():
                raise HJEPAError(f"{source}: the summary does not say how {shown(row['name'])} compares with the true motion")
    for name in wanted:
        found = arrays.get(name)
        if found is None or found.ndim != 2 or not found.numel() or not found.is_floating_point():
            what = "absent" if found is None else f"{found.dtype} {list(found.shape)}"
            raise HJEPAError(f"{source}: expected floating-point numbers [n, m] in {shown(name)}, found {what}")
        if name.endswith("/example") and (found.shape[1] != arrays["true/example"].shape[1] or found.shape[1] < 2):
            raise HJEPAError(f"{source}: {name} has latents of {found.shape[1]} dimensions, another number than true/example")
    if summary.get("motion"):
        for key in ("motion", "motion_energy"):
            shapes = [list(arrays[f"{name}/{key}"].shape) for name in ("true", *names)]
            if key == "motion_energy":
                shapes += [list(arrays[f"{name}/motion_error"].shape) for name in names]
            if other := next((shape for shape in shapes if shape != shapes[0]), None):
                raise HJEPAError(f"{source}: arrays of {key} differ in shape: {shapes[0]} and {other}")
    for name in names:
        if f"{name}/energy" in arrays and arrays[f"{name}/energy"].shape != arrays[f"{name}/energy_true"].shape:
            raise HJEPAError(f"{source}: {name}/energy and {name}/energy_true differ in shape")


def checkpoint_facts(facts: Any, source: str, error: type[HJEPAError]) -> dict[str, Any]:
    """The facts of a checkpoint; its recorded settings with the defaults of those that an older version did not write."""
    known = check(CheckpointFacts, facts, source, error)
    try:
        for key, kind in (("train", TrainConfig), ("data", DataConfig)):
            known[key] = known[key] and coerce_known(kind, known[key], f"{source}: {key}")
    except UsageError as failure:
        raise error(str(failure)) from failure
    rows = [row["epoch"] for row in known["history"]]
    if rows != list(range(1, len(rows) + 1)) or (rows and known["epoch"] != len(rows)):
        raise error(f"{source}: history: expected one row an epoch, from 1 to {known['epoch']}, found {shown(rows)}")
    return known
