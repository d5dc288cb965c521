"""The MLX export: exact paths, false for what is left alone, a script that sees that every layer was met."""

from __future__ import annotations

import json
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import pytest

from mpsearch.exports.mlx import Mlx, stored_bytes
from mpsearch.format import Format
from mpsearch.layer import Layer
from mpsearch.plan import BitPlan
from mpsearch.registry import make
from mpsearch.testing.exporters import ExporterSuite
from tests.export_plans import HOSTILE, plan_of, script, stand_in

PLAN = {
    "model.embed": "int8-g128-asym", "model.layers.0.q": "int3-g64-asym", "model.layers.0.k": "mxfp4",
    "model.layers.10.q": "int6-g32-asym", "model.layers.9.q": "mxfp8-e4m3", "lm_head": "bf16",
}  # fmt: skip


class TestMlx(ExporterSuite):
    @pytest.fixture
    def exporter(self) -> Mlx:
        return make("exporters", "mlx")

    @pytest.fixture
    def plan(self) -> BitPlan:
        return plan_of(PLAN)

    @pytest.fixture
    def refused(self) -> tuple[BitPlan, Sequence[str]]:
        wrong = {"a": "int4-g64", "b": "int7-g64-asym", "c": "int4-channel-asym", "d": "nvfp4", "e": "int4-g16-asym"}
        return plan_of({**wrong, "f": "fp16", "fine": "int4-g64-asym", "bits": "int4-g64-asym"}), [*"abcdef", "bits"]

    def read_back(self, folder: Path, plan: BitPlan) -> Mapping[str, str]:
        body = json.loads((folder / "quantization.json").read_text(encoding="utf-8"))
        names = {"mxfp4": "mxfp4", "mxfp8": "mxfp8-e4m3"}
        return {
            path: names.get(how["mode"], f"int{how['bits']}-g{how['group_size']}-asym") if how else "bf16"
            for path, how in body.items()
            if isinstance(how, dict | bool)
        }


def test_the_file_is_what_mlx_keeps_in_config_json(tmp_path: Path) -> None:
    make("exporters", "mlx").write(
        plan_of({"l.10": "int4-g64-asym", "l.9": "int3-g128-asym", "head": "bf16"}), tmp_path
    )
    assert (tmp_path / "quantization.json").read_text(encoding="utf-8") == (
        "{\n"
        '  "group_size": 64,\n  "bits": 4,\n  "mode": "affine",\n'
        '  "head": false,\n'
        '  "l.9": {\n    "group_size": 128,\n    "bits": 3,\n    "mode": "affine"\n  },\n'
        '  "l.10": {\n    "group_size": 64,\n    "bits": 4,\n    "mode": "affine"\n  }\n'
        "}\n"
    )


@pytest.mark.parametrize(("text", "dtype", "size"), [
    ("int4-g64-asym", "bfloat16", 128 + 4 * 4), ("int3-g32-asym", "float32", 96 + 8 * 8),
    ("mxfp4", "float16", 128 + 8), ("bf16", "bfloat16", 512),
])  # fmt: skip
def test_bytes_are_those_of_the_files(text: str, dtype: str, size: int) -> None:
    """Figures of mlx.core.quantize: codes in words, a scale and a bias of the weight's type, or a byte per block."""
    assert stored_bytes(Layer("fc", "linear", (1, 256), dtype=dtype), Format.parse(text)) == size


def test_notes_say_bytes_and_rules_that_are_not_kept() -> None:
    notes = make("exporters", "mlx").notes(plan_of({"a": "int4-g64-asym-mse"}))
    assert any(line.startswith("a: measured with") for line in notes)
    assert any(line.startswith("MLX stores 9216 bytes") for line in notes)


def converted(monkeypatch: pytest.MonkeyPatch, folder: Path, out: Path, paths: Sequence[str]) -> dict[str, Any]:
    """Run the script with a stand-in for MLX-LM that has these paths; what each was given."""
    given: dict[str, Any] = {}

    def convert(model: str, to: str, *, quant_predicate: Any, **_: Any) -> None:
        Path(to).mkdir()
        given.update({path: quant_predicate(path, object()) for path in paths})

    stand_in(monkeypatch, "mlx_lm", convert=convert)
    monkeypatch.setattr("sys.argv", ["run.py", "--model", "m", "--out", str(out)])
    script(folder)["main"]()
    return given


def test_the_script_tells_each_layer_and_nothing_else(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    formats = {**dict.fromkeys(HOSTILE, "int4-g64-asym"), "kept": "bf16"}
    make("exporters", "mlx", source="m'\"\\ ").write(plan_of(formats), tmp_path / "out")
    given = converted(monkeypatch, tmp_path / "out", tmp_path / "q", [*formats, "layers", "unknown"])
    four = {"group_size": 64, "bits": 4, "mode": "affine"}
    assert given == {**dict.fromkeys(HOSTILE, four), "kept": False, "layers": False, "unknown": False}
    assert script(tmp_path / "out")["MODEL"] == "m'\"\\ "


def test_a_layer_that_mlx_does_not_have_stops_the_script(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    make("exporters", "mlx").write(plan_of({"a": "int4-g64-asym", "b": "int4-g64-asym"}), tmp_path / "out")
    with pytest.raises(SystemExit, match=r"no such layers .*: b$"):
        converted(monkeypatch, tmp_path / "out", tmp_path / "q", ["a"])
    assert not (tmp_path / "q").exists()


def test_a_tied_head_need_not_be_met(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    make("exporters", "mlx").write(plan_of({"embed": "int4-g64-asym"}, shared=("lm_head",)), tmp_path / "out")
    assert converted(monkeypatch, tmp_path / "out", tmp_path / "q", ["embed"])["embed"]["bits"] == 4
