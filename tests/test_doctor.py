"""What the machine has, told in lines that say what to do."""

from __future__ import annotations

import json
import os
import sqlite3
import subprocess
import sys
from contextlib import closing
from pathlib import Path

import pytest

from mpsearch import examining, registry
from mpsearch.cli.main import run
from mpsearch.examining import available_memory, examine
from tests.conftest import DATA


def report(capsys: pytest.CaptureFixture[str], *arguments: str, code: int = 0) -> dict[str, dict[str, str]]:
    assert run(["doctor", "--json", *arguments]) == code
    return {line["what"]: line for line in json.loads(capsys.readouterr().out)}


def test_this_machine_is_fine(capsys: pytest.CaptureFixture[str], tmp_path: Path) -> None:
    registry.make("stores", "sql", url=str(tmp_path / "a.db")).close()
    found = report(capsys, "--storage", str(tmp_path / "a.db"))
    expected = {"python", "mpsearch", "numpy", "torch", "transformers", "sqlalchemy", "disk", "memory", "threads"}
    assert expected | {"database", "journal", "ray", "kernels"} <= set(found)
    assert {line["state"] for line in found.values()} <= {"ok", "warn"}
    assert found["journal"]["found"] == "journal mode wal"
    assert "schema 2" in found["database"]["found"]
    assert all(line["fix"] for line in found.values() if line["state"] != "ok")
    assert run(["doctor"]) == 0
    assert "database" not in capsys.readouterr().out


def test_nothing_heavy_is_loaded_and_ray_is_not_started() -> None:
    code = (
        "import sys; from mpsearch.examining import examine; found = list(examine());"
        "assert 'torch' not in sys.modules and 'ray' not in sys.modules and 'sqlalchemy' not in sys.modules;"
        "print(len(found))"
    )
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    assert int(done.stdout) > 10


def test_what_it_advises_for_an_old_database_mends_it(capsys: pytest.CaptureFixture[str], tmp_path: Path) -> None:
    path = tmp_path / "old.db"
    path.write_bytes((DATA / "schema-1.db").read_bytes())
    line = report(capsys, "--storage", str(path))["database"]
    assert line["state"] == "warn"
    before = path.read_bytes()
    assert path.read_bytes() == before
    assert run(line["fix"].split()[1:]) == 0
    capsys.readouterr()
    assert report(capsys, "--storage", str(path))["database"]["state"] == "ok"


def test_what_would_stop_a_study_fails(capsys: pytest.CaptureFixture[str], tmp_path: Path) -> None:
    (tmp_path / "x.db").write_bytes(b"PK" * 100)
    assert report(capsys, "--storage", str(tmp_path / "x.db"), code=7)["database"]["state"] == "fail"
    registry.make("stores", "sql", url=str(tmp_path / "new.db")).close()
    with closing(sqlite3.connect(tmp_path / "new.db")) as file:
        file.execute("UPDATE mpsearch_schema SET version_num = '0099'")
        file.commit()
    line = report(capsys, "--storage", str(tmp_path / "new.db"), code=7)["database"]
    assert "pip install -U mpsearch" in line["fix"]
    line = report(capsys, "--storage", str(tmp_path / "none.db"), code=7)["database"]
    assert "E101" in line["found"]
    assert run(["doctor", "--storage", "postgresql://ann:secret@127.0.0.1:1/mp"]) == 7
    told = capsys.readouterr()
    assert "E710" in told.err
    assert "secret" not in told.out + told.err


def test_versions_that_are_too_old_or_missing_fail(monkeypatch: pytest.MonkeyPatch) -> None:
    versions = {"torch": "2.5.1", "transformers": "", "ray": "2.47.1"}
    real = examining._installed
    monkeypatch.setattr(examining, "_installed", lambda package: versions.get(package, real(package)))
    found = {line.what: line for line in examine()}
    assert {name: found[name].state for name in versions} == dict.fromkeys(versions, "fail")
    assert found["torch"].fix == "pip install -U 'torch>=2.6'"
    assert "CVE-2025-62593" in found["ray"].found


def test_more_threads_than_processors_are_told(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("OMP_NUM_THREADS", "512")
    line = next(line for line in examine() if line.what == "threads")
    assert line.state == "warn"
    name, _, value = line.fix.removeprefix("export ").partition("=")
    monkeypatch.setenv(name, value)
    assert next(line for line in examine() if line.what == "threads").state == "ok"
    assert int(value) <= (os.cpu_count() or 1)


def test_memory_is_the_least_of_what_system_and_group_allow(tmp_path: Path) -> None:
    (tmp_path / "meminfo").write_text("MemTotal: 9 kB\nMemAvailable:   8388608 kB\n")
    assert available_memory(tmp_path / "meminfo", tmp_path) == 8.0
    (tmp_path / "memory.max").write_text(f"{4 * 2**30}\n")
    (tmp_path / "memory.current").write_text(f"{3 * 2**30}\n")
    assert available_memory(tmp_path / "meminfo", tmp_path) == 1.0
    (tmp_path / "memory.max").write_text("max\n")
    assert available_memory(tmp_path / "meminfo", tmp_path) == 8.0
    assert available_memory(tmp_path / "none", tmp_path) is None
