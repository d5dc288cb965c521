"""The door to the solvers: rules, goals, errors and people's own tables, each against all choices there are."""

from __future__ import annotations

import itertools
import json
import math
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest

import mpsearch as mp
from mpsearch.cli.main import run
from mpsearch.own_tables import read_tables
from mpsearch.problem import Problem, Solution
from mpsearch.robust import cautious
from mpsearch.rules import Aligned, Balance, Family, Peak, Rules
from mpsearch.solving import choose, shortage, solve_problem, solver_for
from mpsearch.structure import PairTerms

ROWS, FORMATS = 5, 3
Keeps = Callable[[tuple[int, ...], Problem], bool]


def some_problem(seed: int, resources: int = 1) -> Problem:
    """Five rows a to e, three formats lo, mid, hi; limits between the least and the most."""
    generator = np.random.default_rng(seed)
    loss = np.sort(generator.integers(0, 60, (ROWS, FORMATS)), axis=1)[:, ::-1] / 4
    cost = np.sort(generator.integers(1, 30, (resources, ROWS, FORMATS)), axis=2).astype(float)
    least, most = cost.min(axis=2).sum(axis=1), cost.max(axis=2).sum(axis=1)
    limit = np.floor(least + generator.uniform(0.3, 0.9, resources) * (most - least))
    names = tuple(f"r{r}" for r in range(resources))
    return Problem(loss, cost, limit, tuple("abcde"), ("lo", "mid", "hi"), names)


def best(problem: Problem, keeps: Keeps) -> float:
    """Least loss of all choices that keep the budgets and a condition."""
    found = math.inf
    for choice in itertools.product(range(FORMATS), repeat=ROWS):
        if keeps(choice, problem) and problem.fits(np.array(choice)):
            found = min(found, problem.total_loss(np.array(choice)))
    return found


def spent(problem: Problem, choice: tuple[int, ...], rows: range | list[int]) -> float:
    return sum(float(problem.cost[0, i, choice[i]]) for i in rows)


def count(choice: tuple[int, ...], column: int, rows: range | list[int] = range(ROWS)) -> int:
    return sum(choice[i] == column for i in rows)


RULES: dict[str, tuple[Rules, Keeps]] = {
    "pins": (Rules(pins={"b": "hi", 3: 0}), lambda c, p: c[1] == 2 and c[3] == 0),
    "bars": (Rules(bars={"[ab]": ["lo"], "e": [1, 2]}), lambda c, p: 0 not in c[:2] and c[4] == 0),
    "floors": (Rules(floors={"*": "mid"}), lambda c, p: 0 not in c),
    "ties": (Rules(ties=[["a", "c"], ["c", "e"]]), lambda c, p: c[0] == c[2] == c[4]),
    "at most": (Rules(at_most={"hi": 1, "mid": 2}), lambda c, p: count(c, 2) <= 1 and count(c, 1) <= 2),
    "at least": (Rules(at_least={"r0": 80.0}), lambda c, p: spent(p, c, range(ROWS)) >= 80.0),
    "families": (Rules(families=[Family(["a", "b"], "r0", 25.0)]), lambda c, p: spent(p, c, range(2)) <= 25.0),
    "balances": (
        Rules(balances=[Balance([*"abcd"], ["hi"], ["lo"])]),
        lambda c, p: count(c, 2, range(4)) == count(c, 0, range(4)),
    ),
    "peaks": (
        Rules(peaks=[Peak([["a", "b"], ["b", "c", "d"]], "r0", 40.0)]),
        lambda c, p: spent(p, c, range(2)) <= 40.0 and spent(p, c, range(1, 4)) <= 40.0,
    ),
    "aligned": (Rules(aligned=[Aligned([*"abcde"], ["hi"], 2)]), lambda c, p: count(c, 2) % 2 == 0),
    "aligned ties": (
        Rules(aligned=[Aligned([*"abcd"], ["hi"], 4)], ties=[["a", "b"], ["c", "d"]]),
        lambda c, p: c[0] == c[1] and c[2] == c[3] and count(c, 2, range(4)) % 4 == 0,
    ),
}  # fmt: skip


