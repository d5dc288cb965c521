"""Who gets in: tokens on every route, attack requests of which none passes, limits, and slow clients."""

from __future__ import annotations

import contextlib
import re
import socket
import threading
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest

from mpsearch.web.server.app import route_table
from mpsearch.web.server.guard import ASKING
from mpsearch.web.server.running import HEAD_SECONDS, Patient
from mpsearch.web.server.tokens import COOKIE_SECONDS, Tokens, write_tokens
from tests.http_server import FOLDER, HOME, Served, fill, served, sqlite

KEY = "0" * 64
#: Every route, and a request that it answers. A new one fails the test below until it stands here.
ROUTES: dict[tuple[str, str], tuple[str, Any]] = {
    ("GET", "/"): ("/", None),
    ("GET", "/health"): ("/health", None),
    ("GET", "/api/v1/openapi.json"): ("/api/v1/openapi.json", None),
    ("GET", "/api/v1/studies"): ("/api/v1/studies?limit=1000", None),
    ("GET", "/api/v1/study"): ("/api/v1/study?study=toy", None),
    ("GET", "/api/v1/layers"): ("/api/v1/layers?study=toy", None),
    ("GET", "/api/v1/scores"): ("/api/v1/scores?study=toy", None),
    ("GET", "/api/v1/costs"): ("/api/v1/costs?study=toy", None),
    ("GET", "/api/v1/plans"): ("/api/v1/plans?study=toy&whole=true", None),
    ("GET", "/api/v1/plans/{key}"): ("/api/v1/plans/KEY", None),
    ("GET", "/api/v1/front"): ("/api/v1/front?study=toy", None),
    ("GET", "/api/v1/measurements"): ("/api/v1/measurements?study=toy", None),
    ("GET", "/api/v1/conflicts"): ("/api/v1/conflicts", None),
    ("GET", "/api/v1/log"): ("/api/v1/log?study=toy", None),
    ("GET", "/api/v1/names"): ("/api/v1/names", None),
    ("GET", "/api/v1/events"): ("/api/v1/events?study=over", None),
    ("GET", "/api/v1/view"): ("/api/v1/view?study=toy", None),
    ("GET", "/api/v1/view/choices"): ("/api/v1/view/choices?study=toy&count=2", None),
    ("GET", "/api/v1/view/keys"): ("/api/v1/view/keys?study=toy", None),
    ("GET", "/api/v1/why"): ("/api/v1/why?study=toy&layer=blocks.0.fc", None),
    ("GET", "/api/v1/compare"): ("/api/v1/compare?study=toy&a=0&b=1", None),
    ("GET", "/assets/{name}"): ("/assets/page.js", None),
    ("POST", "/api/v1/resolve"): ("/api/v1/resolve", {"study": "toy"}),
    ("POST", "/api/v1/solve"): ("/api/v1/solve", {"study": "toy"}),
    ("POST", "/api/v1/plans/{key}/export"): ("/api/v1/plans/KEY/export", {"to": "gptqmodel"}),
    ("POST", "/api/v1/studies"): (
        "/api/v1/studies",
        {"name": "new", "model": "tiny", "calibration": "stdlib:calibration", "budgets": ["weights <= 4 bits"]},
    ),
    ("POST", "/api/v1/study/pause"): ("/api/v1/study/pause", {"study": "toy"}),
    ("POST", "/api/v1/study/resume"): ("/api/v1/study/resume", {"study": "toy"}),
    ("POST", "/api/v1/study/cancel"): ("/api/v1/study/cancel", {"study": "toy"}),
}


@pytest.fixture(scope="module")
def server(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Served]:
    from mpsearch.web.server.submitting import Registered

    folder = tmp_path_factory.mktemp("served")
    (folder / "model").mkdir()
    with sqlite(folder) as store:
        fill(store)
        store.create_study("over", dict(store.study("toy").spec) | {"name": "over"})
        store.set_state("over", "complete")
        with served(store, known=Registered.of([f"tiny={folder / 'model'}"], [])) as found:
            yield found


