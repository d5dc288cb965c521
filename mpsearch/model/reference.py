"""What the original model answers, and how far a changed model's answers are from it."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn

from mpsearch.errors import InputError
from mpsearch.model.model import Batch, Model

#: Log-probabilities of the original model are kept up to this many bytes, else computed again when needed.
KEEP_BYTES = 2**30


class Reference:
    """Log-probabilities of the unchanged model on some batches.

    Ask only while the model is unchanged, or for batches that are kept.

    Raises:
        InputError: the unchanged model gives NaN or infinity (E510), naming the first module that does.
    """

    def __init__(self, model: Model, batches: Sequence[Batch], keep_bytes: int = KEEP_BYTES) -> None:
        self._model = model
        self._batches = batches
        self._kept: list[Tensor] = []
        used = 0
        for i, batch in enumerate(batches):
            log_p = self._compute(batch, i)
            used += log_p.numel() * log_p.element_size()
            if used > keep_bytes:
                break
            self._kept.append(log_p)

    @classmethod
    def of(cls, model: Model, batches: Sequence[Batch]) -> Reference:
        """Return the reference of these batches, computed once while the model is kept."""
        return model.memo("reference", batches, lambda: cls(model, batches))

    @property
    def complete(self) -> bool:
        """Whether all batches are kept."""
        return len(self._kept) == len(self._batches)

    def log_probabilities(self, i: int) -> Tensor:
        """Log-probabilities of batch ``i``, same shape as the logits, in nats."""
        return self._kept[i] if i < len(self._kept) else self._compute(self._batches[i], i)

    def _which(self, i: int) -> str:
        # A batch that was handed over alone may be any of many.
        return f"batch {i}, " if len(self._batches) > 1 else ""

    def _compute(self, batch: Batch, i: int) -> Tensor:
        with torch.no_grad():
            logits = self._model.logits(batch)
            if not bool(torch.isfinite(logits).all()):
                raise InputError(
                    "E510",
                    f"the original model already gives values that are not finite ({self._which(i)}first at "
                    f"'{first_not_finite(self._model, batch)}'): nothing can be measured",
                    advice="check the checkpoint and its number type",
                )
            return torch.log_softmax(logits, dim=-1)


def first_not_finite(model: Model, batch: Batch) -> str:
    """Name the first leaf module whose output is not finite; empty when all are."""
    found: list[str] = []
    handles = []

    def watch(path: str) -> Any:
        def hook(module: nn.Module, args: Any, output: Any) -> None:
            floats = isinstance(output, Tensor) and output.is_floating_point()
            if not found and floats and not bool(torch.isfinite(output).all()):
                found.append(path)

        return hook

    for path, module in model.module.named_modules():
        if next(module.children(), None) is None:
            handles.append(module.register_forward_hook(watch(path)))
    try:
        with torch.no_grad():
            model.logits(batch)
    finally:
        for handle in handles:
            handle.remove()
    return found[0] if found else ""


@dataclass(frozen=True, slots=True)
class Divergence:
    """Divergence of a changed model, one number per sample (sequence), in nats per position.

    Attributes:
        kl: (samples,) mean over positions of KL(original || changed).
        cross_entropy: (samples,) mean loss on the data's own next tokens; empty without tokens.
    """

    kl: Tensor
    cross_entropy: Tensor


def divergence(log_p: Tensor, logits: Tensor, batch: Batch | None = None) -> Divergence:
    """Compare a changed model's logits with the original's log-probabilities.

    KL(p || q) = sum_v p_v (log p_v - log q_v), mean over the positions of a sample.

    Args:
        log_p: original, (samples, positions, classes) or (samples, classes), nats.
        logits: changed, same shape, unnormalised.
        batch: when it holds ``input_ids``, the cross-entropy of the next token is computed as well.

    >>> log_p = torch.log(torch.tensor([[0.5, 0.5]]))
    >>> round(divergence(log_p, torch.log(torch.tensor([[0.25, 0.75]]))).kl.item(), 4)
    0.1438
    """
    log_q = torch.log_softmax(logits, dim=-1)
    difference = log_p - log_q
    kl = difference.mul_(log_p.exp()).sum(dim=-1)
    kl = kl.double().reshape(kl.shape[0], -1).mean(dim=1)
    entropy = torch.zeros(0, dtype=torch.float64)
    if isinstance(batch, dict) and "input_ids" in batch and log_q.ndim == 3:
        nll = -log_q[:, :-1].gather(-1, batch["input_ids"][:, 1:, None])[..., 0]
        entropy = nll.double().mean(dim=1)
    return Divergence(kl, entropy)
