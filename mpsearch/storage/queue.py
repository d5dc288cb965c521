"""Tasks and their leases: who may work on what, until when, and whose result counts."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

from sqlalchemy import (
    ColumnElement,
    Connection,
    Delete,
    Update,
    and_,
    bindparam,
    case,
    delete,
    func,
    or_,
    select,
    update,
)

from mpsearch.errors import StorageError
from mpsearch.records import CellRow, ClaimArgs, LeasedTask, TaskRow, TaskState, ValueRow
from mpsearch.storage import cells as stored_cells
from mpsearch.storage import events, studies, taking, values
from mpsearch.storage.checks import cell_values, check_integer, check_text, plain
from mpsearch.storage.database import Database, again
from mpsearch.storage.portable import clock, insert, listed
from mpsearch.storage.schema import study_table, task_table
from mpsearch.storage.text import decode, encode

_columns = task_table.c
#: What a task has from the study that offers it.
_OFFERED = ("study", "setup", "kind", "body", "position")


class Queue:
    """The tasks of a database.

    A task is given to one worker at a time, for as long as its lease lasts by the database's clock. Each time it is
    given out its epoch is raised; a result that comes with an older epoch is refused.

    Args:
        database: where the tasks are.
    """

    def __init__(self, database: Database) -> None:
        self._database = database

    @again
    def offer(self, study: str, rows: Sequence[TaskRow], again: bool = False) -> None:
        """Put tasks up for work; those that are there already stay, as other studies may need them too.

        A task that nobody has ended, and whose own study nobody drives now, goes over to this study, and is from then
        on as this study offers it: one key may stand in several studies' setups.

        Args:
            study: name of the study that offers them.
            rows: the tasks.
            again: offer tasks anew that failed or were given up earlier.

        Raises:
            StorageError: no such study (E141).
            InputError: text that is not printable or too long (E114), a position outside 64 bits (E113).
        """
        check_text("study name", study)
        prepared = [_task_values(row) for row in sorted(rows, key=lambda row: row.key)]
        if not prepared:
            return
        with self._database.writing() as connection:
            number = studies.number(connection, study, self._database.place.shown)
            statement = insert(connection, task_table)
            new, ended = statement.excluded, or_(_columns.state == "failed", _columns.state == "dead")
            unfinished = or_(_columns.state == "ready", _columns.state == "leased")
            nobodys = _columns.study.not_in(select(study_table.c.id).where(taking.driven(connection)))
            ours = and_(unfinished, or_(_columns.study == new.study, nobodys))
            fresh = {
                "state": case((ended, "ready"), else_=_columns.state),
                "deaths": case((ended, 0), else_=_columns.deaths),
                "reason": case((ended, ""), else_=_columns.reason),
            }
            statement = statement.values(updated=clock(connection)).on_conflict_do_update(
                index_elements=["key"],
                set_={name: new[name] for name in _OFFERED} | (fresh if again else {}),
                where=or_(ours, ended) if again else ours,
            )
            connection.execute(statement, [row | {"study": number} for row in prepared])

    @again
    def claim(
        self,
        worker: str,
        *,
        lease: float,
        setups: Sequence[str] | None = None,
        skip: Sequence[str] = (),
        any_study: bool = True,
        study: str = "",
    ) -> LeasedTask | None:
        """Take the first task, by position and key, that is ready; None when there is none.

        Only studies count that somebody drives and that are wanted to run. Tasks whose lease has lapsed are made
        ready first, or given up when they did so three times; not in the first seconds after the server was away.

        Args:
            worker: name of the worker.
            lease: seconds after which the task is another worker's, unless it is renewed.
            setups: only tasks of these; None for any.
            skip: no tasks of these setups.
            any_study: take tasks of other studies than ``study`` too.
            study: name of a study, where ``any_study`` is false.
        """
        wish = ClaimArgs(check_text("worker name", worker, 400), lease, setups, skip, any_study, study)
        if self._database.is_file:
            # Many who wait must not stand in the way of the one who writes.
            with self._database.reading() as connection:
                if not taking.is_any(connection, wish):
                    return None
        with self._database.writing() as connection:
            self._reap(connection, lease / 3)
            return taking.take(connection, wish)

    @again
    def renew(self, lease: LeasedTask, seconds: float) -> bool:
        """Make a lease last from now on; False when it is lost."""
        with self._database.writing() as connection:
            moment = clock(connection)
            change = update(task_table).where(_is(lease)).values(until=moment + seconds, updated=moment)
            return connection.execute(change).rowcount == 1

    @again
    def finish(
        self,
        lease: LeasedTask,
        *,
        values: Sequence[ValueRow] = (),
        cells: Sequence[tuple[str, Sequence[CellRow]]] = (),
        seconds: float = 0.0,
        claim: ClaimArgs | Mapping[str, Any] | None = None,
    ) -> LeasedTask | None:
        """Keep what a task gave and end it, all or nothing; doing so again with the same lease is fine.

        Args:
            lease: what `claim` returned.
            values: values it gave.
            cells: scores it gave, each list with its scope.
            seconds: how long it took.
            claim: what to take next; of a mapping the ``worker`` may be left out.

        Returns:
            The next task, when one was asked for and is there. Lapsed leases are left to `claim`.

        Raises:
            StorageError: the lease is lost, nothing was kept and the study's log says so (E523); a key holds another
                value, which stays, both are then in `SqlStore.conflicts`, and the task is done (E521).
            InputError: as `SqlStore.put` and `SqlStore.put_cells`; the task stays leased. So with ValueError.
        """
        value_rows = [_value_row(row) for row in values]
        cell_rows = [cell_values(check_text("scope", scope), row) for scope, rows in cells for row in rows]
        wish = ClaimArgs(**{"worker": lease.worker} | dict(claim)) if isinstance(claim, Mapping) else claim
        with self._database.writing() as connection:
            error = _end(connection, lease, "done", "", seconds)
            if error is None:
                error = _keep(connection, value_rows, cell_rows)
            following = taking.take(connection, wish) if wish is not None and error is None else None
        if error is not None:
            raise error
        return following

    @again
    def fail(self, lease: LeasedTask, code: str, message: str, data: Mapping[str, Any] | None = None) -> None:
        """End a task without a result.

        Raises:
            StorageError: the lease is lost (E523).
        """
        reason = encode("reason", {"code": code, "message": plain(message), "data": dict(data or {})})
        with self._database.writing() as connection:
            refused = _end(connection, lease, "failed", reason, 0.0)
        if refused is not None:
            raise refused

    @again
    def release(self, lease: LeasedTask) -> None:
        """Give a task back unharmed; it is ready again. Without effect when the lease is lost."""
        with self._database.writing() as connection:
            connection.execute(update(task_table).where(_is(lease)).values(state="ready", until=None))

    @again
    def lost(self, worker: str, reason: str) -> list[str]:
        """Free what a worker had that is known to have died, without waiting for its leases to lapse.

        Args:
            worker: its name.
            reason: how it died; empty when it was ended on purpose, which no task is to blame for.

        Returns:
            Keys of the tasks it had.
        """
        check_text("worker name", worker, 400)
        theirs = and_(_columns.state == "leased", _columns.worker == worker)
        with self._database.writing() as connection:
            changed = taking.freed(connection, plain(reason)) if reason else {"state": "ready", "until": None}
            change = update(task_table).where(_columns.key.in_(taking.held(theirs))).values(changed)
            found = connection.execute(change.returning(_columns.key))
            return sorted(found.scalars())

    @again
    def sweep(self) -> None:
        """Free the tasks whose lease has lapsed, or give them up, as `claim` does when it looks for one."""
        with self._database.writing() as connection:
            self._reap(connection, taking.GRACE)

    def _reap(self, connection: Connection, grace: float) -> None:
        # Where the server was away for all, those who live must have the time to say so.
        if self._database.settled(min(grace, taking.GRACE)):
            taking.reap(connection)

    @again
    def states(self, keys: Sequence[str]) -> dict[str, TaskState]:
        """Return where tasks stand; keys that are not there are absent."""
        wanted = [[check_text("key", key, 64)] for key in dict.fromkeys(keys)]
        names = (_columns.key, _columns.state, _columns.reason, _columns.deaths, _columns.worker)
        with self._database.reading() as connection:
            listing, key = listed(connection, wanted)
            same = _columns.key == key[0].as_string()
            rows = connection.execute(select(*names).join_from(listing, task_table, same, isouter=True)).all()
        return {
            row[0]: TaskState(row[1], decode(row[2]) if row[2] else {}, row[3], row[4])
            for row in rows
            if row[0] is not None
        }

    @again
    def counts(self, study: str) -> dict[str, int]:
        """Return how many tasks of a study are in each state; states without tasks are absent."""
        with self._database.reading() as connection:
            own = _columns.study == studies.number(connection, study, self._database.place.shown)
            rows = connection.execute(select(_columns.state, func.count()).where(own).group_by(_columns.state))
            return dict(sorted((str(state), int(count)) for state, count in rows))

    @again
    def orphans(self, study: str, keys: Sequence[str]) -> list[str]:
        """Return those of the tasks that nobody will end unless a study offers them (again), in the order given.

        These are the tasks that are not there, and the unfinished ones of another study that nobody drives now, or
        that is not wanted to run.

        Args:
            study: the study that asks; its own tasks are not among them while they are there.
            keys: the tasks it waits for.
        """
        wanted = [[check_text("key", key, 64)] for key in dict.fromkeys(keys)]
        with self._database.reading() as connection:
            listing, key = listed(connection, wanted)
            name = key[0].as_string()
            unfinished = or_(_columns.state == "ready", _columns.state == "leased")
            nobodys = and_(unfinished, study_table.c.name != study, ~taking.driven(connection))
            source = listing.outerjoin(task_table, _columns.key == name)
            source = source.outerjoin(study_table, study_table.c.id == _columns.study)
            found = select(name).select_from(source).where(or_(_columns.key.is_(None), nobodys))
            orphans = set(connection.execute(found).scalars())
        return [row[0] for row in wanted if row[0] in orphans]

    @again
    def withdraw(self, study: str, epoch: int | None = None) -> None:
        """Remove the tasks of a study that nobody has begun.

        Args:
            study: name of the study.
            epoch: what `Control.drive` returned: without effect when another process has taken the study since.
        """
        self._remove(study, "ready", epoch=epoch)

    @again
    def discard(self, keys: Sequence[str]) -> None:
        """Remove tasks that are done, so that they can be offered anew: what they gave is no longer there."""
        wanted = [[check_text("key", key, 64)] for key in dict.fromkeys(keys)]
        with self._database.writing() as connection:
            listing, key = listed(connection, wanted)
            named = _columns.key.in_(select(key[0].as_string()).select_from(listing))
            connection.execute(_delete(and_(named, _columns.state == "done")))

    @again
    def forget(self, study: str, older: float = 0.0, epoch: int | None = None) -> None:
        """Remove the tasks of a study that are done; what they gave stays.

        Args:
            study: name of the study.
            older: seconds since they were done; others who wait for the same need a moment to see it.
            epoch: as in `withdraw`.
        """
        self._remove(study, "done", older, epoch)

    def _remove(self, study: str, state: str, older: float = 0.0, epoch: int | None = None) -> None:
        with self._database.writing() as connection:
            number = studies.number(connection, study, self._database.place.shown)
            if epoch is not None:
                # Who takes the study waits for the end of this; who writes into its log does not.
                held = select(study_table.c.driver_epoch).where(study_table.c.id == number)
                if connection.execute(held.with_for_update(read=True, key_share=True)).scalar_one_or_none() != epoch:
                    return
            before = _columns.updated <= clock(connection) - older
            connection.execute(_delete(and_(_columns.study == number, _columns.state == state, before)))


def _delete(some: ColumnElement[bool]) -> Delete:
    return delete(task_table).where(_columns.key.in_(taking.held(some)))


def _is(lease: LeasedTask) -> Any:
    return and_(
        _columns.key == lease.key,
        _columns.epoch == lease.epoch,
        _columns.worker == lease.worker,
        _columns.state == "leased",
    )


@taking.made_once
def _ending(connection: Connection) -> Update:
    whose = and_(*(_columns[name] == bindparam(f"{name}_") for name in ("key", "epoch", "worker")))
    change: dict[str, Any] = {name: bindparam(name) for name in ("state", "until", "reason", "seconds")}
    return update(task_table).where(whose, _columns.state == "leased").values(**change, updated=clock(connection))


def _end(connection: Connection, lease: LeasedTask, state: str, reason: str, seconds: float) -> StorageError | None:
    """End a task if the lease holds; else write down the refusal and return the error to raise after the commit."""
    whose = {"key_": lease.key, "epoch_": lease.epoch, "worker_": lease.worker}
    ended = {"state": state, "until": None, "reason": reason, "seconds": seconds}
    if connection.execute(_ending(connection), whose | ended).rowcount == 1:
        return None
    names = (_columns.study, _columns.state, _columns.epoch, _columns.worker)
    row = connection.execute(select(*names).where(_columns.key == lease.key)).one_or_none()
    if row is not None and tuple(row)[1:] == (state, lease.epoch, lease.worker):
        # The answer to an earlier call was lost on its way.
        return None
    who = "it was taken away" if row is None else f"it is {row.state} now, given out {row.epoch} times"
    if row is not None:
        events.add(connection, row.study, "refused", f"{lease.worker}: {lease.key} epoch {lease.epoch}; {who}")
    return StorageError(
        "E523",
        f"the lease of task '{lease.key[:16]}' is lost: {who}",
        because=f"worker '{lease.worker}' gave no sign of life for longer than its lease, or was said to be dead",
        advice="nothing is lost: the result of the worker that has the task now is the one that counts",
    )


def _keep(
    connection: Connection, value_rows: Sequence[dict[str, Any]], cell_rows: Sequence[dict[str, Any]]
) -> StorageError | None:
    first = values.put_many(connection, value_rows) if value_rows else None
    second = stored_cells.put(connection, cell_rows) if cell_rows else None
    return first or second


def _value_row(row: ValueRow) -> dict[str, Any]:
    return values.row(row.kind, row.key, row.body, row.volatile)


def _task_values(row: TaskRow) -> dict[str, Any]:
    return {
        "key": check_text("task key", row.key, 64),
        "setup": check_text("setup key", row.setup, 64),
        "kind": check_text("task kind", row.kind, 20),
        "body": encode("task", row.body),
        "position": check_integer("position", row.position),
        "state": "ready",
        "epoch": 0,
        "worker": "",
        "deaths": 0,
        "attempts": 0,
        "reason": "",
        "seconds": 0.0,
    }
