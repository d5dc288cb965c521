"""``mpsearch explain``: what a code of an error or notice means, and what to do."""

from __future__ import annotations

import json
import sys
from typing import Annotated

import typer

from mpsearch.cli.options import Json


def explain(
    code: Annotated[str, typer.Argument(help="A code such as E201; all codes without.")] = "",
    as_json: Json = False,
) -> None:
    """Say what a code of an error or notice means, why it comes, how it looks and what to do.

    mpsearch explain E201
    """
    from mpsearch import explaining

    if not code:
        found = explaining.entries()
        if as_json:
            sys.stdout.write(json.dumps([entry.to_json() for entry in found.values()], indent=1) + "\n")
            return
        for entry in found.values():
            sys.stdout.write(f"{entry.code}  {entry.meaning}\n")
        return
    entry = explaining.entry(code)
    if as_json:
        sys.stdout.write(json.dumps(entry.to_json(), indent=1) + "\n")
        return
    sys.stdout.write(explaining.text(entry))
