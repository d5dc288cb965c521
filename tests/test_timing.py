"""Clocks, the process that times kernels, and what it keeps: workloads, profiles, corrections, tables of others."""

from __future__ import annotations

import csv
import json
import math
import time
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from mpsearch.budget import Budget
from mpsearch.errors import InputError, UsageError
from mpsearch.format import Format
from mpsearch.hardware import child
from mpsearch.hardware.bench import Bench
from mpsearch.hardware.clock import Clock, Timing, bootstrap, reading_seconds
from mpsearch.hardware.identity import check_same, cores, identity
from mpsearch.hardware.kernel import Kernel, KernelTime
from mpsearch.hardware.latency_table import read_profile
from mpsearch.hardware.profile import Correction, Profile, Whole
from mpsearch.hardware.profiling import Timekeeper, stream_bytes
from mpsearch.hardware.requests import parse_engine
from mpsearch.layer import Layer
from mpsearch.registry import make
from mpsearch.workload import CONDITIONS, Step, Workload, canonical

FC = Kernel("linear", 64, 128, "int4-g64", 1)


def busy(seconds: float) -> None:
    end = time.perf_counter() + seconds
    while time.perf_counter() < end:
        pass


# --- the clock


def test_a_known_time_is_within_its_interval() -> None:
    timing = Clock(limit=0.5).time(lambda: busy(0.002))
    assert 0.002 <= timing.low <= timing.seconds <= timing.high
    # What else runs on the machine can only lengthen it.
    assert timing.seconds < 0.2
    assert timing.samples >= 2


def test_short_calls_are_gathered_so_that_the_clock_is_under_one_percent() -> None:
    timing = Clock(limit=0.2).time(lambda: None)
    assert timing.calls * timing.seconds >= 100 * reading_seconds()
    assert timing.calls > 1


def test_a_long_call_is_timed_no_longer_than_it_must() -> None:
    start = time.perf_counter()
    timing = Clock(limit=0.1, warmup=0.01).time(lambda: busy(0.1))
    assert timing.samples >= 2
    assert time.perf_counter() - start < 20.0


def test_waiting_is_not_working_and_is_seen() -> None:
    timing = Clock(limit=0.3).time(lambda: time.sleep(0.003))
    assert timing.disturbed > 0.9
    assert "something else had the processor" in timing.noise


def test_a_device_is_timed_by_its_own_clock() -> None:
    ran = []

    def watch(work: Any) -> float:
        work()
        ran.append(1)
        return 0.25

    timing = Clock(limit=0.05, stopwatch=watch).time(lambda: time.sleep(0.001))
    assert timing.seconds == 0.25  # whatever the wall says
    assert timing.disturbed == 0.0
    assert len(ran) >= timing.samples


def test_what_changes_while_it_is_timed_is_seen() -> None:
    assert "the last samples were +50 % off" in Timing(1.0, 0.99, 1.01, 40, 1, 0.0, 0.5).noise
    assert "interval is 30 % wide" in Timing(1.0, 0.9, 1.2, 40, 1, 0.0, 0.0).noise
    assert not Timing(1.0, 0.99, 1.01, 40, 1, 0.1, 0.01).noise


def test_the_interval_covers_the_median_as_often_as_it_says() -> None:
    covered = 0
    for seed in range(300):
        samples = np.random.default_rng(seed).lognormal(0.0, 0.3, 25)
        low, high = bootstrap(samples)
        assert low <= np.median(samples) <= high
        covered += low <= 1.0 <= high
    assert 0.88 <= covered / 300 <= 0.99


# --- the process that times


