"""The report in a browser: nothing runs or is asked for that should not, and its numbers are Python's."""

from __future__ import annotations

import math
import shutil
from collections.abc import Iterator
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from playwright.sync_api import Browser, Page, sync_playwright

from benchmarks.report import LIMITS, measure_report
from mpsearch.spread import at_most
from mpsearch.testing.views import pretended
from mpsearch.views.agreement import correlation
from mpsearch.views.difference import difference
from mpsearch.views.steps import Ladder
from mpsearch.views.study_view import StudyView
from mpsearch.web.amounts import size, whole_bytes, with_spread
from mpsearch.web.report import report_html
from tests.test_report import HOSTILE, changed, empty_view

CONTRAST = Path(__file__).parent / "data" / "contrast.js"
FLAGS = ["--no-sandbox", "--disable-gpu", "--disable-dev-shm-usage", "--disable-background-networking"]


@pytest.fixture(scope="module")
def browser() -> Iterator[Browser]:
    path = shutil.which("chromium")
    if path is None:
        pytest.fail("the report is tested in Chromium, which is not installed: apt-get install chromium")
    with sync_playwright() as playwright:
        chromium = playwright.chromium.launch(executable_path=path, args=FLAGS)
        yield chromium
        chromium.close()


@dataclass
class Visit:
    page: Page
    complaints: list[str]
    requests: list[str]


def visit(browser: Browser, file: Path, width: int = 1280, mode: Any = "light", drawn: bool = True) -> Visit:
    context = browser.new_context(viewport={"width": width, "height": 900}, color_scheme=mode)
    opened = context.new_page()
    seen = Visit(opened, [], [])
    opened.on("console", lambda message: seen.complaints.append(message.text))
    opened.on("pageerror", lambda error: seen.complaints.append(str(error)))
    opened.on("dialog", lambda dialog: seen.complaints.append(dialog.message))
    opened.on("request", lambda request: seen.requests.append(request.url))
    opened.add_init_script(
        "addEventListener('securitypolicyviolation', (event) => console.log(`blocked ${event.blockedURI}`))"
    )
    opened.goto(file.as_uri())
    if drawn:
        opened.wait_for_selector("html[data-ready]")
    return seen


def written(folder: Path, view: StudyView) -> Path:
    file = folder / "report.html"
    file.write_text(report_html(view), encoding="utf-8")
    return file


