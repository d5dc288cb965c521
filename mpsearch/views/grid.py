"""Where layers stand on the map of a plan: rows are blocks in network order, columns kinds of layers."""

from __future__ import annotations

from collections import Counter
from collections.abc import Sequence
from dataclasses import dataclass

from mpsearch.layer import Layer


@dataclass(frozen=True, slots=True)
class Place:
    """Where a layer stands on the map.

    Attributes:
        row: path up to and with the number of the block; the whole path of a layer without one.
        column: path after the number, further numbers as ``*``; empty for a layer without a block.
    """

    row: str
    column: str

    @classmethod
    def of(cls, layer: Layer) -> Place:
        """Read the place off the module path.

        >>> Place.of(Layer("model.layers.3.mlp.experts.7.up_proj", "linear", (2, 2)))
        Place(row='model.layers.3', column='mlp.experts.*.up_proj')
        >>> Place.of(Layer("lm_head", "linear", (2, 2)))
        Place(row='lm_head', column='')
        """
        parts = layer.name.split(".")
        block = next((i for i, part in enumerate(parts) if part.isdecimal()), None)
        if block is None:
            return cls(layer.name, "")
        rest = ["*" if part.isdecimal() else part for part in parts[block + 1 :]]
        return cls(".".join(parts[: block + 1]), ".".join(rest) or layer.kind)


@dataclass(frozen=True)
class Grid:
    """The map of a model: every layer has one cell; layers such as the experts of a block share one.

    Attributes:
        rows: paths of the blocks, and of layers without one, in network order.
        columns: paths of the kinds of layers.
        row_names: ``rows`` as short as they can be told apart.
        column_names: ``columns`` as short as they can be told apart.
        cells: (row, column) -> numbers of its layers; the column is -1 for a layer without a block.

    >>> layers = [Layer(f"h.{i}.{name}", "linear", (2, 2)) for i in (0, 1) for name in ("up", "down")]
    >>> grid = Grid.of([*layers, Layer("lm_head", "linear", (2, 2))])
    >>> grid.row_names, grid.column_names, grid.cells[1, 0], grid.cells[2, -1]
    (('0', '1', 'lm_head'), ('up', 'down'), (2,), (4,))
    """

    rows: tuple[str, ...]
    columns: tuple[str, ...]
    row_names: tuple[str, ...]
    column_names: tuple[str, ...]
    cells: dict[tuple[int, int], tuple[int, ...]]

    @classmethod
    def of(cls, layers: Sequence[Layer]) -> Grid:
        """Place the layers of a model."""
        places = [Place.of(layer) for layer in layers]
        rows = list(dict.fromkeys(place.row for place in places))
        columns = list(dict.fromkeys(place.column for place in places if place.column))
        row, column = {name: i for i, name in enumerate(rows)}, {name: i for i, name in enumerate(columns)}
        cells: dict[tuple[int, int], list[int]] = {}
        for i, place in enumerate(places):
            cells.setdefault((row[place.row], column.get(place.column, -1)), []).append(i)
        alone = {place.row for place in places if not place.column}
        labels = _row_labels([name for name in rows if name not in alone])
        return cls(
            tuple(rows),
            tuple(columns),
            tuple(labels.get(name, name) for name in rows),
            tuple(short_names(columns).values()),
            {place: tuple(numbers) for place, numbers in cells.items()},
        )


def short_names(paths: Sequence[str]) -> dict[str, str]:
    """Shorten each path to its last part where that is enough to tell it from the others.

    >>> short_names(["self_attn.q_proj", "mlp.gate", "moe.gate"])
    {'self_attn.q_proj': 'q_proj', 'mlp.gate': 'mlp.gate', 'moe.gate': 'moe.gate'}
    """
    count = Counter(path.rpartition(".")[2] for path in paths)
    return {path: last if count[last := path.rpartition(".")[2]] == 1 else path for path in paths}


def _row_labels(rows: Sequence[str]) -> dict[str, str]:
    """Leave the path out of the labels when there is only one."""
    stems = {row.rpartition(".")[0] for row in rows}
    return {row: row.rpartition(".")[2] if len(stems) == 1 else row for row in rows}
