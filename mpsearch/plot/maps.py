"""The bits of a plan as a heat map."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from mpsearch.plot.chart import Axis, Cells, Chart, Panel
from mpsearch.plot.theme import BITS, step_of
from mpsearch.web.amounts import size, whole_bytes, with_spread

#: Digits on these are white.
WHITE = frozenset(f"bits:{bits}" for bits, (_, digits) in BITS.items() if digits == "#ffffff")


def heatmap_chart(data: Mapping[str, Any], title: str = "") -> Chart:
    """Draw what `mpsearch.views.plan_map.plan_map` returned.

    Args:
        data: the cells.
        title: of the picture.
    """
    columns = max(len(data["columns"]), 1)
    cells = []
    for cell in data["cells"]:
        first, last = (0, columns - 1) if cell["column"] < 0 else (cell["column"], cell["column"])
        role = f"bits:{step_of(cell['median'])}"
        cells.append((cell["row"], first, last, role, cell["bits"], _told(cell, data)))
    used = sorted({step_of(cell["median"]) for cell in data["cells"]})
    key = tuple((f"bits:{bits}", f"{bits} bits") for bits in used)
    loss = data["predicted_loss"]
    said = "" if loss is None else f", predicted loss {with_spread(loss)} {data['loss_unit']}"
    notes = [f"{size(data['bytes'])}, {data['bits_per_weight']:.3f} bits per weight{said}. Cells: bits of one code."]
    if any(len(cell["layers"]) > 1 for cell in data["cells"]):
        notes.append("Several layers in one cell: from their fewest to their most bits, coloured by the median.")
    rows = len(data["rows"])
    return Chart(
        title or "Bits of each layer",
        (
            Panel(
                Axis("kind of layer", names=tuple(data["columns"]) or ("",)),
                Axis("block", names=tuple(data["rows"]), down=True),
                (Cells(tuple(cells), rows, columns, WHITE, key),),
            ),
        ),
        tuple(notes),
        height=min(max(1.3 + 0.22 * rows, 2.2), 9.0),
    )


def _told(cell: Mapping[str, Any], data: Mapping[str, Any]) -> tuple[str, ...]:
    names = cell["layers"]
    what = names[0] if len(names) == 1 else f"{len(names)} layers, {names[0]} to {names[-1]}"
    formats = ", ".join(name if count == 1 else f"{count} x {name}" for name, count in cell["formats"].items())
    counted = f" {data['counted_in']}" if data["counted_in"] else ""
    return (what, formats, f"{whole_bytes(cell['bytes'])}{counted}")
