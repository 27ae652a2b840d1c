"""Files that are either complete or absent: written to a temporary name, then renamed."""

from __future__ import annotations

import contextlib
import errno
import json
import os
import re
import tempfile
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any

import torch

from ..errors import HJEPAError
from . import untrusted

PARTIAL = ".partial-"
"""Prefix of a file that is still being written; such names are never read as results."""


@contextlib.contextmanager
def atomic_path(path: Path) -> Iterator[Path]:
    """Yield a temporary path beside `path` with the same suffix; rename it to `path` on success.

    On any failure, an interrupt included, the temporary file is removed and `path` is left as it was.

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
        temporary.replace(path)
    except OSError as error:
        if error.errno == errno.ENOSPC:
            raise HJEPAError(f"cannot write {path}: the disk is full. Free some space and run again.") from error
        if error.errno is None:
            raise
        raise HJEPAError(f"cannot write {path}: {error.strerror or error}") from error
    finally:
        if temporary is not None:
            temporary.unlink(missing_ok=True)


def natural_order(path: Path) -> tuple[list[int | str], str]:
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


def save_tensors(path: Path, tensors: Mapping[str, torch.Tensor], metadata: Mapping[str, str]) -> None:
    """Write named tensors and string metadata as one safetensors file, atomically."""
    from safetensors import SafetensorError
    from safetensors.torch import save_file

    contiguous = {name: tensor.detach().cpu().contiguous() for name, tensor in tensors.items()}
    with atomic_path(path) as temporary:
        try:
            save_file(contiguous, temporary, metadata=dict(metadata))
        except SafetensorError as error:
            # safetensors reports the operating system's error only as text
            if f"os error {errno.ENOSPC}" in str(error):
                raise OSError(errno.ENOSPC, str(error)) from error
            raise HJEPAError(f"cannot write {path}: {error}") from error


def load_tensors(path: Path, what: str) -> tuple[dict[str, torch.Tensor], dict[str, str]]:
    """Read a safetensors file: tensors on the CPU, and its metadata.

    Raises:
        HJEPAError: the file is missing, truncated or not a safetensors file.
    """
    from safetensors import SafetensorError, safe_open

    path = Path(path)
    untrusted.check_header(path, what)
    try:
        with safe_open(path, framework="pt") as file:
            return {name: file.get_tensor(name) for name in file.keys()}, dict(file.metadata() or {})  # noqa: SIM118
    except (SafetensorError, OSError, RuntimeError, MemoryError) as error:  # RuntimeError: no memory for a tensor
        raise HJEPAError(f"{what} is not a readable safetensors file: {path}: {error}") from error


def read_metadata(path: Path) -> dict[str, str] | None:
    """The metadata of a safetensors file, or None if it is missing or unreadable."""
    from safetensors import SafetensorError, safe_open

    try:
        untrusted.check_header(path, "file")
        with safe_open(Path(path), framework="pt") as file:
            return dict(file.metadata() or {})
    except (HJEPAError, SafetensorError, OSError):
        return None
