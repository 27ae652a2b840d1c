"""Files that are either complete or absent: written to a temporary name, then renamed. Folders that one process writes."""

from __future__ import annotations

import contextlib
import errno
import json
import os
import platform
import re
import sys
import tempfile
import time
import warnings
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any

import torch

from ..errors import HJEPAError, MissingDependencyError
from . import untrusted
from .places import Place, Remote

PARTIAL = ".partial-"
"""Prefix of a file that is still being written; such names are never read as results."""
_PARTIAL_NAME = re.compile(rf"{re.escape(PARTIAL)}[a-z0-9_]{{8}}(\.[A-Za-z0-9]+)?")
LOCK = ".hjepa-fast.lock"
"""File that a process locks while it writes into a folder; it stays there, empty."""
_HOLDER = ".hjepa-fast.lock-holder"
_READ_ONLY = (errno.EROFS, errno.EACCES, errno.EPERM)
_NO_LOCKS = (errno.ENOSYS, errno.ENOLCK, errno.EOPNOTSUPP)


@contextlib.contextmanager
def atomic_path(path: Path) -> Iterator[Path]:
    """Yield a temporary path beside `path` with the same suffix; rename it to `path` on success.

    The content is on the disk before the name is, and the name before this returns. On any failure, an interrupt included,
    the temporary file is removed and `path` is left as it was.

    Raises:
        HJEPAError: the folder cannot be made, the disk is full, or the file cannot be written.
    """
    path = Path(path)
    temporary = None
    try:
        untrusted.keep_inside(path)
        path.parent.mkdir(parents=True, exist_ok=True)
        handle, name = tempfile.mkstemp(prefix=PARTIAL, suffix=path.suffix, dir=path.parent)
        os.close(handle)
        temporary = Path(name)
        yield temporary
        temporary.chmod(0o666 & ~_umask())
        _flush(temporary)
        temporary.replace(path)
        with contextlib.suppress(OSError):  # not every file system lets a folder be flushed
            _flush(path.parent)
    except OSError as error:
        if error.errno == errno.ENOSPC:
            raise HJEPAError(f"cannot write {path}: the disk is full. Free some space and run again.") from error
        raise HJEPAError(f"cannot write {path}: {error.strerror or error}") from error
    finally:
        if temporary is not None:
            with contextlib.suppress(OSError):  # the folder may be gone; the error that says so counts
                temporary.unlink(missing_ok=True)


def _flush(path: Path) -> None:
    handle = os.open(path, os.O_RDONLY if path.is_dir() else os.O_RDWR)
    try:
        os.fsync(handle)
    finally:
        os.close(handle)


@contextlib.contextmanager
def locked(folder: Place, needed: bool = True) -> Iterator[None]:
    """Make `folder` if it is missing, and keep every other writer of this package out of it.

    The lock is the operating system's, so it ends with the process, however that ends. Temporary files that ended processes
    left in `folder` are removed. A second lock on the folder is refused within one process and one thread too. There are no
    locks behind an address (see `places`).

    Parameters
    ----------
    needed : bool
        False if perhaps nothing will be written: then a folder that cannot be written into is not locked.

    Raises
    ------
    HJEPAError
        Another process writes there (the message says which), or the folder cannot be written into.
    """
    if isinstance(folder, Remote):
        yield
        return
    folder = Path(folder)
    made = not folder.exists()
    holder = folder / _HOLDER
    try:
        folder.mkdir(parents=True, exist_ok=True)
        lock = _acquire(folder)
    except OSError as error:
        if needed or error.errno not in _READ_ONLY or not folder.is_dir():
            raise HJEPAError(f"cannot write into {folder}: {error.strerror or error}") from error
        lock = None
    try:
        if lock is not None:
            with contextlib.suppress(OSError):
                holder.write_text(_this_process(), encoding="utf-8")
            remove_partial(folder)
        yield
    finally:
        if lock is not None:
            with contextlib.suppress(OSError):
                holder.unlink(missing_ok=True)
            if made:
                with contextlib.suppress(OSError):  # nothing was written into the new folder: it goes again
                    if [path.name for path in folder.iterdir()] == [LOCK]:
                        (folder / LOCK).unlink()
                        folder.rmdir()
            lock.release()


def refuse_if_locked(folder: Place) -> None:
    """What another process still writes is not read as if it were complete.

    Raises
    ------
    HJEPAError
        Another process writes into `folder`.
    """
    if not isinstance(folder, Remote) and (Path(folder) / LOCK).exists():
        with contextlib.suppress(OSError):  # a lock that cannot be looked at, such as another user's
            lock = _acquire(Path(folder), timeout=1)  # others may be looking at the same moment
            if lock is not None:
                lock.release()


def remove_partial(folder: Path) -> None:
    """Remove the unfinished files in `folder`, which nobody may be writing into."""
    with contextlib.suppress(OSError):
        for path in Path(folder).iterdir():
            if _PARTIAL_NAME.fullmatch(path.name) and path.is_file() and not path.is_symlink():
                path.unlink(missing_ok=True)


