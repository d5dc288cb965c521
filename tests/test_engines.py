"""Engines: the suite of all, and that the kernels that are timed are those of their formats."""

from __future__ import annotations

import os
import warnings
from pathlib import Path
from typing import Any, ClassVar

import numpy as np
import pytest
import torch
from numpy.typing import NDArray

from mpsearch import registry
from mpsearch.errors import InputError
from mpsearch.formats.gguf_types import BLOCKS
from mpsearch.hardware.engines import torchao_compile
from mpsearch.hardware.engines.coded_weight import CodedWeight, pack, random_weight
from mpsearch.hardware.engines.llama_cpp import LlamaCpp
from mpsearch.hardware.engines.onnxruntime import OnnxRuntime
from mpsearch.hardware.engines.openvino import OpenVino
from mpsearch.hardware.engines.roofline import Roofline
from mpsearch.hardware.engines.table import Table
from mpsearch.hardware.engines.torch_kernels import Torch, products
from mpsearch.hardware.engines.torchao_compile import TorchAoCompile
from mpsearch.hardware.kernel import Engine, Kernel
from mpsearch.model.codecs.normal_float import NF4
from mpsearch.testing.engines import SHAPES, EngineSuite, RunningEngineSuite
from tests.conftest import many

GGML = os.environ.get("MPSEARCH_GGML", "")


