"""A table that was measured elsewhere, in place of an engine that runs here."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import ClassVar

from mpsearch.errors import InputError
from mpsearch.format import Format
from mpsearch.hardware.clock import Stopwatch
from mpsearch.hardware.kernel import Kernel, Loaded
from mpsearch.layer import Layer


@dataclass(frozen=True)
class Table:
    """Whatever ran the kernels of a user's own table: it has those that the table holds.

    Attributes:
        fused: linear siblings that are one decision are one row of the table, with the rows of all of them.
    """

    name: ClassVar[str] = "table"
    extra: ClassVar[str] = ""
    cache_bits: ClassVar[int] = 16
    fuses: bool = False
    device: str = "cpu"

    def missing(self) -> str:
        return ""

    def versions(self) -> Mapping[str, str]:
        return {}

    def refuses(self, kernel: Kernel) -> str:
        return ""

    def bytes(self, kernel: Kernel) -> int:
        return Format.parse(kernel.format).bytes(Layer("kernel", kernel.kind, (kernel.rows, kernel.columns)))

    def stopwatch(self) -> Stopwatch | None:
        return None

    def load(self, kernel: Kernel, copies: int, threads: int) -> Loaded:
        raise InputError("E431", "a table was measured elsewhere: there is nothing to run")
