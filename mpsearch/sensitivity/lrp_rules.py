"""Rules of layer-wise relevance propagation, written as gradients that are changed on their way back.

The relevance of a tensor is R = x * g, where g is the gradient of the explained output under these rules. That leaves
every linear step (views, sums, scaling, masks) to autograd, and divides by no tensor that may be zero.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any, Literal

import torch
from torch import Tensor

from mpsearch.errors import InputError

Rule = Literal["epsilon", "gamma", "zplus", "alpha_beta"]
RULES = ("epsilon", "gamma", "zplus", "alpha_beta")
#: Applies a layer: (input, weight, bias or None) -> output, linear in the input and in the weight.
Apply = Callable[[Tensor, Tensor, Tensor | None], Tensor]
#: Told what went through a layer: (input, weight, output, gradients of the three).
See = Callable[[Tensor, Tensor, Tensor, Tensor, Tensor, Tensor], None]


@dataclass(frozen=True)
class Rules:
    """Which rule holds where.

    With contributions c = w x, their sum z = P + N with the bias in it, P of the positive and N of the negative:

    - ``epsilon``: R_i = sum_j c_ij R_j / (z_j + eps sign z_j), with sign 0 = 1;
    - ``gamma``: contributions of the sign of z_j count 1 + gamma times, in z_j as well (the generalised rule);
    - ``zplus``: R_i = sum_j c+_ij R_j / P_j;
    - ``alpha_beta``: R_i = sum_j (alpha c+_ij / P_j - beta c-_ij / N_j) R_j.

    Attributes:
        linear: rule of dense layers.
        conv: rule of convolutions.
        epsilon: what denominators are kept away from zero by; it also takes relevance from small outputs.
        gamma: preference of the ``gamma`` rule.
        alpha: weight of the positive contributions in ``alpha_beta``.
        beta: weight of the negative ones; alpha - beta = 1 conserves relevance.
        attention: ``attnlrp`` (relevance goes through the softmax, half of each product to each factor) or ``cp``
            (the softmax is a constant: queries and keys get none).
    """

    linear: Rule = "epsilon"
    conv: Rule = "gamma"
    epsilon: float = 1e-6
    gamma: float = 0.25
    alpha: float = 2.0
    beta: float = 1.0
    attention: Literal["attnlrp", "cp"] = "attnlrp"

    def __post_init__(self) -> None:
        for name in (self.linear, self.conv):
            if name not in RULES:
                raise InputError("E113", f"lrp: the rule is {name!r}; give one of {', '.join(RULES)}")
        if self.attention not in ("attnlrp", "cp"):
            raise InputError("E113", f"lrp: attention is {self.attention!r}; give 'attnlrp' or 'cp'")
        if not 0 < self.epsilon < float("inf"):
            raise InputError("E113", f"lrp: epsilon is {self.epsilon!r}; give a number above 0")
        for name, value in (("gamma", self.gamma), ("alpha", self.alpha), ("beta", self.beta)):
            if not 0 <= value < float("inf"):
                raise InputError("E113", f"lrp: {name} is {value!r}; give a number from 0")


def stabilised(z: Tensor, epsilon: float) -> Tensor:
    """Move a denominator away from zero, on its own side."""
    return z + torch.where(z < 0, -epsilon, epsilon).to(z.dtype)


class _Stable(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, z: Tensor, epsilon: float) -> Tensor:
        ctx.save_for_backward(z)
        ctx.epsilon = epsilon
        return z.view_as(z)

    @staticmethod
    def backward(ctx: Any, g: Tensor) -> Any:
        (z,) = ctx.saved_tensors
        return g * (z / stabilised(z, ctx.epsilon)), None


class _Half(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, x: Tensor) -> Tensor:
        return x.view_as(x)

    @staticmethod
    def backward(ctx: Any, g: Tensor) -> Any:
        return g * 0.5


class _Identity(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, x: Tensor, y: Tensor) -> Tensor:
        ctx.save_for_backward(x, y)
        return y.view_as(y)

    @staticmethod
    def backward(ctx: Any, g: Tensor) -> Any:
        x, y = ctx.saved_tensors
        # A unit at zero holds no relevance, so it passes none on.
        return g * torch.where(x == 0, 0.0, y / torch.where(x == 0, 1.0, x)), None


class _Layer(torch.autograd.Function):
    @staticmethod
    def forward(
        ctx: Any,
        x: Tensor,
        weight: Tensor,
        bias: Tensor | None,
        apply: Apply,
        rule: Rule,
        rules: Rules,
        see: See | None,
    ) -> Tensor:
        z = apply(x, weight, bias)
        ctx.save_for_backward(x, weight, bias, z)
        ctx.how = (apply, rule, rules, see)
        return z

    @staticmethod
    def backward(ctx: Any, g: Tensor) -> Any:
        x, weight, bias, z = ctx.saved_tensors
        apply, rule, rules, see = ctx.how
        if rule == "epsilon":
            scaled = z * g / stabilised(z, rules.epsilon)
            g_x, g_w = _pull(apply, x, weight, scaled, see is not None)
        else:
            g_x, g_w = _split(apply, rule, rules, x, weight, bias, z, g, see is not None)
        if see is not None:
            see(x, weight, z, g_x, g_w, g)
        return g_x, None, None, None, None, None, None


def _pull(apply: Apply, x: Tensor, weight: Tensor, g: Tensor, both: bool) -> tuple[Tensor, Tensor]:
    """Gradients of <g, apply(x, weight)> with respect to the input and, if asked for, the weight (else zero)."""
    with torch.enable_grad():
        a = x.detach().requires_grad_(True)
        w = weight.detach().requires_grad_(both)
        output = apply(a, w, None)
        found = torch.autograd.grad(output, [a, w] if both else [a], g)
    return found[0], found[1] if both else torch.zeros((), dtype=g.dtype, device=g.device)


def _split(
    apply: Apply,
    rule: Rule,
    rules: Rules,
    x: Tensor,
    weight: Tensor,
    bias: Tensor | None,
    z: Tensor,
    g: Tensor,
    both: bool,
) -> tuple[Tensor, Tensor]:
    """Gradients under a rule that treats positive and negative contributions apart."""
    up, down = (x.clamp(min=0), x.clamp(max=0)), (weight.clamp(min=0), weight.clamp(max=0))
    high = None if bias is None else bias.clamp(min=0)
    low = None if bias is None else bias.clamp(max=0)
    positive = apply(up[0], down[0], high) + apply(up[1], down[1], None)
    negative = apply(up[0], down[1], low) + apply(up[1], down[0], None)
    for_positive, for_negative = _coefficients(rule, rules, z * g, z, positive, negative)
    one, one_w = _pull(apply, up[0], down[0], for_positive, both)
    two, two_w = _pull(apply, up[1], down[1], for_positive, both)
    three, three_w = _pull(apply, up[0], down[1], for_negative, both)
    four, four_w = _pull(apply, up[1], down[0], for_negative, both)
    g_x = torch.where(x >= 0, one + three, two + four)
    return g_x, torch.where(weight >= 0, one_w + four_w, two_w + three_w) if both else one_w


def _coefficients(
    rule: Rule, rules: Rules, relevance: Tensor, z: Tensor, positive: Tensor, negative: Tensor
) -> tuple[Tensor, Tensor]:
    """What a positive and what a negative contribution are multiplied with, for every output."""
    if rule == "gamma":
        more, less = stabilised(z + rules.gamma * positive, rules.epsilon), z + rules.gamma * negative
        share = relevance / torch.where(z > 0, more, stabilised(less, rules.epsilon))
        share = torch.where(z == 0, 0.0, share)
        return share * torch.where(z > 0, 1 + rules.gamma, 1.0), share * torch.where(z < 0, 1 + rules.gamma, 1.0)
    share = relevance / stabilised(positive, rules.epsilon)
    if rule == "zplus":
        return share, torch.zeros_like(share)
    # No negative contribution is a zero below which nothing is: its denominator stays on the negative side.
    return rules.alpha * share, -rules.beta * relevance / (negative - rules.epsilon)


def layer(
    x: Tensor, weight: Tensor, bias: Tensor | None, apply: Apply, rule: Rule, rules: Rules, see: See | None = None
) -> Tensor:
    """Output of a dense layer or convolution, whose gradient follows a rule.

    >>> x = torch.tensor([[1.0, 1.0]], requires_grad=True)
    >>> z = layer(x, torch.tensor([[3.0, 1.0]]), None, torch.nn.functional.linear, "epsilon", Rules())
    >>> (x * torch.autograd.grad(z.sum(), x)[0]).detach().round(decimals=3)
    tensor([[3., 1.]])
    """
    result: Tensor = _Layer.apply(x, weight, bias, apply, rule, rules, see)  # type: ignore[no-untyped-call]
    return result


def stable(z: Tensor, rules: Rules) -> Tensor:
    """Epsilon rule of a sum: each term gets what it contributed."""
    result: Tensor = _Stable.apply(z, rules.epsilon)  # type: ignore[no-untyped-call]
    return result


def half(x: Tensor) -> Tensor:
    """Factor of a product with another tensor that depends on the data: it gets half of the relevance."""
    result: Tensor = _Half.apply(x)  # type: ignore[no-untyped-call]
    return result


def identity(x: Tensor, y: Tensor) -> Tensor:
    """Output of an elementwise function of ``x`` that is zero at zero: relevance passes as it is."""
    result: Tensor = _Identity.apply(x, y.detach())  # type: ignore[no-untyped-call]
    return result


def standardised(x: Tensor, axes: tuple[int, ...], epsilon: float, centred: bool) -> Tensor:
    """Normalise over axes, with the deviation held constant: relevance passes but for the mean's part."""
    shifted = x - x.mean(axes, keepdim=True) if centred else x
    scale = shifted.detach().square().mean(axes, keepdim=True).add(epsilon).rsqrt()
    return shifted * scale
