"""The report as a file: its numbers are the study's, its text stays text, and it is small."""

from __future__ import annotations

import base64
import hashlib
import json
import math
import zlib
from collections.abc import Iterator
from dataclasses import dataclass, field, replace
from html.parser import HTMLParser
from typing import Any

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from mpsearch.cli.show import safe
from mpsearch.front import Measurement
from mpsearch.layer import Layers
from mpsearch.plot.text import plain
from mpsearch.testing.views import pretended
from mpsearch.verdict import NEARLY_EQUAL
from mpsearch.views.packed import choices, packed
from mpsearch.views.points import Points
from mpsearch.views.study_view import StudyView
from mpsearch.web.layer_table import layer_table
from mpsearch.web.markup import clean, data_script, tag
from mpsearch.web.plan_table import listed, plan_table
from mpsearch.web.report import report_html

HOSTILE = "</script><script>window.hacked=1</script><img src=x onerror='window.hacked=2'>\"'&amp;<!--\u202e"


def empty_view() -> StudyView:
    """A study that has only begun."""
    return StudyView("begun", "running", Layers(()), Points.of([], []))


def changed(view: StudyView, **columns: Any) -> StudyView:
    """The same view with other columns of its points."""
    return replace(view, points=replace(view.points, **columns))


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


@pytest.fixture(scope="module")
def view() -> StudyView:
    return pretended(60, 16, 4)


@pytest.fixture(scope="module")
def page(view: StudyView) -> Element:
    return read(report_html(view))


@pytest.fixture(scope="module")
def hostile_page() -> Element:
    return read(report_html(pretended(60, 16, 4, hostile=HOSTILE)))


def test_table_holds_the_numbers_of_plans_in_full(view: StudyView, page: Element) -> None:
    points = view.points
    size = points.cost["weights"]
    uniform = [i for i, group in enumerate(points.groups) if group == "uniform" and points.measured[i]]
    expected = []
    for i in listed(view):
        row = [8 * size[i] / view.weights, size[i]]
        row += [x for x in (points.loss[i], points.predicted[i]) if math.isfinite(x)]
        fits = [points.loss[j] for j in uniform if size[j] <= NEARLY_EQUAL * size[i]]
        if points.groups[i] != "uniform" and points.measured[i] and fits:
            row.append(min(fits) - points.loss[i])
        expected.append(row)
    assert numbers_in(page.all("table", id="plans")[0]) == expected
    kinds = {points.groups[i] for i in listed(view)}
    assert {"chosen", "uniform", "mixed"} <= kinds
    assert set(np.flatnonzero(points.front()).tolist()) <= set(listed(view))


def test_verdict_holds_the_chosen_plan(view: StudyView, page: Element) -> None:
    (block,) = page.all("div", id="verdict")
    points, i = view.points, view.chosen
    assert [line.text for line in block.all("p")][: len(view.verdict)] == list(view.verdict)
    values = [float(item.attributes["value"]) for item in block.all("data")]
    size = points.cost["weights"][i]
    assert values == [size, 8 * size / view.weights, points.loss[i], points.predicted[i]]
    assert [term.text for term in block.all("dt")] == [
        "Size, exact",
        "Bits per weight, exact",
        "Loss, measured",
        "Loss, predicted",
    ]


def test_table_of_layers_holds_bytes_and_settled_losses(view: StudyView, page: Element) -> None:
    assert view.scores is not None
    rows = numbers_in(page.all("table", id="layers")[0])
    value, spread = view.scores.value, view.scores.spread
    assert (value < 0).any()
    for i, numbers in enumerate(rows):
        j = int(view.points.choice[view.chosen, i])
        loss = spread[i, j] if value[i, j] < 0 else value[i, j]
        assert numbers == [8 * view.sizes[i, j] / view.layers[i].weights, view.sizes[i, j], loss]


def test_bytes_of_layers_say_where_they_count_when_the_total_counts_elsewhere(view: StudyView) -> None:
    assert "our own file" not in layer_table(view, 0)
    target = changed(view, cost={"weights": view.points.cost["weights"] + 512})
    assert "exact, in our own file" in layer_table(target, 0)


