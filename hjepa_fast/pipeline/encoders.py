"""Frozen V-JEPA 2 encoders: from the hub, from a local folder, or the small untrained one shipped here."""

from __future__ import annotations

import contextlib
from collections.abc import Iterator
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from ..errors import EncoderError, HJEPAError, MissingDependencyError, UsageError
from . import encoder_files
from .config import OFFLINE_ENCODER

_DTYPES = {"float32": torch.float32, "float16": torch.float16, "bfloat16": torch.bfloat16}


@dataclass(frozen=True)
class Encoder:
    """A frozen V-JEPA 2 encoder; a clip's latent is the mean of its output tokens.

    Attributes
    ----------
    model : transformers.VJEPA2Model on `device`, in `dtype`
    crop : side of the square input in pixels
    clip_frames : frames per clip that the checkpoint was made for
    tubelet_size : frames per token; a clip's length must be a multiple of it
    latent_dim : size of a latent
    label : what to call the encoder in results, for example "offline (untrained random features)"
    provenance : see `encoder_provenance`
    """

    model: Any
    crop: int
    clip_frames: int
    tubelet_size: int
    latent_dim: int
    device: torch.device
    dtype: torch.dtype
    label: str
    provenance: dict[str, str | None]

    def __call__(self, clips: Tensor) -> Tensor:
        """Encode `clips`, floating-point [N, T, 3, crop, crop], to float32 [N, latent_dim] on the CPU.

        The frames are preprocessed ones; T is a multiple of `tubelet_size`. EncoderError if the shape is another.
        """
        fits = clips.ndim == 5 and clips.shape[2:] == (3, self.crop, self.crop)
        if not fits or clips.shape[1] == 0 or clips.shape[1] % self.tubelet_size:
            raise EncoderError(
                f"clips must be [N, T, 3, {self.crop}, {self.crop}] with T a multiple of {self.tubelet_size}, "
                f"found {list(clips.shape)}"
            )
        with torch.inference_mode():
            tokens = self.model(clips.to(self.device, self.dtype), skip_predictor=True).last_hidden_state
            return tokens.mean(dim=1, dtype=torch.float32).cpu()


def load_encoder(name: str, revision: str = "main", device: str = "auto", dtype: str = "auto", fetch: bool = True) -> Encoder:
    """Load a frozen encoder.

    "offline" and local folders never touch the network. A hub checkpoint is taken from the local cache if it is there.

    Parameters
    ----------
    name : str
        "offline", a folder holding a V-JEPA 2 checkpoint, or the name of one on the Hugging Face hub.
    revision : str
        Branch, tag or commit of a hub checkpoint.
    device : str
        "auto" (CUDA, else MPS, else CPU) or a torch device.
    dtype : str
        "auto" (float16 on a GPU, float32 on a CPU), "float32", "float16" or "bfloat16".
    fetch : bool
        Whether a checkpoint that is not in the local cache may be had from the hub. False where a file names the encoder,
        and not the user.

    Raises
    ------
    EncoderError
        The checkpoint cannot be found or reached, is not V-JEPA 2, or lacks encoder weights.
    UsageError
        The device or dtype cannot be used.
    MissingDependencyError
        transformers is not installed.
    """
    torch_device = resolve_device(device)
    torch_dtype = _resolve_dtype(dtype, torch_device)
    try:
        from transformers import VJEPA2Model
    except ImportError as error:
        raise MissingDependencyError("encoding needs transformers: pip install 'hjepa_fast[pipeline]'") from error
    local = encoder_files.local_folder(name)
    folder = local or encoder_files.cached_folder(name, revision)
    if folder is None and not fetch:
        raise EncoderError(
            f"encoder {name} (revision {revision}) is named by a file, and is not in the local cache: what a file names is not "
            f"fetched. Give --encoder {name} to have it from the hub"
        )
    folder = folder or encoder_files.download(name, revision)
    try:
        encoder_files.check(folder)
    except HJEPAError as error:
        raise EncoderError(f"encoder {name}: {error}") from error
    try:
        with _quiet_transformers():
            loaded: Any = VJEPA2Model.from_pretrained(
                folder,
                local_files_only=True,
                use_safetensors=True,
                attn_implementation="sdpa",
                dtype=torch_dtype,
                output_loading_info=True,
            )
        model, info = loaded
        # Only encoder keys matter: the predictor is never run, and a classification checkpoint has keys of its own.
        missing = sorted(key for key in info["missing_keys"] if key.startswith("encoder."))
        if missing:
            raise EncoderError(f"{len(missing)} encoder weights are missing, such as {missing[0]}")
        model = model.eval().requires_grad_(False).to(torch_device)
    except Exception as error:
        raise EncoderError(f"encoder {name} cannot be loaded from {folder}: {error}") from error
    if name == OFFLINE_ENCODER:
        label = "offline (untrained random features)"
    else:
        label = f"local checkpoint {local.name} (V-JEPA 2 architecture)" if local else f"{name} (V-JEPA 2)"
    return Encoder(
        model=model,
        crop=model.config.crop_size,
        clip_frames=model.config.frames_per_clip,
        tubelet_size=model.config.tubelet_size,
        latent_dim=model.config.hidden_size,
        device=torch_device,
        dtype=torch_dtype,
        label=label,
        provenance=encoder_files.provenance(name, revision, folder) | {"dtype": _dtype_name(torch_dtype)},
    )


