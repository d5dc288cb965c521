"""llama.cpp: products of GGUF types by ggml's CPU backend, through the C interface of a library that the user built."""

from __future__ import annotations

import ctypes
import hashlib
import weakref
from collections.abc import Mapping
from ctypes import c_bool, c_char_p, c_int, c_int64, c_size_t, c_uint32, c_void_p
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, ClassVar

import numpy as np
from numpy.typing import NDArray

from mpsearch.errors import InputError
from mpsearch.format import Format
from mpsearch.formats.gguf_types import BLOCKS
from mpsearch.hardware.clock import Stopwatch
from mpsearch.hardware.kernel import Kernel, Loaded
from mpsearch.layer import Layer

_PLAIN = {"bf16": "BF16", "fp16": "F16", "fp32": "F32"}
_SUCCESS = 0
#: Rows that are really quantised: their bytes stand for all rows.
_QUANTISED = 16
#: Tensors and nodes of a graph beside its weights and products.
_SPARE = 8


class _InitParams(ctypes.Structure):
    """``struct ggml_init_params``."""

    _fields_ = (("mem_size", c_size_t), ("mem_buffer", c_void_p), ("no_alloc", c_bool))


class _PoolParams(ctypes.Structure):
    """``struct ggml_threadpool_params``."""

    _fields_ = (
        ("cpumask", c_bool * 512), ("n_threads", c_int), ("prio", c_int), ("poll", c_uint32), ("strict_cpu", c_bool),
        ("paused", c_bool),
    )  # fmt: skip


#: Function -> what it returns, what it takes.
_FUNCTIONS: Mapping[str, tuple[Any, tuple[Any, ...]]] = {
    "ggml_init": (c_void_p, (_InitParams,)),
    "ggml_free": (None, (c_void_p,)),
    "ggml_tensor_overhead": (c_size_t, ()),
    "ggml_graph_overhead_custom": (c_size_t, (c_size_t, c_bool)),
    "ggml_new_tensor_1d": (c_void_p, (c_void_p, c_int, c_int64)),
    "ggml_new_tensor_2d": (c_void_p, (c_void_p, c_int, c_int64, c_int64)),
    "ggml_mul_mat": (c_void_p, (c_void_p, c_void_p, c_void_p)),
    "ggml_get_rows": (c_void_p, (c_void_p, c_void_p, c_void_p)),
    "ggml_new_graph_custom": (c_void_p, (c_void_p, c_size_t, c_bool)),
    "ggml_build_forward_expand": (None, (c_void_p, c_void_p)),
    "ggml_quantize_chunk": (c_size_t, (c_int, c_void_p, c_void_p, c_int64, c_int64, c_int64, c_void_p)),
    "ggml_backend_cpu_init": (c_void_p, ()),
    "ggml_backend_cpu_set_n_threads": (None, (c_void_p, c_int)),
    "ggml_backend_cpu_set_threadpool": (None, (c_void_p, c_void_p)),
    "ggml_threadpool_params_init": (None, (c_void_p, c_int)),
    "ggml_threadpool_new": (c_void_p, (c_void_p,)),
    "ggml_threadpool_free": (None, (c_void_p,)),
    "ggml_backend_cpu_buffer_type": (c_void_p, ()),
    "ggml_backend_cpu_reg": (c_void_p, ()),
    "ggml_backend_reg_dev_get": (c_void_p, (c_void_p, c_size_t)),
    "ggml_backend_reg_get_proc_address": (c_void_p, (c_void_p, c_char_p)),
    "ggml_backend_dev_supports_op": (c_bool, (c_void_p, c_void_p)),
    "ggml_backend_alloc_ctx_tensors_from_buft": (c_void_p, (c_void_p, c_void_p)),
    "ggml_backend_buffer_free": (None, (c_void_p,)),
    "ggml_backend_tensor_set": (None, (c_void_p, c_void_p, c_size_t, c_size_t)),
    "ggml_backend_tensor_get": (None, (c_void_p, c_void_p, c_size_t, c_size_t)),
    "ggml_backend_graph_compute": (c_int, (c_void_p, c_void_p)),
    "ggml_backend_free": (None, (c_void_p,)),
}


