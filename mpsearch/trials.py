"""Plans that searchers ask to have measured, what was measured of them, and what a search found."""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

from mpsearch.front import Measurement
from mpsearch.plan import BitPlan
from mpsearch.problem import Problem


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


@dataclass(frozen=True)
class Searched:
    """What a search measured and found.

    Attributes:
        searcher: name of the searcher.
        settings: its settings.
        budgets: what every plan keeps.
        trials: what was measured, in the order in which it was asked for; losses in nats per token.
        tokens: evaluated tokens of each trial; samples, for a model that was given as a module.
        best: the trial that the searcher settled on.
        plan: its plan, which can be exported.
        problem: what was searched.
        note: what the searcher says of it.
        held_out: the start and the best plan, measured on the validation batches; None where one could not be, or where
            the search itself measured there.
    """

    searcher: str
    settings: Mapping[str, Any]
    budgets: tuple[str, ...]
    trials: tuple[Seen, ...]
    tokens: tuple[int, ...]
    best: Seen
    plan: BitPlan
    problem: Problem = field(repr=False, compare=False)
    note: str = ""
    held_out: tuple[Measurement, Measurement] | None = None

    @property
    def start(self) -> Seen:
        """The first trial that was measured on all batches."""
        return next(item for item in self.trials if not item.trial.batches)

    @property
    def history(self) -> list[tuple[int, float]]:
        """Evaluated tokens and the least loss on all batches by then, one pair for each time that it fell."""
        return history(self.trials, self.tokens)

    def to_json(self) -> dict[str, Any]:
        return {
            "searcher": self.searcher,
            "settings": dict(self.settings),
            "budgets": list(self.budgets),
            "trials": [
                {
                    "choice": list(item.trial.choice),
                    "batches": item.trial.batches,
                    "loss": item.loss if math.isfinite(item.loss) else None,
                    "spread": item.spread if math.isfinite(item.spread) else None,
                    "tokens": tokens,
                }
                for item, tokens in zip(self.trials, self.tokens, strict=True)
            ],
            "best": self.trials.index(self.best),
            "plan": self.plan.key,
            "note": self.note,
            "held_out": None if self.held_out is None else [_figures(item) for item in self.held_out],
        }


def _figures(measurement: Measurement) -> dict[str, Any]:
    spread = measurement.spread if math.isfinite(measurement.spread) else None
    return {"loss": measurement.loss, "spread": spread}


def history(trials: Sequence[Seen], tokens: Sequence[int]) -> list[tuple[int, float]]:
    """Return (tokens so far, least loss on all batches so far) each time that the loss fell.

    >>> trials = [Seen(Trial((0,)), 3.0), Seen(Trial((1,), 2), 1.0), Seen(Trial((1,)), 2.0)]
    >>> history(trials, [64, 8, 64])
    [(64, 3.0), (136, 2.0)]
    """
    found: list[tuple[int, float]] = []
    used, least = 0, math.inf
    for item, count in zip(trials, tokens, strict=True):
        used += count
        if not item.trial.batches and item.loss < least:
            least = item.loss
            found.append((used, least))
    return found
