"""What people come to the page for, done in a browser by clicks and keys only; hostile names; what readers need."""

from __future__ import annotations

import json
import re
import shlex
import shutil
import threading
import time
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import pytest
from playwright.sync_api import Browser, Page, sync_playwright

from mpsearch.plan import BitPlan
from mpsearch.views.study_view import StudyView
from mpsearch.web.server.reading import open_study
from tests.http_server import Served, add_study, served, sqlite

HOSTILE = "</script><script>window.hacked=1</script><img src=x onerror='window.hacked=1'>\"'"
RULES = (Path(__file__).parent / "data" / "contrast.js").read_text(encoding="utf-8")


@pytest.fixture(scope="module")
def server(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Served]:
    with sqlite(tmp_path_factory.mktemp("page")) as store:
        add_study(store, "page", rows=14, seed=3, names_of=("lm_head",), uniform=True)
        for i in range(8):
            add_study(store, f"nightly run {i}", rows=4, seed=i)
        add_study(store, f"name {HOSTILE}", rows=3, names_of=(f"lm_head{HOSTILE}\u202e",), uniform=True)
        question = {**store.study("page").spec, "name": "waiting"}
        store.create_study("waiting", question)
        with served(store, place="results.db") as found:
            yield found


@pytest.fixture(scope="module")
def browser() -> Iterator[Browser]:
    path = shutil.which("chromium")
    if path is None:
        pytest.fail("the page is tested in Chromium, which is not installed: apt-get install chromium")
    flags = ["--no-sandbox", "--disable-gpu", "--disable-dev-shm-usage", "--disable-background-networking"]
    with sync_playwright() as playwright:
        chromium = playwright.chromium.launch(executable_path=path, args=flags)
        yield chromium
        chromium.close()


@contextmanager
def visit(browser: Browser, server: Served, *, token: str | None = None, **how: Any) -> Iterator[Page]:
    """Come in by the link, as a reader unless `token` is another; nothing may be complained of but `allowed`."""
    study, allowed = how.pop("study", "page"), how.pop("allowed", "nothing")
    context = browser.new_context(viewport=how.pop("size", {"width": 1280, "height": 900}), **how)
    page = context.new_page()
    complaints: list[str] = []
    page.on("console", lambda message: complaints.append(message.text))
    page.on("pageerror", lambda error: complaints.append(str(error)))
    page.on("dialog", lambda dialog: complaints.append(dialog.message))
    page.goto(f"{server.url}/?token={token or server.tokens.read}{f'#study={study}' if study else ''}")
    page.wait_for_selector("html[data-ready=yes]" if study else "#filter")
    yield page
    assert [text for text in complaints if allowed not in text] == []
    context.close()


def until(page: Page, check: Any) -> None:
    """Wait for something to hold; the page's policy forbids Playwright's own way, which needs eval."""
    for _ in range(100):
        if check():
            return
        page.wait_for_timeout(50)
    pytest.fail(f"never true: {page.locator('main').inner_text()[:3000]}")


def key(page: Page, name: str) -> None:
    page.locator("#home").focus()
    page.keyboard.press(name)


def plan_text(page: Page) -> str:
    return page.locator("#plan").inner_text()


def pin(page: Page, pattern: str, fmt: str, button: str = "Pin") -> None:
    page.fill("#wish-pattern", pattern)
    page.select_option("#wish-format", fmt)
    page.get_by_role("button", name=button, exact=True).click()
    until(page, lambda: "solved now" in plan_text(page))


@pytest.fixture(scope="module")
def view(server: Served) -> StudyView:
    return StudyView.of(open_study(server.store, "page"))


def test_find_the_smallest_plan_below_a_loss(browser: Browser, server: Served, view: StudyView) -> None:
    points = view.points
    most = float(sorted(points.loss)[3]) * 1.001
    fitting = [i for i in range(len(points)) if points.loss[i] <= most]
    wanted = min(fitting, key=lambda i: points.cost["weights"][i])
    with visit(browser, server) as page:
        page.fill("#find-loss", repr(most))
        first = page.locator("table.plans tbody tr").first
        assert first.locator("th").inner_text() == points.labels[wanted]
        assert page.locator("table.plans tbody tr").count() == len(fitting)
        first.get_by_role("button", name=re.compile("^A: ")).click()
        until(page, lambda: plan_text(page).startswith(points.labels[wanted]))


