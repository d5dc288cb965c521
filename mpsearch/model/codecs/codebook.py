"""Code books found by k-means in one dimension.

A tensor, row or group of weights has ``k = 2**bits`` centroids, which are found in float64 and stored in fp16, lowest
first. The code of a weight is the number of midpoints between stored centroids that lie below it: the nearest, ties go
down.

Lloyd's rule: each centroid becomes the mean of the weights nearest to it (one without any stays), until no weight
changes hands, at most `ROUNDS` times. The weights are sorted once and summed up from the left, so that a round only
looks up ``k - 1`` midpoints. It starts twice, from the means of ``k`` runs of equally many weights, and from ``k``
evenly spaced numbers from the lowest weight to the highest; the lesser sum of squares wins, so that the result is, but
for fp16, no worse than an evenly spaced grid. Weights of at most ``k`` different values get just those values.
Everything is determined by the weights: no random start.

With ``fisher``, each weight counts by its importance in means and sums; where the importances of a tensor, row or
group sum to 0, all count alike. A weight of 0 counts like any other (SqueezeLLM leaves out the zeros that its sparse
part made; there is none here). 0 itself need not be in a code book, unless all the weights are 0.

Memory: rows are worked off in small lots; a code book for a whole tensor takes about 8 float32 copies of it.

Sources: Lloyd 1982; SqueezeLLM (arXiv:2306.07629), which takes sklearn's k-means with random starts.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import NamedTuple

import torch
from torch import Tensor

from mpsearch.formats.codebook import Codebook
from mpsearch.layer import Layer
from mpsearch.model.bits import pack_rows, unpack_rows
from mpsearch.model.codec import Bytes, Codec, Evidence, Parts, RangeError, all_finite, as_bytes, from_bytes, magnitude

#: Rounds of Lloyd's rule, at most.
ROUNDS = 50
#: Weights worked off at a time, where code books are smaller.
_LOT = {"cpu": 2**20, "cuda": 2**24}


class CodebookCodec(Codec[Codebook]):
    """Rounds to code books; the rule is the one at the top of this file."""

    def encode(self, rows: Tensor, fmt: Codebook, evidence: Evidence) -> dict[str, Tensor]:
        books = 1 if fmt.granularity == "tensor" else len(rows)
        per_row = rows.shape[1] // fmt.group if fmt.granularity == "group" else 1
        values = rows.reshape(books * per_row, -1)
        counts = evidence.importance if fmt.fisher else None
        counts = None if counts is None else counts.to(rows.device).reshape(values.shape)
        codes = torch.empty(values.shape, dtype=torch.uint8, device=rows.device)
        table = torch.empty(len(values), 2**fmt.bits, dtype=torch.float16, device=rows.device)
        lot = max(1, _LOT.get(rows.device.type, 2**24) // values.shape[1])
        for start in range(0, len(values), lot):
            part = values[start : start + lot].to(torch.float32)
            found = centroids(part, 2**fmt.bits, None if counts is None else counts[start : start + lot])
            table[start : start + lot] = found.to(torch.float16)
            stored = table[start : start + lot].to(torch.float32)
            if not all_finite(stored):
                raise RangeError(f"weights reach {magnitude(rows):.4g}; the fp16 numbers of {fmt} end at 65504")
            codes[start : start + lot] = torch.searchsorted(_midpoints(stored), part, out_int32=True)
        return {"payload": codes.reshape(len(rows), -1), "codebook": table.reshape(books, per_row, -1)}

    def decode(self, parts: Parts, fmt: Codebook, columns: int) -> Tensor:
        table = parts["codebook"].to(torch.float32).flatten(0, 1)
        codes = parts["payload"].reshape(len(table), -1)
        values = torch.empty(codes.shape, device=codes.device)
        lot = max(1, _LOT.get(codes.device.type, 2**24) // codes.shape[1])
        for start in range(0, len(table), lot):
            # `gather` takes int64 only: eight times the codes, so not for all of them at once.
            index = codes[start : start + lot].to(torch.int64)
            torch.gather(table[start : start + lot], 1, index, out=values[start : start + lot])
        return values.reshape(-1, columns)

    def pack(self, parts: Parts, fmt: Codebook) -> dict[str, Bytes]:
        payload = pack_rows(parts["payload"].cpu().numpy(), fmt.bits)
        return {"payload": payload, "codebook": as_bytes(parts["codebook"])}

    def unpack(self, packed: Mapping[str, Bytes], fmt: Codebook, layer: Layer) -> dict[str, Tensor]:
        codes = torch.from_numpy(unpack_rows(packed["payload"], layer.rows, layer.columns, fmt.bits))
        table = from_bytes(packed["codebook"], torch.float16, *fmt.books(layer), 2**fmt.bits)
        return {"payload": codes, "codebook": table}


class _Sums(NamedTuple):
    """Sorted values, and how many, how much and how far the first n of them come to, for n from 0."""

    values: Tensor
    counts: Tensor
    moments: Tensor

    @classmethod
    def of(cls, values: Tensor, counts: Tensor | None) -> _Sums:
        ordered, order = values.sort(dim=-1)
        wide = ordered.to(torch.float64)
        if counts is None:
            heaps = torch.arange(values.shape[1] + 1, dtype=torch.float64, device=values.device)
            return cls(ordered, heaps.expand(len(values), -1), _from_zero(wide))
        weights = counts.gather(1, order).to(torch.float64)
        del order
        weights.masked_fill_(weights.sum(-1, keepdim=True) == 0, 1.0)
        return cls(ordered, _from_zero(weights), _from_zero(wide.mul_(weights)))

    def between(self, cuts: Tensor) -> tuple[Tensor, Tensor]:
        """Count and moment of the runs that inner cuts (how many values lie left of each) make."""
        ends = torch.nn.functional.pad(cuts, (1, 0))
        ends = torch.nn.functional.pad(ends, (0, 1), value=self.values.shape[1])
        return self.counts.gather(1, ends).diff(dim=-1), self.moments.gather(1, ends).diff(dim=-1)


def centroids(values: Tensor, k: int, counts: Tensor | None = None) -> Tensor:
    """Find the k-means of each row.

    Args:
        values: (rows, n) float32.
        k: centroids of a row.
        counts: (rows, n): how much each value counts, at least 0; None: alike.

    Returns:
        (rows, k) float64, lowest first.

    >>> centroids(torch.tensor([[0.0, 1.0, 8.0, 9.0, 10.0, 0.5]]), 2).tolist()
    [[0.5, 9.0]]
    """
    sums = _Sums.of(values, counts)
    n = values.shape[1]
    runs = torch.arange(1, k, device=values.device) * n // k
    even = torch.linspace(0.0, 1.0, k, dtype=torch.float64, device=values.device)
    low, high = sums.values[:, :1].to(torch.float64), sums.values[:, -1:].to(torch.float64)
    spaced = low + (high - low) * even
    first, quality = _lloyd(sums, _means(sums, runs.expand(len(values), -1), spaced))
    second, other = _lloyd(sums, spaced)
    found = torch.where((other > quality).unsqueeze(-1), second, first)
    return _exact(sums.values, found)


def _lloyd(sums: _Sums, start: Tensor) -> tuple[Tensor, Tensor]:
    """Return centroids, and by how much they lessen each row's sum of squares."""
    found, cuts = start, None
    for _ in range(ROUNDS):
        moved = torch.searchsorted(sums.values, _midpoints(found).to(torch.float32), right=True)
        if cuts is not None and torch.equal(moved, cuts):
            break
        cuts = moved
        found = _means(sums, cuts, found)
    cuts = torch.searchsorted(sums.values, _midpoints(found).to(torch.float32), right=True)
    count, moment = sums.between(cuts)
    return found, (2 * moment * found - count * found.square()).sum(-1)


def _means(sums: _Sums, cuts: Tensor, otherwise: Tensor) -> Tensor:
    count, moment = sums.between(cuts)
    means = torch.where(count > 0, moment / count.clamp(min=torch.finfo(torch.float64).tiny), otherwise)
    # An empty run keeps a centroid that its neighbours may have passed.
    return means.sort(dim=-1).values


def _exact(ordered: Tensor, found: Tensor) -> Tensor:
    """Replace the centroids of rows that have no more values than centroids by those values."""
    place = torch.nn.functional.pad((ordered.diff(dim=-1) != 0).cumsum(-1), (1, 0))
    few = place[:, -1:] < found.shape[1]
    values = ordered[:, -1:].to(torch.float64).repeat(1, found.shape[1])
    values.scatter_(1, place.clamp_(max=found.shape[1] - 1), ordered.to(torch.float64))
    return torch.where(few, values, found)


def _midpoints(levels: Tensor) -> Tensor:
    return (levels[:, :-1] + levels[:, 1:]) / 2


def _from_zero(numbers: Tensor) -> Tensor:
    return torch.nn.functional.pad(numbers.cumsum(-1), (1, 0))
