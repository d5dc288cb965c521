"""Figures: their numbers are the study's, names are text in them, and they can be told apart by anyone."""

from __future__ import annotations

import itertools
import json
import math
import re
import shutil
import subprocess
import sys
from collections.abc import Callable
from dataclasses import replace
from html.parser import HTMLParser
from itertools import pairwise
from pathlib import Path
from typing import Any
from xml.etree import ElementTree

import numpy as np
import pytest
from playwright.sync_api import sync_playwright

import mpsearch as mp
from benchmarks.pictures import draw as draw_pictures
from mpsearch.errors import InputError, MpsearchError
from mpsearch.format import Format
from mpsearch.front import Measurement, ParetoFront
from mpsearch.layer import Layer, Layers
from mpsearch.plan import BitPlan, Predicted
from mpsearch.planning import usable
from mpsearch.plot.chart import Bars, Cells, Dots, Mark
from mpsearch.plot.figure import Figure
from mpsearch.plot.sources import view_of
from mpsearch.plot.theme import DARK, GROUPS, LIGHT, luminance, theme_of
from mpsearch.stored_study import StoredStudy
from mpsearch.testing.views import pretended
from mpsearch.views.points import PlanRow, Points
from mpsearch.views.study_view import StudyView
from tests.http_server import add_study, served, sqlite

HOSTILE = "</script><img src=x onerror='window.hacked=1'>$\\frac{1}{0}$ %{x} \u202eevil\x1b[31m _<b>漢"
DRAWN: dict[str, Callable[[StudyView], Figure]] = {
    "front": mp.plot.front,
    "plan_heatmap": mp.plot.plan_heatmap,
    "layer_curves": mp.plot.layer_curves,
    "sensitivity": mp.plot.sensitivity,
    "predicted_vs_measured": mp.plot.predicted_vs_measured,
    "compare": lambda view: mp.plot.compare(view.plan(0), view.plan(len(view.points) - 1), view),
    "budget_breakdown": mp.plot.budget_breakdown,
    "estimator_agreement": mp.plot.estimator_agreement,
}


def marks(figure: Figure) -> list[Mark]:
    return [mark for panel in figure.chart.panels for mark in panel.marks]


def changed(view: StudyView, **columns: Any) -> StudyView:
    return replace(view, points=replace(view.points, **columns))


@pytest.fixture(scope="module")
def view() -> StudyView:
    return pretended(40, 23, 5)


@pytest.mark.parametrize("name", DRAWN)
def test_every_figure_is_data_and_two_pictures(name: str, view: StudyView) -> None:
    figure = DRAWN[name](view)
    assert figure.data["figure"] == name
    assert json.loads(json.dumps(figure.data, allow_nan=False)) == figure.data
    assert any(trace.x is not None and len(trace.x) for trace in figure.plotly().data) or name == "plan_heatmap"
    picture = figure.matplotlib("dark", 3.5)
    assert picture.get_figwidth() == 3.5
    assert picture.get_axes()


def test_the_front_shows_the_numbers_of_the_study(view: StudyView) -> None:
    data = mp.plot.front(view).data
    points = view.points
    assert len(data["points"]) == len(points)
    for i, shown in enumerate(data["points"]):
        assert shown["key"] == points.keys[i]
        measured = math.isfinite(points.loss[i])
        assert shown["kind"] == ("measured" if measured else "predicted")
        assert shown["loss"] == (points.loss[i] if measured else points.predicted[i])
        assert shown["cost"] == points.cost["weights"][i]
        assert shown["front"] == points.front()[i]
    drawn = [
        (x, y, mark.hollow)
        for mark in marks(mp.plot.front(view))
        if isinstance(mark, Dots) and not mark.line and mark.size
        for x, y in zip(mark.x, mark.y, strict=True)
    ]
    wanted = [(p["cost"] / 2**20, p["loss"], p["kind"] == "predicted") for p in data["points"]]
    assert sorted(drawn) == sorted(wanted)
    assert {limit["text"] for limit in data["budgets"]} == {limit.text for limit in view.budgets}


