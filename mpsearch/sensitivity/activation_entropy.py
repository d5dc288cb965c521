"""Activation entropy: how many kinds of outputs a layer makes."""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any, ClassVar, Literal

import torch
from torch import Tensor, nn

from mpsearch.errors import InputError
from mpsearch.format import Format
from mpsearch.layer import Layer
from mpsearch.model.evidence import channel_axis
from mpsearch.model.model import Model
from mpsearch.sensitivity.statistics import importance_table, observe, runs
from mpsearch.tables import SensitivityTable


@dataclass(frozen=True)
class ActivationEntropy:
    """Entropy of a layer's clustered outputs, times relative weight errors.

    score = sum over the decision's layers of (H / log k) ||Q(W) - W||^2 / ||W||^2, where H is the entropy of the
    shares of tokens in k = min(``clusters``, tokens) clusters of the layer's outputs. The factor lies in 0..1: outputs
    that are all alike give 0, as the paper says that layers of low entropy take the fewest bits.

    Clusters are those of k-means, made without chance: the first centre is the greatest output, each next one the
    output furthest from all before it (ties: the earliest), then ``rounds`` of Lloyd's steps. A layer called several
    times in a batch has the mean of its calls, weighted by tokens. Calls of a single token say nothing.

    The paper gives a ranking, so the factor multiplies relative errors, which do not count a layer's size. Stacked
    experts are not observed. Bias: with no more tokens than clusters the entropy is that of unlike outputs: give
    batches of several hundred tokens. Standard error: from batch to batch. Cost: a forward pass, and
    tokens x clusters x output channels products per round and layer; at most ``tokens`` of a call, evenly spaced.
    Source: LUQ (arXiv 2509.23729), with 100 clusters.

    Attributes:
        clusters: most clusters.
        rounds: most steps.
        tokens: most tokens of one call.

    >>> import torch
    >>> round(cluster_entropy(torch.tensor([[0.0], [0.1], [9.0], [9.1]]), 2) / math.log(2), 6)
    1.0
    """

    clusters: int = 100
    rounds: int = 25
    tokens: int = 2048
    by: ClassVar[Literal["cell", "batch"]] = "batch"
    covers: ClassVar[Sequence[str]] = ("weights",)
    version: ClassVar[int] = 1
    streams: ClassVar[Literal["", "forward", "backward"]] = "forward"
    cost: ClassVar[str] = "1 forward, clustering per layer"
    needs: ClassVar[Sequence[str]] = ("data",)

    def __post_init__(self) -> None:
        for name, least in (("clusters", 2), ("rounds", 1), ("tokens", 2)):
            value = getattr(self, name)
            if not isinstance(value, int) or value < least:
                raise InputError("E113", f"activation_entropy: {name} is {value!r}; give a whole number from {least}")

    def refuses(self, model: Model) -> str:
        return runs(model)

    def score(
        self, model: Model, batches: Sequence[Any], layers: Sequence[Layer], formats: Sequence[Format]
    ) -> SensitivityTable:
        return SensitivityTable.mean([self._one(model, batch, layers, formats) for batch in batches])

    def _one(self, model: Model, batch: Any, layers: Sequence[Layer], formats: Sequence[Format]) -> SensitivityTable:
        sums: dict[str, float] = {}
        counts: dict[str, int] = {}

        def see(layer: Layer, module: nn.Module, x: Tensor, output: Tensor) -> None:
            turned = output.movedim(channel_axis(module), -1)
            rows = turned.reshape(-1, turned.shape[-1])
            count = len(rows)
            if count < 2:
                return
            kept = rows[torch.linspace(0, count - 1, min(count, self.tokens)).round().long()].float()
            k = min(self.clusters, len(kept))
            finite = bool(kept.isfinite().all())
            share = cluster_entropy(kept, k, self.rounds) / math.log(k) if finite else math.nan
            sums[layer.name] = sums.get(layer.name, 0.0) + share * count
            counts[layer.name] = counts.get(layer.name, 0) + count

        observe(model, batch, layers, see)
        importance = {name: sums[name] / counts[name] for name in sums}
        return importance_table(model, layers, formats, importance, "activation_entropy")


def cluster_entropy(rows: Tensor, clusters: int, rounds: int = 25) -> float:
    """Entropy in nats of the shares of rows in their clusters."""
    counts = torch.bincount(k_means(rows, clusters, rounds), minlength=clusters).double()
    shares = counts[counts > 0] / len(rows)
    return max(0.0, -float((shares * shares.log()).sum()))


def k_means(rows: Tensor, clusters: int, rounds: int = 25) -> Tensor:
    """Number of the cluster of each row; the same rows always give the same clusters.

    >>> k_means(torch.tensor([[0.0], [5.0], [0.2], [5.1]]), 2).tolist()
    [1, 0, 1, 0]
    """
    centres = _furthest(rows, clusters)
    chosen = torch.full((len(rows),), -1)
    for _ in range(rounds):
        # |x|^2 is the same for all centres of a row, so it is left out.
        distance = centres.square().sum(dim=1) - 2 * rows @ centres.T
        now = distance.argmin(dim=1)
        if torch.equal(now, chosen):
            break
        chosen = now
        counts = torch.bincount(chosen, minlength=len(centres))
        sums = torch.zeros_like(centres).index_add_(0, chosen, rows)
        centres = torch.where(counts[:, None] > 0, sums / counts[:, None].clamp(min=1), centres)
    return chosen


def _furthest(rows: Tensor, clusters: int) -> Tensor:
    """Rows that are far apart, as first centres; fewer than asked for when the rest are copies."""
    first = int(rows.square().sum(dim=1).argmax())
    places = [first]
    nearest = (rows - rows[first]).square().sum(dim=1)
    while len(places) < clusters and float(nearest.max()) > 0:
        place = int(nearest.argmax())
        places.append(place)
        nearest = torch.minimum(nearest, (rows - rows[place]).square().sum(dim=1))
    return rows[places].clone()
