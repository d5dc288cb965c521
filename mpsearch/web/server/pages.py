"""The page itself, and the files that it is drawn by: an exact list, read from the package."""

from __future__ import annotations

import hashlib
from functools import cache
from pathlib import Path
from typing import Annotated, Literal

from fastapi import APIRouter, Header
from fastapi import Path as InPath
from fastapi.responses import Response

from mpsearch import __version__
from mpsearch.errors import InputError
from mpsearch.web.markup import tag

#: Scripts in the order in which they need each other: first what draws, then the page around it.
SCRIPTS = (
    "base.js", "data.js", "axes.js", "front.js", "map.js", "card.js", "compare.js", "predicted.js", "breakdown.js",
    "sensitivity.js", "verdict.js", "state.js", "live.js", "studies.js", "slider.js", "pins.js", "matrix.js",
    "plans.js", "export.js", "solve.js", "plan.js", "frame.js",
    "view.js", "page.js",
)  # fmt: skip
STYLES = ("style.css", "page.css")
_TYPES = {"js": "text/javascript; charset=utf-8", "css": "text/css; charset=utf-8"}
_PLACE = Path(__file__).parents[1] / "assets"


@cache
def _asset(name: str) -> tuple[bytes, str]:
    if name not in (*SCRIPTS, *STYLES):
        raise InputError("E908", "there is nothing at this address", advice="GET /api/v1/openapi.json")
    body = (_PLACE / name).read_bytes()
    return body, f'"{hashlib.sha256(body).hexdigest()[:32]}"'


#: What stands in commands for the place of a database that the reader is not told.
HIDDEN = "DATABASE"


def page_html(rights: Literal["full", "read"] | None, place: str) -> str:
    """The page: scripts and an empty body that they fill.

    Args:
        rights: of who asks; the page offers no more than they allow.
        place: of the store, as the commands that it shows name it.

    >>> '<html lang="en" data-rights="full" data-place="/srv/results.db"' in page_html("full", "/srv/results.db")
    True
    """
    head = [
        tag("meta", charset="utf-8"),
        tag("meta", name="viewport", content="width=device-width, initial-scale=1"),
        tag("meta", name="color-scheme", content="light dark"),
        tag("title", "mpsearch"),
        # Without it browsers ask for one that is not there.
        tag("link", rel="icon", href="data:,"),
        *(tag("link", rel="stylesheet", href=f"/assets/{name}") for name in STYLES),
        *(tag("script", src=f"/assets/{name}", defer=True) for name in SCRIPTS),
    ]
    body = [
        tag("div", tag("p", "Loading …"), id="app"),
        tag("noscript", tag("p", "This page is drawn by scripts of its own. Without them: mpsearch show NAME.")),
    ]
    page = tag(
        "html", tag("head", *head), tag("body", *body),
        lang="en", data_rights=rights or "", data_place=place, data_version=__version__,
    )  # fmt: skip
    return f"<!doctype html>\n{page}\n"


def door_html() -> str:
    """What a browser without a token is shown: no script, no style, and nothing of what is served.

    >>> "mpsearch serve" in door_html()
    True
    """
    told = (
        "This page opens with a link that carries a token. It was missing, wrong, used already or of an earlier start."
    )
    body = [
        tag("h1", "mpsearch"),
        tag("p", told),
        tag("p", "Whoever started the server finds the link where it runs: ", tag("code", "mpsearch serve"), " and ",
            tag("code", "mpsearch view"), " print one each time they start. The first link of ",
            tag("code", "mpsearch serve"), " is good once; start it again for a new one."),
    ]  # fmt: skip
    head = [tag("meta", charset="utf-8"), tag("meta", name="viewport", content="width=device-width, initial-scale=1"),
            tag("meta", name="color-scheme", content="light dark"), tag("title", "mpsearch"),
            tag("link", rel="icon", href="data:,")]  # fmt: skip
    page = tag("html", tag("head", *head), tag("body", tag("main", *body)), lang="en")
    return f"<!doctype html>\n{page}\n"


def serving_assets() -> APIRouter:
    """Make the route of the files of the page."""
    router = APIRouter()

    async def asset(
        name: Annotated[str, InPath(max_length=60)], if_none_match: Annotated[str, Header(max_length=200)] = ""
    ) -> Response:
        """One file of the page."""
        body, mark = _asset(name)
        headers = {"etag": mark, "cache-control": "private, no-cache"}
        if mark in if_none_match:
            return Response(status_code=304, headers=headers)
        return Response(body, media_type=_TYPES[name.rpartition(".")[2]], headers=headers)

    router.add_api_route(
        "/assets/{name}", asset, methods=["GET"], include_in_schema=False, response_model=None,
        response_class=Response,
    )  # fmt: skip
    return router
