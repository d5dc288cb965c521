"""Commands for studies that run elsewhere: submit, worker, watch, pause, cancel, logs."""

from __future__ import annotations

import json
import math
import os
import re
import shlex
import signal
import sys
import threading
import time
from dataclasses import asdict
from datetime import UTC, datetime
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import typer

from mpsearch.cli.options import DEFAULT_STORAGE, Json, Storage, StudyStorage, Workers, storage_option
from mpsearch.errors import MpsearchError

if TYPE_CHECKING:
    from mpsearch.records import EventRow, StudyStatus

#: Seconds after which a study that nobody drives is told of.
_ALONE = 5.0
_EXIT = {"complete": 0, "gaps": 5, "failed": 3, "paused": 0, "cancelled": 0}


def submit(
    what: Annotated[Path, typer.Argument(help="A study file (.toml).")],
    storage: StudyStorage = None,
    name: Annotated[str | None, typer.Option(help="Name of the study.")] = None,
    workers: Workers = None,
    ray: Annotated[str, typer.Option(help="Address of a Ray cluster's dashboard, to run it there as a job.")] = "",
    working_dir: Annotated[Path | None, typer.Option(help="With --ray: folder that goes along.")] = None,
    requirements: Annotated[
        Path | None, typer.Option(help="With --ray: packages of the job (requirements.txt).")
    ] = None,
    wait: Annotated[bool, typer.Option("--wait", help="Only note it; workers of the database will find it.")] = False,
) -> None:
    """Hand a study over and return at once: to workers of the database, or to a process of its own.

    mpsearch submit study.toml

    mpsearch submit study.toml --storage postgresql://ann@db.lan/mp

    mpsearch submit study.toml --ray http://127.0.0.1:8265
    """
    from mpsearch import registry
    from mpsearch.spec import StudySpec
    from mpsearch.submitting import submit as hand_over

    given = {"storage": storage, "name": name, "workers": workers}
    spec = StudySpec.load(what, **{key: value for key, value in given.items() if value is not None})
    with registry.make("stores", "sql", url=spec.storage) as store:
        if ray:
            from mpsearch.executors.ray import check_shown, submit_job

            check_shown(spec.name, store.address)
        # A Ray job drives it, and nobody else.
        hand_over(spec, store, background=False if wait else None, offered=not ray)
        address = store.address
    if ray:
        job = submit_job(ray, spec.name, address, spec.workers, working_dir, requirements)
        sys.stdout.write(f"job     {job}\n")
    _next(spec.name, spec.storage)


def _next(name: str, storage: str) -> None:
    option = storage_option(storage)
    sys.stdout.write(f"study   {name}\nnext    mpsearch watch {shlex.quote(name)}{option}\n")


def worker(
    storage: Storage = DEFAULT_STORAGE,
    study: Annotated[str, typer.Option(help="Drive this study, and leave when it has ended.")] = "",
    idle: Annotated[float, typer.Option(help="Leave after so many seconds without work.")] = math.inf,
    workers: Annotated[int, typer.Option(help="With --study: processes that compute.")] = 1,
    executor: Annotated[str, typer.Option(help="With --study: local, ray or database.")] = "local",
    setting: Annotated[list[str] | None, typer.Option("--set", help="Setting of the executor, NAME=VALUE.")] = None,
) -> None:
    """Join a database: do tasks of any study, and drive studies that nobody drives. Ray is not needed.

    mpsearch worker --storage postgresql://ann@db.lan/mp

    mpsearch worker --idle 60
    """
    from mpsearch.joining import join

    if study:
        _drive(study, storage, workers, executor, setting or [])
        return
    told = threading.Event()
    signal.signal(signal.SIGTERM, lambda number, frame: told.set())
    try:
        done = join(storage, stop=told.is_set, idle=idle, told=_say)
    except KeyboardInterrupt:
        sys.stderr.write("left; what was begun is done by others\n")
        raise typer.Exit(130) from None
    sys.stdout.write(f"{done} tasks done\n")


def _drive(name: str, storage: str, workers: int, executor: str, settings: list[str]) -> None:
    from mpsearch import registry
    from mpsearch.cli.own_tables import read_settings
    from mpsearch.joining import drive_stored

    # To end the process is to pause the study: what is claimed is given back.
    signal.signal(signal.SIGTERM, signal.default_int_handler)
    with registry.make("stores", "sql", url=storage, create=False) as store:
        try:
            drive_stored(store, name, storage, workers=workers, executor=executor, settings=read_settings(settings))
        except KeyboardInterrupt:
            # Python would wait for the threads of workers that were ended in the middle.
            _say(f"study '{name}' stopped")
            store.close()
            os._exit(0)
        except MpsearchError:
            raise
        except Exception as error:
            # Who watches must not wait for what has ended.
            store.control.log(name, "error", f"{type(error).__name__}: {error}")
            if store.control.status(name).state == "submitted":
                store.set_state(name, "failed")
            raise
        state = store.study(name).state
    raise typer.Exit(_EXIT.get(state, 0))


def _say(text: str) -> None:
    from mpsearch.cli.show import safe

    sys.stderr.write(f"{datetime.now(UTC):%H:%M:%S} {safe(text)}\n")
    sys.stderr.flush()


