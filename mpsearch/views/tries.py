"""What to try next in a study, each as a line to copy."""

from __future__ import annotations

import json
import math
import shlex
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

import numpy as np

from mpsearch.front import Measurement
from mpsearch.verdict import NEARLY_EQUAL, best_uniform

if TYPE_CHECKING:
    from mpsearch.views.study_view import StudyView
    from mpsearch.views.worth import Gain, Hindrance


@dataclass(frozen=True)
class Try:
    """What to try next.

    Attributes:
        why: what it is good for.
        line: to copy: a command, or a line of a study file.
    """

    why: str
    line: str


def tries(view: StudyView, mixed: Measurement | None, gain: Gain | None, limits: Sequence[Hindrance]) -> Iterator[Try]:
    """Yield what could help, the likeliest first.

    Args:
        view: of the study.
        mixed: the chosen plan's measurement; None when it was not measured.
        gain: over the best uniform plan; None when there is none.
        limits: what limits further gain.
    """
    name = shlex.quote(view.study)
    if mixed is None:
        yield Try("the chosen plan was not measured", f"mpsearch resume {name}")
    kinds = {item.what: item for item in limits}
    question = view.provenance.get("study")
    asked: Mapping[str, Any] = question if isinstance(question, Mapping) else {}
    for what, more in (("largest", _larger), ("smallest", _smaller)):
        offered = more(view) if what in kinds else ""
        if offered:
            formats = json.dumps([*(str(x) for x in asked.get("formats") or _formats(view)), offered])
            yield Try(f"offer {offered} as well, in the file of another study", f"formats = {formats}")
    if "layer" in kinds:
        layer = view.layers.decisions[_row(view, kinds["layer"].layers[0])].layers[0].name
        yield Try("see why that layer has its bits", f"mpsearch why {name} {shlex.quote(layer)}")
    if "noise" in kinds and isinstance(tokens := asked.get("tokens"), int):
        yield Try("score on more text, in the file of another study", f"tokens = {4 * tokens}")
    uniform = best_uniform(view.measured, NEARLY_EQUAL * mixed.cost["weights"]) if mixed is not None else None
    if mixed is not None and uniform is not None and uniform.plan != mixed.plan:
        line = f"mpsearch compare {name} {shlex.quote(f'{view.study}:{uniform.label}')}"
        yield Try("see where it differs from the best uniform plan", line)
    if view.scores is not None and mixed is not None and view.weights:
        bits = 8 * mixed.cost["weights"] / view.weights
        larger = gain is not None and gain.value <= 0
        there = math.ceil(10 * bits) / 10 + 0.5 if larger or "smallest" in kinds else math.floor(10 * bits) / 10 - 0.5
        least = _least(view)
        if 8 * least / view.weights <= there:
            budget = shlex.quote(f"weights <= {there:.1f} bits")
            yield Try("see another size, on the stored scores", f"mpsearch solve {name} --budget {budget}")


def _row(view: StudyView, decision: str) -> int:
    return [row.name for row in view.layers.decisions].index(decision)


def _least(view: StudyView) -> float:
    """Bytes of the smallest plan of the study's own formats."""
    table = next((table for table in view.costs if table.resource == "weights"), None)
    if table is None:
        return math.inf
    smallest = np.where(np.isfinite(table.value), table.value, np.inf).min(axis=1)
    return float(smallest.sum()) + table.fixed


def _larger(view: StudyView) -> str:
    """A format of more bits than all of the scores', which every model can be given."""
    bits = [fmt for name, fmt in zip(view.points.formats, view.bits, strict=True) if name in _formats(view)]
    return next((name for name, fmt in (("int6-g64", 6), ("int8-channel", 8), ("bf16", 16)) if fmt > max(bits)), "")


def _smaller(view: StudyView) -> str:
    bits = [fmt for name, fmt in zip(view.points.formats, view.bits, strict=True) if name in _formats(view)]
    return next((name for name, fmt in (("int4-g64", 4), ("int3-g64", 3), ("int2-g64", 2)) if fmt < min(bits)), "")


def _formats(view: StudyView) -> tuple[str, ...]:
    return view.scores.formats if view.scores is not None else ()
