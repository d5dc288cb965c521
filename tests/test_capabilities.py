"""What targets can hold is data: read right, joined right, and kept by every plan of a study for a target."""

from __future__ import annotations

import re
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
from hypothesis import given
from hypothesis import strategies as st

import mpsearch as mp
from mpsearch import capabilities as tables
from mpsearch.bundled import bundled_model
from mpsearch.capabilities import Capabilities, capabilities, targets
from mpsearch.cli.main import run
from mpsearch.errors import InputError
from mpsearch.exports.ct_config import violations
from mpsearch.format import Format, all_formats
from mpsearch.hardware.containers import CONTAINERS, refuses, stored_bytes
from mpsearch.held import Held
from mpsearch.held import pattern as compiled
from mpsearch.layer import Layer, Layers
from mpsearch.plan import BitPlan
from mpsearch.spec import StudySpec

NAMES = ("q_proj", "k_proj", "v_proj", "gate_proj", "up_proj")
FORMATS = [fmt for row in all_formats().values() for fmt in row if fmt.family != "kv"]
SHAPES = [(64, 64), (64, 96), (32, 256), (40, 128)]


def block(*shapes: tuple[int, int], dtype: str = "bfloat16") -> Layers:
    every = (shapes * 5)[:5]
    return Layers(tuple(Layer(f"l.0.{n}", "linear", s, dtype=dtype) for n, s in zip(NAMES, every, strict=True)))


@pytest.mark.parametrize("target", targets())
def test_every_table_speaks_of_formats_that_there_are(target: str) -> None:
    able = capabilities(target)
    layers = [Layer("l", kind, shape) for kind in ("linear", "embedding") for shape in SHAPES]
    grains, marks = ("tensor", "channel", "g16", "g32", "g64", "g128"), ("", "-asym", "-full")
    weights = {f"int{bits}-{grain}{mark}" for bits in range(2, 9) for grain in grains for mark in marks}
    weights |= {str(fmt.weight) for fmt in FORMATS} | {"fp8-e4m3-channel", "fp8-e4m3-b128x128", "fp8-e4m3-g32"}
    numbers, spans = ("int4", "int8", "fp8-e4m3"), ("token", "tensor", "channel", "g128")
    inputs = {f"{n}-{g}{m}{s}" for n in numbers for g in spans for m in ("", "-asym") for s in ("", "-static")}
    inputs |= {"mxfp4", "mxfp6-e2m3", "mxfp8-e4m3", "nvfp4"}
    for rule in able.holds:
        for pattern in rule.weights:
            assert any(Held((pattern,)).formats(Format.parse(text)) for text in weights), (target, pattern)
        for pattern in rule.inputs:
            assert any(compiled(pattern).fullmatch(text) for text in inputs), (target, pattern)
    assert able.tested
    assert able.source
    assert able.title
    assert able.container in ("", *CONTAINERS)
    assert able.rounds in ("ours", "theirs")
    assert all(line == line.strip() and line[-1] != "." for line in able.defaults)
    # A layer that stays as it is is held everywhere, whatever else is.
    left = [layer for layer in layers if not able.leaves or layer.kind in able.leaves]
    assert left
    assert not any(able.refuses(layer, Format.parse("fp32")) for layer in left)


@pytest.mark.parametrize("target", [t for t in targets() if capabilities(t).container])
def test_what_a_table_holds_has_bytes(target: str) -> None:
    """Whatever is offered for a target has a price in its container."""
    able = capabilities(target)
    held = 0
    for kind in ("linear", "embedding"):
        for shape in SHAPES:
            layer = Layer("l", kind, shape, dtype="bfloat16")
            for fmt in FORMATS:
                if not able.refuses(layer, fmt):
                    held += 1
                    assert not refuses(fmt, layer, able.container), (target, str(fmt), layer)
    assert held > 15


