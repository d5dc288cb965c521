"""Every command and every block of code of the documents is run: those of one page in order, in one folder."""

from __future__ import annotations

import json
import os
import re
import shlex
import shutil
import sys
from collections import Counter
from collections.abc import Callable, Iterator, Mapping
from contextlib import ExitStack
from dataclasses import replace
from functools import partial
from pathlib import Path

import pytest

import mpsearch as mp
from mpsearch import profiled
from mpsearch.capabilities import capabilities
from mpsearch.cli.main import run
from mpsearch.format import Format
from mpsearch.hardware.bench import Bench
from mpsearch.hardware.clock import Clock
from mpsearch.plan import BitPlan
from mpsearch.spec import StudySpec
from mpsearch.wholes import corrected
from tests.doc_blocks import ROOT, Kitchen, blocks, commands, lines_of_text, make_model
from tests.export_plans import plan_of
from tests.postgres import free_port
from tests.service_shell import command

DOCS = ROOT / "docs"
PAGES = [ROOT / "README.md", *sorted(DOCS.glob("*.md")), *sorted((DOCS / "exports").glob("*.md"))]
#: Pages that another test follows, and which.
FOLLOWED = {"service.md": "tests/test_service.py"}
#: Blocks that show and do not tell anybody to type.
SHOWN = ("", "text")
#: How many blocks are not run, each of which says why.
NOT_RUN = 26
#: Targets that want more than this model's layers in the usual formats: one format for all of them.
FORMATS = {
    "aimet": "int4-channel-full@int8-tensor-static", "mct": "int8-channel-full@int8-tensor-static",
    "mixllm": "int8-g128", "exllamav3": "int4-g128", "transformers-fp8": "fp8-e4m3-b128x128@fp8-e4m3-g128",
    "vllm-online": "fp8-e4m3-channel@fp8-e4m3-token",
}  # fmt: skip


@pytest.fixture(scope="module", autouse=True)
def few_tokens() -> Iterator[None]:
    """Studies of the pages take few tokens and no further budgets, where they do not say; kernels are timed briefly."""
    usual = StudySpec.__init__.__defaults__
    assert usual is not None
    # The defaults belong to the last arguments.
    names = list(StudySpec.__dataclass_fields__)[-len(usual) :]
    time = Bench.time
    few = {"tokens": 256, "validation_tokens": 256, "length": 64, "points": 1}
    with pytest.MonkeyPatch.context() as patch:
        changed = tuple(few.get(name, value) for name, value in zip(names, usual, strict=True))
        patch.setattr(StudySpec.__init__, "__defaults__", changed)
        patch.setattr(os, "cpu_count", lambda: 1)
        # Whole models are run by `measure` alone, and kernels without going through copies of their weights.
        patch.setattr(profiled, "corrected", lambda *args: corrected(*args[:-1], 0))
        patch.setattr(Bench, "time", lambda bench, kernel, stream=0: time(bench, kernel))
        patch.setattr(profiled, "Timekeeper", partial(profiled.Timekeeper, clock=Clock(limit=0.05)))
        patch.setattr(profiled, "Runner", partial(profiled.Runner, clock=Clock(limit=0.1)))
        yield


