"""What every store must do. Subclass `StoreSuite`, give it a store, and run it with pytest."""

from __future__ import annotations

from collections.abc import Iterator
from typing import TYPE_CHECKING

import pytest

from mpsearch.testing.controls import ControlSuite
from mpsearch.testing.queues import QueueSuite
from mpsearch.testing.studies import StudySuite
from mpsearch.testing.values import ValueSuite

if TYPE_CHECKING:
    from mpsearch.storage.store import SqlStore


class StoreSuite(ValueSuite, StudySuite, QueueSuite, ControlSuite):
    """The behaviour of a store.

    A subclass overrides the fixture `store` and the method `reopen`.
    """

    @pytest.fixture
    def store(self) -> Iterator[SqlStore]:
        """An open store with nothing in it, closed afterwards."""
        raise NotImplementedError

    def reopen(self, store: SqlStore) -> SqlStore:
        """Open the database of a store a second time; the caller closes it."""
        raise NotImplementedError
