"""Every estimator on models and data that are not as they should be."""

from __future__ import annotations

from collections.abc import Callable
from functools import cache
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from torch import Tensor, nn
from torch.nn import functional

import mpsearch as mp
from mpsearch import registry
from mpsearch.errors import InputError
from mpsearch.format import parse_formats
from mpsearch.layer import Layer
from mpsearch.model.find import find_layers
from mpsearch.model.model import Model, load_model
from mpsearch.model.repeatable import check_repeatable
from mpsearch.notices import score_notices
from mpsearch.sensitivity.hessian_trace import HessianTrace
from mpsearch.tables import SensitivityTable
from tests.architectures import Built, build, estimator
from tests.tiny_models import tiny, tokens

NAMES = registry.names("estimators")

FMT = parse_formats(["int4-channel", "int8-channel"])
Forward = Callable[[Any, Tensor], Tensor]


@cache
def built(family: str) -> Built:
    return build(family)


def chain(m: Any, x: Tensor) -> Tensor:
    found: Tensor = m["c"](torch.tanh(m["b"](torch.tanh(m["a"](x)))))
    return found


def net(forward: Forward = chain, names: str = "abc", **functions: Any) -> Model:
    torch.manual_seed(0)
    module = nn.ModuleDict({name: nn.Linear(8, 8) for name in names})
    given = {
        "loss": lambda m, b: functional.cross_entropy(forward(m, b[0]), b[1]),
        "logits": lambda m, b: forward(m, b[0]),
        **functions,
    }
    return Model(module, name="net", **given)


def data(count: int = 3) -> list[Any]:
    noise = torch.Generator().manual_seed(1)
    return [(torch.randn(6, 8, generator=noise), torch.randint(0, 8, (6,), generator=noise)) for _ in range(count)]


def layers_of(model: Model) -> list[Layer]:
    """All layers, also those that no data reaches."""
    return list(find_layers(Model(model.module)))


def scored(name: str, model: Model, batches: list[Any]) -> SensitivityTable:
    how = estimator(name)
    layers = layers_of(model)
    model.calibrate(batches, layers)
    if refusal := how.refuses(model):
        raise InputError("E506", refusal)
    table: SensitivityTable = how.score(model, batches, layers, FMT)
    return table


def attempt(name: str, model: Model, batches: list[Any]) -> SensitivityTable | InputError:
    try:
        return scored(name, model, batches)
    except InputError as error:
        return error


def status_of(table: SensitivityTable) -> dict[str, set[str]]:
    return {name: set(row) for name, row in zip(table.layers, table.status, strict=True)}


#: Those that look at weights alone.
WEIGHTS_ONLY = {"weight_mse", "group_range", "weight_kl", "zd", "weight_outlier_ratio"}


