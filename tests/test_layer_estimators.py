"""Estimators of a layer's, a block's and the loss's own answer to rounding and to noise."""

from __future__ import annotations

import copy
import json
import math
from dataclasses import replace
from typing import Any

import numpy as np
import pytest
import torch
from torch import Tensor, nn

import mpsearch as mp
from mpsearch import registry
from mpsearch.format import Format, parse_formats
from mpsearch.layer import Layer, Layers
from mpsearch.model.apply import applied
from mpsearch.model.cut import part_of
from mpsearch.model.find import find_layers
from mpsearch.model.model import Model, samples_of
from mpsearch.parts import split
from mpsearch.sensitivity.assemble import Deltas
from mpsearch.sensitivity.block_mse import BlockMse
from mpsearch.sensitivity.isolated_loss import IsolatedLoss
from mpsearch.sensitivity.layer_hessian import InputForms, LayerHessian
from mpsearch.sensitivity.linearity import Linearity, slope
from mpsearch.sensitivity.noise import Noise, steps_of
from mpsearch.sensitivity.output_mse import OutputMse
from mpsearch.sensitivity.saliency import compensated
from mpsearch.spread import mean_and_error
from mpsearch.testing.estimators import EstimatorSuite, small_classifier
from tests.conftest import DATA
from tests.tiny_models import tiny, tiny_experts, tokens

FORMATS = parse_formats(["int2-channel", "int4-channel", "int8-channel"])
BATCHES = [{"input_ids": part} for part in tokens(4, 12)["input_ids"].split(2)]
NAMES = ("layer_hessian", "linearity", "block_mse", "isolated_loss", "noise")


class TestAbsoluteLayerHessian(EstimatorSuite):
    @pytest.fixture
    def estimator(self) -> Any:
        return LayerHessian(relative=False)


class TestLinearityOfTheLoss(EstimatorSuite):
    @pytest.fixture
    def estimator(self) -> Any:
        return Linearity(against="loss", draws=2)


class TestIsolatedLossUp(EstimatorSuite):
    @pytest.fixture
    def estimator(self) -> Any:
        return IsolatedLoss(direction="up")

    def test_more_bits_hurt_less(self, scored: mp.SensitivityTable) -> None:
        # Among poor layers the loss need not fall with every step; the best format is what others are compared with.
        assert (scored.value[:, 2] == 0).all()
        assert (scored.value[:, :2] != 0).all()


class TestNoiseOfTheLoss(EstimatorSuite):
    @pytest.fixture
    def estimator(self) -> Any:
        return Noise(against="loss", draws=16)


class TestAbsoluteBlockMse(EstimatorSuite):
    @pytest.fixture
    def estimator(self) -> Any:
        return BlockMse(relative=False)


def table(name: str) -> dict[str, Any]:
    found: dict[str, Any] = json.loads((DATA / f"{name}.json").read_text())
    return found


def worked() -> dict[str, Tensor]:
    made = table("obs_gptq_example")
    numbers = {name: x for name, x in made.items() if isinstance(x, list) and isinstance(x[0], list)}
    return {name: torch.tensor(x, dtype=torch.float64) for name, x in numbers.items()}


def test_the_quadratic_form_of_the_worked_example() -> None:
    made = worked()
    module = nn.Linear(4, 2, bias=False)
    module.weight.data = made["W"].float()
    model = Model(module, logits=lambda m, b: m(b))
    (layer,) = find_layers(model)
    forms = InputForms(model, made["X (d x N)"].T.float(), [layer])
    assert forms.tokens == {"": 6}
    # Sums over the six inputs; the scores are means.
    for name, error in (("Q_gptq", 0.309077), ("Q_rtn", 3.147157)):
        assert 6 * forms.half(layer, made[name] - made["W"]) == pytest.approx(error, abs=2e-6)
    # Fewer inputs than columns are kept as they are; the matrix is the same.
    torch.testing.assert_close(3 * forms.matrix(layer)[0] * 2, made["H"], rtol=1e-6, atol=1e-9)
    few = InputForms(model, made["X (d x N)"].T[:3].float(), [layer])
    assert few._inputs
    kept = made["X (d x N)"][:, :3]
    torch.testing.assert_close(few.matrix(layer)[0], 2 / 3 * kept @ kept.T, rtol=1e-6, atol=1e-9)


