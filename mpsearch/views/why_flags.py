"""What decides of a layer beside its scores: ties, pins, rules, scores that are missing."""

from __future__ import annotations

import fnmatch
from collections.abc import Iterable, Iterator, Mapping
from typing import TYPE_CHECKING

from mpsearch.layer import Decision

if TYPE_CHECKING:
    from mpsearch.views.study_view import StudyView
    from mpsearch.views.why import Option


def flags(view: StudyView, row: Decision, options: tuple[Option, ...]) -> Iterator[str]:
    """Yield a few words for each.

    Args:
        view: of the study.
        row: the decision.
        options: formats that it could have.
    """
    if len(row.layers) > 1:
        yield f"tied: {len(row.layers)} layers take one format"
    shared = [name for layer in row.layers for name in layer.shared]
    if shared:
        yield f"shared: the same tensor as {', '.join(shared)}"
    if row.name in view.pins:
        yield f"pinned to {view.pins[row.name]}"
    yield from _ruled(view, row)
    if view.scores is not None and not any(option.status == "ok" for option in options):
        yield "not scored in any format"
    reasons: dict[str, list[str]] = {}
    for option in options:
        if option.status != "ok" and view.scores is not None:
            reasons.setdefault(option.status, []).append(option.format)
    for status, names in reasons.items():
        yield f"{status.replace('_', ' ')}: {', '.join(names)}"
    if view.scores is not None:
        i = [x.name for x in view.layers.decisions].index(row.name)
        below = [name for name, value in zip(view.scores.formats, view.scores.value[i], strict=True) if value < 0]
        if below:
            yield f"estimated below zero, so its error counts: {', '.join(below)}"


def _ruled(view: StudyView, row: Decision) -> Iterator[str]:
    """What the rules of the study say of a decision by its name."""
    question = view.provenance.get("study")
    rules = question.get("rules") if isinstance(question, Mapping) else None
    if not isinstance(rules, Mapping):
        return
    for verb, text in (
        ("pins", "pinned by a rule to"),
        ("bars", "barred by a rule:"),
        ("floors", "at least, by a rule:"),
    ):
        given = rules.get(verb)
        for pattern, value in given.items() if isinstance(given, Mapping) else ():
            if pattern == row.name or fnmatch.fnmatchcase(row.name, str(pattern)):
                yield f"{text} {', '.join(map(str, value)) if isinstance(value, (list, tuple)) else value}"


def held(told: Iterable[str], fmt: str) -> str:
    """Return the flag that keeps a decision from a format: a pin, or a bar that names it; nothing where there is none.

    Args:
        told: what `flags` yielded.
        fmt: name of the format.

    >>> held(["tied: 2 layers take one format", "pinned to int2-g64"], "int4-g64")
    'pinned to int2-g64'
    >>> held(["barred by a rule: int2-g64"], "int4-g64")
    ''
    """
    for flag in told:
        verb, _, names = flag.partition(": ")
        if flag.startswith(("pinned to ", "pinned by a rule to ")):
            return flag
        if verb == "barred by a rule" and any(fnmatch.fnmatchcase(fmt, name) for name in names.split(", ")):
            return flag
    return ""
