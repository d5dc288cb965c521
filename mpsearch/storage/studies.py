"""Studies, and which stored values belong to them."""

from __future__ import annotations

import shlex
from typing import Any

from sqlalchemy import Connection, select, update

from mpsearch.errors import StudyNameError, did_you_mean
from mpsearch.keys import content_key
from mpsearch.records import LinkRow, StudyRow
from mpsearch.storage.checks import shown
from mpsearch.storage.conflicts import differences
from mpsearch.storage.portable import insert_new, insert_or_set, now
from mpsearch.storage.schema import link_table, study_table
from mpsearch.storage.text import decode

_NAMES_SHOWN = 8
_COLUMNS = [study_table.c[name] for name in ("name", "spec", "key", "state", "created", "updated")]


def create(connection: Connection, name: str, spec: str) -> None:
    """Insert a study.

    Raises:
        StudyNameError: the name has another spec (E140).
    """
    asked = decode(spec)
    moment = now()
    row = {"name": name, "spec": spec, "key": content_key(asked), "state": "new", "created": moment, "updated": moment}
    insert_new(connection, study_table, [row])
    stored = connection.execute(select(study_table.c.spec).where(study_table.c.name == name)).scalar_one()
    if stored != spec:
        raise _other_settings(name, decode(stored), asked)


def _other_settings(name: str, stored: dict[str, Any], asked: dict[str, Any]) -> StudyNameError:
    fields = ", ".join(f"{field} {old} (you ask {new})" for field, old, new in differences(stored, asked))
    return StudyNameError(
        "E140",
        f"study '{name}' exists with {fields}",
        advice=f"`mpsearch resume {shlex.quote(name)}` continues it; another `--name` starts a new study",
    )


def read(connection: Connection, name: str, place: str) -> StudyRow:
    """Return a study.

    Raises:
        StudyNameError: no such study (E141).
    """
    row = connection.execute(select(*_COLUMNS).where(study_table.c.name == name)).one_or_none()
    if row is None:
        raise missing(connection, name, place)
    return _study(row)


def read_all(connection: Connection) -> list[StudyRow]:
    """Return all studies, newest first."""
    newest = select(*_COLUMNS).order_by(study_table.c.created.desc(), study_table.c.id.desc())
    return [_study(row) for row in connection.execute(newest)]


def set_state(connection: Connection, name: str, state: str, place: str) -> None:
    """Set where a study stands.

    Raises:
        StudyNameError: no such study (E141).
    """
    change = update(study_table).where(study_table.c.name == name).values(state=state, updated=now())
    if connection.execute(change).rowcount == 0:
        raise missing(connection, name, place)


def link(connection: Connection, study: str, kind: str, row: LinkRow, place: str) -> None:
    """Say that a stored value belongs to a study.

    Raises:
        StudyNameError: no such study (E141).
    """
    values = {"kind": kind, "key": row.key, "label": row.label, "position": row.position}
    insert_or_set(connection, link_table, {"study": number(connection, study, place)} | values, "position")


def links(connection: Connection, study: str, kind: str, place: str) -> list[LinkRow]:
    """Return the links of a study, ordered by position, key and label.

    Raises:
        StudyNameError: no such study (E141).
    """
    columns = link_table.c
    own = number(connection, study, place)
    rows = connection.execute(
        select(columns.key, columns.label, columns.position).where(columns.study == own, columns.kind == kind)
    ).all()
    return sorted((LinkRow(*row) for row in rows), key=lambda row: (row.position, row.key, row.label))


def _study(row: Any) -> StudyRow:
    name, spec, key, state, created, updated = row
    return StudyRow(name, decode(spec), key, state, created, updated)


def number(connection: Connection, name: str, place: str) -> int:
    """Return the number under which other tables know a study.

    Raises:
        StudyNameError: no such study (E141).
    """
    found = connection.execute(select(study_table.c.id).where(study_table.c.name == name)).scalar_one_or_none()
    if found is None:
        raise missing(connection, name, place)
    return int(found)


def missing(connection: Connection, name: str, place: str) -> StudyNameError:
    """The error for a study that is not there; it names those that are."""
    known = [shown(str(other)) for other in connection.execute(select(study_table.c.name)).scalars()]
    listed = ", ".join(sorted(known)[:_NAMES_SHOWN])
    more = f" and {len(known) - _NAMES_SHOWN} more" if len(known) > _NAMES_SHOWN else ""
    has = f"it has: {listed}{more}" if known else "it has no studies"
    return StudyNameError("E141", f"no study '{name}' in {place}{did_you_mean(name, known)}; {has}")
