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
from mpsearch.errors import StorageError
from mpsearch.executors.inline import Inline, Nobody
from mpsearch.machine import process_name
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
        with bench.driver(Inline(), again=again) as driver:
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
        driver._offer(jobs, list(driver._rows(jobs)))
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
            store.queue.offer("other", list(driver._rows(jobs)))
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
