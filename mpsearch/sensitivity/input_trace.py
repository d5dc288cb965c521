"""Average curvature of the loss in the inputs of layers, times their rounding errors (HAWQ-V2's activation term)."""

from __future__ import annotations

import math
from collections.abc import Iterator, Sequence
from contextlib import nullcontext
from dataclasses import dataclass
from typing import Any, Literal

import torch
from torch import Tensor

from mpsearch.errors import InputError
from mpsearch.format import Format
from mpsearch.layer import Layer
from mpsearch.model.model import Model, samples_of
from mpsearch.sensitivity.activation_curvature import ReadErrors, Reads, rounds
from mpsearch.sensitivity.assemble import Cell, batch_seed, mean_cell
from mpsearch.sensitivity.derivatives import dot, math_attention, random_signs

#: Change of a finite difference on halving its step, relative to the sum over inputs, that counts as settled.
_SETTLED = 0.05


@dataclass(frozen=True)
class InputTrace:
    """1/2 tr(H_x) / n_x ||Q(x) - x||^2 of the inputs x that formats round, by decision and format.

    H_x is the Hessian of one sample's mean loss in all n_x numbers that a layer reads in that sample, over all its
    calls; the term is the mean over the samples of a batch, because H_x depends on the sample. The trace is
    Hutchinson's, the mean over probes of v^T H v, each input's random signs v being scaled by its root mean square,
    and divided by its square again: that keeps a probe of all inputs at once unbiased, and each step small next to the
    input it is taken in.

    Standard error: over probes, for these samples. Cost: one forward and backward pass per sample, and per probe as
    `mpsearch.sensitivity.hessian_trace`. Memory: the inputs and their gradients of one sample.

    Attributes:
        probes: probes per batch, in equal parts for each sample, but at least 2.
        probing: ``joint``, all inputs at once, or ``layer``, one at a time.
        product: ``double_backward``, or ``finite_difference``: [g(x + h v) - g(x)] / h, h halved until it settles.
        step: first h.
        seed: seed of the probes.
    """

    probes: int
    probing: Literal["joint", "layer"]
    product: Literal["finite_difference", "double_backward"]
    step: float
    seed: int

    def terms(
        self, model: Model, batch: Any, layers: Sequence[Layer], formats: Sequence[Format]
    ) -> dict[tuple[str, Format], Cell]:
        """The terms of one batch; nothing for formats that leave the input as it is.

        Raises:
            InputError: a finite difference does not settle, or what a layer reads changes its shape (E516).
        """
        reads = Reads(model, layers, formats)
        if not reads:
            return {}
        errors = ReadErrors(model, batch, layers, formats, lambda: model.loss(batch))
        generator = torch.Generator().manual_seed(batch_seed(self.seed, ["inputs", batch]))
        found: dict[tuple[str, Format], list[Cell]] = {}
        samples = list(samples_of(batch))
        each = max(2, math.ceil(self.probes / len(samples)))
        for sample in samples:
            traces = self.traces(model, sample, reads, generator, each)
            for key, cell in _weighted(reads, errors, traces, formats).items():
                found.setdefault(key, []).append(cell)
        return {
            key: Cell(
                math.fsum(cell.value for cell in cells) / len(samples),
                math.sqrt(math.fsum(cell.spread**2 for cell in cells)) / len(samples),
            )
            for key, cells in found.items()
        }

    def traces(
        self, model: Model, sample: Any, reads: Reads, generator: torch.Generator, probes: int
    ) -> list[list[float]]:
        """Estimate tr(H_x) of every tensor that is read in one sample: (probes, tensors), in the order of `Reads`."""
        twice = self.product == "double_backward"
        with math_attention() if twice else nullcontext(), reads.recording() as zeros:
            loss = model.loss(sample)
        if not zeros:
            return []
        start = torch.autograd.grad(loss, zeros, create_graph=twice, materialize_grads=True)
        scales = [math.sqrt(dot(read.x, read.x) / read.x.numel()) or 1.0 for read in reads.found]
        curvature = _Curvature(model, sample, reads, zeros, start, scales)
        groups = [[i] for i in range(len(zeros))] if self.probing == "layer" else [list(range(len(zeros)))]
        draws = self._draws(zeros, generator)
        if twice:
            return [curvature.exact(next(draws), groups) for _ in range(probes)]
        signs = next(draws)
        step, first = self._settled(curvature, signs, groups)
        return [first, *(curvature.by_difference(next(draws), groups, step) for _ in range(probes - 1))]

    def _draws(self, like: Sequence[Tensor], generator: torch.Generator) -> Iterator[list[Tensor]]:
        while True:
            yield [random_signs(x, generator).to(x.device) for x in like]

    def _settled(
        self, curvature: _Curvature, signs: list[Tensor], groups: list[list[int]]
    ) -> tuple[float, list[float]]:
        """Halve the step until the first probe changes little; return it and the probe."""
        step = self.step
        found = curvature.by_difference(signs, groups, step)
        for _ in range(8):
            step /= 2
            finer = curvature.by_difference(signs, groups, step)
            change, size = curvature.compared(found, finer)
            found = finer
            # An input can have no curvature at all; then only the rounding of the gradients is left to compare.
            if change <= _SETTLED * size + 1e-6 * curvature.slope / step:
                return step, found
        raise InputError(
            "E516", "hessian_trace: the finite difference does not settle", advice='set product = "double_backward"'
        )


