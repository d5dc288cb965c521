"""``mpsearch doctor``: what this machine has for a study, and what to do about what is missing."""

from __future__ import annotations

import json
import sys
from typing import Annotated

import typer

from mpsearch.cli.options import STORAGE_VARIABLE, Json
from mpsearch.errors import ResourceError


def doctor(
    storage: Annotated[
        str, typer.Option(envvar=STORAGE_VARIABLE, help="Results database to look at as well: a path or URL.")
    ] = "",
    as_json: Json = False,
) -> None:
    """Look at versions, disk, memory, threads, database, Ray and kernels; each line is ok, warn or fail.

    mpsearch doctor --storage results.db
    """
    from mpsearch.cli.show import safe
    from mpsearch.examining import examine

    lines = list(examine(storage))
    if as_json:
        sys.stdout.write(json.dumps([line.to_json() for line in lines], indent=1) + "\n")
    else:
        for line in lines:
            sys.stdout.write(f"{line.state:<5} {line.what:<13} {safe(line.found)}\n")
            if line.fix:
                sys.stdout.write(f"      {'':<13} -> {safe(line.fix)}\n")
    failed = [line for line in lines if line.state == "fail"]
    if failed:
        raise ResourceError(
            "E710",
            f"{len(failed)} of {len(lines)} things would stop a study",
            because=failed[0].found,
            advice=failed[0].fix,
        )
