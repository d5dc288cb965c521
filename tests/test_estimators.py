"""Estimators against closed forms, and the suite over every one of them."""

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
from mpsearch.format import Format
from mpsearch.model.find import find_layers
from mpsearch.model.model import Model
from mpsearch.sensitivity.fisher import Fisher
from mpsearch.sensitivity.hessian_trace import HessianTrace
from mpsearch.testing.estimators import EstimatorSuite
from tests.conftest import DATA, many

REPETITIONS = many(100, 200)


@pytest.mark.parametrize("name", registry.names("estimators"))
class TestEveryEstimator(EstimatorSuite):
    @pytest.fixture
    def estimator(self, name: str) -> Any:
        return registry.make("estimators", name)


class TestHessianTraceByLayer(EstimatorSuite):
    @pytest.fixture
    def estimator(self) -> Any:
        return HessianTrace(probing="layer")


class TestHessianTraceByDifference(EstimatorSuite):
    @pytest.fixture
    def estimator(self) -> Any:
        return HessianTrace(product="finite_difference")


class TestEmpiricalFisher(EstimatorSuite):
    @pytest.fixture
    def estimator(self) -> Any:
        return Fisher(labels="data")


def softmax_model() -> tuple[Model, tuple[torch.Tensor, torch.Tensor], dict[str, Any]]:
    table = json.loads((DATA / "curvature_softmax.json").read_text())
    module = nn.Linear(3, 2, bias=False)
    module.weight.data = torch.tensor(table["W"])
    batch = (torch.tensor(table["X"]), torch.tensor(table["y"]))
    model = Model(
        module,
        loss=lambda m, b: nn.functional.cross_entropy(m(b[0]), b[1]),
        logits=lambda m, b: m(b[0]),
        name="softmax",
    )
    return model, batch, table


@pytest.mark.parametrize(
    "settings",
    [{"probing": "joint"}, {"probing": "layer"}, {"product": "finite_difference", "step": 0.02}],
    ids=["joint", "layer", "finite difference"],
)
def test_trace_of_a_softmax_regression(settings: dict[str, Any]) -> None:
    model, batch, table = softmax_model()
    estimator = HessianTrace(probes=400, tolerance=1e-9, **settings)
    layers = find_layers(model, [batch])
    probes = np.array(estimator.traces(model, batch, layers))[:, 0]
    error = probes.std(ddof=1) / math.sqrt(len(probes))
    assert len(probes) == 400
    assert abs(probes.mean() - table["trace"]) < 3 * error
    hessian = np.array(table["hessian"])
    variance = 2 * ((hessian**2).sum() - (np.diag(hessian) ** 2).sum())
    assert probes.var(ddof=1) == pytest.approx(variance, rel=0.3)


def test_trace_score_is_half_the_mean_curvature_times_the_error() -> None:
    model, batch, table = softmax_model()
    fmt = Format.parse("int4-channel")
    found = HessianTrace(probes=400, tolerance=1e-9).score(model, [batch], find_layers(model, [batch]), [fmt])
    from mpsearch.model.quantize import fake_quantize

    weight = model.weight("").detach()
    error = float((fake_quantize(weight, fmt) - weight).square().sum())
    expected = 0.5 * table["trace"] / 6 * error
    assert abs(found.value[0, 0] - expected) < 3 * found.spread[0, 0]
    assert found.spread[0, 0] < 0.1 * expected


def test_a_tighter_tolerance_takes_more_probes() -> None:
    model, batch, _ = softmax_model()
    layers = find_layers(model, [batch])
    few = HessianTrace(probes=64, least_probes=4, tolerance=0.5).traces(model, batch, layers)
    many = HessianTrace(probes=64, least_probes=4, tolerance=0.1).traces(model, batch, layers)
    assert 4 <= len(few) < len(many) < 64
    probes = np.array(many)[:, 0]
    assert probes.std(ddof=1) / math.sqrt(len(probes)) <= 0.1 * abs(probes.mean())


def test_layers_of_a_larger_model_get_their_own_trace() -> None:
    torch.manual_seed(0)
    module = nn.Sequential(nn.Linear(4, 6), nn.Tanh(), nn.Linear(6, 3))
    x, y = torch.randn(20, 4), torch.randint(0, 3, (20,))
    model = Model(module, loss=lambda m, b: nn.functional.cross_entropy(m(b[0]), b[1]))
    layers = find_layers(model, [(x, y)])

    def loss_of(weight: torch.Tensor, name: str) -> torch.Tensor:
        return nn.functional.cross_entropy(torch.func.functional_call(module, {name: weight}, (x,)), y)

    for probing in ("joint", "layer"):
        found = np.array(HessianTrace(probes=300, tolerance=1e-9, probing=probing).traces(model, (x, y), layers))
        for column, layer in enumerate(layers):
            weight = model.weight(layer.name).detach()
            hessian = torch.autograd.functional.hessian(lambda w, n=layer.tensor: loss_of(w, n), weight)
            exact = float(hessian.reshape(weight.numel(), -1).diagonal().sum())
            error = found[:, column].std(ddof=1) / math.sqrt(len(found))
            assert abs(found[:, column].mean() - exact) < 3 * error
            assert error < 0.25 * abs(exact)


