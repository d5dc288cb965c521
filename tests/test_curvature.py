"""Estimators of the curvature and of the slope along the rounding error, against closed forms and full Hessians."""

from __future__ import annotations

import json
from typing import Any

import numpy as np
import pytest
import torch
from torch import Tensor, nn
from torch.nn import functional

import mpsearch as mp
from mpsearch import registry
from mpsearch.format import Format
from mpsearch.layer import Layer, decisions
from mpsearch.model.apply import swapped
from mpsearch.model.find import find_layers
from mpsearch.model.model import Model
from mpsearch.model.reference import divergence
from mpsearch.sensitivity.assemble import Deltas
from mpsearch.sensitivity.gauss_newton import GaussNewton
from mpsearch.sensitivity.grad_loss_change import GradLossChange
from mpsearch.sensitivity.grad_x_weight import GradTimesWeight
from mpsearch.sensitivity.hessian_eigenvalue import HessianEigenvalue, lanczos
from mpsearch.sensitivity.hessian_trace import HessianTrace
from mpsearch.sensitivity.hessian_vector import HessianVector
from mpsearch.sensitivity.low_rank_trace import exact_trace, hutch_plus_plus, xtrace
from mpsearch.testing.estimators import EstimatorSuite
from tests.conftest import DATA
from tests.tiny_models import tiny, tiny_experts, tokens

FMT = Format.parse("int4-channel")
PRODUCTS = ["double_backward", "finite_difference"]
MINE = ["hessian_vector", "hessian_eigenvalue", "gauss_newton", "grad_loss_change", "grad_x_weight"]
VARIANTS = [
    HessianVector(product="finite_difference"),
    HessianEigenvalue(bound=True, product="finite_difference"),
    GaussNewton(product="finite_difference"),
    GradLossChange(first_order=False, diagonal=True),
    GradTimesWeight(at="quantized"),
    HessianTrace(probing="layer", method="xtrace", probes=4, least_probes=2),
    HessianTrace(probing="layer", method="hutch++", probes=6, least_probes=2, product="double_backward"),
]


@pytest.mark.parametrize("variant", VARIANTS, ids=str)
class TestEveryVariant(EstimatorSuite):
    @pytest.fixture
    def estimator(self, variant: Any) -> Any:
        return variant


def table_of(name: str) -> dict[str, Any]:
    table: dict[str, Any] = json.loads((DATA / f"{name}.json").read_text())
    return table


def give_error(model: Model, layer: Layer, delta: Tensor, fmt: Format = FMT) -> None:
    """Let a format round a layer by a given error."""
    Deltas.of(model)._kept[layer.name, fmt.weight] = delta


def softmax_model() -> tuple[Model, Any, list[Layer], dict[str, Any]]:
    """The table's regression, whose layer is rounded as the table rounds it."""
    table = table_of("curvature_softmax")
    module = nn.Linear(3, 2, bias=False)
    module.weight.data = torch.tensor(table["W"])
    model = Model(module, loss=lambda m, b: functional.cross_entropy(m(b[0]), b[1]), logits=lambda m, b: m(b[0]))
    batch = (torch.tensor(table["X"]), torch.tensor(table["y"]))
    layers = list(find_layers(model, [batch]))
    give_error(model, layers[0], torch.tensor(table["perturbation"]["Q"]) - torch.tensor(table["W"]))
    return model, batch, layers, table


@pytest.mark.parametrize("product", PRODUCTS)
def test_the_loss_change_of_the_table_is_the_sum_of_both_terms(product: Any) -> None:
    model, batch, layers, table = softmax_model()
    known = table["perturbation"]
    first, second = HessianVector(product=product).terms(model, [batch], layers, [FMT])
    assert first.value[0, 0] == pytest.approx(known["first_order_g_dot_d"], rel=1e-5)
    assert second.value[0, 0] == pytest.approx(known["quadratic_half_dHd"], rel=1e-3)
    both = HessianVector(first_order=True, product=product).score(model, [batch], layers, [FMT]).value[0, 0]
    assert both == pytest.approx(first.value[0, 0] + second.value[0, 0], rel=1e-12)
    assert both == pytest.approx(known["actual_loss_change"], rel=3e-4)
    assert abs(first.value[0, 0] - known["actual_loss_change"]) > 50 * abs(both - known["actual_loss_change"])
    alone = HessianVector(product=product).score(model, [batch], layers, [FMT]).value[0, 0]
    assert alone == second.value[0, 0]


