"""A language model as one ONNX file for prompts and single tokens alike: any batch, any number of tokens, any cache.

`mpsearch.hardware.onnx_export` writes a graph of one fixed step, to be timed. This one is to be used: positions and
masks are computed in the graph from the length of the cache, so that prefill is a call with an empty cache and decoding
one with a full one. Tried with Llama, Qwen 2, Qwen 3, Gemma 2, GPT-2, OPT and GPT-NeoX.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

from mpsearch.errors import InputError
from mpsearch.hardware import onnx_export

if TYPE_CHECKING:
    from mpsearch.model.model import Model

#: Rotary embeddings whose angles hang on the length of the sequence: a graph would keep those of the example.
_MOVING = ("dynamic", "longrope")
#: What becomes of axes 0 and 1 of the tokens, and 0 and 2 of caches, in the file.
_AXES = ("batch", "tokens", "past", "total")


def export_model(model: Model, path: Path) -> None:
    """Write a causal language model as ONNX with external data beside it in ``NAME.data``, in fp32.

    Inputs: ``input_ids`` (batch, tokens) int64, and for each attention layer I ``past_key_values.I.key`` and ``.value``
    (batch, heads, past, channels) fp32, where ``past`` may be 0. Outputs: ``logits`` (batch, tokens, vocabulary) and
    ``present.I.key`` and ``present.I.value`` (batch, heads, past + tokens, channels), the inputs of the next call. The
    sequences of a batch are all of one length: there is no mask for padding. Windows are masks, and caches hold the
    whole context.

    Cost: seconds for a small model, and twice its fp32 weights in memory.

    Args:
        model: a language model of Hugging Face's shape; left as it is.
        path: the file to write.

    Raises:
        InputError: what cannot be exported (E431), or a library is not installed (E432).
    """
    onnx_export.check_installed()
    if not model.tokens:
        raise refusal(model, "it is no causal language model of Hugging Face's shape")
    try:
        with onnx_export._eager_attention(model.module), onnx_export._quiet():
            shapes = onnx_export._check_same(model)
            windows = _windows(model)
            wrapped = _wrapped(model.module, windows)
            _check(model, wrapped, shapes)
            _write(model, wrapped, shapes, path)
    except InputError:
        raise
    except Exception as error:  # the exporter and the model's own code raise whatever they like
        raise refusal(model, onnx_export._reason(error)) from error


def refusal(model: Model, reason: str) -> InputError:
    """The error for a model that cannot be written."""
    return InputError("E431", f"model '{model.name}' ({model.architecture}) cannot be exported to ONNX: {reason}")


def causal(tokens: int, past: int, window: int) -> Any:
    """Mask (1, 1, tokens, past + tokens): 0 where a token may look, else the smallest fp32; ``window`` 0 is no limit.

    >>> (causal(2, 1, 2)[0, 0] == 0).int().tolist()
    [[1, 1, 0], [0, 1, 1]]
    """
    import torch

    query = torch.arange(tokens)[:, None] + past
    key = torch.arange(past + tokens)[None]
    seen = (key <= query) & (key > query - window) if window else key <= query
    return torch.where(seen, 0.0, torch.finfo(torch.float32).min)[None, None]


def _windows(model: Model) -> Mapping[str, int]:
    """Kind of attention -> window that gives the model's own masks; 0 for none, and "" where there is one kind."""
    import torch

    module: Any = model.module
    config = module.config.get_text_config()
    if (getattr(config, "rope_parameters", None) or {}).get("rope_type") in _MOVING:
        raise refusal(model, "its rotary embeddings hang on the length of the sequence")
    width = int(getattr(config, "sliding_window", 0) or 0)
    probes = [(4, 0), (3, 1), *([(3, width)] if width else [])]
    cache_class = onnx_export._cache_class()
    found: dict[str, set[int]] = {}
    for tokens, past in probes:
        positions = torch.arange(past, past + tokens)[None]
        masks = onnx_export._masks(model.module, positions, cache_class([], past))
        for kind, mask in (masks if isinstance(masks, dict) else {"": masks}).items():
            same = {w for w in (0, width) if mask is not None and torch.equal(mask == 0, causal(tokens, past, w) == 0)}
            found[kind] = found.get(kind, same) & same
    if not all(found.values()):
        raise refusal(model, "its attention has masks that are neither causal nor a sliding window")
    return {kind: min(same) for kind, same in found.items()}


