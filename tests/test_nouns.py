"""The nouns: exact arithmetic, reading back, refusing."""

from __future__ import annotations

import math
from fractions import Fraction
from pathlib import Path

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

import mpsearch as mp
from mpsearch.budget import Budget
from mpsearch.decimals import decimal_text
from mpsearch.feasible import check_budgets, in_unit
from mpsearch.format import Format, parse_formats
from mpsearch.front import Measurement, ParetoFront
from mpsearch.hardware.bops import Bops
from mpsearch.hardware.bytes import Bytes
from mpsearch.layer import Excluded, Layer, Layers
from mpsearch.plan import BitPlan
from mpsearch.problem import Problem, Solution
from mpsearch.spread import student_factor
from mpsearch.tables import SensitivityTable

BITS = st.integers(2, 8)
GRAINS = st.one_of(st.sampled_from(["tensor", "channel"]), st.integers(1, 256).map(lambda g: f"g{g}"))
FORMATS = st.builds(lambda b, g, a: f"int{b}-{g}{'-asym' if a else ''}", BITS, GRAINS, st.booleans())


@given(FORMATS)
def test_formats_read_back_as_they_print(text: str) -> None:
    assert str(Format.parse(text)) == text


@given(st.integers(2, 7), GRAINS, st.booleans(), st.integers(1, 40), st.integers(1, 40))
def test_more_bits_never_take_fewer_bytes(bits: int, grain: str, asym: bool, rows: int, columns: int) -> None:
    layer = Layer("x", "linear", (rows, columns))
    small = Format.parse(f"int{bits}-{grain}{'-asym' if asym else ''}")
    large = Format.parse(f"int{bits + 1}-{grain}{'-asym' if asym else ''}")
    if not small.refuses(layer):
        assert small.bytes(layer) <= large.bytes(layer)
        assert small.effective_bits(layer) >= bits


@pytest.mark.parametrize(
    ("text", "bits"),
    [
        ("int4-g128", Fraction(33, 8)),
        ("int4-g128-asym", Fraction(133, 32)),
        ("int2-g64", Fraction(9, 4)),
        ("int3-g64", Fraction(13, 4)),
        ("int4-g32", Fraction(9, 2)),
        ("int8-g32", Fraction(17, 2)),
        ("int8-channel", Fraction(8) + Fraction(16, 4096)),
        ("bf16", Fraction(16)),
    ],
)
def test_effective_bits_are_exact(text: str, bits: Fraction) -> None:
    assert Format.parse(text).effective_bits(Layer("x", "linear", (4096, 4096))) == bits


@pytest.mark.parametrize(
    ("text", "code", "words"),
    [
        ("int1-channel", "E110", "1 bit has no symmetric integer grid; allowed 2 to 8"),
        ("int9-channel", "E110", "9 bits"),
        ("int4-g0", "E110", "group of 0"),
        ("int4-g-8", "E110", "group of -8"),
        ("int4-g12x", "E109", "not known"),
        ("int4_g128", "E109", "did you mean 'int4-g128'"),
    ],
)
def test_impossible_formats_are_refused_with_a_way_out(text: str, code: str, words: str) -> None:
    with pytest.raises(mp.InputError) as found:
        Format.parse(text)
    assert found.value.code == code
    assert words in found.value.message


def test_a_menu_is_not_empty_and_has_no_doubles() -> None:
    with pytest.raises(mp.InputError, match="given twice"):
        parse_formats(["int4-g64", "int4-g64"])
    with pytest.raises(mp.InputError, match="empty"):
        parse_formats([])


def test_a_group_that_does_not_divide_names_what_does() -> None:
    refusal = Format.parse("int4-g128").refuses(Layer("fc", "linear", (8, 100)))
    assert "100" in refusal
    assert "g50, g25, g20" in refusal


MODEL = Layers(
    (
        Layer("a", "linear", (64, 64), dtype="bfloat16", macs=4096, tie="{a,b}"),
        Layer("b", "linear", (32, 64), dtype="bfloat16", macs=2048, tie="{a,b}"),
        Layer("c", "linear", (64, 96), dtype="bfloat16", macs=6144),
    ),
    (Excluded("norm.weight", (64,), "bfloat16", "1-D norm or bias vector"),),
)


def test_bytes_count_everything_that_is_stored() -> None:
    table = Bytes().cost(MODEL, parse_formats(["int4-g32", "int4-g64", "bf16"]))
    assert table.layers == ("{a,b}", "c")
    assert table.value[0].tolist() == [96 * (32 + 4), 96 * (32 + 2), 96 * 128]
    assert math.isnan(table.value[1, 1])
    assert (table.fixed, table.weights) == (128, 96 * 64 + 64 * 96 + 64)
    assert table.reference == 2 * table.weights