def test_see_which_layers_differ(browser: Browser, server: Served, view: StudyView) -> None:
    with visit(browser, server) as page:
        # By keys alone: along the front, the second plan is pinned as A, the last one as B.
        key(page, "f")
        page.keyboard.press("Home")
        page.keyboard.press("ArrowRight")
        page.keyboard.press("Enter")
        page.keyboard.press("End")
        page.keyboard.press("Shift+Enter")
        until(page, lambda: "Same in" in page.locator("#room-compare").inner_text())
        order = sorted(range(len(view.points)), key=lambda i: (view.points.cost["weights"][i], view.points.loss[i]))
        a, b = (view.points.choice[i] for i in (order[1], order[-1]))
        differ = int((a != b).sum())
        assert f"Same in {len(a) - differ} of {len(a)} layers" in page.locator("#room-compare").inner_text()
        text = page.locator("#room-compare").inner_text()
        for layer, x, y in zip(view.layers, a, b, strict=True):
            if x != y:
                assert layer.name in text


def test_see_what_a_pin_costs_and_undo_it(browser: Browser, server: Served) -> None:
    with visit(browser, server) as page:
        pin(page, "lm_head", "int8-g64")
        until(page, lambda: "This pin costs" in page.locator(".wish-cost").inner_text())
        study = open_study(server.store, "page")
        answer = server.ask("POST", "/api/v1/resolve", {"study": "page", "pins": {"lm_head": "int8-g64"}}).json
        said = page.locator(".wish-cost").inner_text()
        shown = float(re.search(r"costs ([\d.e-]+) ", said)[1])  # type: ignore[index]
        assert shown == pytest.approx(answer["wish"], rel=1e-3)
        assert answer["wish"] == pytest.approx(answer["loss"] - (study.plans[0].plan.loss or 0), rel=1e-9)
        key(page, "u")
        until(page, lambda: "solved now" not in plan_text(page))
        key(page, "r")
        until(page, lambda: "solved now" in plan_text(page))
        assert "pin=lm_head%3Dint8-g64" in page.url


def test_save_the_plan_that_is_shown_when_another_wish_failed(browser: Browser, server: Served, tmp_path: Path) -> None:
    with visit(browser, server) as page:
        slider = page.locator("#room-sliders input[type=range]").first
        assert "no limit" not in (slider.get_attribute("aria-valuetext") or ""), "it begins at the study's own budget"
        box = page.get_by_label("most weights, MiB")
        box.fill("0.04")
        box.press("Enter")
        until(page, lambda: "solved now" in plan_text(page))
        assert ", at most ± " in plan_text(page)
        assert "its price here is" in plan_text(page)
        box.fill("0.01")
        box.press("Enter")
        until(page, lambda: "solved before" in plan_text(page))
        assert "E201" in page.locator("#room-sliders").inner_text()
        assert "not for what is asked for now" in plan_text(page)
        page.get_by_role("button", name="Export …").click()
        page.wait_for_selector("dialog[open]")
        with page.expect_download() as waiting:
            page.get_by_role("button", name="Save plan.json").click()
        waiting.value.save_as(tmp_path / "plan.json")
        wanted = open_study(server.store, "page").plan(f"weights <= {int(0.04 * 2**20)} B")
        assert BitPlan.load(tmp_path / "plan.json").formats == wanted.formats
        page.keyboard.press("Escape")
        box.fill("0.0000001")
        box.press("Enter")
        assert "at least a byte" in page.locator("#room-sliders").inner_text()
        assert "solved before" in plan_text(page)


def test_a_budget_of_a_link_that_makes_no_sense_is_told(browser: Browser, server: Served) -> None:
    with visit(browser, server, allowed="status of 422", study="page&budget=weights <= 4 foo") as page:
        until(page, lambda: "E11" in page.locator("#room-sliders [role=alert]").inner_text())