def test_gain_within_noise_is_named(view: StudyView) -> None:
    points = view.points
    loss, spread = points.loss.copy(), points.spread.copy()
    uniform = points.groups.index("uniform")
    loss[:] = np.nan
    loss[[0, uniform]], spread[[0, uniform]] = (0.5, 0.5 + 1e-6), 0.1
    cost = {"weights": np.where(np.arange(len(points)) == uniform, 1.0, 2.0) * 1e6}
    assert "within noise" in report_html(changed(view, loss=loss, spread=spread, cost=cost))
    cost = {"weights": np.where(np.arange(len(points)) == uniform, 3.0, 2.0) * 1e6}
    assert "no uniform plan this small" in report_html(changed(view, loss=loss, spread=spread, cost=cost))


def test_a_gain_has_the_error_of_the_verdict(view: StudyView) -> None:
    noise = np.random.default_rng(0).normal(1.0, 0.5, 64)
    uniform = next(i for i, group in enumerate(view.points.groups) if group == "uniform" and view.points.measured[i])
    size = np.where(np.arange(len(view.points)) == uniform, 1.0, 2.0) * 1e6
    loss = np.full(len(view.points), np.nan)
    loss[[0, uniform]] = noise.mean(), noise.mean() + 0.001
    found = changed(view, loss=loss, spread=np.where(np.isfinite(loss), 0.06, np.nan), cost={"weights": size})
    runs = [
        Measurement(view.points.keys[i], view.points.labels[i], float(loss[i]), 0.06, "nats/token",
                    {"weights": size[i]}, data={"text": "v"}, samples=tuple(noise + (0.001 if i else 0.0)))
        for i in (0, uniform)
    ]  # fmt: skip
    assert "within noise" not in plan_table(replace(found, measured=tuple(runs)), [0], "t")
    assert "within noise" in plan_table(replace(found, measured=()), [0], "t")


def test_the_error_of_a_sum_is_an_upper_limit(view: StudyView) -> None:
    assert f", at most ± {view.points.doubt[0]:.2g}" in report_html(view)


def test_a_view_without_layers_has_a_report(view: StudyView) -> None:
    assert "Size, exact" in report_html(replace(view, layers=Layers(()), scores=None))


def test_paths_of_the_owner_stay_at_home(view: StudyView) -> None:
    question = {
        "model": "/home/annabel/models/llama",
        "calibration": "C:\\annabel\\text.txt",
        "seeds": ["~/x/y.json", 1],
    }
    rules = {"pins": {"/model/layers.0": "int4-g64"}}
    model = {"name": "/home/annabel/models/llama", "digest": "d"}
    shown = replace(view, model=model, provenance={"study": {**question, "rules": rules}})
    (data,) = read(report_html(shown)).all("script", id="study-data")
    for text in (report_html(shown), zlib.decompress(base64.b64decode(data.text)).decode()):
        assert "annabel" not in text
        assert "llama" in text
        assert "text.txt" in text
        assert "/model/layers.0" in text


def unpacked(page: Element, name: str) -> bytes:
    (holder,) = page.all("script", id=name)
    return zlib.decompress(base64.b64decode(holder.text))


def test_data_inside_is_the_view_less_what_follows(view: StudyView, page: Element) -> None:
    data, whole = json.loads(unpacked(page, "study-data")), json.loads(json.dumps(packed(view)))
    assert unpacked(page, "study-plans") == choices(view)
    plans, full = data.pop("points"), whole.pop("points")
    assert data == whole
    assert plans["loss"] == full["loss"]
    assert plans["spread"] == full["spread"]
    assert plans["predicted"] == [True] * len(view.points)
    assert set(plans["cost"]) == {"weights", "tpot at context 512"}
    assert all(column == [True] * len(view.points) for column in plans["cost"].values())


