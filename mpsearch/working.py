"""The loop of every worker: claim a task, do it, and store its result with the end of the lease."""

from __future__ import annotations

import logging
import threading
import time
import traceback
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager, suppress
from dataclasses import dataclass
from typing import Any

from mpsearch import registry
from mpsearch.errors import InputError, MpsearchError, StorageError, UnsafeError
from mpsearch.keeping import kept
from mpsearch.logs import quiet
from mpsearch.machine import fingerprint, process_name
from mpsearch.ports import Store
from mpsearch.records import ClaimArgs, LeasedTask, ValueRow
from mpsearch.spec import StudySpec
from mpsearch.tasks import Failed, Job, Task

#: Seconds that a claimed task belongs to its worker without a sign of life.
LEASE = 15.0
#: What a worker that joins says of itself: whether it runs code that comes with models, ``True`` or ``False``.
TRUSTS = "trusts"
#: Seconds that a driver and its workers wait for a server that has gone away.
AWAY = 600.0
#: What may be wrong with one worker's machine, and not with the task: files, plug-ins, packages, versions, disk.
OF_THE_MACHINE = ("E101", "E107", "E118", "E142", "E401", "E402", "E404", "E701", "E702", "E703")

Work = Callable[[Task], Any]
_LOG = logging.getLogger("mpsearch")


class UntrustedError(UnsafeError):
    """A study asks for code that comes with its model, and who started this worker did not allow that."""


def check_trust(study: str, question: Mapping[str, Any], trusts: bool) -> None:
    """Refuse a study that runs its model's own code, unless that was allowed here.

    Raises:
        UntrustedError: E802.
    """
    if question.get("trust_remote_code") and not trusts:
        raise UntrustedError(
            "E802",
            f"study '{study}' runs code that comes with its model, which this worker was not told to",
            because="the yes of who submitted it counts on that machine only",
            advice="read the code, then have a worker join with: mpsearch worker --trust-remote-code",
        )


@dataclass(frozen=True)
class Order:
    """What a worker in another process is told.

    Attributes:
        storage: address of the database.
        setups: keys of the setups whose tasks are claimed.
        lease: seconds that a task stays claimed without a sign of life.
    """

    storage: str
    setups: tuple[str, ...]
    lease: float = LEASE


@dataclass(frozen=True)
class Done:
    """A task that a worker has ended.

    Attributes:
        key: its key; empty when it was left to others.
        failed: why there is no result, if there is none; the study goes on.
        error: what ends the study.
    """

    key: str
    failed: Failed | None = None
    error: MpsearchError | None = None