def test_a_link_names_plans_by_their_keys(browser: Browser, server: Served, view: StudyView) -> None:
    with visit(browser, server) as page:
        page.locator("[data-view=budget]").click()
        until(page, lambda: "in all" in page.locator("#room-lower").inner_text())
        before = page.locator("#room-lower").inner_text()
        key(page, "c")
        until(page, lambda: "&b=" in page.url)
        b = re.search(r"&b=([0-9a-f]{12})(&|$)", page.url)
        assert b is not None
        assert sum(k.startswith(b[1]) for k in view.points.keys) >= 1
        page.locator("[data-view=plans]").click()
        page.locator("table.plans tbody tr").last.get_by_role("button", name=re.compile("^A: ")).click()
        until(page, lambda: "&a=" in page.url)
        page.locator("[data-view=budget]").click()
        until(page, lambda: "in all" in page.locator("#room-lower").inner_text())
        assert page.locator("#room-lower").inner_text() != before
        # What is shown below follows the plan, also while it is open.
        shown = page.locator("#room-lower").inner_text()
        key(page, "f")
        page.keyboard.press("Home")
        page.keyboard.press("Enter")
        until(page, lambda: page.locator("#room-lower").inner_text() != shown)
        assert page.locator("#shown [role=alert]").inner_text() == ""
    with visit(browser, server, study=f"page&a={'0' * 12}") as page:
        assert "is no plan of this study now" in page.locator("#shown [role=alert]").inner_text()


def test_a_study_that_went_on_leaves_what_one_does(browser: Browser, server: Served) -> None:
    with visit(browser, server, study="nightly run 5") as page:
        pin(page, "blocks.3.fc", "int2-g64")
        page.fill("#wish-pattern", "half a na")
        page.locator("#wish-pattern").focus()
        page.evaluate("window.before = document.querySelector('#wish-pattern')")
        link = server.store.links("nightly run 5", "plan")[0]
        server.store.link("nightly run 5", "plan", link.key, "again", 90)
        page.evaluate("MP.reload()")
        until(page, lambda: page.evaluate("window.before !== document.querySelector('#wish-pattern')"))
        assert page.evaluate("[document.activeElement.id, document.activeElement.value]") == [
            "wish-pattern", "half a na",
        ]  # fmt: skip
        until(page, lambda: "solved now" in plan_text(page))
        key(page, "u")
        until(page, lambda: "solved now" not in plan_text(page))


def test_more_results_within_a_phase_are_told(browser: Browser, server: Served) -> None:
    with visit(browser, server) as page:
        found = page.evaluate("""async () => {
          let heard = null;
          window.EventSource = class { addEventListener(name, act) { if (name === "status") heard = act; } close() {} };
          const real = window.setTimeout;
          window.setTimeout = (act, wait) => real(act, wait === 5000 ? 0 : wait);
          let times = 0;
          const live = MP.live(MP.el("p"), "page", () => { times += 1; });
          const seen = [];
          for (const done of [1, 1, 2]) {
            heard({ data: JSON.stringify({ state: "running", phase: "measure", done, total: 9 }) });
            await new Promise((then) => real(then, 30));
            seen.push(times);
          }
          live.end();
          return seen;
        }""")
        assert found == [0, 0, 1]


def test_single_keys_can_be_turned_off(browser: Browser, server: Served) -> None:
    with visit(browser, server) as page:
        key(page, "?")
        page.get_by_label("Single keys work on this page").uncheck()
        page.keyboard.press("Escape")
        key(page, "c")
        page.wait_for_timeout(200)
        assert page.locator("#room-compare").is_hidden()
        page.get_by_role("button", name="Keys").click()
        page.get_by_label("Single keys work on this page").check()
        page.keyboard.press("Escape")
        key(page, "c")
        until(page, lambda: page.locator("#room-compare").is_visible())


def test_times_are_budgets_with_their_margin(browser: Browser, server: Served) -> None:
    with visit(browser, server) as page:
        found = page.evaluate("""() => {
          const table = { unit: "s", kind: "measured", fixed: 0, margin: 1.25, formats: ["a", "b"] };
          const costs = { tpot: { ...table, cost: [[0.004, 0.008]] } };
          const study = { data: { scores: {}, weights: 8, costs, budgets: [
            { text: "tpot <= 8 ms", resource: "tpot", limit: 0.0064 },
            { text: "bops <= 40 %", resource: "bops", limit: 3 }] } };
          const element = MP.el("div");
          document.body.append(element);
          const asked = [];
          const slider = MP.slider(element, study, { change: (texts) => asked.push(texts) });
          const range = element.querySelector("input[type=range]");
          const begins = range.getAttribute("aria-valuetext");
          const box = element.querySelector("input[type=text]");
          box.value = "6.0000001"; box.dispatchEvent(new Event("change"));
          slider.say({ error: { code: "E201", message: "no" }, budgets: [{ resource: "tpot" }],
            least: [{ text: "tpot <= 5.000001 ms", amount: 0.005000001, short: true }] });
          element.querySelector("[role=alert] button").click();
          range.value = "200"; range.dispatchEvent(new Event("input"));
          return [begins, ...asked];
        }""")
        assert found == [
            "tpot at most 8 ms", ["tpot <= 6.000001 ms", "bops <= 40 %"], ["tpot <= 5.000001 ms", "bops <= 40 %"],
            ["bops <= 40 %"],
        ]  # fmt: skip


