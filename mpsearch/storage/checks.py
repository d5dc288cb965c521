"""What may go into the database. Every database then takes the same values and refuses none by itself."""

from __future__ import annotations

import math
import operator
from collections.abc import Mapping
from typing import Any

from mpsearch.errors import InputError
from mpsearch.records import CellRow
from mpsearch.storage.schema import CELL_STATUSES

#: A reason is a message, not a log.
REASON_LENGTH = 2000


def check_text(what: str, text: str, limit: int = 200, *, empty: bool = False) -> str:
    """Return the text if it is printable and short enough.

    SQLite would store a NUL character where PostgreSQL refuses it, and a terminal obeys control characters.

    Raises:
        InputError: too long, empty, or a character that is not printable (E114).

    >>> check_text("study name", "a b")
    'a b'
    """
    if text.isprintable() and (0 if empty else 1) <= len(text) <= limit:
        return str(text)
    allowed = f"{what.rpartition(' ')[2]}s are {0 if empty else 1} to {limit} printable characters"
    for position, character in enumerate(text, 1):
        if not character.isprintable():
            raise InputError("E114", f"{what}: character {position} is U+{ord(character):04X}; {allowed}")
    raise InputError("E114", f"{what}: {len(text)} characters; {allowed}")


def shown(text: str) -> str:
    """Return text that a terminal only shows, even if it comes from somebody else's database."""
    return text if text.isprintable() else ascii(text)[1:-1]


def check_integer(what: str, value: Any) -> int:
    """Return the value as an integer that a database can hold.

    Raises:
        InputError: outside 64 bits (E113).
        TypeError: not an integer.

    >>> check_integer("seed", 7)
    7
    """
    number = operator.index(value)
    if not -(2**63) <= number < 2**63:
        raise InputError("E113", f"{what}: {number} does not fit in 64 bits")
    return number


def check_integers(what: str, value: Any) -> None:
    """Check every integer of nested dicts and lists.

    Raises:
        InputError: one is outside 64 bits (E113); the message says where it stands.
    """
    if isinstance(value, Mapping):
        for name, item in value.items():
            check_integers(f"{what}.{name}" if what else str(name), item)
    elif isinstance(value, (list, tuple)):
        for index, item in enumerate(value):
            check_integers(f"{what}[{index}]", item)
    elif isinstance(value, int):
        check_integer(what, value)


def cell_values(scope: str, row: CellRow) -> dict[str, str | int | float | None]:
    """Return a cell as the columns of its table.

    A spread that is not finite counts as unknown. Minus zero becomes zero, because SQLite keeps no sign there.

    Raises:
        ValueError: a value that is not finite, an unknown status, a status that does not fit the value,
            a negative number of samples, or seconds that are not finite.
        InputError: a name that is not printable (E114), a number outside 64 bits (E113).
    """
    place = f"cell of layer {row.layer!a} in format {row.format!a}"
    if row.status not in CELL_STATUSES:
        raise ValueError(f"{place}: status is {row.status!a}; there is {', '.join(CELL_STATUSES)}")
    if (row.status == "ok") != (row.value is not None):
        raise ValueError(f"{place}: has status '{row.status}' and value {row.value}; only 'ok' has a value")
    if row.value is not None and not math.isfinite(row.value):
        raise ValueError(f"{place}: value is {row.value}; store it with status 'non_finite' and no value")
    if row.batch < -1 or row.samples < 0:
        raise ValueError(f"{place}: batch is {row.batch}, samples is {row.samples}; expected -1 or more, 0 or more")
    if not math.isfinite(row.seconds):
        raise ValueError(f"{place}: seconds is {row.seconds}; expected a finite number")
    spread = row.spread if row.spread is not None and math.isfinite(row.spread) else None
    return {
        "scope": scope,
        "layer": check_text("layer name", row.layer, 500),
        "format": check_text("format name", row.format),
        "batch": check_integer("batch", row.batch),
        "status": row.status,
        "value": None if row.value is None else float(row.value) + 0.0,
        "spread": None if spread is None else float(spread) + 0.0,
        "samples": check_integer("samples", row.samples),
        "reason": plain(row.reason),
        "seconds": float(row.seconds) + 0.0,
    }


def plain(text: str) -> str:
    r"""Return a reason that any database takes, whatever it is: a failure must not fail to be recorded.

    >>> plain("a\0b")
    'a\ufffdb'
    """
    return text[:REASON_LENGTH].replace("\0", "\ufffd").encode("utf-8", "replace").decode()
