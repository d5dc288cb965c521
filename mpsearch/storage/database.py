"""A results database that is open: its connections, and transactions on them."""

from __future__ import annotations

import os
import random
import time
from collections.abc import Callable, Iterator
from contextlib import AbstractContextManager, contextmanager, nullcontext
from functools import wraps
from pathlib import Path
from types import TracebackType
from typing import ParamSpec, Self, TypeVar

from sqlalchemy import Connection, Engine

from mpsearch.errors import ResourceError, StorageError
from mpsearch.storage.engine import READING, looking_engine, make_engine
from mpsearch.storage.failures import AwayError, UndoneError, translated
from mpsearch.storage.files import prepare
from mpsearch.storage.patience import Patience, Terms
from mpsearch.storage.place import Place
from mpsearch.storage.schema import SCHEMA, newer, schema_version

Arguments = ParamSpec("Arguments")
Result = TypeVar("Result")
#: How often a call is made whose connection is lost each time, and one that the database undoes each time.
_TRIES, _UNDONE = 3, 8
#: Seconds between two calls that both found the server away.
_PAUSE = 0.1

#: On a server each statement sees what is committed, inside a transaction or not; one less has two answers to wait for.
_READING_SERVER = {"isolation_level": "AUTOCOMMIT"}
_AT_ONE_MOMENT = {"isolation_level": "REPEATABLE READ", "postgresql_readonly": True}


def again(method: Callable[Arguments, Result]) -> Callable[Arguments, Result]:
    """Do a call anew whose connection was lost on the way, or that was undone; all calls may be made twice.

    A new connection waits for the server to come back; see `mpsearch.storage.server`, and `Database.wait_for_server`.
    """

    @wraps(method)
    def call(*args: Arguments.args, **kwargs: Arguments.kwargs) -> Result:
        patience: Patience | None = getattr(getattr(args[0], "_database", args[0]), "patience", None) if args else None
        lost = undone = 0
        while True:
            try:
                return method(*args, **kwargs)
            except UndoneError:
                undone += 1
                if undone == _UNDONE:
                    raise
                # Those who met must not meet again.
                time.sleep(random.uniform(0.0, 0.01 * 2**undone))
            except StorageError as error:
                lost += 1
                if error.code != "E609":
                    raise
                if not isinstance(error, AwayError) and lost < _TRIES:
                    continue
                # Something may let everybody in, and have no server behind it.
                if not (patience and patience.goes_on(error) and patience.pause(_PAUSE)):
                    raise

    return call


class Database:
    """Opens a database, brings it to the newest schema, and gives out transactions.

    Args and errors are those of `mpsearch.storage.store.SqlStore`.
    """

    def __init__(self, url: str, create: bool = True, read_only: bool = False, busy_timeout: float = 60.0) -> None:
        self.place = Place.of(url)
        self._read_only = read_only
        self._busy_timeout = busy_timeout
        self.patience = Patience(self.place)
        self._closed = False
        self._process = os.getpid()
        self._inherited: list[object] = []
        if self.place.path is not None:
            prepare(self.place.path, self.place.name, create=create and not read_only)
        self._engine = make_engine(self.place, busy_timeout=busy_timeout, read_only=read_only, patience=self.patience)
        try:
            self._open()
        except BaseException:
            self.close()
            raise

    def _open(self) -> None:
        found = self._version()
        if found > SCHEMA:
            raise newer(self.place.name, found)
        if found == SCHEMA:
            return
        if self._read_only:
            what = f"has schema {found}, this version of mpsearch reads {SCHEMA}" if found else "is empty"
            raise StorageError("E605", f"'{self.place.name}' {what}", advice="open it for writing once")
        # Alembic takes as long to load as everything else, and is not needed again.
        from mpsearch.storage.migrate import migrate

        with translated(self.place):
            migrate(self._engine, self.place.name)

    def _version(self) -> int:
        path = self.place.path
        if path is None:
            with translated(self.place), self._engine.connect() as connection:
                return schema_version(connection, self.place.name)
        for _ in range(2):
            try:
                return self._look(path)
            except StorageError as error:
                if error.code != "E603":
                    raise
                # A look takes no lock, and may meet another process that is just making the database.
                time.sleep(0.05)
        return self._look(path)

    def _look(self, path: Path) -> int:
        engine = looking_engine(path, self._busy_timeout)
        try:
            with translated(self.place), engine.connect().execution_options(**READING) as connection:
                return schema_version(connection, self.place.name)
        finally:
            engine.dispose()

    def close(self) -> None:
        """Close the connections; calling it again does nothing."""
        if not self._closed:
            self._engine_here().dispose()
            self._closed = True

    def wait_for_server(
        self,
        seconds: float,
        told: Callable[[str], None] = lambda text: None,
        stop: Callable[[], bool] = lambda: False,
    ) -> Callable[[], None]:
        """Have calls wait for a server that goes away, also those that wait already; the arguments are `Terms`'.

        Returns:
            What puts back how it was before.
        """
        return self.patience.change(Terms(seconds, told, stop))

    @property
    def away(self) -> bool:
        """Whether the last call found the server away, and none has been answered since."""
        return self.patience.since is not None

    def settled(self, seconds: float) -> bool:
        """Whether the server answers, and has for so long since it was last away."""
        return self.patience.settled(seconds)

    def __enter__(self) -> Self:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self.close()

    def __repr__(self) -> str:
        return f"SqlStore({self.place.shown!r})"

    @property
    def is_file(self) -> bool:
        """Whether it is an SQLite file, where one writes at a time."""
        return self.place.path is not None

    @property
    def shared(self) -> bool:
        """Whether other processes can open it."""
        return self.is_file or self.place.server is not None

    @property
    def address(self) -> str:
        """The address by which other processes open it, in any folder; it may hold a password, so it is not shown."""
        if self.place.server is not None:
            return self.place.server.render_as_string(hide_password=False)
        return f"sqlite:///{self.place.path}" if self.is_file else "sqlite://"

    def _engine_here(self) -> Engine:
        if self._closed:
            raise ValueError(f"{self!r} is closed")
        if os.getpid() != self._process:
            # The parent goes on using these connections. They are kept, because Python would close what nobody
            # holds, and SQLite must not close in one process what it opened in another.
            self._inherited.append(self._engine.pool)
            self._engine.dispose(close=False)
            self.patience.forked()
            self._process = os.getpid()
        return self._engine

    @contextmanager
    def writing(self) -> Iterator[Connection]:
        """One short transaction that writes; an error inside undoes all of it."""
        if self._read_only:
            raise ResourceError("E701", f"'{self.place.name}' was opened for reading only")
        engine = self._engine_here()
        with self._turn(), translated(self.place), engine.begin() as connection:
            yield connection

    @contextmanager
    def reading(self, at_one_moment: bool = False) -> Iterator[Connection]:
        """One short transaction that reads.

        Args:
            at_one_moment: all statements see what was committed before the first; else, on a server, each sees what was
                committed before it.
        """
        options = READING if self.place.server is None else _AT_ONE_MOMENT if at_one_moment else _READING_SERVER
        engine = self._engine_here()
        with self._turn(), translated(self.place), engine.connect().execution_options(**options) as connection:
            yield connection

    def _turn(self) -> AbstractContextManager[None]:
        # Those who wait for the pool's connection would not hear that the server is away, nor that they are to stop.
        return nullcontext() if self.place.server is None else self.patience.turn(self._busy_timeout)
