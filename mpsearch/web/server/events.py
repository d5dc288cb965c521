"""Progress of a study as server-sent events: what it is doing, and each new line of its log."""

from __future__ import annotations

import asyncio
import time
from collections.abc import AsyncIterator
from typing import Annotated, Any

from fastapi import APIRouter, Header
from fastapi import Query as InQuery
from fastapi.responses import StreamingResponse

from mpsearch.errors import InputError, MpsearchError, ResourceError
from mpsearch.web.server.answers import FOUND, failure, new_router
from mpsearch.web.server.machines import Machines
from mpsearch.web.server.plainly import failed, plain
from mpsearch.web.server.reading import status
from mpsearch.web.server.refusals import to_bytes
from mpsearch.web.server.shapes import OfStudy

MOST_STREAMS = 50
#: Nothing happens to a study in such a state, unless somebody submits it again.
OVER = ("complete", "gaps", "failed", "cancelled")
_LINES = 1000
#: Seconds that a study which is over is looked at for.
_LAST = 0.1


class Streams:
    """Open streams, at most so many.

    Attributes:
        seconds: between two looks at the database.
        alive: seconds between signs of life.
    """

    def __init__(self, store: Any, *, seconds: float = 0.5, alive: float = 15.0) -> None:
        self.seconds = seconds
        self.alive = alive
        self.open = 0
        self._store = store

    def _look(self, study: str, after: int) -> tuple[dict[str, Any], list[dict[str, Any]]]:
        # The state is read first: lines that came before its last change are then there.
        now = status(self._store, study)
        return now, [plain(line) for line in self._store.control.lines(study, after=after, limit=_LINES)]

    async def events(self, study: str, after: int) -> AsyncIterator[bytes]:
        """Yield events until the study is over; ``log`` events have the number of their line as id."""
        before: dict[str, Any] | None = None
        quiet = time.monotonic()
        while True:
            try:
                now, lines = await asyncio.to_thread(self._look, study, after)
            except MpsearchError as error:
                yield _event("error", failed(error))
                return
            if now != before:
                yield _event("status", now)
            for line in lines:
                after = line["id"]
                yield _event("log", line, after)
            same = now == before and not lines
            if not same:
                before, quiet = now, time.monotonic()
            elif time.monotonic() - quiet > self.alive:
                quiet = time.monotonic()
                yield b": alive\n\n"
            if len(lines) == _LINES:
                continue
            over = now["state"] in OVER
            if over and same:
                yield _event("end", {"state": now["state"]})
                return
            # Its last lines may come a little after its last state.
            await asyncio.sleep(min(self.seconds, _LAST) if over else self.seconds)


class _Stream(StreamingResponse):
    """A stream that gives its place back, however it ends; one that never began has no generator to do so."""

    def __init__(self, streams: Streams, study: str, after: int) -> None:
        super().__init__(streams.events(study, after), media_type="text/event-stream")
        self._streams = streams

    async def __call__(self, scope: Any, receive: Any, send: Any) -> None:
        try:
            await super().__call__(scope, receive, send)
        finally:
            self._streams.open -= 1


def _event(kind: str, data: Any, number: int | None = None) -> bytes:
    # JSON of ours has no line break, so nobody's text ends an event.
    head = f"id: {number}\n" if number is not None else ""
    return f"{head}event: {kind}\ndata: {to_bytes(data).decode()}\n\n".encode()


def events(store: Any, streams: Streams, machines: Machines) -> APIRouter:
    """Make the route that streams."""
    router = new_router({**FOUND, 429: failure("too many streams")})

    async def stream(
        ask: Annotated[OfStudy, InQuery()], last_event_id: Annotated[str, Header(max_length=20)] = ""
    ) -> StreamingResponse:
        """Follow a study: ``status``, ``log`` and ``end`` events; goes on after ``Last-Event-ID``."""
        if last_event_id and not (last_event_id.isascii() and last_event_id.isdigit() and len(last_event_id) < 17):
            raise InputError("E907", "Last-Event-ID is not a number of a line")
        await asyncio.to_thread(store.study, ask.study)
        await machines.fresh()
        if streams.open >= MOST_STREAMS:
            raise ResourceError(
                "E909", f"{MOST_STREAMS} streams are open already", advice="close one, or ask for /study"
            )
        streams.open += 1
        return _Stream(streams, ask.study, int(last_event_id or 0))

    fields = {"event": {"type": "string"}, "data": {"type": "string"}, "id": {"type": "string"}}
    each = {"type": "object", "properties": fields, "required": ["event", "data"]}
    answers: dict[int | str, dict[str, Any]] = {200: {"content": {"text/event-stream": {"schema": each}}}}
    router.add_api_route(
        "/events", stream, methods=["GET"], responses=answers, response_class=StreamingResponse, response_model=None
    )
    return router