@pytest.mark.parametrize("name", RULES)
def test_rules_give_the_best_of_all_choices_that_keep_them(name: str) -> None:
    rules, keeps = RULES[name]
    feasible = infeasible = changed = 0
    for seed in range(40):
        problem = some_problem(seed)
        expected = best(problem, keeps)
        solution = solve_problem(problem, rules=rules)
        if math.isinf(expected):
            infeasible += 1
            assert solution.status == "infeasible", seed
            continue
        feasible += 1
        changed += expected > best(problem, lambda c, p: True)
        assert solution.status == "optimal", seed
        assert solution.loss == pytest.approx(expected, rel=1e-12), seed
        assert keeps(tuple(solution.choice.tolist()), problem), seed
        assert solution.bound <= solution.loss
        assert len(solution.cost) == len(solution.prices) == 1
    assert feasible >= 5
    assert changed >= 3, "the rule never mattered"


def test_tied_rows_add_up_pairs_between_them() -> None:
    for seed in range(20):
        base = some_problem(seed)
        generator = np.random.default_rng(seed)
        pairs = [(i, f, j, g) for i in range(4) for j in range(i + 1, 5) for f in range(3) for g in range(3)]
        chosen = [pairs[k] for k in generator.choice(len(pairs), 25, replace=False)]
        terms = PairTerms(*(np.array(column) for column in zip(*chosen, strict=True)), generator.normal(0, 3, 25))
        problem = Problem(base.loss, base.cost, base.limit, base.names, base.formats, base.resources, terms)
        solution = solve_problem(problem, rules=Rules(ties=[["a", "d"]]))
        assert solution.loss == pytest.approx(best(problem, lambda c, p: c[0] == c[3]), rel=1e-9, abs=1e-9), seed


@pytest.mark.parametrize(
    ("rules", "words"),
    [
        (Rules(pins={"z": "hi"}), "no row 'z'"),
        (Rules(pins={"a": "hai"}), "no format 'hai'; did you mean 'hi'"),
        (Rules(pins={9: "hi"}), "no row '9'"),
        (Rules(at_least={"bytes": 1.0}), "no resource 'bytes'"),
        (Rules(bars={"a": ["lo", "mid", "hi"]}), "leave row 'a' no format"),
        (Rules(aligned=[Aligned([*"abc"], ["hi"], 2)], ties=[["a", "b"]]), "tied in groups of different sizes"),
    ],
)
def test_rules_that_make_no_sense(rules: Rules, words: str) -> None:
    with pytest.raises(mp.InputError) as caught:
        solve_problem(some_problem(0), rules=rules)
    assert caught.value.code == "E213"
    assert words in str(caught.value)


def test_the_least_cost_within_a_loss_is_the_other_direction() -> None:
    tighter = 0
    for seed in range(60):
        problem = some_problem(seed, resources=2)
        most_loss = float(np.random.default_rng(seed).uniform(0.2, 0.9) * problem.loss[:, 0].sum())
        least = math.inf
        for choice in itertools.product(range(FORMATS), repeat=ROWS):
            if problem.fits(np.array(choice)) and problem.total_loss(np.array(choice)) <= most_loss:
                least = min(least, spent(problem, choice, range(ROWS)))
        found = solve_problem(problem, goal="r0", most_loss=most_loss)
        if math.isinf(least):
            assert found.status == "infeasible", seed
            continue
        assert (found.status, found.loss) == ("optimal", least), seed
        assert found.stats["loss"] == problem.total_loss(found.choice) <= most_loss
        assert found.cost[0] == least
        back = solve_problem(
            Problem(problem.loss, problem.cost, np.array([least, problem.limit[1]])),
        )
        assert back.loss <= most_loss, "there and back again"
        tighter += least < problem.cost[0].max(axis=1).sum()
    assert tighter > 10


