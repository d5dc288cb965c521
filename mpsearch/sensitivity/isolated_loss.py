"""Isolated loss: what one decision alone does to the model's own loss."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any, ClassVar, Literal

from mpsearch.errors import InputError
from mpsearch.format import Format
from mpsearch.formats.kv_cache import KvCache
from mpsearch.layer import Decision, Layer, decisions
from mpsearch.model.apply import Change
from mpsearch.model.model import Model
from mpsearch.sensitivity.assemble import Cell, build_table, mean_cell, offered
from mpsearch.sensitivity.harm import Harm, called, change_to, refusal
from mpsearch.tables import SensitivityTable

#: Tokens of a cache by which formats of caches are put in order.
_TOKENS = 4096


@dataclass(frozen=True)
class IsolatedLoss:
    """Increase of the model's loss with one decision changed, all others fixed.

    - ``direction="down"``: all layers as they are, one decision in the format:
      score = mean over samples of loss(decision in format) - loss(original).
    - ``direction="up"``: every decision in the format of the menu that takes the fewest bytes, one in another:
      score = mean over samples of loss(decision in format) - loss(decision in the format of most bytes). That is
      what raising the decision would still gain where all the rest is poor; the best format scores 0.

    The loss is the user's own, or the next token's in nats; an increase may be negative, and is kept so. Both losses
    are taken on the same sample, so that the standard error is that of the difference.

    Bias: none for one decision alone; adding scores up assumes that errors do not interact, with each other for
    ``down``, beyond those of the poorest plan for ``up``. Standard error: over samples, from batch to batch when
    there are several. Cost: a forward pass per decision and format, for language models from the changed layer on,
    for a loss that the user gave in full. Memory: the kept errors (`Deltas`), for ``up`` a copy of the weights.
    Sources: AdaQuant (Hubara et al. 2020, arXiv:2006.10518) prices layers so; ``up`` follows BitStack (Wang et al.
    2024, arXiv:2410.23918), which raises from the poorest.

    Attributes:
        direction: ``down`` or ``up``.

    >>> import torch, mpsearch as mp
    >>> model = mp.wrap(torch.nn.Linear(1, 2, bias=False), loss=lambda m, x: m(x).square().sum())
    >>> _ = model.module.weight.data.copy_(torch.tensor([[1.0], [0.6]]))
    >>> table = mp.score(model, [torch.ones(1, 1)], ["int2-tensor"], "isolated_loss")
    >>> round(float(table.value[0, 0]), 4)  # 1 + 0.36 becomes 1 + 1
    0.64
    """

    direction: Literal["down", "up"] = "down"
    by: ClassVar[Literal["cell", "batch"]] = "batch"
    covers: ClassVar[Sequence[str]] = ("weights", "activations", "caches")
    parts: ClassVar[bool] = True
    version: ClassVar[int] = 1
    cost: ClassVar[str] = "1 forward per cell"
    needs: ClassVar[Sequence[str]] = ("data", "loss")

    def __post_init__(self) -> None:
        if self.direction not in ("down", "up"):
            raise InputError("E113", f"isolated_loss: direction is {self.direction!r}; give 'down' or 'up'")

    def refuses(self, model: Model) -> str:
        return refusal(model, "loss")

    def score(
        self, model: Model, batches: Sequence[Any], layers: Sequence[Layer], formats: Sequence[Format]
    ) -> SensitivityTable:
        return SensitivityTable.mean([self._one(model, batch, layers, formats) for batch in batches])

    def _one(self, model: Model, batch: Any, layers: Sequence[Layer], formats: Sequence[Format]) -> SensitivityTable:
        rows = decisions(layers)
        up = self.direction == "up"
        lowest = {row: menu[0] for row in rows if (menu := _ranked(row, formats))} if up else {}
        base = {layer: fmt for row, fmt in lowest.items() for layer in row.layers}
        standing = change_to(model, base)
        seen = called(model, batch, layers)
        harm = Harm(model, batch, "loss", standing)
        found: dict[tuple[str, Format], list[float]] = {}
        for row in rows:
            if not _visible(row, seen, harm):
                continue
            harm.prepare(row.layers)
            for fmt in _ranked(row, formats):
                here = change_to(model, dict.fromkeys(row.layers, fmt))
                found[row.name, fmt] = harm.values(_with(standing, here))

        def cell(row: Decision, fmt: Format) -> Cell:
            if (row.name, fmt) not in found:
                return Cell(status="not_observed")
            values = found[row.name, fmt]
            if up:
                best = found[row.name, _ranked(row, formats)[-1]]
                values = [a - b for a, b in zip(values, best, strict=True)]
            return mean_cell(values)

        samples = max((len(values) for values in found.values()), default=0)
        unit = "nats/token" if model.tokens else "loss"
        return build_table(layers, formats, cell, unit=unit, samples=samples, source={"estimator": "isolated_loss"})


def _visible(decision: Decision, seen: set[str], harm: Harm) -> bool:
    """Whether the loss can show what becomes of a decision."""
    reached = all(layer.name in seen for layer in decision.layers)
    return reached and not (harm.given_loss and any(layer.kind == "kv_cache" for layer in decision.layers))


def _with(base: Change, here: Change) -> Change:
    """A base, with other formats for some of its layers."""
    inputs = {layer: how for layer, how in base.inputs.items() if layer not in here.weights}
    return Change({**base.weights, **here.weights}, {**inputs, **here.inputs}, {**base.caches, **here.caches})


def _ranked(decision: Decision, formats: Sequence[Format]) -> list[Format]:
    """The formats that a decision can take, by their bytes, then by the bits of their inputs; ties as in the menu."""

    def size(fmt: Format) -> tuple[int, int]:
        if isinstance(fmt, KvCache):
            return sum(sum(fmt.cache_bytes(layer, _TOKENS).values()) for layer in decision.layers), 0
        inputs = fmt.activation.bits if fmt.activation is not None else 32
        return sum(fmt.bytes(layer) for layer in decision.layers), inputs

    return sorted((fmt for fmt in formats if offered(decision, fmt)), key=size)
