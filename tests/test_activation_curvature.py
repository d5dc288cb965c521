"""Curvature and Fisher information of inputs and KV caches: closed forms, brute force, measured divergence."""

from __future__ import annotations

import math
from typing import Any

import numpy as np
import pytest
import torch
from scipy.stats import spearmanr
from torch import nn
from torch.nn import functional

import mpsearch as mp
from mpsearch.format import Format
from mpsearch.layer import Layers
from mpsearch.model.activations import round_input
from mpsearch.model.apply import applied
from mpsearch.model.find import find_layers
from mpsearch.model.kv_cache import round_states, watched_logits
from mpsearch.model.model import Model, samples_of
from mpsearch.sensitivity.activation_curvature import ReadErrors, Reads
from mpsearch.sensitivity.fisher import Fisher
from mpsearch.sensitivity.hessian_trace import HessianTrace
from mpsearch.sensitivity.input_trace import InputTrace
from tests.test_estimators import softmax_model
from tests.tiny_models import tiny, tokens

PRODUCTS = ("finite_difference", "double_backward")
INPUT = Format.parse("fp32@int3-token")


def squares(x: torch.Tensor, fmt: Format = INPUT) -> torch.Tensor:
    return (round_input(x, fmt.activation) - x).square().double()  # type: ignore[arg-type]


def output_hessians(model: Model, x: torch.Tensor) -> torch.Tensor:
    """W^T (diag p - p p^T) W of every sample: the Hessian of softmax cross-entropy in x, whatever the label."""
    weight = model.weight("").detach().double()
    p = torch.softmax(x.double() @ weight.T, dim=-1)
    middle = torch.diag_embed(p) - p[:, :, None] * p[:, None, :]
    return weight.T @ middle @ weight


def test_fisher_of_an_input_of_a_softmax_regression() -> None:
    model, batch, _ = softmax_model()
    layers = find_layers(model, [batch])
    diagonal = output_hessians(model, batch[0]).diagonal(dim1=1, dim2=2)
    expected = 0.5 * float((diagonal * squares(batch[0])).sum(dim=1).mean())
    found = Fisher(draws=4000).score(model, [batch], layers, [INPUT])
    assert found.value[0, 0] == pytest.approx(expected, rel=0.04)
    # The labels of the data give the empirical Fisher: residual times weight, squared.
    residual = torch.softmax(model.logits(batch), dim=-1) - functional.one_hot(batch[1], 2)
    gradient = residual.detach().double() @ model.weight("").detach().double()
    empirical = 0.5 * float((gradient.square() * squares(batch[0])).sum(dim=1).mean())
    data = Fisher(labels="data").score(model, [batch], layers, [INPUT])
    assert data.value[0, 0] == pytest.approx(empirical, rel=1e-5)
    assert abs(empirical - expected) > 0.2 * expected


def test_terms_of_weight_and_input_add_up() -> None:
    model, batch, _ = softmax_model()
    layers = find_layers(model, [batch])
    formats = [Format.parse(text) for text in ("int3-tensor", "fp32@int3-token", "int3-tensor@int3-token")]
    for estimator in (Fisher(), HessianTrace()):
        weight, read, both = estimator.score(model, [batch], layers, formats).value[0]
        assert both == pytest.approx(weight + read, rel=1e-9)
        assert weight > 0
        assert read > 0


@pytest.mark.parametrize("product", PRODUCTS)
@pytest.mark.parametrize("probing", ["joint", "layer"])
def test_trace_term_of_a_softmax_regression(product: Any, probing: Any) -> None:
    model, batch, _ = softmax_model()
    layers = find_layers(model, [batch])
    traces = output_hessians(model, batch[0]).diagonal(dim1=1, dim2=2).sum(dim=1)
    # Per sample, then averaged: the errors of samples differ, so the mean trace times the mean error is another number.
    expected = 0.5 * float((traces / 3 * squares(batch[0]).sum(dim=1)).mean())
    count = len(batch[0])
    estimator = InputTrace(400 * count, probing, product, 0.02, 0)
    cell = estimator.terms(model, batch, layers, [INPUT])["", INPUT]
    assert abs(cell.value - expected) < 3 * cell.spread
    assert cell.spread < 0.1 * expected
    pooled = 0.5 * float(traces.mean() / 3 * squares(batch[0]).sum() / count)
    assert abs(pooled - expected) > 4 * cell.spread