def score_of(weight: Tensor, rounded: Tensor, x: Tensor, **settings: Any) -> float:
    """Score of a linear layer that is rounded in a given way."""
    module = nn.Linear(weight.shape[1], weight.shape[0], bias=False)
    module.weight.data = weight.float()
    model = Model(module, logits=lambda m, b: m(b))
    layers = find_layers(model)
    Deltas.of(model)._kept["", FORMATS[0].weight] = (rounded - weight).float()
    made = LayerHessian(relative=False, **settings).score(model, [x.float()], layers, FORMATS[:1])
    return float(made.value[0, 0])


def test_saliencies_of_the_worked_example() -> None:
    made = worked()
    weight, hessian = made["W"], made["H"]
    for name in ("Q_rtn", "Q_gptq"):
        d = made[name] - weight
        x = made["X (d x N)"].T
        alone = [float(d[:, j].square().sum() * hessian[j, j]) / 2 for j in range(4)]
        assert 6 * score_of(weight, made[name], x, saliency="owq") == pytest.approx(sum(alone), rel=1e-5)
        each = 0.5 * d.square() * compensated(hessian[None])[0]
        assert 6 * score_of(weight, made[name], x, saliency="obq") == pytest.approx(float(each.sum()), rel=1e-5)
        assert 0 < float(each.sum()) < sum(alone)
    exact = 0.5 * (made["Q_rtn"] - weight).square() * compensated(hessian[None], share=0.0)[0]
    torch.testing.assert_close(exact, made["obq_first_step_error 1/2 (w-q)^2/[Hinv]_ii"], rtol=1e-6, atol=1e-12)


def test_compensation_is_the_least_loss_with_the_damped_others_free() -> None:
    factor = torch.randn(3, 6, generator=torch.Generator().manual_seed(1), dtype=torch.float64)
    hessian = torch.block_diag(factor.T @ factor, torch.zeros(1, 1, dtype=torch.float64))  # singular, one input dead
    found = compensated(hessian[None])[0, 0]
    damp = 0.01 * hessian.diagonal()[:6].mean()
    for j in range(7):
        others = [i for i in range(7) if i != j]
        inner = hessian[others][:, others] + damp * torch.eye(6, dtype=torch.float64)
        across = hessian[others, j]
        least = float(hessian[j, j] - across @ torch.linalg.solve(inner, across))
        assert float(found[j]) == pytest.approx(least, rel=1e-6, abs=1e-12)
    assert float(found[6]) == pytest.approx(0, abs=1e-12)
    # Scales with the inputs' unit, is the diagonal where nothing correlates, and 0 where nothing was seen.
    torch.testing.assert_close(compensated(9 * hessian[None])[0, 0], 9 * found)
    diagonal = torch.tensor([3.0, 0.5, 0.0], dtype=torch.float64)
    torch.testing.assert_close(compensated(torch.diag(diagonal)[None])[0, 0], diagonal)
    assert not compensated(torch.zeros(1, 2, 2)).any()
    assert bool(compensated(torch.full((1, 2, 2), torch.nan)).isnan().all())
    # Rows with lookups have a Hessian each.
    counts = torch.tensor([0.0, 2.0], dtype=torch.float64)
    rows = compensated(hessian[None], counts)[0]
    torch.testing.assert_close(rows[0], found)
    second = hessian + (damp + 2) * torch.eye(7, dtype=torch.float64)
    torch.testing.assert_close(rows[1], 1 / torch.linalg.inv(second).diagonal() - damp)


