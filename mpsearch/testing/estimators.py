"""What every estimator must do, whoever wrote it."""

from __future__ import annotations

import math
from typing import Any

import numpy as np
import pytest
import torch
from torch import nn

from mpsearch.format import Format, parse_formats
from mpsearch.layer import Layers
from mpsearch.model.find import find_layers
from mpsearch.model.model import Model
from mpsearch.tables import SensitivityTable

FORMATS = parse_formats(["int2-channel", "int4-channel", "int8-channel", "int4-g32"])


def small_classifier() -> tuple[Model, list[Any], Layers]:
    """A two-layer classifier with fixed weights, its batches of (inputs, labels), and its layers."""
    generator = torch.Generator().manual_seed(0)
    module = nn.Sequential(nn.Linear(8, 32), nn.Tanh(), nn.Linear(32, 5))
    with torch.no_grad():
        for parameter in module.parameters():
            parameter.copy_(torch.randn(parameter.shape, generator=generator) * 0.4)
    batches = [
        (torch.randn(6, 8, generator=generator), torch.randint(0, 5, (6,), generator=generator)) for _ in range(5)
    ]
    model = Model(
        module, loss=lambda m, b: nn.functional.cross_entropy(m(b[0]), b[1]), logits=lambda m, b: m(b[0]), name="small"
    )
    return model, batches, find_layers(model, batches)


def same(a: SensitivityTable, b: SensitivityTable) -> bool:
    """Whether two tables hold the same bits."""
    return a.layers == b.layers and a.value.tobytes() == b.value.tobytes() and a.status == b.status


class EstimatorSuite:
    """Subclass it with an ``estimator`` fixture.

    class TestMine(EstimatorSuite):
        @pytest.fixture
        def estimator(self): return Mine()
    """

    @pytest.fixture
    def scored(self, estimator: Any) -> SensitivityTable:
        model, batches, layers = small_classifier()
        table: SensitivityTable = estimator.score(model, batches, layers, FORMATS)
        return table

    def test_accepts_a_plain_classifier(self, estimator: Any) -> None:
        assert estimator.refuses(small_classifier()[0]) == ""

    def test_shape_unit_and_names(self, scored: SensitivityTable) -> None:
        assert scored.layers == ("0", "2")
        assert scored.formats == tuple(str(f) for f in FORMATS)
        assert scored.value.shape == scored.spread.shape == (2, 4)
        assert scored.unit

    def test_what_a_layer_cannot_take_is_not_offered(self, scored: SensitivityTable) -> None:
        assert scored.status[0][3] == "not_offered"
        assert math.isnan(scored.value[0, 3])
        assert scored.status[1][3] == "ok"

    def test_more_bits_hurt_less(self, scored: SensitivityTable) -> None:
        assert (np.abs(scored.value[:, 2]) < np.abs(scored.value[:, 1])).all()
        assert (np.abs(scored.value[:, 1]) < np.abs(scored.value[:, 0])).all()

    def test_spread_is_known(self, scored: SensitivityTable) -> None:
        assert np.isfinite(scored.spread[:, :3]).all()
        assert (scored.spread[:, :3] >= 0).all()

    def test_same_bits_twice(self, estimator: Any, scored: SensitivityTable) -> None:
        model, batches, layers = small_classifier()
        assert same(estimator.score(model, batches, layers, FORMATS), scored)

    def test_weights_are_left_bit_for_bit(self, estimator: Any) -> None:
        model, batches, layers = small_classifier()
        before = {name: (value.data_ptr(), value.clone()) for name, value in model.module.state_dict().items()}
        estimator.score(model, batches, layers, FORMATS)
        for name, value in model.module.state_dict().items():
            assert value.data_ptr() == before[name][0]
            assert torch.equal(value, before[name][1])
        assert all(parameter.grad is None for parameter in model.module.parameters())

    def test_work_divides_without_changing_the_answer(self, estimator: Any, scored: SensitivityTable) -> None:
        model, batches, layers = small_classifier()
        if estimator.by == "batch":
            parts = [estimator.score(model, [batch], layers, FORMATS) for batch in reversed(batches)][::-1]
            assert same(SensitivityTable.mean(parts), scored)
            return
        for j, fmt in reversed(list(enumerate(FORMATS))):
            for i, layer in enumerate(layers):
                if not fmt.refuses(layer):
                    one = estimator.score(model, batches, [layer], [fmt])
                    assert one.value[0, 0] == scored.value[i, j]
                    assert one.spread[0, 0] == scored.spread[i, j]

    def test_an_exact_format_costs_nothing(self, estimator: Any) -> None:
        model, batches, layers = small_classifier()
        table = estimator.score(model, batches, layers, [Format.parse("fp32")])
        assert np.allclose(table.value, 0.0, atol=1e-7)
