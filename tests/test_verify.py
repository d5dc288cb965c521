"""A proof of an export finds what is wrong with it: scales, rows, groups, kinds of numbers, what is missing."""

from __future__ import annotations

import json
import sys
from pathlib import Path
from typing import Any

import pytest
from safetensors.torch import load_file, save_file

from mpsearch.cli.main import run
from mpsearch.errors import InputError
from mpsearch.exports.compressed_tensors import CompressedTensors
from mpsearch.exports.folder import VERIFIED
from mpsearch.exports.proof_run import proofs
from mpsearch.exports.verify import Verification, verify
from mpsearch.format import Format
from mpsearch.model.find import find_layers
from mpsearch.model.model import Model, load_model
from mpsearch.plan import BitPlan
from tests.test_export_compressed_tensors import make

Q, K, V, O = (f"model.layers.{{}}.self_attn.{x}_proj" for x in "qkvo")  # noqa: E741 - the field's names
GATE, UP, DOWN = (f"model.layers.{{}}.mlp.{x}_proj" for x in ("gate", "up", "down"))


@pytest.fixture(scope="module")
def model(tmp_path_factory: pytest.TempPathFactory) -> tuple[Model, Path]:
    folder = make(tmp_path_factory.mktemp("model"), "bfloat16")
    return load_model(folder), folder


def planned(model: Model) -> BitPlan:
    first = {Q: "int4-g32", K: "int4-g32", V: "int4-g32", O: "int8-channel@int8-token", GATE: "mxfp4", UP: "mxfp4"}
    second = {Q: "int8-channel@int8-token", K: "int8-channel@int8-token", V: "int8-channel@int8-token",
              O: "int4-g32-asym", GATE: "fp8-e4m3-channel", UP: "fp8-e4m3-channel", DOWN: "int3-channel"}  # fmt: skip
    names = {key.format(i): text for i, each in enumerate((first, second)) for key, text in each.items()}
    names[DOWN.format(0)] = "nvfp4"
    layers = find_layers(model)
    formats = {x.name: Format.parse(names.get(x.name, "bf16")) for x in layers}
    return BitPlan(layers, formats, {"name": "small", "digest": model.digest})


def changed(folder: Path, **changes: Any) -> None:
    """Rewrite the tensors of a checkpoint."""
    file = folder / "model.safetensors"
    tensors = load_file(file)
    for name, change in changes.items():
        if change is None:
            del tensors[name]
        else:
            tensors[name] = change(tensors[name]).contiguous()
    save_file(tensors, file, {"format": "pt"})


def found(result: Verification) -> set[tuple[str, str]]:
    return {(item.tensor.removesuffix(".weight"), item.what) for item in result.differences}


def test_a_right_checkpoint_passes_and_a_wrong_one_does_not(model: tuple[Model, Path], tmp_path: Path) -> None:
    loaded, source = model
    plan, out = planned(loaded), tmp_path / "out"
    CompressedTensors().write(plan, out, loaded)
    right = verify("compressed-tensors", plan, out, loaded, str(source))
    assert right.differences == ()
    assert right.passed
    assert right.tensors == len(plan.layers) + len(plan.layers.excluded)
    assert right.plan == plan.key
    changed(
        out,
        **{
            f"{Q.format(0)}.weight_packed": lambda x: x.flip(0),
            f"{O.format(0)}.weight_scale": lambda x: 3 * x,
            f"{GATE.format(0)}.weight_packed": lambda x: x.flip(0),
            f"{Q.format(1)}.weight": lambda x: x.flip(0),
            f"{O.format(1)}.weight_scale": lambda x: 3 * x,
            f"{O.format(1)}.weight_zero_point": lambda x: x,
            f"{GATE.format(1)}.weight_scale": lambda x: 1.5 * x,
            f"{DOWN.format(1)}.weight_scale": lambda x: x.roll(1, 0),
            f"{DOWN.format(0)}.weight_global_scale": lambda x: x / 2,
            "model.norm.weight": None,
            "model.embed_tokens.weight": lambda x: x.float(),
        },
    )
    wrong = verify("compressed-tensors", plan, out, loaded, str(source))
    moved = {
        Q.format(0),
        O.format(0),
        GATE.format(0),
        Q.format(1),
        O.format(1),
        GATE.format(1),
        *(DOWN.format(i) for i in (0, 1)),
    }
    assert {(name, "moved by") for name in moved} <= found(wrong)
    assert {("model.norm", "missing"), ("model.embed_tokens", "bits"), ("all tensors", "bytes")} <= found(wrong)
    untouched = {name for name in plan.formats if name not in moved and name != "model.embed_tokens"}
    assert not untouched & {name for name, _ in found(wrong)}


def test_what_is_read_is_held_against_the_plan(model: tuple[Model, Path], tmp_path: Path) -> None:
    """A checkpoint of another plan: other bits, groups, zero points and kinds of numbers."""
    loaded, source = model
    plan, out = planned(loaded), tmp_path / "out"
    other = {Q: "int8-g32", O: "int8-tensor@int8-token", GATE: "nvfp4", UP: "nvfp4", DOWN: "mxfp4"}
    names = {key.format(0): text for key, text in other.items()} | {O.format(1): "int4-g32", DOWN.format(1): "int3-g32"}
    names |= {K.format(0): "int8-g32", V.format(0): "int8-g32"}
    formats = {name: Format.parse(names.get(name, str(fmt))) for name, fmt in plan.formats.items()}
    CompressedTensors().write(BitPlan(plan.layers, formats, plan.model), out, loaded)
    wrong = found(verify("compressed-tensors", plan, out, loaded, str(source)))
    assert {(Q.format(0), "bits"), (O.format(0), "group"), (GATE.format(0), "group"), (DOWN.format(0), "group"),
            (O.format(1), "symmetric"), (DOWN.format(1), "group")} <= wrong  # fmt: skip
    assert {name for name, _ in wrong} <= {*names, "all tensors", "logits"}


