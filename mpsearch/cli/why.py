"""``mpsearch why``: why a layer has its bits."""

from __future__ import annotations

import json
import math
import sys
from typing import TYPE_CHECKING, Annotated

import typer

from mpsearch.cli.options import DEFAULT_STORAGE, Json, Storage
from mpsearch.errors import InputError

if TYPE_CHECKING:
    from collections.abc import Iterator, Sequence

    from mpsearch.cli.looks import Pen
    from mpsearch.views.why import Step, Why

_MIB = 2**20


def why(
    plan: Annotated[str, typer.Argument(help="Plan file, study (its chosen plan), STUDY:LABEL, or key.")],
    layer: Annotated[str, typer.Argument(help="Name of a layer, or a pattern.")],
    study: Annotated[str, typer.Option(help="Whose scores to use, for a plan file.")] = "",
    storage: Storage = DEFAULT_STORAGE,
    as_json: Json = False,
) -> None:
    """Say why a layer has its bits: its scores, what a step more or less would do, which budget binds.

    mpsearch why tiny-llama model.layers.0.mlp.down_proj

    mpsearch why plan.json '*.down_proj'
    """
    from mpsearch.cli.looks import Pen
    from mpsearch.cli.pick import Picker
    from mpsearch.views.why import matching, whys

    picker = Picker(storage, study)
    try:
        picked = picker.pick(plan)
    finally:
        picker.close()
    if picked.view is None:
        raise InputError(
            "E143", f"no study of the model of '{plan}' has scores in this database",
            advice="name the database that has one: --storage results.db",
        )  # fmt: skip
    found = whys(picked.view, picked.plan, matching(picked.view, layer))
    if as_json:
        body = {"plan": picked.title, "layers": [one.to_json() for one in found]}
        sys.stdout.write(json.dumps(body, indent=1) + "\n")
        return
    pen = Pen.of_output()
    lines = _one(found[0], pen, picked.title) if len(found) == 1 else _several(found, pen, picked.title)
    for line in lines:
        sys.stdout.write(f"{pen.text(line)}\n")


def _one(found: Why, pen: Pen, title: str) -> Iterator[str]:
    from mpsearch.cli.looks import wrapped

    shapes = ", ".join("x".join(map(str, shape)) for shape in found.shapes)
    scored = f", scored by {found.estimator}" if found.estimator else ""
    yield from wrapped(f"{found.layer}  {found.kind} {shapes}  in {title}{scored}", pen)
    for name in found.layers[1:]:
        yield f"  with {name}"
    for flag in found.flags:
        yield from wrapped(f"  {flag}", pen, 4)
    yield ""
    yield from pen.table(_options(found, pen), "<<>><<", 1)
    yield ""
    for sentence in found.sentences:
        yield from wrapped(sentence, pen)


def _options(found: Why, pen: Pen) -> list[list[str]]:
    rows = [["", "format", "bytes", "predicted loss", "error", "bar (log)"]]
    known = [option.loss for option in found.options if option.loss is not None and option.loss > 0]
    low, high = (math.log10(min(known)) - 0.3, math.log10(max(known))) if known else (0.0, 1.0)
    for option in found.options:
        share = 0.0
        if option.loss is not None and option.loss > 0:
            share = (math.log10(option.loss) - low) / max(high - low, 1e-9)
        rows.append(
            [
                "►" if option.chosen else "",
                option.format,
                "" if option.bytes is None else f"{option.bytes:,}",
                option.status.replace("_", " ") if option.loss is None else f"{option.loss:.4g}",
                "" if option.error is None else f"± {option.error:.2g}",
                pen.bar(share, 16),
            ]
        )
    return rows


def _several(found: Sequence[Why], pen: Pen, title: str) -> Iterator[str]:
    yield f"{len(found)} decisions in {title}; losses in {found[0].unit}"
    rows = [["decision", "format", "loss", "one up gains", "rank", "one down loses", "MiB up"]]
    for one in found:
        now = one.now
        rows.append(
            [
                one.decision,
                one.format,
                "" if now is None or now.loss is None else f"{now.loss:.3g}",
                _change(one.up, 1.0),
                f"{one.up.rank}/{one.up.of}" if one.up is not None and one.up.rank else "",
                _change(one.down, -1.0),
                f"{one.up.bytes / _MIB:.3g}" if one.up is not None else "",
            ]
        )
    yield from pen.table(rows, "<<>>>>>")
    if any(step is not None and step.noise for one in found for step in (one.up, one.down)):
        yield "~ within noise"


def _change(step: Step | None, sign: float) -> str:
    return "" if step is None else f"{'~' if step.noise else ''}{sign * step.gain:.3g}"