@pytest.mark.parametrize("product", PRODUCTS)
def test_gauss_newton_of_the_table_is_its_hessian_which_is_the_full_fisher(product: Any) -> None:
    model, batch, layers, table = softmax_model()
    found = GaussNewton(product=product).score(model, [batch], layers, [FMT])
    known = table["perturbation"]
    assert found.value[0, 0] == pytest.approx(known["quadratic_half_dHd"], rel=1e-4)
    assert found.value[0, 0] < 0.2 * 0.5 * known["diag_fisher_sum_F_d2"]  # what the diagonal alone gives
    # Its error bar is that of four samples: x'd (logit difference) squared times p (1 - p) / 2 each.
    x, w = torch.tensor(table["X"]).double(), torch.tensor(table["W"]).double()
    d = torch.tensor(known["Q"]).double() - w
    p = torch.sigmoid(x @ (w[0] - w[1]))
    each = (0.5 * p * (1 - p) * (x @ (d[0] - d[1])).square()).numpy()
    from mpsearch.spread import mean_and_error

    assert found.spread[0, 0] == pytest.approx(mean_and_error(each.tolist())[1], rel=1e-3)
    assert found.samples == 4


@pytest.mark.parametrize("product", PRODUCTS)
def test_eigenvalue_of_the_table(product: Any) -> None:
    model, batch, layers, table = softmax_model()
    estimator = HessianEigenvalue(product=product, tolerance=1e-6, step=0.003)
    assert estimator.eigenvalues(model, batch, layers) == [pytest.approx(table["top_eigenvalue"], rel=1e-3)]
    bound = HessianEigenvalue(bound=True, product=product, tolerance=1e-6, step=0.003)
    known = 0.5 * table["perturbation"]["hawq_v1_lambda*||d||^2"]
    assert bound.score(model, [batch], layers, [FMT]).value[0, 0] == pytest.approx(known, rel=1e-3)
    assert estimator.score(model, [batch], layers, [FMT]).value[0, 0] == pytest.approx(known / 6, rel=1e-3)
    quadratic = HessianVector().score(model, [batch], layers, [FMT]).value[0, 0]
    assert quadratic < known


def power_iteration(matrix: Tensor, start: Tensor, tolerance: float = 1e-2, most: int = 100) -> tuple[float, int]:
    """PyHessian's, without its added 1e-6."""
    vector, value = start / start.norm(), np.inf
    for count in range(1, most + 1):
        image = matrix @ vector
        before, value = value, float(vector @ image)
        if abs(value - before) <= tolerance * abs(before) < np.inf:
            return value, count
        vector = image / image.norm()
    return value, most


def test_the_top_eigenvalue_of_the_reference_table_takes_fewer_products_than_power_iteration() -> None:
    table = table_of("trace_estimators")
    matrix = torch.tensor(table["A"], dtype=torch.float64)
    start = torch.tensor(table["probes_columns"], dtype=torch.float64)[:, 0]
    known = table["power_iteration"]
    value, count = lanczos(lambda v: matrix @ v, start, tolerance=0.03)
    assert count < known["iterations"]
    assert value == pytest.approx(known["top_eigenvalue_exact"], rel=1e-3)
    exact, more = lanczos(lambda v: matrix @ v, start, tolerance=1e-12)
    assert exact == pytest.approx(known["top_eigenvalue_exact"], rel=1e-12)
    assert more <= 8
    shifted = matrix - 3 * torch.eye(8, dtype=torch.float64)
    assert lanczos(lambda v: shifted @ v, start, tolerance=1e-10)[0] == pytest.approx(-3.15405857, abs=1e-8)
    assert lanczos(lambda v: 0 * v, start) == (0.0, 1)
    assert lanczos(lambda v: torch.nan * v, start) == (np.inf, 1)


@pytest.mark.parametrize("seed", range(6))
def test_opposite_eigenvalues_are_told_apart(seed: int) -> None:
    spectrum = torch.tensor([1.0, -1.0, 0.1])
    start = torch.randn(3, generator=torch.Generator().manual_seed(seed))
    assert lanczos(lambda v: spectrum * v, start) == (pytest.approx(1.0, abs=1e-5), 3)
    # Of two that are not quite as large the larger one, whatever its sign.
    uneven = torch.tensor([1.0, -1.05, 0.1])
    assert lanczos(lambda v: uneven * v, start)[0] == pytest.approx(-1.05, abs=1e-5)


