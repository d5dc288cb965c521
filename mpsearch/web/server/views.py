"""Routes of what is drawn: the view of a study, the formats of its plans, and plans solved for a moment."""

from __future__ import annotations

import asyncio
import hashlib
import math
import threading
from collections import OrderedDict
from collections.abc import Callable
from dataclasses import dataclass, field
from typing import Annotated, Any

from fastapi import APIRouter
from fastapi import Query as InQuery
from fastapi.responses import Response

from mpsearch.errors import InputError
from mpsearch.format import Format
from mpsearch.plan import BitPlan, Predicted
from mpsearch.views.difference import difference
from mpsearch.views.packed import choices, packed
from mpsearch.views.study_view import StudyView
from mpsearch.views.why import why
from mpsearch.web.server import shapes
from mpsearch.web.server.acting import Jobs
from mpsearch.web.server.answers import FOUND, TAKES, Json, failure, new_router
from mpsearch.web.server.reading import open_study
from mpsearch.web.server.refusals import to_bytes
from mpsearch.web.server.resolving import Warm, resolve
from mpsearch.web.server.wishes import Wish

#: What a view is made of.
_KINDS = ("survey", "scores", "cost", "plan", "measurement", "ratios", "profile", "energy")
#: Views that are kept in memory.
_KEPT = 4


@dataclass
class Shown:
    """A view that is kept ready.

    Attributes:
        mark: changes with what is stored of the study.
        view: what is drawn.
        make: makes the tables to solve on.
    """

    mark: str
    view: StudyView
    make: Callable[[], Warm]
    _warm: Warm | None = None
    _text: bytes | None = None
    _lock: threading.Lock = field(default_factory=threading.Lock)

    @property
    def warm(self) -> Warm:
        """The tables to solve on, parsed once (raises E143 before there are scores)."""
        with self._lock:
            if self._warm is None:
                self._warm = self.make()
            return self._warm

    @property
    def text(self) -> bytes:
        """The view as JSON, written once; keys of plans come by `keys`, for nobody reads them at first."""
        with self._lock:
            if self._text is None:
                body = packed(self.view)
                body["points"] |= {"key": [], "plan": []}
                self._text = to_bytes({**body, "mark": self.mark})
            return self._text

    def resolve(self, ask: shapes.Resolve) -> dict[str, Any]:
        """Solve for budgets and wishes; formats become their numbers in the view."""
        budgets = ask.budgets or [limit.text for limit in self.view.budgets]
        answer = resolve(self.warm, budgets, Wish(ask.pins, ask.bars, ask.floors), patient=ask.patient)
        if not answer["found"]:
            return answer
        formats: list[str] = answer["formats"]
        place = {name: i for i, name in enumerate(self.view.points.formats)}
        if missing := [name for name in dict.fromkeys(formats) if name not in place]:
            raise InputError("E107", f"format '{missing[0]}' is in no plan of this study")
        choice = [place[name] for name in formats]
        changed = [] if ask.against is None else _changed(choice, ask.against)
        answer |= {"choice": choice, "changed": changed}
        if ask.whole:
            answer["plan"] = self._plan(answer, budgets).to_json()
        return answer

    def why(self, ask: shapes.Why) -> dict[str, Any]:
        """Why a layer has its bits in a plan (raises as `mpsearch.views.why.why`)."""
        found: dict[str, Any] = _finite(why(self.view, self._number(ask.plan), ask.layer).to_json())
        return found

    def compare(self, ask: shapes.Compare) -> dict[str, Any]:
        """How two plans differ."""
        first, second = (self._number(name) for name in (ask.a, ask.b))
        view = self.view
        if not len(view.points) or not len(view.layers):
            raise InputError("E143", f"study '{view.study}' has no plan yet", advice="let it run on: mpsearch resume")
        a, b = (view.plan(view.chosen if i is None else i) for i in (first, second))
        found: dict[str, Any] = _finite(difference(a, b, view).to_json())
        return found

    def _number(self, name: str) -> int | None:
        """Number of a plan that is named by it or by its key; None for no name.

        Raises:
            InputError: the view has no such plan (E101).
        """
        keys = self.view.points.keys
        if not name:
            return None
        if len(name) < 64 and int(name) < len(keys):
            return int(name)
        if name in keys:
            return keys.index(name)
        raise InputError("E101", f"study '{self.view.study}' has no plan '{name}'", advice="list its plans")

    def _plan(self, answer: dict[str, Any], budgets: list[str]) -> BitPlan:
        layers = self.view.layers
        formats = {layer.name: Format.parse(name) for layer, name in zip(layers, answer["formats"], strict=True)}
        made = Predicted(
            answer["loss"], answer["spread"], self.view.points.unit, answer["bound"], answer["gap"], answer["cost"]
        )
        source = {"budgets": list(map(str, budgets)), "solver": {"name": answer["solver"]}, "made by": "the page"}
        return BitPlan(layers, formats, self.view.model, made, source=source)


