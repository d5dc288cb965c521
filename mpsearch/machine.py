"""What this machine is, for the keys and the records of what was computed on it."""

from __future__ import annotations

import os
import platform
import socket
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


def _started(pid: int) -> str:
    """When a process began, in the system's own ticks; empty when there is none, or the system does not tell."""
    try:
        with open(f"/proc/{pid}/stat", encoding="utf-8", errors="replace") as stream:
            # The name of the program stands in brackets and may hold spaces.
            fields = stream.read().rpartition(")")[2].split()
    except OSError:
        return ""
    return "" if fields[0] == "Z" else fields[19]


@cache
def _boot() -> str:
    try:
        with open("/proc/sys/kernel/random/boot_id", encoding="utf-8") as stream:
            return stream.read().strip()[:8]
    except OSError:
        return ""


def _namespace() -> str:
    """Number of the set of processes that this one sees; containers may share a host name, and each has its own."""
    try:
        return str(os.stat("/proc/self/ns/pid").st_ino)
    except OSError:
        return ""


def process_name(pid: int | None = None) -> str:
    """Name a process of this machine so that no later one has the same name: ``host:boot-namespace:pid:start``."""
    pid = os.getpid() if pid is None else pid
    return f"{socket.gethostname().replace(':', '_')}:{_boot()}-{_namespace()}:{pid}:{_started(pid)}"


def is_gone(name: str) -> bool:
    """Whether a process, named by `process_name`, has certainly ended; False when that cannot be known from here.

    >>> is_gone(process_name())
    False
    >>> is_gone("elsewhere:abc:1:2")
    False
    """
    parts = name.split(":")
    if len(parts) < 4 or not parts[2].isdigit():
        return False
    here = process_name().split(":")
    (boot, _, space), (boot_here, _, space_here) = parts[1].partition("-"), here[1].partition("-")
    if parts[0] != here[0] or space != space_here or not os.path.isdir("/proc/self"):
        return False
    # After a new start of the machine nothing from before is alive.
    return boot != boot_here or _started(int(parts[2])) != parts[3]