class Worker:
    """Claims tasks of a database, one at a time, and does them.

    Attributes:
        name: who it is, to others.
        declined: setup -> why this worker cannot do its tasks; they are left to others.
    """

    def __init__(
        self,
        store: Store,
        name: str = "",
        *,
        work: Work | None = None,
        setups: tuple[str, ...] | None = None,
        lease: float = LEASE,
        joined: bool = False,
        trusts: bool = False,
    ) -> None:
        """Set up; nothing is claimed yet.

        Args:
            store: the database.
            name: who it is, to others; made from host and process when empty.
            work: does tasks, for a model that is in this process; else each study says what is loaded.
            setups: keys of the setups whose tasks are claimed; of all when None.
            lease: seconds that a task stays claimed without a sign of life.
            joined: nobody started this worker for a study, so what its machine lacks is no fault of the task.
            trusts: run code that comes with models, where studies say so; who is not joined does.
        """
        self.name = name or process_name()
        self.declined: dict[str, str] = {}
        self._store, self._work, self._setups = store, work, setups
        self._lease, self._joined, self._trusts = lease, joined, trusts or not joined
        self._held: LeasedTask | None = None
        self._next: LeasedTask | None = None
        self._pulse: threading.Thread | None = None
        self._stopped = threading.Event()
        self._last_setup: tuple[str, ...] | None = None
        self._units: dict[str, ValueRow] = {}

    def step(self) -> Done | None:
        """Do one task; None when there is none to claim.

        Raises:
            Exception: what the work raised that is no error of a user's, when it was given; the task is free again.
        """
        leased, self._next = self._next or self._claim(), None
        if leased is None:
            return None
        try:
            return self._do(leased)
        finally:
            # What is claimed for the next step stays claimed until then.
            self._held = self._next

    def _do(self, leased: LeasedTask) -> Done:
        with self._alive(leased):
            try:
                job = self._job_of(leased)
                work = self._work or self._work_of(leased)
                start = time.perf_counter()
                result = work(job.task)
                seconds = time.perf_counter() - start
            except MpsearchError as error:
                return self._without(leased, error)
            except BaseException as error:
                # Memory that ran out, or a fault of a plug-in: in a process of its own it is told, here it is raised.
                if self._work is not None or not isinstance(error, Exception):
                    self._drop(leased)
                    raise
                return self._without(leased, _unforeseen(error))
            if isinstance(result, Failed):
                told = self._fail(leased, result.code, result.message, {"expected": True})
                return Done(leased.key, result) if told else Done("")
            found = kept(job, result)
            values = [row for row in found.values if self._units.get(row.key) != row]
            try:
                self._next = self._store.queue.finish(
                    leased, values=values, cells=found.cells, seconds=seconds, claim=self._next_claim()
                )
                self._units |= {row.key: row for row in values if row.kind == "score_unit"}
            except StorageError as error:
                if error.code == "E521":
                    # The first value stays, and both are kept.
                    self._log(leased.study, "conflict", error.message)
                    return Done(leased.key)
                if error.code == "E523":
                    # Another worker has taken it over; its result is the one that counts.
                    return Done("")
                raise
            return Done(leased.key)

    def _job_of(self, leased: LeasedTask) -> Job:
        """Read a task, if it is one for this machine.

        Raises:
            InputError: of another version, or of other conditions (E142).
        """
        try:
            self._check_conditions(leased)
            return Job.from_json(leased.body["job"])
        except (KeyError, TypeError, ValueError) as error:
            raise InputError(
                "E142",
                f"study '{leased.study}' has tasks that this version of mpsearch does not know ({error!r})",
                advice="use the same version on all machines",
            ) from error

    def _log(self, study: str, kind: str, text: str) -> None:
        # A study that is forgotten meanwhile has no log.
        with suppress(StorageError):
            self._store.control.log(study, kind, f"{self.name}: {text}")

    def rest(self) -> None:
        """Give back what was claimed for the next step."""
        leased, self._next, self._held = self._next, None, None
        if leased is not None and not self._store.away:
            self._store.queue.release(leased)

    def stop(self) -> None:
        """Give back what is claimed, and end the signs of life."""
        self._stopped.set()
        self.rest()

    def _drop(self, leased: LeasedTask) -> None:
        """Give a task back, if the server is there: who ends must not wait for it, and leases lapse."""
        put_back = self._store.wait_for_server(0.0)
        try:
            with suppress(StorageError):
                self._store.queue.release(leased)
        finally:
            put_back()

    def _claim(self) -> LeasedTask | None:
        # While one task follows the other their study runs, and nobody takes out what it needs.
        self._units = {}
        queue, skip = self._store.queue, tuple(self.declined)
        if self._setups is None and self._last_setup:
            # The model that is loaded already.
            leased = queue.claim(self.name, lease=self._lease, setups=self._last_setup, skip=skip)
            if leased is not None:
                return leased
        leased = queue.claim(self.name, lease=self._lease, setups=self._setups, skip=skip)
        if leased is not None:
            self._last_setup = (leased.setup,)
        return leased

    def _next_claim(self) -> ClaimArgs:
        return ClaimArgs(self.name, self._lease, self._setups or self._last_setup, tuple(self.declined))

    def _work_of(self, leased: LeasedTask) -> Work:
        question = self._store.study(leased.study).spec
        check_trust(leased.study, question, self._trusts)
        spec = StudySpec.from_question(question, StudySpec.storage)
        setup = spec.setup_for(leased.body["identity"])
        work: Work = registry.load("work", "workbench")(setup)
        return work

    def _check_conditions(self, leased: LeasedTask) -> None:
        """Refuse work whose numbers would not be comparable with those of the others.

        Raises:
            InputError: E142, naming what differs.
        """
        wanted, here = leased.body["conditions"], fingerprint()
        differs = [
            f"{name} is {here.get(name)}, the study has {wanted[name]}"
            for name in wanted
            if wanted[name] != here.get(name)
        ]
        if differs:
            raise InputError(
                "E142",
                f"this worker's numbers would not be comparable with those of study '{leased.study}'",
                because="; ".join(differs),
                advice="start the worker on a machine of the same kind with the same versions",
            )

    def _without(self, leased: LeasedTask, error: MpsearchError) -> Done:
        """End a task without a result, or leave it to others."""
        if self._joined and (error.code in OF_THE_MACHINE or isinstance(error, UntrustedError)):
            self.declined[leased.setup] = error.message
            self._store.queue.release(leased)
            self._log(leased.study, "declined", f"{error.code} {error.message}")
            return Done("")
        data = {"kind": type(error).__name__, "where": error.where, "because": error.because, "advice": error.advice}
        told = self._fail(leased, error.code, error.message, data)
        return Done(leased.key, error=error) if told else Done("")

    def _fail(self, leased: LeasedTask, code: str, message: str, data: Mapping[str, Any]) -> bool:
        """End a task without a result; False when another worker has taken it over: its word is the one that counts."""
        try:
            self._store.queue.fail(leased, code, message, data)
        except StorageError as error:
            if error.code != "E523":
                raise
            return False
        return True

    @contextmanager
    def _alive(self, leased: LeasedTask) -> Iterator[None]:
        """Renew a lease while the body works."""
        self._held = leased
        if self._pulse is None:
            self._pulse = threading.Thread(target=self._beat, daemon=True)
            self._pulse.start()
        try:
            yield
        finally:
            self._held = None

    def _beat(self) -> None:
        unexpected: set[str] = set()
        while not self._stopped.wait(self._lease / 3):
            held = self._held
            if held is not None:
                try:
                    self._store.queue.renew(held, self._lease)
                except MpsearchError:
                    # The database is away for a moment; the end of the task will tell whether the lease held.
                    continue
                except Exception as error:
                    tell_once(unexpected, f"the signs of life of worker '{self.name}'", error)


