"""Measuring a plan: divergence from the original model and loss on the text, per token."""

from __future__ import annotations

import math
import time
from collections.abc import Sequence
from contextlib import AbstractContextManager, nullcontext
from dataclasses import dataclass
from typing import Any, ClassVar

import torch

from mpsearch.errors import InputError
from mpsearch.evaluate.first import First
from mpsearch.evaluate.rounded import Rounded
from mpsearch.front import Measurement, Metric
from mpsearch.machine import machine
from mpsearch.model.apply import Change, changed
from mpsearch.model.digest import digest_of
from mpsearch.model.model import Model
from mpsearch.model.reference import Reference, divergence
from mpsearch.plan import BitPlan
from mpsearch.spread import mean_and_error


@dataclass(frozen=True)
class Kl:
    """KL divergence to the original model, and cross-entropy on the data's own tokens, both in nats per token.

    Weights, activations and KV caches are rounded as the plan says and the whole model runs, in float32. The standard
    errors are over sequences.
    Cost: one forward pass per plan, one of the original for all plans; each layer is rounded once to each format, as
    long as the rounded weights of all plans take no more than a GiB.
    """

    version: ClassVar[int] = 1

    def measure(self, model: Model, plan: BitPlan, batches: Sequence[Any], label: str = "") -> Measurement:
        """Run a plan.

        Raises:
            InputError: the plan is for another model (E302), the original is not finite (E510), or the model under
                the plan is not (E511).
        """
        if plan.model.get("digest", model.digest) != model.digest:
            raise InputError("E302", f"the plan is for model {plan.model['digest'][:8]}…, this is {model.digest[:8]}…")
        start = time.perf_counter()
        # One reference serves plans that are measured on the first batches, and on all.
        whole = batches.whole if isinstance(batches, First) else batches
        reference = Reference.of(model, whole)
        change = Rounded.of(model, whole).change({layer: plan.formats[layer.name] for layer in plan.layers})
        kl: list[float] = []
        entropy: list[float] = []
        # Only the unchanged model can answer what is not kept of its answers.
        once, each = (changed, _unchanged) if reference.complete else (_unchanged, changed)
        with torch.no_grad(), once(model, change):
            for i, batch in enumerate(batches):
                log_p = reference.log_probabilities(i)
                with each(model, change):
                    found = divergence(log_p, model.logits(batch), batch)
                kl.extend(found.kl.tolist())
                entropy.extend(found.cross_entropy.tolist())
        if not all(map(math.isfinite, kl)):
            raise InputError(
                "E511", f"the model under plan '{label or plan.assignment[:8]}' gives values that are not finite"
            )
        metrics = {}
        if entropy:
            metrics["cross_entropy"] = Metric(*mean_and_error(entropy), "nats/token")
        mean, error = mean_and_error(kl)
        return Measurement(
            plan.assignment,
            label,
            mean,
            error,
            "nats/token",
            {**plan.cost, "weights": float(plan.stored_bytes)},
            metrics,
            machine=machine(),
            data=_data(model, plan, batches),
            seconds=time.perf_counter() - start,
            samples=tuple(kl),
        )


def _unchanged(model: Model, change: Change) -> AbstractContextManager[None]:
    return nullcontext()


def _data(model: Model, plan: BitPlan, batches: Sequence[Any]) -> dict[str, str]:
    """What the measurement hangs on beside the plan: the data, and what formats were made from."""
    data = {"digest": digest_of(list(batches))}
    if any(fmt.calibrated for fmt in plan.formats.values()):
        data["calibration"] = digest_of(list(model.calibration))
    return data
