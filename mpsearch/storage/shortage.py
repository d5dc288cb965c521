"""Which scores lost cells in a damaged file: their tables, which are stored as values, say how many there were."""

from __future__ import annotations

from collections import defaultdict
from collections.abc import Iterable, Mapping
from dataclasses import dataclass
from typing import Any

from mpsearch.storage.failures import UnreadableError
from mpsearch.storage.layouts import Row
from mpsearch.storage.text import decode

#: How the table says that a cell was computed; of others there need not be one.
_COMPUTED = ("ok", "non_finite", "not_observed")

Rows = Mapping[str, dict[Any, Row]]


@dataclass(frozen=True)
class Shortage:
    """What is missing of the cells that were found.

    Attributes:
        scopes: key of a scope -> how many cells it lacks; None where nothing tells how many there were.
        dropped: cells of batches of which a part was lost; they were taken out.
    """

    scopes: Mapping[str, int | None]
    dropped: int

    def of(self, links: Iterable[tuple[str, str]], values: Mapping[Any, Row]) -> str:
        """Say what a study lacks that has these links, as (kind, key); nothing if it is whole."""
        named = {_scope_of(values.get(link), link[1]) for link in links}
        lacking = [self.scopes[scope] for scope in sorted(named) if scope in self.scopes]
        known = sum(filter(None, lacking))
        unknown = f"perhaps cells of {lacking.count(None)} scopes" if None in lacking else ""
        return " and ".join(filter(None, [f"{known} of its cells" if known else "", unknown]))


def shortage(rows: Rows) -> Shortage:
    """Compare cells with the tables of their scores, and take out the batches that are not whole.

    The cells of a batch are stored in one transaction, so a study takes a batch for known when it finds one of them:
    the others would count as not offered.

    Args:
        rows: table -> key of a row -> row; cells have the numbers of their scopes.
    """
    tables = {}
    for (kind, key), row in rows["value"].items():
        if kind == "scores" and (body := _table(row)) is not None:
            tables[str(body["source"].get("scope", key))] = body
    found: dict[Any, dict[int, set[tuple[Any, Any]]]] = defaultdict(lambda: defaultdict(set))
    for number, layer, fmt, batch in rows["cell"]:
        found[number][batch].add((layer, fmt))
    short: dict[str, int | None] = {}
    dropped = 0
    for number, scope in ((row["id"], str(row["key"])) for row in rows["scope"].values()):
        batches = found[number]
        by_batch = any(batch >= 0 for batch in batches)
        wanted = _computed(tables[scope]) if scope in tables else None
        torn = [batch for batch, there in batches.items() if batch >= 0 and (wanted is None or wanted - there)]
        for batch in torn:
            dropped += len(batches[batch])
            for layer, fmt in batches.pop(batch):
                del rows["cell"][number, layer, fmt, batch]
        if wanted is None:
            short[scope] = None
        elif by_batch:
            short[scope] = len(wanted) * (int(tables[scope]["source"].get("batches", 1)) - len(batches))
        else:
            short[scope] = len(wanted - batches[-1])
    lost = {scope for scope in tables if scope not in short}
    short |= {scope: len(_computed(tables[scope])) for scope in lost}
    return Shortage({scope: lacks for scope, lacks in short.items() if lacks is None or lacks > 0}, dropped)


def _table(row: Row) -> dict[str, Any] | None:
    """The table of scores that a row holds, if it is one."""
    try:
        body = decode(str(row["body"]))
        _computed(body)
        int(body["source"].get("batches", 1))
    except (UnreadableError, LookupError, TypeError, ValueError, AttributeError):
        return None
    return body


def _computed(table: Mapping[str, Any]) -> set[tuple[str, str]]:
    """(layer, format) of the cells that a table was made of."""
    return {
        (layer, fmt)
        for layer, statuses in zip(table["layers"], table["status"], strict=True)
        for fmt, status in zip(table["formats"], statuses, strict=True)
        if status in _COMPUTED
    }


def _scope_of(value: Row | None, key: str) -> str:
    """The scope of linked scores, which with gaps stand under a key of their own."""
    body = _table(value) if value is not None and value["kind"] == "scores" else None
    return key if body is None else str(body["source"].get("scope", key))
