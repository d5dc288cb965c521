"""From layers and formats to a profile: each distinct kernel is timed once, and kept."""

from __future__ import annotations

import math
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import asdict, dataclass, field, replace
from types import MappingProxyType
from typing import Any

from mpsearch import registry
from mpsearch.errors import InputError, Notice
from mpsearch.format import Format
from mpsearch.hardware.bench import Bench
from mpsearch.hardware.calls import kernels, refuses
from mpsearch.hardware.clock import Clock, machine_load
from mpsearch.hardware.engines.roofline import Roofline
from mpsearch.hardware.identity import cores, largest_private_cache
from mpsearch.hardware.in_memory import weight_bytes
from mpsearch.hardware.kernel import Engine, Kernel, KernelTime
from mpsearch.hardware.profile import Profile
from mpsearch.keys import content_key
from mpsearch.layer import Layer, decisions
from mpsearch.workload import Step

#: Raised with every change of how kernels are timed: it is part of each time's key.
TIMING_VERSION = 2
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
        before: what the same study timed before, good or bad, which is not timed again.
        known: key -> a time that was kept, or None.
        keep: keeps a time under its key.
        report: called with (done, total).
    """

    threads: int = 1
    clock: Clock = field(default_factory=Clock)
    before: Profile | None = None
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
        lacking = tuple(_lacking(layers, formats, made)) if steps else ()
        if isinstance(made, Roofline):
            times = tuple(made.model(kernel) for kernel in wanted)
            return Profile(engine, settings, {}, times, origin="modelled"), (_modelled(), *lacking)
        before = machine_load().get("steal", 0.0)
        with Bench(engine, settings, self.threads, self.clock) as bench:
            identity = bench.identity()
            streams = {Kernel.of("", 0, 0, str(fmt), 0).format: stream_bytes(layers, fmt, made) for fmt in formats}
            timed = [
                (_marked(time) if is_new else time, is_new)
                for time, is_new in self._times(bench, identity, wanted, streams)
            ]
            new = any(is_new for _, is_new in timed)
            again = bench.time(wanted[0], streams[wanted[0].format]) if new else None
        profile = Profile(engine, settings, identity, tuple(time for time, _ in timed))
        stolen = machine_load().get("steal", 0.0) - before
        return profile, (*lacking, *_noise(profile, again, stolen), *_ended_badly(profile))

    def _times(
        self, bench: Bench, identity: Mapping[str, str], wanted: Sequence[Kernel], streams: Mapping[str, int]
    ) -> Iterator[tuple[KernelTime, bool]]:
        """(time, whether it is new) of each kernel; one that was disturbed is timed once more."""
        clock = {name: value for name, value in asdict(self.clock).items() if name not in ("stopwatch", "threads")}
        for done, kernel in enumerate(wanted):
            self.report(done, len(wanted))
            stream = streams[kernel.format]
            made_by = [TIMING_VERSION, identity, bench.engine, dict(bench.settings), clock, stream, asdict(kernel)]
            key = content_key(made_by)
            before = self.before.time(kernel) if self.before and self.before.identity == identity else None
            body = self.known(key)
            if before is not None or body is not None:
                yield before or KernelTime.from_json(body or {}), False
                continue
            found = bench.time(kernel, stream)
            if found.noise:
                second = bench.time(kernel, stream)
                found = second if second.status == "ok" and not second.noise else found
            if found.noise or found.status not in ("ok", "refused"):
                # Others should not plan with what one bad hour showed.
                yield found, True
                continue
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


def check_offers(
    layers: Sequence[Layer], formats: Sequence[Format], engine: Engine, pins: Mapping[str, str] = MappingProxyType({})
) -> None:
    """Refuse a menu, or a pin, that leaves a decision without a kernel.

    Raises:
        InputError: E431, naming the layer and what each format lacks.
    """
    for row in decisions(layers):
        if row.name in pins:
            pinned = next(filter(None, (refuses(x, Format.parse(pins[row.name]), engine) for x in row.layers)), "")
            if pinned:
                raise InputError(
                    "E431", f"'{row.name}' is pinned to {pins[row.name]}, which {engine.name} has no kernel for",
                    because=pinned, advice="pin it to another format",
                )  # fmt: skip
            continue
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


def _lacking(layers: Sequence[Layer], formats: Sequence[Format], engine: Engine) -> Iterator[Notice]:
    """Formats that some decision could take and the engine has no kernel for."""
    rows = decisions(layers)
    for fmt in formats:
        takes = [row for row in rows if not any(map(fmt.refuses, row.layers))]
        why = [next(filter(None, (refuses(x, fmt, engine) for x in row.layers)), "") for row in takes]
        lacks = [(row.name, reason) for row, reason in zip(takes, why, strict=True) if reason]
        if lacks:
            where = f"{len(lacks)} of {len(takes)} decisions, first '{lacks[0][0]}'"
            yield Notice("W131", f"{fmt} is not offered for {where}: {lacks[0][1]}")


def _modelled() -> Notice:
    return Notice("W432", "latency is modelled by a roofline, not measured: check a plan on the machine itself")


def _marked(time: KernelTime) -> KernelTime:
    """A new time, with a mark when the machine was busy with other work."""
    load = machine_load().get("load", 0.0)
    busy = f"{load:.1f} processes wanted {cores()} processors" if load > cores() + 1 else ""
    return replace(time, noise=time.noise or busy)


def _noise(profile: Profile, again: KernelTime | None, stolen: float) -> Iterator[Notice]:
    """What says that the machine was busy."""
    if again is not None and stolen > 1.0:
        yield Notice("W430", f"the machine's host took {stolen:.1f} s of processor time away meanwhile")
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
