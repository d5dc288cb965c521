"""Requests of every kind at the HTTP interface: by its own OpenAPI document, and for speed.

    python -m benchmarks.http_load --requests 5000
    python -m benchmarks.http_load --requests 5000 --storage postgresql://user@host/database

Schemathesis makes requests of the document, right and wrong ones, and checks every answer with all of its checks: no
error of the server, no status, header or body that the document does not promise, nothing wrong taken, nothing let in
without the token. Two of its rules are set here. A request that fits the document may still be refused with 422, for
a document cannot say what a budget is; and 409, 413, 415 and 429 are answers of this interface too.
"""

from __future__ import annotations

import argparse
import contextlib
import io
import json
import random
import re
import statistics
import subprocess
import sys
import tempfile
import time
from collections import Counter
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from mpsearch import registry
from mpsearch.cli.main import run
from tests.http_server import Served, add_study, fill, served

_CONFIG = """\
[checks.positive_data_acceptance]
expected-statuses = ["2xx", 401, 403, 404, 409, 413, 422, 429]

[checks.negative_data_rejection]
expected-statuses = [400, 401, 403, 404, 405, 409, 413, 415, 421, 422]

[checks.missing_required_header]
expected-statuses = [401, 403, 404, 415, 422]
"""


@dataclass
class Counted:
    """Counts the answers of an application, and how long they take."""

    app: Any
    statuses: Counter[int] = field(default_factory=Counter)
    seconds: list[float] = field(default_factory=list)

    async def __call__(self, scope: Any, receive: Any, send: Any) -> None:
        started = time.perf_counter()

        async def note(message: Any) -> None:
            if message["type"] == "http.response.start":
                self.statuses[message["status"]] += 1
            await send(message)

        await self.app(scope, receive, note)
        self.seconds.append(time.perf_counter() - started)


@dataclass
class Found:
    """What schemathesis said: its exit code, its words, and what was counted."""

    code: int
    text: str
    counted: Counted

    @property
    def total(self) -> int:
        return sum(self.counted.statuses.values())

    @property
    def failures(self) -> int:
        return sum(count for status, count in self.counted.statuses.items() if status in (500, 503, 504))


def by_document(server: Served, counted: Counted, examples: int, phases: str, seed: int = 1) -> Found:
    """Let schemathesis ask, so many examples for each operation; with an even seed always for one study."""
    with tempfile.TemporaryDirectory() as place:
        config = _CONFIG if seed % 2 else f'[parameters]\nstudy = "tiny-llama"\n\n{_CONFIG}'
        Path(place, "schemathesis.toml").write_text(config)
        command = [
            Path(sys.executable).with_name("schemathesis"), "--config-file", "schemathesis.toml", "run",
            f"{server.url}/api/v1/openapi.json", "-H", f"Authorization: Bearer {server.tokens.full}",
            "--phases", phases, "--checks", "all", "--max-examples", str(examples), "--seed", str(seed), "--no-color",
            "--request-timeout", "20", "--suppress-health-check", "all", "--continue-on-failure",
        ]  # fmt: skip
        done = subprocess.run(command, cwd=place, capture_output=True, text=True, check=False)
    return Found(done.returncode, done.stdout + done.stderr, counted)


@contextlib.contextmanager
def counted_server(storage: str) -> Any:
    """A server of a filled database, which counts."""
    with registry.make("stores", "sql", url=storage, busy_timeout=20.0) as store:
        fill(store)
        add_study(store, "tiny-llama", seed=3)
        # A stream of a study that goes on would never end.
        for name in ("toy", "large", "tiny-llama"):
            store.set_state(name, "complete")
        counters: list[Counted] = []

        def count(app: Any) -> Counted:
            counters.append(Counted(app))
            return counters[0]

        with served(store, wrap=count) as server:
            yield server, counters[0]


