"""A free rollout from one latent or one clip of a video."""

from __future__ import annotations

import tempfile
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from ..api import energy
from ..diagnostics import Balance, energy_balance
from ..errors import CheckpointError, EncoderError, HJEPAError, LatentError, UsageError
from ..integrators import SymplecticIntegrator
from ..ports import PortHNN
from . import animation, checkpoints, controls, encoder_files, files, stage, zoo
from .checkpoints import Checkpoint
from .config import OFFLINE_ENCODER, STATE_ENCODER, EncodeConfig, shown
from .encoders import resolve_device
from .evaluate import step_units
from .figures import check_available, dream_figure, save, step_label
from .latents import Latents, encode_videos, read_latents
from .run_folder import output
from .train import how_trained, load_identified

SUFFIXES = (".safetensors", ".png", ".pdf", *animation.SUFFIXES)
"""Of the files that a dream writes."""


@dataclass(frozen=True)
class Dream:
    """Where a dream was written, and what it did, in words."""

    text: str
    paths: list[Path]


def dream(
    checkpoint: Path,
    out: Path,
    *,
    latents: Path | None = None,
    video: Path | None = None,
    index: int = 0,
    n_steps: int = 20,
    encoder: str | None = None,
    device: str = "auto",
    control: Path | None = None,
    animate: bool = True,
) -> Dream:
    """Roll a trained model out from one latent, plot it, and show it in motion.

    In the animation positions are those of the true states, or are read from latents by the linear probe of the run that the
    checkpoint lies in, which is fitted without this video; where neither is there, latents move in the plane of the two largest
    components of the rollout. Beside it runs the true clip: the video's frames where it is found, or the true motion.

    Parameters
    ----------
    checkpoint : Path
        A checkpoint written by `train`.
    out : Path
        Stem of the files written: `.safetensors` (`states` [n_steps + 1, d] in latent units, `energy` [n_steps + 1] where
        the model has a Hamiltonian, `control` [n_steps, m] of each step where one is given), `.png`, `.pdf`, `.mp4`, `.gif`.
    latents, video : Path
        One of them: a file made by `encode`, or a video, which is encoded first.
    index : int
        Which latent of the file, or clip of the video, to start from.
    encoder : str, optional
        Encoder for `video`; by default the one named in the checkpoint, if it is "offline", the folder that the model was
        trained with, or in the local cache. Nothing is fetched that the caller did not name.
    control : Path, optional
        What acts on a model with a port, see `controls.read`; without it nothing does. Row t is held from frame t of the video
        that the latents are of, and each step has the mean over its clips, see `controls.of_steps`.
    animate : bool
        Whether to write `.mp4` and `.gif`.

    Raises
    ------
    UsageError
        An index out of range, fewer than one step, or a control for a model without a port.
    LatentError
        Latents of another size, or of another encoder than the model's; a control of another size, or one that ends too early.
    HJEPAError
        The rollout leaves the finite numbers; the message says at which step.
    """
    if n_steps < 1:
        raise UsageError(f"a dream needs at least 1 step, found {n_steps}")
    check_available()
    sources = (checkpoint, latents, video, control)
    with output(out, SUFFIXES, sources):
        pass  # refused before anything is computed
    loaded, digest = load_identified(checkpoint)
    model = checkpoints.restore(loaded, checkpoint).eval()
    port = zoo.port_of(model)
    if control is not None and not zoo.takes_control(model):
        raise UsageError(
            f"{checkpoint} is a {zoo.title(loaded.facts['model'], model)}, which has no port for {control}: models have one "
            "that were trained with --control recorded"
        )
    if video is not None:
        source = video
        sequence = _encode_one(video, loaded.facts["encoding"], encoder, device, checkpoint)
    else:
        assert latents is not None
        source = latents
        sequence = read_latents(latents)
    found, label = sequence.latents.shape[1], sequence.metadata.get("label")
    if found != loaded.facts["latent_dim"] or label != loaded.facts["encoder"]:
        raise LatentError(
            f"{checkpoint} was trained on {loaded.facts['latent_dim']} dimensions of {loaded.facts['encoder']}; "
            f"{source} gives {found} of {label}"
        )
    if not 0 <= index < len(sequence.latents):
        raise UsageError(f"index {index} is out of range: {source} has latents 0 to {len(sequence.latents) - 1}")

    target = resolve_device(device)
    model = model.to(target)
    z0 = ((sequence.latents[index] - loaded.mean) / loaded.std).to(target)
    given = None if control is None else _steps_of(control, loaded, checkpoint, int(sequence.start_frame[index]), n_steps)
    u = None if given is None or loaded.control_scale is None else (given / loaded.control_scale).to(target)
    H: Tensor | None = None
    unsolved = worked = ""
    with torch.no_grad():
        if isinstance(model, SymplecticIntegrator):
            rollout = model.trajectory(z0, n_steps, unconverged="flag", control=u)
            states, H = rollout.states, energy(model.hnn, rollout.states).cpu()
            worked = "" if port is None else _worked(energy_balance(port, states, model.step_size, u), port, u)
            if rollout.solve is not None and not rollout.solve.converged.all():
                unsolved = (
                    f"; {int((~rollout.solve.converged).sum())} implicit steps could not be solved, "
                    f"for which dt {model.step_size.item():.4g} is too large"
                )
        else:
            states = model.rollout(z0[None], n_steps)[0]
    states = states.cpu()
    trained = how_trained(checkpoint, loaded.facts)
    title = f"{zoo.title(loaded.facts['model'], model)}: {n_steps} steps from {source.name}, latent {index}"
    title += f"; {trained}" if trained else ""
    finite = states.isfinite().all(dim=1)
    if not finite.all():
        raise HJEPAError(f"{title}: the rollout is not finite from step {int((~finite).nonzero()[0])} on; take fewer --steps")
    tensors = {"states": states * loaded.std + loaded.mean} | ({} if H is None else {"energy": H})
    tensors |= {} if given is None else {"control": given}
    tensor_path = out.with_name(f"{out.name}.safetensors")
    of = {"checkpoint": checkpoint.name, "checkpoint_sha256": digest, "trained": trained, "source": source.name}
    units = step_units([sequence])
    with output(out, SUFFIXES, sources):
        files.save_tensors(tensor_path, tensors, of)
        paths = save(dream_figure(states, H, title, kept=port is None, step=step_label(units)), out)
        if animate:
            motion = stage.of(loaded, checkpoint, tensors["states"], sequence, index, title, units["seconds"], video)
            paths += animation.write(out, motion)
    text = f"{title}; mean step length {states.diff(dim=0).norm(dim=1).mean():.4g}"
    if H is not None:
        text += worked or f", largest energy drift {(H - H[0]).abs().max():.4g}"
    return Dream(text + unsolved, [tensor_path, *paths])