def _wrapped(module: Any, windows: Mapping[str, int]) -> Any:
    """A module (ids, flat list of past keys and values) -> (logits, present keys and values …)."""
    import torch

    cache_class = _growing_cache()

    class Wrapped(torch.nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.model = module

        def forward(self, ids: Any, past: list[Any]) -> tuple[Any, ...]:
            tokens, length = ids.shape[1], past[0].shape[2]
            masks = {kind: causal(tokens, length, window) for kind, window in windows.items()}
            cache = cache_class(past)
            output = self.model(
                input_ids=ids, attention_mask=masks.get("", masks), past_key_values=cache, use_cache=True,
                position_ids=torch.arange(tokens)[None] + length,
            )  # fmt: skip
            return output.logits, *(state for index in sorted(cache.present) for state in cache.present[index])

    return Wrapped().eval()


def _growing_cache() -> Any:
    """Make the cache class; transformers is loaded only by who needs it."""
    import torch
    from transformers import DynamicCache

    class GrowingCache(DynamicCache):
        """A cache over given keys and values, which notes these with the new ones behind them."""

        def __init__(self, past: Sequence[Any]) -> None:
            super().__init__()
            self._past = past
            self.present: dict[int, tuple[Any, Any]] = {}

        def update(self, key_states: Any, value_states: Any, layer_idx: int, *args: Any, **kwargs: Any) -> Any:
            key, value = self._past[2 * layer_idx : 2 * layer_idx + 2]
            self.present[layer_idx] = (torch.cat([key, key_states], dim=2), torch.cat([value, value_states], dim=2))
            return self.present[layer_idx]

        def get_seq_length(self, layer_idx: int = 0) -> int:
            length: int = self._past[0].shape[2]
            return length

        def get_mask_sizes(self, query_length: int, layer_idx: int) -> tuple[int, int]:
            return self.get_seq_length() + query_length, 0

    return GrowingCache


def _check(model: Model, wrapped: Any, shapes: Sequence[tuple[int, int]]) -> None:
    """Refuse a model that gives other logits in two steps than in its own way in one."""
    import torch

    ids = torch.tensor([[0, 1, 2, 3, 1]]) % max(model.vocabulary, 1)
    empty = [torch.zeros(1, heads, 0, channels) for heads, channels in shapes]
    with torch.no_grad():
        expected = model.module(input_ids=ids, use_cache=False).logits
        first, *past = wrapped(ids[:, :3], empty)
        second, *_ = wrapped(ids[:, 3:], past)
    found = torch.cat([first, second], dim=1)
    if found.shape != expected.shape or not torch.allclose(found, expected, atol=1e-4 * float(expected.abs().max())):
        raise refusal(model, "with a cache that grows it gives other logits")


def _write(model: Model, wrapped: Any, shapes: Sequence[tuple[int, int]], path: Path) -> None:
    import torch
    from torch.export import Dim

    # Examples of neither 0 nor 1, which the exporter would take for constants.
    ids = torch.zeros(2, 3, dtype=torch.long)
    past = [torch.zeros(2, heads, 5, channels) for heads, channels in shapes]
    free = Dim.DYNAMIC
    sides = [f"{index}.{side}" for index in range(len(shapes) // 2) for side in ("key", "value")]
    with torch.no_grad():
        program = torch.onnx.export(
            wrapped, (ids, past), dynamo=True, optimize=False, opset_version=onnx_export.OPSET, verbose=False,
            dynamic_shapes=({0: free, 1: free}, [{0: free, 2: free} for _ in past]),
            input_names=["input_ids", *(f"past_key_values.{side}" for side in sides)],
            output_names=["logits", *(f"present.{side}" for side in sides)],
        )  # fmt: skip
    assert program is not None
    onnx_export._simplify(program)
    program.model.metadata_props.update({"model": model.digest})
    path.parent.mkdir(parents=True, exist_ok=True)
    program.save(path, external_data=True)


def cleaned(proto: Any) -> Any:
    """Take out what says how and where a graph was made, and name its free axes; changes and returns the ModelProto."""
    graph = proto.graph
    for part in (*graph.node, *graph.input, *graph.output, *graph.initializer):
        part.ClearField("doc_string")
        part.ClearField("metadata_props")
    graph.ClearField("metadata_props")
    for value in (*graph.input, *graph.output):
        axes = value.type.tensor_type.shape.dim
        names = _AXES[:2] if len(axes) < 4 else (_AXES[0], _AXES[3 if value.name.startswith("present") else 2])
        for axis, name in zip((axes[0], axes[2 if len(axes) == 4 else 1]), names, strict=True):
            axis.ClearField("dim_value")
            axis.dim_param = name
    return proto