@dataclass(frozen=True, eq=False)
class _Curvature:
    """Products of the Hessian of one sample in what was read."""

    model: Model
    sample: Any
    reads: Reads
    zeros: Sequence[Tensor]
    start: Sequence[Tensor]
    scales: Sequence[float]

    @property
    def slope(self) -> float:
        """Size of the gradient, in scaled inputs."""
        sizes = (float(g.detach().abs().sum(dtype=torch.float64)) for g in self.start)
        return math.fsum(size * scale for size, scale in zip(sizes, self.scales, strict=True))

    def compared(self, a: Sequence[float], b: Sequence[float]) -> tuple[float, float]:
        """Difference of two estimates, and size of the second, in scaled inputs."""
        squares = [scale**2 for scale in self.scales]
        change = math.fsum(abs(x - y) * s for x, y, s in zip(a, b, squares, strict=True))
        return change, math.fsum(abs(y) * s for y, s in zip(b, squares, strict=True))

    def exact(self, signs: Sequence[Tensor], groups: Sequence[Sequence[int]]) -> list[float]:
        found = [0.0] * len(signs)
        for group in groups:
            # A loss that is linear in a tensor gives a gradient without a graph, and has no curvature there.
            able = [i for i in group if self.start[i].requires_grad]
            if not able:
                continue
            products = torch.autograd.grad(
                [self.start[i] for i in able],
                [self.zeros[i] for i in able],
                [signs[i] * self.scales[i] for i in able],
                retain_graph=True,
                materialize_grads=True,
            )
            for i, product in zip(able, products, strict=True):
                found[i] = dot(product, signs[i]) / self.scales[i]
        return found

    def by_difference(self, signs: Sequence[Tensor], groups: Sequence[Sequence[int]], step: float) -> list[float]:
        found = [0.0] * len(signs)
        for group in groups:
            shifts = [torch.zeros_like(x) for x in self.zeros]
            for i in group:
                shifts[i] = (step * self.scales[i]) * signs[i]
            asked = [shifts[i].requires_grad_() for i in group]
            with self.reads.disturbed(shifts):
                loss = self.model.loss(self.sample)
            there = torch.autograd.grad(loss, asked, materialize_grads=True)
            for i, gradient in zip(group, there, strict=True):
                found[i] = dot(gradient - self.start[i], signs[i]) / (step * self.scales[i])
        return found


def _weighted(
    reads: Reads, errors: ReadErrors, traces: Sequence[Sequence[float]], formats: Sequence[Format]
) -> dict[tuple[str, Format], Cell]:
    """1/2 tr(H_x) / n_x ||Q(x) - x||^2 of one sample, by decision and format; a layer's calls are one x."""
    groups: dict[tuple[str, str], list[int]] = {}
    for i, read in enumerate(reads.found):
        groups.setdefault((read.decision, read.layer.name), []).append(i)
    probes: dict[tuple[str, Format], list[float]] = {}
    for (decision, _), members in groups.items():
        first = reads.found[members[0]]
        count = sum(reads.found[i].x.numel() for i in members)
        sums = [math.fsum(probe[i] for i in members) for probe in traces]
        for fmt in formats:
            if rounds(fmt, first.layer):
                error = math.fsum(float(errors.squares(reads.found[i], fmt).sum(dtype=torch.float64)) for i in members)
                values = [0.5 * total / count * error for total in sums]
                known = probes.get((decision, fmt), [0.0] * len(values))
                probes[decision, fmt] = [a + b for a, b in zip(known, values, strict=True)]
    return {key: mean_cell(values) for key, values in probes.items()}
