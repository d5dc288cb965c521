"""Is mixing worth it? Gain over uniform, distance to the bound, what limits further gain, and what to try next."""

from __future__ import annotations

import math
import shlex
from collections.abc import Iterator, Sequence
from dataclasses import asdict, dataclass, replace
from typing import TYPE_CHECKING, Any, Literal

import numpy as np

from mpsearch.front import Measurement
from mpsearch.verdict import NEARLY_EQUAL, best_uniform, difference_error
from mpsearch.views.steps import SIGNIFICANT, Ladder
from mpsearch.views.tries import Try, tries

if TYPE_CHECKING:
    from mpsearch.views.study_view import StudyView

Outcome = Literal["pays", "no difference", "does not pay", "uniform", "no rival", "not measured", "no plan"]
#: A limit is told when it holds this share of the decisions.
_MANY = 0.25
#: A layer is told when it holds this share of the plan's predicted loss.
_MOST = 0.3
#: A gap to the bound below this share of the loss is none.
_CLOSE = 1e-9


@dataclass(frozen=True)
class Rival:
    """A measured plan of the comparison.

    Attributes:
        plan: key of its formats.
        label: what it is to the study.
        loss: measured.
        error: its standard error; None where unknown.
        bytes: of the whole model.
        bits: per weight of the whole model; None where its weights are not known.
    """

    plan: str
    label: str
    loss: float
    error: float | None
    bytes: int
    bits: float | None


@dataclass(frozen=True)
class Gain:
    """How much less the mixed plan loses than the best uniform plan of its size; all measured.

    Attributes:
        value: in the unit of the losses; negative where the mixed plan loses more.
        low: lower end of its 95 % interval; paired by sequence where both ran on the same data.
        high: upper end.
        share: ``value`` as a share of the uniform plan's loss.
        share_low: ``low`` as such a share.
        share_high: ``high`` as such a share.
    """

    value: float
    low: float | None
    high: float | None
    share: float
    share_low: float | None
    share_high: float | None


@dataclass(frozen=True)
class Bound:
    """How far the chosen plan's predicted loss is from the least that any plan can have within the budgets.

    Attributes:
        loss: predicted loss.
        bound: no plan is predicted to lose less.
        above: how far ``loss`` can be above the least, as a share of the bound; 0 when it is proven to be the least.
    """

    loss: float
    bound: float
    above: float | None


@dataclass(frozen=True)
class Hindrance:
    """What keeps the plan from losing less.

    Attributes:
        what: ``largest``, ``smallest``, ``ties``, ``layer``, ``noise`` or ``slack``.
        sentence: the same in words.
        share: of the decisions (of ``layer``: of the loss) that it holds.
        layers: the first decisions concerned.
    """

    what: str
    sentence: str
    share: float
    layers: tuple[str, ...] = ()


@dataclass(frozen=True)
class Worth:
    """Whether mixing is worth it in a study, what limits it, and what to try next.

    Attributes:
        outcome: in a word or two.
        sentences: the verdict (`mpsearch.verdict.verdict`); the first one is the headline.
        mixed: the chosen plan; None where it was not measured.
        uniform: the best uniform plan of at most its bytes; None where there is none.
        gain: of the one over the other; None unless both were measured.
        bound: None for a plan that was not solved for.
        limits: what limits further gain, the largest share first.
        next: what to try.
        unit: of the losses.
    """

    outcome: Outcome
    sentences: tuple[str, ...]
    mixed: Rival | None
    uniform: Rival | None
    gain: Gain | None
    bound: Bound | None
    limits: tuple[Hindrance, ...]
    next: tuple[Try, ...]
    unit: str

    def at(self, storage: str) -> Worth:
        """The same with an option such as ``--storage results.db`` behind every command.

        Args:
            storage: the option, or nothing.
        """
        more = storage.strip()
        found = (Try(x.why, f"{x.line} {more}" if x.line.startswith("mpsearch ") else x.line) for x in self.next)
        return replace(self, next=tuple(found)) if more else self

    def to_json(self) -> dict[str, Any]:
        """Return it as plain values."""
        body = asdict(self)
        body["sentences"] = list(self.sentences)
        body["limits"] = [{**asdict(item), "layers": list(item.layers)} for item in self.limits]
        return {**body, "next": [asdict(item) for item in self.next]}


def worth(view: StudyView) -> Worth:
    """Judge a study by what there is of it so far.

    Args:
        view: of the study.

    >>> from mpsearch.testing.views import pretended
    >>> found = worth(pretended(60, 16, 4))
    >>> found.mixed.label, found.gain.low <= found.gain.value <= found.gain.high
    ('mixed', True)
    """
    points = view.points
    if not len(points):
        return _no_plan(view)
    chosen = view.chosen
    mixed = next((m for m in view.measured if m.plan == points.keys[chosen]), None)
    uniform = best_uniform(view.measured, NEARLY_EQUAL * mixed.cost["weights"]) if mixed is not None else None
    gain = _gain(mixed, uniform) if mixed is not None and uniform is not None else None
    limits = sorted(_limits(view, chosen), key=lambda item: -item.share)
    return Worth(
        _outcome(mixed, uniform, gain),
        view.verdict,
        None if mixed is None else _rival(view, mixed),
        None if uniform is None else _rival(view, uniform),
        gain,
        _bound(view, chosen),
        tuple(limits),
        tuple(tries(view, mixed, gain, limits)),
        points.unit,
    )


