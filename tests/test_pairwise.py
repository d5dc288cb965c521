"""Interactions against closed forms, whole Hessians and the published example of an integer quadratic programme."""

from __future__ import annotations

import itertools
import json
import math
from typing import Any

import numpy as np
import pytest
import torch
from torch import nn

import mpsearch as mp
from mpsearch.format import Format, parse_formats
from mpsearch.layer import Layers
from mpsearch.model.find import find_layers
from mpsearch.model.model import Model
from mpsearch.model.quantize import fake_quantize
from mpsearch.pairs import PairTable
from mpsearch.sensitivity import pairwise
from mpsearch.sensitivity.pairwise import Pairwise
from mpsearch.testing.estimators import same, small_classifier
from tests.conftest import DATA
from tests.tiny_models import tiny, tokens

FORMATS = ("int2-channel", "int4-channel", "int8-channel")


class Sum(nn.Module):
    """Two linear maps of two inputs, added up: what one adds does not depend on the other's weights."""

    def __init__(self, classes: int, seed: int = 0) -> None:
        super().__init__()
        noise = torch.Generator().manual_seed(seed)
        self.a, self.b = nn.Linear(3, classes, bias=False), nn.Linear(4, classes, bias=False)
        for layer in (self.a, self.b):
            layer.weight.data = torch.randn(layer.weight.shape, generator=noise)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        found: torch.Tensor = self.a(x[:, :3]) + self.b(x[:, 3:])
        return found


def inputs(count: int = 6, seed: int = 1) -> torch.Tensor:
    return torch.randn(count, 7, generator=torch.Generator().manual_seed(seed))


def error_of(model: Model, name: str, fmt: str) -> torch.Tensor:
    weight = model.weight(name).detach()
    return (fake_quantize(weight, Format.parse(fmt)) - weight).double()


def place(table: PairTable, i: int, f: int, j: int, g: int) -> int:
    (found,) = np.flatnonzero((table.i == i) & (table.f == f) & (table.j == j) & (table.g == g))
    return int(found)


def pair_keys(table: PairTable) -> dict[tuple[int, ...], float]:
    cells = zip(*(getattr(table, name).tolist() for name in "ifjg"), strict=True)
    return dict(zip(cells, table.value.tolist(), strict=True))


# Closed forms


def test_measured_interaction_of_a_squared_error_is_the_product_of_the_two_changes() -> None:
    module, x = Sum(1), inputs()
    y = torch.arange(6.0)
    model = mp.wrap(module, loss=lambda m, b: 0.5 * (m(b[0])[:, 0] - b[1]).square().mean())
    table = mp.interactions(model, [(x, y)], FORMATS, how="measured", against="loss")
    assert (table.layers, table.unit, table.samples, len(table)) == (("a", "b"), "loss", 6, 9)
    for f, g in itertools.product(range(3), repeat=2):
        each = (x[:, :3].double() @ error_of(model, "a", FORMATS[f])[0]) * (
            x[:, 3:].double() @ error_of(model, "b", FORMATS[g])[0]
        )
        at = place(table, 0, f, 1, g)
        assert table.value[at] == pytest.approx(float(each.mean()), abs=2e-6)
        _, error = mp_error(each.tolist())
        assert table.spread[at] == pytest.approx(error, rel=1e-3, abs=2e-6)


def mp_error(values: list[float]) -> tuple[float, float]:
    from mpsearch.spread import mean_and_error

    return mean_and_error(values)


