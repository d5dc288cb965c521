"""torchao under torch.compile: int8 weights, and bf16 that went through the same compiler."""

from __future__ import annotations

import logging
import os
import shutil
import sys
import warnings
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Any, ClassVar

from mpsearch.format import Format
from mpsearch.hardware.clock import Stopwatch
from mpsearch.hardware.engines.packages import missing_packages, package_versions
from mpsearch.hardware.kernel import Kernel, Loaded

if TYPE_CHECKING:
    from torch import Tensor

#: Weights that one compiled graph multiplies: entering a graph costs as much as a small product.
_GRAPH = 16
#: The kernel below reads so many columns at once, and beyond the end of a row that is no multiple of it.
_INT8_COLUMNS = 16


@dataclass(frozen=True)
class TorchAoCompile:
    """What torch.compile makes of torchao's weights on a processor.

    - ``int8-channel``: ``Int8WeightOnlyConfig``, which the compiler lowers to PyTorch's packed int8 product.
    - bf16, linear and embedding: compiled as it is.

    Everything else is refused: without a kernel of their own, torchao's weights are unpacked to bf16 in each call,
    which takes longer than the product. Inputs are bf16. A C++ compiler must be there.

    Source: torchao 0.18, ``torchao.quantization``.
    """

    name: ClassVar[str] = "torchao-compile"
    extra: ClassVar[str] = "torchao"
    fuses: ClassVar[bool] = False
    cache_bits: ClassVar[int] = 16
    device: str = field(default="cpu", init=False)

    def missing(self) -> str:
        compiler = os.environ.get("CXX") or ("clang++" if sys.platform == "darwin" else "g++")
        if reason := missing_packages("torch", "torchao"):
            return reason
        return "" if shutil.which(compiler) else f"torch.compile needs a C++ compiler, and there is no {compiler}"

    def versions(self) -> Mapping[str, str]:
        return package_versions("torch", "torchao")

    def refuses(self, kernel: Kernel) -> str:
        fmt: Any = Format.parse(kernel.format)
        if str(fmt) == "bf16":
            return ""
        if kernel.kind == "embedding":
            return f"torchao-compile looks embeddings up in bf16, not {fmt}"
        if fmt.activation is not None or fmt.family != "int":
            return f"torchao-compile multiplies int8-channel and bf16, not {fmt}"
        if fmt.bits != 8 or fmt.granularity != "channel" or fmt.asymmetric:
            return f"torchao unpacks {fmt} on a processor before it multiplies; it has a kernel for int8-channel"
        if kernel.columns % _INT8_COLUMNS:
            return f"PyTorch's int8 kernel reads {_INT8_COLUMNS} columns at once, and {kernel.columns} is no multiple"
        return ""

    def bytes(self, kernel: Kernel) -> int:
        """Codes in int8 and an fp32 scale per output channel; two bytes of bf16."""
        weights = kernel.rows * kernel.columns
        return 2 * weights if kernel.format == "bf16" else weights + 4 * kernel.rows

    def stopwatch(self) -> Stopwatch | None:
        return None

    def load(self, kernel: Kernel, copies: int, threads: int) -> Loaded:
        import torch

        torch.set_num_threads(threads)
        # Graphs are all of one size: another would be compiled apart.
        copies = copies if copies <= _GRAPH else -(-copies // _GRAPH) * _GRAPH
        with quiet():
            inputs, weights = operands(kernel, copies)
            run = compiled(kernel)
            parts = [weights[i : i + _GRAPH] for i in range(0, len(weights), _GRAPH)]

            @torch.inference_mode()
            def call() -> None:
                for part in parts:
                    run(inputs, part)

            call()  # compiles
        return Loaded(call, copies)


def operands(kernel: Kernel, copies: int) -> tuple[Tensor, list[Tensor]]:
    """Inputs of a kernel, and so many random weights as torchao keeps them."""
    import torch

    torch.manual_seed(0)
    weights = []
    for _ in range(copies):
        layer = torch.nn.Linear(kernel.columns, kernel.rows, bias=False, dtype=torch.bfloat16)
        if kernel.format != "bf16":
            from torchao.quantization import Int8WeightOnlyConfig, quantize_

            quantize_(layer, Int8WeightOnlyConfig())
        weights.append(layer.weight)
    inputs = torch.randn(kernel.tokens, kernel.columns, dtype=torch.bfloat16)
    if kernel.kind == "embedding":
        inputs = torch.randint(0, kernel.rows, (kernel.tokens,))
    return inputs, weights


def compiled(kernel: Kernel) -> Callable[[Tensor, list[Tensor]], list[Tensor]]:
    """Compile the products of one input with some weights of a kernel."""
    import torch
    import torch._dynamo
    import torch._inductor.config
    from torch.nn.functional import embedding, linear

    # One function is compiled anew only a few times, and then runs as it is without a word.
    torch._dynamo.reset()
    torch._inductor.config.compile_threads = 1

    def products(x: Tensor, weights: list[Tensor]) -> list[Tensor]:
        return [linear(x, weight) for weight in weights]

    def rows(x: Tensor, weights: list[Tensor]) -> list[Tensor]:
        return [embedding(x, weight) for weight in weights]

    return torch.compile(rows if kernel.kind == "embedding" else products, fullgraph=True, dynamic=False)


@contextmanager
def quiet() -> Iterator[None]:
    """Drop warnings and what is logged: torchao tells which of its GPU kernels do not load, the compiler much else."""
    before = logging.root.manager.disable
    logging.disable(logging.WARNING)
    try:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")
            yield
    finally:
        logging.disable(before)
