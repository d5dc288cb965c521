"""Connections to a PostgreSQL server: few, and patient when it is full or starts anew."""

from __future__ import annotations

import time
from typing import Any

from sqlalchemy import Engine, create_engine, event
from sqlalchemy.engine import URL

from mpsearch.errors import ResourceError, StorageError
from mpsearch.storage.failures import away, one_line
from mpsearch.storage.patience import HURRY, Patience
from mpsearch.storage.place import Place
from mpsearch.storage.portable import BINARY

#: Seconds to wait for a free connection, or for a server that has gone away, at most.
PATIENCE = 15.0
# A connection that is refused comes without a code, so these are known by their words.
_FULL = ("too many clients", "remaining connection slots", "too many connections")
_SOON = ("starting up", "shutting down", "recovery mode", "not yet accepting")
_AWAY = (
    *("refused", "closed the connection", "could not connect", "timeout", "no such file"),
    *("timed out", "reset by peer", "broken pipe", "network is down", "host is down"),
    *("unreachable", "no route to host", "failed to resolve", "could not translate"),
)
_LIMITS = "SELECT current_setting('max_connections'), current_setting('superuser_reserved_connections')"


def server_engine(place: Place, url: URL, busy_timeout: float, patience: Patience) -> Engine:
    """Return an engine for a server; nothing is opened yet.

    Args:
        place: what messages call it.
        url: its address.
        busy_timeout: seconds to wait for other writers.
        patience: is told when the server is away, and when it is back.

    Raises:
        ResourceError: the driver is not installed (E703).
    """
    # What is sent to a machine that is gone is given up after half a minute, and not after a quarter of an hour.
    arguments: dict[str, object] = {
        **{"connect_timeout": 10, "keepalives_idle": 30, "keepalives_interval": 10, "tcp_user_timeout": 30_000},
    }
    if "options" not in url.query:
        arguments["options"] = _options(busy_timeout)
    try:
        from psycopg.pq import Format

        engine = create_engine(
            url,
            # A server has a hundred connections or so, and there may be as many workers.
            pool_size=1,
            max_overflow=0,
            pool_timeout=busy_timeout,
            hide_parameters=True,
            connect_args=arguments,
        )
    except ImportError as error:
        raise ResourceError(
            "E703", "a postgresql:// address needs the package 'psycopg'", advice="pip install 'psycopg[binary]'"
        ) from error
    _Door(place, busy_timeout, patience).guard(engine)

    @event.listens_for(engine, "before_cursor_execute")
    def choose(connection: object, cursor: Any, statement: str, values: object, context: Any, many: bool) -> None:
        if context is not None and context.execution_options.keys() >= BINARY.keys():
            cursor.format = Format.BINARY

    return engine


def _options(busy_timeout: float) -> str:
    settings = {
        "lock_timeout": max(1, round(busy_timeout * 1000)),
        "statement_timeout": 600_000,
        # A worker that is stopped in the middle must not hold its locks for ever, nor one whose machine is gone.
        "idle_in_transaction_session_timeout": 60_000,
        "tcp_keepalives_idle": 30,
        "tcp_keepalives_interval": 10,
        "tcp_keepalives_count": 3,
    }
    return " ".join(f"-c {name}={value}" for name, value in settings.items())


class _Door:
    """Opens connections.

    Args:
        place: what messages call the server.
        seconds: for how long to try again.
        patience: is told what is found, and says when to stop.
    """

    def __init__(self, place: Place, seconds: float, patience: Patience) -> None:
        self._place, self._seconds, self._patience = place, seconds, patience
        #: How many connections the server allows and how many of them ordinary users; None until one was open.
        self._limits: tuple[int, int] | None = None

    def guard(self, engine: Engine) -> None:
        """Have the engine open its connections here."""
        event.listen(engine, "do_connect", self._open)

    def _open(self, dialect: Any, record: object, arguments: Any, settings: Any) -> Any:
        self._patience.connecting = True
        try:
            connection = self._knock(dialect, arguments, settings)
        finally:
            self._patience.connecting = False
        if self._limits is None:
            with connection.cursor() as cursor:
                most, reserved = cursor.execute(_LIMITS).fetchone()
            connection.rollback()
            self._limits = (int(most), int(most) - int(reserved))
        return connection

    def _knock(self, dialect: Any, arguments: Any, settings: dict[str, Any]) -> Any:
        deadline, pause = time.monotonic() + min(self._seconds, PATIENCE), 0.05
        while True:
            hurry = {"connect_timeout": int(HURRY)} if self._limits is not None and self._patience.hurried else {}
            try:
                return dialect.connect(*arguments, **{**settings, **hurry})
            except dialect.loaded_dbapi.OperationalError as error:
                full = _says(error, _FULL)
                # A server that never answered is a wrong address more often than one that comes back.
                back = _says(error, _SOON) or (self._limits is not None and _says(error, _AWAY))
                if back and self._limits is not None:
                    self._patience.refused(one_line(error, self._place))
                if time.monotonic() + pause > deadline or not (full or back) or not self._patience.pause(pause):
                    if full:
                        raise self._no_room() from None
                    if back and self._limits is not None:
                        raise away(error, self._place) from None
                    raise
            pause = min(2 * pause, 0.5)

    def _no_room(self) -> StorageError:
        many = "it allows no more"
        if self._limits is not None:
            many = f"it allows {self._limits[0]} connections, {self._limits[1]} for users like this one"
        return StorageError(
            "E607",
            f"{self._place.shown} has no free connection: {many}, and all are in use",
            because="each worker takes one connection, and other programs theirs",
            advice="use fewer workers, end other programs, or raise max_connections in the server's postgresql.conf",
        )


def _says(error: BaseException, words: tuple[str, ...]) -> bool:
    text = str(error).lower()
    return any(word in text for word in words)