@pytest.mark.parametrize("product", ["double_backward", "finite_difference"])
def test_second_order_is_the_hessian_of_the_divergence(product: str) -> None:
    module, x = Sum(3), inputs()
    model = mp.wrap(module, logits=lambda m, b: m(b))
    table = mp.interactions(model, [x], FORMATS, product=product)
    log_p = torch.log_softmax(module(x).detach().double(), dim=-1)

    def divergence(flat: torch.Tensor) -> torch.Tensor:
        logits = x[:, :3].double() @ flat[:9].reshape(3, 3).T + x[:, 3:].double() @ flat[9:].reshape(3, 4).T
        return (log_p.exp() * (log_p - torch.log_softmax(logits, dim=-1))).sum(dim=-1).mean()

    flat = torch.cat([module.a.weight.detach().flatten(), module.b.weight.detach().flatten()]).double()
    hessian = torch.autograd.functional.hessian(divergence, flat)
    for f, g in itertools.product(range(3), repeat=2):
        a, b = error_of(model, "a", FORMATS[f]).flatten(), error_of(model, "b", FORMATS[g]).flatten()
        at = place(table, 0, f, 1, g)
        assert table.value[at] == pytest.approx(float(a @ hessian[:9, 9:] @ b), rel=2e-4, abs=1e-7)
        assert table.singles is not None
        assert table.singles.value[0, f] == pytest.approx(float(a @ hessian[:9, :9] @ a) / 2, rel=2e-4, abs=1e-7)


def test_measured_nears_the_second_order_as_the_errors_get_small() -> None:
    model = tiny(layers=2)
    batch = tokens(2, 24)
    layers = find_layers(model, [batch])
    apart = []
    for fmt in ("int4-channel", "int8-channel"):
        found = [Pairwise(how=how).score(model, [batch], layers, parse_formats([fmt])) for how in pairwise._HOW]
        assert pair_keys(found[0]).keys() == pair_keys(found[1]).keys()
        apart.append(float(np.linalg.norm(found[0].value - found[1].value) / np.linalg.norm(found[1].value)))
    assert apart[1] < 0.05 < apart[0]


def test_singles_are_those_of_the_estimators_and_bits_of_the_same_model() -> None:
    model, batches, layers = small_classifier()
    menu = parse_formats(FORMATS)
    for settings, estimator in (
        ({}, "gauss_newton"),
        ({"how": "measured", "against": "loss"}, "isolated_loss"),
        ({"how": "measured"}, "divergence"),
    ):
        singles = Pairwise(**settings).score(model, batches[:1], layers, menu).singles  # type: ignore[arg-type]
        assert singles is not None
        assert same(singles, mp.score(model, batches[:1], FORMATS, estimator, layers=layers)), estimator
        assert (
            singles.spread.tobytes() == mp.score(model, batches[:1], FORMATS, estimator, layers=layers).spread.tobytes()
        )


def test_singles_and_pairs_predict_a_whole_plan_of_two_layers() -> None:
    """With two decisions nothing is left out: what is predicted is what is measured."""
    model, batches, layers = small_classifier()
    table = mp.interactions(model, batches[:1], FORMATS, layers, how="measured")
    for choice in itertools.product(range(3), repeat=2):
        plan = {layer.name: FORMATS[f] for layer, f in zip(layers, choice, strict=True)}
        measured = mp.measure(model, plan, batches[:1], layers=layers).loss
        assert table.total(np.array(choice), singles=True) == pytest.approx(measured, rel=1e-5, abs=1e-7)


# Which pairs


@pytest.mark.parametrize("how", pairwise._HOW)
def test_band_and_sample_are_subsets_of_all(how: str) -> None:
    model, batch = tiny(layers=2), tokens(2, 12)
    ask = {"how": how, "layers": find_layers(model, [batch])}
    every = pair_keys(mp.interactions(model, [batch], FORMATS[:2], **ask))
    rows = len(find_layers(model, [batch]).decisions)
    assert len(every) == 4 * math.comb(rows, 2)
    for settings, count in (
        ({"band": 1}, rows - 1),
        ({"band": 3}, 3 * rows - 6),
        ({"sampled": 7, "seed": 3}, 7),
        ({"sampled": 10**6}, math.comb(rows, 2)),
    ):
        some = pair_keys(mp.interactions(model, [batch], FORMATS[:2], **ask, **settings))
        assert len(some) == 4 * count
        assert all(every[key] == pytest.approx(value, rel=1e-9, abs=0) for key, value in some.items()), settings
    drawn = [set(pair_keys(mp.interactions(model, [batch], FORMATS[:1], sampled=7, seed=s, **ask)))
             for s in (0, 0, 1)]  # fmt: skip
    assert drawn[0] == drawn[1] != drawn[2]


