"""The results database: one suite for every store, then what only SQLite files can go through.

Run as a script, this file is a process that starts others, races them and kills them: see `main`.
"""

from __future__ import annotations

import hashlib
import multiprocessing
import os
import random
import resource
import shutil
import signal
import sqlite3
import subprocess
import sys
import threading
import time
from collections.abc import Callable, Iterator
from functools import partial
from pathlib import Path
from typing import Any

import pytest
from alembic.autogenerate import compare_metadata
from alembic.migration import MigrationContext
from alembic.script import ScriptDirectory
from hypothesis import given, settings
from hypothesis import strategies as st
from sqlalchemy import Engine, create_engine, event
from sqlalchemy.exc import DBAPIError

from mpsearch import registry
from mpsearch.errors import InputError, MpsearchError, ResourceError, StorageError
from mpsearch.keys import content_key
from mpsearch.records import CellRow
from mpsearch.storage import migrate
from mpsearch.storage.engine import make_engine
from mpsearch.storage.failures import translated
from mpsearch.storage.files import NETWORK, mount_type
from mpsearch.storage.place import Place, hide
from mpsearch.storage.schema import SCHEMA, VERSION_TABLE, metadata
from mpsearch.storage.store import SqlStore
from mpsearch.testing.stores import StoreSuite
from mpsearch.testing.values import cell

ROOT = Path(__file__).resolve().parents[1]
WRITERS, PUTS, OPENERS, ROUNDS, KILLS = 16, 100, 8, 5, 20


@pytest.fixture(scope="module")
def blank(tmp_path_factory: pytest.TempPathFactory) -> bytes:
    """The bytes of a database with nothing in it, which take time to make."""
    path = tmp_path_factory.mktemp("blank") / "x.db"
    SqlStore(str(path)).close()
    return path.read_bytes()


class TestSqliteFile(StoreSuite):
    @pytest.fixture
    def store(self, tmp_path: Path, blank: bytes) -> Iterator[SqlStore]:
        self.path = tmp_path / "results of today.db"
        self.path.write_bytes(blank)
        with SqlStore(f"sqlite:///{self.path}") as store:
            yield store

    def reopen(self, store: SqlStore) -> SqlStore:
        return SqlStore(str(self.path), create=False)


@pytest.fixture
def path(tmp_path: Path) -> Path:
    return tmp_path / "x.db"


def digest(path: Path) -> str:
    return hashlib.sha256(path.read_bytes()).hexdigest()


def raw(path: Path, *statements: str) -> list[Any]:
    """Run statements past the store and return the rows of the last one."""
    connection = sqlite3.connect(path, isolation_level=None)
    try:
        return [connection.execute(statement).fetchall() for statement in statements][-1]
    finally:
        connection.close()


def error_of(call: Callable[[], object]) -> MpsearchError:
    with pytest.raises(MpsearchError) as caught:
        call()
    return caught.value


def run_apart(what: str, *arguments: object) -> str:
    """Run a function of this file in a process of its own."""
    environment = os.environ | {"PYTHONPATH": os.pathsep.join([str(ROOT), os.environ.get("PYTHONPATH", "")])}
    command = [sys.executable, "-W", "error", __file__, what, *map(str, arguments)]
    done = subprocess.run(command, capture_output=True, text=True, timeout=120, check=False, env=environment)
    assert done.returncode == 0, done.stderr
    assert done.stderr == ""
    return done.stdout


# --- many processes

FORK = multiprocessing.get_context("fork")


def together(count: int, *rounds: Callable[[int], None]) -> None:
    """Run ``work(0..count-1)`` in as many processes, each round from one moment on; fail if one fails."""
    barrier = FORK.Barrier(count, timeout=60)

    def start(number: int) -> None:
        try:
            for work in rounds:
                barrier.wait()
                work(number)
        except BaseException:
            barrier.abort()
            raise

    workers = [FORK.Process(target=start, args=(number,)) for number in range(count)]
    for worker in workers:
        worker.start()
    for worker in workers:
        worker.join()
    codes = [worker.exitcode for worker in workers]
    if any(codes):
        sys.exit(f"exit codes {codes}")


def draws(number: int) -> list[str]:
    """Keys that a writer puts: half of them its own, half of them drawn from those that all writers put."""
    source = random.Random(number)
    return [f"own {number} {i}" if i % 4 < 2 else f"shared {source.randrange(80)}" for i in range(PUTS)]


def write_together(path: str) -> None:
    def write(number: int) -> None:
        with SqlStore(path) as store:
            for i, key in enumerate(draws(number)):
                if i % 2:
                    store.put("measurement", key, {"key": key}, volatile={"writer": number})
                else:
                    store.put_cells("s", [cell(key, batch=batch, value=len(key) / 3) for batch in range(3)])

    together(WRITERS, write)


