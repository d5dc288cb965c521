"""The HQQ export: settings of every layer by its exact name, and what HQQ cannot pack refused."""

from __future__ import annotations

import json
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import pytest

from mpsearch.exports.hqq import Hqq
from mpsearch.format import Format
from mpsearch.layer import Layer, Layers
from mpsearch.plan import BitPlan
from mpsearch.testing.exporters import ExporterSuite


def plan_of(formats: Mapping[str, str], shape: tuple[int, int] = (64, 128)) -> BitPlan:
    layers = Layers(tuple(Layer(name, "linear", shape) for name in formats))
    return BitPlan(layers, {name: Format.parse(text) for name, text in formats.items()})


class TestHqq(ExporterSuite):
    @pytest.fixture
    def exporter(self) -> Hqq:
        return Hqq()

    @pytest.fixture
    def plan(self) -> BitPlan:
        texts = ("int2-g16-asym", "int3-g64-asym", "int4-g32-asym", "int5-channel-asym", "int6-g8-asym", "fp32")
        return plan_of({f"layers.{i}.fc": text for i, text in enumerate(texts)})

    @pytest.fixture
    def refused(self) -> tuple[BitPlan, Sequence[str]]:
        formats = {
            "symmetric": "int4-g32", "seven": "int7-g32-asym", "tensor": "int4-tensor-asym", "code": "nf4-b64",
            "inputs": "int4-g32-asym@int8-token", "half": "bf16", "four": "int4-g4-asym",
        }  # fmt: skip
        return plan_of(formats), list(formats)

    def read_back(self, folder: Path, plan: BitPlan) -> Mapping[str, str]:
        body = json.loads((folder / "hqq.json").read_text())
        found = dict.fromkeys(body["left"], "fp32")
        for name, one in body["layers"].items():
            grain = f"g{one['group_size']}" if one["group_size"] else "channel"
            found[name] = f"int{one['nbits']}-{grain}-asym"
        return found


@pytest.mark.parametrize(
    ("text", "shape", "words"),
    [
        ("int4-channel-asym", (63, 128), "63 groups are no multiple of 2, as 4 bits are packed"),
        ("int2-g128-asym", (66, 128), "66 groups are no multiple of 4, as 2 bits are packed"),
        ("int3-g12-asym", (64, 96), "groups of 12 are no multiple of 8; allowed int3-g32-asym, int3-g16-asym"),
    ],
)
def test_what_hqq_cannot_pack_is_refused(text: str, shape: tuple[int, int], words: str) -> None:
    (line,) = Hqq().refuses(plan_of({"fc": text}, shape))
    assert line.startswith("fc: ")
    assert words in line
    assert Hqq().refuses(plan_of({"fc": text.replace("-g12-", "-g32-")}, (64, 128))) == []


def test_embeddings_and_heads_that_share_their_weight_are_left_alone() -> None:
    embed = Layer("embed", "embedding", (64, 128), shared=("lm_head",))
    kept = BitPlan(Layers((embed,)), {"embed": Format.parse("fp32")})
    assert json.loads(Hqq().texts(kept)["hqq.json"]) == {"layers": {}, "left": ["embed", "lm_head"]}
    wanted = BitPlan(Layers((embed,)), {"embed": Format.parse("int8-g64-asym")})
    (line,) = Hqq().refuses(wanted)
    assert line.startswith("embed: int8-g64-asym is not held by HQQ for this embedding layer")


def test_hostile_names_are_keys_and_nothing_else() -> None:
    names = ("a.*b", 'quo"te', "na\\me", "层", "x" * 300, "../up", "a\nb")
    body = json.loads(Hqq().texts(plan_of(dict.fromkeys(names, "int4-g32-asym")))["hqq.json"])
    assert set(body["layers"]) == set(names)


def test_the_scripts_compile() -> None:
    texts = Hqq(source="it's").texts(plan_of({"fc": "int4-g32-asym"}))
    scope: dict[str, Any] = {"__name__": "run", "__file__": "run.py"}
    exec(compile(texts["run.py"], "run.py", "exec"), scope)
    assert scope["SOURCE"] == "it's"
    compile(texts["load.py"], "load.py", "exec")
