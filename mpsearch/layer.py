"""Layers: the parts of a model that each get one format, and the parts that are left out."""

from __future__ import annotations

import fnmatch
import math
from collections.abc import Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any, overload

from mpsearch.errors import InputError, did_you_mean
from mpsearch.keys import content_key

#: Bits of one stored number.
DTYPE_BITS: Mapping[str, int] = {
    "float64": 64, "float32": 32, "float16": 16, "bfloat16": 16,
    "int64": 64, "int32": 32, "int16": 16, "int8": 8, "uint8": 8, "bool": 8,
}  # fmt: skip


def _known_dtype(name: str) -> str:
    if name not in DTYPE_BITS:
        raise ValueError(f"number type {name!r} is not one of {', '.join(DTYPE_BITS)}")
    return name


@dataclass(frozen=True, slots=True)
class Layer:
    """One weight tensor that gets one format.

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

    >>> layer = Layer("head", "linear", (8, 4), dtype="bfloat16")
    >>> layer.rows, layer.columns, layer.weights, layer.stored_bytes
    (8, 4, 32, 64)
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

    @property
    def tensor(self) -> str:
        """Name of the weight in the checkpoint."""
        if self.kind in ("expert", "kv_cache"):
            return self.name
        return f"{self.name}.weight" if self.name else "weight"

    @property
    def row_axes(self) -> tuple[int, ...]:
        """Axes of the shape that count output channels; of stacked experts each has its own."""
        return (0, self.out_axis) if self.kind == "expert" else (self.out_axis,)

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

    def rarities(self) -> dict[str, int]:
        """Fields that few layers have, where they say something."""
        return {
            **({"groups": self.groups} if self.groups > 1 else {}),
            **({"window": self.window} if self.window else {}),
        }

    @classmethod
    def from_json(cls, data: Mapping[str, Any]) -> Layer:
        return cls(
            name=str(data["name"]),
            kind=str(data["kind"]),
            shape=tuple(int(n) for n in data["shape"]),
            out_axis=int(data["out_axis"]),
            dtype=_known_dtype(data["dtype"]),
            macs=int(data["macs"]),
            tie=str(data["tie"]),
            shared=tuple(str(name) for name in data["shared"]),
            groups=int(data.get("groups", 1)),
            window=int(data.get("window", 0)),
        )


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
        shape = tuple(int(n) for n in data["shape"])
        return cls(str(data["name"]), shape, _known_dtype(data["dtype"]), str(data["reason"]))


@dataclass(frozen=True, slots=True)
class Decision:
    """One choice of a format: a layer, or several that are tied.

    Attributes:
        name: the layer's name, or the text of the tie.
        layers: the layers that take the chosen format.
    """

    name: str
    layers: tuple[Layer, ...]


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
            if any(fnmatch.fnmatchcase(name, pattern) for name in (layer.name, *layer.shared))
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