def test_many_writers_lose_nothing(path: Path) -> None:
    run_apart("write_together", path)
    keys = {key for number in range(WRITERS) for key in draws(number)[1::2]}
    layers = {key for number in range(WRITERS) for key in draws(number)[::2]}
    with SqlStore(str(path), create=False) as store:
        assert {key: body["key"] for key, body in store.get_many("measurement", keys).items()} == {k: k for k in keys}
        assert {(row.layer, row.batch) for row in store.cells("s")} == {(k, b) for k in layers for b in range(3)}
        assert store.conflicts() == []
    counts = "SELECT (SELECT count(*) FROM value), (SELECT count(*) FROM cell)"
    assert raw(path, counts) == [(len(keys), 3 * len(layers))]
    assert raw(path, "PRAGMA integrity_check") == [("ok",)]


def open_together(folder: str) -> None:
    def put(i: int, number: int) -> None:
        with SqlStore(f"{folder}/{i}.db") as store:
            store.put("plan", str(number), {"i": i})

    together(OPENERS, *(partial(put, i) for i in range(ROUNDS)))


def test_one_schema_when_all_open_an_empty_database_at_once(tmp_path: Path) -> None:
    (tmp_path / "0.db").touch()
    run_apart("open_together", tmp_path)
    for i in range(ROUNDS):
        path = tmp_path / f"{i}.db"
        assert raw(path, f"SELECT version_num FROM {VERSION_TABLE}") == [(f"{SCHEMA:04}",)]
        assert raw(path, "SELECT count(*) FROM value") == [(OPENERS,)]


def kill_writers(path: str, witness: str) -> None:
    def write(number: int) -> None:
        log = os.open(witness, os.O_WRONLY | os.O_APPEND)
        with SqlStore(path) as store:
            for i in range(10**6):
                store.put("measurement", f"{number} {i}", {"value": i / 7})
                store.put_cells("s", [cell(f"{number} {i}", batch=batch) for batch in range(5)])
                os.write(log, f"{number} {i}\n".encode())
                os.fsync(log)

    source = random.Random(5)
    Path(witness).touch()
    for number in range(KILLS):
        before = os.path.getsize(witness)
        worker = FORK.Process(target=write, args=(number,))
        worker.start()
        # One in four is killed while it starts, the others at work, however slow the machine is.
        while number % 4 and worker.is_alive() and os.path.getsize(witness) == before:
            time.sleep(0.001)
        time.sleep(source.uniform(0.0, 0.1))
        worker.kill()
        worker.join()
        if worker.exitcode != -signal.SIGKILL:
            sys.exit(f"a writer ended by itself: {worker.exitcode}")


def test_kill_9_loses_nothing_that_was_acknowledged(path: Path, tmp_path: Path) -> None:
    run_apart("kill_writers", path, tmp_path / "witness")
    acknowledged = (tmp_path / "witness").read_text().split("\n")[:-1]
    assert len(acknowledged) >= KILLS * 3 // 4
    with SqlStore(str(path), create=False) as store:
        values = store.get_many("measurement", acknowledged)
        layers = [row.layer for row in store.cells("s")]
    assert values == {key: {"value": int(key.split()[1]) / 7} for key in acknowledged}
    assert {layers.count(key) for key in acknowledged[-50:]} == {5}
    assert set(acknowledged) <= set(layers)
    # A call of put_cells is there as a whole or not at all.
    assert len(layers) == 5 * len(set(layers))
    assert raw(path, "SELECT key FROM value GROUP BY kind, key HAVING count(*) > 1") == []
    assert raw(path, "PRAGMA integrity_check") == [("ok",)]


def kill_creation(folder: str) -> None:
    for count in range(1, 200):
        path = f"{folder}/{count}.db"

        def create(count: int = count, path: str = path) -> None:
            seen = 0

            @event.listens_for(Engine, "after_cursor_execute")
            def after(*_: object) -> None:
                nonlocal seen
                seen += 1
                if seen == count:
                    os.kill(os.getpid(), signal.SIGKILL)

            SqlStore(path).close()

        worker = FORK.Process(target=create)
        worker.start()
        worker.join()
        with SqlStore(path) as store:
            store.put("plan", "k", {"a": 1})
        if worker.exitcode == 0:
            print(count)
            return
    sys.exit("creation never ended")


def test_creation_killed_after_any_statement_is_made_good(tmp_path: Path) -> None:
    points = int(run_apart("kill_creation", tmp_path))
    assert points > 10
    for count in range(1, points + 1):
        assert raw(tmp_path / f"{count}.db", "SELECT count(*) FROM value") == [(1,)]
        assert raw(tmp_path / f"{count}.db", "PRAGMA integrity_check") == [("ok",)]


