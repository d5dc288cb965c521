"""Requests to time kernels, as users write them: an engine with settings, a workload, layers and formats by name."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from typing import Any

from mpsearch import registry
from mpsearch.budget import TIMED
from mpsearch.errors import InputError, UsageError
from mpsearch.format import Format, parse_formats
from mpsearch.hardware.clock import Clock
from mpsearch.hardware.latency import Latency
from mpsearch.hardware.profiling import Timekeeper
from mpsearch.layer import Layers
from mpsearch.tables import CostTable
from mpsearch.workload import Workload, canonical

#: Plans that are run whole in each pass, unless ``wholes=…`` of the engine says otherwise.
WHOLES = 7


def latency_here(
    layers: Layers, formats: Sequence[Format], engine: str, workload: str = "tpot at context 512"
) -> CostTable:
    """Seconds of every decision in every format, by kernels that are timed now and kept nowhere.

    Args:
        layers: of the model.
        formats: the menu.
        engine: name of the engine, with settings.
        workload: a resource of time and its condition.

    Raises:
        InputError: not a workload (E111, E113); as `Timekeeper.profile`.
    """
    resource, passes, at = parse_workload(workload)
    name, settings, threads, _ = parse_engine(engine)
    steps = [step for _, step in passes.steps]
    profile, _ = Timekeeper(threads=threads).profile(name, settings, layers, formats, steps)
    return Latency(profile, resource, at).cost(layers, formats)


def profile_request(
    request: Mapping[str, Any], report: Callable[[int, int], None] = lambda done, total: None
) -> dict[str, Any]:
    """Do a request of plain values, here or wherever it was sent to.

    Args:
        request: ``layers`` (as `Layers.to_json`), ``formats``, ``workloads`` (such as ``tpot at context 512``),
            ``engine`` (with settings) and ``limit`` (seconds for one kernel).
        report: called with (done, total).

    Returns:
        ``profile`` (as `Profile.to_json`) and ``notices`` (texts).

    Raises:
        InputError: as `Timekeeper.profile`; a workload that is none (E111, E113).
    """
    name, settings, threads, _ = parse_engine(request["engine"])
    menu = tuple(dict.fromkeys([*parse_formats(request["formats"]), Format.parse("bf16")]))
    steps = dict.fromkeys(step for text in request["workloads"] for _, step in parse_workload(text)[1].steps)
    keeper = Timekeeper(threads=threads, clock=Clock(limit=request["limit"]), report=report)
    profile, notices = keeper.profile(name, settings, Layers.from_json(request["layers"]), menu, tuple(steps))
    return {"profile": profile.to_json(), "notices": [str(notice) for notice in notices]}


def parse_workload(text: str) -> tuple[str, Workload, str]:
    """Read a resource of time and its condition: (resource, workload, condition).

    Raises:
        InputError: not one (E111, E113).

    >>> parse_workload("ttft at prompt 64")[1].steps
    ((1.0, Step(tokens=64, context=0, batch=1)),)
    """
    resource, _, condition = text.strip().partition(" ")
    if resource not in TIMED:
        raise InputError(
            "E113", f"workload '{text}'", advice="write one like 'tpot at context 2048' or 'ttft at prompt 512'"
        )
    at = canonical(resource, condition.removeprefix("at ").strip() or None)
    return resource, Workload.parse(resource, at), at


def parse_engine(text: str) -> tuple[str, dict[str, Any], int, int]:
    """Read ``NAME`` or ``NAME:SETTING=VALUE,…`` into (name, settings, threads, plans that are run whole).

    ``threads`` is 1 and ``wholes`` is `WHOLES` unless said, or 0 for engines that run no whole models.

    Raises:
        UsageError: a setting without a value (E115). InputError: threads or wholes that are no such numbers (E113).

    >>> parse_engine("torch:device=cuda,threads=2")
    ('torch', {'device': 'cuda'}, 2, 0)
    """
    name, _, rest = text.partition(":")
    settings: dict[str, Any] = {}
    for item in filter(None, rest.split(",")):
        key, sign, value = item.partition("=")
        if not sign:
            raise UsageError("E115", f"engine '{text}': '{item}' is not SETTING=VALUE", advice="torch:device=cuda")
        settings[key.strip()] = _value(value.strip())
    threads = settings.pop("threads", 1)
    wholes = settings.pop("wholes", WHOLES if name in registry.names("wholes") else 0)
    for what, count, least in (("threads", threads, 1), ("wholes", wholes, 0)):
        if not isinstance(count, int) or count < least:
            raise InputError("E113", f"engine '{text}': {what} is {count}", advice=f"give a whole number from {least}")
    return name, settings, threads, wholes


def _value(text: str) -> int | float | str:
    for kind in (int, float):
        try:
            return kind(text)
        except ValueError:
            continue
    return text
