"""Why a layer has its bits, in sentences."""

from __future__ import annotations

from collections.abc import Iterator
from typing import TYPE_CHECKING

from mpsearch.spread import plus_minus
from mpsearch.views.steps import MIB
from mpsearch.views.why_flags import held

if TYPE_CHECKING:
    from mpsearch.views.why import Price, Step, Why


def sentences(found: Why) -> Iterator[str]:
    """Yield what a `Why` says, the format and its loss first."""
    now, unit = found.now, found.unit
    size = "" if now is None or now.bytes is None else f": {now.bytes:,} bytes"
    if now is None or now.loss is None:
        yield f"{found.layer} has {found.format}{size}, which has no score."
    else:
        part = "" if found.share is None else f", {100 * found.share:.3g} % of the plan's"
        yield f"{found.layer} has {found.format}{size}, predicted loss {_pm(now.loss, now.error)} {unit}{part}."
    price = next((x for x in found.prices if x.binds and x.resource == "weights"), None)
    alone = price is not None and sum(x.binds for x in found.prices) == 1
    yield from _step_sentences(found, price if alone else None)
    for each in found.prices:
        if each.binds:
            told = f"the price at this budget is {each.price:.3g} {each.unit}, for small changes"
            yield f"Budget {each.budget} binds: {told}."
        else:
            yield f"Budget {each.budget} does not bind: more of it would save nothing."
    against = [f"{x.estimator} would give it {x.says}" for x in found.opinions if x.says != "the same"]
    agree = [x.estimator for x in found.opinions if x.says == "the same"]
    if against:
        yield f"Estimators disagree: {'; '.join(against)}."
    if agree:
        yield f"No clear objection from {', '.join(agree)}."


def _step_sentences(found: Why, price: Price | None) -> Iterator[str]:
    unit = found.unit
    if found.up is not None:
        step = found.up
        text = (
            f"Next step up, {step.format}: costs {step.bytes / MIB:.4g} MiB and "
            f"{'gains' if step.gain >= 0 else 'LOSES'} {_pm(abs(step.gain), step.error)} {unit} "
            f"({step.rate:.3g} per MiB, rank {step.rank} of {step.of})."
        )
        yield text + _hindered(found, step, price) + _noise(step)
    elif found.now is not None and found.now.loss is not None:
        yield "There is no scored format of more bytes."
    if found.down is not None:
        step = found.down
        text = (
            f"Next step down, {step.format}: frees {-step.bytes / MIB:.4g} MiB and "
            f"{'loses' if step.gain <= 0 else 'GAINS'} {_pm(abs(step.gain), step.error)} {unit} "
            f"({step.rate:.3g} per MiB)."
        )
        yield text + _noise(step)
    elif found.now is not None and found.now.loss is not None:
        yield "There is no scored format of fewer bytes."


def _hindered(found: Why, step: Step, price: Price | None) -> str:
    """Say what keeps the plan from a step up, where that is known."""
    if rule := held(found.flags, step.format):
        return f" The study rules it out: {rule}."
    if price is None:
        return ""
    if step.rate < price.price:
        return " A MiB is worth more elsewhere."
    if price.left is not None and step.bytes / MIB > price.left:
        return f" It does not fit: {max(price.left, 0.0):.4g} MiB of the budget are left."
    return ""


def _noise(step: Step) -> str:
    return " That is within noise." if step.noise else ""


def _pm(value: float, error: float | None) -> str:
    return f"{value:.4g}{plus_minus(error) if error else ''}"
