"""The server's side of the live page: what it serves, plans solved for a moment, and databases in any state."""

from __future__ import annotations

import gzip
import math
import os
import sqlite3
import stat
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from mpsearch.storage.schema import VERSION_TABLE
from mpsearch.stored_study import StoredStudy
from mpsearch.testing.views import pretended
from mpsearch.views.packed import choices, packed
from mpsearch.views.study_view import StudyView
from mpsearch.web.server.pages import SCRIPTS, STYLES
from mpsearch.web.server.reading import open_study
from mpsearch.web.server.resolving import Warm, resolve
from mpsearch.web.server.wishes import Wish
from tests.http_server import FORMATS, HOSTILE, IDENTITY, Served, add_study, fill, served, sqlite

ROWS = 14


@pytest.fixture(scope="module")
def server(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Served]:
    with sqlite(tmp_path_factory.mktemp("page")) as store:
        fill(store)
        add_study(store, "page", rows=ROWS, seed=3, names_of=("lm_head",), uniform=True)
        with served(store, place="/srv/secret folder/results.db") as found:
            yield found


@pytest.fixture(scope="module")
def study(server: Served) -> StoredStudy:
    return open_study(server.store, "page")


def solved(server: Served, **ask: Any) -> Any:
    answer = server.ask("POST", "/api/v1/resolve", {"study": "page", **ask}, token="read")
    assert answer.status == 200, answer.body
    return answer.json


def test_the_page_names_only_files_that_are_served(server: Served) -> None:
    page = server.ask("GET", "/", token="read")
    assert page.headers["content-type"] == "text/html; charset=utf-8"
    text = page.body.decode()
    for name in (*SCRIPTS, *STYLES):
        assert f"/assets/{name}" in text
        found = server.ask("GET", f"/assets/{name}", token="read")
        assert (found.status, found.headers["x-content-type-options"]) == (200, "nosniff")
        kind = {"js": "text/javascript", "css": "text/css"}[name.rpartition(".")[2]]
        assert found.headers["content-type"] == f"{kind}; charset=utf-8"
        assert b"eval(" not in found.body
        assert b"innerHTML" not in found.body
    assert "style=" not in text
    assert text.count("<script") == len(SCRIPTS)


@pytest.mark.parametrize("name", ["nope.js", "report.js", "../app.py", "%2e%2e/app.py", "page.js/", "PAGE.js", ""])
def test_nothing_else_of_the_disk_is_served(server: Served, name: str) -> None:
    assert server.ask("GET", f"/assets/{name}").status == 404


def test_files_are_compressed_and_are_not_sent_twice(server: Served) -> None:
    plain = server.ask("GET", "/assets/base.js")
    small = server.ask("GET", "/assets/base.js", Accept_Encoding="br, gzip;q=0.5")
    assert small.headers["content-encoding"] == "gzip"
    assert gzip.decompress(small.body) == plain.body
    assert len(small.body) < len(plain.body) / 2
    for refusing in ("identity", "gzip;q=0", "xgzip"):
        assert "content-encoding" not in server.ask("GET", "/assets/base.js", Accept_Encoding=refusing).headers
    again = server.ask("GET", "/assets/base.js", If_None_Match=plain.headers["etag"])
    assert (again.status, again.body) == (304, b"")
    assert server.ask("GET", "/assets/base.js", If_None_Match='"other"').status == 200


def test_a_reader_is_not_told_where_the_database_is(server: Served) -> None:
    assert b'data-place="/srv/secret folder/results.db"' in server.ask("GET", "/").body
    page = server.ask("GET", "/", token="read").body
    assert b"secret folder" not in page
    assert b"results.db" not in page
    assert b'data-place="DATABASE"' in page, "commands that are copied name what is to be filled in"
    for route in ("view", "view/keys"):
        for coding in ("identity", "gzip"):
            answer = server.ask("GET", f"/api/v1/{route}?study=page", token="read", Accept_Encoding=coding)
            body = gzip.decompress(answer.body) if coding in answer.headers.get("content-encoding", "") else answer.body
            assert b"secret folder" not in body


