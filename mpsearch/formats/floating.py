"""Small floats with a scale per tensor, output channel, group or block."""

from __future__ import annotations

import math
import re
from dataclasses import dataclass
from typing import ClassVar, Literal

from mpsearch.errors import InputError
from mpsearch.format import Format
from mpsearch.formats.elements import ELEMENTS, Element
from mpsearch.formats.integer import group_misfit
from mpsearch.layer import Layer

Granularity = Literal["tensor", "channel", "group", "block"]
Rule = Literal["", "mse"]

_NAMES = {f"fp{one.bits}-{name}": name for name, one in ELEMENTS.items()}
_NAME = re.compile(
    r"(?P<element>fp[4-8](-e\d+m\d+)?)(-(?P<grain>tensor|channel|g(?P<group>\d+)|b(?P<height>\d+)x(?P<width>\d+)))?"
    r"(?P<rule>-mse)?"
)


@dataclass(frozen=True, slots=True)
class FloatingPoint(Format):
    """Small floats, printed ``fp<bits>-<element>[-channel|-g<group>|-b<rows>x<columns>][-mse]``.

    One scale is shared by the tensor, an output channel, ``group`` consecutive weights of an output channel, or a
    block of ``height`` output channels by ``width`` weights of each; blocks at the edges may be smaller. The scale is
    fp32, that of a group bf16: a group's needs two bytes, and the scales of 8-bit floats are often too small for fp16.
    Each output channel's codes are padded to a whole byte.

    Attributes:
        element: ``e4m3``, ``e5m2``, ``e3m2``, ``e2m3`` or ``e2m1``.
        granularity: what shares one scale.
        group: weights that share one scale, for ``granularity="group"``.
        height: output channels of a block, for ``granularity="block"``.
        width: weights per output channel in a block, likewise.
        rule: how scales are found: empty: from the largest weight; ``mse``: the scale of least squared error.

    >>> FloatingPoint("e3m2", "group", 5).itemised_bytes(Layer("fc", "linear", (2, 5)))
    {'payload': 8, 'scales': 4}
    >>> FloatingPoint("e4m3", "block", height=128, width=128).itemised_bytes(Layer("fc", "linear", (130, 128)))
    {'payload': 16640, 'scales': 8}
    """

    family: ClassVar[str] = "fp"
    codec: ClassVar[str] = "mpsearch.model.codecs.floating:FloatingPointCodec"
    examples: ClassVar[tuple[str, ...]] = (
        "fp8-e4m3", "fp8-e4m3-channel", "fp8-e4m3-b128x128", "fp8-e5m2", "fp6-e2m3-channel", "fp6-e3m2-channel",
        "fp4-e2m1-g32", "fp4-e2m1-g32-mse",
    )  # fmt: skip
    purpose: ClassVar[str] = "weights for FP8, FP6 and FP4 kernels with ordinary scales"

    element: str
    granularity: Granularity = "tensor"
    group: int = 0
    height: int = 0
    width: int = 0
    rule: Rule = ""

    @classmethod
    def read(cls, text: str) -> FloatingPoint | None:
        match = _NAME.fullmatch(text)
        if match is None:
            return None
        if match["element"] not in _NAMES:
            allowed = ", ".join(_NAMES)
            raise InputError("E110", f"format '{text}': '{match['element']}' is not a small float; allowed {allowed}")
        element, group = _NAMES[match["element"]], int(match["group"] or 0)
        height, width = int(match["height"] or 0), int(match["width"] or 0)
        impossible = ""
        if match["group"] and group < 1:
            impossible = f"a group of {group}"
        if match["height"] and min(height, width) < 1:
            impossible = f"a block of {height} by {width}"
        if impossible:
            raise InputError(
                "E110",
                f"format '{text}': {impossible} weights is impossible",
                advice="use g32, g128, b128x128 or channel",
            )
        grain: Granularity = "channel" if match["grain"] == "channel" else "tensor"
        grain = "group" if group else "block" if height else grain
        return cls(element, grain, group, height, width, "mse" if match["rule"] else "")

    def __str__(self) -> str:
        grain = {
            "tensor": "",
            "channel": "-channel",
            "group": f"-g{self.group}",
            "block": f"-b{self.height}x{self.width}",
        }
        return f"fp{self.bits}-{self.element}{grain[self.granularity]}{'-mse' if self.rule else ''}"

    @property
    def bits(self) -> int:
        return self.numbers.bits

    @property
    def numbers(self) -> Element:
        """What a code can stand for."""
        return ELEMENTS[self.element]

    @property
    def scale_bytes(self) -> int:
        """Bytes of one scale."""
        return 2 if self.granularity == "group" else 4

    def misfit(self, layer: Layer) -> str:
        if self.granularity == "group":
            return group_misfit(layer, self.group)
        if self.granularity == "block" and layer.kind == "expert" and layer.shape[layer.out_axis] % self.height:
            return (
                f"blocks of {self.height} output channels would lie across experts of {layer.shape[layer.out_axis]}; "
                f"use fp{self.bits}-{self.element}-channel"
            )
        return ""

    def scale_shape(self, layer: Layer) -> tuple[int, int]:
        """Rows and columns of a layer's scales."""
        if self.granularity == "block":
            return math.ceil(layer.rows / self.height), math.ceil(layer.columns / self.width)
        if self.granularity == "group":
            return layer.rows, layer.columns // self.group
        return (layer.rows if self.granularity == "channel" else 1), 1

    def itemised_bytes(self, layer: Layer) -> dict[str, int]:
        return {
            "payload": layer.rows * math.ceil(layer.columns * self.bits / 8),
            "scales": math.prod(self.scale_shape(layer)) * self.scale_bytes,
        }