@pytest.fixture
def hostile(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """An installed engine whose kernels end badly, each in its own way."""
    (tmp_path / "hostile_engine.py").write_text(
        """
import os, signal, time
class Hostile:
    name, extra, device, fuses, cache_bits = "hostile", "", "cpu", False, 16
    def missing(self): return ""
    def versions(self): return {"hostile": "1.0"}
    def refuses(self, kernel): return "no such thing" if kernel.rows == 1 else ""
    def bytes(self, kernel): return 8
    def stopwatch(self): return None
    def load(self, kernel, copies, threads):
        from mpsearch.hardware.kernel import Loaded
        print("chatter on stdout", flush=True)
        if kernel.rows == 2: os.kill(os.getpid(), signal.SIGSEGV)
        if kernel.rows == 3: time.sleep(60)
        if kernel.rows == 4: raise RuntimeError("shape not supported")
        if kernel.rows == 5: os.write(2, b"the last words\\n"); os._exit(3)
        return Loaded(lambda: sum(range(200)), copies)
""",
        encoding="utf-8",
    )
    info = tmp_path / "hostile_engine-1.0.dist-info"
    info.mkdir()
    (info / "METADATA").write_text("Metadata-Version: 2.1\nName: hostile-engine\nVersion: 1.0\n", encoding="utf-8")
    (info / "entry_points.txt").write_text("[mpsearch.engines]\nhostile = hostile_engine:Hostile\n", encoding="utf-8")
    monkeypatch.setenv("PYTHONPATH", str(tmp_path))
    monkeypatch.syspath_prepend(str(tmp_path))


def test_a_kernel_that_ends_badly_costs_its_cell_alone(hostile: None) -> None:
    with Bench("hostile", clock=Clock(limit=0.05), patience=10.0) as bench:
        found = {rows: bench.time(Kernel("linear", rows, 8, "fp32", 1)) for rows in (1, 2, 9, 4, 5, 10)}
        bench.patience = 1.0
        found[3] = bench.time(Kernel("linear", 3, 8, "fp32", 1))
        bench.patience = 10.0
        found[11] = bench.time(Kernel("linear", 11, 8, "fp32", 1))
    assert [found[rows].status for rows in (1, 2, 3, 4, 5)] == ["refused", "crashed", "timeout", "failed", "crashed"]
    assert found[2].reason == "killed by SIGSEGV"
    assert found[3].reason == "no answer within 1.5 s"
    assert found[4].reason == "RuntimeError: shape not supported"
    assert found[5].reason == "ended with exit code 3: the last words"
    assert all(math.isnan(found[rows].seconds) for rows in (1, 2, 3, 4, 5))
    # Each time a new process goes on where the old one died.
    assert [found[rows].status for rows in (9, 10, 11)] == ["ok", "ok", "ok"]
    assert all(0 < found[rows].seconds < 1 for rows in (9, 10, 11))


def test_a_profile_goes_on_past_kernels_that_end_badly(hostile: None) -> None:
    layers = [Layer("bad", "linear", (4, 8)), Layer("good", "linear", (9, 8))]
    keeper = Timekeeper(clock=Clock(limit=0.05))
    profile, notices = keeper.profile("hostile", {}, layers, [Format.parse("fp32")], [Step(1)])
    assert [time.status for time in profile.times] == ["failed", "ok"]
    assert any(notice.code == "W433" and "shape not supported" in notice.message for notice in notices)


def test_times_are_taken_once_and_kept(hostile: None) -> None:
    kept: dict[str, dict[str, object]] = {}
    layers = [Layer("fc", "linear", (9, 8)), Layer("other", "linear", (9, 8)), Layer("third", "linear", (10, 8))]
    keeper = Timekeeper(clock=Clock(limit=0.05), known=kept.get, keep=lambda key, body: kept.update({key: dict(body)}))
    first, _ = keeper.profile("hostile", {}, layers, [Format.parse("fp32")], [Step(1), Step(1, 64)])
    assert len(kept) == len(first.times) == 2  # one for each distinct shape, whatever the context
    again, _ = keeper.profile("hostile", {}, layers, [Format.parse("fp32")], [Step(1)])
    # What else the machine did is said of a profile, not of the times that were kept.
    assert [(x.kernel, x.seconds, x.low, x.high) for x in again.times] == [
        (x.kernel, x.seconds, x.low, x.high) for x in first.times
    ]
    other = Timekeeper(clock=Clock(limit=0.06), known=kept.get, keep=keeper.keep)
    other.profile("hostile", {}, layers, [Format.parse("fp32")], [Step(1)])
    assert len(kept) == 4  # timed in another way is another value


def test_more_threads_than_processors_are_refused() -> None:
    with pytest.raises(InputError, match="E435") as caught:
        Timekeeper(threads=cores() + 1).profile("onnxruntime", {}, [Layer("fc", "linear", (8, 64))], [], [Step(1)])
    assert f"may use {cores()} processors" in str(caught.value)


def test_an_engine_that_is_not_installed_says_what_to_install(monkeypatch: pytest.MonkeyPatch) -> None:
    from mpsearch.hardware.engines import packages

    monkeypatch.setattr(packages, "version", lambda name: (_ for _ in ()).throw(packages.PackageNotFoundError(name)))
    with pytest.raises(InputError, match="E432") as caught:
        Timekeeper().profile("onnxruntime", {}, [Layer("fc", "linear", (8, 64))], [Format.parse("fp32")], [Step(1)])
    assert "onnx and onnxruntime are not installed" in str(caught.value)
    assert "mpsearch[onnx]" in caught.value.advice


def test_a_layer_without_any_kernel_is_named() -> None:
    with pytest.raises(InputError, match="E431") as caught:
        Timekeeper().profile(
            "onnxruntime", {}, [Layer("a.fc", "linear", (8, 64))], [Format.parse("int3-g64")], [Step(1)]
        )
    assert "'a.fc'" in str(caught.value)
    assert "not 3" in caught.value.because


def test_a_stream_is_as_long_as_the_model_in_that_format() -> None:
    engine = make("engines", "onnxruntime")
    layers = [Layer(f"l{i}", "linear", (4096, 4096)) for i in range(4)]
    four, eight = (stream_bytes(layers, Format.parse(f"int{bits}-g128"), engine) for bits in (4, 8))
    assert four == 2**25  # 4 x 8.5 MiB, to the next power of two
    assert eight == 2 * four
    assert stream_bytes(layers * 40, Format.parse("fp32"), engine) == 2**28


def test_weights_are_gone_through_before_one_comes_round_again(monkeypatch: pytest.MonkeyPatch) -> None:
    asked = []

    class Spy:
        def __getattr__(self, name: str) -> object:
            return getattr(make("engines", "onnxruntime"), name)

        def load(self, kernel: Kernel, copies: int, threads: int) -> object:
            asked.append(copies)
            return make("engines", "onnxruntime").load(kernel, copies, threads)

    size = make("engines", "onnxruntime").bytes(FC)
    child.time_kernel(Spy(), FC, stream=5 * size - 1, clock=Clock(limit=0.02))  # type: ignore[arg-type]
    child.time_kernel(Spy(), FC, clock=Clock(limit=0.02))  # type: ignore[arg-type]
    many = Kernel("linear", 64, 128, "int4-g64", 128)
    child.time_kernel(Spy(), many, stream=5 * size - 1, clock=Clock(limit=0.02))  # type: ignore[arg-type]
    assert asked == [5, 1, 1, 5]


def test_copies_differ_for_equal_ones_would_be_kept_once() -> None:
    import onnx

    from mpsearch.hardware.engines.onnxruntime import _model_of

    for kind, fmt in (
        ("linear", "int4-g64"),
        ("linear", "bf16"),
        ("linear", "int8-channel@int8-tensor-asym"),
        ("embedding", "int8-g64"),
        ("embedding", "bf16"),
    ):
        text, arrays = _model_of(Kernel(kind, 64, 128, fmt, 2), 300)
        held = [array.tobytes() for name, array in arrays.items() if name.endswith((".codes", ".weight"))]
        assert {x.name for x in onnx.load_model_from_string(text).graph.initializer} >= set(arrays)
        assert len(held) == len(set(held)) == 300
        assert len({len(data) for data in held}) == 1


# --- which machine


def test_a_machine_is_described_by_what_decides_its_speed() -> None:
    found = identity(2, {"engine": "1.2"})
    assert {"processor", "features", "caches", "frequency", "memory", "gpu", "driver"} <= set(found)
    assert found["threads"] == "2"
    assert found["version engine"] == "1.2"
    assert all(isinstance(text, str) and text for text in found.values())
    check_same(found, dict(found), "it")
    with pytest.raises(InputError, match="E430") as caught:
        check_same({**found, "processor": "another"}, found, "the profile")
    assert "processor was 'another'" in caught.value.because


# --- workloads and the budgets that name them


@pytest.mark.parametrize(
    ("text", "shown", "limit"),
    [
        ("tpot<=14ms at context 2048", "tpot <= 14 ms at context 2048", 0.014),
        ("tpot <= 900 us", "tpot <= 900 us at context 512", 0.0009),
        ("ttft <= 0.18 s at prompt 128, batch 2", "ttft <= 0.18 s at prompt 128, batch 2", 0.18),
        ("latency <= 2 s at prompt 64, output 8", "latency <= 2 s at prompt 64, output 8", 2.0),
        (
            "latency <= 2 s at 0.25 x prompt 64,output 8 + 0.75 x prompt 8, output 64",
            "latency <= 2 s at 0.25 x prompt 64, output 8 + 0.75 x prompt 8, output 64",
            2.0,
        ),
    ],
)
def test_budgets_of_time_read_back(text: str, shown: str, limit: float) -> None:
    budget = Budget.parse(text)
    assert str(budget) == shown
    assert Budget.parse(shown) == budget
    assert float(budget.amount * budget.scale) == limit


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("tpot <= 14 ms at prompt 5", "'at prompt 5' is not a condition"),
        ("tpot <= 14 MiB", "unit 'MiB' does not fit 'tpot'"),
        ("memory <= 8 GiB", "does not say at what context"),
        ("latency <= 2 s at prompt 64", "does not say at what output"),
        ("latency <= 2 s at 0.5 x prompt 64, output 8 + 0.6 x prompt 8, output 64", "add up to 1.1"),
        ("ttft <= 1 s at prompt 64 + prompt 128", "only latency has mixes"),
        ("weights <= 4 bits at context 8", "'weights' has no condition"),
        ("ttft <= 1 s at prompt 64, prompt 64", "is not a condition"),
    ],
)
def test_budgets_of_time_that_make_no_sense(text: str, message: str) -> None:
    with pytest.raises(InputError, match=message) as caught:
        Budget.parse(text)
    assert caught.value.code in ("E111", "E112")


