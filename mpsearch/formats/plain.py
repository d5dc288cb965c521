"""Plain number types: bf16, fp16, fp32."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import ClassVar

from mpsearch.format import Format
from mpsearch.layer import Layer

_DTYPES: Mapping[str, str] = {"bf16": "bfloat16", "fp16": "float16", "fp32": "float32"}


@dataclass(frozen=True, slots=True)
class Plain(Format):
    """A plain number type, without scales.

    Attributes:
        name: ``bf16``, ``fp16`` or ``fp32``.

    >>> Plain("bf16").bytes(Layer("fc", "linear", (3, 5)))
    30
    """

    family: ClassVar[str] = "plain"
    codec: ClassVar[str] = "mpsearch.model.codecs.plain:PlainCodec"
    examples: ClassVar[tuple[str, ...]] = ("bf16", "fp16", "fp32")
    purpose: ClassVar[str] = "what is left as it is"

    name: str

    @classmethod
    def read(cls, text: str) -> Plain | None:
        return cls(text) if text in _DTYPES else None

    def __str__(self) -> str:
        return self.name

    @property
    def bits(self) -> int:
        return 32 if self.name == "fp32" else 16

    @property
    def dtype(self) -> str:
        """Name of the number type, such as ``bfloat16``."""
        return _DTYPES[self.name]

    def itemised_bytes(self, layer: Layer) -> dict[str, int]:
        return {"payload": layer.weights * self.bits // 8}
