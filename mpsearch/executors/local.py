"""Workers of this machine: one in the driver's process, more in processes of their own."""

from __future__ import annotations

from mpsearch.executors.inline import Inline
from mpsearch.executors.pool import Pool


def local(workers: int = 1) -> Inline | Pool:
    """Return the executor for a number of workers.

    >>> local(1).inside, local(2).inside
    (True, False)
    """
    return Inline() if workers == 1 else Pool(workers)
