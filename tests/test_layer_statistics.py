"""Estimators that weigh rounding errors by a statistic of weights, inputs, outputs, blocks or routing."""

from __future__ import annotations

import json
import math
from typing import Any

import numpy as np
import pytest
import torch
from torch import nn

import mpsearch as mp
from mpsearch import registry
from mpsearch.format import Format, parse_formats
from mpsearch.layer import Layer
from mpsearch.model.find import find_layers
from mpsearch.model.model import Model
from mpsearch.sensitivity.activation_entropy import ActivationEntropy, cluster_entropy, k_means
from mpsearch.sensitivity.activation_pca import ActivationPca, outside
from mpsearch.sensitivity.blocks import Turn, turns
from mpsearch.sensitivity.expert_usage import ExpertUsage
from mpsearch.sensitivity.group_range import GroupRange, range_ratio
from mpsearch.sensitivity.nncf import CRITERIA, EPSILON, Nncf, activation_criterion, int8_error, one_hot_criterion
from mpsearch.sensitivity.statistics import matrices, relative_error
from mpsearch.sensitivity.weight_kl import WeightKl, histogram_kl
from mpsearch.sensitivity.weight_outlier_ratio import WeightOutlierRatio, outlier_ratio
from mpsearch.sensitivity.zd import z_share
from mpsearch.testing.estimators import EstimatorSuite
from tests.conftest import DATA
from tests.tiny_models import EXPERTS, tiny, tiny_experts, tokens

TABLE = json.loads((DATA / "outlier_metrics.json").read_text())
FORMAT = Format.parse("int4-channel")
WITHOUT_DATA = ("zd", "weight_outlier_ratio", "group_range", "weight_kl")
WITH_DATA = ("activation_spikes", "lim", "block_cosine", "activation_entropy", "expert_usage", "nncf", "activation_pca")


@pytest.mark.parametrize("criterion", CRITERIA)
class TestEveryCriterion(EstimatorSuite):
    @pytest.fixture
    def estimator(self, criterion: Any) -> Any:
        return Nncf(criterion)


class TestOneSidedZd(EstimatorSuite):
    @pytest.fixture
    def estimator(self) -> Any:
        return registry.make("estimators", "zd", two_sided=False)


def plain(weight: torch.Tensor) -> Model:
    module = nn.Linear(weight.shape[1], weight.shape[0], bias=False)
    module.weight.data = weight.clone()
    return Model(module, logits=lambda m, x: m(x))


# Blocks.


def test_lim_and_the_mean_cosine_are_those_of_the_table() -> None:
    before, after = (torch.tensor(TABLE["lim"][f"hidden_{side}"]) for side in ("in", "out"))
    turn = Turn()
    turn.add(before[:1], after[:1])
    turn.add(before[1:], after[1:])
    assert -turn.flattened == pytest.approx(TABLE["lim"]["flattened"], abs=1e-7)
    assert -turn.by_token == pytest.approx(TABLE["lim"]["mean_over_tokens"], abs=1e-7)
    dead = Turn()
    dead.add(torch.zeros(2, 3), torch.ones(2, 3))
    assert dead.flattened == dead.by_token == Turn().flattened == Turn().by_token == 0.0


def test_the_block_of_a_layer_is_its_decoder_layer() -> None:
    model, batch = tiny(), tokens()
    held: list[Any] = []
    handle = model.module.model.layers[1].register_forward_hook(
        lambda m, args, kwargs, out: held.extend([args[0] if args else kwargs["hidden_states"], out]), with_kwargs=True
    )
    layers = find_layers(model, [batch])
    found = turns(model, batch, layers)
    handle.remove()
    # The first pass was that of `find_layers`.
    before, after = (x[0] if isinstance(x, tuple) else x for x in held[-2:])
    flat = torch.nn.functional.cosine_similarity(before.flatten().double(), after.flatten().double(), dim=0)
    each = torch.nn.functional.cosine_similarity(before.double(), after.double(), dim=-1).mean()
    assert found["model.embed_tokens"] is None
    for name in ("self_attn.q_proj", "mlp.down_proj"):
        turn = found[f"model.layers.1.{name}"]
        assert turn is not None
        assert turn.flattened == pytest.approx(float(flat), abs=1e-6)
        assert turn.by_token == pytest.approx(float(each), abs=1e-6)
    for name, cosine in (("lim", flat), ("block_cosine", each)):
        table = mp.score(model, [batch], ["int4-channel"], name)
        errors = sum(relative_error(model, x, FORMAT) for x in layers if x.name.startswith("model.layers.1.mlp.gate"))
        errors += sum(relative_error(model, x, FORMAT) for x in layers if x.name.startswith("model.layers.1.mlp.up"))
        row = table.layers.index("model.layers.1.mlp.{gate,up}_proj")
        assert table.value[row, 0] == pytest.approx((1 - float(cosine)) * errors, rel=1e-5)


