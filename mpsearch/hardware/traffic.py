"""Bytes that a decode step moves, and the energy that a user's own table gives for them: modelled."""

from __future__ import annotations

import csv
import json
import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path

import numpy as np

from mpsearch.errors import InputError
from mpsearch.format import Format
from mpsearch.hardware.calls import offered
from mpsearch.hardware.in_memory import kept_bytes, read_bytes
from mpsearch.hardware.kernel import Engine
from mpsearch.layer import Decision, Layer, decisions
from mpsearch.tables import Array, CostTable
from mpsearch.workload import Workload

_PICO = 1e-12


@dataclass(frozen=True)
class Traffic:
    """Bytes of weights and KV caches that one decode step reads, each once: modelled.

    Attributes:
        condition: such as ``at context 512``.
        engine: who keeps them; our own files when None.
        caches: KV caches that nothing is decided of.

    >>> Traffic("at context 8").cost([Layer("fc", "linear", (64, 64))], [Format.parse("int8-channel")]).value.tolist()
    [[4224.0]]
    """

    condition: str
    engine: Engine | None = None
    caches: tuple[Layer, ...] = ()

    def cost(self, layers: Sequence[Layer], formats: Sequence[Format]) -> CostTable:
        rows = decisions(layers)
        value = offered(rows, formats, self.engine, lambda row, fmt: self.read(row, fmt))
        kept = kept_bytes(layers, self.engine) + self.read_caches()
        plain = {kind: Format.parse(text) for kind, text in ((False, "bf16"), (True, "kv-bf16"))}
        as_it_is = [self.read(row, plain[row.layers[0].kind == "kv_cache"]) for row in rows]
        return _table(rows, formats, value, f"traffic {self.condition}", "bytes", kept, kept + math.fsum(as_it_is))

    def read_caches(self) -> float:
        """Bytes that one step reads of the caches that are not decided."""
        ((_, step),) = Workload.parse("traffic", self.condition).steps
        return math.fsum(read_bytes(layer, Format.parse("kv-bf16"), step, self.engine) for layer in self.caches)

    def read(self, row: Decision, fmt: Format) -> float:
        """Bytes that one step reads of a decision."""
        ((_, step),) = Workload.parse("traffic", self.condition).steps
        return math.fsum(read_bytes(layer, fmt, step, self.engine) for layer in row.layers)


@dataclass(frozen=True)
class Energy:
    """Joules of one decode step, by a user's table of picojoules: modelled.

    A decision costs its multiply-adds times those of its format, and the bytes that it reads times those of a byte.
    A format that the table lacks is not offered. What is not decided is read at the dearest byte.

    Attributes:
        condition: such as ``at context 512``.
        prices: format -> (picojoules of a multiply-add, picojoules of a byte that is read).
        engine: as of `Traffic`.
        caches: as of `Traffic`.

    >>> energy = Energy("at context 8", {"int8-channel": (1.0, 10.0)})
    >>> table = energy.cost([Layer("fc", "linear", (64, 64), macs=4096)], [Format.parse("int8-channel")])
    >>> round(float(table.value[0, 0]) * 1e12)
    46336
    """

    condition: str
    prices: Mapping[str, tuple[float, float]]
    engine: Engine | None = None
    caches: tuple[Layer, ...] = ()

    def cost(self, layers: Sequence[Layer], formats: Sequence[Format]) -> CostTable:
        rows = decisions(layers)
        value = offered(rows, formats, self.engine, self._cell)
        byte = max((price for _, price in self.prices.values()), default=0.0)
        caches = Traffic(self.condition, self.engine, self.caches).read_caches()
        fixed = _PICO * byte * (caches + kept_bytes(layers, self.engine))
        return _table(rows, formats, value, f"energy {self.condition}", "J", fixed, 0.0)

    def _cell(self, row: Decision, fmt: Format) -> float:
        price = self.prices.get(str(fmt))
        if price is None:
            return math.nan
        ((_, step),) = Workload.parse("energy", self.condition).steps
        macs = step.rows * sum(layer.macs for layer in row.layers)
        return _PICO * (macs * price[0] + Traffic(self.condition, self.engine).read(row, fmt) * price[1])


def _table(
    rows: Sequence[Decision], formats: Sequence[Format], value: Array, resource: str, unit: str, fixed: float,
    reference: float,
) -> CostTable:  # fmt: skip
    return CostTable(
        tuple(row.name for row in rows),
        tuple(map(str, formats)),
        value,
        np.where(np.isnan(value), np.nan, 0.0),
        unit=unit,
        resource=resource,
        kind="modelled",
        fixed=fixed,
        reference=reference,
        source={"target": resource.partition(" ")[0]},
    )


def read_energy(path: Path) -> dict[str, tuple[float, float]]:
    """Read a table of ``format, pj_per_mac, pj_per_byte`` (CSV, or JSON as a list of such records).

    Raises:
        InputError: no such file (E101), or not such a table (E433).
    """
    if not path.is_file():
        raise InputError("E101", f"energy: '{path}' is not a file")
    try:
        text = path.read_text(encoding="utf-8-sig")
        rows = json.loads(text) if path.suffix == ".json" else list(csv.DictReader(text.splitlines()))
        found = {str(row["format"]): (float(row["pj_per_mac"]), float(row["pj_per_byte"])) for row in rows}
    except (KeyError, TypeError, ValueError) as error:
        raise InputError(
            "E433", f"energy: '{path}' cannot be read: {error}", advice="columns: format, pj_per_mac, pj_per_byte"
        ) from error
    for name, prices in found.items():
        if not all(math.isfinite(price) and price >= 0 for price in prices):
            raise InputError("E433", f"energy: '{path}', format {name}: {prices} are no picojoules from 0 on")
    return {str(Format.parse(name)): prices for name, prices in found.items()}