def filled(server: Served, route: tuple[str, str]) -> tuple[str, Any]:
    path, body = ROUTES[route]
    return path.replace("KEY", server.store.links("toy", "plan")[0].key), body


def test_the_table_holds_every_route(server: Served) -> None:
    found = {(method, path) for path, methods in route_table(server.guard.app) for method in methods}
    assert found == set(ROUTES)


@pytest.mark.parametrize("route", ROUTES, ids=" ".join)
def test_every_route_wants_the_right_token(server: Served, route: tuple[str, str]) -> None:
    method, (path, body) = route[0], filled(server, route)
    earlier = Tokens()
    if path == "/health":
        assert server.ask(method, path, token=None).json == {"status": "ok"}
        return
    assert earlier.full is not None
    assert server.tokens.link is not None
    wrong = [None, "", "wrong", earlier.full, earlier.read, server.tokens.link, f"{server.tokens.full}x", "é"]
    for token in wrong:
        refused = server.ask(method, path, body, token=token)
        assert (refused.status, refused.code) == (401, "E901"), token
    cookie = server.ask(method, path, body, token=None, Cookie=f"mpsearch_{server.port}={server.tokens.full}")
    assert cookie.status == 401
    in_query = f"{path}{'&' if '?' in path else '?'}access_token={server.tokens.full}"
    assert server.ask(method, in_query, body, token=None).status == 401
    reader = server.ask(method, path, body, token="read")
    assert reader.status == (403 if method == "POST" and path not in ASKING else 200), reader.body
    assert b"Traceback" not in reader.body
    for secret in (FOLDER, "secret folder", HOME, socket.gethostname(), "served.db", "ann b", "@db"):
        assert secret.encode() not in reader.body, secret
    answer = server.ask(method, path, body)
    assert answer.status == 200, answer.body
    assert answer.headers["content-security-policy"].startswith("default-src 'none'; script-src 'self'")
    assert answer.headers["x-content-type-options"] == "nosniff"
    fixed = path.startswith("/assets/")
    assert answer.headers["cache-control"] == ("private, no-cache" if fixed else "no-store")
    assert not any(name.startswith("access-control") for name in answer.headers)
    assert b"ann:pw" not in answer.body


def test_nothing_that_only_reads_changes_a_study_and_every_change_is_a_post(server: Served) -> None:
    assert {method for method, _ in ROUTES} == {"GET", "POST"}
    for method, path in ROUTES:
        other = "POST" if method == "GET" else "GET"
        if (other, path) not in ROUTES:
            refused = server.ask(other, filled(server, (method, path))[0], {} if other == "POST" else None)
            assert (refused.status, refused.headers["allow"]) == (405, method)


