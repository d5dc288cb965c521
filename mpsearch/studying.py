"""The straight line from a question to measured plans, every step kept under its key."""

from __future__ import annotations

import math
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import replace
from typing import TYPE_CHECKING, Any

from mpsearch import registry, rivals
from mpsearch.errors import InputError, Notice
from mpsearch.formats.kv_cache import KvCache, check_length
from mpsearch.front import ParetoFront
from mpsearch.hardware.identity import check_same
from mpsearch.keys import content_key
from mpsearch.machine import fingerprint
from mpsearch.notices import layer_notices, order_notices, score_notices
from mpsearch.planning import Labelled, Planner
from mpsearch.ports import Executor, Searcher, Store
from mpsearch.profiled import study_profile
from mpsearch.protection import Rule
from mpsearch.scoring import check_covers
from mpsearch.session import Session
from mpsearch.spec import StudySpec
from mpsearch.stored_study import StoredStudy
from mpsearch.tasks import RatioTask, Survey, SurveyTask

if TYPE_CHECKING:
    from mpsearch.front import Measurement
    from mpsearch.plan import BitPlan
    from mpsearch.standings import Tournament
    from mpsearch.trials import Searched

Report = Callable[[str, int, int], None]
#: Raised with every change of what is found in a model: it is part of the survey's key.
FIND_VERSION = 2


