"""The results database on a PostgreSQL server, and in memory: the suite of all stores, then what only servers do."""

from __future__ import annotations

import contextlib
import random
import re
import shutil
import subprocess
import sys
import tempfile
import threading
import time
from collections.abc import Callable, Iterator
from concurrent.futures import ThreadPoolExecutor
from functools import partial
from pathlib import Path
from typing import Any, cast

import psycopg
import pytest
from alembic.autogenerate import compare_metadata
from alembic.migration import MigrationContext
from sqlalchemy import event

from mpsearch.errors import MpsearchError, StorageError
from mpsearch.records import CellRow, TaskRow
from mpsearch.storage import cells, migrate, values
from mpsearch.storage.cells import number
from mpsearch.storage.checks import cell_values
from mpsearch.storage.database import again
from mpsearch.storage.engine import make_engine
from mpsearch.storage.gc import collect
from mpsearch.storage.place import Place
from mpsearch.storage.schema import SCHEMA, VERSION_TABLE, metadata
from mpsearch.storage.store import SqlStore
from mpsearch.stored_study import StoredStudy
from mpsearch.testing.queues import DRIVER
from mpsearch.testing.stores import StoreSuite
from mpsearch.testing.values import cell
from mpsearch.testing.values import plan as plan_of
from tests.conftest import DATA
from tests.postgres import PASSWORD, USER, Postgres, postgres


@pytest.fixture(scope="module")
def emptied(server: Postgres) -> Iterator[str]:
    """The address of a database that every test leaves empty."""
    name = server.create()
    SqlStore(server.url(name)).close()
    yield server.url(name)
    server.drop(name)


class TestPostgres(StoreSuite):
    @pytest.fixture
    def store(self, emptied: str) -> Iterator[SqlStore]:
        self.address = emptied
        with SqlStore(emptied) as store:
            yield store
            names = ", ".join(f'"{name}"' for name in metadata.tables)
            with store.writing() as connection:
                connection.exec_driver_sql(f"TRUNCATE {names} RESTART IDENTITY")

    def reopen(self, store: SqlStore) -> SqlStore:
        return SqlStore(self.address)


class TestMemory(StoreSuite):
    @pytest.fixture
    def store(self) -> Iterator[SqlStore]:
        with SqlStore(":memory:") as store:
            yield store

    def reopen(self, store: SqlStore) -> SqlStore:
        # There is no second way into a database in memory.
        return cast(SqlStore, contextlib.nullcontext(store))


def error_of(call: Callable[[], object]) -> MpsearchError:
    with pytest.raises(MpsearchError) as caught:
        call()
    return caught.value


def shown(error: BaseException) -> str:
    """All that a traceback would print of an error."""
    texts = []
    seen: BaseException | None = error
    while seen is not None:
        texts.append(f"{seen} {seen!r}")
        seen = seen.__cause__ or (None if seen.__suppress_context__ else seen.__context__)
    return "\n".join(texts)


# --- the server says no


@pytest.mark.parametrize(
    ("change", "says"),
    [
        (lambda url: url.replace(PASSWORD, f"wrong-{PASSWORD}"), "password authentication failed"),
        (lambda url: url.replace(f"{USER}:", "nobody:"), ""),
        (lambda url: f"{url}-missing", "does not exist"),
        (lambda url: re.sub(r":\d+/", ":1/", url), "refused"),
    ],
)
def test_a_log_in_that_fails_says_why_and_shows_no_password(
    database: str, change: Callable[[str], str], says: str
) -> None:
    error = error_of(lambda: SqlStore(change(database)))
    assert error.code == "E608"
    assert says in error.because
    assert PASSWORD not in shown(error)