class Twice(nn.Module):
    """A layer that is called twice, and two layers that read the same tensor."""

    def __init__(self) -> None:
        super().__init__()
        self.again = nn.Linear(4, 4)
        self.left = nn.Linear(4, 3)
        self.right = nn.Linear(4, 3)

    def forward(self, x: torch.Tensor, a: Any = 0.0, b: Any = 0.0, c: Any = 0.0) -> torch.Tensor:
        y = torch.tanh(self.again(torch.tanh(self.again(x + a)) + b)) + c
        return self.left(y) * torch.sigmoid(self.right(y))


def twice_model() -> tuple[Model, Any]:
    generator = torch.Generator().manual_seed(5)
    module = Twice()
    with torch.no_grad():
        for parameter in module.parameters():
            parameter.copy_(torch.randn(parameter.shape, generator=generator))
    batch = (torch.randn(2, 4, generator=generator), torch.tensor([0, 2]))
    model = Model(
        module, loss=lambda m, b: functional.cross_entropy(m(b[0]), b[1]), logits=lambda m, b: m(b[0]), name="twice"
    )
    return model, batch


@pytest.mark.parametrize("product", PRODUCTS)
def test_traces_of_layers_called_twice_or_reading_one_tensor_are_those_of_brute_force(product: Any) -> None:
    model, batch = twice_model()
    layers = find_layers(model, [batch])
    assert [row.name for row in layers.decisions] == ["again", "{left,right}"]
    expected = {"again": 0.0, "{left,right}": 0.0}
    for sample in samples_of(batch):
        x, label = sample
        zero = torch.zeros(3, 1, 4)
        hessian = torch.autograd.functional.hessian(
            lambda shift, x=x, label=label: functional.cross_entropy(model.module(x, *shift), label), zero
        ).reshape(12, 12)
        with torch.no_grad():
            first = torch.tanh(model.module.again(x))
            last = torch.tanh(model.module.again(first))
        error = float(squares(x).sum() + squares(first).sum())
        expected["again"] += 0.5 * float(hessian.diagonal()[:8].sum()) / 8 * error / 2
        expected["{left,right}"] += 0.5 * float(hessian.diagonal()[8:].sum()) / 4 * float(squares(last).sum()) / 2
    cells = InputTrace(3000, "layer", product, 0.01, 0).terms(model, batch, layers, [INPUT])
    for name, value in expected.items():
        cell = cells[name, INPUT]
        assert abs(cell.value - value) < 3 * cell.spread + 2e-3 * abs(value), name
        assert cell.spread < 0.1 * abs(value)


def test_layers_that_read_one_tensor_share_a_gradient() -> None:
    model, batch = twice_model()
    layers = find_layers(model, [batch])
    expected = np.zeros(2)
    for x, label in samples_of(batch):
        shift = torch.zeros(3, 1, 4, requires_grad=True)
        (gradient,) = torch.autograd.grad(functional.cross_entropy(model.module(x, *shift), label), shift)
        with torch.no_grad():
            first = torch.tanh(model.module.again(x))
            errors = torch.cat([squares(y) for y in (x, first, torch.tanh(model.module.again(first)))])
        terms = 0.5 * (gradient[:, 0].double().square() * errors).sum(dim=1) / 2
        expected += np.array([float(terms[:2].sum()), float(terms[2])])
    table = Fisher(labels="data").score(model, [batch], layers, [INPUT])
    assert table.value[:, 0] == pytest.approx(expected, rel=1e-5)
    apart = find_layers(model, [batch], "none")
    alone = Fisher(labels="data").score(model, [batch], apart, [INPUT]).value[:, 0]
    # The product rule: gradients of left and right by themselves, whose squares do not add up to that of the sum.
    assert abs(alone[1:].sum() - expected[1]) > 0.02 * expected[1]


