"""Studies in one file: whole or refused, the same bytes for the same study, and never run or believed."""

from __future__ import annotations

import hashlib
import io
import json
import random
import shutil
import sqlite3
import struct
import tracemalloc
import zipfile
from collections.abc import Callable, Mapping
from contextlib import closing
from pathlib import Path
from typing import Any

import pytest

import mpsearch as mp
from mpsearch import registry
from mpsearch.bundles import archive, sharing
from mpsearch.bundles.sharing import bundle, merge, unbundle
from mpsearch.cli.main import run
from mpsearch.keys import canonical_json, content_key
from mpsearch.records import CellRow
from mpsearch.storage.compact import PART
from mpsearch.storage.values import whole
from tests.conftest import DATA

NAME = "frozen"


def opened(url: Path | str) -> Any:
    return registry.make("stores", "sql", url=str(url))


@pytest.fixture
def results(tmp_path: Path) -> Path:
    """A finished study whose model folder is not on this machine."""
    path = tmp_path / "results.db"
    shutil.copy(DATA / "schema-1.db", path)
    opened(path).close()
    with closing(sqlite3.connect(path)) as file:
        (text,) = file.execute("SELECT spec FROM study").fetchone()
        spec = {**json.loads(text), "model": str(tmp_path / "gone" / "small-llama")}
        file.execute("UPDATE study SET spec = ?, key = ?", (canonical_json(spec), content_key(spec)))
        file.commit()
    return path


@pytest.fixture
def packed(results: Path, tmp_path: Path) -> Path:
    return bundle(NAME, tmp_path / "study.mps", str(results))


def rows(path: Path) -> dict[str, list[tuple[Any, ...]]]:
    """What a database holds of studies, conflicts and times of putting aside."""
    asked = {
        "study": "SELECT name, spec, key, state FROM study",
        "link": "SELECT name, kind, link.key, label, position FROM link JOIN study ON study.id = link.study",
        "value": "SELECT kind, key, body, volatile FROM value",
        "cell": "SELECT key, layer, format, batch, status, value, spread, samples FROM cell JOIN scope ON id = scope",
    }
    with closing(sqlite3.connect(path)) as file:
        found = {table: sorted(file.execute(text).fetchall(), key=repr) for table, text in asked.items()}
    parts = {key: body for kind, key, body, _ in found["value"] if kind == PART}
    kept = [(kind, key, whole(body, parts), more) for kind, key, body, more in found["value"] if kind != PART]
    return found | {"value": sorted(kept, key=repr)}


def out(capsys: pytest.CaptureFixture[str], *arguments: str) -> str:
    assert run(arguments) == 0, capsys.readouterr().err
    return capsys.readouterr().out


def repacked(path: Path, changes: Mapping[str, Callable[[bytes], bytes]], *, digests: bool = True) -> Path:
    """Write a bundle anew with changed members, with the digests that go with them if asked."""
    with zipfile.ZipFile(path) as old:
        content = {name: old.read(name) for name in old.namelist()}
    for name, change in changes.items():
        content[name] = change(content[name])
    if digests:
        manifest = json.loads(content[archive.MANIFEST])
        for name in archive.MEMBERS:
            told = {"bytes": len(content[name]), "sha256": hashlib.sha256(content[name]).hexdigest()}
            manifest["members"][name].update(told)
        content[archive.MANIFEST] = json.dumps(manifest).encode()
    with zipfile.ZipFile(path, "w", zipfile.ZIP_DEFLATED) as new:
        for name, data in content.items():
            new.writestr(name, data)
    return path


def test_the_same_study_gives_the_same_bytes_wherever_it_is(packed: Path, results: Path, tmp_path: Path) -> None:
    again = bundle(NAME, tmp_path / "again.mps", str(results))
    assert again.read_bytes() == packed.read_bytes()
    found = unbundle(packed, str(tmp_path / "there.db"))
    assert found.studies == (NAME,)
    assert found.values > 10
    assert found.cells > 10
    assert rows(tmp_path / "there.db") == rows(results)
    assert bundle(NAME, tmp_path / "back.mps", str(tmp_path / "there.db")).read_bytes() == packed.read_bytes()
    assert unbundle(packed, str(tmp_path / "there.db")).values == 0


