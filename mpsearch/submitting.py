"""Handing a study over: to a process of its own, to the workers of a database, or to a Ray cluster."""

from __future__ import annotations

import os
import shlex
import socket
import subprocess
import sys
import threading
import time
from collections.abc import Iterator, Sequence
from pathlib import Path

from mpsearch import registry
from mpsearch.bundled import PREFIX
from mpsearch.errors import InputError, ResourceError, StorageError, UsageError
from mpsearch.keys import content_key
from mpsearch.machine import is_gone
from mpsearch.model.source import LIBRARY
from mpsearch.ports import Store
from mpsearch.records import EventRow, StudyStatus
from mpsearch.spec import StudySpec
from mpsearch.working import TRUSTS

#: States in which nothing more happens by itself.
ENDED = ("complete", "gaps", "failed", "paused", "cancelled")
#: Seconds without a sign of life after which a worker counts as gone.
_SEEN = 30.0


def submit(spec: StudySpec, store: Store, *, background: bool | None = None, offered: bool = True) -> str:
    """Note a study to be run, and see that somebody will; one that is complete stays so.

    Args:
        spec: the question; its ``workers`` and ``executor`` are used by a process started for it.
        store: an open store.
        background: start a process for it on this machine; None: only when no worker has joined the database.
        offered: any worker of the database may drive it; else it waits for the one that is told to.

    Returns:
        Name of the study.

    Raises:
        StorageError: the name has another question (E140), which is not one that had no answer.
        InputError: a database in memory, which nobody else can open (E115); for a process that is started here, a model
            or a text that is not here (E101). The study then takes no name.
        ResourceError: the process cannot be started (E526).
    """
    # The estimators themselves load torch, which takes longer than all the rest.
    if spec.estimator_settings or spec.estimator not in registry.BUILT_IN["estimators"]:
        registry.make("estimators", spec.estimator, **spec.estimator_settings)
    if spec.solver != "auto":
        registry.make("solvers", spec.solver, **spec.solver_settings)
    if not store.shared:
        raise InputError(
            "E115", "a database in memory cannot be opened by others", advice="storage = 'sqlite:///results.db'"
        )
    if offered and background is None:
        background = not any(worker_is_here(store, trusting=spec.trust_remote_code))
    if offered and background:
        _check_here(spec)
    take_name(spec, store)
    if not offered or store.control.status(spec.name).state == "complete":
        return spec.name
    store.control.submit(spec.name, socket.gethostname())
    if background:
        start(spec, store.address)
    return spec.name


def _check_here(spec: StudySpec) -> None:
    """Refuse what a process of this machine cannot read; workers elsewhere may have what it lacks.

    Raises:
        InputError: a model or a text that is not here (E101).
    """
    for path in filter(None, (spec.model, spec.calibration, spec.validation)):
        if not path.startswith((LIBRARY, PREFIX)) and not Path(path).exists():
            raise InputError("E101", f"'{path}' is not on this machine", advice="give another path, or --wait")


def take_name(spec: StudySpec, store: Store) -> None:
    """Give a question its name, also one that was taken by a question without an answer."""
    try:
        store.create_study(spec.name, spec.question())
    except StorageError as error:
        if (
            error.code != "E140"
            or store.control.status(spec.name).state != "failed"
            or store.links(spec.name, "survey")
        ):
            raise
        store.control.drop(spec.name)
        store.create_study(spec.name, spec.question())


def ask(store: Store, name: str, wanted: str) -> None:
    """Ask that a study pauses or is cancelled.

    Args:
        store: an open store.
        name: the study.
        wanted: ``pause`` or ``cancel``.

    Raises:
        StorageError: no such study (E141).
        UsageError: it has ended (E115).
    """
    status = store.control.status(name)
    if status.state in ENDED and (wanted, status.state) != ("cancel", "paused"):
        goes_on = status.state in ("paused", "cancelled", "failed")
        raise UsageError(
            "E115", f"study '{name}' is {status.state}: there is nothing to {wanted}",
            advice=f"mpsearch {'resume' if goes_on else 'show'} {shlex.quote(name)}",
        )  # fmt: skip
    store.control.want(name, wanted)


def worker_is_here(store: Store, trusting: bool = False) -> Iterator[str]:
    """Names of workers that have joined a database, live, and do not drive a study already.

    Args:
        store: an open store.
        trusting: only those that run code that comes with models.
    """
    rows = store.control.workers()
    now = store.control.clock()
    free = (row for row in rows if now - row.seen < _SEEN and not row.doing.startswith("drives "))
    able = (row for row in free if not trusting or row.info.get(TRUSTS) == "True")
    return (row.name for row in able if not is_gone(row.name))


def start(spec: StudySpec, address: str) -> int:
    """Start a process that drives a study, and goes on when this one ends; return its number.

    What it prints goes to the study's log in the database; a failure before that is in a file beside the outputs. It
    runs code that comes with the model if the study says so, for the word of who submits counts here.

    Raises:
        ResourceError: it cannot be started (E526).
    """
    folder = Path(spec.out)
    command = [
        sys.executable,
        "-m",
        "mpsearch.cli.main",
        "worker",
        "--study",
        spec.name,
        "--workers",
        str(spec.workers),
    ]
    if spec.trust_remote_code:
        command.append("--trust-remote-code")
    if spec.executor != "local":
        command += ["--executor", spec.executor]
        for name, value in spec.executor_settings.items():
            command += ["--set", f"{name}={value}"]
    try:
        folder.mkdir(parents=True, exist_ok=True)
        with open(folder / f"{_plain(spec.name)}.log", "wb", opener=_owned) as log:
            # The address may hold a password, which a list of processes would show.
            environment = {**os.environ, "MPSEARCH_STORAGE": address}
            process = subprocess.Popen(
                command, stdin=subprocess.DEVNULL, stdout=log, stderr=log, env=environment, start_new_session=True
            )
    except OSError as error:
        raise ResourceError(
            "E526", f"cannot start a process for study '{spec.name}': {error.strerror}",
            advice=f"mpsearch worker --study {spec.name}",
        ) from error  # fmt: skip
    # Somebody must take note of its end, or its number stays taken for as long as this process lives.
    threading.Thread(target=process.wait, daemon=True).start()
    return process.pid


def _owned(path: str, flags: int) -> int:
    return os.open(path, flags, 0o600)


def _plain(name: str) -> str:
    """What a file of a study can be called: no two studies share one."""
    found = "".join(c if c.isalnum() or c in "-_." else "_" for c in name).strip(".")[:60]
    return found if found == name else f"{found}-{content_key(name)[:8]}"


def watch(store: Store, name: str, every: float = 0.5) -> Iterator[tuple[StudyStatus, Sequence[EventRow]]]:
    """Yield what a study does, and its new log lines, until it has ended.

    Args:
        store: an open store.
        name: the study.
        every: seconds between two looks.
    """
    after = 0
    while True:
        status = store.control.status(name)
        lines = store.control.lines(name, after)
        after = lines[-1].id if lines else after
        yield status, lines
        if status.state in ENDED:
            return
        time.sleep(every)
