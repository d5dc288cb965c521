"""Many processes at one database, and processes that are killed: small copies of `benchmarks.storage_load`."""

from __future__ import annotations

import hashlib
import json
import os
import shutil
import signal
import sqlite3
import subprocess
import sys
import tempfile
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import psycopg
import pytest

from mpsearch.storage.schema import SCHEMA, VERSION_TABLE
from mpsearch.storage.store import SqlStore
from tests.conftest import DATA
from tests.postgres import Postgres, postgres

ROOT = Path(__file__).resolve().parents[1]
Fresh = Callable[[], str]


@pytest.fixture(params=["sqlite", "postgres"])
def fresh(request: pytest.FixtureRequest, tmp_path: Path, server: Postgres) -> Iterator[Fresh]:
    """Makes an empty database and returns its address."""
    names: list[str] = []

    def make() -> str:
        if request.param == "sqlite":
            names.append("")
            return str(tmp_path / f"{len(names)}.db")
        names.append(server.create())
        return server.url(names[-1])

    yield make
    for name in filter(None, names):
        server.drop(name)


def run_apart(code: str, *arguments: object, **environment: str) -> subprocess.CompletedProcess[str]:
    """Run Python in a process without torch and without threads, which may fork."""
    return subprocess.run(
        [sys.executable, "-W", "error", "-c", code, *map(str, arguments)],
        capture_output=True, text=True, timeout=120, check=False, cwd=ROOT, env=os.environ | environment,
    )  # fmt: skip


def figures(harness: str, *arguments: object) -> dict[str, Any]:
    """Run one harness of the benchmark, and return its figures."""
    code = (
        "import json, sys; from benchmarks import storage_load; "
        "print(json.dumps(getattr(storage_load, sys.argv[1])(*map(json.loads, sys.argv[2:]))))"
    )
    done = run_apart(code, harness, *map(json.dumps, arguments))
    assert done.returncode == 0, done.stderr
    found: dict[str, Any] = json.loads(done.stdout)
    return found


def test_writers_lose_nothing_and_nothing_is_there_twice(fresh: Fresh) -> None:
    found = figures("writers", fresh(), 12, 10)
    assert (found["commits"], found["errors"], found["lost"], found["double"]) == (120, 0, 0, 0), found
    assert found["connections"] <= 14


def test_the_same_keys_from_all_give_one_row_each_and_every_other_value_is_reported(fresh: Fresh) -> None:
    found = figures("keys", fresh(), 8, 25, 30)
    assert (found["errors"], found["unreported"]) == (0, 0), found
    assert found["rows"] == found["distinct"]
    assert found["conflicts"] == found["written_down"] > 0


def test_workers_that_die_or_oversleep_change_nothing(fresh: Fresh) -> None:
    found = figures("tasks", fresh(), 6, 200, 0.7)
    assert (found["results"], found["ended"], found["states"], found["errors"]) == (200, 200, {"done": 200}, 0), found
    assert found["zombies"] == found["refused"] == found["logged"]
    assert found["zombies"] > 0


def test_one_schema_when_all_open_an_empty_database_at_once(fresh: Fresh) -> None:
    url = fresh()
    code = (
        "import sys; from benchmarks.storage_load import openers; "
        "found = openers(lambda number: sys.argv[1], 10, 1); print(found['rows'], found['errors'], found['first'])"
    )
    done = run_apart(code, url)
    assert (done.stdout, done.stderr) == ("[10] 0 []\n", "")
    with SqlStore(url) as store, store.reading() as connection:
        rows = connection.exec_driver_sql(f"SELECT version_num FROM {VERSION_TABLE}").all()
        assert [tuple(row) for row in rows] == [(f"{SCHEMA:04}",)]


def test_a_killed_writer_loses_nothing_that_was_acknowledged(fresh: Fresh) -> None:
    found = figures("kills", fresh(), 5)
    assert (found["lost"], found["halves"]) == (0, 0), found
    assert found["acknowledged"] >= 3


# --- a migration that is killed

KILLED = """
import os, signal, sys
from sqlalchemy import Engine, event
from mpsearch.storage.store import SqlStore
left = int(sys.argv[2])
@event.listens_for(Engine, "after_cursor_execute")
def after(*_):
    global left
    left -= 1
    if left == 0:
        os.kill(os.getpid(), signal.SIGKILL)
SqlStore(sys.argv[1]).close()
"""


def migrate_killed(url: str, statements: int) -> bool:
    """Open a database in a process that dies after so many statements; whether it died."""
    done = run_apart(KILLED, url, statements)
    assert done.returncode in (0, -signal.SIGKILL), done.stderr
    return done.returncode != 0


def whole(url: str, version: str) -> None:
    """Check a database of the frozen study, before or after the migration."""
    tables = ("study", "link", "value", "cell")
    counts = "SELECT " + ", ".join(f"(SELECT count(*) FROM {name})" for name in tables)
    link: Any = sqlite3.connect(url) if "://" not in url else psycopg.connect(url)
    try:
        assert [tuple(row) for row in link.execute(f"SELECT version_num FROM {VERSION_TABLE}").fetchall()] == [
            (version,)
        ]
        assert tuple(link.execute(counts).fetchall()[0]) == (1, 17, 18, 36)
    finally:
        link.close()


@pytest.mark.parametrize("statements", [2, 18, 24])
@pytest.mark.parametrize("kind", ["sqlite", "postgres"])
def test_a_migration_that_is_killed_leaves_the_old_schema(
    kind: str, statements: int, tmp_path: Path, database: str
) -> None:
    url = database if kind == "postgres" else str(tmp_path / "x.db")
    if kind == "sqlite":
        shutil.copy(DATA / "schema-1.db", url)
    else:
        with psycopg.connect(url) as connection:
            connection.execute((DATA / "schema-1.sql").read_text().encode())
    died = migrate_killed(url, statements)
    whole(url, "0001" if died else f"{SCHEMA:04}")
    assert died or statements > 20
    with SqlStore(url) as store:
        assert store.control.status("frozen").state == "complete"
    whole(url, f"{SCHEMA:04}")


def test_a_newer_file_is_refused_and_stays_as_it_is(tmp_path: Path) -> None:
    path = tmp_path / "x.db"
    shutil.copy(DATA / "schema-1.db", path)
    with sqlite3.connect(path) as link:
        link.execute(f"UPDATE {VERSION_TABLE} SET version_num = '{SCHEMA + 1:04}'")
    link.close()
    before = hashlib.sha256(path.read_bytes()).hexdigest()
    done = run_apart("import sys; from mpsearch.storage.store import SqlStore; SqlStore(sys.argv[1])", path)
    assert "E605" in done.stderr
    assert hashlib.sha256(path.read_bytes()).hexdigest() == before


def test_a_server_that_is_stopped_hard_comes_back_with_all_that_was_acknowledged() -> None:
    with (
        tempfile.TemporaryDirectory(prefix="mpsearch-postgres-") as folder,
        postgres(Path(folder), "fsync = on") as server,
        SqlStore(server.url(server.create())) as store,
    ):
        for i in range(2):
            store.put("plan", f"{i}", {"i": i})
            server.stop("immediate")
            server.start()
            # The store finds the server again by itself.
            assert list(store.get_many("plan", [f"{j}" for j in range(2)])) == [f"{j}" for j in range(i + 1)]
