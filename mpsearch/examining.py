"""What a machine has for a study: each finding is ok, warn or fail, with what to do."""

from __future__ import annotations

import os
import platform
import shutil
import sys
from collections.abc import Callable, Iterator
from dataclasses import asdict, dataclass
from importlib.metadata import PackageNotFoundError, version
from importlib.util import find_spec
from pathlib import Path

from packaging.version import Version

from mpsearch import __version__, registry
from mpsearch.errors import MpsearchError

#: Packages without which nothing runs, and the least versions that are declared.
_NEEDED = {"numpy": "2.0", "scipy": "1.14", "sqlalchemy": "2.1", "alembic": "1.14", "torch": "2.6", "transformers": "5"}
#: Any web page can drive an older one.
_SAFE_RAY = "2.52"
_GIB = 2**30


@dataclass(frozen=True, slots=True)
class Finding:
    """One line of the report.

    Attributes:
        what: what was looked at.
        state: ``ok``, ``warn`` (a study runs all the same) or ``fail`` (it would stop).
        found: what there is.
        fix: what to do; empty when there is nothing to do.
    """

    what: str
    state: str
    found: str
    fix: str = ""

    def to_json(self) -> dict[str, str]:
        return asdict(self)


def examine(storage: str = "") -> Iterator[Finding]:
    """Look at versions, disk, memory, threads, Ray and engines, and at a database if one is named.

    Nothing is started, changed or sent.
    """
    looks: list[Callable[[], Iterator[Finding]]] = [_versions, _disk, _memory, _threads]
    if storage:
        looks.append(lambda: _database(storage))
    for look in [*looks, _ray, _engines]:
        yield from look()


def _installed(package: str) -> str:
    try:
        return version(package)
    except PackageNotFoundError:
        return ""


def _versions() -> Iterator[Finding]:
    python = platform.python_version()
    fine = sys.version_info >= (3, 11)
    yield Finding("python", "ok" if fine else "fail", python, "" if fine else "install Python 3.11 or later")
    yield Finding("mpsearch", "ok", __version__)
    for package, least in _NEEDED.items():
        found = _installed(package)
        if not found:
            yield Finding(package, "fail", "not installed", f"pip install '{package}>={least}'")
        elif Version(found) < Version(least):
            yield Finding(
                package, "fail", f"{found}; {least} or later is needed", f"pip install -U '{package}>={least}'"
            )
        else:
            yield Finding(package, "ok", found)


def _disk() -> Iterator[Finding]:
    free = shutil.disk_usage(Path.cwd()).free / _GIB
    text = f"{free:.1f} GiB free here"
    if free < 0.1:
        yield Finding("disk", "fail", text, "free space, or work in a folder on another disk")
    elif free < 5:
        yield Finding("disk", "warn", text, "exports and models take gigabytes: free space")
    else:
        yield Finding("disk", "ok", text)


def available_memory(table: Path = Path("/proc/meminfo"), group: Path = Path("/sys/fs/cgroup")) -> float | None:
    """Gibibytes that a program can still take, by the system and by the limit of its group; None where nobody says."""
    found = []
    try:
        for line in table.read_text().splitlines():
            if line.startswith("MemAvailable:"):
                found.append(int(line.split()[1]) / 2**20)
        limit, used = (group / "memory.max").read_text().strip(), (group / "memory.current").read_text().strip()
        if limit.isdigit():
            found.append((int(limit) - int(used)) / _GIB)
    except (OSError, ValueError, IndexError):
        pass
    return min(found) if found else None


def _memory() -> Iterator[Finding]:
    free = available_memory()
    if free is None:
        yield Finding("memory", "ok", "the system does not say")
    elif free < 1:
        yield Finding("memory", "warn", f"{free:.1f} GiB available", "end other programs, or use --workers 1")
    else:
        yield Finding("memory", "ok", f"{free:.1f} GiB available; a model takes 4 bytes per weight and worker")


def _threads() -> Iterator[Finding]:
    cores = len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count() or 1
    asked = os.environ.get("OMP_NUM_THREADS", "")
    if asked.isdigit() and int(asked) > cores:
        text = f"OMP_NUM_THREADS={asked}, and there are {cores} processors"
        yield Finding("threads", "warn", text, f"export OMP_NUM_THREADS={cores}")
    else:
        yield Finding("threads", "ok", f"{cores} processors; each worker uses one thread")


def _database(storage: str) -> Iterator[Finding]:
    try:
        found = registry.load("upkeep", "look")(storage)
        if found.schema > found.newest:
            text = f"schema {found.schema}, this version knows {found.newest}"
            yield Finding("database", "fail", text, "pip install -U mpsearch")
            return
        if found.schema < found.newest:
            text = f"{found.shown}, {found.kind}, schema {found.schema} of {found.newest}"
            yield Finding("database", "warn", text, f"mpsearch db upgrade {storage if found.path else found.shown}")
            return
        with registry.make("stores", "sql", url=storage, create=False, read_only=bool(found.path)) as store:
            told = registry.load("upkeep", "journal")(store)
    except MpsearchError as error:
        yield Finding(
            "database", "fail", f"{error.code} {error.message}", error.advice or f"mpsearch explain {error.code}"
        )
        return
    yield Finding("database", "ok", f"{found.shown}, {told['version']}, schema {found.schema}")
    if "journal" in told:
        fine = told["journal"] == "wal"
        fix = "" if fine else f"open it once for writing: mpsearch db upgrade {storage}"
        yield Finding("journal", "ok" if fine else "warn", f"journal mode {told['journal']}", fix)
    else:
        left = told["connections"] - told["used"]
        fix = "" if left > 8 else "use fewer workers, or raise max_connections"
        text = f"{told['used']} of {told['connections']} in use"
        yield Finding("connections", "ok" if left > 8 else "warn", text, fix)


def _ray() -> Iterator[Finding]:
    found = _installed("ray")
    if not found:
        yield Finding("ray", "ok", "not installed; needed for clusters only: pip install 'mpsearch[ray]'")
    elif Version(found) < Version(_SAFE_RAY):
        text = f"{found} can be driven by any web page (CVE-2025-62593)"
        yield Finding("ray", "fail", text, f"pip install -U 'ray>={_SAFE_RAY}'")
    else:
        yield Finding("ray", "ok", f"{found}; started only when asked for")


#: Engine -> (module that it needs, how to get it).
_ENGINES = {
    "torch": ("torch", "pip install torch"),
    "onnxruntime": ("onnxruntime", "pip install 'mpsearch[onnx]'"),
    "openvino": ("openvino", "pip install 'mpsearch[openvino]'"),
    "torchao-compile": ("torchao", "pip install 'mpsearch[torchao]'"),
    "llama.cpp": ("", "install llama.cpp, so that llama-bench is on the PATH"),
}


def _engines() -> Iterator[Finding]:
    there, lacking = ["roofline", "table"], []
    for name, (module, how) in _ENGINES.items():
        found = find_spec(module) is not None if module else shutil.which("llama-bench") is not None
        if found:
            there.append(name)
        else:
            lacking.append(f"{name} ({how})")
    more = f"; not here: {', '.join(lacking)}" if lacking else ""
    yield Finding("kernels", "ok", f"{', '.join(sorted(there))}{more}")