INPUTS = ["fp32@int8-token", "fp32@int8-tensor", "fp32@int4-token", "fp32@int8-token-asym"]


def test_fisher_of_inputs_is_the_measured_divergence_to_second_order() -> None:
    model, data = tiny(), [tokens(2, 40)]
    found = mp.score(model, data, INPUTS, "fisher", draws=16)
    measured = mp.score(model, data, INPUTS, "divergence")
    assert found.unit == measured.unit == "nats/token"
    for j, text in enumerate(INPUTS):
        ok = np.isfinite(measured.value[:, j])
        assert list(ok) == [name != "model.embed_tokens" for name in measured.layers]
        ratio = found.value[ok, j] / measured.value[ok, j]
        assert ((ratio > 0.6) & (ratio < 1.8)).all(), (text, ratio)
        assert abs(math.log(float(np.median(ratio)))) < 0.15
        assert spearmanr(found.value[ok, j], measured.value[ok, j])[0] > 0.9


def test_fisher_of_caches_is_the_measured_divergence_to_second_order() -> None:
    model, data = tiny(), [tokens(2, 40)]
    caches = Layers(tuple(x for x in mp.layers(model, caches=True) if x.kind == "kv_cache"))
    formats = ["kv-int8-token", "kv-int4-token", "kv-int4-token-g8-asym", "kv-fp32"]
    found = mp.score(model, data, formats, "fisher", layers=caches, draws=16)
    measured = mp.score(model, data, formats, "divergence", layers=caches)
    ratio = found.value[:, :3] / measured.value[:, :3]
    assert ((ratio > 0.7) & (ratio < 1.4)).all(), ratio
    assert found.value[:, 3].tolist() == [0.0] * 4  # the model is float32
    data_labels = mp.score(model, data, formats[:1], "fisher", layers=caches, labels="data")
    assert np.isfinite(data_labels.value).all()
    together = mp.score(model, data, ["int8-channel", "int8-channel@int8-token", "kv-int8-token"], "fisher")
    assert together.layers[-1] == caches[-1].name
    assert together.status[-1] == ("not_offered", "not_offered", "ok")


def test_gradients_of_caches_are_taken_where_the_cache_rounds() -> None:
    model, data = tiny(layers=1), tokens(1, 12)
    fmt = Format.parse("kv-int4-token")
    (keys, _) = [x for x in mp.layers(model, caches=True) if x.kind == "kv_cache"]
    rounded: dict[int, torch.Tensor] = {}

    def write(number: int, side: int, states: torch.Tensor) -> torch.Tensor:
        if side == 0:
            rounded[number] = round_states(states, fmt)  # type: ignore[arg-type]
            return rounded[number]
        return states

    with torch.no_grad():
        by_hand = watched_logits(model.module, data, write)
        with applied(model, {keys: fmt}):
            assert torch.equal(model.logits(data), by_hand)
    reads = Reads(model, [keys], [fmt])
    with torch.no_grad(), reads.recording():
        assert torch.equal(reads.logits(data), watched_logits(model.module, data, lambda *states: states[-1]))
    (read,) = reads.found
    errors = ReadErrors(model, data, [keys], [fmt], lambda: None)
    assert torch.equal(errors.squares(read, fmt), (rounded[0] - read.x).square())


