"""Runs a model with the rules of relevance propagation in place of its operations' own gradients."""

from __future__ import annotations

import math
from collections.abc import Callable, Iterator, Mapping
from contextlib import ExitStack, contextmanager
from typing import Any

import torch
from torch import Tensor, nn
from torch.overrides import TorchFunctionMode

from mpsearch.sensitivity.lrp_operations import (
    ACTIVATIONS,
    CONVOLUTIONS,
    GATES,
    LINEAR_OPERATIONS,
    MATRIX_PRODUCTS,
    NORMS,
    OUT_OF_PLACE,
    PRODUCTS,
    QUOTIENTS,
    STATISTICS,
    SUMS,
    mapped,
    tensors,
)
from mpsearch.sensitivity.lrp_rules import Rules, See, half, identity, layer, stable

#: Told what an embedding gave: (tokens, output, gradient).
SeeTokens = Callable[[Tensor, Tensor, Tensor], None]


class Tracer(TorchFunctionMode):
    """Replaces operations on whatever depends on the data.

    Weights are constants here. Attributes:
        rules: which rule holds where.
        unknown: names of operations that no rule covers, once there were some.
    """

    def __init__(self, rules: Rules, see: Mapping[int, See], see_tokens: Mapping[int, SeeTokens]) -> None:
        """Watch weights.

        Args:
            rules: which rule holds where.
            see: identity of a weight -> who is told of its layer.
            see_tokens: the same for weights that are read as embeddings.
        """
        super().__init__()
        self.rules = rules
        self.unknown: set[str] = set()
        self._see = see
        self._see_tokens = see_tokens
        self._norms = 0
        self._plain = False
        # Transposed weight -> weight; the transposed ones are held so that no identity comes back as another's.
        self._turned: dict[int, tuple[Tensor, Tensor]] = {}

    def __torch_function__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        kwargs = kwargs or {}
        name = str(getattr(func, "__name__", func))
        short = name.strip("_")
        if self._plain or short == "set":
            return func(*args, **kwargs)
        if short == "embedding":
            return self._embedding(func, *args, **kwargs)
        if short in CONVOLUTIONS or short in ("linear", "addmm"):
            done = self._layer(func, short, args, kwargs)
            if done is not None:
                return done
        if short in ("matmul", "mm") and not kwargs and (id(args[1]) in self._turned or id(args[1]) in self._see):
            return self._product(args[0], args[1])
        weight = args[0] if args and isinstance(args[0], nn.Parameter) else None
        args, kwargs = _constant(args), _constant(kwargs)
        if weight is not None and id(weight) in self._see and weight.dim() == 2:
            return self._remember(weight, func(*args, **kwargs))
        if not any(x.requires_grad for x in tensors((args, kwargs))):
            return func(*args, **kwargs)
        return self._operation(OUT_OF_PLACE.get(name, func), short, args, kwargs)

    def _operation(self, func: Any, short: str, args: Any, kwargs: Any) -> Any:
        """An operation with a data-dependent operand."""
        if short in STATISTICS and self._norms:
            return _detached(func(*args, **kwargs))
        if short in GATES or (short == "softmax" and self.rules.attention == "cp"):
            return func(args[0].detach(), *args[1:], **kwargs)
        if short in LINEAR_OPERATIONS or short == "softmax":
            return func(*args, **kwargs)
        if short in ACTIVATIONS:
            return identity(args[0], func(args[0].detach().clone(), *args[1:], **kwargs))
        if short in SUMS:
            return stable(func(*args, **kwargs), self.rules)
        if (short in PRODUCTS or short in MATRIX_PRODUCTS) and not (short == "baddbmm" and args[0].requires_grad):
            product = func(*_halved(args), **kwargs)
            return stable(product, self.rules) if short in MATRIX_PRODUCTS else product
        if short in QUOTIENTS and isinstance(args[0], Tensor):
            return func(args[0], *_detached(args[1:]), **kwargs)
        if short == "scaled_dot_product_attention":
            return self._attention(*args, **kwargs)
        if short in NORMS:
            done = NORMS[short](*args, **kwargs)
            if done is not None:
                # Without a mean to take off each number only goes on as it came.
                return done if short == "rms_norm" else stable(done, self.rules)
        result = func(*args, **kwargs)
        if any(x.requires_grad for x in tensors(result)):
            self.unknown.add(short)
        return result

    def _embedding(self, func: Any, tokens: Tensor, weight: Tensor, *args: Any, **kwargs: Any) -> Tensor:
        # A new root: what the table gave holds relevance, the index does not.
        found: Tensor = func(tokens, weight.detach(), *args, **kwargs).detach().requires_grad_(True)
        see = self._see_tokens.get(id(weight))
        if see is not None:
            found.register_hook(lambda g: see(tokens, found.detach(), g))  # type: ignore[no-untyped-call]
        return found.clone()

    def _layer(self, func: Any, short: str, args: Any, kwargs: Any) -> Tensor | None:
        """A dense layer or convolution with a constant weight; None when its weight depends on the data."""
        names = ("bias", "input", "weight") if short == "addmm" else ("input", "weight", "bias")
        given = dict(zip(names, args, strict=False)) | {k: v for k, v in kwargs.items() if k in names}
        rest = {k: v for k, v in kwargs.items() if k not in names}
        x, weight, bias = given["input"], given["weight"], given.get("bias")
        if not isinstance(weight, nn.Parameter) and (weight.requires_grad or not x.requires_grad):
            return None
        see = self._see.get(id(weight))
        if not x.requires_grad:
            if see is None:
                return None
            x = x.detach().requires_grad_(True)

        def apply(x: Tensor, weight: Tensor, bias: Tensor | None) -> Tensor:
            if short == "addmm":
                return x @ weight if bias is None else torch.addmm(bias, x, weight, **rest)
            result: Tensor = func(x, weight, bias, *args[3:], **rest)
            return result

        rule = self.rules.conv if short in CONVOLUTIONS else self.rules.linear
        return layer(x, weight.detach(), None if bias is None else bias.detach(), apply, rule, self.rules, see)

    def _remember(self, weight: Tensor, found: Any) -> Any:
        """What was made of a weight; some models multiply with the transposed one themselves."""
        if not isinstance(found, Tensor) or found.data_ptr() != weight.data_ptr():
            return found
        if found.shape == weight.shape[::-1] and found.stride() == weight.stride()[::-1]:
            self._turned[id(found)] = (found, weight)
        return found

    def _product(self, x: Tensor, matrix: Tensor) -> Tensor:
        """A dense layer that is written as a product of matrices."""
        weight = self._turned[id(matrix)][1] if id(matrix) in self._turned else matrix
        turned = weight is not matrix

        def apply(x: Tensor, weight: Tensor, bias: Tensor | None) -> Tensor:
            return torch.matmul(x, weight.t() if turned else weight)

        x = x if x.requires_grad else x.detach().requires_grad_(True)
        return layer(x, weight.detach(), None, apply, self.rules.linear, self.rules, self._see[id(weight)])

    def _attention(
        self,
        query: Tensor,
        key: Tensor,
        value: Tensor,
        attn_mask: Tensor | None = None,
        dropout_p: float = 0.0,
        is_causal: bool = False,
        scale: float | None = None,
        enable_gqa: bool = False,
    ) -> Tensor:
        """Fused attention, step by step."""
        if enable_gqa:
            times = query.shape[-3] // key.shape[-3]
            key, value = key.repeat_interleave(times, -3), value.repeat_interleave(times, -3)
        factor = 1 / math.sqrt(query.shape[-1]) if scale is None else scale
        scores = stable(half(query) @ half(key).transpose(-2, -1), self.rules) * factor
        if is_causal:
            seen = torch.ones(scores.shape[-2:], dtype=torch.bool, device=scores.device).tril()
            scores = scores.masked_fill(~seen, -math.inf)
        if attn_mask is not None:
            boolean = attn_mask.dtype == torch.bool
            scores = scores.masked_fill(~attn_mask, -math.inf) if boolean else scores + attn_mask
        if self.rules.attention == "cp":
            return stable(torch.softmax(scores.detach(), -1) @ value, self.rules)
        return stable(half(torch.softmax(scores, -1)) @ half(value), self.rules)

    @contextmanager
    def running(self, module: nn.Module) -> Iterator[None]:
        """Run the body with the operations replaced."""
        with ExitStack() as undo:
            for part in module.modules():
                if type(part).__module__ == "transformers.activations":
                    # Some are written out in powers and products, which have rules of their own; seen from outside
                    # they are elementwise, and zero at zero.
                    part.forward = self._outside(part.forward)
                    undo.callback(part.__dict__.pop, "forward", None)
                elif "norm" in type(part).__name__.lower() and not any(True for _ in part.children()):
                    undo.callback(part.register_forward_pre_hook(self._enter).remove)
                    undo.callback(part.register_forward_hook(self._leave).remove)
            with self:
                yield

    def _enter(self, module: nn.Module, args: Any) -> None:
        self._norms += 1

    def _leave(self, module: nn.Module, args: Any, output: Any) -> None:
        self._norms -= 1

    def _outside(self, forward: Callable[[Tensor], Tensor]) -> Callable[[Tensor], Tensor]:
        def run(x: Tensor) -> Tensor:
            self._plain = True
            try:
                y = forward(x.detach())
                return identity(x, y) if x.requires_grad else y
            finally:
                self._plain = False

        return run


def _constant(value: Any) -> Any:
    """The same with weights cut off: only what depends on the data asks for a gradient."""
    return mapped(value, lambda x: x.detach() if isinstance(x, nn.Parameter) else x)


def _detached(value: Any) -> Any:
    return mapped(value, torch.Tensor.detach)


def _halved(args: Any) -> Any:
    """Factors of a product: where two depend on the data, each gets half of the relevance."""
    several = sum(x.requires_grad for x in tensors(args)) > 1
    return mapped(args, lambda x: half(x) if several and x.requires_grad else x)
