"""Running a model again from the first changed layer on, with all before it remembered."""

from __future__ import annotations

import itertools
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from typing import Any

import torch
from torch import Tensor, nn

from mpsearch.errors import InputError
from mpsearch.layer import Layer
from mpsearch.model.model import Batch, Model


class Replay:
    """Repeats forward passes that differ from the original only from some layer on.

    A transformer is a list of blocks that run one after the other. What the block before the changed one
    gave, and what the parts of the changed block gave that end before the changed layer begins, is remembered from a
    pass of the original model, and returned instead of computed. What follows is computed as always, so the
    result is the same bit for bit. That is checked on the first batch, with the original weights, for every place
    that passes start from; where it does not hold, or where the model has no such list, passes run in full.

    Attributes:
        exact: whether the passes for the layers prepared last start in the middle.

    Memory: the outputs of one block and of all parts of the next, over all batches.
    """

    def __init__(self, model: Model, batches: Sequence[Batch]) -> None:
        self._model = model
        self._batches = batches
        self._order, self._end = _clock(model, batches[0])
        self._blocks = _blocks_in_order(model.module, self._order)
        self._stage: int | None = None
        self._kept: list[dict[nn.Module, Any]] = []
        self._before = 0
        self._inside: list[nn.Module] = []
        with torch.no_grad():
            self._full = model.logits(batches[0])
        self._checked: dict[tuple[int, frozenset[nn.Module]], bool] = {}
        self.exact = False

    @classmethod
    def of(cls, model: Model, batches: Sequence[Batch]) -> Replay:
        """Return the replay of these batches, made once while the model is kept."""
        return model.memo("replay", batches, lambda: cls(model, batches))

    def prepare(self, layers: Sequence[Layer]) -> None:
        """Remember what comes before these layers. Call while the model is unchanged."""
        self.exact = False
        if not self._blocks:
            return
        modules = [self._model.holder(n) for layer in layers for n in (layer.name, *layer.shared)]
        first = min(self._order.get(module, -1) for module in modules)
        stage = sum(1 for block in self._blocks if self._order[block] <= first)
        # A block is called before all that it holds, so the first changed layer can only be in the last block begun.
        held = set(self._blocks[stage - 1].modules()) if stage else set()
        inside = any(module in held for module in modules)
        stage = stage - 1 if inside else stage if stage == len(self._blocks) else 0
        if stage != self._stage:
            self._remember(stage)
        self._before = stage
        self._inside = self._finished(self._blocks[stage], first) if stage < len(self._blocks) else []
        what = (stage, frozenset(self._inside))
        if what not in self._checked:
            self.exact = True
            self._checked[what] = self._agrees()
        self.exact = self._checked[what]

    def _agrees(self) -> bool:
        try:
            with torch.no_grad():
                return torch.equal(self.logits(0), self._full)
        except InputError:
            # Modules in a list need not give alike: what T5's cross-attention gives is no answer of its self-attention.
            return False

    def logits(self, i: int) -> Tensor:
        """Logits of batch ``i`` with the model as it is now, changed in the prepared layers only."""
        if not self.exact:
            return self._model.logits(self._batches[i])
        with _answering(self._skipped(self._kept[i], self._before, self._inside)):
            return self._model.logits(self._batches[i])

    def _skipped(self, kept: Mapping[nn.Module, Any], stage: int, inside: Sequence[nn.Module]) -> dict[nn.Module, Any]:
        # Every block before the stage answers as the last of them: nobody reads what the earlier ones give,
        # but it must look like a block's output.
        answers = dict.fromkeys(self._blocks[:stage], kept[self._blocks[stage - 1]]) if stage else {}
        return answers | {module: kept[module] for module in inside}

    def _finished(self, module: nn.Module, first: int) -> list[nn.Module]:
        """The largest parts of a module that had ended when the first changed layer began."""
        found: list[nn.Module] = []
        for part in module.children():
            found += [part] if self._end.get(part, first) < first else self._finished(part, first)
        return found

    def _remember(self, stage: int) -> None:
        keep: list[nn.Module] = []
        if stage > 0:
            keep.append(self._blocks[stage - 1])
        if stage < len(self._blocks):
            keep += [module for module in self._blocks[stage].modules() if module in self._end]
        self._kept = []
        for batch in self._batches:
            self._kept.append(_outputs(self._model, batch, keep))
        self._stage = stage


def _clock(model: Model, batch: Batch) -> tuple[dict[nn.Module, int], dict[nn.Module, int]]:
    """When the modules that run once begin and end, in one pass."""
    begun: dict[nn.Module, list[int]] = {}
    ended: dict[nn.Module, int] = {}
    ticks = itertools.count()

    def begin(module: nn.Module, args: Any) -> None:
        begun.setdefault(module, []).append(next(ticks))

    def end(module: nn.Module, args: Any, output: Any) -> None:
        ended[module] = next(ticks)

    handles = [module.register_forward_pre_hook(begin) for module in model.module.modules()]
    handles += [module.register_forward_hook(end) for module in model.module.modules()]
    try:
        with torch.no_grad():
            model.logits(batch)
    finally:
        for handle in handles:
            handle.remove()
    once = {module: times[0] for module, times in begun.items() if len(times) == 1}
    return once, {module: time for module, time in ended.items() if module in once}


def _blocks_in_order(module: nn.Module, order: Mapping[nn.Module, int]) -> list[nn.Module]:
    """Find the longest list of modules that run once each, in order."""
    usable = [
        list(blocks)
        for blocks in module.modules()
        if isinstance(blocks, nn.ModuleList)
        and len(blocks) > 1
        and all(block in order for block in blocks)
        and all(order[a] < order[b] for a, b in itertools.pairwise(blocks))
    ]
    return max(usable, key=len, default=[])


def _outputs(model: Model, batch: Batch, modules: Sequence[nn.Module]) -> dict[nn.Module, Any]:
    kept: dict[nn.Module, Any] = {}

    def keep(module: nn.Module, args: Any, output: Any) -> None:
        kept[module] = _copy(output)

    handles = [module.register_forward_hook(keep) for module in modules]
    try:
        with torch.no_grad():
            model.logits(batch)
    finally:
        for handle in handles:
            handle.remove()
    return kept


@contextmanager
def _answering(skipped: Mapping[nn.Module, Any]) -> Iterator[None]:
    """Let modules answer from memory instead of running."""
    try:
        for module, output in skipped.items():
            module.forward = _answer(output)
        yield
    finally:
        for module in skipped:
            module.__dict__.pop("forward", None)


def _answer(output: Any) -> Any:
    # A copy each time: what comes next may work in place.
    return lambda *args, **kwargs: _copy(output)


def _copy(output: Any) -> Any:
    if isinstance(output, Tensor):
        return output.clone()
    if isinstance(output, tuple):
        return tuple(_copy(item) for item in output)
    return output