@pytest.mark.parametrize("saliency", ["owq", "obq"])
@pytest.mark.parametrize("relative", [True, False])
def test_saliencies_of_all_kinds_of_layers_and_of_their_parts(saliency: Any, relative: bool) -> None:
    model, batches, layers = mixed()
    estimator = LayerHessian(relative=relative, saliency=saliency)
    found = estimator.score(model, batches, layers, FORMATS)
    direct = LayerHessian(relative=relative).score(model, batches, layers, FORMATS)
    assert (found.value > 0).all()
    np.testing.assert_allclose(found.value[0], direct.value[0], rtol=1e-6)  # the embedding
    assert (found.value[1:] != direct.value[1:]).all()
    forms = InputForms(model, batches[0], layers)
    for layer in layers:
        error = model.weight(layer.name).detach()
        for by in ("output_channel", "input_channel"):
            parts = [x for x in split(layers, by, 2) if x.owner == layer.name]
            if parts[0].is_part:
                total = sum(forms.apart(x, part_of(error, x), saliency) for x in parts)
                assert total == pytest.approx(forms.apart(layer, error, saliency), rel=1e-6)
    if saliency == "owq":
        other = LayerHessian(relative=relative, saliency="obq").score(model, batches, layers, FORMATS)
        assert (other.value <= found.value * (1 + 1e-9)).all()


@pytest.mark.parametrize("saliency", ["format", "owq", "obq"])
def test_a_tied_head_counts_every_token_once_as_lookup_and_once_as_head(saliency: Any) -> None:
    from transformers import GPT2Config, GPT2LMHeadModel

    torch.manual_seed(0)
    config = GPT2Config(vocab_size=61, n_embd=16, n_layer=1, n_head=2, n_positions=32)
    model = Model(GPT2LMHeadModel(config), tokens=True)
    layers = find_layers(model, BATCHES)
    assert layers[0].shared == ("lm_head",)
    form = LayerHessian(relative=False, saliency=saliency).score(model, BATCHES, layers, FORMATS)
    direct = OutputMse(relative=False).score(model, BATCHES, layers, FORMATS)
    if saliency == "format":
        np.testing.assert_allclose(direct.value, form.value, rtol=1e-4)
        return
    # By hand: every row of the embedding has a Hessian of its own.
    forms = InputForms(model, BATCHES[0], layers)
    error = Deltas.of(model)(layers[0], FORMATS[0]).double()
    counts = (
        torch.bincount(BATCHES[0]["input_ids"].flatten(), minlength=61).double() * 2 / forms.tokens["transformer.wte"]
    )
    total = 0.0
    damp = 0.01 * forms.matrix(layers[0])[0].diagonal().mean()
    for row, count in zip(error, counts, strict=True):
        own = forms.matrix(layers[0])[0] + count * torch.eye(16, dtype=torch.float64)
        loss = own.diagonal()
        if saliency == "obq":
            loss = 1 / torch.linalg.inv(own + damp * torch.eye(16, dtype=torch.float64)).diagonal() - damp
        total += float((row.square() * loss).sum()) / 2
    assert forms.apart(layers[0], error, saliency) == pytest.approx(total, rel=1e-6)


class Mixed(nn.Module):
    """Embedding, plain, strided and grouped convolutions, and a linear layer that is called twice."""

    def __init__(self) -> None:
        super().__init__()
        self.embed = nn.Embedding(11, 8)
        self.conv = nn.Conv1d(8, 8, 3, padding=1, stride=2, padding_mode="reflect")
        self.grouped = nn.Conv1d(8, 8, 3, groups=4)
        self.twice = nn.Linear(8, 8)

    def forward(self, x: Tensor) -> Tensor:
        found = self.grouped(self.conv(self.embed(x).transpose(1, 2)).tanh()).transpose(1, 2)
        output: Tensor = self.twice(self.twice(found).tanh())
        return output


def mixed() -> tuple[Model, list[Tensor], Layers]:
    torch.manual_seed(3)
    model = Model(Mixed(), logits=lambda m, b: m(b))
    batches = [torch.randint(0, 11, (3, 16)) for _ in range(3)]
    return model, batches, find_layers(model, batches)


