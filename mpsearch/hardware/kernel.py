"""Kernels: what an engine runs for one layer in one format, and how long that took."""

from __future__ import annotations

import math
import re
from collections.abc import Callable, Mapping
from dataclasses import asdict, dataclass
from typing import Any, Literal, NamedTuple, Protocol, get_args

from mpsearch.hardware.clock import Stopwatch

#: What a format's name says of how its codes are found.
_RULE = re.compile(r"-(?:mse|gptq|fisher)\b")

Status = Literal["ok", "refused", "crashed", "timeout", "failed"]


@dataclass(frozen=True, slots=True, order=True)
class Kernel:
    """One product of ``tokens`` rows of inputs with a weight, or one look-up of as many rows.

    Attributes:
        kind: ``linear`` or ``embedding``.
        rows: output channels; entries of an embedding.
        columns: inputs; width of an embedding.
        format: name of the format.
        tokens: rows of the input: all new tokens of the batch.

    >>> Kernel.of("linear", 64, 128, "int4-g32-asym-gptq", 1).format
    'int4-g32-asym'
    """

    kind: str
    rows: int
    columns: int
    format: str
    tokens: int

    @classmethod
    def of(cls, kind: str, rows: int, columns: int, fmt: str, tokens: int) -> Kernel:
        """The kernel of a format: how its codes were found makes no difference to how fast they multiply."""
        return cls(kind, rows, columns, _RULE.sub("", fmt), tokens)

    def __str__(self) -> str:
        return f"{self.kind} {self.rows} x {self.columns} in {self.format} at {self.tokens} tokens"


@dataclass(frozen=True)
class KernelTime:
    """How long a kernel takes on one machine.

    Attributes:
        kernel: what ran.
        seconds: median of one call; NaN unless ``status`` is ``ok``.
        low: lower end of its 95 % interval.
        high: upper end.
        samples: samples that were taken.
        status: ``ok``; ``refused`` (no such kernel); ``crashed``, ``timeout`` or ``failed`` (it ran, and ended badly).
        reason: why it is not ok.
        noise: what makes it doubtful; empty when nothing does.
    """

    kernel: Kernel
    seconds: float = math.nan
    low: float = math.nan
    high: float = math.nan
    samples: int = 0
    status: Status = "ok"
    reason: str = ""
    noise: str = ""

    def to_json(self) -> dict[str, Any]:
        return {name: None if value != value else value for name, value in asdict(self).items()}

    @classmethod
    def from_json(cls, data: Mapping[str, Any]) -> KernelTime:
        """Read a time.

        Raises:
            ValueError: a status that there is not, or a time that is not within its interval above 0.
        """
        seconds, low, high = (math.nan if data[x] is None else float(data[x]) for x in ("seconds", "low", "high"))
        if data["status"] not in get_args(Status):
            raise ValueError(f"status is {data['status']!r}; it may be {', '.join(get_args(Status))}")
        if data["status"] == "ok" and not 0 < low <= seconds <= high < math.inf:
            raise ValueError(f"a time of {seconds} s is not between {low} and {high} s, above 0")
        return cls(
            Kernel(**data["kernel"]), seconds, low, high, data["samples"], data["status"], data["reason"], data["noise"]
        )


class Loaded(NamedTuple):
    """A kernel that is ready to run.

    Attributes:
        call: runs it once on each copy of its weight, one after the other.
        copies: how many there are.
    """

    call: Callable[[], object]
    copies: int


class Engine(Protocol):
    """Runs kernels the way one inference engine does.

    A frozen dataclass of its settings. Whatever imports the engine's library happens in `load` and `versions`, so that
    `refuses` answers on machines without it.
    """

    @property
    def name(self) -> str:
        """As users write it."""
        ...

    @property
    def extra(self) -> str:
        """What to install, such as ``onnx`` of ``mpsearch[onnx]``; empty when nothing is needed."""
        ...

    @property
    def device(self) -> str:
        """``cpu`` or ``cuda``."""
        ...

    @property
    def fuses(self) -> bool:
        """Whether linear siblings that are one decision run as one product."""
        ...

    @property
    def cache_bits(self) -> int:
        """Bits of a number that it does not round: of KV caches, activations, norms."""
        ...

    def missing(self) -> str:
        """Say why it cannot run here; empty when it can."""
        ...

    def versions(self) -> Mapping[str, str]:
        """Library -> version, of all that can change how fast it is."""
        ...

    def refuses(self, kernel: Kernel) -> str:
        """Say why it has no such kernel; empty when it has."""
        ...

    def bytes(self, kernel: Kernel) -> int:
        """Bytes of the weight as this engine keeps it in memory to run."""
        ...

    def load(self, kernel: Kernel, copies: int, threads: int) -> Loaded:
        """Make a kernel ready, with about so many copies of a random weight."""
        ...

    def stopwatch(self) -> Stopwatch | None:
        """What times work on the device by the device's own clock; none for a processor."""
        ...
