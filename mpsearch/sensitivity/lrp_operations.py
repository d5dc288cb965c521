"""Operations that relevance can go through, and the norms among them."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn import functional

from mpsearch.sensitivity.lrp_rules import standardised


def _names(text: str) -> frozenset[str]:
    return frozenset(text.split())


#: Operations that move, copy, mask, pick or average numbers: their own gradient is the rule.
LINEAR_OPERATIONS = _names(
    """
    get getitem setitem view view_as reshape reshape_as flatten unflatten squeeze unsqueeze transpose t permute movedim
    moveaxis swapaxes swapdims flip roll contiguous clone to float double type type_as alias expand expand_as
    broadcast_to repeat repeat_interleave tile cat concat concatenate stack hstack vstack split split_with_sizes
    tensor_split chunk unbind narrow select index_select gather take take_along_dim index_add index_copy index_put
    scatter scatter_add masked_fill masked_scatter masked_select where tril triu diagonal rot90 pad unfold fold
    pixel_shuffle pixel_unshuffle channel_shuffle neg mean sum cumsum nan_to_num
    dropout dropout1d dropout2d dropout3d alpha_dropout feature_dropout
    avg_pool1d avg_pool2d avg_pool3d adaptive_avg_pool1d adaptive_avg_pool2d adaptive_avg_pool3d
    max_pool1d max_pool2d max_pool3d adaptive_max_pool1d adaptive_max_pool2d adaptive_max_pool3d
    max_pool1d_with_indices max_pool2d_with_indices max_pool3d_with_indices topk sort max min amax amin
    interpolate retain_grad requires_grad register_hook
    """
)
#: Elementwise, and zero at zero.
ACTIVATIONS = _names(
    """
    relu relu6 leaky_relu prelu rrelu elu celu selu gelu silu mish hardswish hardtanh tanh tanhshrink hardshrink
    softshrink softsign threshold clamp clamp_min clamp_max clip abs
    """
)
#: Gates: they say how much passes, not what, so the other factor takes the whole of the relevance.
GATES = _names("sigmoid hardsigmoid")
#: Inside of a norm these make its statistic, which is held constant; elsewhere no rule covers them.
STATISTICS = _names("pow square var std var_mean std_mean rsqrt sqrt reciprocal norm linalg_vector_norm")
SUMS = _names("add radd iadd sub rsub isub subtract")
PRODUCTS = _names("mul rmul imul multiply")
MATRIX_PRODUCTS = _names("matmul rmatmul mm bmm baddbmm einsum grouped_mm")
QUOTIENTS = _names("div truediv itruediv idiv true_divide divide")
CONVOLUTIONS = _names("conv1d conv2d conv3d conv_transpose1d conv_transpose2d conv_transpose3d")
#: Work in place is done on a new tensor: what came in is still needed on the way back.
OUT_OF_PLACE: Mapping[str, Callable[..., Any]] = {
    "add_": torch.add, "__iadd__": torch.add, "sub_": torch.sub, "__isub__": torch.sub,
    "mul_": torch.mul, "__imul__": torch.mul, "div_": torch.div, "__idiv__": torch.div, "__itruediv__": torch.div,
}  # fmt: skip
#: Modules that hide what is between their inputs and outputs, or that no rule covers.
OPAQUE = (nn.MultiheadAttention, nn.RNNBase, nn.RNNCellBase, nn.Bilinear, nn.Softplus, nn.LogSigmoid, nn.LogSoftmax)


def _layer_norm(
    x: Tensor,
    normalized_shape: tuple[int, ...],
    weight: Tensor | None = None,
    bias: Tensor | None = None,
    eps: float = 1e-5,
    cudnn_enable: bool = True,
) -> Tensor:
    y = standardised(x, tuple(range(-len(normalized_shape), 0)), eps, centred=True)
    y = y if weight is None else y * weight
    return y if bias is None else y + bias


def _rms_norm(
    x: Tensor, normalized_shape: tuple[int, ...], weight: Tensor | None = None, eps: float | None = None
) -> Tensor:
    least = torch.finfo(x.dtype).eps if eps is None else eps
    y = standardised(x, tuple(range(-len(normalized_shape), 0)), least, centred=False)
    return y if weight is None else y * weight


def _group_norm(
    x: Tensor,
    num_groups: int,
    weight: Tensor | None = None,
    bias: Tensor | None = None,
    eps: float = 1e-5,
    cudnn_enabled: bool = True,
) -> Tensor:
    y = standardised(x.reshape(x.shape[0], num_groups, -1), (-1,), eps, centred=True).view_as(x)
    sizes = (1, -1, *(1,) * (x.dim() - 2))
    y = y if weight is None else y * weight.view(sizes)
    return y if bias is None else y + bias.view(sizes)


def _batch_norm(
    x: Tensor,
    running_mean: Tensor | None,
    running_var: Tensor | None,
    weight: Tensor | None = None,
    bias: Tensor | None = None,
    training: bool = False,
    momentum: float = 0.1,
    eps: float = 1e-5,
) -> Tensor | None:
    # With running statistics it is a scaling.
    return None if training else functional.batch_norm(x, running_mean, running_var, weight, bias, eps=eps)


#: Norms with their statistic held constant; None of a use that is not covered.
NORMS: Mapping[str, Callable[..., Tensor | None]] = {
    "layer_norm": _layer_norm, "rms_norm": _rms_norm, "group_norm": _group_norm, "batch_norm": _batch_norm,
}  # fmt: skip


def tensors(value: Any) -> Iterator[Tensor]:
    """Yield the tensors in arguments."""
    if isinstance(value, Tensor):
        yield value
    elif isinstance(value, (tuple, list)):
        for item in value:
            yield from tensors(item)
    elif isinstance(value, dict):
        yield from tensors(list(value.values()))


def mapped(value: Any, change: Callable[[Tensor], Tensor]) -> Any:
    """Return the same with every tensor changed."""
    if isinstance(value, Tensor):
        return change(value)
    if isinstance(value, tuple) and hasattr(value, "_fields"):
        return type(value)(*(mapped(item, change) for item in value))
    if type(value) in (tuple, list):
        return type(value)(mapped(item, change) for item in value)
    if type(value) is dict:
        return {name: mapped(item, change) for name, item in value.items()}
    return value
