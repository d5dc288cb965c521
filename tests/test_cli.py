"""The command line: what is printed, exit codes, no tracebacks."""

from __future__ import annotations

import json
import os
import re
import signal
import sqlite3
import subprocess
import sys
import time
from pathlib import Path
from typing import Any

import pytest

from mpsearch.cli.main import run
from mpsearch.plan import BitPlan

QUICK = [
    "--tokens",
    "512",
    "--validation-tokens",
    "512",
    "--length",
    "32",
    "--points",
    "2",
    "--workers",
    "1",
    "--quiet",
]
TEXT = ["--calib", "stdlib:calibration", "--validation", "stdlib:validation"]


@pytest.fixture(scope="module")
def folder(small_llama: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A folder in which a study was run from the command line."""
    where = tmp_path_factory.mktemp("cli")
    before = Path.cwd()
    os.chdir(where)
    try:
        assert run(["run", str(small_llama), *TEXT, "--budget", "weights <= 4 bits", *QUICK]) == 0
    finally:
        os.chdir(before)
    return where


@pytest.fixture
def here(folder: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    monkeypatch.chdir(folder)
    return folder


def test_a_run_leaves_a_report_and_a_plan(here: Path) -> None:
    outputs = here / "mpsearch-out" / "small-llama"
    plan = BitPlan.load(outputs / "plan.json")
    assert plan.bits <= 4
    report = (outputs / "report.html").read_text()
    assert "small-llama" in report
    assert 'src="http' not in report


def test_show_lists_studies_and_shows_one(here: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert run(["show"]) == 0
    assert capsys.readouterr().out.startswith("small-llama  complete")
    assert run(["show", "small-llama"]) == 0
    out = capsys.readouterr().out
    assert "uniform int4-g64" in out
    assert "block  q_proj  k_proj  v_proj  o_proj" in out
    assert run(["show", "small-llama", "--json"]) == 0
    data = json.loads(capsys.readouterr().out)
    assert data["plan"]["schema"] == "mpsearch/plan"
    assert {m["label"].split()[0] for m in data["measurements"]} == {"mixed", "uniform"}


def test_solve_prints_and_writes_a_plan(here: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert run(["solve", "small-llama", "--budget", "weights <= 3.5 bits", "--out", "solved.json"]) == 0
    out = capsys.readouterr().out
    plan = BitPlan.load(here / "solved.json")
    assert f"{plan.bytes:,}" in out
    assert plan.bits <= 3.5
    assert run(["solve", "small-llama", "--budget", "weights <= 3.5 bits", "--json"]) == 0
    assert BitPlan.from_json(json.loads(capsys.readouterr().out)) == plan


def test_solve_finds_the_smallest_plan_within_a_loss(here: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert run(["solve", "small-llama", "--goal", "weights", "--most-loss", "0.8", "--json"]) == 0
    plan = BitPlan.from_json(json.loads(capsys.readouterr().out))
    assert plan.source["goal"] == {"least": "weights", "most_loss": 0.8}
    assert plan.predicted.loss is not None
    assert 0 < plan.predicted.loss <= 0.8
    assert run(["solve", "small-llama", "--goal", "weights", "--most-loss", "1e-30"]) == 4
    assert "allow more loss" in capsys.readouterr().err


def test_solve_says_what_a_budget_is_worth_and_what_is_in_doubt(
    here: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    from dataclasses import replace

    from mpsearch.cli import stored

    assert run(["solve", "small-llama", "--budget", "weights <= 3.5 bits"]) == 0
    out = capsys.readouterr().out
    assert re.search(r"price       [\d.e+-]+ nats/token per MiB of weights, for small changes", out)
    opened = stored.open_study

    def careful(name: str, storage: str) -> Any:
        study = opened(name, storage)
        study.spec = replace(study.spec, cautious=1.645)
        return study

    monkeypatch.setattr(stored, "open_study", careful)
    assert run(["solve", "small-llama", "--budget", "weights <= 3.5 bits"]) == 0
    assert "predicted" in capsys.readouterr().out


def test_resume_of_a_finished_study_computes_nothing(here: Path, capsys: pytest.CaptureFixture[str]) -> None:
    before = (here / "mpsearch-out" / "small-llama" / "plan.json").read_bytes()
    assert run(["resume", "small-llama", "--workers", "1", "--quiet"]) == 0
    assert "0 tasks computed" in capsys.readouterr().out
    assert (here / "mpsearch-out" / "small-llama" / "plan.json").read_bytes() == before


def test_the_native_export_takes_the_predicted_bytes(here: Path) -> None:
    from mpsearch.exports.native import payload_bytes

    assert run(["export", "small-llama", "--to", "native", "--out", "native"]) == 0
    plan = BitPlan.load(here / "native" / "plan.json")
    assert payload_bytes(here / "native" / "weights.safetensors") == plan.bytes


def test_an_export_that_cannot_be_held_names_every_layer(here: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert run(["export", "small-llama", "--to", "llama.cpp", "--out", "gguf"]) == 3
    error = capsys.readouterr().err
    assert "error[E301]" in error
    assert "model.layers.0.mlp.down_proj" in error
    assert not (here / "gguf").exists()


def test_layers_lists_what_is_decided_and_what_is_not(
    small_llama: Path, here: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    assert run(["layers", str(small_llama)]) == 0
    out = capsys.readouterr().out
    assert "same tensor as lm_head" in out
    assert "1-D norm or bias vector" in out
    assert run(["layers", str(small_llama), "--json"]) == 0
    assert len(json.loads(capsys.readouterr().out)["layers"]) == 15


@pytest.mark.parametrize(
    ("line", "exit_code", "words"),
    [
        (["run", "nowhere", "--calib", "x.txt", "--budget", "4 bits"], 3, "E101"),
        (["run", "stduy.toml"], 3, "E101"),
        (["run", "smal-llama.toml"], 3, "E101"),
        (["run", "bundled:tiny-lama", *TEXT, "--budget", "4 bits"], 3, "did you mean 'bundled:tiny-llama'"),
        (["run", "{model}", "--budget", "4 bits"], 3, "'calibration' is missing"),
        (["run", "{model}", "--calib", "none.txt", "--budget", "4 bits", "--name", "new"], 3, "E101"),
        (["run", "{model}", *TEXT], 3, "E111"),
        (["run", "{model}", *TEXT, "--budget", "nan"], 3, "E111"),
        (["run", "{model}", *TEXT, "--budget", "1 bits", "--name", "low", *QUICK], 4, "E201"),
        (["run", "{model}", *TEXT, "--budget", "1.5 bits", "--name", "low", *QUICK], 4, "E201"),
        (["run", "{model}", *TEXT, "--budget", "3 bits", *QUICK], 3, "E140"),
        (["run", "{model}", *TEXT, "--budget", "4 bits", "--pin", "lm_head"], 2, "E115"),
        (["run", "{model}", *TEXT, "--budget", "4 bits", "--tokens", "0"], 3, "E113"),
        (["run", "{model}", *TEXT, "--budget", "4 bits", "--tokens", "many"], 2, "tokens"),
        (["solve", "smal-llama"], 3, "E141"),
        (["solve", "small-llama", "--budget", "1 bits"], 4, "E201"),
        (["solve", "small-llama", "--storage", "none.db"], 3, "E101"),
        (["export", "small-llama", "--to", "gguff"], 3, "E107"),
        (["resume", "smal-llama"], 3, "did you mean 'small-llama'"),
        (["nonsense"], 2, "nonsense"),
    ],
)
def test_mistakes_end_with_their_code_and_a_message(
    line: list[str], exit_code: int, words: str, small_llama: Path, here: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    assert run([part.replace("{model}", str(small_llama)) for part in line]) == exit_code
    error = capsys.readouterr().err
    assert words in error
    assert "Traceback" not in error


def kept_cells(database: Path) -> int:
    if not database.exists():
        return 0
    connection = sqlite3.connect(database)
    try:
        return int(connection.execute("SELECT count(*) FROM cell").fetchone()[0])
    except sqlite3.OperationalError:
        return 0
    finally:
        connection.close()


def test_ctrl_c_pauses_and_says_how_to_go_on(small_llama: Path, tmp_path: Path) -> None:
    # A shell's background jobs ignore Ctrl-C, and their children inherit that.
    code = "import signal; signal.signal(signal.SIGINT, signal.default_int_handler);"
    code += "from mpsearch.cli.main import main; main()"
    line = [sys.executable, "-c", code, "run", str(small_llama), *TEXT, "--budget", "4 bits"]
    more = ["--tokens", "16384", "--length", "32", "--workers", "2", "--name", "long one"]
    process = subprocess.Popen([*line, *more], cwd=tmp_path, stderr=subprocess.PIPE, text=True)
    try:
        deadline = time.monotonic() + 120
        while time.monotonic() < deadline and not kept_cells(tmp_path / "mpsearch.db"):
            time.sleep(0.1)
        assert kept_cells(tmp_path / "mpsearch.db"), "the run scored nothing in two minutes"
        process.send_signal(signal.SIGINT)
        _, error = process.communicate(timeout=30)
    finally:
        process.kill()
        process.communicate()
    assert process.returncode == 130
    assert "mpsearch resume 'long one'" in error
    assert "Traceback" not in error
    shown = subprocess.run(
        [sys.executable, "-m", "mpsearch.cli.main", "show"], cwd=tmp_path, capture_output=True, text=True, check=True
    )
    assert shown.stdout.startswith("long one  paused")


def test_help_is_quick_and_loads_nothing_heavy() -> None:
    code = (
        "import sys; from mpsearch.cli.main import run; run(['--help']);"
        "print([m for m in ('torch', 'ray', 'sqlalchemy', 'transformers', 'plotly') if m in sys.modules])"
    )
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    assert done.stdout.splitlines()[-1] == "[]"


def test_formats_lists_every_family_with_bits_and_holders(capsys: pytest.CaptureFixture[str]) -> None:
    from mpsearch.format import all_formats

    assert run(["formats", "--json"]) == 0
    rows = {row["format"]: row for row in json.loads(capsys.readouterr().out)}
    assert {str(fmt) for fmts in all_formats().values() for fmt in fmts} <= set(rows)
    assert rows["int4-g128-asym"]["bits_exact"] == "133/32"
    assert rows["q6_K"]["held_by"] == ["native", "gguf"]
    assert rows["kv-int8-token"]["bits_exact"] == "65/8"
    assert rows["int4-g128-gptq"]["needs"] == "hessian"
    assert rows["W@fp8-e4m3-token"]["bits"] == 8
    assert run(["formats"]) == 0
    shown = capsys.readouterr().out
    assert "weights of GGUF files for llama.cpp" in shown
    assert all(name in shown for name in rows)


def test_formats_of_a_model_says_what_each_layer_refuses(small_llama: Path, capsys: pytest.CaptureFixture[str]) -> None:
    asked = ["-f", "q4_K", "-f", "int4-g32", "-f", "int8-channel@int8-token", "-f", "kv-int8-token"]
    assert run(["formats", str(small_llama), *asked, "--json"]) == 0
    rows = {row["format"]: row for row in json.loads(capsys.readouterr().out)}
    assert rows["int4-g32"]["taken"] == rows["int4-g32"]["layers"] > 1
    assert rows["q4_K"]["taken"] == 0
    assert "256" in rows["q4_K"]["refused"][0]["reason"]
    (embedding,) = rows["int8-channel@int8-token"]["refused"]
    assert embedding["layers"] == ["model.embed_tokens"]
    assert rows["kv-int8-token"]["taken"] == rows["kv-int8-token"]["layers"] == 4
    assert run(["formats", str(small_llama), *asked]) == 0
    assert "an embedding reads token numbers" in " ".join(capsys.readouterr().out.split())


def test_formats_offers_the_nearest_name(capsys: pytest.CaptureFixture[str]) -> None:
    assert run(["formats", "-f", "int4-g12x8"]) == 3
    assert "E109" in capsys.readouterr().err
