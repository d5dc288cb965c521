"""Is mixing worth it? The measured answer in sentences."""

from __future__ import annotations

import math
from collections.abc import Iterable, Sequence

from mpsearch.cost_text import itemised
from mpsearch.front import Measurement
from mpsearch.planning import Labelled
from mpsearch.spread import mean_and_error, plus_minus
from mpsearch.tables import CostTable

_SIGNIFICANT = 1.96
#: Uniform plans of up to this share of a plan's bytes count as plans of its size.
NEARLY_EQUAL = 1.01


def best_uniform(measurements: Sequence[Measurement], limit: float) -> Measurement | None:
    """Return the uniform plan of the least measured loss among those of at most ``limit`` bytes."""
    fitting = [m for m in measurements if _fair(m) and m.cost["weights"] <= limit]
    return min(fitting, key=lambda m: (m.loss, m.cost["weights"]), default=None)


def next_uniform(measurements: Sequence[Measurement], limit: float) -> Measurement | None:
    """Return the smallest uniform plan of more than ``limit`` bytes."""
    larger = [m for m in measurements if _fair(m) and m.cost["weights"] > limit]
    return min(larger, key=lambda m: (m.cost["weights"], m.loss), default=None)


def rivals(uniform: Iterable[int], loss: Sequence[float], size: Sequence[float]) -> list[int | None]:
    """Return of each plan the number of the best uniform one of its size, as `best_uniform` does for one plan.

    Args:
        uniform: numbers of the uniform plans; those that were not measured are left out.
        loss: (P,) measured losses; NaN for a plan that was not measured.
        size: (P,) bytes; a plan whose are not known (NaN) has no rival.

    >>> rivals([0, 1], [0.5, 0.2, 0.1, 0.4], [100, 200, 199, 150])
    [0, 1, 1, 0]
    """
    known = [i for i in uniform if math.isfinite(loss[i]) and math.isfinite(size[i])]
    best = sorted(known, key=lambda i: (loss[i], size[i]))
    return [next((j for j in best if size[j] <= NEARLY_EQUAL * own), None) for own in size]


def is_uniform(label: str) -> bool:
    """Whether a label is that of a plan with one format.

    >>> is_uniform("uniform int4-g64"), is_uniform("uniformly great by vendor")
    (True, False)
    """
    return label.split(maxsplit=1)[:1] == ["uniform"]


def _fair(m: Measurement) -> bool:
    return is_uniform(m.label) and math.isfinite(m.loss) and math.isfinite(m.cost.get("weights", math.nan))


def gain(mixed: Measurement, uniform: Measurement) -> float:
    """How much lower the mixed plan's loss is, as a share of the uniform plan's; negative when it is higher."""
    return 1 - mixed.loss / uniform.loss if uniform.loss else 0.0


def difference_error(a: Measurement, b: Measurement) -> float:
    """Standard error of the difference of two losses: sequence by sequence when both ran on the same data."""
    if len(a.samples) > 1 and len(a.samples) == len(b.samples) and a.data == b.data:
        return mean_and_error([x - y for x, y in zip(a.samples, b.samples, strict=True)])[1]
    return math.hypot(a.spread, b.spread)


def verdict(chosen: Labelled, measurements: Sequence[Measurement], costs: Sequence[CostTable] = ()) -> list[str]:
    """Compare the chosen plan with the uniform plans, in sentences; the first one is the headline.

    Args:
        chosen: the study's plan for its own budgets.
        measurements: all that was measured.
        costs: what formats cost; resources beside weights and BOPs are itemised, with where each figure is from.
    """
    return [*_comparison(chosen, measurements), *map(str, itemised(chosen.plan, costs))]


def _comparison(chosen: Labelled, measurements: Sequence[Measurement]) -> list[str]:
    mixed = next((m for m in measurements if m.plan == chosen.plan.assignment), None)
    if mixed is None:
        return ["The chosen plan was not measured."]
    weights = chosen.plan.layers.weights

    def describe(m: Measurement) -> str:
        return f"{m.loss:.4g}{plus_minus(m.spread)} {m.unit} at {8 * m.cost['weights'] / weights:.3f} bits"

    lines = []
    # A uniform plan that is a hair larger is a fair rival too: budgets often fall just below one.
    uniform = best_uniform(measurements, NEARLY_EQUAL * mixed.cost["weights"])
    if not any(_fair(m) for m in measurements):
        lines.append(f"Measured: {describe(mixed)}. No uniform plan was measured.")
    elif uniform is None:
        lines.append(
            f"Measured: {describe(mixed)}. No uniform plan of the menu is as small: there is nothing to compare with."
        )
    else:
        noise = difference_error(mixed, uniform)
        better = uniform.loss - mixed.loss
        size = uniform.cost["weights"] / mixed.cost["weights"] - 1
        larger_by = f", {100 * size:.2f} % larger" if size > 0 else ""
        versus = f"uniform {uniform.label[8:]} ({describe(uniform)}{larger_by})"
        if uniform.plan == mixed.plan:
            lines.append(f"Mixing gains nothing here: the best plan is uniform, measured {describe(mixed)}.")
        elif better > _SIGNIFICANT * noise:
            lines.append(f"Mixing pays: {describe(mixed)}, {100 * gain(mixed, uniform):.0f} % below {versus}.")
        elif better > -_SIGNIFICANT * noise:
            lines.append(f"Mixing makes no measurable difference: {describe(mixed)}, against {versus}.")
        else:
            lines.append(f"Mixing does not pay here: {describe(mixed)}, worse than {versus}. Use the uniform plan.")
    larger = next_uniform(measurements, NEARLY_EQUAL * mixed.cost["weights"])
    if larger is not None:
        lines.append(f"The next larger uniform plan is {larger.label.removeprefix('uniform ')}: {describe(larger)}.")
    predicted = chosen.plan.predicted
    if predicted.gap is not None:
        # The gap is relative to the loss; what is above the least is relative to the bound.
        above = predicted.gap / (1 - predicted.gap) if predicted.gap < 1 else math.inf
        how = "proven to be the least" if predicted.gap <= 1e-9 else f"at most {100 * above:.2g} % above the least"
        lines.append(
            f"The chosen plan's predicted loss, {predicted.loss:.4g} {predicted.unit}, is {how} that any plan of this "
            "menu can have within the budgets."
        )
    return lines