def test_tied_layers_are_one_row_and_their_errors_act_together() -> None:
    module, x = nn.Sequential(nn.Linear(4, 4), nn.Tanh(), nn.Linear(4, 4), nn.Tanh(), nn.Linear(4, 3)), inputs()[:, :4]
    noise = torch.Generator().manual_seed(3)
    for parameter in module.parameters():
        parameter.data = torch.randn(parameter.shape, generator=noise)
    model = mp.wrap(module, logits=lambda m, b: m(b))
    tied = mp.layers(model, x, ties=[["0", "2"]])
    free = mp.layers(model, x, ties="none")
    together = mp.interactions(model, [x], ["int4-channel"], tied)
    apart = mp.interactions(model, [x], ["int4-channel"], free)
    assert (len(together), len(apart)) == (1, 3)
    # d_(0+2)^T G d_4 is the sum of both, for the product is linear.
    both = apart.value[place(apart, 0, 0, 2, 0)] + apart.value[place(apart, 1, 0, 2, 0)]
    assert together.value[0] == pytest.approx(both, rel=1e-5)
    assert together.singles is not None
    assert apart.singles is not None
    inner = apart.singles.value[0, 0] + apart.singles.value[1, 0] + apart.value[place(apart, 0, 0, 1, 0)]
    assert together.singles.value[0, 0] == pytest.approx(inner, rel=1e-5)


def test_one_decision_has_no_pairs() -> None:
    model = mp.wrap(nn.Linear(4, 3), logits=lambda m, b: m(b))
    for how in pairwise._HOW:
        table = mp.interactions(model, [torch.ones(2, 4)], FORMATS, how=how)
        assert len(table) == 0
        assert table.total(np.array([1])) == 0.0
        assert PairTable.from_json(json.loads(json.dumps(table.to_json()))).key == table.key


@pytest.mark.parametrize("how", pairwise._HOW)
def test_formats_that_change_nothing_interact_with_nothing(how: str) -> None:
    model, batches, layers = small_classifier()
    table = mp.interactions(model, batches, ["fp32", "int4-channel"], layers, how=how)
    for key, value in pair_keys(table).items():
        assert (abs(value) < 1e-9) == (0 in (key[1], key[3])), key


@pytest.mark.parametrize("how", pairwise._HOW)
def test_the_same_bits_twice_and_the_weights_as_they_were(how: str) -> None:
    found = []
    for _ in range(2):
        model, batches, layers = small_classifier()
        before = {name: (value.data_ptr(), value.clone()) for name, value in model.module.state_dict().items()}
        found.append(Pairwise(how=how, sketch=4).score(model, batches, layers, parse_formats(FORMATS)))  # type: ignore[arg-type]
        for name, value in model.module.state_dict().items():
            assert value.data_ptr() == before[name][0]
            assert torch.equal(value, before[name][1])
        assert not any(module._forward_hooks or module._forward_pre_hooks for module in model.module.modules())
    assert found[0].value.tobytes() == found[1].value.tobytes()
    assert found[0].key == found[1].key


def test_batches_are_averaged_pair_by_pair() -> None:
    model, batches, layers = small_classifier()
    menu = parse_formats(FORMATS)
    whole = Pairwise().score(model, batches, layers, menu)
    parts = [Pairwise().score(model, [batch], layers, menu) for batch in batches]
    values = np.stack([part.value for part in parts])
    assert whole.samples == 30
    for at in range(len(whole)):
        mean, error = mp_error(values[:, at].tolist())
        assert whole.value[at] == pytest.approx(mean, rel=1e-12)
        assert whole.spread[at] == pytest.approx(error, rel=1e-9)


