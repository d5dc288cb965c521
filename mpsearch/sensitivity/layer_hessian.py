"""Layer Hessian: the error of each layer's output as a quadratic form in the error of its weight."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, replace
from typing import Any, ClassVar, Literal, get_args

import torch
from torch import Tensor, nn

from mpsearch.errors import InputError
from mpsearch.format import Format
from mpsearch.formats.integer import Integer
from mpsearch.layer import Decision, Layer
from mpsearch.model.cut import put
from mpsearch.model.evidence import _patches
from mpsearch.model.model import Model
from mpsearch.model.reads import input_of
from mpsearch.parts import wholes
from mpsearch.sensitivity.assemble import Cell, Deltas, build_table
from mpsearch.sensitivity.saliency import compensated
from mpsearch.sensitivity.statistics import relative
from mpsearch.tables import SensitivityTable

#: Weights of a layer that are multiplied in float64 at once.
_AT_ONCE = 2**24

Saliency = Literal["format", "gptq", "owq", "obq"]


@dataclass(frozen=True)
class LayerHessian:
    """Half the quadratic form of each layer's input Hessian, at the rounding error.

    score = sum over the decision's layers of 1/2 tr(D H D^T), D = Q(W) - W, H = 2 X X^T / N over the N tokens of a
    batch: the mean over tokens of the squared error of the layer's output. With ``relative`` divided by
    1/2 tr(W H W^T), of the whole layer also for a part of it, so that parts of rows add up. The same number as
    ``output_mse`` gives, from one matrix per layer instead of one product per format and call: quicker for many formats
    or tokens, at the price of the matrix.

    ``saliency="gptq"`` scores what is left after error feedback: integer formats without a rule are rounded by GPTQ,
    from the calibration data, as the format with ``-gptq`` ships them. Other formats, and layers that GPTQ
    cannot take, are rounded as they are.

    Two take each weight's error by itself, 1/2 sum_ij c_j D_ij^2. ``owq``: c_j = H_jj, every column rounded alone: what
    is expected when the errors of columns are independent. ``obq``: c_j = 1 / [H^-1]_jj, every weight rounded alone
    while its row makes good what it can (`compensated`, with 0.01 of H's mean diagonal as damping): never more than
    ``owq``, and the same for inputs that do not correlate. An embedding's lookups do not correlate.

    Bias: none in the local error, but ``owq`` and ``obq`` leave out how the errors of columns meet; blind to what
    becomes of it behind the layer. Standard error: from batch to batch.
    Cost: one forward pass, per format rows x columns x min(N, columns) multiplications, and for all layers at once
    8 columns^2 bytes each (float64), or 4 N columns where N is smaller; an embedding takes one count per row. ``obq``
    inverts each layer's matrix, one at a time.
    Stacked experts have inputs of their own: not observed.
    Sources: GPTQ (Frantar et al. 2023, arXiv:2210.17323), Optimal Brain Compression (Frantar and Alistarh 2022), OWQ
    (Lee et al. 2024, arXiv:2306.02272), whose scores of columns add up to twice ``owq``.

    Attributes:
        relative: divide by the squared output.
        saliency: ``format`` (as the format rounds), ``gptq``, ``owq`` or ``obq``.

    >>> import torch, mpsearch as mp
    >>> model = mp.wrap(torch.nn.Linear(1, 2, bias=False), logits=lambda m, x: m(x))
    >>> _ = model.module.weight.data.copy_(torch.tensor([[1.0], [0.6]]))
    >>> table = mp.score(model, [torch.tensor([[1.0], [3.0]])], ["int2-tensor"], "layer_hessian", relative=False)
    >>> round(float(table.value[0, 0]), 4)  # 0.4^2 times the mean of 1 and 9
    0.8
    """

    relative: bool = True
    saliency: Saliency = "format"
    by: ClassVar[Literal["cell", "batch"]] = "batch"
    covers: ClassVar[Sequence[str]] = ("weights",)
    parts: ClassVar[bool] = True
    version: ClassVar[int] = 2
    streams: ClassVar[Literal["", "forward", "backward"]] = "forward"
    cost: ClassVar[str] = "1 forward, 1 product per cell"
    needs: ClassVar[Sequence[str]] = ("data",)

    def __post_init__(self) -> None:
        if not isinstance(self.relative, bool):
            raise InputError("E113", f"layer_hessian: relative is {self.relative!r}; give true or false")
        if self.saliency not in get_args(Saliency):
            raise InputError(
                "E113", f"layer_hessian: saliency is {self.saliency!r}; give 'format', 'gptq', 'owq' or 'obq'"
            )

    def refuses(self, model: Model) -> str:
        return "" if model.has_logits or model.has_loss else "it needs logits or a loss to run the model"

    def score(
        self, model: Model, batches: Sequence[Any], layers: Sequence[Layer], formats: Sequence[Format]
    ) -> SensitivityTable:
        return SensitivityTable.mean([self._one(model, batch, layers, formats) for batch in batches])

    def _one(self, model: Model, batch: Any, layers: Sequence[Layer], formats: Sequence[Format]) -> SensitivityTable:
        deltas = Deltas.of(model)
        forms = InputForms(model, batch, layers)
        norms: dict[str, float] = {}

        def part(layer: Layer, fmt: Format) -> float:
            moved = deltas.own(layer, self._rounded(layer, fmt))
            alone = self.saliency in ("owq", "obq")
            error = forms.apart(layer, moved, self.saliency) if alone else forms.half(layer, moved)
            if not self.relative or error == 0:
                return error
            if layer.owner not in norms:
                norms[layer.owner] = forms.half(layer.whole, model.weight(layer.name).detach())
            whole = norms[layer.owner]
            return relative(error, whole)

        def cell(decision: Decision, fmt: Format) -> Cell:
            if any(not forms.tokens.get(layer.owner) for layer in decision.layers):
                return Cell(status="not_observed")
            return Cell(sum(part(layer, fmt) for layer in decision.layers))

        unit = "relative squared output error" if self.relative else "squared output error/token"
        return build_table(layers, formats, cell, unit=unit, samples=1, source={"estimator": "layer_hessian"})

    def _rounded(self, layer: Layer, fmt: Format) -> Format:
        if self.saliency == "gptq" and isinstance(fmt, Integer) and not fmt.rule:
            fed = replace(fmt, rule="gptq")
            return fmt if fed.refuses(layer) else fed
        return fmt


class InputForms:
    """The inputs of all layers over one batch in one pass: X itself while it has fewer tokens than columns, else X X^T.

    Attributes:
        tokens: whole layer -> how many inputs (tokens, positions) it was called with.
    """

    def __init__(self, model: Model, batch: Any, layers: Sequence[Layer]) -> None:
        self.tokens: dict[str, int] = {}
        self._inputs: dict[str, Tensor] = {}
        self._sums: dict[str, Tensor] = {}
        self._apart: dict[tuple[str, str], Tensor] = {}
        handles = [
            model.holder(name).register_forward_hook(self._watch(layer), with_kwargs=True)
            for layer in wholes(layers)
            if layer.kind not in ("expert", "kv_cache")
            for name in (layer.name, *layer.shared)
        ]
        try:
            with torch.no_grad():
                model.logits(batch) if model.has_logits else model.loss(batch)
        finally:
            for handle in handles:
                handle.remove()

    def _watch(self, layer: Layer) -> Any:
        def hook(module: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any], output: Any) -> None:
            x = input_of(module, args, kwargs).detach()
            if isinstance(module, nn.Embedding):
                self._add(f"{layer.name} lookups", torch.bincount(x.reshape(-1), minlength=layer.rows).double())
                count = x.numel()
            else:
                rows = _patches(module, x, layer).reshape(-1, layer.groups, layer.columns).transpose(0, 1)
                self._keep(layer, rows)
                count = rows.shape[1]
            self.tokens[layer.name] = self.tokens.get(layer.name, 0) + count

        return hook

    def _keep(self, layer: Layer, rows: Tensor) -> None:
        """Take more inputs, as (groups, tokens, columns)."""
        kept = self._inputs.pop(layer.name, None)
        if kept is not None:
            rows = torch.cat([kept, rows], dim=1)
        if layer.name not in self._sums and rows.shape[1] < layer.columns:
            self._inputs[layer.name] = rows if kept is not None else rows.clone()
            return
        wide = rows.double()
        self._add(layer.name, wide.transpose(1, 2) @ wide)

    def _add(self, name: str, part: Tensor) -> None:
        self._sums[name] = self._sums[name].add_(part) if name in self._sums else part

    def half(self, layer: Layer, error: Tensor) -> float:
        """Return ``1/2 tr(D H D^T)`` with ``H = 2 X X^T / N``: the mean squared output for a weight (or an error).

        Args:
            layer: a layer, or a part of one.
            error: in the layer's shape.
        """
        whole = layer.whole
        if layer.is_part and layer.groups > 1:  # its rows may lie in several groups of inputs
            return self.half(whole, put({layer: error}, error.new_zeros(layer.of_shape)))
        turned = error.movedim(layer.out_axis, 0).reshape(layer.rows, -1)
        form, kept = self._sums.get(whole.name), self._inputs.get(whole.name)
        lookups = self._sums.get(f"{whole.name} lookups")
        inputs, first = slice(*(layer.inputs or (None,))), (layer.channels or (0,))[0]
        step = max(1, _AT_ONCE // layer.columns) if layer.groups == 1 else layer.rows
        total = 0.0
        for start in range(0, layer.rows, step):
            rows = turned[start : start + step].double()
            grouped = rows.reshape(layer.groups, -1, layer.columns)
            if kept is not None:
                answers = grouped @ kept[..., inputs].double().transpose(1, 2)
                total += float(answers.square_().sum())
            if form is not None:
                total += float((grouped @ form[..., inputs, inputs]).mul_(grouped).sum())
            if lookups is not None:
                counts = lookups[first + start : first + start + len(rows)]
                total += float(counts @ rows.square_().sum(dim=1))
        return total / self.tokens[whole.name]

    def matrix(self, layer: Layer) -> Tensor:
        """Return ``H = 2 X X^T / N`` of what a whole layer was multiplied with: (groups, columns, columns), float64.

        Without what was looked up in it, of which every row has its own.
        """
        form, kept = self._sums.get(layer.name), self._inputs.get(layer.name)
        total = torch.zeros(layer.groups, layer.columns, layer.columns, dtype=torch.float64) if form is None else form
        if kept is not None:
            wide = kept.double()
            total = total.to(wide.device) + wide.transpose(1, 2) @ wide
        return total * (2 / self.tokens[layer.name])

    def apart(self, layer: Layer, error: Tensor, saliency: Saliency) -> float:
        """Return ``1/2 sum_ij c_j D_ij^2``, ``c`` that of ``owq`` or ``obq``.

        Args:
            layer: a layer, or a part of one.
            error: in the layer's shape.
            saliency: ``owq`` or ``obq``.
        """
        whole = layer.whole
        if layer.is_part and layer.groups > 1:
            return self.apart(whole, put({layer: error}, error.new_zeros(layer.of_shape)), saliency)
        loss = self._columns(whole, saliency)[..., slice(*(layer.inputs or (None,)))]
        if loss.shape[1] > 1:
            loss = loss[:, slice(*(layer.channels or (None,)))]
        turned = error.movedim(layer.out_axis, 0).reshape(layer.groups, -1, layer.columns).double()
        return float(turned.square_().mul_(loss.to(turned.device)).sum()) / 2

    def _columns(self, layer: Layer, saliency: Saliency) -> Tensor:
        """Loss per squared error: (groups, 1 or the rows where each has its own, columns)."""
        key = layer.name, saliency
        if key not in self._apart:
            counts = self._sums.get(f"{layer.name} lookups")
            lookups = None if counts is None else counts * (2 / self.tokens[layer.name])
            called = layer.name in self._sums or layer.name in self._inputs
            if lookups is not None and not called:
                self._apart[key] = lookups[None, :, None].expand(1, -1, layer.columns)
            elif saliency == "obq":
                self._apart[key] = compensated(self.matrix(layer), lookups)
            else:
                diagonal = self.matrix(layer).diagonal(dim1=1, dim2=2).unsqueeze(1)
                self._apart[key] = diagonal if lookups is None else diagonal + lookups[None, :, None]
        return self._apart[key]
