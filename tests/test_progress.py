"""Progress that can be read, times left that can be believed, and logs that stay small and keep no secrets."""

from __future__ import annotations

import heapq
import io
import itertools
import math
import random
import re
import statistics
import sys
import time
from typing import Any

import pytest

from mpsearch.cli.progress import Progress
from mpsearch.logs import hidden, plain, without_password
from mpsearch.pace import Detail, Pace, span


def study(seed: int) -> list[float]:
    """Ends of the steps of a study: every layer of a model in every format, by some workers, with trouble."""
    rng = random.Random(seed)
    hidden_size = rng.choice((256, 512, 1024, 2048))
    inner, vocabulary = int(hidden_size * rng.uniform(2, 4)), hidden_size * rng.choice((4, 16, 32))
    narrow = hidden_size // rng.choice((1, 2, 4, 8))
    block = [hidden_size, narrow, narrow, hidden_size, inner, inner, inner]
    sizes = [vocabulary] * rng.randrange(2) + block * rng.randrange(6, 33) + [vocabulary] * rng.randrange(2)
    fixed = rng.random() * statistics.mean(sizes)
    steps = [(size + fixed) * rng.uniform(0.6, 1.4) for size in sizes for _ in range(rng.randrange(3, 9))]
    slower, since = (rng.uniform(0.7, 1.5) if rng.random() < 0.4 else 1.0), rng.random() * len(steps)
    free = [rng.uniform(2, 10) * 1e3 for _ in range(rng.choice((1, 2, 4, 8)))]
    heapq.heapify(free)
    ends = []
    for number, step in enumerate(steps):
        took = step * rng.lognormvariate(0, 0.3) * (slower if number > since else 1.0)
        # A worker that dies, and its step done again.
        took += step * rng.uniform(2, 20) if rng.random() < 0.005 else 0.0
        ends.append(heapq.heappop(free) + took)
        heapq.heappush(free, ends[-1])
    return sorted(ends)


def off(ends: list[float], share: float) -> float:
    """How far the time left is from what it will be, as a share of it, after a share of the steps."""
    pace, now = Pace(), 0.0
    pace.at(0.0, 0)
    for number, now in enumerate(ends, start=1):
        pace.at(now, number)
        if number >= share * len(ends):
            break
    return abs(pace.left(now, len(ends)) / (ends[-1] - now) - 1)


def test_the_time_left_is_within_a_fifth_after_a_fifth_of_the_work() -> None:
    errors = [off(study(seed), 0.2) for seed in range(20)]
    assert statistics.median(errors) < 0.2
    assert statistics.median(off(study(seed), 0.5) for seed in range(20)) < 0.12


def test_steady_steps_are_timed_exactly() -> None:
    pace = Pace()
    for second in range(2000):
        pace.at(float(second), second)
    assert pace.left(1999.0, 4000) == pytest.approx(2001, rel=0.01)
    assert pace.rate == pytest.approx(1.0)


def test_what_a_worker_loads_before_its_first_step_is_not_counted() -> None:
    pace = Pace()
    pace.at(0.0, 0)
    for step in range(1, 11):
        pace.at(100.0 + step, step)
    assert pace.left(110.0, 20) == pytest.approx(10.0)


def test_nothing_is_said_before_anything_is_known() -> None:
    pace = Pace()
    assert math.isnan(pace.left(0.0, 10))
    pace.at(0.0, 5)
    pace.at(1.0, 6)
    assert math.isnan(pace.left(2.0, 10))
    assert span(pace.left(2.0, 10)) == ""


def test_an_overdue_step_does_not_make_the_time_left_negative() -> None:
    pace = Pace()
    for second in range(10):
        pace.at(float(second), second)
    assert 0 <= pace.left(60.0, 10) <= 1
    assert pace.left(60.0, 20) == pytest.approx(10, abs=1)


class Terminal(io.StringIO):
    def isatty(self) -> bool:
        return True


def run_through(
    monkeypatch: pytest.MonkeyPatch, stream: io.StringIO, seconds: float, steps: int = 1000, **details: Any
) -> list[str]:
    """Report the phases of a study of so many seconds; return the lines."""
    monkeypatch.setattr(sys, "stderr", stream)
    now = [0.0]
    progress = Progress(clock=lambda: now[0])
    for phase, count in (("profile", 12), ("score", steps), ("measure", 14), ("search", 20)):
        for done in range(count + 1):
            progress(phase, done, count, Detail(**details) if details else None)
            now[0] += seconds / (steps + 46)
    progress.end()
    return stream.getvalue().splitlines()


@pytest.mark.parametrize("seconds", [5.0, 600.0, 3600.0, 36_000.0])
def test_a_long_study_is_short_to_read(seconds: float, monkeypatch: pytest.MonkeyPatch) -> None:
    lines = run_through(monkeypatch, io.StringIO(), seconds)
    assert len(lines) <= 60 + seconds / 600
    assert any(line.startswith("score   1000/1000  100%") for line in lines)
    if seconds <= 3600:
        assert len(lines) <= 60


