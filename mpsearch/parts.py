"""Cutting layers into parts that get formats of their own: heads, experts, output channels, blocks of columns."""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from dataclasses import replace
from typing import Any, Literal, get_args

from mpsearch.errors import InputError, did_you_mean
from mpsearch.layer import Layer, Layers, Span

By = Literal["output_channel", "input_channel", "head", "expert", "group"]
#: Projections of attention by the last part of their name: those whose output channels are heads, and whose inputs are.
HEADS_OUT = ("q_proj", "k_proj", "v_proj", "query", "key", "value", "q_lin", "k_lin", "v_lin", "wq", "wk", "wv")
HEADS_IN = ("o_proj", "out_proj", "out_lin", "wo")


def split(
    layers: Sequence[Layer],
    by: By,
    size: int | None = None,
    *,
    only: str | Sequence[str] = (),
    model: Any = None,
) -> Layers:
    """Cut layers into parts, each a layer of its own that is scored, priced and planned alone.

    - ``output_channel``: ``size`` output channels each; the last part may hold fewer.
    - ``input_channel``: ``size`` columns each (weights of an output channel, in their order); the last may hold fewer.
    - ``group``: as ``input_channel``, for the groups of a format: ``size`` must divide the columns.
    - ``head``: a part per head of attention; output channels of the projections to queries, keys and values, columns
      of the projection behind (found by name: `HEADS_OUT`, `HEADS_IN`).
    - ``expert``: a part per expert of weights that stack them.

    Parts keep no tie: each decides alone. Heads are the exception: where the projections to queries, keys and values
    are tied, the heads that belong to one head of keys and values are tied (of grouped queries several, of multi-query
    attention all), because engines fuse them; leave ties out of `mp.layers` for heads without. A layer that would be
    one part stays whole, and so do KV caches.

    Args:
        layers: the layers; what is left out of them is passed on.
        by: what to cut by.
        size: how many channels or columns; for ``head`` the channels of one head, if neither the model's configuration
            nor a KV cache among the layers says it.
        only: names or patterns of the layers to cut; all that ``by`` fits when left out.
        model: for ``head``: a model, or anything with a ``config``, whose ``head_dim`` is taken.

    Raises:
        InputError: no such ``by``, or a size out of range (E113); a layer that cannot be cut so, or none that can
            (E122); a pattern that matches nothing (E120).

    >>> layer = Layer("attn.q_proj", "linear", (8, 4))
    >>> [part.name for part in split([layer], "head", 4)]
    ['attn.q_proj[0:4]', 'attn.q_proj[4:8]']
    """
    found = layers if isinstance(layers, Layers) else Layers(tuple(layers))
    if by not in get_args(By):
        known = get_args(By)
        raise InputError("E113", f"by is {by!r}{did_you_mean(str(by), known)}", advice=f"give {', '.join(known)}")
    chosen = _chosen(found, by, only)
    step = _size(found, by, size, model)
    cut = {layer.name: _cut(layer, by, step) for layer in chosen}
    if by == "head":
        cut = _tie_heads(chosen, cut)
    items = [part for layer in found for part in cut.get(layer.name, [layer])]
    return Layers(_without_lone_ties(items, found), found.excluded, found.unit)


def _chosen(layers: Layers, by: By, only: str | Sequence[str]) -> list[Layer]:
    patterns = [only] if isinstance(only, str) else list(only)
    if not patterns:
        able = [layer for layer in layers if not _why_not(layer, by)]
        if not able:
            reasons = {_why_not(layer, by): layer.name for layer in layers}
            why = "; ".join(f"'{name}' {reason}" for reason, name in list(reasons.items())[:3])
            raise InputError("E122", f"no layer can be cut by {by}", because=why)
        return able
    names = {layer.name for pattern in patterns for layer in layers.match(pattern)}
    chosen = [layer for layer in layers if layer.name in names]
    for layer in chosen:
        if why := _why_not(layer, by):
            raise InputError("E122", f"layer '{layer.name}' cannot be cut by {by}: it {why}")
    return chosen


def _why_not(layer: Layer, by: By) -> str:
    """Why a layer cannot be cut so; empty when it can."""
    if layer.kind == "kv_cache":
        return "is a KV cache: its format holds for all heads, for a cache keeps them in one tensor"
    if layer.is_part:
        return "is a part already"
    if by == "expert" and layer.kind != "expert":
        return f"is a {layer.kind} layer, not experts in one tensor"
    if by == "head" and (layer.kind != "linear" or _last(layer) not in (*HEADS_OUT, *HEADS_IN)):
        return f"is not called one of {', '.join((*HEADS_OUT, *HEADS_IN))}, so where its heads lie is not known"
    return ""


def _last(layer: Layer) -> str:
    return layer.name.rpartition(".")[2]


def _size(layers: Layers, by: By, size: int | None, model: Any) -> int:
    if by == "expert":
        if size is not None:
            raise InputError("E113", f"size is {size!r}; experts have their own size, leave it out")
        return 0
    if size is None and by == "head":
        size = _head_size(layers, model)
    if not isinstance(size, int) or isinstance(size, bool) or size < 1:
        what = {"head": "the channels of one head", "output_channel": "output channels"}.get(by, "columns")
        if size is None:
            how = ", or model=… to find them" if by == "head" else ""
            raise InputError("E113", f"parts by {by} need a size", advice=f"size=N, the number of {what}{how}")
        raise InputError("E113", f"size is {size!r}", advice=f"give a whole number of {what} from 1")
    return size


