"""What the server answers: the numbers of the command line, names as text, events, and a client that reads alike."""

from __future__ import annotations

import io
import json
import os
import re
import signal
import socket
import subprocess
import sys
import threading
import time
import zipfile
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest

import mpsearch as mp
from benchmarks.http_load import compare_plans
from mpsearch.cli.main import run
from mpsearch.records import EventRow, StudyStatus
from mpsearch.stored_study import StoredStudy
from mpsearch.web.server.acting import Jobs
from mpsearch.web.server.events import MOST_STREAMS, Streams
from mpsearch.web.server.submitting import Registered
from tests.http_server import FOLDER, FORMATS, HOSTILE, Served, add_study, fill, served, sqlite


@pytest.fixture(scope="module")
def server(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Served]:
    folder = tmp_path_factory.mktemp("served")
    (folder / "model").mkdir()
    (folder / "text.txt").write_text("some text")
    known = Registered.of([f"tiny={folder / 'model'}"], [f"text={folder / 'text.txt'}"])
    with sqlite(folder) as store:
        fill(store)
        with served(store, known=known, streams=Streams(store, seconds=0.05)) as found:
            yield found


@pytest.fixture
def remote(server: Served) -> Any:
    return mp.connect(server.url, server.tokens.full or "").study("toy")


@pytest.fixture
def local(server: Served) -> StoredStudy:
    from mpsearch.web.server.reading import open_study

    return open_study(server.store, "toy")


def test_plans_equal_those_of_the_command_line(server: Served) -> None:
    assert compare_plans(server, 15) > 9


def test_a_study_of_the_client_reads_as_the_stored_one(remote: Any, local: StoredStudy) -> None:
    assert remote.name == local.name
    assert remote.spec.question() == local.spec.question()
    assert remote.budgets == local.budgets
    assert remote.survey == local.survey
    assert remote.scores.to_json() == local.scores.to_json()
    assert remote.scored
    assert [table.to_json() for table in remote.costs] == [table.to_json() for table in local.costs]
    assert remote.plans == local.plans
    assert remote.measurements == local.measurements
    assert remote.front == local.front
    assert len(remote.front) == 3
    assert remote.plan("weights <= 3.5 bits") == local.plan("weights <= 3.5 bits")
    assert [str(notice) for notice in remote.notices] == ["note[N415] 1 vector stays as it is"]


def test_pages_add_up_and_hold_at_most_a_thousand_rows(server: Served, local: StoredStudy) -> None:
    rows: list[Any] = []
    offset: int | None = 0
    while offset is not None:
        page = server.ask("GET", f"/api/v1/scores?study=toy&offset={offset}&limit=5").json
        rows += page["items"]
        offset = page["next"]
    table = local.scores.to_json()
    assert [row["layer"] for row in rows] == table["layers"]
    assert [row["value"] for row in rows] == table["value"]
    assert page["formats"] == list(FORMATS)
    assert server.ask("GET", "/api/v1/studies?limit=1001").status == 422
    assert server.ask("GET", "/api/v1/studies?offset=999").json["items"] == []
    everyone = mp.connect(server.url, server.tokens.read).studies()
    assert {study.name for study in everyone} >= {"toy", "large", *HOSTILE}


@pytest.mark.parametrize("name", HOSTILE)
def test_a_hostile_name_is_only_a_name(server: Served, name: str) -> None:
    study = mp.connect(server.url, server.tokens.read).study(name)
    assert study.status.name == name
    assert study.spec.name == name
    with pytest.raises(mp.InputError, match="has no scores"):
        study.scores  # noqa: B018
    listed = server.ask("GET", "/api/v1/studies?limit=1000")
    assert listed.body.isascii()
    assert name in {row["name"] for row in listed.json["items"]}
    assert listed.headers["content-type"] == "application/json"


