"""Predicted against measured losses of the plans that have both."""

from __future__ import annotations

import math
from typing import TYPE_CHECKING, Any

from mpsearch.views.agreement import MEASURED, correlation
from mpsearch.views.front_data import known

if TYPE_CHECKING:
    from mpsearch.views.study_view import StudyView


def predictions(view: StudyView) -> dict[str, Any]:
    """Return both losses of each plan, and how well they rank alike.

    Args:
        view: of a study.

    Returns:
        ``points``: list of mappings with ``label``, ``key``, ``group``, ``predicted``, ``doubt`` (upper limit of its
        standard error), ``measured``, ``error`` (standard error); ``correlation``: Spearman's, with ``low`` and
        ``high`` of its 95 % interval and ``count``, or None; ``left_out``: labels of plans measured as infinite.

    >>> from mpsearch.testing.views import pretended
    >>> data = predictions(pretended(20, 16, 4))
    >>> all(point["predicted"] > 0 for point in data["points"])
    True
    """
    points = view.points
    both = [i for i in range(len(points)) if math.isfinite(points.loss[i]) and math.isfinite(points.predicted[i])]
    found = correlation("predicted", MEASURED, points.predicted[both], points.loss[both])
    return {
        "figure": "predicted_vs_measured",
        "unit": points.unit,
        "points": [
            {
                "label": points.labels[i],
                "key": points.keys[i],
                "group": points.groups[i],
                "predicted": float(points.predicted[i]),
                "doubt": known(points.doubt[i]),
                "measured": float(points.loss[i]),
                "error": known(points.spread[i]),
            }
            for i in both
        ],
        "correlation": None
        if found is None
        else {"value": found.value, "low": found.low, "high": found.high, "count": found.count},
        "left_out": [points.labels[i] for i in range(len(points)) if math.isinf(points.loss[i])],
    }
