"""Latency of each decision in each format: measured kernels, added up over the passes of a workload."""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass

import numpy as np

from mpsearch.errors import InputError
from mpsearch.format import Format
from mpsearch.hardware.calls import decision_calls, layer_calls, refuses
from mpsearch.hardware.kernel import Kernel, KernelTime
from mpsearch.hardware.profile import Correction, Profile
from mpsearch.layer import Decision, Layer, decisions
from mpsearch.plan import BitPlan
from mpsearch.tables import Array, CostTable
from mpsearch.workload import Step, Workload

#: A 95 % interval is so many standard errors wide.
_WIDTH = 2 * 1.96

_NO_TIME = "there is no time of"

#: (count, pass, what makes a sum of kernels that pass) of a workload.
Passes = Sequence[tuple[float, Step, Correction]]


@dataclass(frozen=True)
class Latency:
    """Seconds of a workload, from a profile of kernels.

    A cell is the sum over the passes of the workload of how often the decision's kernels run, times how long each
    takes. Where whole models were run in that pass, each sum is corrected by what they showed (`Correction`): the
    intercept is ``fixed``, the slope is in the cells; ``source["margin"]`` (`Correction.margin`) is what limits are
    divided by so that 19 of 20 plans keep their budgets. A cell's standard error counts each kernel's interval; kernels
    are not independent (one shape serves many layers), so errors add up.

    A format without a kernel is not offered (NaN); ``source["refused"]`` says why. Percentages of a budget refer to the
    model in the engine's 16-bit kernels, or its 32-bit ones where it has no others.

    Attributes:
        profile: times of kernels.
        resource: ``ttft``, ``tpot`` or ``latency``.
        condition: such as ``at context 512`` (`mpsearch.workload.canonical`).
    """

    profile: Profile
    resource: str
    condition: str

    @property
    def workload(self) -> Workload:
        """The passes."""
        return Workload.parse(self.resource, self.condition)

    def cost(self, layers: Sequence[Layer], formats: Sequence[Format]) -> CostTable:
        rows = decisions(layers)
        engine = self.profile.made
        self._check_corrected()
        passes = [(count, step, self.profile.correction(step)) for count, step in self.workload.steps]
        value = np.full((len(rows), len(formats)), np.nan)
        spread = np.full(value.shape, np.nan)
        refused: dict[str, list[list[int]]] = {}
        for i, row in enumerate(rows):
            for j, fmt in enumerate(formats):
                reason = next(filter(None, (refuses(layer, fmt, engine) for layer in row.layers)), "")
                cell = None if reason else self._cell(row, fmt, passes)
                if isinstance(cell, tuple):
                    value[i, j], spread[i, j] = cell
                else:
                    refused.setdefault(reason or str(cell), []).append([i, j])
        self._check_rows(rows, value, refused)
        margin = max(correction.margin for _, _, correction in passes)
        fixed = math.fsum(count * correction.intercept for count, _, correction in passes)
        return CostTable(
            tuple(row.name for row in rows),
            tuple(map(str, formats)),
            value,
            spread,
            unit="s",
            resource=f"{self.resource} {self.condition}".rstrip(),
            kind=self.profile.origin,
            fixed=fixed,
            reference=self._reference(rows, passes, fixed),
            source={
                "target": f"latency:{self.profile.engine}",
                "profile": self.profile.key,
                "passes": [
                    {"count": count, "pass": str(step), "correction": correction.to_json()}
                    for count, step, correction in passes
                ],
                "margin": margin,
                "modelled": ["which experts run"] if any(x.kind == "expert" for x in layers) else [],
                "refused": refused,
            },
        )

    def _cell(self, row: Decision, fmt: Format, passes: Passes) -> tuple[float, float] | str:
        """Seconds of a decision in a format and their standard error, or why there are none."""
        seconds, error = [], []
        for count, step, correction in passes:
            for often, kernel, found in self._times(row, fmt, step):
                if found is None:
                    return f"{_NO_TIME} {kernel}"
                if found.status != "ok":
                    return f"{kernel}: {found.status}: {found.reason}"
                seconds.append(count * often * correction.slope * found.seconds)
                error.append(count * often * correction.slope * (found.high - found.low) / _WIDTH)
        return math.fsum(seconds), math.fsum(error)

    def _times(self, row: Decision, fmt: Format, step: Step) -> list[tuple[float, Kernel, KernelTime | None]]:
        """(count, kernel, its time) of a decision in one pass; times of layers by name go before those of shapes."""
        calls = decision_calls(row, fmt, step, self.profile.made.fuses)
        if self.profile.layers and calls:
            named = self._named(row.name, calls[0][1])
            if named is not None:
                return [(1.0, calls[0][1], named)]
            members = [layer_calls(layer, fmt, step)[0][1] for layer in row.layers]
            each = [self._named(layer.name, kernel) for layer, kernel in zip(row.layers, members, strict=True)]
            if None not in each:
                return [(1.0, kernel, found) for kernel, found in zip(members, each, strict=True)]
        return [(often, kernel, self.profile.time(kernel)) for often, kernel in calls]

    def _named(self, name: str, kernel: Kernel) -> KernelTime | None:
        return self.profile.layers.get((name, kernel.format, kernel.tokens))

    def _check_corrected(self) -> None:
        """Refuse to set a plain sum of kernels beside passes that runs of the whole model corrected.

        Raises:
            InputError: E434.
        """
        known = {run.step for run in self.profile.wholes}
        missing = [str(step) for _, step in self.workload.steps if step not in known]
        if known and missing:
            raise InputError(
                "E434",
                f"no whole model was run for this pass: {', '.join(missing)}",
                because=f"there are runs of {', '.join(map(str, sorted(known)))}",
                advice=f"a study with this budget runs it: mpsearch run … --name … --budget "
                f"'{self.resource} <= … {self.condition}'",
            )

    def _check_rows(self, rows: Sequence[Decision], value: Array, refused: Mapping[str, list[list[int]]]) -> None:
        """Refuse a profile that lacks a decision altogether: that is a hole in the table, not a missing kernel.

        Raises:
            InputError: E434.
        """
        holes = {i: why for why, cells in refused.items() if why.startswith(_NO_TIME) for i, _ in cells}
        empty = [i for i in sorted(holes) if np.isnan(value[i]).all()]
        if not empty:
            return
        tokens = sorted({time.kernel.tokens for time in self.profile.every})
        raise InputError(
            "E434",
            f"{len(empty)} decisions have no time with {self.profile.engine}, first '{rows[empty[0]].name}'",
            because=f"{holes[empty[0]]}; it holds {len(self.profile.every)} times, "
            f"at {', '.join(map(str, tokens)) or 'no'} tokens",
            advice="time them: a study with this budget, mpsearch profile with this workload, or more rows",
        )

    def _reference(self, rows: Sequence[Decision], passes: Passes, fixed: float) -> float:
        """Seconds of the model as it is; 0 where the profile does not hold them."""
        total = [fixed]
        for row in rows:
            if row.layers[0].kind == "kv_cache":
                continue
            cells = (self._cell(row, Format.parse(text), passes) for text in ("bf16", "fp16", "fp32"))
            there = next((cell[0] for cell in cells if isinstance(cell, tuple)), None)
            if there is None:
                return 0.0
            total.append(there)
        return math.fsum(total)


