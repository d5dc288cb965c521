"""Commands on what is stored or on a model alone: solve, show, export, layers."""

from __future__ import annotations

import json
import math
import shlex
import sys
from pathlib import Path
from typing import Annotated

import typer

from mpsearch.cli.options import DEFAULT_STORAGE, Budgets, Json, Storage, open_study, storage_option
from mpsearch.errors import InputError, UsageError


def solve(
    name: Annotated[str, typer.Argument(help="Name of the study.")] = "",
    budget: Budgets = None,
    storage: Storage = DEFAULT_STORAGE,
    out: Annotated[Path | None, typer.Option(help="Write the plan, or the choice, to this file.")] = None,
    as_json: Json = False,
    table: Annotated[Path | None, typer.Option(help="Instead of a study: losses (.csv, .json, .parquet).")] = None,
    costs: Annotated[list[Path] | None, typer.Option(help="Costs of the table; again for more.")] = None,
    solver: Annotated[str, typer.Option(help="For a table: name of the solver.")] = "auto",
    setting: Annotated[list[str] | None, typer.Option("--set", help="Setting of the solver, NAME=VALUE.")] = None,
    rules: Annotated[Path | None, typer.Option(help="For a table: pins, ties, counts … (.toml).")] = None,
    goal: Annotated[str, typer.Option(help="loss, worst, or a resource to spend least of, such as weights.")] = "loss",
    most_loss: Annotated[float | None, typer.Option(help="With a resource as the goal: the most loss.")] = None,
    cautious: Annotated[float, typer.Option(help="For a table with spreads: standard errors to allow for.")] = 0.0,
    errors: Annotated[str, typer.Option(help="With --cautious: shared or independent.")] = "shared",
) -> None:
    """Solve for other budgets on stored scores, or on a table of your own; the model is not loaded.

    mpsearch solve tiny-llama --budget 'weights <= 3.5 bits'

    mpsearch solve tiny-llama --goal weights --most-loss 0.02

    mpsearch solve --table scores.csv --costs bytes.csv --budget 'bytes <= 40 %'
    """
    if table is not None:
        from mpsearch.cli.own_tables import solve_tables

        if name:
            raise UsageError("E115", "a study and --table are given", advice="leave one of them out")
        solve_tables(
            table, costs or [], budget or [], solver=solver, settings=setting or [], rules=rules, goal=goal,
            most_loss=most_loss, cautious=cautious, errors=errors, out=out, as_json=as_json,
        )  # fmt: skip
        return
    if not name:
        raise UsageError("E115", "nothing to solve", advice="name a study, or give --table scores.csv")
    if costs or setting or rules or cautious or solver != "auto":
        raise UsageError("E115", "--costs, --solver, --set, --rules and --cautious are for --table")
    from mpsearch.cli.lines import cost_lines, doubt_lines, price_lines
    from mpsearch.cli.show import console, plan_table

    study = open_study(name, storage)
    try:
        answer = study.answer(*(budget or []), goal=goal, most_loss=math.inf if most_loss is None else most_loss)
        plan = answer.plan
    finally:
        study.store.close()
    if out is not None:
        plan.save(out)
    if as_json:
        sys.stdout.write(json.dumps(plan.to_json(), indent=1) + "\n")
        return
    console().print(plan_table(plan))
    predicted = plan.predicted
    sys.stdout.write(f"\nbytes       {plan.stored_bytes:,} ({plan.bits:.4f} bits per weight)\n")
    if predicted.loss is not None:
        spread = "" if predicted.spread is None else f" ± {predicted.spread:.2g}"
        sys.stdout.write(f"predicted   {predicted.loss:.5g}{spread} {predicted.unit}\n")
    if predicted.gap is not None:
        proven = "0 (proven least)" if predicted.gap <= 1e-9 else f"{100 * predicted.gap:.3g} % of the loss"
        sys.stdout.write(f"gap         {proven}, bound {predicted.bound:.5g}\n")
    doubtful = doubt_lines(answer.doubts(), len(plan.layers.decisions))
    for line in [*cost_lines(plan, answer.costs), *price_lines(plan), *doubtful]:
        sys.stdout.write(f"{line}\n")
    if out is not None:
        sys.stdout.write(f"plan        {out}\n")


def show(
    name: Annotated[str | None, typer.Argument(help="Name of the study; all studies without.")] = None,
    storage: Storage = DEFAULT_STORAGE,
    as_json: Json = False,
) -> None:
    """Show the studies of a database, or one study's measured plans.

    mpsearch show

    mpsearch show tiny-llama
    """
    from mpsearch import registry
    from mpsearch.cli.show import console, front_table, plan_table, safe, study_json
    from mpsearch.cli.study_list import listed, study_lines
    from mpsearch.verdict import verdict

    if name is None:
        with registry.make("stores", "sql", url=storage, create=False, read_only=True) as store:
            rows, statuses = store.studies(), store.control.statuses()
        if as_json:
            sys.stdout.write(json.dumps(listed(rows, statuses)) + "\n")
            return
        for line in study_lines(statuses):
            sys.stdout.write(f"{line}\n")
        if not rows:
            sys.stdout.write("no studies yet; start one with: mpsearch demo\n")
        return
    study = open_study(name, storage, read_only=True)
    try:
        if as_json:
            sys.stdout.write(json.dumps(study_json(study), indent=1) + "\n")
            return
        plans, measurements = study.plans, study.measurements
        if not plans or not measurements:
            state = study.store.control.status(name).state
            verb = "watch" if state in ("submitted", "running") else "resume"
            raise InputError(
                "E143", f"study '{name}' has no measured plan yet: it is {state}",
                advice=f"mpsearch {verb} {shlex.quote(name)}{storage_option(storage)}",
            )  # fmt: skip
        out = console()
        out.print(front_table(measurements, study.front, study.survey.layers.weights, plans[0].plan.assignment))
        out.print()
        out.print(plan_table(plans[0].plan))
        out.print()
        for line in verdict(plans[0], measurements, study.costs):
            out.print(safe(line), markup=False)
    finally:
        study.store.close()


def layers(
    model: Annotated[str, typer.Argument(help="A model folder, or bundled:tiny-llama.")],
    as_json: Json = False,
) -> None:
    """List what can be decided in a model, and what is left out and why.

    mpsearch layers bundled:tiny-llama
    """
    from mpsearch import api
    from mpsearch.bundled import resolve_model
    from mpsearch.cli.show import console, excluded_table, layers_table

    found = api.layers(resolve_model(model, Path.cwd()))
    if as_json:
        sys.stdout.write(json.dumps(found.to_json(), indent=1) + "\n")
        return
    out = console()
    out.print(layers_table(found))
    out.print()
    out.print(excluded_table(found))
