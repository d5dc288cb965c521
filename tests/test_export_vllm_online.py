"""The export for vLLM's online quantisation: a target for every layer, which matches that layer alone."""

from __future__ import annotations

import fnmatch
import json
import re
import subprocess
from collections.abc import Mapping, Sequence
from pathlib import Path

import pytest

from mpsearch.errors import InputError
from mpsearch.exports.vllm_online import SHORTHANDS, VllmOnline, entry
from mpsearch.format import Format
from mpsearch.layer import Layer, Layers
from mpsearch.plan import BitPlan
from mpsearch.testing.exporters import ExporterSuite

HOSTILE = (
    "a.*b",
    "a?b",
    "a[0]",
    "re:.*",
    "qu'o\"te",
    "na\\me",
    "$(touch x)",
    "层",
    "x" * 300,
    "../up",
    "fc",
    "a.fc",
    "azb",
)


def plan_of(formats: Mapping[str, str]) -> BitPlan:
    layers = Layers(tuple(Layer(name, "linear", (128, 128)) for name in formats))
    return BitPlan(layers, {name: Format.parse(text) for name, text in formats.items()})


def matches(name: str, target: str) -> bool:
    """Whether vLLM 0.33 takes a target for a layer, as its `is_equal_or_regex_match` does for online targets."""
    if target.startswith("re:"):
        return re.match(target[3:], name) is not None
    return name == target or (any(c in target for c in "*?[") and fnmatch.fnmatch(name, target))


class TestVllmOnline(ExporterSuite):
    @pytest.fixture
    def exporter(self) -> VllmOnline:
        return VllmOnline()

    @pytest.fixture
    def plan(self) -> BitPlan:
        texts = (
            "fp8-e4m3@fp8-e4m3-token", "fp8-e4m3-channel@fp8-e4m3-token", "fp8-e4m3-b128x128@fp8-e4m3-g128", "mxfp4",
            "mxfp8-e4m3", "fp32",
        )  # fmt: skip
        return plan_of({**{f"layers.{i}.fc": text for i, text in enumerate(texts)}, "lm_head": "fp32"})

    @pytest.fixture
    def refused(self) -> tuple[BitPlan, Sequence[str]]:
        formats = {
            "four": "int4-g32", "lm_head": "mxfp4", "inputs": "mxfp4@mxfp8-e4m3", "q_proj": "mxfp4", "k_proj": "mxfp4",
            "v_proj": "fp32", "alone": "fp8-e4m3-channel",
        }  # fmt: skip
        return plan_of(formats), ["four", "lm_head", "inputs", "alone", "q_proj"]

    def read_back(self, folder: Path, plan: BitPlan) -> Mapping[str, str]:
        body = json.loads((folder / "quantization-config.json").read_text())
        assert set(body) == {"targets", "ignore"}
        weights = {value: key for key, value in SHORTHANDS.items()}
        inputs = {"fp8_per_block": "@fp8-e4m3-g128", "fp8_per_tensor": "@fp8-e4m3-token"}
        inputs["fp8_per_channel"] = inputs["fp8_per_tensor"]
        found = {}
        for layer in plan.layers:
            (text, *more) = [value for key, value in body["targets"].items() if matches(layer.name, key)] or ["fp32"]
            assert not more
            assert (text == "fp32") == any(matches(layer.name, key) for key in body["ignore"])
            found[layer.name] = weights.get(text, text) + inputs.get(text, "")
        return found


def test_every_target_matches_its_own_layer_alone() -> None:
    for name in HOSTILE:
        assert [other for other in HOSTILE if matches(other, entry(name))] == [name]


def test_a_plan_that_quantises_nothing_is_refused(tmp_path: Path) -> None:
    with pytest.raises(InputError, match="needs a layer to quantise") as caught:
        VllmOnline().write(plan_of({"fc": "fp32"}), tmp_path / "out")
    assert caught.value.code == "E301"
    assert list(tmp_path.iterdir()) == []


@pytest.mark.parametrize("given", [[], ["other $model", "--port", "1"]])
def test_the_command_gives_vllm_the_configuration(given: list[str], tmp_path: Path) -> None:
    plan = plan_of(dict.fromkeys(HOSTILE, "mxfp4"))
    VllmOnline(source='/it\'s "here"').write(plan, tmp_path / "out")
    shown = tmp_path / "vllm"
    shown.write_text('#!/bin/sh\nfor x in "$@"; do printf "%s\\0" "$x"; done\n')
    shown.chmod(0o755)
    done = subprocess.run(
        ["sh", str(tmp_path / "out" / "run.sh"), *given], capture_output=True, text=True, check=True, cwd=tmp_path,
        env={"PATH": "/usr/bin:/bin", "VLLM": str(shown)},
    )  # fmt: skip
    words = done.stdout.split("\0")[:-1]
    assert words[:2] == ["serve", given[0] if given else '/it\'s "here"']
    assert words[2:5] == ["--quantization", "online", "--quantization-config"]
    assert len(json.loads(words[5])["targets"]) == len(HOSTILE)
    assert words[6:] == given[1:]
    assert not (tmp_path / "x").exists()
