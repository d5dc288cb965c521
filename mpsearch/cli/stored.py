"""Commands on what is stored or on a model alone: solve, show, export, layers."""

from __future__ import annotations

import json
import math
import shlex
import sys
from pathlib import Path
from typing import TYPE_CHECKING, Annotated

import typer

from mpsearch.cli.options import DEFAULT_STORAGE, Budgets, Json, Storage, open_study, storage_option
from mpsearch.errors import InputError, UsageError
from mpsearch.spread import at_most

if TYPE_CHECKING:
    from mpsearch.studying import Study
    from mpsearch.views.study_view import StudyView


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
        doubt = at_most(predicted.spread)
        sys.stdout.write(f"predicted   {predicted.loss:.5g} {predicted.unit}{doubt}\n")
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
    from mpsearch.cli.show import study_json
    from mpsearch.cli.study_list import listed, study_lines

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
        _present(study, name, storage)
    finally:
        study.store.close()


def _present(study: Study, name: str, storage: str) -> None:
    """Print what is known of a study: the verdict, its front, and its chosen plan as a grid of bits."""
    from mpsearch.cli.looks import Pen, front_plot, grid_lines, worth_lines, wrapped
    from mpsearch.cli.show import console, front_table
    from mpsearch.views.study_view import StudyView

    view = StudyView.of(study)
    points, option = view.points, storage_option(storage)
    if not len(points) or not points.measured.any():
        verb = "watch" if view.state in ("submitted", "running") else "resume"
        raise InputError(
            "E143", f"study '{name}' has no measured plan yet: it is {view.state}",
            advice=f"mpsearch {verb} {shlex.quote(name)}{option}",
        )  # fmt: skip
    pen = Pen.of_output()
    decisions = f"{len(view.layers)} layers in {len(view.layers.decisions)} decisions, {view.weights:,} weights"
    lines = [f"{name}: {view.state}; {decisions}", "", *worth_lines(view.worth.at(option), pen), ""]
    sys.stdout.write("".join(f"{pen.text(line)}\n" for line in [*lines, *front_plot(view, pen), ""]))
    sys.stdout.flush()
    console().print(front_table(view.measured, study.front, view.weights, points.keys[view.chosen]))
    title = f"Chosen plan: bits of one code of each layer ({_counts(view)})"
    grid = grid_lines(view, points.choice[view.chosen].tolist(), pen)
    sys.stdout.write("".join(f"{line}\n" for line in ["", *wrapped(title, pen), *map(pen.painted, grid)]))


def _counts(view: StudyView) -> str:
    """How many layers have each format in the chosen plan, fewest bits first."""
    numbers = view.points.choice[view.chosen].tolist()
    return ", ".join(f"{numbers.count(j)} {name}" for j, name in enumerate(view.points.formats) if j in numbers)


def layers(
    model: Annotated[str, typer.Argument(help="A model folder, bundled:tiny-llama, or a study (--scores).")] = "",
    scores: Annotated[bool, typer.Option("--scores", help="What each decision loses, as a study scored it.")] = False,
    study: Annotated[str, typer.Option(help="With --scores: the study, instead of the newest of the model.")] = "",
    at: Annotated[str, typer.Option(help="With --scores: the format whose losses are listed.")] = "",
    storage: Storage = DEFAULT_STORAGE,
    as_json: Json = False,
) -> None:
    """List what can be decided in a model, and what is left out and why; or what it loses, as a study has scored it.

    mpsearch layers bundled:tiny-llama

    mpsearch layers --study tiny-llama --scores --at int4-g64
    """
    if scores or study:
        _scores(model, study, at, storage, as_json)
        return
    if not model or at:
        told = "no model is named" if not model else "--at says which scores to list"
        raise UsageError("E115", told, advice="mpsearch layers MODEL, or mpsearch layers --study NAME --scores")
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


def _scores(model: str, study: str, at: str, storage: str, as_json: bool) -> None:
    """Print the scores of a study: of the one that is named, or else of the newest one of the model."""
    from mpsearch.cli.looks import Pen
    from mpsearch.cli.pick import Picker
    from mpsearch.cli.scores import score_lines, scores_json

    picker = Picker(storage)
    try:
        view = picker.view(study or picker.study_of(model))
    finally:
        picker.close()
    if as_json:
        sys.stdout.write(json.dumps(scores_json(view), indent=1) + "\n")
        return
    pen = Pen.of_output()
    sys.stdout.write("".join(f"{pen.text(line)}\n" for line in score_lines(view, pen, at)))