def attacks() -> list[tuple[str, str, str, dict[str, str], bytes | None, set[int]]]:
    """(what, method, target, headers, body, statuses that are a refusal); HOST and PORT are filled in."""
    found: list[tuple[str, str, str, dict[str, str], bytes | None, set[int]]] = []
    hosts = (
        "evil.example", "evil.example:PORT", "127.0.0.1", "localhost", "127.0.0.1:1", "localhost.evil.example:PORT",
        "127.0.0.1.evil.example:PORT", "127.0.0.1:PORT@evil.example", "127.0.0.1:PORT, evil.example", "0.0.0.0:PORT",
        "[::1]:1", "127.1:PORT", "2130706433:PORT", "localhost:PORT.", "null",
    )  # fmt: skip
    found += [(f"host {x}", "GET", "/api/v1/studies", {"Host": x}, None, {421}) for x in hosts]
    origins = (
        "null", "http://evil.example", "https://127.0.0.1.evil.example", "http://localhost.evil.example:PORT",
        "http://127.0.0.1", "http://127.0.0.1:1", "file://", "http://127.0.0.1:PORT.evil.example", "chrome-extension://x",
        "http://evil.example:PORT",
    )  # fmt: skip
    solve = b'{"study": "toy"}'
    for x in origins:
        found.append((f"origin {x}", "POST", "/api/v1/solve", {"Origin": x}, solve, {403}))
    for x in ("http://evil.example", "null"):
        found.append((f"stream {x}", "GET", "/api/v1/events?study=over", {"Origin": x}, None, {403}))
    for x in ("cross-site", "same-site", "bogus"):
        found.append((f"site {x}", "POST", "/api/v1/solve", {"Sec-Fetch-Site": x}, solve, {403}))
        found.append((f"site {x}", "GET", "/api/v1/studies", {"Sec-Fetch-Site": x}, None, {403}))
    for x in ("text/plain", "application/x-www-form-urlencoded", "multipart/form-data", "", "application/json-x",
              "application/json; charset=utf-16", "text/json"):  # fmt: skip
        found.append((f"type {x}", "POST", "/api/v1/solve", {"Content-Type": x}, solve, {415}))
    gzip = {"Content-Type": "application/json", "Content-Encoding": "gzip"}
    found.append(("compressed", "POST", "/api/v1/solve", gzip, solve, {415}))
    paths = (
        "..", "../..", "%2e%2e", "%2e%2e/", "%252e%252e", "..%2f", "..%5c", "..\\", "....//", "%c0%ae%c0%ae", "%2e",
        "/proc/self/environ", "%2fproc%2fself", "file:/etc/passwd", "file:%2f%2f%2fetc", "C:%5c", "C:\\", "%00",
        "plans%00", "plans;x=1", "plans/..;/studies", "plans/%2e%2e/studies", "plans/" + KEY + "/../../studies",
        "plans/" + KEY[:-1] + "%00", "plans/" + KEY + ".json", "plans/%EF%BC%8E%EF%BC%8E", "%uFF0e%uFF0e",
        "plans/" + KEY.upper() + "x", "studies/", "studies//", "//studies", "STUDIES", "stud%69es", "study/",
        "./studies", "studies/.", "studies%20", "studies%3F", "studies%23x", "export/../studies", "link-to-etc",
        "static/app.js", "docs", "redoc", "openapi.yaml", ".git/config", ".env", "admin",
    )  # fmt: skip
    found += [(f"path {x}", "GET", f"/api/v1/{x}", {}, None, {400, 404, 422}) for x in paths]
    for x in ("//api/v1/studies", "http://evil.example/api/v1/studies", "/api/v2/studies", "/%61pi/v1/studies", "*"):
        found.append((f"target {x}", "GET", x, {}, None, {400, 404}))
    found += [
        ("flood of heads", "GET", "/api/v1/studies", {f"X-{i}": "x" * 1000 for i in range(100)}, None, {0, 400, 413}),
        ("long address", "GET", "/api/v1/studies?study=" + "x" * 60_000, {}, None, {0, 400, 413}),
        ("many parameters", "GET", "/api/v1/studies?" + "&".join(f"a{i}=1" for i in range(500)), {}, None, {422}),
        ("a parameter twice", "GET", "/api/v1/study?study=toy&study=large", {}, None, {422}),
        ("an unknown parameter", "GET", "/api/v1/study?study=toy&path=/etc", {}, None, {422}),
        ("not UTF-8", "GET", "/api/v1/study?study=%ff%fe", {}, None, {422}),
        ("a NUL", "GET", "/api/v1/study?study=a%00b", {}, None, {422}),
        ("a page too long", "GET", "/api/v1/studies?limit=1001", {}, None, {422}),
        ("nan", "GET", "/api/v1/studies?limit=nan", {}, None, {422}),
        ("a path for a model", "POST", "/api/v1/studies",
         {}, b'{"name":"x","model":"/etc","calibration":"stdlib:calibration","budgets":["weights <= 4 bits"]}', {422}),
        ("a path for data", "POST", "/api/v1/studies",
         {}, b'{"name":"x","model":"tiny","calibration":"/etc/passwd","budgets":["weights <= 4 bits"]}', {422}),
        ("remote code", "POST", "/api/v1/studies", {}, b'{"name":"x","model":"tiny","calibration":"stdlib:calibration",'
         b'"budgets":["weights <= 4 bits"],"trust_remote_code":true}', {422}),
        ("an engine's library", "POST", "/api/v1/studies", {}, b'{"name":"x","model":"tiny","calibration":'
         b'"stdlib:calibration","budgets":["weights <= 4 bits"],"engine":"llama.cpp:library=/tmp/x.so"}', {422}),
        ("a path in a setting", "POST", "/api/v1/studies", {}, b'{"name":"x","model":"tiny","calibration":'
         b'"stdlib:calibration","budgets":["weights <= 4 bits"],"estimator_settings":{"spill":"/tmp"}}', {422}),
        ("code by name", "POST", "/api/v1/studies", {}, b'{"name":"x","model":"tiny","calibration":'
         b'"stdlib:calibration","budgets":["weights <= 4 bits"],"estimator":"os:system"}', {422}),
        ("a folder to write to", "POST", f"/api/v1/plans/{KEY}/export", {}, b'{"to":"mlx","folder":"/tmp"}', {422}),
        ("an exporter that reads", "POST", "/api/v1/plans/KEY/export", {}, b'{"to":"native"}', {422}),
        ("deep", "POST", "/api/v1/solve", {}, b'{"study":' + b"[" * 100_000, {422}),
        ("a key twice", "POST", "/api/v1/solve", {}, b'{"study":"toy","study":"large"}', {422}),
        ("NaN", "POST", "/api/v1/solve", {}, b'{"study":"toy","most_loss":NaN}', {422}),
        ("a huge number", "POST", "/api/v1/solve", {}, b'{"study":"toy","most_loss":1' + b"0" * 6000 + b"}", {422}),
        ("infinity", "POST", "/api/v1/solve", {}, b'{"study":"toy","most_loss":1e999}', {422}),
        ("half a character", "POST", "/api/v1/solve", {}, b'{"study":"\\ud800"}', {422}),
        ("not text", "POST", "/api/v1/solve", {}, b"\xff\xfe", {422}),
        ("no body", "POST", "/api/v1/solve", {}, b"", {422}),
        ("upgrade", "GET", "/api/v1/events", {"Connection": "upgrade", "Upgrade": "websocket"}, None, {422}),
        ("preflight", "OPTIONS", "/api/v1/solve", {"Origin": "http://evil.example"}, None, {403}),
        ("trace", "TRACE", "/api/v1/studies", {}, None, {405}),
        ("a method of their own", "FOO", "/api/v1/studies", {}, None, {405}),
        ("a bad event id", "GET", "/api/v1/events?study=over", {"Last-Event-ID": "1; DROP"}, None, {422}),
        ("two lengths", "POST", "/api/v1/solve",
         {"Content-Length": "5", "Transfer-Encoding": "chunked"}, solve + b"\r\n", {0, 400}),
    ]  # fmt: skip
    return found


