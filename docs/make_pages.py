"""Makes the pages of the documentation that follow from the code; `mkdocs build` calls it (`make docs`).

Written pages stand in ``docs/``. Made ones exist only in the site: one per estimator, solver, searcher and target, the
reference of Python names and commands, and what each code of an error means.
"""

from __future__ import annotations

import re
from pathlib import Path
from typing import TYPE_CHECKING

import make_components
import make_reference

if TYPE_CHECKING:
    from mkdocs.config.defaults import MkDocsConfig
    from mkdocs.structure.files import Files
    from mkdocs.structure.pages import Page

ROOT = Path(__file__).resolve().parents[1]
#: Files outside of docs/ that are pages too, and how pages of docs/ link to them.
OUTSIDE = {"results.md": ROOT / "benchmarks" / "RESULTS.md"}


def pages() -> dict[str, str]:
    """Return the made pages: path below ``docs/`` -> Markdown."""
    found = {
        "reference/python.md": make_reference.python(),
        "reference/commands.md": make_reference.commands(),
        "reference/codes.md": make_reference.codes(),
    }
    found.update({f"estimators/{name}.md": text for name, text in make_components.estimators()})
    found.update({f"{kind}/{name}.md": text for kind, name, text in make_components.solvers()})
    for name in make_components.target_names():
        if not (ROOT / "docs" / "exports" / f"{name}.md").exists():
            found[f"exports/{name}.md"] = make_components.target(name)
    found.update({path: file.read_text(encoding="utf-8") for path, file in OUTSIDE.items()})
    return found


def styles() -> str:
    """Return the colours of code, light and dark."""
    from pygments.formatters import HtmlFormatter

    dark = HtmlFormatter(style="github-dark").get_style_defs(".highlight")
    light = HtmlFormatter(style="default").get_style_defs(".highlight")
    return f"{light}\n@media (prefers-color-scheme: dark) {{\n{dark}\n}}\n"


def on_files(files: Files, config: MkDocsConfig) -> Files:
    """Add the made pages, and name them in the navigation."""
    from mkdocs.structure.files import File

    made = pages()
    for path, text in {**made, "code.css": styles()}.items():
        files.append(File.generated(config, path, content=text))
    written = [file.src_uri for file in files.documentation_pages()]
    lists = {
        "Targets": "exports/",
        "Estimators": "estimators/",
        "Solvers": "solvers/",
        "Searchers": "searchers/",
    }
    for entry in config.nav or ():
        for title, items in entry.items():
            if title in lists and isinstance(items, list):
                chosen = sorted(path for path in written if path.startswith(lists[title]))
                items.extend({Path(path).name[: -len(".md")]: path} for path in chosen)
    return files


def on_page_markdown(markdown: str, page: Page, config: MkDocsConfig, files: Files) -> str:
    """Turn links that leave ``docs/`` into links to their pages, and add what only the site can say."""
    path = page.file.src_uri
    up = "../" * path.count("/")
    markdown = re.sub(r"\]\((?:\.\./)+benchmarks/RESULTS\.md", f"]({up}results.md", markdown)
    if path == "results.md":
        markdown = markdown.replace("](../docs/", "](")
    if path == "errors.md":
        markdown = re.sub(r"^\| ([EWN])(\d{3}) \|", _linked, markdown, flags=re.MULTILINE)
    folder, _, name = path.removesuffix(".md").rpartition("/")
    if folder == "exports" and (ROOT / "docs" / path).exists():
        markdown = f"{markdown.rstrip()}\n\n{make_components.holds(name)}"
    return markdown


def _linked(found: re.Match[str]) -> str:
    code = found[1] + found[2]
    return f"| [{code}](reference/codes.md#{code.lower()}) |"


def on_page_content(html: str, page: Page, config: MkDocsConfig, files: Files) -> str:
    """Show the dark one of a picture to those who read in the dark."""

    def both(found: re.Match[str]) -> str:
        dark = found[2].replace(".png", "-dark.png")
        return f'<picture><source media="(prefers-color-scheme: dark)" srcset="{dark}">{found[0]}</picture>'

    return re.sub(r'<img([^>]*)src="([^"]*pictures/[^"]+\.png)"[^>]*>', both, html)
