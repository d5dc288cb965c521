"""Expert usage: how many tokens each expert works on."""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass, field
from typing import Any, ClassVar, Literal

import torch
from torch import Tensor, nn

from mpsearch.errors import InputError
from mpsearch.format import Format
from mpsearch.layer import Decision, Layer
from mpsearch.model.model import Model
from mpsearch.sensitivity.assemble import Cell, Deltas, build_table, mean_cell
from mpsearch.sensitivity.statistics import matrices, relative, relative_error, run, runs
from mpsearch.tables import SensitivityTable


@dataclass(frozen=True)
class ExpertUsage:
    """Relative weight errors, weighted by the share of tokens that the weights are used on.

    score = sum over the decision's layers, and over the experts e of a stacked one, of
    s_e ||Q(W_e) - W_e||^2 / ||W_e||^2, s_e = tokens sent to the expert / tokens that reach its router. A layer that is
    not part of an expert has s = 1, so experts that take turns together count as one layer used on every token.

    Experts are the entries of a list of modules whose name holds ``pattern``, or weights stacked in one tensor, whose
    module is given the experts chosen for each token; where it is not, every expert sees every token. An expert
    of its own that no token is sent to is not observed, as nothing is known of its harm; in a stacked weight, which
    gets one format, such experts count with the mean share.

    Bias: ignores how much the router trusts an expert, and all else of the data. Standard error: of the shares, over
    batches; batches in which an expert has no tokens count as 0. Cost: one forward pass per batch, kept for all cells.
    Source: the usage of experts in QuantMoE-Bench (Li et al. 2024), which gives a ranking; relative errors do not count
    a layer's size.

    Attributes:
        pattern: what the name of a list of experts holds.

    >>> import torch, mpsearch as mp
    >>> model = mp.wrap(torch.nn.Linear(4, 1, bias=False), logits=lambda m, x: m(x))
    >>> _ = model.module.weight.data.copy_(torch.tensor([[3.0, 1.0, 0.4, -1.6]]))
    >>> table = mp.score(model, [torch.ones(1, 4)], ["int3-channel"], "expert_usage")
    >>> round(float(table.value[0, 0]), 4)  # 0.32 / 12.72
    0.0252
    """

    pattern: str = "expert"
    by: ClassVar[Literal["cell", "batch"]] = "cell"
    covers: ClassVar[Sequence[str]] = ("weights",)
    version: ClassVar[int] = 1
    streams: ClassVar[Literal["", "forward", "backward"]] = "forward"
    cost: ClassVar[str] = "1 forward"
    needs: ClassVar[Sequence[str]] = ("data",)

    def __post_init__(self) -> None:
        if not isinstance(self.pattern, str) or not self.pattern:
            raise InputError(
                "E113", f"expert_usage: pattern is {self.pattern!r}; give a part of the name of the experts"
            )

    def refuses(self, model: Model) -> str:
        return runs(model)

    def score(
        self, model: Model, batches: Sequence[Any], layers: Sequence[Layer], formats: Sequence[Format]
    ) -> SensitivityTable:
        kept: dict[str, list[Routing]] = model.memo("expert usage", batches, dict)
        if self.pattern not in kept:
            kept[self.pattern] = [_watch(model, batch, self.pattern) for batch in batches]
        routings = kept[self.pattern]
        shares = {x.name: self._shares(x, routings) for x in layers if x.kind != "kv_cache"}

        def cell(decision: Decision, fmt: Format) -> Cell:
            if any(not any(sum(parts) for parts in shares[x.name]) for x in decision.layers):
                return Cell(status="not_observed")
            errors = {x.name: _errors(model, x, fmt) for x in decision.layers}
            return mean_cell(
                [
                    math.fsum(math.fsum(map(_times, shares[x.name][i], errors[x.name])) for x in decision.layers)
                    for i in range(len(batches))
                ]
            )

        unit = "share of tokens x relative squared weight error"
        return build_table(layers, formats, cell, unit=unit, samples=len(batches), source={"estimator": "expert_usage"})

    def _shares(self, layer: Layer, routings: Sequence[Routing]) -> list[list[float]]:
        """Share of tokens of each expert of a layer, batch by batch; of a layer that is no expert, 1."""
        if layer.kind != "expert":
            return [[routing.share(layer, self.pattern)] for routing in routings]
        module = layer.name.rpartition(".")[0]
        found = [routing.stacked.get(module, [0.0] * layer.shape[0]) for routing in routings]
        unused = [not any(parts) for parts in zip(*found, strict=True)]
        # One format for all: an expert that nothing is known of counts as the others do on the whole.
        return [[sum(row) / len(row) if no else s for s, no in zip(row, unused, strict=True)] for row in found]