def kernel_seconds(profile: Profile, plan: BitPlan, step: Step) -> float:
    """Sum of the profile's kernels that a plan runs in one pass, not corrected; NaN where one has no time."""
    target = Latency(profile, "tpot", "")
    total = []
    for row in plan.layers.decisions:
        cell = target._cell(row, plan.formats[row.layers[0].name], [(1.0, step, Correction())])
        total.append(cell[0] if isinstance(cell, tuple) else math.nan)
    return math.fsum(total)


def predicted(table: CostTable, choice: Sequence[int] | Array) -> tuple[float, float]:
    """Seconds of a choice and their standard error, what is fixed and the residual of the passes included.

    >>> table = CostTable(("a",), ("x",), [[2.0]], [[0.1]], "s", "tpot at context 8", "measured", fixed=1.0)
    >>> predicted(table, [0])
    (3.0, 0.1)
    """
    cells = [(i, int(j)) for i, j in enumerate(choice)]
    seconds = math.fsum(float(table.value[cell]) for cell in cells) + table.fixed
    error = math.fsum(float(table.spread[cell]) for cell in cells)
    residuals = [entry["correction"]["residual"] for entry in table.source.get("passes", ())]
    known = [residual for residual in residuals if residual is not None]
    return seconds, math.hypot(error, max(known, default=0.0) * seconds)
