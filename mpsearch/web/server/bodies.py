"""Bodies of requests: JSON of one reading only, up to a size."""

from __future__ import annotations

import asyncio
import json
import re
from collections.abc import Awaitable, Callable
from typing import Any

from mpsearch.errors import InputError

#: Bytes of a body.
MAX_BODY = 10 * 1024 * 1024
_JSON = re.compile(r"application/json(?:\s*;\s*charset=\"?utf-8\"?)?", re.IGNORECASE)
_HALF = re.compile(rb"\\u[dD][89a-fA-F]")
#: Longer bodies are read in a thread, so that others are answered meanwhile.
_SHORT = 10_000


async def read_body(scope: dict[str, Any], receive: Callable[[], Awaitable[dict[str, Any]]]) -> bytes:
    """Return the body of a request whose head the guard has seen.

    Raises:
        InputError: not JSON by its type (E905), too large (E906), or JSON that has two readings or none (E907).
    """
    kinds, lengths = scope["mpsearch_type"], scope["mpsearch_length"]
    if len(kinds) != 1 or not _JSON.fullmatch(kinds[0].strip()) or scope["mpsearch_coded"]:
        raise InputError("E905", "only JSON is read", advice="send Content-Type: application/json, not compressed")
    if any(length.isdigit() and int(length[:20]) > MAX_BODY for length in lengths):
        raise _too_large()
    body = bytearray()
    more = True
    while more:
        message = await receive()
        if message["type"] == "http.disconnect":
            raise InputError("E907", "the request was cut")
        body += message.get("body", b"")
        if len(body) > MAX_BODY:
            raise _too_large()
        more = message.get("more_body", False)
    found = bytes(body)
    if len(found) < _SHORT:
        check_json(found)
    else:
        await asyncio.to_thread(check_json, found)
    return found


def check_json(body: bytes) -> None:
    """Refuse what readers of JSON read in different ways.

    Raises:
        InputError: no JSON, a key given twice, NaN or infinity, half a character (E907).

    >>> check_json(b'{"a": [1.5]}')
    """
    try:
        found = json.loads(body.decode("utf-8"), parse_constant=_no_constant, object_pairs_hook=_no_twins)
        if _HALF.search(body):
            json.dumps(found, ensure_ascii=False).encode("utf-8")
    except (ValueError, RecursionError) as error:
        # What the reader says may repeat what was sent.
        said = str(error) if isinstance(error, _Refused) else "broken, too deep, or not UTF-8"
        raise InputError("E907", f"the body is no JSON that is read here: {said}") from None


class _Refused(ValueError):
    """JSON that is well formed, and refused."""


def _no_constant(name: str) -> None:
    raise _Refused("it holds a number that is not finite")


def _no_twins(pairs: list[tuple[str, Any]]) -> dict[str, Any]:
    found = dict(pairs)
    if len(found) != len(pairs):
        raise _Refused("a key is given twice")
    return found


def _too_large() -> InputError:
    return InputError("E906", f"the body is larger than {MAX_BODY // 2**20} MiB")
