"""What the threads of one process do while their PostgreSQL server is away, and how it ends if that lasts."""

from __future__ import annotations

import signal
import socket
import sys
import threading
import time
from collections.abc import Callable, Iterator
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

import pytest

import mpsearch as mp
from benchmarks.chaos.lab import wait_until
from mpsearch import driving, joining
from mpsearch.errors import InputError, StorageError, StudyNameError
from mpsearch.executors.inline import Nobody
from mpsearch.records import LeasedTask, TaskRow, ValueRow
from mpsearch.storage import server, taking
from mpsearch.storage.control import Control
from mpsearch.storage.patience import Patience, Terms
from mpsearch.storage.place import Place
from mpsearch.storage.queue import Queue
from mpsearch.storage.store import SqlStore
from mpsearch.testing.pretended import Bench
from mpsearch.working import UntrustedError, Worker, as_error
from tests.postgres import Postgres
from tests.service_shell import command, settings, until
from tests.test_away import stopping
from tests.test_postgres import error_of

# A fixture.
__all__ = ["stopping"]


def runs(stopping: Postgres) -> bool:
    return (stopping.folder / "data" / "postmaster.pid").exists()


@pytest.fixture
def opened(stopping: Postgres, monkeypatch: pytest.MonkeyPatch) -> Iterator[SqlStore]:
    """A store with a leased task, whose calls give up after moments where nobody told them to wait."""
    monkeypatch.setattr(server, "PATIENCE", 0.4)
    with SqlStore(stopping.url(stopping.create()), busy_timeout=1.0) as store:
        store.create_study("s", {})
        store.control.drive("s", "elsewhere:boot:1:2", 3600.0)
        yield store
        if not runs(stopping):
            stopping.start()


def leased(store: SqlStore, worker: str, seconds: float, key: str = "k") -> LeasedTask:
    store.queue.offer("s", [TaskRow(key, "setup", "score", {})])
    found = store.queue.claim(worker, lease=seconds)
    assert found is not None
    return found


def test_a_result_outlives_an_outage_longer_than_any_wait_for_a_connection(
    stopping: Postgres, opened: SqlStore
) -> None:
    said: list[str] = []
    opened.wait_for_server(60.0, said.append)
    worker = Worker(opened, "w", lease=0.6)
    task = leased(opened, "w", 0.6)
    with ThreadPoolExecutor(2) as pool, worker._alive(task):
        stopping.stop()
        # The signs of life are at the door by now, and stay there.
        time.sleep(0.5)
        ends = [pool.submit(opened.queue.finish, task, values=[ValueRow("plan", "k", {})]) for _ in range(2)]
        time.sleep(2.0)
        assert opened.away
        assert not any(end.done() for end in ends)
        stopping.start()
        assert [end.result(20) for end in ends] == [None, None]
    worker.stop()
    assert opened.get("plan", "k") == {}
    assert not opened.away
    assert [line.partition(";")[0].partition(" after")[0].split(" ")[-1] for line in said] == ["more", "back"]


@pytest.mark.parametrize("how", ["stop", "hurry"])
def test_who_waits_for_the_connection_of_another_hears_that_it_is_to_stop(
    stopping: Postgres, opened: SqlStore, monkeypatch: pytest.MonkeyPatch, how: str
) -> None:
    monkeypatch.setattr(server, "PATIENCE", 30.0)
    told = threading.Event()
    with SqlStore(opened.address, busy_timeout=30.0) as store, ThreadPoolExecutor(2) as pool:
        store.wait_for_server(60.0, stop=told.is_set)
        stopping.stop()
        calls = [pool.submit(error_of, lambda: store.get("plan", "k")) for _ in range(2)]
        wait_until(lambda: store.away, 10.0, "a knock")
        time.sleep(0.3)
        begun = time.monotonic()
        if how == "stop":
            told.set()
        else:
            store.wait_for_server(0.0)
        assert [call.result(60).code for call in calls] == ["E609", "E609"]
        assert time.monotonic() - begun < 3.0


def test_who_waits_for_one_that_gets_no_answer_at_all_hears_that_it_is_to_stop(
    stopping: Postgres, opened: SqlStore
) -> None:
    told = threading.Event()
    opened.wait_for_server(60.0, stop=told.is_set)
    opened._busy_timeout = 30.0
    stopping.stop()
    with ThreadPoolExecutor(2) as pool, socket.create_server(("127.0.0.1", stopping.port)):
        calls = [pool.submit(error_of, lambda: opened.get("plan", "k")) for _ in range(2)]
        wait_until(lambda: opened.away and opened.patience.connecting, 10.0, "a knock")
        time.sleep(0.3)
        told.set()
        wait_until(lambda: any(call.done() for call in calls), 3.0, "one that hears it")


