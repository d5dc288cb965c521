"""Every code is explained, in one place; many are brought about here, and what they advise is done."""

from __future__ import annotations

import ast
import json
import re
import shutil
import sqlite3
import struct
from collections.abc import Callable, Iterator
from contextlib import closing
from functools import cache
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from torch import nn

import mpsearch as mp
from mpsearch import errors, explaining, registry
from mpsearch.bundles.sharing import bundle, unbundle
from mpsearch.capabilities import capabilities
from mpsearch.cli.main import run
from mpsearch.files import inside, write_file
from mpsearch.format import parse_formats
from mpsearch.hardware.identity import check_same
from mpsearch.hardware.latency_table import read_profile
from mpsearch.imports.reading import read_json
from mpsearch.layer import Layer, Layers
from mpsearch.model.checkpoint import find_folder, read_config, read_header, weight_files
from mpsearch.model.digest import digest_of
from mpsearch.model.model import load_model
from mpsearch.model.quantize import fake_quantize
from mpsearch.model.source import Source, read_texts
from mpsearch.plan import BitPlan
from mpsearch.solvers.ratios import high_impact_ratios
from mpsearch.storage.checks import check_text
from tests.conftest import DATA

CODE = re.compile(r"[EWN]\d{3}")
SOURCE = Path(mp.__file__).parent


@cache
def _trees() -> list[tuple[str, list[ast.AST]]]:
    """Name and nodes of every file of ours."""
    files = [file for file in sorted(SOURCE.rglob("*.py")) if "testing" not in file.parts]
    found = [(str(file.relative_to(SOURCE)), ast.parse(file.read_text(encoding="utf-8"))) for file in files]
    return [(name, [x for x in ast.walk(tree) if isinstance(x, (ast.Constant, ast.Call))]) for name, tree in found]


def _sites() -> Iterator[tuple[str, str]]:
    """(code, place) of every text in the code that is one of our codes."""
    for name, nodes in _trees():
        for node in nodes:
            if isinstance(node, ast.Constant) and isinstance(node.value, str) and CODE.fullmatch(node.value):
                yield node.value, f"{name}:{node.lineno}"


def test_every_code_that_is_raised_is_explained_and_every_explained_one_is_raised() -> None:
    used: dict[str, str] = {}
    for code, place in _sites():
        used.setdefault(code, place)
    assert {code: place for code, place in used.items() if code not in explaining.entries()} == {}
    assert sorted(set(explaining.entries()) - set(used)) == []


def test_every_error_and_notice_begins_with_its_code() -> None:
    kinds = ("UsageError", "InputError", "InfeasibleError", "StorageError", "ResourceError", "UnsafeError", "Notice")
    wrong = []
    for name, nodes in _trees():
        for node in nodes:
            if isinstance(node, ast.Call) and isinstance(node.func, ast.Name) and node.func.id in kinds and node.args:
                first = node.args[0]
                if isinstance(first, ast.Constant) and not CODE.fullmatch(str(first.value)):
                    wrong.append(f"{name}:{node.lineno}")
    assert wrong == []


def test_the_exit_code_of_each_error_is_that_of_its_kind() -> None:
    raised: dict[str, set[int]] = {}
    for _, nodes in _trees():
        for node in nodes:
            if isinstance(node, ast.Call) and isinstance(node.func, ast.Name) and node.args:
                kind, first = getattr(errors, node.func.id, None), node.args[0]
                if isinstance(kind, type) and hasattr(kind, "exit_code") and isinstance(first, ast.Constant):
                    raised.setdefault(str(first.value), set()).add(kind.exit_code)
    told = {entry.code: entry.exit for entry in explaining.entries().values() if entry.code[0] == "E"}
    assert {code: exits for code, exits in told.items() if exits not in raised.get(code, {exits})} == {}
    assert (told["E140"], told["E141"], told["E201"], told["E601"], told["E699"]) == (3, 3, 4, 6, 1)


def test_the_page_is_made_of_the_table() -> None:
    page = SOURCE.parent / "docs" / "errors.md"
    assert page.read_text(encoding="utf-8") == explaining.page(), "python -m mpsearch.explaining > docs/errors.md"


