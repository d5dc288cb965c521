"""The results database: values under their content key, scores, studies."""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from typing import Any

from mpsearch.records import CellRow, LinkRow, StoredPlan, StudyRow
from mpsearch.storage import cells as stored_cells
from mpsearch.storage import conflicts, studies, values
from mpsearch.storage.checks import cell_values, check_integer, check_integers, check_text
from mpsearch.storage.conflicts import ConflictRow
from mpsearch.storage.control import Control
from mpsearch.storage.database import Database, again
from mpsearch.storage.queue import Queue
from mpsearch.storage.schema import STUDY_STATES
from mpsearch.storage.text import encode


class SqlStore(Database):
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

    @property
    def queue(self) -> Queue:
        """Tasks and their leases."""
        return Queue(self)

    @property
    def control(self) -> Control:
        """Who drives which study, what is wanted of it, and what it says."""
        return Control(self)

    @again
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
            ValueError: NaN or infinity, or a part of plans under a key that is not that of its content.
        """
        row = values.row(kind, key, body, volatile)
        with self.writing() as connection:
            conflict = values.put_many(connection, [row])
        if conflict:
            raise conflict

    def get(self, kind: str, key: str) -> dict[str, Any] | None:
        """Return the value of a key, or None."""
        return self.get_many(kind, [key]).get(key)

    def get_many(self, kind: str, keys: Iterable[str]) -> dict[str, dict[str, Any]]:
        """Return the values of those keys that have one, in the order of ``keys``."""
        check_text("kind", kind, 40)
        return self._get_many(kind, [check_text("key", key) for key in dict.fromkeys(keys)])

    @again
    def _get_many(self, kind: str, keys: list[str]) -> dict[str, dict[str, Any]]:
        # Between a plan and its parts somebody may take out both.
        with self.reading(at_one_moment=kind == "plan") as connection:
            return values.get_many(connection, kind, keys)

    def plan_rows(self, keys: Iterable[str]) -> dict[str, StoredPlan]:
        """Return what is drawn of the plans of those keys that have one, in the order of ``keys``.

        It takes a hundredth of the time of `get_many`, as their layers are not read.
        """
        return self._plan_rows([check_text("key", key) for key in dict.fromkeys(keys)])

    @again
    def _plan_rows(self, keys: list[str]) -> dict[str, StoredPlan]:
        with self.reading() as connection:
            return values.plan_rows(connection, keys)

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
        if rows:
            self._put_cells(rows)

    @again
    def _put_cells(self, rows: list[dict[str, Any]]) -> None:
        with self.writing() as connection:
            conflict = stored_cells.put(connection, rows)
        if conflict:
            raise conflict

    @again
    def cells(self, scope: str) -> list[CellRow]:
        """Return the scores of a scope, ordered by layer, format and batch."""
        check_text("scope", scope)
        with self.reading() as connection:
            return stored_cells.read(connection, scope)

    @again
    def conflicts(self) -> list[ConflictRow]:
        """Return every second value that was refused, oldest first."""
        with self.reading() as connection:
            return conflicts.read(connection)

    @again
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
        with self.writing() as connection:
            studies.create(connection, name, text)

    @again
    def study(self, name: str) -> StudyRow:
        """Return a study.

        Raises:
            StorageError: no such study (E141).
            InputError: not a name (E114).
        """
        check_text("study name", name)
        with self.reading() as connection:
            return studies.read(connection, name, self.place.shown)

    @again
    def studies(self) -> list[StudyRow]:
        """Return all studies, newest first."""
        with self.reading() as connection:
            return studies.read_all(connection)

    @again
    def set_state(self, name: str, state: str) -> None:
        """Say where a study stands: see `mpsearch.records.StudyRow`.

        Raises:
            StorageError: no such study (E141).
            InputError: not a name (E114).
            ValueError: no such state.
        """
        check_text("study name", name)
        if state not in STUDY_STATES:
            raise ValueError(f"study '{name}': no state {state!a}; there is {', '.join(STUDY_STATES)}")
        with self.writing() as connection:
            studies.set_state(connection, name, state, self.place.shown)

    @again
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
        with self.writing() as connection:
            studies.link(connection, study, kind, row, self.place.shown)

    @again
    def links(self, study: str, kind: str) -> list[LinkRow]:
        """Return the values of a kind that belong to a study, ordered by position, key and label.

        Raises:
            StorageError: no such study (E141).
            InputError: text that is not printable (E114).
        """
        check_text("study name", study)
        check_text("kind", kind, 40)
        with self.reading() as connection:
            return studies.links(connection, study, kind, self.place.shown)