def test_bops_are_modelled_and_relative_to_16_by_16() -> None:
    table = Bops().cost(MODEL, parse_formats(["int4-g32", "bf16"]))
    assert table.kind == "modelled"
    assert table.value.tolist() == [[6144 * 4 * 16, 6144 * 256], [6144 * 4 * 16, 6144 * 256]]
    assert table.reference == 2 * 6144 * 256
    with pytest.raises(mp.InputError, match="no layer has multiply-adds"):
        Bops().cost([Layer("x", "linear", (2, 2))], parse_formats(["bf16"]))


@pytest.mark.parametrize(
    ("text", "shown"),
    [
        ("weights <= 4.25 bits", "weights <= 4.25 bits"),
        ("weights<=3.5GiB", "weights <= 3.5 GiB"),
        ("28%", "weights <= 28 %"),
        ("4.5", "weights <= 4.5 bits"),
        ("bops <= 60 %", "bops <= 60 %"),
        ("1e3 MB", "weights <= 1000 MB"),
    ],
)
def test_budgets_read(text: str, shown: str) -> None:
    budget = Budget.parse(text)
    assert str(budget) == shown
    assert Budget.parse(str(budget)) == budget


@pytest.mark.parametrize("text", ["nan", "inf", "-1 bits", "0", "weights <= many bits", "weights <= ", "", "1/0 bits"])
def test_amounts_that_are_none_are_refused(text: str) -> None:
    with pytest.raises(mp.InputError) as found:
        Budget.parse(text)
    assert found.value.code == "E111"


@pytest.mark.parametrize(
    ("text", "words"), [("wieghts <= 4 bits", "'weights'"), ("weights <= 4 bit", "'bits'"), ("flops <= 4 ms", "flops")]
)
def test_unknown_resources_and_units_are_refused(text: str, words: str) -> None:
    with pytest.raises(mp.InputError) as found:
        Budget.parse(text)
    assert found.value.code == "E112"
    assert words in str(found.value)


def test_limits_are_whole_and_never_above_the_budget() -> None:
    table = Bytes().cost(MODEL, parse_formats(["int4-g32"]))
    assert Budget.parse("weights <= 4.25 bits").limit(table) == math.floor(4.25 * table.weights / 8)
    assert Budget.parse("weights <= 1 kB").limit(table) == 1000
    assert Budget.parse("weights <= 50 %").limit(table) == table.weights


@given(st.fractions(min_value=0, max_value=10**6))
def test_decimals_are_exact(amount: Fraction) -> None:
    assert Fraction(decimal_text(amount)) == amount


def test_the_smallest_limit_that_is_offered_can_be_met() -> None:
    table = Bytes().cost(MODEL, parse_formats(["int4-g32"]))
    mask = np.zeros(table.value.shape)
    for text in ("weights <= 2 bits", "weights <= 1 kB", "weights <= 1 %"):
        budget = Budget.parse(text)
        with pytest.raises(mp.InfeasibleError) as found:
            check_budgets([budget], [table], mask, {})
        assert found.value.code == "E201"
        least = in_unit(float(np.nansum(table.value) + table.fixed), budget, table)
        assert least in found.value.message
        check_budgets([Budget.parse(f"weights <= {least}")], [table], mask, {})


def test_problems_check_their_shapes_and_own_their_arrays() -> None:
    loss, cost = np.ones((2, 3)), np.ones((1, 2, 3))
    problem = Problem(loss, cost, np.array([5.0]))
    loss[0, 0] = 7
    assert problem.loss[0, 0] == 1
    with pytest.raises(ValueError, match="read-only"):
        problem.loss[0, 0] = 2
    with pytest.raises(ValueError, match="cost must be"):
        Problem(np.ones((2, 3)), np.ones((2, 2, 3)), np.array([5.0]))
    with pytest.raises(ValueError, match="-inf"):
        Problem(np.array([[-np.inf]]), np.ones((1, 1, 1)), np.array([1.0]))
    with pytest.raises(ValueError, match="not finite"):
        Problem(np.array([[1.0]]), np.array([[[np.nan]]]), np.array([1.0]))


def test_totals_are_exact_where_floats_are_not() -> None:
    cost = np.array([[[0.1], [0.2]]])
    assert not Problem(np.zeros((2, 1)), cost, np.array([0.3])).fits(np.array([0, 0]))
    assert Problem(np.zeros((2, 1)), cost, np.array([0.3 + 1e-16 + 5e-17])).fits(np.array([0, 0]))
    big = np.array([[[2.0**53], [1.0]]])
    assert not Problem(np.zeros((2, 1)), big, np.array([2.0**53])).fits(np.array([0, 0]))