@pytest.mark.parametrize("relative", [True, False])
def test_layer_hessian_is_the_output_error(relative: bool) -> None:
    model, batches, layers = mixed()
    found = LayerHessian(relative=relative).score(model, batches, layers, FORMATS)
    direct = OutputMse(relative=relative).score(model, batches, layers, FORMATS)
    assert found.layers == ("embed", "conv", "grouped", "twice")
    assert found.unit == direct.unit
    np.testing.assert_allclose(found.value, direct.value, rtol=2e-5)
    np.testing.assert_allclose(found.spread, direct.spread, rtol=2e-4)


def test_layer_hessian_of_a_language_model_with_ties() -> None:
    model = tiny()
    layers = find_layers(model)
    found = LayerHessian().score(model, BATCHES, layers, FORMATS)
    direct = OutputMse().score(model, BATCHES, layers, FORMATS)
    np.testing.assert_allclose(found.value, direct.value, rtol=1e-4)


def test_gptq_saliency_is_the_score_of_the_format_with_gptq() -> None:
    model, batches, layers = small_classifier()
    model.calibrate(batches)
    menu = parse_formats(["int3-channel", "int3-channel-mse", "fp8-e4m3-channel", "int4-g8-asym"])
    fed = LayerHessian(saliency="gptq").score(model, batches, layers, menu)
    plain = LayerHessian().score(model, batches, layers, menu)
    shipped = LayerHessian().score(model, batches, layers, parse_formats(["int3-channel-gptq", "int4-g8-asym-gptq"]))
    assert np.array_equal(fed.value[:, [0, 3]], shipped.value)
    assert np.array_equal(fed.value[:, 1:3], plain.value[:, 1:3])
    assert (fed.value[:, 0] < plain.value[:, 0]).all()
    fresh = small_classifier()[0]
    with pytest.raises(mp.InputError, match="E422"):
        LayerHessian(saliency="gptq").score(fresh, batches, layers, menu)


def test_slopes_of_the_worked_regression() -> None:
    example = table("higgs_grids_dp")["example"]
    for harm, alpha in zip(example["measured_delta_ppl"], example["expected_alpha"], strict=True):
        assert slope(example["grid_mse"], harm).value == pytest.approx(alpha, rel=1e-12)


def test_error_of_a_slope_is_that_of_least_squares() -> None:
    x, y = np.array([1.0, 2.0, 3.0, 5.0]), np.array([1.1, 1.7, 3.2, 4.9])
    alpha = x @ y / (x @ x)
    error = math.sqrt(((y - alpha * x) ** 2).sum() / 3 / (x @ x))
    found = slope(x.tolist(), y.tolist())
    assert found.value == pytest.approx(alpha)
    assert found.error == pytest.approx(error * 3.182446305284263 / 1.959963984540054)
    assert math.isnan(slope([1.0], [2.0]).error)


def softmax_model() -> tuple[Model, tuple[Tensor, Tensor], dict[str, Any]]:
    made = table("curvature_softmax")
    module = nn.Linear(3, 2, bias=False)
    module.weight.data = torch.tensor(made["W"])
    model = Model(
        module, loss=lambda m, b: nn.functional.cross_entropy(m(b[0]), b[1]), logits=lambda m, b: m(b[0])
    )  # fmt: skip
    return model, (torch.tensor(made["X"]), torch.tensor(made["y"])), made


@pytest.mark.parametrize("against", ["kl", "loss"])
def test_alpha_of_a_softmax_regression_is_half_the_mean_curvature(against: Any) -> None:
    model, batch, made = softmax_model()
    layers = find_layers(model, [batch])
    found = Linearity(levels=2, largest=0.05, draws=600, against=against).coefficients(model, batch, layers)[""]
    # Harm of noise: 1/2 tr(H) per weight times its square; Hessian of the loss and true Fisher are one here.
    expected = 0.5 * made["trace"] / 6 * float(model.weight("").detach().square().sum())
    assert found.error < 0.05 * expected
    assert abs(found.value - expected) < 3 * found.error


