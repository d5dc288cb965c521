"""OpenVINO on a processor: weights of 2, 4 and 8 bits, NF4 and MXFP4 that stay packed in memory, and plain floats."""

from __future__ import annotations

import sys
from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Any, ClassVar

import numpy as np

from mpsearch.errors import InputError
from mpsearch.format import Format
from mpsearch.formats.mx import BLOCK as MX_BLOCK
from mpsearch.hardware.clock import Stopwatch
from mpsearch.hardware.engines.coded_weight import pack, random_weight
from mpsearch.hardware.engines.packages import missing_packages, package_versions
from mpsearch.hardware.kernel import Kernel, Loaded

_BITS = (2, 4, 8)
_BLOCK = 16
#: In bf16, weights stay packed whose columns are a multiple of this and at least twice as many (seen with AMX).
_BF16_COLUMNS = 32
#: Number types of weights that multiply in each precision without losing anything.
_PLAIN = {"f32": ("fp32", "fp16", "bf16"), "bf16": ("bf16",), "f16": ("fp16",)}
#: Number types of weights that the plug-in unpacks as it multiplies.
_PACKED = {2: "u2", 4: "i4", 8: "i8"}
_UNSIGNED = {2: "u2", 4: "u4", 8: "u8"}
#: Bytes of outputs that all copies of a kernel may write.
_MOST_OUTPUT = 64 * 2**20
#: Copies in one model: each is a node that takes milliseconds to compile.
_MOST_COPIES = 128
_TELEMETRY = "openvino_telemetry"


