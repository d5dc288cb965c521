"""A search as a study in Optuna's own tables, for its dashboard: written beside the results, and never in their way."""

from __future__ import annotations

import math
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from typing import Any

from mpsearch.problem import Problem
from mpsearch.solvers import _extra
from mpsearch.solvers._reduced import Ints
from mpsearch.trials import Seen

#: Parameters of a plan: their values, and their distributions.
Read = Callable[[Any, Problem, Ints], tuple[Mapping[str, Any], Mapping[str, Any]]]
#: Seconds to wait before each further try to write.
_WAITS = (0.1, 0.4, 1.6)
#: Seconds that a writer waits for another one before that is an error.
_BUSY = 30


class OptunaStudy:
    """A study of an Optuna database that is told what a search measured.

    Optuna's tables stand in the very database that holds the results. One process writes them, the one that drives the
    search, and after the fact: what is measured is kept already, and a trial that could not be written is written with
    the next one, or by the next run. A trial is known by its plan and its batches, so none comes twice.

    Attributes:
        added: trials written so far.
        failure: why the last writing failed; empty when it did not.
    """

    def __init__(self, url: str, name: str, read: Read | None = None, budgets: Sequence[str] = ()) -> None:
        """Note where to write; nothing is opened yet.

        Args:
            url: address of the database, as SQLAlchemy takes it.
            name: name of the study there.
            read: reads the parameters of a plan, for plots of them; None for trials without.
            budgets: kept with the study.

        Raises:
            InputError: Optuna is not installed (E703).
        """
        _extra.load("optuna", "optuna")
        self.added = 0
        self.failure = ""
        self._url, self._name, self._read, self._budgets = url, name, read, list(budgets)
        self._storage: Any = None
        self._study: Any = None
        self._there: set[tuple[Any, Any]] = set()

    def tell(self, problem: Problem, seen: Sequence[Seen]) -> bool:
        """Write what is not there yet; return whether all of it is there now. Never raises an error of the database."""
        for wait in (*_WAITS, None):
            try:
                with quietly() as optuna:
                    self._open(optuna)
                    self._add(optuna, problem, seen)
            except Exception as error:
                # Of whatever kind: a dashboard is not worth a search. The address may hold a password.
                self.failure = f"{type(error).__name__} from Optuna's tables"
                self.close()
                if wait is None or isinstance(error, ImportError):
                    return False
                time.sleep(wait)
            else:
                self.failure = ""
                return True
        return False

    def close(self) -> None:
        """Close the connections; the next `tell` opens them again."""
        storage, self._storage, self._study = self._storage, None, None
        if storage is not None:
            storage.remove_session()
            storage.engine.dispose()

    def _open(self, optuna: Any) -> None:
        if self._study is not None:
            return
        local = self._url.startswith("sqlite")
        # A server has few connections, and one is enough here.
        settings = {"connect_args": {"timeout": _BUSY}} if local else {"pool_size": 1, "max_overflow": 1}
        self._storage = optuna.storages.RDBStorage(self._url, engine_kwargs=settings)
        self._study = optuna.create_study(study_name=self._name, storage=self._storage, load_if_exists=True)
        if self._budgets and "budgets" not in self._study.user_attrs:
            self._study.set_user_attr("budgets", self._budgets)
        trials = self._study.get_trials(deepcopy=False)
        self._there = {(x.user_attrs.get("plan"), x.user_attrs.get("batches")) for x in trials}

    def _add(self, optuna: Any, problem: Problem, seen: Sequence[Seen]) -> None:
        for item in seen:
            key = _plan(problem, item), item.trial.batches
            if key not in self._there:
                self._study.add_trial(self._record(optuna, problem, item, key[0]))
                self._there.add(key)
                self.added += 1

    def _record(self, optuna: Any, problem: Problem, item: Seen, plan: str) -> Any:
        """A trial of Optuna's: pruned where it was measured on part of the batches, failed where it has no loss."""
        attributes: dict[str, Any] = {"plan": plan, "batches": item.trial.batches}
        if math.isfinite(item.spread):
            attributes["spread"] = item.spread
        given: dict[str, Any] = {"user_attrs": attributes}
        if self._read is not None:
            given["params"], given["distributions"] = self._read(optuna, problem, _choice(item))
        states = optuna.trial.TrialState
        if not math.isfinite(item.loss):
            return optuna.trial.create_trial(state=states.FAIL, **given)
        if item.trial.batches:
            step = {item.trial.batches: item.loss}
            return optuna.trial.create_trial(state=states.PRUNED, intermediate_values=step, **given)
        return optuna.trial.create_trial(value=item.loss, **given)


def _choice(item: Seen) -> Ints:
    import numpy as np

    return np.array(item.trial.choice, dtype=np.int64)


def _plan(problem: Problem, item: Seen) -> str:
    return " ".join(problem.formats[column] for column in item.trial.choice)


@contextmanager
def quietly() -> Iterator[Any]:
    """Give Optuna to the body, without its messages."""
    optuna = _extra.load("optuna", "optuna")
    before = optuna.logging.get_verbosity()
    optuna.logging.set_verbosity(optuna.logging.ERROR)
    try:
        with _extra.quiet():
            yield optuna
    finally:
        optuna.logging.set_verbosity(before)
