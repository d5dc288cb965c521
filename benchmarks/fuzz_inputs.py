"""Inputs that are nearly right: a corpus of good files, and bytes and values changed at random."""

from __future__ import annotations

import contextlib
import copy
import io
import json
import math
import random
import re
import struct
import tomllib
from collections.abc import Callable
from typing import Any

from mpsearch.format import Format
from mpsearch.hardware.kernel import Kernel, KernelTime
from mpsearch.hardware.profile import Profile, Whole
from mpsearch.keys import content_key
from mpsearch.layer import Layer, Layers
from mpsearch.plan import BitPlan, Predicted
from mpsearch.workload import Step

STUDY = b"""# A study.
name = "small"
model = "bundled:tiny-llama"
calibration = "stdlib:calibration"
validation = "stdlib:validation"
formats = ["int2-g64", "int4-g64", "int8-channel", "mxfp4", "nf4-b64"]
activations = ["16", "int8-token"]
budgets = ["weights <= 4.25 bits", "memory <= 8 GiB at context 8192"]
estimator = {name = "divergence"}
solver = "auto"
pins = {"lm_head" = "int8-channel", "model.layers.*.mlp.*" = "int4-g64"}
protect = "activation_spikes > 6.68"
ties = [["a", "b"], ["c"]]
tokens = 8192
seed = 3
cautious = 1.645
clamp = true
storage = "sqlite:///mpsearch.db"

[rules]
at_most = {"int2-g64" = 4}

[[rules.families]]
rows = ["*.down_proj"]
resource = "bytes"
limit = 1000000
"""
CSV = b"row,format,loss,spread,bytes\na,int2,3.0,0.1,1\na,int4,1.0,0.1,2\nb,int2,2.0,,1\nb,int4,0.5,0.05,2\n"
WIDE = b'row,int2,int4,int8\na,3,1,0.2\nb,2,,1e-3\n"c,d",nan,inf,0\n'
RULES = b'pins = {"a" = "int4"}\nat_most = {"int2" = 1}\n[[families]]\nrows = ["*"]\nresource = "bytes"\nlimit = 3\n'
LINES = b'{"text": "one two three"}\n\n{"text": "four \\u00e9\\n five", "id": 7}\n{"text": "six"}\n'
TEXT = "A text.\nTwo lines — and a word that is not ASCII: Größe.\n".encode()
LATENCY = b"layer,format,tokens,ms,low,high\nfc,int4-g64,1,0.5,0.4,0.6\nfc,int8-g64,1,0.9,0.8,1.0\n"

#: What stands in for a number or a text, and is likely to be handled wrongly.
NASTY = (
    "0", "-1", "1e999", "-0.0", "nan", "NaN", "inf", "-inf", "Infinity", "1e308", "5e-324", "9" * 400, "1_000",
    "9223372036854775808", "1e99999999", "1/0", "true", "null", '""', "[]", "{}", "''", "\\u0000", "\\ud800", "\x00",
    "\x1b[31m", "\u202e", "../../x", "/etc/passwd", "*", "[", "%s", "{0}", "$(x)", "'; DROP TABLE value; --", "💥",
    "é", "١٢٣", "１２", "0x10", "010", "4:30", "no", "[" * 3000, "{" * 3000, "a" * 3000, "(" * 200, " ", "\r", "\t",
    "\ufeff", "<=", "!!python", "weights <= 1e99999999 bits", "weights <= 1/0 bits", "int4-g0",
    "int99-g64", "int4-g99999999999999",
    "tpot <= 1 ms at context 1e9", "bytes", "\ud800",
)  # fmt: skip
#: Values that stand in for one in a tree of values.
ODD: tuple[Any, ...] = (
    None, True, False, 0, -1, 1, 2**31, 2**63, -(2**63) - 1, 10**400, 0.0, -0.0, 0.5, 1e308, 5e-324, math.nan, math.inf,
    -math.inf, "", [], {}, [[]], [{}], {"": None}, [1, "a", None], *NASTY,
)  # fmt: skip


def plan() -> BitPlan:
    """A plan with everything in it that a plan can have."""
    layers = Layers((Layer("fc", "linear", (8, 64)), Layer("head", "linear", (16, 64), tie="t")))
    formats = {"fc": Format.parse("int4-g64"), "head": Format.parse("int8-channel")}
    predicted = Predicted(0.25, 0.01, "nats/token", 0.2, 0.2, {"weights": 1040.0, "tpot at context 8": 1e-3})
    return BitPlan(layers, formats, {"name": "m", "digest": "ab" * 32}, predicted, {"budgets": ["weights <= 4 bits"]})


