"""PyTorch's own kernels, called one by one as eager code does: int8 and int4 weights, int8 and FP8 products, floats."""

from __future__ import annotations

import warnings
from collections.abc import Callable, Iterable, Mapping
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any, ClassVar

from mpsearch.errors import InputError
from mpsearch.format import Format
from mpsearch.hardware.clock import Stopwatch
from mpsearch.hardware.engines.coded_weight import random_weight
from mpsearch.hardware.engines.packages import missing_packages, package_versions
from mpsearch.hardware.kernel import Kernel, Loaded

if TYPE_CHECKING:
    from torch import Tensor

_GROUPS = (32, 64, 128, 256)
#: The int8 kernel reads so many columns at once, and beyond the end of a row that is no multiple of it.
_INT8_COLUMNS = 16
#: Output channels are packed in blocks: of 16 rows on a processor, of 8 on a GPU.
_INT4_ROWS = {"cpu": 16, "cuda": 8}
#: ``torch._int_mm`` on a GPU takes more tokens than this.
_FEWEST_TOKENS = 16
_PAIRS = {"cpu": "int8-channel@int8-tensor-asym", "cuda": "fp8-e4m3@fp8-e4m3-tensor, fp8-e4m3-channel@fp8-e4m3-token"}


@dataclass(frozen=True)
class Torch:
    """Kernels of PyTorch, without a compiler.

    - bf16, fp16 and fp32: ``linear`` and ``embedding`` in that number type.
    - ``int8-channel`` (processor): ``_weight_int8pack_mm`` with bf16 inputs. Columns in multiples of 16.
    - ``int4-g<32, 64, 128, 256>``, symmetric or ``-asym``: ``_weight_int4pack_mm_for_cpu`` or, on a GPU,
      ``_weight_int4pack_mm``, with bf16 inputs.
    - ``int8-channel@int8-token``: ``_int_mm``; inputs are rounded and products scaled by PyTorch's own operations.
    - ``int8-channel@int8-tensor-asym`` (processor): ``quantized.linear_dynamic`` with fp32 inputs.
    - ``fp8-e4m3@fp8-e4m3-tensor`` and ``fp8-e4m3-channel@fp8-e4m3-token`` (GPU): ``_scaled_mm``.

    ``int8-tensor`` runs as ``int8-channel`` whose scales are all the same. What ``device="cuda"`` does has not yet been
    run on a GPU.

    Attributes:
        device: ``cpu`` or ``cuda``.

    Raises:
        InputError: another device (E107).

    Source: ``aten/src/ATen/native/native_functions.yaml`` of PyTorch 2.13.
    """

    name: ClassVar[str] = "torch"
    extra: ClassVar[str] = ""
    fuses: ClassVar[bool] = False
    cache_bits: ClassVar[int] = 16
    device: str = "cpu"

    def __post_init__(self) -> None:
        if self.device not in _INT4_ROWS:
            raise InputError("E107", f"engines: 'torch': device is {self.device!r}", advice="give cpu or cuda")

    def missing(self) -> str:
        if self.device == "cuda" and not missing_packages("torch"):
            import torch

            return "" if torch.cuda.is_available() else "PyTorch finds no GPU here"
        return missing_packages("torch")

    def versions(self) -> Mapping[str, str]:
        return package_versions("torch")

    def refuses(self, kernel: Kernel) -> str:
        fmt: Any = Format.parse(kernel.format)
        if fmt.weight.family == "plain":
            return "" if fmt.activation is None else f"PyTorch has no kernel that rounds the inputs of {fmt.weight}"
        if kernel.kind == "embedding":
            return f"PyTorch looks embeddings up in bf16, fp16 or fp32, not {fmt}"
        if fmt.activation is not None:
            return self._refuses_inputs(fmt, kernel)
        if fmt.family != "int":
            return f"PyTorch multiplies int8, int4 and floats of 16 and 32 bits, not {fmt}"
        return self._refuses_weights(fmt, kernel)

    def _refuses_weights(self, fmt: Any, kernel: Kernel) -> str:
        if fmt.bits == 8 and fmt.granularity != "group" and not fmt.asymmetric:
            if self.device != "cpu":
                return (
                    f"PyTorch multiplies {fmt} with inputs of 16 bits on a processor only; use int8-channel@int8-token"
                )
            if kernel.columns % _INT8_COLUMNS:
                return (
                    f"PyTorch's int8 kernel reads {_INT8_COLUMNS} columns at once, and {kernel.columns} is no multiple"
                )
            return ""
        # (code - 8) * scale + offset is what it multiplies: a symmetric code is code + 8 there, with an offset of 0,
        # and nothing is lost. The offset is read and added all the same, so it takes as long and as many bytes.
        if fmt.bits != 4 or fmt.granularity != "group" or fmt.group not in _GROUPS:
            return f"PyTorch has int8-channel and int4 in groups of {', '.join(map(str, _GROUPS))}, not {fmt}"
        if kernel.columns % fmt.group:
            return f"{kernel.columns} columns are no multiple of the group of {fmt.group}"
        if kernel.rows % (rows := _INT4_ROWS[self.device]):
            return f"PyTorch packs int4 in blocks of {rows} output channels, and {kernel.rows} is no multiple"
        return ""

    def _refuses_inputs(self, fmt: Any, kernel: Kernel) -> str:
        pair = _pair(fmt, self.device)
        if not pair:
            return f"PyTorch multiplies int8-channel@int8-token and {_PAIRS[self.device]} here, not {fmt}"
        if self.device == "cuda":
            odd = 16 if pair == "fp8" else 8
            if kernel.rows % odd or kernel.columns % odd:
                return f"PyTorch multiplies {pair} on a GPU in multiples of {odd}, not {kernel.rows} x {kernel.columns}"
            if pair == "int8" and kernel.tokens <= _FEWEST_TOKENS:
                return f"PyTorch multiplies int8 on a GPU from {_FEWEST_TOKENS + 1} tokens on, not {kernel.tokens}"
        return ""

    def bytes(self, kernel: Kernel) -> int:
        """Codes, and per output channel or group: scales in bf16 or, of pairs, fp32; offsets; zero points and sums."""
        fmt: Any = Format.parse(kernel.format)
        weights = kernel.rows * kernel.columns
        if fmt.weight.family == "plain":
            return weights * int(fmt.weight.bits) // 8
        if fmt.activation is not None:
            one = fmt.weight.family == "fp" and fmt.weight.granularity == "tensor"
            return weights + (12 if _pair(fmt, self.device) == "dynamic" else 4) * (1 if one else kernel.rows)
        if fmt.bits == 8:
            return weights + 2 * kernel.rows
        return weights // 2 + 4 * kernel.rows * (kernel.columns // int(fmt.group))

    def stopwatch(self) -> Stopwatch | None:
        if self.device == "cpu":
            return None
        import torch

        def timed(work: Callable[[], object]) -> float:  # not yet run on a GPU
            start, end = (torch.cuda.Event(enable_timing=True) for _ in range(2))  # type: ignore[no-untyped-call]
            start.record()
            work()
            end.record()
            torch.cuda.synchronize()
            return float(start.elapsed_time(end)) / 1e3

        return timed

    def load(self, kernel: Kernel, copies: int, threads: int) -> Loaded:
        import torch

        torch.set_num_threads(threads)
        inputs, multiply = products(kernel, self.device, copies)

        @torch.inference_mode()
        def call() -> None:
            for one in multiply:
                one(inputs)

        return Loaded(call, copies)