def test_what_does_not_follow_stays(view: StudyView) -> None:
    predicted = view.points.predicted.copy()
    predicted[3] = np.nextafter(predicted[3], 1.0)
    predicted[4] = np.nan
    found = json.loads(unpacked(read(report_html(changed(view, predicted=predicted))), "study-data"))
    assert found["points"]["predicted"][:6] == [True, True, True, predicted[3], None, True]


def test_report_of_ten_thousand_plans_is_small() -> None:
    assert len(report_html(pretended(10_000, 300, 5)).encode()) <= 2_000_000


@pytest.mark.parametrize("state", ["running", "failed"])
def test_a_study_without_plans_has_a_report(state: str) -> None:
    found = read(report_html(replace(empty_view(), state=state)))
    assert f"State: {state}." in found.full_text
    assert "There is no plan yet" in found.full_text
    assert not found.all("table")


def test_a_study_without_scores_or_measurements_has_a_report(view: StudyView) -> None:
    unknown = np.full(len(view.points), np.nan)
    bare = changed(replace(view, scores=None, measured=(), costs=(), budgets=()), loss=unknown, spread=unknown)
    found = read(report_html(bare))
    assert "not measured" in found.all("table", id="plans")[0].full_text
    lost = read(report_html(changed(view, loss=np.where(np.arange(60) == 0, np.inf, view.points.loss))))
    assert "not finite" in lost.all("table", id="plans")[0].full_text


def test_same_study_same_file(view: StudyView) -> None:
    assert report_html(view) == report_html(pretended(60, 16, 4))


def test_hostile_text_stays_text(hostile_page: Element, page: Element) -> None:
    assert [e.name for e in hostile_page.everything()] == [e.name for e in page.everything()]
    for element in hostile_page.everything():
        assert not [key for key in element.attributes if key.startswith("on") or key in ("src", "href", "style")]
    assert hostile_page.all("title")[0].text == clean(f"pretended{HOSTILE} - mpsearch")
    assert hostile_page.all("li")[-1].text == clean(f"note[N415] nothing here was ever measured{HOSTILE}")


def test_only_the_own_script_and_style_may_run(hostile_page: Element) -> None:
    def digest(element: Element) -> str:
        return f"'sha256-{base64.b64encode(hashlib.sha256(element.text.encode()).digest()).decode()}'"

    (script,) = [script for script in hostile_page.all("script") if "type" not in script.attributes]
    (style,) = hostile_page.all("style")
    (policy,) = [e.attributes["content"] for e in hostile_page.all("meta") if "http-equiv" in e.attributes]
    assert policy.split("; ") == [
        "default-src 'none'",
        f"script-src {digest(script)}",
        f"style-src {digest(style)}",
        "base-uri 'none'",
        "form-action 'none'",
    ]
    assert {e.attributes["type"] for e in hostile_page.all("script") if e is not script} == {"text/plain"}


def test_text_that_utf8_cannot_hold_can_be_written(view: StudyView) -> None:
    text = report_html(replace(view, study="a\ud800b\x00c\x1bd"))
    assert read(text).all("title")[0].text == "a\ufffdb\ufffdc\ufffdd - mpsearch"
    text.encode()


@pytest.mark.parametrize("odd", "\u061c\u200b\u200f\u2028\u202e\u2066\ufeff\ue000\x85")
def test_what_is_not_seen_is_shown_nowhere(odd: str) -> None:
    assert (clean(f"a{odd}b"), plain(f"a{odd}b"), safe(f"a{odd}b")) == ("a\ufffdb", "a\ufffdb", "a?b")
    assert clean("a\u00a0\tb") == "a\u00a0\tb"


@given(st.text())
def test_any_text_comes_back(text: str) -> None:
    element = read(tag("p", text, data_tip=text)).children[0]
    assert (element.text, element.attributes["data-tip"], element.children) == (clean(text), clean(text), [])


@given(st.recursive(st.text() | st.booleans(), lambda inner: st.lists(inner) | st.dictionaries(st.text(), inner)))
def test_any_data_comes_back(value: Any) -> None:
    assert json.loads(read(data_script(value)).children[0].text) == value
