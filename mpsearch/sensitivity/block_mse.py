"""Block error: how far the output of a transformer block moves when a decision inside it is changed."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any, ClassVar, Literal

import torch
from torch import Tensor, nn

from mpsearch.errors import InputError
from mpsearch.format import Format
from mpsearch.layer import Decision, Layer, decisions
from mpsearch.model.apply import changed
from mpsearch.model.model import Model, batch_size
from mpsearch.model.replay import _blocks_in_order, _clock, _copy
from mpsearch.sensitivity.assemble import Cell, build_table, mean_cell, offered
from mpsearch.sensitivity.harm import called, change_to
from mpsearch.tables import SensitivityTable


@dataclass(frozen=True)
class BlockMse:
    """Squared error of the output of the enclosing block, with the original model's inputs to that block.

    score = sum over the blocks that hold the decision of ||block'(x) - block(x)||^2 / ||block(x)||^2, both summed over
    the batch, where block' has the decision in the format; without ``relative`` the squared error per sample.

    Blocks are the longest list of modules that run once each, in order, as in `mpsearch.model.replay`. A layer outside
    (embedding, head) is its own block, and a model without blocks is one: its logits. Unlike a layer's own
    output error it sees softmax, gates and norms inside the block, and that tied layers act together.

    The block's output holds its residual stream: where a few huge channels run through it, relative
    errors of all decisions in the block shrink alike.

    Bias: blind to what becomes of the error behind the block. Standard error: over samples where the block keeps
    them apart, from batch to batch when there are several. Cost: one forward pass, and one pass of a single block
    per decision and format. Memory: the inputs of all blocks, of one batch.
    Sources: block reconstruction, Li et al. 2021 (BRECQ); AdaDim (Heo et al. 2024, arXiv:2309.15531) chooses by it.

    Attributes:
        relative: divide by the squared output.

    >>> import torch, mpsearch as mp
    >>> model = mp.wrap(torch.nn.Linear(1, 2, bias=False), logits=lambda m, x: m(x))
    >>> _ = model.module.weight.data.copy_(torch.tensor([[1.0], [0.6]]))
    >>> table = mp.score(model, [torch.ones(1, 1)], ["int2-tensor"], "block_mse")
    >>> round(float(table.value[0, 0]), 4)  # 0.4^2 / (1 + 0.6^2)
    0.1176
    """

    relative: bool = True
    by: ClassVar[Literal["cell", "batch"]] = "batch"
    covers: ClassVar[Sequence[str]] = ("weights", "activations")
    parts: ClassVar[bool] = True
    version: ClassVar[int] = 1
    streams: ClassVar[Literal["", "forward", "backward"]] = "forward"
    cost: ClassVar[str] = "1 forward of a block per cell"
    needs: ClassVar[Sequence[str]] = ("data", "logits")

    def __post_init__(self) -> None:
        if not isinstance(self.relative, bool):
            raise InputError("E113", f"block_mse: relative is {self.relative!r}; give true or false")

    def refuses(self, model: Model) -> str:
        return "" if model.has_logits else "it needs logits to run the model; wrap it: mp.wrap(module, logits=…)"

    def score(
        self, model: Model, batches: Sequence[Any], layers: Sequence[Layer], formats: Sequence[Format]
    ) -> SensitivityTable:
        return SensitivityTable.mean([self._one(model, batch, layers, formats) for batch in batches])

    def _one(self, model: Model, batch: Any, layers: Sequence[Layer], formats: Sequence[Format]) -> SensitivityTable:
        seen = called(model, batch, layers)
        found: dict[tuple[str, Format], list[float]] = {}
        blocks = _Blocks(model, batch, layers)
        for row in decisions(layers):
            if any(layer.name not in seen for layer in row.layers) or row.layers[0].kind == "kv_cache":
                continue
            units = blocks.around(row.layers)
            for fmt in formats:
                if offered(row, fmt):
                    change = change_to(model, dict.fromkeys(row.layers, fmt))
                    with changed(model, change):
                        parts = [unit.errors(self.relative) for unit in units]
                    found[row.name, fmt] = _added(parts)

        def cell(decision: Decision, fmt: Format) -> Cell:
            known = found.get((decision.name, fmt))
            return Cell(status="not_observed") if known is None else mean_cell(known)

        unit = "relative squared block error" if self.relative else "squared block error/sample"
        samples = max((len(values) for values in found.values()), default=0)
        return build_table(layers, formats, cell, unit=unit, samples=samples, source={"estimator": "block_mse"})


def _added(parts: Sequence[Sequence[float]]) -> list[float]:
    """Errors of several blocks, sample by sample where all keep samples apart, else together."""
    if len({len(part) for part in parts}) > 1:
        return [sum(sum(part) / len(part) for part in parts)]
    return [sum(values) for values in zip(*parts, strict=True)]


class _Unit:
    """One block: how to run it on the inputs of the original model, and what it gave."""

    def __init__(self, run: Callable[[], list[Tensor]], samples: int) -> None:
        self._run = run
        self._samples = samples
        with torch.no_grad():
            self._clean = run()

    def errors(self, relative: bool) -> list[float]:
        """Squared error of each sample; its mean is that of the batch. One number if samples are not told apart."""
        with torch.no_grad():
            pairs = list(zip(self._run(), self._clean, strict=True))
        apart = all(clean.dim() > 1 and len(clean) == self._samples for _, clean in pairs)
        count = self._samples if apart else 1
        error = sum((_squares(now - clean, count) for now, clean in pairs), torch.zeros(count, dtype=torch.float64))
        if not relative:
            return (error if apart else error / self._samples).tolist()
        whole = sum(float(_squares(clean, 1)) for _, clean in pairs) / count
        return [x / whole if whole else (0.0 if x == 0 else float("inf")) for x in error.tolist()]


def _squares(x: Tensor, count: int) -> Tensor:
    return x.reshape(count, -1).square().sum(dim=1, dtype=torch.float64).cpu()


class _Blocks:
    """The blocks of a model around some layers, with their inputs on one batch."""

    def __init__(self, model: Model, batch: Any, layers: Sequence[Layer]) -> None:
        self._model = model
        self._batch = batch
        self._samples = batch_size(batch)
        order, _ = _clock(model, batch)
        # A piece of a model knows its block; its list of blocks is not all there.
        own: Sequence[nn.Module] | None = getattr(model, "blocks", None)
        blocks = _blocks_in_order(model.module, order) if own is None else own
        self._block_of = {part: block for block in blocks for part in block.modules()}
        self._whole = not blocks and own is None
        self._units: dict[nn.Module | None, _Unit] = {}
        holders = {
            model.holder(name) for x in layers if x.kind != "kv_cache" for name in (x.name, *x.shared)
        }  # fmt: skip
        self._calls = {} if self._whole else _calls(model, batch, {self._block_of.get(x, x) for x in holders})

    def around(self, layers: Sequence[Layer]) -> list[_Unit]:
        """The blocks that hold any of these layers, in the layers' order."""
        holders = [self._model.holder(name) for layer in layers for name in (layer.name, *layer.shared)]
        wanted = dict.fromkeys(None if self._whole else self._block_of.get(x, x) for x in holders)
        return [self._unit(block) for block in wanted if block is None or self._calls[block]]

    def _unit(self, block: nn.Module | None) -> _Unit:
        if block not in self._units:
            self._units[block] = _Unit(lambda: self._outputs(block), self._samples)
        return self._units[block]

    def _outputs(self, block: nn.Module | None) -> list[Tensor]:
        if block is None:
            return [self._model.logits(self._batch)]
        # Copies, because a block may work in place.
        found = [block(*_copy(args), **{k: _copy(v) for k, v in kwargs.items()}) for args, kwargs in self._calls[block]]
        return [output if isinstance(output, Tensor) else next(x for x in output if x is not None) for output in found]


_Call = tuple[tuple[Any, ...], dict[str, Any]]


def _calls(model: Model, batch: Any, modules: set[nn.Module]) -> Mapping[nn.Module, list[_Call]]:
    """What each module is called with in one pass of the original model."""
    found: dict[nn.Module, list[_Call]] = {module: [] for module in modules}

    def note(module: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any]) -> None:
        found[module].append((_copy(args), {name: _copy(value) for name, value in kwargs.items()}))

    handles = [module.register_forward_pre_hook(note, with_kwargs=True) for module in modules]
    try:
        with torch.no_grad():
            model.logits(batch)
    finally:
        for handle in handles:
            handle.remove()
    return found
