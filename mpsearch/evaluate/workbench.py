"""A loaded model with its data, on which a study's tasks run."""

from __future__ import annotations

import time
from collections.abc import Sequence
from dataclasses import dataclass, field, replace
from functools import lru_cache
from typing import Any

from mpsearch import registry
from mpsearch.errors import InputError, Notice
from mpsearch.evaluate.first import First
from mpsearch.format import Format
from mpsearch.front import Measurement
from mpsearch.layer import Layers, decisions
from mpsearch.model.data import load_batches, load_tokenizer
from mpsearch.model.find import find_layers
from mpsearch.model.model import Model, load_model
from mpsearch.model.source import source_digest
from mpsearch.model.threads import one_thread
from mpsearch.plan import BitPlan
from mpsearch.scoring import mark_unreached
from mpsearch.tables import SensitivityTable
from mpsearch.tasks import Failed, MeasureTask, RatioTask, ScoreTask, Setup, Survey, SurveyTask, Task

#: Fewer sequences than this give a rough standard error.
FEW = 8


@dataclass
class Workbench:
    """A model, its layers and its data.

    Attributes:
        model: the model.
        calibration: batches that scores are taken on.
        validation: batches that plans are measured on.
        layers: what can be decided.
        notices: what the user should know about the data.
    """

    model: Model
    calibration: Sequence[Any]
    validation: Sequence[Any]
    layers: Layers
    notices: tuple[Notice, ...] = ()
    _single: dict[int, Sequence[Any]] = field(default_factory=dict, repr=False)
    _scorer: str = field(default="", repr=False)

    def __post_init__(self) -> None:
        self.model.calibrate(self.calibration, self.layers)

    @classmethod
    def load(cls, setup: Setup) -> Workbench:
        """Load what a setup names.

        Raises:
            InputError: the model or the text cannot be used.
        """
        model = load_model(setup.model, trust_remote_code=setup.trust_remote_code)
        found = (model.digest, source_digest(setup.calibration), source_digest(setup.validation))
        if setup.identity and found != setup.identity:
            raise InputError(
                "E142",
                f"'{setup.model}' or its texts changed since the study began",
                advice="start another study: --name",
            )
        if model.context and setup.length > model.context:
            raise InputError(
                "E504",
                f"length {setup.length} is more than the {model.context} tokens that the model takes",
                advice=f"--length {model.context}",
            )
        tokenizer = load_tokenizer(setup.model, trust_remote_code=setup.trust_remote_code)
        common = {"length": setup.length, "batch_size": setup.batch_size, "vocabulary": model.vocabulary}
        calibration = load_batches(setup.calibration, tokenizer, tokens=setup.tokens, **common)
        validation = load_batches(setup.validation, tokenizer, tokens=setup.validation_tokens, **common)
        if sum(len(batch["input_ids"]) for batch in validation) < 2:
            raise InputError(
                "E504",
                f"{setup.validation.text}: one sequence has no spread; plans are measured on at least 2",
                advice="more validation tokens, or a shorter length",
            )
        layers = find_layers(model, calibration, setup.ties, caches=setup.caches)
        notices = calibration.notices + validation.notices
        sequences = sum(len(batch["input_ids"]) for batch in validation)
        if sequences < FEW:
            text = f"plans are measured on {sequences} sequences only: losses and their errors are rough"
            notices += (Notice("W505", f"{text}; more validation tokens, or a shorter length"),)
        return cls(model, calibration, validation, layers, notices)

    def run(self, task: Task) -> Survey | dict[str, float] | SensitivityTable | Measurement | Failed:
        """Do one task on one thread, so that its result is the same on every worker."""
        with one_thread():
            if isinstance(task, SurveyTask):
                return Survey(self.layers, len(self.calibration), self.model.architecture, self.notices)
            if isinstance(task, RatioTask):
                report = registry.make("estimators", task.estimator).report(self.model, self.calibration, self.layers)
                return {row.layer: row.ratio for row in report}
            if isinstance(task, ScoreTask):
                if task.estimator != self._scorer:
                    # What one estimator left behind must not make another one look quick.
                    self.model.forget()
                    self._scorer = task.estimator
                start = time.perf_counter()
                table = self._score(task)
                return replace(table, source={**table.source, "seconds": time.perf_counter() - start})
            return self._measure(task)

    def _measure(self, task: MeasureTask) -> Measurement | Failed:
        evaluator = registry.make("evaluators", task.evaluator)
        whole = self.calibration if task.calibration else self.validation
        batches = First(whole, task.batches) if task.batches else whole
        try:
            measured: Measurement = evaluator.measure(self.model, BitPlan.from_json(task.plan), batches, task.label)
        except InputError as error:
            if error.code not in ("E421", "E511"):
                raise
            return Failed(error.code, error.message)
        return measured

    def _score(self, task: ScoreTask) -> SensitivityTable:
        estimator = registry.make("estimators", task.estimator, **dict(task.settings))
        refusal = estimator.refuses(self.model)
        if refusal:
            raise InputError("E506", f"estimator '{task.estimator}' cannot score '{self.model.name}': {refusal}")
        wanted = set(task.decisions)
        layers = [x for row in decisions(self.layers) if not wanted or row.name in wanted for x in row.layers]
        batches = self.calibration if task.batch is None else self._batch(task.batch)
        formats = [Format.parse(f) for f in task.formats]
        table: SensitivityTable = estimator.score(self.model, batches, layers, formats)
        return mark_unreached(table, layers, formats, estimator)

    def _batch(self, i: int) -> Sequence[Any]:
        # The same object each time, for what is remembered of a batch is remembered by identity.
        return self._single.setdefault(i, [self.calibration[i]])


@lru_cache(maxsize=1)
def workbench_of(setup: Setup) -> Workbench:
    """Load a workbench once per process."""
    return Workbench.load(setup)


@dataclass(frozen=True)
class Work:
    """Runs tasks on the workbench of a setup, in whatever process it is called."""

    setup: Setup

    def __call__(self, task: Task) -> Survey | dict[str, float] | SensitivityTable | Measurement | Failed:
        return workbench_of(self.setup).run(task)