def test_the_least_worst_row() -> None:
    for seed in range(40):
        problem = some_problem(seed, resources=2)
        keys = [
            (max(problem.loss[i, c] for i, c in enumerate(choice)), problem.total_loss(np.array(choice)))
            for choice in itertools.product(range(FORMATS), repeat=ROWS)
            if problem.fits(np.array(choice))
        ]
        found = solve_problem(problem, goal="worst")
        if not keys:
            assert found.status == "infeasible"
            continue
        assert (found.stats["worst"], found.loss) == pytest.approx(min(keys)), seed


@pytest.mark.parametrize("errors", ["shared", "independent"])
def test_the_cautious_plan_has_the_least_quantile(errors: Any) -> None:
    differs = 0
    for seed in range(60):
        problem = some_problem(seed)
        spread = np.random.default_rng(seed + 1000).uniform(0, 6, problem.loss.shape)

        def quantile(choice: Any, problem: Problem = problem, spread: Any = spread) -> float:
            taken = spread[np.arange(ROWS), list(choice)]
            noise = taken.sum() if errors == "shared" else math.sqrt((taken**2).sum())
            return problem.total_loss(np.array(choice)) + 1.645 * float(noise)

        fitting = [c for c in itertools.product(range(FORMATS), repeat=ROWS) if problem.fits(np.array(c))]
        least = min(map(quantile, fitting))
        found = cautious(problem, spread, solver_for("ilp", {}), by=1.645, errors=errors)
        assert found.status == "optimal", seed
        assert found.loss == pytest.approx(least, rel=1e-9), seed
        assert quantile(found.choice) == pytest.approx(least, rel=1e-9), seed
        assert found.bound <= found.loss * (1 + 1e-12)
        assert found.stats["expected"] == problem.total_loss(found.choice)
        differs += found.choice.tolist() != solve_problem(problem).choice.tolist()
    assert differs > 10, "the errors never mattered"


def test_doubtful_rows_are_those_that_change_when_scores_are_drawn_again() -> None:
    generator = np.random.default_rng(3)
    rows = 40
    base = generator.lognormal(0, 1.5, (rows, 1)) * 4.0 ** -np.arange(3)
    cost = np.tile(np.array([2.0, 3.0, 4.0]), (rows, 1))[None]
    problem = Problem(base, cost, np.array([3.0 * rows]))
    spread = 0.05 * base
    solution = solve_problem(problem, "ilp")
    listed = {int(doubt.row) for doubt in mp.doubts(problem, solution, spread)}
    changed: dict[int, int] = {}
    for _ in range(100):
        drawn = Problem(base + spread * generator.standard_normal(base.shape), cost, problem.limit)
        for row in np.flatnonzero(solve_problem(drawn, "ilp").choice != solution.choice).tolist():
            changed[row] = changed.get(row, 0) + 1
    often = {row for row, times in changed.items() if times >= 20}
    assert often
    assert often <= listed, "a row that changes often is not listed"
    assert len(listed) < rows / 2


def test_shortage_names_the_least_limits_and_what_pins_cost() -> None:
    checked = 0
    for seed in range(40):
        problem = some_problem(seed, resources=2)
        tight = Problem(
            problem.loss, problem.cost, problem.cost.min(axis=2).sum(axis=1) + np.array([0.0, 2.0]), problem.names,
            problem.formats, problem.resources,
        )  # fmt: skip
        rules = Rules(pins={"a": "hi"})
        if solve_problem(tight, rules=rules).status != "infeasible":
            continue
        found = shortage(tight, rules)
        for r, (name, least) in enumerate(found.together.items()):
            others = [k for k in (0, 1) if k != r]
            sums = [
                float(tight.cost[r][np.arange(ROWS), list(c)].sum())
                for c in itertools.product(range(FORMATS), repeat=ROWS)
                if c[0] == 2 and all(tight.cost[k][np.arange(ROWS), list(c)].sum() <= tight.limit[k] for k in others)
            ]
            assert least == min(sums, default=math.inf), (seed, name)
            loosened = tight.limit.copy()
            if math.isfinite(least):
                loosened[r] = least
                fits = Problem(tight.loss, tight.cost, loosened, tight.names, tight.formats, tight.resources)
                assert solve_problem(fits, rules=rules).status == "optimal"
        extra = tight.cost[0, 0, 2] - tight.cost[0, 0].min()
        if extra:
            assert found.pins["the rule for 'a'"]["r0"] == extra
            checked += 1
    assert checked > 5