def test_the_linear_score_is_alpha_times_the_relative_error() -> None:
    model, batches, layers = small_classifier()
    estimator = Linearity()
    scores = estimator.score(model, batches[:1], layers, FORMATS)
    alphas = estimator.coefficients(model, batches[0], layers)
    for i, layer in enumerate(layers):
        for j, fmt in enumerate(FORMATS):
            weight = model.weight(layer.name).detach().double()
            t2 = float(Deltas.of(model)(layer, fmt).double().square().sum() / weight.square().sum())
            assert scores.value[i, j] == pytest.approx(alphas[layer.name].value * t2)
            assert scores.spread[i, j] == pytest.approx(alphas[layer.name].error * t2)


def test_alphas_of_tied_layers_are_each_its_own() -> None:
    model, layers = tiny(), find_layers(tiny())
    formats = [Format.parse("int4-channel")]
    tied = Linearity().score(model, BATCHES, layers, formats)
    alone = Linearity().score(model, BATCHES, [replace(x, tie="") for x in layers], formats)
    parts = {x.name: alone.value[i, 0] for i, x in enumerate(layers)}
    for i, decision in enumerate(layers.decisions):
        assert tied.value[i, 0] == pytest.approx(sum(parts[x.name] for x in decision.layers))


def test_a_negative_slope_is_kept_and_a_layer_of_zeros_is_harmless() -> None:
    module = nn.Sequential(nn.Linear(4, 4, bias=False), nn.Linear(4, 4, bias=False))
    nn.init.zeros_(module[1].weight)
    model = Model(module, loss=lambda m, b: m[1](b).sum() - m[0](b).square().mean(), logits=lambda m, b: m(b))
    batch = torch.randn(5, 4, generator=torch.Generator().manual_seed(2))
    for name in ("linearity", "isolated_loss", "noise", "layer_hessian", "block_mse"):
        settings = {"against": "loss"} if name in ("linearity", "noise") else {}
        found = registry.make("estimators", name, **settings).score(model, [batch], find_layers(model), FORMATS)
        assert found.status == (("ok",) * 3,) * 2, name
        assert (found.value[1] == 0).all(), name
        if name == "linearity":
            assert (found.value[0] < 0).all()


def test_errors_of_the_slope_are_honest_over_batches() -> None:
    model, batch, made = softmax_model()
    layers, fmt = find_layers(model, [batch]), Format.parse("int3-tensor")
    rows = torch.Generator().manual_seed(4)
    error = float(Deltas.of(model)(layers[0], fmt).square().sum())
    truth = 0.5 * made["trace"] / 6 * error
    inside = 0
    for _ in range(100):
        picks = [torch.randint(0, len(batch[0]), (8,), generator=rows) for _ in range(8)]
        found = Linearity(levels=2, largest=0.05).score(
            model, [(batch[0][p], batch[1][p]) for p in picks], layers, [fmt]
        )
        inside += abs(found.value[0, 0] - truth) <= 1.96 * found.spread[0, 0]
    assert 0.89 <= inside / 100 <= 0.995


class Blocks(nn.Module):
    """Blocks that work in place on their input."""

    def __init__(self) -> None:
        super().__init__()
        self.start = nn.Linear(6, 8)
        self.blocks = nn.ModuleList(
            nn.Sequential(nn.ELU(inplace=True), nn.Linear(8, 16), nn.Linear(16, 8)) for _ in range(3)
        )
        self.end = nn.Linear(8, 4)

    def forward(self, x: Tensor) -> Tensor:
        x = self.start(x)
        for block in self.blocks:
            x = x + block(x.clone()).mul_(0.5)
        output: Tensor = self.end(x)
        return output


