"""Studies whose drivers, workers and servers are killed: nothing is lost, nothing twice, and the answer is the same.

The same harnesses at length: ``python -m benchmarks.chaos`` and ``python -m benchmarks.determinism``.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import pytest

from benchmarks import determinism
from benchmarks.chaos import drivers, fake, interrupts, lab, workers
from benchmarks.chaos.__main__ import WRONG
from benchmarks.chaos.places import server as own_server
from mpsearch.errors import InputError
from mpsearch.machine import process_name
from mpsearch.records import TaskRow
from mpsearch.storage.queue import Queue
from mpsearch.storage.store import SqlStore
from mpsearch.tasks import Failed, Job, RatioTask
from mpsearch.working import Worker
from tests.postgres import Postgres

SMALL: dict[str, Any] = {"layers": 12, "formats": ("int2-g64", "int4-g64", "int8-g64"), "points": 1}


def maker(workers: int, server: Postgres | None = None, **given: Any) -> drivers.Maker:
    def make(folder: Path) -> lab.Lab:
        storage = server.url(server.create()) if server else ""
        return lab.Lab.make(folder, storage, executor=("--workers", str(workers)), **{**SMALL, **given})

    return make


def wrong(found: Counter[str]) -> dict[str, int]:
    return {name: found[name] for name in WRONG if found[name]}


@pytest.fixture(scope="module")
def calm(tmp_path_factory: pytest.TempPathFactory) -> Mapping[str, str]:
    """What the small study leaves when nothing happens to it."""
    untroubled = maker(1)(tmp_path_factory.mktemp("calm"))
    untroubled.finish()
    return untroubled.outcome()


def test_killed_drivers_lose_nothing(calm: Mapping[str, str], tmp_path: Path) -> None:
    slow = maker(1, least=0.02, most=0.05)
    found, waits = drivers.kill_drivers(slow, tmp_path, calm, kills=3, workers=1, window=3.0)
    assert not wrong(found), found
    assert found["kills"] == 3
    assert waits


def test_killed_drivers_with_a_pool_on_postgresql_lose_nothing(
    calm: Mapping[str, str], tmp_path: Path, server: Postgres
) -> None:
    slow = maker(2, server, least=0.02, most=0.05)
    found, _ = drivers.kill_drivers(slow, tmp_path, calm, kills=3, workers=2, window=4.0, seed=1)
    assert not wrong(found), found
    assert found["kills"] == 3


def test_killed_workers_lose_nothing_and_what_kills_is_given_up(tmp_path: Path) -> None:
    poisoned = maker(2, least=0.02, most=0.05, poison=workers.POISON)
    found = workers.kill_workers(poisoned, tmp_path, kills=2)
    assert not wrong(found), found


def test_a_study_goes_on_when_its_server_is_stopped_at_once(calm: Mapping[str, str], tmp_path: Path) -> None:
    with own_server() as server:
        slow = maker(2, server, least=0.03, most=0.06)
        found = workers.kill_servers(slow, tmp_path, calm, server, stops=1, workers=2)
    assert not wrong(found), found
    assert found["drivers that ended"] == 0


def test_ctrl_c_stops_at_once_and_says_how_to_go_on(calm: Mapping[str, str], tmp_path: Path) -> None:
    slow = maker(1, least=0.02, most=0.05)
    found = interrupts.interrupt(slow, tmp_path, calm, times=5, window=3.0)
    assert not wrong(found), found
    assert found["interrupts"] == 5


def test_the_order_of_tasks_changes_no_number(
    small_llama: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    # Of the number of workers and of kills: tests/test_study.py.
    digests = []
    for order in (0, 1):
        with monkeypatch.context() as patch:
            patch.setattr(Queue, "offer", Queue.offer)
            determinism.shuffle(order)
            storage = str(tmp_path / f"{order}.db")
            determinism.work(str(small_llama), storage, str(tmp_path / "out"), 1, "local")
            digests.append(determinism.digest(storage))
    assert digests[0] == digests[1]


def test_the_witness_sees_what_is_lost(tmp_path: Path) -> None:
    made = maker(1)(tmp_path)
    made.finish()
    assert made.lost() == []
    fake.write_line(made.fake.witness, 'end 1.0 ["cell", "scope", "no.such", "int4-g64", -1]', sync=True)
    assert len(made.lost()) == 1
    assert made.check(made.outcome(), kills=0, workers=1)["lost"] == 1


@pytest.fixture
def driven(tmp_path: Path) -> SqlStore:
    """A study that is driven, with two tasks."""
    store = SqlStore(str(tmp_path / "tasks.db"))
    store.create_study("s", {})
    store.control.drive("s", process_name(), 60.0)
    jobs = [Job(RatioTask("activation_spikes"), f"goes-{i}") for i in range(2)]
    body = {"identity": [], "conditions": {}}
    store.queue.offer(
        "s", [TaskRow(job.key, "setup", job.kind, {"job": job.to_json(), **body}, i) for i, job in enumerate(jobs)]
    )
    return store


def test_a_lapsed_lease_is_freed_while_there_are_other_tasks(driven: SqlStore) -> None:
    leased = driven.queue.claim("silent", lease=-1.0)
    assert leased is not None
    assert driven.queue.counts("s") == {"leased": 1, "ready": 1}
    driven.queue.sweep()
    assert driven.queue.counts("s") == {"ready": 2}
    assert driven.queue.states([leased.key])[leased.key].deaths == 1


@pytest.mark.parametrize(
    "ending", [{"layer": 1.0}, Failed("E511", "not finite"), InputError("E101", "the file is gone")]
)
def test_a_worker_that_lost_its_lease_says_nothing_and_goes_on(driven: SqlStore, ending: Any) -> None:
    taken: list[str] = []

    def work(task: object) -> Any:
        if not taken:
            # Somebody takes this one for dead meanwhile.
            taken.extend(driven.queue.lost("zombie", "no sign of life"))
            assert all(driven.queue.claim("another", lease=60.0) for _ in range(2))
        if isinstance(ending, Exception):
            raise ending
        return ending

    zombie = Worker(driven, "zombie", work=work, lease=60.0)
    done = zombie.step()
    assert done is not None
    assert (done.key, done.failed, done.error) == ("", None, None)
    assert driven.queue.states(taken)[taken[0]].worker == "another"
    assert [line.kind for line in driven.control.lines("s")] == ["refused"]
    assert driven.get("ratios", "goes-0") is None
