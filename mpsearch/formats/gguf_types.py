"""The block types of GGUF files, which llama.cpp reads."""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from typing import ClassVar, NamedTuple

from mpsearch.errors import InputError
from mpsearch.format import Format
from mpsearch.layer import Layer


class Block(NamedTuple):
    """A block type: bits of a code, weights per block, bytes per block, and what llama.cpp takes for other widths."""

    bits: int
    weights: int
    size: int
    instead: str = ""


#: GGUF type, as llama.cpp prints it (the two FP4 containers with ``gguf-`` before it) -> its blocks.
BLOCKS: Mapping[str, Block] = {
    "q4_K": Block(4, 256, 144, "q5_0"),
    "q5_K": Block(5, 256, 176, "q5_1"),
    "q6_K": Block(6, 256, 210, "q8_0"),
    "q3_K": Block(3, 256, 110, "q4_0"),
    "q2_K": Block(2, 256, 84, "q4_0"),
    "q8_0": Block(8, 32, 34),
    "q5_1": Block(5, 32, 24),
    "q5_0": Block(5, 32, 22),
    "q4_1": Block(4, 32, 20),
    "q4_0": Block(4, 32, 18),
    "iq4_nl": Block(4, 32, 18),
    "iq4_xs": Block(4, 256, 136, "iq4_nl"),
    "tq1_0": Block(2, 256, 54, "q4_0"),
    "tq2_0": Block(2, 256, 66, "q4_0"),
    "gguf-mxfp4": Block(4, 32, 17),
    "gguf-nvfp4": Block(4, 64, 36),
    "iq3_s": Block(3, 256, 110, "iq4_nl"),
    "iq3_xxs": Block(3, 256, 98, "iq4_nl"),
    "iq2_s": Block(2, 256, 82, "iq4_nl"),
    "iq2_xs": Block(2, 256, 74, "iq4_nl"),
    "iq2_xxs": Block(2, 256, 66, "iq4_nl"),
    "iq1_m": Block(1, 256, 56, "iq4_nl"),
    "iq1_s": Block(1, 256, 50, "iq4_nl"),
}
#: Types whose codes are points of a lattice; llama.cpp searches them with an importance matrix.
LATTICES = frozenset({"iq3_s", "iq3_xxs", "iq2_s", "iq2_xs", "iq2_xxs", "iq1_m", "iq1_s"})
# One scale from the largest weight; all others search, or have two levels of scales.
_IDEMPOTENT = frozenset({"q8_0", "q4_0", "q5_0", "tq1_0", "tq2_0"})
_SPELT: Mapping[str, str] = {name.lower(): name for name in BLOCKS}
# Names of whole-file recipes, which people take for types.
_RECIPES = ("_s", "_m", "_l", "_xl")


@dataclass(frozen=True, slots=True)
class GgufType(Format):
    """A block type of GGUF, printed as llama.cpp prints it: ``q4_K``, ``q6_K``, ``q8_0``, ``iq4_xs``.

    A row is cut into blocks of 32, 64 or 256 weights. The one part is the tensor's bytes as they stand in the file,
    block after block, row after row: ``rows * columns / weights * size`` bytes, scales included. Names are read in
    any case. The containers of FP4 codes are ``gguf-mxfp4`` and ``gguf-nvfp4``, because ``mxfp4`` is the format of
    the OCP standard, which other programs lay out differently.

    Rounding twice may move a weight: each pass finds its scales anew.

    Source: ``ggml-common.h`` and ``GGML_QUANT_SIZES`` of gguf 0.19; the replacement for a row that cannot be cut is
    ``tensor_type_fallback`` of llama.cpp's ``llama-quant.cpp``.

    Attributes:
        name: name of the type.

    >>> str(GgufType.read("Q4_K")), GgufType("q4_K").bytes(Layer("fc", "linear", (4096, 4096)))
    ('q4_K', 9437184)
    """

    family: ClassVar[str] = "gguf"
    codec: ClassVar[str] = "mpsearch.model.codecs.gguf_types:GgufCodec"
    examples: ClassVar[tuple[str, ...]] = tuple(name for name in BLOCKS if name not in LATTICES)
    purpose: ClassVar[str] = "weights of GGUF files for llama.cpp"

    name: str

    @classmethod
    def read(cls, text: str) -> GgufType | None:
        name = text.lower()
        if name in _SPELT:
            return cls(_SPELT[name])
        stem = next((name.removesuffix(end) for end in _RECIPES if name.endswith(end)), "")
        if stem in _SPELT:
            raise InputError(
                "E110",
                f"format '{text}': names a mix of types for a whole file, not one type",
                advice=f"use {_SPELT[stem]}; a plan says which layers take which",
            )
        return None

    def __str__(self) -> str:
        return self.name

    @property
    def idempotent(self) -> bool:
        return self.name in _IDEMPOTENT

    @property
    def bits(self) -> int:
        return BLOCKS[self.name].bits

    @property
    def type_name(self) -> str:
        """Name of the type in a GGUF file and on llama.cpp's command line.

        >>> GgufType("gguf-mxfp4").type_name
        'mxfp4'
        """
        return self.name.removeprefix("gguf-")

    def misfit(self, layer: Layer) -> str:
        if layer.kind == "conv":
            return f"GGUF files hold convolutions in 16 bits; {self} is for linear layers; use fp16"
        block = BLOCKS[self.name]
        if layer.columns % block.weights:
            return (
                f"{layer.columns} weights per output channel cannot be cut into blocks of {block.weights}; "
                f"use {_instead(layer.columns, block)}"
            )
        if self.name in LATTICES:
            return (
                f"mpsearch cannot round to {self}: llama.cpp itself searches its lattice with an importance matrix; "
                "it is priced only; use q2_K, q3_K or iq4_xs"
            )
        return ""

    def itemised_bytes(self, layer: Layer) -> dict[str, int]:
        block = BLOCKS[self.name]
        return {"payload": layer.rows * (layer.columns // block.weights) * block.size}

    def catalogue(self) -> Iterator[Format]:
        yield from (GgufType(name) for name in BLOCKS if name in LATTICES)


def _instead(columns: int, block: Block) -> str:
    """Name what rows of this width can take: llama.cpp's own replacement where there is one."""
    if columns % 32:
        return "fp16"
    return f"{block.instead or 'q4_0'}, as llama.cpp does, or q8_0" if block.instead else "q4_0 or q8_0"
