"""Why a layer has its bits: what each format would lose and take, what one step more or less would do, what binds."""

from __future__ import annotations

import math
from collections.abc import Iterator
from dataclasses import asdict, dataclass
from typing import TYPE_CHECKING, Any

from mpsearch.budget import Budget
from mpsearch.cost_text import UNITS
from mpsearch.errors import InputError
from mpsearch.format import Format
from mpsearch.layer import Decision
from mpsearch.plan import BitPlan
from mpsearch.views.agreement import estimator
from mpsearch.views.judge import Judge, Says
from mpsearch.views.steps import Ladder, Steps
from mpsearch.views.why_flags import flags
from mpsearch.views.why_text import sentences

if TYPE_CHECKING:
    from mpsearch.stored_study import StoredStudy
    from mpsearch.views.study_view import StudyView

#: A price below this share of the plan's loss is a rounding error of the relaxed problem.
_NO_PRICE = 1e-9


@dataclass(frozen=True)
class Option:
    """A format that a decision could have.

    Attributes:
        format: its name.
        bits: of one code.
        bytes: of all layers of the decision; None where one cannot take it.
        loss: settled predicted loss; None where there is no score.
        error: its standard error; None where unknown.
        status: ``ok``, or why there is no score: ``not_offered``, ``not_observed``, ``non_finite``, ``failed``,
            ``not scored`` for a format that is no column of the scores.
        chosen: whether the plan has it.
    """

    format: str
    bits: int
    bytes: int | None
    loss: float | None
    error: float | None
    status: str
    chosen: bool


@dataclass(frozen=True)
class Step:
    """One step up or down of the decision.

    Attributes:
        format: that it leads to.
        bytes: more, negative for fewer.
        gain: loss now less loss after it: negative where it costs loss.
        error: standard error of ``gain``.
        noise: whether ``gain`` is within 1.96 standard errors of none.
        rate: loss per MiB: saved by a step up, lost by a step down.
        rank: 1 for the decision whose step of this kind has the largest rate.
        of: how many decisions have such a step.
    """

    format: str
    bytes: int
    gain: float
    error: float
    noise: bool
    rate: float
    rank: int
    of: int


@dataclass(frozen=True)
class Price:
    """What a budget of the plan is worth.

    Attributes:
        budget: as the user wrote it.
        resource: what it limits.
        price: slope of the least loss at this budget, as the solver's bound sees it: what a small change of it saves
            for each ``per``. A whole ``per`` can save far less.
        per: ``MiB``, ``ms``, ….
        unit: such as ``nats/token per MiB``.
        binds: whether more of it would save anything.
        left: how much of it the plan leaves unused, in ``per``; None where the plan's cost is not known.
    """

    budget: str
    resource: str
    price: float
    per: str
    unit: str
    binds: bool
    left: float | None


@dataclass(frozen=True)
class Opinion:
    """What another estimator would do with the decision, at the price that parts its own steps up from those down."""

    estimator: str
    says: Says


@dataclass(frozen=True)
class Why:
    """Why a decision has its format in a plan.

    Attributes:
        layer: name of the first layer of the decision.
        decision: its name.
        layers: all layers that share the format.
        kind: of the layers.
        shapes: of their weights.
        plan: key of the plan's formats.
        format: that the plan gives it.
        share: its part of the plan's predicted loss; None where that is not known.
        options: formats that it could have, fewest bytes first.
        up: the next step up; None at the largest scored format, or without a score.
        down: the next step down.
        prices: of the budgets that the plan was solved for; empty for other plans.
        flags: what else decides: ties, pins, bars, missing scores.
        opinions: of the other estimators that scored the model.
        estimator: that made the scores.
        unit: of the losses.
    """

    layer: str
    decision: str
    layers: tuple[str, ...]
    kind: str
    shapes: tuple[tuple[int, ...], ...]
    plan: str
    format: str
    share: float | None
    options: tuple[Option, ...]
    up: Step | None
    down: Step | None
    prices: tuple[Price, ...]
    flags: tuple[str, ...]
    opinions: tuple[Opinion, ...]
    estimator: str
    unit: str

    @property
    def now(self) -> Option | None:
        """The option that the plan has."""
        return next((option for option in self.options if option.chosen), None)

    @property
    def sentences(self) -> list[str]:
        """The same in words."""
        return list(sentences(self))

    def to_json(self) -> dict[str, Any]:
        """Return it as plain values."""
        body = asdict(self)
        for name in ("options", "prices", "opinions"):
            body[name] = [asdict(item) for item in getattr(self, name)]
        body |= {"layers": list(self.layers), "shapes": [list(x) for x in self.shapes], "flags": list(self.flags)}
        return {**body, "sentences": self.sentences}