def test_a_server_without_a_free_connection_says_what_to_do(server: Postgres, database: str) -> None:
    with SqlStore(database, busy_timeout=1.0) as store, contextlib.ExitStack() as stack:
        store.put("plan", "k", {})
        others = 0
        with contextlib.suppress(psycopg.OperationalError):
            while True:
                stack.enter_context(psycopg.connect(database))
                others += 1
        error = error_of(lambda: SqlStore(database, busy_timeout=0.3))
        assert error.code == "E607"
        assert PASSWORD not in shown(error)
        assert "fewer workers" in error.advice
        assert "max_connections" in error.advice
        # One that has its connection goes on, and knows how many there are.
        store.put("plan", "l", {})
        store._engine.dispose()
        extra = stack.enter_context(psycopg.connect(database))
        error = error_of(lambda: store.put("plan", "m", {}))
        assert error.code == "E607"
        assert re.search(r"allows 100 connections, \d+ for users like this one", error.message)
        extra.close()
        deadline = time.monotonic() + 10
        while time.monotonic() < deadline:
            with contextlib.suppress(StorageError):
                store.put("plan", "m", {})
                break
        assert others >= 90
        assert list(store.get_many("plan", "klm")) == ["k", "l", "m"]


def test_a_short_rush_for_connections_is_waited_out(database: str) -> None:
    SqlStore(database).close()
    held: list[psycopg.Connection[Any]] = []
    with contextlib.suppress(psycopg.OperationalError):
        while True:
            held.append(psycopg.connect(database))
    code = (
        "import sys; from mpsearch.storage.store import SqlStore; "
        "store = SqlStore(sys.argv[1]); store.put('plan', 'k', {}); store.close()"
    )
    process = subprocess.Popen([sys.executable, "-W", "error", "-c", code, database], stderr=subprocess.PIPE)
    time.sleep(1.5)
    for connection in held:
        connection.close()
    _, problems = process.communicate(timeout=60)
    assert (process.returncode, problems) == (0, b"")


def test_a_connection_that_the_server_ends_is_replaced(server: Postgres, database: str) -> None:
    with SqlStore(database) as store:
        store.put("plan", "k", {})
        ended = "SELECT count(pg_terminate_backend(pid)) FROM pg_stat_activity WHERE usename = 'worker'"
        assert server.sql(ended) == [(1,)]
        store.put("plan", "l", {})

        def interrupted() -> None:
            with store.writing() as connection:
                connection.exec_driver_sql("INSERT INTO value VALUES ('plan', 'm', '{}', NULL, '')")
                server.sql(ended)
                connection.exec_driver_sql("SELECT 1")

        error = error_of(interrupted)
        assert error.code == "E609"
        assert PASSWORD not in shown(error)
        assert list(store.get_many("plan", "klm")) == ["k", "l"]


def test_one_connection_for_each_store_and_limits_on_the_server(server: Postgres, database: str) -> None:
    with SqlStore(database, busy_timeout=7.0) as store:
        for i in range(5):
            store.put("plan", str(i), {})
        counted = f"SELECT count(*) FROM pg_stat_activity WHERE datname = '{database.rpartition('/')[2]}'"
        assert server.sql(counted) == [(1,)]
        with store.reading() as connection:
            names = ("lock_timeout", "statement_timeout", "idle_in_transaction_session_timeout", "tcp_keepalives_idle")
            found = [connection.exec_driver_sql(f"SHOW {name}").scalar() for name in names]
        assert found == ["7s", "10min", "1min", "30"]


def test_a_row_that_is_locked_is_said_to_be(database: str) -> None:
    with SqlStore(database, busy_timeout=0.2) as store:
        store.create_study("a", {})
        with psycopg.connect(database) as other:
            other.execute("UPDATE study SET phase = 'x'")
            error = error_of(lambda: store.set_state("a", "running"))
        assert error.code == "E601"
        assert "nothing is lost" in error.advice


# --- others, and a server that goes

LOCKS: dict[str, Callable[[SqlStore], object]] = {
    "lost": lambda store: store.queue.lost("w", "signal 9"),
    "withdraw": lambda store: store.queue.withdraw("a", 1),
    "forget": lambda store: store.queue.forget("a"),
    "discard": lambda store: store.queue.discard(["k0", "k1"]),
}
STATES = {"lost": "leased", "withdraw": "ready", "forget": "done", "discard": "done"}


