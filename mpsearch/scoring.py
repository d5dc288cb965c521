"""Scores of a study: which cells are missing, who computes them, and the table they make."""

from __future__ import annotations

import math
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass, replace
from typing import Any

import numpy as np

from mpsearch import registry
from mpsearch.errors import InputError, ResourceError
from mpsearch.format import Format
from mpsearch.keys import content_key
from mpsearch.layer import Layer, Layers, check_layers, decisions
from mpsearch.ports import Estimator, Store
from mpsearch.records import CellRow
from mpsearch.tables import SensitivityTable
from mpsearch.tasks import Failed, Job, ScoreTask


def check_covers(estimator: str, formats: Sequence[Format]) -> None:
    """Refuse formats of something that an estimator does not see: it would call them harmless.

    Raises:
        InputError: E506.
    """
    found = blind_to(estimator, formats)
    if found is not None:
        what, fmt = found
        able = [
            x for x in registry.names("estimators") if what in getattr(registry.load("estimators", x), "covers", ())
        ]
        raise InputError(
            "E506",
            f"estimator '{estimator}' does not see {what}, so it cannot score '{fmt}'",
            advice=f"estimators that do: {', '.join(able)}",
        )


def check_parts(estimator: str, layers: Sequence[Layer]) -> None:
    """Refuse parts of layers for an estimator that is not right for them.

    Raises:
        InputError: E506; something else than layers (E113).
    """
    check_layers(layers)
    part = next((layer for layer in layers if layer.is_part), None)
    if part is not None and not getattr(registry.load("estimators", estimator), "parts", False):
        able = [x for x in registry.names("estimators") if getattr(registry.load("estimators", x), "parts", False)]
        raise InputError(
            "E506",
            f"estimator '{estimator}' scores whole layers, and '{part.name}' is part of one",
            advice=f"estimators that score parts: {', '.join(able)}",
        )


def check_menu(layers: Sequence[Layer], formats: Sequence[Format]) -> None:
    """Refuse a menu of which no layer takes anything: its table would be empty.

    Raises:
        InputError: E130, with the reason of the first layer.
    """
    if layers and all(fmt.refuses(layer) for layer in layers for fmt in formats):
        why = formats[0].refuses(layers[0])
        raise InputError(
            "E130",
            f"no layer takes any of {', '.join(map(str, formats))}",
            because=f"'{layers[0].name}': {why}",
            advice="mpsearch formats MODEL lists what each layer refuses, and what would fit",
        )


def mark_unreached(
    table: SensitivityTable, layers: Sequence[Layer], formats: Sequence[Format], estimator: Estimator
) -> SensitivityTable:
    """Say ``not_observed`` of parts of layers that no token reached, where the score of 0 would read as harmless.

    An expert that gets no token, or the row of a token that does not occur, is multiplied by nothing. Of a whole layer
    estimators see whether it is called; of a part only its score tells: 0 in every format that rounds weights. A part
    whose weights no format changes looks the same, and is marked as well.

    Args:
        table: scores.
        layers: what was scored.
        formats: the formats of the table's columns.
        estimator: what scored; one that does not look at data knows every part.

    >>> part = Layer("experts", "expert", (2, 4, 4)).part((0, 4))
    >>> scores = SensitivityTable((part.name,), ("int4",), [[0.0]], [[0.0]], "nats/token")
    >>> mark_unreached(scores, [part], [Format.parse("int4-channel")], registry.make("estimators", "fisher")).status
    (('not_observed',),)
    """
    if "data" not in getattr(estimator, "needs", ("data",)) or not any(layer.is_part for layer in layers):
        return table
    of_parts = {row.name for row in decisions(layers) if all(layer.is_part for layer in row.layers)}
    rounding = [j for j, fmt in enumerate(formats) if fmt.weight.family != "plain"]
    value, spread = table.value.copy(), table.spread.copy()
    status = [list(row) for row in table.status]
    for i, name in enumerate(table.layers):
        seen = [j for j in rounding if status[i][j] == "ok"]
        if name in of_parts and not value[i, seen].any():
            for j in seen:
                value[i, j] = spread[i, j] = math.nan
                status[i][j] = "not_observed"
    return replace(table, value=value, spread=spread, status=tuple(map(tuple, status)))


def blind_to(estimator: str, formats: Sequence[Format]) -> tuple[str, Format] | None:
    """What an estimator does not see of a menu, ``activations`` or ``caches``, and the first format of it."""
    covers = getattr(registry.load("estimators", estimator), "covers", ("weights",))
    blind = {
        "activations": next((fmt for fmt in formats if fmt.activation is not None), None),
        "caches": next((fmt for fmt in formats if fmt.family == "kv"), None),
    }
    return next(((what, fmt) for what, fmt in blind.items() if fmt is not None and what not in covers), None)


Compute = Callable[[Sequence[Job]], Iterator[tuple[int, Failed | None]]]


def scores_key(source: Mapping[str, Any]) -> str:
    """Key under which scores of a source are stored: their scope, or one of their own while there are gaps."""
    scope, gaps = str(source["scope"]), source.get("gaps")
    return content_key([scope, sorted(gaps.items())]) if gaps else scope


