"""The frame of the project: what importing costs, what is linked, what is never used."""

from __future__ import annotations

import ast
import importlib
import os
import subprocess
import sys
import tomllib
from collections.abc import Iterator
from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parents[1]
PACKAGE = ROOT / "mpsearch"
#: Proofs are scripts for other tools' environments: data here.
SOURCES = sorted(source for source in PACKAGE.rglob("*.py") if source.parent.name != "proofs")
HEAVY = ("torch", "transformers", "ray", "sqlalchemy", "alembic")
#: Import names that only an extra installs.
EXTRAS = {"ray", "fastapi", "uvicorn", "starlette", "PIL", "onnx", "onnxruntime", "psycopg"}
#: Modules beside the trunk that stand above `study`; they load what they need when they are called.
DOORS = {"mpsearch.ablation", "mpsearch.api"}
#: Modules that turn bytes into code or objects (rule: what is read from disk is data).
BARRED_MODULES = {"pickle", "_pickle", "cloudpickle", "dill", "marshal", "shelve", "joblib"}
BARRED_CALLS = {"eval", "exec", "__import__", "torch.load", "torch.export.load"}


def module_name(source: Path) -> str:
    parts = source.relative_to(ROOT).with_suffix("").parts
    return ".".join(parts[:-1] if parts[-1] == "__init__" else parts)


def run_python(*arguments: str) -> subprocess.CompletedProcess[str]:
    return subprocess.run(
        [sys.executable, *arguments], capture_output=True, text=True, cwd=ROOT, timeout=120, check=False
    )


def imported_modules(importtime: str) -> set[str]:
    """Top-level names in what ``-X importtime`` prints."""
    lines = (line for line in importtime.splitlines() if line.startswith("import time:"))
    return {line.rsplit("|", 1)[1].strip().partition(".")[0] for line in lines}


def test_import_is_light() -> None:
    done = run_python("-X", "importtime", "-c", "import mpsearch")
    assert done.returncode == 0, done.stderr
    assert "mpsearch" in imported_modules(done.stderr)
    assert not imported_modules(done.stderr) & set(HEAVY)


def test_help_is_light() -> None:
    done = run_python("-X", "importtime", "-m", "mpsearch.cli.main", "--help")
    assert done.returncode == 0, done.stderr
    assert "usage" in done.stdout.lower()
    assert not imported_modules(done.stderr) & set(HEAVY)


@pytest.mark.parametrize("name", ["sensitivity", "solvers", "storage"])
def test_top_level_links_resolve_and_are_relative(name: str) -> None:
    link = ROOT / name
    assert link.is_symlink()
    assert not os.path.isabs(os.readlink(link))
    assert link.resolve() == PACKAGE / name
    assert link.is_dir()


def test_every_folder_with_code_is_a_package() -> None:
    folders = {source.parent for source in SOURCES}
    assert sorted(str(folder.relative_to(ROOT)) for folder in folders if not (folder / "__init__.py").is_file()) == []


@pytest.mark.parametrize("source", SOURCES, ids=module_name)
def test_module_imports(source: Path) -> None:
    missing = None
    try:
        importlib.import_module(module_name(source))
    except ModuleNotFoundError as error:
        missing = error.name or str(error)
    # A module behind an extra may need that extra, and nothing else.
    assert missing is None or missing.partition(".")[0] in EXTRAS


def test_every_trunk_module_is_under_the_import_rules() -> None:
    contracts = tomllib.loads((ROOT / "pyproject.toml").read_text())["tool"]["importlinter"]["contracts"]
    trunk = ({module_name(source) for source in PACKAGE.glob("*.py")} - DOORS) | {
        "mpsearch.bundles.*",
        "mpsearch.client.*",
        "mpsearch.formats.*",
        "mpsearch.plot.*",
        "mpsearch.views.*",
    }
    for contract in contracts:
        if contract["id"] in ("trunk", "light"):
            assert set(contract["source_modules"]) == trunk, contract["id"]


def barred(tree: ast.AST) -> Iterator[str]:
    """Name what a module uses that could run what it reads."""
    for node in ast.walk(tree):
        if not isinstance(node, ast.stmt | ast.expr):
            continue
        names: list[str] = []
        if isinstance(node, ast.Import):
            names = [alias.name for alias in node.names if alias.name.partition(".")[0] in BARRED_MODULES]
        elif isinstance(node, ast.ImportFrom):
            found = [f"{node.module}.{alias.name}" for alias in node.names]
            names = [name for name in found if name.partition(".")[0] in BARRED_MODULES or name in BARRED_CALLS]
        elif isinstance(node, ast.Call):
            call = ast.unparse(node.func)
            pickles = [k.value for k in node.keywords if k.arg == "allow_pickle"]
            if call in BARRED_CALLS or any(ast.unparse(value) != "False" for value in pickles):
                names = [call]
        yield from (f"line {node.lineno}: {name}" for name in names)


@pytest.mark.parametrize("source", SOURCES, ids=module_name)
def test_nothing_that_is_read_can_run(source: Path) -> None:
    assert list(barred(ast.parse(source.read_text(encoding="utf-8")))) == []


@pytest.mark.parametrize(
    "text",
    [
        "import pickle",
        "import marshal as m",
        "from joblib import load",
        "eval('1')",
        "exec('1')",
        "torch.load('x')",
        "from torch import load",
        "np.load('x', allow_pickle=True)",
        "np.load('x', allow_pickle=flag)",
    ],
)
def test_the_search_for_barred_code_finds_it(text: str) -> None:
    assert list(barred(ast.parse(text)))


@pytest.mark.parametrize("text", ["model.eval()", "np.load('x')", "np.load('x', allow_pickle=False)", "import json"])
def test_the_search_for_barred_code_lets_the_rest_pass(text: str) -> None:
    assert not list(barred(ast.parse(text)))
