"""The first of some batches, for measurements that need not be exact."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any


class First(Sequence[Any]):
    """The first batches of a list, which still knows the whole of it.

    Args:
        whole: the batches.
        count: how many of them, at least 1; all when there are fewer.

    >>> list(First("abc", 2)), First("abc", 2).whole
    (['a', 'b'], 'abc')
    """

    def __init__(self, whole: Sequence[Any], count: int) -> None:
        self.whole = whole
        self._items = tuple(whole[i] for i in range(min(count, len(whole))))

    def __len__(self) -> int:
        return len(self._items)

    def __getitem__(self, index: Any) -> Any:
        return self._items[index]
