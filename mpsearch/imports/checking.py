"""Everything that is wrong with a plan file, at once."""

from __future__ import annotations

import json
import re
from collections.abc import Iterator, Mapping
from functools import lru_cache
from importlib.resources import files
from pathlib import Path
from typing import Any

from mpsearch.errors import InputError
from mpsearch.imports.reading import read_json
from mpsearch.keys import content_key
from mpsearch.layer import Layer, Layers
from mpsearch.plan import SCHEMA, SCHEMA_VERSION, BitPlan, Predicted

_TYPES: Mapping[str, tuple[type, ...]] = {
    "object": (dict,), "array": (list,), "string": (str,), "integer": (int,), "number": (int, float),
    "null": (type(None),), "boolean": (bool,),
}  # fmt: skip
#: Depth of values that is looked at; the schema itself is less deep.
_DEPTH = 20


def check_file(path: Path) -> tuple[BitPlan | None, list[str], list[str]]:
    """Read a plan file and list what is wrong with it.

    A field that the schema does not know is a note: it is of a later version of the same schema, and nothing that an
    older reader needs. So it is passed over, and lost when the plan is saved again.

    Returns:
        The plan, None when it cannot be made; what is wrong; and what a user should know.

    Raises:
        InputError: not readable (E101), no JSON object, or of a newer schema (E304).
    """
    try:
        data = read_json(path)
    except InputError as error:
        raise InputError("E304" if error.code == "E307" else error.code, error.message) from error
    version = data.get("schema_version")
    if data.get("schema") == SCHEMA and isinstance(version, int) and version > SCHEMA_VERSION:
        # Refused before it is held against an older schema.
        BitPlan.from_json(data, str(path))
    wrong: list[str] = []
    notes: list[str] = []
    for place, problem, known in _against(data, _schema(), "", 0):
        (wrong if known else notes).append(f"{place or 'the file'}: {problem}")
    rest = {name: value for name, value in data.items() if name != "digest"}
    try:
        key = content_key(rest)
        if data.get("digest") != key:
            wrong.append("digest: it does not match: the file was cut or edited")
        # The rest is looked at all the same, without figures that are none.
        sound = _without_figures(rest)
        plan = BitPlan.from_json({**sound, "digest": content_key(sound)}, str(path))
    except (InputError, ValueError, RecursionError) as error:
        return None, wrong or [str(getattr(error, "message", error))], notes
    return plan, [*wrong, *_inner(plan, data)], notes


def _without_figures(body: Mapping[str, Any]) -> Mapping[str, Any]:
    """The body of a plan, without its predictions where one of them is no number."""
    predicted = body.get("predicted")
    try:
        if isinstance(predicted, Mapping):
            Predicted.from_json(predicted)
        return body
    except (ValueError, TypeError, AttributeError):
        return {**body, "predicted": {}}


def check_model(plan: BitPlan, layers: Layers, digest: str) -> Iterator[str]:
    """Yield what of a plan is not as in a model: its digest, layers that only one of them has, shapes and types."""
    if plan.model.get("digest", "") != digest:
        yield f"the model: its digest is {digest[:12]}…, in the plan {plan.model.get('digest', '')[:12] or 'none'}"
    here = {layer.name: layer for layer in layers}
    planned = {layer.whole.name: layer.whole for layer in plan.layers}
    kept = {tensor.name for tensor in plan.layers.excluded}
    yield from (f"{name}: the model has no such layer" for name in planned if name not in here)
    yield from (f"{name}: the plan does not name it" for name, layer in here.items()
                if name not in planned and layer.tensor not in kept and layer.kind != "kv_cache")  # fmt: skip
    for name, layer in planned.items():
        other = here.get(name)
        for what in ("kind", "shape", "out_axis", "dtype", "shared") if other else ():
            mine, theirs = getattr(layer, what), getattr(other, what)
            if mine != theirs:
                yield f"{name}: {what} is {mine} in the plan and {theirs} in the model"


def _inner(plan: BitPlan, data: Mapping[str, Any]) -> Iterator[str]:
    """What a schema cannot say: formats that do not fit, sizes that do not add up."""
    for layer, tensor in zip(plan.layers, data["tensors"], strict=True):
        if problem := plan.formats[layer.name].refuses(layer):
            yield f"{layer.name}: {plan.formats[layer.name]}: {problem}"
        elif tensor.get("bytes") != (size := plan.formats[layer.name].bytes(layer)):
            yield f"{layer.name}: {tensor.get('bytes')} bytes are written, {plan.formats[layer.name]} takes {size}"
        if tensor.get("name") != layer.tensor:
            yield f"{layer.name}: its tensor is written as '{tensor.get('name')}' and is '{layer.tensor}'"
    yield from _ties(plan.layers, plan)
    for what, written, real in (
        ("model.weights", data["model"].get("weights"), plan.layers.weights),
        ("predicted.bytes", data["predicted"].get("bytes"), plan.bytes),
    ):
        if written != real:
            yield f"{what}: {written} is written, the tensors make {real}"


