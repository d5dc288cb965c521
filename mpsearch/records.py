"""Rows of the results database, as plain values."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any, NamedTuple

import numpy as np
from numpy.typing import NDArray

#: What the setups begin with whose tasks are for the process that offers them: who takes any task does not take these.
PRIVATE = "private:"


class CellRow(NamedTuple):
    """One scored cell. A study reads them by the ten thousand, so it is a tuple: a dataclass takes five times as long.

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
        state: ``new``, ``submitted``, ``running``, ``complete``, ``gaps``, ``failed``, ``paused`` or ``cancelled``.
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


@dataclass(frozen=True, slots=True)
class ValueRow:
    """One value to keep under its content key.

    Attributes:
        kind: such as ``scores`` or ``measurement``.
        key: content key of everything that made the value.
        body: what JSON can hold.
        volatile: fields that may differ from run to run and are not compared; they are left out of the body.
    """

    kind: str
    key: str
    body: Mapping[str, Any] = field(hash=False)
    volatile: Mapping[str, Any] | None = field(default=None, hash=False)


@dataclass(frozen=True, slots=True, eq=False)
class StoredPlan:
    """What is drawn of one stored plan: all but its layers.

    Attributes:
        key: digest in the plan's file.
        assignment: key of the model and the formats (`mpsearch.BitPlan.assignment`).
        formats: the formats that it gives to some layer, in the order of their first layers.
        choice: (L,) number of each layer's format in ``formats``, layers in the model's order.
        predicted: what was predicted of it: ``loss``, ``spread``, ``bound``, ``cost``.
        source: how it was made: budgets, prices, solver.
    """

    key: str
    assignment: str
    formats: tuple[str, ...]
    choice: NDArray[np.uint16]
    predicted: Mapping[str, Any]
    source: Mapping[str, Any]


@dataclass(frozen=True, slots=True)
class TaskRow:
    """Work that a study offers.

    Attributes:
        key: content key of the work, at most 64 characters; the same key is the same work.
        setup: content key of model, data and versions; a worker that has loaded a setup can do all its tasks.
        kind: what to do, at most 20 characters.
        body: what the worker must know, as JSON values.
        position: tasks are given out by position, then by key.
    """

    key: str
    setup: str
    kind: str
    body: Mapping[str, Any] = field(hash=False)
    position: int = 0


@dataclass(frozen=True, slots=True)
class LeasedTask:
    """Work that a worker has taken, for as long as its lease lasts.

    Attributes:
        key: as in `TaskRow`, like setup, kind and body.
        study: name of the study that offers it.
        setup: see `TaskRow`.
        kind: see `TaskRow`.
        body: see `TaskRow`.
        epoch: raised each time the task is given out; a result with an older one is refused.
        until: end of the lease, seconds of the database's clock.
        worker: who has it.
        deaths: workers that died of it before.
        attempts: how often it was given out, this time included.
    """

    key: str
    study: str
    setup: str
    kind: str
    body: Mapping[str, Any] = field(hash=False)
    epoch: int
    until: float
    worker: str
    deaths: int
    attempts: int


@dataclass(frozen=True, slots=True)
class ClaimArgs:
    """What a worker takes next; see `mpsearch.ports.Queue.claim`.

    Attributes:
        worker: name of the worker.
        lease: seconds the lease lasts.
        setups: only tasks of these; None for any.
        skip: no tasks of these setups.
        any_study: also tasks of other studies than ``study``.
        study: name of a study; empty for none.
    """

    worker: str
    lease: float
    setups: Sequence[str] | None = None
    skip: Sequence[str] = ()
    any_study: bool = True
    study: str = ""


@dataclass(frozen=True, slots=True)
class TaskState:
    """Where a task stands.

    Attributes:
        state: ``ready``, ``leased``, ``done``, ``failed`` (it ended without a result) or ``dead`` (it killed too many
            workers).
        reason: why it failed: ``code``, ``message`` and ``data``; of a task that killed workers E522 and how the last
            one died.
        deaths: workers that died of it.
        worker: who has it, or had it last.
    """

    state: str
    reason: Mapping[str, Any] = field(hash=False)
    deaths: int
    worker: str


@dataclass(frozen=True, slots=True)
class StudyStatus:
    """What a study is doing.

    Attributes:
        name: its name.
        state: as in `StudyRow`, or ``interrupted``: it says running, and nobody drives it. One that shall
            pause or be cancelled is ``paused`` or ``cancelled`` then.
        wanted: ``run``, ``pause`` or ``cancel``.
        phase: what the driver does now, such as ``score``.
        done: steps of the phase that are done.
        total: steps of the phase.
        reason: why it failed.
        home: the machine that submitted it; empty for a study that was run in place.
        driver: the process that drives it; empty for none.
        live: whether the driver's lease is still good, and its process not known to have ended.
        updated: ISO time, UTC, of the last change of state.
    """

    name: str
    state: str
    wanted: str
    phase: str
    done: int
    total: int
    reason: str
    home: str
    driver: str
    live: bool
    updated: str


@dataclass(frozen=True, slots=True)
class EventRow:
    """One line of a study's log.

    Attributes:
        id: number; later lines have greater ones.
        time: seconds since 1970, of the database's clock.
        kind: such as ``state``, ``refused``.
        text: the line.
    """

    id: int
    time: float
    kind: str
    text: str


@dataclass(frozen=True, slots=True)
class WorkerRow:
    """One worker.

    Attributes:
        name: its name.
        host: its machine.
        pid: its process.
        doing: what it does now.
        info: what else is known of it, as JSON values.
        started: when it said hello first, seconds of the database's clock; set by the store.
        seen: when it said hello last; set by the store.
    """

    name: str
    host: str
    pid: int
    doing: str = ""
    info: Mapping[str, Any] = field(default_factory=dict, hash=False)
    started: float = 0.0
    seen: float = 0.0
