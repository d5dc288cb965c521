"""The results database: values under their content key, scores, studies."""

from __future__ import annotations

import os
import time
from collections.abc import Iterable, Iterator, Mapping
from contextlib import contextmanager
from pathlib import Path
from types import TracebackType
from typing import Any, Self

from sqlalchemy import Connection, Engine

from mpsearch.errors import ResourceError, StorageError
from mpsearch.records import CellRow, LinkRow, StudyRow
from mpsearch.storage import cells as stored_cells
from mpsearch.storage import conflicts, studies, values
from mpsearch.storage.checks import cell_values, check_integer, check_integers, check_text
from mpsearch.storage.conflicts import ConflictRow
from mpsearch.storage.engine import READING, looking_engine, make_engine
from mpsearch.storage.failures import translated
from mpsearch.storage.files import prepare
from mpsearch.storage.place import Place
from mpsearch.storage.schema import SCHEMA, STUDY_STATES, newer, schema_version
from mpsearch.storage.text import encode


class SqlStore:
    """Keeps results in an SQLite file or on a PostgreSQL server.

    Any number of processes and threads may use one database at a time. What a method has put is on the disk
    when the method returns. A store that is inherited over a fork opens connections of its own.

    Args:
        url: ``sqlite:///file.db``, the path of a file, or ``postgresql://…``.
        create: make the file if there is none, readable by its owner only.
        read_only: refuse to write.
        busy_timeout: seconds to wait while others write.

    Raises:
        InputError: no such file (E101), or not an address (E107).
        StorageError: locked (E601), on a network disk (E602), not a study database or damaged (E603),
            made by a later version (E605), no connection left (E607), no log-in (E608), other (E600). Each
            method may raise E600, E601, E603, E607 and E608 too.
        ResourceError: the disk is full or cannot be written (E701), or the driver is missing (E703). Each
            method that writes may raise E701 too.
    """

    def __init__(self, url: str, create: bool = True, read_only: bool = False, busy_timeout: float = 60.0) -> None:
        self._place = Place.of(url)
        self._read_only = read_only
        self._busy_timeout = busy_timeout
        self._closed = False
        self._process = os.getpid()
        self._inherited: list[object] = []
        if self._place.path is not None:
            prepare(self._place.path, self._place.name, create=create and not read_only)
        self._engine = make_engine(self._place, busy_timeout=busy_timeout, read_only=read_only)
        try:
            self._open()
        except BaseException:
            self.close()
            raise

    def _open(self) -> None:
        found = self._version()
        if found > SCHEMA:
            raise newer(self._place.name, found)
        if found == SCHEMA:
            return
        if self._read_only:
            what = f"has schema {found}, this version of mpsearch reads {SCHEMA}" if found else "is empty"
            raise StorageError("E605", f"'{self._place.name}' {what}", advice="open it for writing once")
        # Alembic takes as long to load as everything else, and is not needed again.
        from mpsearch.storage.migrate import migrate

        with translated(self._place):
            migrate(self._engine, self._place.name)

    def _version(self) -> int:
        path = self._place.path
        if path is None:
            with translated(self._place), self._engine.connect() as connection:
                return schema_version(connection, self._place.name)
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
            with translated(self._place), engine.connect().execution_options(**READING) as connection:
                return schema_version(connection, self._place.name)
        finally:
            engine.dispose()

    def close(self) -> None:
        """Close the connections; calling it again does nothing."""
        if not self._closed:
            self._engine_here().dispose()
            self._closed = True

    def __enter__(self) -> Self:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self.close()

    def __repr__(self) -> str:
        return f"SqlStore({self._place.shown!r})"

    def _engine_here(self) -> Engine:
        if self._closed:
            raise ValueError(f"{self!r} is closed")
        if os.getpid() != self._process:
            # The parent goes on using these connections. They are kept, because Python would close what nobody
            # holds, and SQLite must not close in one process what it opened in another.
            self._inherited.append(self._engine.pool)
            self._engine.dispose(close=False)
            self._process = os.getpid()
        return self._engine

    @contextmanager
    def _writing(self) -> Iterator[Connection]:
        if self._read_only:
            raise ResourceError("E701", f"'{self._place.name}' was opened for reading only")
        with translated(self._place), self._engine_here().begin() as connection:
            yield connection

    @contextmanager
    def _reading(self) -> Iterator[Connection]:
        with translated(self._place), self._engine_here().connect().execution_options(**READING) as connection:
            yield connection

    def put(self, kind: str, key: str, body: Mapping[str, Any], volatile: Mapping[str, Any] | None = None) -> None:
        """Keep a value; the same value again is fine.

        Args:
            kind: such as ``scores``, ``plan``, ``measurement``.
            key: content key of everything that made the value.
            body: what JSON can hold. Fields that are also in ``volatile`` are left out.
            volatile: fields that may differ from run to run, such as ``seconds``. They are not compared, the
                first ones stay, and `get` adds them to the body.

        Raises:
            StorageError: the key holds another value (E521); both are then in `conflicts`.
            InputError: a kind or key that is not printable, or text that is not text (E114).
            ValueError: NaN or infinity.
        """
        check_text("kind", kind, 40)
        check_text("key", key)
        changing = dict(volatile or {})
        text = encode(f"{kind} '{key}'", {name: item for name, item in body.items() if name not in changing})
        extra = encode(f"{kind} '{key}'", changing) if changing else None
        with self._writing() as connection:
            conflict = values.put(connection, kind, key, text, extra)
        if conflict:
            raise conflict

    def get(self, kind: str, key: str) -> dict[str, Any] | None:
        """Return the value of a key, or None."""
        return self.get_many(kind, [key]).get(key)

    def get_many(self, kind: str, keys: Iterable[str]) -> dict[str, dict[str, Any]]:
        """Return the values of those keys that have one, in the order of ``keys``."""
        check_text("kind", kind, 40)
        wanted = [check_text("key", key) for key in dict.fromkeys(keys)]
        with self._reading() as connection:
            return values.get_many(connection, kind, wanted)

    def put_cells(self, scope: str, cells: Iterable[CellRow]) -> None:
        """Keep scores, all or none; the same status, value and spread again is fine.

        Args:
            scope: content key of the model, the data, the estimator and the version of the code.
            cells: the scores. A spread of NaN is stored as unknown, minus zero as zero, and a reason is cut.

        Raises:
            StorageError: a cell holds other numbers (E521); the cells that are not in conflict are kept, and
                both numbers are then in `conflicts`.
            InputError: a name that is not printable (E114), a number outside 64 bits (E113).
            ValueError: a value that is NaN or infinite, or does not fit its status.
        """
        check_text("scope", scope)
        rows = [cell_values(scope, cell) for cell in cells]
        if not rows:
            return
        with self._writing() as connection:
            conflict = stored_cells.put(connection, rows)
        if conflict:
            raise conflict

    def cells(self, scope: str) -> list[CellRow]:
        """Return the scores of a scope, ordered by layer, format and batch."""
        check_text("scope", scope)
        with self._reading() as connection:
            return stored_cells.read(connection, scope)

    def conflicts(self) -> list[ConflictRow]:
        """Return every second value that was refused, oldest first."""
        with self._reading() as connection:
            return conflicts.read(connection)

    def create_study(self, name: str, spec: Mapping[str, Any]) -> None:
        """Make a study in state ``new``; the same name with the same spec again does nothing.

        Raises:
            StorageError: the name exists with another spec (E140).
            InputError: a name that is not 1 to 200 printable characters (E114), an integer outside 64 bits (E113).
            ValueError: NaN or infinity.
        """
        check_text("study name", name)
        text = encode("spec", spec)
        check_integers("", spec)
        with self._writing() as connection:
            studies.create(connection, name, text)

    def study(self, name: str) -> StudyRow:
        """Return a study.

        Raises:
            StorageError: no such study (E141).
            InputError: not a name (E114).
        """
        check_text("study name", name)
        with self._reading() as connection:
            return studies.read(connection, name, self._place.shown)

    def studies(self) -> list[StudyRow]:
        """Return all studies, newest first."""
        with self._reading() as connection:
            return studies.read_all(connection)

    def set_state(self, name: str, state: str) -> None:
        """Say where a study stands: new, running, complete, gaps, failed or paused.

        Raises:
            StorageError: no such study (E141).
            InputError: not a name (E114).
            ValueError: no such state.
        """
        check_text("study name", name)
        if state not in STUDY_STATES:
            raise ValueError(f"study '{name}': no state {state!a}; there is {', '.join(STUDY_STATES)}")
        with self._writing() as connection:
            studies.set_state(connection, name, state, self._place.shown)

    def link(self, study: str, kind: str, key: str, label: str = "", position: int = 0) -> None:
        """Say that a stored value belongs to a study.

        A value may be linked under several labels. Linking it again under the same one sets its position.

        Raises:
            StorageError: no such study (E141).
            InputError: text that is not printable (E114), a position outside 64 bits (E113).
        """
        check_text("study name", study)
        check_text("kind", kind, 40)
        row = LinkRow(
            check_text("key", key),
            check_text("label", label, 500, empty=True),
            check_integer("position", position),
        )
        with self._writing() as connection:
            studies.link(connection, study, kind, row, self._place.shown)

    def links(self, study: str, kind: str) -> list[LinkRow]:
        """Return the values of a kind that belong to a study, ordered by position, key and label.

        Raises:
            StorageError: no such study (E141).
            InputError: text that is not printable (E114).
        """
        check_text("study name", study)
        check_text("kind", kind, 40)
        with self._reading() as connection:
            return studies.links(connection, study, kind, self._place.shown)