@pytest.mark.parametrize("entry", explaining.entries().values(), ids=str)
def test_each_entry_says_what_it_is_and_what_to_do(entry: explaining.Entry) -> None:
    for text in (entry.meaning, entry.why, entry.example, entry.fix):
        assert 3 < len(text) < 220
        assert "|" not in text
        assert text == text.strip()


def test_explain_prints_each_code(capsys: pytest.CaptureFixture[str]) -> None:
    assert run(["explain", "e201"]) == 0
    assert capsys.readouterr().out.startswith("E201\n  means")
    assert run(["explain", "W131", "--json"]) == 0
    assert json.loads(capsys.readouterr().out)["code"] == "W131"
    for code, entry in explaining.entries().items():
        assert explaining.text(explaining.entry(code)).startswith(f"{code}\n  means     {entry.meaning}\n")
    assert run(["explain", "--json"]) == 0
    assert len(json.loads(capsys.readouterr().out)) == len(explaining.entries())
    assert run(["explain"]) == 0
    assert capsys.readouterr().out.count("\n") == len(explaining.entries())


@pytest.mark.parametrize(("asked", "near"), [("E202", "E201"), ("e999", "E913"), ("W132", "W131"), ("X999", "E9")])
def test_explain_names_the_nearest_codes(asked: str, near: str, capsys: pytest.CaptureFixture[str]) -> None:
    assert run(["explain", asked]) == 3
    told = capsys.readouterr().err
    assert near in told
    assert "E107" in told
    # What it offers can be explained.
    offered = CODE.findall(told.partition("near it:")[2])
    assert offered
    assert all(explaining.entry(code) for code in offered)


def test_what_is_no_code_at_all_lists_them(capsys: pytest.CaptureFixture[str]) -> None:
    for asked in ("help", "\x1b[31m", "E" * 500, "9" * 500):
        assert run(["explain", asked]) == 3
        told = capsys.readouterr().err
        assert "\x1b" not in told
        assert "mpsearch explain" in told


# --- codes that are brought about


class World:
    """Files that the cases need, in a folder of their own."""

    def __init__(self, folder: Path) -> None:
        self.folder = folder
        self.database = folder / "results.db"
        shutil.copy(DATA / "schema-1.db", self.database)
        self.open().close()
        self.url = str(self.database)

    def open(self, name: str = "results.db") -> Any:
        return registry.make("stores", "sql", url=str(self.folder / name))

    def write(self, name: str, content: str | bytes) -> Path:
        path = self.folder / name
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_bytes(content if isinstance(content, bytes) else content.encode())
        return path

    def study(self) -> Any:
        from mpsearch.cli.options import open_study

        return open_study("frozen", self.url)

    def sql(self, text: str) -> None:
        with closing(sqlite3.connect(self.database)) as file:
            file.execute(text)
            file.commit()

    def plan(self) -> BitPlan:
        study = self.study()
        try:
            found: BitPlan = study.plan()
            return found
        finally:
            study.store.close()

    def packed(self) -> Path:
        return bundle("frozen", self.folder / "a.mps", self.url, force=True)


def toml(world: World, more: str) -> Any:
    text = f'model = "m"\ncalibration = "c.txt"\nbudgets = ["weights <= 4 bits"]\n{more}\n'
    return mp.StudySpec.load(world.write("study.toml", text))


def spec(**more: Any) -> Any:
    return mp.StudySpec.of(model="m", calibration="c.txt", **more)


def net(**functions: Any) -> Any:
    return mp.wrap(
        nn.Sequential(nn.Linear(4, 4), nn.Linear(4, 4)), **(functions or {"logits": lambda module, x: module(x)})
    )


def answer(world: World, *budgets: str) -> Any:
    study = world.study()
    try:
        return study.plan(*budgets)
    finally:
        study.store.close()


def hopeless(world: World) -> None:
    study = world.study()
    try:
        study.answer(goal="weights", most_loss=1e-12)
    finally:
        study.store.close()


def command(*arguments: str) -> Any:
    from mpsearch.cli.main import app

    return app(args=list(arguments), standalone_mode=False)


def locked(world: World) -> None:
    with closing(sqlite3.connect(world.database, isolation_level=None)) as holder:
        holder.execute("BEGIN IMMEDIATE")
        with registry.make("stores", "sql", url=world.url, busy_timeout=0.2) as store:
            store.put("x", "y", {})


