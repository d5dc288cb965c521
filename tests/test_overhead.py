"""What a result costs beside its measuring. In milliseconds: ``python -m benchmarks.overhead``."""

from __future__ import annotations

from collections import Counter
from pathlib import Path
from typing import Any

from sqlalchemy import Engine, event

from benchmarks.chaos import faults
from benchmarks.overhead import speed_up


def test_a_result_costs_one_transaction(tmp_path: Path) -> None:
    made, found = faults.make(tmp_path), Counter[str]()

    def statement(connection: Any, cursor: Any, text: str, *more: Any) -> None:
        found["statements"] += not text.startswith("BEGIN")

    def commit(connection: Any) -> None:
        found["commits"] += 1

    event.listen(Engine, "before_cursor_execute", statement)
    event.listen(Engine, "commit", commit)
    counts = []
    try:
        for layers in (4, 24):
            found.clear()
            lab = faults.Lab.make(
                tmp_path / str(layers), layers=layers, formats=made.formats, points=1, least=0.0, most=0.0,
                executor=("--workers", "1"),
            )  # fmt: skip
            with faults.here(lab) as run:
                assert run()[0] == 0
            counts.append((len(lab.begun), found["commits"], found["statements"]))
    finally:
        event.remove(Engine, "before_cursor_execute", statement)
        event.remove(Engine, "commit", commit)
    (few, few_commits, few_statements), (many, many_commits, many_statements) = counts
    assert many - few >= 55
    assert (many_commits - few_commits) / (many - few) <= 1.1
    assert (many_statements - few_statements) / (many - few) <= 8


def test_two_workers_are_faster_than_one(tmp_path: Path) -> None:
    # 1.7 times and more where nothing else runs.
    assert speed_up(tmp_path, ["", ""], 40) > 1.25
