"""Errors as answers: the fields of the error block, and a status by kind."""

from __future__ import annotations

import json
from typing import Any

from mpsearch.errors import (
    InfeasibleError,
    InputError,
    MpsearchError,
    ResourceError,
    StorageError,
    StudyNameError,
    UnsafeError,
    UsageError,
)

#: By code where the kind alone does not say it.
_BY_CODE = {
    "E101": 404, "E141": 404, "E140": 409, "E142": 409, "E143": 409, "E144": 409, "E521": 409, "E523": 409,
    "E901": 401, "E902": 403, "E903": 403, "E904": 421, "E905": 415, "E906": 413, "E908": 404, "E909": 429,
    "E914": 409,
}  # fmt: skip
_BY_KIND: tuple[tuple[type[MpsearchError], str, int], ...] = (
    (InfeasibleError, "infeasible", 409),
    (StudyNameError, "study", 404),
    (InputError, "input", 422),
    (StorageError, "storage", 503),
    (UnsafeError, "unsafe", 403),
    (ResourceError, "resource", 503),
    (UsageError, "usage", 422),
)


def status_of(error: MpsearchError) -> int:
    """Status of the answer to a request that failed so.

    >>> status_of(InputError("E111", "not a budget")), status_of(StorageError("E141", "no such study"))
    (422, 404)
    """
    if error.code in _BY_CODE:
        return _BY_CODE[error.code]
    return next((status for kind, _, status in _BY_KIND if isinstance(error, kind)), 500)


def body_of(error: MpsearchError) -> dict[str, Any]:
    """The error as plain values: ``code``, ``kind``, ``message``, ``where``, ``because`` and ``advice``."""
    kind = next((name for each, name, _ in _BY_KIND if isinstance(error, each)), "other")
    texts = {"message": error.message, "where": error.where, "because": error.because, "advice": error.advice}
    # A message may repeat what somebody sent; half a character has no UTF-8.
    clean = {name: text.encode("utf-8", "backslashreplace").decode() for name, text in texts.items()}
    return {"error": {"code": error.code, "kind": kind, **clean}}


def error_of(body: Any) -> MpsearchError:
    """The error that an answer holds; the other way round from `body_of`.

    Raises:
        ValueError: no such body.

    >>> error_of(body_of(InputError("E111", "no", advice="4 bits"))).advice
    '4 bits'
    """
    try:
        found = body["error"]
        kinds = {name: kind for kind, name, _ in _BY_KIND}
        texts = {name: str(found[name]) for name in ("where", "because", "advice")}
        return kinds.get(found["kind"], MpsearchError)(str(found["code"]), str(found["message"]), **texts)
    except (KeyError, TypeError) as error:
        raise ValueError("not an error of mpsearch") from error


def to_bytes(value: Any) -> bytes:
    """Write an answer: ASCII, so that no reader takes a mark in a name for anything but text."""
    return json.dumps(value, ensure_ascii=True, allow_nan=False, separators=(",", ":")).encode()
