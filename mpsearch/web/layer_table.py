"""The chosen plan layer by layer, with the loss that was predicted of each."""

from __future__ import annotations

import math
from collections.abc import Iterable
from dataclasses import dataclass

import numpy as np

from mpsearch.format import Format
from mpsearch.layer import Layer
from mpsearch.plan import BitPlan
from mpsearch.tables import SensitivityTable
from mpsearch.web.amounts import number, with_spread
from mpsearch.web.markup import Html
from mpsearch.web.table import Column, Row, data_table


@dataclass(frozen=True, slots=True)
class Prediction:
    """Predicted loss and its standard error; ``None`` where a format was not scored."""

    loss: float | None
    spread: float | None

    @classmethod
    def sum(cls, parts: Iterable[Prediction]) -> Prediction:
        """Add predictions up, their errors as if independent; not scored when one of them is not.

        >>> Prediction.sum([Prediction(1.0, 3.0), Prediction(2.0, 4.0)])
        Prediction(loss=3.0, spread=5.0)
        """
        losses, spreads = [], []
        for part in parts:
            if part.loss is None:
                return cls(None, None)
            losses.append(part.loss)
            spreads.append(math.nan if part.spread is None else part.spread)
        spread = math.sqrt(math.fsum(s * s for s in spreads))
        return cls(math.fsum(losses), spread if math.isfinite(spread) else None)

    @property
    def text(self) -> str:
        """The prediction for people, without its unit."""
        return "not scored" if self.loss is None else with_spread(self.loss, self.spread)


def predictions(plan: BitPlan, scores: SensitivityTable) -> dict[str, Prediction]:
    """Look up the score of each decision in the format that a plan gives it."""
    rows = {name: i for i, name in enumerate(scores.layers)}
    columns = {name: i for i, name in enumerate(scores.formats)}
    found = {}
    for decision in plan.layers.decisions:
        row, column = rows.get(decision.name), columns.get(str(plan.formats[decision.layers[0].name]))
        cell = None if row is None or column is None else (row, column)
        scored = cell is not None and bool(np.isfinite(scores.value[cell]))
        loss, spread = (float(scores.value[cell]), float(scores.spread[cell])) if scored else (None, None)
        found[decision.name] = Prediction(loss, spread if spread is not None and math.isfinite(spread) else None)
    return found


def exactly(plan: BitPlan) -> str:
    """How bytes of single layers are known, and where they are counted if the plan's total is counted elsewhere."""
    return f"exact, {plan.counted_in}" if plan.counted_in else "exact"


def layer_table(plan: BitPlan, scores: SensitivityTable) -> Html:
    """List every layer of a plan: format, stored bits and bytes, predicted loss."""
    exact = exactly(plan)
    columns = (
        Column("layer", numeric=False),
        Column("format", numeric=False),
        Column("bits per weight", exact),
        Column("bytes", exact),
        Column("loss ± standard error", f"predicted, {scores.unit}"),
    )
    predicted = predictions(plan, scores)
    rows = (_row(layer, plan.formats[layer.name], predicted[layer.tie or layer.name]) for layer in plan.layers)
    return data_table("layers", columns, rows)


def _row(layer: Layer, fmt: Format, predicted: Prediction) -> Row:
    bits = float(fmt.effective_bits(layer))
    loss = predicted.text if predicted.loss is None else number(predicted.loss, predicted.text)
    count = fmt.bytes(layer)
    return Row((layer.name, str(fmt), number(bits, f"{bits:.3f}"), number(count, f"{count:,}"), loss))