class Study(StoredStudy):
    """A question and all that is known of its answer.

    Every value is kept in the store under its key, so a run that was stopped goes on where it was, and a second
    run computes nothing.

    Attributes:
        spec: the question.
        store: where everything is kept.
        notices: what a user should know about the last run.
        computed: how many tasks the last run computed: 0 when all was known.
        report: called with (phase, done, total).
    """

    def __init__(
        self,
        spec: StudySpec,
        store: Store,
        *,
        work: Callable[[Any], Any] | None = None,
        identity: Mapping[str, str] | None = None,
        report: Report | None = None,
    ) -> None:
        """Set up; nothing is read or computed yet.

        Args:
            spec: the question.
            store: an open store.
            work: does tasks in this process, for a model that is not a folder; else workers load the folder.
            identity: digests of ``model``, ``calibration`` and ``validation`` that go with ``work``.
            report: called with (phase, done, total).
        """
        super().__init__(spec, store, identity)
        self.notices: list[Notice] = []
        self.computed = 0
        self._work = work
        self.report: Report = report or (lambda phase, done, total: None)

    def run(self) -> ParetoFront:
        """Score, solve and measure whatever is missing, and return the measured front.

        Raises:
            InfeasibleError: no plan keeps the budgets (E201); found before anything is scored.
            StorageError: a study of this name asks something else (E140).
            MpsearchError: the model, the data or the formats cannot be used.
        """
        registry.make("estimators", self.spec.estimator, **self.spec.estimator_settings)
        with self.session(self.spec.estimator) as session:
            self.store.set_state(self.name, "running")
            state = "failed"
            try:
                state = "complete" if self._run(session) else "gaps"
            except KeyboardInterrupt:
                state = "paused"
                raise
            finally:
                self.store.set_state(self.name, state)
        return self.front

    def tournament(
        self, estimators: Sequence[str] = (), *, plans: int = 100, sizes: int = 5, limit: float = 30.0
    ) -> Tournament:
        """Find out which estimator to trust on this model (see `mpsearch.tournament.hold`)."""
        from mpsearch.tournament import hold

        return hold(self, estimators, plans=plans, sizes=sizes, limit=limit)

    def measure(self, plans: Mapping[str, BitPlan]) -> dict[str, Measurement]:
        """Measure plans from elsewhere beside the study's own (see `mpsearch.visiting.measure_plans`)."""
        from mpsearch.visiting import measure_plans

        return measure_plans(self, plans)

    def search(
        self,
        searcher: str | Searcher = "refine",
        *,
        evaluations: int = 60,
        budgets: Sequence[str] = (),
        **settings: Any,
    ) -> Searched:
        """Search for the plan of least measured loss within budgets (see `mpsearch.searching.search_study`)."""
        from mpsearch.searching import search_study

        return search_study(self, searcher, evaluations, budgets, settings)

    @property
    def positions(self) -> int:
        """Tokens of one sample of the texts; 1 for a model that was given with its batches."""
        return self.spec.length if self._work is None else 1

    @property
    def batch_samples(self) -> int:
        """Samples of one batch of the texts; 0 where batches were given, and may be of any size."""
        return self.spec.batch_size if self._work is None else 0

    @contextmanager
    def session(self, estimator: str = "") -> Iterator[Session]:
        """Look at model and data, check that the question can be answered, and note it; workers run meanwhile.

        Args:
            estimator: who will score; what it cannot score is refused at once.

        Raises:
            as `run`.
        """
        self.notices, self.computed = [], 0
        if self.spec.solver != "auto":
            registry.make("solvers", self.spec.solver, **self.spec.solver_settings)
        self._check_texts()
        if any(row.name == self.name for row in self.store.studies()):
            self.store.create_study(self.name, self.spec.question())
            self._check_origin()
        with registry.make("executors", "local", workers=1 if self._work else self.spec.workers) as executor:
            key, survey = self._find(executor)
            survey = self._survey(survey)
            rule = Rule.parse(self.spec.protect) if self.spec.protect else None
            ratios_key, ratios = self._ratios(executor, rule, key) if rule else ("", {})
            protected = rule.pins(survey.layers, ratios) if rule else {}
            planner = Planner(
                self.spec, survey.layers, self._model_entry(survey), protected=protected, caches=survey.caches,
                energy=self._energy(),
            )  # fmt: skip
            if rule:
                kept = {name: fmt for name, fmt in protected.items() if planner.pins[name] == fmt}
                self.notices.append(rule.notice(survey.layers, ratios, kept))
            if estimator:
                check_covers(estimator, planner.formats)
            if self._work is None:
                check_length([fmt for fmt in planner.formats if isinstance(fmt, KvCache)], self.spec.length)
            # The others depend on the engine.
            planner.check([budget for budget in self.budgets if budget.resource in ("weights", "bops", "kv")])
            folder = None if self._work else self.spec.model
            known = any(row.name == self.name for row in self.store.studies())
            before = self.profile if known else None
            profile, doubts = study_profile(planner, self.store, self.report, folder, self.identity["model"], before)
            self.notices += doubts
            planner = replace(planner, profile=profile)
            planner.check(self.budgets)
            # A question that cannot be answered takes no name: it can be put right and asked again.
            self.store.create_study(self.name, self.spec.question())
            self.store.link(self.name, "survey", key)
            if rule:
                self.store.link(self.name, "ratios", ratios_key)
            if profile is not None:
                if before is not None:
                    check_same(before.identity, profile.identity, f"study '{self.name}'")
                self.store.put("profile", profile.key, profile.to_json())
                self.store.link(self.name, "profile", profile.key)
            origin = self._origin()
            self.store.put("origin", content_key(origin), origin)
            self.store.link(self.name, "origin", content_key(origin))
            yield Session(self, planner, survey, executor)

    def _check_texts(self) -> None:
        if self.identity["calibration"] == self.identity["validation"]:
            raise InputError(
                "E505",
                "calibration and validation are the same text: a plan would be judged by what it was made from",
                advice="give another validation text, or none: a quarter of the calibration text is then held out",
            )

    def _origin(self) -> dict[str, Any]:
        """All that must stay the same for numbers of one study to be comparable."""
        return {**self.identity, **fingerprint()}

    def _check_origin(self) -> None:
        """Refuse to mix numbers of another model, text, machine or version into a study.

        Raises:
            InputError: E142, naming what changed.
        """
        now = self._origin()
        for _, then in self._linked("origin"):
            changed = [
                f"{name} was {str(then.get(name))[:40]}, is {str(now.get(name))[:40]}"
                for name in now
                if then.get(name) != now.get(name)
            ]
            if changed:
                raise InputError(
                    "E142",
                    f"study '{self.name}' was computed under other conditions; mixed numbers are not comparable",
                    because="; ".join(changed),
                    advice="go back to what it was, or start another study: --name",
                )

    def _run(self, session: Session) -> bool:
        """Score, solve, measure; say whether every plan could be measured."""
        planner, survey = session.planner, session.survey
        self.notices += [*survey.notices, *layer_notices(survey.layers)]
        reasons = [(fmt, planner.why_not(fmt).partition("; allowed")[0]) for fmt in planner.misfits]
        self.notices += [Notice("W131", f"{fmt} fits no layer: {reason}") for fmt, reason in reasons]
        if planner.able and not planner.able.container:
            text = f"what {planner.able.title} stores is not known to the byte: budgets of weights count our own file's"
            self.notices.append(Notice("N416", text))
        for position, table in enumerate(planner.costs):
            self.store.put("cost", table.key, table.to_json())
            self.store.link(self.name, "cost", table.key, table.resource, position)
        kernelless = planner.without_kernel.items() if self.spec.engine.startswith("file:") else ()
        self.notices += [Notice("W131", f"{fmt} is not offered: {reason}") for fmt, reason in kernelless]
        everything = planner.holds_all(self.budgets)
        if everything is not None:
            self.notices.append(everything)
            return self._measure(session, [Labelled("mixed", planner.at_16_bits())])
        made = [str(fmt) for fmt in planner.formats if fmt.calibrated]
        if made:
            text = f"{', '.join(made)}: made from the calibration data and scored on it, so they look too good"
            self.notices.append(Notice("W425", f"{text}; plans are measured on other text"))
        scores, _ = session.score(self.spec.estimator)
        self.store.link(self.name, "scores", str(scores.source["scope"]))
        self.notices += score_notices(scores)
        self.notices += order_notices(scores, planner.sizes, self.spec.clamp)
        if kept := planner.unscored(scores):
            names = ", ".join(f"{scores.layers[i]} in {scores.formats[j]}" for i, j in kept[:3])
            more = f" and {len(kept) - 3} more" if len(kept) > 3 else ""
            self.notices.append(Notice("W518", f"without a score, kept in the largest format: {names}{more}"))
        chosen = Labelled("mixed", planner.mixed(scores, self.budgets))
        plans = [chosen, *rivals.sweep(planner, scores, self.budgets, self.spec.points)]
        plans += [Labelled(x.label, planner.predict(scores, x.plan)) for x in rivals.uniform(planner)]
        plans += rivals.random(planner, scores, self.budgets, self.spec.random)
        return self._measure(session, plans)

    def _find(self, executor: Executor) -> tuple[str, Survey]:
        """Return what is in the model and the text, and its key."""
        spec = self.spec.to_json()
        cut = {name: spec[name] for name in ("tokens", "validation_tokens", "length", "batch_size", "ties")}
        ties = self.spec.ties_used
        cut |= {"find": FIND_VERSION, "caches": self.spec.counts_caches}
        cut["ties"] = ties if isinstance(ties, str) else [list(group) for group in ties]
        key = content_key([self.identity, cut, fingerprint()])
        known = self.store.get("survey", key)
        if known is None:
            self.report("load", 0, 1)
            for _, survey in self.compute(executor, [SurveyTask()]):
                known = survey.to_json()
                self.store.put("survey", key, known)
            self.report("load", 1, 1)
        assert known is not None
        return key, Survey.from_json(known)

    def _ratios(self, executor: Executor, rule: Rule, survey: str) -> tuple[str, dict[str, float | None]]:
        """Return what a rule pins layers by, layer name -> ratio, and its key."""
        version = registry.load("estimators", rule.estimator).version
        key = content_key([survey, rule.estimator, version])
        known = self.store.get("ratios", key)
        if known is None:
            for _, ratios in self.compute(executor, [RatioTask(rule.estimator)]):
                # A stored value is never NaN.
                known = {"ratios": {name: x if math.isfinite(x) else None for name, x in ratios.items()}}
                self.store.put("ratios", key, known)
        assert known is not None
        return key, dict(known["ratios"])

    def _measure(self, session: Session, plans: Sequence[Labelled]) -> bool:
        """Measure plans, and note which belong to this study and in what order.

        Returns:
            Whether all could be measured; each one that could not leaves a notice.
        """
        for position, item in enumerate(plans):
            self.store.put("plan", item.plan.key, item.plan.to_json())
            self.store.link(self.name, "plan", item.plan.key, label=item.label, position=position)
        measured = session.measure(plans)
        self.notices += [Notice("W511", failed.message) for failed in session.failed]
        for position, item in enumerate(plans):
            if item.plan.key in measured:
                key = session.measurement_key(item.plan)
                self.store.link(self.name, "measurement", key, item.label, position)
        return not session.failed

    def compute(self, executor: Executor, tasks: Sequence[Any]) -> Iterator[tuple[int, Any]]:
        """Have tasks done, and yield (index, result) as they are."""
        if not tasks:
            return
        setup = replace(
            self.spec.setup, identity=tuple(self.identity[x] for x in ("model", "calibration", "validation"))
        )
        work = self._work or registry.load("work", "workbench")(setup)
        for result in executor.map(work, tasks):
            self.computed += 1
            yield result
