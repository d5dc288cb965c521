"""ONNX Runtime's nodes for a layer in a format, with the codes, scales and zero points that were measured.

- integers in groups: MatMulNBits; codes are stored offset by ``2**(bits-1)`` when there is no zero point;
- integers with rounded inputs: DynamicQuantizeMatMul, or QuantizeLinear and MatMulIntegerToFloat when static;
- plain formats: MatMul in fp32 with the rounded weights;
- embeddings: GatherBlockQuantized for integers in groups, else Gather in fp32.

Source: ONNX Runtime's ``docs/ContribOperators.md``. Scales are fp16 numbers, kept in fp32.
"""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Any

import numpy as np
from numpy.typing import NDArray

from mpsearch.format import Format
from mpsearch.formats.activation import Activation
from mpsearch.layer import Layer

if TYPE_CHECKING:
    from mpsearch.model.model import Model

_CONTRIB = "com.microsoft"


@dataclass
class Weight:
    """A layer's weight as the tensors of its kernels, made once for all nodes that read it.

    Attributes:
        model: the model, unchanged; calibrated where the format asks for it.
        layer: the layer.
        fmt: its format, one that ONNX Runtime has a kernel for.
        accuracy: accuracy level of MatMulNBits: 4 rounds inputs to int8, 1 keeps them in fp32.
        tensors: what the nodes read, by name; grows with each kind of node.
    """

    model: Model
    layer: Layer
    fmt: Format
    accuracy: int
    tensors: dict[str, NDArray[Any]] = field(default_factory=dict)
    _parts: dict[str, NDArray[Any]] = field(default_factory=dict)

    def product(self, x: str, y: str, prefix: str) -> list[Any]:
        """Nodes from an input (…, columns) to the product (…, rows)."""
        from onnx import helper

        if self.fmt.weight.family == "plain":
            held = self._hold(f"{prefix}.turned", lambda: np.ascontiguousarray(self.values().T))
            return [helper.make_node("MatMul", [x, held], [y])]
        if self.fmt.activation is not None:
            return self._rounded_inputs(x, y, prefix)
        fmt: Any = self.fmt.weight
        rows, groups = self.layer.rows, self.layer.columns // fmt.group
        size = fmt.group * fmt.bits // 8
        inputs = [
            x,
            self._hold(f"{prefix}.codes", lambda: self._packed("payload").reshape(rows, groups, size)),
            self._hold(f"{prefix}.scales", lambda: self._scales().reshape(rows, groups)),
        ]
        if fmt.asymmetric:
            inputs.append(self._hold(f"{prefix}.zeros", lambda: self._packed("zero_points").reshape(rows, -1)))
        node = helper.make_node(
            "MatMulNBits", inputs, [y], domain=_CONTRIB,
            K=self.layer.columns, N=rows, bits=fmt.bits, block_size=fmt.group, accuracy_level=self.accuracy,
        )  # fmt: skip
        return [node]

    def look_up(self, ids: str, y: str, prefix: str) -> list[Any]:
        """Nodes from token numbers to their rows."""
        from onnx import helper

        if self.fmt.weight.family == "plain":
            held = self._hold(prefix, self.values)
            return [helper.make_node("Gather", [held, ids], [y], axis=0)]
        fmt: Any = self.fmt.weight
        rows, groups = self.layer.rows, self.layer.columns // fmt.group
        inputs = [
            self._hold(f"{prefix}.rows", lambda: self._packed("payload").reshape(rows, -1)),
            ids,
            self._hold(f"{prefix}.scales", lambda: self._scales().reshape(rows, groups)),
        ]
        if fmt.asymmetric:
            inputs.append(self._hold(f"{prefix}.zeros", lambda: self._packed("zero_points").reshape(rows, -1)))
        node = helper.make_node(
            "GatherBlockQuantized", inputs, [y], domain=_CONTRIB,
            bits=fmt.bits, block_size=fmt.group, gather_axis=0, quantize_axis=1,
        )  # fmt: skip
        return [node]

    def values(self) -> NDArray[np.float32]:
        """The rounded weight as (rows, columns)."""
        from mpsearch.model.apply import quantized_weight

        rounded = quantized_weight(self.model, self.layer, self.fmt.weight)
        turned = rounded.movedim(self.layer.out_axis, 0).reshape(self.layer.rows, -1)
        found: NDArray[np.float32] = turned.contiguous().cpu().numpy()
        return found

    def _rounded_inputs(self, x: str, y: str, prefix: str) -> list[Any]:
        from onnx import helper

        codes = self._hold(f"{prefix}.codes", lambda: np.ascontiguousarray(self._stored()["payload"].T))
        scales = self._hold(f"{prefix}.scales", lambda: self._scales().reshape(-1))
        activation = self.fmt.activation
        assert isinstance(activation, Activation)
        if not activation.static:
            return [helper.make_node("DynamicQuantizeMatMul", [x, codes, scales], [y], domain=_CONTRIB)]
        scale, zero = self._input_grid(activation)
        step = self._hold(f"{prefix}.input_scale", lambda: scale)
        start = self._hold(f"{prefix}.input_zero", lambda: zero)
        return [
            helper.make_node("QuantizeLinear", [x, step, start], [f"{y}.codes"]),
            helper.make_node(
                "MatMulIntegerToFloat", [f"{y}.codes", codes, step, scales, start], [y], domain=_CONTRIB
            ),
        ]  # fmt: skip

    def _input_grid(self, activation: Activation) -> tuple[NDArray[np.float32], NDArray[np.uint8]]:
        from mpsearch.model.activations import scale_and_zero
        from mpsearch.model.evidence import Calibration

        scale, zero = scale_and_zero(Calibration.of(self.model).input_range(self.layer, activation), activation)
        return np.asarray(scale.item(), np.float32), np.asarray(zero.item(), np.uint8)

    def _stored(self) -> dict[str, NDArray[Any]]:
        """Codes (rows, columns), scales and zero points, by part."""
        if not self._parts:
            from mpsearch.model.apply import quantized_parts

            made = quantized_parts(self.model, self.layer, self.fmt.weight)
            self._parts = {name: part.cpu().numpy() for name, part in made.parts.items()}
        return self._parts

    def _scales(self) -> NDArray[np.float32]:
        return self._stored()["scales"].astype(np.float32)

    def _packed(self, part: str) -> NDArray[np.uint8]:
        """Codes or zero points of a row after each other, lowest bits first."""
        from mpsearch.model.bits import pack_rows

        fmt: Any = self.fmt.weight
        codes = self._stored()[part]
        if not fmt.asymmetric:
            codes = (codes.astype(np.int16) + 2 ** (fmt.bits - 1)).astype(np.uint8)
        return pack_rows(codes, fmt.bits)

    def _hold(self, name: str, make: Any) -> str:
        if name not in self.tensors:
            self.tensors[name] = make()
        return name
