"""Divergence: quantise one decision at a time and see how far the model's answers move."""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any, ClassVar, Literal

import torch

from mpsearch.errors import InputError
from mpsearch.format import Format
from mpsearch.layer import Decision, Layer, decisions
from mpsearch.model.apply import Change, changed
from mpsearch.model.model import Model
from mpsearch.model.reference import Reference, divergence
from mpsearch.model.replay import Replay
from mpsearch.sensitivity.assemble import Cell, build_table, mean_cell, offered
from mpsearch.sensitivity.harm import called
from mpsearch.tables import SensitivityTable


@dataclass(frozen=True)
class Divergence:
    """KL divergence of the outputs with one decision quantised: the yardstick.

    score = mean over positions of KL(p_original || p_quantised), in nats per token.

    A layer that no batch reaches is not observed; it is not harmless.

    Exact for one decision alone; adding the scores up assumes that errors do not interact. Standard error:
    over the samples (sequences). Cost: one forward pass per decision and format, of which what comes before
    the changed layer is remembered (`mpsearch.model.replay`).

    Attributes:
        reuse: remember what comes before the changed layer; the numbers are the same without.

    >>> import torch, mpsearch as mp
    >>> model = mp.wrap(torch.nn.Linear(1, 2, bias=False), logits=lambda m, x: m(x))
    >>> _ = model.module.weight.data.copy_(torch.tensor([[1.0], [0.6]]))
    >>> table = mp.score(model, [torch.ones(1, 1)], ["int2-tensor"], "divergence")
    >>> round(float(table.value[0, 0]), 5)  # 1.0, 0.6 becomes 1.0, 1.0
    0.01961
    """

    reuse: bool = True
    by: ClassVar[Literal["cell", "batch"]] = "cell"
    covers: ClassVar[Sequence[str]] = ("weights", "activations", "caches")
    parts: ClassVar[bool] = True
    version: ClassVar[int] = 1
    cost: ClassVar[str] = "1 forward per cell, from the layer on"
    needs: ClassVar[Sequence[str]] = ("data", "logits")

    def refuses(self, model: Model) -> str:
        return "" if model.has_logits else "it needs logits; wrap the module: mp.wrap(module, logits=…)"

    def score(
        self, model: Model, batches: Sequence[Any], layers: Sequence[Layer], formats: Sequence[Format]
    ) -> SensitivityTable:
        reference = Reference.of(model, batches)
        replay = Replay.of(model, batches) if self.reuse else None
        found: dict[tuple[str, str], Cell] = {}
        samples = 0
        for decision in decisions(layers):
            if replay is not None and decision.layers[0].kind != "kv_cache":
                replay.prepare(decision.layers)
            for fmt in formats:
                if offered(decision, fmt):
                    values = self._values(model, batches, reference, replay, decision, fmt)
                    samples = max(samples, len(values))
                    if any(values) or _called(model, batches, decision):
                        found[decision.name, str(fmt)] = mean_cell(values)
        return build_table(
            layers,
            formats,
            lambda decision, fmt: found.get((decision.name, str(fmt)), Cell(status="not_observed")),
            unit="nats/token",
            samples=samples,
            source={"estimator": "divergence"},
        )

    def _values(
        self,
        model: Model,
        batches: Sequence[Any],
        reference: Reference,
        replay: Replay | None,
        decision: Decision,
        fmt: Format,
    ) -> list[float]:
        try:
            change = Change.of(model, dict.fromkeys(decision.layers, fmt))
        except InputError as error:
            if error.code != "E421":
                raise
            return [math.nan]  # the format cannot hold these weights
        # A remembered pass has no keys and values to round.
        full = replay is None or bool(change.caches)
        values: list[float] = []
        for i, batch in enumerate(batches):
            log_p = reference.log_probabilities(i)
            with torch.no_grad(), changed(model, change):
                logits = model.logits(batch) if replay is None or full else replay.logits(i)
            values.extend(divergence(log_p, logits).kl.tolist())
        return values


def _called(model: Model, batches: Sequence[Any], decision: Decision) -> bool:
    """Whether the data reaches every layer of a decision: to a layer without tokens no change does anything."""
    known: dict[str, bool] = model.memo("called", batches, dict)
    if decision.name not in known:
        reached = set[str]().union(*(called(model, batch, decision.layers) for batch in batches))
        known[decision.name] = all(layer.name in reached for layer in decision.layers)
    return known[decision.name]
