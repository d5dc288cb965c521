"""Real text that is on every machine: the running Python's standard library sources.

The text itself is never stored. Files are split by the SHA-256 of their path, so calibration,
validation and training text never share a file, on any machine and in any Python version.
"""

from __future__ import annotations

import hashlib
import os
import sysconfig
from collections.abc import Iterator, Mapping, Sequence
from functools import cache
from pathlib import Path, PurePosixPath
from typing import Literal

Split = Literal["train", "calibration", "validation"]
SPLITS: tuple[Split, ...] = ("train", "calibration", "validation")

# Distributions may strip the test suite and the GUI parts, so held-out text never comes from them.
_OFTEN_MISSING = {"test", "tests", "idlelib", "lib2to3", "tkinter", "turtledemo", "ensurepip"}


def _rank(path: PurePosixPath) -> bytes:
    return hashlib.sha256(str(path).encode()).digest()


def split_of(path: PurePosixPath) -> Split:
    """Name the split a file of the standard library belongs to.

    Args:
        path: path relative to the library's root.

    Returns:
        ``"calibration"`` (1 file in 8), ``"validation"`` (1 in 8) or ``"train"``.

    >>> split_of(PurePosixPath("json/decoder.py")) in SPLITS
    True
    """
    if _OFTEN_MISSING & set(path.parts):
        return "train"
    bucket = _rank(path)[0] % 8
    return "calibration" if bucket == 0 else "validation" if bucket == 1 else "train"


def library_files(split: Split) -> Iterator[tuple[PurePosixPath, Path]]:
    """Yield (relative path, file) of every source file of a split, in an order fixed by the path's hash."""
    yield from _listed(Path(sysconfig.get_paths()["stdlib"]))[split]


@cache
def _listed(root: Path) -> Mapping[Split, Sequence[tuple[PurePosixPath, Path]]]:
    found: dict[Split, list[tuple[PurePosixPath, Path]]] = {name: [] for name in SPLITS}
    for folder, folders, files in os.walk(root):
        here = PurePosixPath(Path(folder).relative_to(root).as_posix())
        if not here.parts:
            # What others installed may be a hundred times as much.
            folders[:] = [name for name in folders if name not in {"site-packages", "dist-packages"}]
        for name in files:
            if name.endswith(".py"):
                found[split_of(here / name)].append((here / name, Path(folder, name)))
    return {name: sorted(rows, key=lambda item: _rank(item[0])) for name, rows in found.items()}


def library_texts(split: Split, max_bytes: int | None = None) -> list[str]:
    """Read the sources of a split.

    Args:
        split: which part.
        max_bytes: stop after the file that passes this many bytes of source; ``None`` reads all.

    Returns:
        One string per file, in the order of `library_files`. Files that are not UTF-8 are left out.
    """
    texts: list[str] = []
    total = 0
    for _, file in library_files(split):
        try:
            text = file.read_text(encoding="utf-8")
        except (UnicodeDecodeError, OSError):
            continue
        if not text.strip():
            continue
        texts.append(text)
        total += len(text.encode())
        if max_bytes is not None and total >= max_bytes:
            break
    return texts
