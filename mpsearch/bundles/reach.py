"""What the studies of a bundle reach: all that a bundle may bring."""

from __future__ import annotations

import json
import re
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

from mpsearch.bundles.kinds import KINDS
from mpsearch.bundles.portion import Asked, Belongs, Refused
from mpsearch.errors import InputError
from mpsearch.records import ValueRow

#: Values are told by the digests in the bodies of those that name them.
_DIGEST = re.compile(r"[0-9a-f]{64}")


@dataclass(frozen=True)
class Reach:
    """The keys that studies name, directly or through values, and the scopes of their cells.

    Attributes:
        keys: of values.
        scopes: of cells.

    >>> reach = Reach.of([Asked("a", {}, "new")], [Belongs("a", "survey", "k", "", 0)], [("survey", "k", {})])
    >>> reach.value(ValueRow("survey", "other", {}))
    Traceback (most recent call last):
    ...
    mpsearch.errors.InputError: error[E304] survey 'other' belongs to no study of the bundle
    """

    keys: frozenset[str]
    scopes: frozenset[str]

    @classmethod
    def of(
        cls, studies: Sequence[Asked], links: Iterable[Belongs], values: Iterable[tuple[str, str, Mapping[str, Any]]]
    ) -> Reach:
        """Follow the links.

        Args:
            studies: of the bundle.
            links: of the bundle.
            values: kind, key and body of each value.

        Raises:
            InputError: no study, or a link of none of them or of a kind that is no study's (E304).
        """
        if not studies:
            raise InputError("E304", "a bundle without a study")
        names = {row.name for row in studies}
        wanted = set()
        for link in links:
            if link.study not in names or link.kind not in KINDS:
                raise InputError("E304", f"a link of {ascii(link.study)[:60]} to a value of kind {link.kind[:40]!a}")
            wanted.add(link.key)
        named: dict[str, set[str]] = {}
        scores = set()
        for kind, key, body in values:
            named.setdefault(key, set()).update(_DIGEST.findall(json.dumps(body)))
            if kind in ("scores", "score_unit"):
                scores.add(key)
        reached: set[str] = set()
        while wanted:
            reached |= wanted
            wanted = set().union(*(named.get(key, ()) for key in wanted)) - reached
        return cls(frozenset(reached), frozenset(scores & reached))

    def value(self, row: ValueRow) -> ValueRow:
        """Return a value; refuse one that no study reaches (E304)."""
        if row.key not in self.keys:
            raise _stray(f"{row.kind} '{row.key[:12]}'")
        return row

    def scope(self, scope: str) -> str:
        """Return the scope of cells; refuse one that no study reaches (E304)."""
        if scope not in self.scopes:
            raise _stray(f"scope '{scope[:12]}'")
        return scope

    def conflict(self, row: Refused) -> Refused:
        """Return a conflict; refuse one over something that no study reaches (E304)."""
        if row.kind == "cell":
            self.scope(row.key[2:].partition('"')[0])
        elif row.kind not in KINDS or row.key not in self.keys:
            raise _stray(f"a conflict over {row.kind[:40]!a}")
        return row


def _stray(what: str) -> InputError:
    return InputError("E304", f"{what} belongs to no study of the bundle")