def test_a_pattern_says_every_kind_that_it_takes(browser: Browser, server: Served) -> None:
    with visit(browser, server) as page:
        found = page.evaluate("""() => {
          const layers = ["h.0.gate", "h.0.mlp.gate", "h.1.gate", "h.1.mlp.gate"].map((name) => ({ name }));
          const study = { data: { scores: { formats: ["a"] }, layers, grid: { rows: [] } } };
          const element = MP.el("div");
          MP.pins(element, study, { change: () => {} });
          return [...element.querySelectorAll("datalist option")].map((o) => [o.value, o.textContent || o.label]);
        }""")
        assert dict(found)["*.gate"] == "kinds gate, mlp.gate"
        assert dict(found)["*.mlp.gate"] == "kind mlp.gate"


def test_export_it_for_another_tool(browser: Browser, server: Served, tmp_path: Path) -> None:
    with visit(browser, server) as page:
        key(page, "e")
        page.wait_for_selector("dialog[open]")
        page.select_option("#export-to", "llama.cpp")
        command = page.locator("dialog pre").first.inner_text()
        assert shlex.split(command) == [
            "mpsearch", "export", "page", "--to", "llama.cpp", "--out", "exported", "--storage", "DATABASE",
        ]  # fmt: skip
        with page.expect_download() as waiting:
            page.get_by_role("button", name="Save plan.json").click()
        waiting.value.save_as(tmp_path / "plan.json")
        stored = open_study(server.store, "page").plans[0].plan
        assert BitPlan.load(tmp_path / "plan.json").formats == stored.formats
        page.keyboard.press("Escape")
        until(page, lambda: page.locator("dialog").count() == 0)
        pin(page, "lm_head", "int8-g64")
        key(page, "e")
        page.wait_for_selector("dialog[open]")
        assert "mpsearch export plan.json --to" in page.locator("dialog pre").first.inner_text()
        with page.expect_download() as waiting:
            page.get_by_role("button", name="Save plan.json").click()
        waiting.value.save_as(tmp_path / "pinned.json")
        assert str(BitPlan.load(tmp_path / "pinned.json").formats["lm_head"]) == "int8-g64"


def test_the_full_token_makes_the_files_here(browser: Browser, server: Served) -> None:
    with visit(browser, server, token=server.tokens.link) as page:
        key(page, "e")
        page.wait_for_selector("dialog[open]")
        page.select_option("#export-to", "gptqmodel")
        page.get_by_role("button", name="Make its files here").click()
        until(page, lambda: page.get_by_role("button", name=re.compile("^Save .*json")).count() > 1)


def test_find_the_best_plan_under_a_size(browser: Browser, server: Served, view: StudyView) -> None:
    with visit(browser, server) as page:
        box = page.get_by_label("most weights, MiB")
        box.fill("0.035")
        box.press("Enter")
        until(page, lambda: "solved now" in plan_text(page))
        plan = open_study(server.store, "page").plan(f"weights <= {int(0.035 * 2**20)} B")
        assert f"{8 * plan.cost['weights'] / view.weights:.3f} bits per weight" in plan_text(page)
        # The slider by keys.
        key(page, "w")
        before = page.url
        page.keyboard.press("ArrowLeft")
        until(page, lambda: page.url != before)
        box.fill("0.001")
        box.press("Enter")
        until(page, lambda: "E201" in page.locator("#room-sliders").inner_text())
        page.get_by_role("button", name=re.compile("Use the least that fits")).click()
        until(page, lambda: "E201" not in page.locator("#room-sliders").inner_text())
        least = server.ask("POST", "/api/v1/resolve", {"study": "page", "budgets": ["weights <= 1 B"]}).json["least"][0]
        assert least["text"] in plan_text(page)


def test_ask_why_a_layer_has_its_bits(browser: Browser, server: Served, view: StudyView) -> None:
    with visit(browser, server) as page:
        key(page, "m")
        page.keyboard.press("ArrowDown")
        page.keyboard.press("Enter")
        until(page, lambda: "Next step" in page.locator("#room-card").inner_text())
        card = page.locator("#room-card").inner_text()
        assert view.layers[1].name in card
        assert view.points.formats[view.points.choice[0][1]] in card
        assert f"of {len(view.layers.decisions)} by gain" in card