def twice(world: World) -> None:
    with world.open() as store:
        store.put("x", "y", {"a": 1})
        store.put("x", "y", {"a": 2})


def lost(world: World) -> None:
    with world.open() as store:
        store.create_study("other", {"name": "other"})
        store.control.submit("other", "here")
        store.control.drive("other", "me:1:1:1", 60)
        store.control.beat("other", "me:1:1:1", 99, 60, "score", 0, 1)


def driven(world: World) -> None:
    with world.open() as store:
        store.create_study("other", {"name": "other"})
        store.control.submit("other", "here")
        store.control.drive("other", "elsewhere:boot:1:1", 60)
        store.control.drive("other", "here:boot:2:2", 60)


def foreign(world: World) -> None:
    packed = world.packed()
    there = str(world.folder / "there.db")
    unbundle(packed, there)
    with closing(sqlite3.connect(there)) as file:
        file.execute("UPDATE link SET key = ? WHERE kind = 'origin'", ("0" * 64,))
        file.commit()
    unbundle(packed, there)


def other_question(world: World) -> None:
    with world.open() as store:
        store.create_study("frozen", {"name": "frozen"})


def new_study(world: World) -> None:
    with world.open() as store:
        store.create_study("new", spec(name="new", budgets=["4 bits"]).question())
    command("show", "new", "--storage", world.url)


def remote_code(world: World) -> None:
    read_config(world.write("m/config.json", '{"auto_map": {"AutoModel": "x.py"}}').parent)


def header(world: World, content: bytes) -> Any:
    return read_header(world.write("model.safetensors", content))


def solve(**more: Any) -> Any:
    losses = np.array([[2.0, 1.0], [2.0, 1.0]])
    return mp.solve(losses, np.array([[1.0, 2.0], [1.0, 2.0]]), 3.0, **more)


class Noisy(nn.Module):
    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return x + torch.rand(())


def noisy() -> Any:
    return mp.wrap(nn.Sequential(nn.Linear(4, 4), Noisy()), logits=lambda module, x: module(x))


def spoiled(value: float) -> Any:
    linear = nn.Linear(4, 4)
    with torch.no_grad():
        linear.weight[0, 1] = value
    return mp.wrap(linear)


ONES = torch.ones(2, 4)
LAYER = Layer("fc", "linear", (8, 100))

