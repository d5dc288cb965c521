"""``mpsearch worker``: a process that joins a database, or drives one study of it."""

from __future__ import annotations

import math
import os
import signal
import sys
import threading
from datetime import UTC, datetime
from typing import Annotated

import typer

from mpsearch.cli.options import DEFAULT_STORAGE, Storage
from mpsearch.cli.study_list import outcome
from mpsearch.errors import MpsearchError, UsageError


def worker(
    storage: Storage = DEFAULT_STORAGE,
    study: Annotated[str, typer.Option(help="Drive this study, and leave when it has ended.")] = "",
    idle: Annotated[float, typer.Option(help="Leave after so many seconds without work.")] = math.inf,
    workers: Annotated[int, typer.Option(help="With --study: processes that compute.")] = 1,
    executor: Annotated[str, typer.Option(help="With --study: local, ray or database.")] = "local",
    trust_remote_code: Annotated[
        bool, typer.Option("--trust-remote-code", help="Run code that comes with models, where studies say so.")
    ] = False,
    setting: Annotated[list[str] | None, typer.Option("--set", help="Setting of the executor, NAME=VALUE.")] = None,
) -> None:
    """Join a database: do tasks of any study, and drive studies that nobody drives. Ray is not needed.

    Code that comes with a model runs only with --trust-remote-code, with --study as well.

    mpsearch worker --storage postgresql://ann@db.lan/mp

    mpsearch worker --idle 60
    """
    from mpsearch.joining import join

    if study:
        if idle < math.inf:
            raise UsageError("E115", "--idle and --study do not go together: it leaves when the study has ended")
        _drive(study, storage, workers, executor, setting or [], trusts=trust_remote_code)
        return
    if workers != 1 or executor != "local" or setting:
        raise UsageError("E115", "--workers, --executor and --set are for --study", advice="start more such commands")
    told = threading.Event()
    signal.signal(signal.SIGTERM, lambda number, frame: told.set())
    try:
        done = join(storage, stop=told.is_set, idle=idle, told=_say, trusts=trust_remote_code)
    except KeyboardInterrupt:
        sys.stderr.write("left; what was begun is done by others\n")
        raise typer.Exit(130) from None
    sys.stdout.write(f"{done} tasks done\n")


def _drive(name: str, storage: str, workers: int, executor: str, settings: list[str], *, trusts: bool) -> None:
    from mpsearch import registry
    from mpsearch.cli.own_tables import read_settings
    from mpsearch.joining import drive_stored, note_failure
    from mpsearch.working import UntrustedError, check_trust

    # To end the process is to pause the study: what is claimed is given back.
    signal.signal(signal.SIGTERM, signal.default_int_handler)
    with registry.make("stores", "sql", url=storage, create=False) as store:
        try:
            check_trust(name, store.study(name).spec, trusts)
            drive_stored(store, name, storage, workers=workers, executor=executor, settings=read_settings(settings))
        except KeyboardInterrupt:
            # Python would wait for the threads of workers that were ended in the middle.
            _say(f"study '{name}' stopped")
            store.close()
            os._exit(0)
        except UntrustedError as error:
            store.control.log(name, "declined", f"{error.code} {error.message}")
            raise
        except MpsearchError:
            raise
        except Exception as error:
            # Who watches must not wait for what has ended.
            store.control.log(name, "error", f"{type(error).__name__}: {error}")
            note_failure(store, name, f"{type(error).__name__}: {error}")
            raise
        status = store.control.status(name)
    raise typer.Exit(outcome(status))


def _say(text: str) -> None:
    from mpsearch.cli.show import safe

    sys.stderr.write(f"{datetime.now(UTC):%H:%M:%S} {safe(text)}\n")
    sys.stderr.flush()
