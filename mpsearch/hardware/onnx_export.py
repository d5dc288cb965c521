"""Exporting a language model to ONNX for one step: all shapes fixed, caches as inputs, everything in fp32.

Tested with Llama, Mistral, Qwen2, Qwen3, Gemma 2, GPT-2, OPT and GPT-NeoX. Mixtures of experts and state-space models
are refused: the exporter has no operators for them.
"""

from __future__ import annotations

import logging
import warnings
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import TYPE_CHECKING, Any

from mpsearch.errors import InputError
from mpsearch.hardware.engines.packages import missing_packages
from mpsearch.workload import Step

if TYPE_CHECKING:
    from mpsearch.model.model import Model

#: What the names of the model's own tensors begin with in the file.
PREFIX = "model."
#: The newest that the exporter writes without converting.
OPSET = 20
#: Logits of two ways to run the model differ by at most this share of the largest.
_SAME = 1e-4


def export(model: Model, step: Step, path: str | Path) -> None:
    """Write a causal language model as ONNX, with external data beside it in ``NAME.data``.

    Inputs: ``input_ids`` (batch, tokens) int64 and, when the step has a context, ``past.I.key`` and ``past.I.value`` of
    each attention layer I, (batch, heads, context, channels) fp32. Outputs: ``logits`` (batch, 1, vocabulary) of the
    last position, for serving needs no others, and ``new.I.key`` and ``new.I.value`` of the new tokens. Positions and
    masks hang on the step alone and are constants. A sliding window is a mask here: its caches hold the whole context.

    Cost: seconds for a small model, and twice its fp32 weights in memory.

    Args:
        model: a language model of Hugging Face's shape; left as it is.
        step: tokens, context and batch.
        path: the file to write.

    Raises:
        InputError: what cannot be exported (E431), or a library is not installed (E432).
    """
    check_installed()
    if not model.tokens:
        raise _refusal(model, "it is no causal language model of Hugging Face's shape")
    if model.context and step.context + step.tokens > model.context:
        raise _refusal(model, f"it takes {model.context} tokens, and {step} needs {step.context + step.tokens}")
    try:
        with _eager_attention(model.module), _quiet():
            shapes = _check_same(model)
            _write(model, step, shapes, Path(path))
    except InputError:
        raise
    except Exception as error:  # the exporter and the model's own code raise whatever they like
        raise _refusal(model, _reason(error)) from error


def check_installed() -> None:
    """Refuse to go on without what exports and runs models.

    Raises:
        InputError: E432.
    """
    if reason := missing_packages("onnx", "onnxruntime", "onnxscript"):
        raise InputError(
            "E432", f"whole models run in ONNX Runtime, and {reason}", advice="pip install 'mpsearch[onnx]'"
        )


def described(model: Model, step: Step) -> dict[str, str]:
    """What an exported file says it is, in its metadata."""
    return {"model": model.digest, "step": f"{step.tokens} {step.context} {step.batch}"}


def _refusal(model: Model, reason: str) -> InputError:
    return InputError(
        "E431",
        f"model '{model.name}' ({model.architecture}) cannot be exported to ONNX: {reason}",
        advice="time its kernels instead: mpsearch profile",
    )


def _reason(error: BaseException) -> str:
    """The innermost cause in one line."""
    while error.__cause__ is not None:
        error = error.__cause__
    return f"{type(error).__name__}: {(str(error).strip() or 'no reason given').splitlines()[0][:200]}"