def _acquire(folder: Path, timeout: float = 0) -> Any:
    """The acquired lock, or None where there are no locks; OSError if the folder cannot be written into."""
    try:
        from filelock import FileLock, Timeout
    except ImportError as error:
        raise MissingDependencyError("writing runs needs filelock: pip install 'hjepa_fast[pipeline]'") from error
    lock = FileLock(folder / LOCK, mode=0o666 & ~_umask())
    try:
        lock.acquire(timeout=timeout)
    except Timeout as error:
        if not (folder / LOCK).exists():
            raise OSError(errno.EACCES, "no file can be made there") from error
        raise HJEPAError(
            f"{folder} is in use: {_holder(folder)} writes into it. Wait until that has ended, or choose another folder."
        ) from error
    except OSError as error:
        if error.errno not in _NO_LOCKS:
            raise
        warnings.warn(f"{folder} is on a file system without locks: see that nothing else writes there", stacklevel=4)
        return None
    return lock


def _this_process() -> str:
    command = " ".join([Path(sys.argv[0]).name, *sys.argv[1:2]])
    return f"process {os.getpid()} on {platform.node()} ({command}, since {time.strftime('%Y-%m-%d %H:%M:%S')})"


def _holder(folder: Path) -> str:
    try:
        return (folder / _HOLDER).read_text(encoding="utf-8")[:200] or "another process"
    except (OSError, UnicodeDecodeError):
        return "another process"


def natural_order(path: Place) -> tuple[list[int | str], str]:
    """A key that sorts video_2 before video_10."""
    return [int(part) if part.isdecimal() else part for part in re.split(r"(\d+)", path.name.lower())], path.name


def _umask() -> int:
    mask = os.umask(0)
    os.umask(mask)
    return mask


def write_text(path: Path, text: str) -> None:
    """Write `text` as UTF-8, atomically."""
    with atomic_path(path) as temporary:
        temporary.write_text(text, encoding="utf-8")


def write_json(path: Path, value: Any) -> None:
    """Write `value` as indented JSON, atomically. NaN and infinity are refused: they are not JSON."""
    write_text(path, json.dumps(value, indent=2, allow_nan=False) + "\n")


def read_json(path: Path, what: str) -> Any:
    """Read JSON; `what` names the file's role in error messages.

    Raises:
        HJEPAError: the file is missing, unreadable, not JSON, or what `untrusted.parse_json` refuses.
    """
    source = f"{what} cannot be read: {path}"
    try:
        text = untrusted.read_bytes(path, what).decode("utf-8")
    except UnicodeDecodeError as error:
        raise HJEPAError(f"{source}: {error}") from error
    return untrusted.parse_json(text, source)


def save_tensors(path: Place, tensors: Mapping[str, torch.Tensor], metadata: Mapping[str, str]) -> None:
    """Write named tensors and string metadata as one safetensors file, atomically."""
    from safetensors import SafetensorError
    from safetensors.torch import save, save_file

    contiguous = {name: tensor.detach().cpu().contiguous() for name, tensor in tensors.items()}
    if isinstance(path, Remote):
        path.write(save(contiguous, dict(metadata)))
        return
    with atomic_path(path) as temporary:
        try:
            save_file(contiguous, temporary, metadata=dict(metadata))
        except SafetensorError as error:
            # safetensors reports the operating system's error only as text
            if found := re.search(r"os error (\d+)", str(error)):
                raise OSError(int(found[1]), os.strerror(int(found[1]))) from error
            raise HJEPAError(f"cannot write {path}: {error}") from error
        except UnicodeError as error:
            raise HJEPAError(f"cannot write {path}: its name, or a name to write into it, is no UTF-8 text") from error


def read_header(path: Place, what: str) -> untrusted.Header:
    """The header of a safetensors file, with its metadata as text by name.

    Raises:
        HJEPAError: the file is missing, truncated or not a safetensors file.
    """
    header = untrusted.read_header(path, what)
    metadata = {} if header.metadata is None else header.metadata
    if not isinstance(metadata, dict) or not all(isinstance(value, str) for value in metadata.values()):
        raise HJEPAError(f"{what} is not a readable safetensors file: {path}: its metadata are no text")
    return header._replace(metadata=metadata)


def load_tensors(path: Place, what: str) -> tuple[dict[str, torch.Tensor], dict[str, str]]:
    """Read a safetensors file: tensors on the CPU, and its metadata.

    Raises:
        HJEPAError: the file is missing, truncated or not a safetensors file.
    """
    from safetensors import SafetensorError, safe_open

    if isinstance(path, Remote):
        from safetensors.torch import load

        metadata = read_header(path, what).metadata
        try:
            return load(path.read()), metadata
        except (SafetensorError, ValueError, RuntimeError, MemoryError) as error:
            raise HJEPAError(f"{what} is not a readable safetensors file: {path}: {error}") from error
    path = Path(path)
    untrusted.check_header(path, what)
    try:
        with safe_open(path, framework="pt") as file:
            return {name: file.get_tensor(name) for name in file.keys()}, dict(file.metadata() or {})  # noqa: SIM118
    except (SafetensorError, OSError, RuntimeError, MemoryError) as error:  # RuntimeError: no memory for a tensor
        raise HJEPAError(f"{what} is not a readable safetensors file: {path}: {error}") from error


def read_metadata(path: Place) -> dict[str, str] | None:
    """The metadata of a safetensors file, or None if it is missing or unreadable."""
    from safetensors import SafetensorError, safe_open

    try:
        if isinstance(path, Remote):
            return dict(read_header(path, "file").metadata)
        untrusted.check_header(path, "file")
        with safe_open(Path(path), framework="pt") as file:
            return dict(file.metadata() or {})
    except (HJEPAError, SafetensorError, OSError):
        return None
