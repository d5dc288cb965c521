"""Whole studies out of a database and into another one."""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import replace
from typing import TYPE_CHECKING, Any

from sqlalchemy import Connection, and_, func, select

from mpsearch.bundles.portion import Asked, Belongs, Copied, Portion
from mpsearch.errors import InputError, StudyNameError
from mpsearch.storage import cells, conflicts, studies, values
from mpsearch.storage.checks import cell_values, check_integer, check_integers, check_text
from mpsearch.storage.compact import PART
from mpsearch.storage.conflicts import Refusal
from mpsearch.storage.database import again
from mpsearch.storage.portable import chunks, insert_new, listed
from mpsearch.storage.portions import everything, one
from mpsearch.storage.schema import STUDY_STATES, cell_table, link_table, study_table, value_table
from mpsearch.storage.text import decode, encode

if TYPE_CHECKING:
    from mpsearch.storage.store import SqlStore

#: States that nobody works in; a study that was being worked on stands still in its copy.
_RESTING = ("new", "complete", "gaps", "failed", "paused", "cancelled")


class Copying:
    """Reads and writes studies with all that belongs to them.

    Args:
        store: the database.
    """

    def __init__(self, store: SqlStore) -> None:
        self._store = store

    @contextmanager
    def reading(self, name: str | None) -> Iterator[Portion]:
        """Yield one study, or everything, as it stood at one moment.

        Args:
            name: the study; the whole database when None.

        Raises:
            StorageError: no such study (E141).
        """
        if name is not None:
            self._store.study(name)
        with self._store.reading(at_one_moment=True) as connection:
            yield everything(connection) if name is None else one(connection, name)

    def write(self, portion: Portion) -> Copied:
        """Take over a portion in one transaction: all of it, or nothing.

        What the database undoes, for another one takes out at the same moment what the portion belongs to, is done
        anew; so is what loses its connection.

        Raises:
            StorageError: a study of the same name asks something else (E140), other values for the same keys (E521;
                they are then in `SqlStore.conflicts`), or undone each time (E601).
            InputError: a study of the same name has numbers of another machine or version (E142), a name that is not
                printable (E114), a number outside 64 bits (E113), a link to nothing (E304).
            ValueError: NaN, or a status that does not fit its value.
        """
        rows = [values.row(value.kind, value.key, value.body, value.volatile) for value in portion.values]
        # What can be gone through once only must be there when all is done anew.
        whole = replace(portion, values=(), cells=list(portion.cells), conflicts=list(portion.conflicts))
        new, found = _all_or_none(self._store, whole, rows)
        if found:
            _note(self._store, found)
            kind, key, stored, offered = found[0]
            raise conflicts.error(f"{kind} '{key[:80]}'", decode(stored), decode(offered), more=len(found) - 1)
        return Copied(tuple(study.name for study in portion.studies), *new)


@again
def _all_or_none(
    store: SqlStore, portion: Portion, rows: Sequence[dict[str, Any]]
) -> tuple[tuple[int, int], list[Refusal]]:
    """How many values and cells were new, and what was refused, for which nothing is stored."""
    found: list[Refusal] = []
    try:
        with store.writing() as connection:
            before = _counts(connection)
            _write(connection, portion, rows, found)
            if found:
                raise _DifferentError
            after = _counts(connection)
    except _DifferentError:
        return (0, 0), found
    return (after[0] - before[0], after[1] - before[1]), []


@again
def _note(store: SqlStore, refused: Sequence[Refusal]) -> None:
    with store.writing() as connection:
        conflicts.record_all(connection, refused)


def _write(connection: Connection, portion: Portion, rows: Sequence[dict[str, Any]], found: list[Refusal]) -> None:
    numbers = {study.name: _study(connection, study, portion.links) for study in portion.studies}
    for chunk in chunks(rows):
        found += values.keep(connection, chunk)
    for chunk in chunks(cell_values(check_text("scope", scope), cell) for scope, cell in portion.cells):
        found += cells.keep(connection, chunk)
    for chunk in chunks(_link_row(numbers, link) for link in portion.links):
        insert_new(connection, link_table, chunk)
    _check_links(connection, portion.links)
    for refused in portion.conflicts:
        check_text("kind", refused.kind, 40)
        texts = [encode("conflict", side) for side in (refused.stored, refused.offered)]
        conflicts.record(connection, refused.kind, check_text("key", refused.key, 2000), *texts)


