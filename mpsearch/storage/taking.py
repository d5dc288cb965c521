"""Which task a worker gets next, and what becomes of leases that have lapsed."""

from __future__ import annotations

from collections.abc import Callable
from functools import wraps
from typing import Any, TypeVar

from sqlalchemy import (
    CTE,
    ColumnElement,
    Connection,
    Double,
    Select,
    and_,
    bindparam,
    case,
    exists,
    func,
    or_,
    select,
    true,
    update,
)

from mpsearch.keys import canonical_json
from mpsearch.records import PRIVATE, ClaimArgs, LeasedTask
from mpsearch.storage.portable import clock
from mpsearch.storage.schema import study_table, task_table
from mpsearch.storage.text import decode

Statement = TypeVar("Statement")
#: A task that ended this many workers is given up.
DEATHS = 3
_LAPSED = "its worker gave no sign of life"
#: Added to the position of a task that has ended a worker: others go first, so that what kills by chance seldom meets
#: the same task again.
_BEHIND = 1 << 32
#: Leases made free in one go.
_SWEEP = 100
#: Seconds that the holders of leases have to renew them, after the server was away.
GRACE = 5.0
_some, _held = task_table.alias("some"), task_table.alias("held")


def made_once(make: Callable[..., Statement]) -> Callable[..., Statement]:
    """Keep what a function makes for each kind of database; making a statement takes longer than what it does."""
    made: dict[tuple[object, ...], Statement] = {}

    @wraps(make)
    def get(connection: Connection, *shape: bool) -> Statement:
        key = (connection.dialect.name, *shape)
        if key not in made:
            made[key] = make(connection, *shape)
        return made[key]

    return get


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
    lapsed = and_(task_table.c.state == "leased", task_table.c.until < clock(connection))
    if connection.dialect.name != "postgresql":
        return lapsed
    # Nobody could renew a lease of before while the server was down.
    start = func.date_part("epoch", func.pg_postmaster_start_time(), type_=Double)
    return and_(lapsed, or_(task_table.c.updated >= start, clock(connection) >= start + GRACE))


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
    statement, values = _is_any(connection, *_shape(wish)), _values(wish)
    return bool(connection.execute(statement, values).scalar_one())


def take(connection: Connection, wish: ClaimArgs) -> LeasedTask | None:
    """Lease the first task that is ready."""
    values = _values(wish) | {"holder": wish.worker, "seconds_": wish.lease}
    row = connection.execute(_take(connection, *_shape(wish)), values).one_or_none()
    if row is None:
        return None
    told = row._asdict()
    return LeasedTask(**{**told, "body": decode(told["body"])})


def _shape(wish: ClaimArgs) -> tuple[bool, bool, bool]:
    """What of a wish changes the statement, and not its values alone."""
    return wish.setups is not None, bool(wish.skip), wish.any_study


def _values(wish: ClaimArgs) -> dict[str, Any]:
    values: dict[str, Any] = {}
    if wish.setups is not None:
        values["wished"] = list(wish.setups)
    if wish.skip:
        values["skipped"] = list(wish.skip)
    if not wish.any_study:
        values["of_study"] = wish.study
    return values


@made_once
def _is_any(connection: Connection, *shape: bool) -> Select[Any]:
    ready = _first(connection, *shape).subquery()
    return select(or_(exists(select(ready.c.key)), exists().where(_lapsed(connection))))


@made_once
def _take(connection: Connection, *shape: bool) -> Any:
    columns = task_table.c
    change = {
        "state": "leased",
        "epoch": columns.epoch + 1,
        "attempts": columns.attempts + 1,
        "worker": bindparam("holder"),
        "until": clock(connection) + bindparam("seconds_", type_=Double),
        "updated": clock(connection),
    }
    names = ("key", "setup", "kind", "body", "epoch", "until", "worker", "deaths", "attempts")
    study = select(study_table.c.name).where(study_table.c.id == columns.study).scalar_subquery()
    # Found once, before the change: it depends on no row of it.
    first = _first(connection, *shape).scalar_subquery()
    taken = update(task_table).where(columns.key == first).values(change)
    return taken.returning(*(columns[name] for name in names), study.label("study"))


def _setups(connection: Connection, any_study: bool) -> CTE:
    """The setups of which tasks are ready, of each driven study: found by leaps, however many tasks there are."""
    driving = driven(connection)
    if not any_study:
        driving = and_(driving, study_table.c.name == bindparam("of_study"))

    def least(study: ColumnElement[int], *more: ColumnElement[bool]) -> ColumnElement[str]:
        some = and_(_some.c.study == study, _some.c.state == "ready", *more)
        return select(_some.c.setup).where(some).order_by(_some.c.setup).limit(1).scalar_subquery()

    study = study_table.c.id
    begin = select(study.label("study"), least(study).label("setup")).where(driving)
    found = begin.cte("found", recursive=True)
    following = least(found.c.study, _some.c.setup > found.c.setup)
    return found.union_all(select(found.c.study, following).where(found.c.setup.is_not(None)))


def _first(connection: Connection, named: bool, skipping: bool, any_study: bool) -> Select[Any]:
    """The first task of each setup of each study, and of those the key of the first.

    An index leads to each, however many tasks there are; the studies that are driven are few, and so are their setups.
    """
    found = _setups(connection, any_study)
    setup = found.c.setup
    wished: ColumnElement[str] = bindparam("wished", expanding=True)
    fits: ColumnElement[bool] = setup.in_(wished) if named else setup.not_like(f"{PRIVATE}%")
    if skipping:
        skipped: ColumnElement[str] = bindparam("skipped", expanding=True)
        fits = and_(fits, setup.not_in(skipped))
    task = task_table.alias("next")
    ready = and_(task.c.study == found.c.study, task.c.state == "ready", task.c.setup == setup)
    order = (task.c.position, task.c.key)
    if connection.dialect.name == "postgresql":
        # These are held until the end of the transaction, and others take the ones after them meanwhile.
        one = select(task.c.key, task.c.position).where(ready).order_by(*order).limit(1)
        firsts = one.with_for_update(skip_locked=True).correlate(found).lateral("first")
        source, chosen = found.join(firsts, true()), firsts.c
    else:
        key = select(task.c.key).where(ready).order_by(*order).limit(1)
        same = _held.c.key == key.correlate(found).scalar_subquery()
        source, chosen = found.join(_held, same), _held.c
    return (
        select(chosen.key)
        .select_from(source)
        .where(setup.is_not(None), fits)
        .order_by(chosen.position, chosen.key)
        .limit(1)
    )
