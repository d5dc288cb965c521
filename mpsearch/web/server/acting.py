"""Routes that compute or change something. Each takes the full token and a body."""

from __future__ import annotations

import asyncio
import io
import math
import os
import tempfile
import zipfile
from functools import cache, partial
from pathlib import Path as Folder
from typing import Annotated, Any

import anyio
import anyio.to_thread
from fastapi import APIRouter, Path
from fastapi.responses import Response

from mpsearch import registry
from mpsearch.errors import InputError, ResourceError, did_you_mean
from mpsearch.plan import BitPlan
from mpsearch.submitting import ask as ask_for
from mpsearch.web.server import shapes
from mpsearch.web.server.answers import TAKES, Json, new_router
from mpsearch.web.server.reading import open_study, read_plan, status
from mpsearch.web.server.submitting import Registered, resume, spec_of, submit

#: Seconds that a request waits for a processor.
_PATIENCE = 10.0
#: Exporters that read or write weights, and load torch to do so.
_HEAVY = ("native", "compressed-tensors", "gguf", "onnxruntime")


class Jobs:
    """Work for processors: as many at once as there are cores."""

    def __init__(self, most: int | None = None) -> None:
        self._limit = anyio.CapacityLimiter(most or os.cpu_count() or 1)

    async def run(self, work: Any) -> Any:
        """Do work in a thread, when a processor is free.

        Raises:
            ResourceError: none became free in time (E909).
        """
        # The place is kept until the thread has ended, even if nobody waits for it any more.
        try:
            await asyncio.wait_for(self._limit.acquire_on_behalf_of(work), _PATIENCE)
        except TimeoutError as error:
            cores = int(self._limit.total_tokens)
            advice = "ask again in a few seconds"
            raise ResourceError("E909", f"{cores} solvers are at work already, one per core", advice=advice) from error
        try:
            return await anyio.to_thread.run_sync(work, limiter=anyio.CapacityLimiter(1))
        finally:
            self._limit.release_on_behalf_of(work)


def solve_stored(store: Any, ask: shapes.Solve) -> dict[str, Any]:
    """Solve on stored scores, and keep the plan."""
    most = math.inf if ask.most_loss is None else ask.most_loss
    plan = open_study(store, ask.study).plan(*ask.budgets, goal=ask.goal, most_loss=most)
    body = plan.to_json()
    store.put("plan", plan.key, body)
    made = plan.predicted
    return {
        "key": plan.key, "plan": body, "loss": made.loss, "bound": made.bound, "gap": made.gap, "bits": plan.bits,
        "bytes": plan.stored_bytes, "prices": list(plan.source.get("prices", ())),
    }  # fmt: skip


@cache
def exporters() -> tuple[str, ...]:
    """Names of the exporters that need nothing but a plan."""
    names = [name for name in registry.names("exporters") if name not in _HEAVY]
    return tuple(name for name in names if not getattr(registry.load("exporters", name), "reads", ""))


def export_stored(store: Any, key: str, ask: shapes.Export) -> dict[str, Any]:
    """Write a stored plan for another tool; what is written comes back as texts.

    Raises:
        InputError: no such plan (E101) or exporter (E107), or a plan that it cannot hold (E301).
    """
    known = exporters()
    if ask.to not in known:
        raise InputError(
            "E107",
            f"exporters: no '{ask.to}' here{did_you_mean(ask.to, known)}",
            because="here are those that need nothing but the plan; others read or write weights",
            advice=f"there is {', '.join(known)}; for others: mpsearch export",
        )
    plan = BitPlan.from_json(read_plan(store, key))
    given = {name: text for name, text in (("version", ask.version), ("assume", ask.assume)) if text}
    exporter = registry.make("exporters", ask.to, **given)
    with tempfile.TemporaryDirectory(prefix="mpsearch-export-") as place:
        folder = Folder(place) / "out"
        paths = exporter.write(plan, folder)
        files = {str(Folder(path).relative_to(folder)): Folder(path).read_text("utf-8") for path in paths}
    notes = list(exporter.notes(plan)) if hasattr(exporter, "notes") else []
    return {"files": files, "notes": notes}


def archive(files: dict[str, str]) -> bytes:
    """Pack texts; the same texts give the same bytes."""
    packed = io.BytesIO()
    with zipfile.ZipFile(packed, "w", zipfile.ZIP_DEFLATED) as members:
        for name in sorted(files):
            members.writestr(zipfile.ZipInfo(name, (1980, 1, 1, 0, 0, 0)), files[name], zipfile.ZIP_DEFLATED)
    return packed.getvalue()


def acting(store: Any, known: Registered, jobs: Jobs) -> APIRouter:
    """Make the routes that solve, export, submit and steer."""
    router = new_router(TAKES)

    async def solve(ask: shapes.Solve) -> Json:
        """Solve on stored scores for other budgets; the model is not loaded."""
        return Json(await jobs.run(partial(solve_stored, store, ask)))

    async def export(ask: shapes.Export, key: Annotated[shapes.Key, Path()]) -> Response:
        """Write a stored plan in the language of another tool."""
        found = await jobs.run(partial(export_stored, store, key, ask))
        if not ask.archive:
            return Json(found)
        # A name of our own: nothing of the plan's stands in it.
        headers = {"content-disposition": f'attachment; filename="export-{key[:12]}.zip"'}
        return Response(archive(found["files"]), media_type="application/zip", headers=headers)

    def submit_study(ask: shapes.Submit) -> Json:
        """Submit a study of a registered model; a worker takes it on."""
        spec = spec_of(ask.model_dump(), known)
        submit(store, spec)
        return Json(status(store, spec.name))

    def steer(wanted: str) -> Any:
        def route(ask: shapes.Which) -> Json:
            store.study(ask.study)
            if wanted == "run":
                resume(store, ask.study)
            else:
                ask_for(store, ask.study, wanted)
            return Json(status(store, ask.study))

        return route

    def names() -> Json:
        """Models, texts and exporters that requests may name."""
        texts = ["stdlib:calibration", "stdlib:validation", *known.data]
        return Json({"models": list(known.models), "data": texts, "exporters": list(exporters())})

    router.add_api_route("/names", names, methods=["GET"], response_model=None)
    solved: dict[int | str, dict[str, Any]] = {200: {"model": shapes.Solved}}
    router.add_api_route("/solve", solve, methods=["POST"], responses=solved, response_model=None)
    files: dict[int | str, dict[str, Any]] = {200: {"model": shapes.Files, "content": {"application/zip": {}}}}
    router.add_api_route("/plans/{key}/export", export, methods=["POST"], responses=files, response_model=None)
    stands: dict[int | str, dict[str, Any]] = {200: {"model": dict[str, Any]}}
    router.add_api_route("/studies", submit_study, methods=["POST"], responses=stands, response_model=None)
    for verb, wanted in (("pause", "pause"), ("resume", "run"), ("cancel", "cancel")):
        router.add_api_route(
            f"/study/{verb}", steer(wanted), methods=["POST"], name=verb, operation_id=verb, responses=stands,
            response_model=None, summary=f"{verb.capitalize()} a study",
        )  # fmt: skip
    return router