def test_block_errors_are_those_of_the_block_alone() -> None:
    torch.manual_seed(5)
    module = Blocks()
    model = Model(module, logits=lambda m, b: m(b))
    batch = torch.randn(7, 6)
    layers = find_layers(model, [batch])
    fmt = Format.parse("int3-channel")
    found = BlockMse().score(model, [batch], layers, [fmt])
    absolute = BlockMse(relative=False).score(model, [batch], layers, [fmt])
    inputs, x = [], model.module.start(batch)
    for block in model.module.blocks:
        inputs.append(x)
        x = x + 0.5 * block(x.clone())
    units = {"start": (model.module.start, batch), "end": (model.module.end, x)}
    units |= {f"blocks.{i}.{j}": (model.module.blocks[i], inputs[i]) for i in range(3) for j in (1, 2)}
    for i, layer in enumerate(layers):
        unit, given = units[layer.name]
        with torch.no_grad():
            clean = unit(given.clone())
            with applied(model, {layer: fmt}):
                apart = (unit(given.clone()) - clean).double().square().sum(dim=1)
        whole = clean.double().square().sum(dim=1).mean()
        value, error = mean_and_error((apart / whole).tolist())
        assert found.value[i, 0] == pytest.approx(value, rel=1e-5), layer.name
        assert found.spread[i, 0] == pytest.approx(error, rel=1e-4)
        assert absolute.value[i, 0] == pytest.approx(float(apart.mean()), rel=1e-5)


def test_block_errors_of_a_language_model() -> None:
    model = tiny()
    layers = find_layers(model)
    found = BlockMse().score(model, BATCHES[:1], layers, parse_formats(["int4-channel", "int4-channel@int8-token"]))
    assert {s for row in found.status for s in row} == {"ok", "not_offered"}
    inner = [i for i, name in enumerate(found.layers) if ".layers." in name]
    assert (found.value[inner] > 0).all()
    assert not np.array_equal(found.value[inner, 0], found.value[inner, 1])
    # The first block sees the model's own inputs: its output is what comes out of a changed model there.
    block = model.module.model.layers[0]
    outputs: list[Tensor] = []
    handle = block.register_forward_hook(
        lambda module, args, output: outputs.append(output if isinstance(output, Tensor) else output[0])
    )
    decision = next(d for d in layers.decisions if d.name.startswith("model.layers.0.self_attn.{q"))
    with torch.no_grad():
        model.logits(BATCHES[0])
        with applied(model, dict.fromkeys(decision.layers, Format.parse("int4-channel"))):
            model.logits(BATCHES[0])
    handle.remove()
    expected = float((outputs[1] - outputs[0]).double().square().sum() / outputs[0].double().square().sum())
    assert found.value[found.layers.index(decision.name), 0] == pytest.approx(expected, rel=1e-5)


def test_isolated_loss_is_the_difference_of_two_losses() -> None:
    model = tiny()
    layers = find_layers(model)
    menu = parse_formats(["int2-channel", "int4-channel@int8-token", "kv-int2-token"])
    everything = find_layers(model, caches=True)
    found = IsolatedLoss().score(model, BATCHES, everything, menu)
    samples = [s for batch in BATCHES for s in samples_of(batch)]
    with torch.no_grad():
        before = np.array([float(model.loss(s)) for s in samples])
        for i, decision in enumerate(everything.decisions):
            for j, fmt in enumerate(menu):
                if found.status[i][j] == "not_offered":
                    continue
                with applied(model, dict.fromkeys(decision.layers, fmt)):
                    after = np.array([float(model.loss(s)) for s in samples])
                assert found.value[i, j] == pytest.approx((after - before).mean(), abs=2e-6)
    one = IsolatedLoss().score(model, BATCHES[:1], layers, menu[:1])
    with torch.no_grad(), applied(model, dict.fromkeys(layers.decisions[1].layers, menu[0])):
        apart = [float(model.loss(s)) - b for s, b in zip(samples[:2], before, strict=False)]
    assert one.spread[1, 0] == pytest.approx(mean_and_error(apart)[1], rel=1e-3)
    assert found.samples == 4