def test_a_request_is_a_prefill_and_its_later_tokens() -> None:
    found = Workload.parse("latency", "at prompt 100, output 11, batch 3")
    assert found.steps == ((1.0, Step(100, 0, 3)), (10.0, Step(1, 105, 3)))
    assert [step.rows for _, step in found.steps] == [300, 3]
    assert Workload.parse("latency", "at prompt 100, output 1").steps == ((1.0, Step(100)),)
    mix = Workload.parse("latency", "at 0.5 x prompt 8, output 3 + 0.5 x prompt 8, output 5")
    assert mix.steps == ((1.0, Step(8)), (1.0, Step(1, 9)), (2.0, Step(1, 10)))


@given(st.sampled_from(sorted(CONDITIONS)), st.integers(1, 10**6), st.integers(1, 64), st.integers(1, 4096))
@settings(max_examples=60, deadline=None)
def test_conditions_read_back_as_they_print(resource: str, first: int, batch: int, output: int) -> None:
    name = next(iter(CONDITIONS[resource]))
    text = f"{name} {first}, batch {batch}" + (f", output {output}" if resource == "latency" else "")
    shown = canonical(resource, text)
    assert canonical(resource, shown.removeprefix("at ")) == shown
    assert str(first) in shown


# --- profiles


def runs(*pairs: tuple[float, float]) -> list[Whole]:
    return [Whole(Step(1), f"{i}", table, seconds, seconds, seconds) for i, (table, seconds) in enumerate(pairs)]