def watch(
    name: Annotated[str, typer.Argument(help="Name of the study.")],
    storage: Storage = DEFAULT_STORAGE,
    as_json: Json = False,
) -> None:
    """Follow a study until it ends; Ctrl-C leaves it running.

    mpsearch watch tiny-llama
    """
    from mpsearch import registry
    from mpsearch.cli.progress import Progress
    from mpsearch.cli.show import safe
    from mpsearch.submitting import watch as follow

    progress, status, told, started = Progress(as_json), None, False, time.monotonic()
    with registry.make("stores", "sql", url=storage, create=False) as store:
        try:
            for status, lines in follow(store, name):
                if as_json:
                    _print_json(status, lines)
                    continue
                for line in lines:
                    progress.end()
                    sys.stdout.write(f"{_clock(line.time)} {line.kind:<8} {safe(line.text)}\n")
                if status.state == "running":
                    progress(status.phase, status.done, status.total)
                if not told and status.state in ("submitted", "interrupted") and time.monotonic() - started > _ALONE:
                    told = True
                    progress.end()
                    _alone(status, store, storage)
        except KeyboardInterrupt:
            progress.end()
            does = "goes on" if status is not None and status.state == "running" else "is left as it is"
            again = f"mpsearch watch {shlex.quote(name)}{storage_option(storage)}"
            sys.stderr.write(f"study '{safe(name)}' {does}; {again} shows it again\n")
            raise typer.Exit(130) from None
    progress.end()
    assert status is not None
    if not as_json:
        sys.stdout.write(f"{status.state}{': ' + safe(status.reason) if status.reason else ''}\n")
        _hint(status, storage)
    raise typer.Exit(_EXIT[status.state])


def _alone(status: StudyStatus, store: Any, storage: str) -> None:
    """Say so when nobody is there to drive a study."""
    from mpsearch.submitting import worker_is_here

    if any(worker_is_here(store)):
        return
    what = "its process is gone" if status.state == "interrupted" else "nobody has taken it on yet"
    option = storage_option(storage)
    sys.stdout.write(
        f"{status.state}: {what}\nnext    mpsearch resume {shlex.quote(status.name)}{option}, "
        f"or have a worker join: mpsearch worker{option}\n"
    )
    sys.stdout.flush()


def _hint(status: StudyStatus, storage: str) -> None:
    code = status.reason.partition(" ")[0]
    if status.state == "failed" and re.fullmatch(r"E\d{3}", code):
        sys.stdout.write(f"next    mpsearch explain {code}\n")
        return
    verb = "show" if status.state in ("complete", "gaps") else "resume"
    sys.stdout.write(f"next    mpsearch {verb} {shlex.quote(status.name)}{storage_option(storage)}\n")


def _print_json(status: StudyStatus, lines: Any) -> None:
    sys.stdout.write(json.dumps({**asdict(status), "lines": [asdict(line) for line in lines]}) + "\n")
    sys.stdout.flush()


def _clock(seconds: float) -> str:
    return f"{datetime.fromtimestamp(seconds, UTC):%H:%M:%S}"


def pause(name: Annotated[str, typer.Argument(help="Name of the study.")], storage: Storage = DEFAULT_STORAGE) -> None:
    """Have a study stop after the tasks in hand; `mpsearch resume` goes on with it.

    mpsearch pause tiny-llama
    """
    _want(name, storage, "pause")


def cancel(name: Annotated[str, typer.Argument(help="Name of the study.")], storage: Storage = DEFAULT_STORAGE) -> None:
    """Have a study stop for good; what was computed stays.

    mpsearch cancel tiny-llama
    """
    _want(name, storage, "cancel")


def _want(name: str, storage: str, wanted: str) -> None:
    from mpsearch import registry
    from mpsearch.submitting import ENDED, ask

    with registry.make("stores", "sql", url=storage, create=False) as store:
        status = store.control.status(name)
        before = status.state
        ask(store, name, wanted)
        until = time.monotonic() + 30.0
        while (status.state not in ENDED or status.state == before) and time.monotonic() < until:
            time.sleep(0.1)
            status = store.control.status(name)
    sys.stdout.write(f"{status.state if status.state in ENDED else 'asked; it stops after the tasks in hand'}\n")


def logs(
    name: Annotated[str, typer.Argument(help="Name of the study.")],
    storage: Storage = DEFAULT_STORAGE,
    as_json: Json = False,
) -> None:
    """Print what a study said: phases, notices, errors, workers that left.

    mpsearch logs tiny-llama
    """
    from mpsearch import registry
    from mpsearch.cli.show import safe

    with registry.make("stores", "sql", url=storage, create=False, read_only=True) as store:
        lines: list[EventRow] = []
        while page := store.control.lines(name, lines[-1].id if lines else 0):
            lines += page
    if as_json:
        sys.stdout.write(json.dumps([asdict(line) for line in lines], indent=1) + "\n")
        return
    for line in lines:
        moment = datetime.fromtimestamp(line.time, UTC)
        sys.stdout.write(f"{moment:%Y-%m-%d %H:%M:%S} {line.kind:<8} {safe(line.text)}\n")