@contextlib.contextmanager
def waiting(server: Postgres, database: str, call: str) -> Iterator[psycopg.Connection[Any]]:
    """A connection that has locked the first of two tasks, while a call in a thread waits for it."""
    with SqlStore(database) as store, ThreadPoolExecutor(1) as pool, psycopg.connect(database) as other:
        store.create_study("a", {})
        store.control.drive("a", DRIVER, 1000.0)
        store.queue.offer("a", [TaskRow(f"k{i}", "s", "score", {}) for i in range(2)])
        server.sql(f"UPDATE task SET state = '{STATES[call]}', worker = 'w'", database.rpartition("/")[2])
        # The first now lies behind the second, in the table and in its indexes.
        server.sql("UPDATE task SET position = 1 WHERE key = 'k0'", database.rpartition("/")[2])
        other.execute("SELECT 1 FROM task WHERE key = 'k0' FOR UPDATE")
        done = pool.submit(LOCKS[call], store)
        waits = "SELECT count(*) FROM pg_stat_activity WHERE wait_event_type = 'Lock'"
        deadline = time.monotonic() + 20
        while server.sql(waits) != [(1,)] and time.monotonic() < deadline:
            time.sleep(0.01)
        yield other
        other.commit()
        done.result(timeout=20)
        state = store.queue.states(["k0", "k1"])
        assert [row.deaths for row in state.values()] == ([1, 1] if call == "lost" else [])


@pytest.mark.parametrize("call", LOCKS)
def test_tasks_are_locked_by_key(server: Postgres, database: str, call: str) -> None:
    with waiting(server, database, call) as other:
        other.execute("SELECT 1 FROM task WHERE key = 'k1' FOR UPDATE NOWAIT")


def test_a_call_that_waits_in_a_circle_is_made_again(server: Postgres, database: str) -> None:
    ends = "SELECT deadlocks FROM pg_stat_database WHERE datname = current_database()"
    with waiting(server, database, "withdraw") as other:
        # The call holds the study, which this connection now waits for.
        other.execute("SELECT 1 FROM study WHERE name = 'a' FOR UPDATE")
    deadline = time.monotonic() + 20
    while server.sql(ends, database.rpartition("/")[2]) == [(0,)] and time.monotonic() < deadline:
        time.sleep(0.05)
    assert server.sql(ends, database.rpartition("/")[2]) == [(1,)]


def test_a_circle_that_does_not_end_is_said_to_be(database: str) -> None:
    with SqlStore(database) as store:
        calls = []

        @again
        def call() -> None:
            calls.append(1)
            with store.writing() as connection:
                connection.exec_driver_sql("DO $$ BEGIN RAISE EXCEPTION 'x' USING ERRCODE = '40001'; END $$")

        error = error_of(call)
    assert (error.code, len(calls)) == ("E601", 8)
    assert PASSWORD not in shown(error)


def test_a_server_that_goes_away_is_not_a_log_in_that_fails() -> None:
    with (
        tempfile.TemporaryDirectory(prefix="mpsearch-postgres-") as folder,
        postgres(Path(folder)) as server,
        SqlStore(server.url(server.create()), busy_timeout=0.5) as store,
    ):
        store.put("plan", "k", {})
        server.stop("fast")
        started = time.monotonic()
        for _ in range(2):
            error = error_of(lambda: store.put("plan", "l", {}))
            assert error.code == "E609"
            assert PASSWORD not in shown(error)
        assert time.monotonic() - started < 5
        server.start()
        store.put("plan", "l", {})


# --- the schema


def frozen(server: Postgres) -> str:
    """A database of schema 1 with a finished study."""
    name = server.create()
    with psycopg.connect(server.url(name)) as connection:
        connection.execute((DATA / "schema-1.sql").read_text().encode())
    return server.url(name)


@pytest.fixture(params=["sqlite", "postgres"])
def old(request: pytest.FixtureRequest, tmp_path: Path, server: Postgres) -> str:
    """The address of a database of schema 1 with a finished study."""
    if request.param == "postgres":
        return frozen(server)
    shutil.copy(DATA / "schema-1.db", tmp_path / "x.db")
    return f"sqlite:///{tmp_path / 'x.db'}"


def answer(store: SqlStore) -> str:
    """The plan of the frozen study, solved anew, as its key."""
    from mpsearch.spec import StudySpec

    spec = StudySpec.from_question(store.study("frozen").spec, store.address)
    return StoredStudy(spec, store).plan("weights <= 4 bits").key