def _pair(fmt: Any, device: str) -> str:
    """Which kernel a pair of formats takes: ``int8``, ``dynamic``, ``fp8`` or none."""
    weight, inputs = fmt.weight, str(fmt.activation)
    if weight.family == "int" and weight.bits == 8 and weight.granularity != "group" and not weight.asymmetric:
        if inputs == "int8-token":
            return "int8"
        return "dynamic" if inputs == "int8-tensor-asym" and device == "cpu" else ""
    if weight.family == "fp" and weight.element == "e4m3" and device == "cuda":
        taken = {"tensor": ("fp8-e4m3-tensor", "fp8-e4m3-tensor-static"), "channel": ("fp8-e4m3-token",)}
        return "fp8" if inputs in taken.get(weight.granularity, ()) else ""
    return ""


Product = Callable[["Tensor"], "Tensor"]


def products(kernel: Kernel, device: str, copies: int) -> tuple[Tensor, list[Product]]:
    """Inputs of a kernel, and products of them, each with its own copy of `random_weight`."""
    import torch

    fmt: Any = Format.parse(kernel.format)
    torch.manual_seed(0)
    inputs = torch.randn(kernel.tokens, kernel.columns, dtype=torch.float32)
    if kernel.kind == "embedding":
        inputs = torch.randint(0, kernel.rows, (kernel.tokens,))
    if fmt.weight.family == "plain":
        made = _plain(kernel, fmt.weight, copies, device)
        kept = inputs if kernel.kind == "embedding" else inputs.to(getattr(torch, fmt.weight.dtype))
        return kept.to(device), made
    pair = _pair(fmt, device)
    if pair == "dynamic":
        return inputs, _dynamic(kernel, copies)
    if fmt.activation is None:
        made = _int8_weight(kernel, copies) if fmt.bits == 8 else _int4_weight(kernel, copies, device)
    else:
        made = _fp8(kernel, fmt, copies) if pair == "fp8" else _int8_pair(kernel, copies, device)
    return inputs.to(device, torch.bfloat16), made


def _each(multiply: Callable[[Tensor, Any], Tensor], weights: Iterable[Any]) -> list[Product]:
    """The product of an input with each weight."""

    def bound(weight: Any) -> Product:
        return lambda x: multiply(x, weight)

    return [bound(weight) for weight in weights]


