"""What each code of an error or notice means: the one table that ``explain``, the documentation and the tests read.

``python -m mpsearch.explaining > docs/errors.md`` writes the page.
"""

from __future__ import annotations

import sys
import tomllib
from collections.abc import Mapping
from dataclasses import asdict, dataclass
from functools import cache
from pathlib import Path

from mpsearch.errors import InputError

_TABLE = Path(__file__).with_name("errors_table.toml")
_HEAD = """\
# Errors and notices

Every error is one block on standard error: what was found, where, why, and what to do. `mpsearch --debug …` adds the
traceback, and `mpsearch explain CODE` says more of a code. Exit codes: 0 done; 2 usage; 3 bad input; 4 infeasible;
5 done with gaps; 6 storage; 7 resources; 8 refused for safety; 130 interrupted. 1 is a fault of mpsearch itself.

This page is made of `mpsearch/errors_table.toml` by `python -m mpsearch.explaining`; change it there.
"""


@dataclass(frozen=True, slots=True)
class Entry:
    """What is known of one code.

    Attributes:
        code: such as ``E201``; ``E`` is an error, ``W`` a warning, ``N`` a note.
        meaning: what it says, in one line.
        why: how it comes about.
        example: a message as it is printed.
        fix: what to do.
        exit: exit code of a command that ends with it; 0 of what stops nothing.
    """

    code: str
    meaning: str
    why: str
    example: str
    fix: str
    exit: int = 0

    def to_json(self) -> dict[str, str | int]:
        return asdict(self)


@cache
def entries() -> Mapping[str, Entry]:
    """Return every code, errors first, in order.

    >>> entries()["E201"].code
    'E201'
    """
    found = tomllib.loads(_TABLE.read_text(encoding="utf-8"))
    ordered = sorted(found, key=lambda code: (code[0] != "E", code[1:], code[0]))
    return {code: _entry(code, found[code]) for code in ordered}


def _entry(code: str, fields: Mapping[str, str | int]) -> Entry:
    texts = {name: text.strip() for name, text in fields.items() if isinstance(text, str)}
    return Entry(code, **texts, exit=int(fields.get("exit", 0)))


def entry(code: str) -> Entry:
    """Return what is known of a code, written in any case.

    Raises:
        InputError: no such code (E107), with those that are near.

    >>> entry("e201").code
    'E201'
    """
    known = entries()
    asked = code.strip().upper()
    if asked in known:
        return known[asked]
    near = nearest(asked)
    raise InputError(
        "E107",
        f"no code {code[:20]!a}" + (f"; did you mean '{near[0]}'?" if near else ""),
        advice=f"near it: {', '.join(near)}; all: mpsearch explain" if near else "all: mpsearch explain",
    )


def exit_code(reason: str) -> int:
    """Return the exit code of a study that failed for a reason: of the code that it begins with, or 1 without one.

    >>> exit_code("E201 budget '1 bits' cannot be met"), exit_code("KeyError('fc')")
    (4, 1)
    """
    found = entries().get(reason.partition(" ")[0])
    return found.exit or 1 if found else 1


def nearest(code: str, count: int = 4) -> list[str]:
    """Return the codes nearest to one that there is not: of its letter, by number.

    >>> nearest('E202')[:2]
    ['E201', 'E203']
    """
    digits = "".join(filter(str.isdigit, code))[:6]
    if not digits:
        return []
    known = entries()
    same = [other for other in known if other[0] == code[:1]] or list(known)
    return sorted(same, key=lambda other: (abs(int(other[1:]) - int(digits)), other))[:count]


def text(found: Entry) -> str:
    """Return what is known of a code, for a terminal."""
    example = found.example.replace("\n", "\n            ")
    exits = f"with {found.exit}" if found.exit else ""
    lines = (("means", found.meaning), ("why", found.why), ("example", example), ("do", found.fix), ("exits", exits))
    return f"{found.code}\n" + "".join(f"  {label:<9} {words}\n" for label, words in lines if words)


def page() -> str:
    """Return the page of the documentation."""
    tables = []
    for title, letters in (("code", "E"), ("notice", "WN")):
        rows = [f"| {x.code} | {x.meaning} |" for x in entries().values() if x.code[0] in letters]
        tables.append("\n".join([f"| {title} | meaning |", "|---|---|", *rows]))
    return "\n".join([_HEAD, *("\n".join([table, ""]) for table in tables)])


if __name__ == "__main__":
    sys.stdout.write(page())