def test_compressed_tensors_table_says_what_its_writer_takes() -> None:
    able = capabilities("compressed-tensors")
    weights = [
        f"int{b}-{g}{m}" for b in (2, 3, 4, 8) for g in ("tensor", "channel", "g32") for m in ("", "-asym", "-full")
    ]
    inputs = [
        "int8-token",
        "int8-tensor-static",
        "int8-token-asym",
        "fp8-e4m3-token",
        "int4-token",
        "mxfp4",
        "int8-g32",
    ]
    every = [*FORMATS, *(Format.parse(f"{w}@{a}") for w in [*weights, "fp8-e4m3", "mxfp4", "nvfp4"] for a in inputs)]
    seen = set()
    for layer in (Layer("l", "linear", (64, 64)), Layer("e", "embedding", (64, 64)), Layer("c", "conv", (8, 4, 4, 4))):
        for fmt in every:
            ours = list(violations(BitPlan(Layers((layer,)), {layer.name: fmt})))
            theirs = able.refuses(layer, fmt)
            seen.add(bool(theirs))
            assert bool(ours) == bool(theirs), (layer, str(fmt), ours, theirs)
    assert seen == {True, False}


def test_an_overlay_holds_only_what_both_hold() -> None:
    layer = Layer("l", "linear", (64, 64), dtype="bfloat16")
    for fmt in FORMATS:
        vllm, base = capabilities("vllm").refuses(layer, fmt), capabilities("compressed-tensors").refuses(layer, fmt)
        assert vllm or not base, str(fmt)
    assert capabilities("vllm").refuses(layer, Format.parse("mxfp6-e2m3"))
    assert not capabilities("compressed-tensors").refuses(layer, Format.parse("mxfp6-e2m3"))


def test_all_violations_come_at_once_and_name_the_layer() -> None:
    layers = block((64, 64))
    texts = ["nf4-b64", "int4-g64", "int4-g64", "int4-g64", "int8-g64"]
    plan = BitPlan(layers, {layer.name: Format.parse(text) for layer, text in zip(layers, texts, strict=True)})
    found = capabilities("vllm").violations(plan)
    assert [line.partition(":")[0] for line in found] == ["l.0.q_proj", "l.0.gate_proj"]
    assert "nf4-b64 is not held by vLLM" in found[0]
    assert "l.0.gate_proj int4-g64, l.0.up_proj int8-g64" in found[1]


@given(st.lists(st.sampled_from(FORMATS), min_size=5, max_size=5), st.sampled_from(SHAPES), st.sampled_from(targets()))
def test_a_plan_without_violations_is_held_layer_by_layer(formats: list[Format], shape: Any, target: str) -> None:
    layers, able = block(shape), capabilities(target)
    plan = BitPlan(layers, {layer.name: fmt for layer, fmt in zip(layers, formats, strict=True)})
    wrong = {layer.name for layer in layers if able.refuses(layer, plan.formats[layer.name])}
    apart = any(
        len({str(plan.formats[n]) for n in names}) > 1 and not wrong & {*names} for names in able.groups(layers)
    )
    assert bool(able.violations(plan)) == bool(wrong or apart)


def test_versions() -> None:
    assert capabilities("vllm", "0.33.2").tested == "0.33.0"
    with pytest.raises(InputError, match=re.escape("known are versions >=0.33,<0.34")) as caught:
        capabilities("vllm", "0.1")
    assert caught.value.code == "E305"
    assert "--assume 0.33.0" in caught.value.advice
    assert capabilities("vllm", "0.1", assume="0.33.0") == capabilities("vllm")
    with pytest.raises(InputError, match="not a version"):
        capabilities("vllm", "latest")
    with pytest.raises(InputError, match="no target 'vlm'"):
        capabilities("vlm")


