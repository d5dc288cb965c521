"""LIM: how far a block turns the hidden state, as a whole."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any, ClassVar, Literal

from mpsearch.format import Format
from mpsearch.layer import Layer
from mpsearch.model.model import Model
from mpsearch.sensitivity.blocks import turns
from mpsearch.sensitivity.statistics import importance_table, runs
from mpsearch.tables import SensitivityTable


@dataclass(frozen=True)
class Lim:
    """Layer input modification of a layer's block, times relative weight errors.

    LIM = -cos(h_in, h_out) of a block, hidden states of all tokens as one vector: higher, the block changes more, so it
    needs more bits. It lies in -1..1, and 0 stands for a norm of 0.
    score = sum over the decision's layers of (1 + LIM) ||Q(W) - W||^2 / ||W||^2.

    The paper gives only a ranking of blocks; 1 + LIM keeps it and is never negative, and relative errors do not count a
    layer's size. A block is the outermost entry of a list of modules that gives as much as it takes; layers outside of
    blocks (embeddings, heads) have no cosine and count as 1, a right angle. Bias: tokens with massive activations
    dominate the flattened vectors (`block_cosine` gives every token one voice). Standard error: from batch to batch.
    Cost: one forward pass, and products of hidden states.
    Source: Dumitru et al. 2024, "Layer-Wise Quantization" (arXiv 2406.17415).

    >>> import torch, mpsearch as mp
    >>> block = torch.nn.Linear(2, 2, bias=False)
    >>> _ = block.weight.data.copy_(torch.tensor([[0.0, -1.0], [1.0, 0.4]]))
    >>> model = mp.wrap(torch.nn.Sequential(block), logits=lambda m, x: m(x))
    >>> x = torch.tensor([[1.0, 0.0]])  # turned by a right angle: LIM = 0
    >>> ratio = mp.score(model, [x], ["int2-tensor"], "lim").value / mp.score(
    ...     model, [], ["int2-tensor"], "weight_mse", relative=True).value
    >>> round(float(ratio[0, 0]), 6)
    1.0
    """

    by: ClassVar[Literal["cell", "batch"]] = "batch"
    covers: ClassVar[Sequence[str]] = ("weights",)
    version: ClassVar[int] = 1
    streams: ClassVar[Literal["", "forward", "backward"]] = "forward"
    cost: ClassVar[str] = "1 forward"
    needs: ClassVar[Sequence[str]] = ("data",)

    def refuses(self, model: Model) -> str:
        return runs(model)

    def score(
        self, model: Model, batches: Sequence[Any], layers: Sequence[Layer], formats: Sequence[Format]
    ) -> SensitivityTable:
        return SensitivityTable.mean([self._one(model, batch, layers, formats) for batch in batches])

    def _one(self, model: Model, batch: Any, layers: Sequence[Layer], formats: Sequence[Format]) -> SensitivityTable:
        found = turns(model, batch, layers)
        importance = {name: 1.0 if turn is None else _one_less(turn.flattened) for name, turn in found.items()}
        return importance_table(model, layers, formats, importance, "lim")


def _one_less(cosine: float) -> float:
    # Rounding may put a cosine a little over 1. The order of the two keeps NaN, which must not read as harmless.
    return max(1.0 - cosine, 0.0)
