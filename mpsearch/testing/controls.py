"""What every store must do for those who drive, watch and stop studies; see `mpsearch.testing.stores`."""

from __future__ import annotations

from collections.abc import Sequence
from typing import TYPE_CHECKING, Any

import pytest

from mpsearch.errors import InputError, StorageError
from mpsearch.machine import process_name
from mpsearch.records import WorkerRow
from mpsearch.testing.queues import DRIVER, drive
from mpsearch.testing.values import ODD

if TYPE_CHECKING:
    from mpsearch.storage.store import SqlStore

_UNKNOWN: Sequence[Any] = (
    lambda control: control.submit("b", "home"),
    lambda control: control.drive("b", DRIVER, 1.0),
    lambda control: control.want("b", "run"),
    lambda control: control.status("b"),
    lambda control: control.log("b", "note", ""),
    lambda control: control.lines("b"),
    lambda control: control.drop("b"),
)


class ControlSuite:
    """Drivers, wishes, logs and workers; part of `mpsearch.testing.stores.StoreSuite`."""

    def test_a_new_study_waits_for_nobody(self, store: SqlStore) -> None:
        store.create_study("a", {"name": "a"})
        found = store.control.status("a")
        assert (found.state, found.wanted, found.phase, found.done, found.total) == ("new", "run", "", 0, 0)
        assert (found.driver, found.live, found.reason, found.home) == ("", False, "", "")
        assert store.control.waiting() == []

    def test_a_submitted_study_waits(self, store: SqlStore) -> None:
        store.create_study("a", {"name": "a"})
        store.control.submit("a", "home")
        found = store.control.status("a")
        assert (found.state, found.home, store.study("a").state) == ("submitted", "home", "submitted")
        assert store.control.waiting() == ["a"]
        drive(store)
        assert store.control.waiting() == []

    def test_studies_wait_in_the_order_in_which_they_came(self, store: SqlStore) -> None:
        for name in ("c", "a", "b"):
            store.create_study(name, {"name": name})
            store.control.submit(name, "home")
        assert store.control.waiting() == ["c", "a", "b"]

    def test_submitting_a_study_that_is_driven_lets_it_go_on(self, store: SqlStore) -> None:
        drive(store)
        store.control.want("a", "pause")
        store.control.submit("a", "home")
        found = store.control.status("a")
        assert (found.state, found.wanted, found.live) == ("running", "run", True)

    def test_one_process_drives_a_study(self, store: SqlStore) -> None:
        assert drive(store) == 1
        with pytest.raises(StorageError, match="pid 1 on elsewhere") as caught:
            store.control.drive("a", "other:boot:1:2", 10.0)
        assert caught.value.code == "E144"
        assert store.control.status("a").driver == f"{DRIVER}a"

    def test_the_same_process_may_drive_again(self, store: SqlStore) -> None:
        assert drive(store) == 1
        assert drive(store) == 2
        with pytest.raises(StorageError):
            store.control.beat("a", f"{DRIVER}a", 1, 10.0, "", 0, 0)

    def test_a_driver_whose_lease_lapsed_is_followed(self, store: SqlStore) -> None:
        drive(store, lease=-1.0)
        assert store.control.status("a").state == "interrupted"
        assert store.study("a").state == "running"
        assert store.control.waiting() == ["a"]
        assert store.control.drive("a", "other:boot:1:2", 10.0) == 2
        assert store.control.status("a").state == "running"
        for call in (
            lambda: store.control.beat("a", f"{DRIVER}a", 1, 10.0, "", 0, 0),
            lambda: store.control.leave("a", f"{DRIVER}a", 1, "complete"),
        ):
            with pytest.raises(StorageError) as caught:
                call()
            assert caught.value.code == "E523"
        assert store.control.status("a").driver == "other:boot:1:2"

    def test_a_driver_of_this_machine_that_is_dead_is_followed_at_once(self, store: SqlStore) -> None:
        store.create_study("a", {"name": "a"})
        host, boot, pid, _ = process_name().split(":")
        store.control.drive("a", f"{host}:{boot}:{pid}:1", 1000.0)
        assert store.control.drive("a", process_name(), 10.0) == 2
        with pytest.raises(StorageError):
            store.control.drive("a", "other:boot:1:2", 10.0)

    def test_a_process_that_cannot_be_seen_from_here_is_not_known_to_be_dead(self, store: SqlStore) -> None:
        store.create_study("a", {"name": "a"})
        host, start, pid, _ = process_name().split(":")
        # A container of this machine, with the same host name.
        store.control.drive("a", f"{host}:{start.split('-')[0]}-1:{pid}:1", 1000.0)
        with pytest.raises(StorageError, match=f"pid {pid} on {host}") as caught:
            store.control.drive("a", process_name(), 10.0)
        assert caught.value.code == "E144"
        assert store.control.waiting() == []

    @pytest.mark.parametrize(
        ("wanted", "state"), [("run", "interrupted"), ("pause", "paused"), ("cancel", "cancelled")]
    )
    def test_a_study_whose_driver_went_before_it_did_what_was_wanted(
        self, store: SqlStore, wanted: str, state: str
    ) -> None:
        dead = f"{process_name().rpartition(':')[0]}:1"
        for name, owner in (("a", DRIVER), ("b", dead)):
            store.create_study(name, {"name": name})
            epoch = store.control.drive(name, owner, 1000.0)
            store.control.want(name, wanted)
            if owner == DRIVER:
                assert store.control.status(name).state == "running"
                store.control.beat(name, owner, epoch, -1.0, "", 0, 0)
        assert [(row.state, row.live) for row in store.control.statuses()] == [(state, False)] * 2
        assert store.control.waiting() == (["a", "b"] if wanted == "run" else [])

    def test_a_beat_renews_and_tells_what_is_wanted(self, store: SqlStore) -> None:
        epoch = drive(store, lease=-1.0)
        assert store.control.beat("a", f"{DRIVER}a", epoch, 1000.0, "score", 3, 10) == "run"
        found = store.control.status("a")
        assert (found.state, found.live, found.phase, found.done, found.total) == ("running", True, "score", 3, 10)
        for wanted in ("pause", "cancel", "run"):
            store.control.want("a", wanted)
            assert store.control.beat("a", f"{DRIVER}a", epoch, 1000.0, "score", 3, 10) == wanted

    @pytest.mark.parametrize("wanted", ["pause", "cancel"])
    def test_who_runs_a_study_wants_it_to_run(self, store: SqlStore, wanted: str) -> None:
        store.create_study("a", {"name": "a"})
        store.control.want("a", wanted)
        epoch = drive(store)
        assert store.control.beat("a", f"{DRIVER}a", epoch, 10.0, "", 0, 0) == "run"

    @pytest.mark.parametrize("wanted", ["pause", "cancel"])
    @pytest.mark.parametrize("lapsed", [False, True])
    def test_a_study_that_was_stopped_meanwhile_is_not_adopted(
        self, store: SqlStore, wanted: str, lapsed: bool
    ) -> None:
        store.create_study("a", {"name": "a"})
        store.control.submit("a", "home")
        if lapsed:
            drive(store, lease=-1.0)
        assert store.control.waiting() == ["a"]
        store.control.want("a", wanted)
        before = store.control.status("a")
        with pytest.raises(StorageError, match="no longer waiting for a driver") as caught:
            store.control.drive("a", DRIVER, 10.0, adopt=True)
        assert caught.value.code == "E145"
        assert store.control.status("a") == before

    def test_only_a_study_that_waits_is_adopted(self, store: SqlStore) -> None:
        store.create_study("a", {"name": "a"})
        for state in ("new", "complete", "gaps", "failed", "paused"):
            store.set_state("a", state)
            with pytest.raises(StorageError) as caught:
                store.control.drive("a", DRIVER, 10.0, adopt=True)
            assert caught.value.code == "E145"
        store.control.submit("a", "home")
        assert store.control.drive("a", DRIVER, 10.0, adopt=True) == 1
        with pytest.raises(StorageError) as caught:
            store.control.drive("a", "other:boot:1:2", 10.0, adopt=True)
        assert caught.value.code == "E144"
        # The answer to the first call was lost on its way.
        assert store.control.drive("a", DRIVER, -1.0, adopt=True) == 2
        assert store.control.drive("a", "other:boot:1:2", 10.0, adopt=True) == 3
        assert store.control.status("a").state == "running"

    def test_only_its_own_driver_drops_a_study(self, store: SqlStore) -> None:
        epoch = drive(store)
        for owner, number in ((f"{DRIVER}a", epoch + 1), ("other:boot:1:2", epoch)):
            store.control.drop("a", owner, number)
        store.control.drop("b", f"{DRIVER}a", epoch)
        assert [row.name for row in store.studies()] == ["a"]
        store.control.drop("a", f"{DRIVER}a", epoch)
        assert store.studies() == []

    @pytest.mark.parametrize("state", ["complete", "gaps", "failed", "paused", "cancelled"])
    def test_a_driver_leaves_in_some_state(self, store: SqlStore, state: str) -> None:
        epoch = drive(store)
        store.control.leave("a", f"{DRIVER}a", epoch, state, "why\0not")
        found = store.control.status("a")
        assert (found.state, found.live, found.driver, found.reason) == (state, False, "", "why\ufffdnot")
        assert store.study("a").state == state
        assert store.control.waiting() == []
        with pytest.raises(StorageError):
            store.control.beat("a", f"{DRIVER}a", epoch, 10.0, "", 0, 0)
        assert store.control.drive("a", "other:boot:1:2", 10.0) == 2
        assert store.control.status("a").reason == ""

    def test_an_unknown_end_or_wish_is_refused(self, store: SqlStore) -> None:
        epoch = drive(store)
        with pytest.raises(ValueError, match="complete"):
            store.control.leave("a", f"{DRIVER}a", epoch, "done")
        with pytest.raises(ValueError, match="pause"):
            store.control.want("a", "stop")

    @pytest.mark.parametrize(("wanted", "state"), [("pause", "paused"), ("cancel", "cancelled")])
    def test_a_study_that_nobody_drives_stops_at_once(self, store: SqlStore, wanted: str, state: str) -> None:
        for name, lease in (("a", None), ("b", -1.0)):
            store.create_study(name, {"name": name})
            store.control.submit(name, "home")
            if lease is not None:
                store.control.drive(name, DRIVER, lease)
            store.control.want(name, wanted)
            assert store.control.status(name).state == state
        assert store.control.waiting() == []

    def test_what_has_ended_stays_ended(self, store: SqlStore) -> None:
        epoch = drive(store)
        store.control.leave("a", f"{DRIVER}a", epoch, "complete")
        for wanted in ("pause", "cancel", "run"):
            store.control.want("a", wanted)
            assert store.control.status("a").state == "complete"

    def test_a_submitted_study_that_was_paused_waits_again(self, store: SqlStore) -> None:
        store.create_study("a", {"name": "a"})
        store.control.submit("a", "home")
        store.control.want("a", "pause")
        assert store.control.waiting() == []
        store.control.want("a", "run")
        assert store.control.waiting() == ["a"]

    def test_a_study_that_was_run_in_place_waits_for_nobody(self, store: SqlStore) -> None:
        epoch = drive(store)
        store.control.want("a", "pause")
        store.control.leave("a", f"{DRIVER}a", epoch, "paused")
        store.control.want("a", "run")
        assert (store.control.status("a").state, store.control.waiting()) == ("paused", [])

    def test_statuses_come_newest_first(self, store: SqlStore) -> None:
        for name in ("b", "a", "c"):
            store.create_study(name, {"name": name})
        drive(store, "b", -1.0)
        found = [(row.name, row.state) for row in store.control.statuses()]
        assert found == [("c", "new"), ("a", "new"), ("b", "interrupted")]
        assert store.control.statuses()[2] == store.control.status("b")

    @pytest.mark.parametrize("call", _UNKNOWN)
    def test_an_unknown_study_is_said_to_be(self, store: SqlStore, call: Any) -> None:
        store.create_study("a", {"name": "a"})
        with pytest.raises(StorageError, match="no study 'b'") as caught:
            call(store.control)
        assert caught.value.code == "E141"

    def test_a_dropped_study_is_gone_and_its_values_stay(self, store: SqlStore) -> None:
        drive(store)
        store.put("plan", "k", {"x": 1})
        store.link("a", "plan", "k")
        store.control.log("a", "note", "x")
        store.control.drop("a")
        assert store.studies() == []
        assert store.get("plan", "k") == {"x": 1}
        store.create_study("a", {"another": "question"})
        assert (store.links("a", "plan"), store.control.lines("a")) == ([], [])

    # --- the log

    def test_lines_come_in_order_and_from_one_on(self, store: SqlStore) -> None:
        for name in ("a", "b"):
            store.create_study(name, {"name": name})
            for i in range(5):
                store.control.log(name, "note", f"{name}{i}")
        lines = store.control.lines("a")
        assert [line.text for line in lines] == [f"a{i}" for i in range(5)]
        assert [line.id for line in lines] == sorted(line.id for line in lines)
        assert abs(lines[0].time - store.control.clock()) < 60
        assert [line.text for line in store.control.lines("a", after=lines[1].id, limit=2)] == ["a2", "a3"]
        assert store.control.lines("a", limit=0) == []

    @pytest.mark.parametrize("text", [*ODD, "a\0b", "\x1b[31m", "x\ny"])
    def test_any_line_is_kept(self, store: SqlStore, text: str) -> None:
        store.create_study("a", {"name": "a"})
        store.control.log("a", "note", text)
        assert store.control.lines("a")[0].text == text.replace("\0", "\ufffd")

    def test_a_long_line_is_cut(self, store: SqlStore) -> None:
        store.create_study("a", {"name": "a"})
        store.control.log("a", "note", "x" * 10_000)
        assert len(store.control.lines("a")[0].text) == 2000
        with pytest.raises(InputError):
            store.control.log("a", "x" * 21, "")

    def test_old_lines_make_room_for_new_ones(self, store: SqlStore, monkeypatch: pytest.MonkeyPatch) -> None:
        monkeypatch.setattr("mpsearch.storage.events.LINES", 20)
        for name in ("a", "b"):
            store.create_study(name, {"name": name})
            for i in range(25):
                store.control.log(name, "note", str(i))
        for name in ("a", "b"):
            assert [line.text for line in store.control.lines(name)] == [str(i) for i in range(5, 25)]

    # --- workers

    def test_workers_say_hello_and_bye(self, store: SqlStore) -> None:
        store.control.hello(WorkerRow("w", "host", 7, "score fc", {"gpus": 1}))
        store.control.hello(WorkerRow("v", "host", 8))
        first = {row.name: row for row in store.control.workers()}
        assert list(first) == ["v", "w"]
        assert (first["w"].host, first["w"].pid, first["w"].doing, first["w"].info) == (
            "host",
            7,
            "score fc",
            {"gpus": 1},
        )
        store.control.hello(WorkerRow("w", "host", 7, "measure"))
        again = store.control.workers()[1]
        assert (again.doing, again.info, again.started) == ("measure", {}, first["w"].started)
        assert first["w"].seen <= again.seen <= store.control.clock()
        store.control.bye("w")
        store.control.bye("w")
        assert [row.name for row in store.control.workers()] == ["v"]

    def test_the_clock_is_the_time(self, store: SqlStore) -> None:
        first = store.control.clock()
        assert 1.7e9 < first <= store.control.clock() < 1e11