def test_a_layer_that_the_data_does_not_reach_is_in_no_pair() -> None:
    module = nn.ModuleDict({"a": nn.Linear(4, 3), "b": nn.Linear(3, 3), "unused": nn.Linear(4, 3)})
    model = Model(module, logits=lambda m, b: m["b"](m["a"](b)))
    layers = find_layers(Model(module))
    for how in pairwise._HOW:
        table = mp.interactions(model, [inputs()[:, :4]], FORMATS, layers, how=how)
        assert set(zip(table.i.tolist(), table.j.tolist(), strict=True)) == {(0, 1)}
        assert table.singles is not None
        assert table.singles.status[2] == ("not_observed",) * 3


def test_a_format_that_cannot_hold_the_weights_is_in_no_pair() -> None:
    module = nn.Sequential(nn.Linear(4, 3), nn.Linear(3, 3))
    module[0].weight.data[0, 0] = 1e30
    model = mp.wrap(module, logits=lambda m, b: m(b) * 1e-30)
    for how in pairwise._HOW:
        table = mp.interactions(model, [inputs()[:, :4]], ["int4-channel", "fp32"], how=how)
        assert table.singles is not None
        assert table.singles.status[0] == ("non_finite", "ok")
        assert {key[:2] for key in pair_keys(table)} == {(0, 1)}


# Formats of inputs and of caches


def test_measured_takes_inputs_and_caches() -> None:
    model, batch = tiny(layers=1), tokens(2, 24)
    layers = find_layers(model, [batch], caches=True)
    menu = ["int4-channel@int4-token", "kv-int4-token"]
    table = mp.interactions(model, [batch], menu, layers, how="measured")
    kinds = {decision.name: decision.layers[0].kind for decision in layers.decisions}
    mixed = [k for k in range(len(table)) if kinds[table.layers[table.i[k]]] != kinds[table.layers[table.j[k]]]]
    assert mixed
    assert np.abs(table.value[mixed]).max() > 1e-4
    k = mixed[int(np.abs(table.value[mixed]).argmax())]
    names = table.layers[table.i[k]], table.layers[table.j[k]]
    chosen = {name: table.formats[f] for name, f in zip(names, (table.f[k], table.g[k]), strict=True)}
    rows = {layer.name: decision.name for decision in layers.decisions for layer in decision.layers}
    # A cache that is not named stays as it is; kv-bf16 would round those of a model in float32.
    part = Layers(tuple(x for x in layers if x.kind != "kv_cache" or rows[x.name] in chosen))
    plan = {layer.name: chosen.get(rows[layer.name], "fp32") for layer in part}
    both = mp.measure(model, plan, [batch], layers=part).loss
    assert table.singles is not None
    alone = table.singles.value[[table.i[k], table.j[k]], [table.f[k], table.g[k]]].sum()
    assert both == pytest.approx(alone + table.value[k], rel=1e-4)


@pytest.mark.parametrize("fmt", ["int4-channel@int8-token", "kv-int8-token"])
def test_second_order_refuses_what_it_does_not_see(fmt: str) -> None:
    with pytest.raises(mp.InputError, match="E506") as caught:
        mp.interactions(tiny(layers=1), [tokens(1, 8)], ["int4-channel", fmt])
    assert "measured" in caught.value.advice


# The sketch