def test_the_view_is_what_everybody_draws(server: Served, study: StoredStudy) -> None:
    view = StudyView.of(study)
    wanted = packed(view)
    found = server.ask("GET", "/api/v1/view?study=page").json
    mark = found.pop("mark")
    wanted["points"] |= {"key": [], "plan": []}
    assert found == wanted
    whole = server.ask("GET", f"/api/v1/view/choices?study=page&count=1000&mark={mark}")
    assert (whole.headers["content-type"], whole.body) == ("application/octet-stream", choices(view))
    part = server.ask("GET", f"/api/v1/view/choices?study=page&first=2&count=3&mark={mark}")
    assert part.body == choices(view, 2, 5)
    keys = server.ask("GET", f"/api/v1/view/keys?study=page&first=1&count=2&mark={mark}").json
    assert keys == {"plan": list(view.points.plans[1:3]), "key": list(view.points.keys[1:3])}


def test_plans_of_a_study_that_went_on_are_not_mixed_up(tmp_path: Path) -> None:
    with sqlite(tmp_path) as store:
        add_study(store, "page")
        with served(store) as server:
            before = server.ask("GET", "/api/v1/view?study=page").json
            store.set_state("page", "paused")
            old = f"/api/v1/view/choices?study=page&mark={before['mark']}"
            assert server.ask("GET", old).status == 200, "the page goes on with the view that it has"
            after = server.ask("GET", "/api/v1/view?study=page").json
            assert after["mark"] != before["mark"]
            stale = server.ask("GET", old)
            assert (stale.status, stale.code) == (409, "E914")


def test_a_hostile_or_empty_study_has_a_view(server: Served) -> None:
    from urllib.parse import quote

    for name in HOSTILE:
        found = server.ask("GET", f"/api/v1/view?study={quote(name, safe='')}")
        assert found.status == 200, found.body
        assert (found.json["study"], found.json["scores"], found.json["points"]["label"]) == (name, None, [])
        refused = server.ask("POST", "/api/v1/resolve", {"study": name})
        assert (refused.status, refused.code) == (409, "E143")


@pytest.mark.parametrize("budget", ["weights <= 2.6 bits", "weights <= 3.3 bits", "weights <= 5 bits", "bops <= 40 %"])
def test_solving_again_is_what_the_library_solves(server: Served, study: StoredStudy, budget: str) -> None:
    # A proof within 30 ms depends on the machine's other work; one with patience does not.
    found, plan = solved(server, budgets=[budget], patient=True), study.plan(budget)
    names = server.ask("GET", "/api/v1/view?study=page").json["formats"]
    assert [names[j]["name"] for j in found["choice"]] == [str(plan.formats[layer.name]) for layer in plan.layers]
    made = plan.predicted
    assert (found["loss"], found["spread"], found["bound"]) == (made.loss, made.spread, made.bound)
    assert found["cost"] == dict(plan.cost)
    assert found["proven"]
    quick = solved(server, budgets=[budget])
    assert quick["bound"] <= found["loss"] <= quick["loss"]


def test_wishes_are_kept_and_their_price_is_the_difference(server: Served, study: StoredStudy) -> None:
    budget = "weights <= 3.3 bits"
    free = solved(server, budgets=[budget])
    wish = {
        "pins": {"lm_head": "int8-g64"},
        "bars": {"blocks.1*": ["int2-g64", "int4-g64"]},
        "floors": {"blocks.2.*": "int4-g64"},
    }
    found = solved(server, budgets=[budget], against=free["choice"], **wish)
    names = found["formats"]
    layers = [layer.name for layer in study.survey.layers]
    assert names[layers.index("lm_head")] == "int8-g64"
    assert not {names[i] for i, name in enumerate(layers) if name.startswith("blocks.1")} & {"int2-g64", "int4-g64"}
    assert names[layers.index("blocks.2.fc")] in ("int4-g64", "int8-g64")
    assert found["wish"] == found["loss"] - free["loss"] > 0
    assert found["without"]["loss"] == free["loss"]
    assert found["changed"] == [
        i for i, (a, b) in enumerate(zip(free["choice"], found["choice"], strict=True)) if a != b
    ]
    # The same pin as a study would hold it.
    from dataclasses import replace

    pinned = replace(study.spec, pins={"lm_head": "int8-g64"})
    plan = StoredStudy(pinned, server.store, IDENTITY).plan(budget)
    assert solved(server, budgets=[budget], pins={"lm_head": "int8-g64"})["loss"] == plan.loss