def inherit(path: str) -> None:
    with SqlStore(path) as store:
        store.put("plan", "parent", {})
        parents = id(store._engine.pool)

        def write(number: int) -> None:
            for i in range(25):
                store.put("plan", f"{number} {i}", {})
            assert id(store._engine.pool) != parents
            assert [id(pool) for pool in store._inherited] == [parents], "the parent's connection was closed"

        together(4, write)
        store.put("plan", "parent again", {})


def test_a_store_works_on_both_sides_of_a_fork(path: Path) -> None:
    run_apart("inherit", path)
    assert raw(path, "SELECT count(*) FROM value") == [(102,)]
    assert raw(path, "PRAGMA integrity_check") == [("ok",)]


def test_a_current_database_opens_without_alembic(path: Path) -> None:
    SqlStore(str(path)).close()
    code = (
        "import sys; from mpsearch.storage.store import SqlStore; store = SqlStore(sys.argv[1]); store.studies(); "
        "store.close(); print(*sorted({name.partition('.')[0] for name in sys.modules}))"
    )
    done = subprocess.run(
        [sys.executable, "-W", "error", "-c", code, str(path)], capture_output=True, text=True, check=True, cwd=ROOT
    )
    loaded = done.stdout.split()
    assert "sqlalchemy" in loaded
    assert not {"alembic", "mako", "torch", "ray", "psycopg", "pandas"} & set(loaded)


# --- opening


def test_the_registry_knows_the_store(path: Path) -> None:
    with registry.make("stores", "sql", url=str(path)) as store:
        assert isinstance(store, SqlStore)


def test_a_database_in_memory() -> None:
    for address in ("sqlite://", ":memory:"):
        with SqlStore(address) as store:
            store.put("plan", "k", {"a": 1})
            assert store.get("plan", "k") == {"a": 1}


def test_only_the_owner_may_read_the_files(path: Path) -> None:
    before = os.umask(0)
    try:
        with SqlStore(str(path)) as store:
            store.put("plan", "k", {})
            modes = {file.name: oct(file.stat().st_mode & 0o777) for file in path.parent.iterdir()}
    finally:
        os.umask(before)
    assert modes == dict.fromkeys(("x.db", "x.db-wal", "x.db-shm"), "0o600")


def test_one_file_is_left_after_closing(path: Path) -> None:
    for read_only in (False, False, True):
        SqlStore(str(path), read_only=read_only).close()
        assert [file.name for file in path.parent.iterdir()] == ["x.db"]


def test_writers_ask_for_the_lock_first_and_wait_for_the_disk(path: Path) -> None:
    with SqlStore(str(path)) as store:
        with store._engine.connect() as connection:
            pragmas = ("journal_mode", "synchronous", "foreign_keys", "busy_timeout", "trusted_schema")
            found = [connection.exec_driver_sql(f"PRAGMA {name}").scalar() for name in pragmas]
        assert found == ["wal", 2, 1, 60_000, 0]
        seen = statements(store, lambda: store.put("plan", "k", {})) + statements(store, lambda: store.get("plan", "k"))
    assert [text for text in seen if text.startswith("BEGIN")] == ["BEGIN IMMEDIATE", "BEGIN"]


def test_a_missing_file_is_not_made_unasked(path: Path) -> None:
    SqlStore(str(path)).close()
    error = error_of(lambda: SqlStore(f"sqlite:///{path.with_name('xx.db')}", create=False))
    assert isinstance(error, InputError)
    assert error.code == "E101"
    assert "did you mean 'x.db'" in error.message
    assert error_of(lambda: SqlStore(str(path.with_name("yy.db")), read_only=True)).code == "E101"
    assert error_of(lambda: SqlStore(str(path.parent / "no" / "x.db"))).code == "E101"
    assert [file.name for file in path.parent.iterdir()] == ["x.db"]


@pytest.mark.parametrize(
    ("content", "says"),
    [
        (b"PK\x03\x04" + bytes(100), r"starts with 'PK'"),
        (b"version https://git-lfs.github.com/spec/v1\n", r"starts with 'version https://'"),
        (b"layer,format\n", r"starts with 'layer,format'"),
        (b"\x00\x01\x02", r"starts with the bytes 00 01 02"),
        (b"\xff\xfe\x00", r"starts with the bytes ff fe 00"),
    ],
)
def test_another_kind_of_file_is_refused(path: Path, content: bytes, says: str) -> None:
    path.write_bytes(content)
    with pytest.raises(StorageError, match=says) as caught:
        SqlStore(str(path))
    assert caught.value.code == "E603"
    assert path.read_bytes() == content