def _write(model: Model, step: Step, shapes: Sequence[tuple[int, int]], path: Path) -> None:
    import torch

    ids = torch.zeros(step.batch, step.tokens, dtype=torch.long)
    sizes = [(step.batch, heads, step.context, channels) for heads, channels in shapes]
    past = [torch.zeros(size) for size in sizes] if step.context else []
    sides = [f"{index}.{side}" for index in range(len(shapes) // 2) for side in ("key", "value")]
    with torch.no_grad():
        program = torch.onnx.export(
            _wrapped(model.module, step), (ids, past), dynamo=True, optimize=False, opset_version=OPSET, verbose=False,
            input_names=["input_ids", *(f"past.{side}" for side in sides[: len(past)])],
            output_names=["logits", *(f"new.{side}" for side in sides)],
        )  # fmt: skip
    assert program is not None
    _simplify(program)
    program.model.metadata_props.update(described(model, step))
    path.parent.mkdir(parents=True, exist_ok=True)
    program.save(path, external_data=True)


def _simplify(program: Any) -> None:
    """Fold constants, but no weights: these must keep their names and their values."""
    from onnxscript import optimizer

    def fold(node: Any) -> bool | None:
        held = [value for value in node.inputs if value is not None and (value.name or "").startswith(PREFIX)]
        return False if any(len(value.shape or ()) > 1 for value in held) else None

    optimizer.optimize_ir(program.model, should_fold=fold)


def _wrapped(module: Any, step: Step) -> Any:
    """A module (ids, flat list of past keys and values) -> (logits, new keys and values …)."""
    import torch

    cache_class = _cache_class()
    positions = torch.arange(step.context, step.context + step.tokens)[None]
    masks = _masks(module, positions, cache_class([], step.context))
    kinds = masks if isinstance(masks, dict) else {"": masks}

    class Wrapped(torch.nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.model = module
            self.register_buffer("positions", positions)
            for kind, mask in kinds.items():
                self.register_buffer(f"mask_{kind}", mask)

        def forward(self, ids: Any, past: list[Any]) -> tuple[Any, ...]:
            cache = cache_class(past, step.context)
            given = {kind: self.get_buffer(f"mask_{kind}") for kind in kinds}
            output = self.model(
                input_ids=ids, attention_mask=given if isinstance(masks, dict) else given[""],
                position_ids=self.positions, past_key_values=cache, use_cache=True, logits_to_keep=1,
            )  # fmt: skip
            return output.logits, *(state for index in sorted(cache.new) for state in cache.new[index])

    return Wrapped().eval()


def _masks(module: Any, positions: Any, cache: Any) -> Any:
    """The masks that the model would make itself, ready: (1, 1, tokens, context + tokens), by kind of layer."""
    from transformers.masking_utils import create_masks_for_generate

    embedded = positions.new_zeros(*positions.shape, 1).float()
    return create_masks_for_generate(module.config, embedded, None, cache, positions)


def _cache_class() -> Any:
    """Make the cache class; transformers is loaded only by who needs it."""
    import torch
    from transformers import DynamicCache

    class GivenCache(DynamicCache):
        """A cache over given keys and values, which notes the new ones and does not grow."""

        def __init__(self, past: Sequence[Any], length: int) -> None:
            super().__init__()
            self._past = past
            self._length = length
            self.new: dict[int, tuple[Any, Any]] = {}

        def update(self, key_states: Any, value_states: Any, layer_idx: int, *args: Any, **kwargs: Any) -> Any:
            self.new[layer_idx] = (key_states, value_states)
            if not self._past:
                return key_states, value_states
            before = self._past[2 * layer_idx : 2 * layer_idx + 2]
            return tuple(
                torch.cat([old, new], dim=2) for old, new in zip(before, (key_states, value_states), strict=True)
            )

        def get_seq_length(self, layer_idx: int = 0) -> int:
            return self._length

        def get_mask_sizes(self, query_length: int, layer_idx: int) -> tuple[int, int]:
            return self._length + query_length, 0

    return GivenCache


def _check_same(model: Model) -> list[tuple[int, int]]:
    """Refuse a model that takes ready masks and positions for something else; return (heads, channels) of its caches.

    Keys and values in turn. Two tokens after two others must give what four give in the model's own way.
    """
    import torch

    ids = torch.tensor([[0, 1, 2, 3]]) % max(model.vocabulary, 1)
    with torch.no_grad():
        expected = model.module(input_ids=ids, use_cache=False).logits[:, -1:]
        _, *past = _wrapped(model.module, Step(2))(ids[:, :2], [])
        found, *new = _wrapped(model.module, Step(2, 2))(ids[:, 2:], past)
    if not new or len(new) % 2 or any(state.dim() != 4 for state in new):
        raise _refusal(model, "it keeps no caches of keys and values")
    if found.shape != expected.shape or not torch.allclose(found, expected, atol=_SAME * float(expected.abs().max())):
        raise _refusal(model, "with ready masks, positions and caches it gives other logits")
    return [(int(state.shape[1]), int(state.shape[3])) for state in new]


@contextmanager
def _eager_attention(module: Any) -> Iterator[None]:
    """Compute attention by plain products, whose masks are ready tensors."""
    before = module.config._attn_implementation
    module.set_attn_implementation("eager")
    try:
        yield
    finally:
        module.set_attn_implementation(before)


@contextmanager
def _quiet() -> Iterator[None]:
    """Silence what the exporter says of itself: a deprecated call of its own, and libraries that are not here."""
    registry = logging.getLogger("torch.onnx._internal.exporter._registration")
    before = registry.level
    registry.setLevel(logging.ERROR)
    try:
        with warnings.catch_warnings():
            warnings.filterwarnings("ignore", message=r"`isinstance\(treespec, LeafSpec\)` is deprecated")
            yield
    finally:
        registry.setLevel(before)
