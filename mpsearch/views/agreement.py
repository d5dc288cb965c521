"""How far estimators agree with each other, and predictions with what was measured."""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import asdict, dataclass, replace
from typing import TYPE_CHECKING, Any

import numpy as np
from numpy.typing import NDArray

from mpsearch.planning import usable
from mpsearch.spread import student_factor
from mpsearch.standings import spearman
from mpsearch.tables import SensitivityTable
from mpsearch.views.steps import SIGNIFICANT, Ladder

if TYPE_CHECKING:
    from mpsearch.stored_study import StoredStudy
    from mpsearch.views.study_view import StudyView

Numbers = NDArray[np.float64]
#: What stands for measurements among the estimators.
MEASURED = "measured"
_FEWEST = 4
_LARGEST = 0.999999
#: Times that decisions are drawn anew.
_DRAWS = 200
#: Other studies that are looked at for scores of the same model.
_STUDIES = 50


@dataclass(frozen=True)
class Agreement:
    """Spearman's rank correlation of two ways to rank the same things.

    Attributes:
        first: an estimator.
        second: another estimator, or ``measured``.
        value: 1 for the same order, 0 for none, -1 for the opposite.
        low: lower end of its 95 % interval (Fisher's transform, with Bonett and Wright's error; of two estimators with
            that of decisions drawn anew).
        high: upper end.
        count: how many cells of the tables, or measured plans, it is made of.
    """

    first: str
    second: str
    value: float
    low: float
    high: float
    count: int

    def __str__(self) -> str:
        of = "measured plans" if self.second == MEASURED else "scores"
        return (
            f"{self.first} and {self.second}: rank correlation {self.value:.3f} "
            f"({self.low:.3f} to {self.high:.3f}) over {self.count} {of}"
        )

    def to_json(self) -> dict[str, Any]:
        """Return it as plain values."""
        return asdict(self)


def correlation(first: str, second: str, x: Numbers, y: Numbers) -> Agreement | None:
    """Correlate two lists; None for fewer than four finite pairs, or where all of a list are equal.

    >>> str(correlation("fisher", "measured", np.arange(5.0), np.array([1.0, 2.0, 4.0, 3.0, 5.0])))
    'fisher and measured: rank correlation 0.900 (-0.169 to 0.996) over 5 measured plans'
    """
    both = np.isfinite(x) & np.isfinite(y)
    x, y = x[both], y[both]
    if len(x) < _FEWEST or not np.ptp(x) or not np.ptp(y):
        return None
    value = float(spearman(x[None], y[None])[0])
    error = math.sqrt((1 + value**2 / 2) / (len(x) - 3))
    middle = _place(value)
    low, high = (math.tanh(middle + sign * SIGNIFICANT * error) for sign in (-1, 1))
    return Agreement(first, second, value, low, high, len(x))


def of_decisions(first: str, second: str, x: Numbers, y: Numbers) -> Agreement | None:
    """Correlate two tables, as `correlation`; the formats of a decision go together, so the interval is of decisions.

    Args:
        first: an estimator.
        second: another one.
        x: (N, F) its scores.
        y: (N, F) those of the other one.
    """
    found = correlation(first, second, x.ravel(), y.ravel())
    if found is None:
        return None
    draws = np.random.default_rng(0).integers(0, len(x), (_DRAWS, len(x)))
    drawn = [correlation(first, second, x[rows].ravel(), y[rows].ravel()) for rows in draws]
    places = [_place(one.value) for one in drawn if one is not None]
    if len(places) < _DRAWS // 2:
        return replace(found, low=-1.0, high=1.0)
    error = float(np.std(places, ddof=1)) * student_factor(max(len(x) - 1, 1))
    low, high = (math.tanh(_place(found.value) + sign * SIGNIFICANT * error) for sign in (-1, 1))
    return replace(found, low=low, high=high)


def _place(value: float) -> float:
    """Fisher's transform of a correlation."""
    return math.atanh(min(max(value, -_LARGEST), _LARGEST))


def agreement(view: StudyView) -> tuple[Agreement, ...]:
    """Correlate every estimator with what was measured, then every two estimators with each other.

    Predictions are sums of settled scores over the measured plans; those of the study's own estimator come first. Two
    estimators are compared cell by cell, in all decisions and formats that both scored.

    Args:
        view: of a study.

    >>> from mpsearch.testing.views import pretended
    >>> [found.second for found in agreement(pretended(20, 16, 4))]
    ['measured']
    """
    tables = [table for table in (view.scores, *view.others) if table is not None]
    names = [estimator(table) for table in tables]
    there = view.points.measured
    found = []
    for name, table in zip(names, tables, strict=True):
        predicted = _predictions(view, table)
        found.append(correlation(name, MEASURED, predicted[there], view.points.loss[there]))
    for i, first in enumerate(tables):
        for j, second in enumerate(tables[i + 1 :], start=i + 1):
            found.append(of_decisions(names[i], names[j], *_cells(first, second)))
    return tuple(one for one in found if one is not None)


def estimator(table: SensitivityTable) -> str:
    """Name of the estimator that made a table."""
    return str(table.source.get("estimator", "")) or "unnamed"


def _predictions(view: StudyView, table: SensitivityTable) -> Numbers:
    """(P,) predicted loss of each plan by a table; NaN where a decision has no score."""
    ladder = Ladder.of(view, scores=table)
    lead = list(view.leads)
    rows = np.arange(len(lead))
    sums: Numbers = np.array([ladder.loss[rows, choice[lead]].sum() for choice in view.points.choice], dtype=np.float64)
    return sums


def _cells(first: SensitivityTable, second: SensitivityTable) -> tuple[Numbers, Numbers]:
    """(N, F) settled scores of two tables in the formats that both have."""
    shared = [name for name in first.formats if name in second.formats]
    a, b = ([table.formats.index(name) for name in shared] for table in (first, second))
    return usable(first).value[:, a], usable(second).value[:, b]


def other_tables(study: StoredStudy, scores: SensitivityTable) -> tuple[SensitivityTable, ...]:
    """Scores of the same decisions by other estimators, one table for each, that the database holds.

    Looked for in the study itself, whose estimators may have competed, and in the newest studies of the same model.

    Args:
        study: the study.
        scores: its own.
    """
    store, name = study.store, study.name
    origin = _model(study, name)
    rows = [row.name for row in store.studies() if row.name != name and row.spec.get("model") == study.spec.model]
    found: dict[str, SensitivityTable] = {}
    for other in [name, *rows[:_STUDIES]]:
        if other != name and (not origin or _model(study, other) != origin):
            continue
        keys = [link.key for link in store.links(other, "scores")]
        for body in store.get_many("scores", keys).values():
            table = SensitivityTable.from_json(body)
            if table.layers == scores.layers and estimator(table) != estimator(scores):
                found.setdefault(estimator(table), table)
    return tuple(found[name] for name in sorted(found))


def _model(study: StoredStudy, name: str) -> str:
    """Digest of the model of a study; empty before it was looked at."""
    keys: Sequence[str] = [link.key for link in study.store.links(name, "origin")]
    bodies = study.store.get_many("origin", keys)
    return str(bodies[keys[-1]].get("model", "")) if keys and keys[-1] in bodies else ""
