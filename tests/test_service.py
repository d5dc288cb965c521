"""The service from the shell: submit, workers that join, watch, pause, resume, cancel, logs, the list of studies."""

from __future__ import annotations

import json
import os
import re
import subprocess
import sys
import tempfile
import time
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest

import mpsearch as mp
from mpsearch import machine
from mpsearch.bundled import bundled_model
from mpsearch.cli.study_list import study_lines
from mpsearch.errors import InputError
from mpsearch.model.checkpoint import find_folder
from mpsearch.records import StudyStatus, WorkerRow
from mpsearch.storage.store import SqlStore
from mpsearch.studying import Study
from mpsearch.submitting import ENDED
from mpsearch.web.server.submitting import Registered
from tests.service_shell import Shell, command, shell, state, study, until, write

# Fixtures.
__all__ = ["shell", "study"]


def test_a_submitted_study_is_done_by_whoever_joins(shell: Shell, study: dict[str, Any], tmp_path: Path) -> None:
    file = write(tmp_path, **study)
    assert shell("submit", file, "--wait") == 0
    assert shell.out == "study   small\nnext    mpsearch watch small\n"
    assert shell("submit", file, "--wait", "--json") == 0
    told = json.loads(shell.out)
    assert (told["name"], told["state"], told["next"]) == ("small", "submitted", "mpsearch watch small")
    assert shell("submit", file, "--name", "") == 2
    assert "--name is empty" in shell.err
    assert shell("show") == 0
    assert re.fullmatch(r"small  submitted +\d+s\n", shell.out)
    assert shell("show", "small") == 3
    assert "it is submitted" in shell.err
    assert "mpsearch watch small" in shell.err
    assert shell("worker", "--idle", "0.1") == 0
    assert int(shell.out.split()[0]) >= 4
    assert "study 'small'" in shell.err
    assert shell("watch", "small") == 0
    assert " phase    score 0/" in shell.out
    assert shell.out.endswith("complete\nnext    mpsearch show small\n")
    assert shell("watch", "small", "--json") == 0
    last = json.loads(shell.out.splitlines()[-1])
    assert (last["state"], last["name"], last["done"]) == ("complete", "small", last["total"])
    assert {line["kind"] for line in last["lines"]} == {"phase", "notice"}
    assert shell("logs", "small", "--json") == 0
    assert json.loads(shell.out) == last["lines"]
    assert shell("logs", "small") == 0
    assert len(shell.out.splitlines()) == len(last["lines"])
    assert shell("show", "small") == 0
    # The same question again is known already.
    assert shell("submit", file, "--wait") == 0
    assert shell("worker", "--idle", "0.1") == 0
    assert shell.out == "0 tasks done\n"
    assert shell("watch", "small") == 0
    # Another question needs another name.
    assert shell("submit", write(tmp_path, **{**study, "points": 1})) == 3
    assert "E140" in shell.err
    assert shell("pause", "small") == 2
    assert "study 'small' is complete: there is nothing to pause" in shell.err


def test_a_process_of_its_own_does_what_nobody_has_joined_for(
    shell: Shell, study: dict[str, Any], tmp_path: Path
) -> None:
    assert shell("submit", write(tmp_path, **study)) == 0
    assert shell("watch", "small") == 0, shell.out
    with SqlStore("mpsearch.db") as store:
        found = Study(mp.study(**study).spec, store)
        assert store.control.status("small").home == machine.process_name().split(":")[0]
        alone = mp.study(**{**study, "storage": "alone.db"})
        alone.run()
        assert found.plans[0].plan.to_json() == alone.plans[0].plan.to_json()
        assert [m.loss for m in found.measurements] == [m.loss for m in alone.measurements]
    log = tmp_path / "out" / "small.log"
    assert log.read_text() == ""
    assert log.stat().st_mode & 0o777 == 0o600


def test_a_question_without_an_answer_fails_with_its_reason(
    shell: Shell, study: dict[str, Any], tmp_path: Path
) -> None:
    assert shell("submit", write(tmp_path, **{**study, "budgets": ["weights <= 1 bits"]}), "--wait") == 0
    assert shell("worker", "--idle", "0") == 0
    assert "E201" in shell.err
    assert shell("watch", "small") == 4
    assert "failed: E201 budget 'weights <= 1 bits' cannot be met" in shell.out
    assert shell.out.endswith("next    mpsearch explain E201\n")
    assert shell("explain", "E201") == 0
    # Its name is free for the question that was put right; here one that is wrong before the model is even loaded.
    text = {"calibration": "stdlib:calibration", "validation": "stdlib:calibration"}
    assert shell("submit", write(tmp_path, **{**study, **text}), "--wait") == 0
    assert shell("worker", "--idle", "0") == 0
    assert shell("watch", "small") == 3
    assert "failed: E505" in shell.out
    assert shell("submit", write(tmp_path, **study), "--wait") == 0
    assert shell("worker", "--idle", "0") == 0
    assert shell("watch", "small") == 0
    for changes in ({"estimator": "fischer"}, {"solver": "simplx"}, {"storage": "sqlite://"}):
        assert shell("submit", write(tmp_path, **{**study, "name": "wrong", **changes})) == 3
    assert shell("show") == 0
    assert "wrong" not in shell.out