@pytest.fixture
def a_table(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[Any]:
    """A plug-in's folder of tables."""

    class Point:
        value = "given"

        def load(self) -> Any:
            return lambda: tmp_path

    monkeypatch.setattr(tables, "entry_points", lambda group: [Point()] if group == "mpsearch.capabilities" else [])
    tables._tables.cache_clear()
    yield lambda text: (tmp_path / "mine.toml").write_text(text, encoding="utf-8")
    tables._tables.cache_clear()


HEAD = 'schema = "mpsearch/capabilities"\nschema_version = 1\n'
FACTS = 'target = "mine"\ntitle = "Mine"\nversions = ">=1"\ntested = "1.0"\nsource = "here"\n'


def test_a_plug_in_adds_a_target(a_table: Any) -> None:
    a_table(HEAD + FACTS + '[[holds]]\nweights = ["int4-g32"]\nexcept = ["*head"]\ncolumns_of = 64\n')
    able = capabilities("mine")
    assert "mine" in targets()
    assert not able.refuses(Layer("fc", "linear", (8, 64)), Format.parse("int4-g32-gptq"))
    assert "no multiple of 64" in able.refuses(Layer("fc", "linear", (8, 96)), Format.parse("int4-g32"))
    assert "for this linear layer" in able.refuses(Layer("lm_head", "linear", (8, 64)), Format.parse("int4-g32"))
    assert "int4-g64 is not held by Mine; allowed int4-g32" in able.refuses(
        Layer("fc", "linear", (8, 64)), Format.parse("int4-g64")
    )
    part = Layer("fc", "linear", (8, 64)).part((0, 4))
    assert "its parts none" in able.refuses(part, Format.parse("int4-g32"))


@pytest.mark.parametrize(
    ("text", "says"),
    [
        ("x = ", "not TOML"),
        ("schema = 'other'", "not a table of"),
        (HEAD + FACTS + "colour = 1", "unknown key 'colour'"),
        (HEAD + FACTS + "[[holds]]\nwheights = ['int4-g32']", "unknown key 'wheights'"),
        (HEAD + FACTS.replace(">=1", "=>1") + "holds = []", "InvalidSpecifier"),
        (HEAD + FACTS + "based_on = ['nobody']", "nobody"),
        (HEAD + "target = 'mine'\nversions = '>=1'", "tested"),
    ],
)
def test_a_broken_table_is_named(a_table: Any, text: str, says: str) -> None:
    a_table(text)
    with pytest.raises(InputError, match=says) as caught:
        targets()
    assert caught.value.code == "E102"
    assert "mine.toml" in caught.value.message


STUDY = {
    "model": "bundled:tiny-llama", "calibration": "stdlib:calibration", "validation": "stdlib:validation",
    "estimator": "weight_mse", "tokens": 256, "validation_tokens": 512, "length": 64, "points": 0,
}  # fmt: skip


def test_a_study_for_a_target_makes_only_plans_that_it_holds(tmp_path: Path) -> None:
    """Fused layers bind: apart they take other formats than together, and every plan of the study can be exported."""
    menu = ("int2-g64", "int4-g64", "int8-channel", "nf4-b64", "int4-g64-asym")
    common = {**STUDY, "formats": menu, "budgets": ("weights <= 4 bits",), "storage": str(tmp_path / "s.db")}
    free = mp.study("free", **common, ties="none")
    free.run()
    bound = mp.study("bound", **common, target="vllm", ties="none")
    bound.run()
    able = capabilities("vllm")
    # Both found their layers in one database, each with its own ties; a third is tied by what its target needs again.
    assert len(free.survey.layers.decisions) > len(bound.survey.layers.decisions)
    other = {**common, "formats": ("int4-g64", "int8-g64"), "budgets": ("weights <= 8 bits",)}
    alone = mp.study("alone", **other, target="onnxruntime", ties="auto")
    with alone.session() as session:
        assert len(session.planner.layers.decisions) == len(free.survey.layers.decisions)
    assert able.violations(free.plan())
    assert any(n.code == "W131" and "nf4-b64 is not held by vLLM" in n.message for n in bound.notices)
    for item in bound.plans:
        assert able.violations(item.plan) == [], item.label
        assert item.plan.source.get("target", "vllm") == "vllm"
    assert {"uniform int2-g64", "uniform int4-g64-asym"} <= {item.label for item in bound.plans}
    plan = bound.plan()
    layers = plan.layers
    packed = (stored_bytes(plan.formats[layer.name], layer, "compressed-tensors") for layer in layers)
    total = sum(sum(parts.values()) for parts in packed) + layers.excluded_bytes
    assert plan.cost["weights"] == total == plan.stored_bytes
    assert plan.stored_bytes <= 4 * layers.weights / 8
    assert free.plan().compare(BitPlan(free.plan().layers, plan.formats, plan.model))
    # The same stored scores serve the target afterwards: decisions that it fuses are tied by the solver.
    later = free.plan_for("vllm")
    assert able.violations(later) == []
    assert later.source["target"] == "vllm"
    assert later.loss is not None
    assert free.plan().loss is not None
    assert later.loss > free.plan().loss


def test_pins_and_menus_that_a_target_cannot_hold_are_refused_before_scoring(tmp_path: Path) -> None:
    common = {**STUDY, "storage": str(tmp_path / "s.db"), "budgets": ("weights <= 5 bits",), "target": "onnxruntime"}
    with pytest.raises(InputError, match="int3-g64 is not held by ONNX Runtime") as caught:
        mp.study("a", **common, formats=("int4-g64",), pins={"*o_proj": "int3-g64"}).run()
    assert caught.value.code == "E130"
    with pytest.raises(InputError, match="int3-g64 is not held by ONNX Runtime") as caught:
        mp.study("b", **common, formats=("int3-g64",)).run()
    assert caught.value.code == "E130"
    with pytest.raises(InputError, match="no target 'onxruntime'"):
        StudySpec.of_values(**{**common, "target": "onxruntime"})


def test_export_substitutes_by_solving_again(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    storage = str(tmp_path / "s.db")
    mp.study(
        "free", **{**STUDY, "formats": ("int2-g64", "nf4-b64", "int8-channel"), "budgets": ("weights <= 5 bits",)},
        storage=storage,
    ).run()  # fmt: skip
    export = ["export", "free", "--to", "compressed-tensors", "--storage", storage, "--out", str(tmp_path / "out")]
    assert run(export) == 3
    assert "--substitute" in capsys.readouterr().err
    assert not (tmp_path / "out").exists()
    assert run([*export, "--substitute"]) == 0
    said = capsys.readouterr().err
    assert "not nf4-b64" in said
    assert "compressed-tensors costs +" in said
    assert run(["export", "plan.json", "--substitute"]) == 2


def test_plans_from_elsewhere_stand_beside_a_studys_own(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    storage = str(tmp_path / "s.db")
    study = mp.study(
        "own", **{**STUDY, "formats": ("int2-g64", "int4-g64", "int8-channel"), "budgets": ("weights <= 5 bits",)},
        storage=storage,
    )  # fmt: skip
    study.run()
    mine = study.plan()
    # Not of the menu, and without the study's ties.
    formats = {name: Format.parse("int4-g128" if "q_proj" in name else "nf4-b64") for name in mine.formats}
    other = BitPlan(mine.layers, formats, mine.model)
    other.save(tmp_path / "theirs.json")
    assert run(["measure", "own", "--plan", str(tmp_path / "theirs.json"), "--storage", storage, "--quiet"]) == 0
    assert "theirs" in capsys.readouterr().out
    found = next(m for m in study.measurements if m.label == "theirs")
    assert found.cost["weights"] == other.bytes
    assert found.loss > 0
    given = {name: str(fmt) for name, fmt in formats.items()}
    direct = mp.measure(str(bundled_model()), given, list(study_batches(study)))
    assert found.loss == pytest.approx(direct.loss, rel=1e-9)
    strange = BitPlan(mine.layers, formats, {**mine.model, "digest": "0" * 64})
    strange.save(tmp_path / "strange.json")
    assert run(["measure", "own", "--plan", str(tmp_path / "strange.json"), "--storage", storage, "--quiet"]) == 3
    assert "E302" in capsys.readouterr().err


def study_batches(study: Any) -> Any:
    from mpsearch.evaluate.workbench import Workbench

    return Workbench.load(study.spec.setup).validation


@pytest.mark.parametrize("target", targets())
def test_the_shell_tells_what_a_target_holds(target: str, capsys: pytest.CaptureFixture[str]) -> None:
    assert run(["targets", target]) == 0
    able: Capabilities = capabilities(target)
    said = " ".join(capsys.readouterr().out.split())
    assert able.title in said
    assert able.tested in said
    assert run(["targets", target, "--json"]) == 0


def test_a_target_brings_a_menu_of_its_own() -> None:
    for target in targets():
        menu = capabilities(target).menu
        assert menu, target
        spec = StudySpec.of_values(**{**STUDY, "budgets": ("weights <= 9 bits",), "target": target})
        assert spec.formats == menu
    given = StudySpec.of_values(
        **{**STUDY, "budgets": ("weights <= 9 bits",), "target": "vllm", "formats": ("int4-g64",)}
    )
    assert given.formats == ("int4-g64",)


def test_a_budget_that_holds_everything_is_no_reason_to_leave_what_a_target_must_quantise(tmp_path: Path) -> None:
    from mpsearch.planning import Planner

    layers = Layers(
        (Layer("fc", "linear", (64, 64), dtype="float32"), Layer("up", "linear", (64, 64), dtype="float32"))
    )
    for target, holds in (("gptqmodel", False), ("onnxruntime", True), ("mct", False)):
        spec = StudySpec.of_values(
            **{**STUDY, "budgets": ("weights <= 40 bits",), "target": target, "formats": ("bf16",)}
        )
        found = Planner(spec, layers, {}).holds_all(Planner(spec, layers, {}).asked)
        assert (found is not None) == holds, target


@pytest.mark.parametrize(("dtype", "own"), [("float32", "fp32"), ("float16", "fp16"), ("bfloat16", "bf16")])
@pytest.mark.parametrize("target", ["autoround", "gptqmodel", "transformers-fp8", "vllm", "tensorrt-llm", "mct"])
def test_the_own_menu_of_a_target_has_what_the_layers_are_stored_in(target: str, dtype: str, own: str) -> None:
    from mpsearch.planning import Planner

    shapes = {"embedding": (61, 40), "linear": (512, 512)}
    layers = Layers(tuple(Layer(kind, kind, shape, dtype=dtype) for kind, shape in shapes.items()))
    given = {**STUDY, "budgets": ("weights <= 40 bits",), "target": target}
    made = Planner(StudySpec.of_values(**given), layers, {})
    assert [str(fmt) for fmt in made.menu] == list(dict.fromkeys([*capabilities(target).menu, own]))
    offered = {
        row.name: [str(fmt) for fmt, free in zip(made.formats, mask, strict=True) if free == 0]
        for row, mask in zip(made.layers.decisions, made.mask, strict=True)
    }
    assert own in offered["embedding"]
    assert (own in offered["linear"]) == (target != "mct")
    asked = Planner(StudySpec.of_values(**given, formats=("int4-g64",)), layers, {})
    assert [str(fmt) for fmt in asked.menu] == ["int4-g64"]


def test_stored_scores_serve_a_target_whatever_else_the_study_asked(tmp_path: Path) -> None:
    """Pins and caches have columns of their own, behind those of the menu."""
    pin = "model.layers.0.mlp.down_proj"
    asked = {
        "formats": ("int2-g64", "int4-g64", "int8-channel"),
        "budgets": ("weights <= 6 bits",),
        "pins": {pin: "bf16"},
    }
    given = {**STUDY, **asked, "estimator": "fisher", "kv": ("kv-int4-token", "kv-bf16")}
    study = mp.study("asked", **given, storage=str(tmp_path / "s.db"))
    study.run()
    found = study.plan_for("vllm")
    assert capabilities("vllm").violations(found) == []
    assert str(found.formats[pin]) == "bf16"
    assert {str(found.formats[x.name]) for x in found.layers if x.kind == "kv_cache"} == {"kv-bf16"}
    assert found.stored_bytes <= 6 * found.layers.weights / 8
    scores = study.scores
    row = {name: i for i, name in enumerate(scores.layers)}
    chosen = [
        scores.value[row[d.name], scores.formats.index(str(found.formats[d.layers[0].name]))]
        for d in study.survey.layers.decisions
        if d.name != pin and str(found.formats[d.layers[0].name]) in scores.formats
    ]
    assert found.loss == pytest.approx(sum(chosen), rel=1e-6)


def test_names_of_what_engines_fuse_agree_wherever_they_stand() -> None:
    import ast

    from mpsearch.fused import FUSED

    wholes = {frozenset(parts) for parts in FUSED.values()}
    fusing = [capabilities(name) for name in targets() if capabilities(name).fused]
    assert {"compressed-tensors", "vllm", "sglang"} <= {able.target for able in fusing}
    for able in fusing:
        assert wholes <= set(able.fused), able.target
    # A proof is a script of its own and cannot read them.
    proof = Path(__file__).parent.parent / "mpsearch" / "exports" / "proofs" / "vllm_online.py"
    packed = next(
        ast.literal_eval(node.value)
        for node in ast.parse(proof.read_text(encoding="utf-8")).body
        if isinstance(node, ast.Assign) and ast.unparse(node.targets[0]) == "PACKED"
    )
    assert {name: tuple(parts) for name, parts in packed.items()} == FUSED
