"""The formats of a plan as a map: blocks in network order by kinds of layers."""

from __future__ import annotations

import statistics
from typing import Any

from mpsearch.plan import BitPlan
from mpsearch.views.grid import Grid


def plan_map(plan: BitPlan) -> dict[str, Any]:
    """Return the cells of the map; layers such as the experts of a block share one.

    Args:
        plan: the plan.

    Returns:
        ``rows`` and ``columns`` (names), ``cells``: list of mappings with ``row``, ``column`` (-1 for a layer without
        a block), ``layers``, ``formats`` (name -> how many), ``bits`` (text: bits of one code, ``min-max`` where they
        differ), ``median`` (bits, for the colour) and ``bytes``.

    >>> from mpsearch.format import Format
    >>> from mpsearch.layer import Layer, Layers
    >>> layers = Layers(tuple(Layer(f"h.0.experts.{i}.up", "linear", (8, 64)) for i in range(3)))
    >>> plan = BitPlan(layers, {x.name: Format.parse(f"int{4 if i else 8}-g64") for i, x in enumerate(layers)})
    >>> plan_map(plan)["cells"][0]["bits"], plan_map(plan)["cells"][0]["median"]
    ('4-8', 4)
    """
    grid = Grid.of(plan.layers)
    cells = []
    for (row, column), numbers in grid.cells.items():
        members = [plan.layers[i] for i in numbers]
        formats = [plan.formats[layer.name] for layer in members]
        bits = sorted(fmt.bits for fmt in formats)
        counted: dict[str, int] = {}
        for fmt in formats:
            counted[str(fmt)] = counted.get(str(fmt), 0) + 1
        cells.append(
            {
                "row": row,
                "column": column,
                "layers": [layer.name for layer in members],
                "formats": counted,
                "bits": str(bits[0]) if bits[0] == bits[-1] else f"{bits[0]}-{bits[-1]}",
                "median": statistics.median_high(bits),
                "bytes": sum(fmt.bytes(layer) for fmt, layer in zip(formats, members, strict=True)),
            }
        )
    return {
        "figure": "plan_heatmap",
        "rows": list(grid.row_names),
        "columns": list(grid.column_names),
        "cells": cells,
        "bytes": plan.stored_bytes,
        "counted_in": plan.counted_in,
        "bits_per_weight": plan.bits,
        "predicted_loss": plan.loss,
        "loss_unit": plan.predicted.unit,
    }


def bits_of_kinds(plan: BitPlan) -> dict[str, dict[str, int]]:
    """Kind of layer, as on the map -> bits of one code -> bytes; layers without a block are kinds of their own.

    >>> from mpsearch.format import Format
    >>> from mpsearch.layer import Layer, Layers
    >>> bits_of_kinds(BitPlan(Layers((Layer("fc", "linear", (8, 64)),)), {"fc": Format.parse("int4-g64")}))
    {'fc': {'4': 272}}
    """
    grid = Grid.of(plan.layers)
    found: dict[str, dict[str, int]] = {}
    for (row, column), numbers in grid.cells.items():
        sums = found.setdefault(grid.column_names[column] if column >= 0 else grid.row_names[row], {})
        for layer in (plan.layers[i] for i in numbers):
            fmt = plan.formats[layer.name]
            sums[str(fmt.bits)] = sums.get(str(fmt.bits), 0) + fmt.bytes(layer)
    return found