def test_corrections_are_exact_where_they_can_be() -> None:
    assert Correction.fit([]) == Correction()
    one = Correction.fit(runs((1.0, 1.5)))
    assert (one.intercept, one.slope, one.runs) == (0.5, 1.0, 1)
    assert math.isnan(one.residual)
    line = Correction.fit(runs((1.0, 3.0), (2.0, 5.0), (4.0, 9.0)))
    assert (line.intercept, line.slope) == pytest.approx((1.0, 2.0))
    assert line.residual == pytest.approx(0.0, abs=1e-12)
    flat = Correction.fit(runs((1.0, 1.4), (1.0, 1.6)))
    assert flat.slope == 1.0
    steep = Correction.fit(runs((1.0, 1.0), (2.0, 3.0), (3.0, 5.0)))
    assert steep.intercept == 0.0  # nothing takes less than no time
    assert 1.0 < steep.slope < 5.0 / 3.0
    noise = Correction.fit(runs((1.0, 2.0), (2.0, 1.0)))
    assert noise.slope == 1.0  # a longer sum that ran faster is noise, not a law


def test_a_profile_keeps_what_it_knows(tmp_path: Path) -> None:
    times = (KernelTime(FC, 1e-6, 0.9e-6, 1.2e-6, 9), KernelTime(Kernel("linear", 2, 2, "fp32", 1), status="crashed"))
    profile = Profile("onnxruntime", {}, {"processor": "x"}, times, tuple(runs((1.0, 2.0))))
    profile.save(tmp_path / "profile.json")
    again = read_profile(tmp_path / "profile.json")
    assert again.to_json() == profile.to_json()
    assert again.key == profile.key
    assert again.time(FC) == times[0]
    assert again.time(Kernel("linear", 9, 9, "fp32", 1)) is None
    assert again.correction(Step(1)).intercept == 1.0
    assert again.correction(Step(2)) == Correction()


