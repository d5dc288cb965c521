"""Whole models run under plans, to see how far the sum of their kernels is from the truth, and to correct it."""

from __future__ import annotations

import tempfile
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import asdict, dataclass, field, replace
from pathlib import Path
from typing import Any

import numpy as np

from mpsearch import registry
from mpsearch.errors import InputError, Notice
from mpsearch.format import Format
from mpsearch.hardware.calls import refuses
from mpsearch.hardware.clock import Clock
from mpsearch.hardware.kernel import Kernel
from mpsearch.hardware.latency import kernel_seconds
from mpsearch.hardware.profile import Profile, Whole
from mpsearch.keys import content_key
from mpsearch.layer import Layers
from mpsearch.plan import BitPlan
from mpsearch.workload import Step

#: Raised with every change of how whole models are run: it is part of each run's key.
WHOLE_VERSION = 2
#: Seconds that the clock may take for one run.
_LIMIT = 4.0


@dataclass(frozen=True)
class Runner:
    """Runs a model under plans, each pass exported once.

    Attributes:
        model: folder of the model, or the model.
        identity: digest of the model.
        threads: threads that the engine may use.
        clock: times one run.
        before: what the same study measured before, which is not measured again.
        known: key -> a run that was kept, or None.
        keep: keeps a run under its key.
        report: called with (done, total).
    """

    model: Any
    identity: str
    threads: int = 1
    clock: Clock = field(default_factory=lambda: Clock(limit=_LIMIT))
    before: Profile | None = None
    known: Callable[[str], Mapping[str, Any] | None] = lambda key: None
    keep: Callable[[str, Mapping[str, Any]], None] = lambda key, body: None
    report: Callable[[int, int], None] = lambda done, total: None

    def runs(self, profile: Profile, plans: Mapping[Step, Mapping[str, BitPlan]]) -> Iterator[Whole]:
        """Run the plans of each pass, by label; a run that ends badly raises.

        Raises:
            InputError: the engine cannot run whole models, or not this one (E431), a run crashed or hung (E436), or
                what runs it is not installed (E432).
        """
        if profile.engine not in registry.names("wholes"):
            raise InputError("E431", f"{profile.engine} runs single kernels here, not whole models")
        work = registry.make("wholes", profile.engine, model=self.model)
        total = sum(map(len, plans.values()))
        done = 0
        for step, of_step in plans.items():
            with tempfile.TemporaryDirectory(prefix="mpsearch-") as folder:
                for label, plan in of_step.items():
                    self.report(done, total)
                    yield self._run(profile, label, without_rules(plan), step, work, Path(folder))
                    done += 1
        self.report(total, total)

    def _run(self, profile: Profile, label: str, plan: BitPlan, step: Step, work: Any, folder: Path) -> Whole:
        formats = {name: str(fmt) for name, fmt in plan.formats.items()}
        clock = {name: value for name, value in asdict(self.clock).items() if name != "stopwatch"}
        key = content_key([WHOLE_VERSION, dict(profile.identity), self.identity, formats, asdict(step), clock])
        table = kernel_seconds(profile, plan, step)
        body = self.known(key)
        if body is not None:
            return replace(Whole.from_json(body), label=label, table=table)
        found = work.run(plan, step, self.threads, self.clock, folder)
        if found.status != "ok":
            raise InputError(
                "E436", f"{profile.engine} did not run the whole model ({step}): {found.status}: {found.reason}",
                advice="plan without it: wholes=0 after the engine's name",
            )  # fmt: skip
        run = Whole(
            step, label, table, found.seconds, found.low, found.high, found.weights_bytes, found.held_bytes, found.noise
        )
        if run.noise:
            return run
        self.keep(key, asdict(run))
        return replace(Whole.from_json(self.known(key) or asdict(run)), label=label, table=table)


def without_rules(plan: BitPlan) -> BitPlan:
    """The same plan with codes rounded to nearest: they multiply as fast, and need no calibration data."""
    formats = {name: Format.parse(Kernel.of("", 0, 0, str(fmt), 0).format) for name, fmt in plan.formats.items()}
    return replace(plan, formats=formats)


def spread_plans(
    layers: Layers, formats: Sequence[Format], profile: Profile, step: Step, count: int, seed: int = 0
) -> dict[str, BitPlan]:
    """Plans whose sums of kernels lie apart: the fastest, the slowest, and random ones between them.

    Each of the random ones gives a share of its decisions the fastest kernel and the others any; the shares differ.

    Raises:
        InputError: a decision whose kernels all ended badly in this pass (E431).
    """
    engine = profile.made
    options = []
    for row in layers.decisions:
        offered = [fmt for fmt in formats if not any(refuses(layer, fmt, engine) for layer in row.layers)]
        seconds = [
            kernel_seconds(profile, BitPlan(Layers(row.layers), dict.fromkeys((x.name for x in row.layers), fmt)), step)
            for fmt in offered
        ]
        there = [k for k in np.argsort(seconds, kind="stable") if np.isfinite(seconds[k])]
        if not there:
            raise InputError("E431", f"no kernel of '{row.name}' has a time ({step})")
        options.append([offered[k] for k in there])
    drawn = np.random.default_rng(seed)
    plans = {}
    for k in range(count):
        share = 1.0 - k / max(count - 1, 1)
        chosen: dict[str, Format] = {}
        for row, sorted_formats in zip(layers.decisions, options, strict=True):
            if k in (0, count - 1):
                fmt = sorted_formats[0 if k == 0 else -1]
            else:
                fmt = sorted_formats[0 if drawn.random() < share else int(drawn.integers(len(sorted_formats)))]
            chosen |= dict.fromkeys((layer.name for layer in row.layers), fmt)
        plans["fastest" if k == 0 else "slowest" if k == count - 1 else f"random {k}"] = BitPlan(layers, chosen)
    return plans


def corrected(
    runner: Runner, profile: Profile, layers: Layers, formats: Sequence[Format], steps: Sequence[Step], count: int
) -> tuple[Profile, tuple[Notice, ...]]:
    """A profile with runs of whole models for every pass; where these cannot be, the notice says why.

    Args:
        runner: runs them.
        profile: times of kernels.
        layers: of the model.
        formats: on offer.
        steps: the passes.
        count: plans that are run in each pass.
    """
    if not count or not steps:
        return profile, ()
    if runner.before is not None and {run.step for run in runner.before.wholes} >= set(steps):
        return profile.merged(wholes=runner.before.wholes), ()
    try:
        plans = {step: spread_plans(layers, formats, profile, step, count) for step in steps}
        wholes = list(runner.runs(profile, plans))
    except InputError as error:
        text = f"latency is the sum of kernels, not corrected by runs of the whole model: {error.message}"
        return profile, (Notice("W431", text),)
    noisy = [run for run in wholes if run.noise]
    notices = [Notice("W430", f"whole model, {run.label}, {run.step}: {run.noise}") for run in noisy[:1]]
    return profile.merged(wholes=wholes), tuple(notices)
