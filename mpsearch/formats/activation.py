"""Activations: what a layer's input is rounded to on every call."""

from __future__ import annotations

import re
from dataclasses import dataclass
from typing import ClassVar, Literal

from mpsearch.errors import InputError
from mpsearch.format import Format
from mpsearch.formats.elements import FLOAT_NAMES
from mpsearch.formats.mx import BLOCK as MX_BLOCK
from mpsearch.formats.mx import Microscaling
from mpsearch.formats.nvfp4 import BLOCK as NVFP4_BLOCK
from mpsearch.layer import Layer

Grain = Literal["token", "tensor", "channel", "group", "block"]

_NAME = re.compile(
    rf"(?P<number>int(?P<bits>\d+)|{FLOAT_NAMES})-"
    r"(?P<grain>token|tensor|channel|g(?P<group>-?\d+))(?P<asym>-asym)?(?P<static>-static)?"
)
#: Block format -> numbers of a block.
_BLOCKS = {**dict.fromkeys(Microscaling.examples, MX_BLOCK), "nvfp4": NVFP4_BLOCK}
_SCALE_BYTES = 4


@dataclass(frozen=True, slots=True)
class Activation(Format):
    """Rounding of a layer's input, printed ``<number>-<granularity>[-asym][-static]`` or as a block format.

    Scales are float32. A dynamic one is taken from each input as it comes and stored nowhere; a static one is the range
    seen on the calibration data, stored with the weight. Nothing is rounded twice: products and sums stay float32.

    Attributes:
        number: ``int2`` to ``int8``, ``fp8-e4m3``, …, or a block format such as ``mxfp8-e4m3``.
        grain: what shares one scale: a token (position), the whole tensor, a channel, a group of consecutive channels
            of a token, or a block of the block format.
        group: channels that share one scale, for ``grain="group"``.
        asymmetric: integers from 0 with a zero point.
        static: scales from calibration.

    >>> found = Activation.read("int8-tensor-static")
    >>> str(found), found.itemised_bytes(Layer("fc", "linear", (4, 8)))
    ('int8-tensor-static', {'input_scales': 4})
    """

    family: ClassVar[str] = "activation"
    examples: ClassVar[tuple[str, ...]] = (
        "int8-token", "int8-tensor-static", "int8-token-asym", "int8-channel-static", "int4-g128", "fp8-e4m3-token",
        "fp8-e4m3-tensor", "fp8-e4m3-tensor-static", "mxfp8-e4m3", "nvfp4",
    )  # fmt: skip
    purpose: ClassVar[str] = "inputs of layers, after an @"

    number: str
    grain: Grain
    group: int = 0
    asymmetric: bool = False
    static: bool = False

    @classmethod
    def read(cls, text: str) -> Activation | None:
        if text in _BLOCKS:
            return cls(text, "block")
        match = _NAME.fullmatch(text)
        if match is None:
            return None
        bits = int(match["bits"] or 8)
        if not 2 <= bits <= 8:
            raise InputError(
                "E110", f"activation format '{text}': {bits}-bit integers have no grid here; allowed 2 to 8 bits"
            )
        if match["asym"] and not match["bits"]:
            raise InputError("E110", f"activation format '{text}': floats have a sign, so there is no -asym of them")
        group = int(match["group"] or 0)
        if match["group"] and group < 1:
            raise InputError("E110", f"activation format '{text}': a group of {group} channels is impossible")
        grains: dict[str, Grain] = {"token": "token", "tensor": "tensor", "channel": "channel"}
        grain = grains.get(match["grain"], "group")
        if match["static"] and grain in ("token", "group"):
            raise InputError(
                "E110",
                f"activation format '{text}': a scale per token cannot be known beforehand",
                advice="use -tensor-static or -channel-static",
            )
        return cls(match["number"], grain, group, bool(match["asym"]), bool(match["static"]))

    def __str__(self) -> str:
        if self.grain == "block":
            return self.number
        grain = f"g{self.group}" if self.grain == "group" else self.grain
        return f"{self.number}-{grain}{'-asym' * self.asymmetric}{'-static' * self.static}"

    @property
    def bits(self) -> int:
        digits = re.search(r"\d+", self.number)
        assert digits is not None
        return int(digits[0])

    @property
    def behind(self) -> tuple[Format, ...]:
        return (self, Format.parse(self.number)) if self.grain == "block" else (self,)

    @property
    def calibrated(self) -> bool:
        return self.static

    def misfit(self, layer: Layer) -> str:
        if layer.kind == "embedding":
            return "an embedding reads token numbers, which cannot be rounded"
        if layer.kind == "expert":
            return "inputs inside a module of stacked experts cannot be reached"
        if layer.is_part:
            return "the input of a part is that of its whole layer, which has one format; use formats of weights alone"
        if layer.kind == "conv" and (self.grain in ("group", "block") or (self.grain == "channel" and self.static)):
            return "inputs of a convolution are rounded per token or tensor"
        block = _BLOCKS[self.number] if self.grain == "block" else self.group
        if block and layer.columns % block:
            return f"{layer.columns} input channels cannot be cut into groups of {block} for {self}"
        return ""

    def itemised_bytes(self, layer: Layer) -> dict[str, int]:
        if not self.static:
            return {}
        count = layer.columns if self.grain == "channel" else 1
        scales = {"input_scales": _SCALE_BYTES * count}
        return {**scales, "input_zero_points": count} if self.asymmetric else scales