def test_what_does_not_fit_is_answered_with_what_would(server: Served, study: StoredStudy) -> None:
    found = solved(server, budgets=["weights <= 1 bits"])
    assert (found["found"], found["error"]["code"]) == (False, "E201")
    assert "cannot be met" in found["error"]["message"]
    assert found["least"][0]["short"]
    least = found["least"][0]["amount"]
    assert found["least"][0]["text"] == f"weights <= {least} B"
    assert solved(server, budgets=[f"weights <= {least} B"])["cost"]["weights"] == least
    assert not solved(server, budgets=[f"weights <= {least - 1} B"])["found"]
    pinned = solved(server, budgets=[f"weights <= {least} B"], pins={"lm_head": "int8-g64"})
    assert "'lm_head'" in pinned["error"]["because"]
    both = solved(server, budgets=["weights <= 2 bits", "bops <= 1 %"])
    assert not both["found"]
    assert len(both["least"]) == 2


@pytest.mark.parametrize(
    ("ask", "code"),
    [
        ({"pins": {"nope": "int8-g64"}}, "E120"),
        ({"pins": {"lm_head": "int9-g64"}}, "E213"),
        ({"budgets": ["x"]}, "E111"),
        ({"budgets": ["tpot <= 3 ms"]}, "E420"),
        ({"against": [0]}, "E907"),
        ({"against": [-1]}, "E907"),
        ({"mark": "zz"}, "E907"),
        ({"bars": {"lm_head": list(FORMATS)}}, "E213"),
        ({"study": "nope"}, "E141"),
        ({"study": "page", "path": "/etc"}, "E907"),
    ],
)
def test_wishes_that_make_no_sense_are_refused(server: Served, ask: dict[str, Any], code: str) -> None:
    answer = server.ask("POST", "/api/v1/resolve", {"study": "page", **ask}, token="read")
    assert answer.code == code, answer.body
    assert answer.status < 500


def test_solving_again_stores_nothing_and_its_plan_can_be_saved(server: Served, tmp_path: Path) -> None:
    from mpsearch.plan import BitPlan

    before = len(server.store.links("page", "plan"))
    found = solved(server, budgets=["weights <= 2.71 bits"], whole=True)
    plan = BitPlan.from_json(found["plan"])
    plan.save(tmp_path / "plan.json")
    assert BitPlan.load(tmp_path / "plan.json").loss == found["loss"]
    assert len(server.store.links("page", "plan")) == before
    assert server.ask("GET", f"/api/v1/plans/{plan.key}").status == 404


def test_a_post_that_only_asks_is_still_guarded(server: Served) -> None:
    body = {"study": "page"}
    for headers in (
        {"Origin": "http://evil.example"},
        {"Sec_Fetch_Site": "cross-site"},
        {"Content_Type": "text/plain"},
    ):
        assert server.ask("POST", "/api/v1/resolve", body, token="read", **headers).status in (403, 415)
    assert server.ask("POST", "/api/v1/resolve", body, token=None).status == 401
    assert server.ask("POST", "/api/v1/solve", body, token="read").status == 403