ATTACKS = attacks()


def test_there_are_enough_attacks() -> None:
    assert len(ATTACKS) >= 80


@pytest.mark.parametrize("attack", ATTACKS, ids=[f"{i} {what[0]}"[:60] for i, what in enumerate(ATTACKS)])
def test_no_attack_passes(server: Served, attack: Any) -> None:
    _, method, target, headers, body, refusals = attack
    port = str(server.port)
    key = server.store.links("toy", "plan")[0].key
    sent = {"Host": f"127.0.0.1:{port}", "Authorization": f"Bearer {server.tokens.full}"}
    if body is not None:
        sent |= {"Content-Type": "application/json", "Content-Length": str(len(body))}
    sent |= {name: value.replace("PORT", port) for name, value in headers.items()}
    target = target.replace("KEY", key)
    head = "".join(f"{name}: {value}\r\n" for name, value in sent.items())
    before = len(server.store.studies())
    answer = server.raw(f"{method} {target} HTTP/1.1\r\n{head}\r\n".encode() + (body or b""))
    assert answer.status in refusals, (answer.status, answer.body[:300])
    assert b"Traceback" not in answer.body
    assert b"root:" not in answer.body
    assert len(server.store.studies()) == before
    if answer.status not in (0, 400):
        assert re.fullmatch(r"E\d{3}", answer.code)
        assert not any(name.startswith("access-control") for name in answer.headers)


