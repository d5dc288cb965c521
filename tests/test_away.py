"""A PostgreSQL server that goes away under a study and its workers."""

from __future__ import annotations

import signal
import subprocess
import tempfile
import time
from collections.abc import Iterator
from pathlib import Path

import pytest

from benchmarks.chaos.lab import Lab, wait_until
from tests.postgres import Postgres, postgres


@pytest.fixture(scope="module")
def stopping() -> Iterator[Postgres]:
    """A server of this module's own, which it may stop."""
    with (
        tempfile.TemporaryDirectory(prefix="mpsearch-postgres-", ignore_cleanup_errors=True) as folder,
        postgres(Path(folder)) as found,
    ):
        yield found


def at_work(lab: Lab) -> subprocess.Popen[bytes]:
    process = lab.start()
    wait_until(lambda: len(lab.ended) > 20 or process.poll() is not None, 60.0, "a result")
    assert process.poll() is None, lab.said()
    return process


def said(lab: Lab) -> str:
    return (lab.folder / "said").read_text()


@pytest.fixture(scope="module")
def calm(tmp_path_factory: pytest.TempPathFactory) -> dict[str, str]:
    """What an untroubled run leaves."""
    lab = Lab.make(tmp_path_factory.mktemp("calm"), layers=20)
    lab.finish()
    return lab.outcome()


@pytest.mark.parametrize("workers", ["1", "2"])
def test_a_study_goes_on_when_its_server_is_back(
    stopping: Postgres, calm: dict[str, str], tmp_path: Path, workers: str
) -> None:
    lab = Lab.make(
        tmp_path / "away", stopping.url(stopping.create()), layers=20, lease=1.5, door=0.5, least=0.01, most=0.03,
        executor=("--workers", workers),
    )  # fmt: skip
    process = at_work(lab)
    stopping.stop("immediate")
    time.sleep(3.0)
    assert process.poll() is None
    stopping.start()
    assert process.wait(60) == 0, lab.said()
    assert said(lab).count("waiting for up to 600 s") == 1
    assert said(lab).count("the database is back after") == 1
    assert lab.lost() == []
    assert lab.outcome() == calm


def test_ctrl_c_is_heard_while_a_server_is_away(stopping: Postgres, tmp_path: Path) -> None:
    lab = Lab.make(tmp_path, stopping.url(stopping.create()), layers=20, lease=1.5, door=0.5, least=0.01, most=0.03)
    process = at_work(lab)
    stopping.stop("immediate")
    try:
        wait_until(lambda: "waiting for up to" in said(lab), 40.0, "a word of waiting")
        begun = time.monotonic()
        process.send_signal(signal.SIGINT)
        assert process.wait(30) == 130
        assert time.monotonic() - begun < 5.0
    finally:
        process.kill()
        stopping.start()
    assert "go on with: mpsearch resume" in said(lab)
    assert lab.lost() == []
