"""``mpsearch db``: the results database brought up to date, checked, rescued, tidied and joined with others."""

from __future__ import annotations

import json
import shlex
import sys
from pathlib import Path
from typing import Annotated, Any

import typer

from mpsearch.cli.bundle import StripCode
from mpsearch.cli.options import DEFAULT_STORAGE, STORAGE_VARIABLE, Json, storage_option
from mpsearch.errors import StorageError, UsageError

app = typer.Typer(name="db", help="Look after a results database.", no_args_is_help=True)

Where = Annotated[str, typer.Argument(envvar=STORAGE_VARIABLE, help="Results database: a path or URL.")]
_SHOWN = 50


@app.command()
def upgrade(storage: Where = DEFAULT_STORAGE, as_json: Json = False) -> None:
    """Bring a database to the newest schema; an SQLite file is copied first.

    mpsearch db upgrade results.db
    """
    from mpsearch import registry

    found = registry.load("upkeep", "look")(storage)
    copy = ""
    if found.schema < found.newest:
        copy = registry.load("upkeep", "backup")(storage)
    with registry.make("stores", "sql", url=storage, create=False):
        pass
    if as_json:
        sys.stdout.write(
            json.dumps({"before": found.schema, "now": max(found.schema, found.newest), "copy": copy}) + "\n"
        )
        return
    if found.schema == found.newest:
        sys.stdout.write(f"{found.shown} has schema {found.schema} already; nothing was changed\n")
        return
    sys.stdout.write(f"{found.shown}: schema {found.schema} -> {found.newest}\n")
    kept = copy or "none was made: a server is copied by pg_dump"
    sys.stdout.write(f"copy    {kept}\n")


@app.command()
def check(storage: Where = DEFAULT_STORAGE, as_json: Json = False) -> None:
    """Say everything that is wrong with a database: structure, JSON, keys, links, tasks. Exit 6 if anything is.

    mpsearch db check results.db
    """
    from mpsearch import registry
    from mpsearch.bundles.kinds import key_of
    from mpsearch.cli.show import safe

    with registry.make("stores", "sql", url=storage, create=False, read_only=_is_file(storage)) as store:
        faults, noted = registry.load("upkeep", "check")(store, key_of)
    if as_json:
        entries = [{"what": x.what, "where": x.where, "why": x.why} for x in faults]
        sys.stdout.write(json.dumps({"faults": entries, "conflicts": noted}) + "\n")
    else:
        for fault in faults[:_SHOWN]:
            sys.stdout.write(f"{fault.what:<10} {safe(fault.where)}: {safe(fault.why)}\n")
        if noted:
            sys.stdout.write(f"{noted} conflicts are noted: values that came out otherwise a second time\n")
    if faults:
        raise StorageError(
            "E604",
            f"{len(faults)} thing{'s are' if len(faults) > 1 else ' is'} wrong with '{store.place.name}'",
            because=f"{faults[0].where}: {faults[0].why}",
            advice=_how_to_mend(storage),
        )
    if not as_json:
        sys.stdout.write(f"fine: {store.place.shown}\n")


def _is_file(storage: str) -> bool:
    return not storage.startswith("postgres")


def _how_to_mend(storage: str) -> str:
    if not _is_file(storage):
        return "go back to a copy"
    path = shlex.quote(storage.removeprefix("sqlite:///"))
    return f"mpsearch db rescue {path} rescued.db takes what is whole into a new database"


@app.command()
def rescue(
    file: Annotated[Path, typer.Argument(help="The damaged SQLite file; it stays as it is.")],
    out: Annotated[Path, typer.Argument(help="File of the new database.")],
    as_json: Json = False,
) -> None:
    """Take what can be read of a damaged file, row by row, into a new database.

    mpsearch db rescue results.db rescued.db
    """
    from mpsearch import registry
    from mpsearch.bundles.kinds import key_of
    from mpsearch.cli.show import safe

    found = registry.load("upkeep", "rescue")(file, out, key_of)
    if as_json:
        body = {"whole": found.whole, "rows": dict(found.rows), "lost": list(found.lost)}
        sys.stdout.write(json.dumps(body) + "\n")
        return
    if found.whole:
        sys.stdout.write(f"{safe(str(file))} is not damaged; {safe(str(out))} is a copy of it\n")
    for table, count in found.rows.items():
        if count:
            sys.stdout.write(f"{table:<10} {count:>9,} rows\n")
    for line in found.lost:
        sys.stdout.write(f"lost       {safe(line)}\n")
    sys.stdout.write(f"next       mpsearch show --storage {shlex.quote(str(out))}\n")


