"""What a machine is, as far as it decides how fast a kernel runs: part of the key of every measured time."""

from __future__ import annotations

import os
import platform
import subprocess
from collections.abc import Mapping
from pathlib import Path

from mpsearch.errors import InputError
from mpsearch.machine import processor

#: Instruction sets that kernels choose their path by.
_FEATURES = (
    "sse4_2", "avx", "avx2", "fma", "f16c", "avx512f", "avx512_vnni", "avx512_bf16", "avx512_fp16", "avx_vnni",
    "amx_tile", "amx_int8", "amx_bf16", "asimd", "asimddp", "i8mm", "sve", "sve2", "bf16",
)  # fmt: skip
_SYS = Path("/sys/devices/system/cpu/cpu0")


def identity(threads: int, versions: Mapping[str, str], device: str = "cpu") -> dict[str, str]:
    """Describe this machine.

    Args:
        threads: threads that a kernel may use.
        versions: of the engine and what it runs on.
        device: ``cpu`` or ``cuda``.

    Returns:
        Field -> text: processor, caches, threads, …, and ``version NAME`` for each version. What cannot be found is
        ``unknown``.

    >>> sorted(identity(1, {"engine": "1.0"}))[:3]
    ['architecture', 'caches', 'cores']
    """
    found = {
        "processor": processor(),
        "architecture": platform.machine(),
        "system": platform.system(),
        "cores": str(cores()),
        "features": _features(),
        "caches": _caches(),
        "frequency": _read(_SYS / "cpufreq" / "scaling_governor"),
        "memory": f"{memory_bytes() / 2**30:.0f} GiB",
        "threads": str(threads),
        "gpu": "none",
        "driver": "none",
    }
    if device != "cpu":
        found["gpu"], found["driver"] = _gpu()
    return found | {f"version {name}": text for name, text in sorted(versions.items())}


def cores() -> int:
    """Processors that this process may use."""
    return len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count() or 1


def memory_bytes() -> int:
    """Bytes of memory of the machine; 0 when it does not say."""
    try:
        return os.sysconf("SC_PAGE_SIZE") * os.sysconf("SC_PHYS_PAGES")
    except (ValueError, OSError):
        return 0


def largest_private_cache() -> int:
    """Bytes of the largest cache that a core has to itself; 1 MiB when the system does not say."""
    sizes = [size for level, size in _cache_sizes() if level == 2]
    return max(sizes, default=2**20)


def check_same(then: Mapping[str, str], now: Mapping[str, str], what: str) -> None:
    """Refuse times of another machine.

    Raises:
        InputError: E430, naming what differs.
    """
    differs = [name for name in sorted({*then, *now}) if then.get(name) != now.get(name)]
    if differs:
        shown = "; ".join(f"{n} was '{_short(then.get(n))}', is '{_short(now.get(n))}'" for n in differs[:4])
        raise InputError(
            "E430",
            f"{what} was measured on another machine, or with other versions",
            because=shown + (f"; and {len(differs) - 4} more" if len(differs) > 4 else ""),
            advice='measure here: mpsearch profile; or name the table to plan for that machine: engine = "file:PATH"',
        )


def _short(text: str | None) -> str:
    text = text or "none"
    return text if len(text) <= 60 else f"{text[:57]}…"


def _features() -> str:
    try:
        text = Path("/proc/cpuinfo").read_text(encoding="utf-8")
    except OSError:
        return "unknown"
    for line in text.splitlines():
        name, _, flags = line.partition(":")
        if name.strip() in ("flags", "Features"):
            there = set(flags.split())
            return " ".join(name for name in _FEATURES if name in there)
    return "unknown"


def _cache_sizes() -> list[tuple[int, int]]:
    """(level, bytes) of the data caches of the first core."""
    found = []
    for folder in sorted((_SYS / "cache").glob("index*")):
        kind, size, level = (_read(folder / name) for name in ("type", "size", "level"))
        if kind in ("Data", "Unified") and size[:-1].isdigit() and level.isdigit():
            found.append((int(level), int(size[:-1]) * {"K": 2**10, "M": 2**20}.get(size[-1], 1)))
    return found


def _caches() -> str:
    return " ".join(f"L{level} {size // 2**10}K" for level, size in _cache_sizes()) or "unknown"


def _read(path: Path) -> str:
    try:
        return path.read_text(encoding="utf-8").strip() or "unknown"
    except OSError:
        return "unknown"


def _gpu() -> tuple[str, str]:
    """Name and driver of the first GPU, as the driver's own tool tells it."""
    try:
        answer = subprocess.run(
            ["nvidia-smi", "--query-gpu=name,driver_version", "--format=csv,noheader"],
            capture_output=True, text=True, timeout=20, check=True,
        )  # fmt: skip
    except (OSError, subprocess.SubprocessError):
        return "unknown", "unknown"
    name, _, driver = answer.stdout.splitlines()[0].partition(",")
    return name.strip(), driver.strip()