def test_the_bound_is_a_falling_stair_of_plans_of_that_budget_alone(view: StudyView) -> None:
    points = view.points
    solved = np.flatnonzero(np.isfinite(points.bound))
    by_size = solved[np.argsort(points.cost["weights"][solved])]
    sources, bound = list(points.sources), points.bound.copy()
    further, worse = by_size[2], by_size[1]
    sources[further] = {"budgets": [*sources[further]["budgets"], "tpot <= 1 ms at context 512"]}
    bound[further] *= 9
    bound[worse] = bound[by_size[0]] * 1.5
    changed = replace(view, points=replace(points, bound=bound, sources=tuple(sources)))
    found = mp.plot.front(changed)
    pairs = found.data["bound"]
    assert points.cost["weights"][further] not in [x for x, _ in pairs]
    assert all(a[0] < b[0] and a[1] >= b[1] for a, b in itertools.pairwise(pairs))
    (line,) = [mark for mark in marks(found) if isinstance(mark, Dots) and mark.name.startswith("bound of")]
    assert all(x0 == x1 or y0 == y1 for (x0, y0), (x1, y1) in itertools.pairwise(zip(line.x, line.y, strict=True)))
    assert line.name == "bound of predicted loss, not of measured loss"
    unmeasured = replace(changed.points, loss=np.full(len(points), np.nan))
    names = [mark.name for mark in marks(mp.plot.front(replace(changed, points=unmeasured))) if isinstance(mark, Dots)]
    assert "bound of predicted loss" in names
    assert mp.plot.front(view, "tpot at context 512").data["bound"] == []


def test_another_resource_has_its_own_unit_and_budgets(view: StudyView) -> None:
    data = mp.plot.front(view, "tpot at context 512").data
    assert (data["unit"], data["budgets"]) == ("s", [])
    with pytest.raises(InputError, match="no costs of 'tpto'") as failed:
        mp.plot.front(view, "tpto")
    assert failed.value.code == "E113"


def test_losses_of_zero_less_or_infinite_are_named(view: StudyView) -> None:
    loss = view.points.loss.copy()
    measured = np.flatnonzero(np.isfinite(loss))[:3]
    loss[measured] = [0.0, -1e-4, math.inf]
    labels = tuple(f"plan {i}" for i in range(len(loss)))
    figure = mp.plot.front(changed(view, loss=loss, labels=labels))
    notes = " ".join(figure.chart.notes)
    assert f"loss of zero or less: 'plan {measured[0]}', 'plan {measured[1]}'" in notes
    assert f"its measured loss is infinite: 'plan {measured[2]}'" in notes
    figure.matplotlib()
    scatter = mp.plot.predicted_vs_measured(changed(view, loss=loss, labels=labels))
    assert f"measured as infinite: 'plan {measured[2]}'" in " ".join(scatter.chart.notes)
    assert len(scatter.data["points"]) == np.isfinite(loss).sum()


def test_nothing_measured_is_said_and_drawn_hollow(view: StudyView) -> None:
    none = np.full(len(view.points), math.nan)
    figure = mp.plot.front(changed(view, loss=none, spread=none))
    assert "Nothing was measured yet" in figure.chart.notes[0]
    assert all(mark.hollow for mark in marks(figure) if isinstance(mark, Dots) and not mark.line)
    assert "was both predicted and measured" in mp.plot.predicted_vs_measured(changed(view, loss=none)).chart.notes[0]


def test_a_front_of_one_point_and_a_model_of_one_layer() -> None:
    layers = Layers((Layer("fc", "linear", (8, 64)),))
    plan = BitPlan(layers, {"fc": Format.parse("int4-g64")}, predicted=Predicted(cost={"weights": 272.0}))
    run = Measurement(plan.assignment, "mixed", 0.5, 0.1, "nats/token", {"weights": 272.0})
    points = Points.of([PlanRow.of("mixed", plan.to_json())], [run])
    one = StudyView("one", "complete", layers, points, (run,))
    for figure in (
        mp.plot.front(one),
        mp.plot.plan_heatmap(plan),
        mp.plot.budget_breakdown(plan),
        run_front(run).plot(),
    ):
        figure.matplotlib(width=3.5)
        figure.plotly()
    assert mp.plot.front(one).data["points"][0]["group"] == "chosen"
    assert mp.plot.plan_heatmap(plan).data["cells"][0]["bits"] == "4"
    same = mp.plot.compare(plan, plan)
    assert "same in 1 of 1 layers" in same.chart.notes[0]
    same.matplotlib()
    with pytest.raises(InputError) as failed:
        mp.plot.sensitivity(one)
    assert failed.value.code == "E143"


