"""Answers on their way out: the same headers on each, and nothing that a reader must not see."""

from __future__ import annotations

import asyncio
import json
import re
from collections.abc import Awaitable, Callable, Sequence
from typing import Any

from mpsearch.web.server.machines import Machines
from mpsearch.web.server.redact import redact
from mpsearch.web.server.refusals import to_bytes

HEADERS = (
    (b"content-security-policy",
     b"default-src 'none'; script-src 'self'; style-src 'self'; img-src 'self' data:; connect-src 'self'; "
     b"frame-ancestors 'none'; base-uri 'none'; form-action 'none'"),
    (b"x-content-type-options", b"nosniff"),
    (b"x-frame-options", b"DENY"),
    (b"referrer-policy", b"no-referrer"),
    (b"cross-origin-resource-policy", b"same-origin"),
    (b"cross-origin-opener-policy", b"same-origin"),
    (b"cache-control", b"no-store"),
)  # fmt: skip
#: Answers of more bytes are rewritten in a thread.
_SHORT = 100_000
_DATA = re.compile(r"^data: (.*)$", re.MULTILINE)


class Reply:
    """Sends one answer.

    Attributes:
        hide: machines that the reader must not see, with paths and addresses; None hides nothing.
        extra: further headers.
        closed: nothing more is sent, for the request took too long.
    """

    def __init__(self, send: Callable[[dict[str, Any]], Awaitable[None]]) -> None:
        self.hide: Machines | None = None
        self.extra: list[tuple[bytes, bytes]] = []
        self.closed = False
        self._send = send
        self._started = False
        self._kept: dict[str, Any] | None = None
        self._body = bytearray()

    async def __call__(self, message: dict[str, Any]) -> None:
        """Send one part of the answer."""
        if self.closed:
            return
        if message["type"] == "http.response.start":
            self._started = True
            message = {**message, "headers": [*message.get("headers", ()), *HEADERS, *self.extra]}
            if self.hide is not None and _type(message) == b"application/json":
                self._kept = message
                return
        elif message["type"] == "http.response.body" and self.hide is not None:
            if self._kept is not None:
                await self._collect(message)
                return
            message = {**message, "body": self._clean_events(message.get("body", b""))}
        await self._send(message)

    async def refuse(self, status: int, body: Any, *, late: bool = False) -> None:
        """Send an error, unless an answer is on its way already."""
        if (self.closed and not late) or (self._started and self._kept is None):
            return
        self.closed, self._kept = False, None
        data = to_bytes(body if self.hide is None else redact(body, self.hide.names))
        headers = [(b"content-type", b"application/json"), (b"content-length", str(len(data)).encode())]
        if status == 401:
            headers.append((b"www-authenticate", b"Bearer"))
        start = {"type": "http.response.start", "status": status, "headers": [*headers, *HEADERS, *self.extra]}
        self._started = True
        await self._send(start)
        await self._send({"type": "http.response.body", "body": data})
        self.closed = True

    async def _collect(self, message: dict[str, Any]) -> None:
        self._body += message.get("body", b"")
        if message.get("more_body"):
            return
        assert self._kept is not None
        assert self.hide is not None
        start, body = self._kept, bytes(self._body)
        names = await self.hide.fresh()
        body = await asyncio.to_thread(_clean, body, names) if len(body) > _SHORT else _clean(body, names)
        if self.closed:
            return
        self._kept = None
        rest = [(name, value) for name, value in start["headers"] if name.lower() != b"content-length"]
        await self._send({**start, "headers": [*rest, (b"content-length", str(len(body)).encode())]})
        await self._send({"type": "http.response.body", "body": body})

    def _clean_events(self, body: bytes) -> bytes:
        if not body.strip():
            return body
        names = self.hide.names if self.hide else ()
        return _DATA.sub(lambda found: f"data: {_clean(found[1].encode(), names).decode()}", body.decode()).encode()


def _clean(body: bytes, names: Sequence[str]) -> bytes:
    return to_bytes(redact(json.loads(body), names))


def _type(message: dict[str, Any]) -> bytes:
    found = [value for name, value in message["headers"] if name.lower() == b"content-type"]
    return bytes(found[0]).partition(b";")[0] if found else b""
