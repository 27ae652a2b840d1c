"""Files that may be anybody's: JSON without surprises and headers of safetensors files, both within bounds."""

from __future__ import annotations

import json
import math
import os
import stat
import struct
import warnings
from pathlib import Path
from typing import Any, NamedTuple

from ..errors import HJEPAError
from .places import Place, Remote

MOST_JSON = 2**25
"""Bytes of a JSON file, or of a safetensors file's header. A checkpoint's history of 50,000 epochs needs half of it."""
MOST_VALUES = 1_000_000
"""Values in a JSON text."""
DEEPEST = 32
"""Lists and objects within one another."""
MOST_TENSORS = 10_000
MOST_ELEMENTS = 2**34
"""Numbers in all tensors of a file together."""


class _Refused:
    """Stands in a parsed text for what JSON has no meaning for, until its place is known."""

    def __init__(self, what: str) -> None:
        self.what = what


def parse_json(text: str, source: str) -> Any:
    """Parse JSON as its standard means it.

    Raises
    ------
    HJEPAError
        It is no JSON, too large or nested too deeply, or holds NaN or infinity, an integer of more than 64 bits, or a key
        given twice in one object. The message starts with `source` and says where.
    """
    if len(text) > MOST_JSON or text.count(",") + text.count("[") + text.count("{") > MOST_VALUES:
        raise HJEPAError(f"{source}: too large, expected at most {MOST_JSON:,} characters and {MOST_VALUES:,} values")
    try:
        value = json.loads(text, parse_int=_integer, parse_float=_number, parse_constant=_Refused, object_pairs_hook=_object)
    except RecursionError:
        raise HJEPAError(f"{source}: nested too deeply, expected at most {DEEPEST} levels") from None
    except ValueError as error:
        raise HJEPAError(f"{source}: {error}") from error
    _check(value, source)
    return value


def _integer(text: str) -> Any:
    value = int(text) if len(text) <= 20 else 2**64
    return value if -(2**63) <= value < 2**63 else _Refused(f"an integer of more than 64 bits ({len(text)} characters)")


def _number(text: str) -> Any:
    value = float(text)
    return value if math.isfinite(value) else _Refused(f"{text[:20]}, which no 64-bit number can hold")


def _object(pairs: list[tuple[str, Any]]) -> Any:
    found: dict[str, Any] = {}
    for key, value in pairs:
        if key in found:
            return _Refused(f"an object with the key {key[:50]!r} twice")
        found[key] = value
    return found


def _check(value: Any, source: str) -> None:
    # each place is (the place around it, key), put into words only for a message
    pending: list[tuple[Any, Any, int]] = [(value, None, 0)]
    while pending:
        item, place, depth = pending.pop()
        if isinstance(item, (dict, list)):
            if depth == DEEPEST:
                raise HJEPAError(f"{source}: {_words(place)} is nested too deeply, expected at most {DEEPEST} levels")
            entries = item.items() if isinstance(item, dict) else enumerate(item)
            pending += [(child, (place, key), depth + 1) for key, child in entries]
        elif isinstance(item, _Refused):
            raise HJEPAError(f"{source}: {_words(place)} is {item.what}")


def _words(place: Any) -> str:
    keys: list[str] = []
    while place is not None:
        place, key = place
        keys.insert(0, ascii(key).strip("'")[:50])
    return ".".join(keys) or "the whole"


def read_bytes(path: Path, what: str) -> bytes:
    """A small file's bytes; `what` names its role in error messages.

    Raises
    ------
    HJEPAError
        It is missing, no regular file, unreadable, or larger than `MOST_JSON`.
    """
    size = _size(path, what)
    if size > MOST_JSON:
        raise HJEPAError(f"{what} cannot be read: {path}: {size:,} bytes, expected at most {MOST_JSON:,}")
    try:
        return Path(path).read_bytes()
    except OSError as error:
        raise HJEPAError(f"{what} cannot be read: {path}: {error.strerror or error}") from error


