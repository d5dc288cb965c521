"""Writers and readers that meet who takes out what they need, and numbers of scopes at their edges."""

from __future__ import annotations

import json
import sqlite3
from collections.abc import Callable, Iterator
from contextlib import closing, contextmanager
from pathlib import Path
from typing import Any

import pytest
from sqlalchemy import event, text

from mpsearch.bundles.portion import Asked, Portion
from mpsearch.bundles.sharing import unbundle
from mpsearch.cli.main import run
from mpsearch.errors import MpsearchError
from mpsearch.records import CellRow
from mpsearch.storage import cells
from mpsearch.storage.checks import cell_values
from mpsearch.storage.copying import Copying
from mpsearch.storage.store import SqlStore
from tests.test_bundles import NAME, packed, results

__all__ = ["packed", "results"]

CELL = CellRow("l", "int4-g64", -1, "ok", 0.5, 0.1, 1)
#: Two scopes whose keys have the same first 40 bits of their digests.
TWINS = ("s2217717", "s3334116")


@contextmanager
def taken_out(store: SqlStore, other: SqlStore, table: str, when: Callable[[str, Any], bool]) -> Iterator[list[str]]:
    """Have another connection empty a table just before the first statement that fits."""
    done: list[str] = []

    def take(connection: Any, cursor: Any, statement: str, parameters: Any, *more: Any) -> None:
        if not done and when(statement, parameters):
            done.append(statement)
            with other.writing() as writer:
                writer.execute(text(f"DELETE FROM {table}"))

    event.listen(store._engine, "before_cursor_execute", take)
    try:
        yield done
    finally:
        event.remove(store._engine, "before_cursor_execute", take)


def test_a_plan_is_read_with_its_parts_as_of_one_moment(database: str, packed: Path) -> None:
    unbundle(packed, database)
    with SqlStore(database) as store, SqlStore(database) as other:
        keys = [link.key for link in store.links(NAME, "plan")]
        plans = store.get_many("plan", keys)
        with taken_out(store, other, "value", lambda statement, given: "plan_part" in str(given)) as done:
            assert store.get_many("plan", keys) == plans
        assert done
        assert plans
        assert store.get_many("plan", keys) == {}


def test_a_plan_that_goes_while_it_is_offered_again_is_stored(database: str, packed: Path) -> None:
    unbundle(packed, database)
    with SqlStore(database) as store, SqlStore(database) as other:
        (key, *_) = [link.key for link in store.links(NAME, "plan")]
        body = store.get("plan", key) or {}
        # It is stored in parts and offered whole, so its parts are read to compare the two.
        with taken_out(store, other, "value", lambda statement, given: "plan_part" in str(given)) as done:
            store.put("plan", key, body, {"seconds": 1.0})
        assert done
        assert store.get("plan", key) == body | {"seconds": 1.0}


@pytest.mark.parametrize("table", ["value", "cell"])
def test_what_goes_between_two_statements_is_stored_anew(database: str, table: str) -> None:
    with SqlStore(database) as store, SqlStore(database) as other:

        def put() -> None:
            store.put("x", "k", {"a": 1})
            store.put_cells("s", [CELL])

        put()
        with taken_out(store, other, table, lambda statement, _: f"JOIN {table} " in statement) as done:
            put()
        assert done
        assert store.get("x", "k") == {"a": 1}
        assert store.cells("s") == [CELL]


def test_a_copy_whose_scope_is_taken_out_meanwhile_is_made_anew(database: str) -> None:
    with SqlStore(database) as store, SqlStore(database) as other:
        with other.writing() as writer:
            writer.execute(text(f"INSERT INTO scope VALUES ({cells.number('s', 0)}, 's')"))
        portion = Portion([Asked("copied", {"x": 1}, "complete")], [], [], iter([("s", CELL)]), iter([]))
        with taken_out(store, other, "scope", lambda statement, _: statement.startswith("INSERT INTO cell")) as done:
            copied = Copying(store).write(portion)
        assert done
        assert (copied.studies, copied.cells) == (("copied",), 1)
        assert store.cells("s") == [CELL]


def test_scopes_of_one_mark_are_stored_in_one_call() -> None:
    assert cells.mark(TWINS[0]) == cells.mark(TWINS[1])
    with SqlStore(":memory:") as store:
        store._put_cells([cell_values(scope, CELL) for scope in TWINS])
        assert [store.cells(scope) for scope in TWINS] == [[CELL], [CELL]]


def test_more_scopes_than_a_statement_has_variables() -> None:
    scopes = [f"scope {i}" for i in range(5000)]
    with SqlStore(":memory:") as store:
        with store.writing() as connection:
            driver: Any = connection.connection.driver_connection
            driver.setlimit(sqlite3.SQLITE_LIMIT_VARIABLE_NUMBER, 3000)
        store._put_cells([cell_values(scope, CELL) for scope in scopes])
        with store.reading() as connection:
            found, last = cells._known(connection, scopes)
            assert len(found) == len(scopes)
            assert last == max(found.values())


def test_a_number_after_which_there_is_none_is_damage(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    path = tmp_path / "x.db"
    with SqlStore(str(path)) as store:
        store.put_cells("s", [CELL])
        with store.writing() as connection:
            connection.execute(text(f"INSERT INTO scope VALUES ({2**63 - 1}, 'last')"))
        with pytest.raises(MpsearchError, match="damaged") as caught:
            store.put_cells("new", [CELL])
        assert caught.value.code == "E603"
        assert str(2**63 - 1) in caught.value.because
        assert store.cells("s") == [CELL]
    assert run(["db", "check", str(path), "--json"]) == 6
    (fault,) = json.loads(capsys.readouterr().out)["faults"]
    assert (fault["what"], fault["where"]) == ("key", "scope last")


@pytest.mark.parametrize("call", [["db", "upgrade"], ["db", "check"], ["show", "--storage"]])
def test_a_schema_that_was_never_released_is_not_called_damaged(
    call: list[str], tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    path = tmp_path / "x.db"
    SqlStore(str(path)).close()
    with closing(sqlite3.connect(path)) as file:
        file.execute("DROP TABLE scope")
    assert run([*call, str(path)]) == 6
    told = capsys.readouterr().err
    assert "E605" in told
    assert "never released" in told
