"""Workers that join a database by themselves: what they take on, what they leave to others, and how they end."""

from __future__ import annotations

import dataclasses
import shutil
import signal
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import pytest

import mpsearch as mp
from mpsearch import machine
from mpsearch.executors.inline import Nobody
from mpsearch.joining import join
from mpsearch.records import TaskRow
from mpsearch.spec import StudySpec
from mpsearch.storage.store import SqlStore
from mpsearch.submitting import submit
from mpsearch.tasks import Job, SurveyTask
from mpsearch.testing.pretended import Bench, Pretended
from mpsearch.working import Done, Worker
from tests.service_shell import Shell, command, shell, state, study, until, write

# Fixtures.
__all__ = ["shell", "study"]


def test_a_worker_without_the_model_leaves_the_study_to_others(
    small_llama: Path, study: dict[str, Any], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(tmp_path)
    model = shutil.copytree(small_llama, tmp_path / "model")
    asked = mp.study(**{**study, "model": str(model)})
    with SqlStore("mpsearch.db") as store:
        submit(asked.spec, store, background=False)
        model.rename(tmp_path / "moved")
        said: list[str] = []
        assert join("mpsearch.db", idle=0.1, told=said.append) == 0
        assert any("E101" in line for line in said)
        assert store.control.status("small").state == "submitted"
        assert [line.text.partition(" ")[0] for line in store.control.lines("small")] == ["E101"]
        (tmp_path / "moved").rename(model)
        assert join("mpsearch.db", idle=0.1) >= 4
        assert store.control.status("small").state == "complete"
        assert store.control.workers() == []
    asked.store.close()


class Joined(Nobody):
    """Workers that have joined by themselves; here they take turns in the driver's process."""

    def __init__(self) -> None:
        self.steps: list[Callable[[], Any]] = []

    def turn(self) -> Sequence[Done]:
        for step in self.steps:
            step()
        return ()


@pytest.mark.parametrize(("wrong", "words"), [("model", "E101"), ("versions", "E142")])
def test_a_worker_declines_single_tasks_and_says_so(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, wrong: str, words: str
) -> None:
    bench, joined = Bench(f"sqlite:///{tmp_path / 'results.db'}", tmp_path / "witness"), Joined()
    able = Worker(bench.store, "able", work=Pretended(), joined=True)
    poor = Worker(bench.store, "poor", work=None if wrong == "model" else Pretended(), joined=True)
    versions = machine.versions()

    def badly() -> None:
        with monkeypatch.context() as patch:
            if wrong == "versions":
                patch.setattr(machine, "versions", lambda: {**versions, "torch": "0.1"})
            poor.step()

    joined.steps = [badly, able.step]
    with bench.driver(joined) as driver:
        assert sorted(i for i, failed in driver.do(bench.jobs(3)) if failed is None) == [0, 1, 2]
    (line,) = bench.store.control.lines("study")
    assert line.kind == "declined"
    assert line.text.startswith(f"poor: {words} ")
    assert len(poor.declined) == 1
    bench.store.close()


def test_a_driver_that_is_killed_leaves_the_study_interrupted_and_the_next_worker_ends_it(
    shell: Shell, study: dict[str, Any], tmp_path: Path
) -> None:
    file = str(write(tmp_path, **study))
    with command("run", file, "--executor", "database", "-q") as process:
        until(lambda: Path("mpsearch.db").exists() and state("small") == "running")
        process.send_signal(signal.SIGKILL)
        process.wait()
    # Its lease would hold for some seconds more.
    with SqlStore("mpsearch.db") as store, store.writing() as connection:
        connection.exec_driver_sql("UPDATE study SET driver_until = 1")
    assert shell("show") == 0
    assert "small  interrupted" in shell.out
    assert shell("worker", "--idle", "0") == 0
    assert state("small") == "complete"


def test_workers_leave_when_they_are_told(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    with SqlStore("mpsearch.db") as store:
        for sent, code, said in ((signal.SIGTERM, 0, "0 tasks done\n"), (signal.SIGINT, 130, "")):
            # A database may be named in the environment, where no list of processes shows its password.
            with command("worker", MPSEARCH_STORAGE="sqlite:///mpsearch.db") as process:
                until(store.control.workers)
                process.send_signal(sent)
                out, err = process.communicate(timeout=20)
                assert (process.returncode, out) == (code, said)
                assert "Traceback" not in err
            assert store.control.workers() == []


def test_a_task_of_another_version_is_left_to_others(tmp_path: Path) -> None:
    bench = Bench(f"sqlite:///{tmp_path / 'results.db'}", tmp_path / "witness")
    worker = Worker(bench.store, "old", work=Pretended(), joined=True)
    with bench.driver(Nobody()) as driver:
        (row,) = driver.rows(bench.jobs(1))
        bench.store.queue.offer("study", [dataclasses.replace(row, body={**row.body, "job": {"kind": "dream"}})])
        assert worker.step() == Done("")
        assert worker.step() is None
    assert "does not know" in next(iter(worker.declined.values()))


def test_ctrl_c_in_a_worker_leaves_the_study_that_it_drives_to_others(
    small_llama: Path, study: dict[str, Any], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(tmp_path)
    asked = mp.study(**study)
    with SqlStore("mpsearch.db") as store:
        submit(asked.spec, store, background=False)

        def press(worker: Worker) -> None:
            # Not the one that joined: the one that does tasks of the study while it is driven.
            if worker._setups is not None:
                raise KeyboardInterrupt

        with monkeypatch.context() as patch:
            patch.setattr(Worker, "step", press)
            with pytest.raises(KeyboardInterrupt):
                join("mpsearch.db", idle=0.1)
        assert store.control.status("small").state == "submitted"
        assert store.control.waiting() == ["small"]
    asked.store.close()


def test_code_of_models_runs_only_where_the_worker_was_told_to(study: dict[str, Any], tmp_path: Path) -> None:
    database = str(tmp_path / "results.db")
    asked = mp.study(**{**study, "storage": database, "trust_remote_code": True})
    with SqlStore(database) as store:
        submit(asked.spec, store, background=False)
        said: list[str] = []
        assert join(database, idle=0.1, told=said.append) == 0
        assert any("E802" in line for line in said)
        (line,) = store.control.lines("small")
        assert (line.kind, store.control.status("small").state) == ("declined", "submitted")
        assert "E802" in line.text
        assert join(database, idle=0.1, trusts=True) >= 4
        assert store.control.status("small").state == "complete"
    asked.store.close()


def test_a_task_that_runs_code_of_a_model_is_left_to_workers_that_may(tmp_path: Path) -> None:
    bench = Bench(f"sqlite:///{tmp_path / 'results.db'}", tmp_path / "witness")
    asked = StudySpec.of(
        name="theirs", model="m", calibration="c", validation="v", budgets=["4"], trust_remote_code=True
    )
    bench.store.create_study("theirs", asked.question())
    bench.store.control.drive("theirs", "elsewhere:boot:1:2", 1000.0)
    job = Job(SurveyTask(), "k")
    body = {"job": job.to_json(), "identity": ["", "", ""], "conditions": {}}
    bench.store.queue.offer("theirs", [TaskRow(job.key, "setup", "survey", body)])
    worker = Worker(bench.store, "w", joined=True)
    assert worker.step() == Done("")
    assert worker.step() is None
    found = bench.store.queue.states([job.key])[job.key]
    assert (found.state, found.deaths) == ("ready", 0)
    (line,) = bench.store.control.lines("theirs")
    assert line.text.startswith("w: E802 ")
    bench.store.close()


def test_a_process_is_not_started_for_a_model_that_is_not_here(study: dict[str, Any], tmp_path: Path) -> None:
    asked = mp.study(**{**study, "model": str(tmp_path / "nowhere"), "storage": str(tmp_path / "results.db")})
    for _ in range(2):
        with pytest.raises(mp.MpsearchError, match="is not on this machine") as caught:
            submit(asked.spec, asked.store)
        assert caught.value.code == "E101"
    assert asked.store.studies() == []
    assert submit(asked.spec, asked.store, background=False) == asked.name
    asked.store.close()
