"""A worker that joins a database by itself: it does tasks of any study, and drives studies that nobody drives."""

from __future__ import annotations

import math
import socket
import threading
import time
from collections.abc import Callable, Mapping
from contextlib import suppress
from dataclasses import replace
from os import getpid
from typing import Any

from mpsearch import registry
from mpsearch.driving import Stopped, Terms
from mpsearch.errors import MpsearchError, StorageError
from mpsearch.machine import fingerprint, process_name
from mpsearch.ports import Store
from mpsearch.records import WorkerRow
from mpsearch.spec import StudySpec
from mpsearch.studying import Study
from mpsearch.working import AWAY, LEASE, OF_THE_MACHINE, TRUSTS, UntrustedError, Worker, check_trust

#: Seconds between two looks at a database without work.
_PAUSE = (0.05, 2.0)
#: Seconds between two signs of life of a worker.
_HELLO = 10.0
#: Exit codes of errors that another machine would meet as well: usage, bad input, infeasible.
_OF_THE_QUESTION = (2, 3, 4)
#: Somebody else drives the study now, or the database is away or busy: another time it may be otherwise.
_PASSING = ("E144", "E145", "E523", "E601", "E607", "E608", "E609")
#: The database was away for as long as everybody waits.
_AWAY = "E609"


def join(
    storage: str,
    *,
    stop: Callable[[], bool] = lambda: False,
    idle: float = math.inf,
    told: Callable[[str], None] = lambda text: None,
    lease: float = LEASE,
    trusts: bool = False,
) -> int:
    """Do whatever tasks a database has, and drive studies that were submitted or that lost their driver.

    What cannot be done on this machine, for the model is not here or its versions differ, is left to others.

    Args:
        storage: address of the database.
        stop: asked between tasks.
        idle: seconds without work after which the worker leaves.
        told: called with a line for people about what is done.
        lease: seconds that a task stays claimed without a sign of life.
        trusts: run code that comes with models, where studies say so; else they are left to others.

    Returns:
        How many tasks were done, those of driven studies included.

    Raises:
        StorageError: the server was away for ten minutes (E609), or the database cannot be used at all.
    """
    with registry.make("stores", "sql", url=storage) as store:
        store.wait_for_server(AWAY, told, stop)
        joined = _Joined(store, storage, told, lease, trusts)
        try:
            return joined.work(stop, idle)
        finally:
            joined.leave()


