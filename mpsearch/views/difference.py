"""Two plans of one model: the layers on which they differ, and the way from the loss of one to that of the other."""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import asdict, dataclass
from typing import TYPE_CHECKING, Any

import numpy as np

from mpsearch.plan import BitPlan
from mpsearch.spread import plus_minus
from mpsearch.verdict import difference_error
from mpsearch.views.steps import Ladder

if TYPE_CHECKING:
    from mpsearch.views.study_view import StudyView

#: Bars of a waterfall; the changes of least effect are one bar together.
BARS = 12


@dataclass(frozen=True)
class Change:
    """A decision on which two plans differ.

    Attributes:
        decision: its name.
        layers: the layers that change; of a tie all of them, as a rule.
        before: format in the first plan.
        after: format in the second.
        loss: predicted loss in the second plan less that in the first; None where one of them has no score.
        error: its standard error, as if the two scores were independent.
        bytes: bytes in the second plan less those in the first.
    """

    decision: str
    layers: tuple[str, ...]
    before: str
    after: str
    loss: float | None
    error: float | None
    bytes: int


@dataclass(frozen=True)
class Bar:
    """A bar of the waterfall: from one loss to the next."""

    label: str
    start: float
    end: float


@dataclass(frozen=True)
class Side:
    """What is known of one of the two plans.

    Attributes:
        plan: key of its formats (`mpsearch.BitPlan.assignment`).
        bytes: of the whole model, as the plan's target stores it.
        bits: stored bits per weight of the whole model.
        predicted: predicted loss; None where a decision has no score.
        measured: measured loss; None where it was not measured.
        error: standard error of ``measured``.
    """

    plan: str
    bytes: int
    bits: float
    predicted: float | None
    measured: float | None
    error: float | None


@dataclass(frozen=True)
class Difference:
    """How two plans of one model differ.

    Attributes:
        first: one plan.
        second: the other.
        changes: decisions on which they differ, the largest effect on the predicted loss first.
        layers: how many layers there are.
        same: how many of them have the same format in both.
        waterfall: from the first plan's predicted loss to the second's; empty without scores.
        measured: (measured loss of the second less that of the first, standard error by sequence); None unless both
            were measured.
        unit: of the losses.
    """

    first: Side
    second: Side
    changes: tuple[Change, ...]
    layers: int
    same: int
    waterfall: tuple[Bar, ...]
    measured: tuple[float, float] | None
    unit: str

    @property
    def sentences(self) -> list[str]:
        """The same in words; of two losses the second plan's comes second."""
        a, b = self.first, self.second
        lines = [f"The plans are the same in {self.same} of {self.layers} layers."]
        lines.append(f"The second takes {b.bytes - a.bytes:+,} bytes ({a.bytes:,} to {b.bytes:,}).")
        if a.predicted is not None and b.predicted is not None:
            lines.append(
                f"Its predicted loss is {b.predicted - a.predicted:+.4g} {self.unit} "
                f"({a.predicted:.4g} to {b.predicted:.4g})."
            )
        if self.measured is not None:
            lines.append(
                f"Its measured loss is {self.measured[0]:+.4g}{plus_minus(self.measured[1])} {self.unit} "
                f"({a.measured:.4g} to {b.measured:.4g})."
            )
        return lines

    def to_json(self) -> dict[str, Any]:
        """Return it as plain values."""
        body = asdict(self)
        body["changes"] = [{**asdict(change), "layers": list(change.layers)} for change in self.changes]
        body["waterfall"] = [asdict(bar) for bar in self.waterfall]
        body["measured"] = None
        if self.measured is not None:
            value, error = self.measured
            body["measured"] = {"loss": value, "error": error if math.isfinite(error) else None}
        return {**body, "sentences": self.sentences}