def test_the_choice_of_a_solver_is_explained() -> None:
    problem = some_problem(0)
    solution = mp.solve(problem.loss, problem.cost, problem.limit)
    assert solution.solver == choose(problem).name
    assert "5 rows, 1 budget:" in solution.stats["why"]
    counted = mp.solve(problem.loss, problem.cost, problem.limit, rules=Rules(aligned=[Aligned([0, 1], [2], 2)]))
    assert (counted.solver, counted.stats["why"][:6]) == ("ilp", "counts")
    many = Problem(np.ones((30_000, 2)), np.ones((1, 30_000, 2)), np.full(1, 1e9))
    assert choose(many).settings["gap"] == 1e-6


@pytest.mark.parametrize(
    ("call", "code"),
    [
        (lambda: mp.solve([[1.0]], [[1.0, 2.0]], 1), "E212"),
        (lambda: mp.solve([[1.0, 2.0]], [[1.0, 2.0]], 2, goal="bytes", most_loss=1.0), "E212"),
        (lambda: mp.solve([[1.0, 2.0]], [[1.0, 2.0]], 2, goal="0"), "E212"),
        (lambda: mp.solve([[1.0, 2.0]], [[1.0, 2.0]], 2, most_loss=1.0), "E212"),
        (lambda: mp.solve([[1.0, 2.0]], [[1.0, 2.0]], 2, cautious=1.0), "E212"),
        (lambda: mp.solve([[1.0, 2.0]], [[1.0, 2.0]], 2, cautious=1.0, spread=[[1.0]]), "E212"),
        (lambda: mp.solve([[1.0, 2.0]], [[1.0, 2.0]], 2, cautious=-1.0, spread=[[1.0, 1.0]]), "E212"),
        (lambda: mp.solve([[1.0, 2.0]], [[1.0, 2.0]], 2, "ilpp"), "E107"),
        (lambda: mp.solve([[-math.inf, 2.0]], [[1.0, 2.0]], 2), "E212"),
    ],
)
def test_questions_that_make_no_sense(call: Callable[[], Solution], code: str) -> None:
    with pytest.raises(mp.MpsearchError) as caught:
        call()
    assert caught.value.code == code


LONG = "row,format,loss,spread,bytes\na,lo,3,0.1,1\na,hi,1,0.1,2\nb,lo,2,0.1,1\nb,hi,0.5,0.9,2\nc,hi,0,,4\n"


def test_long_and_wide_tables_are_one(tmp_path: Path) -> None:
    long, wide, costs = tmp_path / "long.csv", tmp_path / "wide.csv", tmp_path / "bytes.csv"
    long.write_text(LONG)
    wide.write_text("row,lo,hi\na,3,1\nb,2,0.5\nc,,0\n")
    costs.write_text("row,hi,lo\nc,4,\nb,2,1\na,2,1\n")
    one, two = read_tables(long), read_tables(wide, [costs])
    assert one.rows == two.rows == ("a", "b", "c")
    np.testing.assert_array_equal(one.loss, two.loss)
    np.testing.assert_array_equal(one.problem([]).cost, two.problem([]).cost)
    assert one.spread is not None
    assert math.isnan(one.spread[2, 1])
    assert one.problem(["bytes <= 50 %"]).limit.tolist() == [4.0]
    assert one.problem(["bytes <= 1 KiB", "bytes <= 7"]).limit.tolist() == [7.0]


