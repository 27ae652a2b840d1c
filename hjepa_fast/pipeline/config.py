"""Every number of the pipeline, once. The command line's options and their defaults are made from these fields."""

from __future__ import annotations

import dataclasses
import math
import types
import typing
import unicodedata
from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Any, Literal

from ..api import Backend
from ..errors import UsageError
from ..integrators import DT_BOUNDS
from ..models import GAIN
from ..schemes import SCHEMES

PUBLISHED_ENCODER = "facebook/vjepa2-vitl-fpc16-256-ssv2"
OFFLINE_ENCODER = "offline"
STATE_ENCODER = "state"
OWN_INTEGRATOR = "auto"


MANY = 1_000_000
"""More than any count of frames, latents, steps or runs that makes sense."""
SEEDS = 2**32
MOST_VALUES = 1000
"""Numbers in a list, or characters in a text."""


def _option(default: Any, help: str, most: float = math.inf) -> Any:
    """A field; `most` is the largest value, of either sign, that a file or an option may give it."""
    return field(default=default, metadata={"help": help, "most": most})


@dataclass(frozen=True)
class VideoConfig:
    """Synthetic clips of balls in a square frame (the published setting is the default)."""

    scene: Literal["collisions", "pendulum", "springs", "orbit"] = _option(
        "collisions", "what moves: balls that collide in a box, as published, or one of the smooth scenes"
    )
    n_videos: int = _option(50, "number of videos", most=MANY)
    n_frames: int = _option(150, "frames per video", most=MANY)
    n_balls: int = _option(2, "balls of collisions and springs; the published videos have 2", most=1000)
    radius: tuple[float, ...] = _option((20.0,), "ball radius in pixels: one value, or one per ball", most=4096)
    size: int = _option(256, "side of the square frame in pixels, even", most=8192)
    fps: int = _option(30, "frames per second", most=1000)
    background: Literal["black", "gradient"] = _option("black", "black as published, or a smooth static colour gradient")
    video_seed: int = _option(42, "seed of the initial velocities and positions, and of the force", most=SEEDS)
    restitution: float = _option(
        1.0, "normal speed after a collision, with a wall or a ball, over that before it; 1 is elastic, as published", most=1
    )
    drag: float = _option(0.0, "linear drag: the rate, per frame, at which every ball's velocity decays", most=10)
    force: float = _option(
        0.0,
        "size of the force per mass that pushes all balls alike, in pixels per frame^2; its direction is random, and the "
        "pendulum's torque is its horizontal part",
        most=100,
    )
    force_frames: int = _option(15, "frames for which the direction of the force is held", most=MANY)


@dataclass(frozen=True)
class EncodeConfig:
    """Clips of consecutive frames to one latent each."""

    encoder: str = _option(
        PUBLISHED_ENCODER,
        "hub name or folder of a V-JEPA 2 checkpoint, 'offline' for the small untrained one shipped here, or 'state' for the "
        "true states (q, p) of generated videos instead",
    )
    revision: str = _option("main", "revision of a hub checkpoint")
    clip_frames: int = _option(16, "consecutive frames in a clip; 'state' takes one, the clip's first", most=4096)
    clip_stride: int = _option(4, "frames between the starts of two clips", most=MANY)
    encode_batch: int = _option(8, "clips encoded at once", most=4096)
    encode_dtype: Literal["auto", "float32", "float16", "bfloat16"] = _option(
        "auto", "encoder precision; auto is float16 on a GPU and float32 on a CPU"
    )


@dataclass(frozen=True)
class DataConfig:
    """Latents to training windows."""

    window: int = _option(16, "consecutive latents in a training window", most=MANY)
    split: Literal["video", "window"] = _option(
        "video", "what the test set is made of: whole videos, or windows as published (overlapping windows leak)"
    )
    test_fraction: float = _option(0.2, "share of videos or windows held out")
    split_seed: int = _option(42, "seed of the split", most=SEEDS)
    standardize: bool = _option(
        True,
        "standardise each latent dimension with training statistics, of true states all q alike and all p alike, and scale "
        "controls (published: off)",
    )
    stream: Literal["off", "windows", "blocks"] = _option(
        "off",
        "off reads all latents into memory; windows reads each batch from its files, in the same order; blocks reads parts of "
        "videos in a random order and shuffles within as many as fit into memory, for storage that is slow at single windows",
    )
    control: Literal["none", "recorded"] = _option(
        "none", "control of the models with a Hamiltonian: none, or what is recorded beside each video as NAME.control.json"
    )