def _clones(first: Tensor, copies: int) -> list[Tensor]:
    """So many tensors of equal values, each in its own memory and laid out alike."""
    return [first, *(first.clone() for _ in range(copies - 1))]


def _plain(kernel: Kernel, fmt: Any, copies: int, device: str) -> list[Product]:
    import torch
    from torch.nn.functional import embedding, linear

    weight = torch.randn(kernel.rows, kernel.columns, dtype=torch.float32).to(device, getattr(torch, fmt.dtype))
    return _each(embedding if kernel.kind == "embedding" else linear, _clones(weight, copies))


def _int8(kernel: Kernel) -> tuple[Tensor, Tensor]:
    """Codes (rows, columns) in int8 and scales (rows) in fp32."""
    import torch

    drawn = random_weight(kernel)
    return torch.from_numpy(drawn.codes).reshape(drawn.shape).to(torch.int8), torch.from_numpy(drawn.scales[:, 0])


def _int8_weight(kernel: Kernel, copies: int) -> list[Product]:
    import torch

    codes, scales = _int8(kernel)
    multiply, kept = torch.ops.aten._weight_int8pack_mm, scales.to(torch.bfloat16)
    return _each(lambda x, weight: multiply(x, weight, kept), _clones(codes, copies))


def _int4_weight(kernel: Kernel, copies: int, device: str) -> list[Product]:
    import torch

    drawn = random_weight(kernel)
    scales = torch.from_numpy(drawn.scales)
    if drawn.zeros is None:
        codes, offsets = torch.from_numpy(drawn.codes) + 8, torch.zeros_like(scales)
    else:
        codes, offsets = torch.from_numpy(drawn.codes), (8 - torch.from_numpy(drawn.zeros)) * scales
    group = codes.shape[2]
    flat = codes.reshape(drawn.shape)
    # (groups, rows, 2): a scale and what is added.
    beside = torch.stack([scales, offsets], dim=2).transpose(0, 1).to(device, torch.bfloat16).contiguous()
    if device == "cpu":
        packed = torch.ops.aten._convert_weight_to_int4pack_for_cpu(flat.to(torch.int32), 2)
        multiply = torch.ops.aten._weight_int4pack_mm_for_cpu
    else:  # not yet run on a GPU
        tiles = next(n for n in (8, 4, 2) if kernel.columns % (16 * n) == 0)  # tiles of 16 columns, packed together
        pairs = (flat[:, ::2] << 4 | flat[:, 1::2]).to(device, torch.uint8)
        packed = torch.ops.aten._convert_weight_to_int4pack(pairs, tiles)
        multiply = torch.ops.aten._weight_int4pack_mm
    weights = zip(_clones(packed, copies), _clones(beside, copies), strict=True)
    return _each(lambda x, weight: multiply(x, weight[0], group, weight[1]), weights)


def _int8_pair(kernel: Kernel, copies: int, device: str) -> list[Product]:
    import torch

    codes, scales = (one.to(device) for one in _int8(kernel))

    def product(x: Tensor, weight: Tensor) -> Tensor:
        steps = x.float().abs().amax(1, keepdim=True).clamp_min(1e-12) / 127
        rounded = torch.round(x / steps).to(torch.int8)
        # Read as the transpose of what lies in memory: as it lies there, it takes more than twice as long.
        return (torch._int_mm(rounded, weight.t()) * steps * scales).to(x.dtype)

    return _each(product, _clones(codes, copies))


def _dynamic(kernel: Kernel, copies: int) -> list[Product]:
    import torch

    codes, scales = _int8(kernel)
    quantized = torch.ops.quantized
    with warnings.catch_warnings():
        # PyTorch warns that such tensors go some day; the kernel has no other door.
        warnings.simplefilter("ignore")
        weight = torch._make_per_channel_quantized_tensor(codes, scales.double(), torch.zeros_like(scales).long(), 0)
    packed = [quantized.linear_prepack(weight, None) for _ in range(copies)]
    return _each(lambda x, weight: quantized.linear_dynamic(x, weight, False), packed)


def _fp8(kernel: Kernel, fmt: Any, copies: int) -> list[Product]:
    """Not yet run on a GPU."""
    import torch

    kind, largest = torch.float8_e4m3fn, 448.0
    by_row = fmt.weight.granularity == "channel"
    weight = torch.randn(kernel.rows, kernel.columns, device="cuda").to(kind)
    scales = torch.full((1, kernel.rows) if by_row else (), 0.01, device="cuda")
    fixed = torch.tensor(0.01, device="cuda")

    def product(x: Tensor, weight: Tensor) -> Tensor:
        if fmt.activation.static:
            steps = fixed
        else:
            size = x.abs().amax(1, keepdim=True) if by_row else x.abs().amax()
            steps = size.float().clamp_min(1e-12) / largest
        rounded = (x / steps).clamp(-largest, largest).to(kind)
        return torch._scaled_mm(rounded, weight.t(), scale_a=steps, scale_b=scales, out_dtype=torch.bfloat16)

    return _each(product, _clones(weight, copies))