def test_isolated_loss_from_below() -> None:
    model = tiny()
    layers = find_layers(model, caches=True)
    # Not in order: 3 bits with rounded inputs are the poorest of the weights.
    menu = parse_formats(["int8-channel", "int3-channel", "int3-channel@int4-token", "kv-int8-token", "kv-int2-token"])
    found = IsolatedLoss(direction="up").score(model, BATCHES, layers, menu)
    poorest = {x: menu[4 if x.kind == "kv_cache" else 1 if x.kind == "embedding" else 2] for x in layers}

    def loss(changes: dict[Layer, Format]) -> float:
        with torch.no_grad(), applied(model, {**poorest, **changes}):
            return sum(float(model.loss(batch)) for batch in BATCHES) / len(BATCHES)

    for i, decision in enumerate(layers.decisions):
        best = 3 if decision.layers[0].kind == "kv_cache" else 0
        assert found.value[i, best] == found.spread[i, best] == 0
        for j, fmt in enumerate(menu):
            if found.status[i][j] == "ok":
                raised, top = (dict.fromkeys(decision.layers, f) for f in (fmt, menu[best]))
                assert found.value[i, j] == pytest.approx(loss(raised) - loss(top), abs=5e-6), (decision.name, str(fmt))


def test_a_loss_of_the_users_sees_no_rounded_caches() -> None:
    own = tiny()
    model = Model(own.module, loss=lambda m, b: m(**b, use_cache=False).logits.square().mean(), tokens=True)
    layers = find_layers(model, caches=True)
    found = IsolatedLoss().score(model, BATCHES, layers, parse_formats(["int4-channel", "kv-int4-token"]))
    for decision, row in zip(layers.decisions, found.status, strict=True):
        cache = decision.layers[0].kind == "kv_cache"
        assert row == (("not_offered", "not_observed") if cache else ("ok", "not_offered"))
    assert model.caches == {}


def test_noise_of_a_linear_model_is_a_twelfth_of_the_squared_steps() -> None:
    torch.manual_seed(6)
    module = nn.Linear(4, 3, bias=False)
    # The loss is 1/2 sum of (x w)^2: noise adds 1/2 sum_j x_j^2 s^2 / 12 per row.
    model = Model(module, loss=lambda m, b: 0.5 * m(b).square().sum(dim=1).mean())
    batch = torch.randn(6, 4)
    layers = find_layers(model, [])
    for text in ("int4-channel", "int3-g2-asym", "fp8-e4m3-channel"):
        fmt = Format.parse(text)
        steps = steps_of(model, layers[0], fmt).double()
        second = batch.double().square().mean(dim=0)
        expected = 0.5 * float((steps.square() * second).sum()) / 12
        found = Noise(draws=600, against="loss").score(model, [batch], layers, [fmt]).value[0, 0]
        assert found == pytest.approx(expected, rel=0.06), text


def test_the_step_of_noise() -> None:
    torch.manual_seed(6)
    module = nn.ModuleList([nn.Linear(8, 4), nn.Conv1d(4, 6, 2, groups=2)])
    model = Model(module, logits=lambda m, b: m[1](m[0](b).transpose(1, 2)))
    for layer in find_layers(model):
        weight = model.weight(layer.name).detach()
        rows = weight.reshape(layer.rows, -1)
        step = steps_of(model, layer, Format.parse("int4-channel"))
        assert step.shape == weight.shape
        expected = (rows.abs().amax(dim=1, keepdim=True) / 7).expand_as(rows).reshape(weight.shape)
        torch.testing.assert_close(step, expected, rtol=1e-3, atol=0)
        assert len(steps_of(model, layer, Format.parse("int4-tensor")).unique()) == 1
        assert len(steps_of(model, layer, Format.parse("int4-g4")).unique()) == weight.numel() // 4
        even = steps_of(model, layer, Format.parse("fp8-e4m3-channel"))
        delta = Deltas.of(model)(layer, Format.parse("fp8-e4m3-channel")).reshape(layer.rows, -1)
        found = even.reshape(layer.rows, -1)[:, 0].square() / 12
        torch.testing.assert_close(found, delta.square().mean(dim=1))
        assert not steps_of(model, layer, Format.parse("fp32")).any()