def test_find_the_layer_that_is_worst_known(browser: Browser, server: Served) -> None:
    with visit(browser, server) as page:
        page.get_by_role("button", name="Score matrix").click()
        page.select_option("#matrix-order", "doubt")
        rows = page.locator("table.matrix tbody tr")
        share = [float(rows.nth(i).locator("td").last.inner_text().split()[0]) for i in range(rows.count())]
        assert share == sorted(share, reverse=True)
        assert len(share) == 14
        rows.first.get_by_role("button").click()
        name = rows.first.get_by_role("button").inner_text()
        until(page, lambda: name in page.locator("#room-card").inner_text())
        assert "No gaps" in page.locator("#more").inner_text()
        page.get_by_role("button", name="Predicted and measured").click()
        assert "Rank correlation (Spearman)" in page.locator("#more").inner_text()


def test_bar_a_format_and_see(browser: Browser, server: Served) -> None:
    with visit(browser, server) as page:
        pin(page, "*", "int4-g64", "Bar")
        until(page, lambda: "This bar costs" in page.locator(".wish-cost").inner_text())
        assert "4" not in page.locator("#room-map tbody td").all_inner_texts()
        assert "changed" in page.locator("#changes").inner_text()
        page.get_by_role("button", name=re.compile("^Remove: ")).click()
        until(page, lambda: "solved now" not in plan_text(page))


def test_compare_with_uniform_of_equal_bytes(browser: Browser, server: Served, view: StudyView) -> None:
    with visit(browser, server) as page:
        key(page, "c")
        until(page, lambda: "Same in" in page.locator("#room-compare").inner_text())
        size = view.points.cost["weights"]
        fitting = [i for i, g in enumerate(view.points.groups) if g == "uniform" and size[i] <= 1.01 * size[0]]
        best = min(fitting, key=lambda i: view.points.loss[i])
        assert f"B: {view.points.labels[best]}" in page.locator("#room-compare").inner_text()
        key(page, "x")
        until(page, lambda: page.locator("#room-compare").is_hidden())


def test_share_a_link(browser: Browser, server: Served) -> None:
    with visit(browser, server) as page:
        page.select_option("#map-mode", "loss")
        page.select_option("#front-y", "predicted")
        pin(page, "lm_head", "int8-g64")
        key(page, "c")
        until(page, lambda: "Same in" in page.locator("#room-compare").inner_text())
        page.get_by_role("button", name="Sensitivity").click()
        page.fill("#layer", "lm_head")
        page.locator("#layer").press("Enter")
        until(page, lambda: "lm_head" in page.locator("#room-card").inner_text())
        shown = {
            name: page.locator(name).inner_text()
            for name in ("#plan", "#room-map", "#room-card", "#room-compare", "#more", ".wish-cost")
        }
        page.reload()
        page.wait_for_selector("html[data-ready=yes]")
        until(
            page,
            lambda: (
                "Same in" in page.locator("#room-compare").inner_text()
                and "costs" in page.locator(".wish-cost").inner_text()
            ),
        )
        assert {name: page.locator(name).inner_text() for name in shown} == shown
        assert (page.input_value("#map-mode"), page.input_value("#front-y")) == ("loss", "predicted")
        page.go_back()
        until(page, lambda: page.locator("#room-compare").is_hidden())


def test_find_a_study_by_name(browser: Browser, server: Served) -> None:
    with visit(browser, server, study="") as page:
        assert page.locator("table.studies tbody tr").count() == 11
        page.fill("#filter", "7 NIGHTLY")
        assert page.locator("table.studies tbody th").all_inner_texts() == ["nightly run 7"]
        page.get_by_role("link", name="nightly run 7").click()
        page.wait_for_selector("html[data-ready=yes]")
        assert page.locator("h1").inner_text() == "nightly run 7"
        key(page, "s")
        page.wait_for_selector("#filter")


def test_watch_a_study_that_runs(browser: Browser, server: Served) -> None:
    with visit(browser, server, study="waiting") as page:
        assert "no plan" in page.locator("main").inner_text().lower()
        assert "once the study has scores" in page.locator("#room-sliders").inner_text()
        server.store.control.submit("waiting", "here")
        until(page, lambda: "waiting for a worker" in page.locator(".status").inner_text())
        add = threading.Thread(target=fill_later, args=(server,))
        add.start()
        until(page, lambda: page.locator("#room-map td").count() >= 4)
        add.join()
        until(page, lambda: "complete" in page.locator(".status").inner_text())


