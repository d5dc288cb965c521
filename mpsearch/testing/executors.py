"""What every executor must do. Subclass `ExecutorSuite` or `ProcessSuite`, give it an executor, and run it with pytest.

The driver, the workers, the queue and the database are the real ones; only the work is made up, so that a test takes
a moment. Workers in processes of their own learn of it by `mpsearch.testing.pretended.pretend`.
"""

from __future__ import annotations

import time
from collections.abc import Iterator
from pathlib import Path

import pytest

from mpsearch.driving import Stopped
from mpsearch.errors import InputError, MpsearchError, ResourceError, StorageError
from mpsearch.ports import Executor
from mpsearch.tasks import Failed
from mpsearch.testing import pretended
from mpsearch.testing.pretended import Bench, Pretended
from mpsearch.working import Worker


class ExecutorSuite:
    """The behaviour of an executor.

    A subclass overrides the fixtures `executor` and `storage`. Where workers are processes of their own, `pretend` must
    have been done before they start.
    """

    @pytest.fixture
    def executor(self) -> Executor:
        """An executor that has not begun."""
        raise NotImplementedError

    @pytest.fixture
    def storage(self, tmp_path: Path) -> str:
        """Address of an empty database."""
        raise NotImplementedError

    @pytest.fixture
    def bench(self, storage: str, tmp_path: Path) -> Iterator[Bench]:
        """A study in that database."""
        found = Bench(storage, tmp_path / "witness")
        yield found
        found.store.close()

    def test_every_job_ends_once_and_a_second_round_does_nothing(self, executor: Executor, bench: Bench) -> None:
        jobs = bench.jobs(12)
        with bench.driver(executor) as driver:
            ended = list(driver.do(jobs))
            assert sorted(ended) == [(i, None) for i in range(12)]
            assert sorted(bench.begun()) == list(range(12))
            assert sorted(driver.do(jobs)) == sorted(ended)
            assert list(driver.do([])) == []
            driver.leave("complete")
        assert sorted(bench.begun()) == list(range(12))
        alone = Pretended()
        assert bench.losses(jobs) == [alone(job.task).loss for job in jobs]
        status = bench.store.control.status("study")
        assert (status.state, status.driver, status.live) == ("complete", "", False)

    def test_a_task_without_a_result_is_told_and_the_others_are_done(self, executor: Executor, bench: Bench) -> None:
        jobs = [bench.job(0), bench.job(1, "gap"), bench.job(2)]
        with bench.driver(executor) as driver:
            ended = dict(driver.do(jobs))
        assert ended == {0: None, 1: Failed("E511", "not finite under this plan"), 2: None}
        bench.losses([jobs[0], jobs[2]])

    def test_an_error_of_a_users_reaches_the_driver_as_it_was(self, executor: Executor, bench: Bench) -> None:
        with bench.driver(executor) as driver, pytest.raises(InputError) as caught:
            list(driver.do([bench.job(0, "refuse"), *bench.jobs(3)[1:]]))
        error = caught.value
        assert (error.code, error.message, error.where) == ("E503", "a tokenizer of another model", "model.json")
        assert error.advice == "take its own"

    def test_nothing_is_claimed_when_it_has_ended_at_once(self, executor: Executor, bench: Bench) -> None:
        def interrupted() -> None:
            with bench.driver(executor) as driver:
                next(driver.do(bench.jobs(40, seconds=0.02)))
                raise KeyboardInterrupt

        with pytest.raises(KeyboardInterrupt):
            interrupted()
        assert "leased" not in bench.counts()
        # What had not been begun was withdrawn.
        assert bench.counts().get("ready", 0) <= 4

    def test_what_was_claimed_ahead_is_given_back_at_rest(self, executor: Executor, bench: Bench) -> None:
        with bench.driver(executor) as driver:
            doing = driver.do(bench.jobs(30, seconds=0.02))
            next(doing)
            doing.close()  # type: ignore[attr-defined]
            until = time.monotonic() + 5.0
            while "leased" in bench.counts() and time.monotonic() < until:
                time.sleep(0.02)
            assert "leased" not in bench.counts()
            rest = bench.jobs(30)
            assert len(list(driver.do(rest))) == 30
        bench.losses(rest)

    @pytest.mark.parametrize("wanted", ["pause", "cancel"])
    def test_it_stops_within_seconds_when_asked(self, executor: Executor, bench: Bench, wanted: str) -> None:
        def stopped() -> None:
            with bench.driver(executor, lease=1.5) as driver:
                try:
                    list(driver.do(bench.jobs(1000, seconds=0.05)))
                finally:
                    driver.leave("paused", now=True)

        with bench.soon(wanted), pytest.raises(Stopped) as caught:
            stopped()
        assert caught.value.wanted == wanted
        status = bench.store.control.status("study")
        assert (status.state, status.driver) == ("paused", "")
        assert set(bench.counts()) <= {"done"}
        assert len(bench.begun()) < 500

    def test_one_drives_at_a_time(self, executor: Executor, bench: Bench) -> None:
        other = "elsewhere:boot:1:2"
        epoch = bench.store.control.drive("study", other, 60.0)
        with pytest.raises(StorageError, match="is being run by another process: pid 1 on elsewhere") as caught:
            bench.driver(executor).__enter__()
        assert caught.value.code == "E144"
        bench.store.control.leave("study", other, epoch, "paused")
        with bench.driver(executor) as driver:
            with pytest.raises(StorageError, match="E144"):
                bench.store.control.drive("study", other, 60.0)
            assert len(list(driver.do(bench.jobs(3)))) == 3

    def test_a_driver_that_lost_its_study_stops(self, executor: Executor, bench: Bench) -> None:
        other = "elsewhere:boot:1:2"
        with bench.driver(executor, lease=1.0) as driver:
            bench.take_over(driver, other)
            with pytest.raises(ResourceError, match="taken over by another process") as caught:
                list(driver.do(bench.jobs(1000, seconds=0.02)))
        assert caught.value.code == "E523"
        assert bench.store.control.status("study").driver == other
        assert len(bench.begun()) < 500

    def test_no_other_worker_takes_what_is_private(self, executor: Executor, bench: Bench) -> None:
        jobs = bench.jobs(6, seconds=0.02)
        other = Worker(bench.store, "joined", joined=True)
        with bench.driver(executor, private=True) as driver:
            doing = driver.do(jobs)
            next(doing)
            assert [other.step() for _ in range(3)] == [None] * 3
            assert len(list(doing)) == 5
        assert other.declined == {}