def run_front(*runs: Measurement) -> ParetoFront:
    return ParetoFront.of(runs)


def test_an_empty_study_is_drawn_with_a_note() -> None:
    empty = StudyView("none", "new", Layers(()), Points.of([], []))
    figure = mp.plot.front(empty)
    assert "No plan" in figure.chart.notes[0]
    figure.matplotlib()
    figure.plotly()
    mp.plot.estimator_agreement(empty).matplotlib()
    with pytest.raises(InputError, match="has no plan"):
        mp.plot.plan_heatmap(empty)


def test_two_thousand_layers_have_few_labels() -> None:
    large = pretended(12, 2000, 4)
    for name in ("plan_heatmap", "sensitivity", "compare"):
        figure = DRAWN[name](large)
        picture = figure.matplotlib()
        for axes in picture.get_axes():
            for side in (axes.get_xticklabels(), axes.get_yticklabels()):
                assert len([label for label in side if label.get_text()]) <= 60
        drawn = figure.plotly()
        for axis in (drawn.layout.xaxis, drawn.layout.yaxis):
            assert len(axis.tickvals or ()) <= 60


def test_curves_show_settled_scores(view: StudyView) -> None:
    assert view.scores is not None
    data = mp.plot.sensitivity(view).data
    settled = usable(view.scores)
    for i, decision in enumerate(data["decisions"]):
        for point in decision["points"]:
            j = view.scores.formats.index(point["format"])
            assert point["loss"] == settled.value[i, j]
            assert point["settled"] == (view.scores.value[i, j] < 0)
            assert point["bytes"] == Format.parse(point["format"]).bytes(view.layers[i])
    assert "Estimated below zero" in " ".join(mp.plot.sensitivity(view).chart.notes)


def test_curves_of_named_layers(view: StudyView) -> None:
    name = view.layers[3].name
    assert [d["name"] for d in mp.plot.layer_curves(view, name).data["decisions"]] == [name]
    many = mp.plot.layer_curves(view, ["*"])
    assert len(many.data["decisions"]) == len(view.layers)
    assert any(mark.name == f"{len(view.layers) - 6} more" for mark in marks(many) if isinstance(mark, Dots))
    assert len(mp.plot.layer_curves(view).data["decisions"]) == 6
    with pytest.raises(InputError, match=r"; did you mean 'model.layers.0.mlp.up_proj'") as failed:
        mp.plot.layer_curves(view, "model.layers.0.mlp.up_porj")
    assert failed.value.code == "E302"


def test_missing_scores_leave_gaps_and_are_named(view: StudyView) -> None:
    assert view.scores is not None
    value, status = view.scores.value.copy(), [list(row) for row in view.scores.status]
    value[1, 0], status[1][0] = math.nan, "non_finite"
    value[2, 1], status[2][1] = math.nan, "not_observed"
    holes = replace(view, scores=replace(view.scores, value=value, status=tuple(map(tuple, status))))  # type: ignore[arg-type]
    figure = mp.plot.sensitivity(holes)
    notes = " ".join(figure.chart.notes)
    assert f"(non finite): '{view.layers[1].name[:10]}" in notes
    assert "(not observed)" in notes
    first = next(mark for mark in marks(figure) if isinstance(mark, Dots))
    assert math.isnan(first.y[1])
    figure.matplotlib()


