"""ONNX Runtime on a processor: MatMulNBits of 2, 4 and 8 bits, int8 with inputs rounded as they come, 32-bit floats."""

from __future__ import annotations

import math
import re
from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from typing import Any, ClassVar

import numpy as np

from mpsearch.format import Format
from mpsearch.hardware.clock import Stopwatch
from mpsearch.hardware.engines.packages import missing_packages, package_versions
from mpsearch.hardware.kernel import Kernel, Loaded

_BITS = (2, 4, 8)
_BLOCKS = (16, 32, 64, 128, 256)
#: Multiplies in int8 and adds in int32. The levels below are up to 100 times slower with 2 or 8 bits.
ACCURACY_LEVEL = 4
_INPUTS = ("int8-tensor-asym", "int8-tensor-asym-static")
#: A file of ONNX holds 2 GiB with everything in it.
_MOST_WEIGHT = 2**31 - 2**24
#: Bytes of outputs that all copies of a kernel may write.
_MOST_OUTPUT = 64 * 2**20
OPSET = 21


@dataclass(frozen=True)
class OnnxRuntime:
    """Kernels of ONNX Runtime's CPU provider.

    - ``int2``, ``int4`` and ``int8`` in groups of 16, 32, 64, 128 or 256: MatMulNBits at accuracy level 4, which rounds
      inputs to int8 in blocks by itself; a zero point for each group with ``-asym``. Other bits have no kernel.
    - ``int8-channel@int8-tensor-asym``: DynamicQuantizeMatMul. ``…-static``: QuantizeLinear and MatMulIntegerToFloat.
    - 16- and 32-bit floats: MatMul in fp32, which is also how they are kept.
    - Embeddings: Gather in fp32; GatherBlockQuantized for 4 and 8 bits.

    Source: ONNX Runtime's ``docs/ContribOperators.md``.
    """

    name: ClassVar[str] = "onnxruntime"
    extra: ClassVar[str] = "onnx"
    fuses: ClassVar[bool] = False
    cache_bits: ClassVar[int] = 32
    device: str = field(default="cpu", init=False)

    def missing(self) -> str:
        return missing_packages("onnx", "onnxruntime")

    def versions(self) -> Mapping[str, str]:
        return package_versions("onnxruntime")

    def refuses(self, kernel: Kernel) -> str:
        fmt: Any = Format.parse(kernel.format)
        if fmt.weight.family == "plain":
            return f"ONNX Runtime rounds no inputs of {fmt.weight}" if fmt.activation else self._too_large(kernel)
        if fmt.weight.family != "int":
            return f"ONNX Runtime multiplies integers and fp32, not {fmt}"
        if fmt.activation is not None:
            return self._refuses_inputs(fmt, kernel)
        return self._refuses_blocks(fmt, kernel)

    def _refuses_inputs(self, fmt: Any, kernel: Kernel) -> str:
        weight = fmt.weight
        if kernel.kind != "linear":
            return "ONNX Runtime looks embeddings up, and rounds no inputs of them"
        if weight.bits != 8 or weight.granularity == "group" or weight.asymmetric:
            return f"ONNX Runtime multiplies rounded inputs with int8-channel or int8-tensor, not {weight}"
        if str(fmt.activation) not in _INPUTS:
            return f"ONNX Runtime rounds inputs to {' or '.join(_INPUTS)}, not {fmt.activation}"
        return ""

    def _refuses_blocks(self, fmt: Any, kernel: Kernel) -> str:
        bits = _BITS if kernel.kind == "linear" else (4, 8)
        if fmt.bits not in bits:
            return f"ONNX Runtime has kernels of {', '.join(map(str, bits))} bits here, not {fmt.bits}"
        if fmt.grid == "full":
            return f"ONNX Runtime's codes are centred or have a zero point; use {str(fmt).replace('-full', '')}"
        if fmt.granularity != "group" or fmt.group not in _BLOCKS:
            return f"ONNX Runtime has groups of {', '.join(map(str, _BLOCKS))}, not {fmt}"
        if kernel.columns % fmt.group:
            return f"{kernel.columns} columns are no multiple of the group of {fmt.group}"
        return ""

    def _too_large(self, kernel: Kernel) -> str:
        large = self.bytes(kernel) > _MOST_WEIGHT
        return f"a weight of {self.bytes(kernel) / 2**30:.1f} GiB is more than one file holds" if large else ""

    def bytes(self, kernel: Kernel) -> int:
        """Codes packed, fp32 scales, packed zero points; 4 bytes for a float."""
        fmt: Any = Format.parse(kernel.format)
        weights = kernel.rows * kernel.columns
        if fmt.weight.family == "plain":
            return 4 * weights
        if fmt.activation is not None:
            return weights + 8 * kernel.rows
        groups = kernel.rows * (kernel.columns // fmt.group)
        zeros = kernel.rows * math.ceil(kernel.columns // fmt.group * fmt.bits / 8) if fmt.asymmetric else 0
        return int(weights * fmt.bits // 8 + 4 * groups + zeros)

    def stopwatch(self) -> Stopwatch | None:
        return None

    def load(self, kernel: Kernel, copies: int, threads: int) -> Loaded:
        import onnxruntime as ort

        look_up = kernel.kind == "embedding"
        width = kernel.columns if look_up else kernel.rows
        copies = max(1, min(copies, _MOST_OUTPUT // (4 * kernel.tokens * width)))
        model, held = _model_of(kernel, copies)
        options = session_options(threads)
        options.add_external_initializers(list(held), [ort.OrtValue.ortvalue_from_numpy(a) for a in held.values()])
        session = ort.InferenceSession(model, options, providers=["CPUExecutionProvider"])
        binding = session.io_binding()
        binding.bind_ortvalue_input("x", ort.OrtValue.ortvalue_from_numpy(_inputs(kernel)))
        for copy in range(copies):
            output = ort.OrtValue.ortvalue_from_numpy(np.empty((kernel.tokens, width), dtype=np.float32))
            binding.bind_ortvalue_output(f"y{copy}", output)
        return Loaded(lambda: session.run_with_iobinding(binding), copies)


def _inputs(kernel: Kernel) -> Any:
    drawn = np.random.default_rng(0)
    if kernel.kind == "embedding":
        return drawn.integers(0, kernel.rows, kernel.tokens)
    return drawn.standard_normal((kernel.tokens, kernel.columns), dtype=np.float32)


def _model_of(kernel: Kernel, copies: int) -> tuple[bytes, dict[str, Any]]:
    """An ONNX file that multiplies ``x`` by each of the copies, and the arrays of the copies by name.

    Drawing all numbers anew would take longer than the timing, but each copy must differ: ONNX Runtime keeps weights of
    equal content once, and would run all copies on one that stays in the cache. So each copy's first four bytes tell
    its number. They are handed over beside the file, for writing and reading it would take longer still.
    """
    from onnx import TensorProto, helper, numpy_helper

    number, shape = TensorProto.FLOAT, [kernel.tokens, kernel.columns]
    if kernel.kind == "embedding":
        number, shape = TensorProto.INT64, [kernel.tokens]
    nodes, tensors = random_nodes(kernel, "w0", "y0")
    graph = helper.make_graph(
        [],
        "kernel",
        [helper.make_tensor_value_info("x", number, shape)],
        [helper.make_tensor_value_info(f"y{copy}", TensorProto.FLOAT, None) for copy in range(copies)],
    )
    arrays = {tensor.name: numpy_helper.to_array(tensor) for tensor in tensors}
    held = {}
    for copy in range(copies):
        for node in nodes:
            other = graph.node.add()
            other.CopyFrom(node)
            for names in (other.input, other.output):
                names[:] = [re.sub(r"^([wy])0", rf"\g<1>{copy}", name) for name in names]
        for tensor in tensors:
            name = tensor.name.replace("w0", f"w{copy}", 1)
            if tensor.name not in ("w0.codes", "w0.weight"):
                graph.initializer.add().CopyFrom(tensor)
                graph.initializer[-1].name = name
                continue
            held[name] = arrays[tensor.name].copy()
            first = np.float32(0.01 + copy / 2**16) if tensor.data_type == TensorProto.FLOAT else np.uint32(copy)
            held[name].reshape(-1).view(np.uint8)[:4] = np.frombuffer(first.tobytes(), np.uint8)
            outside = graph.initializer.add(
                name=name, data_type=tensor.data_type, dims=tensor.dims, data_location=TensorProto.EXTERNAL
            )
            outside.external_data.add(key="location", value="beside")
    opsets = [helper.make_opsetid("", OPSET), helper.make_opsetid("com.microsoft", 1)]
    text: bytes = helper.make_model(graph, opset_imports=opsets, ir_version=10).SerializeToString()
    return text, held


def random_nodes(kernel: Kernel, weight: str, output: str) -> tuple[list[Any], list[Any]]:
    """Nodes from ``x`` to ``output`` with a random weight, and the tensors that they read."""
    from onnx import helper, numpy_helper

    fmt: Any = Format.parse(kernel.format)
    rows, columns = kernel.rows, kernel.columns
    look_up = kernel.kind == "embedding"
    tensors = {}

    def hold(name: str, array: Any) -> str:
        tensors[name] = numpy_helper.from_array(array, f"{weight}.{name}")
        return f"{weight}.{name}"

    if fmt.weight.family == "plain":
        held = hold("weight", np.full((rows, columns) if look_up else (columns, rows), 0.01, dtype=np.float32))
        operator, inputs = ("Gather", [held, "x"]) if look_up else ("MatMul", ["x", held])
        nodes = [helper.make_node(operator, inputs, [output])]
    elif fmt.activation is not None:
        codes = hold("codes", np.full((columns, rows), 3, dtype=np.int8))
        scales = hold("scales", np.full(1 if fmt.weight.granularity == "tensor" else rows, 0.01, dtype=np.float32))
        if fmt.activation.static:
            step, zero = hold("step", np.float32(0.02)), hold("zero", np.uint8(128))
            nodes = [
                helper.make_node("QuantizeLinear", ["x", step, zero], [f"{output}.q"]),
                helper.make_node(
                    "MatMulIntegerToFloat", [f"{output}.q", codes, step, scales, zero], [output], domain="com.microsoft"
                ),
            ]
        else:
            nodes = [helper.make_node("DynamicQuantizeMatMul", ["x", codes, scales], [output], domain="com.microsoft")]
    else:
        nodes = [_block_node(kernel, fmt, hold, output)]
    return nodes, list(tensors.values())


def _block_node(kernel: Kernel, fmt: Any, hold: Callable[[str, Any], str], output: str) -> Any:
    from onnx import helper

    rows, groups = kernel.rows, kernel.columns // fmt.group
    drawn = np.random.default_rng(kernel.rows)
    size = fmt.group * fmt.bits // 8
    if kernel.kind == "embedding":
        codes = hold("codes", drawn.integers(0, 256, (rows, groups * size), dtype=np.uint8))
        scales = hold("scales", np.full((rows, groups), 0.01, dtype=np.float32))
        return helper.make_node(
            "GatherBlockQuantized", [codes, "x", scales], [output], domain="com.microsoft",
            bits=fmt.bits, block_size=fmt.group, gather_axis=0, quantize_axis=1,
        )  # fmt: skip
    codes = hold("codes", drawn.integers(0, 256, (rows, groups, size), dtype=np.uint8))
    scales = hold("scales", np.full((rows, groups), 0.01, dtype=np.float32))
    inputs = ["x", codes, scales]
    if fmt.asymmetric:
        inputs.append(hold("zeros", drawn.integers(0, 256, (rows, math.ceil(groups * fmt.bits / 8)), dtype=np.uint8)))
    return helper.make_node(
        "MatMulNBits", inputs, [output], domain="com.microsoft",
        K=kernel.columns, N=rows, bits=fmt.bits, block_size=fmt.group, accuracy_level=ACCURACY_LEVEL,
    )  # fmt: skip


def session_options(threads: int, optimise: bool = False) -> Any:
    """Options of a session: sequential, so many threads, and no fusing of what is timed apart."""
    import onnxruntime as ort

    options = ort.SessionOptions()
    options.intra_op_num_threads = threads
    options.inter_op_num_threads = 1
    options.log_severity_level = 3
    levels = ort.GraphOptimizationLevel
    options.graph_optimization_level = levels.ORT_ENABLE_ALL if optimise else levels.ORT_DISABLE_ALL
    return options