def fill_later(server: Served) -> None:
    """Give the study its results, as a worker would."""
    store = server.store
    time.sleep(0.2)
    for kind in ("survey", "scores", "cost", "plan", "measurement"):
        for link in store.links("nightly run 3", kind):
            store.link("waiting", kind, link.key, link.label, link.position)
    store.set_state("waiting", "complete")


def test_the_page_says_what_its_keys_do(browser: Browser, server: Served) -> None:
    with visit(browser, server) as page:
        key(page, "?")
        page.wait_for_selector("dialog[open]")
        assert "undo and redo" in page.locator("dialog").inner_text()
        page.keyboard.press("Escape")
        until(page, lambda: page.locator("dialog").count() == 0)
        assert page.evaluate("document.activeElement.id") == "home"


def test_hostile_names_are_text_in_every_view(browser: Browser, server: Served) -> None:
    # The browser itself notes each request that is refused.
    with visit(browser, server, study="", allowed="status of 422") as page:
        page.evaluate("addEventListener('securitypolicyviolation', () => { window.violated = 1; })")
        page.fill("#filter", "hacked")
        page.locator("table.studies a").first.click()
        page.wait_for_selector("html[data-ready=yes]")
        key(page, "c")
        for name in ("plans", "predicted", "scores", "sensitivity", "budget"):
            page.locator(f"[data-view={name}]").click()
            page.wait_for_timeout(100)
        page.locator("#room-map td").last.click()
        page.fill("#wish-pattern", f"*{HOSTILE}")
        page.get_by_role("button", name="Pin", exact=True).click()
        until(page, lambda: "E120" in page.locator(".wish-cost").inner_text())
        assert "matches no layer" in page.locator(".wish-cost").inner_text()
        key(page, "e")
        page.wait_for_selector("dialog[open]")
        words = shlex.split(page.locator("dialog pre").first.inner_text())
        assert words[:2] == ["mpsearch", "export"]
        page.keyboard.press("Escape")
        assert page.evaluate("[typeof window.hacked, typeof window.violated]") == ["undefined", "undefined"]
        assert page.locator("img, iframe, [onerror], [style*=expression]").count() == 0
        assert page.locator("h1").inner_text().startswith("name </script><script>")
        assert "\u202e" not in page.locator("body").inner_text()


@pytest.mark.parametrize(("width", "mode"), [(1280, "light"), (390, "dark")])
def test_everybody_can_read_it(browser: Browser, server: Served, width: int, mode: Any) -> None:
    with visit(browser, server, size={"width": width, "height": 900}, color_scheme=mode, study="") as page:
        assert rules(page) == []
        page.get_by_role("link", name="page", exact=True).click()
        page.wait_for_selector("html[data-ready=yes]")
        key(page, "c")
        pin(page, "lm_head", "int8-g64")
        for name in ("predicted", "scores", "sensitivity", "budget", "plans"):
            page.locator(f"[data-view={name}]").click()
            page.wait_for_timeout(100)
            assert rules(page) == []
        assert page.evaluate("document.documentElement.scrollWidth") <= width
        key(page, "e")
        page.wait_for_selector("dialog[open]")
        assert [line for line in rules(page) if "heading" not in line] == []


def rules(page: Page) -> Any:
    """What is wrong by the rules of axe that are checked here; inputs may have a label beside them."""
    found = page.evaluate(RULES)
    script = "[...document.querySelectorAll('input, select')].filter((x) => x.labels.length).map((x) => x.outerHTML)"
    labelled = [html[:80] for html in page.evaluate(script)]
    known = {f"{what}: {html}" for what in ("no label", "no name") for html in labelled}
    return [line for line in found if line not in known]


def test_numbers_of_the_page_are_those_of_the_library(browser: Browser, server: Served, view: StudyView) -> None:
    with visit(browser, server) as page:
        script = """async () => {
          const data = await MP.ask("view?study=page");
          const study = MP.open(data, await MP.ask("view/choices?study=page&count=1000"));
          const all = [...Array(study.count).keys()].map((i) => study.choice(i));
          return all.map((choice) => [study.predicted(choice), study.bytes(choice)]);
        }"""
        found = page.evaluate(script)
        expected = [
            [float(a), float(b)] for a, b in zip(view.points.predicted, view.points.cost["weights"], strict=True)
        ]
        assert json.loads(json.dumps(found)) == expected