def test_formats_of_caches_that_round_late_are_refused() -> None:
    model, data = tiny(layers=1), [tokens(1, 40)]
    for text in ("kv-int4-channel-g8", "kv-int8-token-recent8"):
        with pytest.raises(mp.InputError, match="E506"):
            mp.score(model, data, [text], "fisher")
    given = Model(model.module, tokens=True, loss=lambda m, b: m(**b, use_cache=False).logits.sum())
    with pytest.raises(mp.InputError, match="E506"):
        mp.score(given, data, ["kv-int8-token"], "fisher", labels="data")


@pytest.mark.parametrize("name", ["fisher", "hessian_trace"])
def test_weights_score_the_same_bits_beside_activations(name: str) -> None:
    model, data = tiny(layers=1), [tokens(2, 12), tokens(2, 13)]
    alone = mp.score(model, data, ["int4-channel"], name)
    beside = mp.score(model, data, ["int4-channel", "int4-channel@int8-token"], name)
    assert alone.value[:, 0].tobytes() == beside.value[:, 0].tobytes()
    assert np.nanmax(np.abs(beside.value[:, 1] - beside.value[:, 0])) > 0


def input_in_a_run(model: Model, layer: Any, batch: Any) -> torch.Tensor:
    seen: list[torch.Tensor] = []
    handle = model.holder(layer.name).register_forward_pre_hook(lambda module, args: seen.append(args[0].clone()))
    with torch.no_grad():
        model.logits(batch)
    handle.remove()
    return seen[0]


@pytest.mark.parametrize(
    "text", ["int8-tensor", "int8-channel-static", "int8-tensor-static", "int4-g8", "fp8-e4m3-tensor", "int4-token"]
)
def test_scales_are_those_of_a_run_of_the_batch(text: str) -> None:
    model, data = tiny(layers=1), tokens(3, 10)
    layers = find_layers(model, [data])
    layer = next(x for x in layers if x.name.endswith("down_proj"))
    model.calibrate([data], layers)
    fmt = Format.parse(f"fp32@{text}")
    plain = input_in_a_run(model, layer, data)
    with applied(model, {layer: fmt}):
        rounded = input_in_a_run(model, layer, data)
    reads = Reads(model, [layer], [fmt])
    errors = ReadErrors(model, data, [layer], [fmt], lambda: model.logits(data))
    for sample, expected in zip(samples_of(data), (rounded - plain).square(), strict=True):
        with torch.no_grad(), reads.recording():
            model.logits(sample)
        assert torch.allclose(errors.squares(reads.found[0], fmt)[0], expected, rtol=1e-3, atol=1e-9)


def test_a_layer_without_a_call_has_no_score_and_hooks_go() -> None:
    module = nn.ModuleDict({"used": nn.Linear(4, 3), "unused": nn.Linear(4, 3)})
    model = Model(module, loss=lambda m, b: functional.cross_entropy(m["used"](b[0]), b[1]))
    batch = (torch.randn(6, 4), torch.randint(0, 3, (6,)))
    layers = find_layers(Model(module))
    for estimator in (Fisher(labels="data"), HessianTrace()):
        table = estimator.score(model, [batch], layers, [Format.parse("int4-channel@int8-token")])
        assert table.status == (("ok",), ("not_observed",))

    def fails() -> None:
        with Reads(model, layers, [INPUT]).recording():
            assert any(part._forward_pre_hooks for part in model.module.modules())
            raise ZeroDivisionError

    with pytest.raises(ZeroDivisionError):
        fails()
    assert all(not part._forward_pre_hooks for part in model.module.modules())


def test_inputs_whose_shape_hangs_on_a_step_are_refused() -> None:
    model = Model(nn.Sequential(nn.Linear(2, 2)), loss=lambda m, b: m(b).mean())
    reads = Reads(model, find_layers(model, [torch.ones(1, 2)]), [INPUT])
    with reads.recording() as zeros:
        model.loss(torch.ones(1, 2))
    with pytest.raises(mp.InputError, match="E516"), reads.disturbed(zeros):
        model.loss(torch.ones(3, 2))
    assert not model.module[0]._forward_pre_hooks
