"""What a GGUF file holds, from its header: names, types and shapes of tensors, and nothing of their numbers."""

from __future__ import annotations

import struct
from collections.abc import Mapping
from pathlib import Path
from typing import BinaryIO, NamedTuple

import gguf

from mpsearch.errors import InputError

#: Bytes of a name of a tensor or field; longer texts (chat templates, vocabularies) are passed over.
_NAME_LIMIT = 2**16
_TENSORS = 2**20
_SIZES: Mapping[int, int] = {0: 1, 1: 1, 2: 2, 3: 2, 4: 4, 5: 4, 6: 4, 7: 1, 10: 8, 11: 8, 12: 8}
_TEXT, _LIST = 8, 9


class GgufTensor(NamedTuple):
    """A tensor: its type as gguf names it, and its shape, output channels first."""

    kind: str
    shape: tuple[int, ...]


def read_gguf(path: Path) -> dict[str, GgufTensor]:
    """Read which tensors a GGUF file holds.

    Every length is held against the file's size before anything is read, so that a header that lies costs nothing.

    Raises:
        InputError: not readable (E101), or no whole GGUF file of version 2 or 3 (E307).
    """
    try:
        with path.open("rb") as stream:
            return _Header(path, stream, path.stat().st_size).tensors()
    except OSError as error:
        raise InputError("E101", f"'{path}' cannot be read: {error.strerror}") from error


class _Header:
    def __init__(self, path: Path, stream: BinaryIO, size: int) -> None:
        self._path, self._stream, self._size = path, stream, size
        self._alignment = 32

    def tensors(self) -> dict[str, GgufTensor]:
        if self._take(4) != b"GGUF":
            raise self._broken("it does not begin with GGUF")
        version = self._number("I")
        if version not in (2, 3):
            raise self._broken(f"version {version}; 2 and 3 are read")
        count, fields = self._number("Q"), self._number("Q")
        if count > _TENSORS or fields > _TENSORS:
            raise self._broken(f"{count} tensors and {fields} fields are promised")
        for _ in range(fields):
            self._field()
        found: dict[str, GgufTensor] = {}
        end = 0
        for _ in range(count):
            name, tensor, stop = self._tensor()
            if name in found:
                raise self._broken(f"tensor '{name[:60]}' comes twice")
            found[name], end = tensor, max(end, stop)
        start = -(-self._stream.tell() // self._alignment) * self._alignment
        if start + end > self._size:
            raise self._broken(f"it is cut: {self._size} bytes are there, {start + end} are promised")
        return found

    def _field(self) -> None:
        name, kind = self._text(), self._number("I")
        if name == "general.alignment" and kind == 4:
            self._alignment = self._number("I")
            if not 1 <= self._alignment <= 2**20:
                raise self._broken(f"an alignment of {self._alignment}")
        else:
            self._pass(kind)

    def _pass(self, kind: int) -> None:
        """Pass over the value of a field."""
        if kind == _TEXT:
            self._skip(self._number("Q"))
        elif kind == _LIST:
            inner, length = self._number("I"), self._number("Q")
            if inner in _SIZES:
                self._skip(length * _SIZES[inner])
            elif inner == _TEXT:
                # Each text takes 8 bytes at least.
                self._hold(8 * length)
                for _ in range(length):
                    self._skip(self._number("Q"))
            else:
                raise self._broken(f"a list of type {inner}")
        elif kind in _SIZES:
            self._skip(_SIZES[kind])
        else:
            raise self._broken(f"a field of type {kind}")

    def _tensor(self) -> tuple[str, GgufTensor, int]:
        name, axes = self._text(), self._number("I")
        if not 1 <= axes <= 4:
            raise self._broken(f"tensor '{name[:60]}' has {axes} axes")
        sizes = [self._number("Q") for _ in range(axes)]
        number, offset = self._number("I"), self._number("Q")
        try:
            kind = gguf.GGMLQuantizationType(number)
        except ValueError:
            # A type that is newer than this package: named in the refusal of its layer.
            return name, GgufTensor(f"type {number}", tuple(reversed(sizes))), 0
        block, size = gguf.GGML_QUANT_SIZES[kind]
        weights = 1
        for each in sizes:
            weights *= each
        return name, GgufTensor(kind.name, tuple(reversed(sizes))), offset + weights // block * size

    def _text(self) -> str:
        length = self._number("Q")
        if length > _NAME_LIMIT:
            raise self._broken(f"a name of {length} bytes")
        try:
            return self._take(length).decode("utf-8")
        except UnicodeDecodeError as error:
            raise self._broken("a name that is no text") from error

    def _number(self, code: str) -> int:
        return int(struct.unpack(f"<{code}", self._take(struct.calcsize(f"<{code}")))[0])

    def _take(self, length: int) -> bytes:
        found = self._stream.read(length)
        if len(found) < length:
            raise self._broken("it is cut")
        return found

    def _skip(self, length: int) -> None:
        self._hold(length)
        self._stream.seek(length, 1)

    def _hold(self, length: int) -> None:
        if self._stream.tell() + length > self._size:
            raise self._broken("it is cut, or its header lies")

    def _broken(self, why: str) -> InputError:
        return InputError("E307", f"'{self._path}' is no whole GGUF file: {why}")
