"""JSON answers, and what every route may answer instead."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

from fastapi import APIRouter, Depends
from fastapi.responses import JSONResponse
from fastapi.security import HTTPBearer

from mpsearch.web.server.refusals import to_bytes
from mpsearch.web.server.shapes import Failure

#: Where the first version of the interface stands.
API = "/api/v1"


class Json(JSONResponse):
    """Plain values as JSON."""

    def render(self, content: Any) -> bytes:
        """Write the values."""
        return to_bytes(content)


def failure(text: str) -> dict[str, Any]:
    """An answer that is an error, for the OpenAPI document."""
    return {"model": Failure, "description": text}


#: Of every route but the one that says that the server answers.
ALWAYS: dict[int | str, dict[str, Any]] = {
    401: failure("the token is missing or wrong"),
    403: failure("not with this token, or not from this page"),
    413: failure("the body or the head of the request is too large"),
    421: failure("this Host is not served"),
    422: failure("a value that makes no sense"),
    500: failure("an error of the server"),
    503: failure("the database does not answer"),
    504: failure("no answer in time"),
}
#: Of routes that name a study or a plan.
FOUND: dict[int | str, dict[str, Any]] = {404: failure("no such study or plan")}
#: Of routes that take a body.
TAKES: dict[int | str, dict[str, Any]] = {
    **FOUND,
    409: failure("the study is not in a state for this, or no plan keeps the budgets"),
    415: failure("the body is not application/json"),
    429: failure("too many at once"),
}


def new_router(answers: Mapping[int | str, dict[str, Any]]) -> APIRouter:
    """Make an empty table of routes, with what each may answer beside its own."""
    return APIRouter(
        prefix=API,
        dependencies=[Depends(HTTPBearer(auto_error=False))],
        responses={**ALWAYS, **answers},
        default_response_class=Json,
    )


def page(items: Sequence[Any], total: int, offset: int) -> dict[str, Any]:
    """Rows of a list as an answer.

    >>> page(["a"], 3, 1)["next"]
    2
    """
    end = offset + len(items)
    return {"items": list(items), "total": total, "offset": offset, "next": end if items and end < total else None}
