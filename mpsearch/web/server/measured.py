"""Measured plans of a study, without reading every plan again for each answer."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import replace
from typing import Any

from mpsearch.front import Measurement
from mpsearch.keys import content_key

#: Plans whose costs are kept in memory.
_KEPT = 50_000


class Measured:
    """The same as `mpsearch.stored_study.StoredStudy.measurements`, for many questions.

    A plan of a key never changes, so what it costs is read once.
    """

    def __init__(self, store: Any) -> None:
        """Set up; nothing is read yet."""
        self._store = store
        self._known: dict[str, tuple[str, Mapping[str, float]]] = {}

    def of(self, study: str) -> list[Measurement]:
        """All measured plans of a study, the one for its own budgets first.

        Raises:
            StorageError: no such study (E141).
        """
        links = self._store.links(study, "measurement")
        bodies = self._store.get_many("measurement", [link.key for link in links])
        found = [Measurement.from_json({**bodies[x.key], "label": x.label}) for x in links if x.key in bodies]
        # Losses are shared with other studies of the same plan; what it costs is this study's own.
        costs = dict(self._costs([link.key for link in self._store.links(study, "plan")]) if found else ())
        return [replace(item, cost=costs.get(item.plan, item.cost)) for item in found]

    def _costs(self, keys: Sequence[str]) -> list[tuple[str, Mapping[str, float]]]:
        known = dict(self._known)
        missing = [key for key in keys if key not in known]
        for key, body in self._store.get_many("plan", missing).items() if missing else ():
            formats = {tensor["layer"]: tensor["format"] for tensor in body["tensors"]}
            known[key] = content_key([body["model"].get("digest", ""), formats]), body["predicted"]["cost"]
        # Replaced whole: other threads read it.
        self._known = known if len(known) <= _KEPT else {}
        return [known[key] for key in keys if key in known]
