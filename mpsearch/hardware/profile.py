"""Profiles: how long kernels take on one machine, and how far whole models are from the sum of them."""

from __future__ import annotations

import json
import math
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import asdict, dataclass, field, replace
from functools import cached_property
from pathlib import Path
from typing import Any, Literal

import numpy as np

from mpsearch import registry
from mpsearch.errors import InputError
from mpsearch.files import write_file
from mpsearch.hardware.kernel import Engine, Kernel, KernelTime
from mpsearch.keys import content_key
from mpsearch.spread import student_factor
from mpsearch.workload import Step

SCHEMA = "mpsearch/profile"
SCHEMA_VERSION = 2
Origin = Literal["measured", "modelled"]
#: 95 % quantile of the normal distribution.
_ONE_SIDED = 1.6448536269514722


@dataclass(frozen=True)
class Whole:
    """A whole model that ran under a plan, beside what the table said of it.

    Attributes:
        step: the pass that was timed.
        label: what the plan is.
        table: sum of the table over the plan's kernels, in seconds.
        seconds: median of the whole pass.
        low: lower end of its 95 % interval.
        high: upper end.
        weights: bytes of weights that the engine was given.
        held: bytes of memory that it held after running, weights included.
        noise: what makes it doubtful.
    """

    step: Step
    label: str
    table: float
    seconds: float
    low: float
    high: float
    weights: int = 0
    held: int = 0
    noise: str = ""

    @classmethod
    def from_json(cls, data: Mapping[str, Any]) -> Whole:
        return cls(**{**data, "step": Step(**data["step"])})


def _one_of(name: str, value: Any, allowed: Sequence[str]) -> Any:
    if value not in allowed:
        raise ValueError(f"{name} is {value!r}; it may be {', '.join(allowed)}")
    return value


@dataclass(frozen=True)
class Correction:
    """What makes a sum of kernels the time of a whole pass: ``seconds = intercept + slope * table``.

    Attributes:
        intercept: seconds of everything that is no kernel of the table: attention, norms, calls.
        slope: how much a second of the table is worth.
        residual: root mean square of what is left, as a share of the whole; NaN when it cannot be known.
        runs: whole passes that it was fitted to.
    """

    intercept: float = 0.0
    slope: float = 1.0
    residual: float = math.nan
    runs: int = 0

    @classmethod
    def fit(cls, wholes: Sequence[Whole]) -> Correction:
        """Fit by least squares of relative errors, neither figure below 0.

        One run, or runs of equal sums, leave the slope at 1.

        >>> runs = [Whole(Step(1), "", t, 1.0 + 1.1 * t, 0.0, 0.0) for t in (1.0, 2.0, 4.0)]
        >>> found = Correction.fit(runs)
        >>> round(found.intercept, 6), round(found.slope, 6), found.residual < 1e-9, found.runs
        (1.0, 1.1, True, 3)
        """
        wholes = [run for run in wholes if math.isfinite(run.table)]
        if not wholes:
            return cls()
        table, whole = (np.array([getattr(run, name) for run in wholes]) for name in ("table", "seconds"))
        slope = 1.0
        intercept = max(0.0, float(np.average(whole - table, weights=1 / whole**2)))
        if len(wholes) > 1 and np.ptp(table) > 0.01 * table.max():
            # In shares of each run, for long runs are no more exact than short ones.
            rows = np.stack([1 / whole, table / whole], axis=1)
            fitted = np.linalg.lstsq(rows, np.ones(len(whole)), rcond=None)[0]
            if fitted[0] < 0:
                fitted = np.array([0.0, rows[:, 1].sum() / np.square(rows[:, 1]).sum()])
            # A longer sum that does not run longer is noise, not a law: kernels would cost nothing.
            intercept, slope = fitted if fitted[1] > 0 else (intercept, 1.0)
        left = (intercept + slope * table - whole) / whole
        free = len(wholes) - 2
        residual = math.sqrt(float((left**2).sum()) / free) if free > 0 else math.nan
        return cls(float(intercept), float(slope), residual, len(wholes))

    @property
    def margin(self) -> float:
        """How much longer than predicted a plan must be taken to be, so that 19 of 20 keep their budget.

        The normal distribution's one-sided 95 %, widened for few runs (`student_factor`); 1 where nothing is known.

        >>> round(Correction(0.0, 1.0, 0.02, 9).margin, 3), Correction().margin
        (1.04, 1.0)
        """
        free = self.runs - 2
        if free < 1 or math.isnan(self.residual):
            return 1.0
        return 1.0 + _ONE_SIDED * student_factor(free) * self.residual

    def to_json(self) -> dict[str, Any]:
        return asdict(self) | {"residual": None if math.isnan(self.residual) else self.residual}


