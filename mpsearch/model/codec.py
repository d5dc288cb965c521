"""What every codec does, and what it may know beside the weight."""

from __future__ import annotations

import importlib
from abc import ABC, abstractmethod
from collections.abc import Mapping
from dataclasses import dataclass
from functools import lru_cache
from typing import Any, Generic, TypeVar

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from mpsearch.errors import InputError
from mpsearch.format import Format
from mpsearch.layer import Layer

Bytes = NDArray[np.uint8]
Parts = Mapping[str, Tensor]
F = TypeVar("F", bound=Format)


class RangeError(Exception):
    """A codec cannot hold the numbers; the message says why, without naming the layer."""


@dataclass(frozen=True, slots=True, eq=False)
class Evidence:
    """What rounding may know beside the weight.

    Attributes:
        hessian: (columns, columns) float32, ``2 X X^T / N`` of the layer's inputs; for formats that need it.
        importance: (rows, columns) float32, at least 0: how much the loss hangs on each weight; likewise.
    """

    hessian: Tensor | None = None
    importance: Tensor | None = None


class Codec(ABC, Generic[F]):
    """Rounds to the formats of one family.

    A weight comes as ``rows``: (rows, columns), contiguous, any float type, one row per output channel. It may be
    the caller's own memory, so it is never written to. Nothing is kept between calls. Everything runs on the device
    that the weight is on, vectorised over rows and groups.
    """

    @abstractmethod
    def encode(self, rows: Tensor, fmt: F, evidence: Evidence) -> dict[str, Tensor]:
        """Round; return what is stored, by part. The names are those of ``fmt.itemised_bytes``, ``payload`` first.

        Codes are in ``payload``, one number per weight, before packing.

        Raises:
            RangeError: the numbers do not fit.
        """

    @abstractmethod
    def decode(self, parts: Parts, fmt: F, columns: int) -> Tensor:
        """Return the (rows, columns) float32 weights that parts stand for, in memory of their own."""

    def fake(self, rows: Tensor, fmt: F, evidence: Evidence) -> Tensor:
        """Return the rounded weights, float32 in memory of their own: ``decode(encode(rows))`` bit for bit."""
        return self.decode(self.encode(rows, fmt, evidence), fmt, rows.shape[1])

    @abstractmethod
    def pack(self, parts: Parts, fmt: F) -> dict[str, Bytes]:
        """Return the bytes of each part, flat, exactly as many as ``fmt.itemised_bytes`` says."""

    @abstractmethod
    def unpack(self, packed: Mapping[str, Bytes], fmt: F, layer: Layer) -> dict[str, Tensor]:
        """Undo `pack`: the same parts. Lengths have been checked."""


@lru_cache(maxsize=64)
def codec_of(family: type[Format]) -> Codec[Any]:
    """Load the codec of a family.

    Raises:
        InputError: the family is not one of weights (E110).
    """
    if not family.codec:
        raise InputError("E110", f"formats of the family '{family.family}' hold no weights")
    module, _, name = family.codec.partition(":")
    codec: Codec[Any] = getattr(importlib.import_module(module), name)()
    return codec


def divided(values: Tensor, number: float) -> Tensor:
    """Return ``values / number``; torch on CUDA would multiply by the reciprocal of a Python number instead."""
    return values / values.new_full((), number)


def all_finite(values: Tensor) -> bool:
    """Whether no number is NaN or infinite."""
    # The extremes carry every NaN and infinity, and are 10 times quicker than isfinite over all weights.
    if not values.numel():
        return True
    return bool(torch.isfinite(torch.stack(torch.aminmax(values.detach()))).all())


def magnitude(values: Tensor) -> float:
    """The largest magnitude."""
    low, high = torch.aminmax(values.detach())
    return max(float(high), -float(low))


def as_bytes(values: Tensor) -> Bytes:
    """The bytes of a tensor, little-endian, row by row."""
    found: Bytes = values.cpu().contiguous().reshape(-1).view(torch.uint8).numpy()
    return found


def from_bytes(held: Bytes, dtype: torch.dtype, *shape: int) -> Tensor:
    """Undo `as_bytes`."""
    return torch.from_numpy(held.copy()).view(dtype).reshape(shape)
