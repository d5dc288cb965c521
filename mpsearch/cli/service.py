"""Commands for studies that run elsewhere: submit, watch, pause, cancel, logs."""

from __future__ import annotations

import json
import re
import shlex
import sys
import time
from dataclasses import asdict
from datetime import UTC, datetime
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import typer

from mpsearch.cli.options import (
    DEFAULT_STORAGE,
    Json,
    Storage,
    StudyStorage,
    Workers,
    check_name,
    print_json,
    storage_option,
)
from mpsearch.cli.study_list import outcome

if TYPE_CHECKING:
    from mpsearch.records import EventRow, StudyStatus

#: Seconds after which a study that nobody drives is told of.
_ALONE = 5.0
#: Of what was stopped before its end, for that is no failure either.
_STOPPED = ("paused", "cancelled")


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
    as_json: Json = False,
) -> None:
    """Hand a study over and return at once: to workers of the database, or to a process of its own.

    mpsearch submit study.toml

    mpsearch submit study.toml --storage postgresql://ann@db.lan/mp

    mpsearch submit study.toml --ray http://127.0.0.1:8265
    """
    from mpsearch import registry
    from mpsearch.spec import StudySpec
    from mpsearch.submitting import submit as hand_over

    check_name(name)
    given = {"storage": storage, "name": name, "workers": workers}
    spec = StudySpec.load(what, **{key: value for key, value in given.items() if value is not None})
    with registry.make("stores", "sql", url=spec.storage) as store:
        if ray:
            from mpsearch.executors.ray import check_shown, submit_job

            check_shown(spec.name, store.address)
        # A Ray job drives it, and nobody else.
        hand_over(spec, store, background=False if wait else None, offered=not ray)
        address, status = store.address, store.control.status(spec.name)
    job = ""
    if ray:
        trusts = spec.trust_remote_code
        job = submit_job(ray, spec.name, address, spec.workers, working_dir, requirements, trusts)
    after = f"mpsearch watch {shlex.quote(spec.name)}{storage_option(spec.storage)}"
    if as_json:
        print_json({**asdict(status), "job": job, "next": after})
        return
    if job:
        sys.stdout.write(f"job     {job}\n")
    sys.stdout.write(f"study   {spec.name}\nnext    {after}\n")


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
                    print_json({**asdict(status), "lines": [asdict(line) for line in lines]})
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
        why = status.reason or ("stopped before its end; what was computed is kept" if status.state in _STOPPED else "")
        sys.stdout.write(f"{status.state}{': ' + safe(why) if why else ''}\n")
        _hint(status, storage)
    raise typer.Exit(outcome(status))


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


def _clock(seconds: float) -> str:
    return f"{datetime.fromtimestamp(seconds, UTC):%H:%M:%S}"


def pause(
    name: Annotated[str, typer.Argument(help="Name of the study.")],
    storage: Storage = DEFAULT_STORAGE,
    as_json: Json = False,
) -> None:
    """Have a study stop after the tasks in hand; `mpsearch resume` goes on with it.

    mpsearch pause tiny-llama
    """
    _want(name, storage, "pause", as_json)


def cancel(
    name: Annotated[str, typer.Argument(help="Name of the study.")],
    storage: Storage = DEFAULT_STORAGE,
    as_json: Json = False,
) -> None:
    """Have a study stop for good; what was computed stays.

    mpsearch cancel tiny-llama
    """
    _want(name, storage, "cancel", as_json)


def _want(name: str, storage: str, wanted: str, as_json: bool) -> None:
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
    if as_json:
        print_json(asdict(status))
        return
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