def compare_plans(server: Served, count: int) -> int:
    """Solve for random budgets here and on the command line; fails at a difference, returns how many had a plan."""
    draw = random.Random(7)
    storage = repr(server.store).partition("'")[2].rpartition("'")[0]
    compared = 0
    for _ in range(count):
        study, budgets, goal = draw.choice(("toy", "large")), [f"weights <= {draw.uniform(2.0, 8.3):.4f} bits"], {}
        if draw.random() < 0.3:
            budgets.append(f"bops <= {draw.uniform(15, 55):.2f} %")
        if draw.random() < 0.2:
            budgets, goal = [], {"goal": "weights", "most_loss": draw.uniform(0.05, 5.0)}
        arguments = ["solve", study, "--storage", storage, "--json"]
        arguments += [part for budget in budgets for part in ("--budget", budget)]
        arguments += [f"--goal={goal['goal']}", f"--most-loss={goal['most_loss']!r}"] if goal else []
        answer = server.ask("POST", "/api/v1/solve", {"study": study, "budgets": budgets, **goal})
        out, err = io.StringIO(), io.StringIO()
        with contextlib.redirect_stdout(out), contextlib.redirect_stderr(err):
            code = run(arguments)
        if answer.status != 200:
            assert (answer.status, code) == (409, 4), (answer.body, err.getvalue())
            assert f"error[{answer.code}] {answer.json['error']['message']}" in err.getvalue()
            continue
        compared += 1
        plan = json.loads(out.getvalue())
        assert answer.json["plan"] == plan
        assert answer.json["key"] == plan["digest"]
        assert answer.json["prices"] == plan["source"].get("prices", [])
        assert all(answer.json[name] == plan["predicted"][name] for name in ("bound", "gap", "loss"))
        assert server.ask("GET", f"/api/v1/plans/{plan['digest']}").json == plan
    return compared


def speed(server: Served, count: int) -> None:
    """Print how long single requests take, each over a connection of its own."""
    for path in ("/health", "/api/v1/studies", "/api/v1/scores?study=large&whole=true", "/api/v1/front?study=large"):
        taken = []
        for _ in range(count):
            started = time.perf_counter()
            assert server.ask("GET", path).status == 200
            taken.append(1000 * (time.perf_counter() - started))
        taken.sort()
        print(f"{path:<44} p50 {statistics.median(taken):7.1f} ms   p95 {taken[int(0.95 * count)]:7.1f} ms")


def main() -> int:
    parser = argparse.ArgumentParser()
    parser.add_argument("--requests", type=int, default=5000, help="at least so many requests by the document")
    parser.add_argument("--storage", default="", help="an empty database; an SQLite file in a temporary folder without")
    parser.add_argument("--plans", type=int, default=200, help="plans compared with those of the command line")
    parser.add_argument("--seconds", type=float, default=600.0, help="when to stop asking")
    asked = parser.parse_args()
    with (
        tempfile.TemporaryDirectory() as place,
        counted_server(asked.storage or str(Path(place) / "load.db")) as (server, counted),
    ):
        speed(server, 100)
        if asked.plans and not asked.storage:
            print(f"plans equal to the command line's: {compare_plans(server, asked.plans)} of {asked.plans} asked")
        counted.statuses.clear()
        counted.seconds.clear()
        started, worst, seed = time.monotonic(), 0, 1
        while sum(counted.statuses.values()) < asked.requests and time.monotonic() - started < asked.seconds:
            examples = min(200, max(20, asked.requests // 60))
            found = by_document(server, counted, examples, "examples,coverage,fuzzing,stateful", seed)
            worst, seed = max(worst, found.code), seed + 1
            if found.code:
                print(found.text[-6000:])
        counted.seconds.sort()
        total = sum(counted.statuses.values())
        late = 1000 * counted.seconds[int(0.99 * len(counted.seconds))]
        took = time.monotonic() - started
        print(
            f"by the document: {total} requests, {took:.0f} s, p99 {late:.0f} ms, statuses "
            f"{dict(sorted(counted.statuses.items()))}"
        )
        print(f"schemathesis: exit code {worst}; answers of 5xx: {found.failures}")
        print(re.sub(r"\s+", " ", found.text[-400:]))
    return worst or found.failures


if __name__ == "__main__":
    sys.exit(main())
