"""Errors that a user can cause, each with a message that says what was found and what to do."""

from __future__ import annotations

import sys
import warnings
from types import FrameType


class HJEPAError(RuntimeError):
    """Base of every failure the pipeline reports; the command line prints it and exits with 1."""


class UsageError(HJEPAError, ValueError):
    """An option or configuration value that cannot be used; the command line exits with 2."""


class MissingDependencyError(HJEPAError, ImportError):
    """An optional package is needed and not installed."""


class VideoError(HJEPAError):
    """A video file cannot be read, written or used."""


class LatentError(HJEPAError):
    """A latent file, or a set of them, cannot be used."""


class EncoderError(HJEPAError):
    """A video encoder cannot be loaded or does not fit."""


class CheckpointError(HJEPAError):
    """A checkpoint cannot be read or does not fit the model."""


class TrainingError(HJEPAError):
    """Training cannot go on, for example because the loss is not finite."""


class ConvergenceError(HJEPAError, ArithmeticError):
    """The equation of an implicit step was not solved to the tolerance."""


class NotFusedError(TypeError, ValueError):
    """A module computes something else than the layers that a fused rollout runs on; nested autograd can still run it."""


def warn(message: str) -> None:
    """A warning at the line of the user's that called into this library."""
    frame: FrameType | None = sys._getframe(1)
    level = 2
    while frame is not None and frame.f_globals.get("__name__", "").partition(".")[0] == "hjepa_fast":
        frame, level = frame.f_back, level + 1
    warnings.warn(message, stacklevel=level)