def why(of: StudyView | StoredStudy, plan: BitPlan | int | None, layer: str) -> Why:
    """Say why a layer has its format in a plan.

    Args:
        of: a study or its view.
        plan: a plan of its model, the number of one of its points, or None for the plan for its own budgets.
        layer: name of a layer, of a decision, or a pattern that only one decision matches.

    Raises:
        InputError: no layer of that name, or several decisions (E120); a plan for another model (E302); no plan and no
            layers yet (E143).

    >>> from mpsearch.testing.views import pretended
    >>> found = why(pretended(20, 16, 4), 3, "lm_head")
    >>> found.now.format == found.format, [option.format for option in found.options]
    (True, ['int2-g64', 'int3-g64', 'int4-g64', 'int6-g64'])
    """
    view = as_view(of)
    decisions = matching(view, layer)
    if len(decisions) > 1:
        raise InputError(
            "E120",
            f"pattern '{layer}' matches {len(decisions)} decisions, and one is asked for",
            advice=f"name one, such as '{decisions[0].layers[0].name}'",
        )
    return whys(view, plan, decisions)[0]


def as_view(of: StudyView | StoredStudy) -> StudyView:
    """The view of a study; a view is its own."""
    from mpsearch.views.study_view import StudyView

    return of if isinstance(of, StudyView) else StudyView.of(of)


def matching(view: StudyView, pattern: str) -> list[Decision]:
    """Decisions whose name, or one of whose layers' names, matches a pattern.

    Raises:
        InputError: nothing matches (E120); the closest name is offered.
    """
    named = [row for row in view.layers.decisions if row.name == pattern]
    if named:
        return named
    layers = {layer.name for layer in view.layers.match(pattern)}
    return [row for row in view.layers.decisions if any(layer.name in layers for layer in row.layers)]


def whys(view: StudyView, plan: BitPlan | int | None, decisions: list[Decision]) -> list[Why]:
    """As `why`, of several decisions: what they have in common is computed once."""
    if not isinstance(plan, BitPlan):
        if not len(view.points) or not len(view.layers):
            raise InputError("E143", f"study '{view.study}' has no plan yet", advice="let it run on: mpsearch resume")
        plan = view.plan(view.chosen if plan is None else plan)
    ladder = Ladder.of(view, (plan,))
    choice = ladder.choice(plan)
    up, down = ladder.steps(choice, "up"), ladder.steps(choice, "down")
    total = ladder.total(choice)
    prices = tuple(_prices(view, plan, total))
    others = [Judge(view, table, plan) for table in view.others]
    own = estimator(view.scores) if view.scores is not None else ""
    own_says = Judge(view, view.scores, plan) if view.scores is not None else None
    place = {row.name: i for i, row in enumerate(view.layers.decisions)}
    key = plan.assignment
    found = []
    for row in decisions:
        i = place[row.name]
        options = _options(view, ladder, i, int(choice[i]))
        now = next((option for option in options if option.chosen), None)
        lost = now.loss if now is not None else None
        says = own_says.says(i) if own_says is not None else "the same"
        found.append(
            Why(
                row.layers[0].name,
                row.name,
                tuple(x.name for x in row.layers),
                row.layers[0].kind,
                tuple(x.shape for x in row.layers),
                key,
                str(plan.formats[row.layers[0].name]),
                lost / total if lost is not None and math.isfinite(total) and total > 0 else None,
                options,
                _step(ladder, up, i),
                _step(ladder, down, i),
                prices,
                tuple(flags(view, row, options)),
                tuple(Opinion(x.name, told if (told := x.says(i)) != says else "the same") for x in others),
                own,
                view.points.unit,
            )
        )
    return found


def _options(view: StudyView, ladder: Ladder, i: int, chosen: int) -> tuple[Option, ...]:
    scores = view.scores
    found = []
    for j, name in enumerate(ladder.formats):
        if not math.isfinite(ladder.bytes[i, j]) and j != chosen:
            continue
        status = "not scored"
        if scores is not None and name in scores.formats:
            status = scores.status[i][scores.formats.index(name)]
        loss, error, size = (_known(x[i, j]) for x in (ladder.loss, ladder.error, ladder.bytes))
        size = None if size is None else int(size)
        found.append(Option(name, Format.parse(name).bits, size, loss, error, status, j == chosen))
    return tuple(sorted(found, key=lambda option: (option.bytes is None, option.bytes or 0)))


def _step(ladder: Ladder, steps: Steps, i: int) -> Step | None:
    j = int(steps.column[i])
    if j < 0:
        return None
    return Step(
        ladder.formats[j],
        int(steps.bytes[i]),
        float(steps.gain[i]),
        float(steps.error[i]),
        bool(steps.noise[i]),
        float(steps.rate[i]),
        int(steps.rank[i]),
        int(steps.there.sum()),
    )


def _prices(view: StudyView, plan: BitPlan, loss: float) -> Iterator[Price]:
    tables = {table.resource: table for table in view.costs}
    for entry in plan.source.get("prices", ()):
        budget = Budget.parse(str(entry["budget"]))
        per, size = UNITS.get(budget.resource, ("unit", 1))
        price = float(entry["price"]) * float(size)
        left = None
        if budget.priced_by in tables and budget.priced_by in plan.cost:
            left = (budget.limit(tables[budget.priced_by]) - plan.cost[budget.priced_by]) / float(size)
        floor = _NO_PRICE * abs(plan.predicted.loss or (loss if math.isfinite(loss) else 0.0))
        unit = f"{view.points.unit} per {per}"
        yield Price(str(budget), budget.priced_by, price, per, unit, price > floor, left)


def _known(value: float) -> float | None:
    return float(value) if math.isfinite(value) else None
