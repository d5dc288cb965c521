"""What rounding may ask of the calibration data: input Hessians, gradients and input ranges, on demand and kept."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn import functional

from mpsearch.errors import InputError
from mpsearch.format import Format
from mpsearch.formats.activation import Activation
from mpsearch.layer import Layer
from mpsearch.model.activations import Range, seen_in
from mpsearch.model.codec import Evidence
from mpsearch.model.model import Batch, Model, samples_of


class Calibration:
    """The calibration data of a model, asked for one layer at a time while the model is unchanged.

    Cost: a pass over the data for each layer and kind of question. Memory: what was asked for is kept: a Hessian
    takes 4 columns^2 bytes, an importance as much as the weight in float32.
    """

    def __init__(self, model: Model, batches: Sequence[Batch]) -> None:
        self._model = model
        self._batches = batches
        self._kept: dict[tuple[str, str], Any] = {}

    @classmethod
    def of(cls, model: Model) -> Calibration:
        """Return the calibration of a model; made once for the batches that it has."""
        return model.memo("calibration", model.calibration, lambda: cls(model, model.calibration))

    def evidence(self, layer: Layer, fmt: Format) -> Evidence:
        """What a format needs to round a layer.

        Raises:
            InputError: there is no calibration data, or the layer cannot give it (E422).
        """
        if not fmt.needs:
            return Evidence()
        self._check(layer, fmt)
        if fmt.needs == "hessian":
            return Evidence(hessian=self._once(layer, "hessian", lambda: self._hessian(layer, fmt)))
        return Evidence(importance=self._once(layer, "importance", lambda: self._importance(layer)))

    def input_range(self, layer: Layer, fmt: Activation) -> Range:
        """Least and largest input of a layer, over all calibration data.

        Raises:
            InputError: as `evidence`.
        """
        self._check(layer, fmt)

        def measure() -> Range:
            found: list[Range] = []

            def see(module: nn.Module, x: Tensor) -> None:
                turned = x.movedim(channel_axis(module), -1)
                rows = turned.reshape(-1, turned.shape[-1]).float()
                if not len(rows):
                    return
                found[:] = [seen_in(rows, fmt, found[0] if found else None)]

            self._watch(layer, see)
            if not found:
                raise _unseen(layer, fmt)
            return found[0]

        return self._once(layer, f"range {fmt.grain}", measure)  # type: ignore[no-any-return]

    def _once(self, layer: Layer, what: str, make: Callable[[], Any]) -> Any:
        if (layer.name, what) not in self._kept:
            self._kept[layer.name, what] = make()
        return self._kept[layer.name, what]

    def _check(self, layer: Layer, fmt: Format) -> None:
        if not self._batches:
            raise InputError(
                "E422", f"layer '{layer.name}': {fmt} is made from calibration data, and there is none",
                advice="give calibration data",
            )  # fmt: skip

    def _hessian(self, layer: Layer, fmt: Format) -> Tensor:
        total = torch.zeros(layer.columns, layer.columns, device=self._model.weight(layer.name).device)
        count = 0

        def add(module: nn.Module, x: Tensor) -> None:
            nonlocal count
            rows = _patches(module, x, layer)
            count += len(rows)
            total.addmm_(rows.T, rows, alpha=2.0)

        self._watch(layer, add)
        if not count:
            raise _unseen(layer, fmt)
        return total.div_(count)

    def _importance(self, layer: Layer) -> Tensor:
        weight = self._model.weight(layer.name)
        total = torch.zeros_like(weight)
        for batch in self._batches:
            for sample in samples_of(batch):
                count = self._model.predictions(sample)
                with torch.enable_grad():
                    loss = self._model.loss(sample) * count
                    (gradient,) = torch.autograd.grad(loss, [weight], allow_unused=True)
                if gradient is not None:
                    total += gradient.square_().div_(count)
        axes = layer.row_axes
        return total.movedim(axes, tuple(range(len(axes)))).reshape(layer.rows, -1).contiguous()

    def _watch(self, layer: Layer, see: Callable[[nn.Module, Tensor], None]) -> None:
        """Run the calibration data and show each input of a layer."""

        def hook(module: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any], output: Any) -> None:
            see(module, (args[0] if args else next(iter(kwargs.values()))).detach())

        handles = [
            self._model.holder(name).register_forward_hook(hook, with_kwargs=True)
            for name in (layer.name, *layer.shared)
        ]
        try:
            with torch.no_grad():
                for batch in self._batches:
                    self._model.logits(batch) if self._model.has_logits else self._model.loss(batch)
        finally:
            for handle in handles:
                handle.remove()


def channel_axis(module: nn.Module) -> int:
    """Axis of an input that holds the channels, from the end: a convolution takes a sample without a batch as well."""
    return -1 - len(module.kernel_size) if isinstance(module, (nn.Conv1d, nn.Conv2d, nn.Conv3d)) else -1


def _patches(module: nn.Module, x: Tensor, layer: Layer) -> Tensor:
    """What is multiplied with the rows of the weight: (positions, columns)."""
    if not isinstance(module, (nn.Conv1d, nn.Conv2d, nn.Conv3d)):
        return x.float().reshape(-1, layer.columns)
    axes = len(module.kernel_size)
    batched = x.float() if x.dim() == axes + 2 else x.float().unsqueeze(0)
    mode = "constant" if module.padding_mode == "zeros" else module.padding_mode
    batched = functional.pad(batched, module._reversed_padding_repeated_twice, mode)
    for axis in range(axes):
        reach = module.dilation[axis] * (module.kernel_size[axis] - 1) + 1
        batched = batched.unfold(2 + axis, reach, module.stride[axis])[..., :: module.dilation[axis]]
    return batched.movedim(1, 1 + axes).reshape(-1, layer.columns)


def _unseen(layer: Layer, fmt: Format) -> InputError:
    return InputError("E422", f"layer '{layer.name}': {fmt} is made from its inputs, and the data never calls it")
