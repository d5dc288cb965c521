"""What becomes of a task's result: rows that are stored with the end of its lease, all or none."""

from __future__ import annotations

import math
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

from mpsearch.records import CellRow, ValueRow
from mpsearch.tables import SensitivityTable
from mpsearch.tasks import Job, ScoreTask

if TYPE_CHECKING:
    from mpsearch.ports import Store


@dataclass(frozen=True)
class Kept:
    """Rows of one result.

    Attributes:
        values: JSON values under their content keys.
        cells: scores, each list with its scope.
    """

    values: tuple[ValueRow, ...] = ()
    cells: tuple[tuple[str, tuple[CellRow, ...]], ...] = ()


def kept(job: Job, result: Any) -> Kept:
    """Say what is to be stored of a result.

    Args:
        job: what was done.
        result: what its task gave; not a `Failed`.

    >>> from mpsearch.tasks import RatioTask
    >>> kept(Job(RatioTask("activation_spikes"), "k"), {"fc": 2.0, "out": math.nan}).values[0].body
    {'ratios': {'fc': 2.0, 'out': None}}
    """
    if isinstance(job.task, ScoreTask):
        unit = ValueRow("score_unit", job.goes, {"unit": result.unit})
        return Kept((unit,), ((job.goes, tuple(_cells(result, job.task.batch))),))
    if job.kind == "ratios":
        # A stored value is never NaN.
        ratios = {name: x if math.isfinite(x) else None for name, x in result.items()}
        return Kept((ValueRow("ratios", job.goes, {"ratios": ratios}),))
    body = result.to_json()
    if job.kind == "survey":
        return Kept((ValueRow("survey", job.goes, body),))
    return Kept((ValueRow("measurement", job.goes, body, {"seconds": body.pop("seconds")}),))


#: Kind of job -> kind of the value that it gives.
_VALUES = {"survey": "survey", "ratios": "ratios", "measure": "measurement"}


def missing(store: Store, jobs: Sequence[Job]) -> list[Job]:
    """Jobs whose results a store does not hold."""
    cells: dict[str, set[tuple[str, str, int]]] = {}
    keys: dict[str, list[str]] = {}
    for job in jobs:
        keys.setdefault(_VALUES.get(job.kind, ""), []).append(job.goes)
    known = {kind: store.get_many(kind, goes) for kind, goes in keys.items() if kind}
    found = []
    for job in jobs:
        if not isinstance(job.task, ScoreTask):
            if job.goes not in known[_VALUES[job.kind]]:
                found.append(job)
            continue
        if job.goes not in cells:
            cells[job.goes] = {(row.layer, row.format, row.batch) for row in store.cells(job.goes)}
        task, there = job.task, cells[job.goes]
        batch = -1 if task.batch is None else task.batch
        if task.decisions:
            held = (task.decisions[0], task.formats[0], batch) in there
        else:
            # A batch's cells are kept in one transaction: all are there, or none.
            held = any(row[2] == batch for row in there)
        if not held:
            found.append(job)
    return found


def _cells(table: SensitivityTable, batch: int | None) -> Iterator[CellRow]:
    seconds = float(table.source.get("seconds", 0.0))
    for i, name in enumerate(table.layers):
        for j, fmt in enumerate(table.formats):
            value, spread = float(table.value[i, j]), float(table.spread[i, j])
            yield CellRow(
                name,
                fmt,
                -1 if batch is None else batch,
                table.status[i][j],
                value if math.isfinite(value) else None,
                spread if math.isfinite(spread) else None,
                table.samples,
                seconds=seconds,
            )