def test_a_sketch_is_unbiased_and_its_error_is_told() -> None:
    torch.manual_seed(0)
    module = nn.Sequential(nn.Linear(8, 16), nn.Tanh(), nn.Linear(16, 300))
    model = mp.wrap(module, logits=lambda m, b: m(b))
    batch = torch.randn(8, 8)
    layers = find_layers(model, [batch])
    menu = parse_formats(["int3-channel"])
    exact = Pairwise().score(model, [batch], layers, menu)
    found = [Pairwise(sketch=32, seed=seed).score(model, [batch], layers, menu) for seed in range(200)]
    values = np.array([table.value[0] for table in found])
    error = values.std(ddof=1) / math.sqrt(len(values))
    assert abs(values.mean() - exact.value[0]) < 3 * error
    assert values.std(ddof=1) > 0.01 * abs(exact.value[0])
    inside = np.mean([abs(t.value[0] - exact.value[0]) <= 1.96 * t.spread[0] for t in found])
    assert inside >= 0.9
    assert exact.singles is not None
    assert all(t.singles is not None and same(t.singles, exact.singles) for t in found[:3])
    whole = Pairwise(sketch=300).score(model, [batch], layers, menu)
    assert whole.value[0] == exact.value[0]


def test_changes_that_would_not_fit_are_refused_with_a_way_out(monkeypatch: pytest.MonkeyPatch) -> None:
    model, batches, layers = small_classifier()
    monkeypatch.setattr(pairwise, "KEEP_BYTES", 600)
    with pytest.raises(mp.InputError, match="E506") as caught:
        mp.interactions(model, batches, FORMATS, layers)
    assert "sketch" in caught.value.advice
    assert len(mp.interactions(model, batches, FORMATS, layers, sketch=2)) == 9


# Refusals


def test_what_cannot_be_asked() -> None:
    model, batches, layers = small_classifier()
    for settings in (
        {"how": "exact"},
        {"against": "mse"},
        {"against": "loss"},
        {"band": -1},
        {"sampled": 2.5},
        {"seed": -1},
        {"sketch": True},
        {"product": "forward"},
        {"step": 0.0},
    ):
        with pytest.raises(mp.InputError, match="E113"):
            mp.interactions(model, batches, FORMATS, layers, **settings)
    with pytest.raises(mp.InputError, match="E107"):
        mp.interactions(model, batches, FORMATS, layers, bnad=2)
    with pytest.raises(mp.InputError, match="E501"):
        mp.interactions(model, [], FORMATS, layers)
    plain = mp.wrap(nn.Linear(4, 3))
    for settings in ({}, {"how": "measured"}, {"how": "measured", "against": "loss"}):
        with pytest.raises(mp.InputError, match="E506"):
            mp.interactions(plain, [torch.ones(1, 4)], FORMATS, mp.layers(plain), **settings)


# The noun


def clado() -> tuple[PairTable, dict[str, Any]]:
    table = json.loads((DATA / "clado_example.json").read_text())
    single = np.array(table["single_dL"])
    joint = np.array([[math.nan if x is None else x for x in row] for row in table["joint_dL"]])
    names, menu = ("l0", "l1", "l2", "l3"), ("int8", "int4", "int2")
    pairs = [(i, f, j, g) for i, j in itertools.combinations(range(4), 2) for f in range(3) for g in range(3)]
    value = [joint[3 * i + f, 3 * j + g] - single[3 * i + f] - single[3 * j + g] for i, f, j, g in pairs]
    unknown = np.full((4, 3), math.nan)
    singles = mp.SensitivityTable(names, menu, single.reshape(4, 3), unknown, "loss")
    spread = [math.nan] * len(pairs)
    # Any order will do.
    return PairTable(names, menu, *np.array(pairs)[::-1].T, value[::-1], spread, "loss", singles=singles), table  # type: ignore[arg-type]


