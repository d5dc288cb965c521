"""The straight line from a question to measured plans, every step kept under its key."""

from __future__ import annotations

import shlex
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import asdict, replace
from typing import TYPE_CHECKING, Any

from mpsearch import registry, rivals
from mpsearch.driving import Driver, Stopped, Terms
from mpsearch.errors import InputError, MpsearchError, Notice, ResourceError
from mpsearch.formats.kv_cache import KvCache, check_length
from mpsearch.front import ParetoFront
from mpsearch.hardware.identity import check_same
from mpsearch.keys import content_key
from mpsearch.machine import fingerprint
from mpsearch.notices import failure_notices, layer_notices, order_notices, score_notices
from mpsearch.pace import Detail
from mpsearch.planning import Labelled, Planner
from mpsearch.ports import Executor, Searcher, Store
from mpsearch.profiled import study_profile
from mpsearch.protection import Rule
from mpsearch.scoring import check_covers, scores_key
from mpsearch.session import Session
from mpsearch.spec import StudySpec
from mpsearch.stored_study import StoredStudy
from mpsearch.tasks import Failed, Job, RatioTask, Survey, SurveyTask
from mpsearch.working import OF_THE_MACHINE

if TYPE_CHECKING:
    from mpsearch.front import Measurement
    from mpsearch.plan import BitPlan
    from mpsearch.standings import Tournament
    from mpsearch.tables import SensitivityTable
    from mpsearch.trials import Searched

Report = Callable[[str, int, int], None]
#: Raised with every change of what is found in a model: it is part of the survey's key.
FIND_VERSION = 2
#: The server was away for too long, which is no failure of the study.
_AWAY = "E609"
#: Where a study stands when what was done to it changes nothing of that.
_WITHOUT_DRIVER = {"": "new", "running": "paused", "submitted": "paused"}


