"""Which kernels a layer runs in one pass, and how often."""

from __future__ import annotations

import math
from collections.abc import Callable, Iterable, Sequence

import numpy as np

from mpsearch.format import Format
from mpsearch.formats.kv_cache import KvCache
from mpsearch.hardware.kernel import Engine, Kernel
from mpsearch.layer import Decision, Layer
from mpsearch.tables import Array
from mpsearch.workload import Step

#: Names of layers that give the logits, of which serving needs those of the last token alone.
_HEADS = ("lm_head", "embed_out")

Calls = list[tuple[float, Kernel]]


def is_head(layer: Layer) -> bool:
    """Whether a linear layer gives the logits.

    >>> is_head(Layer("lm_head", "linear", (8, 4))), is_head(Layer("model.layers.0.mlp.up_proj", "linear", (8, 4)))
    (True, False)
    """
    return layer.kind == "linear" and layer.name.rpartition(".")[2] in _HEADS


def refuses(layer: Layer, fmt: Format, engine: Engine) -> str:
    """Say why an engine cannot run a layer in a format; empty when it can.

    >>> from mpsearch.registry import make
    >>> refuses(Layer("fc", "linear", (8, 64)), Format.parse("int3-g64"), make("engines", "onnxruntime"))
    'ONNX Runtime has kernels of 2, 4, 8 bits here, not 3'
    """
    if problem := fmt.refuses(layer):
        return problem
    if isinstance(fmt, KvCache):
        whole = fmt.number.family == "plain"
        return "" if whole else f"{engine.name} keeps KV caches in {engine.cache_bits} bits, not as {fmt}"
    if layer.is_part:
        return f"{engine.name} runs whole layers; '{layer.name}' is a part of '{layer.of}'"
    if layer.kind == "conv" and engine.name != "table":
        return f"kernels of convolutions are not timed with {engine.name}; use a table of your own (engine = 'file:…')"
    for _, kernel in layer_calls(layer, fmt, Step(1)):
        if problem := engine.refuses(kernel):
            return problem
    return ""


def offered(
    rows: Sequence[Decision],
    formats: Sequence[Format],
    engine: Engine | None,
    cell: Callable[[Decision, Format], float],
) -> Array:
    """(N, F) values of cells; NaN where a layer cannot take the format, by its shape or for want of a kernel."""
    value = np.full((len(rows), len(formats)), np.nan)
    for i, row in enumerate(rows):
        for j, fmt in enumerate(formats):
            if not any(fmt.refuses(x) if engine is None else refuses(x, fmt, engine) for x in row.layers):
                value[i, j] = cell(row, fmt)
    return value


def layer_calls(layer: Layer, fmt: Format, step: Step) -> Calls:
    """(count, kernel) of all that one layer runs in one pass.

    A linear layer multiplies all new tokens; one that gives the logits only the last of each sequence. An embedding is
    looked up once for each token, and where it also gives the logits, multiplied as a linear layer is. Of stacked
    experts those run that the tokens are sent to: modelled, as if each token chose its experts at random.

    >>> layer_calls(Layer("e", "expert", (8, 16, 4), out_axis=1, macs=128), Format.parse("bf16"), Step(1))
    [(2.0, Kernel(kind='linear', rows=16, columns=4, format='bf16', tokens=1))]
    """
    text = str(fmt)
    if layer.kind == "kv_cache":
        return []
    if layer.kind == "embedding":
        found: Calls = [(1.0, Kernel.of("embedding", layer.rows, layer.columns, text, step.rows))]
        return [*found, (1.0, _product(layer, text, step.batch))] if layer.shared else found
    if layer.kind == "expert":
        return _experts(layer, text, step)
    if is_head(layer):
        return [(1.0, _product(layer, text, step.batch))]
    times = max(1, round(layer.macs / layer.weights)) if layer.weights else 1
    return [(float(times), _product(layer, text, step.rows))]


def decision_calls(row: Decision, fmt: Format, step: Step, fuses: bool) -> Calls:
    """(count, kernel) of a decision; linear siblings that are fused run as one product."""
    linear = [layer for layer in row.layers if layer.kind == "linear" and not is_head(layer)]
    if fuses and len(linear) == len(row.layers) > 1 and len({layer.columns for layer in linear}) == 1:
        rows = sum(layer.rows for layer in linear)
        return [(1.0, Kernel.of("linear", rows, linear[0].columns, str(fmt), step.rows))]
    return [call for layer in row.layers for call in layer_calls(layer, fmt, step)]


def kernels(
    rows: Iterable[Decision], formats: Sequence[Format], steps: Sequence[Step], engine: Engine
) -> tuple[Kernel, ...]:
    """Each distinct kernel that plans of these formats could run, in the order of the layers."""
    found: dict[Kernel, None] = {}
    for row in rows:
        for fmt in formats:
            if any(refuses(layer, fmt, engine) for layer in row.layers):
                continue
            for step in steps:
                found |= {kernel: None for _, kernel in decision_calls(row, fmt, step, engine.fuses)}
    return tuple(found)


def _product(layer: Layer, text: str, tokens: int) -> Kernel:
    return Kernel.of("linear", layer.rows, layer.columns, text, tokens)


def _experts(layer: Layer, text: str, step: Step) -> Calls:
    """Experts chosen at random: of E, each token takes k, so E (1 - (1 - k/E)^tokens) run."""
    experts = layer.shape[0]
    rows = layer.rows // experts
    each = layer.weights // experts
    share = min(1.0, max(1.0, layer.macs / each) / experts)
    active = experts * (1 - (1 - share) ** step.rows)
    tokens = max(1, math.ceil(step.rows * share * experts / active))
    return [(active, Kernel.of("linear", rows, layer.columns, text, tokens))]
