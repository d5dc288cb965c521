"""From layers and formats to a profile: each distinct kernel is timed once, and kept."""

from __future__ import annotations

import math
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import asdict, dataclass, field
from typing import Any

from mpsearch import registry
from mpsearch.budget import TIMED
from mpsearch.errors import InputError, Notice, UsageError
from mpsearch.format import Format, parse_formats
from mpsearch.hardware.bench import Bench
from mpsearch.hardware.calls import kernels, refuses
from mpsearch.hardware.clock import Clock, machine_load
from mpsearch.hardware.engines.roofline import Roofline
from mpsearch.hardware.identity import cores, largest_private_cache
from mpsearch.hardware.in_memory import weight_bytes
from mpsearch.hardware.kernel import Engine, Kernel, KernelTime
from mpsearch.hardware.latency import Latency
from mpsearch.hardware.profile import Profile
from mpsearch.keys import content_key
from mpsearch.layer import Layer, Layers, decisions
from mpsearch.tables import CostTable
from mpsearch.workload import Step, Workload, canonical

#: Raised with every change of how kernels are timed: it is part of each time's key.
TIMING_VERSION = 1
#: More would take longer to load than to time; most caches are smaller.
_MOST_STREAM = 2**28
#: A first kernel that takes this much longer, or less, in the end says that the machine changed meanwhile.
_DRIFT = 0.1


@dataclass(frozen=True)
class Timekeeper:
    """How kernels are timed, and where times are kept.

    Attributes:
        threads: threads that a kernel may use.
        clock: times one kernel.
        known: key -> a time that was kept, or None.
        keep: keeps a time under its key.
        report: called with (done, total).
    """

    threads: int = 1
    clock: Clock = field(default_factory=Clock)
    known: Callable[[str], Mapping[str, Any] | None] = lambda key: None
    keep: Callable[[str, Mapping[str, Any]], None] = lambda key, body: None
    report: Callable[[int, int], None] = lambda done, total: None

    def profile(
        self, engine: str, settings: Mapping[str, Any], layers: Sequence[Layer], formats: Sequence[Format],
        steps: Sequence[Step],
    ) -> tuple[Profile, tuple[Notice, ...]]:  # fmt: skip
        """Time every kernel that plans of these formats could run.

        Weights are streamed as a model streams them: a kernel goes through copies of its weight, as many bytes as the
        whole model has in that format (at most 256 MiB), before one comes round again.

        Args:
            engine: name of the engine.
            settings: of the engine.
            layers: of the model.
            formats: on offer.
            steps: the passes that will be predicted.

        Returns:
            The profile, and what to know about it.

        Raises:
            InputError: the engine is not installed (E432), more threads than cores (E435), or no kernel for a layer
                in any format (E431).
        """
        made: Engine = registry.make("engines", engine, **settings)
        if reason := made.missing():
            extra = f"pip install 'mpsearch[{made.extra}]'" if made.extra else ""
            raise InputError("E432", f"engine '{engine}': {reason}", advice=extra)
        if self.threads > cores():
            raise InputError(
                "E435",
                f"threads: got {self.threads}, but this process may use {cores()} processors",
                advice=f"threads = {cores()} or fewer; times of threads that wait for each other mean nothing",
            )
        check_offers(layers, formats, made)
        wanted = kernels(decisions(layers), formats, steps, made)
        if isinstance(made, Roofline):
            times = tuple(made.model(kernel) for kernel in wanted)
            return Profile(engine, settings, {}, times, origin="modelled"), (_modelled(),)
        with Bench(engine, settings, self.threads, self.clock) as bench:
            identity = bench.identity()
            streams = {Kernel.of("", 0, 0, str(fmt), 0).format: stream_bytes(layers, fmt, made) for fmt in formats}
            timed = list(self._times(bench, identity, wanted, streams))
            new = any(is_new for _, is_new in timed)
            again = bench.time(wanted[0], streams[wanted[0].format]) if new else None
        profile = Profile(engine, settings, identity, tuple(time for time, _ in timed))
        return profile, (*_noise(profile, again), *_ended_badly(profile))

    def _times(
        self, bench: Bench, identity: Mapping[str, str], wanted: Sequence[Kernel], streams: Mapping[str, int]
    ) -> Iterator[tuple[KernelTime, bool]]:
        """(time, whether it is new) of each kernel; one that was disturbed is timed once more."""
        clock = {name: value for name, value in asdict(self.clock).items() if name != "synchronise"}
        for done, kernel in enumerate(wanted):
            self.report(done, len(wanted))
            stream = streams[kernel.format]
            made_by = [TIMING_VERSION, identity, bench.engine, dict(bench.settings), clock, stream, asdict(kernel)]
            key = content_key(made_by)
            body = self.known(key)
            if body is not None:
                yield KernelTime.from_json(body), False
                continue
            found = bench.time(kernel, stream)
            if found.noise:
                second = bench.time(kernel, stream)
                found = second if second.status == "ok" and not second.noise else found
            self.keep(key, found.to_json())
            # Whoever kept a time first is right: everyone then plans with the same one.
            yield KernelTime.from_json(self.known(key) or found.to_json()), True
        self.report(len(wanted), len(wanted))


