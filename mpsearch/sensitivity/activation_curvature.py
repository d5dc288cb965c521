"""Derivatives of the loss in what layers read, and what rounding does to it: inputs (``W@A``) and KV caches.

A read tensor is disturbed by adding to it on its way in, at the very place where a run rounds it. Layers of one
decision that read one tensor (fused q, k and v) round it alike, so they are disturbed by one and the same addition.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn

from mpsearch.errors import InputError
from mpsearch.format import Format
from mpsearch.formats.activation import Activation
from mpsearch.formats.kv_cache import KvCache
from mpsearch.layer import Layer, decisions
from mpsearch.model.activations import Range, round_input, seen_in
from mpsearch.model.evidence import Calibration, channel_axis, readers
from mpsearch.model.kv_cache import Place, find_caches, round_states, watched_logits
from mpsearch.model.model import Model, batch_size

Run = Callable[[], Any]
#: Of one call: (module, number of its call), or (number of the attention layer, 0 for keys and 1 for values).
Call = tuple[Any, int]


@dataclass(frozen=True, eq=False)
class Read:
    """A tensor that a decision reads in one pass.

    Attributes:
        decision: name of the decision.
        layer: the first of its layers that reads the tensor.
        call: the call that it was first read in.
        axis: axis of the channels.
        x: the tensor.
    """

    decision: str
    layer: Layer
    call: Call
    axis: int
    x: Tensor


class Reads:
    """What the layers that formats round the inputs of, and the KV caches that they round, read in single samples."""

    def __init__(self, model: Model, layers: Sequence[Layer], formats: Sequence[Format]) -> None:
        self._model = model
        self._watched: list[tuple[str, Layer, nn.Module]] = []
        self._places: dict[Call, tuple[str, Layer]] = {}
        caches = find_caches(model) if any(layer.kind == "kv_cache" for layer in layers) else {}
        for row in decisions(layers):
            for layer in row.layers:
                if not any(rounds(fmt, layer) for fmt in formats):
                    continue
                if layer.kind == "kv_cache":
                    place: Place = caches[layer.name]
                    self._places[place.number, place.side] = (row.name, layer)
                else:
                    self._watched += [(row.name, layer, module) for module in readers(model, layer)]
        self.found: list[Read] = []
        self._index: dict[Call, int] = {}
        self._write: Callable[[int, int, Tensor], Tensor] = _as_it_is

    def __bool__(self) -> bool:
        return bool(self._watched or self._places)

    @property
    def caches(self) -> bool:
        """Whether KV caches are among them."""
        return bool(self._places)

    def logits(self, sample: Any) -> Tensor:
        """Logits of a sample, by way of a KV cache where caches are watched."""
        if not self._places:
            return self._model.logits(sample)
        return watched_logits(self._model.module, sample, self._write)

    @contextmanager
    def recording(self) -> Iterator[list[Tensor]]:
        """Note in `found` what is read, and yield what is added to each tensor: zeros, to take gradients in."""
        self.found, self._index = [], {}
        zeros: list[Tensor] = []
        known: dict[tuple[str, int], int] = {}
        kept: list[Tensor] = []  # while they live, their ids name them

        def add(decision: str, layer: Layer, call: Call, axis: int, x: Tensor) -> Tensor:
            if not x.numel():
                return x
            i = known.setdefault((decision, id(x)), len(zeros))
            if i == len(zeros):
                kept.append(x)
                self.found.append(Read(decision, layer, call, axis, x.detach()))
                zeros.append(torch.zeros_like(x, requires_grad=True))
            self._index[call] = i
            return x + zeros[i]

        with self._adding(add):
            yield zeros

    @contextmanager
    def disturbed(self, shifts: Sequence[Tensor]) -> Iterator[None]:
        """Add a shift to each tensor that was found."""

        def add(decision: str, layer: Layer, call: Call, axis: int, x: Tensor) -> Tensor:
            i = self._index.get(call)
            if (i is None and x.numel()) or (i is not None and shifts[i].shape != x.shape):
                raise InputError(
                    "E516",
                    f"layer '{layer.name}' reads {tuple(x.shape)} where it read another shape before a small step",
                    because="what reaches it hangs on the inputs",
                    advice='set product = "double_backward"',
                )
            return x if i is None else x + shifts[i]

        with self._adding(add):
            yield

    @contextmanager
    def _adding(self, add: Callable[[str, Layer, Call, int, Tensor], Tensor]) -> Iterator[None]:
        calls: dict[nn.Module, int] = {}

        def hook(decision: str, layer: Layer) -> Any:
            def before(module: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any]) -> tuple[Any, Any]:
                number = calls[module] = calls.get(module, -1) + 1
                axis = channel_axis(module)
                if args:
                    return (add(decision, layer, (module, number), axis, args[0]), *args[1:]), kwargs
                name = next(iter(kwargs))
                return args, {**kwargs, name: add(decision, layer, (module, number), axis, kwargs[name])}

            return before

        def write(number: int, side: int, states: Tensor) -> Tensor:
            place = self._places.get((number, side))
            return states if place is None else add(*place, (number, side), -1, states)

        self._write = write
        handles = [
            module.register_forward_pre_hook(hook(decision, layer), with_kwargs=True)
            for decision, layer, module in self._watched
        ]
        try:
            yield
        finally:
            self._write = _as_it_is
            for handle in handles:
                handle.remove()


def _as_it_is(number: int, side: int, states: Tensor) -> Tensor:
    return states


def rounds(fmt: Format, layer: Layer) -> bool:
    """Whether a format rounds what a layer reads, or is a cache's that it changes."""
    if fmt.refuses(layer):
        return False
    return not fmt.leaves(layer) if isinstance(fmt, KvCache) else fmt.activation is not None