def test_a_folder_is_refused(tmp_path: Path) -> None:
    assert error_of(lambda: SqlStore(str(tmp_path))).code == "E603"


def test_a_database_of_another_program_is_refused(path: Path) -> None:
    raw(path, "CREATE TABLE trials (id INTEGER)", "CREATE TABLE alembic_version (version_num TEXT)")
    before = digest(path)
    error = error_of(lambda: SqlStore(str(path)))
    assert error.code == "E603"
    assert "alembic_version, trials" in error.message
    assert digest(path) == before
    assert [file.name for file in path.parent.iterdir()] == ["x.db"]


@pytest.mark.parametrize("version", ["v3.2.0.a", "", "1" * 5000, "-1", "\u0661"])
def test_a_schema_that_is_no_number_is_refused(path: Path, version: str) -> None:
    SqlStore(str(path)).close()
    raw(path, f"UPDATE {VERSION_TABLE} SET version_num = '{version}'")
    assert error_of(lambda: SqlStore(str(path))).code == "E603"


def test_a_newer_schema_is_refused_and_the_file_stays_as_it_is(path: Path) -> None:
    SqlStore(str(path)).close()
    raw(path, f"UPDATE {VERSION_TABLE} SET version_num = '0099'")
    before = digest(path)
    for read_only in (False, True):
        error = error_of(lambda read_only=read_only: SqlStore(str(path), read_only=read_only))  # type: ignore[misc]
        assert isinstance(error, StorageError)
        assert error.code == "E605"
        assert "schema 99" in error.message
        assert f"knows {SCHEMA}" in error.message
        assert "pip install -U mpsearch" in error.advice
    assert digest(path) == before
    assert [file.name for file in path.parent.iterdir()] == ["x.db"]


def test_a_newer_schema_that_is_still_in_the_log_is_seen(path: Path, tmp_path: Path) -> None:
    SqlStore(str(path)).close()
    (tmp_path / "copy").mkdir()
    copy = tmp_path / "copy" / "x.db"
    connection = sqlite3.connect(path, isolation_level=None)
    connection.execute(f"UPDATE {VERSION_TABLE} SET version_num = '0099'")
    for end in ("", "-wal"):
        shutil.copy(f"{path}{end}", f"{copy}{end}")
    connection.close()
    before = digest(copy)
    assert error_of(lambda: SqlStore(str(copy))).code == "E605"
    assert digest(copy) == before


def test_an_old_schema_is_not_touched_by_a_reader(path: Path) -> None:
    path.touch()
    error = error_of(lambda: SqlStore(str(path), read_only=True))
    assert error.code == "E605"
    assert path.read_bytes() == b""


def test_a_reader_cannot_write(path: Path) -> None:
    with SqlStore(str(path)) as store:
        store.put("plan", "k", {"a": 1})
    before = digest(path)
    with SqlStore(str(path), read_only=True) as store:
        assert store.get("plan", "k") == {"a": 1}
        for call in (
            lambda: store.put("plan", "l", {}),
            lambda: store.put_cells("s", [cell()]),
            lambda: store.create_study("a", {}),
        ):
            error = error_of(call)
            assert isinstance(error, ResourceError)
            assert error.code == "E701"
    assert digest(path) == before


def test_a_reader_sees_what_a_writer_adds(path: Path) -> None:
    with SqlStore(str(path)) as writer, SqlStore(str(path), read_only=True) as reader:
        assert reader.studies() == []
        writer.create_study("a", {})
        assert [row.name for row in reader.studies()] == ["a"]


def test_a_closed_store_says_so(path: Path) -> None:
    store = SqlStore(str(path))
    store.close()
    store.close()
    with pytest.raises(ValueError, match="closed"):
        store.get("plan", "k")


