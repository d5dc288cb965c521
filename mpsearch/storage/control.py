"""Who drives which study, what is wanted of it, what it says, and who works."""

from __future__ import annotations

import shlex
from typing import Any

from sqlalchemy import ColumnElement, Connection, and_, case, delete, func, select, update

from mpsearch.errors import StorageError
from mpsearch.machine import is_gone
from mpsearch.records import EventRow, StudyStatus, WorkerRow
from mpsearch.storage import events, studies
from mpsearch.storage.checks import check_integer, check_text, plain, shown
from mpsearch.storage.database import Database, again
from mpsearch.storage.portable import clock, insert, now
from mpsearch.storage.schema import STUDY_STATES, WANTED, link_table, study_table, worker_table
from mpsearch.storage.text import decode, encode

_columns = study_table.c
_SHOWN = ("name", "state", "wanted", "phase", "done", "total", "reason", "home", "driver")


class Control:
    """The studies of a database, as those see them who start, watch and stop them.

    A study is driven by one process at a time: it holds a lease on the study, by the database's clock.

    Args:
        database: where the studies are.
    """

    def __init__(self, database: Database) -> None:
        self._database = database

    @again
    def submit(self, name: str, home: str) -> None:
        """Leave a study to whoever drives it first; one that is being driven goes on.

        Args:
            name: a study of this database.
            home: the machine that submits it.

        Raises:
            StorageError: no such study (E141).
        """
        check_text("machine", home, 300, empty=True)
        with self._database.writing() as connection:
            state = case((_live(connection), _columns.state), else_="submitted")
            self._set(connection, name, wanted="run", home=home, state=state, reason="", updated=now())

    @again
    def drive(self, name: str, owner: str, lease: float, adopt: bool = False) -> int:
        """Take a study to drive it, and return the epoch that proves it. Who runs a study wants it to run.

        Args:
            name: a study of this database.
            owner: the process, named by `mpsearch.machine.process_name`.
            lease: seconds after which others may take it, unless `beat` comes.
            adopt: only a study that waits, see `waiting`, and leave what is wanted of it as it is: for those who found
                it waiting, as its user may have stopped or run it since.

        Raises:
            StorageError: another process drives it (E144), it does not wait for a driver any more (E145), no such
                study (E141).
        """
        check_text("driver", owner, 400)
        names = ("driver", "driver_until", "driver_epoch", "state", "wanted")
        with self._database.writing() as connection:
            held = select(*(_columns[name] for name in names), clock(connection).label("moment"))
            row = connection.execute(held.where(_columns.name == name).with_for_update()).one_or_none()
            if row is None:
                raise studies.missing(connection, name, self._database.place.shown)
            until, mine = row.driver_until, row.driver == owner
            left = until is None or until <= row.moment or is_gone(row.driver)
            if row.driver and not left and not mine:
                raise _driven(name, row.driver, until - row.moment)
            # The answer to an earlier call may have been lost on its way, so it may be this one's already.
            waits = row.state == "submitted" or (row.state == "running" and (left or mine))
            if adopt and not (waits and row.wanted == "run"):
                raise _settled(name, row.state, row.wanted)
            change = {"driver": owner, "driver_epoch": row.driver_epoch + 1, "driver_until": clock(connection) + lease}
            change |= {"state": "running", "wanted": "run", "reason": "", "phase": "", "done": 0, "total": 0}
            self._set(connection, name, **change, updated=now())
            return int(row.driver_epoch) + 1

    @again
    def beat(self, name: str, owner: str, epoch: int, lease: float, phase: str, done: int, total: int) -> str:
        """Go on driving; return what is wanted of the study: ``run``, ``pause`` or ``cancel``.

        Args:
            name: the study.
            owner: as given to `drive`.
            epoch: what `drive` returned.
            lease: seconds from now.
            phase: what is being done.
            done: steps of the phase that are done.
            total: steps of the phase.

        Raises:
            StorageError: another process has taken it (E523).
        """
        told = {
            "phase": check_text("phase", phase, empty=True),
            "done": check_integer("done", done),
            "total": check_integer("total", total),
        }
        with self._database.writing() as connection:
            change = update(study_table).where(_held(name, owner, epoch))
            change = change.values(driver_until=clock(connection) + lease, **told)
            wanted = connection.execute(change.returning(_columns.wanted)).scalar_one_or_none()
        if wanted is None:
            raise _lost(name)
        return str(wanted)

    @again
    def leave(self, name: str, owner: str, epoch: int, state: str, reason: str = "") -> None:
        """End driving, in some state.

        Raises:
            StorageError: another process has taken it (E523).
            ValueError: no such state.
        """
        if state not in STUDY_STATES:
            raise ValueError(f"study '{name}': no state {state!a}; there is {', '.join(STUDY_STATES)}")
        with self._database.writing() as connection:
            change = {"driver": "", "driver_until": None, "state": state, "reason": plain(reason), "updated": now()}
            left = connection.execute(update(study_table).where(_held(name, owner, epoch)).values(change)).rowcount
        if not left:
            raise _lost(name)

    @again
    def drop(self, name: str, owner: str = "", epoch: int = 0) -> None:
        """Forget a study with its links, tasks and log; the values that it led to stay.

        Args:
            name: a study of this database.
            owner: as given to `drive`: without effect unless this process drives the study, and has since ``epoch``.
            epoch: what `drive` returned.

        Raises:
            StorageError: no such study (E141), where no owner is given.
        """
        check_text("study name", name)
        which = _held(name, owner, epoch) if owner else _columns.name == name
        with self._database.writing() as connection:
            if not connection.execute(delete(study_table).where(which)).rowcount and not owner:
                raise studies.missing(connection, name, self._database.place.shown)

    @again
    def unlink(self, name: str) -> None:
        """Forget which values belong to a study; the values stay, and what is computed anew is linked anew.

        Raises:
            StorageError: no such study (E141).
        """
        with self._database.writing() as connection:
            number = studies.number(connection, name, self._database.place.shown)
            connection.execute(delete(link_table).where(link_table.c.study == number))

    @again
    def want(self, name: str, wanted: str) -> None:
        """Ask that a study runs, pauses or is cancelled: ``run``, ``pause``, ``cancel``.

        The driver does so at its next beat. Where nobody drives, an unfinished study is paused or cancelled at once,
        and one that was submitted and paused waits again for somebody to drive it.

        Raises:
            StorageError: no such study (E141).
            ValueError: another word.
        """
        if wanted not in WANTED:
            raise ValueError(f"study '{name}': {wanted!a} cannot be wanted; there is {', '.join(WANTED)}")
        with self._database.writing() as connection:
            idle = ~_live(connection)
            if wanted == "run":
                changes = and_(idle, _columns.state.in_(("paused", "cancelled")), _columns.home != "")
                state = "submitted"
            else:
                changes = and_(idle, _columns.state.in_(("new", "submitted", "running", "paused")))
                state = "paused" if wanted == "pause" else "cancelled"
            change = {"state": case((changes, state), else_=_columns.state)}
            if wanted != "run":
                change["driver_until"] = case((changes, None), else_=_columns.driver_until)
            self._set(connection, name, wanted=wanted, **change, updated=now())

    @again
    def status(self, name: str) -> StudyStatus:
        """Return what a study is doing.

        Raises:
            StorageError: no such study (E141).
        """
        check_text("study name", name)
        with self._database.reading() as connection:
            row = connection.execute(_statuses(connection).where(_columns.name == name)).one_or_none()
            if row is None:
                raise studies.missing(connection, name, self._database.place.shown)
        return _status(row)

    @again
    def statuses(self) -> list[StudyStatus]:
        """Return what all studies are doing, newest study first."""
        newest = (_columns.created.desc(), _columns.id.desc())
        with self._database.reading() as connection:
            return [_status(row) for row in connection.execute(_statuses(connection).order_by(*newest))]

    @again
    def waiting(self) -> list[str]:
        """Return the studies that somebody may drive, longest waiting first: submitted, or left by their driver.

        A driver has left when its lease has lapsed, or its process on this machine has ended.
        """
        with self._database.reading() as connection:
            lapsed = (_columns.driver_until < clock(connection)).label("lapsed")
            some = and_(_columns.wanted == "run", _columns.state.in_(("submitted", "running")))
            columns = select(_columns.name, _columns.state, _columns.driver, lapsed)
            rows = connection.execute(columns.where(some).order_by(_columns.updated)).all()
        return [row.name for row in rows if row.state == "submitted" or row.lapsed or is_gone(row.driver)]

    @again
    def log(self, name: str, kind: str, text: str) -> None:
        """Write a line into a study's log, which keeps its newest 10,000.

        Args:
            name: a study of this database.
            kind: one word, at most 20 characters.
            text: what happened; cut when it is long.

        Raises:
            StorageError: no such study (E141), which may have been dropped since its work began.
        """
        check_text("kind", kind, 20)
        with self._database.writing() as connection:
            events.add(connection, studies.number(connection, name, self._database.place.shown), kind, text)

    @again
    def lines(self, name: str, after: int = 0, limit: int = 1000) -> list[EventRow]:
        """Return lines of a study's log, oldest first.

        Args:
            name: a study of this database.
            after: number of the last line that is known.
            limit: at most so many.

        Raises:
            StorageError: no such study (E141).
        """
        with self._database.reading() as connection:
            number = studies.number(connection, name, self._database.place.shown)
            return events.read(connection, number, check_integer("after", after), max(0, limit))

    @again
    def hello(self, worker: WorkerRow) -> None:
        """Say that a worker is there, and what it does."""
        row = {
            "name": check_text("worker name", worker.name, 400),
            "host": check_text("host name", worker.host, 300, empty=True),
            "pid": check_integer("pid", worker.pid),
            "doing": plain(worker.doing)[:300],
            "info": encode("worker", worker.info),
        }
        with self._database.writing() as connection:
            moment = clock(connection)
            statement = insert(connection, worker_table).values(started=moment, seen=moment, **row)
            again = row | {"seen": moment}
            connection.execute(statement.on_conflict_do_update(index_elements=["name"], set_=again))

    @again
    def bye(self, name: str) -> None:
        """Say that a worker has ended."""
        with self._database.writing() as connection:
            connection.execute(delete(worker_table).where(worker_table.c.name == name))

    @again
    def workers(self) -> list[WorkerRow]:
        """Return the workers that said hello and did not say bye, by name."""
        table = worker_table.c
        columns = (table.name, table.host, table.pid, table.doing, table.info, table.started, table.seen)
        with self._database.reading() as connection:
            rows = connection.execute(select(*columns)).all()
        found = (WorkerRow(*row[:4], decode(row.info), row.started, row.seen) for row in rows)
        return sorted(found, key=lambda worker: worker.name)

    @again
    def clock(self) -> float:
        """The time of the database, in seconds since 1970."""
        with self._database.reading() as connection:
            return float(connection.execute(select(clock(connection))).scalar_one())

    def _set(self, connection: Connection, name: str, **values: Any) -> None:
        check_text("study name", name)
        if not connection.execute(update(study_table).where(_columns.name == name).values(values)).rowcount:
            raise studies.missing(connection, name, self._database.place.shown)


