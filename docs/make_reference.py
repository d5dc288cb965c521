"""Pages of the reference: names in Python, commands, and codes of errors."""

from __future__ import annotations

import inspect
import os
from collections.abc import Iterator
from typing import Any

from make_text import cell, fenced, markdown, plain, table

import mpsearch
from mpsearch.explaining import Entry, entries

EXITS = {
    0: "done",
    1: "a fault of mpsearch itself",
    2: "usage: an option or argument that there is not",
    3: "bad input",
    4: "infeasible: nothing keeps the budgets",
    5: "done with gaps",
    6: "storage",
    7: "resources: disk, memory, a package",
    8: "refused for safety",
    130: "interrupted",
}


def python() -> str:
    """Return the page of the names in ``mpsearch.__all__``, in the order of the alphabet."""
    found = [
        "# Python\n",
        "`import mpsearch as mp` loads neither torch nor a database; each name is loaded on first use.\n",
    ]
    for name in sorted(mpsearch.__all__, key=str.lower):
        thing = getattr(mpsearch, name)
        if inspect.ismodule(thing):
            found += [f"## {name}\n", markdown(thing)]
            found += [_one(f"{name}.{part}", getattr(thing, part), "###") for part in thing.__all__]
        else:
            found.append(_one(name, thing, "##"))
    return "\n".join(found)


def _one(name: str, thing: Any, level: str) -> str:
    lines = [f"{level} {name}\n", fenced(_signature(f"mp.{name}", thing), "python"), markdown(thing)]
    if inspect.isclass(thing):
        rows = [(f"`{key}`", cell(what)) for key, what in _members(thing)]
        if rows:
            lines += [table(("method or property", "what it does"), rows)]
    return "\n".join(lines)


def _signature(name: str, thing: Any) -> str:
    if inspect.isclass(thing) and issubclass(thing, Exception):
        return f"class {name}(code, message, *, where=None, because=None, advice=None)  # exit code {thing.exit_code}"
    text = f"{name}{inspect.signature(thing)}".replace("'", "") if callable(thing) else name
    if inspect.isclass(thing):
        text = text.removesuffix(" -> None")
    text = text.replace("typing.", "").replace("collections.abc.", "")
    if len(text) > 110:
        head, _, rest = text.partition("(")
        inner, _, after = rest.rpartition(")")
        text = f"{head}(\n    " + ",\n    ".join(_split(inner)) + f",\n){after}"
    return text


def _split(inner: str) -> Iterator[str]:
    """Split at the commas that stand in no bracket."""
    depth, start = 0, 0
    for place, letter in enumerate(inner):
        depth += (letter in "([{") - (letter in ")]}")
        if letter == "," and not depth:
            yield inner[start:place].strip()
            start = place + 1
    yield inner[start:].strip()


def _members(thing: type) -> Iterator[tuple[str, str]]:
    for name, value in inspect.getmembers(thing):
        own = getattr(value, "__module__", "") or getattr(getattr(value, "fget", None), "__module__", "")
        if name.startswith("_") or not own.startswith("mpsearch"):
            continue
        if isinstance(value, property):
            yield name, (inspect.getdoc(value) or "").split("\n\n")[0]
        elif callable(value) and not inspect.isclass(value):
            yield f"{name}()", (inspect.getdoc(value) or "").split("\n\n")[0]


def commands() -> str:
    """Return the page of every command: its help as printed, and whether it takes ``--json``."""
    import click
    from typer.main import get_command

    from mpsearch.cli.main import _GROUPS, app

    root = get_command(app)
    os.environ["COLUMNS"] = "100"
    groups: dict[str, list[tuple[str, Any]]] = {}
    for name, command in root.commands.items():  # type: ignore[attr-defined]
        subs = getattr(command, "commands", None)
        named = [(f"{name} {sub}", one) for sub, one in subs.items()] if subs else [(name, command)]
        groups.setdefault(_GROUPS.get(name, "Help"), []).extend(named)
    rows = [(str(code), plain(text)) for code, text in EXITS.items()]
    found = [
        "# Commands\n",
        "Every error is one block on standard error, with a code that [errors](../errors.md) lists.\n",
        "With `--json` a command prints one object on standard output and nothing else; see below who takes it.\n",
        "## Exit codes\n",
        table(("code", "meaning"), rows),
    ]
    for heading in dict.fromkeys(_GROUPS.values()):
        found.append(f"## {heading}\n")
        for name, command in groups.get(heading, []):
            command.rich_markup_mode = None
            context = click.Context(command, info_name=f"mpsearch {name}", max_content_width=96)
            takes = any("--json" in item.opts for item in command.params)
            text = command.get_help(context).replace("\b\n", "").replace("\b", "")
            found += [f"### mpsearch {name}\n", fenced(text), "`--json`: yes.\n" if takes else "`--json`: no.\n"]
    return "\n".join(found)


def codes() -> str:
    """Return the page that says everything of every code, an anchor for each: ``#e101``."""
    found = [
        "# Codes explained\n",
        "What `mpsearch explain CODE` prints. `E` stops a command; `W` and `N` are notices and stop nothing.\n",
    ]
    for one in entries().values():
        found.append(_code(one))
    return "\n".join(found)


def _code(one: Entry) -> str:
    lines = [f"## {one.code}\n", f"**{plain(one.meaning)}**\n", f"Why: {plain(one.why)}.\n"]
    lines += [fenced(one.example), f"Do: {plain(one.fix)}.\n"]
    if one.exit:
        lines.append(f"Exit code {one.exit}: {plain(EXITS.get(one.exit, ''))}.\n")
    return "\n".join(lines)
