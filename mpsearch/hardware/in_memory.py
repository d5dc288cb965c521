"""Bytes that a layer takes in the memory of an engine: nominal bits are not stored bits."""

from __future__ import annotations

from collections.abc import Sequence

from mpsearch.format import Format
from mpsearch.formats.kv_cache import KvCache
from mpsearch.hardware.calls import is_head, layer_calls
from mpsearch.hardware.kernel import Engine
from mpsearch.layer import Layer, Layers
from mpsearch.workload import Step


def weight_bytes(layer: Layer, fmt: Format, engine: Engine | None) -> int:
    """Bytes of a layer's weight as an engine keeps it to run; in our own files without an engine.

    An engine that looks a tied embedding up and multiplies it with kernels of their own keeps it twice. All experts are
    kept, not only those that run.

    >>> from mpsearch.registry import make
    >>> layer, fmt = Layer("fc", "linear", (64, 128)), Format.parse("int4-g128")
    >>> weight_bytes(layer, fmt, None), weight_bytes(layer, fmt, make("engines", "onnxruntime"))
    (4224, 4352)
    """
    if layer.kind == "kv_cache":
        return 0
    if engine is None:
        return fmt.bytes(layer)
    copies = layer.shape[0] if layer.kind == "expert" else 1
    once = {kernel: engine.bytes(kernel) for _, kernel in layer_calls(layer, fmt, Step(1))}
    return copies * sum(once.values())


def cache_bytes(layer: Layer, fmt: Format, context: int, batch: int, engine: Engine | None) -> int:
    """Bytes of one attention layer's keys or values; 16-bit ones take what the engine keeps numbers in."""
    if layer.kind != "kv_cache" or not isinstance(fmt, KvCache):
        return 0
    if engine is None or fmt.number.family != "plain":
        return batch * sum(fmt.cache_bytes(layer, context).values())
    tokens = min(context, layer.window or context)
    return batch * layer.rows * layer.columns * tokens * engine.cache_bits // 8


def read_bytes(layer: Layer, fmt: Format, step: Step, engine: Engine | None) -> float:
    """Bytes that one pass reads of a layer, each once: its weight, of an embedding the rows that are looked up.

    Of stacked experts those that run are read (see `mpsearch.hardware.calls.layer_calls`).
    """
    if layer.kind == "kv_cache":
        return float(cache_bytes(layer, fmt, step.context, step.batch, engine))
    whole = weight_bytes(layer, fmt, engine)
    if layer.kind == "embedding" and not layer.shared:
        return whole / layer.rows * min(step.rows, layer.rows)
    if layer.kind == "expert":
        active = sum(often for often, _ in layer_calls(layer, fmt, step))
        return whole / layer.shape[0] * active
    return float(whole)


def kept_bytes(layers: Sequence[Layer], engine: Engine | None) -> int:
    """Bytes of what is left out of the search, as an engine keeps it."""
    if not isinstance(layers, Layers):
        return 0
    if engine is None:
        return layers.excluded_bytes
    return sum(kept.weights for kept in layers.excluded) * engine.cache_bits // 8


def activation_bytes(layers: list[Layer], rows: int, batch: int, bits: int) -> int:
    """Bytes of the activations that live at once, modelled: what the widest decision reads and writes, and two rows.

    Attention keeps no matrix of scores. Logits are those of the last token of each sequence.

    Args:
        layers: of the model.
        rows: new tokens of the batch that pass at once.
        batch: sequences.
        bits: bits of a number that is not rounded.

    >>> activation_bytes([Layer("up", "linear", (64, 16)), Layer("lm_head", "linear", (100, 16))], 8, 1, 32)
    3984
    """
    linear = [layer for layer in layers if layer.kind in ("linear", "expert") and not is_head(layer)]
    ties: dict[str, int] = {}
    for layer in linear:
        experts = layer.shape[0] if layer.kind == "expert" else 1
        ties[layer.tie or layer.name] = ties.get(layer.tie or layer.name, 0) + layer.rows // experts
    width = max((layer.columns + ties[layer.tie or layer.name] for layer in linear), default=0)
    heads = [x for x in layers if is_head(x) or (x.kind == "embedding" and x.shared)]
    hidden = heads[0].columns if heads else min((layer.columns for layer in linear), default=0)
    logits = heads[0].rows if heads else 0
    return (rows * (width + 2 * hidden) + batch * logits) * bits // 8
