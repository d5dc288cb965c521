"""What a change does to the answers on one batch, sample by sample: divergence, or increase of the loss."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any, Literal

import torch
from torch import Tensor, nn

from mpsearch.format import Format
from mpsearch.formats.activation import Activation
from mpsearch.layer import Layer
from mpsearch.model.apply import Change, changed
from mpsearch.model.cut import part_of
from mpsearch.model.evidence import Calibration
from mpsearch.model.model import Model, samples_of
from mpsearch.model.reference import Reference, divergence
from mpsearch.model.replay import Replay
from mpsearch.sensitivity.assemble import Deltas

#: What harm is measured by: ``kl``, KL(p_original || p_changed), or ``loss``, the increase of the model's loss.
Against = Literal["kl", "loss"]
AGAINST = ("kl", "loss")
_NOTHING = Change()


class Harm:
    """Harm of changes to a model on one batch.

    The loss is that of `Model.loss`, sample by sample. Passes of a language model start at the changed layer
    (`mpsearch.model.replay`); a loss that the user gave runs in full, for it may use the module in any way.

    Memory: the answers of one batch, and what `Replay` remembers of it.
    """

    def __init__(self, model: Model, batch: Any, against: Against, base: Change = _NOTHING) -> None:
        """Run the batch once, and remember what changes are compared with.

        Args:
            model: the model, unchanged.
            batch: the batch.
            against: what harm is measured by.
            base: for ``loss``: what is compared with, and what the prefix of later passes comes from.
        """
        self._model = model
        self._batch = batch
        self._base = base
        self._log_p: Tensor | None = None
        self._replay: Replay | None = None
        if against == "kl":
            self._log_p = Reference(model, [batch]).log_probabilities(0)
        with torch.no_grad(), changed(model, base):
            if (against == "kl" or not self.given_loss) and not base.caches:
                self._replay = Replay(model, [batch])
            if against == "loss":
                self._before = self._losses(None if self.given_loss else model.logits(batch))

    @property
    def given_loss(self) -> bool:
        """Whether the loss is a function of the user's, which knows nothing of rounded caches."""
        return self._model._loss is not None or not self._model.tokens

    def prepare(self, layers: Sequence[Layer]) -> None:
        """Say which layers the next changes change, beside those of the base."""
        weights = [layer for layer in layers if layer.kind != "kv_cache"]
        if self._replay is not None and weights:
            with changed(self._model, self._base):
                self._replay.prepare(weights)

    def values(self, change: Change) -> list[float]:
        """Harm of a change, which holds what the base does: one number per sample, in nats per prediction."""
        with torch.no_grad(), changed(self._model, change):
            if self._log_p is None and self.given_loss:
                return self._increase(self._losses(None))
            # A remembered pass has no keys and values to round.
            full = self._replay is None or bool(change.caches)
            logits = self._model.logits(self._batch) if full or self._replay is None else self._replay.logits(0)
            if self._log_p is None:
                return self._increase(self._losses(logits))
        found: list[float] = divergence(self._log_p, logits).kl.tolist()
        return found

    def _increase(self, after: Sequence[float]) -> list[float]:
        return [b - a for a, b in zip(self._before, after, strict=True)]

    def _losses(self, logits: Tensor | None) -> list[float]:
        if logits is None:
            return [float(self._model.loss(sample).double()) for sample in samples_of(self._batch)]
        log_q = torch.log_softmax(logits[:, :-1], dim=-1)
        nll = -log_q.gather(-1, self._batch["input_ids"][:, 1:, None])[..., 0]
        found: list[float] = nll.double().mean(dim=1).tolist()
        return found


def refusal(model: Model, against: Against) -> str:
    """Say why harm cannot be measured in a model; empty when it can."""
    if against == "kl":
        return "" if model.has_logits else "against='kl' needs logits; wrap the module: mp.wrap(module, logits=…)"
    return "" if model.has_loss else "it needs a loss; wrap the module: mp.wrap(module, loss=…)"


def change_to(model: Model, formats: Mapping[Layer, Format]) -> Change:
    """Make the change to some formats, as `Change.of` does, from the rounding errors that are kept (`Deltas`).

    A weight that its format cannot hold is NaN. Call while the model is unchanged.
    """
    deltas = Deltas.of(model)
    weights, inputs = {}, {}
    caches = {layer: fmt for layer, fmt in formats.items() if layer.kind == "kv_cache"}
    for layer, fmt in formats.items():
        if layer in caches:
            continue
        weights[layer] = part_of(model.weight(layer.name).detach(), layer) + deltas.own(layer, fmt)
        activation = fmt.activation
        if isinstance(activation, Activation):
            seen = Calibration.of(model).input_range(layer, activation) if activation.static else None
            inputs[layer] = (activation, seen)
    return Change(weights, inputs, Change.of(model, caches).caches)


def called(model: Model, batch: Any, layers: Sequence[Layer]) -> set[str]:
    """Names of the layers that a batch reaches: one that is never called, or with no tokens, shows nothing."""
    found = {layer.name for layer in layers if layer.kind == "kv_cache"}

    def watch(name: str) -> Any:
        def hook(module: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any], output: Any) -> None:
            first = next((x for x in (*args, *kwargs.values()) if isinstance(x, Tensor)), None)
            if first is None or first.numel():
                found.add(name)

        return hook

    handles = [
        model.holder(name).register_forward_hook(watch(layer.name), with_kwargs=True)
        for layer in layers
        if layer.kind != "kv_cache"
        for name in (layer.name, *layer.shared)
    ]
    try:
        with torch.no_grad():
            model.logits(batch) if model.has_logits else model.loss(batch)
    finally:
        for handle in handles:
            handle.remove()
    return found