CASES: list[tuple[str, Callable[[World], Any]]] = [
    ("E101", lambda w: BitPlan.load(w.folder / "none.json")),
    ("E102", lambda w: toml(w, "formats = [")),
    ("E103", lambda w: toml(w, "budgte = 3")),
    ("E104", lambda w: toml(w, 'model = "again"')),
    ("E106", lambda w: mp.StudySpec.of(model="m")),
    ("E107", lambda w: registry.load("estimators", "fishr")),
    ("E108", lambda w: parse_formats([])),
    ("E109", lambda w: parse_formats(["int4_g64"])),
    ("E110", lambda w: parse_formats(["int9-g64"])),
    ("E111", lambda w: mp.Budget.parse("weights <= nan bits")),
    ("E112", lambda w: mp.Budget.parse("weights <= 3 ms")),
    ("E113", lambda w: spec(tokens=0)),
    ("E114", lambda w: check_text("study name", "a\x1b")),
    ("E115", lambda w: command("solve")),
    ("E120", lambda w: mp.layers(net(), ONES, ties=[["mlp.*", "fc"]])),
    ("E121", lambda w: mp.layers(net(), ONES, ties=[["0", "1"], ["1", "0"]])),
    ("E122", lambda w: BitPlan(Layers((LAYER, LAYER.part((0, 4)))), dict.fromkeys(
        ["fc", LAYER.part((0, 4)).name], mp.Format.parse("int8-channel")))),
    ("E130", lambda w: mp.cost(net(), ["mxfp4"])),
    ("E140", other_question),
    ("E141", lambda w: command("show", "frozn", "--storage", w.url)),
    ("E142", foreign),
    ("E143", new_study),
    ("E144", driven),
    ("E201", lambda w: answer(w, "weights <= 1 bits")),
    ("E203", lambda w: hopeless(w)),
    ("E210", lambda w: high_impact_ratios(-np.eye(2), np.zeros(2), np.ones(2), 0.5)),
    ("E212", lambda w: solve(goal="byte")),
    ("E213", lambda w: solve(rules=mp.Rules(pins={"lm_haed": 1}))),
    ("E214", lambda w: command("solve", "--table", str(w.write("t.csv", "layer;loss\n")))),
    ("E301", lambda w: command("export", "frozen", "--to", "llama.cpp", "--out", str(w.folder / "e"),
                               "--storage", w.url)),
    ("E302", lambda w: w.plan().compare(BitPlan(Layers((LAYER,)), {"fc": mp.Format.parse("int8-channel")}))),
    ("E303", lambda w: bundle("frozen", w.write("b.mps", "mine"), w.url)),
    ("E304", lambda w: BitPlan.load(w.write("plan.json", '{"schema": "mpsearch/plan"'))),
    ("E305", lambda w: capabilities("vllm", "0.0.1")),
    ("E307", lambda w: read_json(w.write("config.json", "[1]"))),
    ("E401", lambda w: weight_files(w.write("m/model.safetensors.index.json",
                                            '{"weight_map": {"a": "b.safetensors"}}').parent)),
    ("E402", lambda w: header(w, b"version https://git-lfs.github.com/spec/v1\noid sha256:ab\nsize 9\n")),
    ("E403", lambda w: header(w, b"<!DOCTYPE html><html></html>")),
    ("E404", lambda w: header(w, struct.pack("<Q", 500) + b"{}")),
    ("E405", lambda w: header(w, struct.pack("<Q", 2**60) + b"{}")),
    ("E406", lambda w: find_folder(w.folder)),
    ("E407", lambda w: weight_files(w.folder)),
    ("E409", lambda w: mp.layers(3)),
    ("E410", lambda w: mp.wrap(nn.Linear(2, 2, device="meta"))),
    ("E411", lambda w: fake_quantize(torch.ones(2, 4, dtype=torch.int8), mp.Format.parse("int4-channel"))),
    ("E412", lambda w: spoiled(float("nan"))),
    ("E418", lambda w: mp.layers(nn.LayerNorm(4))),
    ("E420", lambda w: mp.cost(Layers((LAYER,)), ["int8-channel"], "bops")),
    ("E421", lambda w: fake_quantize(torch.full((1, 4), 1e6), mp.Format.parse("fp16"))),
    ("E422", lambda w: mp.measure(net(), dict.fromkeys("01", "int4-channel-gptq"), [ONES])),
    ("E430", lambda w: check_same({"processor": "another"}, {"processor": "this"}, "the profile")),
    ("E432", lambda w: registry.make("engines", "llama.cpp", library=str(w.folder / "none.so"))._ggml()),
    ("E433", lambda w: read_profile(w.write("times.csv", ""))),
    ("E501", lambda w: mp.measure(net(), {"0": "int8-channel"}, [])),
    ("E502", lambda w: read_texts(Source(str(w.write("a.jsonl", '{"prompt": "x"}\n'))))),
    ("E504", lambda w: mp.study(model=net(), calibration=[ONES], budgets=["4 bits"], storage="sqlite://")),
    ("E505", lambda w: mp.search(net(), [ONES], "8 bits", validation=[ONES], formats=["int4-channel"])),
    ("E506", lambda w: mp.score(net(), [ONES], ["int4-channel@int8-token"], "weight_mse")),
    ("E508", lambda w: mp.wrap(nn.Linear(4, 4)).logits(ONES)),
    ("E509", lambda w: digest_of(object())),
    ("E512", lambda w: mp.score(net(), [torch.ones(2, 3)], ["int4-channel"])),
    ("E513", lambda w: mp.score(noisy(), [ONES], ["int4-channel"])),
    ("E514", lambda w: mp.score(net(logits=lambda m, x: None), [ONES], ["int4-channel"])),
    ("E515", lambda w: mp.score(net(), iter([ONES]), ["int4-channel"])),  # type: ignore[arg-type]
    ("E521", twice),
    ("E523", lost),
    ("E601", locked),
    ("E603", lambda w: registry.make("stores", "sql", url=str(w.write("x.db", "PK" * 100)))),
    ("E604", lambda w: (w.sql("DELETE FROM value"), command("db", "check", w.url))),
    ("E605", lambda w: (w.sql("UPDATE mpsearch_schema SET version_num = '0099'"), w.open())),
    ("E608", lambda w: registry.make("stores", "sql", url="postgresql://ann:secret@127.0.0.1:1/mp")),
    ("E701", lambda w: write_file(w.write("file", "") / "below", "x")),
    ("E710", lambda w: command("doctor", "--storage", str(w.write("x.db", "PK" * 100)))),
    ("E801", lambda w: load_model(w.write("m/pytorch_model.bin", b"\x80").with_name("config.json").parent)
     if w.write("m/config.json", '{"model_type": "llama"}') else None),
    ("E802", remote_code),
    ("E803", lambda w: inside(w.folder, "../../x")),
]  # fmt: skip


