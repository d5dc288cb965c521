"""The command that searches for the plan of least measured loss."""

from __future__ import annotations

import json
import sys
from contextlib import closing
from pathlib import Path
from typing import TYPE_CHECKING, Annotated

import typer

from mpsearch.cli.options import (
    DEFAULT_STORAGE,
    Budgets,
    Json,
    Quiet,
    Storage,
    Workers,
    open_study,
    plain,
    worker_count,
)
from mpsearch.cli.own_tables import read_settings

if TYPE_CHECKING:
    from mpsearch.trials import Searched


def search(
    name: Annotated[str, typer.Argument(help="Name of the study, or a study file (.toml).")],
    searcher: Annotated[
        str, typer.Option(help="refine, evolve, optuna, surrogate or bisection, or a plug-in.")
    ] = "refine",
    evaluations: Annotated[int, typer.Option(help="Most measurements.")] = 60,
    setting: Annotated[
        list[str] | None, typer.Option("--set", help="NAME=VALUE, a setting of the searcher; again for more.")
    ] = None,
    target: Annotated[float | None, typer.Option(help="Loss that --searcher bisection keeps.")] = None,
    budget: Budgets = None,
    storage: Storage = DEFAULT_STORAGE,
    workers: Workers = None,
    out: Annotated[Path | None, typer.Option(help="Write the plan to this file.")] = None,
    optuna_storage: Annotated[
        bool, typer.Option("--optuna-storage", help="Keep the trials as an Optuna study in the same database too.")
    ] = False,
    quiet: Quiet = False,
    as_json: Json = False,
) -> None:
    """Search for the plan of least measured loss; what was measured before is not measured again.

    mpsearch search tiny-llama --searcher refine --evaluations 60
    """
    from dataclasses import replace

    from mpsearch import registry
    from mpsearch.cli.progress import Progress
    from mpsearch.searching import search_study
    from mpsearch.spec import StudySpec
    from mpsearch.studying import Study

    settings = read_settings(setting or [])
    if target is not None:
        settings["target"] = target
    progress = Progress(quiet or as_json)
    if name.endswith(".toml"):
        given = {} if storage == DEFAULT_STORAGE else {"storage": storage}
        spec = StudySpec.load(name, workers=worker_count(workers), **given)
        study = Study(spec, registry.make("stores", "sql", url=spec.storage), report=progress)
    else:
        stored = open_study(name, storage)
        study = Study(replace(stored.spec, workers=worker_count(workers)), stored.store, report=progress)
    with closing(study.store), progress.around(study, "the same command"):
        found = search_study(study, searcher, evaluations, budget or (), settings, shared=optuna_storage or None)
    for notice in study.notices:
        if notice.code == "W520":
            sys.stderr.write(f"{plain(str(notice))}\n")
    if out is not None:
        found.plan.save(out)
    if as_json:
        sys.stdout.write(json.dumps(found.to_json(), indent=1) + "\n")
        return
    _present(found, out)


def _present(found: Searched, out: Path | None) -> None:
    from mpsearch.cli.show import console, plan_table

    start, best = found.start, found.best
    console().print(plan_table(found.plan))
    weights = found.plan.layers.weights
    whole = sum(not item.trial.batches for item in found.trials)
    lines = [
        f"measured    {len(found.trials)} plans, {whole} of them on all batches: {sum(found.tokens):,} tokens",
        f"bytes       {found.plan.stored_bytes:,} ({8 * found.plan.stored_bytes / weights:.4f} bits per weight)",
        f"start       {start.loss:.5g} ± {start.spread:.2g}",
        f"best        {best.loss:.5g} ± {best.spread:.2g} ({_change(start.loss, best.loss)})",
    ]
    if found.held_out is not None:
        before, after = found.held_out
        change = _change(before.loss, after.loss)
        lines.append(f"held out    {after.loss:.5g} ± {after.spread:.2g}, start {before.loss:.5g} ({change})")
    if found.note:
        lines.append(f"searcher    {found.note}")
    if out is not None:
        lines.append(f"plan        {out}")
    sys.stdout.write("\n" + "\n".join(lines) + "\n")


def _change(start: float, best: float) -> str:
    if best == start:
        return "the start: nothing better was found"
    return f"{100 * abs(1 - best / start):.1f} % {'below' if best < start else 'above'} the start" if start else ""
