"""Integers: scales from the largest weight, each weight to its nearest code, unless a rule says otherwise.

The weights that share one scale are a tensor, a row, or ``group`` consecutive columns of a row. With ``b`` bits,
all in float32:

- symmetric: ``scale = fp16(max|w| / n)``, ``code = clamp(round(w / scale), -n, n)``, ``n = 2**(b-1) - 1``;
- full: ``scale = fp16(max|w| / (n + 1/2))``, ``code = clamp(round(w / scale), -n-1, n)``;
- asymmetric: the range ``low..high`` is widened to hold 0, ``scale = fp16((high - low) / n)``,
  ``zero = clamp(round(-low / scale), 0, n)``, ``code = clamp(round(w / scale) + zero, 0, n)``, ``n = 2**b - 1``.

``round`` takes halves to the even number. The stored fp16 scale is the one that codes are made with. Weights
whose scale is 0 (all zeros, or below what fp16 can tell from 0) become exact zeros. A code times its scale
has at most 19 bits, so dequantizing is exact in float32.

Sources: the uniform affine quantizer of Jacob et al. 2018 (arXiv:1712.05877) with fp16 scales; the full grid is that
of compressed-tensors (``calculate_qparams``), whose scales are otherwise of the weight's own type. Their asymmetric
rule and torchao's take the zero point from the scale before its rounding, ours from the stored one, so that the lowest
weight falls on the lowest code; compressed-tensors moreover adds the zero point before it rounds, so that ties beside
an odd zero point go the other way. torchao multiplies by ``1 / scale``, which moves a few weights that lie on a tie.

The rule ``mse`` finds other scales (`integer_mse`), the rule ``gptq`` other codes (`gptq`); what is stored, and how it
is read, stays the same.
"""

from __future__ import annotations

from collections.abc import Mapping

import torch
from torch import Tensor

from mpsearch.formats.integer import Integer
from mpsearch.layer import Layer
from mpsearch.model.bits import pack_rows, unpack_rows
from mpsearch.model.codec import Bytes, Codec, Evidence, Parts, as_bytes, from_bytes
from mpsearch.model.codecs.gptq import compensate, inverse_factor
from mpsearch.model.codecs.integer_mse import least_error
from mpsearch.model.codecs.lattice import Lattice, spanning


class IntegerCodec(Codec[Integer]):
    """Rounds to integers; the rule is the one at the top of this file."""

    def encode(self, rows: Tensor, fmt: Integer, evidence: Evidence) -> dict[str, Tensor]:
        codes, lattice = _round(rows, fmt, evidence)
        kind = torch.int8 if lattice.zero is None else torch.uint8
        parts = {"payload": codes.to(kind).reshape(len(rows), -1), "scales": lattice.scale.squeeze(-1)}
        if lattice.zero is not None:
            parts["zero_points"] = lattice.zero.to(torch.uint8).squeeze(-1)
        return parts

    def decode(self, parts: Parts, fmt: Integer, columns: int) -> Tensor:
        scales = parts["scales"]
        values = parts["payload"].to(torch.float32, copy=True).reshape(*scales.shape, -1)
        if fmt.asymmetric:
            values.sub_(parts["zero_points"].to(torch.float32).unsqueeze(-1))
        return values.mul_(scales.to(torch.float32).unsqueeze(-1)).reshape(-1, columns)

    def fake(self, rows: Tensor, fmt: Integer, evidence: Evidence) -> Tensor:
        codes, lattice = _round(rows, fmt, evidence)
        return lattice.values(codes).reshape(rows.shape)

    def pack(self, parts: Parts, fmt: Integer) -> dict[str, Bytes]:
        codes = parts["payload"].cpu()
        if not fmt.asymmetric:
            codes = (codes.to(torch.int16) + 2 ** (fmt.bits - 1)).to(torch.uint8)
        packed = {"payload": pack_rows(codes.numpy(), fmt.bits), "scales": as_bytes(parts["scales"])}
        if fmt.asymmetric:
            packed["zero_points"] = pack_rows(parts["zero_points"].cpu().numpy(), fmt.bits)
        return packed

    def unpack(self, packed: Mapping[str, Bytes], fmt: Integer, layer: Layer) -> dict[str, Tensor]:
        codes = torch.from_numpy(unpack_rows(packed["payload"], layer.rows, layer.columns, fmt.bits))
        if not fmt.asymmetric:
            codes = (codes.to(torch.int16) - 2 ** (fmt.bits - 1)).to(torch.int8)
        blocks = 1 if fmt.granularity == "tensor" else layer.rows
        groups = fmt.scales(layer) // blocks
        parts = {"payload": codes, "scales": from_bytes(packed["scales"], torch.float16, blocks, groups)}
        if fmt.asymmetric:
            zeros = unpack_rows(packed["zero_points"], blocks, groups, fmt.bits)
            parts["zero_points"] = torch.from_numpy(zeros)
        return parts


def _round(rows: Tensor, fmt: Integer, evidence: Evidence) -> tuple[Tensor, Lattice]:
    """Return codes (blocks, groups, size) as float32, and lattices (blocks, groups, 1)."""
    blocks = 1 if fmt.granularity == "tensor" else rows.shape[0]
    groups = rows.shape[1] // fmt.group if fmt.granularity == "group" else 1
    values = rows.reshape(blocks, groups, -1).to(torch.float32)
    if fmt.rule == "gptq":
        return _compensated(values, rows, fmt, evidence)
    lattice = (least_error if fmt.rule == "mse" else spanning)(values, fmt, rows)
    # Only a float32 weight can share its memory with `values`; every other is a copy that may be written.
    return lattice.codes(values, overwrite=rows.dtype != torch.float32), lattice


def _compensated(values: Tensor, rows: Tensor, fmt: Integer, evidence: Evidence) -> tuple[Tensor, Lattice]:
    if evidence.hessian is None:
        raise ValueError(f"{fmt} needs a Hessian")
    factor = inverse_factor(evidence.hessian.to(rows.device))
    whole = spanning(values, fmt, rows)
    lattice = None if fmt.granularity == "group" else _whole(whole)
    flat = values.reshape(rows.shape)
    codes, lattices = compensate(flat, factor, lattice, fmt.group, lambda part: spanning(part, fmt))
    if lattice is None:
        zeros = [made.zero for made in lattices if made.zero is not None]
        whole = Lattice(
            whole.grid,
            torch.stack([made.scale for made in lattices], 1),
            torch.stack(zeros, 1) if zeros else None,
        )
    # Flattened first: a tensor of one column passes as contiguous with any stride.
    return codes.reshape(-1).reshape(values.shape), whole


def _whole(lattice: Lattice) -> Lattice:
    """Drop the axis of groups, of which there is one."""
    return Lattice(lattice.grid, lattice.scale.squeeze(1), None if lattice.zero is None else lattice.zero.squeeze(1))
