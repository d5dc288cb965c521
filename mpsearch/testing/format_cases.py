"""Layers and weights to try number formats on."""

from __future__ import annotations

from collections.abc import Iterator
from functools import lru_cache
from typing import NamedTuple

import torch
from torch import Tensor

from mpsearch.format import Format
from mpsearch.layer import Layer
from mpsearch.model.codec import Evidence
from mpsearch.model.quantize import fake_quantize

#: Sizes tried for the axis that is cut into groups, odd ones among them.
WIDTHS = (37, 63, 45, 96, 64, 80, 128, 160, 192, 256, 384, 512, 768, 1024)
#: A format that needs evidence is tried on rows up to this: a Hessian has as many rows and columns.
WIDEST_WITH_EVIDENCE = 512


class Case(NamedTuple):
    """A layer, and a weight of normal numbers for it."""

    layer: Layer
    weight: Tensor


def shapes() -> Iterator[Layer]:
    """Yield layers of every kind, of one shape each for every width."""
    for n in WIDTHS:
        yield Layer("linear", "linear", (5, n))
        yield Layer("one_row", "linear", (1, n))
        yield Layer("transposed", "linear", (n, 3), 1)
        yield Layer("embedding", "embedding", (7, n))
        yield Layer("experts", "expert", (2, 3, n), 1)
        yield Layer("experts_transposed", "expert", (2, n, 3), 2)
    for n in (5, 16, 32, 64, 128, 256):
        yield Layer("conv1d", "conv", (4, n, 3))
        yield Layer("conv", "conv", (3, n, 3, 3))
        yield Layer("conv3d", "conv", (2, n, 2, 2, 2))
    yield Layer("depthwise", "conv", (6, 1, 3, 3))
    yield Layer("one_column", "linear", (5, 1))


def cases(fmt: Format, widths: int = 1) -> list[Case]:
    """Make weights that the format takes: of every kind of layer the first ``widths`` shapes of `shapes`."""
    found: dict[str, list[Case]] = {}
    for layer in shapes():
        taken = found.setdefault(layer.name, [])
        if fmt.needs and layer.columns > WIDEST_WITH_EVIDENCE:
            continue
        if len(taken) < widths and not fmt.refuses(layer):
            taken.append(Case(layer, normal(*layer.shape)))
    return [case for taken in found.values() for case in taken]


def normal(*shape: int, seed: int = 0) -> Tensor:
    """Make normal numbers, rounded to bfloat16 so that every number type but float16's smallest holds them."""
    return torch.randn(shape, generator=torch.Generator().manual_seed(seed)).bfloat16().float()


def evidence(fmt: Format, layer: Layer) -> Evidence:
    """Make what a format asks for beside the weight."""
    return _evidence(fmt.needs, layer.rows, layer.columns)


@lru_cache(maxsize=64)
def _evidence(needs: str, rows: int, columns: int) -> Evidence:
    generator = torch.Generator().manual_seed(7)
    if needs == "hessian":
        inputs = torch.randn(columns + 8, columns, generator=generator)
        return Evidence(hessian=2 * inputs.T @ inputs / len(inputs))
    if needs == "importance":
        return Evidence(importance=torch.rand(rows, columns, generator=generator) + 0.01)
    return Evidence()


def rounded(fmt: Format, layer: Layer, weight: Tensor) -> Tensor:
    """Round a weight of a layer."""
    return fake_quantize(weight, fmt, layer.row_axes, name=layer.name, evidence=evidence(fmt, layer))


def same_bits(a: Tensor, b: Tensor) -> bool:
    """Whether two tensors are alike to the bit: type, shape, and -0 told from 0."""
    if a.dtype != b.dtype or a.shape != b.shape:
        return False
    return torch.equal(a.contiguous().view(-1).view(torch.uint8), b.contiguous().view(-1).view(torch.uint8))


def awkward(weight: Tensor) -> dict[str, Tensor]:
    """Make weights of one shape that break careless code."""
    flat = torch.arange(weight.numel()).reshape(weight.shape)
    limit = torch.finfo(torch.float32).max
    spikes = weight.clone()
    spikes.view(-1)[:: max(7, weight.numel() // 9)] *= 1000.0
    return {
        "normal": weight,
        "heavy-tailed": weight**3,
        "spiked": spikes,
        "mixed": torch.where(flat % 3 == 0, torch.zeros(()), weight),
        "tiny": weight * 1e-6,
        "denormal": weight * 1e-40,
        "huge": weight * 1e30,
        "limit": torch.where(flat % 2 == 0, limit, -limit) * torch.ones_like(weight),
        "largest": torch.where(flat % 2 == 0, 3e4, -3e4) * torch.ones_like(weight),
        "positive": weight.abs() + 0.1,
        "negative": -weight.abs() - 0.1,
    }