def test_a_map_folds_experts() -> None:
    layers = Layers(
        (
            *(Layer(f"h.{b}.experts.{i}.up", "linear", (8, 64)) for b in range(2) for i in range(3)),
            Layer("head", "linear", (8, 64)),
        )
    )
    bits = [8, 4, 4, 2, 4, 8, 4]
    plan = BitPlan(layers, {x.name: Format.parse(f"int{b}-g64") for x, b in zip(layers, bits, strict=True)})
    cells = next(mark for mark in marks(plan.plot()) if isinstance(mark, Cells))
    assert [(cell[3], cell[4]) for cell in cells.cells] == [("bits:4", "4-8"), ("bits:4", "2-8"), ("bits:4", "4")]


def test_a_breakdown_adds_up_to_the_plan(view: StudyView) -> None:
    plan = view.plan(0)
    figure = mp.plot.budget_breakdown(view)
    assert sum(part["amount"] for part in figure.data["parts"]) == figure.data["total"] == plan.stored_bytes
    for part in figure.data["parts"]:
        assert sum(part["bits"].values()) in (part["amount"], 0)
    drawn = sum(sum(mark.length) for mark in marks(figure) if isinstance(mark, Bars))
    assert drawn * 2**20 == pytest.approx(plan.stored_bytes, rel=1e-12)
    assert mp.plot.budget_breakdown(plan, "tpot at context 512", view).data["unit"] == "s"
    with pytest.raises(InputError, match="no costs of 'tpot'"):
        mp.plot.budget_breakdown(plan, "tpot")


def test_a_comparison_ends_at_the_other_plan(view: StudyView) -> None:
    a, b = view.plan(0), view.plan(7)
    figure = mp.plot.compare(a, b, view)
    ends = next(mark for mark in marks(figure) if isinstance(mark, Dots))
    assert ends.x == (figure.data["first"]["predicted"], figure.data["second"]["predicted"])
    moved = next(mark for mark in figure.chart.panels[1].marks if isinstance(mark, Bars))
    unit = 2**20 if "MiB" in figure.chart.panels[1].x.title else 1024
    assert round(sum(moved.length) * unit) == b.bytes - a.bytes
    only_bytes = mp.plot.compare(a, b)
    assert len(only_bytes.chart.panels) == 1
    assert "no scores" in " ".join(only_bytes.chart.notes)


@pytest.mark.parametrize("theme", [LIGHT, DARK], ids=["light", "dark"])
def test_groups_differ_in_grey_and_in_shape(theme: Any) -> None:
    from mpsearch.plot.fronts import STYLES

    grey = [luminance(theme.groups[group]) for group in GROUPS]
    assert grey == sorted(grey, reverse=theme is DARK)
    for one, other in pairwise(grey):
        assert (max(one, other) + 0.05) / (min(one, other) + 0.05) > 1.2
    ground = luminance(theme.ground)
    for role in (*GROUPS[:5], "text", "muted"):
        lightness = luminance(theme.colour(role))
        assert (max(lightness, ground) + 0.05) / (min(lightness, ground) + 0.05) > 3
    assert len({STYLES[group][0] for group in GROUPS}) == len(GROUPS)
    steps = [luminance(theme.colour(f"bits:{bits}")) for bits in (2, 3, 4, 5, 6, 7, 8, 16, 32)]
    assert steps == sorted(steps, reverse=True)


@pytest.mark.parametrize("name", DRAWN)
def test_hostile_names_are_text_in_pictures_for_paper(name: str, tmp_path: Path) -> None:
    path = DRAWN[name](pretended(12, 6, 3, hostile=HOSTILE)).save(tmp_path / "a.svg")
    text = path.read_text(encoding="utf-8")
    assert "<script" not in text
    words = "".join(ElementTree.fromstring(text).itertext())
    assert not re.search("[\u202a-\u202e\x00-\x08\x1b]", words)


def test_formulas_in_names_stay_as_typed(tmp_path: Path) -> None:
    layers = Layers((Layer("$x$", "linear", (8, 64)), Layer(r"_a\$b_$c$", "linear", (8, 64))))
    plan = BitPlan(layers, {layer.name: Format.parse("int4-g64") for layer in layers})
    text = plan.plot().save(tmp_path / "a.svg").read_text(encoding="utf-8")
    words = ["".join(node.itertext()) for node in ElementTree.fromstring(text).iter() if node.tag.endswith("}text")]
    assert {"$x$", r"_a\$b_$c$"} <= set(words)


