"""The door of the server: every request passes it before any route sees it, so no route can forget a check."""

from __future__ import annotations

import asyncio
import logging
import re
from collections.abc import Awaitable, Callable, Collection
from dataclasses import dataclass, field
from typing import Any
from urllib.parse import parse_qsl

from mpsearch.errors import InputError, MpsearchError, ResourceError, UnsafeError
from mpsearch.web.server.bodies import read_body
from mpsearch.web.server.machines import Machines
from mpsearch.web.server.pages import door_html
from mpsearch.web.server.plainly import failed
from mpsearch.web.server.refusals import status_of
from mpsearch.web.server.replies import Reply
from mpsearch.web.server.tokens import Rights, Tokens

Scope = dict[str, Any]
Message = dict[str, Any]
Receive = Callable[[], Awaitable[Message]]
Send = Callable[[Message], Awaitable[None]]

HEALTH = "/health"
EVENTS = "/api/v1/events"
#: Posts that store and steer nothing, for their bodies are too long for an address: a token for reading allows them.
ASKING = ("/api/v1/resolve",)
#: Bytes of the head of a request.
MAX_HEAD = 32 * 1024
#: No address of ours needs more; what is spelled in any other way leads nowhere.
_PATH = re.compile(rb"/|(?:/[A-Za-z0-9_-]+(?:\.[a-z]+)?)+")
_log = logging.getLogger("mpsearch.serve")