@dataclass(frozen=True)
class OpenVino:
    """Kernels of OpenVINO's CPU plug-in.

    - ``int2``, ``int4`` and ``int8``, per channel or in groups of a multiple of 16, symmetric or ``-asym``; ``nf4`` and
      ``mxfp4``: the weight stays packed. With ``precision="f32"``, inputs of integers are rounded to int8 in groups of
      ``inputs`` on the way, where a group of weights is a multiple of that; other groups multiply in fp32.
    - Plain formats: in the precision, which is also how they are kept.
    - Embeddings: Gather in the precision; ``int4`` and ``int8`` stay packed.
    - Refused because the plug-in unpacks them when it loads, so that they run and are kept as fp32: integers of other
      bits, small floats of 6 and 8 bits, weights of one row, with ``precision="bf16"`` those whose columns are no
      multiple of 32 or fewer than 64, and everything packed with ``precision="f16"``.

    Attributes:
        precision: ``f32``, ``bf16`` or ``f16``: what is not packed runs in it (``INFERENCE_PRECISION_HINT``).
        inputs: columns that share a scale when inputs are rounded (``DYNAMIC_QUANTIZATION_GROUP_SIZE``); one number for
            a whole model, 0 for none.

    Raises:
        InputError: no such precision, or an impossible group (E107).

    Source: OpenVINO's documentation of ``ov::hint`` and of weight compression.
    """

    name: ClassVar[str] = "openvino"
    extra: ClassVar[str] = "openvino"
    fuses: ClassVar[bool] = False
    precision: str = "f32"
    inputs: int = 32
    device: str = field(default="cpu", init=False)

    def __post_init__(self) -> None:
        if self.precision not in _PLAIN:
            raise InputError(
                "E107", f"engines: 'openvino': precision is {self.precision!r}", advice=f"give {', '.join(_PLAIN)}"
            )
        if not isinstance(self.inputs, int) or self.inputs < 0:
            raise InputError("E107", f"engines: 'openvino': inputs is {self.inputs!r}", advice="give 0, 32, 64 or 128")

    @property
    def cache_bits(self) -> int:
        """Bits of the precision."""
        return 32 if self.precision == "f32" else 16

    def missing(self) -> str:
        return missing_packages("openvino")

    def versions(self) -> Mapping[str, str]:
        return package_versions("openvino")

    def refuses(self, kernel: Kernel) -> str:
        fmt: Any = Format.parse(kernel.format)
        if fmt.activation is not None:
            return "OpenVINO rounds inputs in its own way (setting `inputs`), and takes no format of them here"
        if kernel.kind == "embedding" and kernel.rows == 1:
            return "OpenVINO looks nothing up in an embedding of one row"
        if fmt.family == "plain":
            taken = _PLAIN[self.precision]
            return "" if fmt.name in taken else f"precision {self.precision} multiplies {', '.join(taken)}, not {fmt}"
        if self.precision == "f16":
            return f"OpenVINO unpacks {fmt} when it loads a model of precision f16; use f32 or bf16"
        if kernel.kind == "linear" and kernel.rows == 1:
            return "OpenVINO unpacks a weight of one row when it loads a model"
        odd = kernel.columns % _BF16_COLUMNS or kernel.columns < 2 * _BF16_COLUMNS
        if kernel.kind == "linear" and self.precision == "bf16" and odd:
            return f"OpenVINO unpacks a weight of {kernel.columns} columns in bf16; it takes 64, 96, 128, …"
        if fmt.family == "int":
            return self._refuses_integers(fmt, kernel)
        block = _block(fmt)
        if not block:
            return f"OpenVINO keeps int2, int4, int8, nf4 and mxfp4 packed; {fmt} would run as fp32"
        if kernel.kind == "embedding":
            return f"OpenVINO unpacks an embedding in {fmt} when it loads a model"
        return "" if kernel.columns % block == 0 else f"{kernel.columns} columns are no multiple of {block}"

    def _refuses_integers(self, fmt: Any, kernel: Kernel) -> str:
        bits = _BITS if kernel.kind == "linear" else _BITS[1:]
        if fmt.bits not in bits:
            return f"OpenVINO keeps integers of {', '.join(map(str, bits))} bits packed here; {fmt} would run as fp32"
        if fmt.bits == 2 and fmt.grid == "full":
            return f"OpenVINO has no signed codes of 2 bits; use {str(fmt).replace('-full', '-asym')}"
        if fmt.granularity == "group":
            if fmt.group % _BLOCK:
                return f"OpenVINO takes groups of a multiple of {_BLOCK}, not {fmt}"
            if kernel.columns % fmt.group:
                return f"{kernel.columns} columns are no multiple of the group of {fmt.group}"
        elif kernel.columns * fmt.bits % 8:
            return f"{kernel.columns} columns of {fmt.bits} bits fill no whole bytes"
        return ""

    def bytes(self, kernel: Kernel) -> int:
        """Codes packed, fp32 scales (one byte in MXFP4), zero points as wide as codes; a float in the precision."""
        fmt: Any = Format.parse(kernel.format)
        weights = kernel.rows * kernel.columns
        if fmt.family == "plain":
            return weights * (4 if self.precision == "f32" else 2)
        if block := _block(fmt):
            return weights // 2 + (1 if fmt.family == "mx" else 4) * (weights // block)
        bits = int(fmt.bits)
        groups = kernel.rows * (kernel.columns // int(fmt.group) if fmt.granularity == "group" else 1)
        zeros = -(-groups * bits // 8) if fmt.asymmetric or bits == 2 else 0
        return weights * bits // 8 + 4 * groups + zeros

    def stopwatch(self) -> Stopwatch | None:
        return None

    def load(self, kernel: Kernel, copies: int, threads: int) -> Loaded:
        width = kernel.columns if kernel.kind == "embedding" else kernel.rows
        copies = max(1, min(copies, _MOST_COPIES, _MOST_OUTPUT // (4 * kernel.tokens * width)))
        request, inputs = self.request(kernel, copies, threads)

        def call() -> object:
            # `infer` would make an array of each output.
            request.start_async()
            request.wait()
            return inputs  # the request reads this memory, so it lives as long as the call

        return Loaded(call, copies)

    def request(self, kernel: Kernel, copies: int, threads: int) -> tuple[Any, Any]:
        """Compile a model of so many products of one input; a request that is set up for it, and that input.

        Raises:
            InputError: the plug-in multiplies in another precision (E432), or unpacked the weight (E431).
        """
        ov = _import()
        settings = {
            "INFERENCE_NUM_THREADS": threads,
            "NUM_STREAMS": 1,
            "PERFORMANCE_HINT": "LATENCY",
            "INFERENCE_PRECISION_HINT": self.precision,
            "DYNAMIC_QUANTIZATION_GROUP_SIZE": str(self.inputs),
            # A thread that is bound to a core waits for whatever else runs there.
            "ENABLE_CPU_PINNING": False,
        }
        compiled = ov.Core().compile_model(_model(ov, kernel, copies), "CPU", settings)
        self._check(compiled, kernel, copies)
        inputs = _inputs(kernel)
        request = compiled.create_infer_request()
        request.set_input_tensor(ov.Tensor(inputs, shared_memory=True))
        return request, inputs

    def _check(self, compiled: Any, kernel: Kernel, copies: int) -> None:
        found = compiled.get_property("INFERENCE_PRECISION_HINT").get_type_name()
        if found != self.precision:
            raise InputError("E432", f"OpenVINO multiplies in {found} here, not in {self.precision}")
        kind = "Gather" if kernel.kind == "embedding" else "FullyConnected"
        nodes = [node.rt_info for node in compiled.get_runtime_model().get_ops()]
        ran = [str(node["runtimePrecision"].astype(str)) for node in nodes if node["layerType"].astype(str) == kind]
        packed = Format.parse(kernel.format).family == "plain" or not {"f32", "bf16", "f16"} & set(ran)
        if len(ran) != copies or not packed:
            raise InputError("E431", f"OpenVINO made {len(ran)} x {kind} in {', '.join(sorted(set(ran)))} of {kernel}")


def _block(fmt: Any) -> int:
    """Weights of a block in NF4 or MXFP4; 0 for every other format."""
    if fmt.family == "nf" and fmt.bits == 4 and not fmt.nested:
        return int(fmt.block)
    return MX_BLOCK if str(fmt) == "mxfp4" else 0


def _import() -> Any:
    """Import OpenVINO with its telemetry left out: loading it would else write an identifier and send an event."""
    if "openvino" not in sys.modules and _TELEMETRY not in sys.modules:
        sys.modules[_TELEMETRY] = None  # type: ignore[assignment]
        try:
            import openvino
        finally:
            del sys.modules[_TELEMETRY]
    import openvino

    return openvino


def _inputs(kernel: Kernel) -> Any:
    drawn = np.random.default_rng(0)
    if kernel.kind == "embedding":
        return drawn.integers(0, kernel.rows, kernel.tokens)
    return drawn.standard_normal((kernel.tokens, kernel.columns), dtype=np.float32)


def _model(ov: Any, kernel: Kernel, copies: int) -> Any:
    from openvino import opset13 as ops

    shape = [kernel.tokens] if kernel.kind == "embedding" else [kernel.tokens, kernel.columns]
    inputs = ops.parameter(shape, ov.Type.i64 if kernel.kind == "embedding" else ov.Type.f32)
    outputs = []
    for copy in range(copies):
        weight = _weight(ov, kernel, copy)
        if kernel.kind == "embedding":
            outputs.append(ops.gather(weight, inputs, ops.constant(np.array(0))))
        else:
            outputs.append(ops.matmul(inputs, weight, False, True))
    return ov.Model(outputs, [inputs], "kernel")


def _weight(ov: Any, kernel: Kernel, copy: int) -> Any:
    """A weight (rows, columns) in fp32; packed ones as the plug-in knows them: convert, subtract, multiply, reshape.

    Weights of two copies differ: equal constants are kept once.
    """
    from openvino import opset13 as ops

    fmt: Any = Format.parse(kernel.format)
    shape = (kernel.rows, kernel.columns)
    if fmt.family == "plain":
        kind = {"fp32": ov.Type.f32, "fp16": ov.Type.f16, "bf16": ov.Type.bf16}[fmt.name]
        values = np.random.default_rng(copy).standard_normal(shape, dtype=np.float32)
        # The upper half of an fp32 number is one in bf16.
        raw = values.view(np.uint32) >> 16 if fmt.name == "bf16" else values
        stored = _constant(
            ov, kind, shape, raw.astype({"fp32": np.float32, "fp16": np.float16}.get(fmt.name, np.uint16))
        )
        return stored if fmt.name == "fp32" else ops.convert(stored, ov.Type.f32)
    if fmt.family != "int":
        return _float_blocks(ov, kernel, fmt, copy)
    drawn = random_weight(kernel, copy)
    rows, groups, _ = drawn.codes.shape
    codes, zeros, kind = drawn.codes, drawn.zeros, _PACKED[fmt.bits]
    if zeros is not None:
        kind = _UNSIGNED[fmt.bits]
    elif fmt.bits == 2:  # there are no signed codes of 2 bits
        codes, zeros = codes + 1, np.ones((rows, groups), dtype=np.int16)
    weight = ops.convert(_constant(ov, getattr(ov.Type, kind), codes.shape, pack(codes, fmt.bits)), ov.Type.f32)
    if zeros is not None:
        kept = _constant(ov, getattr(ov.Type, kind), (rows, groups, 1), pack(zeros, fmt.bits))
        weight = ops.subtract(weight, ops.convert(kept, ov.Type.f32))
    weight = ops.multiply(weight, ops.constant(drawn.scales[:, :, None]))
    return ops.reshape(weight, ops.constant(np.array(shape)), False)


def _float_blocks(ov: Any, kernel: Kernel, fmt: Any, copy: int) -> Any:
    """A weight in NF4 with fp32 scales, or in MXFP4 with scales that are powers of two."""
    from openvino import opset13 as ops

    rng = np.random.default_rng(copy)
    block, kind = _block(fmt), ov.Type.nf4 if fmt.family == "nf" else ov.Type.f4e2m1
    shape = (kernel.rows, kernel.columns // block, block)
    weight = ops.convert(
        _constant(ov, kind, shape, rng.integers(0, 256, kernel.rows * kernel.columns // 2)), ov.Type.f32
    )
    if fmt.family == "nf":
        scales = ops.constant(rng.uniform(0.01, 0.02, (*shape[:2], 1)).astype(np.float32))
    else:
        codes = _constant(ov, ov.Type.f8e8m0, (*shape[:2], 1), rng.integers(119, 121, shape[:2]))
        scales = ops.convert(codes, ov.Type.f32)
    return ops.reshape(ops.multiply(weight, scales), ops.constant(np.array((kernel.rows, kernel.columns))), False)


def _constant(ov: Any, kind: Any, shape: tuple[int, ...], raw: Any) -> Any:
    """A constant of any number type, from the numbers that its bytes are."""
    from openvino import opset13 as ops

    held = ov.Tensor(kind, ov.Shape(list(shape)))
    taken = raw.astype(np.uint8) if raw.dtype.kind == "i" else raw
    held.data.reshape(-1).view(np.uint8)[:] = np.ascontiguousarray(taken).reshape(-1).view(np.uint8)
    return ops.constant(held)