def difference(first: BitPlan, second: BitPlan, view: StudyView | None = None) -> Difference:
    """Compare two plans.

    Args:
        first: a plan.
        second: another one of the same model.
        view: of a study of that model, whose scores say what each change does; without it only bytes are known, and
            what the plans themselves say of their losses.

    Raises:
        InputError: the plans are for different models, or for another one than the study's (E302).

    >>> from mpsearch.testing.views import pretended
    >>> view = pretended(20, 16, 4)
    >>> found = difference(view.plan(0), view.plan(1), view)
    >>> found.waterfall[0].start == found.first.predicted, found.waterfall[-1].end == found.second.predicted
    (True, True)
    """
    differ = {name for name, _, _ in first.compare(second)}
    ladder = Ladder.of(view, (first, second)) if view is not None and len(view.layers) else None
    terms = None
    if ladder is not None and view is not None and view.scores is not None:
        terms = (ladder.terms(ladder.choice(first)), ladder.terms(ladder.choice(second)))
    changes = sorted(_changes(first, second, differ, ladder, terms), key=_effect)
    count = len(first.layers)
    return Difference(
        _side(first, view, None if terms is None else terms[0]),
        _side(second, view, None if terms is None else terms[1]),
        tuple(changes),
        count,
        count - len(differ),
        () if ladder is None or terms is None else tuple(_waterfall(changes, ladder.names, *terms)),
        _measured(first, second, view),
        first.predicted.unit or second.predicted.unit or (view.points.unit if view is not None else "nats/token"),
    )


def _changes(
    first: BitPlan,
    second: BitPlan,
    differ: set[str],
    ladder: Ladder | None,
    terms: tuple[list[float], list[float]] | None,
) -> list[Change]:
    row_of = {name: i for i, name in enumerate(ladder.names)} if ladder is not None else {}
    columns = (ladder.choice(first), ladder.choice(second)) if ladder is not None else None
    found = []
    for decision in first.layers.decisions:
        layers = [layer for layer in decision.layers if layer.name in differ]
        if not layers:
            continue
        before, after = first.formats[layers[0].name], second.formats[layers[0].name]
        size = sum(second.formats[x.name].bytes(x) - first.formats[x.name].bytes(x) for x in layers)
        loss = error = None
        i = row_of.get(decision.name)
        if i is not None and ladder is not None and columns is not None and columns[0][i] >= 0 <= columns[1][i]:
            if layers[0].kind == "kv_cache" and math.isfinite(
                more := float(ladder.bytes[i, columns[1][i]] - ladder.bytes[i, columns[0][i]])
            ):
                size = int(more)
            if terms is not None and math.isfinite(terms[1][i] - terms[0][i]):
                loss = terms[1][i] - terms[0][i]
                error = math.hypot(*np.nan_to_num([ladder.error[i, column[i]] for column in columns]).tolist())
        found.append(Change(decision.name, tuple(x.name for x in layers), str(before), str(after), loss, error, size))
    return found


def _effect(change: Change) -> tuple[bool, float, int, str]:
    return change.loss is None, -abs(change.loss or 0.0), -abs(change.bytes), change.decision


def _waterfall(
    changes: Sequence[Change], names: Sequence[str], before: Sequence[float], after: Sequence[float]
) -> list[Bar]:
    """Change one decision after the other; every height is an exact sum, so that the last is the second plan's loss."""
    if not all(map(math.isfinite, [*before, *after])):
        return []
    row_of = {name: i for i, name in enumerate(names)}
    listed = list(changes) if len(changes) <= BARS else list(changes[: BARS - 1])
    rest = changes[len(listed) :]
    now, height, bars = list(before), math.fsum(before), []
    for change in listed:
        now[row_of[change.decision]] = after[row_of[change.decision]]
        bars.append(Bar(change.decision, height, height := math.fsum(now)))
    if rest or not bars:
        bars.append(Bar(f"{len(rest)} more" if rest else "no difference", height, math.fsum(after)))
    return bars


def _side(plan: BitPlan, view: StudyView | None, terms: Sequence[float] | None) -> Side:
    own = plan.predicted.loss if terms is None else math.fsum(terms)
    key = plan.assignment
    run = next((m for m in view.measured if m.plan == key), None) if view is not None else None
    return Side(
        key,
        plan.stored_bytes,
        plan.bits,
        own if own is not None and math.isfinite(own) else None,
        run.loss if run else None,
        run.spread if run and math.isfinite(run.spread) else None,
    )


def _measured(first: BitPlan, second: BitPlan, view: StudyView | None) -> tuple[float, float] | None:
    runs = {m.plan: m for m in reversed(view.measured)} if view is not None else {}
    a, b = runs.get(first.assignment), runs.get(second.assignment)
    return None if a is None or b is None else (b.loss - a.loss, difference_error(b, a))