@dataclass(frozen=True)
class TrainConfig:
    """Optimisation, shared by all models."""

    epochs: int = _option(50, "passes over the training windows", most=50_000)
    batch_size: int = _option(32, "windows per step; the last incomplete batch is dropped", most=MANY)
    lr: float = _option(1e-3, "AdamW's learning rate at the start")
    lr_end: float = _option(1e-5, "learning rate that the schedule ends at")
    lr_schedule: Literal["cosine", "constant", "one-cycle"] = _option(
        "cosine",
        "learning rate of the epochs: cosine annealing from --lr to --lr-end, as published; constant; or one-cycle, which "
        "rises to --lr over the first three tenths of the epochs, from a 25th of it",
    )
    warmup: float = _option(
        0.0, "share of the epochs, at the start, over which the learning rate of a cosine or constant schedule rises linearly"
    )
    matching: float = _option(
        0.0,
        "share of the epochs, at the start, that match the single steps between all consecutive states of the windows; "
        "rollouts follow (published: none)",
    )
    horizon_curriculum: float = _option(
        0.0,
        "share of the epochs, after those of matching, over which the loss's rollouts grow from one step to the window's; "
        "0, as published: the window's from the start",
    )
    starts: Literal["first", "all"] = _option(
        "first",
        "where a window's rollouts start while they are shorter than it: at its first state, or one after the other until "
        "its end",
    )
    weight_decay: float = _option(1e-5, "AdamW's weight decay")
    grad_clip: float = _option(1.0, "largest gradient norm, for the network and for dt separately")
    energy_weight_start: float = _option(0.1, "weight lambda of the energy loss in the first epoch")
    energy_weight_end: float = _option(1.0, "weight lambda of the energy loss in the last epoch")
    energy_reference: Literal["z1", "z0"] = _option(
        "z1", "state that the energy loss compares with: the first prediction (notebook) or the initial state (paper, eq. 7)"
    )
    integrator: str = _option(
        OWN_INTEGRATOR,
        "integrator of the full model, 'hnn', alone: auto, which is the published leapfrog, or one of "
        f"{', '.join(SCHEMES)}; the other models keep the integrator that they are there to show",
    )
    friction: Literal["none", "conformal", "rayleigh"] = _option(
        "none", "learnable friction g >= 0 of the models with a Hamiltonian: none, conformal (g p) or rayleigh (g Hp)"
    )
    friction_per_dimension: bool = _option(False, "a coefficient of friction for each momentum, not one for all")
    widths: tuple[int, ...] | None = _option(
        None,
        "widths of the hidden layers (of T and of V in a separable H), or none: each model's published ones",
        most=MANY,
    )
    activation: Literal["published", "softplus", "tanh", "silu", "gelu", "elu", "sin", "sigmoid"] = _option(
        "published", "of the hidden layers: published is softplus in a Hamiltonian and ReLU in the other models"
    )
    gain: float = _option(GAIN, "gain of the Xavier-normal initial weights of the models with a Hamiltonian", most=1000)
    sub_steps: int = _option(
        1, "steps of the integrator, each by dt over this number, in a step from one latent to the next", most=1000
    )
    dt: float = _option(1.0, "initial step size")
    learn_dt: bool = _option(True, "learn the step size, as published, or keep it")
    dt_bounds: tuple[float, float] | None = _option(
        DT_BOUNDS, "smallest and largest step size that is used, which dt is clamped to, or none for no clamp"
    )
    seed: int = _option(42, "seed of initial weights and batch order", most=SEEDS)
    backend: Backend = _option(  # noqa: RUF009  (a string)
        "auto", "what computes the rollouts; auto is the fastest that is there, reference is nested autograd"
    )
    amp: Literal["off", "bfloat16"] = _option("off", "autocast for the forward pass")


