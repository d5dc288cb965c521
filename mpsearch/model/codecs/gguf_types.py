"""GGUF types: the bytes that ``llama-quantize`` would write, and the weights that llama.cpp would read.

Rounding is that of ggml's reference code without an importance matrix, byte for byte; how, says each module of
`mpsearch.model.codecs.gguf_blocks`. It is computed in float32, in the order of the C code, some blocks at a time.
Reading gives the bits of ``gguf.quants.dequantize``; a 0 may come out as -0, as there.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping

import torch
from torch import Tensor

from mpsearch.formats.gguf_types import BLOCKS, LATTICES, GgufType
from mpsearch.layer import Layer
from mpsearch.model.codec import Bytes, Codec, Evidence, Parts, RangeError, all_finite, as_bytes, from_bytes, magnitude
from mpsearch.model.codecs.gguf_blocks.arithmetic import halves
from mpsearch.model.codecs.gguf_blocks.fp4_blocks import FP4_BLOCKS
from mpsearch.model.codecs.gguf_blocks.k_blocks import K_BLOCKS
from mpsearch.model.codecs.gguf_blocks.kind import Kind
from mpsearch.model.codecs.gguf_blocks.nonlinear_blocks import NONLINEAR_BLOCKS
from mpsearch.model.codecs.gguf_blocks.plain_blocks import PLAIN_BLOCKS

KINDS: Mapping[str, Kind] = {**PLAIN_BLOCKS, **K_BLOCKS, **NONLINEAR_BLOCKS, **FP4_BLOCKS}
# No type reaches this: the widest is 65504 * 128 * 32. Beyond it the searches would meet infinities.
_FAR = 1e9
# Weights handled at a time: what stays in a processor's cache, and what keeps a GPU busy.
_PIECE = {"cpu": 1 << 19}
_GPU_PIECE = 1 << 23


class GgufCodec(Codec[GgufType]):
    """Writes and reads GGUF blocks; ``payload`` is (rows, bytes of a row) uint8, as in the file."""

    def encode(self, rows: Tensor, fmt: GgufType, evidence: Evidence) -> dict[str, Tensor]:
        if fmt.name in LATTICES:
            raise RangeError(f"mpsearch cannot round to {fmt}; it is priced only")
        kind, block = KINDS[fmt.name], BLOCKS[fmt.name]
        if magnitude(rows) > (kind.top or _FAR):
            raise _beyond(rows, fmt, kind)

        octets = _piecewise(
            rows.reshape(-1, block.weights), lambda piece: kind.encode(piece.to(torch.float32)), block.weights
        )
        for place in kind.halves:
            if not all_finite(halves(octets[:, place : place + 2])):
                raise _beyond(rows, fmt, kind)
        return {"payload": octets.reshape(len(rows), -1)}

    def decode(self, parts: Parts, fmt: GgufType, columns: int) -> Tensor:
        block, payload = BLOCKS[fmt.name], parts["payload"]
        read = _read_lattice(fmt) if fmt.name in LATTICES else KINDS[fmt.name].decode
        return _piecewise(payload.reshape(-1, block.size), read, block.weights).reshape(len(payload), columns)

    def pack(self, parts: Parts, fmt: GgufType) -> dict[str, Bytes]:
        return {"payload": as_bytes(parts["payload"])}

    def unpack(self, packed: Mapping[str, Bytes], fmt: GgufType, layer: Layer) -> dict[str, Tensor]:
        return {"payload": from_bytes(packed["payload"], torch.uint8, layer.rows, -1)}


def _piecewise(blocks: Tensor, work: Callable[[Tensor], Tensor], weights: int) -> Tensor:
    """Apply ``work`` to some blocks at a time, so that what it holds beside them stays small."""
    count = max(1, _PIECE.get(blocks.device.type, _GPU_PIECE) // weights)
    if len(blocks) <= count:
        return work(blocks)
    first = work(blocks[:count])
    found = first.new_empty(len(blocks), first.shape[1])
    found[:count] = first
    for start in range(count, len(blocks), count):
        found[start : start + count] = work(blocks[start : start + count])
    return found


def _read_lattice(fmt: GgufType) -> Callable[[Tensor], Tensor]:
    """Read lattice blocks with the gguf package, which holds the lattices, on the processor."""
    import gguf
    import numpy as np

    kind = gguf.GGMLQuantizationType[fmt.type_name.upper()]

    def read(octets: Tensor) -> Tensor:
        # A foreign file may hold infinite scales; they are read as they are.
        with np.errstate(invalid="ignore"):
            values = gguf.quants.dequantize(octets.cpu().numpy(), kind)
        return torch.from_numpy(values).to(octets.device)

    return read


def _beyond(rows: Tensor, fmt: GgufType, kind: Kind) -> RangeError:
    limit = f"{kind.top:.4g} is the largest it can hold" if kind.top else "its fp16 scales end at 65504"
    return RangeError(f"weights reach {magnitude(rows):.4g}, too much for {fmt}: {limit}")