def test_a_database_of_schema_1_goes_on(old: str) -> None:
    with SqlStore(old) as store:
        stored = {row.label: row.key for row in store.links("frozen", "plan")}
        assert len(store.links("frozen", "measurement")) == 6
        assert answer(store) in [row.key for row in store.links("frozen", "plan") if row.label == "mixed"]
        assert len(stored) == 5
        found = store.control.status("frozen")
        assert (found.state, found.wanted, found.driver, found.live) == ("complete", "run", "", False)
        store.control.drive("frozen", DRIVER, 10.0)
        store.queue.offer("frozen", [TaskRow("k", "s", "score", {})])
        assert store.queue.claim("w", lease=1.0) is not None
    with SqlStore(old, read_only=True) as store, store.reading() as connection:
        assert connection.exec_driver_sql(f"SELECT version_num FROM {VERSION_TABLE}").scalar() == f"{SCHEMA:04}"


def cells_of_schema_1(url: str) -> list[tuple[Any, ...]]:
    """Cells as schema 1 keeps them, floats to the last bit."""
    place = Place.of(url)
    engine = make_engine(place, busy_timeout=1, read_only=False)
    with engine.connect() as connection:
        rows = connection.exec_driver_sql(f"SELECT scope, {', '.join(CellRow._fields)} FROM cell").all()
    engine.dispose()
    return sorted(exact(row[0], CellRow(*row[1:])) for row in rows)


def exact(scope: str, row: CellRow) -> tuple[Any, ...]:
    return (scope, *(x.hex() if isinstance(x, float) else str(x) for x in row))


def test_cells_of_schema_1_are_kept_to_the_last_bit(old: str) -> None:
    engine = make_engine(Place.of(old), busy_timeout=1, read_only=False)
    with engine.begin() as connection:
        for scope, number in (("é" * 200, 0.1 + 0.2), ("a'b", 5e-324), ('"; --', 1.7976931348623157e308)):
            values = (scope, "l" * 500, "int4", 2**63 - 1, "ok", number, -number, 2**63 - 1, "\u2028 why", 1e-9)
            mark = "?" if connection.dialect.name == "sqlite" else "%s"
            connection.exec_driver_sql(f"INSERT INTO cell VALUES ({', '.join([mark] * 10)})", values)
    before = cells_of_schema_1(old)
    assert len(before) == 39
    with SqlStore(old) as store:
        found = [exact(scope, row) for scope in {row[0] for row in before} for row in store.cells(scope)]
        assert sorted(found) == before
        # What is known is not stored again, and what is new comes beside it.
        store.put_cells("a'b", [CellRow("l" * 500, "int4", 2**63 - 1, "ok", 5e-324, -5e-324, 1), cell()])
        assert len(store.cells("a'b")) == 2
    with engine.connect() as connection, migrate.alone(connection):
        migrate.downgrade(connection, "0001")
    engine.dispose()
    assert set(cells_of_schema_1(old)) >= set(before)
    with SqlStore(old) as store:
        assert sorted(
            exact(scope, row) for scope in {row[0] for row in before} for row in store.cells(scope)
        ) == sorted([*before, exact("a'b", cell())])


def test_a_study_that_ran_in_schema_1_is_paused(old: str) -> None:
    engine = make_engine(Place.of(old), busy_timeout=1, read_only=False)
    with engine.begin() as connection:
        connection.exec_driver_sql("UPDATE study SET state = 'running'")
    engine.dispose()
    with SqlStore(old) as store:
        assert store.control.status("frozen").state == "paused"


def test_up_down_and_up_again_keeps_what_is_stored(old: str) -> None:
    place = Place.of(old)
    with SqlStore(old) as store:
        before = (store.studies(), store.links("frozen", "plan"), answer(store))
        store.create_study("b", {})
        store.control.submit("b", "home")
    engine = make_engine(place, busy_timeout=1, read_only=False)
    try:
        with engine.connect() as connection, migrate.alone(connection):
            migrate.downgrade(connection, "0001")
        with engine.connect() as connection, migrate.alone(connection):
            migrate.upgrade(connection)
            options = {"version_table": VERSION_TABLE, "compare_type": True, "compare_server_default": True}
            assert compare_metadata(MigrationContext.configure(connection, opts=options), metadata) == []
    finally:
        engine.dispose()
    with SqlStore(old) as store:
        assert store.study("b").state == "paused"
        assert ([store.study("frozen")], store.links("frozen", "plan"), answer(store)) == before


