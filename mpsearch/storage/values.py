"""JSON values under their content key."""

from __future__ import annotations

import hashlib
from collections.abc import Iterable, Mapping, Sequence, Set
from typing import Any

from sqlalchemy import Connection, and_, select

from mpsearch.errors import StorageError
from mpsearch.keys import canonical_json
from mpsearch.records import StoredPlan
from mpsearch.storage import compact, conflicts
from mpsearch.storage.checks import check_text
from mpsearch.storage.conflicts import Refusal
from mpsearch.storage.failures import UndoneError, UnreadableError
from mpsearch.storage.portable import chunks, insert_new, listed, now
from mpsearch.storage.schema import value_table as table
from mpsearch.storage.text import decode, encode

#: How often the parts of a plan are put back that somebody takes out at the same moment.
_TRIES = 10


def row(kind: str, key: str, body: Mapping[str, Any], volatile: Mapping[str, Any] | None) -> dict[str, Any]:
    """Return a value as the columns of its table, and as ``parts`` what it shares with others.

    Raises:
        InputError: a kind or key that is not printable, or text that is not text (E114).
        ValueError: NaN or infinity, or a part of plans under a key that is not that of its content.
    """
    what = f"{check_text('kind', kind, 40)} '{check_text('key', key)}'"
    changing = dict(volatile or {})
    text = encode(what, {name: item for name, item in body.items() if name not in changing})
    if kind == compact.PART and (changing or hashlib.sha256(text.encode()).hexdigest() != key):
        raise ValueError(f"{what}: a part of plans stands under the key of its content, and holds nothing else")
    packed = compact.pack(body, text) if kind == "plan" and not changing else None
    return {
        "kind": kind,
        "key": key,
        "body": packed.text if packed else text,
        "volatile": encode(what, changing) if changing else None,
        "created": now(),
        "parts": packed.parts if packed else {},
    }


def put_many(connection: Connection, rows: Sequence[dict[str, Any]]) -> StorageError | None:
    """Insert values; return the error to raise, after the commit, if a key holds another one.

    Args:
        connection: inside a transaction.
        rows: columns made by `row`.
    """
    refused = keep(connection, rows)
    if not refused:
        return None
    conflicts.record_all(connection, refused)
    kind, name, kept, offered = refused[0]
    return conflicts.error(f"{kind} '{name}'", decode(kept), decode(offered), more=len(refused) - 1)


def keep(connection: Connection, rows: Sequence[dict[str, Any]]) -> list[Refusal]:
    """Insert values that are new, leave the others as they are, and return those whose key holds another value.

    Args:
        connection: inside a transaction.
        rows: columns made by `row`.
    """
    parts = {key: text for row in rows for key, text in row["parts"].items()}
    if parts:
        _keep_parts(connection, parts)
    # One order for all writers: on a server two that insert the same keys in two orders would block each other.
    ordered = sorted(rows, key=lambda row: (row["kind"], row["key"]))
    if insert_new(connection, table, [{name: row[name] for name in table.c.keys()} for row in ordered]):  # noqa: SIM118
        return []
    stored = _bodies(connection, ordered)
    found = [(row, stored[row["kind"], row["key"]]) for row in ordered]
    other = [(row, kept) for row, kept in found if kept != row["body"]]
    # A plan may be stored whole and offered again in parts.
    known = parts | read_parts(connection, [kept for _, kept in other])
    try:
        texts = [(row, whole(kept, known), whole(row["body"], known)) for row, kept in other]
    except UnreadableError:
        # Who takes out the parts of a plan has taken out the plan before; else it is damaged.
        _bodies(connection, ordered)
        raise
    return [(row["kind"], row["key"], kept, offered) for row, kept, offered in texts if kept != offered]


def _bodies(connection: Connection, rows: Sequence[dict[str, Any]]) -> dict[tuple[str, str], str]:
    """Return what is stored under the keys of rows, all of which were there a moment before."""
    wanted, key = listed(connection, [[row["kind"], row["key"]] for row in rows])
    same = and_(table.c.kind == key[0].as_string(), table.c.key == key[1].as_string())
    statement = select(table.c.kind, table.c.key, table.c.body).join_from(wanted, table, same, isouter=True)
    stored = {(kind, name): body for kind, name, body in connection.execute(statement)}
    if any((row["kind"], row["key"]) not in stored for row in rows):
        raise _undone("values come and go while they are being stored")
    return stored