def test_pages_run_no_foreign_script_and_show_names_as_text(tmp_path: Path) -> None:
    chromium = shutil.which("chromium")
    assert chromium, "pages are tested in Chromium: apt-get install chromium"
    hostile = pretended(12, 6, 3, hostile=HOSTILE)
    messages: list[str] = []
    with sync_playwright() as playwright:
        browser = playwright.chromium.launch(executable_path=chromium, args=["--no-sandbox", "--disable-gpu"])
        for name in ("front", "plan_heatmap"):
            path = DRAWN[name](hostile).save(tmp_path / f"{name}.html")
            page = browser.new_page(color_scheme="dark", viewport={"width": 390, "height": 700})
            page.on("console", lambda message: messages.append(message.text))
            page.on("pageerror", lambda error: messages.append(str(error)))
            page.goto(path.as_uri())
            page.wait_for_selector("#figure .infolayer", state="attached")
            assert page.evaluate("window.hacked") is None
            assert page.evaluate("document.querySelectorAll('#figure img, #figure b').length") == 0
            assert "<b>" in page.evaluate("document.querySelector('#figure').textContent + document.title")
            assert page.evaluate("getComputedStyle(document.body).backgroundColor") == "rgb(18, 22, 27)"
            assert page.evaluate("document.documentElement.scrollWidth") <= 390
            page.close()
        browser.close()
    assert messages == []


def test_files_by_suffix(tmp_path: Path, view: StudyView) -> None:
    figure = mp.plot.front(view)
    starts = {".png": b"\x89PNG", ".svg": b"<?xml", ".pdf": b"%PDF", ".json": b"{", ".html": b"<!doctype html>"}
    for suffix, start in starts.items():
        path = figure.save(str(tmp_path / f"a{suffix}"))
        assert path.read_bytes().startswith(start)
        again = figure.save(tmp_path / f"b{suffix}")
        assert path.read_bytes() == again.read_bytes()
    assert json.loads((tmp_path / "a.json").read_text(encoding="utf-8")) == figure.data
    # Text stays text, for those who search or edit it.
    assert "<text" in (tmp_path / "a.svg").read_text(encoding="utf-8")
    for wrong in ("a.gif", "a", "a.pgn"):
        with pytest.raises(InputError, match="no picture is written") as failed:
            figure.save(tmp_path / wrong)
        assert failed.value.code == "E113"
        assert not (tmp_path / wrong).exists()
    for settings in ({"theme": "drak"}, {"width": 0}, {"width": math.nan}, {"dpi": 10**6}):
        with pytest.raises(InputError) as failed:
            figure.save(tmp_path / "c.png", **settings)  # type: ignore[arg-type]
        assert failed.value.code == "E113"
    assert not (tmp_path / "c.png").exists()
    assert theme_of("dark") is DARK


def test_settings_of_the_user_count_for_nothing_and_stay(view: StudyView) -> None:
    import matplotlib

    plain = mp.plot.front(view)._repr_png_()
    with matplotlib.rc_context({"text.usetex": True, "lines.linewidth": 30.0, "font.size": 40.0}):
        before = dict(matplotlib.rcParams)
        assert mp.plot.front(view)._repr_png_() == plain
        assert dict(matplotlib.rcParams) == before
    assert "matplotlib.pyplot" not in sys.modules or not sys.modules["matplotlib.pyplot"].get_fignums()


def test_without_matplotlib_a_typed_error_and_words(monkeypatch: pytest.MonkeyPatch, view: StudyView) -> None:
    for name in [name for name in sys.modules if name.split(".")[0] == "matplotlib"]:
        monkeypatch.delitem(sys.modules, name)
    monkeypatch.setitem(sys.modules, "matplotlib", None)
    figure = mp.plot.front(view)
    with pytest.raises(InputError, match="need matplotlib") as failed:
        figure.matplotlib()
    assert failed.value.code == "E118"
    assert "mpsearch[plot]" in failed.value.advice
    assert figure._repr_png_() is None
    assert "pip install" in figure._repr_html_()
    assert figure.plotly().data


