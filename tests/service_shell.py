"""Commands run in this process or in one of their own, for tests of the service."""

from __future__ import annotations

import json
import os
import signal
import subprocess
import sys
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import pytest

from mpsearch.cli.main import run
from mpsearch.storage.store import SqlStore
from tests.conftest import study_settings


def settings(model: Path, folder: Path, **changes: Any) -> dict[str, Any]:
    """Settings of a study that takes a moment."""
    quick = {"estimator": "fisher", "points": 0, "formats": ["int2-g64", "int8-channel"], "tokens": 256}
    return study_settings(model, folder, **{**quick, **changes})


def write(folder: Path, file: str = "study.toml", **values: Any) -> Path:
    lines = [f"{name} = {json.dumps(value)}" for name, value in values.items()]
    (folder / file).write_text("\n".join(lines) + "\n", encoding="utf-8")
    return folder / file


class Shell:
    """Runs command lines in this process, in a folder whose database is the default one."""

    def __init__(self, capsys: pytest.CaptureFixture[str]) -> None:
        self._capsys = capsys
        self.out = self.err = ""

    def __call__(self, *words: str | Path) -> int:
        code = run([str(word) for word in words])
        self.out, self.err = self._capsys.readouterr()
        return code


@contextmanager
def command(*words: str, **environment: str) -> Iterator[subprocess.Popen[str]]:
    """A command in a process of its own, that is ended with the body."""
    process = subprocess.Popen(
        [sys.executable, "-m", "mpsearch.cli.main", *words], stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True,
        env={**os.environ, **environment},
    )  # fmt: skip
    try:
        yield process
    finally:
        process.kill()
        process.communicate()


def until(true: Callable[[], Any], patience: float = 60.0) -> None:
    end = time.monotonic() + patience
    while not true():
        assert time.monotonic() < end
        time.sleep(0.02)


@pytest.fixture
def shell(capsys: pytest.CaptureFixture[str], tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[Shell]:
    monkeypatch.chdir(tmp_path)
    before = signal.getsignal(signal.SIGTERM)
    yield Shell(capsys)
    # `mpsearch worker` takes it, as it is alone in its process.
    signal.signal(signal.SIGTERM, before)


@pytest.fixture
def study(small_llama: Path, tmp_path: Path) -> dict[str, Any]:
    return settings(small_llama, tmp_path, storage="sqlite:///mpsearch.db")


def state(name: str = "small") -> str:
    """Where a study of the default database stands; empty when there is none."""
    with SqlStore("mpsearch.db") as store:
        return next((row.state for row in store.control.statuses() if row.name == name), "")
