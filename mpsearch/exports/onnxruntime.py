"""ONNX Runtime: a language model as one ONNX file, in which every layer has the kernel of its own format."""

from __future__ import annotations

import tempfile
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import Any, BinaryIO, ClassVar

from mpsearch.capabilities import Capabilities, cannot_hold, capabilities
from mpsearch.errors import InputError, ResourceError
from mpsearch.exports import onnx_script
from mpsearch.exports.folder import write_folder
from mpsearch.exports.original import Original
from mpsearch.files import write_file
from mpsearch.model.model import Model, load_model
from mpsearch.plan import BitPlan

#: The graph, the tensors beside it, and the script that runs both.
MODEL, DATA, RUN = "model.onnx", "model.onnx.data", "run.py"
# What MatMulNBits multiplies in, by its accuracy level.
_LEVELS = {1: "fp32", 4: "int8"}
#: Tensors of fewer bytes stay inside the graph.
_INSIDE = 1024
#: Where tensors begin: pages, which ONNX Runtime maps into memory.
_PAGE = 4096


@dataclass(frozen=True)
class OnnxRuntimeExport:
    """Writes the quantised model as ``model.onnx``, for prompts and single tokens, with a cache (`onnx_model`).

    Codes, scales and zero points are those of the plan's own rounding: MatMulNBits for integers in groups,
    GatherBlockQuantized for embeddings, DynamicQuantizeMatMul or MatMulIntegerToFloat for int8 with rounded inputs,
    MatMul in fp32 for the rest. ``model.onnx.data`` holds the tensors, so that no file has a limit of 2 GiB; the bytes
    of each layer are those of the container ``onnxruntime``. ``run.py`` writes text with it.

    Memory: the model's fp32 weights three times.

    Attributes:
        source: folder of the model, for when none is given to `write`.
        force: replace an earlier export in the same folder.
        version: version of ONNX Runtime; the tested one when empty.
        assume: version whose facts count for a version that no table speaks of.
        accuracy: accuracy level of MatMulNBits. 1 multiplies in fp32, so that the file gives what was measured. 4
            rounds inputs to int8 in blocks: faster, most of all with 2 and 8 bits, and what latencies are measured
            with.
        exported: what `mpsearch.exports.onnx_model.export_model` wrote for this model, to save exporting again.

    >>> from mpsearch.format import Format
    >>> from mpsearch.layer import Layer, Layers
    >>> layers = Layers((Layer("fc", "linear", (8, 64)),))
    >>> OnnxRuntimeExport().refuses(BitPlan(layers, {"fc": Format.parse("int8-channel")}))
    ['fc: int8-channel is not held by ONNX Runtime; allowed int{2,4,8}-g{16,32,64,128,256}{,-asym}, ...']
    """

    reads: ClassVar[str] = "folder"

    source: str = ""
    force: bool = False
    version: str = ""
    assume: str = ""
    accuracy: int = 1
    exported: str = ""

    def __post_init__(self) -> None:
        if self.accuracy not in _LEVELS:
            raise InputError(
                "E102", f"accuracy = {self.accuracy!r}", advice="1 multiplies in fp32, 4 with inputs rounded to int8"
            )

    @property
    def able(self) -> Capabilities:
        """What ONNX Runtime can hold."""
        return capabilities("onnxruntime", self.version, self.assume)

    def refuses(self, plan: BitPlan) -> Sequence[str]:
        """Name every layer that ONNX Runtime has no kernel for: its name, what is wanted, what is allowed."""
        return self.able.violations(plan)

    def notes(self, plan: BitPlan) -> Sequence[str]:
        """Say what of ONNX Runtime a user should know, and how this file multiplies."""
        if self.accuracy == 1:
            said = "multiplies in fp32, as measured; latencies are measured with accuracy=4, which can be far faster"
        else:
            said = "MatMulNBits rounds inputs to int8 in blocks, which was not measured: its loss is not the plan's"
        return (said, *self.able.defaults)

    def bound(self, plan: BitPlan) -> float | None:
        """How far logits may be from our simulation's; None where MatMulNBits rounds inputs.

        Rounded inputs that lie between two codes may fall to either side.
        """
        if self.accuracy != 1:
            return None
        return 5e-3 if any(fmt.activation for fmt in plan.formats.values()) else 1e-4

    def write(self, plan: BitPlan, folder: Path, model: Any = None) -> Sequence[Path]:
        """Write the model.

        Args:
            plan: the plan.
            folder: a new or empty folder.
            model: the model with its original weights; calibrated for formats that are made from data.

        Raises:
            InputError: layers without a kernel (E301), the model is not the plan's (E302), the folder holds files
                (E303), there is no model (E101), it cannot be exported to ONNX (E431), or a library is not installed
                (E432).
            ResourceError: no room for it (E701).
        """
        if violations := self.refuses(plan):
            raise cannot_hold(self.able.title, violations)
        loaded = self._model(model)
        original = Original.of(plan, loaded, self.source)
        original.check(plan)
        proto, held = _outside(self._build(plan, loaded))
        writers: dict[str, Callable[[Path], object]] = {
            "plan.json": plan.save,
            MODEL: partial(write_file, content=proto.SerializeToString(deterministic=True)),
            DATA: partial(write_file, content=partial(_write_data, held=held)),
            RUN: partial(write_file, content=onnx_script.RUN),
        }
        for name, path in original.beside().items():
            writers[name] = partial(_copy, source=path)
        return write_folder(folder, "onnxruntime", writers, self.force)

    def _model(self, model: Any) -> Model:
        if isinstance(model, Model):
            return model
        if model is not None or not self.source:
            raise InputError(
                "E101",
                "the weights of the plan are written, and no model was given",
                advice="give the loaded model or its folder: source=…, on the command line --model",
            )
        return load_model(self.source)

    def _build(self, plan: BitPlan, model: Model) -> Any:
        """The planned graph, with its tensors inside."""
        from mpsearch.exports.onnx_model import cleaned, export_model
        from mpsearch.hardware.onnx_plan import build

        with tempfile.TemporaryDirectory(prefix="mpsearch-") as scratch:
            path = Path(self.exported or Path(scratch) / "exported.onnx")
            try:
                if not self.exported:
                    export_model(model, path)
                return cleaned(build(path, plan, model, accuracy=self.accuracy))
            except OSError as error:
                raise ResourceError("E701", f"cannot write a model into '{scratch}': {error}") from error


def _outside(proto: Any) -> tuple[Any, list[tuple[int, bytes]]]:
    """Move large tensors out of a graph: the graph, and where each of them begins in the file of tensors."""
    from onnx.external_data_helper import set_external_data

    end, held = 0, []
    for tensor in proto.graph.initializer:
        content = tensor.raw_data
        if len(content) < _INSIDE:
            continue
        offset = -(-end // _PAGE) * _PAGE
        held.append((offset, content))
        set_external_data(tensor, DATA, offset, len(content))
        tensor.ClearField("raw_data")
        end = offset + len(content)
    return proto, held


def _write_data(stream: BinaryIO, held: Sequence[tuple[int, bytes]]) -> None:
    for offset, content in held:
        stream.write(bytes(offset - stream.tell()))
        stream.write(content)


def _copy(path: Path, source: Path) -> None:
    write_file(path, source.read_bytes())
