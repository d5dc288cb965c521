"""Two plans side by side, and where the bytes of one go."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from mpsearch.plot.chart import Axis, Bars, Chart, Dots, Mark, Panel, Rule, scaled
from mpsearch.plot.text import stemless
from mpsearch.web.amounts import size, whole_bytes, with_spread

MIB = 2**20
#: Layers that are listed one by one where losses are not known.
_LISTED = 12


def compare_chart(data: Mapping[str, Any]) -> Chart:
    """Draw the way from one plan's predicted loss to the other's, and the bytes of each change.

    Args:
        data: what `mpsearch.views.difference.Difference.to_json` returned.
    """
    known = bool(data["waterfall"])
    size_of = {change["decision"]: change["bytes"] for change in data["changes"]}
    text_of = {change["decision"]: f"{change['before']} to {change['after']}" for change in data["changes"]}
    listed = [bar["label"] for bar in data["waterfall"]] if known else list(size_of)[:_LISTED]
    rest = sum(count for name, count in size_of.items() if name not in listed)
    if not known and len(size_of) > _LISTED:
        listed.append(f"{len(size_of) - _LISTED} more")
    rows = ("A", *stemless(listed), "B")
    moved = [size_of.get(name, rest if name.endswith(" more") else 0) for name in listed]
    panels = []
    if known:
        panels.append(Panel(_loss_axis(data), Axis("", names=rows, down=True), tuple(_waterfall(data, text_of))))
    places = tuple(float(i) for i in range(1, len(rows) - 1))
    unit, per = ("MiB", MIB) if max(map(abs, moved), default=0) >= MIB / 10 else ("KiB", 1024)
    bars = Bars(
        places, (0.0,) * len(moved), tuple(count / per for count in moved), tuple("muted" for _ in moved),
        texts=tuple((n, text_of.get(n, ""), f"{count:+,} bytes") for n, count in zip(listed, moved, strict=True)),
    )  # fmt: skip
    wide = scaled([0.0, *(count / per for count in moved)], log=False)[1]
    axis = Axis(f"bytes, B − A ({unit})", ends=wide)
    panels.append(Panel(axis, Axis("", names=rows, down=True), (Rule(0.0, ""), bars)))
    return Chart(
        "From plan A to plan B", tuple(panels), tuple(_sentences(data, known)), min(1.7 + 0.24 * len(rows), 9.0),
        (1.7, 1.0) if known else (),
    )  # fmt: skip


def _loss_axis(data: Mapping[str, Any]) -> Axis:
    ends = [value for bar in data["waterfall"] for value in (bar["start"], bar["end"])]
    return Axis(f"predicted loss ({data['unit']})", ends=scaled(ends, log=False)[1])


def _waterfall(data: Mapping[str, Any], text_of: Mapping[str, str]) -> list[Mark]:
    bars = data["waterfall"]
    marks: list[Mark] = []
    for role, name, worse in (("worse", "raises the loss", True), ("better", "lowers the loss", False)):
        part = [(i, bar) for i, bar in enumerate(bars, 1) if (bar["end"] > bar["start"]) == worse]
        part = [(i, bar) for i, bar in part if bar["end"] != bar["start"]]
        if part:
            marks.append(
                Bars(
                    tuple(float(i) for i, _ in part),
                    tuple(bar["start"] for _, bar in part),
                    tuple(bar["end"] - bar["start"] for _, bar in part),
                    (role,) * len(part),
                    name,
                    texts=tuple(_told(bar, text_of, data["unit"]) for _, bar in part),
                )
            )
    ends = (bars[0]["start"], bars[-1]["end"])
    told = tuple(
        (f"plan {name}", f"predicted loss {with_spread(x)} {data['unit']}") for name, x in zip("AB", ends, strict=True)
    )
    marks.append(Dots(ends, (0.0, len(bars) + 1.0), "text", "diamond", "plan", size=7, texts=told))
    return marks


def _told(bar: Mapping[str, Any], text_of: Mapping[str, str], unit: str) -> tuple[str, ...]:
    change = bar["end"] - bar["start"]
    return (bar["label"], text_of.get(bar["label"], ""), f"predicted loss {change:+.4g} {unit}")


def _sentences(data: Mapping[str, Any], known: bool) -> list[str]:
    lines = [line.replace("The second", "B").replace("Its ", "B's ") for line in data["sentences"]]
    return [" ".join(lines)] if known else [" ".join(lines), "There are no scores to say what each change does."]


def breakdown_chart(data: Mapping[str, Any]) -> Chart:
    """Draw what each kind of layer takes, coloured by bits where bytes are shown.

    Args:
        data: ``resource``, ``unit``, ``kind``, ``total``, and ``parts``: mappings with ``name``, ``amount`` and
            ``bits`` (bits of one code -> amount; empty for what is not decided).
    """
    parts = data["parts"]
    whole = data["unit"] == "bytes"
    unit, per = ("MiB", MIB) if whole else (data["unit"], 1)
    ends = [0.0] * len(parts)
    marks: list[Mark] = []
    for bits in sorted({bits for part in parts for bits in map(int, part["bits"])}):
        rows = [i for i, part in enumerate(parts) if part["bits"].get(str(bits))]
        amounts = [parts[i]["bits"][str(bits)] for i in rows]
        marks.append(
            Bars(
                tuple(map(float, rows)), tuple(ends[i] for i in rows), tuple(x / per for x in amounts),
                (f"bits:{bits}",) * len(rows), f"{bits} bits",
                texts=tuple(
                    (parts[i]["name"], f"{bits} bits", whole_bytes(x)) for i, x in zip(rows, amounts, strict=True)
                ),
            )
        )  # fmt: skip
        for i, amount in zip(rows, amounts, strict=True):
            ends[i] += amount / per
    plain = [i for i, part in enumerate(parts) if not part["bits"]]
    if plain:
        amounts = [parts[i]["amount"] for i in plain]
        role, name = ("random", "not decided") if whole else ("mixed", data["resource"])
        marks.append(
            Bars(
                tuple(map(float, plain)),
                (0.0,) * len(plain),
                tuple(x / per for x in amounts),
                (role,) * len(plain),
                name,
            )
        )
    total = data["total"]
    labels = tuple(f"{100 * part['amount'] / total:.1f} %" if total else "" for part in parts)
    shares = Bars(
        tuple(map(float, range(len(parts)))), tuple(part["amount"] / per for part in parts), (0.0,) * len(parts),
        ("muted",) * len(parts), labels=labels,
    )  # fmt: skip
    most = max((part["amount"] / per for part in parts), default=0.0)
    said = f"{size(total)} ({whole_bytes(total)})" if whole else f"{total:,.6g} {unit}"
    kind = {"exact": "Exact", "measured": "Measured", "modelled": "Modelled, not measured"}.get(data["kind"], "")
    panel = Panel(
        Axis(f"{data['resource']} ({unit})", ends=(0.0, 1.15 * most or 1.0)),
        Axis("", names=tuple(part["name"] for part in parts) or ("",), down=True),
        (*marks, shares),
    )
    return Chart(
        f"Where the {data['resource']} of the plan go", (panel,), (f"{said} in all. {kind}.",),
        min(1.6 + 0.26 * len(parts), 9.0),
    )  # fmt: skip
