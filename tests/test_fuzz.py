"""Files, command lines and tables that are nearly right: read, or refused with a code, and never anything else."""

from __future__ import annotations

import json
import math
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from benchmarks import fuzz_solve
from benchmarks.fuzz import KINDS, LARGE, attempt, check_for, fuzz, limited
from benchmarks.fuzz_inputs import NASTY, corpus, plan, toml
from mpsearch.budget import Budget
from mpsearch.cli.own_tables import read_settings
from mpsearch.errors import InputError, MpsearchError
from mpsearch.keys import content_key
from mpsearch.model.checkpoint import read_header
from mpsearch.plan import BitPlan

COUNTS = {"study": 300, "header": 300, "table": 200, "argv": 25, "calibration": 150}


@pytest.mark.parametrize("kind", KINDS)
def test_changed_inputs_are_read_or_refused(kind: str) -> None:
    found, faults, grown = fuzz(kind, COUNTS[kind], seed=11)
    assert faults == []
    assert found["accepted"] > 0
    assert found["refused"] > 0 or kind == "argv"
    assert grown < LARGE


@pytest.mark.parametrize("name", corpus())
def test_what_is_changed_is_read_as_it_stands(name: str, tmp_path: Path) -> None:
    for own, content in corpus().items():
        (tmp_path / own).write_bytes(content)
    check_for(name)(tmp_path / name)


