"""Pairwise interactions: what the rounding of two decisions does together beyond what each does alone."""

from __future__ import annotations

import itertools
import math
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any, ClassVar, Literal

import numpy as np
import torch
from torch import Tensor

from mpsearch.errors import InputError
from mpsearch.format import Format
from mpsearch.layer import Decision, Layer, decisions
from mpsearch.model.model import Model
from mpsearch.pairs import PairTable, mean_and_errors
from mpsearch.parts import wholes
from mpsearch.sensitivity.assemble import Cell, Deltas, batch_seed, build_table, mean_cell, offered
from mpsearch.sensitivity.derivatives import Product, check_product
from mpsearch.sensitivity.gauss_newton import GaussNewton, half_variance
from mpsearch.sensitivity.harm import AGAINST, Against, Harm, called, change_to, refusal
from mpsearch.tables import Array

#: Changes of the logits of one batch are kept up to this many bytes.
KEEP_BYTES = 2**31
#: Numbers of one sample's changes that are multiplied at a time, in float64.
_CHUNK = 2**24

#: A cell by its row and its column.
_Place = tuple[int, int]


@dataclass(frozen=True)
class Pairwise:
    """Interactions of all pairs of cells, or of some: I(i in f, j in g) = harm(both) - harm(i in f) - harm(j in g).

    - ``how="gauss_newton"``: to second order, d_i^T G d_j = mean over positions of Cov_p(J d_i, J d_j) in nats per
      token, with d = Q(W) - W, J d the change of the logits along d, p the model's own distribution and G the
      Gauss-Newton matrix, which is the Hessian of KL(original || quantised). One product J d per cell gives all pairs
      of all cells. Weights only.
    - ``how="measured"``: three runs on the same samples, exact whatever the size of the errors; harm is
      KL(original || quantised) or, ``against="loss"``, the increase of the model's loss. Any formats.

    What the pairs and the single cells (``singles`` of the table, of the same samples) predict for a whole plan leaves
    out the interactions of three and more decisions.

    Bias: ``measured`` none for two decisions; ``gauss_newton`` none to second order. Standard error: of the paired
    difference over samples, from batch to batch when there are several.
    Cost per batch, with N rows and F formats: ``gauss_newton`` N F products (see `GaussNewton`) and (N F)^2 / 2
    products of changes of the logits; ``measured`` N F + (N F)^2 / 2 forward passes, for language models from the
    earlier of the two layers on, fewer with ``band`` or ``sampled``. Memory: ``gauss_newton`` N F times the logits of a
    batch in float32; refused above 2 GiB, unless ``sketch`` is set. A count sketch keeps of every sample's change that
    many sums with random signs; the covariances stay unbiased, with a variance of at most 2 |a|^2 |b|^2 / ``sketch``
    per sample, which the standard error contains; the single cells are exact all the same.

    Sources: CLADO (Deng et al. 2023, arXiv:2307.05657) for measured pairs; Augmenting Hessians with Inter-Layer
    Dependencies (Schaefer et al. 2023, arXiv:2306.04879); Schraudolph 2002 (Gauss-Newton products); Charikar et al.
    2002 (count sketch).

    Attributes:
        how: ``gauss_newton`` or ``measured``.
        band: how many rows apart two may be; all pairs when 0.
        sampled: how many of these pairs of rows are drawn at random, without replacement; all when 0.
        seed: of the drawn pairs, and of the sketch.
        against: ``kl`` or ``loss``, for ``measured``.
        sketch: how many sums to keep of each sample's change of the logits; 0 keeps the change itself.
        product: as for `GaussNewton`.
        step: as for `GaussNewton`.

    >>> import torch, mpsearch as mp
    >>> module = torch.nn.Sequential(torch.nn.Linear(1, 2, bias=False), torch.nn.Linear(2, 2, bias=False))
    >>> for layer, rows in zip(module, ([[1.0], [0.6]], [[1.0, 0.4], [0.5, 1.0]])):
    ...     _ = layer.weight.data.copy_(torch.tensor(rows))
    >>> model = mp.wrap(module, logits=lambda m, x: m(x))
    >>> table = mp.interactions(model, [torch.ones(1, 1)], ["int2-tensor"])
    >>> round(float(table.value[0]), 5)  # z0 - z1 changes by -0.24 and 0.26: p (1 - p) x -0.24 x 0.26 with p = 0.535
    -0.01552
    """

    how: Literal["gauss_newton", "measured"] = "gauss_newton"
    band: int = 0
    sampled: int = 0
    seed: int = 0
    against: Against = "kl"
    sketch: int = 0
    product: Product = "double_backward"
    step: float = 0.003
    version: ClassVar[int] = 1

    def __post_init__(self) -> None:
        for name, known in (("how", _HOW), ("against", AGAINST)):
            if getattr(self, name) not in known:
                raise InputError(
                    "E113", f"interactions: {name} is {getattr(self, name)!r}", advice=f"{name}: {', '.join(known)}"
                )
        for name, least in (("band", 0), ("sampled", 0), ("seed", 0), ("sketch", 0)):
            value = getattr(self, name)
            if not isinstance(value, int) or isinstance(value, bool) or value < least:
                raise InputError("E113", f"interactions: {name} is {value!r}; give a whole number from {least}")
        if self.how == "gauss_newton" and self.against == "loss":
            raise InputError(
                "E113",
                "interactions: how='gauss_newton' is the second order of the divergence, not of the loss",
                advice="set how = 'measured' with against = 'loss'",
            )
        check_product("interactions", self.product, self.step)

    @property
    def covers(self) -> Sequence[str]:
        """Whose rounding is seen."""
        return ("weights",) if self.how == "gauss_newton" else ("weights", "activations", "caches")

    def refuses(self, model: Model) -> str:
        """Say why this model has no interactions to be found; empty when it has."""
        return refusal(model, self.against)

    def score(
        self, model: Model, batches: Sequence[Any], layers: Sequence[Layer], formats: Sequence[Format]
    ) -> PairTable:
        """Interactions of the decisions of ``layers`` in ``formats``, with their singles; the model is left as it was.

        Raises:
            InputError: formats that ``how`` does not see, or changes of the logits beyond 2 GiB (E506).
        """
        self._check_formats(formats)
        find = self._second_order if self.how == "gauss_newton" else self._measured
        return PairTable.mean([find(model, batch, layers, formats) for batch in batches])

    def _check_formats(self, formats: Sequence[Format]) -> None:
        blind = next((fmt for fmt in formats if fmt.activation is not None or fmt.family == "kv"), None)
        if blind is not None and self.how == "gauss_newton":
            raise InputError(
                "E506",
                f"interactions: how='gauss_newton' sees the rounding of weights only, so it cannot take '{blind}'",
                advice="set how = 'measured'",
            )

    def _row_pairs(self, rows: int) -> list[_Place]:
        """The pairs of rows that are asked for."""
        found = list(itertools.combinations(range(rows), 2))
        if self.band:
            found = [(i, j) for i, j in found if j - i <= self.band]
        if 0 < self.sampled < len(found):
            drawn = np.random.default_rng(self.seed).choice(len(found), self.sampled, replace=False)
            return [found[k] for k in sorted(drawn.tolist())]
        return found

    def _second_order(self, model: Model, batch: Any, layers: Sequence[Layer], formats: Sequence[Format]) -> PairTable:
        rows = decisions(layers)
        logits, pushed = GaussNewton(self.product, self.step).pushes(model, batch, layers)
        p = torch.softmax(logits, dim=-1)
        keep = self._keeper(p, batch, len(rows) * len(formats))
        deltas = Deltas.of(model)
        work = _Found(rows, formats)
        changes: list[Tensor] = []
        places: dict[_Place, int] = {}
        for place, row, fmt in work.cells():
            errors = [deltas.own(layer, fmt) for layer in row.layers]
            if not all(bool(d.isfinite().all()) for d in errors):
                work.single[place] = [math.nan]
                continue
            change = pushed(row.layers, errors)
            if change is None:
                continue
            work.single[place] = half_variance(p, change)
            if all(map(math.isfinite, work.single[place])):
                places[place] = len(changes)
                changes.append(keep(change))
        # Positions are averaged over, as in the singles.
        positions = math.prod(p.shape[1:-1])
        gram = _gram(changes) / positions if changes else np.zeros((len(p), 0, 0))
        for i, j in self._row_pairs(len(rows)):
            for f, g in itertools.product(range(len(formats)), repeat=2):
                if (i, f) in places and (j, g) in places:
                    work.pair[i, f, j, g] = gram[:, places[i, f], places[j, g]].tolist()
        return work.table(layers, "nats/token", len(p), {"interactions": "pairwise", "how": self.how})

    def _keeper(self, p: Tensor, batch: Any, cells: int) -> _Keeper:
        """What is kept of a change of the logits."""
        size = p[0].numel()
        kept = min(self.sketch, size) if self.sketch else size
        needed = 4 * cells * len(p) * kept
        if needed > KEEP_BYTES:
            raise InputError(
                "E506",
                f"interactions: the changes of the logits of one batch in {cells} cells take {needed / 2**30:.1f} GiB, "
                f"more than {KEEP_BYTES / 2**30:.0f} GiB",
                advice="set sketch = 4096, or give smaller batches or fewer formats",
            )
        if kept == size:
            return _Keeper(p)
        noise = torch.Generator().manual_seed(batch_seed(self.seed, batch))
        # Each sample gets its own, so that the differences between samples show what the sketch adds.
        places = torch.randint(0, kept, (len(p), size), generator=noise)
        signs = torch.randint(0, 2, (len(p), size), generator=noise).to(p.dtype) * 2 - 1
        return _Keeper(p, places, signs, kept)

    def _measured(self, model: Model, batch: Any, layers: Sequence[Layer], formats: Sequence[Format]) -> PairTable:
        rows = decisions(layers)
        seen = called(model, batch, wholes(layers))
        harm = Harm(model, batch, self.against)
        work = _Found(rows, formats)
        visible = [row for row, decision in enumerate(rows) if self._visible(decision, seen, harm)]
        for row in visible:
            harm.prepare(rows[row].layers)
            for place, decision, fmt in work.cells(row):
                work.single[place] = harm.values(change_to(model, dict.fromkeys(decision.layers, fmt)))
        for i, j in self._row_pairs(len(rows)):
            if i in visible and j in visible:
                harm.prepare((*rows[i].layers, *rows[j].layers))
                for (first, a, fmt), (second, b, other) in itertools.product(work.cells(i), work.cells(j)):
                    alone = work.single[first], work.single[second]
                    if not all(map(math.isfinite, itertools.chain(*alone))):
                        continue
                    both = harm.values(
                        change_to(model, {**dict.fromkeys(a.layers, fmt), **dict.fromkeys(b.layers, other)})
                    )
                    work.pair[*first, *second] = [t - x - y for t, x, y in zip(both, *alone, strict=True)]
        unit = "nats/token" if self.against == "kl" or model.tokens else "loss"
        samples = max((len(values) for values in work.single.values()), default=0)
        source = {"interactions": "pairwise", "how": self.how, "against": self.against}
        return work.table(layers, unit, samples, source)

    def _visible(self, decision: Decision, seen: set[str], harm: Harm) -> bool:
        """Whether what is measured can show what becomes of a decision."""
        blind = self.against == "loss" and harm.given_loss
        return all(x.owner in seen and not (blind and x.kind == "kv_cache") for x in decision.layers)