def test_logits_are_judged() -> None:
    from mpsearch.exports.verify import _far

    assert _far((0.05, 0.05), 1e-6, 1e-4) == []
    assert [str(x) for x in _far((0.05, 0.05), 2e-4, 1e-4)] == [
        "logits: differ by 0.0002 of the largest, planned at most 0.0001"
    ]
    assert _far((0.1, 0.05), 0.5, None) == []
    assert _far((0.5, 0.05), 0.5, None)[0].what == "lose"
    assert _far((float("nan"), 0.05), 0.0, None)[0].what == "not finite"


def test_who_reads_and_what_is_read_is_checked(model: tuple[Model, Path], tmp_path: Path) -> None:
    loaded, source = model
    plan = planned(loaded)
    CompressedTensors().write(plan, tmp_path / "out", loaded)
    for python in ("/bin/ls", str(tmp_path), "no-such-program"):
        with pytest.raises(InputError, match="no Python interpreter") as caught:
            verify("compressed-tensors", plan, tmp_path / "out", loaded, str(source), python)
        assert caught.value.code == "E101"
    strange = BitPlan(plan.layers, plan.formats, {**plan.model, "digest": "0" * 64})
    with pytest.raises(InputError, match="another model") as caught:
        verify("compressed-tensors", strange, tmp_path / "out", loaded, str(source))
    assert caught.value.code == "E302"
    with pytest.raises(InputError, match="no proof for 'native'"):
        verify("native", plan, tmp_path / "out", loaded, str(source))


def test_from_the_shell(model: tuple[Model, Path], tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    loaded, source = model
    plan, out = planned(loaded), tmp_path / "out"
    plan.save(tmp_path / "plan.json")
    export = [
        "export",
        str(tmp_path / "plan.json"),
        "--to",
        "compressed-tensors",
        "--model",
        str(source),
        "--out",
        str(out),
    ]
    assert run([*export, "--verify", "--python", sys.executable]) == 0
    said = capsys.readouterr().out
    assert "compressed-tensors" in said
    assert "tensors as planned" in said
    body = json.loads((out / VERIFIED).read_text(encoding="utf-8"))
    assert body["passed"]
    assert body["plan"] == plan.key
    # A proof is of the files that it saw.
    assert run([*export, "--force"]) == 0
    assert not (out / VERIFIED).exists()
    assert run([*export, "--force", "--python", sys.executable]) == 2
    strange = BitPlan(plan.layers, plan.formats, {**plan.model, "digest": "0" * 64})
    strange.save(tmp_path / "strange.json")
    for to in ("compressed-tensors", "autoround", "torchao"):
        capsys.readouterr()
        assert (
            run(
                [
                    "export",
                    str(tmp_path / "strange.json"),
                    "--to",
                    to,
                    "--model",
                    str(source),
                    "--out",
                    str(tmp_path / to),
                ]
            )
            == 3
        )
        assert "E302" in capsys.readouterr().err
        assert not (tmp_path / to).exists()
    assert run(["export", str(tmp_path / "plan.json"), "--to", "vllm", "--out", str(tmp_path / "v")]) == 3
    assert "--to compressed-tensors" in capsys.readouterr().err


def test_a_configuration_needs_no_model_and_digests_are_made_once(
    model: tuple[Model, Path], tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    from mpsearch.model import checkpoint

    loaded, source = model
    layers = find_layers(loaded)
    plan = BitPlan(
        layers,
        {x.name: Format.parse("bf16") for x in layers},
        {"name": "small", "digest": loaded.digest, "architecture": "LlamaForCausalLM"},
    )
    plan.save(tmp_path / "plan.json")
    seen: list[Path] = []

    def digest(folder: Path) -> str:
        seen.append(folder)
        return loaded.digest

    for module in ("mpsearch.model.checkpoint", "mpsearch.exports.original", "mpsearch.model.model"):
        monkeypatch.setattr(f"{module}.folder_digest", digest, raising=module == checkpoint.__name__)

    def export(to: str, folder: Path) -> int:
        out = tmp_path / f"{to} {folder.name}"
        return run(["export", str(tmp_path / "plan.json"), "--to", to, "--model", str(folder), "--out", str(out)])

    assert export("llama.cpp", tmp_path / "moved") == 0, capsys.readouterr().err
    assert seen == []
    for to in ("llama.cpp", "compressed-tensors", "native"):
        seen.clear()
        assert export(to, source) == 0, capsys.readouterr().err
        assert seen == [source], to
    # Who reads the model needs it.
    assert export("compressed-tensors", tmp_path / "moved") == 3
    assert "E101" in capsys.readouterr().err


def test_every_proof_is_a_script_for_another_interpreter() -> None:
    import ast

    folder = Path(__file__).parent.parent / "mpsearch" / "exports" / "proofs"
    assert len(proofs()) >= 18
    for path in folder.glob("*.py"):
        tree = ast.parse(path.read_text(encoding="utf-8"))
        imported = {node.module or "" for node in ast.walk(tree) if isinstance(node, ast.ImportFrom)}
        imported |= {name.name for node in ast.walk(tree) if isinstance(node, ast.Import) for name in node.names}
        assert not {name for name in imported if name.partition(".")[0] == "mpsearch"}, path.name
