"""Plans as people name them on the command line: a file, a study, one of a study's plans, or a key."""

from __future__ import annotations

import math
import re
from collections.abc import Iterator
from functools import cached_property
from pathlib import Path
from typing import TYPE_CHECKING, NamedTuple

from mpsearch.errors import InputError, MpsearchError, did_you_mean
from mpsearch.plan import BitPlan

if TYPE_CHECKING:
    from mpsearch.ports import Store
    from mpsearch.views.study_view import StudyView

#: Fewest digits of a key.
_DIGITS = 6
_KEY = re.compile(rf"[0-9a-f]{{{_DIGITS},64}}")
_AT = re.compile(r"(?P<label>.*)@(?P<bits>\d+(?:\.\d+)?)")


class Picked(NamedTuple):
    """A plan, and the study that knows most of it.

    Attributes:
        plan: the plan.
        view: of the study whose scores tell of it; None when there is none.
        title: what to call it.
    """

    plan: BitPlan
    view: StudyView | None
    title: str


class Picker:
    """Finds plans by what a user calls them.

    Attributes:
        storage: results database.
        study: name of the study whose scores to use for plan files; empty to look for one.
    """

    def __init__(self, storage: str, study: str = "") -> None:
        self.storage, self.study = storage, study
        self._views: dict[str, StudyView] = {}

    def pick(self, text: str) -> Picked:
        """Find a plan.

        Args:
            text: a plan file; a study's name for its chosen plan; ``STUDY:LABEL``, with ``@BITS`` behind it for the
                plan of that label that is nearest to so many bits per weight; or the first digits of a key.

        Raises:
            InputError: nothing is called so (E101), or the study has no such plan (E143).
        """
        if text.endswith(".json") or Path(text).is_file():
            plan = BitPlan.load(text)
            return Picked(plan, self._view_for(plan), Path(text).name)
        names = [row.name for row in self.store.studies()]
        if text in names:
            view = self.view(text)
            return Picked(_plan(view, view.chosen), view, text)
        for i in (i for i, sign in enumerate(text) if sign == ":"):
            if text[:i] in names:
                view = self.view(text[:i])
                return Picked(_plan(view, _labelled(view, text[i + 1 :])), view, text)
        found = self._by_key(text, names) if _KEY.fullmatch(text) else None
        if found is None:
            raise InputError(
                "E101",
                f"'{text}' is no plan file, study or key of a plan{did_you_mean(text, names)}",
                advice="name a plan.json, a STUDY, STUDY:LABEL such as 'demo:uniform int4-g64', or a key",
            )
        return found

    def close(self) -> None:
        """Let go of the database."""
        if "store" in self.__dict__:
            self.store.close()

    @cached_property
    def store(self) -> Store:
        """The database, opened read-only."""
        from mpsearch import registry

        found: Store = registry.make("stores", "sql", url=self.storage, create=False, read_only=True)
        return found

    def view(self, name: str) -> StudyView:
        """View of a study.

        Raises:
            StorageError: no such study (E141).
        """
        from mpsearch.spec import StudySpec
        from mpsearch.stored_study import StoredStudy
        from mpsearch.views.study_view import StudyView

        if name not in self._views:
            row = self.store.study(name)
            study = StoredStudy(StudySpec.from_question(row.spec, self.storage), self.store)
            self._views[name] = StudyView.of(study)
        return self._views[name]

    def study_of(self, model: str) -> str:
        """Name of the newest study of a model, or of the study that is called so.

        Raises:
            InputError: there is none (E101).
        """
        from mpsearch.bundled import resolve_model

        rows = self.store.studies()
        if any(row.name == model for row in rows):
            return model
        try:
            folder = resolve_model(model, Path.cwd()) if model else ""
        except MpsearchError:
            folder = ""
        known = {model, folder, str(Path(folder).resolve()) if folder else ""} - {""}
        found = next((row.name for row in rows if row.spec.get("model") in known), "")
        if not found:
            raise InputError(
                "E101", f"no study of '{model}' is in this database{did_you_mean(model, [row.name for row in rows])}",
                advice="name the study: mpsearch layers --study NAME --scores",
            )  # fmt: skip
        return found

    def _view_for(self, plan: BitPlan) -> StudyView | None:
        """The study that is named; else one that has the plan, or scores of its model; a file needs none."""
        if self.study:
            return self.view(self.study)
        try:
            names = [row.name for row in self.store.studies()]
        except MpsearchError:
            return None
        layers = [layer.name for layer in plan.layers]
        fitting = None
        for name in names:
            links = [link.key for link in self.store.links(name, "plan")]
            bodies = self.store.get_many("plan", links[:1])
            if not any(body["model"].get("digest") == plan.model.get("digest") for body in bodies.values()):
                continue
            view = self.view(name)
            if [layer.name for layer in view.layers] != layers or view.scores is None:
                continue
            if plan.key in links or plan.assignment in view.points.keys:
                return view
            fitting = fitting or view
        return fitting

    def _by_key(self, text: str, names: list[str]) -> Picked | None:
        found = dict(self._with_key(text, names))
        if len(found) > 1:
            raise InputError("E101", f"{len(found)} plans have keys that begin with '{text}'", advice="give more of it")
        return next(iter(found.values()), None)

    def _with_key(self, text: str, names: list[str]) -> Iterator[tuple[str, Picked]]:
        for name in names:
            view = self.view(name) if self.store.links(name, "plan") else None
            for i in range(len(view.points)) if view is not None else ():
                assert view is not None
                if view.points.keys[i].startswith(text) or view.points.plans[i].startswith(text):
                    yield view.points.keys[i], Picked(_plan(view, i), view, f"{name}:{view.points.labels[i]}")


def _plan(view: StudyView, i: int) -> BitPlan:
    if not len(view.points) or not len(view.layers):
        raise InputError("E143", f"study '{view.study}' has no plan yet: it is {view.state}", advice="mpsearch resume")
    return view.plan(i)


def _labelled(view: StudyView, text: str) -> int:
    """Number of the plan of a label; of several the first, or the one that is nearest to the bits behind ``@``."""
    labels, wanted = view.points.labels, math.nan
    label = text
    if label not in labels and (match := _AT.fullmatch(text)):
        label, wanted = match["label"], float(match["bits"])
    there = [i for i, name in enumerate(labels) if name == label]
    if not there:
        known = list(dict.fromkeys(name for name in labels if not name.startswith("random")))
        raise InputError(
            "E143",
            f"study '{view.study}' has no plan called '{label}'{did_you_mean(label, known)}",
            advice=f"there is {', '.join(known[:12])}" if known else "it has no plan yet",
        )
    if math.isnan(wanted) or "weights" not in view.points.cost:
        return there[0]
    bits = 8 * view.points.cost["weights"] / max(view.weights, 1)
    return min(there, key=lambda i: (abs(bits[i] - wanted), i))
