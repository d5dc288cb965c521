"""Whole studies out of a database and into another one."""

from __future__ import annotations

import re
from collections.abc import Iterable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from itertools import islice
from typing import TYPE_CHECKING, Any

from sqlalchemy import BigInteger, Connection, and_, cast, func, select

from mpsearch.bundles.portion import Asked, Belongs, Copied, Portion, Refused
from mpsearch.errors import InputError, StorageError
from mpsearch.keys import canonical_json
from mpsearch.records import CellRow, ValueRow
from mpsearch.storage import cells, conflicts, studies
from mpsearch.storage.checks import cell_values, check_integer, check_integers, check_text
from mpsearch.storage.portable import insert_new, listed, now
from mpsearch.storage.schema import STUDY_STATES, cell_table, link_table, study_table, value_table
from mpsearch.storage.text import decode, encode

if TYPE_CHECKING:
    from mpsearch.storage.store import SqlStore

#: Values and cells are told by the digests in the bodies of those that name them.
_DIGEST = re.compile(r"[0-9a-f]{64}")
_CHUNK = 2000
#: States that nobody works in; a study that was being worked on stands still in its copy.
_RESTING = ("new", "complete", "gaps", "failed", "paused", "cancelled")
_COMPARED = ("status", "value", "spread")

_Conflict = tuple[str, str, str, str]


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
        with self._store.reading() as connection:
            if connection.dialect.name == "postgresql":
                # Else each statement would see another moment.
                connection.exec_driver_sql("SET TRANSACTION ISOLATION LEVEL REPEATABLE READ")
            yield _everything(connection) if name is None else _one(connection, name)

    def write(self, portion: Portion) -> Copied:
        """Take over a portion in one transaction: all of it, or nothing.

        Raises:
            StorageError: a study of the same name asks something else (E140), or other values for the same keys (E521;
                they are then in `SqlStore.conflicts`).
            InputError: a study of the same name has numbers of another machine or version (E142), a name that is not
                printable (E114), a number outside 64 bits (E113), a link to nothing (E304).
            ValueError: NaN, or a status that does not fit its value.
        """
        values = [_value_row(value) for value in portion.values]
        found: list[_Conflict] = []
        try:
            with self._store.writing() as connection:
                before = _counts(connection)
                self._write(connection, portion, values, found)
                if found:
                    raise _DifferentError
                after = _counts(connection)
        except _DifferentError:
            with self._store.writing() as connection:
                for conflict in found:
                    conflicts.record(connection, *conflict)
            kind, key, stored, offered = found[0]
            raise conflicts.error(
                f"{kind} '{key[:80]}'", decode(stored), decode(offered), more=len(found) - 1
            ) from None
        names = tuple(study.name for study in portion.studies)
        return Copied(names, after[0] - before[0], after[1] - before[1])

    def _write(
        self, connection: Connection, portion: Portion, values: Sequence[dict[str, Any]], found: list[_Conflict]
    ) -> None:
        numbers = {study.name: _study(connection, study, portion.links) for study in portion.studies}
        for chunk in _chunks(values):
            insert_new(connection, value_table, chunk)
            found += _other_values(connection, chunk)
        for chunk in _chunks(cell_values(check_text("scope", scope), cell) for scope, cell in portion.cells):
            insert_new(connection, cell_table, chunk)
            found += _other_cells(connection, chunk)
        for chunk in _chunks(_link_row(numbers, link) for link in portion.links):
            insert_new(connection, link_table, chunk)
        _check_links(connection, portion.links)
        for refused in portion.conflicts:
            check_text("kind", refused.kind, 40)
            texts = [encode("conflict", side) for side in (refused.stored, refused.offered)]
            conflicts.record(connection, refused.kind, check_text("key", refused.key, 2000), *texts)


class _DifferentError(Exception):
    """Ends the transaction, so that nothing of the copy stays."""


def _chunks(rows: Iterable[Any]) -> Iterator[list[Any]]:
    left = iter(rows)
    while chunk := list(islice(left, _CHUNK)):
        yield chunk


def _counts(connection: Connection) -> tuple[int, int]:
    count = [select(func.count()).select_from(table) for table in (value_table, cell_table)]
    return int(connection.execute(count[0]).scalar_one()), int(connection.execute(count[1]).scalar_one())


def _value_row(value: ValueRow) -> dict[str, Any]:
    check_text("kind", value.kind, 40)
    what = f"{value.kind} '{check_text('key', value.key)}'"
    changing = dict(value.volatile or {})
    body = encode(what, {name: item for name, item in value.body.items() if name not in changing})
    extra = encode(what, changing) if changing else None
    return {"kind": value.kind, "key": value.key, "body": body, "volatile": extra, "created": now()}


def _other_values(connection: Connection, rows: Sequence[Mapping[str, Any]]) -> Iterator[_Conflict]:
    wanted, key = listed(connection, [[row["kind"], row["key"]] for row in rows])
    same = and_(value_table.c.kind == key[0].as_string(), value_table.c.key == key[1].as_string())
    columns = value_table.c
    statement = select(columns.kind, columns.key, columns.body).join_from(wanted, value_table, same, isouter=True)
    stored = {(kind, name): body for kind, name, body in connection.execute(statement)}
    for row in rows:
        kept = stored[row["kind"], row["key"]]
        if kept != row["body"]:
            yield row["kind"], row["key"], kept, row["body"]


