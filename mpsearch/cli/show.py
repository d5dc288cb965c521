"""Tables for the terminal."""

from __future__ import annotations

import re
import sys
from collections.abc import Mapping, Sequence
from dataclasses import asdict
from typing import Any

from rich.console import Console
from rich.table import Table
from rich.text import Text

from mpsearch.cost_text import UNITS, itemised
from mpsearch.front import Measurement, ParetoFront
from mpsearch.layer import Layers
from mpsearch.plan import BitPlan
from mpsearch.spelling import seen_only
from mpsearch.spread import plus_minus
from mpsearch.standings import Tournament
from mpsearch.studying import Study
from mpsearch.verdict import NEARLY_EQUAL, best_uniform, gain, is_uniform

#: Resources that tables have columns of their own for, or leave out.
_SHOWN = ("weights", "bops")


def safe(text: object) -> str:
    r"""Take control and direction characters, and others that are not seen, out of a text that is shown.

    >>> safe("a\x1b[31mb")
    'a?[31mb'
    """
    return seen_only(str(text), "?")


def console() -> Console:
    """A console that writes plain text when its output is not a terminal."""
    return Console(file=sys.stdout, highlight=False, soft_wrap=False, width=None if sys.stdout.isatty() else 110)


def _table(title: str, *columns: tuple[str, str]) -> Table:
    table = Table(title=title, title_justify="left", title_style="bold", box=None, pad_edge=False, header_style="bold")
    for name, justify in columns:
        table.add_column(name, justify=justify, no_wrap=justify == "right")  # type: ignore[arg-type]
    return table


def front_table(measurements: Sequence[Measurement], front: ParetoFront, weights: int, chosen: str) -> Table:
    """Measured plans, cheapest first: those on the front, and the uniform ones beside them."""
    served = _served(measurements)
    unit = measurements[0].unit if measurements else "nats/token"
    table = _table(
        "Measured plans by bits per weight; ► chosen • front",
        ("", "left"),
        ("plan", "left"),
        ("bits", "right"),
        ("bytes", "right"),
        *((f"{name.replace(' at ', chr(10) + 'at ')}\n{of}", "right") for name, of, _ in served),
        (f"loss {unit}", "right"),
        ("to best uniform", "left"),
    )
    on_front = {(point.plan, point.label) for point in front}
    shown: set[tuple[str, str]] = set()
    for m in sorted(measurements, key=lambda m: (m.cost["weights"], m.loss)):
        if (m.plan, m.label) in shown or m.label.startswith("random"):
            continue
        shown.add((m.plan, m.label))
        uniform = best_uniform(measurements, NEARLY_EQUAL * m.cost["weights"])
        note = ""
        if not is_uniform(m.label) and uniform is not None and uniform.loss and uniform.plan != m.plan:
            share = 100 * gain(m, uniform)
            note = f"{-share:+.0f} % {safe(uniform.label[8:])}"
        mark = "►" if m.plan == chosen and m.label == "mixed" else "•" if (m.plan, m.label) in on_front else ""
        table.add_row(
            mark,
            Text(safe(m.label)),
            f"{8 * m.cost['weights'] / weights:.4f}",
            f"{int(m.cost['weights']):,}",
            *(f"{m.cost[name] / size:,.4g}" if name in m.cost else "" for name, _, size in served),
            f"{m.loss:.4g}{plus_minus(m.spread)}",
            Text(note),
        )
    return table


def _served(measurements: Sequence[Measurement]) -> list[tuple[str, str, float]]:
    """(resource, unit, size of it) of what plans cost beside weights and BOPs."""
    names = dict.fromkeys(name for m in measurements for name in m.cost)
    units = ((name, *UNITS.get(name.split(" ")[0], ("", 1))) for name in names)
    return [(name, unit, float(size)) for name, unit, size in units if unit and name.split(" ")[0] not in _SHOWN]


def layers_table(layers: Layers) -> Table:
    """What can be decided."""
    table = _table(
        f"{len(layers)} layers, {len(layers.decisions)} decisions, {layers.weights:,} weights in all",
        ("layer", "left"),
        ("kind", "left"),
        ("shape", "right"),
        ("stored", "left"),
        (f"macs/{layers.unit}", "right"),
        ("tied or shared", "left"),
    )
    for layer in layers:
        together = layer.tie or (f"same tensor as {', '.join(layer.shared)}" if layer.shared else "")
        shape = "x".join(map(str, layer.shape))
        table.add_row(Text(safe(layer.name)), layer.kind, shape, layer.dtype, f"{layer.macs:,}", Text(safe(together)))
    return table


def layer_lines(layers: Layers) -> list[str]:
    """What can be decided, with the same layer of every block in one line.

    >>> from mpsearch.layer import Layer
    >>> layer_lines(Layers((Layer("h.0.fc", "linear", (4, 8)), Layer("h.1.fc", "linear", (4, 8)))))
    ['2 x h.*.fc  4x8']
    """
    groups: dict[str, int] = {}
    for decision in layers.decisions:
        name = re.sub(r"(?<=\.)\d+(?=\.)", "*", decision.name)
        shared = "".join(f" = {other}" for layer in decision.layers for other in layer.shared)
        shapes = ", ".join("x".join(map(str, layer.shape)) for layer in decision.layers)
        line = f"{name}{shared}  {shapes}"
        groups[line] = groups.get(line, 0) + 1
    return [f"{count} x {line}" for line, count in groups.items()]


