"""The command that lists the solvers: what each takes, proves and costs."""

from __future__ import annotations

import json
import sys
from collections.abc import Iterator
from typing import Any

from mpsearch.cli.options import Json


def solvers(as_json: Json = False) -> None:
    """List the solvers and searchers: what each takes, what it proves, what it costs.

    mpsearch solvers
    """
    from rich.table import Table
    from rich.text import Text

    from mpsearch.cli.show import console

    rows = list(_catalogue())
    if as_json:
        sys.stdout.write(json.dumps(rows, indent=1) + "\n")
        return
    out = console()
    for kind, title in (("solvers", "Solvers, of predicted losses"), ("searchers", "Searchers, of measured losses")):
        table = Table("name", "what it does", "takes", "proves", "cost", title=title, title_justify="left", box=None)
        table.columns[0].no_wrap = True
        for row in rows:
            if row["kind"] == kind:
                table.add_row(Text(row["name"]), *(Text(row[key]) for key in ("does", "takes", "proves", "cost")))
        out.print(table)
        out.print()
    out.print("solver 'auto' picks one by size and structure, and says why.")


def _catalogue() -> Iterator[dict[str, Any]]:
    from mpsearch import registry

    for kind in ("solvers", "searchers"):
        for name in registry.names(kind):
            made = registry.load(kind, name)
            yield {
                "kind": kind,
                "name": name,
                "does": (made.__doc__ or "").strip().splitlines()[0].rstrip(".:"),
                "takes": made.takes,
                "proves": made.proves,
                "cost": made.cost,
                "settings": list(registry.settings(kind, name)),
            }