@app.command()
def gc(
    storage: Where = DEFAULT_STORAGE,
    dry_run: Annotated[bool, typer.Option("--dry-run", help="Only say what would go.")] = False,
    days: Annotated[float, typer.Option(help="Values must be as old as this, in days.")] = 7.0,
    log_days: Annotated[float, typer.Option(help="Lines of logs must be as old as this, in days.")] = 30.0,
    shrink: Annotated[bool, typer.Option("--shrink", help="Give the freed space of a file back to the disk.")] = False,
    as_json: Json = False,
) -> None:
    """Take out what no study needs: unnamed values, tasks of finished studies, old lines of logs, workers long gone.

    mpsearch db gc results.db --dry-run
    """
    from mpsearch import registry
    from mpsearch.cli.show import safe

    # A comparison with NaN is false.
    if not (days >= 0 and log_days >= 0):
        raise UsageError("E113", "--days and --log-days are numbers from 0", advice="--days 7")
    read_only = dry_run and _is_file(storage)
    with registry.make("stores", "sql", url=storage, create=False, read_only=read_only) as store:
        found = registry.load("upkeep", "gc")(store, dry_run=dry_run, days=days, log_days=log_days, shrink=shrink)
    if as_json:
        sys.stdout.write(json.dumps({"dry_run": dry_run, **found.to_json()}) + "\n")
        return
    for kind, count in found.values.items():
        sys.stdout.write(f"{safe(kind):<16} {count:>9,} values\n")
    for what in ("cells", "tasks", "events", "workers"):
        if count := getattr(found, what):
            sys.stdout.write(f"{what:<16} {count:>9,} rows\n")
    if found.kept_for:
        names = ", ".join(safe(name) for name in found.kept_for[:4])
        sys.stdout.write(f"values and cells all stay: not finished is {names}\n")
    gone = "would go" if dry_run else "are gone"
    sys.stdout.write(f"{found.total:,} rows {gone}\n")


@app.command()
def stats(storage: Where = DEFAULT_STORAGE, as_json: Json = False) -> None:
    """Say what fills a database: rows, bytes, studies, oldest value, largest kinds.

    mpsearch db stats results.db
    """
    from mpsearch import registry
    from mpsearch.cli.show import safe

    with registry.make("stores", "sql", url=storage, create=False, read_only=_is_file(storage)) as store:
        found: dict[str, Any] = registry.load("upkeep", "stats")(store)
    if as_json:
        sys.stdout.write(json.dumps(found, indent=1) + "\n")
        return
    sys.stdout.write(f"{safe(found['database'])}: {found['bytes']:,} bytes, schema {found['schema']}\n")
    studies = ", ".join(f"{count} {state}" for state, count in found["studies"].items()) or "none"
    sys.stdout.write(f"studies    {studies}\n")
    if found["oldest"]:
        sys.stdout.write(f"values     from {safe(found['oldest'])} to {safe(found['newest'])}\n")
    for table, count in found["rows"].items():
        sys.stdout.write(f"{table:<10} {count:>9,} rows\n")
    for entry in found["kinds"][:8]:
        sys.stdout.write(
            f"  {safe(entry['kind']):<14} {entry['rows']:>9,} values {entry['characters']:>13,} characters\n"
        )


@app.command()
def merge(
    other: Annotated[str, typer.Argument(help="The database that is read.")],
    into: Annotated[str, typer.Option(envvar=STORAGE_VARIABLE, help="The database that is written.")] = DEFAULT_STORAGE,
    rename: Annotated[list[str] | None, typer.Option("--as", help="OLD=NEW name of a study; again for more.")] = None,
    strip_remote_code: StripCode = False,
    as_json: Json = False,
) -> None:
    """Take over all studies and values of another database, or nothing.

    mpsearch db merge theirs.db --into results.db --as tiny-llama=theirs
    """
    from mpsearch.bundles.sharing import merge as take_over
    from mpsearch.cli.show import safe

    names = {}
    for text in rename or ():
        old, equals, new = text.partition("=")
        if not (old and equals and new):
            raise UsageError("E115", f"--as '{text}' is not OLD=NEW", advice="--as tiny-llama=theirs")
        names[old] = new
    found = take_over(other, into, names=names, strip_remote_code=strip_remote_code)
    if as_json:
        body = {"studies": list(found.studies), "values": found.values, "cells": found.cells}
        sys.stdout.write(json.dumps(body) + "\n")
        return
    sys.stdout.write(f"studies  {', '.join(map(safe, found.studies)) or 'none'}\n")
    sys.stdout.write(f"new      {found.values:,} values, {found.cells:,} cells\n")
    sys.stdout.write(f"next     mpsearch show{storage_option(into)}\n")
