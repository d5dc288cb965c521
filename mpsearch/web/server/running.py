"""The socket and the server behind it."""

from __future__ import annotations

import asyncio
import ipaddress
import logging
import socket
from typing import Any

import uvicorn
from uvicorn.protocols.http.h11_impl import H11Protocol

from mpsearch.errors import ResourceError
from mpsearch.web.server.guard import MAX_HEAD

#: Seconds that a client may take to send the head of a request.
HEAD_SECONDS = 20.0
#: Connections at once; a process has a thousand files or so.
_CONNECTIONS = 500


def is_loopback(host: str) -> bool:
    """Whether only this machine reaches an address.

    >>> is_loopback("127.0.0.1"), is_loopback("localhost"), is_loopback("0.0.0.0")
    (True, True, False)
    """
    try:
        return ipaddress.ip_address(host).is_loopback
    except ValueError:
        return host == "localhost"


def listen(host: str, port: int) -> socket.socket:
    """Open the socket; port 0 takes a free one.

    Raises:
        ResourceError: the port is taken, or there is no such address here (E911).
    """
    family = socket.AF_INET6 if ":" in host else socket.AF_INET
    try:
        return socket.create_server((host, port), family=family, backlog=256)
    except (OSError, OverflowError) as error:
        reason = getattr(error, "strerror", None) or str(error)
        raise ResourceError(
            "E911", f"cannot listen on {host} port {port}: {reason}", advice="--port 0 takes a free port"
        ) from error


class Patient(H11Protocol):
    """HTTP/1.1 that is patient with slow clients, but not for ever."""

    def connection_made(self, transport: asyncio.Transport) -> None:  # type: ignore[override]
        """Begin to wait for the head of a request."""
        super().connection_made(transport)
        self._since = self.loop.time()
        self._watch()

    def on_response_complete(self) -> None:
        """Begin to wait for the next one."""
        self._since = self.loop.time()
        super().on_response_complete()

    def _watch(self) -> None:
        if self.transport.is_closing():
            return
        waiting = self.cycle is None or self.cycle.response_complete
        if waiting and self.loop.time() - self._since > HEAD_SECONDS:
            self.transport.abort()
            return
        self.loop.call_later(HEAD_SECONDS / 4, self._watch)


def make_server(app: Any) -> uvicorn.Server:
    """Make the server of an application; nothing that is asked is written into a log."""
    logging.getLogger("uvicorn.error").setLevel(logging.ERROR)
    config = uvicorn.Config(
        app,
        http=Patient,
        ws="none",
        lifespan="off",
        loop="asyncio",
        # Addresses of requests hold links with tokens.
        access_log=False,
        log_config=None,
        server_header=False,
        # What a client says of proxies is not believed.
        proxy_headers=False,
        limit_concurrency=_CONNECTIONS,
        timeout_keep_alive=5,
        timeout_graceful_shutdown=3,
        h11_max_incomplete_event_size=MAX_HEAD,
    )
    return uvicorn.Server(config)
