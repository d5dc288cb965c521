"""The driver of a study: what it offers again, what it frees, and what it does with the work of others."""

from __future__ import annotations

import subprocess
import sys
import threading
import time
from collections.abc import Iterator
from pathlib import Path

import pytest

from mpsearch import driving
from mpsearch.driving import Stopped, Terms
from mpsearch.errors import StorageError
from mpsearch.executors.inline import Inline, Nobody
from mpsearch.machine import process_name
from mpsearch.records import ValueRow
from mpsearch.storage.store import SqlStore
from mpsearch.tasks import Failed
from mpsearch.testing.pretended import Bench


@pytest.fixture
def bench(tmp_path: Path) -> Iterator[Bench]:
    found = Bench(f"sqlite:///{tmp_path / 'results.db'}", tmp_path / "witness")
    yield found
    found.store.close()


def gone() -> str:
    """Name of a process of this machine that has ended."""
    with subprocess.Popen([sys.executable, "-c", "input()"], stdin=subprocess.PIPE) as process:
        return process_name(process.pid)


def test_what_failed_is_tried_again_by_the_next_run_unless_it_is_told_not_to(bench: Bench) -> None:
    jobs = [bench.job(0, "gap"), bench.job(1)]
    failed = {0: Failed("E511", "not finite under this plan"), 1: None}
    for again, begun in ((True, [0, 1]), (False, [0, 1]), (True, [0, 1, 0])):
        with bench.driver(Inline(), terms=Terms(again=again)) as driver:
            assert dict(driver.do(jobs)) == failed
            driver.leave("gaps")
        assert bench.begun() == begun


def test_a_result_that_somebody_removed_is_computed_again(bench: Bench) -> None:
    jobs = bench.jobs(3)
    with bench.driver(Inline()) as driver:
        list(driver.do(jobs))
    with bench.store.writing() as connection:  # type: ignore[attr-defined]
        connection.exec_driver_sql(f"DELETE FROM value WHERE key = '{jobs[1].goes}'")
    with bench.driver(Inline()) as driver:
        assert len(list(driver.do(jobs))) == 3
    assert bench.begun() == [0, 1, 2, 1]
    bench.losses(jobs)


def test_what_a_dead_process_of_this_machine_held_is_free_at_once(bench: Bench) -> None:
    jobs = bench.jobs(3)
    dead = gone()
    with bench.driver(Nobody()) as driver:
        driver._offer(jobs, driver.rows(jobs))
        assert bench.store.queue.claim(dead, lease=3600.0) is not None
        began = time.monotonic()
        driver._executor = Inline()
        assert len(list(driver.do(jobs))) == 3
    assert time.monotonic() - began < 5
    state = bench.store.queue.states([jobs[0].key])[jobs[0].key]
    assert (state.state, state.deaths) == ("done", 1)


def test_a_study_is_taken_at_once_from_a_process_that_died(bench: Bench) -> None:
    bench.store.control.drive("study", gone(), 3600.0)
    assert bench.store.control.waiting() == ["study"]
    with bench.driver(Inline()) as driver:
        assert len(list(driver.do(bench.jobs(2)))) == 2
        driver.leave("complete")
    assert bench.store.control.waiting() == []