def test_pause_and_cancel_reach_a_study_that_runs(shell: Shell, study: dict[str, Any], tmp_path: Path) -> None:
    file = str(write(tmp_path, **study))

    # Nobody has joined, so it waits.
    with command("run", file, "--executor", "database", "-q") as process:
        until(lambda: state() == "running")
        assert shell("show") == 0
        assert re.match("small  running ", shell.out)
        began = time.monotonic()
        assert shell("pause", "small") == 0
        assert shell.out == "paused\n"
        assert time.monotonic() - began < 10
        _, err = process.communicate(timeout=30)
        assert process.returncode == 130
        assert err == "paused; go on with: mpsearch resume small\n"
    assert state() == "paused"
    assert shell("watch", "small") == 0
    assert shell.out.endswith(
        "paused: stopped before its end; what was computed is kept\nnext    mpsearch resume small\n"
    )
    assert shell("cancel", "small", "--json") == 0
    assert json.loads(shell.out)["state"] == "cancelled"
    assert shell("cancel", "small") == 2
    assert shell("resume", "small", "-q", "--workers", "1", "--json") == 0
    told = json.loads(shell.out)
    assert (told["study"], told["state"]) == ("small", "complete")
    assert Path(told["report"]).is_file()
    assert state() == "complete"


def test_a_study_in_the_background_is_resumed_there(shell: Shell, study: dict[str, Any], tmp_path: Path) -> None:
    assert shell("submit", write(tmp_path, **study), "--wait") == 0
    assert shell("pause", "small") == 0
    assert shell("worker", "--idle", "0") == 0
    assert state("small") == "paused"
    with SqlStore("mpsearch.db") as store:
        # Somebody has joined, so no process is started.
        store.control.hello(WorkerRow("somebody", "elsewhere", 1))
    assert shell("resume", "small", "--background", "--workers", "1") == 0
    assert shell.out == "next    mpsearch watch small\n"
    assert state("small") == "submitted"
    assert shell("worker", "--idle", "0") == 0
    assert shell("watch", "small") == 0