def test_a_block_that_does_nothing_costs_nothing_and_the_rest_counts_as_a_right_angle() -> None:
    module = nn.Sequential(nn.Linear(3, 3, bias=False), nn.Linear(3, 2, bias=False))
    module[0].weight.data = 2 * torch.eye(3) + 1e-9
    model = Model(module, logits=lambda m, x: m(x))
    batch = torch.randn(5, 3, generator=torch.Generator().manual_seed(1))
    layers = find_layers(model, [batch])
    for name in ("lim", "block_cosine"):
        table = registry.make("estimators", name).score(model, [batch], layers, [FORMAT])
        assert 0 <= table.value[0, 0] < 1e-12
        assert table.value[1, 0] == relative_error(model, layers[1], FORMAT)


# Weights.


def test_statistics_of_weights_are_those_of_the_table() -> None:
    weight = torch.tensor(TABLE["W"])
    assert z_share(weight) == pytest.approx(TABLE["zd"]["value"])
    assert z_share(weight, two_sided=False) == pytest.approx(TABLE["zd"]["value_one_sided"])
    assert outlier_ratio(weight.double()[None]) == pytest.approx(TABLE["moe_linear_outlier_score"]["score"], rel=1e-6)
    columns = [outlier_ratio(weight.double()[None, :, j : j + 1]) for j in range(4)]
    assert columns == pytest.approx(TABLE["moe_linear_outlier_score"]["per_column"], rel=1e-6)
    model = plain(weight)
    layers = find_layers(model)
    error = relative_error(model, layers[0], FORMAT)
    for name, factor in (("zd", 1 / 6), ("weight_outlier_ratio", 1.8)):
        table = mp.score(model, [], ["int4-channel"], name)
        assert table.value[0, 0] == pytest.approx(factor * error, rel=1e-6)
        assert table.spread[0, 0] == 0.0


def test_a_dead_column_stands_out_nowhere() -> None:
    assert outlier_ratio(torch.tensor([[[0.0, 2.0], [0.0, 2.0]]])) == 1.0
    assert outlier_ratio(torch.zeros(1, 2, 2)) == 1.0
    assert z_share(torch.full((3, 3), 0.1)) == 0.0
    assert z_share(torch.ones(1)) == 0.0


def test_group_ranges_by_hand() -> None:
    row = torch.tensor([0.0, 1.0, 5.0, 7.0, -1.0])
    # Groups of 2, the last of a single weight: ranges 1, 2, 0; the row's is 8, cut to the number of groups.
    assert range_ratio(torch.stack([row])[None], 2) == 3.0
    assert range_ratio(torch.tensor([[[0.0, 1.0, 0.0, 4.0], [0.0, 1.0, 1.0, 0.0]]]), 2) == pytest.approx((1.6 + 1) / 2)
    assert range_ratio(torch.tensor([[[0.0, 0.0, 4.0, 4.0]]]), 2) == 2.0
    assert range_ratio(torch.full((1, 2, 4), 3.0), 2) == 1.0
    assert range_ratio(torch.randn(1, 3, 8), 8) == 1.0
    model = plain(torch.tensor([[0.1, 1.0, 0.0, 4.0]]))
    layers = find_layers(model)
    table = GroupRange(group=2).score(model, [], layers, [FORMAT])
    assert table.value[0, 0] == pytest.approx(4 / ((0.9 + 4) / 2) * relative_error(model, layers[0], FORMAT), rel=1e-6)


