"""What the commands share: options, opening a stored study, writing commands to copy."""

from __future__ import annotations

import json
import os
import shlex
import sys
from contextvars import ContextVar
from typing import TYPE_CHECKING, Annotated, Any

import typer

from mpsearch.errors import UsageError
from mpsearch.logs import without_password

if TYPE_CHECKING:
    from mpsearch.studying import Study

#: Whether an error shows its traceback.
DEBUG: ContextVar[bool] = ContextVar("debug", default=False)

DEFAULT_STORAGE = "sqlite:///mpsearch.db"
#: Where commands find the database that none is named for: its address may hold a password.
STORAGE_VARIABLE = "MPSEARCH_STORAGE"
Storage = Annotated[str, typer.Option(envvar=STORAGE_VARIABLE, help="Results database: a path or URL.")]
#: The same, where a study file may name one.
StudyStorage = Annotated[str | None, typer.Option(envvar=STORAGE_VARIABLE, help="Results database: a path or URL.")]
Json = Annotated[bool, typer.Option("--json", help="Print JSON.")]
Quiet = Annotated[bool, typer.Option("--quiet", "-q", help="No progress.")]
Budgets = Annotated[
    list[str] | None, typer.Option("--budget", "-b", help="Such as 'weights <= 4.25 bits'; give it again for more.")
]
Workers = Annotated[int | None, typer.Option(help="Processes that compute; all cores, at most 4, by default.")]


def plain(text: str) -> str:
    """Take control characters out of a text of several lines."""
    from mpsearch.cli.show import safe

    return "\n".join(safe(line) for line in text.splitlines())


def check_name(name: str | None) -> None:
    """Refuse an empty name of a study, which would quietly become that of the model.

    Raises:
        UsageError: it is empty (E115).
    """
    if name is not None and not name.strip():
        raise UsageError("E115", "--name is empty", advice="give a name, or leave --name out for the model's own")


def print_json(values: Any) -> None:
    """Print one JSON value on one line, for programs that read a command's answer."""
    sys.stdout.write(json.dumps(values) + "\n")
    sys.stdout.flush()


def worker_count(asked: int | None) -> int:
    """Workers to use: as many as asked for, else all cores up to 4."""
    return asked if asked is not None else min(os.cpu_count() or 1, 4)


def storage_option(storage: str) -> str:
    """The option that names a database, for a command to copy; empty for the one that is used without.

    It never holds a password, which ``~/.pgpass`` or the variable has.
    """
    if storage == (os.environ.get(STORAGE_VARIABLE) or DEFAULT_STORAGE):
        return ""
    return f" --storage {shlex.quote(without_password(storage))}"


def open_study(name: str, storage: str, read_only: bool = False) -> Study:
    """Open a stored study by name."""
    from mpsearch import registry
    from mpsearch.spec import StudySpec
    from mpsearch.studying import Study

    store = registry.make("stores", "sql", url=storage, create=False, read_only=read_only)
    row = store.study(name)
    return Study(StudySpec.from_question(row.spec, storage), store)