class Views:
    """Views of the studies of a store; each is made again when more of its study is stored."""

    def __init__(self, store: Any) -> None:
        """Set up; nothing is read yet."""
        self._store = store
        self._kept: OrderedDict[str, Shown] = OrderedDict()
        self._making: dict[str, threading.Lock] = {}
        self._lock = threading.Lock()

    def of(self, study: str) -> Shown:
        """The view of a study as it is stored now.

        Raises:
            StorageError: no such study (E141).
        """
        # Those who ask for a view that another is making wait for it.
        self._store.study(study)
        with self._lock:
            making = self._making.setdefault(study, threading.Lock())
        with making:
            mark = self._mark(study)
            with self._lock:
                found = self._kept.get(study)
                if found is not None and found.mark == mark:
                    self._kept.move_to_end(study)
                    return found
            stored = open_study(self._store, study)
            view = StudyView.of(stored)
            shown = Shown(mark, view, lambda: Warm.of_study(stored, view))
            with self._lock:
                self._kept[study] = shown
                while len(self._kept) > _KEPT:
                    self._kept.popitem(last=False)
            return shown

    def marked(self, study: str, mark: str) -> Shown:
        """The view that a page has drawn, or else the one of now.

        Raises:
            InputError: the study has changed since (E914).
        """
        with self._lock:
            found = self._kept.get(study)
        if found is not None and found.mark == mark:
            return found
        found = self.of(study)
        if mark and found.mark != mark:
            raise InputError("E914", f"study '{study}' has changed", advice="load the view again")
        return found

    def _mark(self, study: str) -> str:
        # What the view shows: of a study whose worker has gone, another state than the stored one.
        state, spec = self._store.control.status(study).state, self._store.study(study).spec
        links = [[kind, [(x.key, x.label) for x in self._store.links(study, kind)]] for kind in _KINDS]
        return hashlib.sha256(repr([state, spec, links]).encode()).hexdigest()[:16]


def _finite(values: Any) -> Any:
    """Plain values without numbers that JSON does not have."""
    if isinstance(values, dict):
        return {name: _finite(value) for name, value in values.items()}
    if isinstance(values, (list, tuple)):
        return [_finite(value) for value in values]
    return None if isinstance(values, float) and not math.isfinite(values) else values


def _changed(choice: list[int], against: list[int]) -> list[int]:
    if len(choice) != len(against):
        raise InputError("E907", f"against names {len(against)} formats, the model has {len(choice)} layers")
    return [i for i, (now, before) in enumerate(zip(choice, against, strict=True)) if now != before]


def viewing(views: Views, jobs: Jobs) -> APIRouter:
    """Make the routes of what is drawn."""
    router = new_router({**FOUND, 409: failure("the study has changed since the view of that mark")})

    async def view(ask: Annotated[shapes.OfStudy, InQuery()]) -> Response:
        """Everything that is drawn of a study but for the formats and keys of its plans."""
        shown = await asyncio.to_thread(views.of, ask.study)
        text = await asyncio.to_thread(lambda: shown.text)
        return Response(text, media_type="application/json")

    async def formats(ask: Annotated[shapes.Choices, InQuery()]) -> Response:
        """Numbers of the formats of each layer in plans of a view, a byte each, or two beyond 256 formats."""
        shown = await asyncio.to_thread(views.marked, ask.study, ask.mark)
        body = choices(shown.view, ask.first, ask.first + ask.count)
        return Response(body, media_type="application/octet-stream")

    async def keys(ask: Annotated[shapes.Choices, InQuery()]) -> Json:
        """Keys of plans of a view: of their files and of their formats."""
        shown = await asyncio.to_thread(views.marked, ask.study, ask.mark)
        part, points = slice(ask.first, ask.first + ask.count), shown.view.points
        return Json({"plan": list(points.plans[part]), "key": list(points.keys[part])})

    async def reasons(ask: Annotated[shapes.Why, InQuery()]) -> Json:
        """Why a layer has its bits in a plan: its formats, one step up and down, what binds, other estimators."""
        shown = await asyncio.to_thread(views.marked, ask.study, ask.mark)
        return Json(await asyncio.to_thread(shown.why, ask))

    async def compared(ask: Annotated[shapes.Compare, InQuery()]) -> Json:
        """How two plans differ: layers by effect, predicted and measured losses, bytes."""
        shown = await asyncio.to_thread(views.marked, ask.study, ask.mark)
        return Json(await asyncio.to_thread(shown.compare, ask))

    async def again(ask: shapes.Resolve) -> Json:
        """Solve for budgets, pins, bars and floors; nothing is stored."""
        shown = await asyncio.to_thread(views.marked, ask.study, ask.mark)
        return Json(await jobs.run(lambda: shown.resolve(ask)))

    drawn: dict[int | str, dict[str, Any]] = {200: {"model": dict[str, Any]}}
    binary: dict[int | str, dict[str, Any]] = {
        200: {"content": {"application/octet-stream": {"schema": {"type": "string", "format": "binary"}}}}
    }
    router.add_api_route("/view", view, methods=["GET"], responses=drawn, response_model=None)
    router.add_api_route(
        "/view/choices", formats, methods=["GET"], responses=binary, response_model=None, response_class=Response
    )
    router.add_api_route("/view/keys", keys, methods=["GET"], responses=drawn, response_model=None)
    router.add_api_route("/why", reasons, methods=["GET"], responses=drawn, response_model=None)
    router.add_api_route("/compare", compared, methods=["GET"], responses=drawn, response_model=None)
    router.add_api_route("/resolve", again, methods=["POST"], responses={**TAKES, **drawn}, response_model=None)
    return router
