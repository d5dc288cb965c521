"""NormalFloat: codes at quantiles of a normal distribution, with an absmax per block."""

from __future__ import annotations

import math
import re
from dataclasses import dataclass
from typing import ClassVar

from mpsearch.errors import InputError
from mpsearch.format import Format
from mpsearch.layer import Layer

BITS = (2, 3, 4)
BLOCKS = (16, 32, 64, 128, 256, 512, 1024, 2048, 4096)
ABSMAX_BYTES = 4
_NAME = re.compile(r"nf(?P<bits>\d+)-b(?P<block>\d+)(-dq(?P<nested>\d+))?")


@dataclass(frozen=True, slots=True)
class NormalFloat(Format):
    """NormalFloat of 2 to 4 bits, printed ``nf<bits>-b<block>[-dq<blocks>]``.

    Each block of ``block`` consecutive weights of an output channel has a float32 absmax. With double quantization
    the absmaxes, less their mean, are numbers of 8 bits, with a float32 absmax of their own per ``nested`` blocks;
    the mean is one float32 per weight tensor. Blocks of blocks run on from row to row. Each output channel's codes are
    padded to a whole byte. Source: QLoRA (arXiv:2305.14314) and bitsandbytes.

    Attributes:
        bits: bits of one code.
        block: weights that share one absmax.
        nested: blocks whose absmaxes share one absmax; 0 without double quantization.

    Rounding twice changes nothing only without double quantization: with it, the absmaxes of what has been rounded are
    others than the ones it was rounded with.

    >>> NormalFloat(4, 64, 256).itemised_bytes(Layer("fc", "linear", (4096, 4096)))
    {'payload': 8388608, 'absmax': 262144, 'nested_absmax': 4096, 'nested_mean': 4}
    """

    family: ClassVar[str] = "nf"
    codec: ClassVar[str] = "mpsearch.model.codecs.normal_float:NormalFloatCodec"
    examples: ClassVar[tuple[str, ...]] = ("nf4-b64", "nf4-b64-dq256", "nf4-b128", "nf3-b64", "nf2-b64")
    purpose: ClassVar[str] = "normally distributed weights, as bitsandbytes stores them"

    bits: int
    block: int
    nested: int = 0

    @classmethod
    def read(cls, text: str) -> NormalFloat | None:
        match = _NAME.fullmatch(text)
        if match is None:
            return None
        bits, block, nested = int(match["bits"]), int(match["block"]), int(match["nested"] or 0)
        if bits not in BITS:
            raise InputError("E110", f"format '{text}': NormalFloat has 2, 3 or 4 bits, not {bits}")
        for size in (block, nested) if match["nested"] else (block,):
            if size not in BLOCKS:
                raise InputError(
                    "E110",
                    f"format '{text}': blocks of {size} are not known; allowed {', '.join(map(str, BLOCKS))}",
                    advice=f"write nf{bits}-b64 or nf{bits}-b64-dq256",
                )
        return cls(bits, block, nested)

    def __str__(self) -> str:
        return f"nf{self.bits}-b{self.block}" + (f"-dq{self.nested}" if self.nested else "")

    @property
    def idempotent(self) -> bool:
        return not self.nested

    def misfit(self, layer: Layer) -> str:
        if layer.columns % self.block == 0:
            return ""
        sizes = [f"b{n}" for n in reversed(BLOCKS) if layer.columns % n == 0]
        return (
            f"{layer.columns} weights per output channel cannot be cut into blocks of {self.block}; "
            f"use {', '.join(sizes) or f'int{self.bits}-channel'}"
        )

    def blocks(self, layer: Layer) -> int:
        """Number of blocks of a layer."""
        return layer.rows * (layer.columns // self.block)

    def itemised_bytes(self, layer: Layer) -> dict[str, int]:
        blocks = self.blocks(layer)
        payload = {"payload": layer.rows * math.ceil(layer.columns * self.bits / 8)}
        if not self.nested:
            return {**payload, "absmax": blocks * ABSMAX_BYTES}
        return {
            **payload,
            "absmax": blocks,
            "nested_absmax": math.ceil(blocks / self.nested) * ABSMAX_BYTES,
            "nested_mean": ABSMAX_BYTES,
        }