def test_json_and_parquet_hold_the_same(tmp_path: Path) -> None:
    pyarrow = pytest.importorskip("pyarrow")
    parquet = pytest.importorskip("pyarrow.parquet")
    long = tmp_path / "long.csv"
    long.write_text(LONG)
    table = read_tables(long)
    records = [
        {"row": r, "format": f, "loss": table.loss[i, j], "bytes": table.costs["bytes"][i, j]}
        for i, r in enumerate(table.rows) for j, f in enumerate(table.formats) if np.isfinite(table.loss[i, j])
    ]  # fmt: skip
    (tmp_path / "records.json").write_text(json.dumps(records))
    matrices = {
        "rows": table.rows, "formats": table.formats, "loss": [[3, 1], [2, 0.5], [None, 0]],
        "cost": {"bytes": [[1, 2], [1, 2], [None, 4]]},
    }  # fmt: skip
    (tmp_path / "matrices.json").write_text(json.dumps(matrices))
    parquet.write_table(pyarrow.Table.from_pylist(records), tmp_path / "records.parquet")
    for name in ("records.json", "matrices.json", "records.parquet"):
        found = read_tables(tmp_path / name)
        assert found.rows == table.rows
        np.testing.assert_array_equal(found.loss, table.loss)
        np.testing.assert_array_equal(found.problem([]).cost, table.problem([]).cost)


@pytest.mark.parametrize(
    ("text", "words"),
    [
        ("", "no column 'row'"),
        ("row,format\na,lo\n", "there is no loss"),
        ("row,format,loss\na,lo,1\na,lo,2\n", "row 'a' has lo twice"),
        ("row,lo\na,1\na,2\n", "row 'a' is given twice"),
        ("row,lo\na,one\n", "column 'lo'"),
        ("row,lo\na,1,2\n", "line 2 has 3 cells, the first one 2"),
        ("row,lo,lo\na,1,2\n", "a column is given twice"),
        ("row,lo\na,-inf\n", "a loss is -inf"),
        ("row,format,loss,bytes\na,lo,1,\n", "1 cells have a loss and no bytes"),
    ],
)
def test_tables_that_are_none(tmp_path: Path, text: str, words: str, capsys: pytest.CaptureFixture[str]) -> None:
    table = tmp_path / "t.csv"
    table.write_text(text)
    assert run(["solve", "--table", str(table)]) == 3
    error = capsys.readouterr().err
    assert "E214" in error
    assert words in error
    assert "Traceback" not in error


