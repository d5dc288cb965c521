"""The ExLlamaV3 export: refused unless the bits alone are wanted, then a recipe of exact names."""

from __future__ import annotations

import fnmatch
import re
import subprocess
from collections.abc import Mapping, Sequence
from pathlib import Path

import pytest
import yaml

from mpsearch.errors import InputError
from mpsearch.exports.exllamav3 import ExLlamaV3, key
from mpsearch.format import Format
from mpsearch.layer import Layer, Layers
from mpsearch.plan import BitPlan
from mpsearch.testing.exporters import ExporterSuite

HOSTILE = (
    "a.*b",
    "a?b",
    "a[0]",
    "a]",
    "[a-z]",
    "qu'o\"te",
    "na\\me",
    "on",
    "1",
    "{x}: &y",
    "层",
    "x" * 300,
    "../up",
    "azb",
)


def plan_of(formats: Mapping[str, str]) -> BitPlan:
    kinds = {"embed": "embedding", "wpe": "embedding"}
    layers = Layers(tuple(Layer(x, kinds.get(x, "linear"), (128, 128), dtype="bfloat16") for x in formats))
    return BitPlan(layers, {name: Format.parse(text) for name, text in formats.items()})


def bits_of(name: str, recipe: Mapping[str, int]) -> list[int]:
    """All entries that ExLlamaV3 1.6.5 takes for a tensor: exact ones, and patterns of those with ``*?[``."""
    return [
        value
        for entry, value in recipe.items()
        if (re.match(fnmatch.translate(entry), name) if any(c in entry for c in "*?[") else entry == name)
    ]


class TestExLlamaV3(ExporterSuite):
    @pytest.fixture
    def exporter(self) -> ExLlamaV3:
        return ExLlamaV3(nominal=True)

    @pytest.fixture
    def plan(self) -> BitPlan:
        formats = {
            "layers.2.fc": "int3-g64", "layers.10.fc": "int8-channel", "a": "bf16", "lm_head": "int6-g32",
            "embed": "bf16",
        }  # fmt: skip
        return plan_of(formats)

    @pytest.fixture
    def refused(self) -> tuple[BitPlan, Sequence[str]]:
        formats = {
            "inputs": "int4-g32@int8-token",
            "wide": "fp32",
            "a\x00b": "int4-g32",
            "embed": "int4-g32",
            "wpe": "bf16",
        }
        return plan_of(formats), [*list(formats)[:3], "wpe"]

    def read_back(self, folder: Path, plan: BitPlan) -> Mapping[str, str]:
        recipe = yaml.safe_load((folder / "recipe.yaml").read_text(encoding="utf-8"))
        script = (folder / "run.sh").read_text().split()
        bits = {**recipe["tensors"], "lm_head": recipe["head_bits"]}
        bits["embed"] = int(script[script.index("--embed_bits") + 1])
        assert list(recipe["tensors"]) == ["a", "layers.2.fc", "layers.10.fc"]
        assert recipe["target_bpw"] == 5.5
        # The format's name is not in a recipe; its bits are all that is read back.
        texts = {str(fmt.weight.bits): str(fmt) for fmt in plan.formats.values()}
        return {name: texts[str(bits[name])] for name in plan.formats}


def test_without_nominal_every_quantised_layer_is_refused(tmp_path: Path) -> None:
    plan = plan_of({"a": "int4-g64", "b": "bf16", "c": "nf4-b64"})
    found = ExLlamaV3().refuses(plan)
    assert [line.partition(":")[0] for line in found] == ["a", "c"]
    assert all("set nominal=true" in line for line in found)
    with pytest.raises(InputError) as caught:
        ExLlamaV3().write(plan, tmp_path / "out")
    assert caught.value.code == "E301"
    assert "the bits of 2 layers are taken over" in ExLlamaV3(nominal=True).notes(plan)[0]


def test_every_entry_matches_its_own_layer_alone() -> None:
    text = ExLlamaV3(nominal=True).texts(plan_of(dict.fromkeys(HOSTILE, "int4-g64")))["recipe.yaml"]
    recipe = yaml.safe_load(text)["tensors"]
    assert len(recipe) == len(HOSTILE)
    assert all(bits_of(name, recipe) == [4] for name in HOSTILE)
    for name in HOSTILE:
        assert [other for other in HOSTILE if bits_of(other, {key(name): 4})] == [name]


def test_a_head_that_shares_the_embedding_has_its_bits() -> None:
    embed = Layer("embed", "embedding", (128, 128), shared=("lm_head",))
    layers = Layers((embed, Layer("fc", "linear", (128, 128))))
    plan = BitPlan(layers, {"embed": Format.parse("int6-g32"), "fc": Format.parse("int4-g32")})
    texts = ExLlamaV3(nominal=True).texts(plan)
    assert "head_bits: 6\n" in texts["recipe.yaml"]
    assert "--head_bits 6 --embed_bits 6" in texts["run.sh"]
    with pytest.raises(InputError, match="neither head nor embedding"):
        ExLlamaV3(nominal=True).texts(plan_of({"lm_head": "bf16"}))


def test_the_command_gives_the_conversion_its_recipe(tmp_path: Path) -> None:
    ExLlamaV3(nominal=True, source="/it's here").write(plan_of({"fc": "int4-g64"}), tmp_path / "out")
    shown = tmp_path / "python"
    shown.write_text('#!/bin/sh\nfor x in "$@"; do printf "%s\\n" "$x"; done\n')
    shown.chmod(0o755)
    line = ["sh", str(tmp_path / "out" / "run.sh")]
    env = {"PATH": "/usr/bin:/bin", "PYTHON": str(shown)}
    done = subprocess.run([*line, "m m", "o", "w", "-d", "1"], capture_output=True, text=True, check=True, env=env)
    assert done.stdout.split("\n")[:-1] == [
        "-m", "exllamav3.conversion.convert_model", "-i", "m m", "-o", "o", "-w", "w", "--recipe",
        str(tmp_path / "out" / "recipe.yaml"), "--head_bits", "16", "--embed_bits", "16", "-d", "1",
    ]  # fmt: skip
    failed = subprocess.run(line, capture_output=True, text=True, check=False, env=env)
    assert failed.returncode == 2
    assert "MODEL was /it's here" in failed.stderr