def test_drawing_libraries_load_late() -> None:
    code = (
        "import sys, mpsearch; mpsearch.plot.front; "
        "print([x for x in ('plotly', 'matplotlib', 'torch') if x in sys.modules])"
    )
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    assert done.stdout.strip() == "[]"


class Tags(HTMLParser):
    def __init__(self, text: str) -> None:
        super().__init__()
        self.tags: list[str] = []
        self.events: list[str] = []
        self.feed(text)

    def handle_starttag(self, tag: str, attrs: list[tuple[str, str | None]]) -> None:
        self.tags.append(tag)
        self.events += [name for name, value in attrs if name.startswith("on") or (value or "").startswith("http")]


def test_notebooks_get_small_static_html() -> None:
    hostile = pretended(30, 16, 4, hostile=HOSTILE)
    plan = hostile.plan(0)
    shown = {"plan": plan._repr_html_(), "front": ParetoFront.of(hostile.measured)._repr_html_()}
    shown |= {name: draw(hostile)._repr_html_() for name, draw in DRAWN.items()}
    for text in shown.values():
        tags = Tags(text)
        assert set(tags.tags) <= {"table", "thead", "tbody", "tr", "th", "td", "p", "h4", "img", "strong"}
        assert tags.events == []
        assert len(text) < 300_000
    cells = Tags(shown["plan"]).tags.count("td")
    assert cells == len(mp.plot.plan_heatmap(plan).data["cells"])
    assert len(pretended(6, 2000, 4).plan(0)._repr_html_()) < 100_000


def test_what_cannot_be_drawn_is_refused(tmp_path: Path) -> None:
    with pytest.raises(InputError, match="got a int") as failed:
        mp.plot.front(3)  # type: ignore[arg-type]
    assert failed.value.code == "E113"
    with pytest.raises(InputError) as failed:
        mp.plot.plan_heatmap(tmp_path / "none.json")
    assert failed.value.code == "E101"
    with pytest.raises(MpsearchError) as other:
        mp.plot.compare(pretended(6, 4, 3).plan(0), pretended(6, 5, 3).plan(0))
    assert other.value.code == "E302"


def test_paths_of_plans(tmp_path: Path, view: StudyView) -> None:
    view.plan(0).save(tmp_path / "a.json")
    view.plan(1).save(tmp_path / "b.json")
    assert mp.plot.plan_heatmap(str(tmp_path / "a.json")).data == view.plan(0).plot().data
    assert mp.plot.compare(tmp_path / "a.json", tmp_path / "b.json").data["layers"] == len(view.layers)
    assert view_of(view) is view


def test_studies_of_the_store_and_of_a_server_are_drawn_alike(tmp_path: Path) -> None:
    with sqlite(tmp_path) as store:
        local = add_study(store, "toy", rows=6, uniform=True)
        with served(store) as server:
            remote = mp.connect(server.url, server.tokens.full or "").study("toy")
            for draw in (mp.plot.front, mp.plot.sensitivity, mp.plot.predicted_vs_measured, mp.plot.plan_heatmap):
                assert draw(remote).data == draw(local).data
            assert mp.plot.budget_breakdown(remote).data == mp.plot.budget_breakdown(local).data
        shown = local._repr_html_()
        assert view_of(local).verdict[0].split()[0] in shown
        assert Tags(shown).tags.count("img") == 1
        assert local.plot().data == mp.plot.front(local).data
        front = local.front
        points = {p["label"]: (p["cost"], p["loss"]) for p in front.plot().data["points"]}
        assert all(points[run.label] == (run.cost["weights"], run.loss) for run in front)
        assert "It has not run yet" in StoredStudy(replace(local.spec, name="other"), store, {})._repr_html_()


def test_the_pictures_of_the_documentation(tmp_path: Path) -> None:
    drawn = draw_pictures(pretended(12, 9, 4), tmp_path, dpi=40)
    assert [path.stem for path in drawn[::2]] == list(DRAWN)
    assert all(path.read_bytes().startswith(b"\x89PNG") for path in drawn)
    kept = Path(__file__).parents[1] / "docs" / "pictures"
    assert {path.name for path in drawn} <= {path.name for path in kept.glob("*.png")}