@dataclass(frozen=True)
class Profile:
    """Times of kernels by one engine on one machine.

    Attributes:
        engine: name of the engine.
        settings: of the engine.
        identity: the machine, the engine's versions and its threads (`mpsearch.hardware.identity`).
        times: of kernels.
        wholes: of whole models.
        layers: (layer, format, tokens) -> time, of tables that name layers; these go before kernels of their shape.
        origin: ``measured``, or ``modelled``.

    >>> kernel = Kernel("linear", 8, 8, "fp32", 1)
    >>> profile = Profile("onnxruntime", times=(KernelTime(kernel, 1e-6, 1e-6, 1e-6, 11),))
    >>> profile.time(kernel) is profile.times[0], Profile.from_json(profile.to_json()) == profile
    (True, True)
    """

    engine: str
    settings: Mapping[str, Any] = field(default_factory=dict)
    identity: Mapping[str, str] = field(default_factory=dict)
    times: tuple[KernelTime, ...] = ()
    wholes: tuple[Whole, ...] = ()
    layers: Mapping[tuple[str, str, int], KernelTime] = field(default_factory=dict)
    origin: Origin = "measured"

    @cached_property
    def made(self) -> Engine:
        """The engine, set up."""
        engine: Engine = registry.make("engines", self.engine, **self.settings)
        return engine

    @cached_property
    def _by_kernel(self) -> dict[Kernel, KernelTime]:
        return {time.kernel: time for time in self.times}

    def time(self, kernel: Kernel) -> KernelTime | None:
        """The time of a kernel, good or bad; None when the profile has none."""
        return self._by_kernel.get(kernel)

    @property
    def every(self) -> tuple[KernelTime, ...]:
        """All times, of kernels and of layers."""
        return (*self.times, *self.layers.values())

    @property
    def noisy(self) -> tuple[KernelTime, ...]:
        """Times that something disturbed."""
        return tuple(time for time in self.every if time.noise)

    def correction(self, step: Step) -> Correction:
        """What makes a sum of kernels a whole pass, from the runs of that very step."""
        return Correction.fit([run for run in self.wholes if run.step == step])

    def merged(self, times: Iterable[KernelTime] = (), wholes: Iterable[Whole] = ()) -> Profile:
        """This profile with more; a kernel that is timed again takes the new time."""
        every = self._by_kernel | {time.kernel: time for time in times}
        return replace(self, times=tuple(every.values()), wholes=(*self.wholes, *wholes))

    @property
    def key(self) -> str:
        """Content key."""
        return content_key(self.to_json())

    def to_json(self) -> dict[str, Any]:
        return {
            "schema": SCHEMA,
            "version": SCHEMA_VERSION,
            "engine": self.engine,
            "settings": dict(self.settings),
            "origin": self.origin,
            "identity": dict(self.identity),
            "times": [time.to_json() for time in self.times],
            "wholes": [asdict(run) for run in self.wholes],
            "layers": [{"layer": key[0], **time.to_json()} for key, time in self.layers.items()],
        }

    @classmethod
    def from_json(cls, data: Mapping[str, Any]) -> Profile:
        """Read a profile.

        Raises:
            InputError: not one, or of a later version (E433).
        """
        if not isinstance(data, Mapping) or data.get("schema") != SCHEMA:
            raise InputError("E433", "not a profile: it lacks the schema 'mpsearch/profile'", advice="mpsearch profile")
        if data.get("version") != SCHEMA_VERSION:
            raise InputError(
                "E433",
                f"a profile of version {data.get('version')!r}; this mpsearch reads {SCHEMA_VERSION}",
                advice="time again: mpsearch profile, or a study of another name",
            )
        try:
            # Neither NaN, infinity nor half a surrogate pair: they have no key.
            content_key(data)
            of_layers = [(str(row["layer"]), KernelTime.from_json(row)) for row in data["layers"]]
            return cls(
                str(data["engine"]),
                dict(data["settings"]),
                dict(data["identity"]),
                tuple(KernelTime.from_json(row) for row in data["times"]),
                tuple(Whole.from_json(row) for row in data["wholes"]),
                {(name, time.kernel.format, time.kernel.tokens): time for name, time in of_layers},
                _one_of("origin", data["origin"], ("measured", "modelled")),
            )
        except (LookupError, TypeError, ValueError, AttributeError, ArithmeticError, RecursionError) as error:
            raise InputError("E433", f"a profile that cannot be read: {type(error).__name__} {error}") from error

    def save(self, path: Path | str) -> None:
        """Write a JSON file."""
        write_file(Path(path), json.dumps(self.to_json(), indent=1) + "\n")
