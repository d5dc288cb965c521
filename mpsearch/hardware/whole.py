"""Running a whole planned model in ONNX Runtime: what a plan takes end to end, not summed from its kernels."""

from __future__ import annotations

import json
import math
import os
import signal
import subprocess
import sys
import tempfile
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

from mpsearch.errors import InputError, ResourceError
from mpsearch.hardware.clock import Clock
from mpsearch.hardware.kernel import Status
from mpsearch.plan import BitPlan
from mpsearch.workload import Step

if TYPE_CHECKING:
    from mpsearch.model.model import Model

#: Tensors of fewer bytes stay inside the ONNX file.
_INSIDE = 1024


@dataclass(frozen=True)
class WholeTime:
    """What one pass of a whole model takes.

    Attributes:
        step: what ran.
        seconds: median of one pass; NaN unless ``status`` is ``ok``.
        low: lower end of its 95 % interval.
        high: upper end.
        samples: samples that were taken.
        noise: what makes it doubtful; empty when nothing does.
        peak_bytes: the most memory that the process held, less what it held before it loaded the model: reading the
            file, packing weights for the kernels, caches, activations and outputs. Not the libraries themselves, nor
            parts of the file that nothing reads, such as rows of an fp32 embedding. 0 where the system does not say
            (only Linux does).
        held_bytes: memory that it held after running, less the same: without what loading alone took.
        weights_bytes: bytes of the model's tensors in the file: codes, scales, zero points and floats.
        status: ``ok``; ``crashed``, ``timeout`` or ``failed``.
        reason: why it is not ok.
    """

    step: Step
    seconds: float = math.nan
    low: float = math.nan
    high: float = math.nan
    samples: int = 0
    noise: str = ""
    peak_bytes: int = 0
    held_bytes: int = 0
    weights_bytes: int = 0
    status: Status = "ok"
    reason: str = ""


def run_whole(
    plan: BitPlan,
    model: Model | str | Path,
    step: Step,
    *,
    threads: int = 1,
    clock: Clock | None = None,
    exported: str | Path | None = None,
    patience: float = 600.0,
) -> WholeTime:
    """Export a model, give each layer the kernel of its format, and time it in a process of its own.

    All optimisations of ONNX Runtime are on. The step's caches are full, with random contents, and its tokens random.
    Attention is computed by plain products in fp32 and copies its caches once to put the new tokens behind them.

    Args:
        plan: the plan.
        model: the model or its folder; calibrated for formats that are made from data.
        step: one prefill or decode step.
        threads: threads that ONNX Runtime may use.
        clock: how to time; ten seconds unless given.
        exported: what `mpsearch.hardware.onnx_export.export` wrote for this model and step, to save exporting again.
        patience: seconds after which the process counts as hanging; it includes loading the model.

    Returns:
        Time and memory; a crash or a hang is in its status.

    Raises:
        InputError: the model cannot be exported, or a layer's format has no kernel (E431); a library is not installed
            (E432); ``exported`` is of another model or step (E302); as `build`.
        ResourceError: the disk is full (E701).
    """
    from mpsearch.hardware.onnx_export import check_installed, described, export
    from mpsearch.hardware.onnx_plan import build, weights_bytes
    from mpsearch.model.model import as_model

    check_installed()
    found = as_model(model)
    with tempfile.TemporaryDirectory(prefix="mpsearch-") as folder:
        try:
            if exported is None:
                exported = Path(folder) / "exported.onnx"
                export(found, step, exported)
            proto = build(exported, plan, found)
            if described(found, step).items() - {(entry.key, entry.value) for entry in proto.metadata_props}:
                raise InputError("E302", f"'{exported}' was exported for another step than {step}")
            size = weights_bytes(proto)
            path = Path(folder) / "planned.onnx"
            save(proto, path)
        except OSError as error:
            raise ResourceError("E701", f"cannot write a model into '{folder}': {error}") from error
        del proto
        request = {"path": str(path), "threads": threads, "vocabulary": found.vocabulary}
        return _measured(step, request, clock or Clock(limit=10.0), size, patience)


def save(proto: Any, path: Path) -> None:
    """Write a ModelProto, its large tensors in ``NAME.data`` beside it, so that no file has a limit of 2 GiB."""
    import onnx

    onnx.save_model(
        proto, path, save_as_external_data=True, all_tensors_to_one_file=True, location=f"{path.name}.data",
        size_threshold=_INSIDE,
    )  # fmt: skip


def _measured(step: Step, request: dict[str, Any], clock: Clock, size: int, patience: float) -> WholeTime:
    settings = {key: value for key, value in asdict(clock).items() if key != "stopwatch"}
    threads = {name: str(request["threads"]) for name in ("OMP_NUM_THREADS", "OPENBLAS_NUM_THREADS")}
    try:
        ended = subprocess.run(
            [sys.executable, "-m", "mpsearch.hardware.whole_child"],
            input=json.dumps({**request, "clock": settings}), capture_output=True, text=True, encoding="utf-8",
            timeout=patience, check=False, env={**os.environ, "ORT_DISABLE_TELEMETRY": "1", **threads},
        )  # fmt: skip
    except subprocess.TimeoutExpired:
        return WholeTime(step, weights_bytes=size, status="timeout", reason=f"no answer within {patience:g} s")
    if ended.returncode:
        return WholeTime(step, weights_bytes=size, status="crashed", reason=_ending(ended.returncode))
    found = json.loads(ended.stdout)
    if "failed" in found:
        return WholeTime(step, weights_bytes=size, status="failed", reason=found["failed"])
    return WholeTime(step, weights_bytes=size, **found)


def _ending(code: int) -> str:
    """How a process ended.

    >>> _ending(-9), _ending(3)
    ('killed by SIGKILL', 'ended with exit code 3')
    """
    if code > 0:
        return f"ended with exit code {code}"
    names = {member.value: member.name for member in signal.Signals}
    return f"killed by {names.get(-code, f'signal {-code}')}"


@dataclass
class OnnxRuntimeWholes:
    """Runs whole plans of one model in ONNX Runtime; each pass is exported once.

    Attributes:
        model: the model, or its folder.
    """

    model: Any
    _loaded: Any = None

    def run(self, plan: BitPlan, step: Step, threads: int, clock: Clock, folder: Path) -> WholeTime:
        """Run a plan (see `run_whole`); what was exported stays in ``folder`` for the next plan of that pass."""
        from mpsearch.hardware.onnx_export import export
        from mpsearch.model.model import as_model

        if self._loaded is None:
            self._loaded = as_model(self.model)
        exported = folder / f"{step.tokens}-{step.context}-{step.batch}.onnx"
        if not exported.exists():
            export(self._loaded, step, exported)
        return run_whole(plan, self._loaded, step, threads=threads, clock=clock, exported=exported)
