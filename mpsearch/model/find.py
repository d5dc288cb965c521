"""Finding the layers of a model: what can be decided, what cannot and why, and what is fused."""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass, field, replace
from typing import Any, Literal

import torch
from torch import Tensor, nn

from mpsearch.errors import InputError
from mpsearch.layer import Excluded, Layer, Layers
from mpsearch.model.kv_cache import find_caches
from mpsearch.model.model import Batch, Model, batch_size
from mpsearch.model.reads import read_by_any
from mpsearch.model.repeatable import check_repeatable

Ties = Literal["auto", "none"] | Sequence[Sequence[str]]


def _kind(module: nn.Module) -> str:
    if isinstance(module, nn.Linear) or _is_transposed(module):
        return "linear"
    if isinstance(module, (nn.Conv1d, nn.Conv2d, nn.Conv3d)):
        return "conv"
    return "embedding" if isinstance(module, nn.Embedding) else ""


def _is_transposed(module: nn.Module) -> bool:
    # GPT-2's linear keeps its weight as (in, out); known by name so that transformers need not be imported.
    return type(module).__name__ == "Conv1D" and type(module).__module__ == "transformers.pytorch_utils"


@dataclass
class _Use:
    """What the forward passes showed of a module.

    Tensors are held during a pass only, and a freed tensor's identity can come back as another's. So what was read is
    kept with the number of the pass, the first that called the module: identities of two passes say nothing.
    """

    calls: int = 0
    macs: int = 0
    routed: int = 0
    inputs: list[Tensor] = field(default_factory=list)
    read: tuple[int, tuple[int, ...]] | None = None

    def close(self, number: int) -> None:
        """End a pass."""
        if self.read is None and self.inputs:
            self.read = number, tuple(id(x) for x in self.inputs)
        self.inputs.clear()