def test_a_newer_schema_is_refused_on_a_server(server: Postgres, database: str) -> None:
    SqlStore(database).close()
    name = database.rpartition("/")[2]
    server.sql(f"UPDATE {VERSION_TABLE} SET version_num = '0099'", name)
    error = error_of(lambda: SqlStore(database))
    assert error.code == "E605"
    assert "schema 99" in error.message
    assert server.sql(f"SELECT version_num FROM {VERSION_TABLE}", name) == [("0099",)]


# --- scopes


@pytest.mark.parametrize("kind", ["sqlite", "postgres"])
def test_new_scopes_of_many_writers_at_once(kind: str, tmp_path: Path, database: str) -> None:
    url = database if kind == "postgres" else str(tmp_path / "x.db")
    writers, rounds = 6, 8
    barrier = threading.Barrier(writers)

    def write(number: int) -> None:
        with SqlStore(url) as store:
            for i in range(rounds):
                scopes = [f"scope {i} {j}" for j in range(5)]
                random.Random(number).shuffle(scopes)
                rows = [cell_values(scope, cell(batch=number)) for scope in scopes]
                barrier.wait(60)
                store._put_cells(rows)

    SqlStore(url).close()
    with ThreadPoolExecutor(writers) as pool:
        for done in [pool.submit(write, number) for number in range(writers)]:
            done.result()
    with SqlStore(url) as store:
        for i in range(rounds):
            for j in range(5):
                assert [row.batch for row in store.cells(f"scope {i} {j}")] == list(range(writers))


def test_a_scope_that_is_taken_out_while_its_cells_come(server: Postgres, database: str) -> None:
    name = database.rpartition("/")[2]
    with SqlStore(database) as store:
        server.sql(f"INSERT INTO scope VALUES ({number('s', 0)}, 's')", name)
        taken: list[str] = []

        def take(connection: object, cursor: object, statement: str, *_: object) -> None:
            if statement.startswith("INSERT INTO cell") and not taken:
                taken.append(statement)
                server.sql("DELETE FROM scope", name)

        event.listen(store._engine, "before_cursor_execute", take)
        store.put_cells("s", [cell()])
        assert taken
        assert store.cells("s") == [cell()]


def test_two_scopes_are_given_one_number_at_once(server: Postgres, database: str) -> None:
    name = database.rpartition("/")[2]
    with SqlStore(database) as store:
        given: list[str] = []

        def give(connection: object, cursor: object, statement: str, *_: object) -> None:
            if statement.startswith("INSERT INTO scope") and not given:
                given.append(statement)
                server.sql(f"INSERT INTO scope VALUES ({number('s', 0)}, 'other')", name)

        event.listen(store._engine, "before_cursor_execute", give)
        store.put_cells("s", [cell()])
        assert given
        assert store.cells("other") == []
        assert store.cells("s") == [cell()]
        assert len(set(server.sql("SELECT id FROM scope", name))) == 2


def test_a_column_of_a_server_that_was_changed_is_reported(server: Postgres, database: str) -> None:
    with SqlStore(database) as store:
        store.put_cells("s", [cell()])
    server.sql("ALTER TABLE cell ALTER samples TYPE text", database.rpartition("/")[2])
    with SqlStore(database) as store:
        assert error_of(lambda: store.cells("s")).code == "E603"


@pytest.mark.parametrize("kind", ["sqlite", "postgres"])
def test_statements_of_one_moment(kind: str, tmp_path: Path, database: str) -> None:
    url = database if kind == "postgres" else str(tmp_path / "x.db")
    with SqlStore(url) as store, SqlStore(url) as other:
        with store.reading(at_one_moment=True) as connection:
            assert cells.read(connection, "s") == []
            other.put_cells("s", [cell()])
            assert cells.read(connection, "s") == []
        # The next ones see what has come since, and what a read leaves behind does not keep one from writing.
        assert store.cells("s") == [cell()]
        store.put_cells("s", [cell("b")])
        with store.reading() as connection:
            driver = connection.connection.driver_connection
            if kind == "postgres":
                assert driver is not None
                assert driver.autocommit
        assert len(other.cells("s")) == 2