# --- tables of others


def write(path: Path, rows: list[dict[str, object]]) -> Path:
    with path.open("w", encoding="utf-8", newline="") as file:
        writer = csv.DictWriter(file, list(rows[0]))
        writer.writeheader()
        writer.writerows(rows)
    return path


def test_tables_of_others_are_read_in_their_unit(tmp_path: Path) -> None:
    row = {"rows": 64, "columns": 128, "format": "int4-g64-mse", "tokens": 1}
    plain = read_profile(write(tmp_path / "a.csv", [{**row, "us": 12.5}]))
    assert plain.time(FC) == KernelTime(FC, 12.5e-6, 12.5e-6, 12.5e-6, 1)
    (tmp_path / "a.json").write_text(json.dumps({"fused": True, "rows": [{**row, "ms": 0.0125}]}), encoding="utf-8")
    fused = read_profile(tmp_path / "a.json")
    assert fused.made.fuses
    assert fused.time(FC).seconds == pytest.approx(12.5e-6)  # type: ignore[union-attr]
    named = read_profile(write(tmp_path / "b.csv", [{"layer": "qkv", "format": "fp32", "tokens": 1, "seconds": 0.5}]))
    assert named.layers["qkv", "fp32", 1].seconds == 0.5
    import pyarrow
    from pyarrow import parquet

    parquet.write_table(pyarrow.Table.from_pylist([{**row, "ns": 12500.0}]), tmp_path / "a.parquet")
    assert read_profile(tmp_path / "a.parquet").time(FC).seconds == pytest.approx(12.5e-6)  # type: ignore[union-attr]


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"us": ""}, "no time"),
        ({"us": "-3"}, "no time above 0"),
        ({"us": "fast"}, "no time above 0"),
        ({"us": "4e12"}, "is the unit of the column right"),
        ({"us": "1e-9"}, "is the unit of the column right"),
        ({"tokens": "1.5"}, "tokens is '1.5', no whole number"),
        ({"rows": ""}, "rows is '', no whole number"),
        ({"format": "int99"}, "int99"),
        ({"format": ""}, "no format"),
        ({"low": "20"}, "outside of its interval"),
        ({"millis": "3"}, "no column 'millis'"),
        ({"ms": "3"}, "times in ms and us"),
        ({"Time": "3"}, "a column 'Time' has no unit"),
    ],
)
def test_tables_that_make_no_sense_are_refused_by_row(tmp_path: Path, change: dict[str, str], message: str) -> None:
    row = {"rows": 64, "columns": 128, "format": "int4-g64", "tokens": 1, "us": 12.5, **change}
    with pytest.raises(InputError, match=r"E433|E110|E109") as caught:
        read_profile(write(tmp_path / "bad.csv", [row]))  # type: ignore[list-item]
    assert message in str(caught.value)


def test_files_that_are_no_tables_are_refused(tmp_path: Path) -> None:
    for name, text in (
        ("a.json", "{"),
        ("b.json", "3"),
        ("c.json", '{"schema": "mpsearch/profile", "version": 9}'),
        ("d.csv", ""),
        ("e.json", '{"schema": "mpsearch/profile", "version": 1}'),
        ("f.parquet", "no"),
    ):
        (tmp_path / name).write_text(text, encoding="utf-8")
        with pytest.raises(InputError, match="E433"):
            read_profile(tmp_path / name)
    with pytest.raises(InputError, match="E101"):
        read_profile(tmp_path / "nothing.json")


def test_engines_take_settings_as_text() -> None:
    assert parse_engine("onnxruntime") == ("onnxruntime", {}, 1, 7)
    assert parse_engine("torch:device=cuda,threads=2") == ("torch", {"device": "cuda"}, 2, 0)
    assert make("engines", "openvino", **parse_engine("openvino:inputs=64")[1]).inputs == 64
    for bad in ("threads=0", "threads=-1", "threads=1.7", "threads=nan", "threads=abc", "wholes=-1", "wholes=inf"):
        with pytest.raises(InputError, match="give a whole number"):
            parse_engine(f"onnxruntime:{bad}")
    with pytest.raises(UsageError, match="is not SETTING=VALUE"):
        parse_engine("torch:cuda")
    with pytest.raises(InputError, match="bandwidth is 0"):
        make("engines", "roofline", peak=1e12)
