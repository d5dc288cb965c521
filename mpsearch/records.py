"""Rows of the results database, as plain values."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Any


@dataclass(frozen=True, slots=True)
class CellRow:
    """One scored cell.

    Attributes:
        layer: name of the decision.
        format: name of the format.
        batch: index of the calibration batch; -1 when the cell was scored on all of them.
        status: ``ok``, ``non_finite``, ``not_offered``, ``not_observed`` or ``failed``.
        value: predicted loss increase; None unless the status is ``ok``.
        spread: its standard error; None where unknown.
        samples: independent samples behind the value.
        reason: why there is no value.
        seconds: how long it took.
    """

    layer: str
    format: str
    batch: int
    status: str
    value: float | None
    spread: float | None
    samples: int
    reason: str = ""
    seconds: float = 0.0


@dataclass(frozen=True, slots=True)
class StudyRow:
    """One study.

    Attributes:
        name: its name.
        spec: its question, as JSON values.
        key: content key of the question.
        state: ``new``, ``running``, ``complete``, ``gaps``, ``failed`` or ``paused``.
        created: ISO time, UTC.
        updated: ISO time, UTC, of the last change of state.
    """

    name: str
    spec: Mapping[str, Any] = field(hash=False)
    key: str
    state: str
    created: str
    updated: str


@dataclass(frozen=True, slots=True)
class LinkRow:
    """One value that belongs to a study.

    Attributes:
        key: key of the value.
        label: what the value is to the study.
        position: its place in the study's order.
    """

    key: str
    label: str
    position: int
