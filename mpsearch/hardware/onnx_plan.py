"""Putting a plan into an exported model: every layer gets the kernel of its own format."""

from __future__ import annotations

import math
from pathlib import Path
from typing import TYPE_CHECKING, Any

from mpsearch.errors import InputError
from mpsearch.format import Format
from mpsearch.hardware.calls import refuses
from mpsearch.hardware.engines.onnxruntime import ACCURACY_LEVEL, OnnxRuntime
from mpsearch.hardware.onnx_export import PREFIX
from mpsearch.hardware.onnx_graph import Graph, Read
from mpsearch.hardware.onnx_nodes import Weight
from mpsearch.layer import Layer
from mpsearch.plan import BitPlan

if TYPE_CHECKING:
    from mpsearch.model.model import Model


def build(source: str | Path | Any, plan: BitPlan, model: Model, *, accuracy: int = ACCURACY_LEVEL) -> Any:
    """Replace the product or look-up of each layer by the kernel of its format.

    Codes, scales and zero points are those that mpsearch measures the plan with. Biases are added after the product.
    Plain formats compute in fp32 with weights that are rounded to them. A tied embedding is held once for the look-up
    and once for the product where these want two layouts. Caches stay in fp32.

    Args:
        source: what `mpsearch.hardware.onnx_export.export` wrote: its path, or the ModelProto with its weights inside.
        plan: the plan.
        model: the model, unchanged; calibrated (`Model.calibrate`) for formats that are made from data.
        accuracy: accuracy level of MatMulNBits: 4 is what is timed, 1 multiplies in fp32, for comparing numbers.

    Returns:
        A ModelProto with all weights inside.

    Raises:
        InputError: the plan or the graph is of another model (E302); a format without a kernel, or a layer that is not
            found in the graph (E431); as `mpsearch.model.apply.quantized_weight`.
    """
    if plan.model.get("digest", model.digest) != model.digest:
        raise InputError("E302", f"the plan is for model {plan.model['digest'][:8]}…, this is {model.digest[:8]}…")
    engine = OnnxRuntime()
    for layer in plan.layers:
        if reason := refuses(layer, plan.formats[layer.name], engine):
            raise _no_kernel(layer, plan.formats[layer.name], reason)
    graph = Graph(source)
    if graph.metadata.get("model") != model.digest:
        raise InputError("E302", "the exported graph is of another model", advice="export this model")
    tensors: dict[str, Any] = {}
    for layer in plan.layers:
        if layer.kind != "kv_cache":
            tensors |= _place(graph, layer, Weight(model, layer, plan.formats[layer.name], accuracy))
    return graph.finish(tensors)


def weights_bytes(proto: Any) -> int:
    """Bytes of all tensors of the model itself: codes, scales, zero points, floats; no masks and positions."""
    from onnx import helper

    return sum(
        math.prod(tensor.dims) * helper.tensor_dtype_to_np_dtype(tensor.data_type).itemsize
        for tensor in proto.graph.initializer
        if tensor.name.startswith(PREFIX)
    )


def _no_kernel(layer: Layer, fmt: Format, reason: str) -> InputError:
    return InputError(
        "E431",
        f"layer '{layer.name}' cannot run in {fmt} with onnxruntime: {reason}",
        advice='plan with engine = "onnxruntime", which offers only what has a kernel',
    )


def _place(graph: Graph, layer: Layer, weight: Weight) -> dict[str, Any]:
    """Replace what reads a layer's weight; return the tensors that the new nodes read."""
    names = [PREFIX + layer.tensor, *(f"{PREFIX}{module}.weight" for module in layer.shared)]
    reads = graph.reads(names, weight.model.weight(layer.name).detach().cpu().numpy())
    if not reads:
        raise InputError(
            "E431", f"layer '{layer.name}' is not found in the exported graph", advice="export the same model again"
        )
    for number, read in enumerate(reads):
        weight_of_rows = read.turned == (layer.out_axis == 0)
        if read.kind == "other" or (read.kind == "linear" and not weight_of_rows):
            reason = f"the graph reads it by a {read.node.op_type} that is no product with it"
            raise _no_kernel(layer, weight.fmt, reason)
        graph.replace(read.node, _nodes(read, weight, names[0], number))
    return weight.tensors


def _nodes(read: Read, weight: Weight, prefix: str, number: int) -> list[Any]:
    from onnx import helper

    node, y = read.node, read.node.output[0]
    if read.kind == "embedding":
        return weight.look_up(node.input[1], y, prefix)
    if node.op_type != "Gemm" or len(node.input) < 3:
        return weight.product(node.input[0], y, prefix)
    product = f"{prefix}.product.{number}"
    return [*weight.product(node.input[0], product, prefix), helper.make_node("Add", [product, node.input[2]], [y])]
