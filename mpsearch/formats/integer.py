"""Integers with a scale per tensor, output channel or group."""

from __future__ import annotations

import math
import re
from dataclasses import dataclass, replace
from typing import ClassVar, Literal

from mpsearch.errors import InputError
from mpsearch.format import Format, Needs
from mpsearch.layer import Layer

Granularity = Literal["tensor", "channel", "group"]
Grid = Literal["", "full", "asym"]
Rule = Literal["", "mse", "gptq"]

SCALE_BYTES = 2
_NAME = re.compile(
    r"int(?P<bits>\d+)-(?P<grain>tensor|channel|g(?P<group>-?\d+))(-(?P<grid>asym|full))?(-(?P<rule>mse|gptq))?"
)


@dataclass(frozen=True, slots=True)
class Integer(Format):
    """Integers of 2 to 8 bits, printed ``int<bits>-<granularity>[-asym|-full][-mse|-gptq]``.

    Codes have ``bits`` bits. There is one fp16 scale per tensor, output channel or group of ``group`` consecutive
    weights of an output channel, and for asymmetric ones a ``bits``-bit zero point beside each scale. Each output
    channel's codes, and each channel's zero points, are padded to a whole byte.

    Attributes:
        bits: bits of one code.
        granularity: what shares one scale.
        group: weights that share one scale, for ``granularity="group"``.
        grid: empty: codes from ``-(2**(bits-1)-1)`` to ``2**(bits-1)-1``; ``full``: from ``-2**(bits-1)``, with the
            scale ``2 max|w| / (2**bits - 1)`` of compressed-tensors; ``asym``: from 0 to ``2**bits-1`` with a
            stored zero point.
        rule: how scales and codes are found: empty: from the largest weight, each weight to its nearest code;
            ``mse``: the scale of least squared error; ``gptq``: codes column by column, each column's error made good
            by those that follow.

    Rounding twice changes nothing for the symmetric grid without a rule. The codes of the other grids, and of ``mse``,
    need not reach the ends of their range, and what falls short may get a finer scale the second time; GPTQ moves
    weights before it rounds them.

    >>> Integer(3, "group", 5, "asym").itemised_bytes(Layer("fc", "linear", (2, 5)))
    {'payload': 4, 'scales': 4, 'zero_points': 2}
    """

    family: ClassVar[str] = "int"
    codec: ClassVar[str] = "mpsearch.model.codecs.integer:IntegerCodec"
    examples: ClassVar[tuple[str, ...]] = (
        "int4-g128", "int4-g128-asym", "int4-g128-full", "int4-g128-mse", "int4-g128-gptq", "int2-g64", "int3-g64",
        "int8-channel", "int8-tensor",
    )  # fmt: skip
    purpose: ClassVar[str] = "weights for integer kernels; 2 to 8 bits, symmetric or not"

    bits: int
    granularity: Granularity = "tensor"
    group: int = 0
    grid: Grid = ""
    rule: Rule = ""

    @classmethod
    def read(cls, text: str) -> Integer | None:
        match = _NAME.fullmatch(text)
        if match is None:
            return None
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
        grid: Grid = "asym" if match["grid"] == "asym" else "full" if match["grid"] else ""
        rule: Rule = "mse" if match["rule"] == "mse" else "gptq" if match["rule"] else ""
        return cls(bits, grain, group, grid, rule)

    def __str__(self) -> str:
        grain = f"g{self.group}" if self.granularity == "group" else self.granularity
        return "-".join(part for part in (f"int{self.bits}", grain, self.grid, self.rule) if part)

    @property
    def needs(self) -> Needs:
        return "hessian" if self.rule == "gptq" else ""

    @property
    def idempotent(self) -> bool:
        # Symmetric, from the largest weight, and the scale a normal fp16 number.
        return not self.grid and not self.rule

    @property
    def asymmetric(self) -> bool:
        """Whether a zero point is stored beside each scale."""
        return self.grid == "asym"

    def misfit(self, layer: Layer) -> str:
        if self.rule == "gptq" and layer.kind in ("embedding", "expert"):
            why = "an embedding has none" if layer.kind == "embedding" else "each expert has inputs of its own"
            return f"GPTQ goes by the layer's inputs, and {why}; use {replace(self, rule='mse')}"
        if self.rule == "gptq" and layer.groups > 1:
            why = f"each of {layer.groups} groups of channels has inputs of its own"
            return f"GPTQ goes by the layer's inputs, and {why}; use {replace(self, rule='mse')}"
        return group_misfit(layer, self.group) if self.granularity == "group" else ""

    def scales(self, layer: Layer) -> int:
        """Number of scales of a layer."""
        if self.granularity == "tensor":
            return 1
        return layer.rows * (layer.columns // self.group if self.granularity == "group" else 1)

    def itemised_bytes(self, layer: Layer) -> dict[str, int]:
        scales = self.scales(layer)
        zero_rows = 1 if self.granularity == "tensor" else layer.rows
        zeros = zero_rows * math.ceil(scales // zero_rows * self.bits / 8)
        return {
            "payload": layer.rows * math.ceil(layer.columns * self.bits / 8),
            "scales": scales * SCALE_BYTES,
            **({"zero_points": zeros} if self.asymmetric else {}),
        }


def group_misfit(layer: Layer, group: int) -> str:
    """Say why a layer's rows cannot be cut into groups; empty when they can."""
    if layer.columns % group == 0:
        return ""
    sizes = [n for n in range(min(layer.columns, group), 7, -1) if layer.columns % n == 0][:4]
    instead = ", ".join([f"g{n}" for n in sizes])
    return (
        f"{layer.columns} weights per output channel cannot be cut into groups of {group}; "
        f"use {instead + ' or ' if instead else ''}channel"
    )