def test_the_divergence_of_histograms_by_hand() -> None:
    p, q = (np.array(x) / 6 for x in ([2.5, 1.5, 0.5, 1.5], [0.5, 1.5, 0.5, 3.5]))
    before, after = torch.tensor([0.0, 0.0, 1.1, 4.0]), torch.tensor([4.0, 4.0, 1.0, 4.0])
    # The lowest value of both sets is that of `before`: bins of 1, counts 2 1 0 1 and 0 1 0 3.
    assert histogram_kl(before, after, 4) == pytest.approx(float((p * np.log(p / q)).sum()), rel=1e-9)
    assert histogram_kl(before, before, 7) == 0.0
    assert histogram_kl(torch.ones(3), torch.ones(3), 4) == 0.0
    assert math.isnan(histogram_kl(before, torch.full((4,), math.nan), 4))
    model = plain(torch.randn(8, 64, generator=torch.Generator().manual_seed(0)))
    formats = parse_formats(["int2-channel", "int3-channel", "int5-channel", "fp32"])
    values = WeightKl().score(model, [], find_layers(model), formats).value[0]
    assert values[0] > values[1] > values[2] > values[3] == 0.0


def test_stacked_experts_are_seen_one_by_one() -> None:
    weight = torch.arange(24.0).reshape(2, 3, 4)
    straight = matrices(Layer("e", "expert", (2, 3, 4), 1), weight)
    turned = matrices(Layer("e", "expert", (2, 3, 4), 2), weight)
    assert torch.equal(straight.float(), weight)
    assert torch.equal(turned.float(), weight.transpose(1, 2))
    assert matrices(Layer("c", "conv", (3, 2, 2)), weight[0].reshape(3, 2, 2)).shape == (1, 3, 4)
    assert torch.equal(matrices(Layer("t", "linear", (3, 4), 1), weight[0]).float()[0], weight[0].T)


def test_groups_of_a_convolution_are_seen_one_by_one() -> None:
    torch.manual_seed(0)
    module = torch.nn.Sequential(torch.nn.Conv2d(8, 8, 1, groups=8, bias=False), torch.nn.Conv2d(8, 6, 3, groups=2))
    model = mp.wrap(module, logits=lambda m, x: m(x))
    x = torch.randn(2, 8, 4, 4)
    layers = find_layers(model, [x])
    assert [layer.groups for layer in layers] == [8, 2]
    seen = matrices(layers[1], model.weight("1"))
    assert seen.shape == (2, 3, 36)
    assert torch.equal(seen[1, 0].float(), model.weight("1")[3].flatten())
    table = WeightOutlierRatio().score(model, [], layers, [FORMAT])
    # Every input of a depthwise 1x1 convolution feeds one weight, which stands out of nothing.
    assert table.value[0, 0] == pytest.approx(relative_error(model, layers[0], FORMAT), rel=1e-12)
    ratio = float((seen.abs().amax(dim=1) / seen.abs().mean(dim=1)).max())
    assert table.value[1, 0] == pytest.approx(ratio * relative_error(model, layers[1], FORMAT), rel=1e-12)
    usage = ExpertUsage().score(model, [x], layers, [FORMAT])
    assert usage.value[:, 0] == pytest.approx([relative_error(model, layer, FORMAT) for layer in layers], rel=1e-12)


# Outputs and inputs.


