"""Several scores at once, weighed by how well they predict what random plans lose."""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass, replace
from typing import Any, ClassVar, Literal

import numpy as np

from mpsearch import registry
from mpsearch.errors import InputError, did_you_mean
from mpsearch.format import Format
from mpsearch.layer import Decision, Layer, decisions
from mpsearch.loss_fit import Choices, Fit, fit_scores
from mpsearch.model.model import Model
from mpsearch.sensitivity.assemble import batch_seed, mean_cell, offered
from mpsearch.sensitivity.harm import Harm, change_to
from mpsearch.tables import Array, SensitivityTable, Status

#: Spread of the formats of one plan around its level, as a part of the menu's length; and at least so many formats.
_WIDTH, _LEAST_WIDTH = 0.2, 0.75
#: Bootstrap resamplings of a batch's plans.
_DRAWS = 200


@dataclass(frozen=True)
class Combine:
    """Scores of several estimators, weighed to predict measured divergence, in nats per token.

    score = sum_k w_k T_k, with T_k the table of estimator k and weights w_k >= 0 of least relative error over random
    plans whose divergence is measured (`mpsearch.loss_fit`). Plans are spread evenly over the levels of the menu, from
    its fewest bits to its most, and vary around their level; rows without a score stay as they are in them. Every batch
    has its own scores, plans and weights, and the tables of the batches are averaged: the same as one fit to all of
    them up to the noise of the weights, which averaging makes smaller.

    An estimator that does not see activations or caches may be among others that do: its part is the same for formats
    that differ only there, and nothing for caches.

    Bias: takes losses as sums over decisions; what they do together on average goes into the weights, for they are
    fitted to whole plans. Standard error: over batches; of a single batch, that of the scores and, by bootstrap over
    plans, of the weights. Cost: that of the estimators, and ``plans`` forward passes per batch.

    Attributes:
        estimators: names, each with its default settings.
        plans: random plans per batch, at least two for each estimator.
        seed: seed of the plans, and of estimators that draw.

    >>> import torch, mpsearch as mp
    >>> model = mp.wrap(torch.nn.Linear(8, 4), logits=lambda m, x: m(x))
    >>> data = list(torch.randn(2, 16, 8, generator=torch.Generator().manual_seed(0)))
    >>> mp.score(model, data, ["int4-channel"], "combine", estimators=("output_mse",), plans=8).unit
    'nats/token'
    """

    estimators: tuple[str, ...] = ("weight_mse", "output_mse", "fisher")
    plans: int = 24
    seed: int = 0
    by: ClassVar[Literal["cell", "batch"]] = "batch"
    covers: ClassVar[Sequence[str]] = ("weights", "activations", "caches")
    version: ClassVar[int] = 1
    cost: ClassVar[str] = "its estimators' + 24 forward"
    needs: ClassVar[Sequence[str]] = ("data", "logits")

    def __post_init__(self) -> None:
        names = self.estimators
        if isinstance(names, str) or not isinstance(names, Sequence) or not all(isinstance(x, str) for x in names):
            raise InputError("E113", f"combine: estimators is {names!r}; give a list of names")
        # A study file gives a list.
        object.__setattr__(self, "estimators", tuple(names))
        known = [name for name in registry.names("estimators") if name != "combine"]
        for name in names:
            if name not in known:
                raise InputError(
                    "E113",
                    f"combine: no estimator '{name}' to combine{did_you_mean(name, known)}",
                    advice=f"there is {', '.join(known)}",
                )
        if not names or len(set(names)) < len(names):
            raise InputError("E113", f"combine: estimators is {list(names)}; give each name once, at least one")
        if not isinstance(self.plans, int) or isinstance(self.plans, bool) or self.plans < max(4, 2 * len(names)):
            least = max(4, 2 * len(names))
            raise InputError("E113", f"combine: plans is {self.plans!r}; give a whole number from {least}")

    def refuses(self, model: Model) -> str:
        if not model.has_logits:
            return "it needs logits; wrap the module: mp.wrap(module, logits=…)"
        return next((f"'{name}': {why}" for name, made in self._made() if (why := made.refuses(model))), "")

    def _made(self) -> list[tuple[str, Any]]:
        drawing = [name for name in self.estimators if "seed" in registry.settings("estimators", name)]
        return [
            (name, registry.make("estimators", name, **({"seed": self.seed} if name in drawing else {})))
            for name in self.estimators
        ]

    def score(
        self, model: Model, batches: Sequence[Any], layers: Sequence[Layer], formats: Sequence[Format]
    ) -> SensitivityTable:
        self._check_seen(formats)
        return SensitivityTable.mean([self._one(model, batch, layers, formats) for batch in batches])

    def _check_seen(self, formats: Sequence[Format]) -> None:
        """Refuse formats of what none of the estimators sees: they would look harmless.

        Raises:
            InputError: E506.
        """
        seen = {what for _, made in self._made() for what in made.covers}
        for fmt in formats:
            what = "caches" if fmt.family == "kv" else "activations" if fmt.activation is not None else "weights"
            if what not in seen:
                raise InputError(
                    "E506",
                    f"combine: none of {', '.join(self.estimators)} sees {what}, so '{fmt}' cannot be scored",
                    advice="add one that does, such as 'fisher' or 'divergence'",
                )

    def _one(self, model: Model, batch: Any, layers: Sequence[Layer], formats: Sequence[Format]) -> SensitivityTable:
        fit = self.fit(model, batch, layers, formats)
        return replace(fit.table(), source={"estimator": "combine", **fit.to_json()})

    def fit(self, model: Model, batch: Any, layers: Sequence[Layer], formats: Sequence[Format]) -> Fit:
        """Score, draw, measure and fit on one batch.

        Raises:
            InputError: no plan gives a finite divergence (E511), or as the estimators.
        """
        tables = [self._inner(made, model, [batch], layers, formats) for _, made in self._made()]
        seed = batch_seed(self.seed, ["plans", batch])
        plans = random_plans(layers, formats, tables, self.plans, seed)
        rows = decisions(layers)
        harm = Harm(model, batch, "kl")
        losses, errors = [], []
        for plan in plans:
            chosen = {x: formats[j] for row, j in zip(rows, plan, strict=True) if j >= 0 for x in row.layers}
            harm.prepare(list(chosen))
            cell = mean_cell(harm.values(change_to(model, chosen)) if chosen else [0.0])
            losses.append(cell.value)
            errors.append(cell.spread)
        measured = np.array(losses)
        finite = np.isfinite(measured)
        if finite.sum() < len(tables):
            raise InputError(
                "E511",
                f"combine: {int((~finite).sum())} of {len(plans)} random plans give values that are not finite",
                advice="leave out the formats that the weights do not fit",
            )
        return fit_scores(
            tables, plans[finite], measured[finite], np.array(errors)[finite], draws=_DRAWS, seed=self.seed
        )

    def _inner(
        self, made: Any, model: Model, batches: Sequence[Any], layers: Sequence[Layer], formats: Sequence[Format]
    ) -> SensitivityTable:
        """Table of one estimator over all decisions and formats: 0 where it sees nothing of what a format rounds."""
        rows = decisions(layers)
        seen = [x for x in layers if x.kind != "kv_cache" or "caches" in made.covers]
        asked = [fmt for fmt in formats if fmt.family != "kv" or "caches" in made.covers]
        shape = (len(rows), len(formats))
        status: list[list[Status]] = [["ok" if offered(row, fmt) else "not_offered" for fmt in formats] for row in rows]
        value: Array = np.where([[x == "ok" for x in row] for row in status], 0.0, np.nan).reshape(shape)
        spread = value.copy()
        table = made.score(model, batches, seen, asked) if seen and asked else None
        place = {name: i for i, name in enumerate(table.layers)} if table is not None else {}
        columns = [j for j, fmt in enumerate(formats) if fmt in asked]
        for i, row in enumerate(rows):
            if table is not None and row.name in place:
                found = place[row.name]
                value[i, columns], spread[i, columns] = table.value[found], table.spread[found]
                for j, state in zip(columns, table.status[found], strict=True):
                    status[i][j] = state
        names = tuple(row.name for row in rows), tuple(map(str, formats))
        unit, samples = (table.unit, table.samples) if table is not None else ("", 1)
        source = {"estimator": table.source.get("estimator", "")} if table is not None else {}
        return SensitivityTable(*names, value, spread, unit, tuple(map(tuple, status)), samples, source)


