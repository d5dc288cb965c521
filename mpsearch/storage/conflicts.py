"""Two values for one key: written down, and said where they differ."""

from __future__ import annotations

import hashlib
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

from sqlalchemy import Connection, select

from mpsearch.errors import StorageError
from mpsearch.keys import canonical_json
from mpsearch.storage.place import hide
from mpsearch.storage.portable import insert_new, now
from mpsearch.storage.schema import conflict_table as table
from mpsearch.storage.text import decode

#: A refused value: its kind and key, and what was stored and what was offered as canonical JSON.
Refusal = tuple[str, str, str, str]
_MISSING = object()


@dataclass(frozen=True, slots=True)
class ConflictRow:
    """A second, different value that was offered for a key.

    Attributes:
        kind: kind of the value, or ``cell``.
        key: its key; for a cell the JSON list of scope, layer, format and batch.
        stored: the value that was there first and stays.
        offered: the value that was refused.
        created: when it was offered first, ISO 8601 in UTC.
    """

    kind: str
    key: str
    stored: Mapping[str, Any]
    offered: Mapping[str, Any]
    created: str


def record(connection: Connection, kind: str, key: str, stored: str, offered: str) -> None:
    """Write down a refused value, once."""
    record_all(connection, [(kind, key, stored, offered)])


def record_all(connection: Connection, refused: Sequence[Refusal]) -> None:
    """Write down refused values, each once: (kind, key, stored, offered)."""
    moment = now()
    names = ("kind", "key", "stored", "offered", "digest", "created")
    digests = [hashlib.sha256(offered.encode()).hexdigest() for *_, offered in refused]
    rows = [dict(zip(names, (*row, digest, moment), strict=True)) for row, digest in zip(refused, digests, strict=True)]
    insert_new(connection, table, rows)


def read(connection: Connection) -> list[ConflictRow]:
    """Return all refused values, oldest first."""
    columns = table.c
    rows = connection.execute(
        select(columns.kind, columns.key, columns.stored, columns.offered, columns.created).order_by(columns.id)
    )
    return [ConflictRow(kind, key, decode(a), decode(b), when) for kind, key, a, b, when in rows]


def error(what: str, stored: Mapping[str, Any], offered: Mapping[str, Any], more: int = 0) -> StorageError:
    """The error for a second, different value.

    Args:
        what: the kind and key of the value.
        stored: the value that stays.
        offered: the value that was refused.
        more: how many further keys of the same call are in conflict.
    """
    fields = "; ".join(f"{name} {old}, now {new}" for name, old, new in differences(stored, offered)[:4])
    further = f" ({more} more in the same call)" if more else ""
    return StorageError(
        "E521",
        f"two values for {what}: {fields}{further}",
        because="the same work gave two answers: this machine is not deterministic for it, or the code has changed",
        advice="the first value stays, and both are kept as a conflict; do the work again to see which one holds",
    )


def differences(stored: Mapping[str, Any], offered: Mapping[str, Any]) -> list[tuple[str, str, str]]:
    """Return (field, stored, offered) of every top-level field that differs, as short text without passwords.

    >>> differences({"a": 1, "b": 2}, {"a": 1, "b": 3.5})
    [('b', '2', '3.5')]
    """
    return [
        (ascii(name)[1:-1], _short(stored.get(name, _MISSING)), _short(offered.get(name, _MISSING)))
        for name in sorted({*stored, *offered})
        if _text(stored.get(name, _MISSING)) != _text(offered.get(name, _MISSING))
    ]


def _text(value: Any) -> str:
    return "not set" if value is _MISSING else canonical_json(value)


def _short(value: Any) -> str:
    text = hide(ascii(_text(value))[1:-1])
    return text if len(text) <= 60 else f"{text[:40]}…{text[-15:]}"
