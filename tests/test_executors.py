"""Executors: the suite on every kind of database; those on a Ray cluster are in test_ray.py."""

from __future__ import annotations

import os
import subprocess
import sys
from pathlib import Path

import pytest

import mpsearch as mp
from mpsearch.errors import InputError, ResourceError
from mpsearch.executors.inline import Inline
from mpsearch.executors.pool import Pool
from mpsearch.ports import Executor
from mpsearch.testing.executors import ExecutorSuite, ProcessSuite
from mpsearch.testing.pretended import Bench, pretend
from tests.conftest import study_settings


class OnInline(ExecutorSuite):
    @pytest.fixture
    def executor(self) -> Executor:
        return Inline()


class OnPool(ProcessSuite):
    @pytest.fixture
    def executor(self, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Executor:
        monkeypatch.setenv("PYTHONPATH", pretend(tmp_path))
        return Pool(1)

    @pytest.fixture
    def two(self, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Executor:
        monkeypatch.setenv("PYTHONPATH", pretend(tmp_path))
        return Pool(2)


class OnFile:
    @pytest.fixture
    def storage(self, tmp_path: Path) -> str:
        return f"sqlite:///{tmp_path / 'results.db'}"


class OnServer:
    @pytest.fixture
    def storage(self, database: str) -> str:
        return database


class TestInlineInMemory(OnInline):
    @pytest.fixture
    def storage(self) -> str:
        return "sqlite://"


class TestInlineOnFile(OnFile, OnInline):
    pass


class TestInlineOnServer(OnServer, OnInline):
    pass


class TestPoolOnFile(OnFile, OnPool):
    pass


class TestPoolOnServer(OnServer, OnPool):
    pass


def test_workers_say_in_a_few_lines_why_they_cannot_begin(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capfd: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setenv("PYTHONPATH", pretend(tmp_path))
    bench = Bench(f"sqlite:///{tmp_path / 'results.db'}", tmp_path / "witness")
    nowhere = f"sqlite:///{tmp_path / 'nowhere.db'}"
    with (
        bench.driver(Pool(1), storage=nowhere) as driver,
        pytest.raises(ResourceError, match="with 3") as caught,
    ):
        list(driver.do(bench.jobs(1)))
    bench.store.close()
    assert caught.value.because == "why is printed above"
    said = capfd.readouterr().err
    assert "error[E101] results database" in said
    assert "Traceback" not in said


def test_a_database_in_memory_is_refused_where_others_are_to_work(small_llama: Path, tmp_path: Path) -> None:
    settings = study_settings(small_llama, tmp_path, workers=2) | {"storage": "sqlite://"}
    with pytest.raises(InputError, match="a database in memory cannot be opened by other processes") as caught:
        mp.study(**settings).run()
    assert caught.value.code == "E115"


def test_a_pool_that_is_ended_at_once_leaves_no_word_behind(tmp_path: Path) -> None:
    """As when Ctrl-C ends a study while its workers start, and while they work."""
    script = tmp_path / "abort.py"
    script.write_text("""
import sys
import time
from pathlib import Path
from mpsearch.executors.pool import Pool
from mpsearch.testing.pretended import Bench

if __name__ == "__main__":
    bench = Bench(sys.argv[1], Path(sys.argv[2]))
    for first in (False, True):
        try:
            with bench.driver(Pool(2)) as driver:
                doing = driver.do(bench.jobs(100, seconds=0.2))
                if first:
                    next(doing)
                raise KeyboardInterrupt
        except KeyboardInterrupt:
            time.sleep(0.5)
""")
    command = [sys.executable, str(script), f"sqlite:///{tmp_path / 'results.db'}", str(tmp_path / "witness")]
    environment = {**os.environ, "PYTHONPATH": pretend(tmp_path)}
    done = subprocess.run(command, capture_output=True, text=True, check=True, timeout=120, env=environment)
    assert done.stdout == done.stderr == ""
