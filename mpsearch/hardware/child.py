"""The process that runs kernels: reads one request per line, answers with one line, and may die without harm.

    python -m mpsearch.hardware.child

A request is a JSON object with ``engine`` (name and settings), ``kernel``, ``threads``, ``clock`` and ``stream`` (bytes
of weights to go through before one comes round again). Whatever a library prints goes to stderr.
"""

from __future__ import annotations

import json
import os
import sys
from dataclasses import replace
from typing import Any

from mpsearch import registry
from mpsearch.hardware.clock import Clock
from mpsearch.hardware.kernel import Engine, Kernel, KernelTime

#: Copies of one weight at most: a tiny one would else be thousands of nodes.
_MOST_COPIES = 256
#: From this many tokens on, all copies may take longer than the clock has; it then takes as many as it has time for.
_MANY_TOKENS = 16
_FEW_COPIES = 4


def time_kernel(
    engine: Engine, kernel: Kernel, *, threads: int = 1, stream: int = 0, clock: Clock | None = None
) -> KernelTime:
    """Time one kernel in this process.

    Args:
        engine: whose kernel.
        kernel: what to run.
        threads: threads that it may use.
        stream: bytes of weights to go through before one comes round again, as a model does that streams all its
            weights for each token; 0 runs one weight again and again, which stays in the cache.
        clock: how to time.
    """
    if reason := engine.refuses(kernel):
        return KernelTime(kernel, status="refused", reason=reason)
    clock = replace(clock or Clock(), stopwatch=engine.stopwatch(), threads=threads)
    copies = max(1, min(_MOST_COPIES, -(-stream // max(engine.bytes(kernel), 1))))
    if kernel.tokens >= _MANY_TOKENS and copies > _FEW_COPIES:
        once = engine.load(kernel, 1, threads)
        each = replace(clock, limit=clock.limit / 8, least=3).time(once.call).seconds / once.copies
        copies = max(_FEW_COPIES, min(copies, int(clock.limit / 8 / each)))
    loaded = engine.load(kernel, copies, threads)
    timing = clock.time(loaded.call)
    copies = loaded.copies
    return KernelTime(
        kernel, timing.seconds / copies, timing.low / copies, timing.high / copies, timing.samples, noise=timing.noise
    )


def answer(request: dict[str, Any]) -> dict[str, Any]:
    """Do one request."""
    engine = registry.make("engines", request["engine"], **request.get("settings", {}))
    if request.get("what") == "identity":
        from mpsearch.hardware.identity import identity

        return identity(request["threads"], engine.versions(), engine.device)
    kernel = Kernel(**request["kernel"])
    try:
        found = time_kernel(
            engine, kernel, threads=request["threads"], stream=request["stream"], clock=Clock(**request["clock"])
        )
    except MemoryError:
        found = KernelTime(kernel, status="failed", reason="not enough memory")
    except Exception as error:  # whatever a library raises is a cell's reason, never a study's end
        found = KernelTime(kernel, status="failed", reason=f"{type(error).__name__}: {str(error)[:300]}")
    return found.to_json()


def main() -> None:
    """Answer requests until the input ends."""
    # What a library prints to stdout must not be taken for an answer.
    answers = os.fdopen(os.dup(1), "w", encoding="utf-8")
    os.dup2(2, 1)
    for line in sys.stdin:
        answers.write(json.dumps(answer(json.loads(line))) + "\n")
        answers.flush()


if __name__ == "__main__":
    main()