def test_the_entropy_of_a_known_occupancy() -> None:
    centres = torch.tensor([[0.0, 0.0], [10.0, 0.0], [0.0, 20.0], [-30.0, 5.0]])
    sizes = [round(20 * share) for share in TABLE["luq_entropy"]["example_occupancy"]]
    noise = 0.1 * torch.randn(20, 2, generator=torch.Generator().manual_seed(0))
    rows = torch.repeat_interleave(centres, torch.tensor(sizes), dim=0) + noise
    assert cluster_entropy(rows, 4) / math.log(2) == pytest.approx(TABLE["luq_entropy"]["entropy_bits"])
    order = torch.randperm(20, generator=torch.Generator().manual_seed(1))
    assert cluster_entropy(rows[order], 4) == pytest.approx(TABLE["luq_entropy"]["entropy_nats"])
    # Scored through a layer that passes its inputs on.
    model = plain(torch.eye(2) + 0.01)
    rows = rows @ torch.inverse(torch.eye(2) + 0.01)
    layers = find_layers(model, [rows])
    table = ActivationEntropy(clusters=4).score(model, [rows], layers, [FORMAT])
    factor = TABLE["luq_entropy"]["entropy_bits"] / 2
    assert table.value[0, 0] == pytest.approx(factor * relative_error(model, layers[0], FORMAT), rel=1e-6)


def test_k_means_is_a_fixed_point_and_takes_copies() -> None:
    rows = torch.randn(200, 3, generator=torch.Generator().manual_seed(4))
    chosen = k_means(rows, 7, rounds=200)
    centres = torch.stack([rows[chosen == i].mean(dim=0) for i in range(7)])
    assert torch.equal(torch.cdist(rows, centres).argmin(dim=1), chosen)
    assert torch.equal(k_means(rows, 7, rounds=200), chosen)
    assert cluster_entropy(torch.ones(9, 2), 5) == 0.0
    assert cluster_entropy(torch.zeros(1, 2), 3) == 0.0


def test_the_share_of_variance_outside_of_known_directions() -> None:
    spectrum = torch.tensor([9.0, 4.0, 2.0, 1.0, 0.5, 0.25, 0.125, 0.125])
    base = torch.linalg.qr(torch.randn(40, 8, generator=torch.Generator().manual_seed(0)).double()).Q
    turn = torch.linalg.qr(torch.randn(8, 8, generator=torch.Generator().manual_seed(1)).double()).Q
    rows = base * spectrum.sqrt() @ turn
    assert outside(rows, 1) == pytest.approx(8 / 17, rel=1e-7)
    assert outside(rows.T, 3) == pytest.approx(2 / 17, rel=1e-7)
    assert outside(torch.zeros(3, 2), 1) == 0.0
    model = plain(torch.randn(2, 8, generator=torch.Generator().manual_seed(2)))
    layers = find_layers(model, [rows.float()])
    error = relative_error(model, layers[0], FORMAT)
    for top, share in ((0.125, 8 / 17), (0.25, 4 / 17)):
        table = ActivationPca(top=top).score(model, [rows.float()], layers, [FORMAT])
        assert table.value[0, 0] == pytest.approx(share * error, rel=1e-5)
    # Two tokens have no more than two directions: nothing is known of the rest.
    assert ActivationPca(top=0.25).score(model, [rows[:2].float()], layers, [FORMAT]).status == (("not_observed",),)


def test_the_criteria_of_inputs_by_hand() -> None:
    twelve, twenty_four = torch.arange(12.0).reshape(1, 2, 6), torch.arange(24.0).reshape(1, 4, 6)
    x = torch.tensor([[[3.0, 1.0, 0.5], [-2.0, 8.0, 0.0]], [[0.0, -9.0, 2.0], [1.0, 1.0, -7.0]]])
    flat = x.flatten(0, 1).numpy()
    assert activation_criterion(x, "max_activation_variance") == pytest.approx(flat.var(axis=0).max())
    assert activation_criterion(x, "mean_activation_variance") == pytest.approx(flat.var(axis=0).mean())
    assert activation_criterion(x, "mean_activation_magnitude") == pytest.approx((3 + 9 + 7) / 3)
    # The plain mean over batches, with no discount of the first.
    model = plain(torch.linspace(-1, 1, 12).reshape(2, 6))
    layers = find_layers(model, [twelve])
    table = Nncf("hessian_input_activation").score(model, [twelve, twenty_four], layers, [FORMAT])
    lost = relative_error(model, layers[0], FORMAT) * float(model.weight("").detach().double().square().sum())
    assert table.value[0, 0] == pytest.approx((2 * 506 / 12 + 2 * 4324 / 24) / 2 * lost, rel=1e-6)
    assert table.value[0, 0] / lost == pytest.approx(222.333333, rel=1e-6)


