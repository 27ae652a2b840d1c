"""A run's folder: where each result lies, and the settings and inputs it was made with."""

from __future__ import annotations

import contextlib
import os
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from ..errors import HJEPAError, UsageError
from . import files, zoo
from .config import Config
from .places import Place, Remote, place


@dataclass(frozen=True)
class Run:
    """The paths of a run."""

    root: Path

    @property
    def config(self) -> Path:
        return self.own(self.root / "config.json")

    @property
    def inputs(self) -> Path:
        """JSON naming the folders of videos and latents that the run uses."""
        return self.own(self.root / "inputs.json")

    @property
    def arrays(self) -> Path:
        return self.own(self.root / "evaluation.safetensors")

    @property
    def summary(self) -> Path:
        return self.own(self.root / "summary.json")

    @property
    def table(self) -> Path:
        return self.own(self.root / "summary.md")

    @property
    def figures(self) -> Path:
        return self.own(self.root / "figures")

    def model(self, name: str) -> Path:
        """Folder of one model's checkpoints."""
        return self.own(self.root / "models" / name)

    def trained(self) -> dict[str, Path]:
        """Best checkpoint of every model that has one, in the zoo's order."""
        paths = {name: self.model(name) / "best.safetensors" for name in zoo.MODELS}
        return {name: path for name, path in paths.items() if path.is_file()}

    def own(self, path: Path) -> Path:
        """`path`, which lies in the run's folder by its name, if no link leads it, or an entry of it, elsewhere.

        Raises
        ------
        HJEPAError
            One does; the message names it.
        """
        root = os.path.realpath(self.root)
        for item in (path, *(path.iterdir() if path.is_dir() else ())):
            if not Path(os.path.realpath(item)).is_relative_to(root):
                raise HJEPAError(f"{item} is a link that leads out of the run's folder, to {os.path.realpath(item)}: delete it")
        return path

    def asked(self) -> list[str]:
        """Every model that was to be trained here, in the zoo's order: those with a folder, which `start` makes."""
        return [name for name in zoo.MODELS if self.model(name).is_dir()]

    def owns(self, path: Path) -> bool:
        """Whether `path` is one of the files that the run consists of, or lies among its videos or latents."""
        results = {self.config, self.inputs, self.arrays, self.summary, self.table}
        checkpoint = path.parent.parent == self.root / "models" and path.stem in ("best", "last", "history")
        return path in results or checkpoint or any(path.is_relative_to(self.root / part) for part in ("videos", "latents"))

    @contextlib.contextmanager
    def locked(self) -> Iterator[None]:
        """Keep every other writer out of the run; see `files.locked`."""
        with files.locked(self.root):
            files.remove_partial(self.figures)
            yield

    def read_config(self) -> Config:
        """Raises HJEPAError if the folder is no run."""
        if not self.root.is_dir():
            raise HJEPAError(f"run folder not found: {self.root}")
        return Config.from_dict(files.read_json(self.config, "the run's configuration"), str(self.config))

    def read_inputs(self) -> dict[str, Any]:
        """The folders `videos`, a Path or None if unknown, and `latents`, a Place."""
        from . import schemas

        found = files.read_json(self.inputs, "the run's list of inputs")
        found = schemas.check(schemas.Inputs, found, str(self.inputs))
        videos = None if found["videos"] is None else self._input(Path(found["videos"]))
        return {"videos": videos, "latents": self._input(place(found["latents"]))}

    def _input(self, recorded: Place) -> Place:
        if isinstance(recorded, Remote):
            return recorded
        # what `start` records without a root lies in the run's folder
        return recorded if recorded.is_absolute() else self.own(self.root / recorded)

    def start(self, config: Config, videos: Path | None, latents: Place, names: Sequence[str] = ()) -> None:
        """Record configuration, inputs and the models to train, or check that the first two are those recorded before.

        Raises
        ------
        HJEPAError
            The folder holds a run with other settings.
        """
        recorded = {"videos": None if videos is None else self._relative(videos), "latents": self._relative(latents)}
        if self.config.exists():
            # read as a configuration, so that fields which an older version did not write have their defaults
            _refuse_difference(self.read_config().to_dict(), config.to_dict(), "settings", self.root)
        else:
            files.write_json(self.config, config.to_dict())
        if self.inputs.exists():
            _refuse_difference(files.read_json(self.inputs, "the run's inputs"), recorded, "inputs", self.root)
        else:
            files.write_json(self.inputs, recorded)
        for name in names:
            try:
                self.model(name).mkdir(parents=True, exist_ok=True)
            except OSError as error:
                raise HJEPAError(f"cannot write into {self.model(name)}: {error.strerror or error}") from error

    def _relative(self, folder: Place) -> str:
        if isinstance(folder, Remote):
            return str(folder)
        # a run that holds its inputs can be moved as a whole
        return (
            os.path.relpath(folder, self.root)
            if folder.resolve().is_relative_to(self.root.resolve())
            else str(folder.resolve())
        )


@contextlib.contextmanager
def inside(path: Place) -> Iterator[None]:
    """Where `path` is, or lies in, a run, keep every other writer out of that run."""
    run = None if isinstance(path, Remote) else run_around(path)
    with run.locked() if run is not None else contextlib.nullcontext():
        yield


def run_around(path: Path) -> Run | None:
    """The run that a path is, or lies in."""
    path = Path(path).absolute()
    runs = map(Run, (path, *path.parents))
    return next((run for run in runs if run.config.is_file() and run.inputs.is_file()), None)


@contextlib.contextmanager
def output(stem: Path, suffixes: Sequence[str], sources: Sequence[Path | None]) -> Iterator[None]:
    """Where `stem` lies in a run, keep every other writer out of that run while the files `stem` + suffix are written.

    Raises
    ------
    UsageError
        A file would take the place of one of `sources`, or of one that the run consists of.
    HJEPAError
        Another process writes into the run.
    """
    stem = Path(stem).absolute()
    run = run_around(stem.parent)
    for path in (stem.with_name(f"{stem.name}{suffix}") for suffix in suffixes):
        if any(source is not None and path.resolve() == Path(source).resolve() for source in sources):
            raise UsageError(f"--out {stem} would overwrite {path}, which is read: choose another --out")
        if run is not None and run.owns(path):
            raise UsageError(f"--out {stem} would write among the run's own files as {path}: choose another --out")
    with inside(stem.parent):
        yield


def _refuse_difference(found: Any, expected: Any, what: str, root: Path) -> None:
    if changes := differences(found, expected):
        raise HJEPAError(f"{root} holds a run with other {what}: {changes}. Choose another --out, or delete that folder.")


def differences(found: Any, expected: Any) -> str:
    """What differs between two nested dicts, in words: "train.epochs 2 -> 50"; empty if nothing does."""

    def flat(value: Any, prefix: str = "") -> dict[str, Any]:
        if isinstance(value, dict):
            return {k: v for name, item in value.items() for k, v in flat(item, f"{prefix}{name}.").items()}
        return {prefix[:-1]: list(value) if isinstance(value, tuple) else value}

    old, new = flat(found), flat(expected)
    differing = [name for name in (*new, *(old.keys() - new.keys())) if old.get(name) != new.get(name)]
    return ", ".join(f"{name} {old.get(name)!r} -> {new.get(name)!r}" for name in differing)