class _DifferentError(Exception):
    """Ends the transaction, so that nothing of the copy stays."""


def _counts(connection: Connection) -> tuple[int, int]:
    count = [select(func.count()).select_from(table) for table in (value_table, cell_table)]
    count[0] = count[0].where(value_table.c.kind != PART)
    return int(connection.execute(count[0]).scalar_one()), int(connection.execute(count[1]).scalar_one())


def _study(connection: Connection, study: Asked, links: Iterable[Belongs]) -> int:
    """Make the study, or find that it is the same one; return its number."""
    check_text("study name", study.name)
    check_integers("", study.spec)
    if study.state not in STUDY_STATES:
        raise ValueError(f"study '{study.name}': no state {ascii(study.state)[:40]}")
    text = encode("spec", study.spec)
    chosen = select(study_table.c.spec, study_table.c.state).where(study_table.c.name == study.name)
    there = connection.execute(chosen).one_or_none()
    if there is not None and there.spec != text:
        different = ", ".join(name for name, _, _ in conflicts.differences(decode(there.spec), dict(study.spec)))
        raise StudyNameError(
            "E140",
            f"study '{study.name}' is there already and asks something else: {different}",
            advice="give the other one a name of its own: --as NAME (of a whole database: --as OLD=NEW)",
        )
    if there is None:
        studies.create(connection, study.name, text)
    number = connection.execute(select(study_table.c.id).where(study_table.c.name == study.name)).scalar_one()
    _check_origin(connection, study.name, int(number), links)
    state = study.state if study.state in _RESTING else "paused"
    if there is None or (there.state in _RESTING and state in ("complete", "gaps")):
        connection.execute(study_table.update().where(study_table.c.id == number).values(state=state))
    return int(number)


def _check_origin(connection: Connection, name: str, number: int, links: Iterable[Belongs]) -> None:
    """Refuse to mix numbers of two machines or versions in one study."""
    chosen = select(link_table.c.key).where(link_table.c.study == number, link_table.c.kind == "origin")
    mine = set(connection.execute(chosen).scalars())
    theirs = {link.key for link in links if link.study == name and link.kind == "origin"}
    if mine and theirs and mine != theirs:
        raise InputError(
            "E142",
            f"study '{name}' is there already, and was computed under other conditions",
            because="model, text, machine or versions differ, and mixed numbers are not comparable",
            advice="give the other one a name of its own: --as NAME (of a whole database: --as OLD=NEW)",
        )


def _link_row(numbers: Mapping[str, int], link: Belongs) -> dict[str, Any]:
    if link.study not in numbers:
        raise ValueError(f"a link of study {ascii(link.study)[:60]}, which is not there")
    return {
        "study": numbers[link.study],
        "kind": check_text("kind", link.kind, 40),
        "key": check_text("key", link.key),
        "label": check_text("label", link.label, 500, empty=True),
        "position": check_integer("position", link.position),
    }


def _check_links(connection: Connection, links: Sequence[Belongs]) -> None:
    pairs = sorted({(link.kind, link.key) for link in links})
    for chunk in chunks(pairs):
        wanted, key = listed(connection, [list(pair) for pair in chunk])
        same = and_(value_table.c.kind == key[0].as_string(), value_table.c.key == key[1].as_string())
        chosen = select(value_table.c.kind, value_table.c.key)
        rows = connection.execute(chosen.join_from(wanted, value_table, same, isouter=True))
        there = {(kind, name) for kind, name in rows}
        lost = [pair for pair in chunk if pair not in there]
        if lost:
            raise InputError(
                "E304",
                f"{len(lost)} values that belong to a study are missing, first {lost[0][0]} '{lost[0][1][:12]}'",
                advice="write the bundle again where the study is whole; nothing was stored",
            )
