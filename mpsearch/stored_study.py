"""A study as the store knows it: its tables, plans and measurements, and new plans from them. Needs no torch."""

from __future__ import annotations

import math
import shlex
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import replace
from functools import cached_property
from pathlib import Path
from typing import TYPE_CHECKING, Any

from mpsearch.answer import Answer
from mpsearch.budget import Budget, parse_budgets
from mpsearch.bundled import model_title
from mpsearch.capabilities import own_type
from mpsearch.errors import InputError
from mpsearch.front import Measurement, ParetoFront
from mpsearch.hardware.profile import Profile
from mpsearch.hardware.traffic import read_energy
from mpsearch.model.checkpoint import find_folder, folder_digest
from mpsearch.model.source import source_digest
from mpsearch.plan import BitPlan
from mpsearch.planning import Labelled, Planner
from mpsearch.ports import Store
from mpsearch.protection import Rule
from mpsearch.records import StoredPlan, StudyStatus
from mpsearch.robust import Doubt
from mpsearch.spec import StudySpec
from mpsearch.tables import CostTable, SensitivityTable
from mpsearch.tasks import Survey

if TYPE_CHECKING:
    from mpsearch.plot.figure import Figure
    from mpsearch.views.study_view import StudyView


class StoredStudy:
    """A question, and what is stored of its answer.

    Attributes:
        spec: the question.
        store: where everything is kept.
    """

    def __init__(self, spec: StudySpec, store: Store, identity: Mapping[str, str] | None = None) -> None:
        """Set up; nothing is read yet.

        Args:
            spec: the question.
            store: an open store.
            identity: digests of ``model``, ``calibration`` and ``validation``, when these are not files.
        """
        self.spec = spec
        self.store = store
        self._given = identity

    @property
    def name(self) -> str:
        """Name of the study."""
        return self.spec.name

    @property
    def status(self) -> StudyStatus:
        """What the study is doing: state, phase, who drives it."""
        return self.store.control.status(self.name)

    def watch(self, every: float = 0.5) -> Iterator[StudyStatus]:
        """Yield what the study does until it has ended; it goes on when nobody watches.

        Args:
            every: seconds between two looks.
        """
        from mpsearch.submitting import watch

        return (status for status, _ in watch(self.store, self.name, every))

    def pause(self) -> None:
        """Ask that it stops after the tasks in hand; ``run()`` or ``submit()`` goes on with it.

        Raises:
            UsageError: it has ended (E115); so with `cancel`.
        """
        from mpsearch.submitting import ask

        ask(self.store, self.name, "pause")

    def cancel(self) -> None:
        """Ask that it stops for good; what was computed stays."""
        from mpsearch.submitting import ask

        ask(self.store, self.name, "cancel")

    @property
    def budgets(self) -> tuple[Budget, ...]:
        """The study's own budgets."""
        return parse_budgets(self.spec.budgets)

    @cached_property
    def identity(self) -> Mapping[str, str]:
        """Digests of the model, the calibration text and the validation text."""
        if self._given is not None:
            return self._given
        setup = self.spec.setup
        return {
            "model": folder_digest(find_folder(setup.model)),
            "calibration": source_digest(setup.calibration),
            "validation": source_digest(setup.validation),
        }

    def _model_entry(self, survey: Survey) -> dict[str, str]:
        name = model_title(self.spec.model)
        return {"name": name, "digest": self.identity["model"], "architecture": survey.architecture}

    def _linked(self, kind: str) -> list[tuple[str, Mapping[str, Any]]]:
        links = self.store.links(self.name, kind)
        bodies = self.store.get_many(kind, [link.key for link in links])
        return [(link.label, bodies[link.key]) for link in links if link.key in bodies]

    @property
    def survey(self) -> Survey:
        """What was found in the model.

        Raises:
            InputError: the study has not come that far (E143).
        """
        return self._survey(Survey.from_json(self._only("survey")))

    def _survey(self, found: Survey) -> Survey:
        """What was found, with KV caches beside the layers where the study decides none."""
        return found if self.spec.kv else found.apart()

    @property
    def profile(self) -> Profile | None:
        """How long kernels take; None in a study that timed none."""
        found = self._linked("profile")
        return Profile.from_json(found[-1][1]) if found else None

    def _energy(self) -> Mapping[str, tuple[float, float]]:
        """Picojoules per operation and byte: as the study first read them, so that a copy of it needs no file."""
        if not self.spec.energy:
            return {}
        known = self._linked("energy")
        if known:
            return {name: (float(mac), float(byte)) for name, (mac, byte) in known[-1][1]["energy"].items()}
        return read_energy(Path(self.spec.energy))

    @property
    def protected(self) -> dict[str, str]:
        """Decision name -> format, of the decisions that the rule of the study pins (raises as `survey`)."""
        if not self.spec.protect:
            return {}
        return Rule.parse(self.spec.protect).pins(self.survey.layers, self._only("ratios")["ratios"])

    @property
    def scores(self) -> SensitivityTable:
        """The stored scores (raises as `survey`)."""
        return SensitivityTable.from_json(self._only("scores"))

    @property
    def scored(self) -> bool:
        """Whether there are scores to solve on."""
        return bool(self.store.links(self.name, "scores"))

    @property
    def costs(self) -> list[CostTable]:
        """The stored cost tables, weights first."""
        return [CostTable.from_json(body) for _, body in self._linked("cost")]

    @property
    def plans(self) -> list[Labelled]:
        """The study's plans, the one for its own budgets first."""
        return [Labelled(label, BitPlan.from_json(body)) for label, body in self._linked("plan")]

    @property
    def measurements(self) -> list[Measurement]:
        """All measured plans of the study, each with its label; the plan for its own budgets first."""
        return self.measured_at({row.assignment: row.predicted["cost"] for row in self.plan_rows.values()})

    def measured_at(self, costs: Mapping[str, Mapping[str, float]]) -> list[Measurement]:
        """The measurements, each with what its plan costs.

        Losses are shared with other studies of the same plan; what it costs is this study's own.

        Args:
            costs: key of a plan's formats -> resource -> its total cost.
        """
        found = [Measurement.from_json({**body, "label": label}) for label, body in self._linked("measurement")]
        return [replace(item, cost=costs.get(item.plan, item.cost)) for item in found]

    @property
    def plan_rows(self) -> dict[str, StoredPlan]:
        """Key of each plan -> what is drawn of it, the plan for the study's own budgets first; no layer is made."""
        return self.store.plan_rows([link.key for link in self.store.links(self.name, "plan")])

    @property
    def front(self) -> ParetoFront:
        """The measured front over the bytes of weights."""
        return ParetoFront.of(self.measurements)

    @property
    def view(self) -> StudyView:
        """What is drawn of the study, read from the store anew: points, scores, verdict, what to try next."""
        from mpsearch.views.study_view import StudyView

        return StudyView.of(self)

    def plot(self) -> Figure:
        """Draw what its plans lose over their size (see `mpsearch.plot.front`)."""
        from mpsearch.plot import front

        return front(self)

    def _repr_html_(self) -> str:
        from mpsearch.plot.notebook import study_html

        return study_html(self)

    def plan(self, *budgets: str, goal: str = "loss", most_loss: float = math.inf) -> BitPlan:
        """Solve on the stored scores; neither the model nor torch is loaded (see `answer`)."""
        return self.answer(*budgets, goal=goal, most_loss=most_loss).plan

    def answer(self, *budgets: str, goal: str = "loss", most_loss: float = math.inf) -> Answer:
        """Solve on the stored scores; neither the model nor torch is loaded.

        Args:
            budgets: budgets to keep; the study's own when none is given and the goal is the loss.
            goal: ``loss``; ``worst`` for the plan whose worst decision is best; or a resource, such as ``weights``:
                the least of it with a predicted loss of at most ``most_loss``.
            most_loss: of the goal that is a resource.

        Raises:
            InfeasibleError: no plan keeps them (E201, E203).
            InputError: not budgets (E111, E112), no such goal (E212), or the study has no scores yet (E143).
        """
        own = self.budgets if goal in ("loss", "worst") else ()
        wanted = parse_budgets(budgets) if budgets else own
        planner = self._planner(wanted)
        if goal == "loss" and planner.holds_all(wanted) is not None:
            return Answer(planner.at_16_bits())
        answer = planner.answer(self.scores, wanted, goal, most_loss)
        self.store.put("plan", answer.plan.key, answer.plan.to_json())
        return answer

    def plan_for(self, target: str, *budgets: str) -> BitPlan:
        """Solve again with only what a target can hold; decisions that it loads as one are tied.

        Weights count with the bytes that it stores. Losses of decisions that are tied here add up, where a study for
        the target measures them together.

        Args:
            target: name of the target.
            budgets: as for `answer`.

        Raises:
            InputError: no such target (E107), or a layer that it holds in no format of the study (E130).
            InfeasibleError: as `answer`.
        """
        wanted = parse_budgets(budgets) if budgets else self.budgets
        planner = self._planner(wanted)
        # A layer that stays in its own type loses nothing; whether it may is for the target to say.
        rows = planner.layers.decisions
        stored = dict.fromkeys(filter(None, map(own_type, planner.layers)))
        harmless = {own: [all(own_type(x) == own for x in row.layers) for row in rows] for own in stored}
        formats = tuple(dict.fromkeys([*planner.weights, *stored]))
        planner = replace(planner, spec=replace(planner.spec, formats=formats, target=target))
        scores = self.scores.for_formats([str(fmt) for fmt in planner.formats], harmless)
        return planner.answer(scores, wanted).plan

    def doubts(self, *budgets: str, by: float = 1.645) -> tuple[Doubt, ...]:
        """List the decisions whose format the errors of the scores leave open (see `mpsearch.doubts`).

        Args:
            budgets: as for `answer`.
            by: standard errors that a lead must have not to be listed.
        """
        return self.answer(*budgets).doubts(by)

    def _planner(self, wanted: Sequence[Budget]) -> Planner:
        survey = self.survey
        model = dict(self._model_of_plans() or self._model_entry(survey))
        return Planner(
            self.spec, survey.layers, model, tuple(wanted), self.protected, survey.caches, self.profile, self._energy()
        )

    def _model_of_plans(self) -> Mapping[str, str] | None:
        links = self.store.links(self.name, "plan")
        bodies = (self.store.get("plan", link.key) for link in links)
        first = next((body for body in bodies if body is not None), None)
        return BitPlan.from_json(first).model if first is not None else None

    def _only(self, kind: str) -> Mapping[str, Any]:
        found = self._linked(kind)
        if not found:
            where = "" if self.spec.storage == StudySpec.storage else f" --storage {shlex.quote(self.spec.storage)}"
            advice = f"mpsearch resume {shlex.quote(self.name)}{where}"
            if self.store.study(self.name).state == "complete":
                advice = "its budget held the whole model; start another study with a smaller one"
            raise InputError("E143", f"study '{self.name}' has no {kind}", advice=advice)
        return found[-1][1]