def stream_bytes(layers: Sequence[Layer], fmt: Format, engine: Engine) -> int:
    """Bytes that the whole model has in a format, to the next power of two; what cannot take it is counted alike."""
    taken = [layer for layer in layers if layer.kind != "kv_cache" and not refuses(layer, fmt, engine)]
    weights = sum(layer.weights for layer in taken)
    if not weights:
        return 0
    every = sum(layer.weights for layer in layers)
    size = sum(weight_bytes(layer, fmt, engine) for layer in taken) * every / weights
    return int(min(_MOST_STREAM, max(2 * largest_private_cache(), 2 ** round(math.log2(size)))))


def check_offers(layers: Sequence[Layer], formats: Sequence[Format], engine: Engine) -> None:
    """Refuse a menu that leaves a decision without a kernel.

    Raises:
        InputError: E431, naming the layer and what each format lacks.
    """
    for row in decisions(layers):
        reasons = [next(filter(None, (refuses(x, fmt, engine) for x in row.layers)), "") for fmt in formats]
        caches = row.layers[0].kind == "kv_cache"
        concerned = [r for r, fmt in zip(reasons, formats, strict=True) if (fmt.family == "kv") == caches]
        if concerned and all(concerned):
            raise InputError(
                "E431",
                f"{engine.name} has no kernel for '{row.name}' in any format on offer",
                because="; ".join(dict.fromkeys(concerned)),
                advice="offer bf16 as well, which every engine runs in some float",
            )


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
    name, settings = parse_engine(engine)
    threads = int(settings.pop("threads", 1))
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
    name, settings = parse_engine(request["engine"])
    threads = int(settings.pop("threads", 1))
    settings.pop("wholes", None)
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


def parse_engine(text: str) -> tuple[str, dict[str, Any]]:
    """Read ``NAME`` or ``NAME:SETTING=VALUE,…``.

    Raises:
        UsageError: a setting without a value (E115).

    >>> parse_engine("roofline:bandwidth=25e9,peak=1e12")
    ('roofline', {'bandwidth': 25000000000.0, 'peak': 1000000000000.0})
    """
    name, _, rest = text.partition(":")
    settings: dict[str, Any] = {}
    for item in filter(None, rest.split(",")):
        key, sign, value = item.partition("=")
        if not sign:
            raise UsageError("E115", f"engine '{text}': '{item}' is not SETTING=VALUE", advice="torch:device=cuda")
        try:
            settings[key.strip()] = float(value)
        except ValueError:
            settings[key.strip()] = value.strip()
    return name, settings


def _modelled() -> Notice:
    return Notice("W432", "latency is modelled by a roofline, not measured: check a plan on the machine itself")


def _noise(profile: Profile, again: KernelTime | None) -> Iterator[Notice]:
    """What says that the machine was busy."""
    load = machine_load().get("load", 0.0)
    if again is not None and load > 0.75 * cores() + 1:
        yield Notice("W430", f"the machine is busy: {load:.1f} processes wanted its {cores()} processors")
    if noisy := profile.noisy:
        first = noisy[0]
        more = f" and {len(noisy) - 1} more" if len(noisy) > 1 else ""
        count = f"{len(noisy)} of {len(profile.every)}"
        yield Notice("W430", f"{count} times are doubtful: {first.kernel}: {first.noise}{more}")
    if again is not None and again.status == "ok" and profile.times[0].status == "ok":
        change = again.seconds / profile.times[0].seconds - 1
        if abs(change) > _DRIFT:
            yield Notice("W430", f"{again.kernel} took {100 * change:+.0f} % in the end of what it took at first")


def _ended_badly(profile: Profile) -> Iterator[Notice]:
    for time in profile.times:
        if time.status not in ("ok", "refused"):
            yield Notice("W433", f"{time.kernel}: {time.status}: {time.reason}; not offered")
