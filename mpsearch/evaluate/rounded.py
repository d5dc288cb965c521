"""Rounded weights, kept between plans: plans of one search mostly round the same layers to the same formats."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field, replace
from typing import Any

from torch import Tensor

from mpsearch.format import Format
from mpsearch.layer import Layer
from mpsearch.model.apply import Change
from mpsearch.model.model import Model

#: Rounded weights are kept up to this many bytes; of more, those that were not used for longest are dropped.
KEEP_BYTES = 2**30


@dataclass(eq=False)
class Rounded:
    """The rounded weights of a model, kept as long as plans are measured on the same batches.

    Attributes:
        model: the model.
        calibration: the batches that formats are made from.
        kept: (layer, format of the weight) -> rounded weight, the last used one last.
        bytes: size of what is kept.
    """

    model: Model
    calibration: Sequence[Any]
    kept: dict[tuple[Layer, Format], Tensor] = field(default_factory=dict)
    bytes: int = 0

    @classmethod
    def of(cls, model: Model, batches: Sequence[Any]) -> Rounded:
        """Return what is kept of a model, where it was last measured on the same batches and calibrated on the same."""
        found = model.memo("rounded", batches, lambda: cls(model, model.calibration))
        if found.calibration is not model.calibration:
            found.calibration, found.bytes = model.calibration, 0
            found.kept.clear()
        return found

    def change(self, formats: Mapping[Layer, Format], keep_bytes: int = KEEP_BYTES) -> Change:
        """Return what `Change.of` does, with weights that were rounded before looked up.

        Raises:
            InputError: as `Change.of`.
        """
        # A layer whose inputs or caches are rounded too is rounded anew: their ranges are found together.
        known = {
            layer: (layer, fmt)
            for layer, fmt in formats.items()
            if fmt.activation is None and (layer, fmt) in self.kept
        }
        made = Change.of(self.model, {layer: fmt for layer, fmt in formats.items() if layer not in known})
        found = {layer: self.kept.pop(key) for layer, key in known.items()}
        self.kept |= {key: found[layer] for layer, key in known.items()}
        for layer, weight in made.weights.items():
            if formats[layer].activation is None:
                self.kept[layer, formats[layer]] = weight
                self.bytes += weight.numel() * weight.element_size()
        while self.bytes > keep_bytes and self.kept:
            weight = self.kept.pop(next(iter(self.kept)))
            self.bytes -= weight.numel() * weight.element_size()
        weights = {**made.weights, **found}
        return replace(made, weights={layer: weights[layer] for layer in formats if layer in weights})