def test_leases_outlive_an_outage_that_was_longer(
    stopping: Postgres, opened: SqlStore, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(taking, "GRACE", 1.5)
    opened.wait_for_server(60.0)
    dead = leased(opened, "dead", 1.0)
    living, worker = leased(opened, "living", 1.0, "l"), Worker(opened, "living", lease=1.0)
    taken: list[LeasedTask | None] = []
    with SqlStore(opened.address, busy_timeout=1.0) as other, worker._alive(living):
        other.wait_for_server(60.0)
        opened.queue.renew(dead, 1.0)
        stopping.stop()
        with ThreadPoolExecutor(1) as pool:
            claimed = pool.submit(other.queue.claim, "idle", lease=10.0)
            time.sleep(2.0)
            stopping.start()
            taken.append(claimed.result(20))
            # One that knows nothing of the outage.
            with SqlStore(opened.address) as fresh:
                taken.append(fresh.queue.claim("fresh", lease=10.0))
            assert taken == [None, None]
            wait_until(lambda: taken.append(other.queue.claim("idle", lease=10.0)) or taken[-1], 10.0, "a lapsed lease")
        found = opened.queue.states(["k", "l"])
    worker.stop()
    assert [(row.worker, row.deaths) for row in found.values()] == [("idle", 1), ("living", 0)]


def test_who_comes_back_first_takes_nothing_at_once(
    stopping: Postgres, opened: SqlStore, monkeypatch: pytest.MonkeyPatch
) -> None:
    # Where the network was cut, and the server went on.
    monkeypatch.setattr(taking, "GRACE", 1.5)
    leased(opened, "w", 0.1)
    opened.control.leave("s", "elsewhere:boot:1:2", 1, "running")
    opened.control.drive("s", "elsewhere:boot:1:2", 0.1)
    time.sleep(0.2)
    said: list[str] = []
    joined = joining._Joined(opened, opened.address, said.append, 3.0, False)
    opened.patience.refused("cut off")
    assert opened.control.waiting() == ["s"]
    assert not opened.away
    opened.queue.sweep()
    assert not joined._adopt(lambda: False)
    assert (opened.queue.counts("s"), said) == ({"leased": 1}, [])
    wait_until(lambda: joined._adopt(lambda: False), 10.0, "a driver")
    assert said[0] == "study 's'"
    wait_until(lambda: opened.queue.sweep() or opened.queue.counts("s") == {"ready": 1}, 10.0, "a free task")


def test_a_store_waits_as_before_when_a_study_on_it_has_ended(tmp_path: Path) -> None:
    bench = Bench(f"sqlite:///{tmp_path / 'results.db'}", tmp_path / "witness")
    store = bench.store
    assert isinstance(store, SqlStore)
    for _ in range(2):
        before = store.patience.terms
        with bench.driver(Nobody()) as driver:
            assert store.patience.terms.seconds == 600.0
            # As Ctrl-C does.
            driver.leave("paused", now=True)
            assert store.patience.terms.seconds == 0.0
        assert store.patience.terms is before
        epoch = store.control.drive("study", "elsewhere:boot:1:2", 60.0)
        assert error_of(bench.driver(Nobody()).__enter__).code == "E144"
        assert store.patience.terms is before
        store.control.leave("study", "elsewhere:boot:1:2", epoch, "paused")
        store.wait_for_server(600.0, print)
    store.close()


def test_an_answer_that_is_an_error_is_an_answer(stopping: Postgres, opened: SqlStore) -> None:
    stopping.stop()
    assert error_of(lambda: opened.study("nope")).code == "E609"
    assert opened.away
    stopping.start()
    assert error_of(lambda: opened.study("nope")).code == "E141"
    assert not opened.away
    assert not opened.settled(60.0)


def test_threads_that_find_a_server_away_and_back_at_once_agree() -> None:
    patience = Patience(Place.of("postgresql://host/name"))
    said: list[str] = []
    patience.change(Terms(60.0, said.append))
    error = StorageError("E609", "gone")
    until = time.monotonic() + 1.0

    def meet(number: int) -> int:
        count = 0
        while time.monotonic() < until:
            count += 1
            patience.refused("gone")
            assert patience.goes_on(error)
            patience.answered()
        return count

    before = sys.getswitchinterval()
    sys.setswitchinterval(1e-6)
    try:
        with ThreadPoolExecutor(4) as pool:
            assert min(pool.map(meet, range(4))) > 10
    finally:
        sys.setswitchinterval(before)
    waits = [line for line in said if "waiting" in line]
    assert 0 <= len(waits) - (len(said) - len(waits)) <= 1


def test_signs_of_life_outlive_what_nobody_foresaw(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    bench = Bench(f"sqlite:///{tmp_path / 'results.db'}", tmp_path / "witness")
    beats = {"renew": 0, "beat": 0}

    def failing(name: str) -> Callable[..., Any]:
        def call(*args: Any, **kwargs: Any) -> Any:
            beats[name] += 1
            raise RuntimeError("nobody foresaw this")

        return call

    monkeypatch.setattr(Queue, "renew", failing("renew"))
    monkeypatch.setattr(Control, "beat", failing("beat"))
    worker = Worker(bench.store, "w", lease=0.1)
    with bench.driver(Nobody(), lease=0.3):
        bench.store.queue.offer("study", [TaskRow("k", "setup", "score", {})])
        task = bench.store.queue.claim("w", lease=60.0)
        assert task is not None
        with worker._alive(task):
            wait_until(lambda: min(beats.values()) > 2, 20.0, "a third sign of life")
    worker.stop()
    lines = [record.getMessage() for record in caplog.records]
    assert len([line for line in lines if "nobody foresaw this" in line]) == 2
    bench.store.close()


def test_a_worker_leaves_when_the_server_stays_away(
    stopping: Postgres, opened: SqlStore, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(joining, "AWAY", 1.5)
    said: list[str] = []
    with ThreadPoolExecutor(1) as pool:
        joined = pool.submit(error_of, lambda: joining.join(opened.address, told=said.append))
        wait_until(opened.control.workers, 20.0, "a worker")
        stopping.stop()
        error = joined.result(30)
    assert error.code == "E609"
    assert len(said) == 1
    assert "waiting for up to 2 s" in said[0]


def test_workers_that_are_told_to_leave_do_not_wait_for_a_server(stopping: Postgres, opened: SqlStore) -> None:
    with (
        command("worker", MPSEARCH_STORAGE=opened.address) as first,
        command("worker", MPSEARCH_STORAGE=opened.address) as second,
    ):
        until(lambda: len(opened.control.workers()) == 2)
        stopping.stop()
        # Both knock by now.
        time.sleep(3.0)
        told = ((first, signal.SIGINT, 130, ""), (second, signal.SIGTERM, 0, "0 tasks done\n"))
        for process, sent, code, last in told:
            begun = time.monotonic()
            process.send_signal(sent)
            out, err = process.communicate(timeout=60)
            assert (process.returncode, out) == (code, last), err
            assert time.monotonic() - begun < 5.0
            assert "Traceback" not in err


@pytest.mark.parametrize("back", [True, False])
def test_a_study_that_has_waited_long_enough_ends(
    stopping: Postgres, small_llama: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, back: bool
) -> None:
    monkeypatch.setattr(server, "PATIENCE", 0.3)
    monkeypatch.setattr(driving, "AWAY", 1.0)
    leave = driving.Driver.leave

    def late(self: driving.Driver, *args: Any, **kwargs: Any) -> None:
        if back and not runs(stopping):
            stopping.start()
        leave(self, *args, **kwargs)

    monkeypatch.setattr(driving.Driver, "leave", late)
    asked = mp.study(**settings(small_llama, tmp_path, storage=stopping.url(stopping.create())))
    asked.told = lambda phase, done, total: stopping.stop() if done and runs(stopping) else None
    assert error_of(asked.run).code == "E609"
    if not back:
        stopping.start()
    found = asked.store.control.status(asked.name)
    assert (found.state, found.reason[:4]) == (("paused", "E609") if back else ("running", ""))
    asked.told = lambda phase, done, total: None
    if not back:
        # As if its lease had lapsed: this process is the one that drove it.
        assert found.live
    asked.run()
    assert asked.store.control.status(asked.name).state == "complete"
    asked.store.close()


@pytest.mark.parametrize("kind", [mp.MpsearchError, InputError, StudyNameError, UntrustedError])
def test_an_error_comes_back_as_what_it_was(kind: type[mp.MpsearchError]) -> None:
    found = as_error({"code": "E101", "message": "words", "data": {"kind": kind.__name__, "advice": "do"}})
    assert (type(found), found.exit_code, found.advice) == (kind, kind.exit_code, "do")