def test_rankings_are_divided_by_the_error_of_8_bits() -> None:
    weight = torch.tensor([[0.0, 255.0, 1.25, 3.0], [0.0, 0.0, 0.0, 0.0]])
    model = plain(weight)
    x = torch.tensor([[1.0, 2.0, 0.0, 0.0], [3.0, 2.0, 0.0, 1.0]])
    layers = find_layers(model, [x])
    # Steps of 1: only 1.25 is off, by a quarter.
    assert int8_error(model, layers[0]) == pytest.approx(0.0625 / 4 + EPSILON)
    relative = relative_error(model, layers[0], FORMAT)
    for criterion, statistic in (
        ("max_activation_variance", 1.0),
        ("mean_activation_variance", 1.25 / 4),
        ("mean_activation_magnitude", 6 / 4),
        ("weight_quantization_error", 1.0),
    ):
        table = Nncf(criterion).score(model, [x], layers, [FORMAT])
        assert table.value[0, 0] == pytest.approx(statistic / (1 / 64 + EPSILON) * relative, rel=1e-6), criterion
    without = mp.score(model, [], ["int4-channel"], "nncf", criterion="weight_quantization_error")
    assert without.value[0, 0] == table.value[0, 0]
    assert without.spread[0, 0] == 0.0
    assert int8_error(plain(torch.zeros(2, 2)), layers[0]) == EPSILON


def test_token_numbers_are_one_hot_inputs() -> None:
    numbers = torch.tensor([[0, 0, 3], [1, 0, 3]])
    vectors = nn.functional.one_hot(numbers, 5).float()
    for criterion in CRITERIA[:4]:
        expected = activation_criterion(vectors, criterion)
        assert one_hot_criterion(numbers, 5, criterion) == pytest.approx(expected), criterion


# Routing.


class Routed(nn.Module):
    """Sends a token to the experts whose numbers are in its first channels."""

    def __init__(self, to: list[list[int]]) -> None:
        super().__init__()
        self.to = to
        self.experts = nn.ModuleList(nn.Linear(4, 4) for _ in range(3))
        self.shared = nn.Linear(4, 4)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        out = self.shared(x)
        for number, expert in enumerate(self.experts):
            rows = [i for i, chosen in enumerate(self.to) if number in chosen]
            out[rows] = out[rows] + expert(x[rows])
        return out


class Whole(nn.Module):
    def __init__(self, to: list[list[int]]) -> None:
        super().__init__()
        self.moe = Routed(to)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return self.moe(x)


def test_experts_count_by_their_tokens() -> None:
    model = Model(Whole([[0], [0, 1], [0], [1]]), logits=lambda m, x: m(x))
    batches = [torch.randn(4, 4, generator=torch.Generator().manual_seed(s)) for s in (1, 2)]
    layers = find_layers(Model(Whole([])))
    table = ExpertUsage().score(model, batches, layers, [FORMAT])
    shares = {"moe.experts.0": 0.75, "moe.experts.1": 0.5, "moe.shared": 1.0}
    for name, share in shares.items():
        layer = next(x for x in layers if x.name == name)
        i = table.layers.index(name)
        assert table.value[i, 0] == pytest.approx(share * relative_error(model, layer, FORMAT), rel=1e-9)
        assert table.spread[i, 0] == 0.0
    assert table.status[table.layers.index("moe.experts.2")] == ("not_observed",)
    # Under another name they are no experts.
    assert ExpertUsage(pattern="slot").score(model, batches, layers, [FORMAT]).value[0, 0] > table.value[0, 0]
    for name in ("activation_spikes", "activation_entropy", "nncf", "activation_pca", "lim", "block_cosine"):
        other = registry.make("estimators", name).score(model, batches, layers, [FORMAT])
        assert other.status[other.layers.index("moe.experts.2")] == ("not_observed",), name


