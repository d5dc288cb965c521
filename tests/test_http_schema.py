"""Answers are as the OpenAPI document says, to right and to wrong requests; the long form is `benchmarks.http_load`."""

from __future__ import annotations

from pathlib import Path

from benchmarks.http_load import by_document, counted_server


def test_schemathesis_finds_nothing(tmp_path: Path) -> None:
    with counted_server(str(tmp_path / "load.db")) as (server, counted):
        found = by_document(server, counted, 4, "examples,fuzzing", seed=2)
        assert found.code == 0, found.text[-4000:]
        assert found.total > 100, found.text[-4000:]
        assert found.failures == 0, counted.statuses
        assert counted.statuses[200] > 20, counted.statuses
        assert counted.statuses[422] > 20, counted.statuses
