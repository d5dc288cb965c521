"""Two users submit studies of the same model to one PostgreSQL database; workers join it, and are killed at random.

    python -m benchmarks.team --storage postgresql://ann@127.0.0.1/team --kills 20

Needs an empty database. What both ask for must be computed once, nothing may stay leased, and the plans must be those
of runs alone, in one process, on SQLite. A worker that is killed is replaced by a new one.
"""

from __future__ import annotations

import argparse
import json
import os
import random
import signal
import subprocess
import sys
import tempfile
import time
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import psycopg

import mpsearch as mp
from mpsearch.storage.store import SqlStore
from mpsearch.stored_study import StoredStudy
from mpsearch.submitting import ENDED

_WORKERS = 3
_SHELL = [sys.executable, "-m", "mpsearch.cli.main"]
#: Writes down each time that a task is given out, given back unharmed, or done.
_NOTES = """
CREATE TABLE note (kind text, key text);
CREATE FUNCTION take_note() RETURNS trigger AS $$ BEGIN
  IF NEW.epoch > OLD.epoch THEN INSERT INTO note VALUES ('given', NEW.key); END IF;
  IF OLD.state = 'leased' AND NEW.state = 'ready' AND NEW.deaths = OLD.deaths THEN
    INSERT INTO note VALUES ('back', NEW.key); END IF;
  IF OLD.state = 'leased' AND NEW.state = 'done' THEN INSERT INTO note VALUES ('done', NEW.key); END IF;
  RETURN NEW; END $$ LANGUAGE plpgsql;
CREATE TRIGGER notes AFTER UPDATE ON task FOR EACH ROW EXECUTE FUNCTION take_note();
"""


@dataclass(frozen=True)
class Outcome:
    """How it went.

    Attributes:
        states: name of the study -> where it stands.
        killed: workers that were killed.
        distinct: tasks that are different.
        done: tasks that were done; more than ``distinct`` when one was done twice.
        given_out: how often tasks were given out and not given back unharmed.
        alone: tasks that the two runs alone computed together.
        left_leased: tasks that are leased in the end.
        same_as_alone: whether plans and measured losses are those of the runs alone.
        seconds: from the first worker's start to the end of both studies.
    """

    states: dict[str, str]
    killed: int
    distinct: int
    done: int
    given_out: int
    alone: int
    left_leased: int
    same_as_alone: bool
    seconds: float


def question(user: str, model: str, folder: Path, tokens: int) -> dict[str, Any]:
    """Settings of a user's study: both have the model, data and menu, and each has a budget."""
    return {
        "name": user,
        "model": model,
        "calibration": "stdlib:calibration",
        "validation": "stdlib:validation",
        "formats": ["int2-g64", "int3-g64", "int4-g64", "int8-channel"],
        "budgets": ["weights <= 4 bits" if user == "ann" else "weights <= 3.2 bits"],
        "tokens": tokens,
        "validation_tokens": tokens,
        "length": 32,
        "batch_size": 4,
        "points": 2,
        "out": str(folder / user),
    }


def play(storage: str, model: str | Path, folder: Path, kills: int = 2, seed: int = 0, tokens: int = 512) -> Outcome:
    """Let two users and their workers work on an empty database.

    Args:
        storage: its address.
        model: folder of a model, or a bundled one.
        folder: an empty folder.
        kills: how often a worker is killed.
        seed: of who is killed and when.
        tokens: of calibration and validation.
    """
    users = ("ann", "bob")
    questions = {user: question(user, str(model), folder, tokens) for user in users}
    alone = {user: mp.study(**questions[user], storage=str(folder / f"{user}.db")) for user in users}
    for study in alone.values():
        study.run()
    with SqlStore(storage) as store:
        connection = psycopg.connect(storage, autocommit=True)
        connection.execute(_NOTES)
        for user in users:
            _submit(questions[user], folder, storage)
        started = time.monotonic()
        killed = _work(store, connection, storage, folder, kills, random.Random(seed))
        seconds = time.monotonic() - started
        (counts,) = connection.execute(
            "SELECT count(DISTINCT key), count(*) FILTER (WHERE kind = 'done'), count(*) FILTER (WHERE kind = 'given')"
            " - count(*) FILTER (WHERE kind = 'back') FROM note"
        )
        (leased,) = connection.execute("SELECT count(*) FROM task WHERE state = 'leased'")
        connection.close()
        states = {user: store.control.status(user).state for user in users}
        same = all(_result(StoredStudy(alone[user].spec, store)) == _result(alone[user]) for user in users)
    for study in alone.values():
        study.store.close()
    return Outcome(
        states, killed, *counts, alone=sum(x.computed for x in alone.values()), left_leased=leased[0],
        same_as_alone=same, seconds=seconds,
    )  # fmt: skip


