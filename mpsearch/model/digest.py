"""Digests of what a user gives as Python objects: batches, functions, modules."""

from __future__ import annotations

import hashlib
from collections.abc import Callable, Mapping
from types import FunctionType, MethodType
from typing import Any

import numpy as np
import torch
from torch import Tensor, nn

from mpsearch.errors import InputError


def digest_of(value: Any) -> str:
    """Return the SHA-256 of tensors, arrays, numbers and texts, and of lists, tuples and mappings of them.

    Raises:
        InputError: something else is in it (E509).

    >>> digest_of([1, "a"]) == digest_of([1, "a"]), digest_of(torch.zeros(2, 3)) == digest_of(torch.zeros(3, 2))
    (True, False)
    """
    total = hashlib.sha256()
    _feed(total, value)
    return total.hexdigest()


def _feed(total: Any, value: Any) -> None:
    if isinstance(value, Tensor):
        data = value.detach().cpu().contiguous()
        total.update(f"tensor {data.dtype} {tuple(data.shape)};".encode())
        total.update(data.reshape(-1).view(torch.uint8).numpy().tobytes())
    elif isinstance(value, np.ndarray):
        total.update(f"array {value.dtype.str} {value.shape};".encode() + np.ascontiguousarray(value).tobytes())
    elif isinstance(value, Mapping):
        total.update(f"mapping {len(value)};".encode())
        for name in sorted(value, key=repr):
            _feed(total, name)
            _feed(total, value[name])
    elif isinstance(value, (list, tuple)):
        total.update(f"{type(value).__name__} {len(value)};".encode())
        for item in value:
            _feed(total, item)
    elif value is None or isinstance(value, (bool, int, float, complex, str, bytes, np.generic)):
        total.update(f"{type(value).__name__} {value!r};".encode())
    else:
        raise InputError(
            "E509",
            f"a batch holds a {type(value).__name__}, which has no digest",
            advice="give tensors, arrays, numbers, texts, and lists, tuples or mappings of them",
        )


def function_digest(function: Callable[..., Any] | None) -> str:
    """Return the SHA-256 of a function's code, constants, defaults and simple closed-over values.

    What it calls elsewhere is not looked at.

    >>> function_digest(lambda m, x: m(x)) == function_digest(lambda m, x: 10 * m(x))
    False
    """
    if isinstance(function, MethodType):
        function = function.__func__
    if not isinstance(function, FunctionType):
        return "" if function is None else f"{type(function).__module__}.{type(function).__qualname__}"
    total = hashlib.sha256()
    _feed_code(total, function.__code__)
    cells = [cell.cell_contents for cell in function.__closure__ or ()]
    for value in (*cells, *(function.__defaults__ or ())):
        try:
            _feed(total, value)
        except InputError:
            total.update(f"{type(value).__qualname__};".encode())
    return total.hexdigest()


def _feed_code(total: Any, code: Any) -> None:
    total.update(code.co_code + repr(code.co_names).encode())
    for constant in code.co_consts:
        if hasattr(constant, "co_code"):
            _feed_code(total, constant)
        else:
            total.update(repr(constant).encode())


def module_digest(module: nn.Module) -> str:
    """Return the SHA-256 over a module's structure and its stored weights and buffers."""
    state = {
        name: value for name, value in module.state_dict().items() if isinstance(value, Tensor) and not value.is_meta
    }
    return hashlib.sha256(f"{module}{digest_of(state)}".encode()).hexdigest()
