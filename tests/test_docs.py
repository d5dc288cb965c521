"""The documents say what is true: codes are listed, code blocks run, links lead somewhere."""

from __future__ import annotations

import re
from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parents[1]
PAGES = [ROOT / "README.md", *sorted((ROOT / "docs").rglob("*.md")), ROOT / "benchmarks" / "RESULTS.md"]


def test_every_code_that_is_raised_is_explained() -> None:
    raised = set()
    for file in (ROOT / "mpsearch").rglob("*.py"):
        raised |= set(re.findall(r'"([EWN]\d{3})"', file.read_text()))
    explained = set(re.findall(r"^\| ([EWN]\d{3}) \|", (ROOT / "docs" / "errors.md").read_text(), re.MULTILINE))
    assert raised == explained


def anchors(page: Path) -> set[str]:
    """Anchors of the headings of a page, as GitHub and MkDocs make them where they agree."""
    text = re.sub(r"^```.*?^```$", "", page.read_text(encoding="utf-8"), flags=re.MULTILINE | re.DOTALL)
    headings = (re.sub(r"[`*]", "", line) for line in re.findall(r"^#+ (.*)$", text, re.MULTILINE))
    return {re.sub(r"[^\w\s-]", "", heading.lower()).strip().replace(" ", "-") for heading in headings}


@pytest.mark.parametrize("page", PAGES, ids=lambda page: page.name)
def test_links_lead_to_files_and_headings(page: Path) -> None:
    for target in re.findall(r"\]\(([^)\s]+)\)", page.read_text(encoding="utf-8")):
        if target.startswith("http"):
            continue
        name, _, anchor = target.partition("#")
        to = page.parent / name if name else page
        assert to.exists(), target
        assert not anchor or anchor in anchors(to), target


def test_the_python_blocks_about_solvers_run(capsys: pytest.CaptureFixture[str]) -> None:
    names: dict[str, object] = {}
    for block in re.findall(r"```python\n(.*?)```", (ROOT / "docs" / "solvers.md").read_text(), re.DOTALL):
        exec(compile(block, "solvers.md", "exec"), names)
    first, second = capsys.readouterr().out.splitlines()
    assert first.startswith("[1 0 2] optimal 0.0")
    assert second.startswith("[2")


def test_the_study_file_of_the_readme_is_one(tmp_path: Path) -> None:
    from mpsearch.spec import StudySpec

    (block,) = re.findall(r"```toml\n(.*?)```", (ROOT / "README.md").read_text(), re.DOTALL)
    (tmp_path / "study.toml").write_text(block)
    spec = StudySpec.load(tmp_path / "study.toml")
    assert spec.name == "laptop"
    assert spec.pins == {"model.embed_tokens": "int8-channel"}


def test_every_field_of_a_study_is_documented() -> None:
    from dataclasses import fields

    from mpsearch.spec import StudySpec

    page = (ROOT / "docs" / "study-file.md").read_text()
    for field in fields(StudySpec):
        if not field.name.endswith("_settings"):
            assert f"`{field.name}`" in page, field.name


def test_every_format_stands_in_the_table_of_references() -> None:
    from fnmatch import fnmatchcase

    from mpsearch.format import all_formats
    from mpsearch.formats.activation import Activation

    page = (ROOT / "docs" / "formats.md").read_text()
    table = page[page.index("## Compared with") : page.index("## Bytes")]
    rows = [line.split(" | ") for line in table.splitlines() if line.startswith("| `")]
    patterns = [name for row in rows for code in re.findall(r"`([^`]+)`", row[0]) for name in code.split()]
    names = [str(fmt) for fmts in all_formats().values() for fmt in fmts] + [f"@{text}" for text in Activation.examples]
    assert [name for name in names if not any(fnmatchcase(name, pattern) for pattern in patterns)] == []
    assert all(row[-1].strip(" |") for row in rows)


def test_every_estimator_stands_in_the_tables_of_its_page() -> None:
    from mpsearch.cli.estimators import _catalogue
    from tests.architectures import FAMILIES
    from tests.test_architectures import REFUSED

    page = (ROOT / "docs" / "estimators.md").read_text()
    listed = page[page.index("## All of them") : page.index("## Which to trust")]
    families = page[page.index("## Architectures") :]
    assert f"| estimator | {' | '.join(FAMILIES)} |" in families
    for row in _catalogue():
        also = [what for what in row["sees"] if what != "weights"]
        predicts = row["predicts"] + (f" [{', '.join(also)}]" if also else "")
        needs, parts = ", ".join(row["needs"]), "yes" if row["parts"] else ""
        name = row["estimator"]
        assert f"| `{name}` | {predicts} | {needs} | {parts} | {row['streams']} |" in listed
        cells = next(line for line in families.splitlines() if line.startswith(f"| `{name}` |"))[2:-2].split(" | ")[1:]
        refused = [family for family, cell in zip(FAMILIES, cells, strict=True) if cell == "refused"]
        blind = {"own loss"} if "logits" in row["needs"] else set()
        assert refused == [family for family in FAMILIES if (name, family) in REFUSED or family in blind]
