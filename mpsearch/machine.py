"""What this machine is, for the keys and the records of what was computed on it."""

from __future__ import annotations

import platform
from functools import cache
from importlib.metadata import PackageNotFoundError, version

import mpsearch


def processor() -> str:
    """Model name of the processor, where the system tells it."""
    try:
        with open("/proc/cpuinfo", encoding="utf-8") as stream:
            return next(line.partition(":")[2].strip() for line in stream if line.startswith("model name"))
    except (OSError, StopIteration):
        return platform.processor() or "unknown processor"


@cache
def machine() -> str:
    """Name this machine: processor and system."""
    return f"{processor()}, {platform.machine()} {platform.system()}"


@cache
def versions() -> dict[str, str]:
    """Versions that can change a computed number: mpsearch, Python's minor version, torch, transformers, tokenizers."""
    found = {"mpsearch": mpsearch.__version__, "python": ".".join(platform.python_version_tuple()[:2])}
    for package in ("torch", "transformers", "tokenizers", "numpy"):
        try:
            found[package] = version(package)
        except PackageNotFoundError:
            found[package] = "none"
    return found


def fingerprint() -> dict[str, str]:
    """All that makes numbers of two runs comparable: machine and versions."""
    return {"machine": machine(), **versions()}
