"""Whether a model gives one batch one answer: scores of a model that draws at random would be noise."""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from typing import Any

import torch
from torch import Tensor, nn

from mpsearch.errors import InputError
from mpsearch.model.model import Batch, Model

#: Two answers that differ by less, relative to the largest number in them, are one: sums may run in any order.
_ROUNDING = 1e-4


def check_repeatable(model: Model, batch: Batch) -> None:
    """Refuse a model whose answers to the same batch differ, and name the first module that gives something else.

    Cost: two forward passes of a batch; two more for a model that is refused.

    Raises:
        InputError: the answers differ (E513).

    >>> noisy = nn.Sequential(nn.Linear(4, 4), nn.Dropout(0.5))
    >>> model = Model(noisy, logits=lambda module, x: module.train()(x), name="noisy")
    >>> try:
    ...     check_repeatable(model, torch.ones(2, 4))
    ... except InputError as error:
    ...     print(error.message)
    model 'noisy' gives two answers to one batch; '1' (Dropout) is the first to differ
    """
    if _same(_answer(model, batch), _answer(model, batch)):
        return
    place = _first_unlike(model, batch)
    first = "no module differs, so it is around them"
    if place is not None:
        path, how = place
        first = f"'{path}' ({type(model.module.get_submodule(path)).__name__}) is the first {how}"
    raise InputError(
        "E513",
        f"model '{model.name}' gives two answers to one batch; {first}",
        because="something draws at random or remembers earlier passes: a dropout left on, noise, a cache",
        advice="switch it off in the forward pass, or give it a fixed seed there",
    )


def _answer(model: Model, batch: Batch) -> Tensor:
    with torch.no_grad():
        return model.logits(batch) if model.has_logits else model.loss(batch)


def _same(a: Tensor, b: Tensor) -> bool:
    if a.shape != b.shape:
        return False
    finite = a[torch.isfinite(a)]
    scale = float(finite.abs().max()) if finite.numel() else 0.0
    return torch.allclose(a, b, rtol=_ROUNDING, atol=_ROUNDING * scale, equal_nan=True)


def _first_unlike(model: Model, batch: Batch) -> tuple[str, str] | None:
    """Path of the first module to give another output for the same input, else of the first that gets another input."""
    reached: str | None = None
    for one, two in zip(_passed(model, batch), _passed(model, batch), strict=False):
        (path, given, gave), (other, given_again, gave_again) = one, two
        if path != other:
            break
        if not _alike(given, given_again):
            reached = path if reached is None else reached
        elif not _alike(gave, gave_again):
            return path, "to differ"
    return None if reached is None else (reached, "to be given something else")


def _passed(model: Model, batch: Batch) -> list[tuple[str, list[Tensor], list[Tensor]]]:
    """What each call took and gave, in the order of their ends, in short."""
    calls: list[tuple[str, list[Tensor], list[Tensor]]] = []

    def watch(path: str) -> Any:
        given: list[list[Tensor]] = []

        def before(module: nn.Module, args: Any, kwargs: Any) -> None:
            # Before, because a module may work in place.
            given.append(list(_sums((args, kwargs))))

        def after(module: nn.Module, args: Any, output: Any) -> None:
            calls.append((path, given.pop(), list(_sums(output))))

        return before, after

    handles = []
    try:
        for path, module in model.module.named_modules():
            before, after = watch(path)
            handles.append(module.register_forward_pre_hook(before, with_kwargs=True))
            handles.append(module.register_forward_hook(after))
        _answer(model, batch)
    finally:
        for handle in handles:
            handle.remove()
    return calls


def _sums(value: Any) -> Iterator[Tensor]:
    """A few numbers for each tensor in a value, that tell it from others without keeping it."""
    if isinstance(value, Tensor):
        flat = value.detach().reshape(-1).double().cpu()
        waves = torch.cos(torch.arange(len(flat), dtype=torch.float64))
        yield torch.stack([flat.sum(), flat.abs().sum(), flat.abs() @ waves, flat @ waves])
    elif isinstance(value, Mapping):
        for part in value.values():
            yield from _sums(part)
    elif isinstance(value, (tuple, list)):
        for part in value:
            yield from _sums(part)


def _alike(a: list[Tensor], b: list[Tensor]) -> bool:
    return len(a) == len(b) and all(map(_same, a, b))