def test_tokens_of_stacked_experts_are_those_that_the_router_sent() -> None:
    for architecture in EXPERTS:
        model = tiny_experts(architecture)
        batch = tokens(2, 12)
        layers = [x for x in find_layers(model, [batch]) if x.kind == "expert"]
        chosen: list[torch.Tensor] = []
        holder = model.holder(layers[0].name)
        handle = holder.register_forward_pre_hook(
            lambda m, args, kwargs, chosen=chosen: chosen.extend(
                x for x in (*args, *kwargs.values()) if x.dtype == torch.int64
            ),
            with_kwargs=True,
        )
        model.logits(batch)
        handle.remove()
        counts = torch.bincount(chosen[0].flatten(), minlength=4) / 24
        assert float(counts.sum()) == pytest.approx(2)
        counts = torch.where(counts == 0, counts.mean(), counts)
        table = ExpertUsage().score(model, [batch], layers, [FORMAT])
        for layer in layers:
            weight = matrices(layer, model.weight(layer.name))
            from mpsearch.model.quantize import fake_quantize

            rounded = matrices(layer, fake_quantize(model.weight(layer.name).detach(), FORMAT, layer.row_axes))
            errors = (rounded - weight).square().sum(dim=(1, 2)) / weight.square().sum(dim=(1, 2))
            expected = float((counts * errors).sum())
            assert table.value[table.layers.index(layer.name), 0] == pytest.approx(expected, rel=1e-6)


@pytest.mark.parametrize("name", WITH_DATA + WITHOUT_DATA)
def test_stacked_experts_have_a_score_or_say_why_not(name: str) -> None:
    model = tiny_experts("Mixtral")
    table = mp.score(model, [tokens(4, 24)], ["int4-channel"], name)
    inside = name in ("activation_spikes", "activation_entropy", "nncf", "activation_pca")
    for layer, status in zip(table.layers, table.status, strict=True):
        assert status == ("not_observed",) if inside and ".experts." in layer else ("ok",), layer


# All of them.


class Edges(nn.Module):
    """A weight of zeros, a row of zeros, a layer on zeros, and one that is never called."""

    def __init__(self) -> None:
        super().__init__()
        self.zero, self.row, self.dead, self.never = (nn.Linear(4, 4) for _ in range(4))
        self.conv = nn.Conv1d(4, 4, 2)
        with torch.no_grad():
            self.zero.weight.zero_()
            self.row.weight[1:3] = 0.0

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        x = self.row(x) + self.zero(x) + self.dead(torch.zeros_like(x))
        return self.conv(x.transpose(1, 2)).mean(dim=2)


@pytest.mark.parametrize("name", WITH_DATA + WITHOUT_DATA)
def test_edges_give_finite_numbers(name: str) -> None:
    torch.manual_seed(0)
    model = Model(Edges(), logits=lambda m, x: m(x))
    batches = list(torch.randn(3, 2, 5, 4, generator=torch.Generator().manual_seed(1)))
    table = registry.make("estimators", name).score(model, batches, find_layers(Model(Edges())), [FORMAT])
    row = dict(zip(table.layers, range(5), strict=True))
    for layer in ("zero", "row", "dead", "conv"):
        assert table.status[row[layer]] == ("ok",), layer
        assert table.value[row[layer], 0] >= 0
    assert table.value[row["zero"], 0] == 0.0
    assert table.value[row["row"], 0] > 0
    assert table.status[row["never"]] == (("ok",) if name in WITHOUT_DATA else ("not_observed",))


@pytest.mark.parametrize("name", WITH_DATA + WITHOUT_DATA)
def test_data_is_asked_for_by_those_that_look_at_it(name: str) -> None:
    model = plain(torch.linspace(-1, 1, 16).reshape(4, 4))
    blind = mp.wrap(nn.Linear(4, 4))
    assert bool(registry.make("estimators", name).refuses(blind)) == (name in WITH_DATA)
    if name in WITHOUT_DATA:
        assert mp.score(model, [], ["int3-channel"], name).value[0, 0] > 0
    else:
        with pytest.raises(mp.InputError, match="E501"):
            mp.score(model, [], ["int3-channel"], name)


