"""A database with studies that nobody had to compute, and a real server before it."""

from __future__ import annotations

import http.client
import json
import socket
import threading
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np

from mpsearch import registry
from mpsearch.errors import Notice
from mpsearch.format import parse_formats
from mpsearch.front import Measurement
from mpsearch.layer import Excluded, Layer, Layers
from mpsearch.planning import Planner
from mpsearch.spec import StudySpec
from mpsearch.stored_study import StoredStudy
from mpsearch.tables import SensitivityTable
from mpsearch.tasks import Survey
from mpsearch.web.server.app import make_app
from mpsearch.web.server.running import listen, make_server
from mpsearch.web.server.tokens import Tokens

FORMATS = ("int2-g64", "int3-g64", "int4-g64", "int8-g64")
IDENTITY = {"model": "ab" * 32, "calibration": "cd" * 32, "validation": "ef" * 32}
#: What a token for reading must not be told.
FOLDER = "/srv/secret folder/tiny-model"
HOME = "build-host-7"
HOSTILE = (
    "<script>alert(1)</script>", "../../etc/passwd", "a/b?c#d&e=f%2e%2e", "'; DROP TABLE study; --", "{{7*7}}",
    "名前 🙂", "=cmd|' /C calc'!A0", "\\\\host\\share", "..", "%00%0a", "a\u0301\u0300", '"quoted"',
)  # fmt: skip


def add_study(
    store: Any, name: str, *, rows: int = 12, seed: int = 0, budgets: tuple[str, ...] = (),
    names_of: tuple[str, ...] = (), uniform: bool = False,
) -> StoredStudy:  # fmt: skip
    """Add a study with scores, costs, plans and measurements, all made up; `names_of` names the last layers."""
    called = [f"blocks.{i}.fc" for i in range(rows)]
    called[rows - len(names_of) :] = names_of
    items = [
        Layer(text, "linear", (64, 64 * (1 + i % 3)), dtype="bfloat16", macs=4096) for i, text in enumerate(called)
    ]
    layers = Layers(tuple(items), (Excluded("norm.weight", (64,), "bfloat16", "a vector"),))
    spec = StudySpec.of_values(
        name=name, model=FOLDER, calibration="/srv/secret folder/text.txt", formats=FORMATS,
        budgets=budgets or ("weights <= 4 bits",),
    )  # fmt: skip
    store.create_study(name, spec.question())
    survey = Survey(layers, 4, "Toy", (Notice("N415", "1 vector stays as it is"),))
    store.put("survey", f"survey-{seed}-{rows}", survey.to_json())
    store.link(name, "survey", f"survey-{seed}-{rows}")
    noise = np.random.default_rng(seed)
    value = (
        noise.uniform(0.5, 2.0, (rows, 1)) * np.array([[0.4, 0.1, 0.02, 0.001]]) * noise.uniform(0.8, 1.2, (rows, 4))
    )
    names = tuple(row.name for row in layers.decisions)
    scores = SensitivityTable(names, FORMATS, value, value / 10, "nats/token", source={"scope": f"scope-{seed}-{rows}"})
    store.put("scores", f"scope-{seed}-{rows}", scores.to_json())
    store.link(name, "scores", f"scope-{seed}-{rows}")
    study = StoredStudy(spec, store, IDENTITY)
    model = {"name": "tiny-model", "digest": IDENTITY["model"], "architecture": "Toy"}
    planner = Planner(spec, layers, model, study.budgets)
    for position, table in enumerate(planner.costs):
        store.put("cost", table.key, table.to_json())
        store.link(name, "cost", table.key, table.resource, position)
    plans = [
        (budget, planner.mixed(scores, parse(budget)))
        for budget in ("weights <= 4 bits", "weights <= 3 bits", "weights <= 6 bits")
    ]
    if uniform:
        for j, fmt in enumerate(FORMATS):
            plan = planner.from_choice([j] * rows, {"uniform": fmt})
            plans.append((f"uniform {fmt}", planner.predict(scores, plan)))
    for position, (budget, plan) in enumerate(plans):
        store.put("plan", plan.key, plan.to_json())
        store.link(name, "plan", plan.key, "mixed" if not position else budget, position)
        loss = (plan.loss or 0.0) * 1.1
        found = Measurement(
            plan.assignment, budget, loss, loss / 20, "nats/token", plan.cost, machine="a processor, x86_64 Linux",
            data={"key": "text"}, seconds=1.5, samples=(loss, loss),
        )  # fmt: skip
        store.put("measurement", f"{plan.assignment}-{seed}", found.to_json())
        store.link(name, "measurement", f"{plan.assignment}-{seed}", "mixed" if not position else budget, position)
    return study


