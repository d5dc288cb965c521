"""Block cosine: how far a block turns the hidden state of each token."""

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
class BlockCosine:
    """One minus the mean cosine of a block's input and output, times relative weight errors.

    score = sum over the decision's layers of (1 - c) ||Q(W) - W||^2 / ||W||^2, where c is the mean over tokens of
    cos(h_in, h_out) of the layer's block; a token of zeros counts 0. Low cosine: important.

    The importance is that of QuantMoE-Bench (Li et al. 2024; code UNITES-Lab/moe-quantization), measured here, where
    the authors train a small network to predict it from the input. It is a ranking there, so it multiplies relative
    errors, which do not count a layer's size. Blocks as in `lim`; layers outside of blocks count as 1.

    Bias: a block that turns tokens together and then back is not told from one that does nothing. Standard error: from
    batch to batch. Cost: one forward pass, and products of hidden states.

    >>> import torch, mpsearch as mp
    >>> block = torch.nn.Linear(2, 2, bias=False)
    >>> _ = block.weight.data.copy_(torch.tensor([[1.0, 0.0], [0.0, -0.4]]))
    >>> model = mp.wrap(torch.nn.Sequential(block), logits=lambda m, x: m(x))
    >>> x = torch.tensor([[9.0, 0.0], [0.0, 1.0]])  # cosines 1 and -1
    >>> ratio = mp.score(model, [x], ["int2-tensor"], "block_cosine").value / mp.score(
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
        importance = {name: 1.0 if turn is None else max(0.0, 1.0 - turn.by_token) for name, turn in found.items()}
        return importance_table(model, layers, formats, importance, "block_cosine")
