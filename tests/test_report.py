"""The report: its numbers are the study's, its text stays text, and a browser finds nothing to complain about."""

from __future__ import annotations

import base64
import hashlib
import json
import math
import shutil
from collections.abc import Iterator
from dataclasses import dataclass, field, replace
from html.parser import HTMLParser
from pathlib import Path
from typing import Any

import numpy as np
import plotly.graph_objects as go
import pytest
from hypothesis import given
from hypothesis import strategies as st
from playwright.sync_api import Browser, Page, sync_playwright

from mpsearch.format import Format
from mpsearch.front import Measurement
from mpsearch.layer import Excluded, Layer, Layers
from mpsearch.plan import BitPlan, Predicted
from mpsearch.tables import SensitivityTable
from mpsearch.verdict import best_uniform
from mpsearch.web.figures import front_figure, prediction_figure, rank_correlation
from mpsearch.web.heat_map import heat_map
from mpsearch.web.layer_table import layer_table
from mpsearch.web.markup import clean, data_script, tag
from mpsearch.web.report import report_html
from mpsearch.web.report_data import ReportData

MIB = 2**20
FORMATS = ("int2-g64", "int3-g64", "int4-g64", "int8-channel")
HOSTILE = "</script><script>window.hacked=1</script><img src=x onerror='window.hacked=2'>\"'&amp;<!--"


def made_layers(blocks: int = 3, hostile: str = "") -> Layers:
    shapes = {"self_attn.q_proj": (128, 64), "self_attn.k_proj": (64, 64), "mlp.down_proj": (64, 256)}
    items = [Layer(f"model.embed_tokens{hostile}", "embedding", (512, 64), dtype="bfloat16")]
    for block in range(blocks):
        items += [Layer(f"model.layers.{block}.{name}", "linear", shape) for name, shape in shapes.items()]
    items.append(Layer("lm_head", "linear", (512, 64), dtype="bfloat16"))
    return Layers(tuple(items), (Excluded("model.norm.weight", (64,), "bfloat16", "a norm"),))


