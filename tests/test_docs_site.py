"""The site of the documents builds without a warning, needs no network, and has a page for all that there is."""

from __future__ import annotations

import logging
import re
import sys
from html.parser import HTMLParser
from pathlib import Path
from typing import Any

import pytest

import mpsearch
from mpsearch import registry
from mpsearch.capabilities import targets
from mpsearch.explaining import entries

ROOT = Path(__file__).resolve().parents[1]


class Found(HTMLParser):
    """What a page loads, links to, and can be linked to by."""

    def __init__(self, text: str) -> None:
        super().__init__()
        self.loads: list[str] = []
        self.links: list[str] = []
        self.ids: set[str] = set()
        self.feed(text)

    def handle_starttag(self, tag: str, attrs: list[tuple[str, str | None]]) -> None:
        held = {name: value or "" for name, value in attrs}
        self.ids.add(held.get("id", ""))
        if tag == "a":
            self.links.append(held.get("href", ""))
        else:
            self.loads += [held[name] for name in ("src", "srcset", "href") if name in held]


@pytest.fixture(scope="module")
def site(tmp_path_factory: pytest.TempPathFactory) -> Path:
    pytest.importorskip("mkdocs")
    from mkdocs.commands.build import build
    from mkdocs.config import load_config

    folder = tmp_path_factory.mktemp("site")
    told: list[str] = []

    class Hears(logging.Handler):
        def emit(self, record: logging.LogRecord) -> None:
            told.append(record.getMessage())

    log, hears = logging.getLogger("mkdocs"), Hears(logging.WARNING)
    log.addHandler(hears)
    try:
        config = load_config(str(ROOT / "mkdocs.yml"), site_dir=str(folder), strict=True)
        config.plugins.on_startup(command="build", dirty=False)
        build(config)
    finally:
        log.removeHandler(hears)
        for name in ("make_text", "make_components", "make_reference"):
            sys.modules.pop(name, None)
    assert told == []
    return folder


@pytest.fixture(scope="module")
def pages(site: Path) -> dict[Path, Found]:
    return {path: Found(path.read_text(encoding="utf-8")) for path in site.rglob("*.html")}


def text(site: Path, page: str) -> str:
    return (site / page).read_text(encoding="utf-8")


def test_nothing_is_loaded_from_elsewhere(site: Path, pages: dict[Path, Found]) -> None:
    assert len(pages) > 90
    for path, found in pages.items():
        assert [what for what in found.loads if re.match(r"(https?:)?//", what)] == [], path
    for style in site.rglob("*.css"):
        sheet = style.read_text(encoding="utf-8")
        assert re.findall(r"""url\(["']?(?:https?:)?//""", sheet) == [], style
        assert "@import" not in sheet, style


def test_links_of_the_site_lead_somewhere(site: Path, pages: dict[Path, Found]) -> None:
    for path, found in pages.items():
        if path.name == "404.html":
            continue
        for link in found.links:
            name, _, anchor = link.partition("#")
            if re.match(r"https?:|mailto:", name) or not link:
                continue
            to = (path.parent / name).resolve() if name else path
            assert to.is_file(), (path, link)
            if anchor and to in pages:
                assert anchor in pages[to].ids, (path, link)


@pytest.mark.parametrize("kind", ["estimators", "solvers", "searchers"])
def test_every_component_has_a_page_with_its_facts(site: Path, kind: str) -> None:
    for name in registry.BUILT_IN[kind]:
        page = text(site, f"{kind}/{name}.html")
        made: Any = registry.load(kind, name)
        for word in ("Example", "settings", "in the code", *(("Formula",) if "\n    score = " in made.__doc__ else ())):
            assert word in page, (name, word)
        assert page.count("<tr>") >= 6, name
        assert ">>> " in re.sub(r"<[^>]+>", "", page).replace("&gt;", ">"), name


def test_every_target_has_a_page(site: Path) -> None:
    for name in {*targets(), *registry.BUILT_IN["exporters"]}:
        page = text(site, f"exports/{name}.html")
        assert name not in targets() or "By the table that plans are checked with" in page, name


def test_every_name_command_and_code_is_in_the_reference(site: Path) -> None:
    from typer.main import get_command

    from mpsearch.cli.main import app

    python = text(site, "reference/python.html")
    assert [name for name in mpsearch.__all__ if f'id="{name.lower()}' not in python] == []
    commands = text(site, "reference/commands.html")
    assert [name for name in get_command(app).commands if f'id="mpsearch-{name}' not in commands] == []  # type: ignore[attr-defined]
    codes = text(site, "reference/codes.html")
    assert [code for code in entries() if f'id="{code.lower()}"' not in codes] == []
    assert [code for code in entries() if f"codes.html#{code.lower()}" not in text(site, "errors.html")] == []


def test_pictures_have_a_dark_one(site: Path) -> None:
    shown = {name for page in site.rglob("*.html") for name in re.findall(r"pictures/([\w-]+)\.png", page.read_text())}
    assert {"front", "plan_heatmap"} <= shown
    for name in shown:
        assert (site / "pictures" / f"{name}.png").is_file()
        assert name.endswith("-dark") or f"{name}-dark" in shown