def test_a_bundle_holds_no_pickle_no_date_and_only_known_members(packed: Path) -> None:
    with zipfile.ZipFile(packed) as file:
        assert file.namelist() == [*archive.MEMBERS, archive.MANIFEST]
        assert {info.date_time for info in file.infolist()} == {(1980, 1, 1, 0, 0, 0)}
        text = b"".join(file.read(name) for name in file.namelist())
    assert json.loads(text.splitlines()[0])["name"] == NAME
    assert b"created" not in text
    assert b"updated" not in text


def test_show_solve_and_export_work_without_the_model(
    packed: Path, results: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    there = tmp_path / "there.db"
    assert not Path(json.loads(rows(results)["study"][0][1])["model"]).exists()
    unbundle(packed, str(there))
    for command in (
        ("show", NAME, "--json"),
        ("solve", NAME, "--budget", "weights <= 3.7 bits", "--json"),
        ("solve", NAME, "--goal", "weights", "--most-loss", "0.1", "--json"),
        ("export", NAME, "--to", "native", "--no-weights", "--force", "--out", str(tmp_path / "exported")),
    ):
        here = out(capsys, *command, "--storage", str(results))
        assert out(capsys, *command, "--storage", str(there)) == here
    assert list((tmp_path / "exported").iterdir())


def test_the_commands_write_and_read(results: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    file, there = str(tmp_path / "a.mps"), str(tmp_path / "there.db")
    told = json.loads(out(capsys, "bundle", NAME, file, "--storage", str(results), "--json"))
    assert told["bytes"] == Path(file).stat().st_size
    assert run(["bundle", NAME, file, "--storage", str(results)]) == 3
    assert "E303" in capsys.readouterr().err
    out(capsys, "bundle", NAME, file, "--storage", str(results), "--force")
    told_of = out(capsys, "unbundle", file, "--storage", there, "--as", "theirs")
    assert "theirs" in told_of
    assert "sender" in told_of
    assert json.loads(out(capsys, "unbundle", file, "--storage", there, "--json"))["studies"] == [NAME]
    names = {row["name"] for row in json.loads(out(capsys, "show", "--storage", there, "--json"))}
    assert names == {NAME, "theirs"}
    assert run(["bundle", "nobody", str(tmp_path / "b.mps"), "--storage", there]) == 3
    assert "E141" in capsys.readouterr().err
    assert not (tmp_path / "b.mps").exists()


def test_paths_are_left_out_when_asked(results: Path, tmp_path: Path) -> None:
    bundle(NAME, tmp_path / "a.mps", str(results), strip_paths=True)
    unbundle(tmp_path / "a.mps", str(tmp_path / "there.db"))
    with opened(tmp_path / "there.db") as store:
        spec = store.study(NAME).spec
    assert spec["model"] == "small-llama"
    assert spec["calibration"] == "stdlib:calibration"
    with zipfile.ZipFile(tmp_path / "a.mps") as file:
        assert b"/small-llama" not in b"".join(file.read(name) for name in file.namelist())


def test_another_question_of_the_same_name_needs_a_name_of_its_own(packed: Path, tmp_path: Path) -> None:
    there = tmp_path / "there.db"
    with opened(there) as store:
        store.create_study(NAME, {"name": NAME, "other": 1})
    before = rows(there)
    with pytest.raises(mp.StorageError) as caught:
        unbundle(packed, str(there))
    assert caught.value.code == "E140"
    assert "--as" in caught.value.advice
    assert rows(there) == before
    unbundle(packed, str(there), name="theirs")
    with opened(there) as store:
        assert store.study("theirs").spec["name"] == "theirs"


def test_numbers_of_another_machine_are_not_mixed_into_a_study(packed: Path, tmp_path: Path) -> None:
    there = tmp_path / "there.db"
    unbundle(packed, str(there))
    with closing(sqlite3.connect(there)) as file:
        file.execute("UPDATE link SET key = ? WHERE kind = 'origin'", ("0" * 64,))
        file.commit()
    before = rows(there)
    with pytest.raises(mp.InputError) as caught:
        unbundle(packed, str(there))
    assert caught.value.code == "E142"
    assert rows(there) == before


@pytest.mark.parametrize("table", ["measurement", "cell"])
def test_other_values_are_a_conflict_and_nothing_is_half_written(packed: Path, tmp_path: Path, table: str) -> None:
    there = tmp_path / "there.db"
    with zipfile.ZipFile(packed) as file:
        values = [json.loads(line) for line in file.read("values.jsonl").splitlines()]
        cells = [json.loads(line) for line in file.read("cells.jsonl").splitlines()]
    with opened(there) as store:
        if table == "cell":
            layer, fmt, batch = cells[1][:3]
            store.put_cells(cells[0]["scope"], [CellRow(layer, fmt, batch, "ok", 123.0, None, 1)])
        else:
            value = next(row for row in values if row["kind"] == "measurement")
            store.put("measurement", value["key"], {**value["body"], "loss": 123.0}, value.get("volatile"))
    before = rows(there)
    with pytest.raises(mp.StorageError) as caught:
        unbundle(packed, str(there))
    assert caught.value.code == "E521"
    assert "123" in str(caught.value)
    assert rows(there) == before
    with opened(there) as store:
        assert [row.kind for row in store.conflicts()] == [table]
    assert bundle(NAME, tmp_path / "again.mps", str(packed.with_name("results.db"))).exists()


def test_conflicts_travel_with_their_study(results: Path, tmp_path: Path) -> None:
    with opened(results) as store:
        key = store.links(NAME, "measurement")[0].key
        body = store.get("measurement", key)
        with pytest.raises(mp.StorageError):
            store.put("measurement", key, {**body, "loss": 7.0}, {"seconds": 1.0})
        store.put("other", "k", {"a": 1})
        with pytest.raises(mp.StorageError):
            store.put("other", "k", {"a": 2})
    bundle(NAME, tmp_path / "a.mps", str(results))
    unbundle(tmp_path / "a.mps", str(tmp_path / "there.db"))
    with opened(tmp_path / "there.db") as store:
        assert [(row.kind, row.key, row.offered["loss"]) for row in store.conflicts()] == [("measurement", key, 7.0)]


def test_a_question_that_runs_somebodys_code_is_refused(packed: Path, tmp_path: Path) -> None:
    def allow(data: bytes) -> bytes:
        row = json.loads(data)
        row["spec"]["trust_remote_code"] = True
        return json.dumps(row).encode() + b"\n"

    repacked(packed, {"studies.jsonl": allow})
    with pytest.raises(mp.UnsafeError) as caught:
        unbundle(packed, str(tmp_path / "there.db"))
    assert caught.value.code == "E802"
    assert caught.value.exit_code == 8
    unbundle(packed, str(tmp_path / "there.db"), strip_remote_code=True)
    with opened(tmp_path / "there.db") as store:
        assert store.study(NAME).spec["trust_remote_code"] is False


def _line(change: Callable[[Any], Any]) -> Callable[[bytes], bytes]:
    def changed(data: bytes) -> bytes:
        first, *rest = data.splitlines()
        return b"\n".join([json.dumps(change(json.loads(first))).encode(), *rest]) + b"\n"

    return changed


def _plan(change: Callable[[dict[str, Any]], None]) -> Callable[[bytes], bytes]:
    """Change the plans of a bundle, and put them under the key that goes with the change."""

    def changed(data: bytes) -> bytes:
        found = []
        for row in map(json.loads, data.splitlines()):
            if row["kind"] == "plan":
                change(row["body"])
                row["body"].pop("digest", None)
                row["key"] = row["body"]["digest"] = content_key(row["body"])
            found.append(json.dumps(row).encode())
        return b"\n".join(found) + b"\n"

    return changed


def _stray(kind: str) -> bytes:
    """A whole value of a kind, under a key that no study names."""
    path = DATA / "schema-1.db"
    with closing(sqlite3.connect(path)) as file:
        (body,) = file.execute("SELECT body FROM value WHERE kind = ?", (kind,)).fetchone()
    return json.dumps({"kind": kind, "key": "5" * 64, "body": json.loads(body)}).encode() + b"\n"


HOSTILE: dict[str, dict[str, Callable[[bytes], bytes]]] = {
    "nan": {"cells.jsonl": lambda data: data + b'["l","f",-1,"ok",NaN,null,1,"",0.0]\n'},
    "infinity": {"cells.jsonl": lambda data: data + b'["l","f",-1,"ok",1e999,null,1,"",0.0]\n'},
    "a status that does not fit": {"cells.jsonl": lambda data: data + b'["l","f",-1,"ok",null,null,1,"",0.0]\n'},
    "an unknown status": {"cells.jsonl": lambda data: data + b'["l","f",-1,"fine",null,null,1,"",0.0]\n'},
    "a truth value for a number": {"cells.jsonl": lambda data: data + b'["l","f",true,"ok",1.0,null,1,"",0.0]\n'},
    "a short row": {"cells.jsonl": lambda data: data + b'["l","f"]\n'},
    "deep": {"values.jsonl": lambda data: data + b"[" * 5000 + b"]" * 5000 + b"\n"},
    "deep enough for a reader": {"values.jsonl": lambda data: data + b'{"a":' * 100 + b"1" + b"}" * 100 + b"\n"},
    "a name twice": {"studies.jsonl": lambda data: b'{"name":"a","name":"b","spec":{},"state":"new"}\n'},
    "no JSON": {"links.jsonl": lambda data: data + b"{\n"},
    "no UTF-8": {"links.jsonl": lambda data: data + b'["\xff"]\n'},
    "half a surrogate pair": {"values.jsonl": lambda data: data + b'{"kind":"x","key":"y","body":{"a":"\\ud800"}}\n'},
    "a number of 5,000 digits": {"links.jsonl": lambda data: data + b'["frozen","a","b","",' + b"9" * 5000 + b"]\n"},
    "a number of 70 bits": {"links.jsonl": lambda data: data + b'["frozen","origin","b","",1180591620717411303424]\n'},
    "a control character": {"links.jsonl": lambda data: data + b'["frozen","a\\u001b[31m","b","",0]\n'},
    "a link to nothing": {"links.jsonl": lambda data: data + b'["frozen","plan","nothing","",0]\n'},
    "a link of another study": {"links.jsonl": lambda data: data + b'["other","plan","nothing","",0]\n'},
    "an unknown state": {"studies.jsonl": _line(lambda row: {**row, "state": "fine"})},
    "another name inside": {"studies.jsonl": _line(lambda row: {**row, "spec": {**row["spec"], "name": "x"}})},
    "a question with unknown keys": {"studies.jsonl": _line(lambda row: {**row, "spec": {**row["spec"], "run": "x"}})},
    "a question of wrong types": {"studies.jsonl": _line(lambda row: {**row, "spec": {**row["spec"], "tokens": "x"}})},
    "no question": {"studies.jsonl": _line(lambda row: {**row, "spec": {}})},
    "a plan without layers": {"values.jsonl": _plan(lambda body: body.update(tensors=[]))},
    "a plan with an unknown format": {"values.jsonl": _plan(lambda body: body["tensors"][0].update(format="rm"))},
    "a plan of no shape": {"values.jsonl": _plan(lambda body: body["tensors"][0].update(shape=[10**30, "x"]))},
    "a value under another key": {"values.jsonl": _line(lambda row: {**row, "key": "0" * 64})},
    "a value that is none": {"values.jsonl": lambda data: data + b'{"kind":"survey","key":"x","body":{}}\n'},
    "a survey of no study": {"values.jsonl": lambda data: data + _stray("survey")},
    "a time of a kernel": {
        "links.jsonl": lambda data: data + b'["frozen","kernel_time","k","",0]\n',
        "values.jsonl": lambda data: data + b'{"kind":"kernel_time","key":"k","body":{"kernel":"a"}}\n',
    },
    "a kind that nobody knows": {
        "values.jsonl": lambda data: data + b'{"kind":"other","key":"y","body":{}}\n',
    },
    "cells of no study": {"cells.jsonl": lambda data: data + b'{"scope":"x"}\n["l","f",-1,"ok",1.0,null,1,"",0.0]\n'},
    "cells of no scope": {"cells.jsonl": lambda data: b'["l","f",-1,"ok",1.0,null,1,"",0.0]\n' + data},
    "a conflict over nothing of it": {"conflicts.jsonl": lambda data: data + b'["survey","x",{},{"a":1}]\n'},
    "a conflict over cells of no study": {
        "conflicts.jsonl": lambda data: data + b'["cell","[\\"x\\",\\"l\\",\\"f\\",-1]",{},{"a":1}]\n',
    },
    "no study": {"studies.jsonl": lambda data: b"", "links.jsonl": lambda data: b""},
    "scores that are none": {
        "values.jsonl": lambda data: data + b'{"kind":"scores","key":"x","body":{"layers":[1]}}\n'
    },
}


@pytest.mark.parametrize("what", HOSTILE)
def test_what_is_no_study_is_refused_and_nothing_is_stored(what: str, packed: Path, tmp_path: Path) -> None:
    there = tmp_path / "there.db"
    opened(there).close()
    before = rows(there)
    repacked(packed, HOSTILE[what])
    with pytest.raises(mp.MpsearchError) as caught:
        unbundle(packed, str(there))
    assert caught.value.code in ("E304", "E113", "E114"), caught.value
    assert rows(there) == before


def _zip(members: Mapping[str, bytes]) -> bytes:
    stream = io.BytesIO()
    with zipfile.ZipFile(stream, "w", zipfile.ZIP_DEFLATED) as file:
        for name, data in members.items():
            file.writestr(name, data)
    return stream.getvalue()


def test_archives_that_are_no_bundles_are_refused(tmp_path: Path) -> None:
    empty = dict.fromkeys([*archive.MEMBERS, archive.MANIFEST], b"")
    bomb = {**empty, "cells.jsonl": b"[" + b"0" * 20_000_000}
    many = {f"{i}.jsonl": b"" for i in range(2000)}
    path_like = {**dict.fromkeys(archive.MEMBERS[1:], b""), "../studies.jsonl": b"", archive.MANIFEST: b"{}"}
    whole = _zip(empty)
    cases = [
        b"", b"PK", b"not a zip at all" * 10, whole, whole + b"tail", b"head" + whole, _zip(bomb), _zip(many),
        _zip(path_like), _zip({**empty, "extra": b""}), _zip({**empty, archive.MANIFEST: b"[]"}),
        _zip({**empty, archive.MANIFEST: b'{"kind":"mpsearch bundle","format":1,"members":{}}'}),
        # A list of members that promises what nobody can hold.
        whole[:-12] + struct.pack("<2L", 0xFFFFFFFF, 0) + whole[-4:],
    ]  # fmt: skip
    for data in cases:
        (tmp_path / "a.mps").write_bytes(data)
        with pytest.raises(mp.InputError) as caught:
            unbundle(tmp_path / "a.mps", str(tmp_path / "there.db"))
        assert caught.value.code == "E304"
    assert not (tmp_path / "there.db").exists()
    with pytest.raises(mp.InputError, match="cannot be read"):
        unbundle(tmp_path / "none.mps", str(tmp_path / "there.db"))


def test_a_line_of_millions_of_lists_takes_no_memory(packed: Path, tmp_path: Path) -> None:
    for text in (b"[]," * 20_000_000, b'["a",' * 1_000_000, b'"' + b'\\"' * 3_000_000):
        repacked(packed, {"values.jsonl": lambda data, text=text: data + text + b"\n"})  # type: ignore[misc]
        tracemalloc.start()
        with pytest.raises(mp.InputError) as caught:
            unbundle(packed, str(tmp_path / "there.db"))
        peak = tracemalloc.get_traced_memory()[1]
        tracemalloc.stop()
        assert caught.value.code == "E304"
        assert peak < 400e6


@pytest.mark.parametrize(
    ("text", "deep"), [(b"1", 0), (b"[[],[[]]]", 3), (b'{"a]": ["[[\\"[", {}]}', 3), (b"]]]][", 0), (b'"[[', 0)]
)
def test_depth_is_counted_without_reading(text: bytes, deep: int) -> None:
    assert archive.depth(text) == deep


def test_what_cannot_be_read_is_not_written(results: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    for name, limit in (("LINE_LIMIT", 1000), ("ROW_LIMIT", 3), ("CELL_LIMIT", 3)):
        with monkeypatch.context() as changed:
            changed.setattr(archive, name, limit)
            with pytest.raises(mp.InputError, match="too large"):
                bundle(NAME, tmp_path / "a.mps", str(results))
    assert not (tmp_path / "a.mps").exists()


def test_times_of_kernels_stay_at_home(results: Path, tmp_path: Path) -> None:
    with opened(results) as store:
        survey = store.links(NAME, "survey")[0].key
        # One that a study reaches all the same.
        store.put("kernel_time", survey, {"kernel": "a"}, {"seconds": 1.0})
    bundle(NAME, tmp_path / "a.mps", str(results))
    unbundle(tmp_path / "a.mps", str(tmp_path / "there.db"))
    with opened(tmp_path / "there.db") as store:
        assert store.get("kernel_time", survey) is None


def test_a_newer_format_asks_for_an_upgrade(packed: Path, tmp_path: Path) -> None:
    repacked(packed, {archive.MANIFEST: lambda data: json.dumps({**json.loads(data), "format": 9}).encode()})
    with pytest.raises(mp.InputError, match="bundle format 9"):
        unbundle(packed, str(tmp_path / "there.db"))


def test_limits_hold_while_reading(packed: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    for name, limit in (("FILE_LIMIT", 100), ("TOTAL_LIMIT", 1000), ("LINE_LIMIT", 1000), ("DEPTH_LIMIT", 1),
                        ("ROW_LIMIT", 3), ("CELL_LIMIT", 3), ("HELD_LIMIT", 1000)):  # fmt: skip
        with monkeypatch.context() as changed:
            changed.setattr(archive, name, limit)
            with pytest.raises(mp.InputError) as caught:
                unbundle(packed, str(tmp_path / "there.db"))
            assert caught.value.code == "E304"


def _code(path: Path, storage: str) -> str | None:
    try:
        unbundle(path, storage)
    except mp.MpsearchError as error:
        return error.code
    return None


def test_a_bundle_that_was_cut_or_changed_anywhere_is_refused(packed: Path, tmp_path: Path) -> None:
    whole, there, draw = packed.read_bytes(), str(tmp_path / "there.db"), random.Random(1)
    broken = [whole[: draw.randrange(len(whole))] for _ in range(60)]
    for _ in range(60):
        place = draw.randrange(len(whole))
        broken.append(whole[:place] + bytes([whole[place] ^ (1 << draw.randrange(8))]) + whole[place + 1 :])
    accepted = 0
    for data in broken:
        packed.write_bytes(data)
        if (code := _code(packed, there)) is None:
            # A date or the like was changed, which holds nothing: what came in is what was sent.
            accepted += 1
            assert rows(Path(there)) == rows(packed.with_name("results.db"))
        else:
            assert code == "E304"
    assert accepted < len(broken) / 4


def test_many_equal_rows_are_no_bomb(tmp_path: Path, results: Path) -> None:
    with opened(results) as store:
        scope = store.links(NAME, "scores")[0].key
        store.put_cells(scope, [CellRow(f"x.{i}", "int4-g64", -1, "not_offered", None, None, 0) for i in range(30_000)])
    bundle(NAME, tmp_path / "a.mps", str(results))
    assert unbundle(tmp_path / "a.mps", str(tmp_path / "there.db")).cells > 30_000


def test_databases_are_merged_all_or_nothing(results: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    into = tmp_path / "team.db"
    with opened(results) as store:
        store.put("kernel_time", "k", {"kernel": "a"}, {"seconds": 1.0})
    assert merge(str(results), str(into)).studies == (NAME,)
    assert rows(into) == rows(results)
    merge(str(results), str(into))
    assert rows(into) == rows(results)
    told = out(capsys, "db", "merge", str(results), "--into", str(into), "--as", f"{NAME}=theirs", "--json")
    assert json.loads(told) == {"studies": ["theirs"], "values": 0, "cells": 0}
    before = rows(into)
    with closing(sqlite3.connect(results)) as file:
        file.execute("UPDATE cell SET value = value + 1 WHERE status = 'ok'")
        file.commit()
    assert run(["db", "merge", str(results), "--into", str(into)]) == 6
    assert "E521" in capsys.readouterr().err
    assert rows(into) == before
    assert run(["db", "merge", str(results), "--into", str(into), "--as", "nobody=x"]) == 3
    assert "E141" in capsys.readouterr().err
    assert run(["db", "merge", str(results), "--into", str(into), "--as", "nobody"]) == 2
    assert "E115" in capsys.readouterr().err


def test_a_running_study_stands_still_in_its_copy(results: Path, tmp_path: Path) -> None:
    with opened(results) as store:
        store.set_state(NAME, "running")
    bundle(NAME, tmp_path / "a.mps", str(results))
    unbundle(tmp_path / "a.mps", str(tmp_path / "there.db"))
    with opened(tmp_path / "there.db") as store:
        assert store.study(NAME).state == "paused"


def test_a_study_itself_can_be_given(results: Path, tmp_path: Path) -> None:
    from mpsearch.cli.options import open_study

    study = open_study(NAME, str(results))
    try:
        first = sharing.bundle(study, tmp_path / "a.mps")
    finally:
        study.store.close()
    assert first.read_bytes() == bundle(NAME, tmp_path / "b.mps", str(results)).read_bytes()
