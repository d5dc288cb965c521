"""What a study asks to be done, as plain values that travel to any worker."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import asdict, dataclass, field, replace
from functools import cached_property
from typing import Any

from mpsearch.errors import Notice
from mpsearch.keys import content_key
from mpsearch.layer import Layer, Layers
from mpsearch.model.source import Source


@dataclass(frozen=True)
class Setup:
    """How a worker loads the model and its data.

    Attributes:
        model: folder of the model.
        calibration: text that scores are taken on.
        validation: text that plans are measured on.
        tokens: calibration tokens.
        validation_tokens: validation tokens.
        length: tokens of one sequence.
        batch_size: sequences of one batch; fixed, so that results do not depend on who computes them.
        ties: ``auto``, ``none``, or names and patterns of layers, one tuple per tie.
        trust_remote_code: run the model's own code.
        caches: the KV caches are decided as well.
        identity: digests of model, calibration and validation text that must be found; not checked when empty.
    """

    model: str
    calibration: Source
    validation: Source
    tokens: int
    validation_tokens: int
    length: int
    batch_size: int
    ties: str | tuple[tuple[str, ...], ...] = "auto"
    trust_remote_code: bool = False
    caches: bool = False
    identity: tuple[str, ...] = ()


@dataclass(frozen=True)
class Survey:
    """What was found before any scoring.

    Attributes:
        layers: what can be decided, and what is left out.
        batches: number of calibration batches.
        architecture: class name of the model.
        notices: what the user should know about model and data.
        caches: KV caches that nothing is decided of; they take memory all the same.
    """

    layers: Layers
    batches: int
    architecture: str
    notices: tuple[Notice, ...] = ()
    caches: tuple[Layer, ...] = ()

    def apart(self) -> Survey:
        """The same with its KV caches beside the layers: none of them is decided."""
        caches = tuple(layer for layer in self.layers if layer.kind == "kv_cache")
        if not caches:
            return self
        weights = tuple(layer for layer in self.layers if layer.kind != "kv_cache")
        return replace(self, layers=replace(self.layers, items=weights), caches=caches)

    def to_json(self) -> dict[str, Any]:
        return {
            "layers": self.layers.to_json(),
            "batches": self.batches,
            "architecture": self.architecture,
            "notices": [[notice.code, notice.message] for notice in self.notices],
        }

    @classmethod
    def from_json(cls, data: Mapping[str, Any]) -> Survey:
        notices = tuple(Notice(code, message) for code, message in data["notices"])
        return cls(Layers.from_json(data["layers"]), int(data["batches"]), str(data["architecture"]), notices)


@dataclass(frozen=True)
class SurveyTask:
    """Load model and data and look at them."""


@dataclass(frozen=True)
class ScoreTask:
    """Score some decisions in some formats.

    Attributes:
        estimator: name of the estimator.
        settings: its settings.
        decisions: names of the decisions; all when empty.
        formats: names of the formats.
        batch: index of the one calibration batch to use; all when None.
    """

    estimator: str
    settings: tuple[tuple[str, Any], ...]
    decisions: tuple[str, ...]
    formats: tuple[str, ...]
    batch: int | None = None


@dataclass(frozen=True)
class RatioTask:
    """Find the ratio of every layer that a rule pins by, on the calibration data.

    Attributes:
        estimator: who reports it.
    """

    estimator: str


@dataclass(frozen=True)
class MeasureTask:
    """Run a plan on the validation text.

    Attributes:
        evaluator: name of the evaluator.
        plan: the plan as JSON.
        label: what the plan is to its study.
        batches: how many of the batches to use, from the first; 0 for all.
        calibration: measure on the calibration batches instead of the validation batches.
    """

    evaluator: str
    plan: Mapping[str, Any] = field(hash=False)
    label: str = ""
    batches: int = 0
    calibration: bool = False


@dataclass(frozen=True)
class Failed:
    """A task without a result, and why; the study goes on without it."""

    code: str
    message: str


Task = SurveyTask | RatioTask | ScoreTask | MeasureTask
_KINDS: Mapping[str, type] = {"survey": SurveyTask, "ratios": RatioTask, "score": ScoreTask, "measure": MeasureTask}


@dataclass(frozen=True)
class Job:
    """A task, and where its result is kept.

    Attributes:
        task: what is to be done.
        goes: key of the value that it makes; for scores the scope of the cells.
    """

    task: Task
    goes: str

    @property
    def kind(self) -> str:
        """``survey``, ``ratios``, ``score`` or ``measure``."""
        return next(name for name, kind in _KINDS.items() if isinstance(self.task, kind))

    @cached_property
    def key(self) -> str:
        """Content key: two studies that ask for the same work have the same job."""
        if isinstance(self.task, ScoreTask):
            return content_key([self.kind, self.goes, self.task.decisions, self.task.formats, self.task.batch])
        return content_key([self.kind, self.goes])

    def describe(self) -> str:
        """Say what is worked on, shortly.

        >>> Job(ScoreTask("fisher", (), ("fc",), ("int4-g64",)), "scope").describe()
        'score fc int4-g64'
        """
        task = self.task
        if isinstance(task, ScoreTask):
            place = f"{task.decisions[0]} {task.formats[0]}" if task.decisions else f"batch {task.batch}"
            return f"score {place}"
        if isinstance(task, MeasureTask):
            return f"measure {task.label or self.goes[:8]}"
        return self.kind

    def to_json(self) -> dict[str, Any]:
        return {"kind": self.kind, "goes": self.goes, "task": asdict(self.task)}

    @classmethod
    def from_json(cls, data: Mapping[str, Any]) -> Job:
        """Read what `to_json` wrote; lists become tuples again.

        >>> job = Job(ScoreTask("fisher", (("seed", 1),), ("fc",), ("int4-g64",)), "scope")
        >>> Job.from_json(job.to_json()) == job
        True
        """
        values = dict(data["task"])
        if data["kind"] == "score":
            values["settings"] = tuple((name, value) for name, value in values["settings"])
            values |= {name: tuple(values[name]) for name in ("decisions", "formats")}
        return cls(_KINDS[data["kind"]](**values), str(data["goes"]))
