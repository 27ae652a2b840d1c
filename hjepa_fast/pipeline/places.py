"""Where files lie: paths, and addresses such as s3://bucket/folder, which fsspec reads and writes."""

from __future__ import annotations

import contextlib
import re
from collections.abc import Iterator
from pathlib import Path, PurePosixPath
from typing import Any

from ..errors import HJEPAError, MissingDependencyError

_SCHEME = re.compile(r"([A-Za-z][A-Za-z0-9+.-]*(?:::[A-Za-z][A-Za-z0-9+.-]*)*)://")


class Remote:
    """A file or folder behind an address. It offers what this package uses of a `Path`.

    A file is written as a whole, and is there when the storage says so; nothing is locked.

    Raises
    ------
    MissingDependencyError
        fsspec, or the package that it needs for such addresses, is not installed.
    HJEPAError
        fsspec knows no such addresses, or cannot reach them.
    """

    def __init__(self, url: str) -> None:
        self.url = url.rstrip("/")
        try:
            from fsspec.core import url_to_fs
        except ImportError as error:
            raise MissingDependencyError(f"{url} needs fsspec: pip install fsspec") from error
        try:
            self.fs, self.path = url_to_fs(self.url)
        except ImportError as error:
            raise MissingDependencyError(f"{url}: {error}") from error
        except Exception as error:
            raise HJEPAError(f"{url} cannot be reached: {error}") from error

    def __str__(self) -> str:
        return self.url

    def __repr__(self) -> str:
        return f"Remote({self.url!r})"

    def __eq__(self, other: object) -> bool:
        return isinstance(other, Remote) and self.url == other.url

    def __hash__(self) -> int:
        return hash(self.url)

    def __truediv__(self, name: str) -> Remote:
        return Remote(f"{self.url}/{name}")

    @property
    def name(self) -> str:
        return PurePosixPath(self.path).name

    @property
    def stem(self) -> str:
        return PurePosixPath(self.path).stem

    def exists(self) -> bool:
        with self._explained("looked for"):
            return bool(self.fs.exists(self.path))

    def is_dir(self) -> bool:
        with self._explained("looked for"):
            return bool(self.fs.isdir(self.path))

    def size(self) -> int:
        """Bytes of a file."""
        with self._explained("read"):
            return int(self.fs.size(self.path))

    def read(self, start: int | None = None, stop: int | None = None) -> bytes:
        """The bytes from `start` to `stop`, of which no others are fetched where the storage can do that."""
        with self._explained("read"):
            return bytes(self.fs.cat_file(self.path, start=start, end=stop))

    def write(self, content: bytes) -> None:
        with self._explained("written"):
            self.fs.pipe_file(self.path, content)

    def files(self, suffix: str) -> list[Remote]:
        """The files of a folder whose names end so, but for hidden ones."""
        with self._explained("read"):
            names = [PurePosixPath(name).name for name in self.fs.ls(self.path, detail=False)]
        return [self / name for name in names if name.endswith(suffix) and not name.startswith(".")]

    @contextlib.contextmanager
    def _explained(self, what: str) -> Iterator[None]:
        try:
            yield
        except FileNotFoundError as error:
            raise HJEPAError(f"not found: {self.url}") from error
        except HJEPAError:
            raise
        except Exception as error:  # every storage has errors of its own
            raise HJEPAError(f"{self.url} cannot be {what}: {type(error).__name__}: {error}") from error


Place = Path | Remote


def place(name: Any) -> Place:
    """A path, or what lies behind an address. file:// is a path."""
    if isinstance(name, (Path, Remote)):
        return name
    found = _SCHEME.match(str(name))
    if found is None:
        return Path(name)
    if found[1] in ("file", "local"):
        return Path(str(name)[found.end() :])
    return Remote(str(name))