def _ties(layers: Layers, plan: BitPlan) -> Iterator[str]:
    for row in layers.decisions:
        formats = [str(plan.formats[layer.name]) for layer in row.layers]
        if len(set(formats)) > 1:
            yield f"{row.layers[0].name}: tied layers have several formats: {_told(row.layers, formats)}"


def _told(layers: tuple[Layer, ...], formats: list[str]) -> str:
    return ", ".join(f"{layer.name} {text}" for layer, text in zip(layers, formats, strict=True))


@lru_cache(maxsize=1)
def _schema() -> Mapping[str, Any]:
    text = files("mpsearch.exports").joinpath("plan.schema.json").read_text(encoding="utf-8")
    schema: Mapping[str, Any] = json.loads(text)
    return schema


def _against(value: Any, schema: Mapping[str, Any], place: str, depth: int) -> Iterator[tuple[str, str, bool]]:
    """Yield (place, what is wrong, whether it is that and not only unknown) by the words of the plan's schema."""
    if depth > _DEPTH:
        yield place, "is nested too deeply", True
        return
    if "$ref" in schema:
        named = _schema()["$defs"][schema["$ref"].removeprefix("#/$defs/")]
        yield from _against(value, named, place, depth + 1)
    wanted = schema.get("type")
    if wanted is not None:
        kinds = [wanted] if isinstance(wanted, str) else wanted
        fits = any(isinstance(value, _TYPES[kind]) for kind in kinds)
        if not fits or (isinstance(value, bool) and "boolean" not in kinds):
            yield place, f"is {_shown(value)}, expected {' or '.join(kinds)}", True
            return
    yield from ((place, problem, True) for problem in _alone(value, schema))
    if isinstance(value, dict):
        yield from _members(value, schema, place, depth)
    if isinstance(value, list) and "items" in schema:
        for i, item in enumerate(value):
            name = item.get("layer", item.get("name")) if isinstance(item, dict) else None
            where = f"{place}[{name if isinstance(name, str) else i}]"
            yield from _against(item, schema["items"], where, depth + 1)


def _alone(value: Any, schema: Mapping[str, Any]) -> Iterator[str]:
    """What is wrong with a value in itself."""
    if "const" in schema and (value != schema["const"] or isinstance(value, bool)):
        yield f"is {_shown(value)}, expected {schema['const']!r}"
    if "enum" in schema and value not in schema["enum"]:
        yield f"is {_shown(value)}, expected one of {', '.join(schema['enum'])}"
    if "minimum" in schema and value < schema["minimum"]:
        yield f"is {_shown(value)}, expected at least {schema['minimum']}"
    if "pattern" in schema and not re.search(schema["pattern"], value[:1000]):
        yield f"is {_shown(value)}, which is not of the form that it should have"
    size = len(value) if isinstance(value, (str, list)) else 0
    least = schema.get("minLength", schema.get("minItems", 0))
    if size < least or size > schema.get("maxItems", size):
        yield f"has {size} {'characters' if isinstance(value, str) else 'entries'}, expected {least} or more"


def _members(
    value: Mapping[str, Any], schema: Mapping[str, Any], place: str, depth: int
) -> Iterator[tuple[str, str, bool]]:
    known = schema.get("properties", {})
    other = schema.get("additionalProperties", True)
    dot = f"{place}." if place else ""
    yield from ((f"{dot}{name}", "is missing", True) for name in schema.get("required", ()) if name not in value)
    for name, inner in value.items():
        if name in known:
            yield from _against(inner, known[name], f"{dot}{name}", depth + 1)
        elif isinstance(other, dict):
            yield from _against(inner, other, f"{dot}{name}", depth + 1)
        elif other is False:
            yield f"{dot}{name[:60]}", "this version does not know it and passes over it", False


def _shown(value: Any) -> str:
    text = repr(value) if isinstance(value, (str, int, float, type(None))) else type(value).__name__
    return text if len(text) <= 60 else f"{text[:60]}…"
