"""Writing files that are whole or not there, and joining paths that stay in their folder."""

from __future__ import annotations

import os
import stat
import tempfile
from collections.abc import Callable
from pathlib import Path
from typing import BinaryIO

from mpsearch.errors import InputError, ResourceError, UnsafeError

try:
    import fcntl
except ImportError:  # Not on Windows, where what a killed writer leaves stays.
    fcntl = None  # type: ignore[assignment]

#: Names of files that are being written, and of nothing else.
_PREFIX, _SUFFIX = ".mpsearch-", ".tmp"
#: Folders that this process has swept.
_swept: set[str] = set()


def write_file(path: Path, content: bytes | str | Callable[[BinaryIO], object]) -> None:
    """Write a file so that a reader sees the old or the new content, never a part.

    A temporary file in the same folder is written, flushed to disk and renamed over the target. What killed writers
    left in the folder goes when a process first writes there (`sweep`).

    Args:
        path: the file.
        content: what to write; of a file too large for memory, a function that writes it to the stream.

    Raises:
        InputError: a name that no file can have (E114).
        ResourceError: the disk is full or the folder cannot be written (E701).
    """
    try:
        os.fsencode(path)
        if "\0" in str(path):
            raise ValueError("it holds a NUL")
    except ValueError as error:
        raise InputError("E114", f"no file can be called {str(path)!a}: {error}") from error
    try:
        path.parent.mkdir(parents=True, exist_ok=True)
        if (folder := os.path.abspath(path.parent)) not in _swept:
            _swept.add(folder)
            sweep(path.parent)
        descriptor, name = _temporary(path.parent)
        try:
            with os.fdopen(descriptor, "wb") as stream:
                if callable(content):
                    content(stream)
                else:
                    stream.write(content.encode() if isinstance(content, str) else content)
                stream.flush()
                os.fsync(stream.fileno())
                os.chmod(name, 0o644)
                # Still open, and so still held: nobody takes it for a left-over.
                os.replace(name, path)
        except BaseException:
            Path(name).unlink(missing_ok=True)
            raise
        _flush_folder(path.parent)
    except OSError as error:
        raise ResourceError(
            "E701", f"cannot write '{path}': {error.strerror}", advice="free space or choose another folder"
        ) from error


def sweep(folder: Path) -> int:
    """Remove the temporary files that killed writers left in a folder; return how many.

    A file that somebody still writes is held by its writer, of whatever process, and stays; so does every file of
    another user and of another name.
    """
    if fcntl is None:
        return 0
    try:
        names = [name for name in os.listdir(folder) if name.startswith(_PREFIX) and name.endswith(_SUFFIX)]
    except OSError:
        return 0
    return sum(_removed(folder / name) for name in names)


def _removed(path: Path) -> bool:
    """Remove a temporary file unless it is held; say whether it was removed."""
    try:
        descriptor = os.open(path, os.O_RDWR | os.O_NOFOLLOW | os.O_NONBLOCK | os.O_CLOEXEC)
    except OSError:
        return False
    try:
        found = os.fstat(descriptor)
        if not stat.S_ISREG(found.st_mode) or found.st_uid != os.geteuid():
            return False
        fcntl.flock(descriptor, fcntl.LOCK_EX | fcntl.LOCK_NB)
        path.unlink()
        return True
    except OSError:
        return False
    finally:
        os.close(descriptor)


def _temporary(folder: Path) -> tuple[int, str]:
    """Make a temporary file and hold it."""
    while True:
        descriptor, name = tempfile.mkstemp(dir=folder, prefix=_PREFIX, suffix=_SUFFIX)
        try:
            if fcntl is not None:
                fcntl.flock(descriptor, fcntl.LOCK_EX)
        except OSError:
            # A file system without locks, where nothing is swept either.
            return descriptor, name
        if os.fstat(descriptor).st_nlink:
            return descriptor, name
        # Swept between being made and being held.
        os.close(descriptor)


def _flush_folder(folder: Path) -> None:
    descriptor = os.open(folder, os.O_RDONLY)
    try:
        os.fsync(descriptor)
    finally:
        os.close(descriptor)


def located(text: str, base: Path) -> Path:
    """Turn a path as a user writes it, relative to a folder or to a home (``~``), into an absolute one.

    Raises:
        InputError: the home of a user who is not there (E101).

    >>> located("model", Path("/data")).as_posix()
    '/data/model'
    """
    try:
        return (base / Path(text).expanduser()).resolve()
    except RuntimeError as error:
        raise InputError("E101", f"'{text}': there is no such user's folder", advice="write the whole path") from error


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
