"""Writing files that are whole or not there, and joining paths that stay in their folder."""

from __future__ import annotations

import os
import tempfile
from collections.abc import Callable
from pathlib import Path
from typing import BinaryIO

from mpsearch.errors import ResourceError, UnsafeError


def write_file(path: Path, content: bytes | str | Callable[[BinaryIO], object]) -> None:
    """Write a file so that a reader sees the old or the new content, never a part.

    A temporary file in the same folder is written, flushed to disk and renamed over the target.

    Args:
        path: the file.
        content: what to write; of a file too large for memory, a function that writes it to the stream.

    Raises:
        ResourceError: the disk is full or the folder cannot be written (E701).
    """
    try:
        path.parent.mkdir(parents=True, exist_ok=True)
        descriptor, name = tempfile.mkstemp(dir=path.parent, prefix=f".{path.name}.", suffix=".tmp")
        try:
            with os.fdopen(descriptor, "wb") as stream:
                if callable(content):
                    content(stream)
                else:
                    stream.write(content.encode() if isinstance(content, str) else content)
                stream.flush()
                os.fsync(stream.fileno())
            os.chmod(name, 0o644)
            os.replace(name, path)
        except BaseException:
            Path(name).unlink(missing_ok=True)
            raise
        folder = os.open(path.parent, os.O_RDONLY)
        try:
            os.fsync(folder)
        finally:
            os.close(folder)
    except OSError as error:
        raise ResourceError(
            "E701", f"cannot write '{path}': {error.strerror}", advice="free space or choose another folder"
        ) from error


def inside(folder: Path, name: str) -> Path:
    """Join a file name to a folder and refuse to leave the folder.

    Raises:
        UnsafeError: the name is absolute, holds a NUL, or leads out of the folder (E803).

    >>> inside(Path("out"), "plan.json").name
    'plan.json'
    """
    if "\0" in name:
        raise UnsafeError("E803", f"file name {name!r} holds a NUL character: refused")
    root = folder.resolve()
    path = (root / name).resolve()
    if not path.is_relative_to(root) or path == root:
        raise UnsafeError("E803", f"file name '{name}' leaves the folder '{folder}': refused")
    return path