@dataclass
class Guard:
    """Checks name, token, origin, type and size of a request, and ends it in time.

    Attributes:
        app: what answers.
        tokens: who may what.
        hosts: exact values of ``Host`` that are served, in small letters.
        cookie: name of the cookie.
        methods: path -> methods that it takes; none for no such path.
        machines: names that a reader must not see.
        seconds: that a request may take, streams of events excepted.
    """

    app: Any
    tokens: Tokens
    hosts: Collection[str]
    cookie: str
    methods: Callable[[str], Collection[str]]
    machines: Machines
    seconds: float = 30.0
    _left: set[asyncio.Task[None]] = field(default_factory=set)

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        """Answer one request."""
        if scope["type"] != "http":
            if scope["type"] == "lifespan":
                await self.app(scope, receive, send)
            return
        reply = Reply(send)
        reply.zips = any(
            name.lower() == b"accept-encoding" and re.search(rb"(?<![a-z])gzip(?!\s*;\s*q=0(?:\.0*)?(?![.\d]))", value)
            for name, value in scope["headers"]
        )
        try:
            rights = self._check(scope)
            reply.hide = self.machines if rights == "read" else None
            scope["mpsearch_rights"], scope["mpsearch_tokens"] = rights, self.tokens
            path = scope["raw_path"].decode()
            allowed = self.methods(path)
            if not allowed:
                raise InputError("E908", "there is nothing at this address", advice="GET /api/v1/openapi.json")
            if scope["method"] not in allowed:
                reply.extra.append((b"allow", ", ".join(sorted(allowed)).encode()))
                raise _WrongMethod("E908", f"this address takes {' and '.join(sorted(allowed))} only")
            if path == EVENTS:
                await self.app(scope, receive, reply)
                return
            await self._in_time(scope, receive, reply)
        except MpsearchError as error:
            status = 405 if isinstance(error, _WrongMethod) else status_of(error)
            await reply.refuse(status, failed(error), page=door_html() if status == 401 and _opens(scope) else "")
        except Exception as error:  # Nothing that a client sends may show how the inside looks.
            _log.error("a request ended with %s", type(error).__name__, exc_info=_log.isEnabledFor(logging.DEBUG))
            unexpected = MpsearchError("E900", "the server met an error that it did not expect", advice="see its log")
            await reply.refuse(500, failed(unexpected))

    def _check(self, scope: Scope) -> Rights | None:
        """Refuse what no route may see, cheapest first; says what the token allows."""
        if sum(len(name) + len(value) for name, value in scope["headers"]) + len(scope["query_string"]) > MAX_HEAD:
            raise InputError("E906", f"the head of the request is larger than {MAX_HEAD // 1024} KiB")
        headers: dict[bytes, list[str]] = {}
        for name, value in scope["headers"]:
            headers.setdefault(bytes(name).lower(), []).append(bytes(value).decode("latin-1"))
        names = headers.get(b"host", [])
        if len(names) != 1 or names[0].lower() not in self.hosts:
            raise UnsafeError(
                "E904", "this Host is not served here", advice="use the address that was printed at start"
            )
        raw = bytes(scope["raw_path"])
        if raw == HEALTH.encode():
            return None
        if not self._is_link(scope):
            rights, by_cookie = self._rights(headers)
            asks = scope["method"] == "POST" and raw.decode("latin-1") in ASKING
            if scope["method"] not in ("GET", "HEAD", "OPTIONS") and rights == "read" and not asks:
                raise UnsafeError("E902", "this token is for reading only", advice="use the full token")
            self._check_origin(scope, headers, by_cookie)
        else:
            rights = None
        if not _PATH.fullmatch(raw):
            raise InputError("E908", "there is nothing at this address", advice="GET /api/v1/openapi.json")
        _check_query(bytes(scope["query_string"]))
        scope["mpsearch_type"] = headers.get(b"content-type", [])
        scope["mpsearch_coded"] = bool(headers.get(b"content-encoding"))
        scope["mpsearch_length"] = headers.get(b"content-length", [])
        return rights

    @staticmethod
    def _is_link(scope: Scope) -> bool:
        return (
            scope["method"] == "GET"
            and scope["raw_path"] == b"/"
            and bytes(scope["query_string"]).startswith(b"token=")
        )

    def _rights(self, headers: dict[bytes, list[str]]) -> tuple[Rights, bool]:
        given = headers.get(b"authorization", [])
        if given:
            scheme, _, token = given[0].partition(" ")
            found = self.tokens.rights(token.strip()) if len(given) == 1 and scheme.lower() == "bearer" else None
            by_cookie = False
        else:
            found, by_cookie = None, True
            for part in ";".join(headers.get(b"cookie", [])).split(";"):
                name, _, value = part.strip().partition("=")
                if name == self.cookie:
                    found = self.tokens.session_rights(value)
        if found is None:
            raise UnsafeError(
                "E901",
                "the token is missing, wrong or of an earlier start",
                advice="send it as a bearer token; it stands in the file that was named when the server started",
            )
        return found, by_cookie

    def _check_origin(self, scope: Scope, headers: dict[bytes, list[str]], by_cookie: bool) -> None:
        """Refuse what a page of another site has sent."""
        site, origins = headers.get(b"sec-fetch-site", []), headers.get(b"origin", [])
        ours = {f"{scheme}://{host}" for scheme in ("http", "https") for host in self.hosts}
        wrong = any(value not in ("same-origin", "none") for value in site)
        if scope["method"] != "GET" or scope["raw_path"] == EVENTS.encode():
            wrong = wrong or len(origins) > 1 or any(value not in ours for value in origins)
            # A cookie comes along by itself; only a browser of today says for whom.
            wrong = wrong or (by_cookie and not site and not origins)
        if wrong:
            raise UnsafeError("E903", "a page of another site may not ask this server")

    async def _in_time(self, scope: Scope, receive: Receive, reply: Reply) -> None:
        task = asyncio.ensure_future(self._answer(scope, receive, reply))
        done, _ = await asyncio.wait({task}, timeout=self.seconds)
        if done:
            task.result()
            return
        # A thread cannot be stopped; it ends by itself, and what it says then goes nowhere.
        self._left.add(task)
        task.add_done_callback(self._forget)
        reply.closed = True
        task.cancel()
        late = ResourceError("E910", f"no answer within {self.seconds:g} s", advice="ask for less, or again later")
        await reply.refuse(504, failed(late), late=True)

    def _forget(self, task: asyncio.Task[None]) -> None:
        self._left.discard(task)
        if not task.cancelled():
            task.exception()

    async def _answer(self, scope: Scope, receive: Receive, reply: Reply) -> None:
        if scope["method"] == "POST":
            body = await read_body(scope, receive)
            receive = _once(body)
        await self.app(scope, receive, reply)


def _opens(scope: Scope) -> bool:
    """Whether a browser asks for the page itself."""
    accepts = any(name.lower() == b"accept" and b"text/html" in value.lower() for name, value in scope["headers"])
    return accepts and scope["method"] == "GET" and scope["raw_path"] == b"/"


class _WrongMethod(InputError):
    """A method that an address does not take."""


def _check_query(query: bytes) -> None:
    try:
        pairs = parse_qsl(query.decode("ascii"), keep_blank_values=True, errors="strict", max_num_fields=32)
    except ValueError as error:
        raise InputError("E907", "the query is not UTF-8, or too long") from error
    names = [name for name, _ in pairs]
    if len(set(names)) != len(names):
        raise InputError("E907", "a parameter is given twice", advice="keep one")


def _once(body: bytes) -> Receive:
    parts = [body]

    async def receive() -> Message:
        if parts:
            return {"type": "http.request", "body": parts.pop(), "more_body": False}
        await asyncio.Event().wait()
        raise AssertionError("unreachable")

    return receive