def _submit(settings: dict[str, Any], folder: Path, storage: str) -> None:
    file = folder / f"{settings['name']}.toml"
    file.write_text("\n".join(f"{name} = {json.dumps(value)}" for name, value in settings.items()), encoding="utf-8")
    subprocess.run([*_SHELL, "submit", str(file), "--wait", "--storage", storage], check=True, capture_output=True)


def _work(
    store: SqlStore, connection: psycopg.Connection[Any], storage: str, folder: Path, kills: int, rng: random.Random
) -> int:
    """Have workers work until both studies have ended; return how many were killed on the way."""
    workers = [_worker(storage, folder) for _ in range(_WORKERS)]
    killed = 0
    after = rng.randint(1, 6)
    try:
        while not all(row.state in ENDED for row in store.control.statuses()):
            (row,) = connection.execute("SELECT count(*) FROM note WHERE kind = 'given'")
            if killed < kills and row[0] >= after:
                victim = workers.pop(rng.randrange(_WORKERS))
                victim.send_signal(signal.SIGKILL)
                victim.wait()
                killed += 1
                workers.append(_worker(storage, folder))
                after = row[0] + rng.randint(1, 12)
            time.sleep(0.02)
    finally:
        for worker in workers:
            worker.send_signal(signal.SIGTERM)
        for worker in workers:
            worker.wait(60)
    return killed


def _worker(storage: str, folder: Path) -> subprocess.Popen[bytes]:
    # One thread each, as there are several.
    environment = {**os.environ, "MPSEARCH_STORAGE": storage, "OMP_NUM_THREADS": "1"}
    with (folder / "workers.log").open("ab") as log:
        return subprocess.Popen([*_SHELL, "worker"], env=environment, stdout=log, stderr=log)


def _result(study: StoredStudy) -> Any:
    plans = [(item.label, item.plan.to_json()) for item in study.plans]
    return plans, [(m.label, m.plan, m.loss, m.spread) for m in study.measurements]


def main(arguments: Sequence[str] | None = None) -> int:
    """Play once and print how it went; 1 when something was computed twice, lost, or came out otherwise."""
    parser = argparse.ArgumentParser(description=(__doc__ or "").splitlines()[0])
    parser.add_argument("--storage", required=True, help="an empty PostgreSQL database")
    parser.add_argument("--model", default="bundled:tiny-llama")
    parser.add_argument("--kills", type=int, default=20)
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--tokens", type=int, default=1024)
    asked = parser.parse_args(arguments)
    with tempfile.TemporaryDirectory() as folder:
        found = play(asked.storage, asked.model, Path(folder), asked.kills, asked.seed, asked.tokens)
    print(f"studies                    {', '.join(f'{name} {state}' for name, state in found.states.items())}")
    print(f"workers killed             {found.killed}")
    print(f"tasks of both, each once   {found.distinct} (alone {found.alone})")
    print(f"tasks done                 {found.done}")
    print(f"tasks given out            {found.given_out}")
    print(f"tasks leased in the end    {found.left_leased}")
    print(f"plans as alone             {found.same_as_alone}")
    print(f"seconds                    {found.seconds:.1f}")
    fine = (
        set(found.states.values()) == {"complete"}
        and found.same_as_alone
        and found.done == found.distinct < found.alone
        and found.given_out <= found.distinct + found.killed
        and not found.left_leased
    )
    return 0 if fine else 1


if __name__ == "__main__":
    sys.exit(main())
