"""Plans that searchers ask to have measured, and what was measured of them."""

from __future__ import annotations

import math
from dataclasses import dataclass


@dataclass(frozen=True)
class Trial:
    """A plan to measure.

    Attributes:
        choice: column of each row of the problem.
        batches: how many of the validation batches to measure on, from the first; 0 for all.
    """

    choice: tuple[int, ...]
    batches: int = 0

    def __post_init__(self) -> None:
        object.__setattr__(self, "choice", tuple(int(column) for column in self.choice))


@dataclass(frozen=True)
class Seen:
    """What was measured of a trial.

    Attributes:
        trial: the trial.
        loss: measured loss; infinite where the model under the plan gives values that are not finite.
        spread: its standard error; NaN where unknown.
    """

    trial: Trial
    loss: float
    spread: float = math.nan
