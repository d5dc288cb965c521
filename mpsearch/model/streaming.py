"""Scoring language models that are larger than memory: piece by piece, from their files."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor, nn

from mpsearch.errors import InputError
from mpsearch.format import Format
from mpsearch.layer import Decision, Layer, Layers, decisions
from mpsearch.model.activation_store import KEEP_BYTES, ActivationStore
from mpsearch.model.empty_model import EmptyModel
from mpsearch.model.find import find_layers
from mpsearch.model.model import Batch, batch_size, samples_of
from mpsearch.model.pieces import Piece, Runner
from mpsearch.model.threads import one_thread
from mpsearch.tables import SensitivityTable

Progress = Callable[[int, int], None]
#: What a piece is scored in when only the gradient that it sends back is wanted.
_ANY = (Format.parse("fp32"),)
_EXAMPLE = {"input_ids": torch.zeros(1, 8, dtype=torch.long)}


@dataclass(frozen=True, eq=False)
class _Part:
    """What is loaded at once.

    Attributes:
        modules: the modules.
        run: gives the part's output for a batch.
        number: of a block; None around the blocks.
    """

    modules: list[nn.Module]
    run: Callable[[Batch], Tensor]
    number: int | None = None


class Stream:
    """A causal language model in a folder, of which one piece at a time is in memory.

    Pieces are what comes before the blocks, each block, and what comes after; the first and the last are one where they
    share weights (tied embeddings). Every piece is shown to the estimator as a model of its own, which gets the hidden
    states that it gets in the whole model, so that the scores are those of the whole model bit for bit.

    Estimators say in ``streams`` what they look at: ``forward`` (weights, and inputs and outputs of layers and blocks:
    pieces in order) or ``backward`` (gradients of single samples: after a forward pass the pieces in reverse order,
    each run again, with the gradient of its output injected). Others need the whole model and are refused.

    Memory: a piece in float32, at most 256 MB of its quantisation errors, and what the estimator itself takes for it;
    hidden states beyond ``keep_bytes`` lie in files. Cost: ``forward`` reads each weight once (tied embeddings twice)
    and runs each block once more than the estimator does; ``backward`` reads all weights twice and keeps the hidden
    states of all blocks and the logits of all samples.

    Weights are read by the names that the model has for them: checkpoints that transformers rearranges as it loads them
    (experts kept one by one) are refused.

    Attributes:
        model: the model without its weights.
    """

    def __init__(self, folder: str | Path, *, spill: Path | None = None, keep_bytes: int = KEEP_BYTES) -> None:
        """Take a folder.

        Args:
            folder: a Hugging Face folder with safetensors.
            spill: where hidden states go that do not fit; the system's temporary folder when left out.
            keep_bytes: hidden states that are kept in memory.

        Raises:
            InputError: as for loading the model; or it does not come in pieces (E506).
        """
        self.model = EmptyModel(folder)
        self._spill = spill
        self._keep_bytes = keep_bytes
        self._store: ActivationStore
        self._runner: Runner

    @property
    def largest(self) -> int:
        """Bytes in float32 of the largest piece that is loaded at once."""
        around = [self.model.around] if self.model.tied else [[module] for module in self.model.around]
        return max(self.model.size(modules) for modules in [*around, *([x] for x in self.model.blocks)])

    def layers(self, batches: Sequence[Batch] = ()) -> Layers:
        """Find the layers, as `find_layers` does in memory. Cost: one forward pass."""
        with one_thread(), self._session(batches):
            return self._joined([self._look(piece, batches) for _, piece in self._pieces(batches)])

    def score(
        self,
        estimator: Any,
        batches: Sequence[Batch],
        formats: Sequence[Format],
        layers: Sequence[Layer] | None = None,
        progress: Progress | None = None,
    ) -> SensitivityTable:
        """Score every decision in every format, as the estimator does in memory.

        Args:
            estimator: the estimator.
            batches: calibration batches.
            formats: the menu.
            layers: what to score; found when left out.
            progress: called with (pieces done, pieces in all).

        Raises:
            InputError: the estimator or a format needs the whole model, or a tie joins several pieces (E506); no such
                layer (E120); nothing to decide (E418).
        """
        if reason := refusal(estimator, formats):
            raise InputError("E506", reason, advice="score it in memory: streaming=False")
        work = self._backward if estimator.streams == "backward" else self._forward
        with one_thread(), self._session(batches):
            if layers is not None:
                self._check(layers)
            found, tables = work(estimator, batches, formats, layers, progress or (lambda done, total: None))
            return _join(tables, decisions(layers if layers is not None else found))

    def _forward(
        self,
        estimator: Any,
        batches: Sequence[Batch],
        formats: Sequence[Format],
        layers: Sequence[Layer] | None,
        progress: Progress,
    ) -> tuple[Layers, list[SensitivityTable]]:
        found: list[Layers] = []
        tables: list[SensitivityTable] = []
        runs = layers is None or "data" in estimator.needs or any(map(_needs, formats))
        for done, (part, piece) in enumerate(self._pieces(batches, runs=runs), start=1):
            if runs:
                found.append(self._look(piece, batches))
            chosen = [x for x in (layers if layers is not None else found[-1]) if self.model.holds(part.modules, x)]
            if chosen:
                tables.append(_scored(estimator, piece, batches, chosen, formats))
            progress(done, len(self._parts))
        return (self._joined(found) if runs else Layers(tuple(layers or ()))), tables

    def _backward(
        self,
        estimator: Any,
        batches: Sequence[Batch],
        formats: Sequence[Format],
        layers: Sequence[Layer] | None,
        progress: Progress,
    ) -> tuple[Layers, list[SensitivityTable]]:
        samples = [sample for batch in batches for sample in samples_of(batch)]
        done, total = 0, 2 * len(self._parts)
        known: list[Layers] = []
        # Gradients are those of single samples, but estimators may look at what runs in a whole batch.
        whole = [batch for batch in batches if batch_size(batch) > 1]
        for _, piece in self._pieces([*samples, *whole], keep=True):
            known.append(self._look(piece, samples))
            with torch.no_grad(), self._remembering():
                for batch in whole:
                    piece.logits(batch)
            progress(done := done + 1, total)
        if self.model.tied:
            # The head sends the gradient that all blocks wait for; the weight it shares is scored after them.
            head = [module for module in self.model.around if module not in self._runner.before]
            with self._loaded(_Part(head, self._runner.end)) as piece:
                _scored(estimator, piece, batches, self._look(piece, samples), _ANY)
        tables: list[SensitivityTable] = []
        for part, own in self._reversed(known):
            with self._loaded(part) as piece:
                chosen = [x for x in (own if layers is None else layers) if self.model.holds(part.modules, x)]
                found = _scored(estimator, piece, batches, chosen or own, formats if chosen else _ANY)
                tables += [found] if chosen else []
            if part.number is not None:
                self._store.drop_all("gradient", part.number + 1)
            progress(done := done + 1, total)
        return self._joined(known), tables

    def _reversed(self, known: Sequence[Layers]) -> list[tuple[_Part, Layers]]:
        pairs = list(zip(self._parts, known, strict=True))
        # Where the ends are one part they come last: they need the gradient of the first block.
        return [*pairs[-2::-1], pairs[-1]] if self.model.tied else pairs[::-1]

    @contextmanager
    def _session(self, batches: Sequence[Batch]) -> Iterator[None]:
        self._store = ActivationStore(self._spill, self._keep_bytes)
        try:
            runner = self._runner = Runner(self.model.module, self.model.blocks, self._store)
            runner.before = self.model.called_first(batches[0] if batches else _EXAMPLE)
            last = [module for module in self.model.around if module not in runner.before]
            blocks = [_Part([x], partial(runner.block, i), i) for i, x in enumerate(self.model.blocks)]
            self._start = _Part(runner.before, runner.start)
            self._parts = [self._start, *blocks, _Part(last, runner.end)]
            if self.model.tied:
                self._parts = [*blocks, _Part(self.model.around, runner.ends)]
            yield
        finally:
            self._store.close()

    @contextmanager
    def _loaded(self, part: _Part) -> Iterator[Piece]:
        blocks = part.modules if part.number is not None else []
        with self.model.loaded(part.modules, part.run, blocks) as piece:
            self._runner.begin(list(piece.module.parameters()))
            yield piece

    def _pieces(
        self, units: Sequence[Batch], *, keep: bool = False, runs: bool = True
    ) -> Iterator[tuple[_Part, Piece]]:
        """Load the pieces in order; what a piece gives is known to the next once `_look` has run it."""
        if runs and self.model.tied:
            with self._loaded(self._start), torch.no_grad(), self._remembering():
                for unit in units or [_EXAMPLE]:
                    self._runner.start(unit)
        for part in self._parts:
            with self._loaded(part) as piece:
                yield part, piece
            if part.number and not keep:
                self._store.drop_all("block", part.number - 1)

    def _look(self, piece: Piece, units: Sequence[Batch]) -> Layers:
        with self._remembering():
            return find_layers(piece, units, may_be_none=True)

    @contextmanager
    def _remembering(self) -> Iterator[None]:
        self._runner.remembering = True
        try:
            yield
        finally:
            self._runner.remembering = False

    def _joined(self, found: Sequence[Layers]) -> Layers:
        items = sorted((x for part in found for x in part), key=lambda x: self.model.order(x.tensor))
        excluded = sorted((x for part in found for x in part.excluded), key=lambda x: self.model.order(x.name))
        if not items:
            raise InputError("E418", f"model '{self.model.name}' has no Linear, Conv or Embedding weights")
        return Layers(tuple(items), tuple(excluded))

    def _check(self, layers: Sequence[Layer]) -> None:
        for row in decisions(layers):
            held = [[part for part in self._parts if self.model.holds(part.modules, x)] for x in row.layers]
            for layer, parts in zip(row.layers, held, strict=True):
                if not parts:
                    raise InputError("E120", f"model '{self.model.name}' has no layer '{layer.name}'")
            if len({id(part) for parts in held for part in parts}) > 1:
                raise InputError(
                    "E506",
                    f"'{row.name}' ties layers of several blocks, which are never in memory together",
                    advice="score it in memory: streaming=False",
                )


def _needs(fmt: Format) -> str:
    """What a format is made from beside the weight."""
    return fmt.needs or ("range" if getattr(fmt.activation, "static", False) else "")


def refusal(estimator: Any, formats: Sequence[Format] = ()) -> str:
    """Say why an estimator cannot score these formats piece by piece; empty when it can.

    >>> from mpsearch import registry
    >>> refusal(registry.make("estimators", "weight_mse"))
    ''
    >>> refusal(registry.make("estimators", "divergence"))
    "estimator 'Divergence' needs the whole model, so it cannot be streamed"
    """
    name = type(estimator).__name__
    streams = getattr(estimator, "streams", "")
    if not streams:
        return f"estimator '{name}' needs the whole model, so it cannot be streamed"
    for fmt in formats:
        if fmt.family == "kv":
            return f"'{fmt}' rounds a cache, which needs the whole model, so it cannot be streamed"
        need = _needs(fmt)
        if need == "importance" or (streams == "backward" and (need or fmt.activation is not None)):
            what = "is made from gradients of the whole model" if need == "importance" else "needs more than gradients"
            return f"'{fmt}' {what}, so estimator '{name}' cannot stream it"
    return ""


def _scored(
    estimator: Any, piece: Piece, batches: Sequence[Batch], layers: Sequence[Layer], formats: Sequence[Format]
) -> SensitivityTable:
    if reason := estimator.refuses(piece):
        raise InputError("E506", f"estimator '{type(estimator).__name__}' cannot score '{piece.name}': {reason}")
    piece.calibrate(batches, list(layers))
    table: SensitivityTable = estimator.score(piece, batches, list(layers), formats)
    return table


def _join(tables: Sequence[SensitivityTable], rows: Sequence[Decision]) -> SensitivityTable:
    """Put the rows of pieces into the order of the whole model."""
    place = {name: (table, i) for table in tables for i, name in enumerate(table.layers)}
    found = [place[row.name] for row in rows]
    first = tables[0]
    pooled = {name: known for table in tables for name, known in table.source.get("pooled", {}).items()}
    return SensitivityTable(
        tuple(row.name for row in rows),
        first.formats,
        np.array([table.value[i] for table, i in found]),
        np.array([table.spread[i] for table, i in found]),
        first.unit,
        tuple(table.status[i] for table, i in found),
        max(table.samples for table in tables),
        {**first.source, **({"pooled": pooled} if pooled else {})},
    )