def test_a_study_waits_for_what_another_one_computes_and_takes_over_when_that_is_lost(
    bench: Bench, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(driving, "_AGAIN", 0.3)
    with SqlStore(str(tmp_path / "results.db")) as store:
        # Another study offers the same work; its driver lives elsewhere, and never comes back.
        store.create_study("other", {})
        epoch = store.control.drive("other", "elsewhere:boot:1:2", 3600.0)
        jobs = bench.jobs(2)
        with bench.driver(Nobody()) as driver:
            store.queue.offer("other", driver.rows(jobs))
            first = store.queue.claim("w", lease=3600.0)
            assert first is not None
            ended: list[int] = []
            waiting = threading.Thread(target=lambda: ended.extend(i for i, _ in driver.do(jobs)))
            waiting.start()
            time.sleep(0.5)
            assert bench.store.queue.counts("study") == {}
            store.queue.fail(first, "E511", "not finite", {"expected": True})
            store.control.leave("other", "elsewhere:boot:1:2", epoch, "paused")
            until = time.monotonic() + 20
            while (second := store.queue.claim("w", lease=60.0)) is None:
                assert time.monotonic() < until
                time.sleep(0.05)
            assert second.study == "study"
            store.queue.finish(second)
            waiting.join(20)
            assert sorted(ended) == [0, 1]


def test_a_driver_says_how_far_it_is(bench: Bench) -> None:
    with bench.driver(Inline(), lease=0.6) as driver:
        driver.progress = ("score", 3, 40)
        until = time.monotonic() + 10
        while bench.store.control.status("study").phase != "score":
            assert time.monotonic() < until
            time.sleep(0.02)
        driver.progress = ("score", 40, 40)
        driver.leave("complete")
    status = bench.store.control.status("study")
    assert (status.phase, status.done, status.total, status.state) == ("score", 40, 40, "complete")


def test_a_pause_before_the_start_does_not_stop_who_runs_the_study_now(bench: Bench) -> None:
    bench.store.control.want("study", "pause")
    with bench.driver(Inline()) as driver:
        assert len(list(driver.do(bench.jobs(2)))) == 2
        driver.leave("complete")
    with pytest.raises(StorageError, match="E523"):
        driver._store.control.beat("study", "nobody", 0, 1.0, "", 0, 0)


def test_work_of_a_dead_driver_is_taken_over_with_what_this_one_has_loaded(bench: Bench) -> None:
    jobs = bench.jobs(2)
    bench.store.create_study("other", {})
    # The same tasks under another setup, as of an in-memory model in a process that was killed.
    with bench.driver(Nobody(), private=True) as driver:
        rows = driver.rows(jobs)
    bench.store.control.drive("other", gone(), 0.01)
    bench.store.queue.offer("other", rows)
    time.sleep(0.05)
    with bench.driver(Inline()) as driver:
        assert sorted(i for i, _ in driver.do(jobs)) == [0, 1]


def test_work_that_another_study_withdraws_meanwhile_is_offered_again(
    bench: Bench, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(driving, "_AGAIN", 0.1)
    jobs, queue = bench.jobs(2), bench.store.queue
    bench.store.create_study("other", {})
    bench.store.control.drive("other", "elsewhere:boot:1:2", 3600.0)
    with bench.driver(Nobody()) as driver:
        rows = driver.rows(jobs)
        queue.offer("other", rows)
        driver._offer(jobs, rows)
        assert bench.store.queue.counts("study") == {}
        queue.withdraw("other")
        driver._offer(jobs[:0], [])
        driver._executor = Inline()
        assert sorted(i for i, _ in driver.do(jobs)) == [0, 1]


def test_what_is_done_already_is_not_done_again_when_its_task_is_gone(
    bench: Bench, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(driving, "_AGAIN", 0.05)
    jobs = bench.jobs(1)
    with bench.driver(Nobody()) as driver:
        waiting = driver.do(jobs)
        ended: list[int] = []
        thread = threading.Thread(target=lambda: ended.extend(i for i, _ in waiting))
        thread.start()
        until = time.monotonic() + 10
        while (leased := bench.store.queue.claim("w", lease=60.0)) is None:
            assert time.monotonic() < until
        measured = ValueRow("measurement", jobs[0].goes, {"loss": 0.5})
        bench.store.queue.finish(leased, values=[measured])
        bench.store.queue.discard([jobs[0].key])
        thread.join(20)
        assert ended == [0]
        assert bench.counts() == {}


def test_a_process_that_lost_its_study_does_not_forget_it(bench: Bench) -> None:
    with bench.driver(Inline()) as driver:
        bench.store.control.leave("study", driver._name, driver._epoch, "paused")
        epoch = bench.store.control.drive("study", "elsewhere:boot:1:2", 60.0)
        driver.drop()
        driver.leave("failed")
    status = bench.store.control.status("study")
    assert (status.state, status.driver, epoch > 1) == ("running", "elsewhere:boot:1:2", True)


def test_a_process_that_has_to_end_leaves_the_study_to_others(bench: Bench) -> None:
    bench.store.control.submit("study", "here")
    begun: list[int] = []
    terms = Terms(adopts=True, stop=lambda: len(begun) >= 2)
    with bench.driver(Inline(), terms=terms) as driver, pytest.raises(Stopped) as stopped:
        begun.extend(i for i, _ in driver.do(bench.jobs(4)))
    assert (stopped.value.wanted, begun) == ("leave", [0, 1])


def test_a_study_that_was_cancelled_is_not_adopted(bench: Bench) -> None:
    bench.store.control.submit("study", "here")
    bench.store.control.want("study", "cancel")
    with pytest.raises(StorageError) as refused, bench.driver(Inline(), terms=Terms(adopts=True)):
        raise AssertionError("it was driven")
    assert refused.value.code == "E145"
    assert bench.store.control.status("study").state == "cancelled"


def test_a_second_value_is_written_down_and_the_work_goes_on(bench: Bench) -> None:
    jobs = bench.jobs(2)
    bench.store.put("measurement", jobs[0].goes, {"loss": 7.0})
    with bench.driver(Nobody()) as driver:
        driver._offer(jobs, driver.rows(jobs))
        worker = driver._here()
        assert [done.key for done in (worker.step(), worker.step()) if done] == [job.key for job in jobs]
        worker.stop()
    assert [line.kind for line in bench.store.control.lines("study")] == ["conflict"]
    assert bench.counts() == {"done": 2}
    assert bench.losses(jobs)[0] == 7.0
