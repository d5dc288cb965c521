"""Weights that the recorded blocks of ggml were made from: the same on every machine and with every numpy."""

from __future__ import annotations

from collections.abc import Callable, Mapping

import numpy as np
from numpy.typing import NDArray

Weights = NDArray[np.float32]


def _draw(seed: int, rows: int, columns: int) -> NDArray[np.float64]:
    # The old generator's streams are promised never to change.
    drawn: NDArray[np.float64] = np.random.RandomState(seed).standard_normal((rows, columns))
    return drawn


def _spread(values: NDArray[np.float64], group: int) -> NDArray[np.float64]:
    """Give each group a power of two of its own, from 2**-30 to 2**8."""
    powers = np.random.RandomState(9).randint(-30, 9, (len(values), values.shape[1] // group))
    return np.ldexp(values, powers.repeat(group, 1))


def _outliers(values: NDArray[np.float64]) -> NDArray[np.float64]:
    found = values * 0.02
    found[:, ::97] *= 1000
    return found


def _sparse(values: NDArray[np.float64]) -> NDArray[np.float64]:
    return np.where(np.abs(values) > 1.9, values, 0.0)


def _near_powers(values: NDArray[np.float64]) -> NDArray[np.float64]:
    powers = np.exp2(np.clip(np.round(values * 3), -20, 8)).astype(np.float32) * np.sign(values).astype(np.float32)
    return np.nextafter(powers, np.where(values > 1, np.float32(1e9), np.float32(0))).astype(np.float64)


KINDS: Mapping[str, Callable[[NDArray[np.float64]], NDArray[np.float64]]] = {
    "normal": lambda x: x * 0.02,
    "cubed": lambda x: x * x * x,
    "bfloat16": lambda x: (
        (x.astype(np.float32).view(np.uint32) & np.uint32(0xFFFF0000)).view(np.float32).astype(np.float64)
    ),
    "positive": np.abs,
    "far from zero": lambda x: x / 1024 - 1000,
    "halves": lambda x: np.round(4 * x) / 2,
    "spread over groups of 16": lambda x: _spread(x, 16),
    "spread over groups of 32": lambda x: _spread(x, 32),
    "outliers": _outliers,
    "sparse": _sparse,
    "near powers of two": _near_powers,
    "large": lambda x: x * 300,
    "below fp16": lambda x: np.ldexp(x, -20),
    "tiny": lambda x: np.ldexp(x, -46),
    "denormal": lambda x: np.ldexp(x, -133),
    "zero": np.zeros_like,
    "constant": lambda x: np.full_like(x, 0.37),
    "negative constant": lambda x: np.full_like(x, -0.37),
}


def weights(kind: str, rows: int, columns: int) -> Weights:
    """Return one kind of weights; the seed is the kind's place in the list."""
    values = KINDS[kind](_draw(list(KINDS).index(kind), rows, columns))
    # Adding 0 leaves no -0.
    return values.astype(np.float32) + np.float32(0)