def test_errors_come_back_as_their_own_kind(server: Served, remote: Any) -> None:
    door = mp.connect(server.url, server.tokens.full or "")
    for code, kind, ask in (
        ("E141", mp.StorageError, lambda: door.study("tiy")),
        ("E111", mp.InputError, lambda: remote.plan("weights <= nan bits")),
        ("E201", mp.InfeasibleError, lambda: remote.plan("weights <= 0.1 bits")),
        ("E212", mp.InputError, lambda: remote.plan(goal="no such goal")),
        ("E143", mp.InputError, lambda: door.study(HOSTILE[0]).plan()),
        ("E107", mp.InputError, lambda: remote.export("native")),
        ("E301", mp.InputError, lambda: remote.export("mlx")),
        ("E907", mp.InputError, lambda: door.study("")),
        ("E902", mp.UnsafeError, lambda: mp.connect(server.url, server.tokens.read).study("toy").plan()),
        ("E901", mp.UnsafeError, lambda: mp.connect(server.url, "wrong")),
        ("E912", mp.ResourceError, lambda: mp.connect("http://127.0.0.1:1", "x")),
        ("E107", mp.InputError, lambda: mp.connect("ftp://127.0.0.1", "x")),
        ("E901", mp.InputError, lambda: mp.connect(server.url, Path("/nowhere"))),
        ("E901", mp.InputError, lambda: mp.connect(server.url, "a\r\nX: y")),
    ):
        with pytest.raises(kind) as caught:
            ask()
        assert caught.value.code == code, caught.value
        assert (server.tokens.full or "") not in str(caught.value)


