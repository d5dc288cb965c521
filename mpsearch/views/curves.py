"""Loss of each decision in each format over the bytes that it takes there."""

from __future__ import annotations

import fnmatch
from collections.abc import Sequence
from typing import TYPE_CHECKING, Any

import numpy as np

from mpsearch.errors import InputError, did_you_mean
from mpsearch.format import Format
from mpsearch.planning import usable
from mpsearch.views.front_data import known
from mpsearch.views.steps import Ladder

if TYPE_CHECKING:
    from mpsearch.views.study_view import StudyView


def curves(view: StudyView) -> dict[str, Any]:
    """Return the scores of all decisions, in network order.

    Scores below zero count as their standard error, as they do for solvers (`mpsearch.planning.usable`).

    Args:
        view: of a study with scores.

    Returns:
        ``formats``: names, by bits; ``bits`` of one code of each; ``decisions``: list of mappings with ``name``,
        ``layers``, ``weights`` and ``points``, of each format ``format``, ``loss``, ``error`` (standard error),
        ``bytes``, ``status`` (``ok`` or why there is no loss) and ``settled`` (whether the estimate was below zero).

    Raises:
        InputError: the study has no scores (E143).

    >>> from mpsearch.testing.views import pretended
    >>> data = curves(pretended(20, 16, 4))
    >>> [point["status"] for point in data["decisions"][0]["points"]]
    ['ok', 'ok', 'ok', 'ok']
    """
    scores = view.scores
    if scores is None:
        raise InputError("E143", f"study '{view.study}' has no scores", advice=f"mpsearch resume {view.study}")
    settled = usable(scores)
    formats = [Format.parse(name) for name in scores.formats]
    order = sorted(range(len(formats)), key=lambda j: formats[j].bits)
    ladder = Ladder.of(view)
    place = {name: j for j, name in enumerate(ladder.formats)}
    found = []
    for i, (name, decision) in enumerate(zip(scores.layers, view.layers.decisions, strict=True)):
        points = []
        for j in order:
            points.append(
                {
                    "format": scores.formats[j],
                    "loss": known(settled.value[i, j]),
                    "error": known(settled.spread[i, j]),
                    "bytes": known(ladder.bytes[i, place[scores.formats[j]]]),
                    "status": scores.status[i][j],
                    "settled": bool(scores.value[i, j] < 0),
                }
            )
        layers = [layer.name for layer in decision.layers]
        weights = sum(layer.weights for layer in decision.layers)
        found.append({"name": name, "layers": layers, "weights": weights, "points": points})
    return {
        "unit": scores.unit,
        "bytes_unit": "bytes",
        "estimator": str(scores.source.get("estimator", "")),
        "formats": [scores.formats[j] for j in order],
        "bits": [formats[j].bits for j in order],
        "decisions": found,
    }


def picked(data: dict[str, Any], layers: Sequence[str] | str | None, most: int = 6) -> list[int]:
    """Numbers of the decisions that are asked for: by name, by the name of a layer, or by a pattern.

    Args:
        data: what `curves` returned.
        layers: names or patterns such as ``*.down_proj``; None for those whose worst finite loss is largest.
        most: how many then.

    Raises:
        InputError: a name that no layer has (E302).
    """
    decisions = data["decisions"]
    if layers is None:
        worst = [max((p["loss"] for p in d["points"] if p["loss"] is not None), default=-1.0) for d in decisions]
        return sorted(np.argsort([-loss for loss in worst], kind="stable")[:most].tolist())
    found: dict[int, None] = {}
    for pattern in [layers] if isinstance(layers, str) else layers:
        names = [[d["name"], *d["layers"]] for d in decisions]
        hits = [i for i, known_as in enumerate(names) if pattern in known_as]
        hits = hits or [i for i, known_as in enumerate(names) if any(fnmatch.fnmatchcase(n, pattern) for n in known_as)]
        if not hits:
            close = did_you_mean(str(pattern), [name for known_as in names for name in known_as])
            raise InputError("E302", f"the study has no layer '{pattern}'{close}")
        found |= dict.fromkeys(hits)
    return list(found)