def test_what_fits_is_offered_and_within_every_limit() -> None:
    problem = Problem(np.array([[1.0, np.nan]]), np.array([[[5.0, 1.0]]]), np.array([9.0]))
    assert problem.fits(np.array([0]))
    for choice in ([1], [-1], [2], [0, 0], []):
        assert not problem.fits(np.array(choice, dtype=np.int64))
    assert Problem(np.array([[1.0]]), np.array([[[5.0]]]), np.array([np.inf])).fits(np.array([0]))
    assert not Problem(np.array([[1.0]]), np.array([[[5.0]]]), np.array([-np.inf])).fits(np.array([0]))


def test_a_solution_that_breaks_a_budget_cannot_be_made() -> None:
    problem = Problem(np.array([[1.0, 2.0]]), np.array([[[5.0, 1.0]]]), np.array([3.0]))
    with pytest.raises(ValueError, match="does not keep the budgets"):
        Solution.of(problem, np.array([0]), bound=0.0, prices=[0.0], solver="x")
    solution = Solution.of(problem, np.array([1]), bound=1.0, prices=[0.0], solver="x")
    assert (solution.loss, solution.gap, solution.status) == (2.0, 0.5, "feasible")
    assert Solution.without(problem, "infeasible", "x").choice.size == 0


def table_of(values: list[list[float]]) -> SensitivityTable:
    array = np.array(values)
    names = tuple(f"l{i}" for i in range(len(values)))
    return SensitivityTable(
        names, tuple(f"f{j}" for j in range(len(values[0]))), array, np.full(array.shape, np.nan), "nats/token"
    )


def test_tables_average_with_the_spread_between_batches() -> None:
    mean = SensitivityTable.mean([table_of([[1.0, 5.0]]), table_of([[3.0, 5.0]]), table_of([[2.0, np.nan]])])
    assert mean.value[0, 0] == 2.0
    assert mean.spread[0, 0] == pytest.approx(student_factor(2) / math.sqrt(3))
    assert mean.status == (("ok", "not_offered"),)
    assert mean.samples == 3


def test_tables_read_back_bit_for_bit() -> None:
    table = table_of([[0.1 + 0.2, np.nan], [1e-300, 5e-324]])
    again = SensitivityTable.from_json(table.to_json())
    assert again.value.tobytes() == table.value.tobytes()
    assert again.key == table.key


def test_a_cell_cannot_be_ok_without_a_value() -> None:
    with pytest.raises(ValueError, match="status"):
        SensitivityTable(("a",), ("f",), np.array([[np.nan]]), np.array([[0.0]]), "x", (("ok",),))


def measured(plan: str, cost: float, loss: float) -> Measurement:
    return Measurement(plan, "mixed", loss, 0.1, "nats/token", {"weights": cost})


@given(st.lists(st.tuples(st.integers(1, 20), st.integers(1, 20)), min_size=1, max_size=30))
def test_a_front_holds_what_nothing_beats(points: list[tuple[int, int]]) -> None:
    front = ParetoFront.of([measured(str(i), c, v) for i, (c, v) in enumerate(points)])
    best = {(c, v) for c, v in points if not any((a <= c and b < v) or (a < c and b <= v) for a, b in points)}
    assert {(m.cost["weights"], m.loss) for m in front} == best
    assert len(front) + len(front.dominated) == len(points)
    assert [m.cost["weights"] for m in front] == sorted(m.cost["weights"] for m in front)


def test_knee_and_hypervolume() -> None:
    front = ParetoFront.of([measured("a", 1, 10), measured("b", 2, 2), measured("c", 10, 1)])
    assert front.knee is not None
    assert front.knee.plan == "b"
    assert front.hypervolume(11, 11) == 10 * 1 + 9 * 8 + 1 * 1


