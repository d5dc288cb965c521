"""Searches as Optuna studies in the database of the results: what the dashboard shows, and that it harms nothing."""

from __future__ import annotations

import json
import random
import socket
import subprocess
import sys
import time
import urllib.request
from pathlib import Path
from typing import Any

import optuna
import pytest

from benchmarks.optuna_storage import FORMATS, command, compared, kept, kill, measured, problem
from mpsearch import registry
from mpsearch.errors import InputError
from mpsearch.optuna_trials import database_url
from mpsearch.searching import drive
from mpsearch.solvers._optuna_study import OptunaStudy
from mpsearch.solvers.optuna_search import Optuna
from mpsearch.trials import Seen, Trial


@pytest.fixture
def results(tmp_path: Path) -> Path:
    """A database of results that holds one study."""
    path = tmp_path / "results.db"
    store = registry.make("stores", "sql", url=str(path))
    store.create_study("small", {"model": "m"})
    store.close()
    return path


@pytest.fixture(autouse=True)
def quiet() -> None:
    optuna.logging.set_verbosity(optuna.logging.ERROR)


def names_of(path: Path) -> list[str]:
    store = registry.make("stores", "sql", url=str(path), create=False)
    try:
        return [row.name for row in store.studies()]
    finally:
        store.close()


def test_a_search_is_told_trial_by_trial_with_parameters_and_losses(results: Path) -> None:
    url, given = database_url(str(results)), problem()
    searcher = Optuna(evaluations=16, startup=6)
    told = searcher.study(url, "small optuna", ["bytes <= 12"])
    seen = drive(given, searcher, lambda trials: measured(given, trials), 16, told.tell)
    told.close()
    trials = kept(url, "small optuna")
    assert [trial.value for trial in trials] == [item.loss for item in seen]
    assert [trial.user_attrs["plan"].split() for trial in trials] == [
        [FORMATS[column] for column in item.trial.choice] for item in seen
    ]
    assert all(trial.params for trial in trials)
    # Both programs still take the file for theirs.
    assert names_of(results) == ["small"]


def test_what_is_asked_does_not_depend_on_what_is_kept(results: Path) -> None:
    given, searcher = problem(), Optuna(evaluations=16, startup=6)
    told = searcher.study(database_url(str(results)), "small optuna")
    with_tables = drive(given, searcher, lambda trials: measured(given, trials), 16, told.tell)
    told.close()
    assert with_tables == drive(given, searcher, lambda trials: measured(given, trials), 16)


def test_what_is_told_again_is_there_once(results: Path) -> None:
    url, given = database_url(str(results)), problem()
    trials = [Trial((0,) * 6), Trial((1,) * 6), Trial((1,) * 6, 2), Trial((0, 1) * 3)]
    seen = [*measured(given, trials[:3]), Seen(trials[3], float("inf"))]
    for count in (1, 3, 4, 4):
        told = OptunaStudy(url, "small refine")
        assert told.tell(given, seen[:count])
        assert told.tell(given, seen[:count])
        told.close()
    states = [trial.state.name for trial in kept(url, "small refine")]
    assert states == ["COMPLETE", "COMPLETE", "PRUNED", "FAIL"]


@pytest.mark.parametrize("broken", ["no database", "locked", "other tables"])
def test_a_database_that_cannot_be_written_is_no_reason_to_stop(
    broken: str, results: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    import sqlite3

    import mpsearch.solvers._optuna_study as module

    monkeypatch.setattr(module, "_WAITS", (0.01,))
    monkeypatch.setattr(module, "_BUSY", 0.05)
    given = problem()
    url = database_url(str(results))
    other = sqlite3.connect(results, isolation_level=None)
    if broken == "no database":
        (tmp_path / "text.db").write_text("a text " * 500)
        url = database_url(str(tmp_path / "text.db"))
    elif broken == "locked":
        other.execute("BEGIN IMMEDIATE")
    else:
        other.execute("CREATE TABLE studies (another INTEGER)")
    told = OptunaStudy(url, "small refine")
    seen = measured(given, [Trial((0,) * 6)])
    assert not told.tell(given, seen)
    assert told.failure
    if broken == "locked":
        # Once the way is free, all that is missing comes.
        other.execute("ROLLBACK")
        seen += measured(given, [Trial((1,) * 6)])
        assert told.tell(given, seen)
        assert told.failure == ""
        assert len(kept(url, "small refine")) == 2
    told.close()
    other.close()
    assert names_of(results) == ["small"]


def test_a_failure_does_not_show_a_password() -> None:
    told = OptunaStudy("postgresql+psycopg://ann:s3cret@127.0.0.1:1/mp?connect_timeout=1", "small refine")
    assert not told.tell(problem(), measured(problem(), [Trial((0,) * 6)]))
    told.close()
    assert told.failure
    assert "s3cret" not in told.failure


def test_killed_and_begun_again_it_is_the_same_search_without_a_trial_twice(results: Path) -> None:
    rng = random.Random(1)
    killed = [kill(str(results), 24, rng) for _ in range(2)]
    assert any(killed)
    subprocess.run(command(str(results), 24), capture_output=True, timeout=120, check=True)
    found = compared(str(results), 24)
    trials = found.pop("trials")
    assert trials > 10
    assert set(found.values()) == {0}


@pytest.mark.parametrize("first", ["ours", "Optuna's"])
def test_on_a_server_both_programs_share_a_database(first: str, database: str) -> None:
    given, seen = problem(), measured(problem(), [Trial((0,) * 6), Trial((1,) * 6)])
    told = Optuna(evaluations=4).study(database_url(database), "small optuna")
    if first == "Optuna's":
        assert told.tell(given, seen[:1]), told.failure
    store = registry.make("stores", "sql", url=database)
    store.create_study("small", {"model": "m"})
    assert told.tell(given, seen), told.failure
    told.close()
    assert [row.name for row in store.studies()] == ["small"]
    store.close()
    assert [trial.value for trial in kept(database_url(database))] == [item.loss for item in seen]


def fetched(url: str) -> Any:
    with urllib.request.urlopen(url, timeout=10) as answer:
        return json.loads(answer.read())


def test_the_dashboard_shows_the_study_and_its_trials(results: Path) -> None:
    url, given = database_url(str(results)), problem()
    seen = measured(given, [Trial((0,) * 6), Trial((1,) * 6)])
    told = Optuna(evaluations=4).study(url, "small optuna", ["bytes <= 12"])
    told.tell(given, seen)
    told.close()
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        port = probe.getsockname()[1]
    program = Path(sys.executable).with_name("optuna-dashboard")
    command = [str(program), "--port", str(port), "--host", "127.0.0.1", url]
    with subprocess.Popen(command, stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL) as server:
        try:
            address = f"http://127.0.0.1:{port}/api/studies"
            for _ in range(300):
                try:
                    studies = fetched(address)["study_summaries"]
                    break
                except OSError:
                    assert server.poll() is None, "the dashboard ended"
                    time.sleep(0.1)
            (one,) = [study for study in studies if study["study_name"] == "small optuna"]
            trials = fetched(f"{address}/{one['study_id']}?after=0")["trials"]
        finally:
            server.kill()
    assert [trial["values"] for trial in trials] == [[item.loss] for item in seen]
    assert names_of(results) == ["small"]


def test_a_database_in_memory_cannot_be_shared() -> None:
    with pytest.raises(InputError, match="in memory"):
        database_url(":memory:")
