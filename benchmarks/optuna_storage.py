"""Are the trials of a search in Optuna's tables once each, however often the search is killed? And what does it cost?

    python -m benchmarks.optuna_storage --kills 50 [--storage postgresql://…]

A search of the searcher `optuna` keeps its trials in a study of Optuna's, in the database of the results. It is killed
at random moments and begun again, then runs to its end. Its trials must be those of a search that was never killed.
"""

from __future__ import annotations

import argparse
import random
import select
import subprocess
import sys
import tempfile
import time
from collections import Counter
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np

from mpsearch import registry
from mpsearch.optuna_trials import database_url
from mpsearch.problem import Problem
from mpsearch.searching import drive
from mpsearch.solvers.optuna_search import Optuna
from mpsearch.trials import Seen, Trial

FORMATS = ("int2", "int4", "int8")
NAME = "small optuna"


def problem(rows: int = 6) -> Problem:
    rng = np.random.default_rng(3)
    loss = np.sort(rng.random((rows, 3)), axis=1)[:, ::-1]
    cost = np.tile([1.0, 2.0, 4.0], (1, rows, 1))
    return Problem(loss, cost, np.array([2.0 * rows]), formats=FORMATS, resources=("bytes",))


def measured(given: Problem, trials: Sequence[Trial]) -> list[Seen]:
    """Losses that do not quite add up, the same each time."""
    rows = np.arange(len(given.loss))
    losses = [float(given.loss[rows, list(t.choice)].sum()) + 0.01 * (sum(t.choice) % 3) for t in trials]
    return [Seen(t, loss, 0.001) for t, loss in zip(trials, losses, strict=True)]


def search(storage: str, evaluations: int) -> None:
    """Search to the end, and print how many trials were told after each ask, and the seconds that telling took."""
    given, searcher = problem(), Optuna(evaluations=evaluations, startup=6)
    told = searcher.study(database_url(storage), NAME, ["bytes <= 12"])
    spent = 0.0

    def heard(given: Problem, seen: Sequence[Seen]) -> None:
        nonlocal spent
        start = time.perf_counter()
        assert told.tell(given, seen), told.failure
        spent += time.perf_counter() - start
        sys.stdout.write(f"{len(seen)} {spent}\n")
        sys.stdout.flush()

    drive(given, searcher, lambda trials: measured(given, trials), evaluations, heard)
    told.close()
    sys.stdout.write("end\n")


def command(storage: str, evaluations: int) -> list[str]:
    return [
        sys.executable, "-m", "benchmarks.optuna_storage", "--search", storage, "--evaluations", str(evaluations)
    ]  # fmt: skip


def kill(storage: str, evaluations: int, rng: random.Random) -> bool:
    """Begin a search and kill it at a random moment; return whether it was killed before its end."""
    with subprocess.Popen(command(storage, evaluations), stdout=subprocess.PIPE, text=True) as child:
        assert child.stdout is not None
        asks = rng.randrange(1, 5)
        while asks and select.select([child.stdout], [], [], 60)[0] and child.stdout.readline() not in ("", "end\n"):
            asks -= 1
        time.sleep(rng.uniform(0, 0.05))
        child.kill()
        return not asks


def kept(url: str, name: str = NAME) -> list[Any]:
    """The trials of a study of Optuna's."""
    import optuna

    optuna.logging.set_verbosity(optuna.logging.ERROR)
    storage = optuna.storages.RDBStorage(url)
    try:
        return list(optuna.load_study(study_name=name, storage=storage).get_trials(deepcopy=False))
    finally:
        storage.remove_session()
        storage.engine.dispose()


def compared(storage: str, evaluations: int) -> Counter[str]:
    """Hold what is kept against a search that was never killed."""
    given = problem()
    whole = drive(
        given, Optuna(evaluations=evaluations, startup=6), lambda trials: measured(given, trials), evaluations
    )
    expected = {" ".join(FORMATS[column] for column in item.trial.choice): item.loss for item in whole}
    trials = kept(database_url(storage))
    found = {trial.user_attrs["plan"]: trial.value for trial in trials}
    return Counter(
        {
            "trials": len(trials),
            "twice": len(trials) - len(found),
            "missing": len(expected.keys() - found.keys()),
            "not of the search": len(found.keys() - expected.keys()),
            "another loss": sum(found[plan] != expected[plan] for plan in found.keys() & expected.keys()),
            "unfinished": sum(trial.state.name != "COMPLETE" for trial in trials),
        }
    )


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--kills", type=int, default=50)
    parser.add_argument("--evaluations", type=int, default=40)
    parser.add_argument("--storage", default="", help="a database; a new file when left out")
    parser.add_argument("--search", default="", help=argparse.SUPPRESS)
    args = parser.parse_args()
    if args.search:
        search(args.search, args.evaluations)
        return
    rng = random.Random(0)
    with tempfile.TemporaryDirectory() as folder:
        storage = args.storage or str(Path(folder) / "results.db")
        registry.make("stores", "sql", url=storage).close()
        killed = sum(kill(storage, args.evaluations, rng) for _ in range(args.kills))
        ended = subprocess.run(command(storage, args.evaluations), capture_output=True, text=True, check=True)
        found = compared(storage, args.evaluations)
        registry.make("stores", "sql", url=storage, create=False).close()
    spent = float(ended.stdout.splitlines()[-2].split()[1])
    sys.stdout.write(f"{args.kills} kills, {killed} of them before the end of the search\n")
    for name, count in found.items():
        sys.stdout.write(f"{name:<20} {count:>6}\n")
    sys.stdout.write(f"the last search spent {spent:.2f} s on Optuna's tables\n")
    sys.exit(1 if sum(found.values()) - found["trials"] else 0)


if __name__ == "__main__":
    main()
