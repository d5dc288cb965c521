"""Layers: the parts of a model that each get one format, and the parts that are left out."""

from __future__ import annotations

import fnmatch
import math
import re
from collections.abc import Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field, replace
from typing import Any, overload

from mpsearch.errors import InputError, did_you_mean
from mpsearch.keys import content_key

#: Bits of one stored number.
DTYPE_BITS: Mapping[str, int] = {
    "float64": 64, "float32": 32, "float16": 16, "bfloat16": 16,
    "int64": 64, "int32": 32, "int16": 16, "int8": 8, "uint8": 8, "bool": 8,
}  # fmt: skip


Span = tuple[int, int]
#: Most axes that a tensor of a file may have.
_AXES = 64
_PART = re.compile(r"\[(?:\d+:\d+|:,\d+:\d+|\d+:\d+,\d+:\d+)\]$")


def _known_dtype(name: str) -> str:
    if name not in DTYPE_BITS:
        raise ValueError(f"number type {name!r} is not one of {', '.join(DTYPE_BITS)}")
    return name


def whole_name(name: str) -> str:
    """Name of the layer that a part belongs to; the name of a whole layer is its own.

    >>> whole_name("q_proj[0:64]"), whole_name("q_proj[:,0:64]"), whole_name("q_proj")
    ('q_proj', 'q_proj', 'q_proj')
    """
    return _PART.sub("", name)


