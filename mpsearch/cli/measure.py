"""The command that runs a plan whole, and compares what was predicted of it with what it takes."""

from __future__ import annotations

import json
import math
import sys
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import typer

from mpsearch.cli.options import DEFAULT_STORAGE, Budgets, Json, Quiet, Storage, open_study
from mpsearch.errors import InputError, UsageError

if TYPE_CHECKING:
    from mpsearch.budget import Budget
    from mpsearch.hardware.profile import Whole
    from mpsearch.plan import BitPlan
    from mpsearch.studying import Study
    from mpsearch.workload import Step


@dataclass(frozen=True)
class Compared:
    """One figure, predicted and measured.

    Attributes:
        what: resource with its condition, or the bytes of weights.
        predicted: in ``unit``.
        error: standard error of the prediction; 0 where it has none.
        measured: in ``unit``.
        low: lower end of the 95 % interval of what was measured.
        high: upper end.
        unit: ``ms`` or ``MiB``.
        note: what makes it doubtful, or what the prediction is made of.
    """

    what: str
    predicted: float
    error: float
    measured: float
    low: float
    high: float
    unit: str
    note: str = ""

    @property
    def off(self) -> float:
        """How far the prediction is from the measurement, as a share of it."""
        return self.predicted / self.measured - 1 if self.measured else 0.0


def measure(
    name: Annotated[str, typer.Argument(help="Name of the study.")],
    latency: Annotated[bool, typer.Option("--latency", help="Run the plan whole: time and memory.")] = False,
    plan_file: Annotated[
        list[Path] | None, typer.Option("--plan", help="Measure the loss of a plan from elsewhere; again for more.")
    ] = None,
    budget: Budgets = None,
    storage: Storage = DEFAULT_STORAGE,
    model: Annotated[str, typer.Option(help="Model folder, when it is not where the study had it.")] = "",
    limit: Annotated[float, typer.Option(help="Seconds that the clock may take for one pass.")] = 10.0,
    quiet: Quiet = False,
    as_json: Json = False,
) -> None:
    """Run a plan whole and compare time and memory with what was predicted, or measure plans from elsewhere.

    mpsearch measure tiny-llama --plan theirs.json

    mpsearch measure served --latency

    mpsearch measure served --latency --budget 'tpot <= 12 ms at context 2048'
    """
    if plan_file:
        _measure_losses(name, plan_file, storage, quiet or as_json, as_json)
    if not latency:
        if plan_file:
            return
        raise UsageError("E115", "nothing to measure", advice="--latency, or --plan FILE for its loss")
    from mpsearch.budget import parse_budgets

    study = open_study(name, storage)
    try:
        plan = study.plan(*(budget or []))
        wanted = parse_budgets(budget) if budget else study.budgets
        compared = compare(study, plan, wanted, model or study.spec.model, limit, quiet or as_json)
    finally:
        study.store.close()
    if as_json:
        sys.stdout.write(json.dumps([{**asdict(row), "off": row.off} for row in compared], indent=1) + "\n")
        return
    _print(compared)


def _measure_losses(name: str, files: Sequence[Path], storage: str, quiet: bool, as_json: bool) -> None:
    """Measure plan files beside the plans of a study, and say where they stand."""
    from mpsearch.cli.progress import Progress
    from mpsearch.cli.show import console, front_table, safe
    from mpsearch.plan import BitPlan

    stems = [file.stem for file in files]
    plans = {str(file) if stems.count(file.stem) > 1 else file.stem: BitPlan.load(file) for file in files}
    study = open_study(name, storage)
    study.told = progress = Progress(quiet)
    try:
        found = study.measure(plans)
        progress.end()
        for notice in study.notices:
            sys.stderr.write(f"{safe(str(notice))}\n")
        if as_json:
            sys.stdout.write(json.dumps([one.to_json() for one in found.values()], indent=1) + "\n")
            return
        chosen = study.plans[0].plan.assignment if study.plans else ""
        console().print(front_table(study.measurements, study.front, study.survey.layers.weights, chosen))
    finally:
        progress.end()
        study.store.close()