def test_a_fault_is_counted(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    def broken(path: Path) -> None:
        raise KeyError("dtype")

    monkeypatch.setattr("benchmarks.fuzz.check_for", lambda name: broken)
    assert "KeyError" in attempt("study", 0, 0, corpus(), tmp_path)


def test_a_hang_is_ended() -> None:
    # In a process of its own: the test runner has an alarm of its own.
    code = "import time; from benchmarks.fuzz import limited\nwith limited(1): time.sleep(30)"
    root = Path(__file__).parents[1]
    done = subprocess.run(
        [sys.executable, "-c", code], capture_output=True, text=True, cwd=root, timeout=25, check=False
    )
    assert done.stderr.strip().endswith("HangError: more than 1 s")


# --- trees of values, drawn

VALUES: Any = st.recursive(
    st.none() | st.booleans() | st.integers() | st.floats() | st.text(max_size=20) | st.sampled_from(NASTY),
    lambda inner: st.lists(inner, max_size=3) | st.dictionaries(st.text(max_size=8), inner, max_size=3),
    max_leaves=8,
)
QUICK = settings(max_examples=120, deadline=None, suppress_health_check=list(HealthCheck), derandomize=True)


def outcome(name: str, content: bytes, folder: Path) -> str:
    (folder / name).write_bytes(content)
    try:
        check_for(name)(folder / name)
        return "accepted"
    except MpsearchError as error:
        return error.code


@QUICK
@given(st.sampled_from(["name", "model", "formats", "budgets", "pins", "rules", "tokens", "ties", "estimator", "kv",
                        "cautious", "protect", "engine", "target", "out", "x"]), VALUES)  # fmt: skip
def test_any_value_of_any_key_of_a_study(tmp_path_factory: pytest.TempPathFactory, key: str, value: Any) -> None:
    tree = {"model": "bundled:tiny-llama", "calibration": "stdlib:calibration", key: value}
    text = toml(tree).encode("utf-8", "surrogatepass")
    assert outcome("study.toml", text, tmp_path_factory.getbasetemp())


@QUICK
@given(st.sampled_from(["schema_version", "model", "tensors", "kept", "predicted", "source", "x"]), VALUES)
def test_any_value_of_any_field_of_a_plan(tmp_path_factory: pytest.TempPathFactory, key: str, value: Any) -> None:
    body = {**plan().to_json(), key: value}
    del body["digest"]
    try:
        body["digest"] = content_key(body)
    except ValueError:
        body["digest"] = ""
    content = json.dumps(body).encode()
    assert outcome("plan.json", content, tmp_path_factory.getbasetemp())


@QUICK
@given(st.dictionaries(st.text(max_size=5), VALUES | st.fixed_dictionaries(
    {"dtype": st.sampled_from(["F32", "BF16", "X"]) | VALUES, "shape": st.lists(st.integers(0, 9), max_size=3) | VALUES,
     "data_offsets": st.lists(st.integers(0, 64), max_size=3) | VALUES}
), max_size=3))  # fmt: skip
def test_any_header_of_tensors(tmp_path_factory: pytest.TempPathFactory, header: dict[str, Any]) -> None:
    text = json.dumps(header).encode()
    content = len(text).to_bytes(8, "little") + text + bytes(64)
    assert outcome("model.safetensors", content, tmp_path_factory.getbasetemp())


# --- faults that were found so, each by itself


@pytest.mark.parametrize("amount", ["1e99999999", "1e-99999999", "9" * 400, "1/0"])
def test_an_amount_of_a_hundred_million_digits_is_refused_at_once(amount: str) -> None:
    with limited(2), pytest.raises(InputError) as caught:
        Budget.parse(f"weights <= {amount} bits")
    assert caught.value.code == "E111"


def test_a_long_amount_is_kept_exactly() -> None:
    assert Budget.parse("weights <= 1e3 B").amount == 1000
    assert math.isclose(Budget.parse("weights <= 1e-3 bits").amount, 1e-3)


@pytest.mark.parametrize("entry", [
    {}, {"dtype": "F32"}, 3, None, {"dtype": "F32", "shape": [-2], "data_offsets": [0, 8]},
    {"dtype": "F32", "shape": ["2"], "data_offsets": [0, 8]}, {"dtype": "F32", "shape": [2], "data_offsets": [8, 0]},
    {"dtype": ["F32"], "shape": [2], "data_offsets": [0, 8]}, {"dtype": "F32", "shape": [2], "data_offsets": [0, 8, 9]},
    {"dtype": "F32", "shape": [True, 2], "data_offsets": [0, 8]},
    {"dtype": "F32", "shape": [2.0], "data_offsets": [0, 8]},
])  # fmt: skip
def test_a_header_that_is_none_is_refused(entry: Any, tmp_path: Path) -> None:
    text = json.dumps({"a": entry}).encode()
    file = tmp_path / "model.safetensors"
    file.write_bytes(len(text).to_bytes(8, "little") + text + bytes(8))
    with pytest.raises(InputError) as caught:
        read_header(file)
    assert caught.value.code == "E405"


@pytest.mark.parametrize(
    ("place", "value"),
    [
        (("tensors", 0, "shape"), [8, 0]),
        (("tensors", 0, "shape"), [8, 2.5]),
        (("tensors", 0, "shape"), "64"),
        (("tensors", 0, "out_axis"), 2),
        (("tensors", 0, "out_axis"), -1),
        (("tensors", 0, "macs"), 2**64),
        (("predicted",), []),
        (("predicted", "loss"), "0.1"),
        (("predicted", "cost"), {"weights": None}),
        (("predicted", "cost"), {"weights": 10**400}),
        (("model", "name"), "\ud800"),
    ],
)
def test_a_plan_of_impossible_values_is_refused(place: tuple[Any, ...], value: Any) -> None:
    body: Any = json.loads(json.dumps(plan().to_json()))
    node = body
    for key in place[:-1]:
        node = node[key]
    node[place[-1]] = value
    del body["digest"]
    try:
        body["digest"] = content_key(body)
    except ValueError:
        body["digest"] = "none"
    with pytest.raises(InputError) as caught:
        BitPlan.from_json(body)
    assert caught.value.code == "E304"


@pytest.mark.parametrize("value", ["9" * 5000, "[" * 5000])
def test_a_setting_that_is_no_json_stays_text(value: str) -> None:
    assert read_settings([f"x={value}"]) == {"x": value}


# --- tables, solved


def test_random_tables_are_solved_or_refused() -> None:
    ended = [fuzz_solve.attempt(seed) for seed in range(250)]
    assert [text for text in ended if "\n" in text] == []
    assert {"optimal", "infeasible", "E212"} <= set(ended)


def test_the_checker_sees_a_wrong_answer(monkeypatch: pytest.MonkeyPatch) -> None:
    import numpy as np

    import mpsearch as mp
    from mpsearch.problem import Solution

    given_table = fuzz_solve.Table([[3.0, 1.0], [2.0, 0.5]], [[[1, 2], [1, 2]]], [4.0])
    solution = mp.solve(*given_table)
    assert fuzz_solve.solved(given_table)[0] == "optimal"

    def wrong(*arguments: Any) -> Solution:
        import dataclasses

        return dataclasses.replace(solution, choice=np.array([0, 1]))

    monkeypatch.setattr(mp, "solve", wrong)
    with pytest.raises(AssertionError, match="called optimal"):
        fuzz_solve.solved(given_table)