def find_layers(
    model: Model,
    batches: Sequence[Batch] = (),
    ties: Ties = "auto",
    *,
    caches: bool = False,
    may_be_none: bool = False,
) -> Layers:
    """Find what can be decided in a model, with one forward pass per batch.

    Linear, convolution and embedding weights are decided, and so are weights of many experts stacked in one tensor;
    everything else keeps its number type and is listed with the reason. A weight that several modules share is one
    layer. Linear siblings that read the very same tensor (q/k/v, gate/up) are tied, because engines fuse them.

    Args:
        model: the model.
        batches: what to run it on, to count multiply-adds, to see what is fused, and what is never called. Without any,
            a language model runs on eight tokens, and nothing counts as never called.
        ties: ``auto`` as above, ``none``, or lists of layer names or patterns, one list per tie.
        caches: also list the KV caches, keys and values apart, after all weights.
        may_be_none: a model with nothing to decide is no error.

    Raises:
        InputError: nothing to decide (E418), a tie that matches nothing (E120), or a model that gives two answers to
            one batch (E513).
    """
    if ties not in ("auto", "none") and isinstance(ties, str):
        raise InputError("E113", f"ties is '{ties}'; give auto, none, or lists of layer names")
    used = _watch_forward(model, batches)
    if batches:
        check_repeatable(model, batches[0])
    calls = _calls(model, used) if batches else None
    read = _read_elsewhere(model, batches, calls) if calls is not None else set()
    layers: dict[int, Layer] = {}
    excluded: list[Excluded] = []
    seen: dict[int, str] = {}
    for path, module in model.module.named_modules():
        for name, parameter in module.named_parameters(recurse=False):
            full = f"{path}.{name}" if path else name
            if id(parameter) in seen:
                if id(parameter) in layers and name == "weight":
                    layers[id(parameter)] = _join(layers[id(parameter)], path, used.get(path))
                continue
            seen[id(parameter)] = full
            dtype = model.stored.get(full, "float32")
            reason = _reason_to_keep(module, name, parameter, calls, read)
            if reason:
                excluded.append(Excluded(full, tuple(parameter.shape), dtype, reason))
                continue
            use = used.get(path, _Use())
            if _holds_experts(module, parameter):
                layers[id(parameter)] = _expert(full, module, parameter, dtype, use)
                continue
            out_axis = 1 if _is_transposed(module) else 0
            layers[id(parameter)] = Layer(
                path,
                _kind(module),
                tuple(parameter.shape),
                out_axis,
                dtype,
                use.macs,
                groups=int(getattr(module, "groups", 1)) if _kind(module) == "conv" else 1,
            )
        for name, buffer in module.named_buffers(recurse=False):
            if name not in module._non_persistent_buffers_set:
                full = f"{path}.{name}" if path else name
                excluded.append(Excluded(full, tuple(buffer.shape), model.stored[full], "buffer"))
    if not layers and not may_be_none:
        kinds = sorted(
            {type(m).__name__ for m in model.module.modules() if next(m.parameters(recurse=False), None) is not None}
        )
        raise InputError(
            "E418",
            f"model '{model.name}' has no Linear, Conv or Embedding weights",
            because=f"found: {', '.join(kinds) or 'none'}",
        )
    per = _units(model, batches)
    items = tuple(replace(layer, macs=layer.macs // per) for layer in layers.values())
    if caches:
        items += tuple(place.layer for place in find_caches(model).values())
    found = Layers(items, tuple(excluded), "token" if model.tokens else "sample")
    return _tie(found, used, ties)


def _holds_experts(module: nn.Module, parameter: Tensor) -> bool:
    """Whether a parameter stacks the weights of experts.

    That is: three axes, more than one expert, in a module that holds no others, is none of torch's own, and says that
    it holds experts, by its class name or by how many it has. Other weights of three axes are something else:
    transposed convolutions, bilinear maps, tokens and positions that vision models learn.
    """
    kind = type(module)
    inner = (x for child in module.children() for x in child.parameters())
    says_so = "expert" in kind.__name__.lower() or any(hasattr(module, name) for name in ("num_experts", "n_experts"))
    stacked = parameter.ndim == 3 and parameter.shape[0] > 1
    return stacked and says_so and not kind.__module__.startswith("torch.") and next(inner, None) is None


def _expert(name: str, module: nn.Module, parameter: Tensor, dtype: str, use: _Use) -> Layer:
    # Hugging Face marks experts that keep their weights as (experts, in, out).
    out_axis = 2 if getattr(module, "is_transposed", False) else 1
    size = math.prod(parameter.shape[1:])
    return Layer(name, "expert", tuple(parameter.shape), out_axis, dtype, use.routed * size)


def _join(layer: Layer, path: str, use: _Use | None) -> Layer:
    return replace(layer, shared=(*layer.shared, path), macs=layer.macs + (use.macs if use else 0))


def _calls(model: Model, used: dict[str, _Use]) -> dict[int, int]:
    """How often each weight was used, by all modules that share it."""
    calls: dict[int, int] = {}
    for path, use in used.items():
        for weight in model.module.get_submodule(path).parameters(recurse=False):
            calls[id(weight)] = calls.get(id(weight), 0) + use.calls
    return calls


def _read_elsewhere(model: Model, batches: Sequence[Batch], calls: dict[int, int]) -> set[int]:
    """Weights whose module is not called but which are read: Mamba gives its convolution's weight to a function."""
    uncalled = {
        id(module.weight)
        for module in model.module.modules()
        if _kind(module) and not calls.get(id(module.weight)) and isinstance(module.weight, nn.Parameter)
    }
    return read_by_any(uncalled, lambda batch: _run(model, batch), batches)


def _run(model: Model, batch: Batch) -> None:
    with torch.no_grad():
        model.logits(batch) if model.has_logits else model.loss(batch)


def _reason_to_keep(
    module: nn.Module, name: str, parameter: Tensor, calls: dict[int, int] | None, read: set[int]
) -> str:
    if parameter.ndim < 2:
        return "1-D norm or bias vector"
    if not _holds_experts(module, parameter) and (name != "weight" or not _kind(module)):
        return f"no quantiser for {type(module).__name__}.{name}"
    if calls is not None and not calls.get(id(parameter)):
        return "read outside of its module" if id(parameter) in read else "never called by the data"
    return ""


def _examples(model: Model, batches: Sequence[Batch]) -> Sequence[Batch]:
    if not batches and model.tokens:
        return [{"input_ids": torch.zeros(1, 8, dtype=torch.long)}]
    return batches


def _units(model: Model, batches: Sequence[Batch]) -> int:
    """Tokens or samples that the multiply-adds were counted over."""
    examples = _examples(model, batches)
    return sum(int(x["input_ids"].numel()) if model.tokens else batch_size(x) for x in examples) or 1


def _watch_forward(model: Model, batches: Sequence[Batch]) -> dict[str, _Use]:
    examples = _examples(model, batches)
    used: dict[str, _Use] = {}
    handles = []
    for path, module in model.module.named_modules():
        stacked = any(_holds_experts(module, x) for x in module.parameters(recurse=False))
        if (_kind(module) or stacked) and examples:
            used[path] = _Use()
            handles.append(module.register_forward_hook(_watcher(used[path]), with_kwargs=True))
    try:
        for number, example in enumerate(examples):
            _run(model, example)
            for use in used.values():
                use.close(number)
    finally:
        for handle in handles:
            handle.remove()
    return used


def _watcher(use: _Use) -> Any:
    def watch(module: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any], output: Any) -> None:
        use.calls += 1
        if not _kind(module):
            use.routed += _routed(args, kwargs)
            return
        first = args[0] if args else next(iter(kwargs.values()), None)
        if isinstance(first, Tensor):
            use.inputs.append(first)
        if isinstance(output, Tensor) and not isinstance(module, nn.Embedding):
            weight: Any = module.weight
            use.macs += output.numel() * (weight.numel() // weight.shape[1 if _is_transposed(module) else 0])

    return watch


def _routed(args: tuple[Any, ...], kwargs: dict[str, Any]) -> int:
    """How many (token, expert) pairs a module of experts works on: the size of its index of chosen experts."""
    given = [x for x in (*args, *kwargs.values()) if isinstance(x, Tensor)]
    chosen = next((x for x in given if x.dtype in (torch.int32, torch.int64)), None)
    if chosen is not None:
        return chosen.numel()
    return given[0].numel() // given[0].shape[-1] if given else 0


def _tie(found: Layers, used: dict[str, _Use], ties: Ties) -> Layers:
    if isinstance(ties, str):
        groups = _fused(found, used) if ties == "auto" else []
    else:
        groups = [[layer.name for pattern in group for layer in found.match(pattern)] for group in ties]
    tie_of: dict[str, str] = {}
    for group in groups:
        names = list(dict.fromkeys(group))
        for name in names:
            if name in tie_of:
                raise InputError("E121", f"layer '{name}' is in two ties: '{tie_of[name]}' and '{tie_name(names)}'")
            tie_of[name] = tie_name(names)
    return Layers(tuple(replace(x, tie=tie_of.get(x.name, "")) for x in found), found.excluded, found.unit)


def _fused(found: Layers, used: dict[str, _Use]) -> list[list[str]]:
    groups: dict[tuple[str, tuple[int, tuple[int, ...]], int], list[str]] = {}
    for layer in found:
        use = used.get(layer.name)
        if layer.kind != "linear" or layer.shared or use is None or use.read is None:
            continue
        parent = layer.name.rpartition(".")[0]
        groups.setdefault((parent, use.read, layer.out_axis), []).append(layer.name)
    return [names for names in groups.values() if len(names) > 1]


def _common(texts: Sequence[str]) -> str:
    """The longest text that all begin with."""
    length = 0
    for characters in zip(*texts, strict=False):
        if len(set(characters)) > 1:
            break
        length += 1
    return texts[0][:length]


def tie_name(names: Sequence[str]) -> str:
    """Write the names of tied layers as one text.

    >>> tie_name(["l.0.q_proj", "l.0.k_proj"])
    'l.0.{q,k}_proj'
    """
    prefix = _common(names)
    prefix = prefix[: prefix.rfind(".") + 1]
    rests = [name[len(prefix) :] for name in names]
    suffix = _common([rest[::-1] for rest in rests])[::-1]
    suffix = suffix[suffix.find("_") :] if "_" in suffix else ""
    middles = [rest[: len(rest) - len(suffix)] for rest in rests]
    return f"{prefix}{{{','.join(middles)}}}{suffix}"