def test_hutchinson_products_of_the_reference_table() -> None:
    table = json.loads((DATA / "trace_estimators.json").read_text())
    matrix = torch.tensor(table["A"], dtype=torch.float32)
    # Loss 1/2 w A w of one layer: its Hessian is the table's matrix.
    module = nn.Linear(8, 1, bias=False)
    model = Model(module, loss=lambda m, b: 0.5 * (m.weight @ b @ m.weight.T).sum())
    layers = find_layers(Model(nn.Linear(8, 1, bias=False)))
    probes = np.array(HessianTrace(probes=2000, tolerance=1e-9).traces(model, matrix, layers))[:, 0]
    assert probes.mean() == pytest.approx(table["trace"], abs=3 * probes.std() / math.sqrt(2000))
    assert probes.var() == pytest.approx(table["hutchinson_single_probe_variance_exact"], rel=0.15)


def test_fishers_of_a_softmax_regression() -> None:
    model, batch, table = softmax_model()
    layers = find_layers(model, [batch])
    fmt = Format.parse("int3-tensor")
    from mpsearch.model.quantize import fake_quantize

    weight = model.weight("").detach()
    squares = (fake_quantize(weight, fmt) - weight).double().square().flatten().numpy()
    empirical = Fisher(labels="data").score(model, [batch], layers, [fmt])
    assert empirical.value[0, 0] == pytest.approx(0.5 * squares @ table["empirical_fisher_diag"], rel=1e-5)
    true = Fisher(labels="model", draws=4000).score(model, [batch], layers, [fmt])
    expected = 0.5 * squares @ table["true_fisher_diag"]
    assert true.value[0, 0] == pytest.approx(expected, rel=0.04)
    assert empirical.value[0, 0] > 2 * expected
    wrong = 0.5 * squares @ table["squared_mean_gradient (WRONG as Fisher)"]
    assert abs(true.value[0, 0] - wrong) > 0.2 * wrong


def covered(scores: list[mp.SensitivityTable], truth: float) -> float:
    inside = [abs(s.value[0, 0] - truth) <= 1.96 * s.spread[0, 0] for s in scores]
    return sum(inside) / len(inside)


MIX = torch.tensor([[1.0, 0.5, 0.0, 0.3], [0.0, 0.8, 0.4, 0.0], [0.2, 0.0, 1.2, 0.5], [0.0, 0.6, 0.0, 0.7]])
FORMAT = Format.parse("int3-tensor")


def linear_model() -> tuple[Model, torch.Tensor]:
    module = nn.Linear(4, 1, bias=False)
    module.weight.data = torch.tensor([[0.9, -0.37, 0.52, 0.14]])
    model = Model(module, loss=lambda m, b: 0.5 * (m(b[0])[:, 0] - b[1]).square().mean())
    from mpsearch.model.quantize import fake_quantize

    return model, (fake_quantize(module.weight.detach(), FORMAT) - module.weight.detach()).square()[0]


def linear_batches(seed: int, count: int) -> list[Any]:
    generator = torch.Generator().manual_seed(seed)
    batches = []
    for _ in range(count):
        x = torch.randn(8, 4, generator=generator) @ MIX.T
        noise = torch.randn(8, generator=generator)
        batches.append((x, x @ torch.tensor([0.9, -0.37, 0.52, 0.14]) + noise))
    return batches


def test_errors_of_the_trace_are_honest_on_a_linear_model() -> None:
    model, squares = linear_model()
    layers = find_layers(model, linear_batches(0, 1))
    # The Hessian of the squared error is E[x x'] = MIX MIX'.
    truth = 0.5 * float(MIX.square().sum()) / 4 * float(squares.sum())
    estimator = HessianTrace(probes=4, least_probes=4)
    scores = [estimator.score(model, linear_batches(1 + r, 24), layers, [FORMAT]) for r in range(REPETITIONS)]
    assert 0.90 <= covered(scores, truth) <= 0.99
    mean = np.mean([s.value[0, 0] for s in scores])
    error = np.std([s.value[0, 0] for s in scores]) / math.sqrt(REPETITIONS)
    assert abs(mean - truth) < 3 * error


def test_errors_of_the_empirical_fisher_are_honest_on_a_linear_model() -> None:
    model, squares = linear_model()
    layers = find_layers(model, linear_batches(0, 1))
    # With noise of variance 1 the Fisher is E[x x'] as well.
    truth = 0.5 * float(((MIX @ MIX.T).diagonal() * squares).sum())
    estimator = Fisher(labels="data")
    # Squares of gradients have long tails: fewer repetitions tell less than the bounds ask.
    scores = [estimator.score(model, linear_batches(1 + r, 24), layers, [FORMAT]) for r in range(200)]
    assert 0.90 <= covered(scores, truth) <= 0.99