def profile() -> Profile:
    kernel = Kernel("linear", 8, 64, "int4-g64", 1)
    whole = Whole(Step(1), "plan", 1e-3, 2e-3, 1.9e-3, 2.1e-3)
    return Profile("roofline", {}, {"machine": "m"}, (KernelTime(kernel, 1e-6, 9e-7, 2e-6, 11),), (whole,))


def safetensors() -> bytes:
    header = {
        "__metadata__": {"format": "pt"},
        "a.weight": {"dtype": "F32", "shape": [2, 4], "data_offsets": [0, 32]},
        "b.weight": {"dtype": "BF16", "shape": [3], "data_offsets": [32, 38]},
        "c": {"dtype": "F32", "shape": [], "data_offsets": [38, 42]},
    }
    text = json.dumps(header).encode()
    return struct.pack("<Q", len(text)) + text + bytes(42)


def gguf() -> bytes:
    def text(value: str) -> bytes:
        return struct.pack("<Q", len(value)) + value.encode()

    head = b"GGUF" + struct.pack("<IQQ", 3, 2, 4)
    head += text("general.alignment") + struct.pack("<II", 4, 32)
    head += text("general.name") + struct.pack("<I", 8) + text("m")
    head += text("tokens") + struct.pack("<IIQ", 9, 8, 2) + text("a") + text("bc")
    head += text("scores") + struct.pack("<IIQ", 9, 6, 3) + bytes(12)
    head += text("a.weight") + struct.pack("<IQQIQ", 2, 32, 2, 8, 0)
    head += text("b.weight") + struct.pack("<IQIQ", 1, 4, 0, 96)
    return head + bytes(-len(head) % 32) + bytes(112)


def parquet() -> bytes:
    import pyarrow
    import pyarrow.parquet

    stream = io.BytesIO()
    table = pyarrow.table({"row": ["a", "a", "b", "b"], "format": ["x", "y"] * 2, "loss": [3.0, 1.0, 2.0, None]})
    pyarrow.parquet.write_table(table, stream)
    return stream.getvalue()


def corpus() -> dict[str, bytes]:
    """Good files, by the names that they are read under."""
    wide = {"rows": ["a", "b"], "formats": ["x", "y"], "loss": [[3, 1], [2, 0.5]], "cost": {"bytes": [[1, 2], [1, 2]]}}
    records = [
        {"row": "a", "format": "x", "loss": 1.0, "bytes": 2},
        {"row": "a", "format": "y", "loss": 0.5, "bytes": 4},
    ]
    rows = {"fused": True, "rows": [{"rows": 8, "columns": 64, "format": "int4-g64", "tokens": 1, "us": 3.0}]}
    return {
        "study.toml": STUDY,
        "rules.toml": RULES,
        "model.safetensors": safetensors(),
        "model.gguf": gguf(),
        "long.csv": CSV,
        "wide.csv": WIDE,
        "matrices.json": json.dumps(wide).encode(),
        "records.json": json.dumps(records).encode(),
        "table.parquet": parquet(),
        "plan.json": json.dumps(plan().to_json(), indent=1).encode(),
        "profile.json": json.dumps(profile().to_json(), indent=1).encode(),
        "latency.csv": LATENCY,
        "latency.json": json.dumps(rows).encode(),
        "calibration.jsonl": LINES,
        "calibration.txt": TEXT,
    }


def reshaped(name: str, data: bytes, rng: random.Random) -> bytes:
    """Change values of a file that holds a tree of them: another value, a key fewer, more, or called otherwise."""
    kind = name.rpartition(".")[2]
    if kind == "safetensors":
        (length,) = struct.unpack("<Q", data[:8])
        text = reshaped("x.json", data[8 : 8 + length], rng)
        return struct.pack("<Q", len(text)) + text + data[8 + length :]
    if kind not in ("toml", "json"):
        return mutated(data, rng)
    tree = tomllib.loads(data.decode()) if kind == "toml" else json.loads(data)
    for _ in range(rng.choice((1, 1, 1, 2, 4))):
        _bend(tree, rng)
    if name == "plan.json" and rng.random() < 0.7:
        # A digest that matches, so that what is behind it is looked at too.
        with contextlib.suppress(ValueError, AttributeError):
            tree["digest"] = content_key({key: value for key, value in tree.items() if key != "digest"})
    text = toml(tree) if kind == "toml" else json.dumps(tree)
    return text.encode("utf-8", "surrogatepass")