def made_view(hostile: str = "", ratio: float = 3.0) -> ReportData:
    """A small study with two mixed plans, all uniform plans and three random ones."""
    generator = np.random.default_rng(7)
    layers = made_layers(hostile=hostile)
    value = generator.uniform(0.5, 1.5, len(layers))[:, None] * ratio ** -np.arange(4.0) * 0.01
    names = tuple(layer.name for layer in layers)
    scores = SensitivityTable(names, FORMATS, value, value * 0.1, "nats/token", source={"estimator": "fisher"})
    plans: dict[str, BitPlan] = {}
    measurements = []
    mixed = [np.arange(len(layers)) % 2 + 1, np.arange(len(layers)) % 3 + 1]
    uniform = [np.full(len(layers), column) for column in range(4)]
    random = list(generator.integers(0, 4, (3, len(layers))))
    labels = ["mixed", "mixed", *(f"uniform {fmt}" for fmt in FORMATS), "random", "random", "random"]
    for label, choice in zip(labels, [*mixed, *uniform, *random], strict=True):
        loss = math.fsum(value[i, column] for i, column in enumerate(choice))
        formats = {name: Format.parse(FORMATS[column]) for name, column in zip(names, choice, strict=True)}
        predicted = Predicted(loss, 0.1 * loss, "nats/token", 0.99 * loss, 0.01)
        plan = BitPlan(layers, formats, {"digest": "d"}, predicted, {"label": f"{label}{len(plans)}"})
        plans[plan.key] = plan
        measured = loss * generator.uniform(0.9, 1.1)
        cost = {"weights": float(plan.bytes)}
        measurements.append(
            Measurement(
                plan.key,
                f"{label} {hostile}".strip(),
                measured,
                measured / 30,
                "nats/token",
                cost,
                machine=f"box{hostile}",
            )
        )
    return ReportData(
        study=f"study{hostile}",
        model={f"name{hostile}": f"tiny{hostile}", "weights": layers.weights},
        verdict=[f"Mixing pays.{hostile}", "Both were measured."],
        budgets=[(f"weights <= 4 bits{hostile}", layers.weights // 2)],
        measurements=measurements,
        plans=plans,
        scores=scores,
        chosen=plans[measurements[0].plan],
        notices=[f"note[N415] one norm stays{hostile}"],
        provenance={
            "versions": {f"torch{hostile}": f"2{hostile}"},
            "seeds": [0, hostile],
            "data": [{"n": hostile}],
            "machine": f"box{hostile}",
        },
    )


@dataclass
class Element:
    name: str
    attributes: dict[str, str]
    text: str = ""
    children: list[Element] = field(default_factory=list)

    def all(self, name: str, **attributes: str) -> list[Element]:
        found = [
            child
            for child in self.children
            if child.name == name and all(child.attributes.get(key) == value for key, value in attributes.items())
        ]
        return found + [deep for child in self.children for deep in child.all(name, **attributes)]

    def everything(self) -> Iterator[Element]:
        yield self
        for child in self.children:
            yield from child.everything()

    @property
    def full_text(self) -> str:
        return self.text + "".join(child.full_text for child in self.children)


class Reader(HTMLParser):
    """Builds a tree, and fails on an element that is not closed in order."""

    def __init__(self) -> None:
        super().__init__(convert_charrefs=True)
        self.open = [Element("", {})]

    def handle_starttag(self, tag: str, attrs: list[tuple[str, str | None]]) -> None:
        element = Element(tag, {key: value or "" for key, value in attrs})
        self.open[-1].children.append(element)
        if tag != "meta":
            self.open.append(element)

    def handle_endtag(self, tag: str) -> None:
        assert self.open.pop().name == tag

    def handle_data(self, data: str) -> None:
        self.open[-1].text += data

    def handle_comment(self, data: str) -> None:
        raise AssertionError(f"a comment: {data}")


def read(text: str) -> Element:
    reader = Reader()
    reader.feed(text)
    reader.close()
    assert len(reader.open) == 1
    return reader.open[0]


def numbers_in(table: Element) -> list[list[float]]:
    rows = table.all("tbody")[0].all("tr")
    return [[float(cell.attributes["value"]) for cell in row.all("data")] for row in rows]


def figure(page: Element, name: str) -> dict[str, Any]:
    (holder,) = [script for script in page.all("script") if script.attributes.get("data-chart") == name]
    loaded: dict[str, Any] = json.loads(holder.text)
    return loaded


@pytest.fixture(scope="module")
def view() -> ReportData:
    return made_view()


@pytest.fixture(scope="module")
def page(view: ReportData) -> Element:
    return read(report_html(view))


@pytest.fixture(scope="module")
def hostile_page() -> Element:
    return read(report_html(made_view(HOSTILE)))


def test_tables_hold_the_measured_numbers_in_full(view: ReportData, page: Element) -> None:
    found = numbers_in(page.all("table", id="plans")[0]) + numbers_in(page.all("table", id="random-plans")[0])
    expected = []
    for group in (view.measurements[:6], view.measurements[6:]):
        for m in sorted(group, key=lambda m: m.cost["weights"]):
            row = [8 * view.plans[m.plan].bytes / view.weights, m.cost["weights"], m.loss]
            uniform = best_uniform(view.measurements, m.cost["weights"])
            if not m.label.startswith("uniform") and uniform is not None:
                row.append(uniform.loss - m.loss)
            expected.append(row)
    assert found == expected


def test_verdict_holds_the_chosen_plan(view: ReportData, page: Element) -> None:
    (block,) = page.all("div", id="verdict")
    assert [line.text for line in block.all("p")] == view.verdict
    values = [float(item.attributes["value"]) for item in block.all("data")]
    assert values == [view.chosen.bytes, view.chosen.bits, view.measurements[0].loss, view.chosen.loss]
    assert [term.text for term in block.all("dt")] == [
        "Size, exact",
        "Bits per weight, exact",
        "Loss, measured",
        "Loss, predicted",
    ]


def test_front_holds_the_measured_numbers(view: ReportData, page: Element) -> None:
    traces = {trace.get("name"): trace for trace in figure(page, "front")["data"]}
    drawn: dict[tuple[float, float], float] = {}
    for name in ("random", "mixed", "mixed, dominated", "uniform"):
        trace = traces.get(name, {"x": [], "y": [], "error_y": {"array": []}})
        drawn |= dict(zip(zip(trace["x"], trace["y"], strict=True), trace["error_y"]["array"], strict=True))
    assert drawn == {(m.cost["weights"] / MIB, m.loss): m.spread for m in view.measurements}
    assert traces["chosen plan"]["y"] == [view.measurements[0].loss]
    assert traces["mixed"]["mode"] == "lines+markers"
    assert traces["uniform"]["marker"]["symbol"] == "diamond"


def test_front_axes_say_the_same_in_two_units(view: ReportData, page: Element) -> None:
    drawn = figure(page, "front")
    lower, upper = drawn["layout"]["xaxis"]["range"], drawn["layout"]["xaxis2"]["range"]
    chosen = view.measurements[0].cost["weights"] / MIB
    share = (chosen - lower[0]) / (lower[1] - lower[0])
    assert upper[0] + share * (upper[1] - upper[0]) == pytest.approx(view.chosen.bits, rel=1e-12)
    assert drawn["layout"]["shapes"][0]["x0"] == view.budgets[0][1] / MIB
    assert drawn["layout"]["annotations"][0]["text"] == "weights &lt;= 4 bits"


@pytest.mark.parametrize(("ratio", "kind"), [(1.5, "linear"), (4.0, "log")])
def test_loss_axis_is_logarithmic_beyond_a_factor_of_ten(ratio: float, kind: str) -> None:
    assert front_figure(made_view(ratio=ratio))["layout"]["yaxis"]["type"] == kind


def test_a_loss_that_cannot_stand_on_a_logarithmic_axis_is_named(view: ReportData) -> None:
    free = replace(view.measurements[-1], label="uniform bf16", loss=0.0, spread=0.0)
    text = report_html(replace(made_view(ratio=4.0), measurements=[*made_view(ratio=4.0).measurements, free]))
    assert "Not on this axis, with a loss of 0 or less: uniform bf16." in text


def test_predictions_hold_both_numbers(view: ReportData, page: Element) -> None:
    drawn = figure(page, "predictions")
    pairs = {pair for trace in drawn["data"][1:] for pair in zip(trace["x"], trace["y"], strict=True)}
    assert pairs == {(view.plans[m.plan].loss, m.loss) for m in view.measurements}


def test_rank_correlation_of_a_known_order() -> None:
    losses = [(1.0, 2.0), (2.0, 1.0), (3.0, 3.0), (4.0, 4.0)]
    pairs = [(p, Measurement("k", "random", m, 0.0, "nats/token", {"weights": 1})) for p, m in losses]
    assert rank_correlation(pairs) == pytest.approx(0.8)
    assert rank_correlation(pairs[:2]) is None


def test_map_holds_each_layer(view: ReportData, page: Element) -> None:
    (table,) = page.all("table", **{"class": "map"})
    assert [cell.text for cell in table.all("thead")[0].all("th")] == ["block", "q_proj", "k_proj", "down_proj"]
    rows = table.all("tbody")[0].all("tr")
    assert [row.all("th")[0].text for row in rows] == ["model.embed_tokens", "0", "1", "2", "lm_head"]
    cells = [cell for row in rows for cell in row.all("td")]
    assert len(cells) == len(view.chosen.layers)
    for cell, layer in zip(cells, view.chosen.layers, strict=True):
        fmt = view.chosen.formats[layer.name]
        lines = cell.attributes["data-tip"].splitlines()
        assert cell.text == str(fmt.bits)
        assert lines[:3] == [layer.name, f"format {fmt}", f"{fmt.bytes(layer):,} bytes, exact"]
        assert lines[3].startswith("predicted loss: 0.0")
        assert lines[3].endswith(" nats/token")
    listed = numbers_in(page.all("table", id="layers")[0])
    for numbers, (i, layer) in zip(listed, enumerate(view.chosen.layers), strict=True):
        fmt = view.chosen.formats[layer.name]
        loss = float(view.scores.value[i, view.scores.formats.index(str(fmt))])
        assert numbers == [float(fmt.effective_bits(layer)), fmt.bytes(layer), loss]


def test_bytes_of_layers_say_where_they_count_when_the_total_counts_elsewhere() -> None:
    from mpsearch.cli.show import plan_table

    layers = Layers((Layer("fc", "linear", (64, 64)), Layer("up", "linear", (64, 64))))
    ours = BitPlan(layers, dict.fromkeys(("fc", "up"), Format.parse("int4-g64")))
    theirs = replace(ours, predicted=Predicted(cost={"weights": ours.bytes + 512}))
    scores = SensitivityTable(("fc", "up"), ("int4-g64",), np.ones((2, 1)), np.ones((2, 1)), "nats/token")
    assert "our own file" not in str(layer_table(ours, scores))
    assert [str(column.header) for column in plan_table(ours).columns][-1] == "bytes"
    assert "exact, in our own file" in str(layer_table(theirs, scores))
    assert "bytes, exact, in our own file" in str(heat_map(theirs, scores))
    assert [str(column.header) for column in plan_table(theirs).columns][-1] == "bytes in our own file"


def test_map_folds_experts_and_counts_a_tie_once() -> None:
    names = [f"model.layers.0.mlp.experts.{i}.up_proj" for i in range(3)]
    layers = Layers(
        (
            Layer(names[0], "linear", (4, 64)),
            Layer(names[1], "linear", (4, 64), tie="pair"),
            Layer(names[2], "linear", (4, 64), tie="pair"),
            Layer("decoder.layers.0.fc", "linear", (4, 64)),
        )
    )
    formats = {layer.name: Format.parse("int4-g64") for layer in layers} | {names[0]: Format.parse("int2-g64")}
    value = np.array([[0.5, 0.25], [0.125, 0.0625], [math.nan, math.nan]])
    scores = SensitivityTable((names[0], "pair", "x"), ("int2-g64", "int4-g64"), value, value / 8, "nats/token")
    table = read(heat_map(BitPlan(layers, formats), scores))
    assert [row.all("th")[0].text for row in table.all("tbody")[0].all("tr")] == ["model.layers.0", "decoder.layers.0"]
    folded, lone = (cell for cell in table.all("td") if cell.attributes)
    assert folded.text == "2-4"
    assert folded.attributes["data-tip"].splitlines()[1:] == [
        "formats 2 x int4-g64, 1 x int2-g64",
        "344 bytes, exact",
        "predicted loss: 0.562 ± 0.063 nats/token",
        "tied as pair: the loss is of all tied layers together",
    ]
    assert lone.attributes["data-tip"].splitlines()[-1] == "predicted loss: not scored"


def test_gain_within_noise_is_named(view: ReportData) -> None:
    uniform = view.measurements[3]
    close = replace(view.measurements[0], loss=uniform.loss - 1e-6, cost=uniform.cost)
    assert "less than uniform int3-g64, within noise" in report_html(replace(view, measurements=[close, uniform]))
    same = replace(uniform, label="mixed")
    assert "the same plan as uniform int3-g64" in report_html(replace(view, measurements=[same, uniform]))
    small = replace(close, cost={"weights": 1.0})
    assert "no uniform plan this small" in report_html(replace(view, measurements=[small, uniform]))


def test_chosen_plan_is_known_by_what_it_does(view: ReportData) -> None:
    found = [replace(m, plan=view.plans[m.plan].assignment) for m in view.measurements]
    plans = {plan.assignment: plan for plan in view.plans.values()}
    same = replace(view, measurements=found, plans=plans, chosen=replace(view.chosen, source={"found": "otherwise"}))
    assert same.chosen_measurement == found[0]
    assert replace(same, plans={}).chosen_measurement == found[0]


def test_a_study_without_measurements_has_a_report(view: ReportData) -> None:
    empty = read(report_html(replace(view, measurements=[], notices=[], plans={}, budgets=[])))
    headings = [heading.text for heading in empty.all("h2")]
    assert headings == ["Size and loss", "The chosen plan", "Model", "Provenance"]
    assert "No plan was measured yet." in empty.full_text


def test_a_number_that_is_none_is_refused(view: ReportData) -> None:
    with pytest.raises(ValueError, match="JSON"):
        report_html(replace(view, measurements=[replace(view.measurements[0], loss=math.nan)]))


def test_same_study_same_file(view: ReportData) -> None:
    assert report_html(view) == report_html(made_view())


def test_figures_are_what_plotly_knows(view: ReportData) -> None:
    for drawn in (front_figure(view), prediction_figure(view)):
        assert drawn is not None
        text = json.dumps({"data": drawn["data"], "layout": drawn["layout"]})
        for name in ("faint", "line", "mixed", "muted", "panel", "text", "uniform"):
            text = text.replace(f"var(--{name})", "#123456")
        assert "var(" not in text
        go.Figure(json.loads(text))


def test_hostile_text_stays_text(hostile_page: Element, page: Element) -> None:
    assert [e.name for e in hostile_page.everything()] == [e.name for e in page.everything()]
    for element in hostile_page.everything():
        assert not [key for key in element.attributes if key.startswith("on") or key in ("src", "href", "style")]
    assert hostile_page.all("title")[0].text == f"study{HOSTILE} - mpsearch"
    assert hostile_page.all("h1")[0].text == f"mpsearch study study{HOSTILE}"
    assert hostile_page.all("li")[0].text == f"note[N415] one norm stays{HOSTILE}"
    assert [e.text for e in hostile_page.all("dt")].count(f"versions / torch{HOSTILE}") == 1
    tips = [cell.attributes["data-tip"] for cell in hostile_page.all("td") if "data-tip" in cell.attributes]
    assert tips[0].startswith(f"model.embed_tokens{HOSTILE}\n")


def test_only_the_two_own_scripts_may_run(hostile_page: Element) -> None:
    scripts = [script for script in hostile_page.all("script") if "type" not in script.attributes]
    digests = [base64.b64encode(hashlib.sha256(script.text.encode()).digest()).decode() for script in scripts]
    (policy,) = [e.attributes["content"] for e in hostile_page.all("meta") if "http-equiv" in e.attributes]
    assert len(scripts) == 2
    assert policy.startswith("default-src 'none'; script-src " + " ".join(f"'sha256-{d}'" for d in digests) + ";")
    for script in hostile_page.all("script", type="application/json"):
        assert not set("<>&") & set(script.text)


def test_text_that_utf8_cannot_hold_can_be_written(view: ReportData) -> None:
    text = report_html(replace(view, study="a\ud800b\x00c\x1bd"))
    assert read(text).all("title")[0].text == "a\ufffdb\ufffdc\ufffdd - mpsearch"
    text.encode()


@given(st.text())
def test_any_text_comes_back(text: str) -> None:
    element = read(tag("p", text, data_tip=text)).children[0]
    assert (element.text, element.attributes["data-tip"], element.children) == (clean(text), clean(text), [])


@given(st.recursive(st.text() | st.booleans(), lambda inner: st.lists(inner) | st.dictionaries(st.text(), inner)))
def test_any_data_comes_back(value: Any) -> None:
    assert json.loads(read(data_script(value)).children[0].text) == value


@pytest.fixture(scope="module")
def browser() -> Iterator[Browser]:
    path = shutil.which("chromium")
    if path is None:
        pytest.fail("the report is tested in Chromium, which is not installed: apt-get install chromium")
    flags = ["--no-sandbox", "--disable-gpu", "--disable-dev-shm-usage", "--disable-background-networking"]
    with sync_playwright() as playwright:
        chromium = playwright.chromium.launch(executable_path=path, args=flags)
        yield chromium
        chromium.close()


@dataclass
class Visit:
    page: Page
    complaints: list[str]
    requests: list[str]


def visit(browser: Browser, file: Path, width: int, mode: Any) -> Visit:
    opened = browser.new_context(viewport={"width": width, "height": 900}, color_scheme=mode).new_page()
    seen = Visit(opened, [], [])
    opened.on("console", lambda message: seen.complaints.append(message.text))
    opened.on("pageerror", lambda error: seen.complaints.append(str(error)))
    opened.on("dialog", lambda dialog: seen.complaints.append(dialog.message))
    opened.on("request", lambda request: seen.requests.append(request.url))
    opened.goto(file.as_uri())
    opened.wait_for_selector("#front svg.main-svg")
    opened.wait_for_selector("#predictions svg.main-svg")
    return seen


@pytest.fixture(scope="module")
def hostile_file(tmp_path_factory: pytest.TempPathFactory) -> Path:
    file = tmp_path_factory.mktemp("report") / "report.html"
    file.write_text(report_html(made_view(HOSTILE)), encoding="utf-8")
    return file


@pytest.mark.parametrize("mode", ["light", "dark"])
@pytest.mark.parametrize("width", [1280, 390])
def test_browser_shows_it_without_network_or_complaint(
    browser: Browser, hostile_file: Path, width: int, mode: str
) -> None:
    seen = visit(browser, hostile_file, width, mode)
    seen.page.wait_for_timeout(300)
    assert seen.complaints == []
    assert seen.requests == [hostile_file.as_uri()]
    assert seen.page.evaluate("typeof window.hacked") == "undefined"
    assert seen.page.evaluate("document.documentElement.scrollWidth") <= width
    assert seen.page.locator("#front .scatterlayer .trace").count() >= 4
    assert seen.page.locator("img, iframe, a[href]").count() == 0
    light = seen.page.evaluate("getComputedStyle(document.body).backgroundColor") == "rgb(255, 255, 255)"
    assert light == (mode == "light")
    seen.page.context.close()


def test_browser_draws_names_as_text(browser: Browser, hostile_file: Path) -> None:
    seen = visit(browser, hostile_file, 1280, "light")
    budget = seen.page.locator("#front .annotation-text").first.text_content() or ""
    assert budget.startswith("weights <= 4 bits</script><script>window.hacked=1</script><img src=x")
    seen.page.locator(".map td").first.hover()
    assert (seen.page.locator("#tip").text_content() or "").startswith(f"model.embed_tokens{HOSTILE}\nformat int")
    assert seen.page.locator("#tip").is_visible()
    seen.page.locator("h2").first.hover()
    assert seen.page.locator("#tip").is_hidden()
    assert seen.page.evaluate("typeof window.hacked") == "undefined"
    seen.page.context.close()


def wait_until(page: Page, expression: str) -> None:
    """Wait for something to become true; the page's policy forbids Playwright's own way, which needs eval."""
    for _ in range(100):
        if page.evaluate(expression):
            return
        page.wait_for_timeout(50)
    pytest.fail(f"never true: {expression}")


def test_browser_follows_mode_and_zoom(browser: Browser, hostile_file: Path) -> None:
    seen = visit(browser, hostile_file, 1280, "light")
    colour = "document.querySelector('#front').layout.font.color"
    assert seen.page.evaluate(colour) == "#1b2330"
    seen.page.emulate_media(color_scheme="dark")
    wait_until(seen.page, f"{colour} === '#e7ebf0'")
    seen.page.evaluate("Plotly.relayout('front', {'xaxis.range': [0.1, 0.2]})")
    factor = 8 * MIB / made_layers().weights
    wait_until(seen.page, f"Math.abs(document.querySelector('#front').layout.xaxis2.range[1] - {0.2 * factor}) < 1e-6")
    assert seen.page.evaluate("document.querySelector('#front').layout.xaxis2.range[0]") == pytest.approx(0.1 * factor)
    assert seen.complaints == []
    seen.page.context.close()
