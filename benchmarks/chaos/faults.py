"""The n-th call that needs the disk fails, for every n until none does: one message each time, and nothing is lost."""

from __future__ import annotations

import contextlib
import errno
import io
import os
import re
import sqlite3
import subprocess
import sys
from collections import Counter
from collections.abc import Callable, Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any

from sqlalchemy import Engine, event

import mpsearch.files
from benchmarks.chaos.fake import VARIABLE
from benchmarks.chaos.lab import Lab
from mpsearch import registry

#: What the system calls fail with, and what SQLite makes of it.
ERRORS = {
    errno.ENOSPC: sqlite3.SQLITE_FULL,
    errno.EIO: sqlite3.SQLITE_IOERR,
    errno.EMFILE: sqlite3.SQLITE_CANTOPEN,
    errno.EACCES: sqlite3.SQLITE_READONLY,
}
#: First lines of error blocks.
_BLOCK = re.compile(r"^\W*(?:error\W+)?[E]\d{3}\b", re.MULTILINE)


class Faults:
    """Counts calls, and has one of them fail, as well as all that follow if asked.

    Attributes:
        calls: how many there were.
    """

    def __init__(self, number: int, error: int) -> None:
        self.calls = 0
        self._number, self._error = number, error

    def point(self) -> None:
        """Be called.

        Raises:
            OSError: it is this one's turn.
        """
        self.calls += 1
        if self.calls == self._number:
            raise OSError(self._error, os.strerror(self._error))

    def commit(self, connection: object) -> None:
        """Be a commit.

        Raises:
            sqlite3.OperationalError: it is this one's turn.
        """
        try:
            self.point()
        except OSError as error:
            failure = sqlite3.OperationalError(f"disk: {error.strerror}")
            failure.sqlite_errorcode = ERRORS[self._error]
            raise failure from None


class _System:
    """The module `os`, some of whose functions may fail."""

    def __init__(self, faults: Faults) -> None:
        self._faults = faults

    def __getattr__(self, name: str) -> Any:
        return getattr(os, name)

    def fsync(self, descriptor: int) -> None:
        self._faults.point()
        os.fsync(descriptor)

    def replace(self, source: str, target: Path) -> None:
        self._faults.point()
        os.replace(source, target)

    def open(self, path: Any, flags: int) -> int:
        self._faults.point()
        return os.open(path, flags)

    def fdopen(self, descriptor: int, mode: str) -> Any:
        stream = os.fdopen(descriptor, mode)
        write = stream.write

        def failing(content: bytes) -> int:
            self._faults.point()
            return write(content)

        stream.write = failing  # type: ignore[method-assign,assignment]
        return stream


@contextlib.contextmanager
def failing(number: int, error: int) -> Iterator[Faults]:
    """Have the n-th call that needs the disk fail inside the block."""
    faults = Faults(number, error)
    setattr(mpsearch.files, "os", _System(faults))  # noqa: B010
    event.listen(Engine, "commit", faults.commit)
    try:
        yield faults
    finally:
        event.remove(Engine, "commit", faults.commit)
        setattr(mpsearch.files, "os", os)  # noqa: B010


@contextlib.contextmanager
def here(lab: Lab) -> Iterator[Callable[[], tuple[int, str]]]:
    """Have the fake model in this process; gives what runs the study, and returns its exit code and what it said."""
    from mpsearch.cli.main import run

    before = {kind: dict(registry.BUILT_IN[kind]) for kind in ("work", "estimators")}
    registry.BUILT_IN["work"]["workbench"] = "benchmarks.chaos.fake:Cells"  # type: ignore[index]
    registry.BUILT_IN["estimators"]["chaos"] = "benchmarks.chaos.fake:Chaos"  # type: ignore[index]
    os.environ[VARIABLE] = str(lab.settings)

    def once() -> tuple[int, str]:
        said = io.StringIO()
        command = lab.command()[3:]
        with contextlib.redirect_stderr(said), contextlib.redirect_stdout(io.StringIO()):
            code = run(command)
        return code, said.getvalue()

    try:
        yield once
    finally:
        del os.environ[VARIABLE]
        for kind, names in before.items():
            registry.BUILT_IN[kind].clear()  # type: ignore[attr-defined]
            registry.BUILT_IN[kind].update(names)  # type: ignore[attr-defined]


def untroubled(folder: Path) -> Mapping[str, str]:
    """What the small study leaves when nothing fails."""
    calm = make(folder)
    with here(calm) as run:
        assert run()[0] == 0
    return calm.outcome()


def fail_each(folder: Path, error: int, calm: Mapping[str, str], *, first: int = 1, step: int = 1) -> Counter[str]:
    """Run a small study with a fault at the n-th call, for every n, each time to its end afterwards.

    Args:
        folder: for the labs.
        error: number of the system's error.
        calm: what an untroubled run leaves.
        first: the first n.
        step: from one n to the next.
    """
    found: Counter[str] = Counter()
    number = first
    while True:
        lab = make(folder / f"{number}")
        with here(lab) as run:
            with failing(number, error) as faults:
                code, said = run()
            found["faults"] += faults.calls >= number
            found.update(_judged(lab, code, said, reached=faults.calls >= number))
            if code != 0:
                found["did not resume"] += run()[0] != 0
            found.update(lab.check(calm, kills=1, workers=1))
        if faults.calls < number:
            return found
        number += step


def make(folder: Path) -> Lab:
    """A study of a dozen results."""
    return Lab.make(
        folder, layers=3, formats=("int2-g64", "int4-g64", "int8-g64"), points=1, least=0.0, most=0.0,
        executor=("--workers", "1"),
    )  # fmt: skip


def _judged(lab: Lab, code: int, said: str, *, reached: bool) -> dict[str, int]:
    connection = sqlite3.connect(lab.storage)
    try:
        intact = connection.execute("PRAGMA integrity_check").fetchone() == ("ok",)
    finally:
        connection.close()
    blocks = len(_BLOCK.findall(said))
    wrong = {
        "other code": code not in ((0, 6, 7) if reached else (0,)),
        "no single message": blocks != (code != 0),
        "traceback": "Traceback" in said,
        "damaged": not intact,
    }
    if any(wrong.values()):
        sys.stderr.write(f"{lab.folder.name}: {code}, {said[-800:]}\n")
    return {name: int(is_wrong) for name, is_wrong in wrong.items()} | {"went on": int(reached and code == 0)}


def fill_disk(folder: Path, calm: Mapping[str, str], limits: Sequence[int] = range(16, 640, 48)) -> Counter[str]:
    """Run a study whose files may not grow beyond a limit, and again without it.

    Args:
        folder: for the labs.
        calm: what an untroubled run leaves.
        limits: 1,024 bytes that a file may have.
    """
    found: Counter[str] = Counter()
    for limit in limits:
        lab = make(folder / f"limit-{limit}")
        shell = ["bash", "-c", f'ulimit -f {limit}; exec "$@"', "-", *lab.command()]
        done = subprocess.run(shell, env=lab.environment, cwd=lab.folder, capture_output=True, text=True, check=False)
        found["limits"] += 1
        found["full"] += done.returncode != 0
        found.update(_judged(lab, done.returncode, done.stderr, reached=True))
        if done.returncode:
            lab.finish()
        found.update(lab.check(calm, kills=1, workers=1))
    return found
