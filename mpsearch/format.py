"""Number formats: what a weight can be stored in, and what that costs to the byte."""

from __future__ import annotations

import math
import re
from collections.abc import Iterable
from dataclasses import dataclass
from fractions import Fraction
from typing import Literal

from mpsearch.errors import InputError, did_you_mean
from mpsearch.layer import Layer

Family = Literal["float", "int"]
Granularity = Literal["tensor", "channel", "group"]

_FLOATS = {"bf16": "bfloat16", "fp16": "float16", "fp32": "float32"}
_FLOAT_BITS = {"bf16": 16, "fp16": 16, "fp32": 32}
_SCALE_BYTES = 2
_PATTERN = re.compile(r"int(?P<bits>\d+)-(?P<grain>tensor|channel|g(?P<group>-?\d+))(?P<asym>-asym)?")
_EXAMPLES = ("int4-g128", "int4-g128-asym", "int8-channel", "int8-tensor", "bf16", "fp16", "fp32")


@dataclass(frozen=True, slots=True)
class Format:
    """A number format and its layout.

    Integers are stored as ``bits``-bit codes, one fp16 scale per tensor, output channel or group of
    ``group`` consecutive weights of an output channel, and for asymmetric ones a ``bits``-bit zero point
    beside each scale. Each output channel's codes, and each channel's zero points, are padded to a whole byte.

    Attributes:
        family: ``int``, or ``float`` for a plain number type.
        bits: bits of one code.
        granularity: what shares one scale (``int`` only).
        group: weights that share one scale, for ``granularity="group"``.
        symmetric: codes run from ``-(2**(bits-1)-1)`` to ``2**(bits-1)-1`` with zero at 0; else from 0 to
            ``2**bits-1`` with a stored zero point.
        name_of_float: ``bf16``, ``fp16`` or ``fp32`` for the family ``float``.

    >>> str(Format.parse("int4-g128-asym"))
    'int4-g128-asym'
    >>> Format.parse("int4-g128").bytes(Layer("fc", "linear", (4096, 4096)))
    8650752
    """

    family: Family
    bits: int
    granularity: Granularity = "tensor"
    group: int = 0
    symmetric: bool = True
    name_of_float: str = ""

    @classmethod
    def parse(cls, text: str) -> Format:
        """Read a format as it prints.

        Args:
            text: such as ``int4-g128``, ``int4-g128-asym``, ``int8-channel``, ``int8-tensor``, ``bf16``.

        Raises:
            InputError: unknown name (E109), or an impossible one (E110).
        """
        if text in _FLOATS:
            return cls("float", _FLOAT_BITS[text], name_of_float=text)
        match = _PATTERN.fullmatch(text)
        if match is None:
            raise InputError(
                "E109",
                f"format '{text}' is not known{did_you_mean(text, _EXAMPLES)}",
                advice=f"write one like {', '.join(_EXAMPLES)}",
            )
        bits = int(match["bits"])
        if not 2 <= bits <= 8:
            reason = (
                "1 bit has no symmetric integer grid" if bits == 1 else f"{bits} bits is not an integer format here"
            )
            raise InputError("E110", f"format '{text}': {reason}; allowed 2 to 8, or bf16, fp16, fp32")
        group = int(match["group"]) if match["group"] else 0
        if match["group"] and group < 1:
            raise InputError(
                "E110",
                f"format '{text}': a group of {group} weights is impossible",
                advice="use g32, g64, g128 or channel",
            )
        grain: Granularity = "group" if match["group"] else "channel" if match["grain"] == "channel" else "tensor"
        return cls("int", bits, grain, group, match["asym"] is None)

    def __str__(self) -> str:
        if self.family == "float":
            return self.name_of_float
        grain = f"g{self.group}" if self.granularity == "group" else self.granularity
        return f"int{self.bits}-{grain}{'' if self.symmetric else '-asym'}"

    @property
    def dtype(self) -> str:
        """Number type of a plain float, such as ``bfloat16``; empty for integers."""
        return _FLOATS.get(self.name_of_float, "")

    def refuses(self, layer: Layer) -> str:
        """Say why a layer cannot take this format; empty when it can.

        >>> Format.parse("int4-g128").refuses(Layer("fc", "linear", (10, 100)))
        '100 weights per output channel cannot be cut into groups of 128; use g100, g50, g25, g20 or channel'
        """
        if self.granularity == "group" and layer.columns % self.group:
            sizes = [n for n in range(min(layer.columns, self.group), 7, -1) if layer.columns % n == 0][:4]
            instead = ", ".join([f"g{n}" for n in sizes])
            return (
                f"{layer.columns} weights per output channel cannot be cut into groups of {self.group}; "
                f"use {instead + ' or ' if instead else ''}channel"
            )
        return ""

    def scales(self, layer: Layer) -> int:
        """Number of scales of a layer."""
        if self.family == "float":
            return 0
        if self.granularity == "tensor":
            return 1
        return layer.rows * (layer.columns // self.group if self.granularity == "group" else 1)

    def itemised_bytes(self, layer: Layer) -> dict[str, int]:
        """Bytes of a layer in this format: ``payload``, ``scales``, ``zero_points``.

        >>> Format.parse("int3-g5-asym").itemised_bytes(Layer("fc", "linear", (2, 5)))
        {'payload': 4, 'scales': 4, 'zero_points': 2}
        """
        if self.family == "float":
            return {"payload": layer.weights * self.bits // 8, "scales": 0, "zero_points": 0}
        scales = self.scales(layer)
        zero_rows = 1 if self.granularity == "tensor" else layer.rows
        zeros = 0 if self.symmetric else zero_rows * math.ceil(scales // zero_rows * self.bits / 8)
        return {
            "payload": layer.rows * math.ceil(layer.columns * self.bits / 8),
            "scales": scales * _SCALE_BYTES,
            "zero_points": zeros,
        }

    def bytes(self, layer: Layer) -> int:
        """Exact bytes of a layer's weight in this format, padding included."""
        return sum(self.itemised_bytes(layer).values())

    def effective_bits(self, layer: Layer) -> Fraction:
        """Exact stored bits per weight of a layer.

        >>> Format.parse("int4-g128-asym").effective_bits(Layer("fc", "linear", (512, 1024)))
        Fraction(133, 32)
        """
        return Fraction(8 * self.bytes(layer), layer.weights)


def parse_formats(texts: Iterable[str]) -> tuple[Format, ...]:
    """Read a menu of formats; the same one twice is an error.

    Raises:
        InputError: unknown (E109), impossible (E110), given twice or none at all (E108).
    """
    names = list(texts)
    if not names:
        raise InputError("E108", "formats: the list is empty", advice=f"give at least one, such as {_EXAMPLES[0]}")
    found: list[Format] = []
    for text in names:
        parsed = Format.parse(text)
        if parsed in found:
            raise InputError("E108", f"formats: '{text}' is given twice")
        found.append(parsed)
    return tuple(found)
