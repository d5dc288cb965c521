"""Blocks of a model, and how far each turns what passes through it."""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn

from mpsearch.layer import Layer
from mpsearch.model.model import Model
from mpsearch.sensitivity.statistics import run


def _tensor(value: Any) -> Tensor | None:
    """The first tensor of real numbers in what a module takes or gives."""
    if isinstance(value, Tensor):
        return value if value.is_floating_point() else None
    parts = value.values() if isinstance(value, dict) else value if isinstance(value, (tuple, list)) else ()
    return next((x for x in map(_tensor, parts) if x is not None), None)


def candidates(module: nn.Module) -> list[str]:
    """Paths of what may be blocks: entries of lists and sequences of modules, outer ones first.

    >>> candidates(nn.Sequential(nn.Linear(2, 2), nn.Sequential(nn.ReLU())))
    ['0', '1', '1.0']
    """
    return [
        f"{path}.{name}" if path else name
        for path, outer in module.named_modules()
        if isinstance(outer, (nn.ModuleList, nn.Sequential))
        for name, _ in outer.named_children()
    ]


@dataclass
class Turn:
    """Products of a block's inputs and outputs, summed, and the cosines of single tokens."""

    dot: float = 0.0
    before: float = 0.0
    after: float = 0.0
    cosines: float = 0.0
    tokens: int = 0

    def add(self, x: Tensor, y: Tensor) -> None:
        """Count one call."""
        rows, moved = x.double().reshape(-1, x.shape[-1]), y.double().reshape(-1, y.shape[-1])
        dots, before, after = (rows * moved).sum(1), rows.square().sum(1), moved.square().sum(1)
        self.dot += float(dots.sum())
        self.before += float(before.sum())
        self.after += float(after.sum())
        norms = (before * after).sqrt()
        self.cosines += float(torch.where(norms == 0, torch.zeros_like(dots), dots / norms.clamp(min=1e-300)).sum())
        self.tokens += len(rows)

    @property
    def flattened(self) -> float:
        """Cosine of all inputs and all outputs, each as one vector; 0 when either is 0."""
        norm = math.sqrt(self.before) * math.sqrt(self.after)
        return self.dot / norm if norm else 0.0

    @property
    def by_token(self) -> float:
        """Mean over tokens of the cosine; a token of zeros counts 0."""
        return self.cosines / self.tokens if self.tokens else 0.0


def turns(model: Model, batch: Any, layers: Sequence[Layer]) -> dict[str, Turn | None]:
    """Find for each layer that was called its block's turn; None for a layer outside of any block.

    A block is the outermost entry of a list of modules (decoder layers, residual stages) that holds the layer and gives
    as much as it takes. Cost: one forward pass.
    """
    seen: dict[str, Turn] = {}
    uneven: set[str] = set()
    called: set[str] = set()

    def watch(path: str) -> Any:
        def hook(module: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any], output: Any) -> None:
            x, y = _tensor((args, kwargs)), _tensor(output)
            if x is None or y is None or x.shape != y.shape:
                uneven.add(path)
            elif x.numel():
                seen.setdefault(path, Turn()).add(x, y)

        return hook

    def note(name: str) -> Any:
        def hook(module: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any]) -> None:
            first = args[0] if args else next(iter(kwargs.values()), None)
            if not isinstance(first, Tensor) or first.numel():
                called.add(name)

        return hook

    handles = [
        model.module.get_submodule(path).register_forward_hook(watch(path), with_kwargs=True)
        for path in candidates(model.module)
    ]
    handles += [
        model.holder(name).register_forward_pre_hook(note(layer.name), with_kwargs=True)
        for layer in layers
        if layer.kind != "kv_cache"
        for name in (layer.name, *layer.shared)
    ]
    try:
        run(model, batch)
    finally:
        for handle in handles:
            handle.remove()
    blocks = {path: turn for path, turn in seen.items() if path not in uneven}
    return {layer.name: _block_of(layer, blocks) for layer in layers if layer.name in called}


def _block_of(layer: Layer, blocks: dict[str, Turn]) -> Turn | None:
    if layer.shared:
        return None  # what several places share belongs to none of them
    parts = layer.name.split(".")
    paths = (".".join(parts[:i]) for i in range(1, len(parts) + 1))
    return next((blocks[path] for path in paths if path in blocks), None)
