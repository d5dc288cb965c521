"""The plan file: what `BitPlan` writes keeps the published schema, and the page explains every field."""

from __future__ import annotations

import json
from importlib.resources import files
from pathlib import Path
from typing import Any

import jsonschema
import pytest

from mpsearch.format import Format
from mpsearch.layer import Excluded, Layer, Layers
from mpsearch.plan import BitPlan, Predicted

ROOT = Path(__file__).resolve().parents[1]
SCHEMA = json.loads(files("mpsearch.exports").joinpath("plan.schema.json").read_text(encoding="utf-8"))


def plan_of(text: str) -> BitPlan:
    layers = Layers(
        (
            Layer("model.embed", "embedding", (7, 480), 0, "bfloat16", 0, "", ("head",)),
            Layer("model.up", "linear", (480, 8), 1, "float16", 3840, "model.{up,gate}"),
        ),
        (Excluded("model.norm.weight", (480,), "float32", "1-D norm or bias vector"),),
    )
    formats = {"model.embed": Format.parse(text), "model.up": Format.parse("int8-channel")}
    model = {"name": "net", "digest": "ab12", "architecture": "Net"}
    predicted = Predicted(0.25, 0.01, "nats/token", 0.24, 0.04, {"weights": 1000.0, "bops": 1.5})
    return BitPlan(layers, formats, model, predicted, {"study": "s", "budgets": ["weights <= 4 bits"]})


def schema_errors(data: Any) -> list[str]:
    return [error.message for error in jsonschema.Draft202012Validator(SCHEMA).iter_errors(data)]


INTEGERS = [
    f"int{bits}-{grain}{asym}"
    for bits in range(2, 9)
    for grain in ("tensor", "channel", "g1", "g480")
    for asym in ("", "-asym")
]
PLANS = [
    *map(plan_of, [*INTEGERS, "bf16", "fp16", "fp32"]),
    BitPlan(Layers((), (Excluded("scale", (), "float64", "a number"),), "sample"), {}),
]


def test_the_schema_is_a_schema() -> None:
    jsonschema.Draft202012Validator.check_schema(SCHEMA)


@pytest.mark.parametrize("plan", PLANS, ids=range(len(PLANS)))
def test_plans_keep_the_schema(plan: BitPlan, tmp_path: Path) -> None:
    plan.save(tmp_path / "plan.json")
    assert schema_errors(json.loads((tmp_path / "plan.json").read_text())) == []


@pytest.mark.parametrize(
    ("path", "value"),
    [
        (("schema",), "other"),
        (("schema_version",), 2),
        (("digest",), "abc"),
        (("extra",), 1),
        (("model", "weights"), -1),
        (("model", "macs_per"), "hour"),
        (("model", "name"), 3),
        (("tensors", 0, "format"), "int4 g128"),
        (("tensors", 0, "format"), "@int8-token"),
        (("tensors", 0, "format"), "int4-"),
        (("tensors", 0, "bytes"), 1.5),
        (("tensors", 0, "shape"), []),
        (("tensors", 0, "shape"), [0, 4]),
        (("tensors", 0, "stored_dtype"), "int8"),
        (("tensors", 0, "extra"), ""),
        (("kept", 0, "dtype"), "complex64"),
        (("predicted", "loss"), "low"),
        (("predicted", "cost"), {"weights": "1 GiB"}),
        (("predicted", "bytes"), None),
    ],
)
def test_the_schema_refuses(path: tuple[Any, ...], value: Any) -> None:
    data = plan_of("int4-g32").to_json()
    place: Any = data
    for key in path[:-1]:
        place = place[key]
    place[path[-1]] = value
    assert schema_errors(data)


def properties(schema: Any) -> set[str]:
    """Every field name of a schema."""
    if isinstance(schema, list):
        return set().union(*map(properties, schema))
    if not isinstance(schema, dict):
        return set()
    own = set(schema.get("properties", {}))
    return own.union(*(properties(value) for value in schema.values()))


def test_every_field_of_the_plan_file_is_required_and_explained() -> None:
    page = (ROOT / "docs/plan-schema.md").read_text()
    assert [name for name in sorted(properties(SCHEMA)) if f"| `{name}` |" not in page] == []
    data, parts = plan_of("int4-g32").to_json(), SCHEMA["$defs"]
    pairs = [
        (SCHEMA, data),
        (parts["tensor"], data["tensors"][0]),
        (parts["kept"], data["kept"][0]),
        (parts["predicted"], data["predicted"]),
    ]
    for schema, part in pairs:
        assert set(schema["required"]) == set(part)