def excluded_table(layers: Layers) -> Table:
    """What is left out, and why."""
    table = _table("Left out (kept as stored, and counted)", ("tensor", "left"), ("bytes", "right"), ("reason", "left"))
    for kept in layers.excluded:
        table.add_row(Text(safe(kept.name)), f"{kept.stored_bytes:,}", Text(safe(kept.reason)))
    return table


def in_short(names: Sequence[str]) -> str:
    """Name the first layer, and how many more there are.

    >>> in_short(["a", "b", "c"])
    'a and 2 more'
    """
    return names[0] if len(names) == 1 else f"{names[0]} and {len(names) - 1} more"


def formats_tables(rows: Sequence[Mapping[str, Any]]) -> list[Table]:
    """The number formats, one table per purpose, with who can store them."""
    tables: dict[str, Table] = {}
    for row in rows:
        if row["for"] not in tables:
            columns = (("format", "left"), ("bits", "right"), ("made from", "left"), ("held by", "left"))
            tables[row["for"]] = _table(row["for"], *columns)
        held = Text(", ".join(row["held_by"]), no_wrap=True, overflow="ellipsis")
        tables[row["for"]].add_row(row["format"].ljust(34), f"{row['bits']:.4f}", row["needs"].ljust(10), held)
    return list(tables.values())


def refusals_table(rows: Sequence[Mapping[str, Any]]) -> Table:
    """What a model's layers can take."""
    table = _table("Formats of this model's layers", ("format", "left"), ("taken by", "right"), ("refused", "left"))
    for row in rows:
        reasons = [f"{in_short(entry['layers'])}: {entry['reason']}" for entry in row["refused"]]
        table.add_row(row["format"], f"{row['taken']} of {row['layers']}", Text(safe("; ".join(reasons))))
    return table


def estimators_table(rows: Sequence[Mapping[str, Any]]) -> Table:
    """The estimators, what they cost and need."""
    table = _table(
        "Estimators", ("name", "left"), ("predicts", "left"), ("cost beside rounding", "left"), ("needs", "left")
    )
    for row in rows:
        sees = [what for what in row["sees"] if what != "weights"]
        also = f" (also of {' and '.join(sees)})" if sees else ""
        name = Text(row["estimator"], no_wrap=True)
        table.add_row(name, f"{row['predicts']}{also}", row["cost"], Text(", ".join(row["needs"]), no_wrap=True))
    return table


def tournament_table(outcome: Tournament) -> Table:
    """Who predicts best, best first."""
    table = _table(
        f"Estimators against {outcome.plans} measured random plans of {len(outcome.sizes)} sizes",
        ("estimator", "left"),
        ("plans lose", "right"),
        ("correlation", "right"),
        ("95 %", "right"),
        ("same size", "right"),
        ("seconds", "right"),
    )
    table.columns[0].min_width = 2 + max(len(entry.estimator) for entry in outcome.entries)
    for entry in outcome.entries:
        c = entry.correlation
        mark = "► " if entry.estimator == outcome.recommended else "  "
        table.add_row(
            Text(mark + entry.estimator, no_wrap=True),
            "" if entry.excess is None else f"+{100 * entry.excess:.1f} %",
            "" if c is None else f"{c.value:.3f}",
            "" if c is None else f"{c.low:.3f} to {c.high:.3f}",
            "" if c is None else f"{c.within:.2f}",
            f"{entry.seconds:.2f}" if entry.seconds else "",
        )
    return table


def tournament_notes(outcome: Tournament) -> list[str]:
    """What the columns mean, and who did not take part, or not in full."""
    return [
        "plans lose: how much more than the best plan measured at each size, on average. correlation: rank correlation "
        "of predicted and measured losses; same size: among plans of one size. seconds: of scoring, on one core.",
        *(f"{entry.estimator}: {safe(entry.why_not)}" for entry in outcome.entries if entry.why_not),
    ]


def plan_table(plan: BitPlan) -> Table:
    """One row per decision of a plan."""
    table = _table("Plan", ("decision", "left"), ("format", "left"), (f"bytes {plan.counted_in}".strip(), "right"))
    for decision in plan.layers.decisions:
        fmt = plan.formats[decision.layers[0].name]
        table.add_row(Text(safe(decision.name)), str(fmt), f"{sum(fmt.bytes(x) for x in decision.layers):,}")
    return table


def study_json(study: Study) -> dict[str, Any]:
    """A study's results as plain values."""
    from mpsearch.views.study_view import StudyView

    return {
        "study": study.name,
        "spec": study.spec.question(),
        "measurements": [m.to_json() for m in study.measurements],
        "front": [m.to_json() for m in study.front],
        "plan": study.plans[0].plan.to_json() if study.plans else None,
        "costs": [asdict(item) for item in itemised(study.plans[0].plan, study.costs)] if study.plans else [],
        "worth": StudyView.of(study).worth.to_json(),
    }