@dataclass(frozen=True)
class EvaluateConfig:
    """What is measured after training."""

    extended_steps: int = _option(
        1000, "steps of the extended rollouts, of which only energies are kept (published: 50)", most=MANY
    )
    dream_steps: int = _option(20, "steps of a free rollout from one state", most=MANY)
    timing_warmup: int = _option(10, "rollouts before timing starts", most=MANY)
    timing_runs: int = _option(100, "timed rollouts; the median is reported", most=MANY)


def _world(friction: str = "none", control: str = "none", **videos: float) -> dict[str, dict[str, Any]]:
    published = {name: getattr(VideoConfig(), name) for name in ("restitution", "drag", "force")}
    return {"videos": published | videos, "data": {"control": control}, "train": {"friction": friction}}


def _recipe(**settings: Any) -> dict[str, dict[str, Any]]:
    published = {name: getattr(TrainConfig(), name) for name in _RECIPE_FIELDS}
    assert settings.keys() <= published.keys()
    return {"train": published | settings}


_RECIPE_FIELDS = (
    "lr", "lr_end", "lr_schedule", "warmup", "weight_decay", "energy_weight_start", "energy_weight_end",
    "matching", "horizon_curriculum", "starts", "widths", "activation", "gain", "sub_steps", "dt", "learn_dt",
    "integrator", "batch_size",
)  # fmt: skip
"""Settings of TrainConfig that make a recipe; for how many epochs is another question."""

RECIPES = {
    "published": _recipe(),
    "smooth": _recipe(
        batch_size=64,
        lr=2e-2,
        lr_end=1e-5,
        warmup=0.05,
        energy_weight_start=0.0,
        energy_weight_end=0.0,
        matching=1.0,
        widths=(128, 128),
        activation="gelu",
        gain=2.0,
        learn_dt=False,
        integrator="implicit-midpoint",
    ),
}
"""Settings of `--recipe`: how models are trained. published is H-JEPA's; smooth is for latents that are canonical states."""


def recipe_of(train: TrainConfig) -> str:
    """The recipe that a training's settings are, or "own" if they are none's."""
    found = {name: getattr(train, name) for name in _RECIPE_FIELDS}
    return next((name for name, recipe in RECIPES.items() if recipe["train"] == found), "own")


WORLDS = {
    "elastic": _world(),
    "damped": _world("conformal", restitution=0.9, drag=0.01),
    "driven": _world(control="recorded", force=0.1),
}
"""Settings of `--world`: what the synthetic balls live in, and the friction and control of models for it."""
_SMOOTH = {
    "pendulum": {"drag": 0.01, "force": 0.1},
    "springs": {"drag": 0.01, "force": 0.03},
    "orbit": {"drag": 0.001, "force": 0.02},
}
"""Drag and force of the smooth scenes' damped and driven worlds, with which they stay inside the frame."""


def world(name: str, scene: str) -> dict[str, dict[str, Any]]:
    """The settings of `WORLDS` for a scene: in a smooth one nothing collides, and drag and force have values of their own."""
    settings = WORLDS[name]
    if scene not in _SMOOTH:
        return settings
    own = {key: value if settings["videos"][key] else 0.0 for key, value in _SMOOTH[scene].items()}
    return settings | {"videos": {"restitution": 1.0, **own}}


@dataclass(frozen=True)
class Config:
    """A whole run; `config.json` in a run's folder holds exactly this."""

    videos: VideoConfig = VideoConfig()
    encode: EncodeConfig = EncodeConfig()
    data: DataConfig = DataConfig()
    train: TrainConfig = TrainConfig()
    evaluate: EvaluateConfig = EvaluateConfig()

    def to_dict(self) -> dict[str, Any]:
        """Nested plain values, as written to `config.json`."""
        return dataclasses.asdict(self)

    @classmethod
    def from_dict(cls, values: Mapping[str, Any], source: str) -> Config:
        """Build from nested plain values; missing fields take their defaults, unknown ones are refused.

        Raises:
            UsageError: an unknown section or field, or a value of the wrong type; `source` names the file.
        """
        if not isinstance(values, Mapping):
            raise UsageError(f"{source}: a configuration is a JSON object, found {type(values).__name__}")
        sections = {f.name: f.default for f in dataclasses.fields(cls)}
        _refuse_unknown(values, sections, source, "section")
        return cls(**{name: _section(type(default), values.get(name, {}), f"{source}: {name}")
                      for name, default in sections.items()})  # fmt: skip


