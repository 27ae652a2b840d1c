"""The truth behind latents that are canonical states: the energy, the exact motion and the picture of any state."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

import numpy as np
import torch
from torch import Tensor

from ..errors import HJEPAError, UsageError
from . import drawing, scenes
from .scenes import Scene


@dataclass(frozen=True)
class Truth:
    """What a model of a smooth scene's true states is measured against.

    Latents z = [q, p], [..., d], are in the units of training windows: the states are z * std + mean. They may be anywhere and
    of any floating-point type; results are float64 on the CPU, and not finite where z is not.

    Attributes
    ----------
    scene : Scene
    mean, std : Tensor [d]
        As those of the windows.
    frames_per_step : int
        Frames of a video that pass in a step from latent to latent.
    """

    scene: Scene
    mean: Tensor
    std: Tensor
    frames_per_step: int

    @property
    def conservative(self) -> bool:
        """Whether the true energy is constant in the videos: neither drag nor a push."""
        return self.scene.conservative

    @property
    def radii(self) -> tuple[float, ...]:
        """Radius in pixels of each of `positions`' points."""
        return self.scene.radii

    @property
    def size(self) -> int:
        """Side of the frame in pixels."""
        return self.scene.size

    def states(self, z: Tensor) -> tuple[np.ndarray, np.ndarray]:
        """Canonical coordinates and momenta of latents, each [..., d / 2]; UsageError if they are of another size."""
        n = self.scene.n
        if z.shape[-1:] != (2 * n,):
            raise UsageError(f"states of scene {self.scene.name} have {2 * n} numbers, found {list(z.shape)}")
        state = (z.detach().cpu().double() * self.std.cpu().double() + self.mean.cpu().double()).numpy()
        return state[..., :n], state[..., n:]

    def energy(self, z: Tensor) -> Tensor:
        """The true energy of latents, [..., d] to [...]; in the scene's units, see `scenes`."""
        with np.errstate(all="ignore"):
            return torch.from_numpy(np.asarray(self.scene.energy(*self.states(z))))

    def rollout(self, z0: Tensor, n_steps: int) -> Tensor:
        """The exact motion from latents, [B, d] to [B, n_steps + 1, d], z0 first.

        It is the scene's motion with its drag and without a push, to about 1e-8 over 1,000 steps where it is not chaotic.
        """
        if n_steps < 0:
            raise UsageError(f"a rollout has at least 0 steps, found {n_steps}")
        with np.errstate(all="ignore"):
            path = torch.from_numpy(
                np.concatenate(self.scene.path(*self.states(z0), n_steps + 1, stride=self.frames_per_step), axis=-1)
            )
        return ((path - self.mean.cpu().double()) / self.std.cpu().double()).movedim(0, -2)

    def positions(self, z: Tensor) -> Tensor:
        """Centres (x, y) in pixels of the balls that are drawn for latents, [..., d] to [..., n_points, 2]."""
        with np.errstate(all="ignore"):
            return torch.from_numpy(np.asarray(self.scene.positions(self.states(z)[0])))

    def frames(self, z: Tensor) -> np.ndarray:
        """What states look like in a video, [T, d] to uint8 [T, size, size, 3] RGB; black where a state is not finite."""
        with np.errstate(all="ignore"):
            return drawing.draw(self.scene, self.positions(z).numpy())


def of(encoding: Mapping[str, Any], mean: Tensor, std: Tensor, source: str) -> Truth | None:
    """The truth of latents that were encoded so; None where they are not the states of a smooth scene.

    Parameters
    ----------
    encoding : mapping
        A latent file's provenance or a checkpoint's `encoding`: `scene`, which encoder "state" records, and `clip_stride`.
    mean, std : Tensor [d]
        States = latents * std + mean.
    source : str
        Names the file in error messages.

    Raises
    ------
    HJEPAError
        A scene is recorded and cannot be read, or does not fit the latents.
    """
    recorded = encoding.get("scene")
    if recorded is None or recorded.get("name") == "collisions":
        return None
    scene = scenes.read(encoding["scene"], source)
    if mean.shape != (2 * scene.n,):
        raise HJEPAError(f"{source}: states of scene {scene.name} have {2 * scene.n} numbers, found {list(mean.shape)}")
    if not isinstance(encoding.get("clip_stride"), int):
        raise HJEPAError(f"{source}: does not say how many frames lie between two latents")
    return Truth(scene, mean, std, encoding["clip_stride"])
