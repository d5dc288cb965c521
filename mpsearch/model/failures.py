"""What a user is told when the model, or a function given with it, fails on a batch."""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from typing import Any

import torch
from torch import Tensor

from mpsearch.errors import InputError

_MISTAKES = (RuntimeError, TypeError, ValueError, KeyError, IndexError, AttributeError)


@contextmanager
def told_plainly(name: str, batch: Any) -> Iterator[None]:
    """Turn what a forward pass raises into an error for the one who gave model, functions and batch.

    Args:
        name: the model's name.
        batch: what it runs on.

    Raises:
        InputError: the pass failed (E512).

    >>> try:
    ...     with told_plainly("toy", torch.ones(2, 3)):
    ...         {"input_ids": 1}["labels"]
    ... except InputError as error:
    ...     print(error.message)
    model 'toy' fails on a batch (2, 3): KeyError: 'labels'
    """
    try:
        yield
    except _MISTAKES as error:
        first = (str(error).splitlines() or [""])[0]
        kinds = {x.dtype for x in _tensors(batch) if x.is_floating_point()} - {torch.float32}
        given = ", ".join(sorted(str(kind).removeprefix("torch.") for kind in kinds))
        raise InputError(
            "E512",
            f"model '{name}' fails on a batch {_shapes(batch)}: {type(error).__name__}: {first}",
            because=f"models compute in float32 here, and the batch holds {given}" if given else "",
            advice="run its functions on (module, batch) to see where" if not given else "give float32 batches",
        ) from error


def _tensors(batch: Any) -> Iterator[Tensor]:
    if isinstance(batch, Tensor):
        yield batch
    elif isinstance(batch, Mapping):
        for part in batch.values():
            yield from _tensors(part)
    elif isinstance(batch, (list, tuple)):
        for part in batch:
            yield from _tensors(part)


def _shapes(batch: Any) -> str:
    if isinstance(batch, Mapping):
        return "{" + ", ".join(f"{name}: {_shapes(part)}" for name, part in batch.items()) + "}"
    if isinstance(batch, (list, tuple)):
        return "[" + ", ".join(map(_shapes, batch)) + "]"
    return str(tuple(batch.shape)) if isinstance(batch, Tensor) else type(batch).__name__