@pytest.mark.parametrize("name", NAMES)
class TestEveryEstimatorOnOddData:
    def test_numbers_that_are_not_finite_spoil_cells_and_not_the_run(self, name: str) -> None:
        batches = data()
        batches[1][0][2, 3] = torch.nan
        model = net()
        table = attempt(name, model, batches)
        if isinstance(table, InputError):
            assert table.code == "E510"
            assert "'a'" in table.message
            return
        for i, row in enumerate(table.status):
            assert set(row) <= {"ok", "non_finite", "not_observed"}
            assert np.isfinite(table.value[i][[x == "ok" for x in row]]).all()
        if "non_finite" in {x for row in table.status for x in row} and estimator(name).by == "batch":
            notice = next(x for x in score_notices(table) if x.code == "W511")
            assert "in batch 1)" in notice.message

    def test_a_gradient_that_is_not_finite_spoils_its_layer_only(self, name: str) -> None:
        # The root of a square has no slope at 0: what it gives is finite and its gradient is not.
        model = net(lambda m, x: m["c"](torch.tanh(m["a"](x)) + torch.sqrt((0 * m["b"](x)).square())))
        table = attempt(name, model, data())
        if isinstance(table, InputError):
            assert table.code == "E506"
            return
        status = status_of(table)
        assert status["a"] == status["c"] == {"ok"}
        assert len(status["b"]) == 1
        if {"gradient", "loss"} <= set(getattr(estimator(name), "needs", ())):
            assert status["b"] == {"non_finite"}

    def test_a_layer_that_is_never_called_is_not_harmless(self, name: str) -> None:
        status = status_of(scored(name, net(names="abcd"), data()))
        assert status["d"] == ({"ok"} if name in WEIGHTS_ONLY else {"not_observed"})
        assert status["a"] == status["b"] == status["c"] == {"ok"}

    def test_a_layer_called_with_nothing_is_not_harmless(self, name: str) -> None:
        model = net(lambda m, x: chain(m, x) + m["d"](x[:0]).sum(), names="abcd")
        status = status_of(scored(name, model, data()))
        assert status["d"] == ({"ok"} if name in WEIGHTS_ONLY else {"not_observed"})

    def test_weights_of_zero_are_exact_in_every_format(self, name: str) -> None:
        model = net(lambda m, x: m["a"](x) + m["b"](x) + m["c"](x))
        model.module["b"].weight.data.zero_()
        table = scored(name, model, data())
        row = table.layers.index("b")
        assert table.status[row] == ("ok", "ok")
        assert table.value[row].tolist() == [0.0, 0.0]
        assert next(x.message for x in score_notices(table) if x.code == "W513").startswith("1 decisions score 0")

    def test_inputs_of_one_direction_make_no_trouble(self, name: str) -> None:
        batches = [(x[:1].expand(6, 8).clone(), y) for x, y in data()]
        assert all(found == {"ok"} for found in status_of(scored(name, net(), batches)).values())

    def test_answers_that_never_move_are_reported(self, name: str) -> None:
        table = scored(name, net(lambda m, x: 0 * chain(m, x)), data())
        assert all(found == {"ok"} for found in status_of(table).values())
        blind = not table.value.any()
        assert blind == any(x.code == "W513" and "0 everywhere" in x.message for x in score_notices(table))

    def test_a_detached_layer_gets_a_number_or_a_reason(self, name: str) -> None:
        model = net(lambda m, x: m["c"](torch.tanh(m["a"](x)) + m["b"](x).detach()))
        status = status_of(scored(name, model, data()))
        assert status["a"] == status["c"] == {"ok"}
        assert status["b"] in ({"ok"}, {"not_observed"})

    def test_a_loss_without_labels_is_named(self, name: str) -> None:
        model = net(loss=lambda m, b: None)
        table = attempt(name, model, data())
        if isinstance(table, InputError):
            assert table.code == "E514"
            assert "labels" in table.because + table.advice
            return
        assert all(found == {"ok"} for found in status_of(table).values())


def test_a_loss_of_each_sample_is_not_one_number() -> None:
    model = net(loss=lambda m, b: functional.cross_entropy(chain(m, b[0]), b[1], reduction="none"))
    with pytest.raises(InputError, match=r"shape \(6,\), not one number"):
        scored("hessian_trace", model, data())


def test_weights_that_are_not_finite_are_refused_at_once() -> None:
    module = nn.Linear(3, 2)
    module.weight.data[1, 2] = torch.inf
    with pytest.raises(InputError, match="1 of 6 weights are not finite") as found:
        mp.wrap(module)
    assert found.value.code == "E412"


@pytest.mark.parametrize("method", ["hutchinson", "xtrace", "hutch++"])
@pytest.mark.parametrize("product", ["finite_difference", "double_backward"])
def test_curvature_that_is_not_finite_bars_its_layer_only(method: Any, product: Any) -> None:
    model = net(lambda m, x: m["c"](torch.tanh(m["a"](x)) + torch.sqrt((0 * m["b"](x)).square())))
    settings = {} if method == "hutchinson" else {"probing": "layer", "probes": 6, "least_probes": 2}
    table = HessianTrace(product=product, method=method, **settings).score(model, data(2), layers_of(model), FMT)
    assert status_of(table) == {"a": {"ok"}, "b": {"non_finite"}, "c": {"ok"}}
    assert table.source["not_finite"] == {"b": [0, 1]}


