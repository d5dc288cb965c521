"""Activation spikes: the statistics of inputs against a table, the report and the score against closed forms."""

from __future__ import annotations

import json
from typing import Any

import numpy as np
import pytest
import torch
from torch import nn

import mpsearch as mp
from mpsearch.format import Format, parse_formats
from mpsearch.model.activations import round_input
from mpsearch.model.find import find_layers
from mpsearch.model.model import Model
from mpsearch.sensitivity.activation_spikes import ActivationSpikes, SpikeReport, flagged, massive_places
from mpsearch.sensitivity.statistics import Inputs, relative_error, sequences_of, spike_ratio
from tests.conftest import DATA
from tests.tiny_models import tiny

TABLE = json.loads((DATA / "outlier_metrics.json").read_text())
X = torch.tensor(TABLE["X (tokens x channels)"])


def seen(*parts: torch.Tensor) -> Inputs:
    inputs = Inputs()
    for part in parts:
        inputs.add(part)
    return inputs


def test_the_ratio_is_that_of_the_table_with_numpys_median() -> None:
    scales = X.abs().amax(dim=-1)
    assert scales.tolist() == pytest.approx(TABLE["qfem"]["token_absmax"])
    assert spike_ratio(scales) == pytest.approx(TABLE["qfem"]["ratio_numpy"], rel=1e-6)
    assert spike_ratio(scales) != pytest.approx(TABLE["qfem"]["ratio_torch"], rel=0.05)
    assert spike_ratio(torch.tensor([3.0, 1.0, 2.0])) == 1.5
    # Tokens of zeros are left out, so that the ratio stays finite.
    assert spike_ratio(torch.tensor([0.0, 0.0, 0.0, 4.0, 2.0])) == pytest.approx(4 / 3)
    assert spike_ratio(torch.zeros(3)) == 1.0


