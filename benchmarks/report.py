"""How small and quick the one-file report is in headless Chromium: size, until it answers, hover, heat map.

    python -m benchmarks.report

Each time is the median of 20, in milliseconds: ``work`` until everything is laid out, ``frame`` until it was painted.
"""

from __future__ import annotations

import argparse
import json
import shutil
import statistics
import tempfile
import time
from pathlib import Path
from typing import Any

from playwright.sync_api import Browser, sync_playwright

from mpsearch.testing.views import pretended
from mpsearch.web.report import report_html

FLAGS = ["--no-sandbox", "--disable-gpu", "--disable-dev-shm-usage", "--disable-background-networking"]
#: Most milliseconds, and most bytes of 10,000 plans of 300 layers.
LIMITS = {"interactive": 2000.0, "hover": 50.0, "map": 100.0, "bytes": 2_000_000.0}

#: Times from a pointer's move over a plan to the changed map.
HOVER = """async (times) => {
  const canvas = document.querySelector("#front canvas.over");
  const box = canvas.getBoundingClientRect();
  const shown = document.querySelector("#shown");
  const found = [];
  for (let i = 0; found.length < times && i < 4000; i += 1) {
    const before = shown.textContent;
    const at = { clientX: box.left + 75 + (i * 37) % (box.width - 100), clientY: box.top + 55 + (i * 53) % 300 };
    const start = performance.now();
    canvas.dispatchEvent(new PointerEvent("pointermove", at));
    if (shown.textContent === before) continue;
    void document.querySelector("#map").offsetHeight;
    const work = performance.now() - start;
    await new Promise((done) => requestAnimationFrame(() => setTimeout(done)));
    found.push([work, performance.now() - start]);
  }
  return found;
}"""

MAP = """async (times) => {
  const mode = document.querySelector("#modes select");
  const found = [];
  for (let i = 0; i < times; i += 1) {
    const start = performance.now();
    mode.selectedIndex = (i + 1) % mode.options.length;
    mode.dispatchEvent(new Event("change"));
    void document.querySelector("#map").offsetHeight;
    const work = performance.now() - start;
    await new Promise((done) => requestAnimationFrame(() => setTimeout(done)));
    found.push([work, performance.now() - start]);
  }
  return found;
}"""


def measure_report(browser: Browser, plans: int, layers: int, formats: int, times: int) -> dict[str, Any]:
    """Bytes of the file, seconds to write it, medians of what is done with it."""
    view = pretended(plans, layers, formats)
    begun = time.perf_counter()
    text = report_html(view)
    found: dict[str, Any] = {"plans": plans, "layers": layers, "formats": formats, "bytes": len(text.encode())}
    found["seconds_to_write"] = time.perf_counter() - begun
    with tempfile.TemporaryDirectory() as folder:
        file = Path(folder) / "report.html"
        file.write_text(text, encoding="utf-8")
        ready = []
        for _ in range(times):
            page = browser.new_page(viewport={"width": 1280, "height": 900})
            page.goto(file.as_uri())
            page.wait_for_selector("html[data-ready]")
            ready.append(float(page.evaluate("document.documentElement.dataset.ready")))
            if len(ready) < times:
                page.close()
        found["interactive"] = statistics.median(ready)
        for name, script in (("hover", HOVER), ("map", MAP)):
            taken = page.evaluate(script, times)
            assert len(taken) == times, name
            found[name] = statistics.median(work for work, _ in taken)
            found[f"{name}_frame"] = statistics.median(frame for _, frame in taken)
        page.close()
    return found


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--times", type=int, default=20)
    given = parser.parse_args()
    path = shutil.which("chromium")
    if path is None:
        raise SystemExit("Chromium is not installed: apt-get install chromium")
    with sync_playwright() as playwright:
        browser = playwright.chromium.launch(executable_path=path, args=FLAGS)
        for plans, layers in ((10_000, 300), (10_000, 1_000)):
            found = measure_report(browser, plans, layers, 5, given.times)
            print(json.dumps({name: round(value, 1) for name, value in found.items()}))
            limits = LIMITS if layers == 300 else {name: most for name, most in LIMITS.items() if name != "bytes"}
            over = [name for name, most in limits.items() if found[name] > most]
            print("all within their limits" if not over else f"over the limit: {', '.join(over)}")
        browser.close()


if __name__ == "__main__":
    main()