@dataclass(frozen=True, slots=True)
class Layer:
    """One weight tensor that gets one format, or a rectangle of one.

    A part of a layer is a layer of its own: a matrix of (rows, columns), whose row 0 is the first of its ``channels``
    (`part` makes one, `mpsearch.parts.split` all that a layer is cut into).

    Attributes:
        name: path of the module that holds the weight; of the first one when several share it.
        kind: ``linear``, ``conv``, ``embedding``, ``expert`` (weights of many experts in one tensor, experts on axis 0)
            or ``kv_cache`` (keys or values of one attention layer, which no checkpoint holds).
        shape: shape of the weight as stored; (heads, channels per head) of a KV cache.
        out_axis: axis of the output channels (1 for GPT-2's transposed linears, 1 or 2 for experts, else 0).
        dtype: number type of the stored weight, such as ``bfloat16``.
        macs: multiply-adds per token (per sample for a model without tokens), over all calls.
        tie: layers with the same text get the same format; empty when the layer decides alone.
        shared: names of further modules that hold the very same weight.
        groups: of a convolution: how many groups of channels it keeps apart.
        window: of a KV cache: tokens that it holds at most; 0 when it grows without end.
        channels: of a part: its range of output channels, of stacked experts counted over all experts; None for all.
        inputs: of a part: its range of columns (weights of an output channel, in their order); None for all.
        of: of a part: name of the whole layer; empty for a whole one.
        of_shape: of a part: shape of the whole weight as stored.
        of_axis: of a part: axis of the output channels of the whole weight.

    >>> layer = Layer("head", "linear", (8, 4), dtype="bfloat16")
    >>> layer.rows, layer.columns, layer.weights, layer.stored_bytes
    (8, 4, 32, 64)
    >>> part = layer.part((2, 5))
    >>> part.name, part.shape, part.whole == layer
    ('head[2:5]', (3, 4), True)
    """

    name: str
    kind: str
    shape: tuple[int, ...]
    out_axis: int = 0
    dtype: str = "float32"
    macs: int = 0
    tie: str = ""
    shared: tuple[str, ...] = ()
    groups: int = 1
    window: int = 0
    channels: Span | None = None
    inputs: Span | None = None
    of: str = ""
    of_shape: tuple[int, ...] = ()
    of_axis: int = 0

    @property
    def is_part(self) -> bool:
        """Whether this is a part of a layer."""
        # Not by the name of the whole: that of a bare module is empty.
        return bool(self.of_shape)

    @property
    def owner(self) -> str:
        """Name of the whole layer: of a part the one that it belongs to."""
        return self.of if self.is_part else self.name

    @property
    def whole(self) -> Layer:
        """The layer that a part belongs to, without tie and multiply-adds; a whole layer itself."""
        if not self.is_part:
            return self
        return Layer(
            self.of, self.kind, self.of_shape, self.of_axis, self.dtype, shared=self.shared, groups=self.groups
        )

    def part(self, channels: Span | None = None, inputs: Span | None = None, tie: str = "") -> Layer:
        """Return a part of this layer: a range of its output channels, of its columns, or of both.

        Multiply-adds go by weights, rounded so that those of neighbours along one axis add up.

        Args:
            channels: first output channel and the one after the last; None for all.
            inputs: first column and the one after the last; None for all.
            tie: tie of the part.

        Raises:
            InputError: a range that the layer does not have (E113), or a layer that has no parts (E122).

        >>> part = Layer("up", "linear", (8, 4), macs=32).part((0, 2), (1, 4))
        >>> part.name, part.tensor, part.shape, part.macs
        ('up[0:2,1:4]', 'up.weight[0:2,1:4]', (2, 3), 6)
        """
        if self.kind == "kv_cache" or self.is_part:
            why = "a part already" if self.is_part else "a KV cache, which is stored as a whole"
            raise InputError("E122", f"layer '{self.name}' is {why}", advice="cut whole layers that hold weights")
        for what, span, size in (("output channels", channels, self.rows), ("columns", inputs, self.columns)):
            if span is not None and not 0 <= span[0] < span[1] <= size:
                raise InputError("E113", f"layer '{self.name}' has {size} {what}; there is no range {span}")
        first, last = channels or (0, self.rows)
        left, right = inputs or (0, self.columns)
        ends = (last * right, first * right, last * left, first * left)
        macs = [self.macs * end // self.weights for end in ends]
        return replace(
            self,
            name=f"{self.name}{_range_text(channels, inputs)}",
            shape=(last - first, right - left),
            out_axis=0,
            macs=max(macs[0] - macs[1] - macs[2] + macs[3], 0),
            tie=tie,
            channels=channels,
            inputs=inputs,
            of=self.name,
            of_shape=self.shape,
            of_axis=self.out_axis,
        )

    @property
    def tensor(self) -> str:
        """Name of the weight in the checkpoint; of a part with its range behind it."""
        if self.is_part:
            return f"{self.whole.tensor}{_range_text(self.channels, self.inputs)}"
        if self.kind in ("expert", "kv_cache"):
            return self.name
        return f"{self.name}.weight" if self.name else "weight"

    @property
    def row_axes(self) -> tuple[int, ...]:
        """Axes of the shape that count output channels; of stacked experts each has its own."""
        return (0, self.out_axis) if self.kind == "expert" and not self.is_part else (self.out_axis,)

    @property
    def rows(self) -> int:
        """Number of output channels (entries of an embedding), over all experts."""
        return math.prod(self.shape[axis] for axis in self.row_axes)

    @property
    def columns(self) -> int:
        """Weights per output channel."""
        return math.prod(self.shape) // self.rows

    @property
    def weights(self) -> int:
        """Number of stored weights; none in a KV cache."""
        return 0 if self.kind == "kv_cache" else math.prod(self.shape)

    @property
    def stored_bytes(self) -> int:
        """Bytes of the weight as it is stored now."""
        return self.weights * DTYPE_BITS[self.dtype] // 8

    def to_json(self) -> dict[str, Any]:
        return {
            "name": self.name,
            "kind": self.kind,
            "shape": list(self.shape),
            "out_axis": self.out_axis,
            "dtype": self.dtype,
            "macs": self.macs,
            "tie": self.tie,
            "shared": list(self.shared),
            **self.rarities(),
        }

    def rarities(self) -> dict[str, Any]:
        """Fields that few layers have, where they say something."""
        return {
            **({"groups": self.groups} if self.groups > 1 else {}),
            **({"window": self.window} if self.window else {}),
            **({"channels": list(self.channels)} if self.channels else {}),
            **({"inputs": list(self.inputs)} if self.inputs else {}),
            **({"of": self.of, "of_shape": list(self.of_shape), "of_axis": self.of_axis} if self.is_part else {}),
        }

    @classmethod
    def from_json(cls, data: Mapping[str, Any]) -> Layer:
        return cls(
            name=str(data["name"]),
            kind=str(data["kind"]),
            shape=_shape(data["shape"], 1),
            out_axis=_axis(data["out_axis"], data["shape"]),
            dtype=_known_dtype(data["dtype"]),
            macs=_count(data["macs"], 0),
            tie=str(data["tie"]),
            shared=tuple(str(name) for name in data["shared"]),
            groups=_count(data.get("groups", 1), 1),
            window=_count(data.get("window", 0), 0),
            channels=_span(data.get("channels")),
            inputs=_span(data.get("inputs")),
            of=str(data.get("of", "")),
            of_shape=_shape(data["of_shape"], 1) if data.get("of_shape") else (),
            of_axis=_axis(data.get("of_axis", 0), data.get("of_shape") or (1,)),
        )


def _span(data: Sequence[Any] | None) -> Span | None:
    if data is None:
        return None
    first, last = (_count(end, 0) for end in data)
    return first, last


def _count(value: Any, least: int) -> int:
    if isinstance(value, bool) or not isinstance(value, int) or not least <= value < 2**63:
        raise ValueError(f"{str(value)[:40]!r} is no whole number from {least}")
    return value


def _shape(value: Any, least: int) -> tuple[int, ...]:
    if not isinstance(value, (list, tuple)) or len(value) > _AXES:
        raise ValueError(f"{str(value)[:40]!r} is no shape")
    return tuple(_count(n, least) for n in value)


def _axis(value: Any, shape: Sequence[Any]) -> int:
    if _count(value, 0) >= len(shape):
        raise ValueError(f"a shape of {len(shape)} axes has no axis {value}")
    return int(value)


def _range_text(channels: Span | None, inputs: Span | None) -> str:
    rows = f"{channels[0]}:{channels[1]}" if channels else ":"
    return f"[{rows},{inputs[0]}:{inputs[1]}]" if inputs else f"[{rows}]"


@dataclass(frozen=True, slots=True)
class Excluded:
    """A stored tensor that keeps its number type, and why.

    Attributes:
        name: name of the tensor in the checkpoint.
        shape: its shape.
        dtype: its number type as stored.
        reason: why it is left out.
    """

    name: str
    shape: tuple[int, ...]
    dtype: str
    reason: str

    @property
    def weights(self) -> int:
        return math.prod(self.shape)

    @property
    def stored_bytes(self) -> int:
        return self.weights * DTYPE_BITS[self.dtype] // 8

    def to_json(self) -> dict[str, Any]:
        return {"name": self.name, "shape": list(self.shape), "dtype": self.dtype, "reason": self.reason}

    @classmethod
    def from_json(cls, data: Mapping[str, Any]) -> Excluded:
        return cls(str(data["name"]), _shape(data["shape"], 0), _known_dtype(data["dtype"]), str(data["reason"]))


@dataclass(frozen=True, slots=True)
class Decision:
    """One choice of a format: a layer, or several that are tied.

    Attributes:
        name: the layer's name, or the text of the tie.
        layers: the layers that take the chosen format.
    """

    name: str
    layers: tuple[Layer, ...]


def check_layers(layers: Any) -> None:
    """Refuse what is not a sequence of layers, such as a list of their names.

    Raises:
        InputError: E113.

    >>> check_layers([Layer("q", "linear", (4, 4))])
    """
    odd = next((x for x in layers if not isinstance(x, Layer)), None) if isinstance(layers, Sequence) else layers
    if odd is not None:
        raise InputError(
            "E113",
            f"layers hold {odd!r} ({type(odd).__name__})",
            advice="give what mp.layers or mp.split returns, or some of it: [x for x in mp.layers(model) if …]",
        )


@dataclass(frozen=True)
class Layers(Sequence[Layer]):
    """All that can be decided in a model, and all that cannot.

    Behaves as a sequence of `Layer` in the model's order.

    Attributes:
        items: the layers.
        excluded: stored tensors that keep their number type, each with the reason.
        unit: what ``macs`` counts per: ``token`` or ``sample``.

    >>> found = Layers((Layer("q", "linear", (4, 4), tie="qk"), Layer("k", "linear", (4, 4), tie="qk")))
    >>> [decision.name for decision in found.decisions]
    ['qk']
    """

    items: tuple[Layer, ...]
    excluded: tuple[Excluded, ...] = ()
    unit: str = "token"
    decisions: tuple[Decision, ...] = field(init=False, repr=False, compare=False)

    def __post_init__(self) -> None:
        object.__setattr__(self, "decisions", decisions(self.items))

    def __len__(self) -> int:
        return len(self.items)

    @overload
    def __getitem__(self, index: int) -> Layer: ...
    @overload
    def __getitem__(self, index: slice) -> Sequence[Layer]: ...
    def __getitem__(self, index: int | slice) -> Layer | Sequence[Layer]:
        return self.items[index]

    def __iter__(self) -> Iterator[Layer]:
        return iter(self.items)

    @property
    def weights(self) -> int:
        """Number of weights of the whole model, left-out tensors included, shared storage counted once."""
        return sum(layer.weights for layer in self.items) + sum(kept.weights for kept in self.excluded)

    @property
    def excluded_bytes(self) -> int:
        """Bytes of the left-out tensors as stored."""
        return sum(kept.stored_bytes for kept in self.excluded)

    @property
    def key(self) -> str:
        """Content key of the layers, their ties and what is left out."""
        return content_key(self.to_json())

    def match(self, pattern: str) -> tuple[Layer, ...]:
        """Return the layers whose name matches a pattern with ``*``, ``?`` and ``[…]``.

        Raises:
            InputError: nothing matches (E120); the closest name is offered.
        """
        found = tuple(
            layer
            for layer in self.items
            # The name of a part reads as a pattern of something else.
            if any(name == pattern or fnmatch.fnmatchcase(name, pattern) for name in (layer.name, *layer.shared))
        )
        if not found:
            names = [name for layer in self.items for name in (layer.name, *layer.shared)]
            raise InputError(
                "E120",
                f"pattern '{pattern}' matches no layer{did_you_mean(pattern, names)}",
                advice="`mpsearch layers MODEL` lists the names",
            )
        return found

    def to_json(self) -> dict[str, Any]:
        return {
            "layers": [layer.to_json() for layer in self.items],
            "excluded": [kept.to_json() for kept in self.excluded],
            "unit": self.unit,
        }

    @classmethod
    def from_json(cls, data: Mapping[str, Any]) -> Layers:
        return cls(
            tuple(Layer.from_json(item) for item in data["layers"]),
            tuple(Excluded.from_json(item) for item in data["excluded"]),
            str(data["unit"]),
        )


def decisions(layers: Iterable[Layer]) -> tuple[Decision, ...]:
    """Group layers by their tie, in the order of first appearance.

    >>> [d.name for d in decisions([Layer("a", "linear", (2, 2)), Layer("b", "linear", (2, 2))])]
    ['a', 'b']
    """
    groups: dict[str, list[Layer]] = {}
    for layer in layers:
        groups.setdefault(layer.tie or layer.name, []).append(layer)
    return tuple(Decision(name, tuple(members)) for name, members in groups.items())
