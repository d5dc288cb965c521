"""Searching for plans by what they measure: a searcher names plans, and the study measures them."""

from __future__ import annotations

import dataclasses
import math
from collections.abc import Callable, Iterator, Mapping, Sequence
from typing import TYPE_CHECKING, Any

import numpy as np

from mpsearch import registry
from mpsearch.budget import parse_budgets
from mpsearch.errors import InfeasibleError, InputError
from mpsearch.front import Measurement
from mpsearch.keys import content_key
from mpsearch.optuna_trials import Heard, told
from mpsearch.plan import BitPlan, Predicted
from mpsearch.planning import Labelled, Planner
from mpsearch.ports import Searcher
from mpsearch.problem import Problem
from mpsearch.ruled import Ruled
from mpsearch.trials import Searched, Seen, Trial

if TYPE_CHECKING:
    from mpsearch.session import Session
    from mpsearch.studying import Study

Measure = Callable[[Sequence[Trial]], Sequence[Seen]]
#: Plans of searches stand after those of a study's own run.
_POSITION = 1_000_000


def drive(
    problem: Problem, searcher: Searcher, measure: Measure, evaluations: int, heard: Heard | None = None
) -> tuple[Seen, ...]:
    """Ask, measure and ask again, until the searcher asks for nothing more or the evaluations are used up.

    Args:
        problem: what is searched.
        searcher: who asks.
        measure: measures some trials, and returns what was measured of each, in their order.
        evaluations: most trials.
        heard: told all that was seen, each time that more was.

    Raises:
        ValueError: the searcher asks for a plan that does not fit, or for a trial again.
    """
    seen: list[Seen] = []
    while len(seen) < evaluations:
        asked = list(searcher.ask(problem, tuple(seen)))[: evaluations - len(seen)]
        if not asked:
            break
        before = {item.trial for item in seen}
        for trial in asked:
            if trial in before:
                raise ValueError(f"the searcher asks for {trial} a second time")
            if not problem.fits(np.array(trial.choice, dtype=np.int64)):
                raise ValueError(f"the searcher asks for {trial}, which does not fit")
            before.add(trial)
        seen += measure(asked)
        if heard is not None:
            heard(problem, tuple(seen))
    return tuple(seen)


def search_study(
    study: Study,
    searcher: str | Searcher = "refine",
    evaluations: int = 60,
    budgets: Sequence[str] = (),
    settings: Mapping[str, Any] | None = None,
    shared: bool | None = None,
) -> Searched:
    """Search for the plan of least measured loss within budgets.

    Every measurement is kept in the study's store under its content key, part of which is on how many batches it was
    taken. A search that was stopped asks for the same again, finds it there, and goes on; nothing is measured twice.

    What is chosen by its measured loss looks better than it is on the data it was chosen on. So the search measures on
    the calibration batches, and only its start and its best plan are measured on the validation batches, which chose
    nothing. (A searcher that keeps a target is ``judged_on`` validation: the target is of that data.) The best plan
    joins the study's measured plans as ``mixed SEARCHER``.

    Args:
        study: says the model, the texts, the menu, the pins and the estimator.
        searcher: name of a searcher, or one that is set up.
        evaluations: most measurements, each counting one however few its batches.
        budgets: what every plan must keep; the study's own when there are none.
        settings: of a searcher given by name.
        shared: whether the trials are also kept as a study of Optuna's in the same database; None as the searcher says.

    Raises:
        InfeasibleError: no plan keeps the budgets (E201, E203).
        InputError: no such searcher or setting (E107), fewer than one evaluation (E113), a problem that it cannot take
            (E210), or no plan could be measured (E511); or as `Study.session`.
    """
    if isinstance(evaluations, bool) or evaluations < 1:
        raise InputError("E113", f"evaluations is {evaluations!r}, expected at least 1")
    name, made = _made(searcher, evaluations, dict(settings or {}))
    wanted = parse_budgets(budgets) if budgets else study.budgets
    with study.session(study.spec.estimator) as session:
        session.planner = dataclasses.replace(session.planner, budgets=wanted)
        session.planner.check(wanted)
        scores, _ = session.score(study.spec.estimator)
        study.link_scores(scores)
        ruled = session.planner.rules.apply(session.planner.problem(scores, wanted))
        problem = ruled.problem
        if reason := made.refuses(problem):
            raise InputError("E210", f"searcher '{name}' cannot take this: {reason}")
        source = {"budgets": [str(b) for b in wanted], "search": name, "scores": scores.source.get("scope", "")}
        on_calibration = getattr(made, "judged_on", "calibration") == "calibration"
        runner = _Runner(session, source, evaluations, ruled, on_calibration)
        with told(study, name, made, source["budgets"] if budgets else (), shared) as heard:
            trials = drive(problem, made, runner.measure, evaluations, heard)
        if not trials:
            raise InfeasibleError(
                "E203", f"searcher '{name}' found no plan within {' and '.join(source['budgets'])}", advice="loosen one"
            )
        best = _best(made, problem, trials)
        if best is None or not math.isfinite(best.loss):
            raise InputError("E511", f"none of the {len(trials)} plans gives finite values", advice="larger budgets")
        plan = session.planner.predict(scores, runner.plan(best.trial))
        plan = dataclasses.replace(
            plan, predicted=dataclasses.replace(plan.predicted, cost=runner.plan(best.trial).cost)
        )
        report = getattr(made, "report", None)
        found = Searched(
            name,
            _settings(made),
            tuple(source["budgets"]),
            trials,
            tuple(runner.tokens),
            best,
            plan,
            problem,
            "" if report is None else report(problem, trials),
        )
        # A plan that was chosen on the validation text is not held out there.
        held_out = _held_out(session, found, runner.plan(found.start.trial)) if on_calibration else None
        found = dataclasses.replace(found, held_out=held_out)
        _keep(session, found)
    return found


