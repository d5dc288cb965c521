"""A view as plain values, for the scripts that draw it: of the report, of the page and of notebooks alike."""

from __future__ import annotations

import math
from collections.abc import Iterable
from typing import Any

import numpy as np

from mpsearch.views.study_view import StudyView

#: Of the shape of what `packed` returns.
VERSION = 1


def packed(view: StudyView) -> dict[str, Any]:
    """Return everything that is drawn of a study, but for the formats of each plan, which `choices` returns.

    Numbers are as stored, to the last digit; what is not known is None.

    Args:
        view: of the study.
    """
    points, grid, scores = view.points, view.grid, view.scores
    return {
        "version": VERSION,
        "study": view.study,
        "state": view.state,
        "unit": points.unit,
        "weights": view.weights,
        "model": dict(view.model),
        "layers": [
            {
                "name": layer.name,
                "kind": layer.kind,
                "shape": list(layer.shape),
                "tie": layer.tie,
                "shared": list(layer.shared),
                "row": view.rows[i],
            }
            for i, layer in enumerate(view.layers)
        ],
        "grid": {
            "rows": list(grid.row_names),
            "columns": list(grid.column_names),
            "cells": [[row, column, list(numbers)] for (row, column), numbers in grid.cells.items()],
        },
        "formats": [{"name": name, "bits": bits} for name, bits in zip(points.formats, view.bits, strict=True)],
        "bytes": [_numbers(row) for row in view.sizes],
        "decisions": [row.name for row in view.layers.decisions],
        "scores": None
        if scores is None
        else {
            "formats": list(scores.formats),
            "loss": [_numbers(row) for row in scores.value],
            "error": [_numbers(row) for row in scores.spread],
            "status": [list(row) for row in scores.status],
            "estimator": str(scores.source.get("estimator", "")),
        },
        "costs": {
            table.resource: {
                "unit": table.unit,
                "kind": table.kind,
                "fixed": table.fixed,
                "margin": float(table.source.get("margin", 1.0)),
                "formats": list(table.formats),
                "cost": [_numbers(row) for row in table.value],
            }
            for table in view.costs
        },
        "points": {
            "key": list(points.keys),
            "plan": list(points.plans),
            "label": list(points.labels),
            "group": list(points.groups),
            "loss": _numbers(points.loss),
            "spread": _numbers(points.spread),
            "predicted": _numbers(points.predicted),
            "doubt": _numbers(points.doubt),
            "bound": _numbers(points.bound),
            "cost": {name: _numbers(values) for name, values in points.cost.items()},
            "rival": points.rival,
            "alone": points.alone("weights"),
            "front": [int(i) for i in np.flatnonzero(points.front())],
        },
        "budgets": [
            {"text": limit.text, "resource": limit.resource, "limit": _number(limit.limit)} for limit in view.budgets
        ],
        "verdict": list(view.verdict),
        "worth": view.worth.to_json(),
        "notices": list(view.notices),
        "provenance": dict(view.provenance),
    }


def choices(view: StudyView, first: int = 0, last: int | None = None) -> bytes:
    """Return the number of the format of each layer in each plan: one byte each (two where there are over 256 formats).

    Args:
        view: of the study.
        first: number of the first plan.
        last: number of the plan after the last; None for all.
    """
    part = view.points.choice[first:last]
    return part.astype("<u1" if len(view.points.formats) <= 256 else "<u2").tobytes()


def _number(value: float) -> float | int | None:
    if not math.isfinite(value):
        return None
    return int(value) if value == int(value) and abs(value) < 2**53 else float(value)


def _numbers(values: Iterable[float]) -> list[float | int | None]:
    return [_number(float(value)) for value in values]
