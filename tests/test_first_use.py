"""The door: what help and version load, how commands are listed, and examples that can be typed as they stand."""

from __future__ import annotations

import json
import shlex
import subprocess
import sys
from typing import Any

import pytest
import typer

from mpsearch.cli.main import app

HEAVY = ("torch", "transformers", "ray", "sqlalchemy", "alembic", "numpy", "fastapi", "optuna", "plotly")
GROUP: Any = typer.main.get_command(app)


def commands(group: Any = GROUP, path: tuple[str, ...] = ()) -> dict[str, Any]:
    """Every command that can be run, by its words."""
    found: dict[str, Any] = {}
    for name, command in group.commands.items():
        inner = hasattr(command, "commands")
        found |= commands(command, (*path, name)) if inner else {" ".join((*path, name)): command}
    return found


COMMANDS = commands()


def examples(command: Any) -> list[str]:
    lines = (line.strip() for line in (command.help or "").splitlines())
    return [line for line in lines if line.startswith("mpsearch ")]


def parsed(arguments: list[str]) -> str:
    """Parse a command line as it would be run, run nothing, and return the words of its command."""
    context = GROUP.make_context("mpsearch", list(arguments))
    words: list[str] = []
    while hasattr(context.command, "commands"):
        rest = [*context._protected_args, *context.args]
        name, command, rest = context.command.resolve_command(context, rest)
        context = command.make_context(name, rest, parent=context)
        words.append(name)
    return " ".join(words)


def loaded_by(arguments: list[str]) -> list[str]:
    """Heavy packages that a process holds after a command line."""
    code = (
        "import json, sys\nfrom mpsearch.cli.main import run\n"
        f"assert run({arguments!r}) == 0\n"
        f"print('\\n' + json.dumps([name for name in {HEAVY!r} if name in sys.modules]))"
    )
    ended = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, timeout=60, check=True)
    found: list[str] = json.loads(ended.stdout.splitlines()[-1])
    return found


@pytest.mark.parametrize("arguments", [["--help"], ["--version"], ["plan", "--help"], ["run", "-h"], ["search", "-h"]])
def test_help_and_version_load_nothing_heavy(arguments: list[str]) -> None:
    assert loaded_by(arguments) == []


def test_what_is_counted_as_loaded_is_seen() -> None:
    assert "numpy" in loaded_by(["targets", "vllm"])


@pytest.mark.parametrize("name", COMMANDS)
def test_the_help_of_every_command_ends_in_an_example_that_parses(name: str) -> None:
    command = COMMANDS[name]
    given = examples(command)
    assert given, f"mpsearch {name}: no example in its help"
    last = [line for line in (command.help or "").splitlines() if line.strip()][-1]
    assert last.strip() == given[-1], f"mpsearch {name}: the help goes on after its examples"
    used = [parsed(shlex.split(line)[1:]) for line in given]
    assert name in used, f"mpsearch {name}: its examples are of {used}"


@pytest.mark.parametrize("line", ["mpsearch run ./model --budgte x", "mpsearch solve a b", "mpsearch nothing"])
def test_an_example_that_does_not_parse_is_noticed(line: str) -> None:
    with pytest.raises(Exception, match=r"(?i)no such|unexpected"):
        parsed(shlex.split(line)[1:])


def test_every_command_stands_under_a_heading() -> None:
    headings = {name: getattr(command, "rich_help_panel", None) for name, command in GROUP.commands.items()}
    assert [name for name, heading in headings.items() if not isinstance(heading, str)] == []


def test_every_option_says_what_it_is() -> None:
    silent = [
        f"{name} {option.opts[0]}"
        for name, command in COMMANDS.items()
        for option in command.params
        if not getattr(option, "help", "")
    ]
    assert silent == []