@dataclass(frozen=True)
class LlamaCpp:
    """Kernels of llama.cpp on a processor: ``ggml_mul_mat`` and ``ggml_get_rows``.

    All GGUF types, bf16, fp16 and fp32. As llama.cpp does when it loads a model, a weight goes into the first layout
    that the backend has for the product (repacked in blocks of rows, or for AMX), and else stays as in the file. Inputs
    are fp32, which the backend rounds to int8 in blocks. How fast it is hangs on the instruction sets that the library
    was built for.

    Attributes:
        library: path of a shared library with ggml's CPU backend, such as ``libggml-cpu.so`` or ``libllama.so``.

    Source: ``ggml.h``, ``ggml-backend.h`` and ``ggml-cpu.h`` of ggml 0.25; ``llama-model-loader.cpp`` of llama.cpp.
    """

    name: ClassVar[str] = "llama.cpp"
    extra: ClassVar[str] = ""
    fuses: ClassVar[bool] = False
    cache_bits: ClassVar[int] = 16
    library: str = ""
    device: str = field(default="cpu", init=False)

    def missing(self) -> str:
        if not self.library:
            return (
                "no library is given: build llama.cpp with -DBUILD_SHARED_LIBS=ON, "
                "and set `library` to the path of its libggml-cpu.so"
            )
        try:
            self._ggml()
        except InputError as error:
            return error.message
        return ""

    def versions(self) -> Mapping[str, str]:
        found = {"library": hashlib.sha256(Path(self.library).read_bytes()).hexdigest()[:16]}
        library = self._ggml()
        for name in ("ggml_version", "ggml_commit"):
            if hasattr(library, name):
                function = getattr(library, name)
                function.restype = c_char_p
                found[name] = (function() or b"unknown").decode()
        return found

    def refuses(self, kernel: Kernel) -> str:
        fmt: Any = Format.parse(kernel.format)
        if fmt.activation is not None:
            return "llama.cpp rounds inputs in its own way, and takes no format of them"
        if fmt.family == "plain":
            return ""
        if fmt.family != "gguf":
            return f"llama.cpp multiplies GGUF types such as q4_K and floats, not {fmt}"
        block = BLOCKS[fmt.name].weights
        return f"{kernel.columns} columns are no multiple of the block of {block}" if kernel.columns % block else ""

    def bytes(self, kernel: Kernel) -> int:
        """Bytes of the tensor in a GGUF file; repacking keeps them."""
        return Format.parse(kernel.format).bytes(Layer("weight", "linear", (kernel.rows, kernel.columns)))

    def stopwatch(self) -> Stopwatch | None:
        return None

    def load(self, kernel: Kernel, copies: int, threads: int) -> Loaded:
        return Loaded(self.graph(kernel, copies, threads).compute, copies)

    def graph(self, kernel: Kernel, copies: int, threads: int) -> Graph:
        """Make a kernel ready, with what it gives at hand."""
        return Graph(self._ggml(), kernel, copies, threads)

    def _ggml(self) -> Any:
        """Open the library.

        Raises:
            InputError: it cannot be opened, or lacks a function (E432).
        """
        try:
            library = ctypes.CDLL(self.library)
        except OSError as error:
            raise InputError("E432", f"the library '{self.library}' does not load: {error}") from error
        for name, (returns, takes) in _FUNCTIONS.items():
            try:
                function = getattr(library, name)
            except AttributeError:
                raise InputError(
                    "E432", f"the library '{self.library}' has no {name}", advice="give the path of libggml-cpu.so"
                ) from None
            function.restype, function.argtypes = returns, takes
        return library