@pytest.fixture
def world(tmp_path: Path) -> World:
    return World(tmp_path)


@pytest.mark.parametrize(("code", "call"), CASES, ids=[code for code, _ in CASES])
def test_a_code_comes_as_one_plain_block(code: str, call: Callable[[World], Any], world: World) -> None:
    with pytest.raises(mp.MpsearchError) as caught:
        call(world)
    error = caught.value
    assert error.code == code, error
    first, *rest = str(error).splitlines()
    assert re.fullmatch(rf"error\[{code}\] \S.*", first)
    assert all(re.match(r"  (where|because|try) {2,}|   ", line) for line in rest)
    assert not re.search(r"Traceback|<function|object at 0x|secret", str(error))
    assert error.exit_code in (2, 3, 4, 6, 7, 8)
    assert explaining.entry(code).fix


def test_enough_codes_are_brought_about() -> None:
    assert len({code for code, _ in CASES}) >= 70


# --- what is advised is done


def advice(call: Callable[[], Any]) -> mp.MpsearchError:
    with pytest.raises(mp.MpsearchError) as caught:
        call()
    return caught.value


def commands(text: str) -> list[list[str]]:
    """The commands of ours that a text names."""
    import shlex

    return [shlex.split(found) for found in re.findall(r"mpsearch ((?:\S+ ?)+)", text.replace("`", "\n"))]


def test_the_limit_that_is_offered_can_be_met(world: World) -> None:
    error = advice(lambda: answer(world, "weights <= 1 bits"))
    budget = re.match(r"budget: (.*), or offer", error.advice)
    assert budget is not None
    assert answer(world, budget[1]).bits < 4


@pytest.mark.parametrize(
    ("wrong", "right"),
    [("int4_g64", "int4-g64"), ("mxpf4", "mxfp4"), ("nf4-64", "nf4-b64")],
)
def test_the_format_that_is_offered_is_one(wrong: str, right: str) -> None:
    error = advice(lambda: parse_formats([wrong]))
    offered = re.search(r"did you mean '([^']+)'", error.message)
    assert offered is not None
    assert str(parse_formats([offered[1]])[0])
    assert str(parse_formats([right])[0]) == right


@pytest.mark.parametrize("wrong", ["fishr", "divergance", "hessian_trase", "weigth_mse"])
def test_the_name_that_is_offered_is_one(wrong: str) -> None:
    offered = re.search(r"did you mean '([^']+)'", advice(lambda: registry.load("estimators", wrong)).message)
    assert offered is not None
    assert registry.load("estimators", offered[1])


def test_the_key_that_is_offered_is_one(world: World) -> None:
    error = advice(lambda: toml(world, 'buget = ["x"]'))
    offered = re.search(r"did you mean '([^']+)'", error.message)
    assert offered is not None
    assert offered[1] in spec(budgets=["4 bits"]).to_json()


@pytest.mark.parametrize("text", ["weights <= nan bits", "weights <= 3 ms", "weights", "wieghts <= 3 bits"])
def test_the_budget_that_is_given_as_an_example_reads(text: str) -> None:
    error = advice(lambda: mp.Budget.parse(text))
    examples = re.findall(r"'([^']*<=[^']*)'", error.advice)
    assert all(mp.Budget.parse(example) for example in examples)
    units = re.findall(r"units of weights: (.*)", error.advice)
    assert all(mp.Budget.parse(f"weights <= 3 {unit}") for line in units for unit in line.split(", "))


