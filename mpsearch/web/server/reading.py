"""Routes that only read."""

from __future__ import annotations

from dataclasses import asdict
from typing import Annotated, Any

from fastapi import APIRouter, Path
from fastapi import Query as InQuery

from mpsearch.errors import InputError, MpsearchError
from mpsearch.ports import Store
from mpsearch.records import LinkRow
from mpsearch.spec import StudySpec
from mpsearch.stored_study import StoredStudy
from mpsearch.web.server import shapes
from mpsearch.web.server.answers import FOUND, Json, new_router, page
from mpsearch.web.server.plainly import plain

#: Whole plans of one answer: each may have thousands of layers.
_WHOLE = 50
InPage = Annotated[shapes.PagedStudy, InQuery()]
InStudy = Annotated[shapes.OfStudy, InQuery()]


def open_study(store: Any, name: str) -> StoredStudy:
    """Open a stored study by name.

    Raises:
        StorageError: no such study (E141).
    """
    return StoredStudy(StudySpec.from_question(store.study(name).spec, StudySpec.storage), store)


def status(store: Any, name: str) -> dict[str, Any]:
    """What a study is doing, as plain values."""
    return plain(store.control.status(name))


def read_plan(store: Store, key: str) -> dict[str, Any]:
    """Return a stored plan.

    Raises:
        InputError: no such plan (E101).
    """
    body = store.get("plan", key)
    if body is None:
        raise InputError("E101", f"no plan '{key}' is stored", advice="list the plans of a study, or solve for one")
    return body


def _only(store: Store, study: str, kind: str) -> dict[str, Any]:
    links = store.links(study, kind)
    body = store.get(kind, links[-1].key) if links else None
    if body is None:
        raise InputError("E143", f"study '{study}' has no {kind} yet", advice=f"mpsearch resume '{study}'")
    return body


def _linked(store: Store, study: str, kind: str) -> list[dict[str, Any]]:
    links = store.links(study, kind)
    bodies = store.get_many(kind, [link.key for link in links])
    return [{"label": link.label, "key": link.key, **bodies[link.key]} for link in links if link.key in bodies]


def _plan_row(link: LinkRow, body: dict[str, Any], whole: bool) -> dict[str, Any]:
    row = {"label": link.label, "key": link.key, "predicted": body["predicted"], "source": body["source"]}
    return {**row, "plan": body} if whole else row


def _notices(store: Store, study: str) -> list[dict[str, str]]:
    try:
        found = _only(store, study, "survey").get("notices", ())
    except MpsearchError:
        return []
    return [{"code": str(code), "message": str(message)} for code, message in found]


class Reading:
    """Answers to what is asked of a store.

    Attributes:
        store: an open store.
    """

    def __init__(self, store: Any) -> None:
        self.store = store

    def studies(self, ask: Annotated[shapes.Paged, InQuery()]) -> Json:
        """List the studies, newest first."""
        rows = self.store.studies()
        statuses = {item.name: item for item in self.store.control.statuses()}
        part = rows[ask.offset : ask.offset + ask.limit]
        items = [
            {"name": row.name, "state": row.state, "created": row.created, "updated": row.updated}
            | ({"state": statuses[row.name].state} if row.name in statuses else {})
            for row in part
        ]
        return Json(page(items, len(rows), ask.offset))

    def study(self, ask: InStudy) -> Json:
        """One study: its question, what it is doing, and what to know of it."""
        row, now = self.store.study(ask.study), status(self.store, ask.study)
        found = {"name": row.name, "state": now["state"], "created": row.created, "updated": row.updated}
        return Json({**found, "spec": dict(row.spec), "status": now, "notices": _notices(self.store, ask.study)})

    def layers(self, ask: InStudy) -> Json:
        """What can be decided in the model, and what is left out."""
        return Json(open_study(self.store, ask.study).survey.to_json())

    def scores(self, ask: Annotated[shapes.Scores, InQuery()]) -> Json:
        """Predicted losses and standard errors, one row per decision, one column per format."""
        table = _only(self.store, ask.study, "scores")
        if ask.whole:
            return Json(table)
        part = slice(ask.offset, ask.offset + ask.limit)
        names = ("layers", "value", "spread", "status")
        rows = zip(*(table[name][part] for name in names), strict=True)
        items = [{"layer": a, "value": b, "spread": c, "status": d} for a, b, c, d in rows]
        found = page(items, len(table["layers"]), ask.offset)
        return Json({**found, "formats": table["formats"], "unit": table["unit"], "samples": table["samples"]})

    def costs(self, ask: InStudy) -> Json:
        """What each format costs: one table per resource, weights first."""
        items = _linked(self.store, ask.study, "cost")
        return Json(page(items, len(items), 0))

    def plans(self, ask: Annotated[shapes.Plans, InQuery()]) -> Json:
        """List the plans of a study, the one for its own budgets first."""
        links = self.store.links(ask.study, "plan")
        part = links[ask.offset : ask.offset + min(ask.limit, _WHOLE if ask.whole else ask.limit)]
        bodies = self.store.get_many("plan", [link.key for link in part])
        items = [_plan_row(link, bodies[link.key], ask.whole) for link in part if link.key in bodies]
        found = page(items, len(links), ask.offset)
        end = ask.offset + len(part)
        return Json({**found, "next": end if part and end < len(links) else None})

    def plan(self, key: Annotated[shapes.Key, Path()]) -> Json:
        """One plan by its key."""
        return Json(read_plan(self.store, key))

    def front(self, ask: InStudy) -> Json:
        """List the measured plans that no other beats in both bytes and loss, cheapest first."""
        items = [point.to_json() for point in open_study(self.store, ask.study).front]
        return Json(page(items, len(items), 0))

    def measurements(self, ask: InPage) -> Json:
        """List all measured plans of a study."""
        found = open_study(self.store, ask.study).measurements
        part = [item.to_json() for item in found[ask.offset : ask.offset + ask.limit]]
        return Json(page(part, len(found), ask.offset))

    def conflicts(self, ask: Annotated[shapes.Paged, InQuery()]) -> Json:
        """List second, different values that were refused, oldest first."""
        found = self.store.conflicts()
        part = [asdict(item) for item in found[ask.offset : ask.offset + ask.limit]]
        return Json(page(part, len(found), ask.offset))

    def log(self, ask: Annotated[shapes.Lines, InQuery()]) -> Json:
        """Lines of a study's log after the number of one."""
        self.store.study(ask.study)
        items = [plain(line) for line in self.store.control.lines(ask.study, after=ask.after, limit=ask.limit)]
        return Json({"items": items, "after": items[-1]["id"] if items else ask.after})


def reading(store: Any) -> APIRouter:
    """Make the routes that read a store."""
    router, reads = new_router(FOUND), Reading(store)
    for path, route, shape in (
        ("/studies", reads.studies, shapes.Rows),
        ("/study", reads.study, shapes.StudyAnswer),
        ("/layers", reads.layers, None),
        ("/scores", reads.scores, None),
        ("/costs", reads.costs, shapes.Rows),
        ("/plans", reads.plans, shapes.Rows),
        ("/plans/{key}", reads.plan, None),
        ("/front", reads.front, shapes.Rows),
        ("/measurements", reads.measurements, shapes.Rows),
        ("/conflicts", reads.conflicts, shapes.Rows),
        ("/log", reads.log, None),
    ):
        router.add_api_route(
            path, route, methods=["GET"], responses={200: {"model": shape or dict[str, Any]}}, response_model=None
        )
    return router