@pytest.fixture(scope="module")
def hostile_file(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return written(tmp_path_factory.mktemp("hostile"), pretended(60, 16, 4, hostile=HOSTILE))


@pytest.fixture(scope="module")
def view() -> StudyView:
    return pretended(1000, 40, 5, seed=3)


@pytest.fixture(scope="module")
def open_page(browser: Browser, view: StudyView, tmp_path_factory: pytest.TempPathFactory) -> Iterator[Visit]:
    seen = visit(browser, written(tmp_path_factory.mktemp("plain"), view))
    yield seen
    assert seen.complaints == []
    seen.page.context.close()


@pytest.mark.parametrize("mode", ["light", "dark"])
@pytest.mark.parametrize("width", [1280, 390])
def test_it_shows_without_network_or_complaint(browser: Browser, hostile_file: Path, width: int, mode: str) -> None:
    seen = visit(browser, hostile_file, width, mode)
    page = seen.page
    page.locator("#uniform").click()
    for row in page.locator("#map td[data-cell]").all()[:3]:
        row.click()
    for name in ("share of predicted loss", "gain of the next step up", "bits"):
        page.locator("#modes select").select_option(label=name)
    for button in ("swap", "keep", "unpin"):
        page.locator(f"#{button}").click()
    page.locator("#front canvas.over").press("ArrowRight")
    page.locator("#front canvas.over").press("Enter")
    page.reload()
    page.wait_for_selector("html[data-ready]")
    assert seen.complaints == []
    assert {url.split("#")[0] for url in seen.requests} == {hostile_file.as_uri()}
    assert page.evaluate("typeof window.hacked") == "undefined"
    assert page.evaluate("document.documentElement.scrollWidth") <= width
    assert page.locator("img, iframe, a[href], [style*='url']").count() == 0
    # Its marks that turn the direction of text are gone; the rest is there to be read.
    assert "<script>window.hacked=1" in (page.locator("#card h3").text_content() or "")
    assert "\u202e" not in (page.locator("#card").text_content() or "")
    light = page.evaluate("getComputedStyle(document.body).backgroundColor") == "rgb(255, 255, 255)"
    assert light == (mode == "light")
    page.context.close()


@pytest.mark.parametrize("mode", ["light", "dark"])
def test_controls_have_names_and_text_has_contrast(browser: Browser, open_page: Visit, mode: Any) -> None:
    page = open_page.page
    page.emulate_media(color_scheme=mode)
    page.locator("#uniform").click()
    page.locator("#map td[data-cell]").nth(3).click()
    assert page.evaluate(CONTRAST.read_text()) == []


def test_numbers_of_plans_are_those_of_python(view: StudyView, open_page: Visit) -> None:
    found = open_page.page.evaluate("""() => [...Array(MP.report.count).keys()].map((i) => {
      const [s, choice] = [MP.report, MP.report.choice(i)];
      return [s.size(i), s.bits(i), s.loss(i), s.forecast(i), s.predicted(choice), s.bytes(choice), s.doubt(choice)];
    })""")
    points = view.points
    for i, numbers in enumerate(found):
        loss = float(points.loss[i]) if points.measured[i] else None
        total, predicted = points.cost["weights"][i], points.predicted[i]
        assert numbers == [total, 8 * total / view.weights, loss, predicted, predicted, total, points.doubt[i]]


def test_steps_and_ranks_are_those_of_python(view: StudyView, open_page: Visit) -> None:
    ladder = Ladder.of(view)
    for i in range(0, len(view.points), 97):
        choice = view.points.choice[i][list(view.leads)].astype(np.int64)
        count, found = open_page.page.evaluate(
            """(i) => { const s = MP.report; const c = s.choice(i);
            const steps = s.decisions.map((_, row) => [s.stepUp(c, row), s.stepDown(c, row), s.rank(c, row)]);
            return [s.steps(c), steps]; }""",
            i,
        )
        up, down = ladder.steps(choice, "up"), ladder.steps(choice, "down")
        assert count == up.there.sum()
        for row, (higher, lower, rank) in enumerate(found):
            for steps, step in ((up, higher), (down, lower)):
                assert (step is not None) == steps.there[row]
                if step is not None:
                    own = [steps.column[row], steps.gain[row], steps.bytes[row], steps.rate[row], steps.noise[row]]
                    assert [step[key] for key in ("format", "gain", "cost", "rate", "noise")] == own
                    assert step["error"] == pytest.approx(steps.error[row], rel=1e-12)
            assert (rank or 0) == up.rank[row]


def test_rivals_and_the_bound_are_those_of_python(view: StudyView, open_page: Visit) -> None:
    points = view.points
    found = open_page.page.evaluate("""() => [...Array(MP.report.count).keys()]
      .map((i) => [MP.report.rival(i), MP.report.rivalOf(MP.report.size(i))])""")
    assert found == [[i, i] for i in points.rival]
    # Steps of the axis are in MiB there; here the sizes are passed as bytes.
    steps = open_page.page.evaluate("""() => ["predicted", "measured"].map((y) =>
      MP.boundOf(MP.report, MP.report.data.points.cost.weights, { x: "weights", y }))""")
    assert steps[1] == [], "plans of measured losses may lie below a bound of predicted ones"
    size, bound = points.cost["weights"], points.bound
    held = [i for i, alone in enumerate(points.alone("weights")) if alone and math.isfinite(bound[i])]
    assert [x for x, _ in steps[0]] == sorted(size[i] for i in held)
    for x, y in steps[0]:
        assert any(y == bound[i] for i in held)
        assert y >= min(bound[i] for i in held if size[i] <= x)
    assert steps[0] == sorted(steps[0], key=lambda step: (step[0], -step[1]))


def test_what_is_not_known_is_not_told_as_known(open_page: Visit) -> None:
    found = open_page.page.evaluate(r"""() => {
      const names = ["h.0.q", "h.0.k", "h.0.v"];
      const study = MP.open({
        unit: "nats", weights: 3, decisions: ["h.0.q"], bytes: [[1, 2], [1, 2], [1, 2]],
        layers: names.map((name) => ({ name, kind: "linear", row: 0 })),
        formats: [{ name: "a", bits: 2 }, { name: "b", bits: 4 }],
        grid: { rows: ["0"], columns: ["q", "k", "v"], cells: [[0, 0, [0]], [0, 1, [1]], [0, 2, [2]]] },
        scores: { formats: ["a", "b"], loss: [[2, 1]], error: [[null, 0.5]], status: [["ok", "ok"]] },
        costs: { tpot: { unit: "s", kind: "measured", fixed: 0, formats: ["a", "b"], cost: [[1, 2]] } },
        points: { label: [], cost: {}, group: [], loss: [] },
      });
      const choice = Uint8Array.from([0, 0, 0]);
      const { error, noise } = study.stepUp(choice, 0);
      const element = MP.el("div");
      MP.breakdown(element, study).show(choice);
      const select = element.querySelector("select");
      select.selectedIndex = 1;
      select.dispatchEvent(new Event("change"));
      const parts = [...element.querySelectorAll("tbody th")].map((head) => head.textContent);
      return [error, noise, MP.steps(study, choice, 0)[0].includes("of unknown error"), parts, MP.median([4, 2]),
        MP.changes(study, choice, Uint8Array.from([1, 1, 1]))[0].error];
    }""")
    assert found == [None, False, True, ["q+k+v", "0"], 4, None]


def test_nothing_unseen_stands_in_a_text(open_page: Visit) -> None:
    forged = r'MP.text.safe("a\u061c\u2028\u200b\ufeff\ud800\u202eb\tc\n")'
    assert open_page.page.evaluate(forged) == "a" + 6 * "\N{REPLACEMENT CHARACTER}" + "b\tc\n"


def test_a_link_to_a_plan_of_another_report_is_told(open_page: Visit) -> None:
    page = open_page.page
    page.evaluate(f"location.hash = 'a={'0' * 12}'")
    page.wait_for_timeout(100)
    assert "is no plan of this report" in page.locator("#pins").inner_text()
    page.evaluate("location.hash = ''")


def test_difference_and_correlation_are_those_of_python(view: StudyView, open_page: Visit) -> None:
    for i, j in ((0, 1), (5, 700), (300, 999)):
        expected = difference(view.plan(i), view.plan(j), view)
        found = open_page.page.evaluate(
            "([i, j]) => MP.changes(MP.report, MP.report.choice(i), MP.report.choice(j))"
            ".map((c) => [MP.report.decisions[c.row].name, c.loss, c.bytes])",
            [i, j],
        )
        assert found == [[c.decision, c.loss, c.bytes] for c in expected.changes]
    there = view.points.measured
    wanted = correlation("a", "b", view.points.predicted[there], view.points.loss[there])
    assert wanted is not None
    value, low, high = open_page.page.evaluate("""() => {
      const { points } = MP.report.data;
      const there = points.loss.map((_, i) => i).filter((i) => points.loss[i] !== null);
      const value = MP.spearman(there.map((i) => points.predicted[i]), there.map((i) => points.loss[i]));
      return [value, ...MP.spearmanInterval(value, there.length)];
    }""")
    assert (value, low, high) == pytest.approx((wanted.value, wanted.low, wanted.high), rel=1e-12)


def test_numbers_are_written_as_python_writes_them(open_page: Visit) -> None:
    generator = np.random.default_rng(0)
    values = (10.0 ** generator.uniform(-9, 7, 400) * generator.choice([-1, 1], 400)).tolist()
    values += [0.0, 1.0625, 4.0625, 0.125, 2.5, 9999.5, 99995.0, 0.00012345, 1e-5, 2.0**20, 1234567.0]
    errors = (10.0 ** generator.uniform(-11, 2, len(values))).tolist()
    errors[-4:] = [0.0, math.nan, 0.5, 0.0625]
    pairs = [[v, None if math.isnan(e) else e] for v, e in zip(values, errors, strict=True)]
    found = open_page.page.evaluate("(all) => all.map(([v, e]) => MP.text.withSpread(v, e))", pairs)
    assert found == [with_spread(v, e) for v, e in zip(values, errors, strict=True)]
    limits = open_page.page.evaluate("(all) => all.map(([v, e]) => MP.text.atMost(v, e))", pairs)
    assert limits == [f"{with_spread(v)}{at_most(e)}" for v, e in zip(values, errors, strict=True)]
    sizes = [0, 1, 1234, 2**20, 2**20 - 1, 3 * 2**20 + 512, 123456789012, 1082130432, 7 * 2**16]
    shown = open_page.page.evaluate("(all) => all.map((v) => [MP.text.size(v), MP.text.bytes(v)])", sizes)
    assert shown == [[size(count), whole_bytes(count)] for count in sizes]
    sums = generator.normal(0, 1, (50, 200)) * 10.0 ** generator.uniform(-12, 12, (50, 200))
    assert open_page.page.evaluate("(all) => all.map(MP.sum)", sums.tolist()) == [math.fsum(x) for x in sums]


def test_map_follows_the_pointer_and_the_address_keeps_the_view(view: StudyView, open_page: Visit) -> None:
    page = open_page.page
    page.evaluate("location.hash = ''")
    canvas = page.locator("#front canvas.over")
    bits = "() => [...document.querySelectorAll('#map td[data-cell]')].map((cell) => cell.textContent)"
    canvas.focus()
    page.keyboard.press("Home")
    smallest = int(
        np.lexsort((np.where(view.points.measured, view.points.loss, np.inf), view.points.cost["weights"]))[0]
    )
    numbers = [view.bits[j] for j in view.points.choice[smallest].tolist()]
    assert page.evaluate(bits) == [str(b) for b in numbers]
    page.keyboard.press("Enter")
    page.keyboard.press("End")
    page.keyboard.press("Shift+Enter")
    page.locator("#modes select").select_option(label="share of bytes")
    page.locator("#map td[data-cell]").nth(5).click()
    for key in ("ArrowDown", "ArrowRight", "Enter"):
        page.keyboard.press(key)
    assert page.evaluate("document.querySelectorAll('#map td[tabindex=\"0\"]').length") == 1
    parts = ("#compare", "#pins", "#map", "#card")
    page.mouse.move(0, 0)
    link, shown = page.url, [page.locator(part).inner_text() for part in parts]
    assert view.points.keys[smallest][:12] in link
    page.reload()
    page.wait_for_selector("html[data-ready]")
    assert page.url == link
    for part, text in zip(parts, shown, strict=True):
        assert page.locator(part).inner_text().splitlines() == text.splitlines()


def test_pointing_at_a_plan_shows_it(view: StudyView, open_page: Visit) -> None:
    page = open_page.page
    page.evaluate("location.hash = ''")
    page.locator("#front canvas.over").scroll_into_view_if_needed()
    box = page.locator("#front canvas.over").bounding_box()
    assert box is not None
    seen = set()
    for share in np.linspace(0.15, 0.95, 12):
        page.mouse.move(box["x"] + share * box["width"], box["y"] + 0.5 * box["height"])
        page.mouse.move(box["x"] + share * box["width"], box["y"] + 0.75 * box["height"])
        seen.add(page.locator("#shown").inner_text())
    assert len(seen) > 3


def test_a_hover_is_quick(browser: Browser) -> None:
    found = measure_report(browser, 2000, 100, 5, times=5)
    assert found["interactive"] <= LIMITS["interactive"]
    assert found["hover"] <= LIMITS["hover"]
    assert found["map"] <= LIMITS["map"]


def test_tables_are_there_without_scripts(browser: Browser, hostile_file: Path) -> None:
    context = browser.new_context(java_script_enabled=False)
    page = context.new_page()
    page.goto(hostile_file.as_uri())
    assert "need JavaScript" in page.locator("main").inner_text()
    assert page.locator("#plans").is_visible()
    assert page.locator("#front").is_hidden()
    context.close()


def odd_views() -> dict[str, StudyView]:
    plain = pretended(40, 8, 3)
    unknown = np.full(40, np.nan)
    return {
        "one point of one layer": pretended(3, 1, 1),
        "many layers": pretended(9, 2000, 4),
        "nothing measured": changed(plain, loss=unknown, spread=unknown),
        "no scores": replace(changed(plain, predicted=unknown, doubt=unknown, bound=unknown), scores=None),
        "losses of zero and less": changed(plain, loss=np.where(np.arange(40) % 2, plain.points.loss, -1e-9)),
        "infinite losses": changed(plain, loss=np.where(np.arange(40) % 2, plain.points.loss, np.inf)),
    }


@pytest.mark.parametrize("name", odd_views())
def test_odd_studies_are_drawn(browser: Browser, tmp_path: Path, name: str) -> None:
    seen = visit(browser, written(tmp_path, odd_views()[name]), width=390)
    seen.page.locator("#map td[data-cell]").first.click()
    for mode in ("share of predicted loss", "share of bytes", "loss at the fewest bits", "gain of the next step up"):
        seen.page.locator("#modes select").select_option(label=mode)
    assert seen.page.evaluate("document.documentElement.scrollWidth") <= 390
    seen.page.emulate_media(media="print")
    assert seen.page.locator("#switches").is_hidden()
    assert seen.complaints == []
    seen.page.context.close()


def test_a_study_that_has_only_begun_is_told(browser: Browser, tmp_path: Path) -> None:
    seen = visit(browser, written(tmp_path, empty_view()), drawn=False)
    assert "There is no plan yet" in seen.page.locator("main").inner_text()
    assert seen.complaints == []
    seen.page.context.close()