def test_a_table_is_solved_from_the_shell(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    table, out, rules = tmp_path / "t.csv", tmp_path / "choice.csv", tmp_path / "rules.toml"
    table.write_text(LONG)
    assert run(["solve", "--table", str(table), "-b", "bytes <= 7", "--out", str(out)]) == 0
    shown = capsys.readouterr().out
    assert "proven" in shown
    assert "in doubt    1 of 3 choices" in shown
    assert out.read_text().splitlines()[1:] == ["a,hi,1.0,2.0", "b,lo,2.0,1.0", "c,hi,0.0,4.0"]
    rules.write_text('pins = {b = "hi"}\n[[families]]\nrows = ["a", "b"]\nresource = "bytes"\nlimit = 3\n')
    assert run(["solve", "--table", str(table), "-b", "bytes <= 9", "--rules", str(rules), "--json"]) == 0
    assert json.loads(capsys.readouterr().out)["choice"] == {"a": "lo", "b": "hi", "c": "hi"}
    assert run(["solve", "--table", str(table), "--goal", "bytes", "--most-loss", "4.0", "--json"]) == 0
    assert json.loads(capsys.readouterr().out)["loss"] == 7.0


def test_a_table_that_cannot_be_met_says_what_can(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    table, rules = tmp_path / "t.csv", tmp_path / "rules.toml"
    table.write_text(LONG)
    rules.write_text('pins = {b = "hi"}\n')
    assert run(["solve", "--table", str(table), "-b", "bytes <= 6", "--rules", str(rules)]) == 4
    error = capsys.readouterr().err
    assert "bytes can be as small as 7 alone" in error
    assert "the rule for 'b' adds 1 of bytes" in error
    rules.write_text("pin = 1\n")
    assert run(["solve", "--table", str(table), "--rules", str(rules)]) == 3
    assert "did you mean 'pins'" in capsys.readouterr().err
    assert run(["solve"]) == 2
    assert run(["solve", "x", "--table", str(table)]) == 2


# --- fractions, negative losses, and other numbers that sums round


def fractional(seed: int) -> Problem:
    """Costs with two decimals, limits that tied rows can meet exactly."""
    generator = np.random.default_rng(seed)
    loss = generator.normal(0, 3, (ROWS, FORMATS))
    cost = generator.integers(1, 300, (1, ROWS, FORMATS)) / 100
    choice = generator.integers(0, FORMATS, ROWS)
    limit = math.fsum(cost[0, np.arange(ROWS), choice].tolist())
    return Problem(loss, cost, np.array([limit]), tuple("abcde"), ("lo", "mid", "hi"), ("r0",))


def test_ties_of_fractions_keep_the_budget_and_miss_nothing() -> None:
    ties, proven = Rules(ties=[["a", "b", "c"], ["d", "e"]]), 0
    for seed in range(150):
        problem = fractional(seed)
        expected = best(problem, lambda c, p: c[0] == c[1] == c[2] and c[3] == c[4])
        solution = solve_problem(problem, rules=ties)
        if math.isinf(expected):
            assert solution.status == "infeasible", seed
            continue
        assert problem.fits(solution.choice), seed
        assert solution.bound <= expected + 1e-12 * abs(expected) <= solution.loss + 2e-12 * abs(expected), seed
        # Where a plan passes the limit by less than a float can tell, there may be no proof, and none is claimed.
        if solution.status == "optimal":
            proven += 1
            assert solution.loss == pytest.approx(expected, rel=1e-12), seed
    assert proven > 100
    tenths = Problem(np.array([[1.0, 0.0]] * 10), np.array([[[0.05, 0.1]] * 10]), np.array([1.0]))
    solution = solve_problem(tenths, rules=Rules(ties=[range(10)]))
    assert tenths.fits(solution.choice)
    halves = Problem(np.array([[1.0]] * 2), np.array([[[0.5]] * 2]), np.array([1.0]))
    assert solve_problem(halves, rules=Rules(ties=[[0, 1]])).status == "optimal"


def test_the_worst_of_tied_rows_is_a_row() -> None:
    problem = Problem(np.array([[3.0, 1.0], [3.0, 1.0], [5.0, 4.5]]), np.array([[[1.0, 2.0]] * 3]), np.array([5.0]))
    found = solve_problem(problem, rules=Rules(ties=[[0, 1]]), goal="worst")
    assert found.stats["worst"] == 4.5
    assert found.choice.tolist()[2] == 1


def test_independent_errors_of_losses_below_zero_are_proven_and_priced() -> None:
    for seed in range(40):
        base = some_problem(seed)
        problem = Problem(base.loss - 40.0, base.cost, base.limit)
        spread = np.random.default_rng(seed).uniform(0.1, 6, base.loss.shape)
        solve = solver_for("ilp", {})
        found = cautious(problem, spread, solve, by=1.645, errors="independent")
        assert found.status == "optimal", seed
        assert found.stats["solves"] < 40
        double = Problem(1000 * problem.loss, base.cost, base.limit)
        scaled = cautious(double, 1000 * spread, solve, by=1.645, errors="independent")
        assert scaled.loss == pytest.approx(1000 * found.loss)
        assert scaled.prices == pytest.approx([1000 * price for price in found.prices], rel=1e-6)


def test_prices_at_the_smallest_budget_are_what_more_would_save() -> None:
    loss = [[3.0, 1.0, 0.2], [2.0, 0.5, 0.1], [4.0, 3.0, 0.3]]
    cost = [[[1, 2, 4], [1, 2, 4], [2, 4, 8]]]
    for solver in ("auto", "ilp", "lagrangian"):
        at_least = mp.solve(loss, cost, [4], solver)
        assert at_least.prices[0] == pytest.approx(at_least.loss - mp.solve(loss, cost, [5]).loss)


def test_many_equal_moves_do_not_stop_the_default_solver() -> None:
    size = np.random.default_rng(3).integers(100, 900, (300, 1)).astype(float)
    cost = size * np.array([2.0, 3.0, 4.0, 8.0])
    found = mp.solve(20_000 - cost, cost[None], cost.mean() * 300 // 1 + 0.5, time_limit=5.0)
    other = mp.solve(20_000 - cost, cost[None], cost.mean() * 300 // 1 + 0.5, "lagrangian")
    assert found.status == "optimal"
    assert found.loss <= other.loss


def test_doubts_look_at_what_rules_allow_and_at_pairs() -> None:
    problem = Problem(np.array([[1.0, 1.1], [2.0, 2.1]]), np.zeros((1, 2, 2)), np.array([1.0]))
    spread = np.full((2, 2), 0.3)
    rules = Rules(pins={"0": "0"})
    solution = solve_problem(problem, rules=rules)
    assert [doubt.row for doubt in mp.doubts(problem, solution, spread, rules=rules)] == ["1"]
    tied = Rules(ties=[["0", "1"]])
    assert len(mp.doubts(problem, solve_problem(problem, rules=tied), spread, rules=tied)) == 1
    pairs = PairTerms([0], [1], [1], [0], [50.0])
    joined = Problem(problem.loss, problem.cost, problem.limit, pairs=pairs)
    found = mp.doubts(joined, solve_problem(joined), spread)
    assert [doubt.row for doubt in found] == ["1"], "the first row would meet the pair"


@pytest.mark.parametrize(
    "values",
    [
        {"at_most": {"hi": "two"}},
        {"at_most": {"hi": -1}},
        {"at_least": {"r0": math.nan}},
        {"families": [{"rows": ["a"], "resource": "r0", "limit": "3 B"}]},
        {"families": [{"rows": ["a"], "resource": "r0"}]},
        {"families": [{"rows": "a*", "resource": "r0", "limit": 3}]},
        {"balances": [{"rows": ["a"], "up": ["hi"], "down": ["hi"]}]},
        {"peaks": [{"steps": [["a"]], "resource": "r0", "limit": "x"}]},
        {"aligned": [{"rows": ["a"], "formats": ["hi"], "multiple": 0}]},
        {"pins": {"a": ["hi"]}},
        {"bars": {"a": "hi"}},
        {"ties": 3},
        {"ties": ["ab"]},
        [1],
    ],
)
def test_rules_of_the_wrong_kind_say_what_is_expected(values: Any) -> None:
    with pytest.raises(mp.InputError, match="E213") as caught:
        Rules.of(values)
    assert "expected" in str(caught.value) or "needs" in str(caught.value) or "missing" in str(caught.value)


@pytest.mark.parametrize(
    "options",
    [
        ["--set", "time_limit=x", "--solver", "ilp"],
        ["--set", "time_limit=NaN", "--solver", "ilp"],
        ["--set", "buckets=2.5", "--solver", "dp"],
        ["--set", "seed=abc", "--solver", "random"],
        ["--goal", "foo"],
        ["--out", "/nowhere/x.csv"],
        ["--out", "t.csv"],
        ["--out", "x.txt"],
        ["-b", "bytes <= 1.2.3"],
        ["-b", "bytes <= 1 bit"],
    ],
)
def test_mistakes_at_the_shell_are_one_plain_error(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str], options: list[str]
) -> None:
    monkeypatch.chdir(tmp_path)
    Path("t.csv").write_text(LONG)
    assert run(["solve", "--table", "t.csv", *options]) in (2, 3)
    shown = capsys.readouterr()
    assert shown.err.startswith("error[E")
    assert "Traceback" not in shown.err
    assert shown.out == ""
    assert Path("t.csv").read_text() == LONG


def test_solvers_and_searchers_are_listed(capsys: pytest.CaptureFixture[str]) -> None:
    assert run(["solvers"]) == 0
    shown = capsys.readouterr().out
    assert run(["solvers", "--json"]) == 0
    rows = json.loads(capsys.readouterr().out)
    assert {row["name"] for row in rows} >= {"mckp", "ilp", "lagrangian", "quadratic", "refine", "evolve", "optuna"}
    for row in rows:
        assert row["name"] in shown
        assert row["takes"]
        assert row["proves"]
        assert row["cost"]
