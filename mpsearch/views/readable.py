"""Plans of a study that can be read; those that are damaged are left out, and told of."""

from __future__ import annotations

from collections import Counter
from collections.abc import Sequence
from typing import Any

from mpsearch.errors import MpsearchError, StorageError
from mpsearch.format import Format
from mpsearch.layer import Layers
from mpsearch.ports import Store
from mpsearch.records import StoredPlan


def readable_plans(
    store: Store, keys: Sequence[str], layers: Layers | None = None
) -> tuple[dict[str, StoredPlan], list[str]]:
    """Return what is drawn of those plans, and a sentence where some of them cannot be drawn.

    Args:
        store: where they are.
        keys: of the plans.
        layers: of the model; without them the length of most plans counts.

    Raises:
        StorageError: not one of them can be read (E603).
    """
    found, damaged = _read(store, keys)
    lengths = Counter(len(plan.choice) for plan in found.values())
    count = len(layers) if layers is not None else max(lengths, key=lengths.__getitem__, default=0)
    known = {name: _is_format(name) for plan in found.values() for name in plan.formats}
    fine = {
        key: plan
        for key, plan in found.items()
        if len(plan.choice) == count and all(known[name] for name in plan.formats)
    }
    damaged += len(found) - len(fine)
    if not damaged:
        return fine, []
    many = "1 plan is" if damaged == 1 else f"{damaged} plans are"
    return fine, [f"{many} left out: damaged in the database, or in a format that is not known here"]


def readable_body(store: Store, key: str) -> dict[str, Any] | None:
    """Return a plan's file; None where what the plan shares with others is damaged."""
    try:
        body = store.get("plan", key)
    except StorageError as error:
        if error.code != "E603":
            raise
        return None
    return None if body is None else dict(body)


def _read(store: Store, keys: Sequence[str]) -> tuple[dict[str, StoredPlan], int]:
    """Read all at once; one by one where one of them is damaged."""
    try:
        return store.plan_rows(keys), 0
    except StorageError as error:
        if error.code != "E603":
            raise
        found: dict[str, StoredPlan] = {}
        damaged = 0
        for key in dict.fromkeys(keys):
            try:
                found |= store.plan_rows([key])
            except StorageError as wrong:
                if wrong.code != "E603":
                    raise
                damaged += 1
        if not found:
            raise error from None
        return found, damaged


def _is_format(name: str) -> bool:
    try:
        Format.parse(name)
    except MpsearchError:
        return False
    return True
