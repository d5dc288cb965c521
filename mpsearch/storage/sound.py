"""Is a row that was found in a damaged file what mpsearch wrote?"""

from __future__ import annotations

import hashlib
import re
from collections.abc import Callable, Mapping
from typing import Any

from mpsearch.errors import MpsearchError
from mpsearch.keys import content_key
from mpsearch.records import CellRow
from mpsearch.storage import cells, compact
from mpsearch.storage.checks import cell_values, check_text
from mpsearch.storage.failures import UnreadableError
from mpsearch.storage.inspecting import KeyOf
from mpsearch.storage.layouts import Row
from mpsearch.storage.schema import STUDY_STATES
from mpsearch.storage.text import decode, encode

_TIME = re.compile(r"\d{4}-\d\d-\d\dT\d\d:\d\d:\d\d\.\d{6}\+00:00")
_FAULTS = (
    *(MpsearchError, UnreadableError, ValueError, TypeError, KeyError),
    *(AttributeError, IndexError, OverflowError),
)


class Sound:
    """Checks rows as if each were put anew.

    Args:
        key_of: the key that a value of a kind must stand under; None where that cannot be told.
    """

    def __init__(self, key_of: KeyOf) -> None:
        self._key_of = key_of
        self._checks = _checks(key_of)

    def plan(self, row: Row, parts: Mapping[str, str]) -> bool:
        """Whether a row of a plan is sound with the parts that it names."""
        try:
            body = compact.checked(str(row["body"]), parts)
            return self._key_of("plan", body) in (None, row["key"])
        except _FAULTS:
            return False

    def __call__(self, table: str, row: Row) -> bool:
        """Whether a row of a table is sound."""
        try:
            return self._checks.get(table, _printable)(row)
        except _FAULTS:
            return False


def _checks(key_of: KeyOf) -> dict[str, Callable[[Row], bool]]:
    def value(row: Row) -> bool:
        kind, key = check_text("kind", str(row["kind"]), 40), check_text("key", str(row["key"]))
        if row["volatile"] is not None:
            decode(row["volatile"])
        if kind == "plan" and compact.is_compact(str(row["body"])):
            # Its parts may be found later.
            return bool(compact.parts_of(str(row["body"]))) and _is_time(row["created"])
        body = decode(row["body"])
        made = content_key(body) if kind == compact.PART else key_of(kind, body)
        return encode("value", body) == row["body"] and made in (None, key) and _is_time(row["created"])

    return {
        "value": value,
        "scope": _scope,
        "cell": _cell,
        "study": _study,
        "link": _link,
        "conflict": _conflict,
        "task": _task,
    }


def _is_time(text: Any) -> bool:
    return bool(_TIME.fullmatch(str(text)))


def _scope(row: Row) -> bool:
    mark = cells.mark(check_text("scope", str(row["key"])))
    return isinstance(row["id"], int) and row["id"] % (1 << cells.MARK_BITS) == mark


def _cell(row: Row) -> bool:
    # Schema 1 has the key of the scope here, later ones its number.
    scope = check_text("scope", row["scope"]) if isinstance(row["scope"], str) else ""
    cell_values(scope, CellRow(**{name: row[name] for name in CellRow._fields}))  # type: ignore[arg-type]
    return True


def _study(row: Row) -> bool:
    check_text("study name", str(row["name"]))
    fine = row["state"] in STUDY_STATES and _is_time(row["created"]) and _is_time(row["updated"])
    return fine and content_key(decode(row["spec"])) == row["key"]


def _link(row: Row) -> bool:
    check_text("kind", str(row["kind"]), 40)
    check_text("key", str(row["key"]))
    check_text("label", str(row["label"]), 500, empty=True)
    return True


def _conflict(row: Row) -> bool:
    decode(row["stored"]), decode(row["offered"])
    return hashlib.sha256(str(row["offered"]).encode()).hexdigest() == row["digest"] and _is_time(row["created"])


def _task(row: Row) -> bool:
    decode(row["body"])
    return len(str(row["key"])) <= 64


def _printable(row: Row) -> bool:
    return all("\0" not in value for value in row.values() if isinstance(value, str))
