"""The next larger and the next smaller format of each decision: what such a step gains, and what it costs."""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, Literal

import numpy as np
from numpy.typing import NDArray

from mpsearch.errors import InputError
from mpsearch.format import Format
from mpsearch.plan import BitPlan
from mpsearch.planning import usable
from mpsearch.tables import SensitivityTable

if TYPE_CHECKING:
    from mpsearch.views.study_view import StudyView

Numbers = NDArray[np.float64]
Columns = NDArray[np.int64]
MIB = 2**20
#: Standard errors beyond which a difference is no noise (95 %, two-sided).
SIGNIFICANT = 1.96


@dataclass(frozen=True, eq=False)
class Steps:
    """One step of each of N decisions, all up or all down.

    Attributes:
        column: (N,) the format that the step leads to; -1 where there is none.
        gain: (N,) loss before less loss after; negative where the step costs loss, NaN where it is not known.
        error: (N,) its standard error; the errors of the two scores count as independent, one not known as none.
        bytes: (N,) bytes after less bytes before; NaN where there is no step.
    """

    column: Columns
    gain: Numbers
    error: Numbers
    bytes: Numbers

    @property
    def there(self) -> NDArray[np.bool_]:
        """(N,) which decisions have such a step."""
        return self.column >= 0

    @property
    def rate(self) -> Numbers:
        """(N,) loss per MiB: saved by a step up, lost by a step down."""
        return self.gain / (self.bytes / MIB)

    @property
    def rank(self) -> Columns:
        """(N,) 1 for the step of the largest rate; 0 where the rate is not known."""
        rate = self.rate
        known = np.sort(rate[np.isfinite(rate)])
        above = len(known) - np.searchsorted(known, rate, side="right")
        ranks: Columns = np.where(np.isfinite(rate), 1 + above, 0).astype(np.int64)
        return ranks

    @property
    def noise(self) -> NDArray[np.bool_]:
        """(N,) where the gain is within `SIGNIFICANT` standard errors of none."""
        return np.abs(self.gain) < SIGNIFICANT * self.error