def parse(text: str) -> Any:
    from mpsearch.budget import parse_budgets

    return parse_budgets((text,))


def fill(store: Any) -> None:
    """Two studies with results, some with hostile names and a log."""
    add_study(store, "toy")
    add_study(store, "large", rows=60, seed=1)
    question = StudySpec.of_values(name="x", model=FOLDER, calibration="c", budgets=("weights <= 4 bits",)).question()
    for name in HOSTILE:
        store.create_study(name, {**question, "name": name})
    store.control.submit("toy", HOME)
    store.control.log("toy", "state", f"submitted by {HOME} from '/home/ann b/study.toml' to postgresql://ann:pw@db/x")
    store.control.log("toy", "note", "<b>bold</b> \u2028 line")


@dataclass
class Reply:
    """An answer, read to its end."""

    status: int
    headers: Mapping[str, str]
    body: bytes

    @property
    def json(self) -> Any:
        return json.loads(self.body)

    @property
    def code(self) -> str:
        return str(self.json["error"]["code"])


@dataclass
class Served:
    """A server that runs in a thread."""

    port: int
    tokens: Tokens
    store: Any
    guard: Any

    @property
    def url(self) -> str:
        return f"http://127.0.0.1:{self.port}"

    def ask(self, method: str, path: str, body: Any = None, *, token: str | None = "full", **headers: str) -> Reply:
        """Send one request; ``token`` is full, read, a text of its own, or None; headers with _ for -."""
        sent = {name.replace("_", "-"): value for name, value in headers.items()}
        known = {"full": self.tokens.full, "read": self.tokens.read}
        if token is not None:
            sent.setdefault("Authorization", f"Bearer {known.get(token, token)}")
        data = body if isinstance(body, (bytes, type(None))) else json.dumps(body).encode()
        if data is not None:
            sent.setdefault("Content-Type", "application/json")
        link = http.client.HTTPConnection("127.0.0.1", self.port, timeout=30)
        try:
            link.request(method, path, body=data, headers=sent)
            answer = link.getresponse()
            return Reply(answer.status, {k.lower(): v for k, v in answer.getheaders()}, answer.read())
        finally:
            link.close()

    def raw(self, head: bytes, *, seconds: float = 10.0) -> Reply:
        """Send bytes as they are, and read one answer; the head names Host and token itself."""
        with socket.create_connection(("127.0.0.1", self.port), timeout=seconds) as link:
            link.sendall(head)
            answer = http.client.HTTPResponse(link)
            try:
                answer.begin()
                return Reply(answer.status, {k.lower(): v for k, v in answer.getheaders()}, answer.read())
            except http.client.HTTPException:
                return Reply(0, {}, b"")
            except (ConnectionError, TimeoutError):
                return Reply(0, {}, b"")


@contextmanager
def served(store: Any, **settings: Any) -> Iterator[Served]:
    """Serve a store from a thread on a free port."""
    tokens, wrap = settings.pop("tokens", None) or Tokens(), settings.pop("wrap", None)
    with listen("127.0.0.1", settings.pop("port", 0)) as door:
        port = int(door.getsockname()[1])
        guard = make_app(store, tokens, port, **settings)
        server = make_server(wrap(guard) if wrap else guard)
        thread = threading.Thread(target=server.run, kwargs={"sockets": [door]}, daemon=True)
        thread.start()
        while not server.started:
            thread.join(0.01)
            assert thread.is_alive()
        try:
            yield Served(port, tokens, store, guard)
        finally:
            server.should_exit = True
            thread.join(20)
            assert not thread.is_alive()


def sqlite(folder: Path) -> Any:
    return registry.make("stores", "sql", url=str(folder / "served.db"), busy_timeout=20.0)


__all__ = [
    "FOLDER",
    "FORMATS",
    "HOME",
    "HOSTILE",
    "Reply",
    "Served",
    "add_study",
    "fill",
    "parse_formats",
    "served",
    "sqlite",
]