def test_outlier_columns_kurtosis_and_massive_activations_are_those_of_the_table() -> None:
    inputs = seen(X[None, :2], X[None, 2:])
    assert inputs.outlier_columns == tuple(TABLE["llm_int8"]["outlier_columns"])
    shares = TABLE["llm_int8"]["fraction_of_tokens_above_6_per_column"]
    assert (inputs.above / inputs.tokens).tolist() == shares
    assert inputs.kurtosis == pytest.approx(TABLE["kurtosis"]["whole_tensor"], rel=1e-6)
    assert inputs.peaks.tolist() == X.abs().amax(dim=0).tolist()
    places = [(place // 6, place % 6, float(X.flatten()[place])) for place in massive_places(X)]
    assert places == [tuple(hit) for hit in TABLE["massive_activation"]["hits (token,channel,value)"]]
    one_hot = torch.zeros(1, 1, 16)
    one_hot[..., 3] = 5.0
    assert seen(one_hot).kurtosis == pytest.approx(TABLE["kurtosis"]["one_hot_n=16"])
    assert seen(torch.full((1, 4, 4), 2.5)).kurtosis == 0.0
    assert seen(*torch.full((7, 1, 3, 1), 0.1)).kurtosis == 0.0


def test_kurtosis_does_not_cancel_far_from_0_and_does_not_depend_on_the_parts() -> None:
    x = torch.randn(4, 5000, 5, generator=torch.Generator().manual_seed(2)) ** 3 + 1e4
    apart = x.double() - x.double().mean()
    exact = float(apart.pow(4).mean() / apart.square().mean() ** 2)
    assert exact > 20
    assert seen(x).kurtosis == pytest.approx(exact, rel=1e-9)
    assert seen(x[:1], x[1:, :7], x[1:, 7:]).kurtosis == pytest.approx(exact, rel=1e-9)
    plain = torch.randn(1, 100000, 1, generator=torch.Generator().manual_seed(2)) + 1e4
    assert seen(plain[:, :100], plain[:, 100:]).kurtosis == pytest.approx(3, abs=0.1)
    assert np.isnan(seen(torch.tensor([[[1.0, np.nan]]])).kurtosis)


def test_a_massive_activation_is_over_both_limits() -> None:
    assert massive_places(torch.tensor([0.01, 99.0, 0.01])) == []
    assert massive_places(torch.tensor([0.2, 150.0, 0.2])) == []
    assert massive_places(torch.tensor([0.1, -150.0, 0.1])) == [1]


def test_inputs_of_every_kind_of_layer_become_sequences_of_tokens() -> None:
    image = torch.arange(24.0).reshape(1, 2, 3, 4)
    rows = sequences_of(nn.Conv2d(2, 1, 1), image)
    assert rows.shape == (1, 12, 2)
    assert rows[0, 0].tolist() == [0.0, 12.0]
    assert torch.equal(sequences_of(nn.Conv2d(2, 1, 1), image[0]), rows)
    assert sequences_of(nn.Conv1d(2, 1, 1), torch.zeros(5, 2, 7)).shape == (5, 7, 2)
    assert sequences_of(nn.Linear(4, 1), torch.zeros(2, 3, 5, 4)).shape == (2, 15, 4)
    assert sequences_of(nn.Linear(4, 1), torch.zeros(4)).shape == (1, 1, 4)


NOISE = torch.randint(1, 61, (4, 11), generator=torch.Generator().manual_seed(3))
# The same token first everywhere, so that it meets the same hidden state; 48 tokens in 64 channels can be told apart.
SEQUENCES = torch.cat([torch.zeros(4, 1, dtype=torch.long), NOISE], dim=1)
BATCHES = [{"input_ids": part} for part in SEQUENCES.split(2)]


def plant(model: Model, block: int, channel: int, size: float) -> None:
    """Make one channel of a down_proj's input huge on the first token, and have the output not feel it."""
    mlp = model.module.model.layers[block].mlp
    held: list[torch.Tensor] = []
    handle = mlp.gate_proj.register_forward_pre_hook(lambda module, args: held.append(args[0].detach()))
    with torch.no_grad():
        for batch in BATCHES:
            model.logits(batch)
    handle.remove()
    rows = torch.cat([x.flatten(0, 1) for x in held]).double()
    wanted = torch.zeros(len(rows)).double()
    wanted[:: SEQUENCES.shape[1]] = size
    direction = torch.linalg.solve(rows.T @ rows + 1e-4 * torch.eye(64), rows.T @ wanted)
    for projection in (mlp.gate_proj, mlp.up_proj):
        projection.weight.data[channel] = direction.float()
    mlp.down_proj.weight.data[:, channel] = 0.0


@pytest.fixture
def planted() -> Model:
    model = tiny(layers=4)
    plant(model, 1, 5, 60.0)
    plant(model, 3, 40, 60.0)
    return model


def test_exactly_the_layers_with_planted_channels_are_flagged(planted: Model) -> None:
    layers = find_layers(planted, BATCHES)
    report = ActivationSpikes().report(planted, BATCHES, layers)
    assert [row.layer for row in report] == [x.name for x in layers if x.kind == "linear"]
    wanted = {"model.layers.1.mlp.down_proj": 5, "model.layers.3.mlp.down_proj": 40}
    assert set(flagged(report)) == set(wanted)
    for row in report:
        assert row.tokens == 48
        if row.layer in wanted:
            assert row.peak is not None
            assert (row.peak.token, row.peak.channel) == (0, wanted[row.layer])
            assert row.peak.value > 1000
            # The same token and channel in all four sequences of both batches.
            places = [(hit.batch, hit.sequence, hit.token, hit.channel) for hit in row.massive]
            assert places == [(b, s, 0, wanted[row.layer]) for b in (0, 1) for s in (0, 1)]
            assert wanted[row.layer] in row.outlier_columns
            assert row.kurtosis > 100
        else:
            assert row.massive == ()
            assert 1.0 <= row.ratio < 6.68
    assert len(flagged(report, threshold=0.5)) == len(report)
    assert ActivationSpikes(most=1).report(planted, BATCHES, layers)[-2].massive[1:] == ()


def test_a_planted_layer_scores_higher_than_its_like(planted: Model) -> None:
    table = mp.score(planted, BATCHES, ["int4-channel", "int4-channel@int8-tensor"], "activation_spikes")
    row = {name: table.value[i] for i, name in enumerate(table.layers)}
    assert (row["model.layers.1.mlp.down_proj"] > 10 * row["model.layers.0.mlp.down_proj"]).all()
    # One scale for a tensor with a spike leaves nothing of the other tokens' numbers.
    for values in row.values():
        assert np.isnan(values[1]) or values[1] > values[0]
    clean = mp.score(tiny(layers=4), BATCHES, ["int4-channel"], "activation_spikes")
    assert clean.value.max() < 6.68 * 2


def test_the_score_is_ratio_times_both_errors() -> None:
    module = nn.Linear(6, 3, bias=False)
    module.weight.data = torch.linspace(-1, 1, 18).reshape(3, 6) ** 3
    model = Model(module, logits=lambda m, x: m(x))
    layers = find_layers(model, [X[None]])
    formats = parse_formats(["int4-channel", "int4-channel@int8-token", "fp32@int8-tensor", "fp32"])
    table = ActivationSpikes().score(model, [X[None]], layers, formats)
    weight = relative_error(model, layers[0], formats[0])
    ratio = TABLE["qfem"]["ratio_numpy"]
    energy = float(X.square().sum())
    token, tensor = (
        float((round_input(X, fmt.activation) - X).square().sum()) / energy for fmt in (formats[1], formats[2])
    )
    expected = [ratio * weight, ratio * (weight + token), ratio * tensor, 0.0]
    assert table.value[0].tolist() == pytest.approx(expected, rel=1e-5)
    # Two sequences: the ratio is the mean of both, and its error is known.
    both = ActivationSpikes().score(model, [torch.stack([X, torch.ones_like(X)])], layers, formats[:1])
    assert both.value[0, 0] == pytest.approx((ratio + 1) / 2 * weight, rel=1e-5)
    assert both.spread[0, 0] > 0
    assert both.samples == 2


def test_static_formats_are_scored_with_their_own_range() -> None:
    model = Model(nn.Linear(6, 3, bias=False), logits=lambda m, x: m(x))
    batches = [X[None], 8 * X[None]]
    one, both = (
        mp.score(model, part, ["fp32@int4-tensor-static"], "activation_spikes").value[0, 0]
        for part in (batches[:1], batches)
    )
    # The smaller batch loses more once the range is that of the larger one.
    assert both > one > 0


def test_dead_inputs_and_embeddings_have_a_ratio_of_one() -> None:
    class Dead(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.table, self.head = nn.Embedding(7, 4), nn.Linear(4, 2)

        def forward(self, ids: Any) -> Any:
            return self.head(self.table(ids) * 0.0)

    model = Model(Dead(), logits=lambda m, ids: m(ids))
    batch = torch.tensor([[1, 2, 3]])
    layers = find_layers(model, [batch])
    formats = [Format.parse("int4-channel"), Format.parse("int4-channel@int8-token")]
    table = ActivationSpikes().score(model, [batch], layers, formats)
    assert table.value[:, 0].tolist() == pytest.approx([relative_error(model, x, formats[0]) for x in layers])
    assert table.status[0] == ("ok", "not_offered")
    assert table.value[1, 1] == table.value[1, 0]
    (row,) = ActivationSpikes().report(model, [batch], layers)
    assert row == SpikeReport("head", 1.0, 3, row.peak, (), 0.0, ())
