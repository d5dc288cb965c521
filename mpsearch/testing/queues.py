"""What every store must do with tasks and leases; see `mpsearch.testing.stores`."""

from __future__ import annotations

from collections import Counter
from collections.abc import Iterable, Sequence
from concurrent.futures import ThreadPoolExecutor
from typing import TYPE_CHECKING, Any

import pytest

from mpsearch.errors import InputError, StorageError
from mpsearch.records import ClaimArgs, LeasedTask, TaskRow, ValueRow
from mpsearch.testing.values import HOSTILE, cell

if TYPE_CHECKING:
    from mpsearch.storage.store import SqlStore

#: A driver of another machine, of which nobody here can know whether it is alive.
DRIVER = "elsewhere:boot:1:2"


def drive(store: SqlStore, name: str = "a", lease: float = 1000.0) -> int:
    """Make a study if there is none, and drive it."""
    store.create_study(name, {"name": name})
    return store.control.drive(name, f"{DRIVER}{name}", lease)


def tasks(numbers: Iterable[int], setup: str = "s", **changes: Any) -> list[TaskRow]:
    """Tasks whose position is their number."""
    return [TaskRow(f"k{i:02}", setup, "score", {"i": i}, **{"position": i, **changes}) for i in numbers]


def offered(store: SqlStore, count: int = 3) -> SqlStore:
    """Offer some tasks of a study that is driven."""
    drive(store)
    store.queue.offer("a", tasks(range(count)))
    return store


def taken(store: SqlStore, worker: str = "w", lease: float = 1000.0, **more: Any) -> LeasedTask:
    """Claim a task that must be there."""
    found = store.queue.claim(worker, lease=lease, **more)
    assert found is not None
    return found


def state(store: SqlStore, key: str = "k00") -> tuple[str, int]:
    """State of a task, and how many workers died of it."""
    found = store.queue.states([key])[key]
    return found.state, found.deaths


def drain(store: SqlStore, worker: str = "w", **more: Any) -> list[str]:
    """Claim all there is, and return the keys in order."""
    keys: list[str] = []
    while (found := store.queue.claim(worker, lease=1000.0, **more)) is not None:
        keys.append(found.key)
    return keys