class Graph:
    """Products of one input with so many weights, in ggml's memory, which is freed with the object."""

    def __init__(self, ggml: Any, kernel: Kernel, copies: int, threads: int) -> None:
        self._ggml, self._kernel = ggml, kernel
        self._free: list[tuple[Any, Any]] = []
        weakref.finalize(self, _release, self._free)
        self._backend = self._held(ggml.ggml_backend_cpu_init(), ggml.ggml_backend_free)
        ggml.ggml_backend_cpu_set_n_threads(self._backend, threads)
        # Without a pool, every call starts its threads anew.
        wanted = _PoolParams()
        ggml.ggml_threadpool_params_init(ctypes.byref(wanted), threads)
        pool = self._held(ggml.ggml_threadpool_new(ctypes.byref(wanted)), ggml.ggml_threadpool_free)
        ggml.ggml_backend_cpu_set_threadpool(self._backend, pool)
        self.raw = file_bytes(ggml, kernel)
        context = self._context(copies + _SPARE)
        inputs, self._graph, outputs = self._products(context, self._weights(copies), copies)
        buffer = ggml.ggml_backend_alloc_ctx_tensors_from_buft(context, ggml.ggml_backend_cpu_buffer_type())
        self._held(buffer, ggml.ggml_backend_buffer_free)
        self.inputs = _inputs(kernel)
        ggml.ggml_backend_tensor_set(inputs, self.inputs.ctypes.data, 0, self.inputs.nbytes)
        self._output = outputs[-1]

    def compute(self) -> None:
        """Run all products."""
        if self._ggml.ggml_backend_graph_compute(self._backend, self._graph) != _SUCCESS:
            raise RuntimeError("ggml_backend_graph_compute failed")

    def output(self) -> NDArray[np.float32]:
        """The last product (tokens, rows), or rows looked up (tokens, columns)."""
        width = self._kernel.columns if self._kernel.kind == "embedding" else self._kernel.rows
        found = np.empty((self._kernel.tokens, width), dtype=np.float32)
        self._ggml.ggml_backend_tensor_get(self._output, found.ctypes.data, 0, found.nbytes)
        return found

    def _held(self, pointer: Any, free: Any) -> Any:
        if not pointer:
            raise MemoryError
        self._free.append((free, pointer))
        return pointer

    def _context(self, tensors: int) -> Any:
        ggml = self._ggml
        size = tensors * ggml.ggml_tensor_overhead() + ggml.ggml_graph_overhead_custom(tensors, False)
        return self._held(ggml.ggml_init(_InitParams(size, None, True)), ggml.ggml_free)

    def _weights(self, copies: int) -> list[Any]:
        """Weights in the first layout that the backend multiplies, filled."""
        ggml, kernel = self._ggml, self._kernel
        device = ggml.ggml_backend_reg_dev_get(ggml.ggml_backend_cpu_reg(), 0)
        for layout in (*_layouts(ggml, device), ggml.ggml_backend_cpu_buffer_type()):
            context = self._context(copies + _SPARE)
            shape = (_type(kernel), kernel.columns, kernel.rows)
            weights = [ggml.ggml_new_tensor_2d(context, *shape) for _ in range(copies)]
            buffer = ggml.ggml_backend_alloc_ctx_tensors_from_buft(context, layout)
            if not buffer:
                continue
            self._held(buffer, ggml.ggml_backend_buffer_free)
            asked = self._context(_SPARE)
            if ggml.ggml_backend_dev_supports_op(device, self._products(asked, weights[:1], 1)[2][0]):
                for weight in weights:
                    ggml.ggml_backend_tensor_set(weight, self.raw.ctypes.data, 0, self.raw.nbytes)
                return weights
            self._free.pop()
            self._free.pop()
            ggml.ggml_free(asked)
            ggml.ggml_backend_buffer_free(buffer)
        raise RuntimeError(f"ggml has no kernel for {kernel}")

    def _products(self, context: Any, weights: list[Any], copies: int) -> tuple[Any, Any, list[Any]]:
        """The input, the graph and the products."""
        ggml, kernel = self._ggml, self._kernel
        if kernel.kind == "embedding":
            inputs = ggml.ggml_new_tensor_1d(context, _number("I32"), kernel.tokens)
            outputs = [ggml.ggml_get_rows(context, weight, inputs) for weight in weights]
        else:
            inputs = ggml.ggml_new_tensor_2d(context, _number("F32"), kernel.columns, kernel.tokens)
            outputs = [ggml.ggml_mul_mat(context, weight, inputs) for weight in weights]
        graph = ggml.ggml_new_graph_custom(context, copies + _SPARE, False)
        for output in outputs:
            ggml.ggml_build_forward_expand(graph, output)
        return inputs, graph, outputs


def _release(held: list[tuple[Any, Any]]) -> None:
    for free, pointer in reversed(held):
        free(pointer)
    held.clear()


def _layouts(ggml: Any, device: Any) -> list[int]:
    """Layouts that the backend has beside the plain one; llama.cpp tries them in this order."""
    address = ggml.ggml_backend_reg_get_proc_address(ggml.ggml_backend_cpu_reg(), b"ggml_backend_dev_get_extra_bufts")
    if not address:
        return []
    found = ctypes.CFUNCTYPE(ctypes.POINTER(c_void_p), c_void_p)(address)(device)
    layouts: list[int] = []
    while found and (layout := found[len(layouts)]):
        layouts.append(layout)
    return layouts


def _number(name: str) -> int:
    from gguf import GGMLQuantizationType

    return int(GGMLQuantizationType[name])


def _type(kernel: Kernel) -> int:
    fmt: Any = Format.parse(kernel.format)
    return _number(_PLAIN[fmt.name] if fmt.family == "plain" else fmt.type_name.upper())


def _inputs(kernel: Kernel) -> NDArray[Any]:
    drawn = np.random.default_rng(0)
    if kernel.kind == "embedding":
        return drawn.integers(0, kernel.rows, kernel.tokens, dtype=np.int32)
    return drawn.standard_normal((kernel.tokens, kernel.columns), dtype=np.float32)


def file_bytes(ggml: Any, kernel: Kernel) -> NDArray[np.uint8]:
    """A random weight as it stands in a GGUF file, quantised by ggml; a few rows, over and over."""
    rows = min(kernel.rows, _QUANTISED)
    values = np.random.default_rng(1).standard_normal((rows, kernel.columns), dtype=np.float32)
    size = LlamaCpp().bytes(kernel) // kernel.rows
    held = np.empty((rows, size), dtype=np.uint8)
    importance = np.ones(kernel.columns, dtype=np.float32)
    ggml.ggml_quantize_chunk(
        _type(kernel), values.ctypes.data, held.ctypes.data, 0, rows, kernel.columns, importance.ctypes.data
    )
    return np.ascontiguousarray(np.resize(held, (kernel.rows, size)))