def _keep_parts(connection: Connection, parts: Mapping[str, str]) -> None:
    """Insert parts of plans that are new, and hold all of them until the end of the transaction."""
    columns = table.c
    of_plans = and_(columns.kind == compact.PART, columns.key.in_(sorted(parts)))
    # Who collects what is not needed waits for us, and then finds the plan.
    held = select(columns.key).where(of_plans).order_by(columns.key).with_for_update(read=True, key_share=True)
    for _ in range(_TRIES):
        there = set(connection.execute(held).scalars())
        new = [key for key in sorted(parts) if key not in there]
        if not new:
            return
        shape = {"kind": compact.PART, "volatile": None, "created": now()}
        insert_new(connection, table, [shape | {"key": key, "body": parts[key]} for key in new])
    raise _undone("what plans share comes and goes while a plan is being stored")


def _undone(message: str) -> UndoneError:
    return UndoneError(
        "E601",
        message,
        because="another program takes it out",
        advice="run the command again when the other one has ended",
    )


def read_parts(connection: Connection, texts: Iterable[str]) -> dict[str, str]:
    """Return the parts of those of the stored texts that are plans in parts: key -> text."""
    keys = sorted({key for text in texts if compact.is_compact(text) for key in compact.parts_of(text)})
    chosen = select(table.c.key, table.c.body).where(table.c.kind == compact.PART)
    found: dict[str, str] = {}
    for chunk in chunks(keys):
        found |= {row.key: row.body for row in connection.execute(chosen.where(table.c.key.in_(chunk)))}
    return found


def all_parts(connection: Connection) -> dict[str, str]:
    """Return the parts of all plans: key -> text."""
    chosen = select(table.c.key, table.c.body).where(table.c.kind == compact.PART)
    return {row.key: row.body for row in connection.execute(chosen)}


def named_parts(connection: Connection, without: Set[str] = frozenset()) -> set[str]:
    """Return the keys of the parts that some plan needs.

    Args:
        connection: inside a transaction.
        without: plans that do not count.
    """
    chosen = select(table.c.key, table.c.body).where(table.c.kind == "plan")
    rows = connection.execute(chosen)
    return {
        part for key, body in rows if key not in without and compact.is_compact(body) for part in compact.parts_of(body)
    }


def whole(text: str, parts: Mapping[str, str]) -> str:
    """Return a stored text as if it were stored whole.

    Raises:
        UnreadableError: a plan whose parts are not there.
    """
    return canonical_json(compact.expand(text, parts)) if compact.is_compact(text) else text


def opened(text: str, parts: Mapping[str, str]) -> dict[str, Any]:
    """Return the body behind a stored text.

    Raises:
        UnreadableError: it is none, or a plan whose parts are not there.
    """
    return compact.expand(text, parts) if compact.is_compact(text) else decode(text)


def get_many(connection: Connection, kind: str, keys: Sequence[str]) -> dict[str, dict[str, Any]]:
    """Return the values that are there, in the order of ``keys``.

    Args:
        connection: for plans one that reads at one moment, as their parts are read after them.
        kind: their kind.
        keys: their keys.

    Raises:
        UnreadableError: a value is none, or a plan whose parts are not there.
    """
    rows = _stored(connection, kind, keys)
    parts = read_parts(connection, [body for body, _ in rows.values()])
    found = {
        key: opened(body, parts) | (decode(volatile) if volatile else {}) for key, (body, volatile) in rows.items()
    }
    return {key: found[key] for key in keys if key in found}


def plan_rows(connection: Connection, keys: Sequence[str]) -> dict[str, StoredPlan]:
    """Return what is drawn of the plans that are there, in the order of ``keys``."""
    rows = _stored(connection, "plan", keys)
    return {key: compact.outline(rows[key][0]) for key in keys if key in rows}


def _stored(connection: Connection, kind: str, keys: Sequence[str]) -> dict[str, tuple[str, str | None]]:
    columns = table.c
    wanted, key_column = listed(connection, [[key] for key in keys])
    same = and_(columns.kind == kind, columns.key == key_column[0].as_string())
    statement = select(columns.key, columns.body, columns.volatile).join_from(wanted, table, same, isouter=True)
    return {key: (body, volatile) for key, body, volatile in connection.execute(statement) if key is not None}