def test_two_budgets_of_a_large_model_are_solved_at_once() -> None:
    view = pretended(40, 600, 8, seed=1)
    warm = Warm.of_view(view)
    tables = {table.resource: table for table in warm.costs}
    timed = next(name for name in tables if name.startswith("tpot"))
    texts = []
    for name, scale, unit in (("weights", 1.0, "B"), (timed, 1e3, "ms")):
        table = tables[name]
        low, high = (float(f(table.value, axis=1).sum()) + table.fixed for f in (np.nanmin, np.nanmax))
        resource, _, condition = name.partition(" ")
        texts.append(
            f"{resource} <= {math.ceil(scale * (low + 0.4 * (high - low)) * 1e6) / 1e6:.6f} {unit} {condition}"
        )
    texts[0] = texts[0].replace(".000000", "")
    wish = Wish(pins={view.layers[3].name: view.scores.formats[0] if view.scores else ""})
    quick, patient = resolve(warm, texts, wish), resolve(warm, texts, wish, patient=True)
    for found in (quick, patient):
        assert found["found"]
        for limit in found["budgets"]:
            assert found["cost"][limit["resource"]] <= limit["limit"]
    # How near the quick answer comes depends on the machine's other work; both bounds are proven.
    assert patient["gap"] <= 0.01
    assert quick["gap"] < 0.1
    assert quick["bound"] <= patient["loss"] <= quick["loss"]


def view_command(path: Path, *more: str) -> subprocess.Popen[str]:
    return subprocess.Popen(
        [sys.executable, "-m", "mpsearch.cli.main", "view", str(path), "--no-browser", *more],
        stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True,
    )  # fmt: skip


def test_a_database_that_nobody_may_write_can_be_looked_at(tmp_path: Path) -> None:
    import http.client

    folder = tmp_path / "kept"
    folder.mkdir()
    with sqlite(folder) as store:
        add_study(store, "page")
    file = folder / "served.db"
    before = file.read_bytes()
    file.chmod(stat.S_IRUSR)
    with view_command(file, "--study", "page") as process:
        assert process.stdout is not None
        first = process.stdout.readline()
        link = first.split()[1]
        assert link.endswith("#study=page")
        port = int(link.split(":")[2].split("/")[0])
        client = http.client.HTTPConnection("127.0.0.1", port, timeout=10)
        client.request("GET", link.split(str(port))[1].partition("#")[0])
        answer = client.getresponse()
        cookie = (answer.getheader("set-cookie") or "").partition(";")[0]
        assert answer.status == 303
        answer.read()
        client.request("GET", "/api/v1/view?study=page", headers={"Cookie": cookie})
        found = client.getresponse()
        assert found.status == 200
        found.read()
        client.request("GET", "/", headers={"Cookie": cookie})
        assert f'data-place="{file}"' in client.getresponse().read().decode(), "it is the owner's own"
        client.close()
        process.terminate()
        process.wait(10)
    assert file.read_bytes() == before


@pytest.mark.parametrize(
    ("make", "code"),
    [
        (lambda path: None, "E101"),
        (lambda path: path.write_bytes(b""), "E605"),
        (lambda path: path.write_bytes(b"junk" * 100), "E603"),
        (lambda path: newer(path), "E605"),
    ],
    ids=["missing", "empty", "broken", "newer"],
)
def test_a_database_that_cannot_be_read_is_refused_with_a_reason(tmp_path: Path, make: Any, code: str) -> None:
    path = tmp_path / "results.db"
    make(path)
    before = path.read_bytes() if path.exists() else None
    done = subprocess.run(
        [sys.executable, "-m", "mpsearch.cli.main", "view", str(path), "--no-browser"],
        capture_output=True, text=True, timeout=60, check=False,
    )  # fmt: skip
    assert done.returncode in (3, 6)
    assert f"error[{code}" in done.stderr
    assert "Traceback" not in done.stderr
    assert (path.read_bytes() if path.exists() else None) == before


def newer(path: Path) -> None:
    with sqlite(path.parent):
        pass
    os.replace(path.parent / "served.db", path)
    with sqlite3.connect(path) as connection:
        connection.execute(f"UPDATE {VERSION_TABLE} SET version_num = '9999'")
    connection.close()