def _no_plan(view: StudyView) -> Worth:
    told = view.verdict or (f"There is no plan yet: the study is {view.state}.",)
    verb = "watch" if view.state in ("submitted", "running") else "resume"
    then = Try("there is no plan yet", f"mpsearch {verb} {shlex.quote(view.study)}")
    return Worth("no plan", told, None, None, None, None, (), (then,), view.points.unit)


def _rival(view: StudyView, m: Measurement) -> Rival:
    size = int(m.cost["weights"])
    bits = 8 * size / view.weights if view.weights else None
    return Rival(m.plan, m.label, m.loss, m.spread if math.isfinite(m.spread) else None, size, bits)


def _gain(mixed: Measurement, uniform: Measurement) -> Gain:
    value = uniform.loss - mixed.loss
    error = difference_error(mixed, uniform)
    ends = [value - SIGNIFICANT * error, value + SIGNIFICANT * error] if math.isfinite(error) else [None, None]
    share = [None if x is None else x / uniform.loss if uniform.loss else 0.0 for x in (value, *ends)]
    return Gain(value, ends[0], ends[1], share[0] or 0.0, share[1], share[2])


def _outcome(mixed: Measurement | None, uniform: Measurement | None, gain: Gain | None) -> Outcome:
    if mixed is None:
        return "not measured"
    if uniform is None or gain is None:
        return "no rival"
    if uniform.plan == mixed.plan:
        return "uniform"
    if gain.low is None or gain.high is None:
        return "no difference"
    return "pays" if gain.low > 0 else "does not pay" if gain.high <= 0 else "no difference"


def _bound(view: StudyView, i: int) -> Bound | None:
    loss, bound = float(view.points.predicted[i]), float(view.points.bound[i])
    if not (math.isfinite(loss) and math.isfinite(bound)):
        return None
    if loss - bound <= _CLOSE * abs(loss):
        return Bound(loss, bound, 0.0)
    return Bound(loss, bound, (loss - bound) / bound if bound > 0 else None)


def _limits(view: StudyView, chosen: int) -> Iterator[Hindrance]:
    if view.scores is None or not len(view.layers):
        return
    ladder = Ladder.of(view)
    choice = view.points.choice[chosen][list(view.leads)].astype(np.int64)
    up, down = ladder.steps(choice, "up"), ladder.steps(choice, "down")
    count, terms = len(choice), np.array(ladder.terms(choice))
    for what, steps, other, side in (("largest", up, down, "larger"), ("smallest", down, up, "smaller")):
        # A decision with one format only has nothing to choose.
        stuck = np.flatnonzero(~steps.there & other.there)
        if len(stuck) >= _MANY * count:
            lead = f"{len(stuck)} of {count} decisions have the {what} format that they are offered"
            told = f"{lead}: {side} ones could {'help' if what == 'largest' else 'free bytes for others'}."
            yield Hindrance(what, told, len(stuck) / count, _names(ladder, stuck))
    yield from _tied(view)
    total = math.fsum(terms) if np.isfinite(terms).all() else 0.0
    if total > 0 and count > 1 and (most := int(terms.argmax())) >= 0 and terms[most] >= _MOST * total:
        share = float(terms[most] / total)
        told = f"One decision holds {100 * share:.0f} % of the predicted loss: {ladder.names[most]}."
        yield Hindrance("layer", told, share, (ladder.names[most],))
    noisy = np.flatnonzero((up.there & up.noise) | (down.there & down.noise))
    if len(noisy) >= _MANY * count:
        told = f"{len(noisy)} of {count} decisions have a neighbouring format within the noise of the scores."
        yield Hindrance("noise", told, len(noisy) / count, _names(ladder, noisy))
    if not up.there.any() and down.there.any():
        yield Hindrance("slack", "Every decision has the largest format that it is offered.", 1.0)


def _tied(view: StudyView) -> Iterator[Hindrance]:
    fused = [row for row in view.layers.decisions if len(row.layers) > 1]
    if not fused:
        return
    kinds = dict.fromkeys("/".join(x.name.rpartition(".")[2] for x in row.layers) for row in fused)
    listed = ", ".join(list(kinds)[:3]) + (", …" if len(kinds) > 3 else "")
    count = len(view.layers.decisions)
    told = (
        f"{len(fused)} of {count} decisions tie layers ({listed}); what that costs is not known, for they were scored "
        "together."
    )
    yield Hindrance("ties", told, len(fused) / count, tuple(row.name for row in fused[:3]))


def _names(ladder: Ladder, rows: Sequence[int] | Any) -> tuple[str, ...]:
    return tuple(ladder.names[i] for i in rows[:3])
