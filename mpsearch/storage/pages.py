"""Records in the pages of an SQLite file, found without its trees: what is left where these are broken.

Source: https://www.sqlite.org/fileformat2.html, sections 1.3 to 1.6, 2.1 and 4.
"""

from __future__ import annotations

import struct
from collections.abc import Iterator
from pathlib import Path
from typing import BinaryIO

MAGIC = b"SQLite format 3\0"
_PAGE = 4096
#: Types of pages that hold whole rows: of tables, and of tables without row numbers.
TABLE, LEAF, INNER = 0x0D, 0x0A, 0x02
_COLUMNS = 64

Value = int | float | str | bytes | None


class Pages:
    """The pages of a file, with those of its log over them.

    Args:
        path: the file. Nothing is written, and the file may be cut or overwritten anywhere.
    """

    def __init__(self, path: Path) -> None:
        self._stream: BinaryIO = path.open("rb")
        head = self._stream.read(100)
        size, reserved = _PAGE, 0
        told = struct.unpack(">H", head[16:18])[0] if len(head) == 100 and head[:16] == MAGIC else 0
        told = 65536 if told == 1 else told
        if 512 <= told <= 65536 and not told & (told - 1):
            size, reserved = told, head[20] if head[20] <= 64 else 0
        self.size, self.usable = size, size - reserved
        #: Pages that the file says it has; 0 where it does not say.
        self.promised = struct.unpack(">I", head[28:32])[0] if told else 0
        length = self._stream.seek(0, 2)
        self.count = -(-length // size)
        self._log = dict(_log_pages(Path(f"{path}-wal"), size))
        self.count = max([self.count, *self._log])

    def close(self) -> None:
        """Close the file."""
        self._stream.close()

    def page(self, number: int) -> bytes:
        """Return a page, numbered from 1; shorter where the file ends, empty beyond."""
        if number in self._log:
            return self._log[number]
        if not 1 <= number <= self.count:
            return b""
        self._stream.seek((number - 1) * self.size)
        return self._stream.read(self.size)

    def records(self) -> Iterator[tuple[bool, int, tuple[Value, ...]]]:
        """Yield (of a table with row numbers, row number, columns) of every record that can be read."""
        for number in range(1, self.count + 1):
            page = self.page(number)
            start = 100 if number == 1 else 0
            if len(page) < start + 12 or page[start] not in (TABLE, LEAF, INNER):
                continue
            kind = page[start]
            first = start + (12 if kind == INNER else 8)
            for i in range(struct.unpack_from(">H", page, start + 3)[0]):
                try:
                    (place,) = struct.unpack_from(">H", page, first + 2 * i)
                    yield self._record(page, place, kind)
                except (IndexError, ValueError, struct.error, OverflowError):
                    # What was overwritten ends a record anywhere.
                    continue

    def _record(self, page: bytes, place: int, kind: int) -> tuple[bool, int, tuple[Value, ...]]:
        if kind == INNER:
            place += 4
        length, place = _varint(page, place)
        row = 0
        if kind == TABLE:
            row, place = _varint(page, place)
        if length > self.count * self.size:
            raise ValueError("a record larger than the file")
        most = self.usable - 35 if kind == TABLE else (self.usable - 12) * 64 // 255 - 23
        if length <= most:
            payload = page[place : place + length]
        else:
            least = (self.usable - 12) * 32 // 255 - 23
            here = least + (length - least) % (self.usable - 4)
            here = here if here <= most else least
            (following,) = struct.unpack_from(">I", page, place + here)
            payload = page[place : place + here] + self._overflow(following, length - here)
        if len(payload) != length:
            raise ValueError("a record that is cut")
        return kind == TABLE, row, tuple(_columns(payload))

    def _overflow(self, number: int, length: int) -> bytes:
        parts: list[bytes] = []
        # A chain is as long as its record needs, so one that goes in a circle ends as well.
        while length > 0 and number:
            page = self.page(number)
            (number,) = struct.unpack_from(">I", page, 0)
            parts.append(page[4 : min(self.usable, 4 + length)])
            length -= len(parts[-1])
            if not parts[-1]:
                break
        return b"".join(parts)


def _varint(data: bytes, place: int) -> tuple[int, int]:
    value = 0
    for i in range(8):
        byte = data[place + i]
        value = value << 7 | byte & 0x7F
        if byte < 0x80:
            return value, place + i + 1
    value = value << 8 | data[place + 8]
    return value - (1 << 64 if value >= 1 << 63 else 0), place + 9


def _columns(payload: bytes) -> Iterator[Value]:
    end, place = _varint(payload, 0)
    types: list[int] = []
    while place < end:
        kind, place = _varint(payload, place)
        types.append(kind)
        if len(types) > _COLUMNS:
            raise ValueError("more columns than any table has")
    place = end
    for kind in types:
        length = _LENGTHS[kind] if kind < 12 else (kind - 12) // 2
        data = payload[place : place + length]
        if len(data) != length or length < 0:
            raise ValueError("a column that is cut")
        place += length
        yield _value(kind, data)


_LENGTHS = (0, 1, 2, 3, 4, 6, 8, 8, 0, 0, 0, 0)


def _value(kind: int, data: bytes) -> Value:
    if kind >= 12:
        return data.decode() if kind % 2 else data
    if kind in (8, 9):
        return kind - 8
    if kind == 7:
        return float(struct.unpack(">d", data)[0])
    return int.from_bytes(data, "big", signed=True) if kind else None


def _log_pages(path: Path, size: int) -> Iterator[tuple[int, bytes]]:
    """Yield the pages of a write-ahead log that were committed, later ones last."""
    try:
        data = path.read_bytes()
    except OSError:
        return
    if len(data) < 32:
        return
    magic, _, told = struct.unpack(">III", data[:12])
    if magic not in (0x377F0682, 0x377F0683) or told != size:
        return
    order = ">" if magic & 1 else "<"
    sums = _checksum(order, data[:24], (0, 0))
    salts, waiting = data[16:24], []
    for place in range(32, len(data) - size - 23, size + 24):
        head, page = data[place : place + 24], data[place + 24 : place + 24 + size]
        sums = _checksum(order, page, _checksum(order, head[:8], sums))
        if head[8:16] != salts or struct.unpack(">II", head[16:24]) != sums:
            return
        number, committed = struct.unpack(">II", head[:8])
        waiting.append((number, page))
        if committed:
            yield from waiting
            waiting = []


def _checksum(order: str, data: bytes, sums: tuple[int, int]) -> tuple[int, int]:
    a, b = sums
    words = struct.unpack(f"{order}{len(data) // 4}I", data)
    for x, y in zip(words[::2], words[1::2], strict=True):
        a = (a + x + b) & 0xFFFFFFFF
        b = (b + y + a) & 0xFFFFFFFF
    return a, b