def _live(connection: Connection) -> ColumnElement[bool]:
    return func.coalesce(_columns.driver_until > clock(connection), False)


def _held(name: str, owner: str, epoch: int) -> ColumnElement[bool]:
    return and_(_columns.name == name, _columns.driver == owner, _columns.driver_epoch == epoch)


def _statuses(connection: Connection) -> Any:
    return select(
        *(_columns[name] for name in _SHOWN), _live(connection).label("live"), _columns.driver_until, _columns.updated
    )


def _status(row: Any) -> StudyStatus:
    told = {name: getattr(row, name) for name in _SHOWN}
    live = bool(row.live) and not is_gone(row.driver)
    if row.state == "running" and row.driver_until is not None and not live:
        # Nobody is there to do what is wanted, so it is done.
        told["state"] = {"pause": "paused", "cancel": "cancelled"}.get(row.wanted, "interrupted")
    return StudyStatus(**told, live=live, updated=row.updated)


def _driven(name: str, driver: str, left: float) -> StorageError:
    host, _, rest = driver.partition(":")
    pid = rest.split(":")[1] if rest.count(":") >= 2 else "?"
    study = shlex.quote(name)
    return StorageError(
        "E144",
        f"study '{name}' is being run by another process: pid {shown(pid)} on {shown(host)}",
        because=f"it gave a sign of life, which holds for {max(1, round(left))} s more",
        advice=f"`mpsearch watch {study}` shows how it goes on, `mpsearch pause {study}` stops it",
    )


def _settled(name: str, state: str, wanted: str) -> StorageError:
    stopped = {"pause": "it shall pause", "cancel": "it shall be cancelled"}
    return StorageError(
        "E145",
        f"study '{name}' is no longer waiting for a driver: {stopped.get(wanted, f'it is {state}')}",
        because="somebody stopped it, or ran it to its end, in the meantime",
        advice=f"`mpsearch resume {shlex.quote(name)}` runs it again",
    )


def _lost(name: str) -> StorageError:
    return StorageError(
        "E523",
        f"study '{name}' was taken over by another process",
        because="this one gave no sign of life for longer than its lease",
        advice="nothing is lost: `mpsearch watch` shows how it goes on",
    )
