"""A roofline in place of kernels: bytes over bandwidth, or operations over peak, whichever is slower. Modelled."""

from __future__ import annotations

import time
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from typing import ClassVar

import numpy as np

from mpsearch.errors import InputError
from mpsearch.format import Format
from mpsearch.hardware.clock import Stopwatch
from mpsearch.hardware.kernel import Kernel, KernelTime, Loaded
from mpsearch.layer import Layer


@dataclass(frozen=True)
class Roofline:
    """A model of a machine that cannot be reached: ``max(bytes / bandwidth, operations / peak) + launch``.

    Bytes are those of the weight as our own files hold it, and of the inputs and outputs in ``cache_bits``; operations
    are two for each multiply-add. Source: Williams, Waterman and Patterson, "Roofline", 2009.

    Attributes:
        bandwidth: bytes per second that the memory gives.
        peak: operations per second on 16- or 32-bit numbers.
        peak8: operations per second where inputs are rounded to 8 bits or fewer; ``peak`` when 0.
        launch: seconds that every kernel takes before it does anything.

    >>> Roofline(1e9, 1e12).model(Kernel("linear", 1000, 1000, "int8-channel", 1)).seconds
    0.001006
    """

    name: ClassVar[str] = "roofline"
    extra: ClassVar[str] = ""
    fuses: ClassVar[bool] = True
    cache_bits: ClassVar[int] = 16
    bandwidth: float = 0.0
    peak: float = 0.0
    peak8: float = 0.0
    launch: float = 0.0
    device: str = "cpu"

    def __post_init__(self) -> None:
        for name in ("bandwidth", "peak"):
            value = getattr(self, name)
            if isinstance(value, bool) or not isinstance(value, (int, float)) or not value > 0:
                raise InputError(
                    "E113",
                    f"roofline: {name} is {value!r}",
                    advice="give bytes and operations per second: engine = 'roofline:bandwidth=25e9,peak=1e12'; "
                    "mpsearch.hardware.engines.roofline.measured() finds those of this machine",
                )

    def missing(self) -> str:
        return ""

    def versions(self) -> Mapping[str, str]:
        return {}

    def refuses(self, kernel: Kernel) -> str:
        return Format.parse(kernel.format).refuses(_layer(kernel))

    def bytes(self, kernel: Kernel) -> int:
        return Format.parse(kernel.format).bytes(_layer(kernel))

    def stopwatch(self) -> Stopwatch | None:
        return None

    def load(self, kernel: Kernel, copies: int, threads: int) -> Loaded:
        raise InputError("E431", "a roofline is a model: there is nothing to run")

    def model(self, kernel: Kernel) -> KernelTime:
        """The modelled time of a kernel; its interval is the value itself, for a model knows no spread."""
        activation = Format.parse(kernel.format).activation
        numbers = kernel.tokens * (kernel.columns if kernel.kind == "embedding" else kernel.rows + kernel.columns)
        moved = numbers * self.cache_bits / 8
        operations = 0
        if kernel.kind == "embedding":
            moved += self.bytes(kernel) * min(1.0, kernel.tokens / kernel.rows)
        else:
            moved += self.bytes(kernel)
            operations = 2 * kernel.rows * kernel.columns * kernel.tokens
        peak = self.peak8 if self.peak8 and activation is not None and activation.bits <= 8 else self.peak
        seconds = max(moved / self.bandwidth, operations / peak) + self.launch
        return KernelTime(kernel, seconds, seconds, seconds, 0)


def _layer(kernel: Kernel) -> Layer:
    return Layer("kernel", kernel.kind, (kernel.rows, kernel.columns))


def measured(size: int = 2**26) -> Roofline:
    """Measure the bandwidth and the fp32 peak of one thread of this machine, as NumPy reaches them.

    Args:
        size: bytes of the array that is copied; it should be larger than the caches.

    >>> measured(2**16).peak > 0
    True
    """
    source = np.ones(size // 8)
    target = np.empty_like(source)
    factor = np.ones((512, 512), dtype=np.float32)
    copy = min(_seconds(lambda: np.copyto(target, source)) for _ in range(5))
    product = min(_seconds(lambda: factor @ factor) for _ in range(5))
    return Roofline(bandwidth=2 * size / copy, peak=2 * 512**3 / product)


def _seconds(call: Callable[[], object]) -> float:
    before = time.perf_counter()
    call()
    return time.perf_counter() - before