def test_a_head_without_a_host_or_with_two_is_refused(server: Served) -> None:
    ours = f"Host: 127.0.0.1:{server.port}\r\n"
    for head in ("", ours + "Host: evil.example\r\n", ours * 2):
        for version in ("1.0", "1.1"):
            text = f"GET /health HTTP/{version}\r\n{head}\r\n"
            assert server.raw(text.encode()).status in (400, 421)


def test_a_link_gives_a_cookie_once_and_the_cookie_ages() -> None:
    now = [0.0]
    tokens = Tokens(clock=lambda: now[0])
    assert tokens.link is not None
    cookie = tokens.exchange(tokens.link)
    assert cookie is not None
    assert tokens.exchange(tokens.link) is None
    assert tokens.exchange(tokens.full or "") is None
    assert tokens.session_rights(cookie) == "full"
    now[0] = COOKIE_SECONDS + 1
    assert tokens.session_rights(cookie) is None
    assert tokens.session_rights("") is None
    assert len({Tokens().full, Tokens().full, tokens.read, tokens.link}) == 4
    reader = Tokens(read_only=True)
    assert (reader.full, reader.link, reader.rights(""), reader.exchange("")) == (None, None, None, None)


def test_a_browser_comes_in_by_the_link_and_stays_by_its_cookie(server: Served) -> None:
    found = server.ask("GET", f"/?token={server.tokens.read}", token=None)
    assert (found.status, found.headers["location"]) == (303, "/")
    set_cookie = found.headers["set-cookie"]
    for part in ("HttpOnly", "SameSite=strict", "Path=/"):
        assert part in set_cookie
    cookie = set_cookie.partition(";")[0]
    assert server.ask("GET", "/", token=None, Cookie=cookie).status == 200
    assert server.ask("GET", "/api/v1/studies", token=None, Cookie=f"other=1; {cookie}").status == 200
    assert server.ask("GET", f"/?token={server.tokens.full}", token=None).status == 401
    assert server.ask("GET", "/?token=wrong", token=None).status == 401
    link = server.ask("GET", f"/?token={server.tokens.link}", token=None)
    full = link.headers["set-cookie"].partition(";")[0]
    assert server.ask("GET", f"/?token={server.tokens.link}", token=None).status == 401
    # A cookie comes along by itself, so the browser must say who asks.
    solve = {"study": "toy"}
    assert server.ask("POST", "/api/v1/solve", solve, token=None, Cookie=full).status == 403
    ours = {"Cookie": full, "Origin": server.url}
    assert server.ask("POST", "/api/v1/solve", solve, token=None, **ours).status == 200
    site = {"Cookie": full, "Sec_Fetch_Site": "same-origin"}
    assert server.ask("POST", "/api/v1/solve", solve, token=None, **site).status == 200
    assert server.ask("POST", "/api/v1/solve", solve, token=None, Cookie=cookie, Origin=server.url).status == 403


def test_the_token_file_is_for_its_owner_alone(tmp_path: Path) -> None:
    tokens = Tokens()
    file = tmp_path / "state" / "serve-1.json"
    for _ in range(2):
        write_tokens(file, "http://127.0.0.1:1", tokens)
        assert file.stat().st_mode & 0o777 == 0o600
        assert file.parent.stat().st_mode & 0o777 == 0o700
        assert [path.name for path in file.parent.iterdir()] == [file.name]


