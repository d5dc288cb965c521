"""Keeping layers at 16 bits because tokens spike in their inputs, and checking whether that helps."""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from typing import Any, Literal

from mpsearch import registry
from mpsearch.errors import InputError, did_you_mean
from mpsearch.format import Format
from mpsearch.front import Measurement
from mpsearch.layer import Layers
from mpsearch.plan import BitPlan
from mpsearch.protection import RULES, THRESHOLD, Rule, check_threshold
from mpsearch.spread import mean_and_error

#: Differences of less than this many standard errors are chance.
_SIGNIFICANT = 1.96

Verdict = Literal["helps", "does not help", "within noise"]


def protect(
    model: Any,
    batches: Sequence[Any],
    *,
    threshold: float = THRESHOLD,
    format: str = "bf16",
    layers: Layers | None = None,
) -> dict[str, str]:
    """Find the layers whose inputs hold a few tokens far larger than the rest, and pin them.

    A layer is kept where the mean over sequences of greatest over median token scale is over the threshold (QFeM, Yang
    et al. 2024; see `mpsearch.sensitivity.activation_spikes`). Cost: one forward pass.

    Args:
        model: a Hugging Face folder, a torch module or `mp.wrap`'s result; left as it was.
        batches: calibration batches.
        threshold: ratio over which a layer is kept.
        format: what it keeps; without an ``@`` its input is not rounded.
        layers: what can be kept; found when left out.

    Returns:
        Decision name -> format: pins for a study, or what `ablate` checks.

    Raises:
        InputError: no data (E501), a threshold that is none (E113), a model that cannot be run (E506), or a layer that
            cannot take the format (E130).

    >>> import torch, mpsearch as mp
    >>> model = mp.wrap(torch.nn.Sequential(torch.nn.Linear(1, 1)), logits=lambda m, x: m(x))
    >>> mp.protect(model, [torch.tensor([1.0, 1.0, 9.0, 1.0]).reshape(1, 4, 1)])
    {'0': 'bf16'}
    """
    from mpsearch.model.find import find_layers
    from mpsearch.model.model import as_model
    from mpsearch.model.threads import one_thread

    check_threshold(threshold)
    Format.parse(format)
    if not batches:
        raise InputError("E501", "there are no calibration batches")
    found = as_model(model)
    chosen = registry.make("estimators", RULES[0])
    if refusal := chosen.refuses(found):
        raise InputError("E506", f"estimator '{RULES[0]}' cannot score '{found.name}': {refusal}")
    with one_thread():
        what = layers if layers is not None else find_layers(found, batches)
        ratios = {row.layer: row.ratio for row in chosen.report(found, batches, what)}
    return Rule(RULES[0], threshold).pins(what, ratios, format)


@dataclass(frozen=True)
class Ablation:
    """A plan with and without the protection of some layers, at otherwise equal formats.

    Attributes:
        change: loss with it minus loss without it, in ``unit``, on the same samples; below 0 it loses less.
        spread: standard error of the change, over the differences of single samples.
        unit: such as ``nats/token``.
        verdict: ``helps`` or ``does not help`` (it loses more) where the change is over 1.96 standard errors; else
            ``within noise``.
        protection: decision name -> format.
        protected: the measurement with it.
        unprotected: the measurement without it.
    """

    change: float
    spread: float
    unit: str
    verdict: Verdict
    protection: Mapping[str, str]
    protected: Measurement
    unprotected: Measurement

    @property
    def bytes(self) -> float:
        """Bytes that the protection costs."""
        return self.protected.cost["weights"] - self.unprotected.cost["weights"]


def ablate(
    model: Any,
    plan: BitPlan | Mapping[str, str],
    protection: Mapping[str, str],
    data: Sequence[Any],
    *,
    calibration: Sequence[Any] = (),
) -> Ablation:
    """Measure what the protection of some layers changes, everything else being equal.

    Cost: two runs of the data, and one of the original model.

    Args:
        model: as for `mp.measure`.
        plan: a plan without the protection, or layer name -> format for every layer.
        protection: decision or layer name -> format that it keeps, such as `protect` gives.
        data: validation batches, better other ones than the layers were found with.
        calibration: batches for formats that are made from data.

    Raises:
        InputError: nothing is protected, or nothing that the plan does not keep already (E113); names that the model
            does not have (E120), a layer that cannot take its format (E130), or as `mp.measure`.
    """
    from mpsearch.api import measure
    from mpsearch.model.find import find_layers
    from mpsearch.model.model import as_model

    found = as_model(model)
    if isinstance(plan, BitPlan):
        base = plan
    else:
        caches = any(str(fmt).startswith("kv-") for fmt in plan.values())
        what = find_layers(found, data, caches=caches)
        if wrong := sorted(set(plan) ^ {layer.name for layer in what}):
            raise InputError("E302", f"the plan names other layers than the model has: {', '.join(wrong[:5])}")
        base = BitPlan(what, {name: Format.parse(str(fmt)) for name, fmt in plan.items()})
    kept = _formats_of(base.layers, protection)
    if all(base.formats[name] == fmt for name, fmt in kept.items()):
        raise InputError("E113", "the protection changes nothing in this plan", advice="a plan without it")
    with_it = replace(base, formats={**base.formats, **kept})
    without = measure(found, base, data, label="unprotected", calibration=calibration)
    after = measure(found, with_it, data, label="protected", calibration=calibration)
    change, spread = mean_and_error([b - a for a, b in zip(without.samples, after.samples, strict=True)])
    verdict: Verdict = "within noise"
    if math.isfinite(spread) and abs(change) > _SIGNIFICANT * spread:
        verdict = "helps" if change < 0 else "does not help"
    return Ablation(change, spread, after.unit, verdict, dict(protection), after, without)


def _formats_of(layers: Layers, protection: Mapping[str, str]) -> dict[str, Format]:
    """Layer name -> format that it keeps."""
    members = {row.name: row.layers for row in layers.decisions}
    members |= {layer.name: row.layers for row in layers.decisions for layer in row.layers}
    found: dict[str, Format] = {}
    for name, text in protection.items():
        if name not in members:
            raise InputError("E120", f"the model has no '{name}' to protect{did_you_mean(name, list(members))}")
        kept = Format.parse(text)
        for layer in members[name]:
            if why := kept.refuses(layer):
                raise InputError("E130", f"protected layer '{layer.name}': {why}")
            found[layer.name] = kept
    return found