def test_top_eigenvalues_of_random_matrices() -> None:
    generator = torch.Generator().manual_seed(5)
    products, powers, wrong = [], [], 0
    for shape in ("decay", "semicircle", "outlier"):
        for _ in range(20):
            basis = torch.linalg.qr(torch.randn(300, 300, generator=generator, dtype=torch.float64))[0]
            noise = torch.randn(300, generator=generator, dtype=torch.float64)
            values = {
                "decay": noise.sign() * 0.8 ** torch.arange(300, dtype=torch.float64),
                "semicircle": 2 * torch.sin(noise),
                "outlier": torch.cat([torch.tensor([5.0], dtype=torch.float64), 0.2 * noise[1:]]),
            }[shape]
            matrix = basis @ torch.diag(values) @ basis.T
            start = torch.randn(300, generator=generator, dtype=torch.float64)
            top = float(values[values.abs().argmax()])
            found, count = lanczos(lambda v, matrix=matrix: matrix @ v, start)
            power, more = power_iteration(matrix, start)
            # A semicircle has many eigenvalues within the tolerance of its ends, of both signs.
            assert abs(found) == pytest.approx(abs(top), rel=0.03), shape
            wrong += abs(abs(power) - abs(top)) > 0.03 * abs(top)
            products.append(count)
            powers.append(more)
    assert np.mean(products) < 0.9 * np.mean(powers)
    assert max(products) <= 20
    assert wrong > 5


def test_low_rank_traces_of_the_reference_table() -> None:
    table = table_of("trace_estimators")
    matrix = torch.tensor(table["A"], dtype=torch.float64)
    probes = torch.tensor(table["probes_columns"], dtype=torch.float64)
    hutch = hutch_plus_plus(lambda v: matrix @ v, probes[:, :2], probes[:, 2:])
    assert float(hutch.mean()) == pytest.approx(table["hutchpp_6_matvecs"]["value"], abs=1e-9)
    known = table["xtrace_6_matvecs"]
    found = xtrace(lambda v: matrix @ v, probes[:, :3])
    assert found.tolist() == pytest.approx(known["per_probe"], abs=1e-9)
    assert float(found.mean()) == pytest.approx(known["value"], abs=1e-9)
    assert float(found.std()) / 3**0.5 == pytest.approx(known["err_est"], abs=1e-9)
    low = torch.outer(matrix[:, 0], matrix[:, 0]) + torch.outer(matrix[:, 1], matrix[:, 1])
    assert xtrace(lambda v: low @ v, probes[:, :3]).tolist() == pytest.approx([4.616029694898] * 3, abs=1e-9)
    assert exact_trace(lambda v: matrix @ v, probes[:, 0]) == pytest.approx(table["trace"], abs=1e-12)


def naive_xtrace(matrix: Tensor, probes: Tensor) -> list[float]:
    """Leave each probe out by a decomposition of its own."""
    estimates = []
    for i in range(probes.shape[1]):
        others = [j for j in range(probes.shape[1]) if j != i]
        u, sizes, _ = torch.linalg.svd(matrix @ probes[:, others], full_matrices=False)
        q = u[:, sizes > 1e-10 * sizes.max()]
        rest = probes[:, i] - q @ (q.T @ probes[:, i])
        estimates.append(float((q.T @ matrix @ q).trace() + rest @ matrix @ rest))
    return estimates


@pytest.mark.parametrize("rank", [1, 2, 5, 20])
def test_xtrace_is_the_one_that_leaves_each_probe_out_by_itself(rank: int) -> None:
    generator = torch.Generator().manual_seed(rank)
    factor = torch.randn(20, rank, generator=generator, dtype=torch.float64)
    matrix = factor @ torch.diag(torch.linspace(-1, 3, rank, dtype=torch.float64)) @ factor.T
    probes = torch.randint(0, 2, (20, 5), generator=generator).double() * 2 - 1
    found = xtrace(lambda v: matrix @ v, probes)
    assert found.tolist() == pytest.approx(naive_xtrace(matrix, probes), abs=1e-9)
    if rank < 5:  # what the other probes' range holds whole is found exactly
        assert found.tolist() == pytest.approx([float(matrix.trace())] * 5, abs=1e-8)
    # Twice the same probe makes the triangular factor singular.
    twice = torch.cat([probes, probes[:, :1]], dim=1)
    assert xtrace(lambda v: matrix @ v, twice).tolist() == pytest.approx(naive_xtrace(matrix, twice), abs=1e-9)


