"""Driving a study: its lease, the tasks that it offers, and waiting until all have ended."""

from __future__ import annotations

import logging
import threading
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from types import TracebackType
from typing import Any, Self

from mpsearch.errors import MpsearchError, ResourceError, StorageError
from mpsearch.keeping import missing
from mpsearch.keys import content_key
from mpsearch.machine import fingerprint, is_gone, process_name
from mpsearch.pace import Detail
from mpsearch.ports import Executor, Store
from mpsearch.records import PRIVATE, TaskRow, TaskState
from mpsearch.tasks import Failed, Job
from mpsearch.working import AWAY, LEASE, Order, Work, Worker, as_error, tell_once

_LOG = logging.getLogger("mpsearch")
#: Seconds between two looks at tasks that others do, at least.
_LOOK = 0.05
#: Of the time, how much looking may take.
_SHARE = 0.05
#: Seconds after which tasks of a study whose driver is gone are offered again by those who wait for them.
_AGAIN = 5.0
#: Seconds after which everybody who waits for a task has seen that it is done.
_SEEN = 60.0


class Stopped(KeyboardInterrupt):
    """Somebody asked for a study to be paused or cancelled, or its process to leave it to others.

    Attributes:
        wanted: ``pause``, ``cancel`` or ``leave``.
    """

    def __init__(self, wanted: str) -> None:
        super().__init__(wanted)
        self.wanted = wanted


@dataclass(frozen=True)
class Terms:
    """On what terms a process drives a study.

    Attributes:
        again: try again what failed, or was given up, in an earlier run.
        adopts: nobody asked this process in particular: it drives a study only if that still waits for somebody, and
            leaves it to others when it has to end, or lacks something.
        stop: asked between tasks; True when the process has to end.
    """

    again: bool = True
    adopts: bool = False
    stop: Callable[[], bool] = lambda: False