class Study(StoredStudy):
    """A question and all that is known of its answer.

    Every value is kept in the store under its key, so a run that was stopped goes on where it was, and a second
    run computes nothing.

    Attributes:
        spec: the question.
        store: where everything is kept.
        notices: what a user should know about the last run.
        computed: how many tasks the last run had computed: 0 when all was known.
        told: called with (phase, done, total).
        terms: on what terms this process drives it.
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
        self.told: Report = report or (lambda phase, done, total: None)
        self.terms = Terms()
        self._driver: Driver | None = None
        self._at_work: Session | None = None

    @property
    def detail(self) -> Detail:
        """What is worth knowing of the work under way: workers, tasks done again or given up, what was begun last."""
        return self._driver.detail if self._driver else Detail()

    def report(self, phase: str, done: int, total: int) -> None:
        """Tell whoever set the study up, and whoever watches it, how far it is."""
        if self._driver is not None:
            self._driver.progress = (phase, done, total)
        self.told(phase, done, total)

    def run(self) -> ParetoFront:
        """Score, solve and measure whatever is missing, and return the measured front.

        Raises:
            InfeasibleError: no plan keeps the budgets (E201); found before anything is scored.
            StorageError: a study of this name asks something else (E140).
            MpsearchError: the model, the data or the formats cannot be used.
        """
        registry.make("estimators", self.spec.estimator, **self.spec.estimator_settings)
        with self.session(self.spec.estimator) as session:
            session.outcome = "failed"
            since = self.store.control.clock()
            session.outcome = "complete" if self._run(session) else "gaps"
            told = [line for line in self.store.control.lines(self.name, limit=10_000) if line.time >= since]
            self.notices += [Notice("W521", line.text) for line in told if line.kind == "conflict"][:5]
            for notice in self.notices:
                self.store.control.log(self.name, "notice", str(notice))
        return self.front

    def submit(self) -> str:
        """Hand the study over and return at once: to workers of the database, or else to a process of its own.

        Returns:
            Its name; `watch` follows it.

        Raises:
            StorageError: the name has another question (E140).
            InputError: a model or a database that lives in this process only (E115).
        """
        from mpsearch.submitting import submit

        if self._work is not None:
            raise InputError(
                "E115", "the model is in this process only: nobody else can work on it",
                advice="run() it here, or save the model in a folder",
            )  # fmt: skip
        return submit(self.spec, self.store)

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
        executor = self._executor()
        before = next((row.state for row in self.store.studies() if row.name == self.name), "")
        self.store.create_study(self.name, self.spec.question())
        if before:
            self._check_origin()
        with self._drive(before, executor) as driver:
            key, survey = self._find(driver)
            survey = self._survey(survey)
            rule = Rule.parse(self.spec.protect) if self.spec.protect else None
            ratios_key, ratios = self._ratios(driver, rule, key) if rule else ("", {})
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
            then = self.profile
            profile, doubts = study_profile(planner, self.store, self.report, folder, self.identity["model"], then)
            self.notices += doubts
            planner = replace(planner, profile=profile)
            planner.check(self.budgets)
            self.store.link(self.name, "survey", key)
            if rule:
                self.store.link(self.name, "ratios", ratios_key)
            if profile is not None:
                if then is not None:
                    check_same(then.identity, profile.identity, f"study '{self.name}'")
                self.store.put("profile", profile.key, profile.to_json())
                self.store.link(self.name, "profile", profile.key)
            if planner.energy:
                energy = {"energy": {name: list(prices) for name, prices in planner.energy.items()}}
                self.store.put("energy", content_key(energy), energy)
                self.store.link(self.name, "energy", content_key(energy))
            origin = self._origin()
            self.store.put("origin", content_key(origin), origin)
            self.store.link(self.name, "origin", content_key(origin))
            self._at_work = Session(self, planner, survey, driver, _WITHOUT_DRIVER.get(before, before))
            yield self._at_work

    @contextmanager
    def _drive(self, before: str, executor: Executor) -> Iterator[Driver]:
        """Hold the study while the body works on it, and say in the end where it stands.

        Args:
            before: its state until now; empty for one that was made for this.
            executor: starts the workers.
        """
        setup = asdict(self.spec.setup)
        cut = {name: setup[name] for name in setup if name not in ("model", "calibration", "validation", "identity")}
        identity = [self.identity[x] for x in ("model", "calibration", "validation")]
        work = self._work or registry.load("work", "workbench")(self.spec.setup_for(identity))
        driver = Driver(
            self.store, self.name, executor, self.identity, cut, storage=self.store.address, work=work,
            private=self._work is not None, terms=self.terms,
        )  # fmt: skip
        stopped, reason = "", ""
        # Whoever drove it before is gone.
        before = {"submitted": "failed", "running": "failed", "new": "failed"}.get(before, before)
        with driver:
            self._driver, self._at_work = driver, None
            try:
                yield driver
            except Stopped as stop:
                stopped = {"pause": "paused", "cancel": "cancelled", "leave": "submitted"}[stop.wanted]
                raise
            except KeyboardInterrupt:
                begun = self._at_work
                ended = begun is not None and begun.outcome in ("complete", "gaps")
                # A search on a study that had ended leaves it as it was.
                stopped = begun.outcome if ended and begun else "submitted" if self.terms.adopts else "paused"
                raise
            except Exception as error:
                reason = f"{error.code} {error.message}" if isinstance(error, MpsearchError) else repr(error)
                code = getattr(error, "code", "")
                if self.terms.adopts and code in (*OF_THE_MACHINE, _AWAY):
                    # Another machine may have what this one lacks.
                    stopped = "submitted"
                elif code == _AWAY:
                    stopped = "paused"
                raise
            finally:
                begun, self._driver, self._at_work = self._at_work, None, None
                if state := stopped or (begun.outcome if begun else before):
                    driver.leave(state, reason, now=bool(stopped))
                else:
                    # A question that cannot be answered takes no name: it can be put right and asked again.
                    driver.drop()

    def _executor(self) -> Executor:
        if self._work is not None:
            made: Executor = registry.make("executors", "local", workers=1)
            return made
        settings = dict(self.spec.executor_settings)
        if "workers" in registry.settings("executors", self.spec.executor):
            settings.setdefault("workers", self.spec.workers)
        made = registry.make("executors", self.spec.executor, **settings)
        if not made.inside and not self.store.shared:
            raise InputError(
                "E115",
                "a database in memory cannot be opened by other processes, and they are to do the work",
                advice="give a file (storage = 'sqlite:///results.db'), or workers = 1",
            )
        return made

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
                    advice=f"go back to what it was, compute all of it again (mpsearch resume {shlex.quote(self.name)} "
                    "--remeasure), or start another study: --name",
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
        self.link_scores(scores)
        self.notices += score_notices(scores)
        gaps = scores.source.get("gaps", {})
        self.notices += [Notice("W522", f"{what}: {why}; without a score") for what, why in gaps.items()]
        self.notices += order_notices(scores, planner.sizes, self.spec.clamp)
        if kept := planner.unscored(scores):
            names = ", ".join(f"{scores.layers[i]} in {scores.formats[j]}" for i, j in kept[:3])
            more = f" and {len(kept) - 3} more" if len(kept) > 3 else ""
            self.notices.append(Notice("W518", f"without a score, kept in the largest format: {names}{more}"))
        chosen = Labelled("mixed", planner.mixed(scores, self.budgets))
        plans = [chosen, *rivals.sweep(planner, scores, self.budgets, self.spec.points)]
        plans += [Labelled(x.label, planner.predict(scores, x.plan)) for x in rivals.uniform(planner)]
        plans += rivals.random(planner, scores, self.budgets, self.spec.random)
        return self._measure(session, plans) and not gaps

    def link_scores(self, scores: SensitivityTable) -> None:
        """Note the study's scores; those with gaps count until there are some without."""
        self.store.link(self.name, "scores", scores_key(scores.source), position=-1 if scores.source.get("gaps") else 0)

    def _find(self, driver: Driver) -> tuple[str, Survey]:
        """Return what is in the model and the text, and its key."""
        spec = self.spec.to_json()
        cut = {name: spec[name] for name in ("tokens", "validation_tokens", "length", "batch_size", "ties")}
        ties = self.spec.ties_used
        cut |= {"find": FIND_VERSION, "caches": self.spec.counts_caches}
        cut["ties"] = ties if isinstance(ties, str) else [list(group) for group in ties]
        key = content_key([self.identity, cut, fingerprint()])
        if self.store.get("survey", key) is None:
            self.report("load", 0, 1)
            self._have(driver, Job(SurveyTask(), key))
            self.report("load", 1, 1)
        return key, Survey.from_json(self.store.get("survey", key) or {})

    def _have(self, driver: Driver, job: Job) -> None:
        """Have one job done, without which nothing can be.

        Raises:
            ResourceError: it kills every worker that tries (E522).
        """
        for _, failed in self.compute(driver, [job]):
            if failed is not None:
                advice = "mpsearch doctor tells of memory; a smaller batch_size or length needs less of it"
                raise ResourceError(failed.code, f"{job.describe()}: {failed.message}", advice=advice)

    def _ratios(self, driver: Driver, rule: Rule, survey: str) -> tuple[str, dict[str, float | None]]:
        """Return what a rule pins layers by, layer name -> ratio, and its key."""
        version = registry.load("estimators", rule.estimator).version
        key = content_key([survey, rule.estimator, version])
        if self.store.get("ratios", key) is None:
            self._have(driver, Job(RatioTask(rule.estimator), key))
        return key, dict((self.store.get("ratios", key) or {})["ratios"])

    def _measure(self, session: Session, plans: Sequence[Labelled]) -> bool:
        """Measure plans, and note which belong to this study and in what order.

        Returns:
            Whether all could be measured; each one that could not leaves a notice.
        """
        for position, item in enumerate(plans):
            self.store.put("plan", item.plan.key, item.plan.to_json())
            self.store.link(self.name, "plan", item.plan.key, label=item.label, position=position)
        measured = session.measure(plans)
        self.notices += failure_notices(session.failed)
        for position, item in enumerate(plans):
            if item.plan.key in measured:
                key = session.measurement_key(item.plan)
                self.store.link(self.name, "measurement", key, item.label, position)
        return not session.failed

    def compute(self, driver: Driver, jobs: Sequence[Job]) -> Iterator[tuple[int, Failed | None]]:
        """Have jobs done, which keeps their results, and yield (index, why there is none) as they end."""
        for result in driver.do(jobs):
            self.computed += 1
            yield result