def test_plans_read_back_and_notice_edits(tmp_path: Path) -> None:
    plan = BitPlan(MODEL, dict.fromkeys(("a", "b", "c"), Format.parse("int4-g32")), {"name": "m", "digest": "d"})
    file = tmp_path / "plan.json"
    plan.save(file)
    again = BitPlan.load(file)
    assert again == plan
    assert again.key == plan.key
    text = file.read_text()
    for broken in (text.replace("int4-g32", "int8-g32", 1), text[: len(text) // 2], "[]", "{}", "\ud800x"):
        file.write_text(broken, errors="surrogatepass")
        with pytest.raises(mp.InputError) as found:
            BitPlan.load(file)
        assert found.value.code == "E304"
    with pytest.raises(mp.InputError, match="E101"):
        BitPlan.load(tmp_path / "none.json")


def test_every_cut_of_a_plan_file_is_noticed(tmp_path: Path) -> None:
    plan = BitPlan(Layers((Layer("a", "linear", (4, 4)),)), {"a": Format.parse("int4-channel")})
    file = tmp_path / "plan.json"
    plan.save(file)
    whole = file.read_bytes()
    for length in range(len(whole) - 1):
        file.write_bytes(whole[:length])
        with pytest.raises(mp.InputError):
            BitPlan.load(file)


def test_plans_of_different_models_do_not_compare() -> None:
    formats = dict.fromkeys(("a", "b", "c"), Format.parse("int4-g32"))
    plan = BitPlan(MODEL, formats, {"digest": "x"})
    other = BitPlan(MODEL, {**formats, "c": Format.parse("bf16")}, {"digest": "x"})
    assert plan.compare(other) == [("c", Format.parse("int4-g32"), Format.parse("bf16"))]
    with pytest.raises(mp.InputError, match="E302"):
        plan.compare(BitPlan(MODEL, formats, {"digest": "y"}))


def test_patterns_that_match_nothing_offer_the_closest() -> None:
    assert [layer.name for layer in MODEL.match("[ab]")] == ["a", "b"]
    with pytest.raises(mp.InputError, match="E120"):
        MODEL.match("zz*")


def verdict_of(mixed: float, uniform: float, size: int) -> str:
    from mpsearch.planning import Labelled
    from mpsearch.verdict import verdict

    plan = BitPlan(MODEL, dict.fromkeys(("a", "b", "c"), Format.parse("int4-g32")))
    points = [
        Measurement(plan.assignment, "mixed", mixed, 0.01, "nats/token", {"weights": 1000}),
        Measurement("small", "uniform int3-g32", 1.0, 0.01, "nats/token", {"weights": 700}),
        Measurement("large", "uniform int4-g32", uniform, 0.01, "nats/token", {"weights": size}),
    ]
    return verdict(Labelled("mixed", plan), points)[0]


def test_the_verdict_looks_at_uniform_plans_a_hair_larger() -> None:
    assert verdict_of(0.5, 0.2, 1005).startswith("Mixing does not pay here")
    assert "0.50 % larger" in verdict_of(0.5, 0.2, 1005)
    assert verdict_of(0.5, 0.8, 1005).startswith("Mixing pays: 0.5")
    assert "uniform int4-g32" in verdict_of(0.5, 0.8, 1005)
    assert "uniform int3-g32" in verdict_of(0.5, 0.2, 1200)
    assert verdict_of(0.5, 0.5, 1000).startswith("Mixing makes no measurable difference")


def test_paired_losses_are_compared_sequence_by_sequence() -> None:
    from mpsearch.verdict import difference_error

    def with_samples(*samples: float) -> Measurement:
        return Measurement("p", "mixed", 1.0, 0.5, "nats/token", {}, data={"digest": "d"}, samples=samples)

    a, b = with_samples(1.0, 2.0, 3.0), with_samples(1.5, 2.5, 3.5)
    assert difference_error(a, b) == pytest.approx(0.0, abs=1e-12)
    assert difference_error(a, with_samples(1.0)) == pytest.approx(math.hypot(0.5, 0.5))


def test_a_plan_by_names_of_layers_or_decisions() -> None:
    import torch
    from torch import nn

    class Fused(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.q, self.k, self.out = nn.Linear(8, 8), nn.Linear(8, 8), nn.Linear(8, 3)

        def forward(self, x: torch.Tensor) -> torch.Tensor:
            y: torch.Tensor = self.out(self.q(x) * self.k(x))
            return y

    model = mp.wrap(Fused(), logits=lambda m, x: m(x))
    data = [torch.randn(2, 8)]
    decisions = [row.name for row in mp.layers(model, data[0]).decisions]
    assert len(decisions) == 2
    by_decision = mp.measure(model, dict.fromkeys(decisions, "int4-channel"), data)
    by_layer = mp.measure(model, dict.fromkeys(("q", "k", "out"), "int4-channel"), data)
    assert by_decision.loss == by_layer.loss > 0
    with pytest.raises(mp.InputError, match="leaves out 1 layers, first 'out'"):
        mp.measure(model, {"q": "bf16", "k": "bf16"}, data)
    with pytest.raises(mp.InputError, match="no layer of the plan's name 'ou'; did you mean 'out'"):
        mp.measure(model, {"q": "bf16", "k": "bf16", "ou": "bf16"}, data)