class Driver:
    """The one process that works on a study: others may only do its tasks.

    Use it as a context: the study belongs to this process inside.

    Attributes:
        study: name of the study.
        progress: (phase, done, total) of what goes on, for those who watch.
        detail: what else is worth knowing of it.
    """

    def __init__(
        self,
        store: Store,
        study: str,
        executor: Executor,
        identity: Mapping[str, str],
        setup: Mapping[str, Any],
        *,
        storage: str,
        work: Work,
        private: bool = False,
        terms: Terms | None = None,
        lease: float = LEASE,
    ) -> None:
        """Set up; nothing is claimed yet.

        Args:
            store: the database.
            study: name of a stored study.
            executor: starts the workers.
            identity: digests of ``model``, ``calibration`` and ``validation``.
            setup: how the data is cut and what is decided; with the identity, all that makes two tasks comparable.
            storage: address of the database, for workers that open it themselves.
            work: does tasks in this process.
            private: the model is in this process only.
            terms: on what terms; those of a user who runs the study when None.
            lease: seconds that the study, or a task, stays claimed without a sign of life.
        """
        self.study = study
        self.progress = ("", 0, 0)
        self.detail = Detail()
        self._store, self._executor, self._lease, self._work = store, executor, lease, work
        self._terms = terms or Terms()
        conditions = fingerprint()
        self._conditions = {
            "identity": [identity[x] for x in ("model", "calibration", "validation")],
            "conditions": conditions,
        }
        # Tasks on a model that is in this process are for this process.
        whose = process_name() if private else ""
        key = content_key([dict(identity), dict(setup), conditions, whose])
        self.setup_key = f"{PRIVATE}{key}"[: len(key)] if private else key
        self._order = Order(storage, (self.setup_key,), lease)
        self._epoch = 0
        self._name = process_name()
        self._wanted = "run"
        self._lost: MpsearchError | None = None
        self._ended = threading.Event()
        self._begun = False
        self._doing: dict[str, Job] = {}
        # The store is its owner's, who may wait on other terms.
        self._put_back: Callable[[], None] = lambda: None

    def __enter__(self) -> Self:
        self._put_back = self._store.wait_for_server(AWAY, _LOG.warning, self._terms.stop)
        try:
            self._epoch = self._store.control.drive(self.study, self._name, self._lease, adopt=self._terms.adopts)
        except BaseException:
            self._put_back()
            raise
        threading.Thread(target=self._beat, daemon=True).start()
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        try:
            self._dismiss(now=kind is not None and not issubclass(kind, Exception))
        finally:
            self._ended.set()
            self._put_back()

    def _dismiss(self, now: bool) -> None:
        if now:
            # Who asks a study to stop must not wait for a server that is away.
            self._store.wait_for_server(0.0)
        if self._begun:
            self._begun = False
            self._executor.end(now)

    def leave(self, state: str, reason: str = "", now: bool = False) -> None:
        """End the workers and let go of the study, in some state; its tasks that nobody has begun are withdrawn.

        Args:
            state: where the study stands.
            reason: why it failed.
            now: do not wait for what the workers are doing.
        """
        self._dismiss(now)
        self._ended.set()
        if self._lost is not None:
            # It is another process's now.
            return
        control, queue, mine = self._store.control, self._store.queue, (self.study, self._name, self._epoch)
        try:
            # How far it came, for those who look at it later.
            control.beat(*mine, self._lease, *self.progress)
            queue.withdraw(self.study, self._epoch)
            queue.forget(self.study, older=_SEEN, epoch=self._epoch)
            control.leave(*mine, state, reason)
        except StorageError as error:
            # Where nobody hears that it ends, it will count as interrupted.
            if error.code not in ("E523", "E609"):
                raise

    def drop(self) -> None:
        """Forget the study, if it is still this process's."""
        self._dismiss(now=True)
        self._ended.set()
        self._store.control.drop(self.study, self._name, self._epoch)

    def do(self, jobs: Sequence[Job]) -> Iterator[tuple[int, Failed | None]]:
        """Have jobs done, by whoever does them first, and yield (index, why there is no result) as they end.

        Raises:
            Stopped: somebody asked for it.
            MpsearchError: as the work; a worker that died again and again for reasons of its own (E522).
        """
        pending = {job.key: i for i, job in enumerate(jobs)}
        if not pending:
            return
        rows = self.rows(jobs)
        self._offer(jobs, rows)
        if not self._begun:
            self._executor.begin(self._order, self._here, self._end_of)
            self._begun = True
        self._doing = {job.key: job for job in jobs}
        try:
            yield from self._until_done(pending, rows)
        finally:
            if not self._store.away:
                self._executor.rest()
            if pending and not self._store.away:
                self._store.queue.withdraw(self.study, self._epoch)

    def rows(self, jobs: Sequence[Job]) -> list[TaskRow]:
        """Jobs as tasks that any worker of the database can do."""
        return [
            TaskRow(job.key, self.setup_key, job.kind, {"job": job.to_json(), **self._conditions}, i)
            for i, job in enumerate(jobs)
        ]

    def _offer(self, jobs: Sequence[Job], rows: Sequence[TaskRow]) -> None:
        """Offer jobs, those too that failed or were given up in an earlier run, when a user runs the study again."""
        queue = self._store.queue
        keys = [job.key for job in jobs]
        self._free(queue.states(keys))
        queue.offer(self.study, rows, again=self._terms.again)
        # A study that had offered the same may have withdrawn it meanwhile: that is seen to later.
        done = {key for key, state in queue.states(keys).items() if state.state == "done"}
        if gone := {job.key for job in missing(self._store, [job for job in jobs if job.key in done])}:
            # Somebody has removed what they gave.
            queue.discard(sorted(gone))
            queue.offer(self.study, [row for row in rows if row.key in gone])

    def _free(self, states: Mapping[str, TaskState]) -> None:
        """Free what is held by processes of this machine that have ended, without waiting for their leases."""
        for worker in {state.worker for state in states.values() if state.state == "leased"}:
            if is_gone(worker):
                self._store.queue.lost(worker, "its process ended")

    def _end_of(self, worker: str, reason: str) -> Sequence[str]:
        # Who stops does not wait for a server that is away: leases lapse.
        return [] if self._store.away and not reason else self._store.queue.lost(worker, reason)

    def _here(self) -> Worker:
        return Worker(self._store, work=self._work, setups=(self.setup_key,), lease=self._lease)

    def _until_done(self, pending: dict[str, int], rows: Sequence[TaskRow]) -> Iterator[tuple[int, Failed | None]]:
        looked = offered = time.monotonic()
        wait, inside = _LOOK, self._executor.inside
        while pending:
            self._check()
            worked = self._executor.turn()
            for done in worked:
                if done.key in pending:
                    self._tell(done.key, done.failed is not None and done.failed.code == "E522", 0)
                    if done.error is not None:
                        raise done.error
                    yield pending.pop(done.key), done.failed
            now = time.monotonic()
            # Who works here looks at what others do less often.
            if now - looked < (max(wait, _AGAIN) if worked and inside else wait):
                if not worked:
                    time.sleep(min(wait, _LOOK))
                continue
            if now - offered > _AGAIN:
                yield from self._offer_again(pending, rows)
                offered = now
            yield from self._look(pending)
            looked = time.monotonic()
            # A look may have waited for a server that was away.
            wait = min(max(_LOOK, (looked - now) / _SHARE), _AGAIN)

    def _offer_again(self, pending: dict[str, int], rows: Sequence[TaskRow]) -> Iterator[tuple[int, None]]:
        """Offer what a study had offered that has ended, or lost its driver; what is done already is not done again."""
        orphans = set(self._store.queue.orphans(self.study, list(pending)))
        if not orphans:
            return
        without = {job.key for job in missing(self._store, [self._doing[key] for key in orphans])}
        for key in orphans - without:
            yield pending.pop(key), None
        self._store.queue.offer(self.study, [row for row in rows if row.key in without])

    def _look(self, pending: dict[str, int]) -> Iterator[tuple[int, Failed | None]]:
        states = self._store.queue.states(list(pending))
        self._free(states)
        for key, state in states.items():
            if state.state != "ready":
                self._tell(key, state.state == "dead", state.deaths if state.state == "done" else 0)
            if state.state == "done":
                yield pending.pop(key), None
            elif state.state == "failed":
                yield pending.pop(key), _failed(state.reason)
            elif state.state == "dead":
                # How they died is for the log: results hold nothing that differs from run to run.
                text = f"given up after it ended {state.deaths} workers"
                why = f"{self._doing[key].describe()}: {text}; the last one: {state.reason.get('message', '')}"
                self._store.control.log(self.study, "gap", why)
                yield pending.pop(key), Failed("E522", text)

    def _tell(self, key: str, given_up: bool, retried: int) -> None:
        doing, now = self._doing[key].describe(), self.detail
        self.detail = Detail(self._executor.workers, now.retried + retried, now.gaps + given_up, doing)

    def _check(self) -> None:
        if self._lost is not None:
            raise self._lost
        if self._wanted != "run":
            raise Stopped(self._wanted)
        if self._terms.stop():
            raise Stopped("leave")

    def _beat(self) -> None:
        unexpected: set[str] = set()
        while not self._ended.wait(min(2.0, self._lease / 3)):
            phase, done, total = self.progress
            try:
                self._wanted = self._store.control.beat(
                    self.study, self._name, self._epoch, self._lease, phase, done, total
                )
                # Workers look for lapsed leases only once there is nothing else to claim.
                self._store.queue.sweep()
            except MpsearchError as error:
                if error.code == "E523":
                    self._lost = ResourceError(
                        "E523",
                        f"study '{self.study}' was taken over by another process, for this one gave no sign of life",
                        advice="nothing is lost; mpsearch watch shows how it goes on",
                    )
                    return
            except Exception as error:
                # Without signs of life the study would be another process's.
                tell_once(unexpected, f"the signs of life of study '{self.study}'", error)


def _failed(reason: Mapping[str, Any]) -> Failed:
    """Read why a task has no result.

    Raises:
        MpsearchError: an error that ends the study, and not this task alone.
    """
    if not (reason.get("data") or {}).get("expected"):
        raise as_error(reason)
    return Failed(str(reason["code"]), str(reason["message"]))
