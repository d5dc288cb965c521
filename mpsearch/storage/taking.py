"""Which task a worker gets next, and what becomes of leases that have lapsed."""

from __future__ import annotations

from typing import Any

from sqlalchemy import CTE, ColumnElement, Connection, Select, and_, case, exists, func, or_, select, true, update

from mpsearch.keys import canonical_json
from mpsearch.records import PRIVATE, ClaimArgs, LeasedTask
from mpsearch.storage.portable import clock
from mpsearch.storage.schema import study_table, task_table
from mpsearch.storage.text import decode

#: A task that ended this many workers is given up.
DEATHS = 3
_LAPSED = "its worker gave no sign of life"
#: Added to the position of a task that has ended a worker: others go first, so that what kills by chance seldom meets
#: the same task again.
_BEHIND = 1 << 32
#: Leases made free in one go.
_SWEEP = 100
_some = task_table.alias("some")


def driven(connection: Connection) -> ColumnElement[bool]:
    """Whether somebody drives a study, and it is wanted to run."""
    live = func.coalesce(study_table.c.driver_until > clock(connection), False)
    return and_(live, study_table.c.wanted == "run")


def freed(connection: Connection, reason: str) -> dict[str, Any]:
    """The columns of a task whose worker has died of it, perhaps."""
    last, position = task_table.c.deaths + 1 >= DEATHS, task_table.c.position
    return {
        "state": case((last, "dead"), else_="ready"),
        "deaths": task_table.c.deaths + 1,
        "position": case((position < _BEHIND, position + _BEHIND), else_=position),
        "until": None,
        "reason": canonical_json({"code": "E522", "message": reason}),
        "updated": clock(connection),
    }


def _lapsed(connection: Connection) -> ColumnElement[bool]:
    return and_(task_table.c.state == "leased", task_table.c.until < clock(connection))


def held(some: ColumnElement[bool]) -> Select[Any]:
    """Keys of tasks, locked one after the other by key, as `Queue.offer` locks them: so neither waits in a circle."""
    return select(task_table.c.key).where(some).order_by(task_table.c.key).with_for_update()


def reap(connection: Connection) -> None:
    """Make tasks ready whose lease has lapsed, or give them up."""
    found = select(task_table.c.key).where(_lapsed(connection)).limit(_SWEEP)
    if connection.dialect.name == "postgresql":
        found = found.with_for_update(skip_locked=True)
    connection.execute(update(task_table).where(task_table.c.key.in_(found)).values(freed(connection, _LAPSED)))


def is_any(connection: Connection, wish: ClaimArgs) -> bool:
    """Whether a task is ready, or a lease has lapsed."""
    ready = _first(connection, wish).subquery()
    some = or_(exists(select(ready.c.key)), exists().where(_lapsed(connection)))
    return bool(connection.execute(select(some)).scalar_one())


def take(connection: Connection, wish: ClaimArgs) -> LeasedTask | None:
    """Lease the first task that is ready."""
    row = connection.execute(_first(connection, wish)).one_or_none()
    if row is None:
        return None
    columns = task_table.c
    change = {
        "state": "leased",
        "epoch": row.epoch + 1,
        "attempts": row.attempts + 1,
        "worker": wish.worker,
        "until": clock(connection) + wish.lease,
    }
    until = connection.execute(
        update(task_table).where(columns.key == row.key).values(change).returning(columns.until)
    ).scalar_one()
    return LeasedTask(
        key=row.key,
        study=row.study,
        setup=row.setup,
        kind=row.kind,
        body=decode(row.body),
        epoch=row.epoch + 1,
        until=until,
        worker=wish.worker,
        deaths=row.deaths,
        attempts=row.attempts + 1,
    )


def _setups(connection: Connection, wish: ClaimArgs) -> CTE:
    """The setups of which tasks are ready, of each driven study: found by leaps, however many tasks there are."""
    driving = driven(connection)
    if not wish.any_study:
        driving = and_(driving, study_table.c.name == wish.study)

    def least(study: ColumnElement[int], *more: ColumnElement[bool]) -> ColumnElement[str]:
        some = and_(_some.c.study == study, _some.c.state == "ready", *more)
        return select(_some.c.setup).where(some).order_by(_some.c.setup).limit(1).scalar_subquery()

    study = study_table.c.id
    begin = select(study.label("study"), study_table.c.name, least(study).label("setup")).where(driving)
    found = begin.cte("found", recursive=True)
    following = least(found.c.study, _some.c.setup > found.c.setup)
    return found.union_all(select(found.c.study, found.c.name, following).where(found.c.setup.is_not(None)))


def _first(connection: Connection, wish: ClaimArgs) -> Select[Any]:
    """The first task of each setup of each study, and of those the first.

    An index leads to each, however many tasks there are; the studies that are driven are few, and so are their setups.
    """
    found = _setups(connection, wish)
    setup = found.c.setup
    fits: ColumnElement[bool] = setup.not_like(f"{PRIVATE}%") if wish.setups is None else setup.in_(list(wish.setups))
    if wish.skip:
        fits = and_(fits, setup.not_in(list(wish.skip)))
    task = task_table.alias("next")
    ready = and_(task.c.study == found.c.study, task.c.state == "ready", task.c.setup == setup)
    order = (task.c.position, task.c.key)
    if connection.dialect.name == "postgresql":
        # These are held until the end of the transaction, and others take the ones after them meanwhile.
        first = select(task).where(ready).order_by(*order).limit(1).with_for_update(skip_locked=True)
        firsts = first.correlate(found).lateral("first")
        source, chosen = found.join(firsts, true()), firsts.c
    else:
        one = select(task.c.key).where(ready).order_by(*order).limit(1)
        same = task_table.c.key == one.correlate(found).scalar_subquery()
        source, chosen = found.join(task_table, same), task_table.c
    names = ("key", "setup", "kind", "body", "epoch", "deaths", "attempts")
    columns = [chosen[name] for name in names]
    return (
        select(*columns, found.c.name.label("study"))
        .select_from(source)
        .where(setup.is_not(None), fits)
        .order_by(chosen.position, chosen.key)
        .limit(1)
    )