def test_the_client_reads_the_token_from_where_it_stands(
    server: Served, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    from mpsearch.web.server.tokens import token_file, write_tokens

    monkeypatch.delenv("MPSEARCH_TOKEN", raising=False)
    monkeypatch.setenv("XDG_STATE_HOME", str(tmp_path))
    with pytest.raises(mp.InputError, match="no token is known"):
        mp.connect(server.url)
    write_tokens(token_file(server.port), server.url, server.tokens)
    assert mp.connect(server.url).studies()
    assert mp.connect(server.url, token_file(server.port)).studies()
    (tmp_path / "token").write_text(f"{server.tokens.read}\n")
    assert mp.connect(server.url, tmp_path / "token").studies()
    monkeypatch.setenv("MPSEARCH_TOKEN", "wrong")
    with pytest.raises(mp.UnsafeError):
        mp.connect(server.url)


def test_an_export_is_files_as_text_or_an_archive_of_the_same(server: Served, remote: Any, tmp_path: Path) -> None:
    plan = remote.plan("weights <= 3.5 bits")
    path = f"/api/v1/plans/{plan.key}/export"
    files = server.ask("POST", path, {"to": "gptqmodel"}).json["files"]
    assert remote.export("gptqmodel", "weights <= 3.5 bits") == files
    packed = server.ask("POST", path, {"to": "gptqmodel", "archive": True})
    assert packed.headers["content-type"] == "application/zip"
    assert re.fullmatch(r'attachment; filename="export-[0-9a-f]{12}\.zip"', packed.headers["content-disposition"])
    with zipfile.ZipFile(io.BytesIO(packed.body)) as members:
        assert {name: members.read(name).decode() for name in members.namelist()} == files
    assert server.ask("POST", path, {"to": "gptqmodel", "archive": True}).body == packed.body
    plan.save(tmp_path / "plan.json")
    assert run(["export", str(tmp_path / "plan.json"), "--to", "gptqmodel", "--out", str(tmp_path / "out")]) == 0
    theirs = {each.name: each.read_text() for each in (tmp_path / "out").iterdir()}
    assert theirs.keys() == files.keys()
    # A stored plan has its keys in another order, and the manifest a digest of it.
    assert json.loads(theirs.pop("plan.json")) == json.loads(files.pop("plan.json"))
    del theirs["mpsearch-export.json"], files["mpsearch-export.json"]
    assert theirs == files
    known = server.ask("GET", "/api/v1/names").json["exporters"]
    assert "gptqmodel" in known
    from mpsearch import registry

    reads = {name for name in registry.names("exporters") if getattr(registry.load("exporters", name), "reads", "")}
    assert set(known) == set(registry.names("exporters")) - reads
    assert server.ask("POST", f"/api/v1/plans/{'0' * 64}/export", {"to": "gptqmodel"}).status == 404


@pytest.mark.parametrize("text", ["{", "{}", '{"token": 5}', "", '{"token": "a b"}', "{" * 100_000])
def test_a_broken_token_file_is_said_plainly(text: str, tmp_path: Path) -> None:
    (tmp_path / "tokens.json").write_text(text)
    with pytest.raises(mp.InputError) as caught:
        mp.connect("http://127.0.0.1:1", tmp_path / "tokens.json")
    assert caught.value.code == "E901"


def test_a_study_is_submitted_by_reference_and_steered(server: Served) -> None:
    door = mp.connect(server.url, server.tokens.full or "")
    assert door.names()["models"] == ["tiny"]
    assert door.names()["data"] == ["stdlib:calibration", "stdlib:validation", "text"]
    asked: dict[str, Any] = {"model": "tiny", "calibration": "text", "validation": "stdlib:validation", "points": 2}
    study = door.submit("by reference", budgets="weights <= 4 bits", formats=["int4-g64"], **asked)
    assert study.status.state == "submitted"
    spec = study.spec
    assert (Path(spec.model).name, Path(spec.calibration).name, spec.points) == ("model", "text.txt", 2)
    assert spec.trust_remote_code is False
    assert "by reference" in server.store.control.waiting()
    assert door.submit("by reference", budgets="weights <= 4 bits", formats=["int4-g64"], **asked).name == study.name
    with pytest.raises(mp.StorageError) as caught:
        door.submit("by reference", budgets="weights <= 5 bits", **asked)
    assert caught.value.code == "E140"
    assert study.pause().state == "paused"
    assert "by reference" not in server.store.control.waiting()
    assert study.resume().state == "submitted"
    server.store.set_state("by reference", "failed")
    assert study.resume().state == "submitted"
    assert "by reference" in server.store.control.waiting()
    server.store.set_state("by reference", "failed")
    # A question that had no answer takes no name: it can be put right.
    right = door.submit("by reference", budgets="weights <= 5 bits", formats=["int4-g64"], **asked)
    assert str(right.budgets[0]).startswith("weights <= 5")
    assert study.cancel().state == "cancelled"
    for wrong in (
        {"model": "other"}, {"calibration": str(Path(spec.calibration))}, {"estimator": "none"}, {"solver": "none"},
        {"formats": ["int99"]}, {"target": "nobody"}, {"seed": 2**63}, {"seed": True}, {"points": 2.5},
        {"storage": "x"}, {"engine": "roofline"}, {"pins": {"a": "int1-g64"}}, {"solver_settings": {"x": "/etc"}},
        {"cautious": -1.0},
    ):  # fmt: skip
        with pytest.raises(mp.InputError):
            door.submit("refused", budgets="weights <= 4 bits", **{**asked, **wrong})
    assert "refused" not in {each.name for each in door.studies()}


def test_events_tell_what_happens_and_go_on_after_the_last_line(server: Served) -> None:
    control = server.store.control
    add_study(server.store, "followed", rows=2, seed=5)
    study = mp.connect(server.url, server.tokens.read).study("followed")
    seen: list[StudyStatus | EventRow] = []
    follower = threading.Thread(target=lambda: seen.extend(study.watch()))
    follower.start()
    epoch = control.drive("followed", "somebody", 30.0)
    for step in range(3):
        control.beat("followed", "somebody", epoch, 30.0, "score", step, 3)
        control.log("followed", "note", f"step {step}\nevent: end\n\ndata: {{}}")
        time.sleep(0.15)
    control.leave("followed", "somebody", epoch, "complete")
    follower.join(10)
    assert not follower.is_alive()
    lines = [item for item in seen if isinstance(item, EventRow)]
    assert [line.text.partition(" ")[2][0] for line in lines if line.text.startswith("step")] == ["0", "1", "2"]
    assert lines == study.lines()
    states = [item for item in seen if isinstance(item, StudyStatus)]
    assert states[-1].state == "complete"
    assert ("score", 3) in {(item.phase, item.total) for item in states}
    assert all(not item.driver and not item.home for item in states)
    middle = lines[1].id
    again = [item for item in study.watch(after=middle) if isinstance(item, EventRow)]
    assert again == [line for line in lines if line.id > middle]
    raw = server.ask("GET", "/api/v1/events?study=followed", Last_Event_ID=str(middle))
    assert raw.headers["content-type"].startswith("text/event-stream")
    kinds = re.findall(r"^event: (.*)$", raw.body.decode(), re.MULTILINE)
    assert kinds == ["status", *["log"] * len(again), "end"]


def test_streams_are_counted_and_given_back(server: Served) -> None:
    head = (
        f"GET /api/v1/events?study=large HTTP/1.1\r\nHost: 127.0.0.1:{server.port}\r\n"
        f"Authorization: Bearer {server.tokens.read}\r\n\r\n"
    )
    links = [socket.create_connection(("127.0.0.1", server.port), timeout=10) for _ in range(MOST_STREAMS)]
    try:
        for link in links:
            link.sendall(head.encode())
        for link in links:
            assert link.recv(20).startswith(b"HTTP/1.1 200")
        refused = server.ask("GET", "/api/v1/events?study=large")
        assert (refused.status, refused.code) == (429, "E909")
        assert server.ask("GET", "/health", token=None).status == 200
    finally:
        for link in links:
            link.close()
    server.store.set_state("large", "complete")
    until = time.monotonic() + 10
    while server.ask("GET", "/api/v1/events?study=large").status != 200:
        assert time.monotonic() < until
        time.sleep(0.1)


def test_solvers_wait_for_a_core_and_are_refused_when_none_gets_free(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("mpsearch.web.server.acting._PATIENCE", 0.2)
    gate, running, most = threading.Event(), [0], [0]
    solve = StoredStudy.plan

    def slow(self: StoredStudy, *budgets: str, **rest: Any) -> Any:
        running[0] += 1
        most[0] = max(most[0], running[0])
        gate.wait(10)
        running[0] -= 1
        return solve(self, *budgets, **rest)

    monkeypatch.setattr(StoredStudy, "plan", slow)
    with sqlite(tmp_path) as store:
        add_study(store, "toy", rows=2)
        with served(store, jobs=Jobs(2)) as found:
            answers: list[Any] = []
            asks = [
                threading.Thread(target=lambda: answers.append(found.ask("POST", "/api/v1/solve", {"study": "toy"})))
                for _ in range(5)
            ]
            for ask in asks:
                ask.start()
            until = time.monotonic() + 10
            while len(answers) < 3 and time.monotonic() < until:
                time.sleep(0.02)
            assert [answer.status for answer in answers] == [429] * 3
            assert found.ask("GET", "/api/v1/scores?study=toy").status == 200
            gate.set()
            for ask in asks:
                ask.join(10)
    assert sorted(answer.status for answer in answers) == [200, 200, 429, 429, 429]
    assert most[0] == 2


def test_the_command_serves_prints_its_links_and_ends_on_a_signal(tmp_path: Path) -> None:
    with sqlite(tmp_path) as store:
        fill(store)
    command = [
        sys.executable,
        "-m",
        "mpsearch.cli.main",
        "serve",
        "--storage",
        str(tmp_path / "served.db"),
        "--port",
        "0",
    ]
    place = {**os.environ, "XDG_STATE_HOME": str(tmp_path)}
    with subprocess.Popen(command, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True, env=place) as process:
        try:
            assert process.stdout is not None
            lines = [process.stdout.readline() for _ in range(3)]
            found = re.search(r"(http://127\.0\.0\.1:(\d+))/\?token=(\S+)  \(good once\)", lines[0])
            assert found, lines
            file = tmp_path / "mpsearch" / f"serve-{found[2]}.json"
            assert file.stat().st_mode & 0o777 == 0o600
            assert str(file) in lines[2]
            tokens = json.loads(file.read_text())
            assert found[3] not in (tokens["token"], tokens["read_token"])
            assert len(mp.connect(found[1], file).studies()) == 2 + len(HOSTILE)
        finally:
            process.send_signal(signal.SIGTERM)
            out, err = process.communicate(timeout=20)
    assert (process.returncode, err) == (0, "")
    assert out.endswith("ended\n")
    assert not file.exists()


def test_a_port_that_is_taken_and_names_that_are_none_are_told(
    server: Served, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    with sqlite(tmp_path):
        pass
    storage = str(tmp_path / "served.db")
    for code, exit_code, options in (
        ("E911", 7, ["--port", str(server.port)]),
        ("E115", 2, ["--model", "no-name"]),
        ("E101", 3, ["--model", "a=/nowhere"]),
        ("E101", 3, ["--data", f"a={tmp_path}"]),
        ("E101", 3, ["--storage", str(tmp_path / "none.db")]),
    ):
        assert run(["serve", "--storage", storage, *options]) == exit_code
        assert f"error[{code}]" in capsys.readouterr().err


def test_a_server_for_others_warns_and_serves_only_names_that_are_given(
    tmp_path: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    with sqlite(tmp_path):
        pass
    apps: list[Any] = []
    monkeypatch.setattr("mpsearch.cli.serve.run_until_stopped", lambda server, door: apps.append(server.config.app))
    monkeypatch.setenv("XDG_STATE_HOME", str(tmp_path))
    options = ["--storage", str(tmp_path / "served.db"), "--port", "0"]
    assert run(["serve", *options]) == 0
    assert capsys.readouterr().err == ""
    assert run(["serve", *options, "--host", "0.0.0.0", "--allow-host", "Box.lan"]) == 0
    printed = capsys.readouterr()
    assert "warning[W901] 0.0.0.0 is reached from other machines" in printed.err
    assert "http://127.0.0.1:" in printed.out
    names = {host.rpartition(":")[0] for host in apps[1].hosts}
    assert names == {"127.0.0.1", "localhost", "[::1]", "box.lan"}
    assert apps[1].tokens.full


def test_a_server_that_is_only_read_has_no_other_token(tmp_path: Path) -> None:
    from mpsearch.web.server.tokens import Tokens

    with sqlite(tmp_path) as store:
        add_study(store, "toy", rows=2)
    from mpsearch import registry

    with (
        registry.make("stores", "sql", url=str(tmp_path / "served.db"), create=False, read_only=True) as store,
        served(store, tokens=Tokens(read_only=True)) as found,
    ):
        assert found.ask("GET", "/api/v1/front?study=toy", token="read").status == 200
        assert found.ask("POST", "/api/v1/solve", {"study": "toy"}, token="read").status == 403
        assert found.ask("GET", "/api/v1/front?study=toy", token="").status == 401
        assert FOLDER.encode() not in found.ask("GET", "/api/v1/study?study=toy", token="read").body


def test_a_follower_outlives_its_server(tmp_path: Path) -> None:
    from mpsearch.web.server.tokens import Tokens

    tokens = Tokens()
    with sqlite(tmp_path) as store:
        add_study(store, "toy", rows=2)
        store.control.log("toy", "note", "first")
        with served(store, tokens=tokens) as found:
            port = found.port
            study = mp.connect(found.url, tokens.read).study("toy")
            watch = study.watch()
            assert isinstance(next(watch), StudyStatus)
            assert getattr(next(watch), "text", "") == "first"
        store.control.log("toy", "note", "second")
        store.set_state("toy", "complete")
        with served(store, tokens=tokens, port=port):
            rest = list(watch)
    assert [item.text for item in rest if isinstance(item, EventRow)] == ["second"]
    assert isinstance(rest[0], StudyStatus)
    assert rest[0].state == "complete"
    with pytest.raises(mp.ResourceError, match="does not answer"):
        list(study.watch(tries=1))