def _times(share: float, error: float) -> float:
    return share * error


def _errors(model: Model, layer: Layer, fmt: Format) -> list[float]:
    """Relative squared error of each expert of a layer."""
    if layer.kind != "expert":
        return [relative_error(model, layer, fmt)]
    lost = matrices(layer, Deltas.of(model)(layer, fmt)).square().sum(dim=(1, 2))
    norms = matrices(layer, model.weight(layer.name)).square().sum(dim=(1, 2))
    return [relative(float(a), float(b)) for a, b in zip(lost, norms, strict=True)]


@dataclass
class Routing:
    """Where the tokens of a batch went.

    Attributes:
        rows: path of a module -> tokens that it was called with.
        stacked: path of a module of stacked experts -> share of tokens of each expert.
    """

    rows: dict[str, int] = field(default_factory=dict)
    stacked: dict[str, list[float]] = field(default_factory=dict)

    def share(self, layer: Layer, name: str) -> float:
        """Share of the router's tokens that a layer of one expert was called with; 1 for a layer that is none."""
        total = sum(self.rows.get(path, 0) for path in (layer.name, *layer.shared))
        owner = _router(layer.name, name)
        if not total or owner is None or not self.rows.get(owner):
            return float(total > 0)
        return min(1.0, total / self.rows[owner])


def _router(layer: str, name: str) -> str | None:
    """Path of the module that holds a layer's list of experts: what stands before ``experts.7``."""
    parts = layer.split(".")
    places = [i for i in range(len(parts) - 1) if name in parts[i] and parts[i + 1].isdigit()]
    return ".".join(parts[: places[-1]]) if places else None


def _watch(model: Model, batch: Any, name: str) -> Routing:
    """Run a batch and count the tokens of every module that holds weights, or a list of experts."""
    routing = Routing()
    modules = dict(model.module.named_modules())
    routers = {_router(path, name) for path in modules}

    def watch(path: str) -> Any:
        def hook(module: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any], output: Any) -> None:
            given = [x for x in (*args, *kwargs.values()) if isinstance(x, Tensor)]
            if not given:
                return
            first = given[0]
            width = first.shape[-1] if first.is_floating_point() else 1
            routing.rows[path] = routing.rows.get(path, 0) + (first.numel() // width if width else 0)
            count = _stacked(module)
            if count:
                _count(routing, path, given, count)

        return hook

    handles = [
        module.register_forward_hook(watch(path), with_kwargs=True)
        for path, module in modules.items()
        if path in routers or next(module.parameters(recurse=False), None) is not None
    ]
    try:
        run(model, batch)
    finally:
        for handle in handles:
            handle.remove()
    return routing


def _stacked(module: nn.Module) -> int:
    """Number of experts that a module stacks; 0 when it does not."""
    return next((len(x) for x in module.parameters(recurse=False) if x.dim() == 3 and len(x) > 1), 0)


def _count(routing: Routing, path: str, given: Sequence[Tensor], experts: int) -> None:
    chosen = next((x for x in given if x.dtype in (torch.int32, torch.int64)), None)
    if chosen is None or not chosen.numel():
        routing.stacked[path] = [float(chosen is None)] * experts
        return
    known = chosen[(chosen >= 0) & (chosen < experts)].flatten()
    counts = torch.bincount(known, minlength=experts).double() / (chosen.numel() // chosen.shape[-1])
    routing.stacked[path] = [float(x) for x in counts]