def test_a_relative_path_stays_the_same_file(path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(path.parent)
    with SqlStore("x.db") as store:
        (path.parent / "elsewhere").mkdir()
        monkeypatch.chdir(path.parent / "elsewhere")
        store._engine.dispose()
        store.put("plan", "k", {})
    assert raw(path, "SELECT count(*) FROM value") == [(1,)]


def test_a_link_leads_to_one_database(path: Path) -> None:
    link = path.parent / "elsewhere" / "link.db"
    link.parent.mkdir()
    link.symlink_to(path)
    with SqlStore(str(path)) as store, SqlStore(str(link)) as other:
        store.put("plan", "k", {"a": 1})
        assert other.get("plan", "k") == {"a": 1}


def test_a_name_that_no_file_can_have(tmp_path: Path) -> None:
    assert error_of(lambda: SqlStore(str(tmp_path / ("x" * 300)))).code == "E701"


def test_a_pipe_is_refused(path: Path) -> None:
    os.mkfifo(path)
    assert error_of(lambda: SqlStore(str(path))).code == "E603"


@pytest.mark.parametrize("kind", ["nfs", "nfs4", "cifs", "smb3", "fuse.sshfs", "9p"])
def test_a_network_disk_is_refused(path: Path, monkeypatch: pytest.MonkeyPatch, kind: str) -> None:
    monkeypatch.setattr("mpsearch.storage.files.mount_type", lambda path: kind)
    error = error_of(lambda: SqlStore(str(path)))
    assert error.code == "E602"
    assert f"is on {kind}," in error.message
    assert not path.exists()


def test_the_mount_of_a_path_is_found(tmp_path: Path) -> None:
    table = tmp_path / "mountinfo"
    table.write_text(
        "22 1 8:1 / / rw,relatime shared:1 - ext4 /dev/sda1 rw\n"
        "30 22 0:31 / /data rw shared:2 master:1 - nfs4 server:/data rw\n"
        "31 30 0:32 / /data/local rw - xfs /dev/sdb1 rw\n"
        "32 22 0:33 / /my\\040disk rw - cifs //server/disk rw\n"
        "33 22 0:34 / /over rw - nfs server:/x rw\n"
        "34 33 0:35 / /over rw - tmpfs tmpfs rw\n"
        "broken line\n"
    )
    found = {name: mount_type(Path(name), table) for name in ("/x.db", "/data/a/x.db", "/database/x.db", "/over/x")}
    assert found == {"/x.db": "ext4", "/data/a/x.db": "nfs4", "/database/x.db": "ext4", "/over/x": "tmpfs"}
    assert mount_type(Path("/data/local/x.db"), table) == "xfs"
    assert mount_type(Path("/my disk/x.db"), table) == "cifs"
    assert mount_type(tmp_path / "x.db", tmp_path / "missing") == ""
    assert mount_type(tmp_path / "x.db") not in NETWORK


# --- addresses and secrets


@pytest.mark.parametrize("address", ["", "a\0b", "mysql://ann:canary@h/x", "sqlite:///x.db?mode=ro", "://", "http://"])
def test_another_address_is_refused(address: str) -> None:
    error = error_of(lambda: SqlStore(address))
    assert error.code == "E107"
    assert "canary" not in str(error)


@pytest.mark.parametrize(
    "address",
    [
        "postgresql://ann:canary@127.0.0.1:1/x",
        "postgres://ann:canary@127.0.0.1:1/x",
        "postgresql://127.0.0.1:1/x?user=ann&password=canary",
        "postgresql://ann:canary@127.0.0.1:port/x",
    ],
)
def test_a_password_is_never_shown(address: str) -> None:
    with pytest.raises(MpsearchError) as caught:
        SqlStore(address)
    assert caught.value.code in ("E107", "E608", "E703")
    seen: BaseException | None = caught.value
    while seen:
        assert "canary" not in f"{seen} {seen!r}"
        seen = seen.__cause__ or (None if seen.__suppress_context__ else seen.__context__)
    assert "canary" not in hide(address)


def test_a_place_shows_no_password() -> None:
    place = Place.of("postgresql://ann:canary@db.lan:5432/x?sslmode=require")
    assert place.shown == "postgresql://ann:***@db.lan:5432/x"
    assert "canary" not in repr(place)


class ServerError(Exception):
    """What a PostgreSQL driver raises, as far as it matters here."""

    def __init__(self, sqlstate: str) -> None:
        super().__init__("FATAL: password=canary")
        self.sqlstate = sqlstate


@pytest.mark.parametrize(
    ("sqlstate", "code"),
    [
        ("55P03", "E601"),
        ("40P01", "E601"),
        ("53300", "E607"),
        ("28P01", "E608"),
        ("3D000", "E608"),
        ("08006", "E609"),
        ("57P01", "E609"),
        ("53100", "E701"),
        ("XX000", "E600"),
        ("", "E600"),
    ],
)
def test_errors_of_a_server_are_told_apart(sqlstate: str, code: str) -> None:
    place = Place.of("postgresql://ann:canary@db.lan/x")
    with pytest.raises(MpsearchError) as caught, translated(place):
        raise DBAPIError("SELECT 1", {}, ServerError(sqlstate))
    assert caught.value.code == code
    assert "canary" not in str(caught.value)
    assert caught.value.__cause__ is None


def test_names_of_a_foreign_database_are_only_shown(path: Path) -> None:
    with SqlStore(str(path)) as store:
        store.create_study("a", {})
        raw(path, "UPDATE study SET name = 'b' || char(27) || '[31m'")
        error = error_of(lambda: store.study("b"))
    assert error.code == "E141"
    assert "\x1b" not in str(error)
    assert "\\x1b[31m" in str(error)


# --- migrations


def scripts() -> ScriptDirectory:
    return ScriptDirectory(str(Path(migrate.__file__).with_name("migrations")))


def test_the_last_script_makes_the_schema_of_this_version() -> None:
    assert scripts().get_heads() == [f"{SCHEMA:04}"]
    assert [script.revision for script in scripts().walk_revisions()] == [f"{i:04}" for i in range(SCHEMA, 0, -1)]


@pytest.fixture
def engine(path: Path) -> Iterator[Engine]:
    path.touch()
    engine = make_engine(Place.of(str(path)), busy_timeout=1, read_only=False)
    yield engine
    engine.dispose()


def test_up_down_and_up_again(engine: Engine, path: Path) -> None:
    for _ in range(2):
        with engine.begin() as connection:
            migrate.upgrade(connection)
        with engine.begin() as connection:
            options = {"version_table": VERSION_TABLE, "compare_type": True, "compare_server_default": True}
            assert compare_metadata(MigrationContext.configure(connection, opts=options), metadata) == []
            migrate.downgrade(connection, "base")
        tables = raw(path, "SELECT name FROM sqlite_master WHERE type = 'table'")
        assert tables == [(VERSION_TABLE,)]
    with SqlStore(str(path)) as store:
        store.put("plan", "k", {})


def test_the_scripts_and_the_tables_of_the_code_are_the_same_to_the_letter(engine: Engine, path: Path) -> None:
    def shape(path: Path) -> dict[str, list[str]]:
        rows = raw(path, f"SELECT name, sql FROM sqlite_master WHERE sql IS NOT NULL AND name != '{VERSION_TABLE}'")
        # A table that was renamed has its name in quotes.
        texts = ((name, sql.replace(f'"{name}" (', f"{name} (", 1)) for name, sql in rows)
        return {name: sorted(line.strip(" ,\t") for line in sql.splitlines()) for name, sql in texts}

    with engine.begin() as connection:
        migrate.upgrade(connection)
    other = path.with_name("other.db")
    made = create_engine(f"sqlite:///{other}")
    metadata.create_all(made)
    made.dispose()
    assert shape(path) == shape(other)
    assert "WITHOUT ROWID" in str(shape(path)["cell"])


def test_the_database_itself_refuses_what_makes_no_sense(path: Path) -> None:
    SqlStore(str(path)).close()
    columns = "INSERT INTO cell (scope, layer, format, batch, status, value, samples, reason, seconds)"
    for status, value in (("ok", "NULL"), ("failed", "1.0"), ("fine", "NULL")):
        with pytest.raises(sqlite3.IntegrityError):
            raw(path, f"{columns} VALUES ('s', 'l', 'f', -1, '{status}', {value}, 1, '', 0)")


# --- damage and trouble


def test_a_database_locked_by_another_program(path: Path) -> None:
    with SqlStore(str(path)) as store:
        store.put("plan", "k", {"a": 1})
    other = sqlite3.connect(path, isolation_level=None)
    other.execute("BEGIN IMMEDIATE")
    try:
        with SqlStore(str(path), busy_timeout=0.2) as store:
            started = time.monotonic()
            error = error_of(lambda: store.put("plan", "l", {"a": 1}))
            assert time.monotonic() - started < 5
            assert error.code == "E601"
            assert "nothing is lost; wait, or" in error.advice
            if Path("/proc/locks").exists():
                assert f"by pid {os.getpid()} (" in error.message
            assert store.get("plan", "k") == {"a": 1}
            other.execute("ROLLBACK")
            store.put("plan", "l", {"a": 1})
    finally:
        other.close()


def test_changing_to_the_log_waits_for_a_writer(path: Path) -> None:
    SqlStore(str(path)).close()
    raw(path, "PRAGMA journal_mode = DELETE")
    other = sqlite3.connect(path, isolation_level=None, check_same_thread=False)
    other.execute("BEGIN IMMEDIATE")
    timer = threading.Timer(0.3, lambda: other.execute("COMMIT"))
    timer.start()
    try:
        with SqlStore(str(path)) as store:
            store.put("plan", "k", {})
    finally:
        timer.join()
        other.close()
    assert raw(path, "PRAGMA journal_mode") == [("wal",)]


def test_an_empty_database_locked_by_another_program(path: Path) -> None:
    other = sqlite3.connect(path, isolation_level=None)
    other.execute("BEGIN EXCLUSIVE")
    try:
        assert error_of(lambda: SqlStore(str(path), busy_timeout=0.2)).code == "E601"
    finally:
        other.close()
    SqlStore(str(path)).close()


def use(path: Path) -> None:
    """Do everything once."""
    with SqlStore(str(path)) as store:
        store.studies()
        store.study("a")
        store.links("a", "plan")
        store.get_many("plan", [str(i) for i in range(200)])
        store.cells("s")
        store.conflicts()
        store.put("plan", "new", {})
        store.put_cells("s", [cell("new")])
        store.set_state("a", "running")


@pytest.fixture(scope="module")
def full(tmp_path_factory: pytest.TempPathFactory) -> bytes:
    """The bytes of a database with something of everything in it."""
    path = tmp_path_factory.mktemp("full") / "x.db"
    with SqlStore(str(path)) as store:
        store.create_study("a", {"seed": 0})
        store.put("plan", "long", {"x": list(range(5000))})
        with store.writing() as connection:
            rows = [("plan", str(i), '{"i":"' + "x" * 50 + '"}', None, "") for i in range(200)]
            connection.exec_driver_sql("INSERT INTO value VALUES (?, ?, ?, ?, ?)", rows)
        store.put_cells("s", [cell(f"layer {i}") for i in range(500)])
        store.link("a", "plan", "1")
    use(path)
    return path.read_bytes()


@pytest.mark.parametrize("seed", range(40))
def test_damage_gives_an_error_of_ours_or_none(full: bytes, path: Path, seed: int) -> None:
    source = random.Random(seed)
    content = bytearray(full)
    if seed % 4 == 0:
        del content[source.randrange(len(content)) :]
    elif seed % 4 == 1:
        start = source.randrange(16, len(content))
        content[start : start + 4096] = source.randbytes(len(content[start : start + 4096]))
    else:
        for _ in range(seed):
            content[source.randrange(16, len(content))] = source.randrange(256)
    path.write_bytes(content)
    try:
        use(path)
    except MpsearchError as error:
        assert error.code in ("E603", "E605", "E141", "E521", "E701", "E600"), error  # noqa: PT017


def test_a_damaged_page_is_reported(full: bytes, path: Path) -> None:
    content = bytearray(full)
    content[8192:] = bytes(len(content) - 8192)
    path.write_bytes(content)
    error = error_of(lambda: use(path))
    assert isinstance(error, StorageError)
    assert error.code == "E603"
    assert "damaged" in error.message
    assert "malformed" in error.because


@pytest.mark.parametrize("body", ["[1]", "{", "x'ff'", "NULL", '{"a":' * 100_000])
def test_a_value_that_another_program_wrote_is_reported(path: Path, body: str) -> None:
    SqlStore(str(path)).close()
    text = body if body in ("x'ff'",) else f"'{body}'"
    raw(path, f"INSERT INTO value VALUES ('plan', 'k', {text}, NULL, '')")
    with SqlStore(str(path)) as store:
        assert error_of(lambda: store.get("plan", "k")).code == "E603"
        assert error_of(lambda: store.put("plan", "k", {})).code == "E603"


@pytest.mark.parametrize("column", ["value", "spread", "samples", "seconds", "batch"])
def test_a_cell_that_another_program_wrote_is_reported(path: Path, column: str) -> None:
    with SqlStore(str(path)) as store:
        store.put_cells("s", [cell()])
        raw(path, f"UPDATE cell SET {column} = '<script>'")
        assert error_of(lambda: store.cells("s")).code == "E603"


def test_text_that_is_not_text_is_reported(path: Path) -> None:
    with SqlStore(str(path)) as store:
        store.put_cells("s", [cell()])
        raw(path, "UPDATE cell SET reason = CAST(x'ff' AS TEXT)")
        assert error_of(lambda: store.cells("s")).code == "E603"


def test_a_missing_table_is_reported(path: Path) -> None:
    SqlStore(str(path)).close()
    raw(path, "DROP TABLE cell")
    with SqlStore(str(path)) as store:
        error = error_of(lambda: store.cells("s"))
    assert error.code == "E603"
    assert "no such table: cell" in error.because


def test_a_full_disk_is_reported_and_what_was_stored_is_safe(path: Path) -> None:
    with SqlStore(str(path)) as store:
        store.put("plan", "k", {"a": 1})
        with store._engine.connect() as connection:
            connection.exec_driver_sql("PRAGMA max_page_count = 40")
        error = error_of(lambda: store.put("plan", "l", {"x": "y" * 500_000}))
        assert isinstance(error, ResourceError)
        assert error.code == "E701"
        assert "no space" in error.message
        assert "MB free" in error.message
        assert store.get("plan", "k") == {"a": 1}
        store.put("plan", "m", {})


def test_a_write_that_the_system_refuses_is_reported(path: Path) -> None:
    with SqlStore(str(path)) as store:
        store.put("plan", "k", {"a": 1})
        limits = resource.getrlimit(resource.RLIMIT_FSIZE)
        resource.setrlimit(resource.RLIMIT_FSIZE, (300_000, limits[1]))
        try:
            error = error_of(lambda: store.put("plan", "l", {"x": "y" * 1_000_000}))
        finally:
            resource.setrlimit(resource.RLIMIT_FSIZE, limits)
        assert error.code == "E701"
        assert store.get("plan", "l") is None
        store.put("plan", "l", {"x": "y" * 1_000_000})
    assert raw(path, "PRAGMA integrity_check") == [("ok",)]


# --- cost


def statements(store: SqlStore, call: Callable[[], object]) -> list[str]:
    """Return the SQL that a call sends."""
    seen: list[str] = []

    def listen(connection: object, cursor: object, statement: str, *_: object) -> None:
        seen.append(statement)

    event.listen(store._engine, "before_cursor_execute", listen)
    call()
    event.remove(store._engine, "before_cursor_execute", listen)
    return seen


def test_the_number_of_statements_does_not_grow(path: Path) -> None:
    with SqlStore(str(path)) as store:
        store.create_study("a", {})
        calls: list[Callable[[], object]] = [
            lambda: store.put("plan", "k", {}),
            lambda: store.get_many("plan", [str(i) for i in range(5000)]),
            lambda: store.put_cells("s", [cell(batch=i) for i in range(5000)]),
            lambda: store.cells("s"),
            lambda: store.create_study("b", {}),
            lambda: store.studies(),
            lambda: store.link("a", "plan", "k"),
            lambda: store.links("a", "plan"),
        ]
        assert [len(statements(store, call)) for call in calls] == [2, 2, 4, 2, 3, 2, 3, 3]
        # A second look, at what is there already.
        assert [len(statements(store, call)) for call in calls] == [3, 2, 4, 2, 3, 2, 3, 3]


def test_no_query_reads_a_whole_table(path: Path) -> None:
    with SqlStore(str(path)) as store:
        store.create_study("a", {})

        def work() -> None:
            for _ in range(2):
                store.put("plan", "k", {})
                store.put_cells("s", [cell()])
            store.get_many("plan", ["k", "l"])
            store.cells("s")
            store.study("a")
            store.links("a", "plan")

        plans = []
        for statement in statements(store, work):
            if statement.startswith("SELECT"):
                filled = statement.replace("json_each(?)", "json_each('[]')").replace("?", "'1'")
                plans += [row[3] for row in raw(path, f"EXPLAIN QUERY PLAN {filled}")]
    assert [plan for plan in plans if plan.startswith("SCAN") and not plan.startswith("SCAN wanted")] == []
    assert sum("scope=? AND layer=? AND format=? AND batch=?" in plan for plan in plans) == 1


# --- any value

NAMES = st.text(st.characters(exclude_categories=["C", "Z"]), min_size=1, max_size=20)
FINITE = st.floats(allow_nan=False, allow_infinity=False).map(lambda x: x + 0.0)
JSON = st.recursive(
    st.none() | st.booleans() | st.integers() | st.floats(allow_nan=False, allow_infinity=False) | st.text(max_size=9),
    lambda inner: st.lists(inner, max_size=4) | st.dictionaries(st.text(max_size=5), inner, max_size=4),
    max_leaves=20,
)
QUICK = settings(max_examples=100, deadline=None)


@pytest.fixture(scope="module")
def memory() -> Iterator[SqlStore]:
    with SqlStore(":memory:") as store:
        yield store


@QUICK
@given(body=st.dictionaries(st.text(max_size=5), JSON, max_size=5))
def test_any_json_comes_back(memory: SqlStore, body: dict[str, Any]) -> None:
    key = content_key(body)
    memory.put("plan", key, body)
    memory.put("plan", key, body)
    assert memory.get("plan", key) == body


@QUICK
@given(rows=st.dictionaries(st.tuples(NAMES, NAMES, st.integers(-1, 2**63 - 1)), st.tuples(FINITE, FINITE), max_size=9))
def test_any_cells_come_back(memory: SqlStore, rows: dict[tuple[str, str, int], tuple[float, float]]) -> None:
    cells = [CellRow(*key, "ok", value, spread, 1) for key, (value, spread) in sorted(rows.items())]
    scope = content_key([list(key) + list(value) for key, value in sorted(rows.items())])
    for _ in range(2):
        memory.put_cells(scope, cells)
    assert memory.cells(scope) == cells


def main() -> None:
    """Run a function of this file: ``test_storage.py NAME ARGUMENTS``."""
    globals()[sys.argv[1]](*sys.argv[2:])


if __name__ == "__main__":
    main()