def tell_once(told: set[str], what: str, error: Exception) -> None:
    """Log a failure that nobody foresaw of something that goes on all the same.

    Args:
        told: what was told before; added to.
        what: what failed.
        error: how.
    """
    text = f"{what} failed and go on: {type(error).__name__}: {error}"
    if text not in told:
        told.add(text)
        _LOG.warning(text)


def _unforeseen(error: BaseException) -> MpsearchError:
    """The error for something that nobody foresaw, from a worker in a process of its own."""
    last = traceback.extract_tb(error.__traceback__)[-1]
    return MpsearchError(
        "E525",
        f"a worker's code failed: {type(error).__name__}: {str(error)[:300]}",
        where=f"{last.filename}:{last.lineno}",
        advice="what was finished is saved; run with --workers 1 and --debug to see where it comes from",
    )


def as_error(reason: Mapping[str, Any]) -> MpsearchError:
    """Make an error again of what `Worker` stored of it."""
    data = reason.get("data") or {}
    kinds: list[type[MpsearchError]] = [MpsearchError]
    for kind in kinds:
        # The list grows while it is gone through: kinds of kinds follow.
        kinds += kind.__subclasses__()
    kind = next((kind for kind in kinds if kind.__name__ == data.get("kind")), MpsearchError)
    return kind(
        str(reason.get("code")),
        str(reason.get("message")),
        where=str(data.get("where", "")),
        because=str(data.get("because", "")),
        advice=str(data.get("advice", "")),
    )


def serve(order: Order, stop: Callable[[], bool], name: str = "") -> None:
    """Do tasks until told to stop; the loop of a worker in a process of its own."""
    quiet()
    with registry.make("stores", "sql", url=order.storage, create=False) as store:
        store.wait_for_server(AWAY, stop=stop)
        worker = Worker(store, name, setups=order.setups, lease=order.lease)
        idle = 0.02
        while not stop():
            try:
                if worker.step() is not None:
                    idle = 0.02
                    continue
            except StorageError as error:
                # A server that is started anew, or busy: the driver says when it has been away for too long.
                if error.code not in ("E601", "E607", "E609"):
                    raise
            time.sleep(idle)
            idle = min(0.5, 1.5 * idle)
        worker.stop()
