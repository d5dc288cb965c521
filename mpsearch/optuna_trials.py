"""The trials of a search, kept as a study of Optuna's in the database of the results, for ``optuna-dashboard``."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import TYPE_CHECKING

from mpsearch import registry
from mpsearch.errors import InputError, Notice
from mpsearch.files import located
from mpsearch.ports import Searcher
from mpsearch.problem import Problem
from mpsearch.trials import Seen

if TYPE_CHECKING:
    from mpsearch.studying import Study

#: Told a problem and all that was seen of it.
Heard = Callable[[Problem, Sequence[Seen]], object]


@contextmanager
def told(
    study: Study, name: str, searcher: Searcher, budgets: Sequence[str], shared: bool | None = None
) -> Iterator[Heard | None]:
    """Give what keeps the trials in Optuna's tables; None where they are not to be kept.

    A trial that cannot be written is no reason to stop a search: when the last one is not there, a notice says so.

    Args:
        study: whose database it is.
        name: of the searcher; the study there is called ``STUDY SEARCHER``.
        searcher: with ``shared`` when it wants its trials kept, and ``study`` when its plans have parameters.
        budgets: part of the name there when they are not the study's own.
        shared: True or False instead of what the searcher wants.

    Raises:
        InputError: asked to, for a database in memory (E107).
    """
    url = _url(study.spec.storage, getattr(searcher, "shared", False) if shared is None else shared, bool(shared))
    if not url:
        yield None
        return
    make = getattr(searcher, "study", None) or registry.load("searchers", "optuna").study_of_plans
    label = f"{study.name} {name}" + (f": {' and '.join(budgets)}" if budgets else "")
    keeper = make(url, label, budgets or study.spec.budgets)
    try:
        yield keeper.tell
    finally:
        keeper.close()
    if keeper.failure:
        text = f"the trials are not in Optuna's tables ({keeper.failure}); the search itself is complete"
        study.notices.append(Notice("W520", text))


def _url(storage: str, wanted: bool, asked: bool) -> str:
    try:
        return database_url(storage) if wanted else ""
    except InputError:
        if asked:
            raise
        return ""


def database_url(storage: str) -> str:
    """Address of a study's database as SQLAlchemy, and so Optuna, takes it.

    Raises:
        InputError: a database in memory, which nobody else can read (E107).

    >>> database_url("postgresql://ann@db.lan/mp")
    'postgresql+psycopg://ann@db.lan/mp'
    """
    scheme, colon, rest = storage.partition("://")
    if colon and scheme.partition("+")[0] in ("postgresql", "postgres"):
        return f"postgresql+psycopg://{rest}"
    path = rest.removeprefix("/") if colon else storage
    if path in ("", ":memory:"):
        raise InputError("E107", "a database in memory cannot be shared with Optuna", advice="give a file as storage")
    return f"sqlite:///{located(path, Path.cwd())}"