@pytest.fixture(scope="module")
def pantry(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """What pages take for granted: a model, texts, a study and its plan, and a plan of another tool."""
    folder = tmp_path_factory.mktemp("pantry")
    make_model(folder / "model")
    (folder / "calib.txt").write_text(lines_of_text(120))
    study = mp.study(
        "STUDY",
        model=str(folder / "model"),
        calibration=str(folder / "calib.txt"),
        formats=["int2-g64", "int4-g64", "int8-g64"],
        budgets=["weights <= 4.25 bits"],
        estimator="weight_mse",
        storage=str(folder / "mpsearch.db"),
        out=str(folder / "out"),
    )
    study.run()
    study.plan().save(folder / "plan.json")
    study.plan("weights <= 3 bits").save(folder / "theirs.json")
    mp.bundle("STUDY", folder / "study.mps", storage=str(folder / "mpsearch.db"))
    study.store.close()
    return folder


@pytest.fixture
def kitchen(
    pantry: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> Kitchen:
    for name in ("model", "MODEL", "FOLDER", "llama"):
        (tmp_path / name).symlink_to(pantry / "model")
    for name in ("calib.txt", "sample.txt", "wiki.txt"):
        shutil.copy(pantry / "calib.txt", tmp_path / name)
    text = (pantry / "calib.txt").read_text().splitlines()
    (tmp_path / "calib.jsonl").write_text("".join(json.dumps({"text": line}) + "\n" for line in text))
    for name in ("plan.json", "PLAN.json", "ours.json"):
        shutil.copy(pantry / "plan.json", tmp_path / name)
    (tmp_path / "other").mkdir()
    scheme = {"quant_method": "auto-round", "bits": 4, "group_size": 64, "sym": True, "data_type": "int"}
    (tmp_path / "other" / "config.json").write_text(json.dumps({"quantization_config": scheme}))
    monkeypatch.chdir(tmp_path)
    monkeypatch.setenv("XDG_STATE_HOME", str(tmp_path / "state"))
    return Kitchen(tmp_path, capsys)


def stock(kitchen: Kitchen, pantry: Path, *names: str, into: str = "mpsearch.db") -> None:
    """Put the study of the pantry into a database, under each name."""
    for name in names:
        assert run(["unbundle", str(pantry / "study.mps"), "--as", name, "--storage", into]) == 0


def _exports(kitchen: Kitchen, pantry: Path) -> None:
    stock(kitchen, pantry, "NAME")
    held_plan("llama.cpp", pantry).save(kitchen.folder / "plan.json")
    shutil.copy(pantry / "theirs.json", kitchen.folder)


def _imports(kitchen: Kitchen, pantry: Path) -> None:
    stock(kitchen, pantry, "STUDY")
    words = ["export", "STUDY", "--to", "compressed-tensors", "--out", "quantised", "--substitute"]
    assert run(words) == 0


def _sharing(kitchen: Kitchen, pantry: Path) -> None:
    stock(kitchen, pantry, "tiny-llama")
    stock(kitchen, pantry, "theirs", into="theirs.db")
    stock(kitchen, pantry, "mine", into="results.db")


def _solvers(kitchen: Kitchen, pantry: Path) -> None:
    stock(kitchen, pantry, "STUDY")
    (kitchen.folder / "scores.csv").write_text("row,int2,int8\nlm_head,3,0.1\na.down_proj,2,0.2\n")
    (kitchen.folder / "bytes.csv").write_text("row,int2,int8\nlm_head,10,40\na.down_proj,10,40\n")


def _estimators(kitchen: Kitchen, pantry: Path) -> None:
    (kitchen.folder / "study.toml").write_text(
        'name = "small"\nmodel = "model"\ncalibration = "calib.txt"\nformats = ["int2-g64", "int4-g64"]\n'
        'budgets = ["weights <= 4 bits"]\ntokens = 64\nvalidation_tokens = 64\nlength = 32\n'
    )


PREPARED: Mapping[str, Callable[[Kitchen, Path], object]] = {
    "estimators.md": _estimators,
    "exports.md": _exports,
    "imports.md": _imports,
    "plan-schema.md": lambda kitchen, pantry: shutil.copy(pantry / "theirs.json", kitchen.folder),
    "operations.md": lambda kitchen, pantry: stock(kitchen, pantry, "STUDY", into="results.db"),
    "sharing.md": _sharing,
    "solvers.md": _solvers,
}


def held_plan(target: str, pantry: Path) -> BitPlan:
    """A plan that a target holds: of each layer its usual formats, the first that fits, else the layer's own type."""
    if target == "mct":
        return plan_of({"fc1": FORMATS[target], "fc2": FORMATS[target]})
    able = capabilities(target)
    found = BitPlan.load(pantry / "plan.json")
    own = Format.parse("bf16")
    menu = [Format.parse(text) for text in ([FORMATS[target]] if target in FORMATS else able.menu)]
    group = {name: names for names in able.groups(found.layers) for name in names}
    by_name = {layer.name: layer for layer in found.layers}
    chosen = {}
    for layer in found.layers:
        alike = [by_name[name] for name in group.get(layer.name, [layer.name])]
        fits = [fmt for fmt in menu if not any(able.refuses(one, fmt) for one in alike)]
        chosen[layer.name] = fits[0] if fits else own
    return BitPlan(found.layers, chosen, found.model)


@pytest.mark.parametrize(
    "page", [page for page in PAGES if page.name not in (*FOLLOWED, "http.md") and blocks(page)], ids=lambda p: p.stem
)
def test_the_blocks_of_a_page_run(page: Path, kitchen: Kitchen, pantry: Path) -> None:
    if page.parent.name == "exports":
        held_plan(page.stem, pantry).save(kitchen.folder / "PLAN.json")
    PREPARED.get(page.name, lambda kitchen, pantry: None)(kitchen, pantry)
    for block in blocks(page):
        if not block.reason and block.language not in SHOWN:
            kitchen.cook(block)


def test_the_blocks_about_http_run(kitchen: Kitchen, pantry: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.delenv("XDG_STATE_HOME")
    monkeypatch.setenv("HOME", str(kitchen.folder))
    for place in ("mpsearch.db", "results.db"):
        stock(kitchen, pantry, "laptop", into=place)
    first, *others = [block for block in blocks(DOCS / "http.md") if block.language not in SHOWN]
    lines = [shlex.split(line) for line in commands(first.text)]
    assert [words[:2] for words in lines] == [["mpsearch", "serve"]] * 4
    doors = [free_port() for _ in lines]
    with ExitStack() as servers:
        running = [
            servers.enter_context(command(*words[1:], "--port", str(door)))
            for words, door in zip(lines, doors, strict=True)
        ]
        said = [[server.stdout.readline().split()[0] for _ in (1, 2)] for server in running if server.stdout]
        assert said == [["open", "read"]] * 3 + [["read", "tokens"]]
        for block in others:
            # The port that all who try the page take may be another one's here.
            kitchen.cook(replace(block, text=block.text.replace("8765", str(doors[1]))))
    assert "cancelled" in kitchen.out
    assert '"bound"' in kitchen.out
    assert "event: end" in kitchen.out


def test_blocks_that_are_not_run_say_why() -> None:
    every = [block for page in PAGES for block in blocks(page)]
    left = {str(block): block.reason for block in every if block.reason}
    sys.stdout.write("".join(f"{place}: {reason}\n" for place, reason in left.items()))
    words = {reason.split()[0] for reason in left.values()}
    assert words <= {"needs", "changes", "goes"}
    # As many as there are; a new one is a decision.
    assert len(left) == NOT_RUN
    ran = Counter(block.language for block in every if not block.reason)
    assert ran["sh"] >= 45
    assert ran["python"] >= 14


def test_what_can_be_typed_is_in_blocks_that_are_run() -> None:
    for page in PAGES:
        for block in blocks(page):
            assert block.language in ("sh", "python", "toml", *SHOWN) or block.reason, block
            if block.language in SHOWN:
                assert "mpsearch " not in block.text.replace("mpsearch.", ""), block
        fences = len(re.findall(r"^```", page.read_text(encoding="utf-8"), re.MULTILINE))
        assert fences == 2 * len(blocks(page)), page


@pytest.mark.parametrize("page", FOLLOWED)
def test_pages_that_another_test_follows_are_read_by_it(page: str) -> None:
    assert f'"{page}"' in (ROOT / FOLLOWED[page]).read_text(encoding="utf-8")
