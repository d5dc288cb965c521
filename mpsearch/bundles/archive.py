"""The file of a bundle: a zip of JSON lines, with a manifest of their digests.

A bundle may come from anybody. It is bounded in members, names, sizes, ratio and depth before anything is believed;
nothing of it is unpacked to the disk, and nothing in it is ever run.
"""

from __future__ import annotations

import hashlib
import json
import re
import struct
import zipfile
import zlib
from collections.abc import Callable, Iterable, Iterator, Mapping
from pathlib import Path
from typing import Any, BinaryIO

import numpy as np

from mpsearch.errors import InputError
from mpsearch.files import write_file
from mpsearch.keys import canonical_json

FORMAT = 1
MANIFEST = "manifest.json"
#: The members, in the order in which they are written and read.
MEMBERS = ("studies.jsonl", "links.jsonl", "values.jsonl", "cells.jsonl", "conflicts.jsonl")
#: Bytes of the file, of all members unpacked, and of one line. A plan of 10,000 layers takes 4 MB.
FILE_LIMIT, TOTAL_LIMIT, LINE_LIMIT = 2**30, 2**31, 2**23
#: Rows of scores, which are read one by one, and of any other member; bytes of that, which is held as a whole.
CELL_LIMIT, ROW_LIMIT, HELD_LIMIT = 20_000_000, 200_000, 2**29
#: Unpacked bytes per packed byte; rows of scores have 5 to 40. Members below a mebibyte may have any.
RATIO_LIMIT, SMALL = 200, 2**20
DEPTH_LIMIT = 64
# Dates would make two bundles of one study differ.
_DATE = (1980, 1, 1, 0, 0, 0)
_END = 22
# Texts are taken out whole, so that no bracket in one counts; nothing here goes back, or costs more than it reads.
_TEXT = re.compile(rb'"(?:[^"\\]++|\\.)*+"?', re.DOTALL)
_STEPS = bytes.maketrans(b"[{]}", b"\x01\x01\xff\xff")
_OTHERS = bytes(set(range(256)) - set(b"[]{}"))
_BROKEN = (
    zipfile.BadZipFile, zlib.error, struct.error, EOFError, NotImplementedError, RuntimeError, OverflowError,
    UnicodeError, ValueError,
)  # fmt: skip


def save(path: Path, members: Mapping[str, Iterable[Any]]) -> None:
    """Write a bundle, whole or not at all; the same rows give the same bytes.

    Args:
        path: the file.
        members: name of a member -> its rows, as JSON values.

    Raises:
        ResourceError: the file cannot be written (E701).
        InputError: more than a bundle may hold (E304).
        ValueError: a row with NaN or infinity.
    """
    write_file(path, lambda stream: _write(stream, members))


def _write(stream: BinaryIO, members: Mapping[str, Iterable[Any]]) -> None:
    told: dict[str, Any] = {}
    with zipfile.ZipFile(stream, "w") as archive:
        for name in MEMBERS:
            digest, size, rows = hashlib.sha256(), 0, 0
            with archive.open(_info(name), "w") as member:
                for row in members[name]:
                    line = canonical_json(row).encode() + b"\n"
                    if len(line) > LINE_LIMIT or rows == _most(name):
                        raise _too_large(name, len(line))
                    member.write(line)
                    digest.update(line)
                    size, rows = size + len(line), rows + 1
            told[name] = {"bytes": size, "rows": rows, "sha256": digest.hexdigest()}
        manifest = {"format": FORMAT, "kind": "mpsearch bundle", "members": told}
        archive.writestr(_info(MANIFEST), json.dumps(manifest, indent=1, sort_keys=True) + "\n")


def _most(name: str) -> int:
    return CELL_LIMIT if name == "cells.jsonl" else ROW_LIMIT


def _too_large(name: str, size: int) -> InputError:
    return InputError(
        "E304",
        f"the study is too large for a bundle: {name}",
        because=f"{size:,} bytes in a row of at most {LINE_LIMIT:,}, or more than {_most(name):,} rows",
        advice="join the databases instead: mpsearch db merge THEIRS --into YOURS",
    )


def _info(name: str) -> zipfile.ZipInfo:
    info = zipfile.ZipInfo(name, _DATE)
    info.compress_type = zipfile.ZIP_DEFLATED
    info.external_attr = 0o644 << 16
    info.create_system = 3
    return info


