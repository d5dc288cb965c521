"""Batches that scores can be averaged over: tensors, every position counted, all of one size."""

from __future__ import annotations

from collections.abc import Mapping, Sequence

import numpy as np
import torch
from torch import Tensor

from mpsearch.errors import InputError
from mpsearch.model.model import Batch, batch_size

_NO_TENSORS = (str, bytes, bool, int, float, complex, np.ndarray, np.generic, type(None))


def check_batches(batches: Sequence[Batch], by: str = "", *, tokens: bool = False) -> None:
    """Refuse batches whose mean would not be what it is taken for.

    Args:
        batches: the batches.
        by: ``batch`` when batches are averaged with equal weight, and so must be of one size. Batches whose size cannot
            be told are let through.
        tokens: whether a causal language model reads them. Its losses and divergences count every position, those of
            padding too, and each position predicts the next token.

    Raises:
        InputError: something else than a list of batches of tensors, padding or labels of their own, or unequal sizes
            (E515).

    >>> check_batches([torch.zeros(2, 3), torch.zeros(2, 3)], "batch")
    >>> try:
    ...     check_batches([torch.zeros(4, 3), torch.zeros(1, 3)], "batch")
    ... except InputError as error:
    ...     print(error.message)
    batches are averaged with equal weight, and they hold 4 and 1 samples
    """
    if isinstance(batches, (Tensor, Mapping, str)):
        raise InputError(
            "E515", f"batches are one {type(batches).__name__}, not a list of batches", advice="put it into a list"
        )
    if not isinstance(batches, Sequence):
        raise InputError(
            "E515",
            f"batches are of type {type(batches).__name__}, not a list",
            because="they are read several times, and must be the same each time",
            advice="give a list: list(…)",
        )
    for i, batch in enumerate(batches):
        if not _may_hold_tensors(batch):
            what = f"{type(batch).__name__}, which holds no tensor"
            raise InputError("E515", f"batch {i} is a {what}", advice="give tensors, or lists or mappings of them")
        if tokens:
            _check_positions(i, batch)
    if by == "batch":
        _check_sizes(batches)


def _may_hold_tensors(batch: Batch) -> bool:
    if isinstance(batch, _NO_TENSORS):
        return False
    if isinstance(batch, Mapping):
        return any(map(_may_hold_tensors, batch.values()))
    if isinstance(batch, (list, tuple)):
        return any(map(_may_hold_tensors, batch))
    # Of objects of other kinds only the user's own functions know what they hold.
    return True


def _check_positions(i: int, batch: Batch) -> None:
    ids = batch.get("input_ids") if isinstance(batch, Mapping) else None
    if not isinstance(ids, Tensor):
        raise InputError(
            "E515", f"batch {i} has no input_ids, which a language model reads", advice='give {"input_ids": …}'
        )
    mask, labels = batch.get("attention_mask"), batch.get("labels")
    found = ""
    if isinstance(mask, Tensor) and not bool(mask.all()):
        found = "its attention_mask holds zeros"
    elif isinstance(labels, Tensor) and bool((labels == -100).any()):
        found = "its labels hold -100"
    elif isinstance(labels, Tensor) and not (labels.shape == ids.shape and torch.equal(labels.cpu(), ids.cpu())):
        found = "its labels are not its input_ids"
    if found:
        raise InputError(
            "E515",
            f"batch {i} leaves positions out: {found}",
            because="losses and divergences of language models count every position here",
            advice="cut the texts into sequences of one length without padding, as mp.batches does; leave labels out",
        )


def _check_sizes(batches: Sequence[Batch]) -> None:
    sizes = [_size(batch) for batch in batches]
    known = list(dict.fromkeys(size for size in sizes if size is not None))
    if len(known) > 1:
        raise InputError(
            "E515",
            f"batches are averaged with equal weight, and they hold {' and '.join(map(str, known))} samples",
            advice="give batches of equal size; often only the last is smaller: drop it",
        )


def _size(batch: Batch) -> int | None:
    """Number of samples; None where it cannot be told."""
    try:
        return batch_size(batch)
    except (TypeError, IndexError, StopIteration, RecursionError, AttributeError):
        return None
