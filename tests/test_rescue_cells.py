"""Scores whose cells are partly lost: told, and never taken for whole."""

from __future__ import annotations

from pathlib import Path

import pytest

from mpsearch.bundles.kinds import key_of
from mpsearch.records import CellRow
from mpsearch.storage.rescue import Rescued, rescue
from mpsearch.storage.store import SqlStore

LAYERS, FORMATS, BATCHES = [f"layer {i}" for i in range(100)], ["int2-g64", "int4-g64"], 3
KEY = "a" * 64
PAGE = 4096


def table(status: str = "ok") -> dict[str, object]:
    return {
        "layers": LAYERS,
        "formats": FORMATS,
        "value": [[0.5, 0.5] for _ in LAYERS],
        "spread": [[0.1, 0.1] for _ in LAYERS],
        "unit": "nats/token",
        "status": [["ok", status] for _ in LAYERS],
        "samples": 1,
        "source": {"estimator": "e", "settings": {}, "scope": KEY, "batches": BATCHES},
    }


def stored(path: Path, by_batch: bool, scored: bool, formats: list[str] = FORMATS) -> None:
    """A finished study in a file of many pages."""
    batches = range(BATCHES) if by_batch else [-1]
    with SqlStore(str(path)) as store:
        store.create_study("s", {"x": 1})
        store.create_study("other", {"x": 2})
        if scored:
            store.put("scores", KEY, table())
        else:
            store.put("score_unit", KEY, {"unit": "nats/token"})
        store.link("s", "scores" if scored else "score_unit", KEY)
        for batch in batches:
            store.put_cells(KEY, [CellRow(x, f, batch, "ok", 0.5, 0.1, 1, "y" * 30) for x in LAYERS for f in formats])
        store.put("note", "n", {"a": 1})
        store.link("other", "note", "n")
        for name in ("s", "other"):
            store.set_state(name, "complete")


def harmed(path: Path, *, cells: bool) -> Rescued:
    """Overwrite pages, of the middle of the cells or the first one, and rescue the rest."""
    data = bytearray(path.read_bytes())
    holds = [i for i in range(1, len(data) // PAGE) if data[i * PAGE : (i + 1) * PAGE].count(b"layer ") > 20]
    hit = holds[len(holds) // 2] if cells else 0
    data[hit * PAGE : (hit + 1) * PAGE] = b"\xff" * PAGE
    path.write_bytes(data)
    return rescue(path, path.with_name("new.db"), key_of)


@pytest.fixture
def path(tmp_path: Path) -> Path:
    return tmp_path / "x.db"


@pytest.mark.parametrize("by_batch", [True, False])
@pytest.mark.parametrize("lost", [True, False])
def test_a_study_whose_cells_are_lost_is_paused(path: Path, by_batch: bool, lost: bool) -> None:
    stored(path, by_batch, True)
    found = harmed(path, cells=lost)
    assert not found.whole
    lines = [line for line in found.lost if line.startswith("study 's'")]
    with SqlStore(str(path.with_name("new.db"))) as store:
        rows = store.cells(KEY)
        whole = len(LAYERS) * len(FORMATS) * (BATCHES if by_batch else 1)
        assert (len(rows) < whole) == lost
        assert store.study("s").state == ("paused" if lost else "complete")
        assert store.study("other").state == "complete"
        assert lines == ([f"study 's': {whole - len(rows)} of its cells"] if lost else [])
        # A batch is there, or it is not.
        for batch in {row.batch for row in rows if row.batch >= 0}:
            assert len([row for row in rows if row.batch == batch]) == len(LAYERS) * len(FORMATS)


@pytest.mark.parametrize("by_batch", [True, False])
def test_without_a_table_of_scores_nothing_tells_how_many_there_were(path: Path, by_batch: bool) -> None:
    stored(path, by_batch, False)
    found = harmed(path, cells=True)
    assert "study 's': perhaps cells of 1 scopes" in found.lost
    with SqlStore(str(path.with_name("new.db"))) as store:
        assert (len(store.cells(KEY)) == 0) == by_batch
        assert any("cells of batches" in line for line in found.lost) == by_batch
        assert (store.study("s").state, store.study("other").state) == ("paused", "complete")