def _steps_of(path: Path, loaded: Checkpoint, checkpoint: Path, start: int, n_steps: int) -> Tensor:
    """The control of each step from the clip that starts at a frame, float32 [n_steps, m], as recorded."""
    found, size, encoding = controls.read(path), loaded.facts["control_dim"], loaded.facts["encoding"]
    if found.shape[1] != size:
        raise LatentError(f"{path} has {found.shape[1]} numbers a row, and {checkpoint} was trained with {size}")
    if encoding is None or encoding.get("clip_stride") is None:
        raise CheckpointError(f"{checkpoint} does not say how its latents were encoded, so frames cannot be told from steps")
    needed = start + encoding["clip_stride"] * n_steps + encoding["clip_frames"]
    if needed > len(found):
        raise LatentError(
            f"{path} has {len(found)} rows, and {n_steps} steps from the clip at frame {start} pass {needed} frames: "
            "take fewer --steps, or a longer control"
        )
    starts = start + encoding["clip_stride"] * torch.arange(n_steps + 1)
    return controls.of_steps(found, starts, encoding["clip_frames"], str(path)).float()


def _worked(balance: Balance, port: PortHNN, control: Tensor | None) -> str:
    """What friction and control did, in words."""
    text = f", H changes by {balance.change[-1]:.4g}"
    if port.kind is not None:
        text += f", friction takes {balance.lost[-1]:.4g}"
    if port.control_dim:
        text += ", without a control" if control is None else f", the control gives {balance.supplied[-1]:.4g}"
    return text


def _encode_one(video: Path, encoding: dict[str, Any] | None, encoder: str | None, device: str, checkpoint: Path) -> Latents:
    """Encode one video as the model's training videos were."""
    if encoding is None or encoding.get("clip_stride") is None:
        raise CheckpointError(f"{checkpoint} does not say how its latents were encoded; start from a file of --latents")
    recorded = encoding["model"]
    if encoder is None and recorded != STATE_ENCODER:
        _check_local(recorded, encoding, checkpoint)
    same = encoder in (None, recorded)
    config = EncodeConfig(
        encoder=encoder or recorded,
        revision=(encoding.get("commit") or encoding.get("revision") or "main") if same else "main",
        clip_frames=encoding["clip_frames"],
        clip_stride=encoding["clip_stride"],
    )
    with tempfile.TemporaryDirectory() as folder:
        return read_latents(encode_videos([video], Path(folder), config, device, fetch=encoder is not None)[0])


def _check_local(name: str, encoding: dict[str, Any], checkpoint: Path) -> None:
    """A folder that a checkpoint names must be the one that it was made with: a file may name any."""
    try:
        folder = encoder_files.local_folder(name)
        if folder is None or name == OFFLINE_ENCODER:
            return
        found = encoder_files.provenance(name, "main", folder)
        if found["weights_sha256"] == encoding.get("weights_sha256"):
            return
        reason = f"{folder} holds other weights"
    except EncoderError as error:
        reason = str(error)
    raise EncoderError(f"{checkpoint} was trained with the encoder {shown(name)}, and {reason}: name a folder with --encoder")
