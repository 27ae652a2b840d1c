"""The history of a training for TensorBoard, beside `history.csv`."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import Any

from ..errors import MissingDependencyError

SHOWN = ("train_loss", "train_mse", "train_energy", "test_mse", "lr", "energy_weight", "dt", "seconds")
"""Columns of a history that are curves."""


def check_available() -> None:
    """Raises MissingDependencyError without the package tensorboard."""
    try:
        import torch.utils.tensorboard  # noqa: F401
    except ImportError as error:
        raise MissingDependencyError("--tensorboard needs the package tensorboard: pip install tensorboard") from error


class Curves:
    """Writes rows of a history into a folder of event files.

    What an earlier, interrupted training wrote there is taken back by TensorBoard from epoch 1 on, and the epochs that
    count are given again, so that none is shown twice.

    Parameters
    ----------
    folder : Path
    history : sequence of dict
        The epochs that are done.
    """

    def __init__(self, folder: Path, history: Sequence[dict[str, Any]]) -> None:
        from torch.utils.tensorboard import SummaryWriter

        self._writer: Any = SummaryWriter(str(folder), purge_step=1)
        for row in history:
            self.add(row)

    def add(self, row: dict[str, Any]) -> None:
        """An epoch; what it has no number of is left out."""
        for name in SHOWN:
            if row.get(name) is not None:
                self._writer.add_scalar(name, row[name], row["epoch"])
        self._writer.flush()

    def close(self) -> None:
        self._writer.close()
