"""Requests to a server and its answers, with the standard library alone."""

from __future__ import annotations

import http.client
import json
import os
import urllib.error
import urllib.request
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any
from urllib.parse import urlencode, urlsplit

from mpsearch.errors import InputError, MpsearchError, ResourceError
from mpsearch.web.server.refusals import error_of
from mpsearch.web.server.tokens import token_file

#: Bytes of an answer; a table of a million cells has fewer.
_MOST = 1 << 30


class _Stay(urllib.request.HTTPRedirectHandler):
    """Goes nowhere else: a token is for one server."""

    def redirect_request(self, *_: Any, **__: Any) -> None:
        """Refuse."""


class Wire:
    """One server and the token for it.

    Attributes:
        url: such as ``http://127.0.0.1:8765``.
        seconds: to wait for an answer.
    """

    def __init__(self, url: str, token: str | Path = "", seconds: float = 60.0) -> None:
        """Set up; nothing is asked yet.

        Args:
            url: address of the server.
            token: the token, or a file that holds it (see `find_token`).
            seconds: to wait for an answer.

        Raises:
            InputError: no such address (E107), or no token for it is known (E901).
        """
        parts = urlsplit(url)
        if parts.scheme not in ("http", "https") or not parts.hostname or parts.path not in ("", "/") or parts.username:
            raise InputError("E107", f"'{url[:200]}' is no address of a server", advice="http://127.0.0.1:8765")
        self.url = f"{parts.scheme}://{parts.netloc}"
        self.seconds = seconds
        self._token = find_token(token, parts.port or 80)
        # Settings for proxies of the environment are for the web, not for a token.
        self._opener = urllib.request.build_opener(urllib.request.ProxyHandler({}), _Stay())

    def __repr__(self) -> str:
        return f"Wire({self.url!r})"

    def get(self, path: str, **asked: Any) -> Any:
        """Ask, and return the answer's values.

        Raises:
            MpsearchError: what the server says, as its own kind; ResourceError when it does not answer (E912).
        """
        return self._values(self._open(path, asked))

    def post(self, path: str, body: Mapping[str, Any]) -> Any:
        """Send a body, and return the answer's values (raises as `get`)."""
        return self._values(self._open(path, {}, json.dumps(body, allow_nan=False).encode()))

    def rows(self, path: str, **asked: Any) -> Iterator[Any]:
        """Yield the rows of a list, page by page (raises as `get`)."""
        offset: int | None = 0
        while offset is not None:
            found = self.get(path, **asked, offset=offset)
            yield from found["items"]
            offset = found["next"]

    def events(self, path: str, last: int, **asked: Any) -> Iterator[tuple[str, int | None, Any]]:
        """Yield server-sent events as (kind, number, values); ends when the server or the network does."""
        with self._open(path, asked, extra={"Last-Event-ID": str(last)} if last else {}) as answer:
            kind, number, data = "message", None, ""
            try:
                for line in answer:
                    name, _, value = line.decode().rstrip("\r\n").partition(": ")
                    if name == "event":
                        kind = value
                    elif name == "id":
                        number = int(value)
                    elif name == "data":
                        data = value
                    elif not name and data:
                        yield kind, number, json.loads(data)
                        kind, number, data = "message", None, ""
            except (OSError, http.client.HTTPException):
                return

    def _open(self, path: str, asked: Mapping[str, Any], body: bytes | None = None, extra: Any = None) -> Any:
        query = urlencode({k: str(v).lower() if isinstance(v, bool) else v for k, v in asked.items()})
        headers = {"Authorization": f"Bearer {self._token}", **(extra or {})}
        if body is not None:
            headers["Content-Type"] = "application/json"
        address = f"{self.url}/api/v1{path}" + (f"?{query}" if query else "")
        request = urllib.request.Request(address, data=body, headers=headers)
        try:
            return self._opener.open(request, timeout=self.seconds)
        except urllib.error.HTTPError as error:
            with error:
                raise _raised(error.code, error.read(_MOST)) from None
        except (OSError, http.client.HTTPException) as error:
            raise self._silent(error) from error

    def _values(self, answer: Any) -> Any:
        try:
            with answer:
                return json.loads(answer.read(_MOST))
        except (OSError, http.client.HTTPException) as error:
            raise self._silent(error) from error
        except (ValueError, RecursionError) as error:
            raise ResourceError("E912", f"{self.url} gave an answer that is not from mpsearch") from error

    def _silent(self, error: Exception) -> ResourceError:
        reason = getattr(error, "reason", None) or error
        return ResourceError(
            "E912", f"{self.url} does not answer: {reason}", advice="is `mpsearch serve` running there?"
        )


def _raised(status: int, body: bytes) -> MpsearchError:
    try:
        return error_of(json.loads(body))
    except (ValueError, RecursionError):
        return ResourceError("E912", f"an answer with status {status} that is not from mpsearch")


def find_token(token: str | Path, port: int) -> str:
    """The token to use: what is given, ``MPSEARCH_TOKEN``, or that of a server of the same user on this machine.

    Args:
        token: the token, or a file: the one that ``mpsearch serve`` writes, or one with the token alone.
        port: of the server, which names the usual file.

    Raises:
        InputError: none is known (E901).
    """
    given = token or os.environ.get("MPSEARCH_TOKEN", "")
    if isinstance(given, str) and given:
        return _clean(given)
    file = given if isinstance(given, Path) else token_file(port)
    try:
        text = file.read_text(encoding="utf-8")
        held = json.loads(text) if text.lstrip().startswith("{") else {"token": text}
    except (OSError, ValueError, RecursionError) as error:
        raise InputError(
            "E901",
            "no token is known for this server",
            because=f"'{file}' cannot be read",
            advice="give token=…, or set MPSEARCH_TOKEN",
        ) from error
    found = held.get("token") or held.get("read_token")
    return _clean(found if isinstance(found, str) else "")


def _clean(token: str) -> str:
    found = token.strip()
    if not found or not found.isascii() or not found.isprintable() or " " in found:
        raise InputError("E901", "this is no token", advice="copy it from the file that `mpsearch serve` names")
    return found
