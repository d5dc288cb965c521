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
from mpsearch.model.threads import one_thread
from mpsearch.parts import wholes

#: What was asked for is kept up to this many bytes; the oldest is forgotten first.
KEEP_BYTES = 2**30


class Calibration:
    """The calibration data of a model, asked for while the model is unchanged.

    What one layer is asked for is gathered for as many of the following layers as there is room for in the same pass,
    on one thread, so that it does not depend on who asks. Cost: a pass over the data (for importances one backward
    pass per sample) for every `KEEP_BYTES`. A Hessian takes 4 columns^2 bytes, an importance as much as the weight in
    float32.
    """

    def __init__(self, model: Model, batches: Sequence[Batch], layers: Sequence[Layer] = ()) -> None:
        self._model = model
        self._batches = batches
        self._layers = [layer for layer in wholes(layers) if layer.kind in ("linear", "conv") and layer.groups == 1]
        self._kept: dict[tuple[str, str], Any] = {}

    @classmethod
    def of(cls, model: Model) -> Calibration:
        """Return the calibration of a model; made once for the batches that it has."""
        return model.memo(
            "calibration", model.calibration, lambda: cls(model, model.calibration, model.calibration_layers)
        )

    def evidence(self, layer: Layer, fmt: Format) -> Evidence:
        """What a format needs to round a layer.

        Of a part of a layer: the rows and columns of the whole layer's that are the part's.

        Raises:
            InputError: there is no calibration data, or the layer is never called by it (E422).
        """
        if not fmt.needs:
            return Evidence()
        known: Tensor = self._known(layer.whole, fmt, fmt.needs)
        columns = slice(*layer.inputs) if layer.inputs else slice(None)
        rows = columns if fmt.needs == "hessian" else slice(*layer.channels) if layer.channels else slice(None)
        return Evidence(**{fmt.needs: known[rows, columns] if layer.is_part else known})

    def input_range(self, layer: Layer, fmt: Activation) -> Range:
        """Least and largest input of a layer, over all calibration data.

        Raises:
            InputError: as `evidence`.
        """
        found: Range = self._known(layer, fmt, f"range {fmt.grain}")
        return found

    def _known(self, layer: Layer, fmt: Format, what: str) -> Any:
        if not self._batches:
            raise InputError(
                "E422",
                f"layer '{layer.name}': {fmt} is made from calibration data, and there is none",
                advice="give calibration data",
            )
        if (layer.name, what) not in self._kept:
            self._gather(layer, what)
        if self._kept[layer.name, what] is None:
            raise InputError(
                "E422", f"layer '{layer.name}': {fmt} is made from its inputs, and the data never calls it"
            )
        return self._kept[layer.name, what]

    def _gather(self, layer: Layer, what: str) -> None:
        names = [known.name for known in self._layers]
        start = names.index(layer.name) + 1 if layer.name in names else len(names)
        together, room = [layer], KEEP_BYTES - _size(layer, what)
        for other in self._layers[start:]:
            if (other.name, what) not in self._kept and (room := room - _size(other, what)) >= 0:
                together.append(other)
        for key in list(self._kept):
            if room >= 0 and sum(_held(value) for value in self._kept.values()) <= room:
                break
            del self._kept[key]
        gather = {"hessian": self._hessians, "importance": self._importances}.get(what)
        with one_thread():
            found = gather(together) if gather else self._ranges(together, what.removeprefix("range "))
        self._kept |= {(each.name, what): found.get(each.name) for each in together}

    def _hessians(self, layers: Sequence[Layer]) -> dict[str, Tensor]:
        totals: dict[str, Tensor] = {}
        counts: dict[str, int] = {}

        def add(layer: Layer, module: nn.Module, x: Tensor) -> None:
            rows = _patches(module, x, layer)
            if len(rows):
                total = totals.setdefault(layer.name, rows.new_zeros(layer.columns, layer.columns))
                total.addmm_(rows.T, rows, alpha=2.0)
                counts[layer.name] = counts.get(layer.name, 0) + len(rows)

        self._watch(layers, add)
        return {name: total.div_(counts[name]) for name, total in totals.items()}

    def _importances(self, layers: Sequence[Layer]) -> dict[str, Tensor]:
        weights = [self._model.weight(layer.name) for layer in layers]
        totals = [torch.zeros_like(weight) for weight in weights]
        for batch in self._batches:
            for sample in samples_of(batch):
                count = self._model.predictions(sample)
                with torch.enable_grad():
                    loss = self._model.loss(sample) * count
                    gradients = torch.autograd.grad(loss, weights, allow_unused=True)
                for total, gradient in zip(totals, gradients, strict=True):
                    if gradient is not None:
                        total += gradient.square_().div_(count)
        return {
            layer.name: total.movedim(layer.row_axes, tuple(range(len(layer.row_axes)))).reshape(layer.rows, -1)
            for layer, total in zip(layers, totals, strict=True)
        }

    def _ranges(self, layers: Sequence[Layer], grain: str) -> dict[str, Range]:
        found: dict[str, Range] = {}

        def see(layer: Layer, module: nn.Module, x: Tensor) -> None:
            turned = x.movedim(channel_axis(module), -1)
            rows = turned.reshape(-1, turned.shape[-1]).float()
            if len(rows):
                found[layer.name] = seen_in(rows, grain, found.get(layer.name))

        self._watch(layers, see)
        return found

    def _watch(self, layers: Sequence[Layer], see: Callable[[Layer, nn.Module, Tensor], None]) -> None:
        """Run the calibration data and show the inputs of layers."""

        def watcher(layer: Layer) -> Any:
            def hook(module: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any], output: Any) -> None:
                see(layer, module, (args[0] if args else next(iter(kwargs.values()))).detach())

            return hook

        handles = [
            module.register_forward_hook(watcher(layer), with_kwargs=True)
            for layer in layers
            for module in readers(self._model, layer)
        ]
        try:
            with torch.no_grad():
                for batch in self._batches:
                    self._model.logits(batch) if self._model.has_logits else self._model.loss(batch)
        finally:
            for handle in handles:
                handle.remove()


def readers(model: Model, layer: Layer) -> list[nn.Module]:
    """The modules that multiply something with a layer's weight: all that hold it but embeddings."""
    modules = [model.holder(name) for name in (layer.name, *layer.shared)]
    return [module for module in modules if not isinstance(module, nn.Embedding)]


def _size(layer: Layer, what: str) -> int:
    """Bytes that are kept of a layer."""
    return {"hessian": 4 * layer.columns**2, "importance": 4 * layer.weights}.get(what, 8 * layer.columns)


def _held(value: Any) -> int:
    tensors = [value] if isinstance(value, Tensor) else value or ()
    return sum(tensor.numel() * tensor.element_size() for tensor in tensors)


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