@pytest.mark.parametrize("chunked", [False, True])
def test_a_body_that_is_too_large_is_refused_at_once(server: Served, chunked: bool) -> None:
    size = 11 * 2**20
    how = "Transfer-Encoding: chunked" if chunked else f"Content-Length: {size}"
    head = (
        f"POST /api/v1/solve HTTP/1.1\r\nHost: 127.0.0.1:{server.port}\r\nContent-Type: application/json\r\n"
        f"Authorization: Bearer {server.tokens.full}\r\n{how}\r\n\r\n"
    )
    part = b" " * 2**16
    body = [b"%x\r\n%b\r\n" % (len(part), part) if chunked else part] * (size // len(part))
    started = time.monotonic()
    with socket.create_connection(("127.0.0.1", server.port), timeout=10) as link:
        link.sendall(head.encode())
        with contextlib.suppress(OSError):
            for each in body:
                link.sendall(each)
        answer = b""
        while b"E906" not in answer and (part := link.recv(65536)):
            answer += part
    assert answer.startswith(b"HTTP/1.1 413 ")
    assert b"E906" in answer
    assert time.monotonic() - started < 1.0


def test_a_hundred_slow_clients_delay_nobody(server: Served) -> None:
    head = f"POST /api/v1/solve HTTP/1.1\r\nHost: 127.0.0.1:{server.port}\r\nContent-Type: application/json\r\n"
    body = f"Authorization: Bearer {server.tokens.full}\r\nContent-Length: 1000\r\n\r\n{{"
    links = []
    try:
        for i in range(100):
            link = socket.create_connection(("127.0.0.1", server.port), timeout=10)
            links.append(link)
            # Some are slow with their head, some with their body.
            link.sendall(head.encode() if i % 2 else (head + body).encode())
        for _ in range(5):
            started = time.monotonic()
            assert server.ask("GET", "/health", token=None).status == 200
            assert server.ask("GET", "/api/v1/scores?study=toy").status == 200
            assert time.monotonic() - started < 1.0
    finally:
        for link in links:
            link.close()


def test_who_never_ends_a_head_is_hung_up_on(server: Served, monkeypatch: pytest.MonkeyPatch) -> None:
    assert Patient.__module__ == "mpsearch.web.server.running"
    assert HEAD_SECONDS <= 30
    monkeypatch.setattr("mpsearch.web.server.running.HEAD_SECONDS", 0.4)
    with socket.create_connection(("127.0.0.1", server.port), timeout=10) as link:
        link.sendall(b"GET /health HTTP/1.1\r\nHost: ")
        with contextlib.suppress(ConnectionResetError):
            assert link.recv(100) == b""


def test_a_request_that_takes_too_long_is_answered_and_the_next_is_served(tmp_path: Path) -> None:
    class Slow:
        """A store whose list of studies waits."""

        def __init__(self, store: Any) -> None:
            self._store = store
            self.go = threading.Event()

        def __getattr__(self, name: str) -> Any:
            return getattr(self._store, name)

        def studies(self) -> Any:
            self.go.wait(10)
            return self._store.studies()

    with sqlite(tmp_path) as store:
        fill(store)
        slow = Slow(store)
        with served(slow, seconds=0.3) as found:
            started = time.monotonic()
            late = found.ask("GET", "/api/v1/studies")
            assert (late.status, late.code) == (504, "E910")
            assert time.monotonic() - started < 2
            assert found.ask("GET", "/api/v1/study?study=toy").status == 200
            slow.go.set()
            assert found.ask("GET", "/api/v1/studies").status == 200


def test_a_browser_without_a_cookie_is_told_how_to_get_a_link(server: Served) -> None:
    wanted = {"Accept": "text/html,application/xhtml+xml,*/*;q=0.8"}
    for path, token in (("/", None), ("/", "wrong"), ("/?token=wrong", None)):
        found = server.ask("GET", path, token=token, **wanted)
        assert (found.status, found.headers["content-type"]) == (401, "text/html; charset=utf-8")
        text = found.body.decode()
        assert "mpsearch serve" in text
        assert "mpsearch view" in text
        assert "<script" not in text
        assert found.headers["content-security-policy"].startswith("default-src 'none'")
        assert "served.db" not in text
    # Programs, and every other address, get the error block.
    assert server.ask("GET", "/", token=None).code == "E901"
    assert server.ask("GET", "/api/v1/studies", token=None, **wanted).code == "E901"
    assert server.ask("GET", "/", **wanted).status == 200
