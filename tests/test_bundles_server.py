"""Studies between a file and a server: the same bytes, checks and counts on both."""

from __future__ import annotations

import json
from pathlib import Path

import pytest

from mpsearch import registry
from mpsearch.bundles.sharing import bundle, merge, unbundle
from mpsearch.cli.main import run
from mpsearch.records import CellRow
from tests.postgres import PASSWORD
from tests.test_bundles import NAME, packed, results

__all__ = ["packed", "results"]


def out(capsys: pytest.CaptureFixture[str], *arguments: str) -> str:
    code = run(arguments)
    told = capsys.readouterr()
    assert code == 0, told.err
    assert PASSWORD not in told.out + told.err
    return told.out


def test_a_server_holds_a_bundle_and_gives_it_back(
    database: str, packed: Path, results: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    assert unbundle(packed, database).studies == (NAME,)
    assert unbundle(packed, database).values == 0
    assert bundle(NAME, tmp_path / "back.mps", database).read_bytes() == packed.read_bytes()
    for command in (("show", NAME), ("solve", NAME, "--budget", "weights <= 3.7 bits")):
        here = out(capsys, *command, "--json", "--storage", str(results))
        assert out(capsys, *command, "--json", "--storage", database) == here
    told = out(capsys, "db", "merge", database, "--into", str(tmp_path / "as.db"), "--as", f"{NAME}=theirs", "--json")
    assert json.loads(told)["studies"] == ["theirs"]
    assert run(["db", "merge", database, "--into", str(tmp_path / "as.db"), "--as", "nobody=theirs"]) == 3
    assert "E141" in capsys.readouterr().err
    merge(database, str(tmp_path / "merged.db"))
    assert bundle(NAME, tmp_path / "merged.mps", str(tmp_path / "merged.db")).read_bytes() == packed.read_bytes()


def test_a_server_is_checked_tidied_and_counted(
    database: str, packed: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    unbundle(packed, database)
    assert "already" in out(capsys, "db", "upgrade", database)
    assert "fine" in out(capsys, "db", "check", database)
    with registry.make("stores", "sql", url=database) as store:
        store.put("score_unit", "f" * 64, {"unit": "nats"})
        store.put_cells("f" * 64, [CellRow("a", "int4-g64", -1, "ok", 1.0, None, 1)])
    told = json.loads(out(capsys, "db", "gc", database, "--days", "0", "--json"))
    assert (told["values"], told["cells"]) == ({"score_unit": 1}, 1)
    told = json.loads(out(capsys, "db", "stats", database, "--json"))
    assert told["studies"] == {"complete": 1}
    assert told["bytes"] > 10_000
    lines = json.loads(out(capsys, "doctor", "--storage", database, "--json"))
    assert {line["state"] for line in lines if line["what"] in ("database", "connections")} == {"ok"}