_HOW = ("gauss_newton", "measured")


@dataclass(eq=False)
class _Keeper:
    """Turns a change of the logits into vectors whose products are covariances under p, one per sample."""

    p: Tensor
    places: Tensor | None = None
    signs: Tensor | None = None
    kept: int = 0

    def __call__(self, change: Tensor) -> Tensor:
        centred = change - (self.p * change).sum(dim=-1, keepdim=True)
        flat = (self.p.sqrt() * centred).reshape(len(self.p), -1)
        if self.places is None or self.signs is None:
            return flat
        return flat.new_zeros(len(flat), self.kept).scatter_add_(1, self.places, self.signs * flat)


def _gram(changes: Sequence[Tensor]) -> Array:
    """(samples, cells, cells) products of all changes of each sample, in float64."""
    samples, size = changes[0].shape
    found = np.zeros((samples, len(changes), len(changes)))
    width = max(1, _CHUNK // len(changes))
    for s in range(samples):
        for start in range(0, size, width):
            part = torch.stack([change[s, start : start + width] for change in changes]).double()
            found[s] += (part @ part.T).numpy()
    return found


@dataclass(eq=False)
class _Found:
    """Harm of single cells and of pairs, one number per sample; what is missing was not observed."""

    rows: Sequence[Decision]
    formats: Sequence[Format]
    single: dict[_Place, list[float]] = field(default_factory=dict)
    pair: dict[tuple[int, int, int, int], list[float]] = field(default_factory=dict)

    def cells(self, row: int | None = None) -> Iterator[tuple[_Place, Decision, Format]]:
        """The cells that are offered, of one row or of all."""
        for i in range(len(self.rows)) if row is None else (row,):
            for f, fmt in enumerate(self.formats):
                if offered(self.rows[i], fmt):
                    yield (i, f), self.rows[i], fmt

    def table(self, layers: Sequence[Layer], unit: str, samples: int, source: Mapping[str, Any]) -> PairTable:
        """Put everything together."""
        number = {decision.name: i for i, decision in enumerate(self.rows)}
        column = {str(fmt): f for f, fmt in enumerate(self.formats)}

        def cell(decision: Decision, fmt: Format) -> Cell:
            values = self.single.get((number[decision.name], column[str(fmt)]))
            return Cell(status="not_observed") if values is None else mean_cell(values)

        singles = build_table(layers, self.formats, cell, unit=unit, samples=samples, source=source)
        i, f, j, g = np.array(list(self.pair), dtype=np.int32).reshape(-1, 4).T
        # One row per sample; without pairs an empty one.
        value, spread = mean_and_errors(np.array(list(self.pair.values())).reshape(len(i), -1 if self.pair else 1).T)
        return PairTable(
            singles.layers, singles.formats, i, f, j, g, value, spread, unit, (), samples, source, singles
        )  # fmt: skip
