"""A number format of one's own: integers whose scale is a power of two per output channel, printed ``shift<bits>``."""

from __future__ import annotations

import dataclasses
import re
from collections.abc import Mapping
from typing import ClassVar

import torch
from torch import Tensor

from mpsearch.errors import InputError
from mpsearch.format import Format
from mpsearch.layer import Layer
from mpsearch.model.codec import Bytes, Codec, Evidence, Parts, as_bytes, from_bytes


@dataclasses.dataclass(frozen=True, slots=True)
class Shifted(Format):
    """Its name, what it takes, and the bytes of each stored part."""

    family: ClassVar[str] = "shift"
    codec: ClassVar[str] = "shift_format:ShiftedCodec"
    examples: ClassVar[tuple[str, ...]] = ("shift8", "shift5")
    purpose: ClassVar[str] = "micro-controllers without multiplier"

    bits: int

    @classmethod
    def read(cls, text: str) -> Shifted | None:
        match = re.fullmatch(r"shift(\d)", text)
        if match and int(match[1]) < 2:
            raise InputError("E110", f"format '{text}': allowed 2 to 9 bits")
        return cls(int(match[1])) if match else None

    def __str__(self) -> str:
        return f"shift{self.bits}"

    def itemised_bytes(self, layer: Layer) -> dict[str, int]:
        return {"payload": layer.weights, "shifts": layer.rows}


class ShiftedCodec(Codec[Shifted]):
    """How it rounds; rows are output channels, of shape (rows, columns).

    `encode` makes the stored parts and `decode` the weights that they stand for; `pack` and `unpack` turn the parts
    into the bytes that the format prices, and back.
    """

    def encode(self, rows: Tensor, fmt: Shifted, evidence: Evidence) -> dict[str, Tensor]:
        values, top = rows.to(torch.float32), 2 ** (fmt.bits - 1) - 1
        mantissa, exponent = torch.frexp(values.abs().amax(1, keepdim=True) / top)
        shifts = (exponent - (mantissa == 0.5).int()).clamp(-100, 127 - fmt.bits)
        codes = (values * torch.exp2(-shifts.double())).float().round().clamp(-top, top)
        return {"payload": codes.to(torch.int8), "shifts": shifts.to(torch.int8)}

    def decode(self, parts: Parts, fmt: Shifted, columns: int) -> Tensor:
        return (parts["payload"] * torch.exp2(parts["shifts"].double())).float()

    def pack(self, parts: Parts, fmt: Shifted) -> dict[str, Bytes]:
        return {name: as_bytes(part) for name, part in parts.items()}

    def unpack(self, packed: Mapping[str, Bytes], fmt: Shifted, layer: Layer) -> dict[str, Tensor]:
        shapes = {"payload": (layer.rows, layer.columns), "shifts": (layer.rows, 1)}
        return {name: from_bytes(packed[name], torch.int8, *shape) for name, shape in shapes.items()}
