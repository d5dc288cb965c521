"""Code books: each weight one of a few numbers, which are found for every channel."""

from __future__ import annotations

import math
import re
from dataclasses import dataclass
from typing import ClassVar

from mpsearch.errors import InputError
from mpsearch.format import Format, Needs
from mpsearch.formats.integer import Granularity, group_misfit
from mpsearch.layer import Layer

ENTRY_BYTES = 2
_NAME = re.compile(r"codebook(?P<bits>\d+)-(?P<grain>tensor|channel|g(?P<group>\d+))(?P<fisher>-fisher)?")


@dataclass(frozen=True, slots=True)
class Codebook(Format):
    """Code books of ``2**bits`` fp16 numbers, printed ``codebook<bits>-<granularity>[-fisher]``.

    There is one code book per tensor, output channel or group, found by k-means. Each output channel's codes are
    padded to a whole byte. Source: SqueezeLLM (arXiv:2306.07629) without its sparse part; Deep Compression
    (arXiv:1510.00149) for whole tensors.

    Attributes:
        bits: bits of one code.
        granularity: what shares one code book.
        group: weights that share one code book, for ``granularity="group"``.
        fisher: whether each weight counts by how much the loss hangs on it.

    >>> Codebook(3, "channel").itemised_bytes(Layer("fc", "linear", (2, 5)))
    {'payload': 4, 'codebook': 32}
    """

    family: ClassVar[str] = "codebook"
    codec: ClassVar[str] = "mpsearch.model.codecs.codebook:CodebookCodec"
    examples: ClassVar[tuple[str, ...]] = (
        "codebook4-channel", "codebook4-channel-fisher", "codebook3-channel", "codebook2-g128",
    )  # fmt: skip
    purpose: ClassVar[str] = "weights of any distribution, read through a table"

    bits: int
    granularity: Granularity
    group: int = 0
    fisher: bool = False

    @classmethod
    def read(cls, text: str) -> Codebook | None:
        match = _NAME.fullmatch(text)
        if match is None:
            return None
        bits, group = int(match["bits"]), int(match["group"] or 0)
        if not 2 <= bits <= 8:
            raise InputError("E110", f"format '{text}': a code book has 2 to 8 bits here, not {bits}")
        if match["group"] and group <= 2**bits:
            raise InputError(
                "E110",
                f"format '{text}': a code book of {2**bits} numbers for {group} weights; allowed g{2**bits + 1} and up",
                advice=f"write codebook{bits}-channel",
            )
        grain: Granularity = "group" if group else "channel" if match["grain"] == "channel" else "tensor"
        return cls(bits, grain, group, bool(match["fisher"]))

    def __str__(self) -> str:
        grain = f"g{self.group}" if self.granularity == "group" else self.granularity
        return f"codebook{self.bits}-{grain}" + ("-fisher" if self.fisher else "")

    @property
    def needs(self) -> Needs:
        return "importance" if self.fisher else ""

    def misfit(self, layer: Layer) -> str:
        return group_misfit(layer, self.group) if self.granularity == "group" else ""

    def books(self, layer: Layer) -> tuple[int, int]:
        """Number of code books of a layer: (rows, books per row)."""
        rows = 1 if self.granularity == "tensor" else layer.rows
        return rows, layer.columns // self.group if self.granularity == "group" else 1

    def itemised_bytes(self, layer: Layer) -> dict[str, int]:
        return {
            "payload": layer.rows * math.ceil(layer.columns * self.bits / 8),
            "codebook": math.prod(self.books(layer)) * 2**self.bits * ENTRY_BYTES,
        }
