"""One study, or everything, read out of a database with all that belongs to it."""

from __future__ import annotations

import re
from collections.abc import Iterable, Iterator, Mapping, Sequence
from typing import Any

from sqlalchemy import Connection, and_, select

from mpsearch.bundles.portion import Asked, Belongs, Portion, Refused
from mpsearch.records import CellRow, ValueRow
from mpsearch.storage import cells, conflicts, values
from mpsearch.storage.compact import PART
from mpsearch.storage.portable import chunks, listed
from mpsearch.storage.schema import link_table, scope_table, study_table, value_table
from mpsearch.storage.text import decode

#: Values and cells are told by the digests in the bodies of those that name them.
_DIGEST = re.compile(r"[0-9a-f]{64}")


def one(connection: Connection, name: str) -> Portion:
    """Return a study that is there, with what it names, directly or through others."""
    row = connection.execute(
        select(study_table.c.id, study_table.c.spec, study_table.c.state).where(study_table.c.name == name)
    ).one()
    columns = link_table.c
    rows = connection.execute(
        select(columns.kind, columns.key, columns.label, columns.position).where(columns.study == row.id)
    )
    links = [Belongs(name, *link) for link in rows]
    found = reached(connection, (link.key for link in links))
    stored = {(kind, key): (body, volatile) for kind, key, body, volatile in found}
    parts = {key: body for (kind, key), (body, _) in stored.items() if kind == PART}
    links = sorted(
        (link for link in links if (link.kind, link.key) in stored),
        key=lambda link: (link.kind, link.position, link.key, link.label),
    )
    scopes = sorted({key for kind, key in stored if kind in ("scores", "score_unit")})
    # Plans leave the database whole.
    kept = [_kept(parts, kind, key, *texts) for (kind, key), texts in sorted(stored.items()) if kind != PART]
    return Portion(
        [Asked(name, decode(row.spec), row.state)],
        links,
        kept,
        _cells_of(connection, scopes),
        _conflicts_of(connection, set(stored), set(scopes)),
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
        for chunk in chunks(sorted(new)):
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


def _kept(parts: Mapping[str, str], kind: str, key: str, body: str, volatile: str | None) -> ValueRow:
    return ValueRow(kind, key, values.opened(body, parts), decode(volatile) if volatile else None)


def _cells_of(connection: Connection, scopes: Iterable[str]) -> Iterator[tuple[str, CellRow]]:
    for scope in scopes:
        for cell in cells.read(connection, scope):
            yield scope, cell


def _conflicts_of(connection: Connection, kept: set[tuple[str, str]], scopes: set[str]) -> Iterator[Refused]:
    for row in conflicts.read(connection):
        scope = row.key[2:].partition('"')[0] if row.kind == "cell" else ""
        if (row.kind, row.key) in kept or scope in scopes:
            yield Refused(row.kind, row.key, row.stored, row.offered)


def everything(connection: Connection) -> Portion:
    """Return all studies, values and cells, and all second values that were refused."""
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
    parts = values.all_parts(connection)
    whole = chosen.where(value_table.c.kind != PART).order_by(value_table.c.kind, value_table.c.key)
    kept = (_kept(parts, *row) for row in connection.execute(whole))
    scopes = sorted(connection.execute(select(scope_table.c.key)).scalars())
    refused = (Refused(row.kind, row.key, row.stored, row.offered) for row in conflicts.read(connection))
    return Portion(asked, links, kept, _cells_of(connection, scopes), refused)
