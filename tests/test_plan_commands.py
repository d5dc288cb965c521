"""``mpsearch plan``: what is wrong is all told at once, differences are exact, and imports can be measured."""

from __future__ import annotations

import copy
import dataclasses
import json
from pathlib import Path
from typing import Any

import jsonschema
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from mpsearch.cli.main import run
from mpsearch.errors import InputError
from mpsearch.format import Format
from mpsearch.imports.checking import check_file, check_model
from mpsearch.keys import content_key
from mpsearch.layer import Excluded, Layer, Layers
from mpsearch.plan import BitPlan, Predicted
from tests.test_export_compressed_tensors import make
from tests.test_plan_schema import SCHEMA, plan_of

torch.set_num_threads(1)


def signed(data: dict[str, Any]) -> dict[str, Any]:
    """Give what was changed its own digest."""
    rest = {name: value for name, value in data.items() if name != "digest"}
    return {**rest, "digest": content_key(rest)}


def written(path: Path, data: Any) -> Path:
    path.write_text(json.dumps(data), encoding="utf-8")
    return path


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return make(tmp_path_factory.mktemp("model"))


@pytest.fixture(scope="module")
def theirs(folder: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A plan file that was imported from the command line."""
    place = tmp_path_factory.mktemp("theirs")
    config = {"quant_method": "gptq", "bits": 4, "group_size": 32, "sym": True, "dynamic": {r"-:.*\.1\..*down": {}}}
    source = written(place / "quantize_config.json", config)
    out = place / "theirs.json"
    command = ["plan", "import", str(source), "--from", "gptqmodel", "--model", str(folder), "--out", str(out)]
    assert run(command) == 0
    return out


def test_an_import_writes_a_plan_and_tells_it(
    folder: Path, theirs: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    plan = BitPlan.load(theirs)
    assert sorted({str(fmt) for fmt in plan.formats.values()}) == ["fp32", "int4-g32"]
    assert plan.cost["weights"] == plan.bytes
    out = tmp_path / "again.json"
    command = ["plan", "import", str(theirs.parent), "--from", "gptqmodel", "--model", str(folder), "--out", str(out)]
    assert run(command) == 0
    printed = capsys.readouterr()
    assert "int4-g32                     13 layers" in printed.out
    assert f"{plan.bytes:,} (" in printed.out
    assert "note: GPTQModel finds codes" in printed.err
    assert out.read_bytes() == theirs.read_bytes()


def test_an_import_that_is_refused_writes_nothing(
    folder: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    source = written(tmp_path / "config.json", {"quant_method": "gptq", "bits": 4, "group_size": 48})
    out = tmp_path / "plan.json"
    command = ["plan", "import", str(source), "--from", "gptqmodel", "--model", str(folder), "--out"]
    assert run([*command, str(out)]) == 3
    assert not out.exists()
    told = capsys.readouterr().err
    assert "error[E307] gptqmodel says of 12 layers" in told
    assert told.count("cannot be cut into groups of 48") == 12
    assert run([*command, str(source)]) == 2
    assert run(["plan", "import", str(tmp_path / "gone"), "--from", "gptqmodel", "--model", str(folder)]) == 3
    assert run([*command[:4], "gguff", "--model", str(folder)]) == 3


def test_options_reach_the_plan(folder: Path, theirs: Path, tmp_path: Path) -> None:
    out = tmp_path / "plan.json"
    command = ["plan", "import", str(theirs.parent), "--from", "gptqmodel", "--model", str(folder), "--out", str(out)]
    assert run([*command, "--rounding", "full", "--without", "caches", "--without", "inputs"]) == 0
    plan = BitPlan.load(out)
    assert "int4-g32-full" in {str(fmt) for fmt in plan.formats.values()}
    imported = plan.source["imported"]
    assert (imported["rounding"], imported["without"]) == ("full", ["caches", "inputs"])
    assert run([*command, "--without", "weights"]) == 3


class TestCheck:
    def test_a_plan_that_is_fine(self, folder: Path, theirs: Path, capsys: pytest.CaptureFixture[str]) -> None:
        command = ["plan", "check", str(theirs), "--model", str(folder), "--to", "vllm"]
        assert run(command) == 0
        assert capsys.readouterr().out.startswith("fine: 16 layers, ")
        assert run([*command, "--json"]) == 0
        found = json.loads(capsys.readouterr().out)
        assert found == {"plan": BitPlan.load(theirs).key, "wrong": [], "notes": []}

    def test_all_that_is_wrong_at_once(self, folder: Path, theirs: Path, tmp_path: Path, capsys: Any) -> None:
        plan = BitPlan.load(theirs)
        first, last = plan.layers[1], plan.layers[2]
        free = [dataclasses.replace(layer, tie="") for layer in plan.layers]
        items = (free[0], dataclasses.replace(free[1], name="gone", shape=(64, 128)), *free[2:])
        formats = {layer.name: plan.formats.get(layer.name, Format.parse("int8-channel")) for layer in items}
        other = BitPlan(
            Layers(items, plan.layers.excluded), {**formats, last.name: Format.parse("nf4-b64")}, {"digest": "0" * 64}
        )
        data = other.to_json()
        data["tensors"][5]["bytes"] += 1
        data["predicted"]["loss"] = "low"
        path = written(tmp_path / "plan.json", data)
        assert run(["plan", "check", str(path), "--json", "--model", str(folder), "--to", "compressed-tensors"]) == 3
        printed = capsys.readouterr()
        found = [(line["where"], line["what"].partition(":")[0]) for line in json.loads(printed.out)["wrong"]]
        assert found == [
            ("file", "predicted.loss"), ("file", "digest"), ("file", items[5].name),
            ("model", "the model"), ("model", "gone"), ("model", first.name), ("target", last.name),
        ]  # fmt: skip
        assert "error[E304]" in printed.err
        assert "7 things are wrong" in printed.err

    def test_what_a_target_cannot_hold(self, theirs: Path, capsys: pytest.CaptureFixture[str]) -> None:
        assert run(["plan", "check", str(theirs), "--to", "llama.cpp"]) == 3
        printed = capsys.readouterr()
        assert printed.out.count("target ") == 13
        assert "error[E301]" in printed.err
        assert run(["plan", "check", str(theirs), "--to", "vllm", "--target-version", "0.1"]) == 3
        assert "E305" in capsys.readouterr().err
        assert run(["plan", "check", str(theirs), "--to", "vllm", "--target-version", "0.1", "--assume", "0.33"]) == 0
        assert run(["plan", "check", str(theirs), "--to", "native"]) == 0
        assert run(["plan", "check", str(theirs), "--assume", "0.33"]) == 2
        assert run(["plan", "check", str(theirs), "--to", "vlm"]) == 3
        assert "did you mean 'vllm'" in capsys.readouterr().err

    @pytest.mark.parametrize(
        ("text", "code"),
        [(text, "E304") for text in ("", "{", "[]", "[" * 99_999, '{"schema": 1}', "\x00", "null")],
    )
    def test_files_that_are_no_plans(self, text: str, code: str, tmp_path: Path, capsys: Any) -> None:
        (tmp_path / "plan.json").write_text(text)
        assert run(["plan", "check", str(tmp_path / "plan.json")]) == 3
        assert f"error[{code}]" in capsys.readouterr().err
        assert run(["plan", "check", str(tmp_path / "gone.json")]) == 3
        assert "error[E101]" in capsys.readouterr().err

    def test_a_newer_schema_is_refused_whatever_it_holds(self, tmp_path: Path) -> None:
        data = {"schema": "mpsearch/plan", "schema_version": 2, "other": []}
        with pytest.raises(InputError, match="plan schema 2; this version reads 1") as caught:
            check_file(written(tmp_path / "plan.json", data))
        assert caught.value.advice == "update mpsearch"

    @pytest.mark.parametrize("place", [(), ("predicted",), ("tensors", 0), ("kept", 0)])
    def test_a_field_of_a_later_version_is_passed_over(self, place: tuple[Any, ...], tmp_path: Path) -> None:
        before = plan_of("int4-g32")
        data = copy.deepcopy(before.to_json())
        inner: Any = data
        for key in place:
            inner = inner[key]
        inner["new"] = {"anything": [1]}
        path = written(tmp_path / "plan.json", signed(data))
        # Read as if it were not there; a digest that is not its own still counts.
        assert BitPlan.load(path).key == before.key
        plan, wrong, notes = check_file(path)
        assert (plan, wrong) == (before, [])
        assert len(notes) == 1
        assert "new: this version does not know it" in notes[0]
        written(path, {**data, "digest": before.key})
        with pytest.raises(InputError, match="digest does not match"):
            BitPlan.load(path)

    def test_what_a_schema_cannot_say(self, tmp_path: Path) -> None:
        data = plan_of("int4-g32").to_json()
        data["tensors"][0]["format"] = "int4-g7"
        data["tensors"][1] |= {"name": "other", "bytes": 1}
        data["model"]["weights"] = 3
        _, wrong, _ = check_file(written(tmp_path / "plan.json", signed(data)))
        places = [line.partition(":")[0] for line in wrong]
        assert places[:4] == ["model.embed", "model.up", "model.up", "model.weights"]

    def test_layers_that_the_data_never_called_are_no_fault(self) -> None:
        plan = plan_of("int4-g32")
        layers = Layers((*plan.layers, Layer("spare", "linear", (8, 8))), plan.layers.excluded)
        assert list(check_model(plan, layers, "ab12")) == ["spare: the plan does not name it"]
        kept = (*plan.layers.excluded, Excluded("spare.weight", (8, 8), "float32", "never called by the data"))
        plan = dataclasses.replace(plan, layers=Layers(plan.layers.items, kept))
        assert list(check_model(plan, layers, "ab12")) == []


VALUES = st.sampled_from([None, True, -1, 1.5, "", "x", [], {}, [0], {"a": 1}, 10**30, "int4-g32"])


@settings(max_examples=150, deadline=None)
@given(st.data())
def test_the_check_agrees_with_the_published_schema(data: st.DataObject) -> None:
    """Whatever is changed in a plan, jsonschema finds fault where we do, but for fields that we pass over."""
    from mpsearch.imports.checking import _against, _schema

    body = copy.deepcopy(plan_of("int4-g32").to_json())
    for _ in range(data.draw(st.integers(1, 2))):
        place: Any = body
        while True:
            key = data.draw(st.sampled_from(list(place) if isinstance(place, dict) else range(len(place))))
            if not (isinstance(place[key], (dict, list)) and place[key]) or data.draw(st.booleans()):
                break
            place = place[key]
        if isinstance(place, dict) and data.draw(st.booleans()):
            del place[key]
        else:
            place[key] = data.draw(VALUES)
        if not body or not any(isinstance(each, (dict, list)) and each for each in body.values()):
            break
    theirs = list(jsonschema.Draft202012Validator(SCHEMA).iter_errors(body))
    ours = list(_against(body, _schema(), "", 0))
    assert bool(theirs) == bool(ours)


class TestDiff:
    def test_layers_that_differ_and_totals(self, theirs: Path, tmp_path: Path, capsys: Any) -> None:
        plan = BitPlan.load(theirs)
        name = plan.layers[3].name
        other = dataclasses.replace(
            plan,
            formats={**plan.formats, name: Format.parse("int8-channel")},
            predicted=Predicted(0.25, 0.01, "nats/token"),
        )
        other.save(tmp_path / "other.json")
        assert run(["plan", "diff", str(theirs), str(tmp_path / "other.json"), "--json"]) == 0
        found = json.loads(capsys.readouterr().out)
        layer = plan.layers[3]
        sizes = plan.formats[name].bytes(layer), Format.parse("int8-channel").bytes(layer)
        row = {"layer": name, "first": "int4-g32", "second": "int8-channel"}
        assert found["layers"] == [{**row, "first_bytes": sizes[0], "second_bytes": sizes[1]}]
        assert found["second"]["bytes"] - found["first"]["bytes"] == sizes[1] - sizes[0]
        assert (found["first"]["loss"], found["second"]["loss"]) == (None, 0.25)
        assert run(["plan", "diff", str(theirs), str(tmp_path / "other.json")]) == 0
        printed = capsys.readouterr().out
        assert f"{sizes[1] - sizes[0]:+,}" in printed
        assert "1 of 16 layers differ" in printed
        assert "no loss predicted" in printed
        assert "predicted 0.25 nats/token, at most ± 0.01" in printed

    def test_a_plan_does_not_differ_from_itself(self, theirs: Path, capsys: pytest.CaptureFixture[str]) -> None:
        assert run(["plan", "diff", str(theirs), str(theirs)]) == 0
        assert capsys.readouterr().out.startswith("0 of 16 layers differ\n")

    def test_plans_for_two_models_are_refused(self, theirs: Path, tmp_path: Path, capsys: Any) -> None:
        plan = BitPlan.load(theirs)
        dataclasses.replace(plan, model={**plan.model, "digest": "0" * 64}).save(tmp_path / "other.json")
        assert run(["plan", "diff", str(theirs), str(tmp_path / "other.json")]) == 3
        assert "error[E302] the plans are for different models" in capsys.readouterr().err
