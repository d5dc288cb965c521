"""Which operations read a weight, and what they multiply it with: also where no module of torch's own says so."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Mapping, Sequence
from typing import Any

from torch import Tensor, nn
from torch.overrides import TorchFunctionMode

_PLAIN = (nn.Linear, nn.Embedding, nn.Conv1d, nn.Conv2d, nn.Conv3d)
_OPERATIONS = ("linear", "embedding", "conv1d", "conv2d", "conv3d")


class _Reads(TorchFunctionMode):
    """Keeps what the first operation on a weight is given beside it."""

    def __init__(self, weight: Tensor) -> None:
        super().__init__()
        self._weight = weight
        self.found: Tensor | None = None

    def __torch_function__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        given = (*args, *(kwargs or {}).values())
        known = getattr(func, "__name__", "") in _OPERATIONS
        if known and self.found is None and any(x is self._weight for x in given):
            self.found = given[0]
        return func(*args, **(kwargs or {}))


def input_of(module: nn.Module, args: Sequence[Any], kwargs: Mapping[str, Any]) -> Tensor:
    """What a layer's weight is multiplied with, or what is looked up in it, in one call of its module.

    That is the first thing a module is called with, unless its class brings a ``forward`` of its own: OPT's embedding
    of positions takes a mask and counts the positions itself. Such a call is run once more to see what reaches the
    weight. Cost: nothing for torch's own classes, else that run.

    Args:
        module: the module.
        args: what it is called with by position.
        kwargs: what it is called with by name.

    >>> import torch
    >>> class Shifted(nn.Embedding):
    ...     def forward(self, mask):
    ...         return super().forward(mask.long().cumsum(-1) + 1)
    >>> input_of(Shifted(9, 2), [torch.ones(1, 3)], {})
    tensor([[2, 3, 4]])
    """
    first: Tensor = args[0] if args else next(iter(kwargs.values()))
    base = next((kind for kind in _PLAIN if isinstance(module, kind)), None)
    if base is None or type(module).forward is base.forward:
        return first
    weight: Any = module.weight
    with _Reads(weight) as reads:
        type(module).forward(module, *args, **kwargs)
    return first if reads.found is None else reads.found


def read_by_any(weights: set[int], run: Callable[[Any], None], batches: Iterable[Any]) -> set[int]:
    """Which of some weights anything is computed from, whoever does it.

    Cost: a pass per batch, until all have been seen; none for no weights.

    Args:
        weights: identities of the weights.
        run: runs a batch.
        batches: what to run.

    >>> import torch
    >>> weight, other = torch.ones(2, 2), torch.ones(2, 2)
    >>> read_by_any({id(weight), id(other)}, lambda x: x @ weight, [torch.ones(1, 2)]) == {id(weight)}
    True
    """
    seen = _AnyRead(weights)
    with seen:
        for batch in batches:
            if seen.found == weights:
                break
            run(batch)
    return seen.found


class _AnyRead(TorchFunctionMode):
    def __init__(self, wanted: set[int]) -> None:
        super().__init__()
        self._wanted = wanted
        self.found: set[int] = set()

    def __torch_function__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        output = func(*args, **(kwargs or {}))
        # Questions, such as for the number type, give no tensor.
        if isinstance(output, (Tensor, tuple)):
            given = (*args, *(kwargs or {}).values())
            self.found |= {id(x) for x in given if isinstance(x, Tensor)} & self._wanted
        return output