def test_not_on_a_terminal_lines_are_ten_seconds_apart(monkeypatch: pytest.MonkeyPatch) -> None:
    stream = io.StringIO()
    monkeypatch.setattr(sys, "stderr", stream)
    now, times = 0.0, []
    progress = Progress(clock=lambda: now)
    for done in range(101):
        before = stream.tell()
        progress("score", done, 100)
        times += [now] if stream.tell() > before else []
        now += 1.0
    assert len(times) > 5
    assert all(later - earlier >= 10 for earlier, later in itertools.pairwise(times[:-1]))


def test_the_line_says_who_works_how_fast_and_what_went_wrong(monkeypatch: pytest.MonkeyPatch) -> None:
    stream = io.StringIO()
    monkeypatch.setattr(sys, "stderr", stream)
    now = 0.0
    progress = Progress(clock=lambda: now)
    doing = "layers.17.mlp.down_proj\x1b[31m int3-g64"
    for done in range(413):
        progress("measure", done, 1000, Detail(2, retried=2, gaps=3, doing=doing))
        now += 1 / 3.1
    last = stream.getvalue().splitlines()[-1]
    assert re.fullmatch(r"measure \d+/1000  \d+%  2 workers  3\.1/s  left 3m\d\ds  retried 2  gaps 3  layers.*", last)
    assert last.endswith("  retried 2  gaps 3  layers.17.mlp.down_proj?[31m int3-g64")


def test_shares_of_work_are_better_than_counts_where_steps_differ(monkeypatch: pytest.MonkeyPatch) -> None:
    stream = Terminal()
    monkeypatch.setattr(sys, "stderr", stream)
    now = 0.0
    progress = Progress(clock=lambda: now)
    sizes = [1.0] * 50 + [9.0] * 50
    for done in range(51):
        progress("score", done, 100, Detail(share=sum(sizes[:done]) / sum(sizes)))
        now += 1.0
    assert stream.getvalue().rstrip().endswith("left 7m30s")


def test_on_a_terminal_one_line_is_written_over(monkeypatch: pytest.MonkeyPatch) -> None:
    stream = Terminal()
    run_through(monkeypatch, stream, 600.0, doing="x" * 500)
    lines = stream.getvalue().split("\n")
    assert len(lines) == 5
    assert all(part.startswith("\x1b[K") and len(part) < 130 for line in lines[:4] for part in line.split("\r")[1:])


def test_what_was_known_is_called_so(monkeypatch: pytest.MonkeyPatch) -> None:
    stream = io.StringIO()
    monkeypatch.setattr(sys, "stderr", stream)
    Progress()("score", 7, 7)
    assert stream.getvalue() == "score   7/7  100%  known\n"


def test_quiet_says_nothing(monkeypatch: pytest.MonkeyPatch) -> None:
    stream = Terminal()
    monkeypatch.setattr(sys, "stderr", stream)
    Progress(quiet=True)("score", 1, 1)
    assert stream.getvalue() == ""


# --- what texts must not hold


@pytest.mark.parametrize(
    "text",
    [
        "postgresql://ann:CANARY@db.lan/mp",
        "postgresql+psycopg://ann:p/CANARY@db.lan:5432/mp?sslmode=require",
        "could not connect: password=CANARY host=db",
        "PGPASSWORD=CANARY mpsearch run",
        "{'token': 'CANARY', 'x': 1}",
        "Authorization: Bearer CANARY12345",
        "HF_TOKEN=CANARY",
        "api_key: CANARY",
        "hf_CANARYCANARYCANARYCANARY",
    ],
)
def test_secrets_are_hidden(text: str) -> None:
    assert "CANARY" not in hidden(text)
    assert "***" in hidden(text)


@pytest.mark.parametrize("text", ["://" + ":" + "/" * 70_000, "://a:" * 20_000, "a-" * 40_000, "token" * 20_000])
def test_a_text_made_to_be_slow_is_not(text: str) -> None:
    start = time.perf_counter()
    hidden(text)
    without_password(text)
    assert time.perf_counter() - start < 2


def test_what_is_no_secret_is_kept() -> None:
    text = "tokens=4096 of sqlite:///results.db, 12:30, user@host, 3 passwords"
    assert hidden(text) == text


def test_control_characters_are_taken_out() -> None:
    content = plain("a\x1b]0;title\x07\nb \u202eevil\r \x9b31m")
    assert content.isprintable()
    assert plain(content) == content


@pytest.mark.parametrize(
    ("address", "left"),
    [
        ("postgresql://ann:secret@db.lan/mp", "postgresql://ann@db.lan/mp"),
        ("postgresql+psycopg://ann:s/e:c@db.lan:5432/mp", "postgresql+psycopg://ann@db.lan:5432/mp"),
        ("postgresql://db.lan/mp?user=ann&password=x&a=b", "postgresql://db.lan/mp?user=ann&a=b"),
        ("postgresql://db.lan/mp?PASSWORD=x", "postgresql://db.lan/mp"),
        ("postgresql://:secret@db.lan/mp", "postgresql://@db.lan/mp"),
        ("postgresql://ann@db.lan:5432/mp", "postgresql://ann@db.lan:5432/mp"),
        ("sqlite:///a b.db", "sqlite:///a b.db"),
        ("odd?password=x.db", "odd?password=x.db"),
    ],
)
def test_an_address_without_its_password_is_one(address: str, left: str) -> None:
    assert without_password(address) == left