# --- cost


def statements(store: SqlStore, call: Callable[[], object]) -> list[tuple[str, Any]]:
    """Return the SQL that a call sends, with its values."""
    seen: list[tuple[str, Any]] = []

    def listen(connection: object, cursor: object, statement: str, parameters: Any, *_: object) -> None:
        seen.append((statement, parameters))

    event.listen(store._engine, "before_cursor_execute", listen)
    call()
    event.remove(store._engine, "before_cursor_execute", listen)
    return seen


def calls(store: SqlStore, rows: int) -> dict[str, Callable[[], object]]:
    """Every call on a store, with so many rows."""
    queue, control = store.queue, store.control
    some = [TaskRow(f"{rows} {i}", "s", "score", {}, i) for i in range(rows)]
    cells = [cell(batch=i) for i in range(rows)]
    keys = [f"{i}" for i in range(rows)]

    def leased() -> Any:
        found = queue.claim("w", lease=10.0)
        assert found is not None
        return found

    def finish() -> None:
        queue.finish(held.pop(), cells=[(f"finish {rows}", cells)], claim={"lease": 10.0})

    held: list[Any] = []
    return {
        "put": lambda: store.put("plan", f"{rows}", {}),
        "get_many": lambda: store.get_many("plan", keys),
        "put_cells": lambda: store.put_cells(f"{rows}", cells),
        "put_cells again": lambda: store.put_cells(f"{rows}", cells),
        "cells": lambda: store.cells(f"{rows}"),
        "offer": lambda: queue.offer("a", some),
        "offer again": lambda: queue.offer("a", some, again=True),
        "claim": lambda: held.append(leased()),
        "renew": lambda: queue.renew(held[0], 10.0),
        "finish": finish,
        "states": lambda: queue.states([row.key for row in some]),
        "counts": lambda: queue.counts("a"),
        "status": lambda: control.status("a"),
        "statuses": control.statuses,
        "waiting": control.waiting,
        "beat": lambda: control.beat("a", DRIVER, 1, 10.0, "", 0, 0),
        "log": lambda: control.log("a", "note", ""),
        "lines": lambda: control.lines("a"),
        "lost": lambda: queue.lost("w", "signal 9"),
        "orphans": lambda: queue.orphans("b", [row.key for row in some]),
        "withdraw": lambda: queue.withdraw("a"),
        "withdraw mine": lambda: queue.withdraw("a", 1),
        "forget mine": lambda: queue.forget("a", epoch=1),
    }


@pytest.mark.parametrize("kind", ["sqlite", "postgres"])
def test_the_number_of_statements_is_constant_and_small(kind: str, tmp_path: Path, database: str) -> None:
    with SqlStore(database if kind == "postgres" else str(tmp_path / "x.db")) as store:
        store.create_study("a", {})
        store.control.drive("a", DRIVER, 1000.0)
        counts = [
            {name: len(statements(store, call)) for name, call in calls(store, rows).items()} for rows in (3, 3000)
        ]
    assert counts[0] == counts[1]
    assert max(counts[0].values()) <= 6, counts[0]


def fill(store: SqlStore, scale: int) -> None:
    """Write a large table of cells and of tasks past the store."""
    with store.writing() as connection:
        number = connection.exec_driver_sql("SELECT id FROM study").scalar_one()
        mark = "?" if connection.dialect.name == "sqlite" else "%s"
        scopes = [(i, f"scope {i}") for i in range(1000)]
        connection.exec_driver_sql(f"INSERT INTO scope VALUES ({mark}, {mark})", scopes)
        rows = [(i % 10, f"layer {i}", "int4", -1, "ok", 0.5, 0.1, 1, "", 0.0) for i in range(scale)]
        connection.exec_driver_sql(f"INSERT INTO cell VALUES ({', '.join([mark] * 10)})", rows)
        tasks = [
            (f"k{i}", number, f"setup {i % 3}", "score", "{}", i, ("done", "ready")[i % 2], 0, "", 0, 0, "", 0.0, 0.0)
            for i in range(scale)
        ]
        names = (
            "key, study, setup, kind, body, position, state, epoch, worker, deaths, attempts, reason, seconds, updated"
        )
        connection.exec_driver_sql(f"INSERT INTO task ({names}) VALUES ({', '.join([mark] * 14)})", tasks)


