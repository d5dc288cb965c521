"""What a user gets for a mistake in what is given with a model: one plain error each, never a traceback."""

from __future__ import annotations

from typing import Any

import numpy as np
import pytest
import torch
from torch import Tensor, nn

import mpsearch as mp

INT4 = ["int4-channel"]


def model(**functions: Any) -> Any:
    functions = functions or {"logits": lambda module, x: module(x)}
    return mp.wrap(nn.Sequential(nn.Linear(4, 4)), **functions)


def batch() -> Tensor:
    return torch.ones(2, 4)


def labelled(module: nn.Module, batch: dict[str, Tensor]) -> Tensor:
    return nn.functional.cross_entropy(module(batch["x"]), batch["labels"])


MISTAKES: list[tuple[str, str, Any]] = [
    ("E109", "got [3]", lambda: mp.score(model(), [batch()], 3)),  # type: ignore[arg-type]
    ("E515", "not a list", lambda: mp.score(model(), iter([batch()]), INT4)),  # type: ignore[arg-type]
    ("E515", "DataLoader", lambda: mp.measure(model(), {"0": "bf16"}, torch.utils.data.DataLoader([batch()]))),  # type: ignore[arg-type, list-item]
    ("E515", "no tensor", lambda: mp.score(model(), [np.ones((2, 4))], INT4)),
    ("E501", "no batches", lambda: mp.measure(model(), {"0": "int8-channel"}, [])),
    ("E512", "holds bfloat16", lambda: mp.score(model(), [batch().bfloat16()], INT4)),
    ("E512", "(2, 3)", lambda: mp.score(model(), [torch.ones(2, 3)], INT4)),
    ("E512", "'labels'", lambda: mp.score(model(loss=labelled), [{"x": batch()}], INT4, "grad_loss_change")),
    ("E514", "NoneType", lambda: mp.score(model(logits=lambda m, x: None), [batch()], INT4)),
    ("E514", "tuple", lambda: mp.score(model(logits=lambda m, x: (m(x),)), [batch()], INT4)),
    ("E514", "(2,)", lambda: mp.score(model(logits=lambda m, x: m(x)[:, 0]), [batch()], INT4)),
    ("E113", "'0' (str)", lambda: mp.score(model(), [batch()], INT4, layers=["0"])),  # type: ignore[arg-type]
    ("E113", "'0' (str)", lambda: mp.measure(model(), {"0": "bf16"}, [batch()], layers=["0"])),  # type: ignore[arg-type]
    ("E130", "mxfp4", lambda: mp.cost(model(), ["mxfp4"])),
    ("E130", "mxfp4", lambda: mp.score(model(), [batch()], ["mxfp4"], "weight_mse")),
]


@pytest.mark.parametrize(("code", "words", "call"), MISTAKES)
def test_a_mistake_is_one_plain_error(code: str, words: str, call: Any) -> None:
    with pytest.raises(mp.MpsearchError) as caught:
        call()
    assert caught.value.code == code
    assert words in str(caught.value)


def test_a_layer_that_gives_nan_is_never_called_harmless() -> None:
    class Bad(nn.Linear):
        def forward(self, x: Tensor) -> Tensor:
            return super().forward(x) * torch.nan

    blocks = nn.Sequential(nn.ModuleList([Bad(4, 4)])[0])
    found = mp.wrap(nn.ModuleDict({"blocks": blocks}), logits=lambda module, x: module["blocks"](x), name="bad")
    table = mp.score(found, [batch(), batch()], INT4, "lim")
    assert np.isnan(table.value).all()