def test_the_study_that_is_offered_is_there(world: World, capsys: pytest.CaptureFixture[str]) -> None:
    error = advice(lambda: command("show", "frozn", "--storage", world.url))
    offered = re.search(r"did you mean '([^']+)'", error.message)
    assert offered is not None
    assert run(["show", offered[1], "--storage", world.url]) == 0
    assert "frozen" not in capsys.readouterr().err


def test_a_name_of_its_own_lets_a_bundle_in(world: World) -> None:
    packed = world.packed()
    with world.open("there.db") as store:
        store.create_study("frozen", {"name": "frozen"})
    error = advice(lambda: unbundle(packed, str(world.folder / "there.db")))
    assert "--as NAME" in error.advice
    assert run(["unbundle", str(packed), "--storage", str(world.folder / "there.db"), "--as", "mine"]) == 0


def test_force_replaces_what_is_there(world: World) -> None:
    packed = world.packed()
    error = advice(lambda: bundle("frozen", packed, world.url))
    assert "--force" in error.advice
    assert run(["bundle", "frozen", str(packed), "--storage", world.url, "--force"]) == 0


def test_substitute_makes_a_plan_that_the_target_holds(world: World, tmp_path: Path) -> None:
    arguments = ["export", "frozen", "--to", "llama.cpp", "--out", str(tmp_path / "e"), "--storage", world.url]
    refused = advice(lambda: command(*arguments))
    assert "--substitute" in refused.advice
    # The target holds larger formats only, so a limit is offered as well.
    small = advice(lambda: command(*arguments, "--substitute"))
    budget = re.match(r"budget: (.*), or offer", small.advice)
    assert budget is not None
    assert run([*arguments, "--substitute", "--budget", budget[1]]) == 0


def test_the_facts_of_the_version_that_is_offered_can_be_taken() -> None:
    version = re.search(r"--assume (\S+)", advice(lambda: capabilities("vllm", "0.0.1")).advice)
    assert version is not None
    assert capabilities("vllm", "0.0.1", version[1])


def test_the_example_of_a_pin_is_one(world: World) -> None:
    from mpsearch.cli.compute import _pins

    error = advice(lambda: _pins(["lm_head"]))
    pin = re.match(r"--pin '([^']+)'", error.advice)
    assert pin is not None
    assert _pins([pin[1]]) == {"lm_head": "int8-channel"}


def test_a_conflict_leaves_the_first_value(world: World) -> None:
    error = advice(lambda: twice(world))
    assert "the first value stays" in error.advice
    with world.open() as store:
        assert store.get("x", "y") == {"a": 1}
        assert len(store.conflicts()) == 1


def test_a_lock_that_is_let_go_lets_the_same_command_through(world: World) -> None:
    error = advice(lambda: locked(world))
    assert "run the same command again" in error.advice
    with world.open() as store:
        store.put("x", "y", {})
        assert store.get("x", "y") == {}


def test_a_rescue_mends_what_a_check_finds(world: World) -> None:
    world.sql("DELETE FROM value WHERE kind = 'measurement'")
    error = advice(lambda: command("db", "check", world.url))
    told = [words for words in commands(error.advice) if words[:2] == ["db", "rescue"]]
    assert told
    target = str(world.folder / "rescued.db")
    assert run(["db", "rescue", told[0][2], target]) == 0
    assert run(["db", "check", target]) == 0


def test_fewer_bits_of_a_wrong_group_are_told(world: World) -> None:
    error = advice(lambda: mp.cost(Layers((LAYER,)), ["int4-g64"]))
    sizes = re.findall(r"g(\d+)", error.because)
    assert sizes
    assert all(not mp.Format.parse(f"int4-g{size}").refuses(LAYER) for size in sizes)


def test_a_list_is_what_batches_should_be() -> None:
    error = advice(lambda: mp.score(net(), iter([ONES]), ["int4-channel"]))  # type: ignore[arg-type]
    assert "list(…)" in error.advice
    assert mp.score(net(), list(iter([ONES])), ["int4-channel"]).value.shape == (2, 1)


def test_a_field_that_is_named_is_read(world: World) -> None:
    path = world.write("a.jsonl", '{"prompt": "some text"}\n')
    error = advice(lambda: read_texts(Source(str(path))))
    key = re.search(r'text_key = "([^"]+)"', error.advice)
    assert key is not None
    assert read_texts(Source(str(path), key=key[1])) == ["some text"]
