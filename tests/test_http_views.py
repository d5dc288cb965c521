"""Views that the server keeps: made once, of the state that is told; why and compare; what a reader sees of names."""

from __future__ import annotations

import json
import threading
import time
from collections.abc import Iterator
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest

from mpsearch.stored_study import StoredStudy
from mpsearch.views.difference import difference
from mpsearch.views.study_view import StudyView
from mpsearch.views.why import why
from mpsearch.web.server.reading import open_study
from mpsearch.web.server.redact import redact
from mpsearch.web.server.resolving import Warm
from mpsearch.web.server.views import Views
from tests.http_server import FORMATS, Served, add_study, served, sqlite


@pytest.fixture(scope="module")
def server(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Served]:
    with sqlite(tmp_path_factory.mktemp("views")) as store:
        add_study(store, "page", uniform=True)
        store.create_study("empty", {**store.study("page").spec, "name": "empty"})
        with served(store) as found:
            yield found


@pytest.fixture(scope="module")
def view(server: Served) -> StudyView:
    return StudyView.of(open_study(server.store, "page"))


def test_a_herd_makes_a_view_once(server: Served, monkeypatch: pytest.MonkeyPatch) -> None:
    made: list[str] = []
    real = StudyView.of

    def slow(study: StoredStudy) -> StudyView:
        made.append(study.name)
        time.sleep(0.2)
        return real(study)

    monkeypatch.setattr(StudyView, "of", slow)
    views, found = Views(server.store), []
    threads = [threading.Thread(target=lambda: found.append(views.of("page"))) for _ in range(8)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join(30)
    assert made == ["page"]
    assert len(found) == 8
    assert len(set(map(id, found))) == 1


def test_a_view_is_made_again_when_the_told_state_or_the_question_is_another(
    server: Served, monkeypatch: pytest.MonkeyPatch
) -> None:
    views = Views(server.store)
    first = views.of("page").mark
    assert views.of("page").mark == first
    # The worker went away: what is told changes, and what is stored does not.
    control = server.store.control
    real = type(control).status
    with monkeypatch.context() as patched:
        patched.setattr(type(control), "status", lambda self, name: replace(real(self, name), state="interrupted"))
        gone = views.of("page")
        assert gone.mark != first
        assert gone.view.state == "interrupted"
    study = type(server.store).study
    with monkeypatch.context() as patched:
        patched.setattr(
            type(server.store),
            "study",
            lambda self, name: replace(row := study(self, name), spec={**row.spec, "budgets": ["weights <= 3 bits"]}),
        )
        other = views.of("page")
        assert other.mark != first
        assert [limit.text for limit in other.view.budgets] == ["weights <= 3 bits"]
    server.store.put("ratios", "r", {"ratios": {}})
    server.store.link("page", "ratios", "r")
    assert views.of("page").mark != first


def test_the_tables_are_of_the_view(server: Served, view: StudyView) -> None:
    assert view.scores is not None
    doubled = replace(view.scores, value=2 * view.scores.value)
    found = Warm.of_study(open_study(server.store, "page"), replace(view, scores=doubled))
    assert found.scores.value.tolist() == doubled.value.tolist()


def test_why_is_what_the_library_says(server: Served, view: StudyView) -> None:
    layer = view.layers[2].name
    for plan, number in (("", None), ("1", 1), (view.points.keys[2], 2)):
        found = server.ask("GET", f"/api/v1/why?study=page&layer={layer}&plan={plan}", token="read")
        assert found.status == 200, found.body
        assert found.json == json.loads(json.dumps(why(view, number, layer).to_json()))
        assert found.json["sentences"]
    assert found.json["plan"] == view.points.keys[2]


def test_compare_is_what_the_library_says(server: Served, view: StudyView) -> None:
    found = server.ask("GET", f"/api/v1/compare?study=page&a=0&b={view.points.keys[1]}", token="read")
    assert found.status == 200, found.body
    assert found.json == json.loads(json.dumps(difference(view.plan(0), view.plan(1), view).to_json()))
    assert found.json["changes"]


@pytest.mark.parametrize(
    ("path", "code"),
    [
        ("why?study=page&layer=nope", "E120"),
        ("why?study=page&layer=*", "E120"),
        ("why?study=page", "E907"),
        ("why?study=page&layer=blocks.0.fc&plan=99", "E101"),
        ("why?study=page&layer=blocks.0.fc&plan=" + "0" * 64, "E101"),
        ("why?study=page&layer=blocks.0.fc&plan=../x", "E907"),
        ("why?study=page&layer=blocks.0.fc&mark=0000000000000000", "E914"),
        ("why?study=nope&layer=blocks.0.fc", "E141"),
        ("why?study=empty&layer=blocks.0.fc", "E120"),
        ("compare?study=page&a=0", "E907"),
        ("compare?study=page&a=0&b=-1", "E907"),
        ("compare?study=page&a=0&b=99", "E101"),
        ("compare?study=empty&a=&b=", "E143"),
    ],
)
def test_questions_that_make_no_sense_are_refused(server: Served, path: str, code: str) -> None:
    answer = server.ask("GET", f"/api/v1/{path}", token="read")
    assert answer.code == code, answer.body
    assert 400 <= answer.status < 500


def test_names_of_layers_stay_whole_for_a_reader() -> None:
    onnx = "/model/layers.0/attn/q_proj/MatMul"
    told: dict[str, Any] = {
        "decisions": [onnx, "model.layers.0.up"],
        "layers": [{"name": onnx, "tie": onnx, "shared": [onnx]}],
        "grid": {"rows": ["/model/layers.0"], "columns": ["model.up"]},
        "decision": onnx,
        "points": {"label": ["mixed model", "read from /home/ann/secret/plan.json"]},
        "notices": ["N1: on model, '/home/ann/x.txt'"],
        "provenance": {"calibration": "/home/ann/text.txt"},
    }
    found = redact(told, ["model"])
    assert {name: found[name] for name in ("decisions", "layers", "grid", "decision")} == {
        name: told[name] for name in ("decisions", "layers", "grid", "decision")
    }
    assert found["points"]["label"] == ["mixed model", "read from …/plan.json"]
    assert found["notices"] == ["N1: on …, '…/x.txt'"]
    assert found["provenance"] == {"calibration": "…/text.txt"}


def test_a_study_of_names_like_paths_can_be_solved_by_a_reader(tmp_path: Path) -> None:
    name = "/model/layers.0/MatMul"
    with sqlite(tmp_path) as store:
        add_study(store, "onnx", names_of=(name,))
        with served(store) as server:
            seen = server.ask("GET", "/api/v1/view?study=onnx", token="read").json
            assert seen["decisions"][-1] == seen["layers"][-1]["name"] == name
            ask = {"study": "onnx", "pins": {seen["decisions"][-1]: FORMATS[-1]}}
            found = server.ask("POST", "/api/v1/resolve", ask, token="read").json
            assert found["formats"][-1] == FORMATS[-1]
