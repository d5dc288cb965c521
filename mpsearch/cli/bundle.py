"""``mpsearch bundle`` and ``unbundle``: a study as one file that can be sent."""

from __future__ import annotations

import json
import shlex
import sys
from pathlib import Path
from typing import Annotated

import typer

from mpsearch.cli.options import DEFAULT_STORAGE, Json, Storage, storage_option
from mpsearch.errors import UsageError

StripCode = Annotated[
    bool,
    typer.Option("--strip-remote-code", help="Take a study that would run the model's own code as one that does not."),
]

_TRUST = "trust   surveys, scores and measurements are the sender's word; studies here will take them as known\n"


def bundle(
    name: Annotated[str, typer.Argument(help="Name of the study.")],
    out: Annotated[Path, typer.Argument(help="File to write, such as study.mps.")],
    storage: Storage = DEFAULT_STORAGE,
    strip_paths: Annotated[
        bool, typer.Option("--strip-paths", help="Of the model's folder and of files keep only the last name.")
    ] = False,
    force: Annotated[bool, typer.Option("--force", help="Replace the file if it is there.")] = False,
    as_json: Json = False,
) -> None:
    """Write a study to one file: question, scores, costs, plans, measurements, where they are from.

    mpsearch bundle tiny-llama tiny-llama.mps
    """
    from mpsearch.bundles.sharing import bundle as write

    if str(out) == "-":
        raise UsageError(
            "E115", "a bundle is a zip file, which is not written to standard output",
            advice=f"name a file: mpsearch bundle {shlex.quote(name)} {shlex.quote(f'{name}.mps')}",
        )  # fmt: skip
    path = write(name, out, storage, strip_paths=strip_paths, force=force)
    size = path.stat().st_size
    if as_json:
        sys.stdout.write(json.dumps({"bundle": str(path), "bytes": size}) + "\n")
        return
    sys.stdout.write(
        f"bundle  {path} ({size:,} bytes)\nnext    mpsearch unbundle {shlex.quote(str(path))} --storage there.db\n"
    )


def unbundle(
    file: Annotated[Path, typer.Argument(help="The bundle.")],
    storage: Storage = DEFAULT_STORAGE,
    name: Annotated[str, typer.Option("--as", help="What to call the study here.")] = "",
    strip_remote_code: StripCode = False,
    as_json: Json = False,
) -> None:
    """Read a bundle into a database, all of it or nothing; show, solve and export then need no model.

    mpsearch unbundle tiny-llama.mps --as theirs
    """
    from mpsearch.bundles.sharing import unbundle as read
    from mpsearch.cli.show import safe

    found = read(file, storage, name=name, strip_remote_code=strip_remote_code)
    if as_json:
        body = {"studies": list(found.studies), "values": found.values, "cells": found.cells}
        sys.stdout.write(json.dumps(body) + "\n")
        return
    for study in found.studies:
        sys.stdout.write(f"study   {safe(study)}: {found.values} values and {found.cells} cells were new\n")
        sys.stdout.write(f"next    mpsearch show {shlex.quote(safe(study))}{storage_option(storage)}\n")
    sys.stdout.write(_TRUST)
