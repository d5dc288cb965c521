"""The AutoRound export: every linear layer by its exact name; the script stops before a name becomes a pattern."""

from __future__ import annotations

import json
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import pytest
from torch import nn

from mpsearch.exports.autoround import AutoRound
from mpsearch.format import Format
from mpsearch.layer import Excluded, Layer, Layers
from mpsearch.plan import BitPlan
from mpsearch.testing.exporters import ExporterSuite
from tests.test_export_gptqmodel import FORMATS, HOSTILE, made

SYMMETRIC = {name: text.replace("-asym", "") for name, text in FORMATS.items()}


def read(folder: Path) -> dict[str, dict[str, Any]]:
    found: dict[str, dict[str, Any]] = json.loads((folder / "layer_config.json").read_text(encoding="utf-8"))
    return found


class TestAutoRound(ExporterSuite):
    @pytest.fixture
    def exporter(self) -> AutoRound:
        return AutoRound()

    @pytest.fixture
    def plan(self) -> BitPlan:
        return made({name: text.removesuffix("-mse").removesuffix("-full") for name, text in SYMMETRIC.items()})

    @pytest.fixture
    def refused(self) -> tuple[BitPlan, Sequence[str]]:
        formats = {
            Layer("code", "linear", (64, 64)): "nf4-b64",
            Layer("nine", "linear", (64, 64)): "int6-g32",
            Layer("zeros", "linear", (64, 64)): "int4-g32-asym",
            Layer("rows", "linear", (61, 64)): "int4-g32",
            Layer("uneven", "linear", (64, 256)): "int4-g96",
            Layer("turned", "linear", (64, 64), 1): "int4-g32",
            Layer("embed", "embedding", (64, 64)): "int8-channel",
            Layer("cache", "kv_cache", (2, 16)): "kv-int8-token",
            Layer("cast", "linear", (64, 64)): "fp16",
        }
        plan = BitPlan(Layers(tuple(formats)), {layer.name: Format.parse(text) for layer, text in formats.items()})
        return plan, [layer.name for layer in formats]

    def read_back(self, folder: Path, plan: BitPlan) -> Mapping[str, str]:
        found = {}
        for name, entry in read(folder).items():
            grain = "channel" if entry.get("group_size") == -1 else f"g{entry.get('group_size')}"
            found[name] = "bf16" if entry["bits"] == 16 else f"int{entry['bits']}-{grain}"
        return {layer.name: found.pop(layer.name) for layer in plan.layers}


def test_the_file_is_what_autoround_documents(tmp_path: Path) -> None:
    kept = (Excluded("router.weight", (4, 64), "bfloat16", "router"), Excluded("norm.weight", (4,), "bfloat16", "1-D"))
    AutoRound().write(made({"fc.10": "int3-g64-mse", "fc.9": "int8-channel", "head": "bf16"}, kept=kept), tmp_path)
    left = {"bits": 16, "data_type": "float", "act_bits": 16, "act_data_type": "float"}
    assert list(read(tmp_path)) == ["fc.9", "fc.10", "head", "router"]
    assert read(tmp_path) == {
        "fc.9": {"bits": 8, "group_size": -1, "sym": True, "data_type": "int", "act_bits": 16},
        "fc.10": {"bits": 3, "group_size": 64, "sym": True, "data_type": "int", "act_bits": 16},
        "head": left,
        "router": left,
    }


class Small(nn.Module):
    """Layers whose names are parts of one another, and a head that shares the embedding's weight."""

    def __init__(self) -> None:
        super().__init__()
        self.embed = nn.Embedding(8, 8)
        self.fc = nn.Linear(8, 8)
        self.fc_gate = nn.Linear(8, 8)
        self.head = nn.Linear(8, 8, bias=False)
        self.head.weight = self.embed.weight

    def get_input_embeddings(self) -> nn.Module:
        return self.embed


def checked(folder: Path, planned: Mapping[str, Any]) -> dict[str, Any]:
    """Run the script's own look at the names."""
    space: dict[str, Any] = {"__name__": "run", "__file__": str(folder / "run.py")}
    exec(compile((folder / "run.py").read_text(encoding="utf-8"), "run.py", "exec"), space)
    found: dict[str, Any] = space["checked"](Small(), planned)
    return found


def test_the_script_stops_before_a_name_becomes_a_pattern(tmp_path: Path) -> None:
    AutoRound(source='it\'s "a" \\ folder').write(
        made({"fc": "int4-g32", "fc_gate": "int8-g32", "embed": "bf16"}), tmp_path
    )
    planned = read(tmp_path)
    # Neither the embedding nor the head that is tied to it is named to AutoRound.
    assert set(checked(tmp_path, {**planned, "head": {"bits": 16}})) == {"fc", "fc_gate"}
    with pytest.raises(SystemExit, match="no linear layers of this model, and so patterns to AutoRound: fc_"):
        checked(tmp_path, {**planned, "fc_": {"bits": 8}})
    with pytest.raises(SystemExit, match="linear layers that the plan does not know, so another model: fc_gate"):
        checked(tmp_path, {"fc": planned["fc"]})


def test_rounding_rules_that_it_does_not_have_are_said() -> None:
    assert any(
        note.startswith("fc: measured with -mse or -gptq") for note in AutoRound().notes(made({"fc": "int4-g32-gptq"}))
    )


def test_hostile_names_are_only_data(tmp_path: Path) -> None:
    AutoRound().write(made(dict.fromkeys(HOSTILE, "int4-g32")), tmp_path / "out")
    assert set(read(tmp_path / "out")) == set(HOSTILE)
    assert {path.parent for path in tmp_path.rglob("*") if path.is_file()} == {tmp_path / "out"}
    assert not any(name in (tmp_path / "out" / "run.py").read_text(encoding="utf-8") for name in ("../../up", "пример"))
    (line,) = AutoRound().refuses(made({"fc\u2028": "int4-g32"}))
    assert "names that cannot be printed" in line
