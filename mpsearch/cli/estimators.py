"""The command that lists the estimators, and lets them compete on a study's model."""

from __future__ import annotations

import json
import sys
from collections.abc import Iterator
from contextlib import closing
from typing import TYPE_CHECKING, Annotated, Any

import typer

from mpsearch.cli.options import DEFAULT_STORAGE, Json, Quiet, Storage, Workers, open_study, worker_count
from mpsearch.errors import UsageError

if TYPE_CHECKING:
    from mpsearch.studying import Study


def estimators(
    study: Annotated[str, typer.Argument(help="A stored study, or a study file (.toml), to compete on.")] = "",
    only: Annotated[list[str] | None, typer.Option("--only", help="Only this estimator; again for more.")] = None,
    plans: Annotated[int, typer.Option(help="Random plans that are measured.")] = 100,
    sizes: Annotated[int, typer.Option(help="At how many sizes plans are drawn and chosen.")] = 5,
    limit: Annotated[float, typer.Option(help="Seconds that an estimator should take.")] = 30.0,
    storage: Storage = DEFAULT_STORAGE,
    workers: Workers = None,
    quiet: Quiet = False,
    as_json: Json = False,
) -> None:
    """List the estimators; given a study, find out which of them to trust on its model.

    mpsearch estimators

    mpsearch estimators tiny-llama --plans 100
    """
    from mpsearch.cli.show import console, estimators_table, tournament_notes, tournament_table

    if not study:
        if only or (plans, sizes, limit) != (100, 5, 30.0):
            raise UsageError(
                "E115",
                "--only, --plans, --sizes and --limit are for estimators that compete",
                advice="name a study: mpsearch estimators STUDY --only fisher",
            )
        rows = list(_catalogue())
        if as_json:
            sys.stdout.write(json.dumps(rows, indent=1) + "\n")
        else:
            console().print(estimators_table(rows))
        return
    from mpsearch.cli.progress import Progress

    progress = Progress(quiet or as_json)
    asked = _study(study, storage, workers)
    asked.told = progress
    with closing(asked.store), progress.around(asked, "the same command"):
        outcome = asked.tournament(only or (), plans=plans, sizes=sizes, limit=limit)
    if as_json:
        sys.stdout.write(json.dumps(outcome.to_json(), indent=1) + "\n")
        return
    out = console()
    out.print(tournament_table(outcome))
    for line in [*tournament_notes(outcome), "", *outcome.sentences]:
        out.print(line)


def _study(name: str, storage: str, workers: int | None) -> Study:
    from dataclasses import replace

    from mpsearch import registry
    from mpsearch.spec import StudySpec
    from mpsearch.studying import Study

    if name.endswith(".toml"):
        given = {} if storage == DEFAULT_STORAGE else {"storage": storage}
        spec = StudySpec.load(name, workers=worker_count(workers), **given)
        return Study(spec, registry.make("stores", "sql", url=spec.storage))
    found = open_study(name, storage)
    return Study(replace(found.spec, workers=worker_count(workers)), found.store)


def _catalogue() -> Iterator[dict[str, Any]]:
    from mpsearch import registry

    for name in registry.names("estimators"):
        made = registry.make("estimators", name)
        yield {
            "estimator": name,
            "predicts": (type(made).__doc__ or "").strip().splitlines()[0].rstrip("."),
            "cost": made.cost,
            "needs": list(made.needs),
            "sees": list(made.covers),
            "parts": getattr(made, "parts", False),
            "streams": getattr(made, "streams", ""),
            "settings": list(registry.settings("estimators", name)),
        }