@dataclass(frozen=True, eq=False)
class Ladder:
    """What N decisions lose and take in F formats.

    Attributes:
        names: of the decisions.
        formats: names; those of the scores first.
        loss: (N, F) settled predicted loss (see `mpsearch.planning.usable`); NaN where there is no score.
        error: (N, F) its standard error.
        bytes: (N, F) bytes; of a KV cache those of its own table. NaN where one of the layers cannot take the format.
        leads: first layer of each decision; what a plan gives it counts for all.

    >>> ladder = Ladder(
    ...     ("a", "b"),
    ...     ("int2", "int4"),
    ...     np.array([[3.0, 1.0], [2.0, 1.5]]),
    ...     np.full((2, 2), 0.1),
    ...     np.array([[1.0, 2.0], [1.0, 2.0]]) * MIB,
    ... )
    >>> up = ladder.steps(np.array([0, 0]), "up")
    >>> up.gain.tolist(), up.rate.tolist(), up.rank.tolist(), up.noise.tolist()
    ([2.0, 0.5], [2.0, 0.5], [1, 2], [False, False])
    >>> ladder.steps(np.array([0, 0]), "down").column.tolist()
    [-1, -1]
    """

    names: tuple[str, ...]
    formats: tuple[str, ...]
    loss: Numbers
    error: Numbers
    bytes: Numbers
    leads: tuple[str, ...] = ()

    @classmethod
    def of(cls, view: StudyView, plans: Sequence[BitPlan] = (), scores: SensitivityTable | None = None) -> Ladder:
        """Put scores and bytes of a study side by side.

        Args:
            view: of the study.
            plans: plans whose formats need columns too.
            scores: another table of the same decisions; the study's own when left out.
        """
        known = view.points.formats
        more = dict.fromkeys(str(fmt) for plan in plans for fmt in plan.formats.values())
        if view.scores is not None:
            more = {**dict.fromkeys(view.scores.formats), **more}
        formats = (*known, *(name for name in more if name not in known))
        shape = (len(view.layers.decisions), len(formats))
        loss, error = np.full(shape, np.nan), np.full(shape, np.nan)
        table = view.scores if scores is None else scores
        if table is not None:
            settled = usable(table)
            place = {name: j for j, name in enumerate(formats)}
            for j, name in enumerate(settled.formats):
                if name in place:
                    loss[:, place[name]], error[:, place[name]] = settled.value[:, j], settled.spread[:, j]
        names = tuple(row.name for row in view.layers.decisions)
        leads = tuple(row.layers[0].name for row in view.layers.decisions)
        return cls(names, formats, loss, error, _bytes(view, formats), leads)

    def choice(self, plan: BitPlan) -> Columns:
        """(N,) column of each decision's format in a plan.

        Raises:
            InputError: the plan is for other layers (E302).
        """
        if not set(self.leads) <= set(plan.formats):
            raise InputError("E302", "the plan is for another model than the study")
        place = {name: j for j, name in enumerate(self.formats)}
        return np.array([place.get(str(plan.formats[name]), -1) for name in self.leads], dtype=np.int64)

    def total(self, choice: Columns) -> float:
        """Predicted loss of a plan: the exact sum over its decisions; NaN where one has no score."""
        return math.fsum(self.terms(choice)) if len(choice) else 0.0

    def terms(self, choice: Columns) -> list[float]:
        """Predicted loss of each decision; NaN where there is no score."""
        found: list[float] = np.where(choice >= 0, self.loss[np.arange(len(choice)), choice], np.nan).tolist()
        return found

    def steps(self, choice: Columns, way: Literal["up", "down"]) -> Steps:
        """The next scored format of more bytes, or of fewer, of every decision.

        Args:
            choice: (N,) columns of the plan.
            way: ``up`` to the one of the fewest bytes above, ``down`` to the one of the most bytes below.
        """
        rows = np.arange(len(choice))
        now, lost, doubt = (table[rows, choice] for table in (self.bytes, self.loss, self.error))
        beyond = (1.0 if way == "up" else -1.0) * (self.bytes - now[:, None])
        open_to = np.isfinite(self.loss) & (beyond > 0) & np.isfinite(lost)[:, None] & (choice >= 0)[:, None]
        distance = np.where(open_to, beyond, np.inf)
        # Of formats of equal bytes the one that loses least.
        least = distance.min(axis=1, keepdims=True, initial=np.inf)
        nearest = np.where(open_to & (distance == least), self.loss, np.inf).argmin(axis=1)
        there = open_to.any(axis=1)
        gain = np.where(there, lost - self.loss[rows, nearest], np.nan)
        error = np.where(there, np.hypot(np.nan_to_num(doubt), np.nan_to_num(self.error[rows, nearest])), np.nan)
        change = np.where(there, self.bytes[rows, nearest] - now, np.nan)
        return Steps(np.where(there, nearest, -1).astype(np.int64), gain, error, change)


def _bytes(view: StudyView, formats: Sequence[str]) -> Numbers:
    """(N, F) bytes of each decision; NaN where one of its layers cannot take the format."""
    by_layer = {layer.name: i for i, layer in enumerate(view.layers)}
    extra = [Format.parse(name) for name in formats[len(view.points.formats) :]]
    found = np.full((len(view.layers.decisions), len(formats)), np.nan)
    cache = next((table for table in view.costs if table.resource.startswith("kv ")), None)
    for i, row in enumerate(view.layers.decisions):
        if row.layers[0].kind == "kv_cache":
            if cache is not None:
                at = {name: j for j, name in enumerate(cache.formats)}
                found[i] = [cache.value[i, at[name]] if name in at else np.nan for name in formats]
            continue
        known = view.sizes[[by_layer[layer.name] for layer in row.layers]].sum(axis=0)
        further = [
            math.nan if any(fmt.refuses(x) for x in row.layers) else float(sum(fmt.bytes(x) for x in row.layers))
            for fmt in extra
        ]
        found[i] = [*known, *further]
    return found