class ProcessSuite(ExecutorSuite):
    """The behaviour of an executor whose workers are processes of their own.

    A subclass overrides the fixture `two` as well.
    """

    @pytest.fixture
    def two(self) -> Executor:
        """An executor of two workers that has not begun."""
        raise NotImplementedError

    def test_a_task_that_kills_its_worker_three_times_is_given_up(self, two: Executor, bench: Bench) -> None:
        jobs = [bench.job(0, "die"), *bench.jobs(9)[1:]]
        with bench.driver(two) as driver:
            ended = dict(driver.do(jobs))
        failed = ended.pop(0)
        assert failed is not None
        assert failed.code == "E522"
        # Nothing of how they died: it is stored with the results.
        assert failed.message == "given up after it ended 3 workers"
        (gap,) = [line.text for line in bench.store.control.lines(driver.study) if line.kind == "gap"]
        assert "given up after it ended 3 workers; the last one: " in gap
        assert ended == dict.fromkeys(range(1, 9))
        assert bench.begun().count(0) == 3
        bench.losses(jobs[1:])

    def test_what_nobody_foresaw_is_told_with_its_place(self, executor: Executor, bench: Bench) -> None:
        with bench.driver(executor) as driver, pytest.raises(MpsearchError, match="nobody foresaw this") as caught:
            list(driver.do([bench.job(0, "break")]))
        assert caught.value.code == "E525"
        assert caught.value.message == "a worker's code failed: RuntimeError: nobody foresaw this"
        assert caught.value.where.startswith(str(pretended.__file__))

    def test_workers_that_cannot_begin_end_the_study(self, executor: Executor, bench: Bench, tmp_path: Path) -> None:
        nowhere = f"sqlite:///{tmp_path / 'nowhere.db'}"
        with bench.driver(executor, storage=nowhere) as driver, pytest.raises(ResourceError) as caught:
            list(driver.do(bench.jobs(3)))
        assert caught.value.code == "E522"
        assert "workers die before they do anything" in caught.value.message
        assert "leased" not in bench.counts()
