"""Where a plan spends each resource: by kind of layer and by block, with what is not decided."""

from __future__ import annotations

import math
from collections.abc import Iterable, Sequence
from dataclasses import asdict, dataclass
from typing import TYPE_CHECKING, Any

from mpsearch.plan import BitPlan
from mpsearch.tables import CostTable

if TYPE_CHECKING:
    from mpsearch.layer import Layer
    from mpsearch.views.study_view import StudyView

#: What stands for tensors that keep their number type, and for fixed costs.
UNDECIDED = "not decided"
#: What a target's container takes beside the bytes of layers in our own file, or saves.
CONTAINER = "container of the target"


@dataclass(frozen=True)
class Part:
    """What some of the layers take."""

    name: str
    amount: float


@dataclass(frozen=True)
class Breakdown:
    """Where one resource goes. The kinds add up to the total, and so do the blocks.

    Attributes:
        resource: with its condition, such as ``weights`` or ``tpot at context 512``.
        unit: of the amounts.
        kind: ``exact``, ``measured`` or ``modelled``.
        total: of the plan.
        kinds: by kind of layer, in network order; what is not decided comes last.
        blocks: by block.
    """

    resource: str
    unit: str
    kind: str
    total: float
    kinds: tuple[Part, ...]
    blocks: tuple[Part, ...]

    def to_json(self) -> dict[str, Any]:
        """Return it as plain values."""
        return {**asdict(self), "kinds": [asdict(x) for x in self.kinds], "blocks": [asdict(x) for x in self.blocks]}


def breakdown(view: StudyView, plan: BitPlan) -> tuple[Breakdown, ...]:
    """Say where a plan spends its resources, weights first; one that a format has no price in is left out.

    Args:
        view: of a study of the plan's model.
        plan: the plan.

    >>> from mpsearch.testing.views import pretended
    >>> view = pretended(20, 16, 4)
    >>> plan = view.plan(0)
    >>> weights = breakdown(view, plan)[0]
    >>> sum(part.amount for part in weights.kinds) == sum(part.amount for part in weights.blocks) == plan.bytes
    True
    """
    names = _places(view)
    found = [_weights(plan, names)]
    for table in view.costs:
        made = _of_table(view, plan, table, names) if table.resource != "weights" else None
        if made is not None:
            found.append(made)
    return tuple(found)


def _places(view: StudyView) -> dict[str, tuple[str, str]]:
    """Layer -> (kind, block); a layer without a block is a kind and a block of its own."""
    grid = view.grid
    found: dict[str, tuple[str, str]] = {}
    for (row, column), numbers in grid.cells.items():
        block = grid.row_names[row]
        kind = grid.column_names[column] if column >= 0 else block
        found |= {view.layers[i].name: (kind, block) for i in numbers}
    return found


def _weights(plan: BitPlan, names: dict[str, tuple[str, str]]) -> Breakdown:
    entries = [(names.get(x.name, (x.kind, x.name)), float(plan.formats[x.name].bytes(x))) for x in plan.layers]
    rest = [(UNDECIDED, float(plan.layers.excluded_bytes))]
    if plan.stored_bytes != plan.bytes:
        rest.append((CONTAINER, float(plan.stored_bytes - plan.bytes)))
    return _made("weights", "bytes", "exact", entries, rest)


def _of_table(view: StudyView, plan: BitPlan, table: CostTable, names: dict[str, tuple[str, str]]) -> Breakdown | None:
    column = {name: j for j, name in enumerate(table.formats)}
    row_of = {name: i for i, name in enumerate(table.layers)}
    entries = []
    for decision in view.layers.decisions:
        fmt = str(plan.formats[decision.layers[0].name])
        if decision.name not in row_of or fmt not in column:
            return None
        amount = float(table.value[row_of[decision.name], column[fmt]])
        if not math.isfinite(amount):
            return None
        entries.append((_together(decision.layers, names), amount))
    rest = [(UNDECIDED, float(table.fixed))]
    return _made(table.resource, table.unit, table.kind, entries, rest)


def _together(layers: Sequence[Layer], names: dict[str, tuple[str, str]]) -> tuple[str, str]:
    """Kind and block of layers that have one price together."""
    kinds = dict.fromkeys(names[layer.name][0] for layer in layers)
    blocks = list(dict.fromkeys(names[layer.name][1] for layer in layers))
    return "+".join(kinds), blocks[0] if len(blocks) == 1 else "several blocks"


def _made(
    resource: str,
    unit: str,
    kind: str,
    entries: Sequence[tuple[tuple[str, str], float]],
    rest: Sequence[tuple[str, float]],
) -> Breakdown:
    fixed = [(name, amount) for name, amount in rest if amount]
    total = math.fsum([amount for _, amount in entries] + [amount for _, amount in fixed])
    kinds = _sums([(places[0], amount) for places, amount in entries] + fixed)
    blocks = _sums([(places[1], amount) for places, amount in entries] + fixed)
    return Breakdown(resource, unit, kind, total, kinds, blocks)


def _sums(entries: Iterable[tuple[str, float]]) -> tuple[Part, ...]:
    groups: dict[str, list[float]] = {}
    for name, amount in entries:
        groups.setdefault(name, []).append(amount)
    return tuple(Part(name, math.fsum(amounts)) for name, amounts in groups.items())