def random_plans(
    layers: Sequence[Layer], formats: Sequence[Format], tables: Sequence[SensitivityTable], count: int, seed: int
) -> Choices:
    """Draw plans at even levels of the menu, each format near its plan's level.

    Args:
        layers: the layers.
        formats: the menu.
        tables: only cells that all of them have a score for are drawn.
        count: how many plans.
        seed: seed of the draws.

    Returns:
        (count, decisions) column of each decision; -1 where it has no score at all.
    """
    generator = np.random.default_rng(seed)
    usable = np.all([np.isfinite(table.value) for table in tables], axis=0)
    menus = []
    for row, able in zip(decisions(layers), usable, strict=True):
        columns: list[int] = np.nonzero(able)[0].tolist()
        menus.append(sorted(columns, key=lambda j: (_bits(row, formats[j]), j)))
    plans = np.full((count, len(menus)), -1)
    for p in range(count):
        level = p / max(count - 1, 1)
        for i, menu in enumerate(menus):
            if menu:
                last = len(menu) - 1
                rank = level * last + generator.normal() * max(_LEAST_WIDTH, _WIDTH * last)
                plans[p, i] = menu[min(max(round(rank), 0), last)]
    return plans


def _bits(row: Decision, fmt: Format) -> float:
    """Bits of a format's weights and inputs, or of its cache, on average over a decision."""
    bits = math.fsum(float(fmt.weight.effective_bits(layer)) for layer in row.layers) / len(row.layers)
    if fmt.family == "kv":
        return bits
    return bits + (fmt.activation.bits if fmt.activation is not None else 16)
