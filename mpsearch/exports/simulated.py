"""What the original model and our own simulation of a plan answer, to compare a loaded export with."""

from __future__ import annotations

from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray

from mpsearch.model.apply import applied, quantized_weight
from mpsearch.model.model import Model, load_model
from mpsearch.plan import BitPlan

Logits = NDArray[np.float64]


def distances(plan: BitPlan, model: Model | str) -> dict[str, float]:
    """How far rounding moves each weight: the norm of the change over that of the weight, by tensor."""
    loaded = load_model(model) if isinstance(model, str) else model
    found = {}
    for layer in plan.layers:
        if layer.kind == "kv_cache":
            continue
        weight = loaded.weight(layer.name).detach().double()
        moved = quantized_weight(loaded, layer, plan.formats[layer.name].weight).double() - weight
        norm = float(weight.norm())
        found[layer.tensor] = float(moved.norm()) / norm if norm else 0.0
    return found


def simulated_logits(plan: BitPlan, model: Model | str, tokens: list[list[int]]) -> tuple[Logits, Logits]:
    """Run the original and the model as planned, in float32.

    Args:
        plan: the plan.
        model: the original, or its folder. Formats that are made from calibration data need a model that has been
            calibrated (E422).
        tokens: (sequences, positions).

    Returns:
        Logits of the original and of the simulation, each (sequences, positions, vocabulary).
    """
    loaded = load_model(model) if isinstance(model, str) else model
    batch: Any = {"input_ids": torch.tensor(tokens)}
    with torch.no_grad():
        original = loaded.logits(batch)
        with applied(loaded, {layer: plan.formats[layer.name] for layer in plan.layers}):
            planned = loaded.logits(batch)
    return original.double().numpy(), planned.double().numpy()
