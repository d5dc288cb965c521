"""What a user should know of a model and its scores, beside the numbers."""

from __future__ import annotations

from mpsearch.errors import Notice
from mpsearch.layer import Layers
from mpsearch.tables import SensitivityTable


def layer_notices(layers: Layers) -> list[Notice]:
    """Say what is left out and what is shared."""
    notices = []
    if layers.excluded:
        count = sum(kept.weights for kept in layers.excluded)
        notices.append(
            Notice(
                "N415",
                f"{len(layers.excluded)} tensors ({100 * count / layers.weights:.2f} % of weights) keep their "
                f"number type and are counted: {', '.join(sorted({kept.reason for kept in layers.excluded}))}",
            )
        )
    for layer in layers:
        if layer.shared:
            names = " and ".join([layer.name, *layer.shared])
            notices.append(Notice("N414", f"{names} are one tensor: scored once, counted once, one format"))
    return notices


def score_notices(scores: SensitivityTable) -> list[Notice]:
    """Name the cells without a value, and those below zero."""
    notices = []
    for status, code, text in (
        ("non_finite", "W511", "gives values that are not finite: that format is barred for it"),
        ("not_observed", "W512", "was not reached by the calibration data: it has no score"),
    ):
        cells = [
            f"{name} at {fmt}"
            for name, row in zip(scores.layers, scores.status, strict=True)
            for fmt, found in zip(scores.formats, row, strict=True)
            if found == status
        ]
        if cells:
            more = f" and {len(cells) - 3} more" if len(cells) > 3 else ""
            notices.append(Notice(code, f"{', '.join(cells[:3])}{more} {text}"))
    negative = [name for name, row in zip(scores.layers, scores.value, strict=True) if (row < 0).any()]
    if negative:
        notices.append(
            Notice(
                "W516",
                f"{len(negative)} decisions have scores below zero ({negative[0]}, …); their error is taken instead",
            )
        )
    return notices
