"""Microscaling (MX) formats of the Open Compute Project."""

from __future__ import annotations

import re
from dataclasses import dataclass
from typing import ClassVar

from mpsearch.errors import InputError
from mpsearch.format import Format
from mpsearch.formats.elements import ELEMENTS, Element
from mpsearch.layer import Layer

BLOCK = 32
_ELEMENTS = {
    "mxfp4": "e2m1", "mxfp4-e2m1": "e2m1", "mxfp6-e2m3": "e2m3", "mxfp6-e3m2": "e3m2", "mxfp8-e4m3": "e4m3",
    "mxfp8-e5m2": "e5m2", "mxint8": "int8",
}  # fmt: skip
_NAME = re.compile(r"mx(fp|int)\d+(-.*)?")


@dataclass(frozen=True, slots=True)
class Microscaling(Format):
    """Blocks of 32 consecutive weights of an output channel with a power of two as their scale: OCP MX v1.0.

    The scale is one byte, E8M0: its code ``c`` stands for ``2**(c - 127)``. Floats are coded as in
    `mpsearch.formats.elements`, integers in two's complement with six bits behind the point.

    Attributes:
        element: ``e2m1``, ``e2m3``, ``e3m2``, ``e4m3``, ``e5m2`` or ``int8``.

    >>> Microscaling("e3m2").itemised_bytes(Layer("fc", "linear", (2, 64)))
    {'payload': 96, 'scales': 4}
    """

    family: ClassVar[str] = "mx"
    codec: ClassVar[str] = "mpsearch.model.codecs.mx:MicroscalingCodec"
    examples: ClassVar[tuple[str, ...]] = ("mxfp4", "mxfp6-e2m3", "mxfp6-e3m2", "mxfp8-e4m3", "mxfp8-e5m2", "mxint8")
    purpose: ClassVar[str] = "weights for kernels of the OCP microscaling standard"

    element: str

    @classmethod
    def read(cls, text: str) -> Microscaling | None:
        if text in _ELEMENTS:
            return cls(_ELEMENTS[text])
        if _NAME.fullmatch(text):
            raise InputError(
                "E110",
                f"format '{text}': not in the MX standard (blocks of {BLOCK}); allowed {', '.join(cls.examples)}",
            )
        return None

    def __str__(self) -> str:
        if self.element == "int8":
            return "mxint8"
        return "mxfp4" if self.element == "e2m1" else f"mxfp{self.bits}-{self.element}"

    @property
    def bits(self) -> int:
        return 8 if self.numbers is None else self.numbers.bits

    @property
    def numbers(self) -> Element | None:
        """What a float code can stand for; None for integers."""
        return ELEMENTS.get(self.element)

    @property
    def top_exponent(self) -> int:
        """Exponent of an element's largest number: ``emax``."""
        return 0 if self.numbers is None else self.numbers.top_exponent

    def misfit(self, layer: Layer) -> str:
        scaled = f"fp{self.bits}-{self.element}" if self.numbers else "int8"
        return block_misfit(layer, BLOCK, scaled)

    def itemised_bytes(self, layer: Layer) -> dict[str, int]:
        return {"payload": layer.weights * self.bits // 8, "scales": layer.weights // BLOCK}


def block_misfit(layer: Layer, block: int, scaled: str) -> str:
    """Say why a layer's rows cannot be cut into blocks of a fixed size; empty when they can.

    Args:
        layer: the layer.
        block: weights of a block.
        scaled: format of the same numbers with ordinary scales, without its granularity.
    """
    if layer.columns % block == 0:
        return ""
    groups = [f"{scaled}-g{n}" for n in range(2 * block, 7, -1) if layer.columns % n == 0][:1]
    instead = " or ".join([*groups, f"{scaled}-channel"])
    return f"{layer.columns} weights per output channel cannot be cut into blocks of {block}; use {instead}"