class Archive:
    """A bundle that is open for reading.

    Args:
        path: the file.

    Raises:
        InputError: no such file (E101); not a bundle, cut, edited, beyond a limit, or of a newer format (E304).
    """

    def __init__(self, path: Path) -> None:
        self._path = path
        try:
            if path.stat().st_size > FILE_LIMIT:
                raise self.broken(f"{path.stat().st_size:,} bytes; a bundle has at most {FILE_LIMIT:,}")
            self._stream = path.open("rb")
        except OSError as error:
            raise InputError("E101", f"bundle '{path}' cannot be read: {error.strerror}") from error
        try:
            self._archive = self._opened()
            self._told = self._checked()
        except BaseException:
            self._stream.close()
            raise

    def close(self) -> None:
        """Close the file."""
        self._archive.close()
        self._stream.close()

    def __enter__(self) -> Archive:
        return self

    def __exit__(self, *_: object) -> None:
        self.close()

    def broken(self, reason: str, member: str = "") -> InputError:
        """The error for a bundle that nobody should open."""
        return InputError(
            "E304",
            f"{self._path}: not a whole bundle",
            where=member,
            because=reason,
            advice="have it sent again, or write it again: `mpsearch bundle NAME FILE`; nothing was stored",
        )

    def _opened(self) -> zipfile.ZipFile:
        # Python reads the whole list of members before it says how many there are, so its size is looked at first.
        self._stream.seek(0, 2)
        size = self._stream.tell()
        self._stream.seek(max(0, size - _END - 20))
        tail = self._stream.read()
        end = tail[-_END:]
        if len(end) < _END or end[:4] != b"PK\5\6" or tail[:4] == b"PK\6\7":
            raise self.broken("it does not end as a bundle does: it was cut, or is something else")
        disk, first, here, count, listed, start, comment = struct.unpack("<4H2LH", end[4:])
        if disk or first or comment or here != count or count != len(MEMBERS) + 1 or listed > 4096:
            raise self.broken(f"{count} members; a bundle has {len(MEMBERS) + 1}")
        if start + listed + _END != size:
            raise self.broken("bytes that belong to no member")
        try:
            return zipfile.ZipFile(self._stream)
        except _BROKEN as error:
            raise self.broken(_reason(error)) from error

    def _checked(self) -> Mapping[str, Any]:
        infos = self._archive.infolist()
        if sorted(info.filename for info in infos) != sorted([*MEMBERS, MANIFEST]):
            raise self.broken(f"members {', '.join(ascii(info.filename)[:60] for info in infos)}")
        if sum(info.file_size for info in infos) > TOTAL_LIMIT:
            raise self.broken(f"more than {TOTAL_LIMIT:,} bytes when unpacked")
        for info in infos:
            if info.flag_bits & 1 or info.compress_type not in (zipfile.ZIP_DEFLATED, zipfile.ZIP_STORED):
                raise self.broken("encrypted, or packed in another way", info.filename)
            if info.file_size > HELD_LIMIT and info.filename != "cells.jsonl":
                raise self.broken(f"more than {HELD_LIMIT:,} bytes when unpacked", info.filename)
            if info.file_size > SMALL and info.file_size > RATIO_LIMIT * info.compress_size:
                raise self.broken(f"{info.file_size:,} bytes out of {info.compress_size:,}", info.filename)
        if self._archive.getinfo(MANIFEST).file_size > 65536:
            raise self.broken("a manifest of more than 64 KiB", MANIFEST)
        told = self._parsed(b"".join(self._lines(MANIFEST)), MANIFEST)
        if not isinstance(told, dict) or told.get("kind") != "mpsearch bundle":
            raise self.broken("its manifest is that of something else", MANIFEST)
        if isinstance(told.get("format"), int) and told["format"] > FORMAT:
            raise InputError(
                "E304",
                f"{self._path}: bundle format {told['format']}; this version reads {FORMAT}",
                advice="pip install -U mpsearch",
            )
        for name in MEMBERS:
            self._verify(name, told.get("members"))
        return told

    def _verify(self, name: str, told: Any) -> None:
        said = told.get(name) if isinstance(told, dict) else None
        digest, size = hashlib.sha256(), 0
        for line in self._lines(name):
            digest.update(line)
            size += len(line)
        if not isinstance(said, dict) or said.get("sha256") != digest.hexdigest() or said.get("bytes") != size:
            raise self.broken("its digest is not that of the manifest: it was edited", name)

    def _lines(self, name: str) -> Iterator[bytes]:
        limit, size = self._archive.getinfo(name).file_size, 0
        try:
            with self._archive.open(name) as member:
                while line := member.readline(LINE_LIMIT + 1):
                    size += len(line)
                    if len(line) > LINE_LIMIT or size > limit:
                        raise self.broken("a line, or the whole of it, is longer than a bundle may have", name)
                    yield line
        except _BROKEN as error:
            raise self.broken(_reason(error), name) from error

    def rows(self, name: str, read: Callable[[Any], Any]) -> Iterator[Any]:
        """Go through a member.

        Args:
            name: the member.
            read: makes a row of JSON values; what it raises is an error of the bundle.

        Raises:
            InputError: something that cannot be such a row (E304), with the number of its line.
        """
        for number, line in enumerate(self._lines(name), start=1):
            where = f"{name}:{number}"
            if number > _most(name):
                raise self.broken(f"more than {_most(name):,} rows", name)
            value = self._parsed(line, where)
            try:
                row = read(value)
            except InputError as error:
                raise self.broken(error.message, where) from error
            except (KeyError, TypeError, ValueError, AttributeError, IndexError, OverflowError) as error:
                raise self.broken(_reason(error), where) from error
            if row is not None:
                yield row

    def _parsed(self, text: bytes, where: str) -> Any:
        # Small rows in their millions are looked at only if they have so many brackets.
        if text.count(b"[") + text.count(b"{") > DEPTH_LIMIT and depth(text) > DEPTH_LIMIT:
            raise self.broken(f"nested deeper than {DEPTH_LIMIT}", where)
        try:
            return json.loads(text, parse_constant=_no_constant, object_pairs_hook=_once)
        except (ValueError, RecursionError) as error:
            raise self.broken(_reason(error), where) from error


def depth(text: bytes) -> int:
    """How deep lists and objects are nested, at most, in a JSON text that nobody has read yet.

    >>> depth(b'{"a": [1, "[[["]}')
    2
    """
    steps = np.frombuffer(_TEXT.sub(b"", text).translate(_STEPS, _OTHERS), np.int8)
    return int(steps.cumsum(dtype=np.int64).max(initial=0))


def _no_constant(name: str) -> Any:
    raise ValueError(f"{name} is no number of JSON")


def _once(pairs: list[tuple[str, Any]]) -> dict[str, Any]:
    found = dict(pairs)
    if len(found) != len(pairs):
        raise ValueError("a name is given twice in one object")
    return found


def _reason(error: BaseException) -> str:
    return f"{type(error).__name__}: {ascii(str(error))[1:-1][:200]}"