def test_low_rank_traces_have_no_bias_and_gain_where_the_curvature_lies_in_few_directions() -> None:
    generator = torch.Generator().manual_seed(3)
    basis = torch.linalg.qr(torch.randn(24, 24, generator=generator, dtype=torch.float64))[0]
    matrix = basis @ torch.diag(0.5 ** torch.arange(24, dtype=torch.float64)) @ basis.T
    trace = float(matrix.trace())

    def signs(count: int) -> Tensor:
        return torch.randint(0, 2, (24, count), generator=generator).double() * 2 - 1

    def product(v: Tensor) -> Tensor:
        return matrix @ v

    ways = {
        "hutchinson": lambda: float(torch.stack([v @ product(v) for v in signs(12).T]).mean()),
        "hutch++": lambda: float(hutch_plus_plus(product, signs(4), signs(4)).mean()),
        "xtrace": lambda: float(xtrace(product, signs(6)).mean()),
    }
    spread = {}
    for name, way in ways.items():
        found = np.array([way() for _ in range(300)])
        spread[name] = found.std()
        assert abs(found.mean() - trace) < 4 * found.std() / 300**0.5, name
    assert spread["hutch++"] < 0.4 * spread["hutchinson"]
    assert spread["xtrace"] < 0.2 * spread["hutchinson"]


def test_low_rank_traces_of_nothing_and_of_what_is_not_finite() -> None:
    signs = torch.tensor([[1.0, 1, 1], [1, -1, 1], [1, 1, -1], [-1, 1, 1]])
    assert xtrace(lambda v: 0 * v, signs).tolist() == [0.0] * 3
    assert hutch_plus_plus(lambda v: 0 * v, signs[:, :2], signs).tolist() == [0.0] * 3
    assert bool(xtrace(lambda v: v / 0, signs).isinf().all())
    assert bool(hutch_plus_plus(lambda v: v * torch.nan, signs, signs).isinf().all())