def _head_size(layers: Layers, model: Any) -> int | None:
    """Channels of one head, from a model's configuration or from a KV cache."""
    config = getattr(getattr(model, "module", model), "config", None)
    if config is not None:
        given = getattr(config, "head_dim", None)
        if given:
            return int(given)
        width, heads = getattr(config, "hidden_size", 0), getattr(config, "num_attention_heads", 0)
        if width and heads:
            return int(width) // int(heads)
    return next((layer.shape[1] for layer in layers if layer.kind == "kv_cache"), None)


def _cut(layer: Layer, by: By, size: int) -> list[Layer]:
    if by == "expert":
        size = layer.shape[layer.out_axis]
    of_columns = by in ("input_channel", "group") or (by == "head" and _last(layer) in HEADS_IN)
    total, what = (layer.columns, "columns") if of_columns else (layer.rows, "output channels")
    if by in ("head", "group") and total % size:
        raise InputError(
            "E122",
            f"layer '{layer.name}' cannot be cut by {by}: its {total} {what} are no whole number of parts of {size}",
            advice="give another size, or cut by output_channel or input_channel, whose last part may be smaller",
        )
    if size >= total:
        return [replace(layer, tie="")]
    spans = [(start, min(start + size, total)) for start in range(0, total, size)]
    return [layer.part(None, span) if of_columns else layer.part(span) for span in spans]


def _tie_heads(chosen: Sequence[Layer], cut: dict[str, list[Layer]]) -> dict[str, list[Layer]]:
    """Tie the heads of queries, keys and values that belong to one head of keys and values."""
    tied: dict[str, list[Layer]] = {}
    for layer in chosen:
        if layer.tie and _last(layer) in HEADS_OUT:
            tied.setdefault(layer.tie, []).append(layer)
    for tie, members in tied.items():
        least = min(len(cut[layer.name]) for layer in members)
        for layer in members if len(members) > 1 else ():
            parts = cut[layer.name]
            if len(parts) % least:
                raise InputError(
                    "E122",
                    f"layer '{layer.name}' has {len(parts)} heads, those that it is tied to {least}: they do not match",
                    advice="find the layers without ties",
                )
            share = len(parts) // least
            cut[layer.name] = [
                replace(part, tie=f"{tie}[{i // share}]" if least > 1 else tie) for i, part in enumerate(parts)
            ]
    return cut


def _without_lone_ties(items: Sequence[Layer], before: Layers) -> tuple[Layer, ...]:
    """Drop the ties of layers whose partners were all cut into parts."""
    counts: dict[str, int] = {}
    for layer in items:
        counts[layer.tie] = counts.get(layer.tie, 0) + 1
    known = {decision.name for decision in before.decisions if len(decision.layers) > 1}
    return tuple(replace(x, tie="") if x.tie in known and counts[x.tie] == 1 else x for x in items)


def wholes(layers: Iterable[Layer]) -> tuple[Layer, ...]:
    """The whole layers that some layers are, or are parts of, in the order of first appearance; each once.

    >>> layer = Layer("a", "linear", (4, 2))
    >>> wholes([layer.part((0, 2)), layer.part((2, 4))]) == (layer,)
    True
    """
    found: dict[str, Layer] = {}
    for layer in layers:
        if layer.owner not in found:
            found[layer.owner] = layer.whole
    return tuple(found.values())


def check_apart(layers: Iterable[Layer]) -> None:
    """Refuse parts that share a weight with another part, or with their whole layer: it would get two formats.

    Raises:
        InputError: E122, with both names.

    >>> check_apart([Layer("a", "linear", (4, 2)).part((0, 2)), Layer("a", "linear", (4, 2)).part(None, (0, 1))])
    Traceback (most recent call last):
    mpsearch.errors.InputError: error[E122] 'a[0:2]' and 'a[:,0:1]' have weights in common, so they cannot both ...
      try      give one format for each weight
    """
    parts: dict[str, list[Layer]] = {}
    whole: set[str] = set()
    for layer in layers:
        if layer.is_part:
            parts.setdefault(layer.of, []).append(layer)
        else:
            whole.add(layer.name)
    for name, members in parts.items():
        clash = (members[0].name, name) if name in whole else _overlap(members)
        if clash:
            raise InputError(
                "E122",
                f"'{clash[0]}' and '{clash[1]}' have weights in common, so they cannot both have a format",
                advice="give one format for each weight",
            )


def _overlap(parts: Sequence[Layer]) -> tuple[str, str] | None:
    """Names of two parts of one layer that overlap."""
    boxes = []
    for part in parts:
        whole = part.whole
        boxes.append((part.channels or (0, whole.rows), part.inputs or (0, whole.columns), part.name))
    # Along the axis that they are cut more on, so that few stand open at a time.
    if len({box[1] for box in boxes}) > len({box[0] for box in boxes}):
        boxes = [(inputs, channels, name) for channels, inputs, name in boxes]
    boxes.sort()
    open_boxes: list[tuple[Span, Span, str]] = []
    for box in boxes:
        open_boxes = [other for other in open_boxes if other[0][1] > box[0][0]]
        for other in open_boxes:
            if other[1][0] < box[1][1] and box[1][0] < other[1][1]:
                return other[2], box[2]
        open_boxes.append(box)
    return None