class _Runner:
    """Measures trials in a session, and counts the tokens."""

    def __init__(
        self, session: Session, source: Mapping[str, Any], evaluations: int, ruled: Ruled, calibration: bool
    ) -> None:
        self.tokens: list[int] = []
        self._session = session
        self._source = source
        self._evaluations = evaluations
        self._group = ruled.group
        self._calibration = calibration
        self._whole = 0

    def plan(self, trial: Trial) -> BitPlan:
        choice = np.array(trial.choice, dtype=np.int64)[self._group]
        return _plan(self._session.planner, choice.tolist(), self._source)

    def measure(self, trials: Sequence[Trial]) -> list[Seen]:
        """Measure trials, those on all batches first: they show how many batches there are."""
        found: dict[Trial, Seen] = {}
        tokens: dict[Trial, int] = {}
        for level in sorted({trial.batches for trial in trials}):
            same = [trial for trial in trials if trial.batches == level]
            for trial, measurement in self._level(same, level):
                samples = 0 if measurement is None else len(measurement.samples)
                tokens[trial] = samples * self._session.study.positions
                found[trial] = (
                    Seen(trial, math.inf) if measurement is None else Seen(trial, measurement.loss, measurement.spread)
                )
                self._whole = max(self._whole, samples) if not level else self._whole
        self.tokens += [tokens[trial] for trial in trials]
        self._session.study.report("search", len(self.tokens), self._evaluations)
        return [found[trial] for trial in trials]

    def _level(self, trials: Sequence[Trial], level: int) -> Iterator[tuple[Trial, Measurement | None]]:
        """Measure trials on so many batches; None where the model gives no finite values."""
        session = self._session
        # What covers all batches is the same measurement as one on all of them.
        level = 0 if 0 < self._whole <= level * session.study.batch_samples else level
        plans = [
            Labelled(f"{self._source['search']} {len(self.tokens) + k}", self.plan(t)) for k, t in enumerate(trials)
        ]
        calibration = self._calibration
        keys = [session.measurement_key(item.plan, level, calibration=calibration) for item in plans]
        lost = session.study.store.get_many("unmeasured", keys)
        unmeasured = [x for x, key in zip(plans, keys, strict=True) if key not in lost]
        measured = session.measure(unmeasured, level, phase="", calibration=calibration)
        for trial, item, key in zip(trials, plans, keys, strict=True):
            measurement = measured.get(item.plan.key)
            if measurement is None and key not in lost:
                session.study.store.put("unmeasured", key, {"plan": item.plan.assignment, "batches": level})
            yield trial, measurement


def _made(searcher: str | Searcher, evaluations: int, settings: dict[str, Any]) -> tuple[str, Searcher]:
    if not isinstance(searcher, str):
        names = {registry.load("searchers", name): name for name in registry.BUILT_IN["searchers"]}
        return names.get(type(searcher), type(searcher).__name__), searcher
    if "evaluations" in registry.settings("searchers", searcher):
        settings.setdefault("evaluations", evaluations)
    return searcher, registry.make("searchers", searcher, **settings)


def _settings(searcher: Any) -> dict[str, Any]:
    if not dataclasses.is_dataclass(searcher):
        return {}
    return {f.name: getattr(searcher, f.name) for f in dataclasses.fields(searcher)}


def _best(searcher: Any, problem: Problem, trials: Sequence[Seen]) -> Seen | None:
    """What the searcher settles on; of one that does not say, the least loss on all batches."""
    if hasattr(searcher, "best"):
        chosen: Seen | None = searcher.best(problem, trials)
        return chosen
    return min((item for item in trials if not item.trial.batches), key=lambda item: item.loss, default=None)


def _held_out(session: Session, found: Searched, start: BitPlan) -> tuple[Measurement, Measurement] | None:
    """Measure the start and the best plan on the validation batches; None where one gives no finite values."""
    plans = [Labelled("start", start), Labelled(f"mixed {found.searcher}", found.plan)]
    measured = session.measure(plans, phase="")
    if any(item.plan.key not in measured for item in plans):
        return None
    return measured[start.key], measured[found.plan.key]


def _plan(planner: Planner, choice: Sequence[int], source: Mapping[str, Any]) -> BitPlan:
    rows = planner.layers.decisions
    formats = {
        layer.name: planner.formats[column]
        for decision, column in zip(rows, choice, strict=True)
        for layer in decision.layers
    }
    cost = {
        table.resource: math.fsum([*table.value[np.arange(len(rows)), list(choice)].tolist(), table.fixed])
        for table in planner.costs
    }
    return BitPlan(planner.layers, formats, planner.model, Predicted(cost=cost), source)


def _keep(session: Session, found: Searched) -> None:
    """Store the search, and let its plan join the study's measured plans."""
    study, body = session.study, found.to_json()
    study.store.put("search", content_key(body), body)
    study.store.link(study.name, "search", content_key(body), found.searcher)
    study.store.put("plan", found.plan.key, found.plan.to_json())
    label = f"mixed {found.searcher}"
    study.store.link(study.name, "plan", found.plan.key, label, _POSITION)
    key = session.measurement_key(found.plan)
    if study.store.get_many("measurement", [key]):
        study.store.link(study.name, "measurement", key, label, _POSITION)
