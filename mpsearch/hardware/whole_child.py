"""The process that runs one whole model: a request on stdin, an answer on stdout, and nothing else in its memory.

    python -m mpsearch.hardware.whole_child

A request is a JSON object with ``path`` of an ONNX file, ``threads``, ``clock`` and ``vocabulary``. Whatever a library
prints goes to stderr.
"""

from __future__ import annotations

import json
import os
import sys
from pathlib import Path
from typing import Any

import numpy as np

from mpsearch.hardware.clock import Clock
from mpsearch.hardware.engines.onnxruntime import session_options


def memory() -> tuple[int, int]:
    """Bytes of memory that this process holds, and the most that it has held; zeros where the system does not say.

    ``getrusage`` is no help: a process begins with the peak of the one that started it.

    >>> now, most = memory()
    >>> now <= most
    True
    """
    try:
        lines = Path("/proc/self/status").read_text(encoding="ascii").splitlines()
    except OSError:
        return 0, 0
    held = {name: rest.split() for name, _, rest in (line.partition(":") for line in lines)}
    now, most = (int(held[name][0]) * 1024 for name in ("VmRSS", "VmHWM"))
    return now, max(now, most)


def answer(request: dict[str, Any]) -> dict[str, Any]:
    """Load a model, run it under the clock, and tell its time and its memory."""
    import onnxruntime as ort

    before, _ = memory()
    options = session_options(request["threads"], optimise=True)
    session = ort.InferenceSession(request["path"], options, providers=["CPUExecutionProvider"])
    binding = session.io_binding()
    for given in session.get_inputs():
        binding.bind_ortvalue_input(
            given.name, ort.OrtValue.ortvalue_from_numpy(_numbers(given, request["vocabulary"]))
        )
    for made in session.get_outputs():
        held = ort.OrtValue.ortvalue_from_numpy(np.zeros(made.shape, dtype=np.float32))
        binding.bind_ortvalue_output(made.name, held)
    timing = Clock(**{**request["clock"], "threads": request["threads"]}).time(
        lambda: session.run_with_iobinding(binding)
    )
    now, most = memory()
    logits = binding.get_outputs()[0].numpy()
    if not np.isfinite(logits).all():
        raise ValueError("the logits are not finite")
    figures = {"seconds": timing.seconds, "low": timing.low, "high": timing.high, "samples": timing.samples}
    return {**figures, "noise": timing.noise, "peak_bytes": most - before, "held_bytes": now - before}


def _numbers(given: Any, vocabulary: int) -> Any:
    """Random tokens, or random keys or values, of the shape of an input."""
    drawn = np.random.default_rng(0)
    if given.type == "tensor(int64)":
        return drawn.integers(0, vocabulary, given.shape)
    return drawn.standard_normal(given.shape, dtype=np.float32)


def main() -> None:
    """Answer one request."""
    # What a library prints to stdout must not be taken for an answer.
    answers = os.fdopen(os.dup(1), "w", encoding="utf-8")
    os.dup2(2, 1)
    try:
        found = answer(json.load(sys.stdin))
    except MemoryError:
        found = {"failed": "not enough memory"}
    except Exception as error:  # whatever the library raises is a reason, never a traceback
        found = {"failed": f"{type(error).__name__}: {str(error)[:300]}"}
    answers.write(json.dumps(found) + "\n")
    answers.flush()


if __name__ == "__main__":
    main()
