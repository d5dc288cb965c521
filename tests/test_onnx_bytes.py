"""Bytes in files for ONNX Runtime: by hand, and offered exactly where its kernels are."""

from __future__ import annotations

import pytest

from mpsearch.capabilities import capabilities
from mpsearch.exports.onnxruntime import OnnxRuntimeExport
from mpsearch.format import Format
from mpsearch.hardware.calls import refuses as has_no_kernel
from mpsearch.hardware.containers import kept_bytes, refuses, stored_bytes
from mpsearch.hardware.engines.onnxruntime import OnnxRuntime
from mpsearch.layer import Excluded, Layer, Layers
from mpsearch.plan import BitPlan

CANDIDATES = [
    *(
        f"int{bits}-{shared}{end}"
        for bits in (2, 3, 4, 5, 8)
        for shared in ("channel", "tensor", "g8", "g16", "g32", "g64", "g128", "g256", "g512")
        for end in ("", "-asym", "-full", "-mse")
    ),
    *(
        f"int8-{shared}{end}@{inputs}"
        for shared in ("channel", "tensor", "g32")
        for end in ("", "-asym")
        for inputs in ("int8-tensor-asym", "int8-tensor-asym-static", "int8-token", "int8-tensor")
    ),
    *("int4-channel@int8-tensor-asym", "bf16", "fp16", "fp32", "nf4-b64", "mxfp4", "q4_K", "fp8-e4m3-channel"),
]


@pytest.mark.parametrize(
    "layer",
    [
        Layer("a", "linear", (64, 512)),
        Layer("a", "linear", (512, 64), 1),
        Layer("a", "linear", (61, 48), dtype="bfloat16"),
        Layer("a", "embedding", (64, 512), shared=("b",)),
        Layer("a", "embedding", (61, 96)),
    ],
)
def test_the_table_the_kernels_and_the_bytes_agree(layer: Layer) -> None:
    able, engine, held = capabilities("onnxruntime"), OnnxRuntime(), []
    for text in CANDIDATES:
        fmt = Format.parse(text)
        if fmt.refuses(layer):
            continue
        kernel = not has_no_kernel(layer, fmt, engine)
        assert kernel == (not refuses(fmt, layer, "onnxruntime")), text
        assert kernel == (not OnnxRuntimeExport().refuses(BitPlan(Layers((layer,)), {"a": fmt}))), text
        assert fmt.activation is not None or kernel == (not able.refuses(layer, fmt)), text
        assert kernel or able.refuses(layer, fmt), text
        held += [text] if kernel else []
    assert {"int4-g16", "int8-g16-asym", "bf16"} <= set(held)
    assert len(held) < len(CANDIDATES) / 2


@pytest.mark.parametrize(
    ("text", "layer", "expected"),
    [
        ("int4-g32", Layer("a", "linear", (61, 64)), 61 * 32 + 61 * 2 * 4),
        ("int4-g64-asym", Layer("a", "linear", (61, 64)), 61 * 32 + 61 * 4 + 61),
        ("int2-g16-asym", Layer("a", "linear", (10, 80)), 10 * 20 + 10 * 5 * 4 + 10 * 2),
        ("int8-g16-asym-mse", Layer("a", "linear", (10, 80)), 800 + 10 * 5 * 4 + 10 * 5),
        ("int4-g16", Layer("a", "embedding", (10, 80), shared=("b",)), 2 * 400 + 10 * 5 * 4),
        ("int8-channel@int8-tensor-asym", Layer("a", "linear", (10, 80)), 800 + 40),
        ("int8-tensor@int8-tensor-asym-static", Layer("a", "linear", (10, 80)), 800 + 4 + 5),
        ("bf16", Layer("a", "linear", (10, 80), dtype="bfloat16"), 3200),
        ("fp32", Layer("a", "embedding", (10, 80), shared=("b",)), 6400),
    ],
)
def test_bytes_by_hand(text: str, layer: Layer, expected: int) -> None:
    assert sum(stored_bytes(Format.parse(text), layer, "onnxruntime").values()) == expected


def test_kept_tensors_are_fp32_in_the_file() -> None:
    assert kept_bytes(Excluded("n", (8,), "bfloat16", "1-D"), "onnxruntime") == 32
    assert kept_bytes(Excluded("n", (8,), "int64", "1-D"), "onnxruntime") == 64