class QueueSuite:
    """Tasks and leases; part of `mpsearch.testing.stores.StoreSuite`."""

    def test_a_claimed_task_is_as_it_was_offered(self, store: SqlStore) -> None:
        drive(store)
        store.queue.offer("a", [TaskRow("k", "setup", "score", {"x": [1, 2.5, None]}, 7)])
        before = store.control.clock()
        found = taken(store, "w", 60.0)
        assert (found.key, found.study, found.setup, found.kind, found.worker) == ("k", "a", "setup", "score", "w")
        assert (found.body, found.epoch, found.deaths, found.attempts) == ({"x": [1, 2.5, None]}, 1, 0, 1)
        assert before + 59 < found.until < store.control.clock() + 61
        assert store.queue.states(["k"])["k"].worker == "w"

    def test_tasks_come_by_position_then_by_key(self, store: SqlStore) -> None:
        drive(store)
        rows = [TaskRow(key, "s", "score", {}, position) for key, position in (("d", 1), ("c", 2), ("b", 1), ("a", 9))]
        store.queue.offer("a", rows)
        assert drain(store) == ["b", "d", "c", "a"]

    def test_studies_take_turns_by_position(self, store: SqlStore) -> None:
        for name in ("a", "b"):
            drive(store, name)
            store.queue.offer(name, [TaskRow(f"{name}{i}", "s", "score", {}, i) for i in range(3)])
        assert drain(store) == ["a0", "b0", "a1", "b1", "a2", "b2"]

    def test_no_task_is_given_out_twice(self, store: SqlStore) -> None:
        offered(store, 40)
        with ThreadPoolExecutor(8) as pool:
            found = [key for keys in pool.map(lambda i: drain(store, f"w{i}"), range(8)) for key in keys]
        assert sorted(found) == [f"k{i:02}" for i in range(40)]

    def test_nothing_to_do_gives_none(self, store: SqlStore) -> None:
        assert store.queue.claim("w", lease=1.0) is None
        drive(store)
        store.queue.offer("a", [])
        assert store.queue.claim("w", lease=1.0) is None

    def test_only_tasks_of_driven_studies_are_given_out(self, store: SqlStore) -> None:
        store.create_study("a", {"name": "a"})
        store.queue.offer("a", tasks([0]))
        assert store.queue.claim("w", lease=1.0) is None
        store.control.drive("a", DRIVER, -1.0)
        assert store.queue.claim("w", lease=1.0) is None
        store.control.drive("a", DRIVER, 1000.0)
        assert taken(store).key == "k00"

    @pytest.mark.parametrize("wanted", ["pause", "cancel"])
    def test_a_study_that_shall_stop_gives_no_tasks(self, store: SqlStore, wanted: str) -> None:
        offered(store)
        store.control.want("a", wanted)
        assert store.queue.claim("w", lease=1.0) is None
        store.control.want("a", "run")
        assert taken(store).key == "k00"

    def test_a_worker_may_ask_for_setups_and_leave_out_others(self, store: SqlStore) -> None:
        drive(store)
        for i, setup in enumerate("xyz"):
            store.queue.offer("a", tasks(range(2 * i, 2 * i + 2), setup))
        assert taken(store, setups=["y"]).key == "k02"
        assert taken(store, skip=["x"]).key == "k03"
        assert store.queue.claim("w", lease=1.0, setups=["x"], skip=["x"]) is None
        assert store.queue.claim("w", lease=1.0, setups=[]) is None
        assert drain(store, setups=["z", "x"]) == ["k00", "k01", "k04", "k05"]

    def test_a_worker_may_ask_for_one_study(self, store: SqlStore) -> None:
        for name in ("a", "b"):
            drive(store, name)
            store.queue.offer(name, [TaskRow(f"{name}{i}", "s", "score", {}, i) for i in range(2)])
        assert drain(store, any_study=False, study="b") == ["b0", "b1"]
        assert store.queue.claim("w", lease=1.0, any_study=False) is None

    # --- the end of a task

    def test_a_result_is_kept_with_the_end_of_its_lease(self, store: SqlStore) -> None:
        offered(store)
        rows = [ValueRow("measurement", "m", {"loss": 1.5, "seconds": 2.0}, {"seconds": 2.0})]
        assert store.queue.finish(taken(store), values=rows, cells=[("x", [cell()]), ("y", [cell(value=2.0)])]) is None
        assert state(store) == ("done", 0)
        assert store.get("measurement", "m") == {"loss": 1.5, "seconds": 2.0}
        assert [row.value for scope in "xy" for row in store.cells(scope)] == [0.5, 2.0]

    def test_the_end_of_a_task_may_take_the_next(self, store: SqlStore) -> None:
        offered(store)
        following = store.queue.finish(taken(store), claim=ClaimArgs("w", 1000.0))
        assert following is not None
        assert (following.key, following.epoch, following.worker) == ("k01", 1, "w")
        following = store.queue.finish(following, claim={"lease": 1000.0, "setups": ("s",)})
        assert following is not None
        assert store.queue.finish(following, claim={"lease": 1.0}) is None
        assert store.queue.counts("a") == {"done": 3}

    def test_a_task_ends_once(self, store: SqlStore) -> None:
        offered(store)
        lease = taken(store)
        for _ in range(2):
            # The answer to the first call may be lost on its way.
            store.queue.finish(lease, values=[ValueRow("plan", "p", {})])
        assert state(store) == ("done", 0)
        with pytest.raises(StorageError) as caught:
            store.queue.fail(lease, "E512", "too late")
        assert caught.value.code == "E523"

    def test_nothing_is_kept_of_a_result_that_comes_too_late(self, store: SqlStore) -> None:
        offered(store, 1)
        old = taken(store, "slow", -1.0)
        new = taken(store, "quick")
        assert (new.key, new.epoch, new.attempts, new.deaths) == (old.key, 2, 2, 1)
        with pytest.raises(StorageError) as caught:
            store.queue.finish(old, values=[ValueRow("plan", "p", {})], cells=[("x", [cell()])], claim={"lease": 1.0})
        assert caught.value.code == "E523"
        assert (store.get("plan", "p"), store.cells("x")) == (None, [])
        assert state(store) == ("leased", 1)
        (line,) = store.control.lines("a")
        assert (line.kind, line.text.split(":")[0]) == ("refused", "slow")
        store.queue.finish(new, values=[ValueRow("plan", "p", {})])
        assert store.get("plan", "p") == {}

    def test_a_result_of_a_task_that_is_gone_is_refused(self, store: SqlStore) -> None:
        offered(store, 1)
        lease = taken(store)
        store.control.drop("a")
        with pytest.raises(StorageError) as caught:
            store.queue.finish(lease, values=[ValueRow("plan", "p", {})])
        assert caught.value.code == "E523"
        assert store.get("plan", "p") is None

    def test_a_lease_that_lapsed_holds_until_another_takes_it(self, store: SqlStore) -> None:
        offered(store, 1)
        store.queue.finish(taken(store, lease=-1.0), values=[ValueRow("plan", "p", {})])
        assert state(store) == ("done", 0)

    def test_another_value_ends_the_task_and_is_a_conflict(self, store: SqlStore) -> None:
        offered(store)
        store.put("plan", "p", {"a": 1})
        store.put_cells("x", [cell()])
        rows = [ValueRow("plan", "p", {"a": 2}), ValueRow("plan", "q", {})]
        with pytest.raises(StorageError) as caught:
            store.queue.finish(
                taken(store), values=rows, cells=[("x", [cell(value=0.75), cell("new")])], claim={"lease": 9.0}
            )
        assert caught.value.code == "E521"
        assert state(store) == ("done", 0)
        assert (store.get("plan", "p"), store.get("plan", "q")) == ({"a": 1}, {})
        assert [row.value for row in store.cells("x")] == [0.5, 0.5]
        assert [row.kind for row in store.conflicts()] == ["plan", "cell"]
        assert state(store, "k01") == ("ready", 0)

    def test_a_result_that_makes_no_sense_leaves_the_task_leased(self, store: SqlStore) -> None:
        offered(store)
        lease = taken(store)
        with pytest.raises(ValueError, match="JSON"):
            store.queue.finish(lease, values=[ValueRow("plan", "p", {"x": float("nan")})])
        assert state(store) == ("leased", 0)

    def test_a_failure_is_kept(self, store: SqlStore) -> None:
        offered(store, 1)
        store.queue.fail(taken(store), "E512", "a\0b\n\ud800", {"where": "fc"})
        found = store.queue.states(["k00"])["k00"]
        assert found.state == "failed"
        assert found.reason == {"code": "E512", "message": "a\ufffdb\n?", "data": {"where": "fc"}}
        assert store.queue.claim("w", lease=1.0) is None

    def test_a_failure_that_comes_too_late_is_refused(self, store: SqlStore) -> None:
        offered(store, 1)
        old = taken(store, lease=-1.0)
        taken(store, "v")
        with pytest.raises(StorageError) as caught:
            store.queue.fail(old, "E512", "")
        assert caught.value.code == "E523"
        assert state(store) == ("leased", 1)

    # --- leases

    def test_a_renewed_lease_holds(self, store: SqlStore) -> None:
        offered(store, 1)
        lease = taken(store, lease=-1.0)
        assert store.queue.renew(lease, 1000.0)
        assert store.queue.claim("v", lease=1.0) is None
        store.queue.finish(lease)

    def test_a_lost_lease_is_not_renewed(self, store: SqlStore) -> None:
        offered(store, 1)
        old = taken(store, lease=-1.0)
        new = taken(store, "v")
        assert not store.queue.renew(old, 1000.0)
        store.queue.finish(new)
        assert not store.queue.renew(new, 1000.0)

    def test_a_task_given_back_has_killed_nobody(self, store: SqlStore) -> None:
        offered(store, 1)
        lease = taken(store)
        store.queue.release(lease)
        assert state(store) == ("ready", 0)
        assert taken(store, "v").epoch == 2
        store.queue.release(lease)
        assert state(store) == ("leased", 0)

    def test_a_task_that_kills_three_workers_is_given_up(self, store: SqlStore) -> None:
        offered(store, 1)
        for deaths in range(3):
            found = taken(store, f"w{deaths}", -1.0)
            assert (found.deaths, found.attempts) == (deaths, deaths + 1)
        assert store.queue.claim("w", lease=1.0) is None
        assert state(store) == ("dead", 3)
        reason = store.queue.states(["k00"])["k00"].reason
        assert reason == {"code": "E522", "message": "its worker gave no sign of life"}

    def test_tasks_of_a_dead_worker_are_free_at_once(self, store: SqlStore) -> None:
        offered(store)
        first, second = taken(store, "w"), taken(store, "v")
        assert store.queue.lost("w", "signal 9") == [first.key]
        assert state(store) == ("ready", 1)
        assert state(store, second.key) == ("leased", 0)
        assert store.queue.lost("w", "signal 9") == []
        assert taken(store, "u").key == "k02"
        for _ in range(2):
            assert taken(store).key == "k00"
            store.queue.lost("w", "signal 9")
        assert state(store) == ("dead", 3)
        assert store.queue.states(["k00"])["k00"].reason == {"code": "E522", "message": "signal 9"}

    def test_a_task_that_ended_a_worker_comes_after_the_others(self, store: SqlStore) -> None:
        offered(store, 3)
        store.queue.offer("a", [TaskRow("far", "s", "score", {}, (1 << 63) - 1)])
        for key in ("k00", "k01"):
            assert taken(store).key == key
            assert store.queue.lost("w", "signal 9") == [key]
        store.queue.offer("a", tasks([1]))
        assert drain(store) == ["k01", "k02", "k00", "far"]
        store.queue.lost("w", "signal 9")
        assert drain(store) == ["k00", "k01", "k02", "far"]

    def test_tasks_of_a_worker_that_was_ended_blame_nobody(self, store: SqlStore) -> None:
        offered(store, 1)
        taken(store)
        assert store.queue.lost("w", "") == ["k00"]
        assert state(store) == ("ready", 0)

    # --- offers

    def test_offering_again_changes_nothing(self, store: SqlStore) -> None:
        offered(store)
        store.queue.finish(taken(store))
        lease = taken(store)
        store.queue.offer("a", tasks(range(3)))
        store.queue.offer("a", tasks(range(3)), again=True)
        assert store.queue.counts("a") == {"done": 1, "leased": 1, "ready": 1}
        store.queue.finish(lease)

    def test_an_offer_sets_the_position_of_what_is_not_done(self, store: SqlStore) -> None:
        offered(store)
        store.queue.offer("a", [TaskRow("k02", "s", "score", {}, -5)])
        assert drain(store) == ["k02", "k00", "k01"]

    def test_what_failed_is_offered_anew_only_when_asked(self, store: SqlStore) -> None:
        offered(store, 2)
        store.queue.fail(taken(store), "E512", "")
        for _ in range(3):
            taken(store, "w")
            store.queue.lost("w", "signal 9")
        store.queue.offer("a", tasks(range(2)))
        assert store.queue.counts("a") == {"dead": 1, "failed": 1}
        store.queue.offer("a", tasks(range(2)), again=True)
        assert store.queue.counts("a") == {"ready": 2}
        assert store.queue.states(["k01"])["k01"].reason == {}
        assert state(store, "k01") == ("ready", 0)

    def test_two_studies_share_a_task(self, store: SqlStore) -> None:
        offered(store)
        drive(store, "b")
        store.queue.offer("b", tasks(range(5)))
        assert (store.queue.counts("a"), store.queue.counts("b")) == ({"ready": 3}, {"ready": 2})
        assert drain(store) == [f"k{i:02}" for i in range(5)]

    def test_tasks_of_a_study_without_driver_go_over(self, store: SqlStore) -> None:
        offered(store)
        store.queue.finish(taken(store))
        lease = taken(store)
        drive(store, "b")
        store.control.leave("a", f"{DRIVER}a", 1, "paused")
        store.queue.offer("b", tasks(range(3)))
        assert (store.queue.counts("a"), store.queue.counts("b")) == ({"done": 1}, {"leased": 1, "ready": 1})
        store.queue.finish(lease)
        assert drain(store) == ["k02"]

    def test_tasks_of_a_study_that_shall_pause_go_over(self, store: SqlStore) -> None:
        offered(store)
        drive(store, "b")
        store.control.want("a", "pause")
        store.queue.offer("b", tasks(range(3)))
        assert store.queue.counts("b") == {"ready": 3}

    def test_a_task_that_goes_over_is_as_its_new_study_offers_it(self, store: SqlStore) -> None:
        drive(store)
        store.queue.offer("a", tasks([0], "old"))
        drive(store, "b")
        store.control.leave("a", f"{DRIVER}a", 1, "paused")
        store.queue.offer("b", [TaskRow("k00", "new", "measure", {"new": True}, 5)])
        assert store.queue.claim("w", lease=1.0, setups=["old"]) is None
        found = taken(store, setups=["new"])
        assert (found.study, found.setup, found.kind, found.body) == ("b", "new", "measure", {"new": True})

    def test_a_task_that_is_offered_anew_is_as_its_new_study_offers_it(self, store: SqlStore) -> None:
        drive(store)
        store.queue.offer("a", tasks([0], "old"))
        store.queue.fail(taken(store), "E512", "")
        drive(store, "b")
        store.queue.offer("b", tasks([0], "new"), again=True)
        assert taken(store, setups=["new"]).study == "b"

    def test_a_task_of_another_study_that_is_driven_stays_as_it_is(self, store: SqlStore) -> None:
        drive(store)
        store.queue.offer("a", tasks([0], "old"))
        drive(store, "b")
        for again in (False, True):
            store.queue.offer("b", tasks([0], "new"), again=again)
        found = taken(store)
        assert (found.study, found.setup) == ("a", "old")

    @pytest.mark.parametrize("how", ["gone", "lapsed", "pause", "cancel"])
    def test_orphans_are_what_nobody_will_end(self, store: SqlStore, how: str) -> None:
        offered(store, 4)
        epoch = drive(store, "b")
        store.queue.offer("b", tasks([5]))
        store.queue.finish(taken(store))
        store.queue.fail(taken(store), "E512", "")
        taken(store)
        keys = ["k09", "k05", "k03", "k02", "k01", "k00", "k03"]
        assert store.queue.orphans("b", keys) == ["k09"]
        if how == "lapsed":
            store.control.beat("a", f"{DRIVER}a", 1, -1.0, "", 0, 0)
        elif how == "gone":
            store.control.leave("a", f"{DRIVER}a", 1, "failed")
        else:
            store.control.want("a", how)
        assert store.queue.orphans("b", keys) == ["k09", "k03", "k02"]
        assert store.queue.orphans("a", keys) == ["k09"]
        store.control.leave("b", f"{DRIVER}b", epoch, "paused")
        assert store.queue.orphans("b", ["k05"]) == []
        assert store.queue.orphans("b", []) == []
        store.control.drop("a")
        assert store.queue.orphans("b", keys) == ["k09", "k03", "k02", "k01", "k00"]

    def test_a_driver_that_was_followed_removes_nothing(self, store: SqlStore) -> None:
        old = drive(store)
        new = drive(store)
        store.queue.offer("a", tasks(range(2)))
        store.queue.finish(taken(store))
        store.queue.withdraw("a", old)
        store.queue.forget("a", epoch=old)
        assert store.queue.counts("a") == {"done": 1, "ready": 1}
        store.queue.withdraw("a", new)
        assert store.queue.counts("a") == {"done": 1}
        store.queue.forget("a", epoch=new)
        assert store.queue.counts("a") == {}

    def test_withdrawn_tasks_are_gone_and_begun_ones_stay(self, store: SqlStore) -> None:
        offered(store)
        drive(store, "b")
        store.queue.offer("b", tasks([9]))
        lease = taken(store)
        store.queue.withdraw("a")
        assert (store.queue.counts("a"), store.queue.counts("b")) == ({"leased": 1}, {"ready": 1})
        store.queue.finish(lease)
        store.queue.forget("a")
        assert store.queue.counts("a") == {}
        assert list(store.queue.states(["k00", "k01", "k09", "x"])) == ["k09"]

    def test_many_tasks_at_once(self, store: SqlStore) -> None:
        drive(store)
        rows = [TaskRow(f"{i:05}", "s", "score", {"i": i}, i) for i in range(5000)]
        for _ in range(2):
            store.queue.offer("a", rows)
        assert store.queue.counts("a") == {"ready": 5000}
        assert len(store.queue.states([row.key for row in rows])) == 5000
        assert store.queue.states([]) == {}
        assert taken(store).key == "00000"

    def test_tasks_go_with_their_study(self, store: SqlStore) -> None:
        offered(store)
        store.control.drop("a")
        assert store.queue.states(["k00"]) == {}

    @pytest.mark.parametrize("name", [*HOSTILE, "x" * 65])
    def test_hostile_keys_are_refused(self, store: SqlStore, name: str) -> None:
        drive(store)
        for row in (TaskRow(name, "s", "score", {}), TaskRow("k", name, "score", {}), TaskRow("k", "s", name, {})):
            with pytest.raises(InputError) as caught:
                store.queue.offer("a", [row])
            assert caught.value.code == "E114"

    def test_tasks_of_an_unknown_study_are_refused(self, store: SqlStore) -> None:
        calls: Sequence[Any] = (
            lambda: store.queue.offer("b", tasks([0])),
            lambda: store.queue.counts("b"),
            lambda: store.queue.withdraw("b"),
            lambda: store.queue.forget("b"),
        )
        for call in calls:
            with pytest.raises(StorageError, match="no study 'b'") as caught:
                call()
            assert caught.value.code == "E141"

    def test_workers_that_die_lose_nothing(self, store: SqlStore) -> None:
        drive(store)
        store.queue.offer("a", tasks(range(30)))
        zombies: list[LeasedTask] = []
        results: Counter[str] = Counter()
        while (found := store.queue.claim("w", lease=-1.0 if len(zombies) < 20 else 1000.0)) is not None:
            if found.until < store.control.clock():
                zombies.append(found)
                continue
            store.queue.finish(found, values=[ValueRow("plan", found.key, {"i": found.body["i"]})])
            results[found.key] += 1
        dead = [key for key in (f"k{i:02}" for i in range(30)) if state(store, key)[0] == "dead"]
        assert set(results.values()) == {1}
        assert sorted([*results, *dead]) == [f"k{i:02}" for i in range(30)]
        for zombie in zombies:
            with pytest.raises(StorageError):
                store.queue.finish(zombie, values=[ValueRow("plan", "zombie", {})])
        assert store.get("plan", "zombie") is None
        assert len(store.control.lines("a")) == len(zombies) == 20
