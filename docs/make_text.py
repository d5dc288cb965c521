"""Docstrings as Markdown: paragraphs, lists of names, and examples."""

from __future__ import annotations

import inspect
import re
import textwrap
from collections.abc import Iterable
from typing import Any

_SECTIONS = ("Args", "Attributes", "Returns", "Yields", "Raises")
_TITLES = {"Args": "Takes", "Attributes": "Settings and fields"}
_LABELS = re.compile(r"(^|(?<=[.)] )|(?<=\n))(Bias|Standard errors?|Cost|Memory|Sources?|Made for):")


def plain(text: str) -> str:
    r"""Escape what Markdown would read in a text, outside of its code spans.

    >>> plain("a_i * b < c, ``x_i``")
    'a\\_i \\* b &lt; c, ``x_i``'
    """
    parts = re.split(r"(``[^`]+``|`[^`]+`)", text)
    return "".join(part if part.startswith("`") else _escaped(part) for part in parts)


def _escaped(text: str) -> str:
    return re.sub(r"([\\*_\[\]])", r"\\\1", text).replace("<", "&lt;")


def cell(text: str) -> str:
    r"""Return a text for a cell of a table.

    >>> cell("a | b")
    'a \\| b'
    """
    return plain(" ".join(text.split())).replace("|", "\\|")


def table(head: Iterable[str], rows: Iterable[Iterable[str]]) -> str:
    """Return a table whose cells are Markdown already."""
    head = list(head)
    lines = [head, ["---"] * len(head), *map(list, rows)]
    return "\n".join(f"| {' | '.join(line)} |" for line in lines) + "\n"


def fenced(text: str, language: str = "text") -> str:
    """Return a block of code."""
    return f"```{language}\n{text.rstrip()}\n```\n"


def markdown(thing: Any, skip: int = 0) -> str:
    """Return the docstring of a thing.

    Args:
        thing: a class, function or module.
        skip: paragraphs at its start that stand elsewhere already.

    >>> print(markdown(markdown, skip=1).splitlines()[0])
    **Takes**
    """
    body = inspect.getdoc(thing) or ""
    paragraphs = re.split(r"\n\s*\n", body)[skip:]
    found: list[str] = []
    example: list[str] = []
    for part in paragraphs:
        name = part.partition(":")[0]
        if part.startswith(">>>") or (example and part.startswith("...")):
            example.append(part)
        elif name in _SECTIONS and part.startswith(f"{name}:\n"):
            found.append(_section(name, part.partition("\n")[2]))
        else:
            found.append(_paragraph(part))
    if example:
        found.append("**Example**\n\n" + fenced("\n\n".join(example), "pycon"))
    return "\n".join(found)


def _paragraph(text: str) -> str:
    text = _LABELS.sub(lambda m: f"{m[1]}@@{m[2]}:@@", text)
    text = re.sub(r"(^|\n)(score = )", r"\1@@Formula:@@ \2", text, count=1)
    return plain(text).replace("@@", "**") + "\n"


def _section(name: str, body: str) -> str:
    lines = textwrap.dedent(body).splitlines()
    items: list[str] = []
    for line in lines:
        if line.startswith(" ") and items:
            items[-1] += " " + line.strip()
        else:
            items.append(line)
    if name in ("Returns", "Yields"):
        return f"**{name}** {plain(' '.join(items))}\n"
    named = [item.partition(": ") for item in items]
    rows = "\n".join(f"- `{key}`: {plain(rest)}" if rest else f"- {plain(key)}" for key, _, rest in named)
    return f"**{_TITLES.get(name, name)}**\n\n{rows}\n"