def encoder_provenance(name: str, revision: str = "main", device: str = "auto", dtype: str = "auto") -> dict[str, str | None]:
    """What `load_encoder` with the same arguments would record, without loading the model or touching the network.

    Returns
    -------
    dict
        "model", "revision" and "commit" (hub checkpoints only; the commit is None if the checkpoint is not in the
        local cache), "weights_sha256" and "config_sha256" (the offline encoder and local folders only), "dtype".

    Raises
    ------
    EncoderError, UsageError
        As `load_encoder`.
    """
    torch_dtype = _resolve_dtype(dtype, resolve_device(device))
    folder = encoder_files.local_folder(name) or encoder_files.cached_folder(name, revision)
    return encoder_files.provenance(name, revision, folder) | {"dtype": _dtype_name(torch_dtype)}


def resolve_device(device: str) -> torch.device:
    """The torch device that `device` names; "auto" is CUDA, else MPS, else the CPU. UsageError if it is not there."""
    cuda, mps = torch.cuda.is_available(), torch.backends.mps.is_available()
    if device == "auto":
        return torch.device("cuda" if cuda else "mps" if mps else "cpu")
    try:
        found = torch.device(device)
    except RuntimeError as error:
        raise UsageError(f"device {device!r} is not a torch device; use auto, cpu, cuda or mps") from error
    counts = {"cpu": 1, "cuda": torch.cuda.device_count() if cuda else 0, "mps": int(mps)}
    if (found.index or 0) >= counts.get(found.type, 0):
        raise UsageError(f"device {device!r} is not available here; available: {[k for k, n in counts.items() if n]}")
    return found


def _dtype_name(dtype: torch.dtype) -> str:
    return str(dtype).removeprefix("torch.")


def _resolve_dtype(dtype: str, device: torch.device) -> torch.dtype:
    if dtype == "auto":
        return torch.float32 if device.type == "cpu" else torch.float16
    if dtype not in _DTYPES:
        raise UsageError(f"encoder dtype {dtype!r} is not one of auto, {', '.join(_DTYPES)}")
    return _DTYPES[dtype]


@contextlib.contextmanager
def _quiet_transformers() -> Iterator[None]:
    """Without its progress bars and its report of unused keys; both are as before afterwards."""
    from transformers.utils import logging

    verbosity, bars = logging.get_verbosity(), logging.is_progress_bar_enabled()
    logging.set_verbosity_error()
    logging.disable_progress_bar()
    try:
        yield
    finally:
        logging.set_verbosity(verbosity)
        if bars:
            logging.enable_progress_bar()