def _refuse_unknown(values: Mapping[str, Any], known: Mapping[str, Any], source: str, what: str) -> None:
    unknown = sorted(set(values) - set(known))
    if unknown:
        raise UsageError(f"{source}: unknown {what} {', '.join(unknown)}; known: {', '.join(known)}")


def _section(kind: type, values: Any, source: str) -> Any:
    if not isinstance(values, Mapping):
        raise UsageError(f"{source}: expected a JSON object, found {type(values).__name__}")
    hints = typing.get_type_hints(kind)
    _refuse_unknown(values, hints, source, "field")
    most = {f.name: f.metadata["most"] for f in dataclasses.fields(kind)}
    return kind(**{name: coerce(hints[name], value, f"{source}.{name}", most[name]) for name, value in values.items()})


def coerce(hint: Any, value: Any, source: str, most: float = math.inf) -> Any:
    """Check `value` against a field's type, turning lists into tuples and ints into floats.

    Raises:
        UsageError: the value does not fit, is not finite, or is larger than `most`; the message starts with `source`.
    """
    origin, parts = typing.get_origin(hint), typing.get_args(hint)
    if origin is Literal:
        if isinstance(value, str) and value in parts:
            return value
        raise UsageError(f"{source}: {shown(value)} is not one of {', '.join(map(str, parts))}")
    if origin is tuple:
        lengths = range(1, MOST_VALUES + 1) if parts[-1] is Ellipsis else (len(parts),)
        if not isinstance(value, (list, tuple)) or len(value) not in lengths:
            expected = "a list of" if parts[-1] is Ellipsis else len(parts)
            raise UsageError(f"{source}: expected {expected} numbers, found {shown(value)}")
        return tuple(coerce(parts[0], item, source, most) for item in value)
    if origin in (typing.Union, types.UnionType):
        return None if value is None else coerce(next(a for a in parts if a is not type(None)), value, source, most)
    if hint is float and isinstance(value, int) and not isinstance(value, bool):
        value = math.inf if abs(value) > 1e300 else float(value)
    if not isinstance(value, hint) or (hint is int and isinstance(value, bool)):
        raise UsageError(f"{source}: expected {hint.__name__}, found {shown(value)}")
    if isinstance(value, float) and not math.isfinite(value):
        raise UsageError(f"{source}: expected a finite number, found {value}")
    if isinstance(value, (int, float)) and abs(value) > most:
        raise UsageError(f"{source}: expected at most {most:,}, found {shown(value)}")
    if isinstance(value, str) and not (len(value) <= MOST_VALUES and is_line(value.encode("utf-8", "replace").decode())):
        raise UsageError(f"{source}: expected a line of text, found {shown(value)}")
    return value


def coerce_known(kind: type, values: Any, source: str) -> dict[str, Any]:
    """A section as it was recorded, perhaps by another version: fields it lacks have defaults, unknown ones are kept.

    Raises:
        UsageError: a known field has a value that does not fit.
    """
    names = {f.name for f in dataclasses.fields(kind)}
    return values | dataclasses.asdict(_section(kind, {k: v for k, v in values.items() if k in names}, source))


def is_line(text: str) -> bool:
    """Whether a text can be shown and written: no control characters, no halves of surrogate pairs."""
    return not any(unicodedata.category(c) in ("Cc", "Cs", "Zl", "Zp") for c in text)


def shown(value: Any) -> str:
    """A value in an error message: its first characters, and never an integer that Python refuses to print."""
    try:
        text = repr(value)
    except ValueError:
        return "a number of thousands of digits"
    return text if len(text) <= 120 else f"{text[:120]}..."