def _size(path: Path, what: str) -> int:
    try:
        status = Path(path).stat()
    except (FileNotFoundError, NotADirectoryError) as error:
        raise HJEPAError(f"{what} not found: {path}") from error
    except (OSError, ValueError) as error:
        raise HJEPAError(f"{what} cannot be read: {path}: {error}") from error
    if not stat.S_ISREG(status.st_mode):  # a pipe or a device would never end
        raise HJEPAError(f"{what} cannot be read: {path}: no regular file")
    return status.st_size


def keep_inside(path: Path) -> None:
    """Nothing that by its name lies in a run's folder is written elsewhere: a folder on the way that is a link out of the run
    gives place to a folder, as a file that is a link does when it is renamed over. What the link leads to is not touched."""
    folders = list(path.absolute().parents)
    for i, root in enumerate(folders):
        if (root / "config.json").exists() and (root / "inputs.json").exists():
            for folder in reversed(folders[:i]):
                if folder.is_symlink() and not Path(os.path.realpath(folder)).is_relative_to(os.path.realpath(root)):
                    warnings.warn(f"{folder} was a link out of the run's folder, to {os.path.realpath(folder)}", stacklevel=2)
                    folder.unlink()


def _bytes(path: Place, start: int, stop: int) -> bytes:
    if isinstance(path, Remote):
        return path.read(start, stop)
    with Path(path).open("rb") as file:
        file.seek(start)
        return file.read(stop - start)


class Header(NamedTuple):
    """Of a safetensors file."""

    tensors: dict[str, Any]
    """By name: an object with a shape. What else it says of a tensor is not checked."""
    metadata: Any
    """Not checked."""
    data: int
    """Bytes before the tensors' own."""
    size: int
    """Bytes of the file."""


def check_header(path: Path, what: str) -> dict[str, Any]:
    """The tensors in the header of a safetensors file; see `read_header`."""
    return read_header(path, what).tensors


def read_header(path: Place, what: str) -> Header:
    """The header of a safetensors file, parsed before a reader allocates what it says.

    Raises
    ------
    HJEPAError
        The file is missing or no regular file, or its header is longer than the file or than `MOST_JSON`, is no JSON, or
        names more tensors or elements than a file of this package's can hold.
    """
    size = path.size() if isinstance(path, Remote) else _size(path, what)
    unreadable = f"{what} is not a readable safetensors file: {path}"
    try:
        start = _bytes(path, 0, min(size, 8))
        length = struct.unpack("<Q", start)[0] if len(start) == 8 else 0
        if not 0 < length <= min(size - 8, MOST_JSON):
            raise HJEPAError(f"{unreadable}: its header has {length:,} bytes, the file {size:,}")
        header = parse_json(_bytes(path, 8, 8 + length).decode("utf-8"), unreadable)
    except (OSError, UnicodeDecodeError) as error:
        raise HJEPAError(f"{unreadable}: {error}") from error
    if not isinstance(header, dict):
        raise HJEPAError(f"{unreadable}: its header is no JSON object")
    tensors = {name: value for name, value in header.items() if name != "__metadata__"}
    if len(tensors) > MOST_TENSORS:
        raise HJEPAError(f"{unreadable}: {len(tensors):,} tensors, expected at most {MOST_TENSORS:,}")
    elements = 0
    for name, value in tensors.items():
        shape = value.get("shape") if isinstance(value, dict) else None
        if not isinstance(shape, list) or not all(type(n) is int and n >= 0 for n in shape) or len(shape) > 8:
            raise HJEPAError(f"{unreadable}: {name[:50]} has no shape")
        elements += math.prod(shape)
    if elements > MOST_ELEMENTS:
        raise HJEPAError(f"{unreadable}: {elements:.3g} numbers, expected at most {MOST_ELEMENTS:.3g}")
    return Header(tensors, header.get("__metadata__"), 8 + length, size)
