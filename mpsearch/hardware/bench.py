"""Timing kernels in a process of their own: one that hangs or crashes costs its cell, and nothing else."""

from __future__ import annotations

import json
import os
import selectors
import signal
import subprocess
import sys
import tempfile
from collections.abc import Mapping
from contextlib import suppress
from dataclasses import asdict, dataclass, field
from types import TracebackType
from typing import IO, Any

from mpsearch.errors import InputError
from mpsearch.hardware.clock import Clock
from mpsearch.hardware.kernel import Kernel, KernelTime

_QUIET = {"ORT_DISABLE_TELEMETRY": "1", "OMP_WAIT_POLICY": "PASSIVE", "TOKENIZERS_PARALLELISM": "false"}


@dataclass
class Bench:
    """A process that times kernels of one engine, started anew when it dies.

    Attributes:
        engine: name of the engine.
        settings: of the engine.
        threads: threads that a kernel may use.
        clock: how to time.
        patience: seconds after which a kernel counts as hanging, beside ten times the clock's limit; it includes
            loading the library.

    >>> with Bench("torch", clock=Clock(limit=0.1)) as bench:
    ...     found = bench.time(Kernel("linear", 64, 64, "fp32", 1))
    >>> found.status, 0 < found.seconds < 1
    ('ok', True)
    """

    engine: str
    settings: Mapping[str, Any] = field(default_factory=dict)
    threads: int = 1
    clock: Clock = field(default_factory=Clock)
    patience: float = 120.0
    _child: subprocess.Popen[str] | None = field(default=None, init=False, repr=False)
    _said: IO[bytes] = field(default_factory=tempfile.TemporaryFile, init=False, repr=False)

    def __enter__(self) -> Bench:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, value: BaseException | None, trace: TracebackType | None
    ) -> None:
        self.close()
        self._said.close()

    def time(self, kernel: Kernel, stream: int = 0) -> KernelTime:
        """Time a kernel; what goes wrong is in its status.

        Args:
            kernel: what to run.
            stream: bytes of weights to go through before one comes round again (see `child.time_kernel`).
        """
        clock = {key: value for key, value in asdict(self.clock).items() if key != "stopwatch"}
        request = {"kernel": asdict(kernel), "clock": clock, "stream": stream}
        found = self._ask(request)
        if isinstance(found, str):
            status = "timeout" if found.startswith("no answer") else "crashed"
            return KernelTime(kernel, status=status, reason=found)  # type: ignore[arg-type]
        return KernelTime.from_json(found)

    def identity(self) -> dict[str, str]:
        """What this machine and the engine are (see `mpsearch.hardware.identity`).

        Raises:
            InputError: the engine does not start (E432).
        """
        found = self._ask({"what": "identity"})
        if isinstance(found, str):
            raise InputError("E432", f"engine '{self.engine}' does not start: {found}")
        return {str(name): str(text) for name, text in found.items()}

    def close(self) -> None:
        """End the process."""
        if self._child is not None:
            self._child.kill()
            self._child.wait()
            for pipe in (self._child.stdin, self._child.stdout):
                # What was written to a process that is gone cannot be flushed.
                with suppress(BrokenPipeError):
                    if pipe is not None:
                        pipe.close()
            self._child = None

    def _ask(self, request: dict[str, Any]) -> dict[str, Any] | str:
        """The answer, or why there is none."""
        if self._child is None:
            self._child = self._start()
        child = self._child
        assert child.stdin is not None
        assert child.stdout is not None
        line = json.dumps({"engine": self.engine, "settings": dict(self.settings), "threads": self.threads, **request})
        try:
            child.stdin.write(line + "\n")
            child.stdin.flush()
        except BrokenPipeError:
            return self._died(child)
        with selectors.DefaultSelector() as selector:
            selector.register(child.stdout, selectors.EVENT_READ)
            patience = self.patience + 10 * self.clock.limit
            if not selector.select(patience):
                self.close()
                return f"no answer within {patience:g} s"
        answer = child.stdout.readline()
        if not answer:
            return self._died(child)
        found: dict[str, Any] = json.loads(answer)
        return found

    def _start(self) -> subprocess.Popen[str]:
        threads = {name: str(self.threads) for name in ("OMP_NUM_THREADS", "MKL_NUM_THREADS", "OPENBLAS_NUM_THREADS")}
        return subprocess.Popen(
            [sys.executable, "-m", "mpsearch.hardware.child"],
            stdin=subprocess.PIPE, stdout=subprocess.PIPE, stderr=self._said, text=True, encoding="utf-8",
            env={**os.environ, **_QUIET, **threads},
        )  # fmt: skip

    def _died(self, child: subprocess.Popen[str]) -> str:
        code = child.wait()
        self.close()
        if code < 0:
            try:
                return f"killed by {signal.Signals(-code).name}"
            except ValueError:
                return f"killed by signal {-code}"
        self._said.seek(0)
        last = self._said.read().decode(errors="replace").strip().rpartition("\n")[2][:300]
        return f"ended with exit code {code}" + (f": {last}" if last else "")