def test_a_process_that_crashes_marks_its_study_failed(
    shell: Shell, study: dict[str, Any], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    assert shell("submit", write(tmp_path, **study), "--wait") == 0

    def broken(*words: Any, **settings: Any) -> None:
        raise ZeroDivisionError("a fault of ours")

    monkeypatch.setattr("mpsearch.joining._driven", broken)
    monkeypatch.setattr(tempfile, "tempdir", str(tmp_path))
    assert shell("worker", "--study", "small") == 1
    assert shell.err.count("error[E699] internal error") == 1
    assert "Traceback" not in shell.err
    written = next(tmp_path.glob("mpsearch-fault-*.txt"))
    assert str(written) in shell.err
    assert "in broken" in written.read_text()
    assert written.stat().st_mode & 0o777 == 0o600
    assert shell("watch", "small") == 1
    assert "failed: ZeroDivisionError: a fault of ours" in shell.out
    assert shell("logs", "small") == 0
    assert "error    ZeroDivisionError: a fault of ours" in shell.out


def test_a_bundled_model_is_stored_by_its_name() -> None:
    spec = mp.StudySpec.of(model="bundled:tiny-llama", calibration="stdlib:calibration", budgets="4 bits")
    assert (spec.name, spec.question()["model"], spec.setup.model) == ("tiny-llama", *["bundled:tiny-llama"] * 2)
    assert find_folder(spec.setup.model) == bundled_model()
    known = Registered.of(["x=bundled:tiny-llama"], ["y=stdlib:calibration"])
    assert (known.model("x"), known.text("y")) == ("bundled:tiny-llama", "stdlib:calibration")


def test_what_makes_no_sense_is_refused(shell: Shell) -> None:
    with SqlStore("mpsearch.db") as store:
        store.create_study("a", {})
    assert shell("bundle", "a", "-") == 2
    assert "mpsearch bundle a a.mps" in shell.err
    assert shell("db", "merge", "mpsearch.db", "--into", "sqlite:///./mpsearch.db") == 2
    assert "would be joined with itself" in shell.err


def test_a_study_with_gaps_ends_with_five(shell: Shell, tmp_path: Path) -> None:
    with SqlStore("mpsearch.db") as store:
        store.create_study("a", {})
        store.set_state("a", "gaps")
    assert shell("watch", "a") == 5
    assert shell.out == "gaps\nnext    mpsearch show a\n"


@pytest.mark.parametrize(
    ("words", "code", "said"),
    [
        (("watch", "nosuch"), 3, "E141"),
        (("pause", "nosuch"), 3, "E141"),
        (("cancel", "nosuch"), 3, "E141"),
        (("logs", "nosuch"), 3, "E141"),
        (("resume", "nosuch"), 3, "E141"),
        (("worker", "--study", "nosuch"), 3, "E141"),
        (("watch", "a", "--storage", "other.db"), 3, "E101"),
        (("worker", "--study", "a", "--storage", "other.db"), 3, "E101"),
        (("worker", "--storage", "mysql://x/y"), 3, "E107"),
        (("run", "x.toml", "--ray", "auto", "--executor", "local"), 2, "E115"),
        (("submit", "nosuch.toml"), 3, "E101"),
    ],
)
def test_bad_words_are_one_error_with_its_code(shell: Shell, words: tuple[str, ...], code: int, said: str) -> None:
    with SqlStore("mpsearch.db") as store:
        store.create_study("a", {})
    Path("x.toml").write_text("")
    assert shell(*words) == code, shell.err
    assert shell.err.count("error[") == 1
    assert said in shell.err
    assert not Path("other.db").exists()


def test_executors_are_named_on_the_command_line(shell: Shell, study: dict[str, Any], tmp_path: Path) -> None:
    file = write(tmp_path, **study)
    assert shell("run", file, "-q", "--executor", "rai") == 3
    assert "E107" in shell.err
    assert "there is local, ray, database" in shell.err
    assert shell("run", file, "-q", "--ray", "127.0.0.1:9") == 3
    assert "no Ray cluster at '127.0.0.1:9'" in shell.err
    # A study that could not begin takes no name.
    assert shell("show") == 0
    assert "small" not in shell.out


def test_numbers_of_other_conditions_are_not_mixed(
    shell: Shell, study: dict[str, Any], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    first = mp.study(**study)
    first.run()
    origin = first._origin()
    assert len(origin) == 10
    for field in origin:
        other = Study(first.spec, first.store)
        monkeypatch.setattr(other, "_origin", lambda field=field: {**origin, field: "changed"})
        with pytest.raises(InputError, match="computed under other conditions") as caught:
            other.run()
        assert caught.value.code == "E142"
        assert caught.value.because == f"{field} was {origin[field][:40]}, is changed"
        assert "--remeasure" in caught.value.advice
    assert first.store.control.status("small").state == "complete"
    versions = {**machine.versions(), "torch": "9.9"}
    monkeypatch.setattr(machine, "versions", lambda: versions)
    assert shell("resume", "small", "-q", "--workers", "1") == 3
    assert "E142" in shell.err
    assert "torch was" in shell.err
    assert shell("resume", "small", "-q", "--workers", "1", "--remeasure") == 0
    again = Study(first.spec, first.store)
    assert again._linked("origin")[0][1]["torch"] == "9.9"
    assert [m.loss for m in again.measurements] == [m.loss for m in first.measurements]
    first.store.close()


def test_the_list_of_studies_fits_a_terminal() -> None:
    row = StudyStatus(
        "n" * 150, "running", "run", "score", 123456, 1234567, "", "", "", True, "2026-01-01T00:00:00+00:00"
    )
    rows = [row, replace(row, wanted="pause"), replace(row, name="a\x1b[31mb", state="interrupted", phase="p" * 60)]
    rows += [replace(row, name=state, state=state) for state in (*ENDED, "new", "submitted")]
    lines = list(study_lines(rows))
    assert max(map(len, lines)) <= 80
    assert "stopping" in lines[1]
    assert lines[2].startswith("a?[31mb")
    assert "\x1b" not in "".join(lines)


def test_the_tutorial_can_be_followed_literally(tmp_path: Path) -> None:
    page = (Path(__file__).parents[1] / "docs" / "service.md").read_text(encoding="utf-8")
    page = page[: page.index("## Ray")]
    script = ["set -e", "trap 'kill $(jobs -p) 2> /dev/null || true' EXIT"]
    for language, block in re.findall(r"```(sh|python|toml)\n(.*?)```", page, re.DOTALL):
        if language == "python":
            block = f"python - <<'END'\n{block}END\n"
        elif language == "toml":
            block = f"cat > study.toml <<'END'\n{block}END\n"
        script.append(block)
    environment = {**os.environ, "PATH": f"{Path(sys.executable).parent}{os.pathsep}{os.environ['PATH']}"}
    done = subprocess.run(
        ["bash", "-c", "\n".join(script)], cwd=tmp_path, env=environment, capture_output=True, text=True, timeout=240,
        check=False,
    )  # fmt: skip
    assert done.returncode == 0, done.stdout + done.stderr
    assert "Traceback" not in done.stderr
    lines = done.stdout.splitlines()
    assert lines.count("complete") == 3
    assert "notebook" in lines
    assert "paused" in lines
    assert any(re.match(r"laptop  complete ", line) for line in lines)
    assert (tmp_path / "mpsearch-out" / "laptop" / "report.html").is_file()
    assert list((tmp_path / "exported").glob("*.safetensors"))
    assert lines[-1].startswith(("in doubt", "price", "            ", "predicted", "gap"))
    with SqlStore(str(tmp_path / "mpsearch.db")) as store:
        assert {row.name: row.state for row in store.control.statuses()} == dict.fromkeys(
            ("laptop", "notebook", "later"), "complete"
        )
