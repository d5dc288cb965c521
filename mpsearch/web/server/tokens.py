"""Tokens of one start of the server: what they allow, and how a link becomes a cookie."""

from __future__ import annotations

import hashlib
import hmac
import json
import os
import secrets
import time
from collections.abc import Callable
from pathlib import Path
from typing import Literal

Rights = Literal["full", "read"]
#: Seconds that a cookie is good for.
COOKIE_SECONDS = 12 * 3600.0
#: Sessions of one start; the oldest goes.
_SESSIONS = 1000


def _digest(text: str) -> bytes:
    # Digests are of one length, and what a client sent may be no ASCII text.
    return hashlib.sha256(text.encode("utf-8", "surrogatepass")).digest()


class Tokens:
    """The secrets of one start, each of 256 bits.

    Attributes:
        full: allows everything; None for a server that is only read.
        read: allows reading, without paths and names of machines.
        link: good once, for a cookie with the rights of ``full``; None as that.

    >>> tokens = Tokens()
    >>> tokens.rights(tokens.full), tokens.rights(tokens.read), tokens.rights("guess")
    ('full', 'read', None)
    """

    def __init__(self, *, read_only: bool = False, clock: Callable[[], float] = time.monotonic) -> None:
        """Draw the secrets.

        Args:
            read_only: make no token that allows more than reading.
            clock: seconds; for the age of cookies.
        """
        self.full = None if read_only else secrets.token_urlsafe(32)
        self.read = secrets.token_urlsafe(32)
        self.link = None if read_only else secrets.token_urlsafe(32)
        self._clock = clock
        self._linked = False
        self._sessions: dict[bytes, tuple[Rights, float]] = {}

    def rights(self, token: str) -> Rights | None:
        """What a token allows; None for a wrong one. Takes the same time for every wrong one."""
        given = _digest(token)
        full = hmac.compare_digest(given, _digest(self.full or "")) & (self.full is not None)
        read = hmac.compare_digest(given, _digest(self.read))
        return "full" if full else "read" if read else None

    def session_rights(self, cookie: str) -> Rights | None:
        """What a cookie allows; None for a wrong one or one that is too old."""
        # Looked up by its digest: how long that takes says nothing of the cookie.
        rights, until = self._sessions.get(_digest(cookie), (None, 0.0))
        return rights if self._clock() < until else None

    def exchange(self, code: str) -> str | None:
        """Make a cookie of what a link carries; None for a wrong code, or a link that was used.

        The link that allows everything is good once, so that nobody finds it in a history later. The one for
        reading holds the token itself, and is good until the server ends.
        """
        given = _digest(code)
        full = hmac.compare_digest(given, _digest(self.link or "")) & (self.link is not None)
        read = hmac.compare_digest(given, _digest(self.read))
        if full and not self._linked:
            self._linked = True
            return self._session("full")
        return self._session("read") if read else None

    def _session(self, rights: Rights) -> str:
        cookie = secrets.token_urlsafe(32)
        while len(self._sessions) >= _SESSIONS:
            del self._sessions[next(iter(self._sessions))]
        self._sessions[_digest(cookie)] = (rights, self._clock() + COOKIE_SECONDS)
        return cookie


def token_file(port: int) -> Path:
    """Where programs of the same user find the tokens of the server on a port."""
    state = os.environ.get("XDG_STATE_HOME") or "~/.local/state"
    return Path(state).expanduser() / "mpsearch" / f"serve-{port}.json"


def write_tokens(path: Path, address: str, tokens: Tokens) -> None:
    """Write the tokens into a file that only its owner can read, whole or not at all.

    Raises:
        OSError: the file cannot be written.
    """
    path.parent.mkdir(parents=True, exist_ok=True, mode=0o700)
    body = json.dumps({"url": address, "token": tokens.full, "read_token": tokens.read}, indent=1)
    new = path.with_name(f".{path.name}.{secrets.token_hex(8)}.tmp")
    # Never readable by others, not even between making and changing its mode.
    descriptor = os.open(new, os.O_WRONLY | os.O_CREAT | os.O_EXCL | os.O_NOFOLLOW, 0o600)
    try:
        with os.fdopen(descriptor, "w", encoding="utf-8") as stream:
            stream.write(body + "\n")
        os.replace(new, path)
    except BaseException:
        new.unlink(missing_ok=True)
        raise