class TestModelsThatDrawAtRandom:
    def test_the_first_module_that_differs_is_named(self) -> None:
        class Noisy(nn.Module):
            def forward(self, x: Tensor) -> Tensor:
                return x + torch.randn_like(x)

        module = nn.Sequential(nn.Linear(8, 8), nn.Sequential(Noisy(), nn.Linear(8, 8)), nn.Linear(8, 8))
        model = Model(module, logits=lambda m, b: m(b[0]), name="noisy")
        with pytest.raises(InputError, match=r"two answers to one batch; '1.0' \(Noisy\) is the first") as found:
            mp.score(model, data(), ["int4-channel"], "divergence")
        assert found.value.code == "E513"
        assert all(not part._forward_hooks and not part._forward_pre_hooks for part in module.modules())

    def test_a_dropout_that_is_left_on_is_named(self) -> None:
        model = net(lambda m, x: m["c"](functional.dropout(m["a"](x), 0.5, training=True)))
        with pytest.raises(InputError, match=r"'c' \(Linear\) is the first to be given something else"):
            check_repeatable(model, data()[0])

    def test_a_dropout_of_a_transformer_that_is_left_on_is_named(self) -> None:
        model = tiny(attention_dropout=0.5)
        model.module.model.layers[1].self_attn.train()
        with pytest.raises(InputError, match=r"'model.layers.1.self_attn' \(LlamaAttention\) is the first"):
            check_repeatable(model, tokens())

    def test_one_that_answers_alike_is_taken(self) -> None:
        for family in ("Llama", "Mixtral", "own loss"):
            check_repeatable(built(family).model, built(family).batches[0])


def test_a_checkpoint_that_overflows_in_half_precision_is_computed_in_single(tmp_path: Path) -> None:
    made = tiny(layers=1)
    for name in ("gate_proj", "up_proj"):
        getattr(made.module.model.layers[0].mlp, name).weight.data.mul_(400)
    half = made.module.half()
    with torch.no_grad():
        assert not torch.isfinite(half(**tokens(1, 8)).logits).all()
    half.save_pretrained(tmp_path / "half")
    model = load_model(tmp_path / "half")
    assert {model.stored[key] for key, _ in model.module.named_parameters()} == {"float16"}
    batches = [tokens(2, 12)]
    layers = find_layers(model, batches)
    for name in ("divergence", "output_mse", "fisher", "isolated_loss"):
        table = estimator(name).score(model, batches, layers, FMT)
        assert all(set(row) == {"ok"} for row in table.status), name


def test_attention_without_a_second_derivative_is_replaced_while_curvature_needs_one() -> None:
    case = built("Llama")
    assert case.model.module.config._attn_implementation == "sdpa"
    table = HessianTrace(product="double_backward", probes=4, least_probes=4).score(
        case.model, case.batches, case.layers, FMT
    )
    assert np.isfinite(table.value).all()


def test_negative_traces_within_their_noise_are_kept_and_reported() -> None:
    # A loss that curves down along the first layer as much as up along the second.
    model = net(loss=lambda m, b: m["b"].weight.square().mean() - m["a"].weight.square().mean(), names="ab")
    table = HessianTrace().score(model, data(), layers_of(model), FMT)
    assert (table.value[0] < 0).all()
    assert (table.value[1] > 0).all()
    assert "W516" in [x.code for x in score_notices(table)]


def search_net(model: Model, **settings: Any) -> Any:
    return mp.search(
        model, data(8), "weights <= 11 bits", formats=["int4-channel", "int8-channel"], points=0, **settings
    )


def test_a_study_finds_a_plan_beside_a_layer_without_a_finite_gradient() -> None:
    model = net(lambda m, x: m["c"](torch.tanh(m["a"](x)) + torch.sqrt((0 * m["b"](x + 0)).square())))
    with pytest.raises(InputError, match="no usable score in any format, first 'b'"):
        search_net(model, estimator="hessian_trace")
    found = search_net(model, estimator="hessian_trace", pins={"b": "int8-channel"})
    assert str(found.plan.formats["b"]) == "int8-channel"
    notice = next(x for x in found.study.notices if x.code == "W511")
    assert "b at int4-channel, b at int8-channel" in notice.message
    assert "('b' in batch 0, 1, 2 and 3 more)" in notice.message


def test_a_study_with_a_blind_estimator_says_so_and_finds_a_plan() -> None:
    model = net(loss=lambda m, b: (0 * chain(m, b[0])).sum())
    found = search_net(model, estimator="hessian_trace")
    assert "estimator 'hessian_trace' scores 0 everywhere" in str(found.study.notices)
    assert found.plan.bits <= 11
