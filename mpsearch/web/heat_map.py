"""The map of a plan: rows are blocks in network order, columns kinds of layers, a cell says its bits."""

from __future__ import annotations

from collections import Counter
from collections.abc import Mapping, Sequence
from dataclasses import dataclass

from mpsearch.layer import Layer
from mpsearch.plan import BitPlan
from mpsearch.tables import SensitivityTable
from mpsearch.web.amounts import whole_bytes
from mpsearch.web.layer_table import Prediction, exactly, predictions
from mpsearch.web.markup import Html, join, tag

#: Bits that have a colour of their own in the style sheet.
STEPS = (2, 3, 4, 5, 6, 7, 8, 16, 32)


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


def heat_map(plan: BitPlan, scores: SensitivityTable) -> Html:
    """Draw the formats of a plan as a table; each cell's ``data-tip`` says the rest.

    Layers that share a place, such as the experts of a block, are folded into one cell.
    """
    places: dict[Place, list[Layer]] = {}
    for layer in plan.layers:
        places.setdefault(Place.of(layer), []).append(layer)
    predicted = predictions(plan, scores)
    columns = list(dict.fromkeys(place.column for place in places if place.column))
    cells = {
        place: _cell(layers, plan, _tip(layers, plan, predicted, scores.unit), 1 if place.column else len(columns))
        for place, layers in places.items()
    }
    rows = list(dict.fromkeys(place.row for place in places))
    labels = _row_labels([row for row in rows if Place(row, "") not in places])
    body = []
    for row in rows:
        alone = cells.get(Place(row, ""))
        across = [cells.get(Place(row, column), tag("td")) for column in columns]
        body.append(tag("tr", tag("th", labels.get(row, row), scope="row", title=row), *([alone] if alone else across)))
    headings = (tag("th", name, scope="col", title=path) for path, name in short_names(columns).items())
    head = tag("tr", tag("th", "block", scope="col"), *headings)
    table = tag("table", tag("thead", head), tag("tbody", *body), class_="map")
    return join([tag("div", table, class_="scroll"), _key(plan)])


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


def _cell(layers: Sequence[Layer], plan: BitPlan, tip: str, span: int) -> Html:
    bits = sorted(plan.formats[layer.name].bits for layer in layers)
    digits = str(bits[0]) if bits[0] == bits[-1] else f"{bits[0]}-{bits[-1]}"
    colspan = span if span > 1 else None
    return tag("td", digits, class_=_colour(bits[len(bits) // 2]), data_tip=tip, colspan=colspan, tabindex=-1)


def _colour(bits: int) -> str:
    return f"b{min(STEPS, key=lambda known: abs(known - bits))}"


def _tip(layers: Sequence[Layer], plan: BitPlan, predicted: Mapping[str, Prediction], unit: str) -> str:
    formats = [plan.formats[layer.name] for layer in layers]
    lines = [layers[0].name, f"format {formats[0]}"]
    if len(layers) > 1:
        counted = Counter(map(str, formats)).most_common()
        lines = [
            f"{len(layers)} layers, {layers[0].name} to {layers[-1].name}",
            "formats " + ", ".join(f"{times} x {name}" for name, times in counted),
        ]
    count = sum(fmt.bytes(layer) for fmt, layer in zip(formats, layers, strict=True))
    loss = Prediction.sum(predicted[name] for name in dict.fromkeys(layer.tie or layer.name for layer in layers))
    lines.append(f"{whole_bytes(count)}, {exactly(plan)}")
    lines.append(f"predicted loss: {loss.text}{'' if loss.loss is None else ' ' + unit}")
    ties = dict.fromkeys(layer.tie for layer in layers if layer.tie)
    if ties:
        lines.append(f"tied as {', '.join(ties)}: the loss is of all tied layers together")
    shared = [name for layer in layers for name in layer.shared]
    if shared:
        lines.append(f"same weight as {', '.join(shared)}")
    return "\n".join(lines)


def _key(plan: BitPlan) -> Html:
    used = sorted({fmt.bits for fmt in plan.formats.values()})
    steps = (tag("span", str(bits), class_=_colour(bits)) for bits in used)
    return tag("p", "bits of one code: ", *steps, class_="key")
