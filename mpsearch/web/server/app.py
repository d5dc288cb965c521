"""The application: routes behind the guard."""

from __future__ import annotations

import re
from collections.abc import Collection, Mapping, Sequence
from typing import Any

from fastapi import FastAPI, Request
from fastapi.exceptions import RequestValidationError
from fastapi.responses import HTMLResponse, RedirectResponse, Response

from mpsearch import __version__
from mpsearch.errors import InputError, MpsearchError, UnsafeError
from mpsearch.web.server import shapes
from mpsearch.web.server.acting import Jobs, acting
from mpsearch.web.server.answers import API, Json
from mpsearch.web.server.events import Streams, events
from mpsearch.web.server.guard import HEALTH, Guard
from mpsearch.web.server.machines import Machines
from mpsearch.web.server.pages import HIDDEN, door_html, page_html, serving_assets
from mpsearch.web.server.plainly import failed
from mpsearch.web.server.reading import reading
from mpsearch.web.server.refusals import status_of
from mpsearch.web.server.submitting import Registered
from mpsearch.web.server.tokens import COOKIE_SECONDS, Tokens
from mpsearch.web.server.views import Views, viewing


def hosts_of(port: int, names: Sequence[str] = ()) -> list[str]:
    """Values of ``Host`` that are served on a port.

    >>> hosts_of(80)
    ['127.0.0.1:80', 'localhost:80', '[::1]:80', '127.0.0.1', 'localhost', '[::1]']
    """
    known = [f"[{name}]" if ":" in name else name for name in dict.fromkeys(["127.0.0.1", "localhost", "::1", *names])]
    return [f"{name.lower()}:{port}" for name in known] + ([name.lower() for name in known] if port == 80 else [])


def make_app(
    store: Any,
    tokens: Tokens,
    port: int,
    *,
    names: Sequence[str] = (),
    known: Registered | None = None,
    seconds: float = 30.0,
    streams: Streams | None = None,
    jobs: Jobs | None = None,
    views: Views | None = None,
    place: str = "",
    told: bool = False,
) -> Guard:
    """Make the application of a store.

    Args:
        store: an open store.
        tokens: who may what.
        port: that it is served on; part of the names that are served.
        names: names beside the loopback ones that it is served under.
        known: models and texts that requests may name.
        seconds: that a request may take.
        streams: of events.
        jobs: how many solvers run at once.
        views: of the studies, kept ready.
        place: of the store, as commands name it; without its password.
        told: whether readers are the owner alone, who may see the place as well.
    """
    machines, jobs = Machines(store), jobs or Jobs()
    app = FastAPI(
        title="mpsearch", version=__version__, docs_url=None, redoc_url=None, openapi_url=f"{API}/openapi.json",
        redirect_slashes=False,
    )  # fmt: skip
    for router in (
        reading(store),
        acting(store, known or Registered(), jobs),
        viewing(views or Views(store), jobs),
        events(store, streams or Streams(store), machines),
    ):
        # Added one by one: the table of routes is what the guard and its tests go by.
        app.router.routes.extend(router.routes)
    cookie = f"mpsearch_{port}"
    _doors(app, tokens, cookie, {"full": place, "read": place if told else HIDDEN})
    app.router.routes.extend(serving_assets().routes)
    app.add_exception_handler(MpsearchError, _refused)
    app.add_exception_handler(RequestValidationError, _wrong_fields)
    return Guard(app, tokens, hosts_of(port, names), cookie, _methods(app), machines, seconds)


def _doors(app: FastAPI, tokens: Tokens, cookie: str, places: Mapping[str, str]) -> None:
    @app.get(HEALTH, responses={200: {"model": shapes.Health}}, response_model=None)
    async def health() -> Json:
        """Whether the server answers; needs no token."""
        return Json({"status": "ok"})

    @app.get("/", include_in_schema=False)
    async def root(request: Request) -> Response:
        code = request.query_params.get("token")
        if code is None:
            rights = request.scope["mpsearch_rights"]
            return HTMLResponse(page_html(rights, places[rights]))
        session = tokens.exchange(code) if len(request.query_params) == 1 else None
        if session is None and "text/html" in request.headers.get("accept", ""):
            return HTMLResponse(door_html(), status_code=401)
        if session is None:
            raise UnsafeError(
                "E901",
                "this link is wrong, was used already, or is of an earlier start",
                advice="start the server again for a new one",
            )
        # The link leaves the address bar with the same answer that sets the cookie.
        answer = RedirectResponse("/", status_code=303)
        answer.set_cookie(cookie, session, max_age=int(COOKIE_SECONDS), httponly=True, samesite="strict", path="/")
        return answer


def _methods(app: FastAPI) -> Any:
    table = [(re.compile(re.sub(r"{\w+}", "[^/]+", path)), methods) for path, methods in route_table(app)]

    def methods(path: str) -> Collection[str]:
        return {method for pattern, found in table if pattern.fullmatch(path) for method in found}

    return methods


def route_table(app: FastAPI) -> list[tuple[str, frozenset[str]]]:
    """Every route as (path, methods)."""
    routes: list[Any] = list(app.routes)
    return [(route.path, frozenset(route.methods) - {"HEAD"}) for route in routes]


async def _refused(request: Request, error: Exception) -> Response:
    assert isinstance(error, MpsearchError)
    return Json(failed(error), status_code=status_of(error))


async def _wrong_fields(request: Request, error: Exception) -> Response:
    assert isinstance(error, RequestValidationError)
    # What was sent is not repeated: it may be no text, and no number.
    wrong = [
        f"{'.'.join(str(part)[:40] for part in each['loc'][1:])}: {str(each['msg'])[:100]}"
        for each in error.errors()[:5]
    ]
    where = str(error.errors()[0]["loc"][0]) if error.errors() else ""
    refused = InputError("E907", "the request has fields that make no sense", where=where, because="; ".join(wrong))
    return Json(failed(refused), status_code=422)