def mlp() -> tuple[Model, Any, list[Layer]]:
    """Two siblings that read the same input, tied, and a head."""

    class Siblings(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.a, self.b, self.head = nn.Linear(4, 5), nn.Linear(4, 5), nn.Linear(5, 3)

        def forward(self, x: Tensor) -> Tensor:
            return self.head(torch.tanh(self.a(x)) * torch.sigmoid(self.b(x)))

    torch.manual_seed(2)
    module = Siblings()
    with torch.no_grad():
        for parameter in module.parameters():
            parameter.mul_(2)
    batch = (torch.randn(12, 4), torch.randint(0, 3, (12,)))
    model = Model(module, loss=lambda m, b: functional.cross_entropy(m(b[0]), b[1]), logits=lambda m, b: m(b[0]))
    return model, batch, list(find_layers(model, [batch]))


def full_hessian(model: Model, batch: Any, layers: list[Layer]) -> tuple[Tensor, Tensor]:
    """Gradient and Hessian over the weights of some layers, in float64."""
    module = model.module
    parameters = {name: value.detach().double() for name, value in module.named_parameters()}
    start = torch.cat([parameters[x.tensor].flatten() for x in layers])

    def loss(flat: Tensor) -> Tensor:
        parts = flat.split([x.weights for x in layers])
        values = parameters | {x.tensor: part.reshape(x.shape) for x, part in zip(layers, parts, strict=True)}
        logits: Tensor = torch.func.functional_call(module, values, (batch[0].double(),))
        return functional.cross_entropy(logits, batch[1])

    start.requires_grad_(True)
    (gradient,) = torch.autograd.grad(loss(start), [start])
    return gradient, torch.autograd.functional.hessian(loss, start.detach())


@pytest.mark.parametrize("product", PRODUCTS)
def test_terms_and_eigenvalues_are_those_of_the_full_hessian(product: Any) -> None:
    model, batch, layers = mlp()
    rows = decisions(layers)
    assert [len(row.layers) for row in rows] == [2, 1]
    first, second = HessianVector(product=product).terms(model, [batch], layers, [FMT])
    for i, row in enumerate(rows):
        d = torch.cat([Deltas.of(model)(x, FMT).double().flatten() for x in row.layers])
        g, hessian = full_hessian(model, batch, list(row.layers))
        assert first.value[i, 0] == pytest.approx(float(g @ d), rel=1e-4)
        assert second.value[i, 0] == pytest.approx(float(0.5 * d @ hessian @ d), rel=5e-3)
        if len(row.layers) == 2:  # tied layers move together: their cross terms count
            half = len(d) // 2
            cross = float(d[:half] @ hessian[:half, half:] @ d[half:])
            assert abs(cross) > 0.05 * abs(second.value[i, 0])
    values = HessianEigenvalue(product=product, tolerance=1e-7, max_iterations=500).eigenvalues(model, batch, layers)
    for layer, value in zip(layers, values, strict=True):
        spectrum = torch.linalg.eigvalsh(full_hessian(model, batch, [layer])[1])
        assert value == pytest.approx(float(spectrum[spectrum.abs().argmax()]), rel=5e-3)


@pytest.mark.parametrize(("method", "probes"), [("xtrace", 12), ("hutch++", 12)])
@pytest.mark.parametrize("product", PRODUCTS)
def test_low_rank_traces_of_a_model(method: Any, probes: int, product: Any) -> None:
    model, batch, layers = mlp()
    exact = [float(full_hessian(model, batch, [layer])[1].trace()) for layer in layers]
    few = HessianTrace(probing="layer", method=method, probes=probes, product=product)
    found = np.array(few.traces(model, batch, layers))
    assert found.shape == (probes // (2 if method == "xtrace" else 3), 3)
    for column, truth in zip(found.T, exact, strict=True):
        assert abs(column.mean() - truth) < 5 * column.std(ddof=1) / len(column) ** 0.5 + 1e-3 * abs(truth)
        assert abs(column.mean() - truth) < 0.3 * abs(truth)
    # From as many products as weights on the trace is exact, of every layer.
    all_of_them = np.array(
        HessianTrace(probing="layer", method=method, probes=24, product=product).traces(model, batch, layers)
    )
    assert np.ptp(all_of_them, axis=0).tolist() == [0.0] * 3
    assert all_of_them[0].tolist() == pytest.approx(exact, rel=5e-3)


def test_gauss_newton_becomes_the_divergence_for_small_errors() -> None:
    model = tiny()
    batch = tokens(2, 12)
    layers = list(find_layers(model, [batch]))
    with torch.no_grad():
        log_p = torch.log_softmax(model.logits(batch), dim=-1)
    whole = {layer: Deltas.of(model)(layer, FMT) for layer in layers}
    off = {}
    for part in (1.0, 0.03):
        for layer in layers:
            give_error(model, layer, part * whole[layer])
        table = GaussNewton().score(model, [batch], layers, [FMT])
        ratios = []
        for i, row in enumerate(decisions(layers)):
            kl = 0.0
            for sign in (part, -part):  # the mean over both signs leaves the third order out
                moved = {x: model.weight(x.name).detach() + sign * whole[x] for x in row.layers}
                with torch.no_grad(), swapped(model, moved):
                    kl += 0.5 * float(divergence(log_p, model.logits(batch)).kl.mean())
            ratios.append(abs(table.value[i, 0] / kl - 1))
        off[part] = max(ratios)
    assert off[0.03] < 0.01
    assert off[1.0] > 3 * off[0.03]


@pytest.mark.parametrize("name", ["gauss_newton", "hessian_vector"])
def test_both_ways_agree_through_attention_and_experts(name: str) -> None:
    for model in (tiny(layers=1, tie_word_embeddings=True), tiny_experts("Mixtral")):
        model.module.config._experts_implementation = "eager"
        scores = [
            mp.score(model, [tokens(2, 10)], ["int8-g16"], name, product=product).value[:, 0] for product in PRODUCTS
        ]
        assert scores[0] == pytest.approx(scores[1], rel=0.05, abs=0.01 * float(np.abs(scores[0]).max()))


def given_gradients() -> tuple[Model, list[Layer], Tensor, Tensor]:
    """A model whose samples are their own gradients, and the table's errors."""
    table = table_of("misc_formula_checks")["mixllm"]
    samples, delta = torch.tensor(table["gradients_per_sample"]), torch.tensor(table["delta"])
    model = Model(nn.Linear(3, 2, bias=False), loss=lambda m, b: (m.weight * b).sum(dim=(1, 2)).mean())
    layers = list(find_layers(Model(nn.Linear(3, 2, bias=False))))
    give_error(model, layers[0], delta)
    return model, layers, samples, delta


@pytest.mark.parametrize(("diagonal", "name"), [(False, "score"), (True, "score_diagonal_variant")])
def test_loss_change_of_rows_of_the_reference_table(diagonal: bool, name: str) -> None:
    model, layers, samples, delta = given_gradients()
    known = table_of("misc_formula_checks")["mixllm"][name]
    estimator = GradLossChange(diagonal=diagonal)
    rows = sum(estimator.rows(layers[0], g, delta) for g in samples)
    assert rows.tolist() == pytest.approx(known, rel=1e-6)
    # The reference adds samples up; here they are averaged.
    table = estimator.score(model, [samples], layers, [FMT])
    assert table.value[0, 0] == pytest.approx(sum(known) / 2, rel=1e-6)
    assert table.samples == 2
    second = GradLossChange(diagonal=diagonal, first_order=False).score(model, [samples], layers, [FMT])
    along = samples * delta if diagonal else (samples * delta).sum(dim=2)
    assert second.value[0, 0] == pytest.approx(0.25 * float(along.square().sum()), rel=1e-5)


def test_rows_are_output_channels_whatever_the_layout() -> None:
    torch.manual_seed(0)
    gradient, delta = torch.randn(4, 6), torch.randn(4, 6)
    straight = GradLossChange().rows(Layer("x", "linear", (4, 6)), gradient, delta)
    turned = GradLossChange().rows(Layer("x", "linear", (6, 4), out_axis=1), gradient.T, delta.T)
    assert turned.tolist() == pytest.approx(straight.tolist(), rel=1e-12)
    stack = torch.stack([gradient, 2 * gradient]), torch.stack([delta, delta])
    experts = GradLossChange().rows(Layer("x", "expert", (2, 4, 6), out_axis=1), *stack)
    assert experts.shape == (8,)
    assert experts[:4].tolist() == pytest.approx(straight.tolist(), rel=1e-12)


def test_gradient_times_error_counts_every_sign_as_harm() -> None:
    model, layers, samples, delta = given_gradients()
    found = GradTimesWeight().score(model, [samples], layers, [FMT])
    assert found.value[0, 0] == pytest.approx(float((samples * delta).abs().sum() / 2), rel=1e-6)
    assert found.value[0, 0] > float((samples * delta).sum(dim=(1, 2)).abs().mean())


def test_gradient_times_error_at_the_rounded_weights() -> None:
    module = nn.Sequential(nn.Linear(1, 1, bias=False), nn.Linear(1, 1, bias=False))
    module[0].weight.data.fill_(2.0)
    module[1].weight.data.fill_(3.0)
    model = Model(module, loss=lambda m, x: m(x).mean())
    layers = list(find_layers(model, [torch.ones(1, 1)]))
    for layer, size in zip(layers, (0.5, -1.0), strict=True):
        give_error(model, layer, torch.full((1, 1), size))
    original = GradTimesWeight().score(model, [torch.ones(1, 1)], layers, [FMT])
    assert original.value[:, 0].tolist() == [3.0 * 0.5, 2.0 * 1.0]
    rounded = GradTimesWeight(at="quantized").score(model, [torch.ones(1, 1)], layers, [FMT])
    assert rounded.value[:, 0].tolist() == [2.0 * 0.5, 2.5 * 1.0]
    assert module[0].weight.item() == 2.0


def odd_model() -> tuple[Model, Any, list[Layer]]:
    """Layers that are all zero, behind a dead unit, called with nothing and never called; and one that is fine."""
    parts = {name: nn.Linear(4, 4) for name in ("fine", "zero", "dead", "empty", "unused")}
    module = nn.ModuleDict(parts)
    torch.manual_seed(5)
    module["fine"].weight.data.normal_()
    module["zero"].weight.data.zero_()

    def logits(m: Any, batch: Any) -> Tensor:
        x = batch[0]
        nobody = m["empty"](x[:0]).sum()
        return m["fine"](x) + m["zero"](x) + torch.relu(m["dead"](x) - 1e4) + nobody

    model = Model(module, loss=lambda m, b: functional.cross_entropy(logits(m, b), b[1]), logits=logits)
    return model, (torch.randn(6, 4), torch.randint(0, 4, (6,))), list(find_layers(Model(module)))


@pytest.mark.parametrize("name", [*MINE, *VARIANTS], ids=str)
def test_odd_layers_get_a_number_or_a_reason(name: Any) -> None:
    model, batch, layers = odd_model()
    estimator = registry.make("estimators", name) if isinstance(name, str) else name
    table = estimator.score(model, [batch, batch], layers, [FMT])
    status = {layer: row[0] for layer, row in zip(table.layers, table.status, strict=True)}
    assert status == {"fine": "ok", "zero": "ok", "dead": "ok", "empty": "not_observed", "unused": "not_observed"}
    values = dict(zip(table.layers, table.value[:, 0].tolist(), strict=True))
    assert values["fine"] != 0.0
    assert values["zero"] == values["dead"] == 0.0
    assert all(not module._forward_hooks for module in model.module.modules())


@pytest.mark.parametrize("name", [*MINE, *VARIANTS], ids=str)
def test_what_a_format_cannot_hold_is_not_finite_and_spoils_nothing_else(name: Any) -> None:
    model, batch, layers = mlp()
    give_error(model, layers[2], torch.full(layers[2].shape, torch.nan))
    estimator = registry.make("estimators", name) if isinstance(name, str) else name
    table = estimator.score(model, [batch], layers, [FMT, Format.parse("int8-channel")])
    assert table.status == (("ok", "ok"), ("non_finite", "ok"))


def test_a_sample_that_misses_an_expert_counts_as_no_change() -> None:
    module = nn.ModuleDict({"a": nn.Linear(2, 2, bias=False), "b": nn.Linear(2, 2, bias=False)})

    def loss(m: Any, x: Tensor) -> Tensor:
        return torch.stack([m["a" if row[0] > 0 else "b"](row).sum() for row in x]).mean()

    model = Model(module, loss=loss)
    layers = list(find_layers(Model(module)))
    for layer in layers:
        give_error(model, layer, torch.full((2, 2), 0.1))
    x = torch.tensor([[1.0, 1.0], [1.0, 1.0], [1.0, 1.0], [-1.0, 1.0]])
    table = GradTimesWeight().score(model, [x], layers, [FMT])
    assert table.value[:, 0].tolist() == pytest.approx([0.3, 0.1])
    assert GradTimesWeight().score(model, [x[:3]], layers, [FMT]).status == (("ok",), ("not_observed",))
    assert GradLossChange().score(model, [x[:3]], layers, [FMT]).status == (("ok",), ("not_observed",))


def test_a_loss_without_curvature_has_none() -> None:
    model, layers, samples, delta = given_gradients()
    first, second = HessianVector().terms(model, [samples], layers, [FMT])
    assert first.value[0, 0] == pytest.approx(float((samples.mean(dim=0) * delta).sum()), rel=1e-5)
    assert second.value[0, 0] == 0.0
    assert HessianEigenvalue().score(model, [samples], layers, [FMT]).value[0, 0] == 0.0


@pytest.mark.parametrize(
    ("name", "settings"),
    [
        ("hessian_vector", {"product": "exact"}),
        ("hessian_vector", {"step": 0.0}),
        ("gauss_newton", {"product": "jvp"}),
        ("gauss_newton", {"step": "1"}),
        ("hessian_eigenvalue", {"max_iterations": 1}),
        ("hessian_eigenvalue", {"tolerance": 0.0}),
        ("hessian_eigenvalue", {"product": ""}),
        ("grad_x_weight", {"at": "rounded"}),
        ("grad_loss_change", {"first_order": "no"}),
        ("hessian_vector", {"first_order": 1}),
        ("hessian_trace", {"method": "xtrace"}),
        ("hessian_trace", {"method": "xtrace", "probing": "layer", "probes": 9}),
        ("hessian_trace", {"method": "hutch++", "probing": "layer"}),
        ("hessian_trace", {"method": "diagonal", "probing": "layer"}),
    ],
)
def test_settings_that_make_no_sense_are_refused(name: str, settings: dict[str, Any]) -> None:
    with pytest.raises(mp.InputError, match="E113"):
        registry.make("estimators", name, **settings)


@pytest.mark.parametrize("name", MINE)
def test_a_model_without_what_is_needed_is_refused(name: str) -> None:
    assert registry.make("estimators", name).refuses(mp.wrap(nn.Linear(4, 3)))
    other = {"logits" if name != "gauss_newton" else "loss": lambda m, b: m(b)}
    assert registry.make("estimators", name).refuses(mp.wrap(nn.Linear(4, 3), **other))
