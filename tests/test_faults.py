"""Disks that are full, broken or closed at any moment: one message, and the study goes on when they are mended."""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path

import pytest

from benchmarks.chaos import faults
from tests.test_chaos import wrong


@pytest.fixture(scope="module")
def calm(tmp_path_factory: pytest.TempPathFactory) -> Mapping[str, str]:
    return faults.untroubled(tmp_path_factory.mktemp("calm"))


@pytest.mark.parametrize(("place", "error"), list(enumerate(faults.ERRORS)))
def test_a_fault_at_any_call_is_told_and_mended(
    calm: Mapping[str, str], tmp_path: Path, place: int, error: int
) -> None:
    """Each error at some calls; `python -m benchmarks.chaos --only faults` takes all."""
    found = faults.fail_each(tmp_path, error, calm, first=1 + 10 * place, step=40)
    assert not wrong(found), found
    assert found["faults"] >= 2


def test_a_file_that_cannot_grow_is_told_and_mended(calm: Mapping[str, str], tmp_path: Path) -> None:
    found = faults.fill_disk(tmp_path, calm, [160])
    assert not wrong(found), found
    assert found["full"] >= 1
