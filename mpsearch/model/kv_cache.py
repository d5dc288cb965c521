"""KV caches of Hugging Face models: finding them, and running with rounded ones."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator, Mapping
from itertools import pairwise
from typing import TYPE_CHECKING, Any, NamedTuple

import torch
from torch import Tensor, nn

from mpsearch.errors import InputError
from mpsearch.formats.kv_cache import KvCache, check_length
from mpsearch.layer import Layer
from mpsearch.model.codec import Evidence, RangeError, codec_of

if TYPE_CHECKING:
    from mpsearch.model.model import Model

#: Tokens that are fed at once where what a query sees depends on how many came after.
STEP = 16

#: (number of the attention layer, 0 for keys and 1 for values) -> format.
Formats = Mapping[tuple[int, int], KvCache]
#: (number of the attention layer, 0 for keys and 1 for values, new states) -> what is kept of them.
Write = Callable[[int, int, Tensor], Tensor]


class Place(NamedTuple):
    """A KV cache: number of its attention layer, 0 for keys and 1 for values, and the layer that is decided."""

    number: int
    side: int
    layer: Layer


def find_caches(model: Model) -> dict[str, Place]:
    """Find the KV caches of a language model, by name.

    Empty when the model keeps none of the kind that grows by keys and values.
    """
    return model.memo("caches", model, lambda: {place.layer.name: place for place in _places(model)})


def _places(model: Model) -> Iterator[Place]:
    if not model.tokens:
        return
    shapes: dict[int, tuple[Any, Any]] = {}
    cache = _cache_class()(model.module, {}, shapes)
    with torch.no_grad():
        try:
            tokens = torch.zeros(1, 2, dtype=torch.long, device=next(model.module.parameters()).device)
            model.module(input_ids=tokens, use_cache=True, past_key_values=cache)
        except (AttributeError, TypeError, ValueError, RuntimeError, LookupError):
            return  # a model that takes no such cache keeps none that could be rounded
    dtype = next(iter(model.stored.values()), "float32")
    for index, pair in sorted(shapes.items()):
        window = cache.layers[index].sliding_window if cache.is_sliding[index] else 0
        owner = _owner(model.module, index)
        for side, shape in enumerate(pair):
            size = (int(shape[1]), int(shape[3]))
            yield Place(index, side, Layer(f"{owner}.{'kv'[side]}_cache", "kv_cache", size, dtype=dtype, window=window))


def _owner(module: nn.Module, index: int) -> str:
    """Path of the innermost module that knows its number in the cache."""
    paths = [path for path, part in module.named_modules() if getattr(part, "layer_idx", None) == index]
    inner = [path for path in paths if not any(other.startswith(f"{path}.") for other in paths)]
    return inner[0] if inner else f"kv_cache.{index}"


def cached_logits(module: nn.Module, batch: Mapping[str, Tensor], formats: Formats) -> Tensor:
    """Logits of a causal language model that keeps its keys and values in other formats.

    A format that rounds each token as it is written is exact in one pass. Where the newest tokens or an incomplete
    group stay in 16 bits, tokens are fed in steps, and what is due is rounded at the beginning of each. Steps begin
    wherever a group is due, which makes formats per channel exact, and at least every `STEP` tokens, so that with
    ``-recent`` a token is rounded at most ``STEP - 1`` tokens later than in an engine that feeds one by one.

    Args:
        module: the model.
        batch: ``input_ids`` (sequences, positions), and what else the model takes where one pass is enough.
        formats: which cache gets which format; all others stay as they are.

    Raises:
        InputError: tokens must be fed in steps, and the batch holds more than tokens (E423), or sequences so short that
            nothing would be rounded (E424).
    """
    tokens = batch["input_ids"]
    cache = _cache_class()(module, formats, {})
    stepwise = next((fmt for fmt in formats.values() if fmt.stepwise), None)
    if stepwise is None:
        output: Tensor = module(**batch, use_cache=True, past_key_values=cache).logits
        return output
    if len(batch) > 1:
        raise InputError(
            "E423",
            f"{stepwise}: tokens are fed in steps, and the batch holds {', '.join(batch)}",
            advice="give batches of input_ids alone, or a format per token without -recent",
        )
    check_length(formats.values(), tokens.shape[1])
    starts = _starts(formats.values(), tokens.shape[1])
    parts = [
        module(input_ids=tokens[:, start:end], use_cache=True, past_key_values=cache).logits
        for start, end in pairwise([*starts, tokens.shape[1]])
    ]
    return torch.cat(parts, dim=1)


def watched_logits(module: nn.Module, batch: Mapping[str, Tensor], write: Write) -> Tensor:
    """Logits of a causal language model whose keys and values pass through a function as they are cached.

    Args:
        module: the model.
        batch: what the model takes.
        write: (number of the attention layer, 0 for keys and 1 for values, states) -> what is kept of them.
    """
    output: Tensor = module(**batch, use_cache=True, past_key_values=_cache_class()(module, {}, {}, write)).logits
    return output


def _starts(formats: Iterable[KvCache], length: int) -> list[int]:
    """Where steps begin: every `STEP` tokens, and wherever a group of tokens is due to be rounded."""
    starts = set(range(0, length, STEP))
    for fmt in formats:
        if fmt.tokens:
            starts |= set(range(max(fmt.tokens + fmt.recent - 1, 0), length, fmt.tokens))
    return sorted(starts)


def round_states(states: Tensor, fmt: KvCache) -> Tensor:
    """Round keys or values (sequences, heads, tokens, channels); whole groups of tokens for a format per channel.

    >>> from mpsearch.format import Format
    >>> fmt = Format.parse("kv-int8-token")
    >>> round_states(torch.tensor([[[[1.0, 0.3]]]]), fmt).shape
    torch.Size([1, 1, 1, 2])
    """
    turned = states
    if fmt.along == "channel":
        sequences, heads, count, channels = states.shape
        turned = states.reshape(sequences, heads, count // fmt.tokens, fmt.tokens, channels).movedim(3, 4)
    rows = turned.reshape(-1, turned.shape[-1]).contiguous()
    try:
        rounded = codec_of(type(fmt.number)).fake(rows, fmt.number, Evidence()).reshape(turned.shape)
    except RangeError:
        # As a weight this is an error of the user's; here it is a state of the run, and shows as a loss.
        return torch.full_like(states, torch.nan)
    if fmt.along == "channel":
        rounded = rounded.movedim(4, 3).flatten(2, 3)
    return rounded.to(states.dtype)


def _cache_class() -> Any:
    """Make the cache class; transformers is loaded only by who needs it."""
    from transformers import DynamicCache

    class RoundingCache(DynamicCache):
        """A cache that rounds what it keeps, and notes the shapes it saw."""

        def __init__(
            self, module: nn.Module, formats: Formats, shapes: dict[int, Any], write: Write | None = None
        ) -> None:
            super().__init__(config=module.config)  # type: ignore[arg-type]
            self._formats = formats
            self._shapes = shapes
            self._write = write
            self._rounded: dict[tuple[int, int], int] = {}

        def update(
            self, key_states: Tensor, value_states: Tensor, layer_idx: int, *args: Any, **kwargs: Any
        ) -> tuple[Tensor, Tensor]:
            self._shapes[layer_idx] = (key_states.shape, value_states.shape)
            if self._write is not None:
                key_states, value_states = (
                    self._write(layer_idx, 0, key_states),
                    self._write(layer_idx, 1, value_states),
                )
            before = self.get_seq_length(layer_idx)
            written = [
                round_states(states, fmt) if fmt is not None and not fmt.stepwise else states
                for states, fmt in zip((key_states, value_states), self._of(layer_idx), strict=True)
            ]
            held = super().update(written[0], written[1], layer_idx, *args, **kwargs)
            for side, fmt in enumerate(self._of(layer_idx)):
                if fmt is not None and fmt.stepwise:
                    self._age(held[side], (layer_idx, side), fmt, before)
            return held

        def _of(self, index: int) -> tuple[KvCache | None, KvCache | None]:
            return self._formats.get((index, 0)), self._formats.get((index, 1))

        def _age(self, held: Tensor, place: tuple[int, int], fmt: KvCache, before: int) -> None:
            """Round in place the tokens that are too old for 16 bits; ``held`` is what the cache itself keeps."""
            done, size = self._rounded.get(place, 0), fmt.tokens or 1
            due = max(0, before + 1 - fmt.recent) // size * size
            if due > done:
                held[:, :, done:due] = round_states(held[:, :, done:due], fmt)
                self._rounded[place] = due

    return RoundingCache
