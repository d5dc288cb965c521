"""Answers on their way out: the same headers on each, and nothing that a reader must not see."""

from __future__ import annotations

import asyncio
import gzip
import hashlib
import json
import re
import threading
from collections import OrderedDict
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
#: Answers of fewer bytes are not worth compressing.
_SMALL = 1024
#: What is sent compressed to who takes it.
_TEXTS = (
    b"application/json", b"application/octet-stream", b"text/html", b"text/css", b"text/javascript",
)  # fmt: skip
#: Bytes of long answers that are kept compressed, for a page that is loaded again.
_KEPT = 32 * 2**20
_DATA = re.compile(r"^data: (.*)$", re.MULTILINE)


class Reply:
    """Sends one answer.

    Attributes:
        hide: machines that the reader must not see, with paths and addresses; None hides nothing.
        extra: further headers.
        zips: whether the client reads gzip.
        closed: nothing more is sent, for the request took too long.
    """

    def __init__(self, send: Callable[[dict[str, Any]], Awaitable[None]]) -> None:
        self.hide: Machines | None = None
        self.extra: list[tuple[bytes, bytes]] = []
        self.zips = False
        self.closed = False
        self._send = send
        self._started = False
        self._events = False
        self._kept: dict[str, Any] | None = None
        self._body = bytearray()

    async def __call__(self, message: dict[str, Any]) -> None:
        """Send one part of the answer."""
        if self.closed:
            return
        if message["type"] == "http.response.start":
            self._started = True
            self._events = _type(message) == b"text/event-stream"
            own = {name.lower() for name, _ in message.get("headers", ())}
            rest = [pair for pair in HEADERS if pair[0] not in own or pair[0] != b"cache-control"]
            message = {**message, "headers": [*message.get("headers", ()), *rest, *self.extra]}
            hides = self.hide is not None and _type(message) == b"application/json"
            if hides or (self.zips and _type(message) in _TEXTS):
                self._kept = message
                return
        elif message["type"] == "http.response.body" and self._kept is not None:
            await self._collect(message)
            return
        elif message["type"] == "http.response.body" and self.hide is not None and self._events:
            message = {**message, "body": self._clean_events(message.get("body", b""))}
        await self._send(message)

    async def refuse(self, status: int, body: Any, *, late: bool = False, page: str = "") -> None:
        """Send an error, unless an answer is on its way already; as a page, to a browser that asked for one."""
        if (self.closed and not late) or (self._started and self._kept is None):
            return
        self.closed, self._kept = False, None
        data = to_bytes(body if self.hide is None else redact(body, self.hide.names))
        if page:
            data = page.encode()
        kind = b"text/html; charset=utf-8" if page else b"application/json"
        headers = [(b"content-type", kind), (b"content-length", str(len(data)).encode())]
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
        start, body = self._kept, bytes(self._body)
        hides = self.hide is not None and _type(start) == b"application/json"
        names = await self.hide.fresh() if self.hide is not None and hides else None
        zips = self.zips and len(body) >= _SMALL
        long = len(body) > _SHORT
        body = await asyncio.to_thread(_made, body, names, zips) if long else _make(body, names, zips)
        if self.closed:
            return
        self._kept = None
        rest = [(name, value) for name, value in start["headers"] if name.lower() != b"content-length"]
        more = [(b"content-encoding", b"gzip"), (b"vary", b"accept-encoding")] if zips else []
        await self._send({**start, "headers": [*rest, *more, (b"content-length", str(len(body)).encode())]})
        await self._send({"type": "http.response.body", "body": body})

    def _clean_events(self, body: bytes) -> bytes:
        if not body.strip():
            return body
        names = self.hide.names if self.hide else ()
        return _DATA.sub(lambda found: f"data: {_clean(found[1].encode(), names).decode()}", body.decode()).encode()


_known: OrderedDict[bytes, bytes] = OrderedDict()
_knowing = threading.Lock()


def _make(body: bytes, names: Sequence[str] | None, zips: bool) -> bytes:
    """Take out what a reader must not see, and compress."""
    if names is not None:
        body = _clean(body, names)
    return gzip.compress(body, 6, mtime=0) if zips else body


def _made(body: bytes, names: Sequence[str] | None, zips: bool) -> bytes:
    """The same of a long answer, remembered by all that it is made from."""
    mark = hashlib.blake2b(body + repr((names, zips)).encode()).digest()
    with _knowing:
        if mark in _known:
            _known.move_to_end(mark)
            return _known[mark]
    found = _make(body, names, zips)
    with _knowing:
        _known[mark] = found
        while len(_known) > 1 and sum(map(len, _known.values())) > _KEPT:
            _known.popitem(last=False)
    return found


def _clean(body: bytes, names: Sequence[str]) -> bytes:
    return to_bytes(redact(json.loads(body), names))


def _type(message: dict[str, Any]) -> bytes:
    found = [value for name, value in message["headers"] if name.lower() == b"content-type"]
    return bytes(found[0]).partition(b";")[0] if found else b""
