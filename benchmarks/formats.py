"""How long rounding a weight takes, beside the libraries that round to the same format, and what memory it takes.

``python -m benchmarks.formats``. All contenders run in one process on one thread, in turns, so that whatever else the
machine does meets them alike; a warm-up turn is not counted. Every one starts from a float32 weight and ends with the
rounded float32 weight. Memory is how far the peak of the process rises while one runs, its result included, over the
bytes of the weight; only Linux tells it.
"""

from __future__ import annotations

import argparse
import ctypes
import importlib
import logging
import statistics
import time
import warnings
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor

from mpsearch.format import Format
from mpsearch.machine import fingerprint
from mpsearch.model.quantize import fake_quantize

Work = Callable[[Tensor], object]


def quietly(name: str) -> Any:
    """Import a library without what it says about the GPU kernels that it lacks."""
    logging.disable(logging.ERROR)
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        found = importlib.import_module(name)
    logging.disable(logging.NOTSET)
    return found


def ours(text: str) -> Work:
    fmt = Format.parse(text)
    return lambda weight: fake_quantize(weight, fmt)


def torchao_int4(weight: Tensor, *, fake: bool) -> Tensor:
    """Symmetric codes from -7 to 7 in groups of 128 with fp16 scales, as ours."""
    q = quietly("torchao.quantization.quant_primitives")
    block, grid = (1, 128), (-7, 7)
    scale, zero = q.choose_qparams_affine(
        weight, q.MappingType.SYMMETRIC, block, torch.int8, *grid, eps=2.0**-24, scale_dtype=torch.float16
    )
    if fake:
        found: Tensor = q._fake_quantize_affine(weight, block, scale.float(), zero, torch.int8, *grid)
        return found
    codes = q.quantize_affine(weight, block, scale.float(), zero, torch.int8, *grid)
    found = q.dequantize_affine(codes, block, scale.float(), zero, torch.int8, *grid)
    return found


def compressed_int4() -> Work:
    """Symmetric codes from -8 to 7 in groups of 128."""
    quantization = quietly("compressed_tensors.quantization")
    helpers = quietly("compressed_tensors.quantization.utils.helpers")
    forward = quietly("compressed_tensors.quantization.lifecycle.forward")
    args = quantization.QuantizationArgs(num_bits=4, symmetric=True, strategy="group", group_size=128)

    def work(weight: Tensor) -> Tensor:
        groups = weight.unflatten(-1, (-1, 128))
        low, high = torch.aminmax(groups, dim=-1)
        scale, zero = helpers.calculate_qparams(low, high, args)
        found: Tensor = forward.fake_quantize(weight, scale, zero, args)
        return found

    return work


def torchao_mx(weight: Tensor) -> Tensor:
    mx = quietly("torchao.prototype.mx_formats.mx_tensor")
    scale, data = mx.to_mx(weight, torch.float4_e2m1fn_x2, 32)
    found: Tensor = mx.to_dtype(data, scale, torch.float4_e2m1fn_x2, 32, torch.float32)
    return found


def torchao_nvfp4(weight: Tensor) -> Tensor:
    nv = quietly("torchao.prototype.mx_formats.nvfp4_tensor")
    scale = nv.per_tensor_amax_to_scale(weight.abs().amax())
    found: Tensor = nv.NVFP4Tensor.to_nvfp4(weight, per_tensor_scale=scale).dequantize(torch.float32)
    return found


def bitsandbytes_nf4(weight: Tensor) -> Tensor:
    functional = quietly("bitsandbytes.functional")
    codes, state = functional.quantize_4bit(weight, blocksize=64, quant_type="nf4")
    found: Tensor = functional.dequantize_4bit(codes, state)
    return found


def gguf_type(name: str) -> Work:
    quants = quietly("gguf.quants")
    kind = quietly("gguf").GGMLQuantizationType[name]
    return lambda weight: quants.dequantize(quants.quantize(weight.numpy(), kind), kind)


#: Our format -> who else rounds to it.
CONTENDERS: Mapping[str, Callable[[], Mapping[str, Work]]] = {
    "int4-g128": lambda: {
        "torchao, codes and back": lambda w: torchao_int4(w, fake=False),
        "torchao, fake": lambda w: torchao_int4(w, fake=True),
    },
    "int4-g128-full": lambda: {"compressed-tensors, fake": compressed_int4()},
    "mxfp4": lambda: {"torchao": torchao_mx},
    "nvfp4": lambda: {"torchao": torchao_nvfp4},
    "nf4-b64": lambda: {"bitsandbytes": bitsandbytes_nf4},
    "q8_0": lambda: {"gguf (numpy)": gguf_type("Q8_0")},
    "q4_0": lambda: {"gguf (numpy)": gguf_type("Q4_0")},
    "q4_K": dict,
}


def seconds(works: Mapping[str, Work], weight: Tensor, repeat: int) -> dict[str, list[float]]:
    """Times of each, in turns."""
    times: dict[str, list[float]] = {name: [] for name in works}
    for turn in range(repeat + 1):
        for name, work in works.items():
            start = time.perf_counter()
            work(weight)
            if turn:
                times[name].append(time.perf_counter() - start)
    return times


def peak(work: Work, weight: Tensor) -> float:
    """Peak of the process while one runs, less what it had before, over the weight's bytes; NaN when it is not told."""
    try:
        # What earlier runs freed, and the allocator kept, would hide what this one takes.
        ctypes.CDLL("libc.so.6").malloc_trim(0)
        before = _status("VmRSS")
        Path("/proc/self/clear_refs").write_text("5")
        work(weight)
        return (_status("VmHWM") - before) / weight.nbytes
    except OSError:
        return float("nan")


def _status(field: str) -> int:
    lines = Path("/proc/self/status").read_text().splitlines()
    return 1024 * next(int(line.split()[1]) for line in lines if line.startswith(f"{field}:"))


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--size", type=int, default=4096, help="rows and columns of the weight")
    parser.add_argument("--repeat", type=int, default=9)
    parser.add_argument("formats", nargs="*", help="which of our formats; all without")
    args = parser.parse_args()
    torch.set_num_threads(1)
    versions = {name: quietly(name).__version__ for name in ("torchao", "compressed_tensors", "bitsandbytes")}
    print(fingerprint(), versions, f"numpy {np.__version__}")
    weight = torch.randn(args.size, args.size, generator=torch.Generator().manual_seed(0)) * 0.02
    print(f"| {args.size} x {args.size} float32 | median s | lowest to highest s | x ours | peak memory, x weight |")
    print("|---|---|---|---|---|")
    for text in args.formats or CONTENDERS:
        works = {text: ours(text), **CONTENDERS[text]()}
        times = seconds(works, weight, args.repeat)
        base = statistics.median(times[text])
        for name, found in times.items():
            middle, used = statistics.median(found), peak(works[name], weight)
            label = f"{text}, {name}" if name != text else f"**{text}**"
            spread = f"{min(found):.3f} to {max(found):.3f}"
            print(f"| {label} | {middle:.3f} | {spread} | {middle / base:.2f} | {used:.1f} |", flush=True)


if __name__ == "__main__":
    main()