@pytest.fixture(autouse=True)
def no_telemetry(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("ORT_DISABLE_TELEMETRY", "1")


class TestOnnxRuntime(RunningEngineSuite):
    @pytest.fixture
    def engine(self) -> Engine:
        return OnnxRuntime()


class TestTorch(RunningEngineSuite):
    @pytest.fixture
    def engine(self) -> Engine:
        return Torch()


class TestTorchOnGpu(EngineSuite):
    @pytest.fixture
    def engine(self) -> Engine:
        return Torch(device="cuda")

    def test_says_what_it_is(self, engine: Engine) -> None:
        super().test_says_what_it_is(engine)
        assert bool(engine.missing()) != torch.cuda.is_available()


class TestOpenVino(RunningEngineSuite):
    shapes: ClassVar[tuple[tuple[int, int], ...]] = SHAPES[:: many(3, 1)]

    @pytest.fixture
    def engine(self) -> Engine:
        return OpenVino()


class TestOpenVinoInFloat16(RunningEngineSuite):
    shapes: ClassVar[tuple[tuple[int, int], ...]] = SHAPES[:: many(3, 1)]

    @pytest.fixture
    def engine(self) -> Engine:
        return OpenVino(precision="f16")


class TestTorchAoCompile(RunningEngineSuite):
    # Each kernel is compiled.
    shapes: ClassVar[tuple[tuple[int, int], ...]] = ((33, 48),)
    tokens: ClassVar[tuple[int, ...]] = (3,)

    @pytest.fixture
    def engine(self) -> Engine:
        return TorchAoCompile()


class TestLlamaCppWithoutALibrary(EngineSuite):
    @pytest.fixture
    def engine(self) -> Engine:
        return LlamaCpp()


@pytest.mark.skipif(not GGML, reason="MPSEARCH_GGML names no shared library of ggml")
class TestLlamaCpp(RunningEngineSuite):
    # Some types take long to quantise.
    shapes: ClassVar[tuple[tuple[int, int], ...]] = ((96, 512), (1, 256))

    @pytest.fixture
    def engine(self) -> Engine:
        return LlamaCpp(GGML)


class TestRoofline(EngineSuite):
    @pytest.fixture
    def engine(self) -> Engine:
        return Roofline(bandwidth=1e10, peak=1e12)


class TestTable(EngineSuite):
    @pytest.fixture
    def engine(self) -> Engine:
        return Table()


def test_every_built_in_engine_is_tested() -> None:
    tested = {OnnxRuntime, Torch, OpenVino, TorchAoCompile, LlamaCpp, Roofline, Table}
    assert {registry.load("engines", name) for name in registry.BUILT_IN["engines"]} == tested
    for name in registry.BUILT_IN["engines"]:
        assert registry.load("engines", name).name == name


# --- weights


@pytest.mark.parametrize("bits", [2, 4, 8])
def test_packed_codes_read_back(bits: int) -> None:
    codes = np.arange(-(2 ** (bits - 1)), 2 ** (bits - 1))
    packed = pack(codes, bits)
    assert len(packed) == len(codes) * bits // 8
    read = [int(byte) >> shift & (2**bits - 1) for byte in packed for shift in range(0, 8, bits)]
    assert read == [int(code) & (2**bits - 1) for code in codes]


def test_values_of_a_coded_weight() -> None:
    codes = np.array([[[1, 2], [3, 4]]], dtype=np.int16)
    scales = np.array([[2.0, 0.5]], dtype=np.float32)
    assert CodedWeight(codes, scales).values().tolist() == [[2, 4, 1.5, 2]]
    assert CodedWeight(codes, scales, np.array([[1, 5]], dtype=np.int16)).values().tolist() == [[0, 2, -1, -0.5]]


@pytest.mark.parametrize("fmt", ["int4-g32-asym", "int4-g64", "int8-channel", "int8-tensor"])
def test_scales_are_exact_in_16_bits(fmt: str) -> None:
    scales = torch.from_numpy(random_weight(Kernel("linear", 32, 64, fmt, 1)).scales)
    for dtype in (torch.float16, torch.bfloat16):
        assert torch.equal(scales.to(dtype).float(), scales)


# --- arithmetic


def error(found: Any, expected: NDArray[np.float64]) -> float:
    """Largest difference, relative to the largest number."""
    return float(np.abs(np.asarray(found, dtype=np.float64) - expected).max() / np.abs(expected).max())


#: Numbers of 8 significant bits, rounded once or twice.
BF16 = 8e-3


@pytest.mark.parametrize("tokens", [1, 5])
@pytest.mark.parametrize("fmt", ["int8-channel", "int8-tensor", "int4-g32", "int4-g128-full", "int4-g64-asym"])
def test_torch_multiplies_coded_weights(fmt: str, tokens: int) -> None:
    kernel = Kernel("linear", 48, 256, fmt, tokens)
    assert Torch().refuses(kernel) == ""
    inputs, multiply = products(kernel, "cpu", 2)
    expected = inputs.double().numpy() @ random_weight(kernel).values().T
    for one in multiply:
        assert error(one(inputs).float(), expected) < BF16


def test_torch_rounds_inputs_per_token() -> None:
    kernel = Kernel("linear", 48, 256, "int8-channel@int8-token", 5)
    inputs, (multiply,) = products(kernel, "cpu", 1)
    x = inputs.double().numpy()
    steps = np.abs(x).max(axis=1, keepdims=True) / 127
    expected = (np.round(x / steps) * steps) @ random_weight(kernel).values().T
    assert error(multiply(inputs).float(), expected) < BF16


def test_torch_rounds_inputs_per_tensor() -> None:
    kernel = Kernel("linear", 48, 256, "int8-channel@int8-tensor-asym", 5)
    inputs, (multiply,) = products(kernel, "cpu", 1)
    x = inputs.double().numpy()
    step = (x.max() - x.min()) / 255
    zero = np.round(-x.min() / step)
    expected = ((np.clip(np.round(x / step) + zero, 0, 255) - zero) * step) @ random_weight(kernel).values().T
    assert error(multiply(inputs), expected) < 1e-4


@pytest.mark.parametrize("fmt", ["bf16", "fp16", "fp32"])
@pytest.mark.parametrize("kind", ["linear", "embedding"])
def test_torch_computes_in_the_number_type(fmt: str, kind: str) -> None:
    inputs, multiply = products(Kernel(kind, 24, 40, fmt, 3), "cpu", 3)
    dtype = {"bf16": torch.bfloat16, "fp16": torch.float16, "fp32": torch.float32}[fmt]
    for one in multiply:
        assert one(inputs).dtype == dtype
        assert one(inputs).shape == (3, 24 if kind == "linear" else 40)


def test_torch_takes_a_device_that_it_knows() -> None:
    with pytest.raises(InputError, match="device is 'tpu'"):
        Torch(device="tpu")


def openvino_product(engine: OpenVino, kernel: Kernel, copies: int = 2) -> tuple[NDArray[Any], list[NDArray[Any]]]:
    request, inputs = engine.request(kernel, copies, 1)
    request.infer()
    return inputs, [np.array(request.get_output_tensor(place).data) for place in range(copies)]


@pytest.mark.parametrize("tokens", [1, 5])
@pytest.mark.parametrize(
    "fmt",
    [
        "int8-channel",
        "int8-g64",
        "int8-g64-asym",
        "int4-g32",
        "int4-g128-asym",
        "int4-channel",
        "int2-g64",
        "int2-g64-asym",
    ],
)
def test_openvino_multiplies_coded_weights(fmt: str, tokens: int) -> None:
    kernel = Kernel("linear", 48, 256, fmt, tokens)
    for inputs, tolerance in ((0, 1e-5), (32, 2e-2)):  # in fp32, and with inputs rounded to int8
        x, outputs = openvino_product(OpenVino(inputs=inputs), kernel)
        errors = [
            error(output, x.astype(np.float64) @ random_weight(kernel, copy).values().T)
            for copy, output in enumerate(outputs)
        ]
        assert max(errors) < tolerance
        assert (min(errors) > 1e-4) == bool(inputs)


@pytest.mark.parametrize("fmt", ["int8-channel", "int4-g64-asym"])
def test_openvino_looks_coded_weights_up(fmt: str) -> None:
    kernel = Kernel("embedding", 40, 128, fmt, 6)
    places, outputs = openvino_product(OpenVino(), kernel)
    for copy, output in enumerate(outputs):
        assert error(output, random_weight(kernel, copy).values()[places]) < 1e-6


def test_openvino_multiplies_nf4() -> None:
    x, (output,) = openvino_product(OpenVino(), Kernel("linear", 16, 128, "nf4-b64", 3), copies=1)
    rng = np.random.default_rng(0)
    raw = rng.integers(0, 256, 16 * 64).astype(np.uint8)
    codes = np.stack([raw & 15, raw >> 4], axis=1).reshape(16, 2, 64)
    scales = rng.uniform(0.01, 0.02, (16, 2, 1)).astype(np.float32)
    values = (np.array(NF4)[codes] * scales).reshape(16, 128)
    assert error(output, x.astype(np.float64) @ values.T) < 1e-5


def test_openvino_sends_and_writes_nothing(tmp_path: Path) -> None:
    import subprocess
    import sys

    code = (
        "import sys; from mpsearch.hardware.engines import openvino; openvino._import();"
        "print(sorted(name for name in sys.modules if name.startswith('openvino_telemetry')))"
    )
    done = subprocess.run(
        [sys.executable, "-c", code],
        env={**os.environ, "HOME": str(tmp_path)},
        capture_output=True,
        text=True,
        check=True,
    )
    assert done.stdout.strip() == "[]"
    assert list(tmp_path.rglob("*")) == []


@pytest.mark.parametrize("settings", [{"precision": "f64"}, {"inputs": -1}, {"inputs": "32"}])
def test_openvino_takes_settings_that_it_knows(settings: dict[str, Any]) -> None:
    with pytest.raises(InputError, match="'openvino'"):
        OpenVino(**settings)


def test_openvino_says_when_it_unpacked_a_weight() -> None:
    kernel = Kernel("linear", 1, 256, "int4-g32", 1)
    assert "one row" in OpenVino().refuses(kernel)
    with pytest.raises(InputError, match="in f32 of linear 1 x 256"):
        OpenVino().load(kernel, 1, 1)


def test_torchao_multiplies_int8() -> None:
    with torchao_compile.quiet(), torch.inference_mode():
        inputs, (weight,) = torchao_compile.operands(Kernel("linear", 32, 64, "int8-channel", 3), 1)
        (found,) = torchao_compile.compiled(Kernel("linear", 32, 64, "int8-channel", 3))(inputs, [weight])
        held: Any = weight
        values = held.qdata.double() * held.scale.double()
    assert held.qdata.dtype == torch.int8
    assert error(found.float(), (inputs.double() @ values.T).numpy()) < BF16


def test_torchao_loads_without_a_word(capfd: pytest.CaptureFixture[str]) -> None:
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        TorchAoCompile().load(Kernel("linear", 16, 32, "int8-channel", 2), 2, 1).call()
    assert capfd.readouterr() == ("", "")


def test_torchao_needs_a_compiler(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("CXX", "no-such-compiler")
    assert "no-such-compiler" in TorchAoCompile().missing()


def test_llama_cpp_says_which_library_it_needs(tmp_path: Path) -> None:
    assert "libggml-cpu.so" in LlamaCpp().missing()
    assert "does not load" in LlamaCpp(str(tmp_path / "none.so")).missing()
    import numpy

    other = next(Path(numpy.__file__).parent.rglob("_multiarray_umath*.so"))
    assert "has no ggml_init" in LlamaCpp(str(other)).missing()


@pytest.mark.skipif(not GGML, reason="MPSEARCH_GGML names no shared library of ggml")
@pytest.mark.parametrize("fmt", [*BLOCKS, "bf16", "fp16"])
@pytest.mark.parametrize("kind", ["linear", "embedding"])
def test_llama_cpp_multiplies_gguf_types(fmt: str, kind: str) -> None:
    import gguf

    kernel = Kernel(kind, 64, 512, fmt, 5)
    graph = LlamaCpp(GGML).graph(kernel, 3, 1)
    graph.compute()
    name = {"bf16": "BF16", "fp16": "F16"}.get(fmt, fmt.removeprefix("gguf-").upper())
    values = gguf.dequantize(graph.raw, gguf.GGMLQuantizationType[name]).astype(np.float64).reshape(64, 512)
    if kind == "embedding":
        assert error(graph.output(), values[graph.inputs]) < 1e-6
    else:  # inputs are rounded to int8 in blocks
        assert error(graph.output(), graph.inputs.astype(np.float64) @ values.T) < 2e-2
