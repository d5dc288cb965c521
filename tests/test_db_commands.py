"""A database that is brought up to date, checked, rescued, tidied and counted."""

from __future__ import annotations

import json
import random
import shutil
import sqlite3
import time
from collections.abc import Callable
from contextlib import closing
from pathlib import Path
from typing import Any

import pytest
import typer

import mpsearch as mp
from mpsearch import registry
from mpsearch.bundles.kinds import key_of
from mpsearch.cli.main import app, run
from mpsearch.cli.options import storage_option
from mpsearch.records import CellRow, TaskRow, WorkerRow
from mpsearch.storage import gc as gc_module
from mpsearch.storage.rescue import rescue
from mpsearch.storage.schema import metadata
from tests.conftest import DATA

NAME = "frozen"


def opened(url: Path | str) -> Any:
    return registry.make("stores", "sql", url=str(url))


@pytest.fixture
def old(tmp_path: Path) -> Path:
    """A finished study in a database of the first schema."""
    return Path(shutil.copy(DATA / "schema-1.db", tmp_path / "results.db"))


@pytest.fixture
def results(old: Path) -> Path:
    opened(old).close()
    return old


def out(capsys: pytest.CaptureFixture[str], *arguments: str) -> str:
    assert run(arguments) == 0, capsys.readouterr().err
    return capsys.readouterr().out


def change(path: Path, *statements: str) -> None:
    with closing(sqlite3.connect(path)) as file:
        for statement in statements:
            file.execute(statement)
        file.commit()


def answers(capsys: pytest.CaptureFixture[str], path: Path, tmp_path: Path) -> list[str]:
    """What a study gives: shown, solved anew, exported."""
    told = [
        out(capsys, *command, "--storage", str(path))
        for command in (
            ("show", NAME, "--json"),
            ("solve", NAME, "--json"),
            ("solve", NAME, "--budget", "weights <= 3.7 bits", "--json"),
            ("export", NAME, "--no-weights", "--force", "--out", str(tmp_path / "exported")),
        )
    ]
    files = sorted(path for path in (tmp_path / "exported").rglob("*") if path.is_file())
    return [*told, *(path.read_text() for path in files)]