def test_the_matrix_and_the_optima_of_the_published_example() -> None:
    pairs, table = clado()
    assert np.allclose(pairs.dense(singles=True), table["C"], atol=1e-12)
    assert np.allclose(np.linalg.eigvalsh(pairs.dense(singles=True)), table["eigenvalues"], atol=1e-12)
    assert len(table["cases"]) == 11
    sizes = np.outer(table["params"], table["bits"])
    choices = [np.array(c) for c in itertools.product(range(3), repeat=4)]
    alone_differs = 0
    for case in table["cases"]:
        fitting = [c for c in choices if sizes[np.arange(4), c].sum() <= case["budget_bits"]]
        if case["exact"] is None:
            assert not fitting
            continue
        best = min(fitting, key=lambda c: pairs.total(c, singles=True))
        assert [table["bits"][f] for f in best] == case["exact"]["bits"]
        assert pairs.total(best, singles=True) == pytest.approx(case["exact"]["predicted_loss"], abs=1e-12)
        x = np.zeros(12)
        x[3 * np.arange(4) + best] = 1
        assert x @ pairs.dense() @ x / 2 == pytest.approx(pairs.total(best), abs=1e-12)
        assert pairs.singles is not None
        single = pairs.singles.value
        alone = min(fitting, key=lambda c: single[np.arange(4), c].sum())
        assert [table["bits"][f] for f in alone] == case["diagonal_only"]["bits"]
        alone_differs += alone.tolist() != best.tolist()
    assert alone_differs == 5


def test_pairs_are_kept_in_order_and_read_back() -> None:
    pairs, _ = clado()
    places = list(pair_keys(pairs))
    assert places == sorted(places)
    back = PairTable.from_json(json.loads(json.dumps(pairs.to_json())))
    assert back.key == pairs.key
    assert back.value.tobytes() == pairs.value.tobytes()
    with pytest.raises(ValueError, match="read-only"):
        pairs.value[0] = 1.0


def test_some_rows_of_a_table() -> None:
    pairs, _ = clado()
    some = pairs.of(["l3", "l1"])
    assert some.layers == ("l1", "l3")
    assert len(some) == 9
    for f, g in itertools.product(range(3), repeat=2):
        assert some.value[place(some, 0, f, 1, g)] == pairs.value[place(pairs, 1, f, 3, g)]
    # l1 in int2 and l3 in int8 together, as the example has it.
    assert some.total(np.array([2, 0]), singles=True) == pytest.approx(0.178, abs=1e-12)
    assert some.singles is not None
    assert some.singles.layers == some.layers
    with pytest.raises(mp.InputError, match="E120"):
        pairs.of(["l4"])


def test_a_pair_without_a_finite_value_is_barred() -> None:
    table = PairTable(("a", "b"), ("x", "y"), [0, 0], [0, 1], [1, 1], [1, 1], [math.nan, 1.0], [math.nan, 0.1], "n")  # type: ignore[arg-type]
    assert table.status == ("non_finite", "ok")
    assert table.total(np.array([0, 1])) == math.inf
    assert table.total(np.array([1, 1])) == 1.0
    assert table.dense()[0, 3] == table.dense()[3, 0] == math.inf
    text = json.dumps(table.to_json(), allow_nan=False)
    assert PairTable.from_json(json.loads(text)).status == table.status
    mean = PairTable.mean([table, table])
    assert mean.status == ("non_finite", "ok")


@pytest.mark.parametrize(
    ("i", "j", "value", "why"),
    [
        ([1], [0], [1.0], "comes first"),
        ([0], [0], [1.0], "comes first"),
        ([0, 0], [1, 1], [1.0, 2.0], "twice"),
        ([0], [2], [1.0], "beyond"),
    ],
)
def test_pairs_that_make_no_sense(i: list[int], j: list[int], value: list[float], why: str) -> None:
    zeros = [0] * len(i)
    with pytest.raises(ValueError, match=why):
        PairTable(("a", "b"), ("x",), i, zeros, j, zeros, value, [0.0] * len(i), "n")  # type: ignore[arg-type]


def test_what_a_table_cannot_do() -> None:
    names = tuple(map(str, range(5000)))
    empty: list[int] = []
    table = PairTable(names, ("x", "y"), empty, empty, empty, empty, empty, empty, "n")  # type: ignore[arg-type]
    with pytest.raises(mp.InputError, match="E212"):
        table.dense()
    with pytest.raises(mp.InputError, match="E212"):
        table.total(np.zeros(5000, dtype=int), singles=True)
    with pytest.raises(ValueError, match="columns"):
        table.total(np.full(5000, 2))