class ReadErrors:
    """Rounding errors Q(x) - x of what was read in single samples, with the scales of a run of the whole batch.

    Scales that reach over tokens (``-tensor``, ``-channel``) are those of the batch, static ones of the calibration
    data; the scale of the whole tensor of ``nvfp4`` is that of the sample. Cost: a pass if a scale reaches over tokens.
    """

    def __init__(self, model: Model, batch: Any, layers: Sequence[Layer], formats: Sequence[Format], run: Run) -> None:
        """Find the scales. Call while the model is unchanged.

        Raises:
            InputError: a cache is rounded as its tokens grow old (E506), or as `Calibration.input_range`.
        """
        self._static: dict[tuple[str, Activation], Range] = {}
        self._wide: dict[tuple[Call, str], Range] = {}
        grains: set[str] = set()
        for layer in layers:
            for fmt in formats:
                how = fmt.activation
                if isinstance(fmt, KvCache) and fmt.stepwise and rounds(fmt, layer):
                    raise InputError(
                        "E506",
                        f"'{fmt}' rounds tokens as they grow old, and each only for the queries that come later",
                        because="the gradient in a cached token is that of all queries that see it",
                        advice="use a format per token without -recent, or the estimator 'divergence'",
                    )
                if isinstance(how, Activation) and rounds(fmt, layer):
                    if how.static:
                        self._static[layer.name, how] = Calibration.of(model).input_range(layer, how)
                    elif how.grain in ("tensor", "channel"):
                        grains.add(how.grain)
        if grains and batch_size(batch) > 1:
            self._see(Reads(model, layers, formats), grains, run)

    def _see(self, reads: Reads, grains: set[str], run: Run) -> None:
        with torch.no_grad(), reads.recording():
            run()
        for read in reads.found:
            rows = read.x.movedim(read.axis, -1)
            for grain in grains:
                self._wide[read.call, grain] = seen_in(rows.reshape(-1, rows.shape[-1]), grain, None)

    def squares(self, read: Read, fmt: Format) -> Tensor:
        """(Q(x) - x)^2 of a tensor in a format that `rounds` it."""
        if isinstance(fmt, KvCache):
            return (round_states(read.x, fmt) - read.x).square()
        how = fmt.activation
        assert isinstance(how, Activation)
        wide = self._wide and how.grain in ("tensor", "channel")
        seen = self._static[read.layer.name, how] if how.static else self._wide[read.call, how.grain] if wide else None
        return (round_input(read.x, how, read.axis, seen) - read.x).square()