def test_noise_sees_the_same_draws_for_every_format() -> None:
    model, batches, layers = small_classifier()
    both = Noise().score(model, batches, layers, FORMATS)
    alone = Noise().score(model, batches, layers, FORMATS[1:2])
    assert np.array_equal(both.value[:, 1], alone.value[:, 0])
    other = Noise(seed=1).score(model, batches, layers, FORMATS)
    assert not np.array_equal(both.value, other.value)


class Routed(nn.Module):
    """Experts as modules of their own, one of which gets no tokens."""

    def __init__(self) -> None:
        super().__init__()
        self.experts = nn.ModuleList(nn.Linear(4, 4) for _ in range(2))
        self.spare = nn.Linear(4, 4)

    def forward(self, x: Tensor) -> Tensor:
        first = self.experts[0](x)
        none: Tensor = self.experts[1](x[:0])
        output: Tensor = first.clone()
        output[:0] += none
        return output


@pytest.mark.parametrize("name", NAMES)
def test_what_gets_no_tokens_is_not_observed(name: str) -> None:
    torch.manual_seed(8)
    model = Model(Routed(), loss=lambda m, b: m(b).square().mean(), logits=lambda m, b: m(b))
    layers = find_layers(Model(Routed()))
    found = registry.make("estimators", name).score(model, [torch.randn(3, 4)], layers, FORMATS[:1])
    assert dict(zip(found.layers, found.status, strict=True)) == {
        "experts.0": ("ok",), "experts.1": ("not_observed",), "spare": ("not_observed",)
    }  # fmt: skip


@pytest.mark.parametrize("name", NAMES)
def test_stacked_experts(name: str) -> None:
    model = tiny_experts("Mixtral")
    layers = find_layers(model)
    before = copy.deepcopy(model.module.state_dict())
    found = registry.make("estimators", name).score(model, BATCHES[:1], layers, [Format.parse("int4-g16")])
    for decision, status in zip(layers.decisions, found.status, strict=True):
        blind = name == "layer_hessian" and decision.layers[0].kind == "expert"
        assert status == ("not_observed" if blind else "ok",), decision.name
    assert all(torch.equal(value, before[key]) for key, value in model.module.state_dict().items())
    assert not any(m._forward_hooks or m._forward_pre_hooks for m in model.module.modules())


@pytest.mark.parametrize("name", NAMES)
def test_what_a_format_cannot_hold_is_not_finite(name: str) -> None:
    model, batches, layers = small_classifier()
    with torch.no_grad():
        model.weight("2")[0, 0] = 1e6
    found = registry.make("estimators", name).score(model, batches, layers, parse_formats(["int4-channel", "fp32"]))
    assert found.status == (("ok", "ok"), ("non_finite", "ok"))


def test_settings_that_make_no_sense_are_refused() -> None:
    for name, settings in (
        ("layer_hessian", {"saliency": "magnitude"}), ("layer_hessian", {"relative": "yes"}),
        ("block_mse", {"relative": 1}), ("isolated_loss", {"direction": "sideways"}),
        ("linearity", {"levels": 0}), ("linearity", {"levels": 1}), ("linearity", {"draws": "2"}),
        ("linearity", {"largest": 0}), ("linearity", {"against": "ppl"}), ("linearity", {"seed": "a"}),
        ("noise", {"draws": 0}), ("noise", {"against": "ppl"}), ("noise", {"seed": None}),
    ):  # fmt: skip
        with pytest.raises(mp.InputError, match="E113"):
            registry.make("estimators", name, **settings)


def test_what_an_estimator_cannot_take_it_refuses() -> None:
    blind = mp.wrap(nn.Linear(4, 3))
    for name in NAMES:
        assert registry.make("estimators", name).refuses(blind), name
    only_loss = mp.wrap(nn.Linear(4, 3), loss=lambda m, b: m(b).sum())
    able = {name for name in NAMES if not registry.make("estimators", name).refuses(only_loss)}
    assert able == {"layer_hessian", "isolated_loss"}
    assert not Linearity(against="loss").refuses(only_loss)
    with pytest.raises(mp.InputError, match="E506"):
        mp.score(only_loss, [torch.ones(1, 4)], ["int4-channel@int8-token"], "noise")
