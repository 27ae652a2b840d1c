"""Where an encoder's checkpoint is: shipped here, in a local folder, in the hub's local cache, or on the hub."""

from __future__ import annotations

import hashlib
import math
from pathlib import Path

from ..errors import EncoderError, HJEPAError
from . import files, offline_encoder, untrusted
from .config import OFFLINE_ENCODER, STATE_ENCODER, shown

HUB_TIMEOUT = 10.0
"""Seconds to wait for the hub's first answer."""

HUB_FILES = ["config.json", "model*.safetensors", "model.safetensors.index.json"]


def local_folder(name: str) -> Path | None:
    """The folder that an encoder's name stands for, or None for a hub name (owner/model).

    Raises
    ------
    EncoderError
        `name` is neither.
    """
    if name == OFFLINE_ENCODER:
        return offline_encoder.FOLDER
    if name == STATE_ENCODER:
        raise EncoderError(f"{name!r} stands for the true states of generated videos and no encoder; a folder is ./{name}")
    path = Path(name).expanduser()
    if path.is_dir():
        return path.resolve()
    if path.exists() or name.startswith((".", "/", "~")) or len(path.parts) != 2:
        raise EncoderError(f"encoder {name!r} is neither a folder, nor a hub name (owner/model), nor {OFFLINE_ENCODER!r}")
    return None


def cached_folder(name: str, revision: str) -> Path | None:
    """A hub checkpoint's folder in the local cache, named by its commit; None if it is not there. No network."""
    try:
        from huggingface_hub import snapshot_download

        folder = Path(snapshot_download(name, revision=revision, allow_patterns=HUB_FILES, local_files_only=True))
    except (ImportError, OSError, ValueError):
        return None
    return folder if any(folder.glob("model*.safetensors")) else None


def download(name: str, revision: str) -> Path:
    """Fetch a hub checkpoint to the local cache; return its folder, named by its commit.

    Raises
    ------
    EncoderError
        The hub or the checkpoint cannot be reached; the message names the ways out.
    """
    from huggingface_hub import HfApi, snapshot_download

    try:
        # One request without retries, so that a missing network or model is reported at once.
        HfApi().model_info(name, revision=revision, timeout=HUB_TIMEOUT)
        return Path(snapshot_download(name, revision=revision, allow_patterns=HUB_FILES))
    except Exception as error:
        reason = (str(error).strip() or type(error).__name__).splitlines()[0]
        raise EncoderError(
            f"encoder {name} (revision {revision}) is not in the local cache and cannot be had from the hub: {reason}. "
            "Point --encoder at a local folder holding the checkpoint (config.json and model.safetensors), "
            f"or use --encoder {OFFLINE_ENCODER} for the small untrained one."
        ) from error


def provenance(name: str, revision: str, folder: Path | None) -> dict[str, str | None]:
    """What identifies the checkpoint in `folder` (None: a hub checkpoint that is not in the local cache).

    Raises
    ------
    EncoderError
        A local folder does not hold a checkpoint.
    """
    local = local_folder(name)
    if local is None:
        return {"model": name, "revision": revision, "commit": folder.name if folder else None}
    digests = [file_sha256(file) for file in weight_files(local)]
    return {
        "model": name if name == OFFLINE_ENCODER else local.name,
        "weights_sha256": digests[0] if len(digests) == 1 else hashlib.sha256("".join(digests).encode()).hexdigest(),
        "config_sha256": file_sha256(local / "config.json"),
    }


def weight_files(folder: Path) -> list[Path]:
    """The checkpoint's safetensors files; EncoderError if `folder` lacks them or config.json."""
    found = sorted(folder.glob("model*.safetensors"))
    if not found or not (folder / "config.json").is_file():
        raise EncoderError(f"{folder} is not an encoder: it must hold config.json and model.safetensors")
    return found


def check(folder: Path) -> None:
    """What a reader of the checkpoint would build and open, before it does.

    Raises
    ------
    EncoderError
        The files are missing or damaged, config.json is not V-JEPA 2's or asks for more than its weights can fill, or the
        index of a sharded checkpoint names files outside the folder.
    """
    from . import schemas

    try:
        headers = [untrusted.check_header(file, "encoder weights") for file in weight_files(folder)]
        config = files.read_json(folder / "config.json", "encoder configuration")
        model_type = config.get("model_type") if isinstance(config, dict) else None
        if model_type != "vjepa2":
            raise EncoderError(
                f"{folder} is not a V-JEPA 2 model: its config.json says model_type {shown(model_type)}, not 'vjepa2'"
            )
        config = schemas.check(schemas.EncoderConfig, config, str(folder / "config.json"), EncoderError)
        index = folder / "model.safetensors.index.json"
        shards = files.read_json(index, "index of weights") if index.exists() else {"weight_map": {}}
    except HJEPAError as error:
        raise EncoderError(str(error)) from error
    names = shards.get("weight_map") if isinstance(shards, dict) else None
    if not isinstance(names, dict) or not all(isinstance(name, str) and Path(name).name == name for name in names.values()):
        raise EncoderError(f"{index}: expected weight_map, from names of weights to names of files in the same folder")
    held = sum(math.prod(tensor["shape"]) for header in headers for tensor in header.values())
    wanted = config["num_hidden_layers"] * config["hidden_size"] ** 2 * (4 + 2 * config["mlp_ratio"])
    if wanted > 1.5 * held + 2**20:
        raise EncoderError(
            f"{folder}: config.json describes an encoder of {wanted:.3g} weights, the safetensors files hold {held:.3g}"
        )


def file_sha256(path: Path) -> str:
    """Hexadecimal SHA-256 of a file's bytes; HJEPAError if it cannot be read."""
    try:
        with Path(path).open("rb") as file:
            return hashlib.file_digest(file, "sha256").hexdigest()
    except OSError as error:
        raise HJEPAError(f"cannot read {path}: {error.strerror or error}") from error
