"""The command that lists number formats, and says which layers of a model each would refuse."""

from __future__ import annotations

import json
import sys
from collections.abc import Iterator
from pathlib import Path
from typing import Annotated, Any

import typer

from mpsearch.cli.options import Json

#: The layers that the list of formats is priced on.
_ROWS = _COLUMNS = 4096
_HEADS, _CHANNELS = 8, 128


def formats(
    model: Annotated[str, typer.Argument(help="A model folder, or bundled:tiny-llama: what each layer takes.")] = "",
    format: Annotated[
        list[str] | None, typer.Option("--format", "-f", help="Only this format; again for more.")
    ] = None,
    as_json: Json = False,
) -> None:
    """List the number formats; given a model, say which of its layers each would refuse and why.

    mpsearch formats

    mpsearch formats bundled:tiny-llama -f q4_K -f int4-g128
    """
    from mpsearch.format import all_formats, parse_formats

    given = {"": parse_formats(format)} if format else all_formats()
    rows = list(_refusals(model, given) if model else _catalogue(given))
    if as_json:
        sys.stdout.write(json.dumps(rows, indent=1) + "\n")
        return
    from mpsearch.cli.show import console, formats_tables, refusals_table

    out = console()
    for table in [refusals_table(rows)] if model else formats_tables(rows):
        out.print(table)
        out.print()
    if not model:
        out.print(
            "held by: checkpoint formats that can store it; the target bytes@NAME prices it there. "
            "Exporters are native and llama.cpp (gguf)."
        )
        out.print("Bits are stored bits per number: of a 4096 x 4096 weight, of a long cache of 128 channels per head.")


def _catalogue(families: Any) -> Iterator[dict[str, Any]]:
    from mpsearch.formats.activation import Activation
    from mpsearch.hardware.containers import CONTAINERS, refuses
    from mpsearch.layer import Layer

    weight, cache = Layer("", "linear", (_ROWS, _COLUMNS), dtype="bfloat16"), Layer("", "kv_cache", (_HEADS, _CHANNELS))
    for fmts in families.values():
        for fmt in fmts:
            layer = cache if fmt.family == "kv" else weight
            bits = fmt.effective_bits(layer)
            held = ["native"] if fmt.family == "kv" else [name for name in CONTAINERS if not refuses(fmt, weight, name)]
            yield {
                "format": str(fmt),
                "bits": float(bits),
                "bits_exact": str(bits),
                "for": fmt.purpose,
                "needs": fmt.needs,
                "held_by": held,
            }
    if "" not in families:
        for text in Activation.examples:
            fmt = Activation.read(text)
            assert fmt is not None
            yield {
                "format": f"W@{fmt}",
                "bits": float(fmt.bits),
                "bits_exact": str(fmt.bits),
                "for": fmt.purpose,
                "needs": "ranges" if fmt.static else "",
                "held_by": [name for name in CONTAINERS if not refuses(parse_pair("int8-channel", text), weight, name)],
            }


def parse_pair(weight: str, activation: str) -> Any:
    """Read a pair of formats."""
    from mpsearch.format import Format

    return Format.parse(f"{weight}@{activation}")


def _refusals(model: str, families: Any) -> Iterator[dict[str, Any]]:
    from mpsearch import api
    from mpsearch.bundled import resolve_model
    from mpsearch.format import Format
    from mpsearch.formats.activation import Activation

    found = api.layers(resolve_model(model, Path.cwd()), caches=True)
    inputs = [] if "" in families else [Format.parse(f"bf16@{text}") for text in Activation.examples]
    for fmts in (*families.values(), inputs):
        for fmt in fmts:
            caches = fmt.family == "kv"
            concerned = [layer for layer in found if (layer.kind == "kv_cache") == caches]
            reasons: dict[str, list[str]] = {}
            for layer in concerned:
                if reason := fmt.refuses(layer):
                    reasons.setdefault(reason, []).append(layer.name)
            refused = sum(map(len, reasons.values()))
            yield {
                "format": str(fmt),
                "layers": len(concerned),
                "taken": len(concerned) - refused,
                "refused": [{"reason": reason, "layers": names} for reason, names in reasons.items()],
            }