@pytest.mark.parametrize(
    "estimator", [HessianTrace(probes=4, least_probes=4), Fisher()], ids=["hessian_trace", "fisher"]
)
def test_errors_are_honest_on_a_logistic_model(estimator: Any) -> None:
    generator = torch.Generator().manual_seed(7)
    module = nn.Linear(4, 2, bias=False)
    module.weight.data = torch.randn(2, 4, generator=generator) * 0.5
    model = Model(module, loss=lambda m, b: nn.functional.cross_entropy(m(b[0]), b[1]), logits=lambda m, b: m(b[0]))
    population = torch.randn(64, 4, generator=generator) @ MIX.T
    labels = torch.randint(0, 2, (64,), generator=generator)
    layers = find_layers(model, [(population, labels)])
    from mpsearch.model.quantize import fake_quantize

    squares = (fake_quantize(module.weight.detach(), FORMAT) - module.weight.detach()).square().double()
    p = torch.softmax(module(population), dim=-1).detach().double()
    # Both Hessian and true Fisher have the diagonal mean p (1 - p) x_i^2 for either class.
    diagonal = ((p[:, :1] * p[:, 1:]) * population.double().square()).mean(dim=0)
    if isinstance(estimator, HessianTrace):
        truth = 0.5 * float(2 * diagonal.sum()) / 8 * float(squares.sum())
    else:
        truth = 0.5 * float((diagonal * squares).sum())
    scores = []
    for _ in range(REPETITIONS):
        rows = torch.randint(0, 64, (24, 8), generator=generator)
        scores.append(estimator.score(model, [(population[r], labels[r]) for r in rows], layers, [FORMAT]))
    assert 0.90 <= covered(scores, truth) <= 0.99


def test_a_layer_that_the_data_does_not_reach_has_no_score() -> None:
    module = nn.ModuleDict({"used": nn.Linear(4, 3), "unused": nn.Linear(4, 3)})
    model = Model(
        module,
        loss=lambda m, b: nn.functional.cross_entropy(m["used"](b[0]), b[1]),
        logits=lambda m, b: m["used"](b[0]),
    )
    batch = (torch.randn(6, 4), torch.randint(0, 3, (6,)))
    layers = find_layers(Model(module))
    for name in ("output_mse", "hessian_trace", "fisher"):
        table = registry.make("estimators", name).score(model, [batch], layers, [Format.parse("int4-channel")])
        assert table.status == (("ok",), ("not_observed",)), name


def test_what_an_estimator_cannot_take_it_refuses() -> None:
    model = mp.wrap(nn.Linear(4, 3))
    for name in ("output_mse", "hessian_trace", "fisher", "divergence"):
        assert registry.make("estimators", name).refuses(model)
        with pytest.raises(mp.InputError, match="E506"):
            mp.score(model, [torch.ones(1, 4)], ["int4-channel"], name, layers=mp.layers(model))


@pytest.mark.parametrize("count", [1, 2, 6])
def test_errors_of_the_trace_are_honest_for_few_batches_at_default_settings(count: int) -> None:
    """The target is the trace on these very batches for one, and in the population for more."""
    model, squares = linear_model()
    layers = find_layers(model, linear_batches(0, 1))
    estimator = HessianTrace()
    inside = 0
    for repetition in range(REPETITIONS):
        batches = linear_batches(1000 + repetition, count)
        table = estimator.score(model, batches, layers, [FORMAT])
        trace = float(batches[0][0].square().sum(dim=1).mean()) if count == 1 else float(MIX.square().sum())
        inside += abs(table.value[0, 0] - 0.5 * trace / 4 * float(squares.sum())) <= 1.96 * table.spread[0, 0]
    assert 0.90 <= inside / REPETITIONS <= 0.99


def test_students_factor_is_that_of_the_distribution() -> None:
    from scipy.stats import norm, t

    from mpsearch.spread import student_factor

    for freedom in (1, 2, 3, 4, 5, 7, 15, 31, 1000):
        assert student_factor(freedom) == pytest.approx(t.ppf(0.975, freedom) / norm.ppf(0.975), rel=2e-3)


def test_settings_that_make_no_sense_are_refused() -> None:
    for name, settings in (
        ("fisher", {"labels": "dat"}),
        ("fisher", {"draws": 0}),
        ("hessian_trace", {"probes": "16"}),
        ("hessian_trace", {"probing": "all"}),
        ("hessian_trace", {"probes": 4}),
    ):
        with pytest.raises(mp.InputError, match="E113"):
            registry.make("estimators", name, **settings)


def test_where_no_step_settles_the_gradient_is_differentiated(monkeypatch: pytest.MonkeyPatch) -> None:
    import mpsearch.sensitivity.hessian_trace as module

    monkeypatch.setattr(module, "_SETTLED", -1.0)
    model, batch, _ = softmax_model()
    layers = find_layers(model)
    fallen_back = HessianTrace(probes=4, least_probes=4).traces(model, batch, layers)
    twice = HessianTrace(product="double_backward", probes=5, least_probes=5).traces(model, batch, layers)
    # The first signs were spent on the search for a step.
    np.testing.assert_allclose(fallen_back, twice[1:])