@dataclass(frozen=True)
class Scoring:
    """The scoring of one model by one estimator, kept cell by cell under its scope.

    Attributes:
        scope: content key of everything that the scores depend on.
        estimator: name of the estimator.
        settings: its settings.
        layers: what is scored.
        formats: in which formats.
        batches: number of calibration batches.
    """

    scope: str
    estimator: str
    settings: tuple[tuple[str, Any], ...]
    layers: Layers
    formats: tuple[Format, ...]
    batches: int

    def table(
        self,
        store: Store,
        compute: Compute,
        report: Callable[[int, int], None],
        limit: float = math.inf,
    ) -> SensitivityTable:
        """Return the scores; have only the cells that are missing computed.

        What cannot be scored, because it kills every worker that tries, is ``failed`` in the table; a batch that does
        is left out of the mean. ``source["gaps"]`` says why.

        Args:
            store: where cells are kept.
            compute: has jobs done, which keeps their results, and yields (index, why there is none) as they end.
            report: called with (done, total).
            limit: seconds on one core. An estimator that scores batch by batch, and needs longer for all by the time
                of its first, scores the first ones only. ``source["batches"]`` says how many.
        """
        known = store.get("scores", self.scope)
        if known is not None:
            return SensitivityTable.from_json(known)
        if limit < math.inf and self.batches > 1 and registry.load("estimators", self.estimator).by == "batch":
            replace(self, batches=1)._fill(store, compute, lambda done, total: report(done, self.batches))
            fitting = max(1, int(limit / max(self.seconds(store, 1), 1e-9)))
            if fitting < self.batches:
                part = replace(self, batches=fitting)
                return part._assemble(store, True, part._fill(store, compute, report)[1])
        by_batch, gaps = self._fill(store, compute, report)
        found = self._assemble(store, by_batch, gaps)
        # What has gaps is tried again another time.
        store.put("scores", scores_key(found.source), found.to_json())
        return found

    def _fill(
        self, store: Store, compute: Compute, report: Callable[[int, int], None]
    ) -> tuple[bool, dict[tuple[str, str, int], str]]:
        """Have missing cells computed; say whether that is batch by batch, and which there will not be, and why."""
        by_batch = bool(registry.load("estimators", self.estimator).by == "batch")
        rows = {(r.layer, r.format, r.batch): r for r in store.cells(self.scope)}
        tasks = list(self._missing(rows.keys(), by_batch))
        total = self.batches if by_batch else len(list(self._missing((), False)))
        report(total - len(tasks), total)
        gaps = {}
        for done, (i, failed) in enumerate(compute([Job(task, self.scope) for task in tasks]), start=1):
            if failed is not None:
                task = tasks[i]
                place = (task.decisions[0], task.formats[0]) if task.decisions else ("", "")
                gaps[(*place, -1 if task.batch is None else task.batch)] = failed.message
            report(total - len(tasks) + done, total)
        # In the order of their names, whichever ended first.
        return by_batch, dict(sorted(gaps.items()))

    def seconds(self, store: Store, batches: int | None = None) -> float:
        """Computing time of the stored cells on one core, of the first batches or of all."""
        by_task: dict[Any, float] = {}
        for row in store.cells(self.scope):
            if batches is None or row.batch < batches:
                by_task[row.batch if row.batch >= 0 else (row.layer, row.format)] = row.seconds
        return math.fsum(by_task.values())

    def _missing(self, known: Any, by_batch: bool) -> Iterator[ScoreTask]:
        names = [str(fmt) for fmt in self.formats]
        if by_batch:
            first = self.layers.decisions[0].name
            for i in range(self.batches):
                # A batch's cells are kept in one transaction: all are there, or none.
                if (first, names[0], i) not in known:
                    yield ScoreTask(self.estimator, self.settings, (), tuple(names), i)
            return
        for decision in self.layers.decisions:
            for fmt in self.formats:
                offered = not any(fmt.refuses(layer) for layer in decision.layers)
                if offered and (decision.name, str(fmt), -1) not in known:
                    yield ScoreTask(self.estimator, self.settings, (decision.name,), (str(fmt),))

    def _assemble(self, store: Store, by_batch: bool, gaps: Mapping[tuple[str, str, int], str]) -> SensitivityTable:
        rows = {(r.layer, r.format, r.batch): r for r in store.cells(self.scope)}
        rows |= {key: CellRow(*key, "failed", None, None, 0, reason=why) for key, why in gaps.items()}
        unit = (store.get("score_unit", self.scope) or {}).get("unit", "")
        without = {batch for _, _, batch in gaps} if by_batch else set()
        indices = [i for i in range(self.batches) if i not in without] if by_batch else [-1]
        if not indices:
            raise ResourceError(
                "E522", f"no batch could be scored: {next(iter(gaps.values()))}", advice="fewer workers"
            )
        found = SensitivityTable.mean([self._part(rows, i, unit) for i in indices])
        if not gaps:
            return found
        told = {
            " ".join(filter(None, [layer, fmt, f"batch {i}" if i >= 0 else ""])): why
            for (layer, fmt, i), why in gaps.items()
        }
        return replace(found, source={**found.source, "gaps": told, "batches": self.batches - len(without)})

    def _part(self, rows: dict[tuple[str, str, int], CellRow], batch: int, unit: str) -> SensitivityTable:
        names = tuple(decision.name for decision in self.layers.decisions)
        formats = tuple(str(fmt) for fmt in self.formats)
        empty = CellRow("", "", batch, "not_offered", None, None, 0)
        cells = [[rows.get((name, fmt, batch), empty) for fmt in formats] for name in names]
        shape = (len(names), len(formats))
        return SensitivityTable(
            names,
            formats,
            np.array([[math.nan if c.value is None else c.value for c in row] for row in cells]).reshape(shape),
            np.array([[math.nan if c.spread is None else c.spread for c in row] for row in cells]).reshape(shape),
            unit,
            tuple(tuple(c.status for c in row) for row in cells),  # type: ignore[misc]
            max((c.samples for row in cells for c in row), default=0),
            {
                "estimator": self.estimator,
                "settings": dict(self.settings),
                "scope": self.scope,
                "batches": self.batches,
            },
        )