def compare(
    study: Study, plan: BitPlan, budgets: Sequence[Budget], model: str, limit: float, quiet: bool
) -> list[Compared]:
    """Run a plan in every pass that budgets name (see `Compared`).

    Raises:
        InputError: the study timed no kernels (E420), its engine runs no whole models (E431), or its times are of
            another machine (E430).
    """
    from mpsearch import registry
    from mpsearch.cli.progress import Progress
    from mpsearch.hardware.bench import Bench
    from mpsearch.hardware.clock import Clock
    from mpsearch.hardware.identity import check_same
    from mpsearch.hardware.latency import kernel_seconds
    from mpsearch.profiled import timed_steps
    from mpsearch.wholes import Runner

    profile = study.profile
    steps = timed_steps(budgets, study.spec.engine)
    if profile is None or not steps:
        raise InputError(
            "E420", f"study '{study.name}' has timed no kernels",
            advice="start one with a budget of time, such as 'tpot <= 14 ms at context 2048'",
        )  # fmt: skip
    progress = Progress(quiet)
    threads = int(profile.identity.get("threads", "1"))
    runner = Runner(
        model, plan.model.get("digest", ""), threads, Clock(limit=limit),
        report=lambda done, total: progress("whole", done, total),
    )  # fmt: skip
    try:
        if profile.engine in registry.names("wholes"):
            with Bench(profile.engine, profile.settings, threads) as bench:
                check_same(profile.identity, bench.identity(), f"the profile of study '{study.name}'")
        runs = {run.step: run for run in runner.runs(profile, {step: {"plan": plan} for step in steps})}
    finally:
        progress.end()
    found = []
    for step, run in runs.items():
        correction = profile.correction(step)
        table = kernel_seconds(profile, plan, step)
        predicted = correction.intercept + correction.slope * table
        error = 0.0 if correction.residual != correction.residual else correction.residual * predicted
        made = f"{table * 1e3:.4g} ms of kernels, " + (
            f"corrected by {correction.runs} runs" if correction.runs else "not corrected"
        )
        found.append(_milliseconds(str(step), predicted, error, run, "; ".join(filter(None, (made, run.noise)))))
    return [*_budgets(budgets, study, plan, runs), *found, *_memory(study, plan, runs)]


def _budgets(budgets: Sequence[Budget], study: Study, plan: BitPlan, runs: Mapping[Step, Whole]) -> Iterator[Compared]:
    """Each budget of time, predicted and measured, and whether it is kept."""
    from mpsearch.budget import TIMED
    from mpsearch.hardware.latency import Latency, predicted
    from mpsearch.workload import Workload

    assert study.profile is not None
    for budget in budgets:
        if budget.resource not in TIMED:
            continue
        table = Latency(study.profile, budget.resource, budget.condition).cost(
            plan.layers, tuple(dict.fromkeys(plan.formats.values()))
        )
        seconds, error = predicted(table, plan.choice(table.formats))
        passes = [(count, runs[step]) for count, step in Workload.parse(budget.resource, budget.condition).steps]
        took, low, high = (
            math.fsum(count * getattr(run, name) for count, run in passes) for name in ("seconds", "low", "high")
        )
        limit = budget.limit(table) * table.source["margin"]
        kept = "kept" if high <= limit else "NOT kept" if low > limit else "kept or not: within its interval"
        yield Compared(str(budget), 1e3 * seconds, 1e3 * error, 1e3 * took, 1e3 * low, 1e3 * high, "ms", kept)


def _milliseconds(what: str, predicted: float, error: float, run: Whole, note: str) -> Compared:
    return Compared(what, 1e3 * predicted, 1e3 * error, 1e3 * run.seconds, 1e3 * run.low, 1e3 * run.high, "ms", note)


def _memory(study: Study, plan: BitPlan, runs: Any) -> list[Compared]:
    """Bytes of weights, and of everything where a budget counts it."""
    from mpsearch.hardware.in_memory import weight_bytes
    from mpsearch.hardware.memory import Memory

    profile = study.profile
    assert profile is not None
    engine = profile.made
    kept = sum(x.weights for x in plan.layers.excluded) * engine.cache_bits // 8
    weights = kept + sum(weight_bytes(layer, plan.formats[layer.name], engine) for layer in plan.layers)
    found = []
    for step, run in runs.items():
        size = run.weights / 2**20
        found.append(Compared(f"weights, {step}", weights / 2**20, 0.0, size, size, size, "MiB", "in the file"))
        if step.context and run.held:
            at = f"at context {step.context}" + (f", batch {step.batch}" if step.batch > 1 else "")
            table = Memory(at, profile, study.survey.caches).cost(
                plan.layers, tuple(dict.fromkeys(plan.formats.values()))
            )
            cells = table.value[range(len(table.layers)), plan.choice(table.formats)]
            total, held = (math.fsum(cells) + table.fixed) / 2**20, run.held / 2**20
            origin, error = f"activations {table.source['activations are']}", table.source["spread"] / 2**20
            found.append(Compared(f"memory {at}", total, error, held, held, held, "MiB", origin))
    return found


def _print(compared: list[Compared]) -> None:
    from rich.table import Table
    from rich.text import Text

    from mpsearch.cli.show import console, safe

    table = Table("what", "predicted", "measured", "off", "", title="Predicted and measured", box=None)
    for column in (1, 2, 3):
        table.columns[column].justify = "right"
    for row in compared:
        error = f" ± {row.error:.2g}" if row.error else ""
        interval = f" ({row.low:,.4g} to {row.high:,.4g})" if row.high > row.low else ""
        measured = f"{row.measured:,.4g}{interval} {row.unit}"
        predicted = f"{row.predicted:,.4g}{error} {row.unit}"
        table.add_row(Text(safe(row.what)), predicted, measured, f"{100 * row.off:+.1f} %", Text(safe(row.note)))
    console().print(table)