class _Joined:
    def __init__(self, store: Store, storage: str, told: Callable[[str], None], lease: float, trusts: bool) -> None:
        self._store, self._storage, self._told, self._trusts = store, storage, told, trusts
        self._worker = Worker(store, process_name(), lease=lease, joined=True, trusts=trusts)
        self._lease = lease
        self._refused: set[str] = set()
        self._done = 0
        self._doing = "waiting"
        self._left = threading.Event()

    def work(self, stop: Callable[[], bool], idle: float) -> int:
        pause, last = _PAUSE[0], time.monotonic()
        self._hello()
        # A task, or a study that is driven, may take hours.
        threading.Thread(target=self._go_on_greeting, daemon=True).start()
        while not stop():
            if self._patiently(self._step, stop) or self._patiently(lambda: self._adopt(stop), stop):
                pause, last = _PAUSE[0], time.monotonic()
                continue
            self._doing = "waiting"
            if time.monotonic() - last > idle:
                break
            time.sleep(pause)
            pause = min(_PAUSE[1], 1.5 * pause)
        return self._done

    def leave(self) -> None:
        self._left.set()
        # Who leaves must not wait for a server that is away: leases lapse.
        self._store.wait_for_server(0.0)
        with suppress(MpsearchError):
            self._worker.stop()
            self._store.control.bye(self._worker.name)

    def _patiently(self, work: Callable[[], bool], stop: Callable[[], bool]) -> bool:
        """Do something with a database that may be busy for a while."""
        try:
            return work()
        except StorageError as error:
            if error.code == _AWAY and stop():
                return False
            if error.code not in _PASSING or error.code == _AWAY:
                raise
            self._told(f"{error.code} {error.message}; waiting")
            time.sleep(_PAUSE[1])
            return False

    def _step(self) -> bool:
        declined = len(self._worker.declined)
        done = self._worker.step()
        if len(self._worker.declined) > declined:
            self._told(f"left to others: {list(self._worker.declined.values())[-1]}")
        elif done is not None:
            self._done += 1
            self._doing = f"{self._done} tasks done"
        return done is not None

    def _adopt(self, stop: Callable[[], bool]) -> bool:
        """Drive a study that waits for a driver; say whether there was one."""
        # Where the server was away, those who drive must have the time to say that they still do.
        for name in self._store.control.waiting() if self._store.settled(self._lease / 3) else ():
            if name in self._refused or not self._trusted(name):
                continue
            self._told(f"study '{name}'")
            self._doing = f"drives {name}"[:300]
            self._hello()
            try:
                # What ended its last driver must not end one after the other.
                again = self._store.control.status(name).state != "interrupted"
                terms = Terms(again, adopts=True, stop=stop)
                self._done += drive_stored(self._store, name, self._storage, terms=terms).computed
            except Stopped as stopped:
                self._told(f"study '{name}': {stopped.wanted}")
            except MpsearchError as error:
                # The model is not here, or the question has no answer; or somebody was quicker, and may yet fail.
                if error.code not in _PASSING:
                    self._refused.add(name)
                self._told(f"study '{name}': {error.code} {error.message}")
            except Exception as error:
                # A fault of a plug-in or of ours, on this study, must not end the work on all others.
                self._refused.add(name)
                self._store.control.log(name, "error", f"{type(error).__name__}: {error}")
                self._told(f"study '{name}': {type(error).__name__}: {error}")
            return True
        return False

    def _trusted(self, name: str) -> bool:
        try:
            check_trust(name, self._store.study(name).spec, self._trusts)
        except UntrustedError as error:
            self._refused.add(name)
            self._store.control.log(name, "declined", f"{self._worker.name}: {error.code} {error.message}")
            self._told(f"study '{name}': left to others: {error.code} {error.message}")
            return False
        return True

    def _hello(self) -> None:
        info = fingerprint() | {TRUSTS: str(self._trusts)}
        row = WorkerRow(self._worker.name, socket.gethostname(), getpid(), self._doing, info)
        self._store.control.hello(row)

    def _go_on_greeting(self) -> None:
        while not self._left.wait(_HELLO):
            # The database may be away for a moment.
            with suppress(MpsearchError):
                self._hello()


def drive_stored(
    store: Store,
    name: str,
    storage: str,
    *,
    workers: int = 1,
    executor: str = "local",
    settings: Mapping[str, Any] | None = None,
    terms: Terms | None = None,
) -> Study:
    """Run a stored study to its end, and log what a user should know.

    Args:
        store: the database.
        name: the study.
        storage: address of the database.
        workers: processes that compute.
        executor: where they run.
        settings: of the executor.
        terms: on what terms; as if a user ran it when None.

    Raises:
        as `Study.run`; a question that has no answer is noted as the study's failure as well.
    """
    terms = terms or Terms()
    try:
        return _driven(store, name, storage, workers, executor, settings or {}, terms)
    except MpsearchError as error:
        if error.code in _PASSING:
            raise
        store.control.log(name, "error", f"{error.code} {error.message}")
        if error.exit_code in _OF_THE_QUESTION and not (terms.adopts and error.code in OF_THE_MACHINE):
            # What was computed under other conditions is none the worse for it.
            state = "paused" if error.code == "E142" else "failed"
            note_failure(store, name, f"{error.code} {error.message}", state)
        raise


def note_failure(store: Store, name: str, reason: str, state: str = "failed") -> None:
    """Say why a study failed that nobody could begin to drive; else all who join would try, one after the other.

    Args:
        store: an open store.
        name: the study; left as it is unless it still waits for a driver.
        reason: code and message of the error.
        state: where it stands then.
    """
    if store.control.status(name).state == "submitted":
        epoch = store.control.drive(name, process_name(), LEASE)
        store.control.leave(name, process_name(), epoch, state, reason)


def _driven(
    store: Store, name: str, storage: str, workers: int, executor: str, settings: Mapping[str, Any], terms: Terms
) -> Study:
    spec = StudySpec.from_question(store.study(name).spec, storage)
    study = Study(replace(spec, workers=workers, executor=executor, executor_settings=dict(settings)), store)
    study.terms = terms
    phase = ""

    def tell(now: str, done: int, total: int) -> None:
        nonlocal phase
        if now != phase:
            phase = now
            store.control.log(name, "phase", f"{now} {done}/{total}")

    study.told = tell
    study.run()
    return study