@pytest.mark.parametrize("name", WITH_DATA + WITHOUT_DATA)
def test_tied_layers_add_up(name: str) -> None:
    model, batch = tiny(layers=1), tokens(2, 40)
    apart = mp.score(model, [batch], ["int4-channel"], name, layers=find_layers(model, [batch], "none"))
    tied = mp.score(model, [batch], ["int4-channel"], name)
    names = [f"model.layers.0.self_attn.{x}_proj" for x in "qkv"]
    parts = [apart.value[apart.layers.index(x), 0] for x in names]
    row = tied.layers.index("model.layers.0.self_attn.{q,k,v}_proj")
    assert tied.value[row, 0] == pytest.approx(math.fsum(parts), rel=1e-9)
    assert np.isfinite(tied.value).all()


@pytest.mark.parametrize(
    ("name", "settings"),
    [
        ("activation_spikes", {"outlier": 0}), ("activation_spikes", {"most": -1}), ("zd", {"two_sided": "yes"}),
        ("activation_entropy", {"clusters": 1}), ("activation_entropy", {"tokens": 1.5}),
        ("nncf", {"criterion": "max"}),
        ("group_range", {"group": 1}), ("activation_pca", {"top": 1.0}), ("weight_kl", {"bins": 1}),
        ("expert_usage", {"pattern": ""}),
    ],
)  # fmt: skip
def test_settings_that_make_no_sense_are_refused(name: str, settings: dict[str, Any]) -> None:
    with pytest.raises(mp.InputError, match="E113"):
        registry.make("estimators", name, **settings)


class Loud(nn.Module):
    """The weights of the first layer pass what float16 scales can hold."""

    def __init__(self) -> None:
        super().__init__()
        self.loud, self.soft = nn.Linear(8, 8), nn.Linear(8, 4)
        with torch.no_grad():
            self.loud.weight.mul_(1e9)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return self.soft(torch.tanh(self.loud(x)))


@pytest.mark.parametrize("name", WITH_DATA + WITHOUT_DATA)
def test_weights_beyond_a_format_are_a_status(name: str) -> None:
    torch.manual_seed(0)
    model = Model(Loud(), logits=lambda m, x: m(x))
    batches = list(torch.randn(3, 6, 8, generator=torch.Generator().manual_seed(1)))
    table = mp.score(model, batches, ["int4-channel", "bf16"], name)
    assert table.status == (("non_finite", "ok"), ("ok", "ok"))


def transposed() -> Model:
    """A model whose linears keep their weights as (in, out), and whose head is its embedding."""
    import transformers

    torch.manual_seed(5)
    config = transformers.GPT2Config(vocab_size=61, n_embd=64, n_layer=1, n_head=4, n_positions=64)
    return Model(transformers.GPT2LMHeadModel(config), tokens=True)


@pytest.mark.parametrize("name", WITH_DATA + WITHOUT_DATA)
def test_formats_made_from_data_leave_the_statistics_alone(name: str) -> None:
    batches = [tokens(2, 40), {"input_ids": tokens(4, 40)["input_ids"][2:]}]
    table = mp.score(transposed(), batches, ["int3-g16-gptq", "int3-g16"], name)
    alone = mp.score(transposed(), batches, ["int3-g16"], name)
    assert table.value[:, 1].tobytes() == alone.value[:, 0].tobytes()
    rounded = np.array([status[0] == "ok" for status in table.status])
    assert rounded.any()
    assert (table.value[rounded, 0] != table.value[rounded, 1]).all()


@pytest.mark.parametrize("name", WITH_DATA + WITHOUT_DATA)
def test_a_search_takes_every_one_of_them(name: str) -> None:
    torch.manual_seed(0)
    module = nn.Sequential(nn.Linear(16, 32), nn.Tanh(), nn.Linear(32, 8))
    model = mp.wrap(module, logits=lambda m, x: m(x))
    batches = list(torch.randn(8, 12, 16, generator=torch.Generator().manual_seed(2)))
    menu = ["int2-channel", "int4-channel", "int8-channel"]
    found = mp.search(model, batches, "weights <= 5 bits", formats=menu, points=0, estimator=name)
    assert {str(fmt) for fmt in found.plan.formats.values()} <= {*menu, "bf16"}
    assert found.study.measurements[0].loss > 0