def _other_cells(connection: Connection, rows: Sequence[Mapping[str, Any]]) -> Iterator[_Conflict]:
    names = ("scope", "layer", "format", "batch")
    wanted, key = listed(connection, [[row[name] for name in names] for row in rows])
    columns = cell_table.c
    same = and_(
        *(columns[name] == key[i].as_string() for i, name in enumerate(names[:3])),
        columns.batch == cast(key[3].as_string(), BigInteger),
    )
    chosen = [columns[name] for name in names + _COMPARED]
    found = connection.execute(select(*chosen).join_from(wanted, cell_table, same, isouter=True))
    stored = {tuple(row[:4]): dict(zip(_COMPARED, row[4:], strict=True)) for row in found}
    for row in rows:
        place = tuple(row[name] for name in names)
        kept, offered = stored[place], {name: row[name] for name in _COMPARED}
        if kept != offered:
            yield "cell", canonical_json(list(place)), canonical_json(kept), canonical_json(offered)


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
        raise StorageError(
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
    for chunk in _chunks(pairs):
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


def _one(connection: Connection, name: str) -> Portion:
    row = connection.execute(
        select(study_table.c.id, study_table.c.spec, study_table.c.state).where(study_table.c.name == name)
    ).one()
    columns = link_table.c
    rows = connection.execute(
        select(columns.kind, columns.key, columns.label, columns.position).where(columns.study == row.id)
    )
    links = [Belongs(name, *link) for link in rows]
    found = reached(connection, (link.key for link in links))
    values = {(kind, key): (body, volatile) for kind, key, body, volatile in found}
    links = sorted(
        (link for link in links if (link.kind, link.key) in values),
        key=lambda link: (link.kind, link.position, link.key, link.label),
    )
    scopes = sorted({key for kind, key in values if kind in ("scores", "score_unit")})
    kept = [_kept(kind, key, *texts) for (kind, key), texts in sorted(values.items())]
    return Portion(
        [Asked(name, decode(row.spec), row.state)],
        links,
        kept,
        _cells_of(connection, scopes),
        _conflicts_of(connection, set(values), set(scopes)),
    )


def reached(connection: Connection, keys: Iterable[str]) -> Iterator[tuple[str, str, str, str | None]]:
    """Go through values and all that they name, however far: kind, key, and body and volatile fields as stored text.

    A value names another one by its key, and shares it with what else is known of the same work.

    Args:
        connection: inside a transaction.
        keys: where to start.
    """
    every_kind = connection.execute(select(value_table.c.kind).distinct()).scalars().all()
    asked: set[str] = set()
    wanted = set(keys)
    while new := wanted - asked:
        asked |= new
        wanted = set()
        for chunk in _chunks(sorted(new)):
            for kind, key, body, volatile in _with_keys(connection, every_kind, chunk):
                wanted |= set(_DIGEST.findall(body))
                yield kind, key, body, volatile


def _with_keys(connection: Connection, every_kind: Sequence[str], keys: Sequence[str]) -> Iterator[Any]:
    columns = value_table.c
    for kind in every_kind:
        wanted, key = listed(connection, [[name] for name in keys])
        same = and_(columns.kind == kind, columns.key == key[0].as_string())
        chosen = select(columns.kind, columns.key, columns.body, columns.volatile)
        for row in connection.execute(chosen.join_from(wanted, value_table, same, isouter=True)):
            if row[0] is not None:
                yield row


def _kept(kind: str, key: str, body: str, volatile: str | None) -> ValueRow:
    return ValueRow(kind, key, decode(body), decode(volatile) if volatile else None)


def _cells_of(connection: Connection, scopes: Iterable[str]) -> Iterator[tuple[str, CellRow]]:
    for scope in scopes:
        for cell in cells.read(connection, scope):
            yield scope, cell


def _conflicts_of(connection: Connection, values: set[tuple[str, str]], scopes: set[str]) -> Iterator[Refused]:
    for row in conflicts.read(connection):
        scope = row.key[2:].partition('"')[0] if row.kind == "cell" else ""
        if (row.kind, row.key) in values or scope in scopes:
            yield Refused(row.kind, row.key, row.stored, row.offered)


def _everything(connection: Connection) -> Portion:
    names: dict[int, str] = {}
    asked = []
    for number, name, spec, state in connection.execute(
        select(study_table.c.id, study_table.c.name, study_table.c.spec, study_table.c.state)
    ):
        names[number] = name
        asked.append(Asked(name, decode(spec), state))
    columns = link_table.c
    rows = connection.execute(select(columns.study, columns.kind, columns.key, columns.label, columns.position))
    there = {(kind, key) for kind, key in connection.execute(select(value_table.c.kind, value_table.c.key))}
    links = [Belongs(names[study], *rest) for study, *rest in rows if study in names]
    links = [link for link in links if (link.kind, link.key) in there]
    chosen = select(value_table.c.kind, value_table.c.key, value_table.c.body, value_table.c.volatile)
    values = (_kept(*row) for row in connection.execute(chosen.order_by(value_table.c.kind, value_table.c.key)))
    scopes = sorted(connection.execute(select(cell_table.c.scope).distinct()).scalars())
    refused = (Refused(row.kind, row.key, row.stored, row.offered) for row in conflicts.read(connection))
    return Portion(asked, links, values, _cells_of(connection, scopes), refused)