@pytest.mark.parametrize("kind", ["sqlite", "postgres"])
def test_no_call_goes_through_a_whole_table(kind: str, tmp_path: Path, server: Postgres, database: str) -> None:
    with SqlStore(database if kind == "postgres" else str(tmp_path / "x.db")) as store:
        store.create_study("a", {})
        store.control.drive("a", DRIVER, 1000.0)
        fill(store, 20_000)
        if kind == "postgres":
            server.sql("ANALYZE", database.rpartition("/")[2])
        wanted = calls(store, 3)
        names = ("put_cells", "put_cells again", "cells", "claim", "renew", "finish", "states", "orphans")
        work = [wanted[name] for name in names]
        narrower: list[dict[str, Any]] = [{"setups": ["setup 1"]}, {"setups": ["x"]}, {"skip": ["setup 0", "setup 2"]}]
        for more in narrower:
            work.append(partial(store.queue.claim, "w", lease=10.0, **more))
        plans = [plan for call in work for plan in explained(store, statements(store, call))]
    assert len(plans) >= 14
    for statement, plan in plans:
        whole = r"Seq Scan on (cell|scope|task)|SCAN (cell|scope|task|next|some)\b"
        assert not re.search(whole, plan), f"{statement}\n{plan}"
    claims = [plan for statement, plan in plans if "RECURSIVE" in statement]
    assert len(claims) >= 4
    for plan in claims:
        assert re.search(r"next USING .*ix_task_next \(.*setup=\?|Index Cond: .*state.*setup\)::text = ", plan), plan
    assert any("ix_task_next" in plan for _, plan in plans)
    assert any("ix_task_until" in plan for _, plan in plans)
    assert any("pk_cell" in plan or "sqlite_autoindex_cell" in plan or "USING PRIMARY KEY" in plan for _, plan in plans)


def explained(store: SqlStore, sent: list[tuple[str, Any]]) -> Iterator[tuple[str, str]]:
    """Statements with the database's plans for them."""
    for statement, parameters in sent:
        if statement.startswith(("BEGIN", "INSERT")) or not re.search(r"\b(cell|scope|task)\b", statement):
            continue
        values = parameters[0] if isinstance(parameters, list) else parameters
        with store.reading() as connection:
            verb = "EXPLAIN QUERY PLAN" if connection.dialect.name == "sqlite" else "EXPLAIN"
            rows = connection.exec_driver_sql(f"{verb} {statement}", values).all()
        yield statement, "\n".join(str(row[-1]) for row in rows)


def test_the_canary_is_nowhere(database: str) -> None:
    with SqlStore(database) as store:
        store.create_study("a", {"storage": database})
        assert PASSWORD not in repr(store)
        assert PASSWORD not in str(error_of(lambda: store.study("b")))
        assert PASSWORD not in str(error_of(lambda: store.create_study("a", {"storage": f"{database}x"})))
        assert PASSWORD in store.address


def test_what_a_plan_shares_is_not_collected_while_the_plan_is_being_stored(emptied: str) -> None:
    first, second = plan_of("int4-g64", "bf16"), plan_of("bf16", "int4-g64")
    with SqlStore(emptied) as store, SqlStore(emptied) as other, ThreadPoolExecutor(1) as pool:
        store.put("plan", first.key, first.to_json())
        with store.writing() as connection:
            values.put_many(connection, [values.row("plan", second.key, second.to_json(), None)])
            collected = pool.submit(collect, other, dry_run=False, days=0)
            time.sleep(0.5)
            assert not collected.done()
        assert collected.result(30).values == {"plan": 1}
        assert store.get("plan", first.key) is None
        assert store.get("plan", second.key) == second.to_json()
        assert collect(store, dry_run=False, days=0).values == {"plan": 1}