def test_upgrade_copies_the_file_first(old: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    before = old.read_bytes()
    told = json.loads(out(capsys, "db", "upgrade", str(old), "--json"))
    assert (told["before"], told["now"]) == (1, 2)
    copy = Path(told["copy"])
    assert copy.stat().st_mode & 0o777 == 0o600
    with closing(sqlite3.connect(copy)) as file, closing(sqlite3.connect(DATA / "schema-1.db")) as kept:
        assert list(file.iterdump()) == list(kept.iterdump())
    assert before
    assert "already" in out(capsys, "db", "upgrade", str(old))
    assert answers(capsys, old, tmp_path)
    # The copy is a database like any other.
    out(capsys, "db", "upgrade", str(copy))
    assert out(capsys, "show", NAME, "--json", "--storage", str(copy)) == out(
        capsys, "show", NAME, "--json", "--storage", str(old)
    )


def test_upgrade_refuses_a_later_schema(results: Path, capsys: pytest.CaptureFixture[str]) -> None:
    change(results, "UPDATE mpsearch_schema SET version_num = '0099'")
    before = results.read_bytes()
    assert run(["db", "upgrade", str(results)]) == 6
    assert "E605" in capsys.readouterr().err
    assert results.read_bytes() == before
    assert run(["db", "upgrade", str(results.with_name("none.db"))]) == 3
    assert "E101" in capsys.readouterr().err


FAULTS: dict[str, tuple[str, str]] = {
    "json": ("UPDATE value SET body = '{' WHERE kind = 'survey'", "json"),
    "not written by us": ("UPDATE value SET body = body || ' ' WHERE kind = 'survey'", "json"),
    "a plan that was changed": (
        "UPDATE value SET body = replace(body, 'int4-g64', 'int3-g64') WHERE kind = 'plan'",
        "key",
    ),
    "a question that was changed": ("UPDATE study SET spec = replace(spec, '512', '513')", "key"),
    "a link to nothing": ("DELETE FROM value WHERE kind = 'measurement'", "links"),
    "a link of nobody": ("INSERT INTO link VALUES (99, 'plan', 'x', '', 0)", "structure"),
    "a scope with the number of another one": ("UPDATE scope SET key = 'x'", "key"),
    "a cell with a wrong type": ("UPDATE cell SET samples = 'x'", "cell"),
    "a task of nobody": (
        "INSERT INTO task VALUES ('k', 99, 's', 'score', '{}', 0, 'ready', 0, NULL, '', 0, 0, '', 0.0, 0.0)",
        "tasks",
    ),
}


@pytest.mark.parametrize("what", FAULTS)
def test_check_finds_each_fault(what: str, results: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert "fine" in out(capsys, "db", "check", str(results))
    statement, kind = FAULTS[what]
    change(results, "PRAGMA foreign_keys=OFF", statement)
    assert run(["db", "check", str(results), "--json"]) == 6
    told = capsys.readouterr()
    assert kind in {fault["what"] for fault in json.loads(told.out)["faults"]}
    assert "E604" in told.err
    # What it advises works, and gives a database without faults.
    target = results.with_name("rescued.db")
    assert f"mpsearch db rescue {results} rescued.db" in told.err
    out(capsys, "db", "rescue", str(results), str(target))
    out(capsys, "db", "check", str(target))


def test_check_counts_conflicts_which_are_no_fault(results: Path, capsys: pytest.CaptureFixture[str]) -> None:
    with opened(results) as store:
        store.put("x", "k", {"a": 1})
        with pytest.raises(mp.StorageError):
            store.put("x", "k", {"a": 2})
    assert json.loads(out(capsys, "db", "check", str(results), "--json")) == {"faults": [], "conflicts": 1}


def test_gc_takes_only_what_no_study_needs(results: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    before = answers(capsys, results, tmp_path)
    with opened(results) as store:
        store.put("measurement", "m" * 64, {"loss": 1.0})
        store.put("score_unit", "f" * 64, {"unit": "nats"})
        store.put_cells("f" * 64, [CellRow("a", "int4-g64", -1, "ok", 1.0, None, 1)])
        store.put("kernel_time", "k" * 64, {"kernel": "a"})
        store.control.hello(WorkerRow("gone", "host", 1))
    change(results, "UPDATE worker SET seen = 1")
    told = json.loads(out(capsys, "db", "gc", str(results), "--json", "--dry-run", "--days", "0"))
    assert told["values"] == {"measurement": 1, "plan": 1, "score_unit": 1}
    assert (told["cells"], told["workers"]) == (1, 1)
    assert out(capsys, "db", "gc", str(results), "--dry-run", "--days", "1").endswith("would go\n")
    size = results.stat().st_size
    gone = json.loads(out(capsys, "db", "gc", str(results), "--json", "--days", "0", "--shrink"))
    assert gone == {**told, "dry_run": False}
    assert results.stat().st_size <= size
    again = json.loads(out(capsys, "db", "gc", str(results), "--json", "--days", "0"))
    assert (again["values"], again["cells"], again["workers"]) == ({}, 0, 0)
    with opened(results) as store:
        assert store.get("kernel_time", "k" * 64) is not None
    out(capsys, "db", "check", str(results))
    assert answers(capsys, results, tmp_path) == before


def test_gc_keeps_all_for_a_study_that_is_not_finished(results: Path, capsys: pytest.CaptureFixture[str]) -> None:
    with opened(results) as store:
        store.put("measurement", "m" * 64, {"loss": 1.0})
        store.create_study("open", {"name": "open"})
        store.control.submit("open", "here")
        store.control.drive("open", "me:1:1:1", 60)
        store.queue.offer("open", [TaskRow("t" * 64, "s", "score", {})])
        lease = store.queue.claim("w", lease=60)
        store.queue.finish(lease, values=(), cells=())
        store.control.log("open", "state", "a line")
    change(results, f"UPDATE event SET time = {time.time() - 40 * 86400}")
    told = json.loads(out(capsys, "db", "gc", str(results), "--json", "--days", "0"))
    assert (told["kept_for"], told["values"], told["cells"], told["tasks"]) == (["open"], {}, 0, 0)
    assert told["events"] >= 1
    change(results, "UPDATE study SET state = 'cancelled' WHERE name = 'open'")
    told = json.loads(out(capsys, "db", "gc", str(results), "--json", "--days", "0"))
    assert (told["kept_for"], told["tasks"], told["values"]["measurement"]) == ([], 1, 1)
    assert run(["db", "gc", str(results), "--days", "nan"]) == 2
    assert "E113" in capsys.readouterr().err


@pytest.mark.parametrize("place", ["file", "server"])
def test_gc_takes_tasks_of_finished_studies_that_nobody_is_at(
    place: str, tmp_path: Path, request: pytest.FixtureRequest
) -> None:
    url = str(tmp_path / "a.db") if place == "file" else request.getfixturevalue("database")
    with opened(url) as store:
        for name in ("ended", "paused"):
            store.create_study(name, {"name": name})
            store.control.drive(name, "me:1:1:1", 60)
        store.queue.offer("ended", [TaskRow(f"{i:064}", "s", "score", {}, i) for i in range(1200)])
        for number in range(4):
            lease = store.queue.claim("w", lease=60)
            if number == 0:
                store.queue.finish(lease)
            elif number == 1:
                store.queue.fail(lease, "E999", "no", {})
            elif number == 2:
                store.queue.release(lease)
        store.queue.offer("paused", [TaskRow("t" * 64, "s", "score", {})])
        store.control.leave("ended", "me:1:1:1", 1, "cancelled")
        store.control.leave("paused", "me:1:1:1", 1, "paused")
        gc = registry.load("upkeep", "gc")
        assert gc(store, dry_run=True).tasks == 1199
        assert gc(store, dry_run=False).tasks == 1199
        assert gc(store, dry_run=False).tasks == 0
        assert sum(store.queue.counts("ended").values()) == store.queue.counts("ended")["leased"] == 1
        assert store.queue.counts("paused")["ready"] == 1


@pytest.mark.parametrize("place", ["file", "server"])
def test_gc_stops_where_a_study_begins_meanwhile(
    place: str, tmp_path: Path, request: pytest.FixtureRequest, monkeypatch: pytest.MonkeyPatch
) -> None:
    url = str(tmp_path / "a.db") if place == "file" else request.getfixturevalue("database")
    monkeypatch.setattr(gc_module, "_CHUNK", 2)
    with opened(url) as store, opened(url) as other:
        for number in range(6):
            store.put("measurement", f"{number:064}", {"loss": 1.0})
        take = gc_module._take_values
        calls: list[int] = []

        def begin(*args: Any) -> int:
            if calls:
                other.create_study("new", {"name": "new"})
                other.link("new", "measurement", f"{5:064}")
            calls.append(take(*args))
            return calls[-1]

        monkeypatch.setattr(gc_module, "_take_values", begin)
        assert dict(gc_module.collect(store, dry_run=False, days=0).values) == {"measurement": 2}
        assert calls == [2, 0, 0]
        assert store.get("measurement", f"{5:064}") is not None


def test_days_may_be_many(results: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert json.loads(out(capsys, "db", "gc", str(results), "--json", "--days", "1e300"))["values"] == {}


def test_commands_to_copy_are_quoted_and_hold_no_password(
    results: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    spaced = tmp_path / "a b.db"
    told = out(capsys, "db", "rescue", str(results), str(spaced))
    assert f"--storage '{spaced}'" in told
    assert f"unbundle '{tmp_path / 'c d.mps'}'" in out(
        capsys, "bundle", NAME, str(tmp_path / "c d.mps"), "--storage", str(results)
    )
    address = "postgresql://ann:s3cret@db.lan/mp"
    assert storage_option(address) == " --storage postgresql://ann@db.lan/mp"
    monkeypatch.setenv("MPSEARCH_STORAGE", address)
    assert storage_option(address) == ""
    assert storage_option("sqlite:///mpsearch.db") == " --storage sqlite:///mpsearch.db"


def test_every_command_takes_its_database_from_the_variable(
    results: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("MPSEARCH_STORAGE", str(results))
    assert json.loads(out(capsys, "show", "--json"))[0]["name"] == NAME
    assert json.loads(out(capsys, "db", "stats", "--json"))["studies"] == {"complete": 1}
    assert "fine" in out(capsys, "db", "check")

    def without(command: Any) -> list[str]:
        inner = [name for below in getattr(command, "commands", {}).values() for name in without(below)]
        places = [x for x in command.params if x.name in ("storage", "into")]
        return inner + [command.name for x in places if x.envvar != "MPSEARCH_STORAGE"]

    assert without(typer.main.get_command(app)) == []


def test_stats_count(results: Path, capsys: pytest.CaptureFixture[str]) -> None:
    told = json.loads(out(capsys, "db", "stats", str(results), "--json"))
    assert set(told["rows"]) == {table.name for table in metadata.sorted_tables}
    assert told["studies"] == {"complete": 1}
    assert told["bytes"] >= results.stat().st_size
    assert told["kinds"][0]["kind"] == "plan"
    assert told["oldest"] <= told["newest"]
    assert "study" in out(capsys, "db", "stats", str(results))


def test_rescue_of_a_whole_file_is_a_copy(results: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    before = answers(capsys, results, tmp_path)
    told = json.loads(out(capsys, "db", "rescue", str(results), str(tmp_path / "new.db"), "--json"))
    assert told["whole"]
    assert told["lost"] == []
    assert answers(capsys, tmp_path / "new.db", tmp_path) == before
    assert run(["db", "rescue", str(results), str(tmp_path / "new.db")]) == 3
    assert "E303" in capsys.readouterr().err


def test_rescue_reads_the_log_as_well(results: Path, tmp_path: Path) -> None:
    store = opened(results)
    store.put("x", "in the log", {"a": 1})
    copy = tmp_path / "copy.db"
    for end in ("", "-wal"):
        shutil.copy(f"{results}{end}", f"{copy}{end}")
    store.close()
    data = bytearray(copy.read_bytes())
    # The first page is gone, and with it the names of the tables; the log is only found by its own numbers.
    data[:4096] = bytes(4096)
    copy.write_bytes(data)
    found = rescue(copy, tmp_path / "new.db", key_of)
    assert not found.whole
    with opened(tmp_path / "new.db") as store:
        assert store.get("x", "in the log") == {"a": 1}
        assert len(store.links(NAME, "measurement")) == 6


@pytest.mark.parametrize("which", ["schema 1", "schema 2"])
def test_without_its_trees_a_file_still_gives_every_row(
    which: str, old: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    with closing(sqlite3.connect(old)) as file:
        counts = {
            table: file.execute(f"SELECT count(*) FROM {table}").fetchone()[0]
            for table in ("study", "link", "value", "cell")
        }
    if which == "schema 2":
        opened(old).close()
    data = bytearray(old.read_bytes())
    data[:100] = bytes(100)
    old.write_bytes(data)
    told = json.loads(out(capsys, "db", "rescue", str(old), str(tmp_path / "new.db"), "--json"))
    assert {table: told["rows"][table] for table in counts} == counts
    assert told["lost"] == []
    answers(capsys, tmp_path / "new.db", tmp_path)
    out(capsys, "db", "check", str(tmp_path / "new.db"))


def _cut(data: bytes, draw: random.Random) -> bytes:
    return data[: draw.randrange(len(data))]


def _overwritten(data: bytes, draw: random.Random) -> bytes:
    pages = bytearray(data)
    for _ in range(draw.randint(1, 8)):
        start = draw.randrange(len(data) // 4096) * 4096
        pages[start : start + 4096] = draw.choice([bytes(4096), draw.randbytes(4096), b"\xff" * 4096])
    return bytes(pages)


def _flipped(data: bytes, draw: random.Random) -> bytes:
    content = bytearray(data)
    for _ in range(draw.randint(1, 200)):
        content[draw.randrange(len(content))] = draw.randrange(256)
    return bytes(content)


def _mixed(data: bytes, draw: random.Random) -> bytes:
    pages = [data[i : i + 4096] for i in range(0, len(data), 4096)]
    draw.shuffle(pages)
    return b"".join(pages)


@pytest.mark.parametrize("harm", [_cut, _overwritten, _flipped, _mixed])
def test_rescue_of_a_damaged_file_gives_a_database_or_a_plain_error(
    harm: Callable[[bytes, random.Random], bytes], results: Path, tmp_path: Path
) -> None:
    whole, draw, rescued = results.read_bytes(), random.Random(3), 0
    with opened(results) as store:
        known = {key for kind in ("plan", "measurement") for key in (row.key for row in store.links(NAME, kind))}
    for i in range(12):
        damaged, new = tmp_path / f"damaged-{i}.db", tmp_path / f"new-{i}.db"
        damaged.write_bytes(harm(whole, draw))
        before = damaged.read_bytes()
        code = _rescue(damaged, new)
        assert damaged.read_bytes() == before
        assert (code is None) == new.exists()
        if code is not None:
            assert code == "E603"
            continue
        rescued += 1
        with opened(new) as store:
            for row in store.studies():
                for link in (*store.links(row.name, "plan"), *store.links(row.name, "measurement")):
                    assert link.key in known
                    assert store.get_many("plan", [link.key]) or store.get_many("measurement", [link.key])
            faults, _ = registry.load("upkeep", "check")(store, key_of)
            assert faults == []
    assert rescued >= 6


def _rescue(damaged: Path, new: Path) -> str | None:
    try:
        rescue(damaged, new, key_of)
    except mp.MpsearchError as error:
        return error.code
    return None


def test_rescue_names_the_studies_that_are_lost(
    results: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    with opened(results) as store:
        store.create_study("other", {"name": "other"})
        cells = {scope: store.cells(scope) for scope in scopes(results)}
    change(results, f"UPDATE study SET spec = '{{' WHERE name = '{NAME}'")
    told = json.loads(out(capsys, "db", "rescue", str(results), str(tmp_path / "new.db"), "--json"))
    (line,) = [line for line in told["lost"] if line.startswith("study")]
    assert line.startswith(f"study '{NAME}', and 17 rows of 'link'")
    assert "run its study file" in line
    # Neither has the row of a study a name that can be read, nor are the rows of scopes there.
    change(results, "DELETE FROM study WHERE name != 'other'", "DELETE FROM scope")
    told = json.loads(out(capsys, "db", "rescue", str(results), str(tmp_path / "newer.db"), "--json"))
    assert "study number 1, with its name" in str(told["lost"])
    with opened(tmp_path / "newer.db") as store:
        assert [study.name for study in store.studies()] == ["other"]
        # What the old study had computed is there, under the scopes it was.
        assert {scope: store.cells(scope) for scope in cells} == cells
    change(results, "DELETE FROM study", "DELETE FROM link", "COMMIT", "VACUUM")
    data = bytearray(results.read_bytes())
    data[:100] = bytes(100)
    results.write_bytes(data)
    told = json.loads(out(capsys, "db", "rescue", str(results), str(tmp_path / "newest.db"), "--json"))
    assert [line.partition(";")[0] for line in told["lost"] if "study" in line] == ["every study"]


def scopes(path: Path) -> list[str]:
    with closing(sqlite3.connect(path)) as file:
        return [key for (key,) in file.execute("SELECT key FROM scope")]


def test_rescue_of_cells_whose_scope_nobody_knows(results: Path, tmp_path: Path) -> None:
    with opened(results) as store:
        store.put_cells("nobody", [CellRow("a", "int4-g64", -1, "ok", 1.0, None, 1)])
    change(results, "PRAGMA foreign_keys=OFF", "DELETE FROM scope WHERE key = 'nobody'")
    found = rescue(results, tmp_path / "new.db", key_of)
    assert "1 rows of 'cell' whose scope is lost" in found.lost
    with opened(tmp_path / "new.db") as store:
        assert registry.load("upkeep", "check")(store, key_of) == ([], 0)


@pytest.mark.parametrize("file", ["postgresql://ann:canary@db.lan/mp", "sqlite:///results.db"])
def test_rescue_takes_paths(file: str, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    for arguments in ([file, str(tmp_path / "new.db")], [__file__, file]):
        assert run(["db", "rescue", *arguments]) == 3
        told = capsys.readouterr().err
        assert f"{file.partition(':')[0]}:// is" in told
        assert "E101" in told
        assert "canary" not in told


def test_rescue_refuses_what_is_no_file(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    (tmp_path / "text.db").write_text("nothing of ours" * 1000)
    for name, code, number in (("none.db", "E101", 3), (".", "E603", 6), ("text.db", "E603", 6)):
        assert run(["db", "rescue", str(tmp_path / name), str(tmp_path / "new.db")]) == number
        assert code in capsys.readouterr().err
        assert not (tmp_path / "new.db").exists()
