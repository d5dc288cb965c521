"""How quick the live page is in headless Chromium: first load, hover, heat map, slider; medians of 20.

    python -m benchmarks.page --plans 10000 --layers 1000

The report that needs no server is measured by the same names where `report` is asked for.
"""

from __future__ import annotations

import argparse
import json
import shutil
import statistics
import tempfile
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from mpsearch.errors import InputError
from mpsearch.spec import StudySpec
from mpsearch.testing.views import pretended
from mpsearch.views.study_view import StudyView
from mpsearch.web.server.resolving import Warm
from mpsearch.web.server.views import Shown
from tests.http_server import Served, served, sqlite

FLAGS = ["--no-sandbox", "--disable-gpu", "--disable-dev-shm-usage", "--disable-background-networking"]
#: Most milliseconds, and most bytes of the first load.
LIMITS = {"interactive": 2000.0, "hover": 50.0, "map": 100.0, "slider": 150.0, "bytes": 1_500_000.0}

#: Times from a pointer's move over a plan to the changed map, laid out.
HOVER = """async (times) => {
  const canvas = document.querySelector("#room-front canvas.over");
  const box = canvas.getBoundingClientRect();
  const plan = document.querySelector("#plan");
  const found = [];
  const move = (x, y) => canvas.dispatchEvent(
    new PointerEvent("pointermove", { clientX: box.left + x, clientY: box.top + y, bubbles: true }));
  for (let i = 0; found.length < times && i < 4000; i += 1) {
    const before = plan.textContent;
    const start = performance.now();
    move(75 + (i * 37) % (box.width - 100), 55 + (i * 53) % (box.height - 110));
    if (plan.textContent === before) {
      // Its formats may be on their way.
      for (let k = 0; k < 40 && plan.textContent === before; k += 1) await new Promise((done) => setTimeout(done, 1));
      if (plan.textContent === before) continue;
    }
    void document.querySelector("#room-map").offsetHeight;
    found.push(performance.now() - start);
    await new Promise((done) => requestAnimationFrame(done));
  }
  return found;
}"""

MAP = """async (times) => {
  const mode = document.querySelector("#map-mode");
  const found = [];
  for (let i = 0; i < times; i += 1) {
    const start = performance.now();
    mode.selectedIndex = (i + 1) % mode.options.length;
    mode.dispatchEvent(new Event("change"));
    void document.querySelector("#room-map").offsetHeight;
    found.push(performance.now() - start);
    await new Promise((done) => requestAnimationFrame(done));
  }
  return found;
}"""

SLIDER = """async (times) => {
  const sliders = [...document.querySelectorAll("#room-sliders input[type=range]")];
  const plan = document.querySelector("#plan");
  const found = [];
  if (sliders.length > 1) {
    sliders[1].value = 150;
    sliders[1].dispatchEvent(new Event("input"));
    await new Promise((done) => setTimeout(done, 500));
  }
  for (let i = 0; i < times; i += 1) {
    const before = plan.textContent;
    const start = performance.now();
    sliders[0].value = 60 + 5 * i;
    sliders[0].dispatchEvent(new Event("input"));
    while (plan.textContent === before && performance.now() - start < 3000)
      await new Promise((done) => setTimeout(done, 1));
    void document.querySelector("#room-map").offsetHeight;
    found.push(performance.now() - start);
    await new Promise((done) => setTimeout(done, 50));
  }
  return found;
}"""


@dataclass
class Ready:
    """Takes the place of `mpsearch.web.server.views.Views`: one view, made beforehand."""

    shown: Shown

    @classmethod
    def of_view(cls, view: StudyView) -> Ready:
        return cls(Shown("0123456789abcdef", view, lambda: Warm.of_view(view)))

    def of(self, study: str) -> Shown:
        if study != self.shown.view.study:
            raise InputError("E101", f"only '{self.shown.view.study}' is here")
        return self.shown

    def marked(self, study: str, mark: str) -> Shown:
        return self.of(study)


@contextmanager
def serving(view: StudyView) -> Iterator[Served]:
    """Serve a view that no store holds."""
    with tempfile.TemporaryDirectory() as folder, sqlite(Path(folder)) as store:
        spec = StudySpec.of_values(name=view.study, model="m", calibration="c", budgets=("weights <= 4 bits",))
        store.create_study(view.study, spec.question())
        store.set_state(view.study, "complete")
        with served(store, views=Ready.of_view(view)) as server:
            yield server


@contextmanager
def chromium() -> Iterator[Any]:
    from playwright.sync_api import sync_playwright

    with sync_playwright() as playwright:
        browser = playwright.chromium.launch(executable_path=shutil.which("chromium"), args=FLAGS)
        yield browser
        browser.close()


def measure_page(browser: Any, server: Served, study: str, times: int) -> dict[str, float]:
    """Medians in milliseconds, and the bytes that the first load sends."""
    loads = []
    for _ in range(times):
        context = browser.new_context(viewport={"width": 1280, "height": 900})
        page = context.new_page()
        page.goto(f"{server.url}/?token={server.tokens.read}")
        page.wait_for_selector("#filter")
        # A browser that was never here: nothing is kept but the cookie.
        page.goto("about:blank")
        session = context.new_cdp_session(page)
        session.send("Network.enable")
        session.send("Network.clearBrowserCache")
        sent: list[float] = []
        session.on("Network.loadingFinished", lambda event, sent=sent: sent.append(event["encodedDataLength"]))
        page.goto(f"{server.url}/#study={study}")
        page.wait_for_selector("html[data-ready=yes]", timeout=60_000)
        interactive = page.evaluate("performance.getEntriesByName('ready')[0].startTime")
        loads.append((interactive, sum(sent)))
        if len(loads) < times:
            context.close()
    found = {"interactive": statistics.median(x for x, _ in loads), "bytes": max(x for _, x in loads)}
    for name, script in (("hover", HOVER), ("map", MAP), ("slider", SLIDER)):
        taken = page.evaluate(script, times)
        assert len(taken) == times, name
        found[name] = statistics.median(taken)
        found[f"{name}_worst"] = max(taken)
    context.close()
    return found


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--plans", type=int, default=10_000)
    parser.add_argument("--layers", type=int, default=1_000)
    parser.add_argument("--formats", type=int, default=8)
    parser.add_argument("--times", type=int, default=20)
    given = parser.parse_args()
    view = pretended(given.plans, given.layers, given.formats)
    with serving(view) as server, chromium() as browser:
        found = measure_page(browser, server, view.study, given.times)
    print(json.dumps({name: round(value, 1) for name, value in found.items()}))
    over = [name for name, most in LIMITS.items() if found[name] > most]
    print("all within their limits" if not over else f"over the limit: {', '.join(over)}")


if __name__ == "__main__":
    main()