def _bend(tree: Any, rng: random.Random) -> None:
    """Change one place of a tree."""
    places: list[tuple[Any, Any]] = []
    heap = [tree]
    while heap:
        node = heap.pop()
        keys = list(node) if isinstance(node, dict) else range(len(node)) if isinstance(node, list) else []
        places += [(node, key) for key in keys]
        heap += [node[key] for key in keys]
    if not places:
        return
    node, key = rng.choice(places)
    way = rng.random()
    if way < 0.7:
        node[key] = copy.deepcopy(rng.choice(ODD))
    elif way < 0.8:
        del node[key]
    elif way < 0.9 and isinstance(node, dict):
        node[str(rng.choice(ODD))] = node.pop(key)
    else:
        other, place = rng.choice(places)
        node[key] = copy.deepcopy(other[place]) if place in other or isinstance(other, list) else None


def toml(tree: Any, top: bool = True) -> str:
    """Write a tree as TOML, tables in line; None, which TOML lacks, is left out."""
    if isinstance(tree, dict):
        pairs = [f"{_key(key)} = {toml(value, False)}" for key, value in tree.items() if value is not None]
        return "\n".join(pairs) if top else "{" + ", ".join(pairs) + "}"
    if isinstance(tree, list):
        return "[" + ", ".join(toml(value, False) for value in tree if value is not None) + "]"
    if isinstance(tree, bool):
        return str(tree).lower()
    if isinstance(tree, (int, float)):
        return repr(tree)
    return _key(tree)


def _key(text: str) -> str:
    return json.dumps(text, ensure_ascii=False).replace("\x7f", "\\u007f")


def mutated(data: bytes, rng: random.Random, other: bytes = b"") -> bytes:
    """Change a few places of a file: bits, bytes, words, pieces doubled, cut, moved, or taken from another file."""
    for _ in range(rng.choice((1, 1, 1, 2, 3, 8))):
        data = rng.choice(_CHANGES)(data, rng, other)
    return data[: 2**18]


def _span(data: bytes, rng: random.Random, longest: int = 40) -> tuple[int, int]:
    start = rng.randrange(len(data) + 1)
    return start, min(len(data), start + rng.randrange(1, longest))


def _flip(data: bytes, rng: random.Random, other: bytes) -> bytes:
    if not data:
        return b"\0"
    at = rng.randrange(len(data))
    return data[:at] + bytes([data[at] ^ 1 << rng.randrange(8)]) + data[at + 1 :]


def _put(data: bytes, rng: random.Random, other: bytes) -> bytes:
    start, stop = _span(data, rng)
    return data[:start] + rng.choice(NASTY).encode("utf-8", "surrogatepass") + data[rng.choice((start, stop)) :]


def _value(data: bytes, rng: random.Random, other: bytes) -> bytes:
    """Put a nasty value where a word or a number stands."""
    found = [match.span() for match in re.finditer(rb"[\w.+-]+", data[:4000])]
    if not found:
        return _put(data, rng, other)
    start, stop = rng.choice(found)
    return data[:start] + rng.choice(NASTY).encode("utf-8", "surrogatepass") + data[stop:]


def _cut(data: bytes, rng: random.Random, other: bytes) -> bytes:
    return data[: rng.randrange(len(data) + 1)]


def _drop(data: bytes, rng: random.Random, other: bytes) -> bytes:
    start, stop = _span(data, rng)
    return data[:start] + data[stop:]


def _double(data: bytes, rng: random.Random, other: bytes) -> bytes:
    start, stop = _span(data, rng, 200)
    return data[:stop] + data[start:stop] * rng.choice((1, 1, 50)) + data[stop:]


def _noise(data: bytes, rng: random.Random, other: bytes) -> bytes:
    start, stop = _span(data, rng)
    return data[:start] + rng.randbytes(stop - start) + data[stop:]


def _whole_number(data: bytes, rng: random.Random, other: bytes) -> bytes:
    at = rng.randrange(len(data) + 1)
    number = rng.choice((0, 1, 2**31, 2**32 - 1, 2**62, 2**63, 2**64 - 1, len(data)))
    return data[:at] + struct.pack("<Q", number) + data[at + 8 :]


def _graft(data: bytes, rng: random.Random, other: bytes) -> bytes:
    start, stop = _span(other, rng, 400)
    at = rng.randrange(len(data) + 1)
    return data[:at] + other[start:stop] + data[at:]


_CHANGES: tuple[Callable[[bytes, random.Random, bytes], bytes], ...] = (
    _flip, _put, _value, _value, _value, _cut, _drop, _double, _noise, _whole_number, _graft,
)  # fmt: skip
