"""Connections that keep what they acknowledge, and wait for their turn."""

from __future__ import annotations

import os
import sqlite3
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any
from urllib.parse import quote

from sqlalchemy import Connection, Engine, create_engine, event
from sqlalchemy.pool import NullPool, QueuePool

from mpsearch.storage.patience import Patience
from mpsearch.storage.place import Place
from mpsearch.storage.server import server_engine

#: Execution option: the statement that opens a transaction of an SQLite connection.
BEGIN = "mpsearch_begin"
#: Reading needs no place in the queue of writers.
READING = {BEGIN: "BEGIN"}


def make_engine(place: Place, *, busy_timeout: float, read_only: bool, patience: Patience | None = None) -> Engine:
    """Return an engine for a place; nothing is opened yet.

    Args:
        place: the database.
        busy_timeout: seconds to wait for other writers.
        read_only: SQLite opens the file so that it cannot be written.
        patience: what is known of the server; nothing when None.

    Raises:
        ResourceError: the driver is not installed (E703).
    """
    if place.server is not None:
        return server_engine(place, place.server, busy_timeout, patience or Patience(place))
    if place.path is None:
        # The one connection is the database; it must neither be doubled nor closed.
        pool = {"poolclass": QueuePool, "pool_size": 1, "max_overflow": 0, "pool_timeout": busy_timeout}
        return _sqlite_engine(lambda: _connect(":memory:", busy_timeout), pool)
    path = place.path
    mode = _reading_mode(path) if read_only else "mode=rw"
    wal = not read_only
    pool = {"poolclass": QueuePool, "pool_size": 1, "max_overflow": 15, "pool_timeout": busy_timeout}
    return _sqlite_engine(lambda: _connect(_uri(path, mode), busy_timeout, wal=wal), pool)


def looking_engine(path: Path, busy_timeout: float) -> Engine:
    """Return an engine to look at an unknown file, which stays as it is to the last byte."""
    mode = "mode=ro"
    if Path(f"{path}-journal").exists():
        mode = "mode=rw"
    elif not Path(f"{path}-wal").exists():
        # An ordinary reader would leave two files beside the database.
        mode = "immutable=1"
    return _sqlite_engine(lambda: _connect(_uri(path, mode), busy_timeout), {"poolclass": NullPool})


def _reading_mode(path: Path) -> str:
    # A reader needs the shared memory file, which a folder that cannot be written does not allow.
    closed = not Path(f"{path}-wal").exists()
    return "immutable=1" if closed and not os.access(path.parent, os.W_OK) else "mode=ro"


def _uri(path: Path, mode: str) -> str:
    return f"file:{quote(str(path))}?{mode}"


def _sqlite_engine(connect: Callable[[], sqlite3.Connection], pool: dict[str, Any]) -> Engine:
    engine = create_engine("sqlite://", creator=connect, hide_parameters=True, **pool)

    @event.listens_for(engine, "begin")
    def begin(connection: Connection) -> None:
        # A deferred transaction that reads and then writes fails at once when another one has written, whatever
        # the timeout. One that asks for the lock first waits for its turn.
        connection.exec_driver_sql(connection.get_execution_options().get(BEGIN, "BEGIN IMMEDIATE"))

    return engine


def _connect(address: str, busy_timeout: float, *, wal: bool = False) -> sqlite3.Connection:
    connection = sqlite3.connect(
        address,
        uri=address.startswith("file:"),
        timeout=busy_timeout,
        # The driver opens no transactions of its own.
        isolation_level=None,
        # The pool gives a connection to one thread at a time.
        check_same_thread=False,
    )
    try:
        # A file from somebody else may hold views and triggers that call functions.
        connection.execute("PRAGMA trusted_schema=OFF")
        connection.execute("PRAGMA foreign_keys=ON")
        connection.execute("PRAGMA synchronous=FULL")
        if wal:
            _use_wal(connection, time.monotonic() + busy_timeout)
    except BaseException:
        connection.close()
        raise
    return connection


def _use_wal(connection: sqlite3.Connection, deadline: float) -> None:
    while True:
        try:
            connection.execute("PRAGMA journal_mode=WAL")
            return
        except sqlite3.OperationalError as error:
            # Two connections that change the mode at once refuse each other without waiting.
            if error.sqlite_errorcode & 0xFF != sqlite3.SQLITE_BUSY or time.monotonic() > deadline:
                raise
            time.sleep(0.005)
