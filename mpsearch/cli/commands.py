"""The commands. Heavy parts are loaded when a command needs them."""

from __future__ import annotations

import json
import os
import sys
import time
from contextvars import ContextVar
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import typer

from mpsearch.errors import InputError, MpsearchError, UsageError

if TYPE_CHECKING:
    from mpsearch.studying import Study

#: Whether an error shows its traceback.
DEBUG: ContextVar[bool] = ContextVar("debug", default=False)

_STORAGE = "sqlite:///mpsearch.db"
Storage = Annotated[str, typer.Option(help="Results database: a path or URL.")]
Json = Annotated[bool, typer.Option("--json", help="Print JSON.")]
Quiet = Annotated[bool, typer.Option("--quiet", "-q", help="No progress.")]
Budgets = Annotated[
    list[str] | None, typer.Option("--budget", "-b", help="Such as 'weights <= 4.25 bits'; give it again for more.")
]
Workers = Annotated[int | None, typer.Option(help="Processes that compute; all cores, at most 4, by default.")]


def plain(text: str) -> str:
    """Take control characters out of a text of several lines."""
    from mpsearch.cli.show import safe

    return "\n".join(safe(line) for line in text.splitlines())


def _workers(asked: int | None) -> int:
    return asked if asked is not None else min(os.cpu_count() or 1, 4)


def run(
    what: Annotated[str, typer.Argument(help="A study file (.toml), a model folder, or bundled:tiny-llama.")],
    calib: Annotated[str, typer.Option(help="Calibration text: .txt, .jsonl or stdlib:calibration.")] = "",
    validation: Annotated[str, typer.Option(help="Validation text; a quarter of --calib is held out without.")] = "",
    budget: Budgets = None,
    format: Annotated[
        list[str] | None, typer.Option("--format", "-f", help="A format of the menu; again for more.")
    ] = None,
    estimator: Annotated[str | None, typer.Option(help="Name of the estimator.")] = None,
    solver: Annotated[str | None, typer.Option(help="Name of the solver.")] = None,
    pin: Annotated[list[str] | None, typer.Option(help="LAYER=FORMAT, the layer may be a pattern.")] = None,
    name: Annotated[str | None, typer.Option(help="Name of the study; the model's name by default.")] = None,
    tokens: Annotated[int | None, typer.Option(help="Calibration tokens.")] = None,
    validation_tokens: Annotated[int | None, typer.Option(help="Validation tokens.")] = None,
    length: Annotated[int | None, typer.Option(help="Tokens of one sequence.")] = None,
    text_key: Annotated[str | None, typer.Option(help="Field of a .jsonl line that holds the text.")] = None,
    points: Annotated[
        int | None, typer.Option(help="Further budgets that are solved and measured for the front.")
    ] = None,
    random: Annotated[int | None, typer.Option(help="Random plans that are measured for comparison.")] = None,
    seed: Annotated[int | None, typer.Option(help="Seed of all that is random.")] = None,
    storage: Annotated[str | None, typer.Option(help="Results database: a path or URL.")] = None,
    out: Annotated[str | None, typer.Option(help="Folder of the report and the plan.")] = None,
    workers: Workers = None,
    trust_remote_code: Annotated[bool, typer.Option("--trust-remote-code", help="Run the model's own code.")] = False,
    quiet: Quiet = False,
) -> None:
    """Score, solve, measure, and write the report and the plan.

    mpsearch run ./model --calib calib.txt --budget "weights <= 4.25 bits"

    mpsearch run study.toml
    """
    from mpsearch.spec import StudySpec

    given = {
        "name": name, "calibration": calib or None, "validation": validation or None, "estimator": estimator,
        "solver": solver, "tokens": tokens, "validation_tokens": validation_tokens, "length": length,
        "text_key": text_key, "points": points, "random": random, "seed": seed, "storage": storage, "out": out,
        "budgets": tuple(budget) if budget else None, "formats": tuple(format) if format else None,
        "pins": _pins(pin) if pin else None, "trust_remote_code": trust_remote_code or None, "workers": workers,
    }  # fmt: skip
    values: dict[str, Any] = {key: value for key, value in given.items() if value is not None}
    if what.endswith(".toml"):
        spec = StudySpec.load(what, **values)
    else:
        values.setdefault("workers", _workers(None))
        spec = StudySpec.of(model=what, **values)
    _run(spec, quiet)


def _pins(texts: list[str]) -> dict[str, str]:
    pins = {}
    for text in texts:
        pattern, equals, fmt = text.rpartition("=")
        if not equals:
            raise UsageError("E115", f"--pin '{text}' is not LAYER=FORMAT", advice="--pin 'lm_head=int8-channel'")
        pins[pattern] = fmt
    return pins


def _run(spec: Any, quiet: bool) -> None:
    from mpsearch import registry
    from mpsearch.cli.progress import Progress
    from mpsearch.studying import Study

    progress = Progress(quiet)
    with registry.make("stores", "sql", url=spec.storage) as store:
        study = Study(spec, store, report=progress)
        started = time.monotonic()
        try:
            study.run()
        except KeyboardInterrupt:
            progress.end()
            where = "" if spec.storage == _STORAGE else f" --storage {spec.storage}"
            noted = any(row.name == spec.name for row in store.studies())
            again = f"mpsearch resume {_quoted(spec.name)}{where}" if noted else "the same command"
            sys.stderr.write(f"paused; go on with: {again}\n")
            raise typer.Exit(130) from None
        except MpsearchError:
            progress.end()
            raise
        progress.end()
        _present(study, time.monotonic() - started)


def _present(study: Study, seconds: float) -> None:
    from mpsearch.cli.show import console, front_table, safe
    from mpsearch.outputs import write_outputs
    from mpsearch.verdict import verdict

    out = console()
    layers = study.survey.layers
    out.print(
        f"{len(layers)} layers in {len(layers.decisions)} decisions, {layers.weights:,} weights; "
        f"{study.computed} tasks computed in {seconds:.1f} s",
        markup=False,
    )
    for notice in study.notices:
        out.print(safe(notice), markup=False)
    chosen, measurements = study.plans[0], study.measurements
    out.print()
    out.print(front_table(measurements, study.front, layers.weights, chosen.plan.assignment))
    out.print()
    for line in verdict(chosen, measurements):
        out.print(safe(line), markup=False)
    report, plan = write_outputs(study)
    storage = "" if study.spec.storage == _STORAGE else f" --storage {_quoted(study.spec.storage)}"
    sys.stdout.write(
        f"\nreport  {report}\nplan    {plan}\n"
        f"next    mpsearch solve {_quoted(study.name)} --budget 'weights <= 3.5 bits'{storage}\n"
        f"        mpsearch export {_quoted(study.name)} --to native --out exported{storage}\n"
    )


def _quoted(text: str) -> str:
    import shlex

    return shlex.quote(text)


def _open(name: str, storage: str, read_only: bool = False) -> Study:
    """Open a stored study by name."""
    from mpsearch import registry
    from mpsearch.spec import StudySpec
    from mpsearch.studying import Study

    store = registry.make("stores", "sql", url=storage, create=False, read_only=read_only)
    row = store.study(name)
    return Study(StudySpec.from_question(row.spec, storage), store)


def resume(
    name: Annotated[str, typer.Argument(help="Name of the study.")],
    storage: Storage = _STORAGE,
    workers: Workers = None,
    out: Annotated[str, typer.Option(help="Folder of the report and the plan.")] = "mpsearch-out",
    quiet: Quiet = False,
) -> None:
    """Go on with a study that was stopped; what is known is not computed again.

    mpsearch resume tiny-llama
    """
    from dataclasses import replace

    found = _open(name, storage)
    found.store.close()
    _run(replace(found.spec, workers=_workers(workers), out=out), quiet)


def solve(
    name: Annotated[str, typer.Argument(help="Name of the study.")],
    budget: Budgets = None,
    storage: Storage = _STORAGE,
    out: Annotated[Path | None, typer.Option(help="Write the plan to this file.")] = None,
    as_json: Json = False,
) -> None:
    """Solve for other budgets on the stored scores; neither the model nor torch is loaded.

    mpsearch solve tiny-llama --budget 'weights <= 3.5 bits'
    """
    from mpsearch.cli.show import console, plan_table

    study = _open(name, storage)
    try:
        plan = study.plan(*(budget or []))
    finally:
        study.store.close()
    if out is not None:
        plan.save(out)
    if as_json:
        sys.stdout.write(json.dumps(plan.to_json(), indent=1) + "\n")
        return
    console().print(plan_table(plan))
    predicted = plan.predicted
    sys.stdout.write(f"\nbytes       {plan.bytes:,} ({plan.bits:.4f} bits per weight)\n")
    if predicted.loss is not None:
        spread = "" if predicted.spread is None else f" ± {predicted.spread:.2g}"
        sys.stdout.write(f"predicted   {predicted.loss:.5g}{spread} {predicted.unit}\n")
    if predicted.gap is not None:
        sys.stdout.write(f"gap         {100 * predicted.gap:.3g} % (bound {predicted.bound:.5g})\n")
    if out is not None:
        sys.stdout.write(f"plan        {out}\n")


def show(
    name: Annotated[str | None, typer.Argument(help="Name of the study; all studies without.")] = None,
    storage: Storage = _STORAGE,
    as_json: Json = False,
) -> None:
    """Show the studies of a database, or one study's measured plans.

    mpsearch show

    mpsearch show tiny-llama
    """
    from mpsearch import registry
    from mpsearch.cli.show import console, front_table, plan_table, safe, study_json
    from mpsearch.verdict import verdict

    if name is None:
        with registry.make("stores", "sql", url=storage, create=False, read_only=True) as store:
            rows = store.studies()
        if as_json:
            sys.stdout.write(
                json.dumps([{"name": r.name, "state": r.state, "created": r.created} for r in rows]) + "\n"
            )
            return
        for row in rows:
            sys.stdout.write(f"{safe(row.name)}  {row.state}  {row.created}\n")
        if not rows:
            sys.stdout.write("no studies yet; start one with: mpsearch demo\n")
        return
    study = _open(name, storage, read_only=True)
    try:
        if as_json:
            sys.stdout.write(json.dumps(study_json(study), indent=1) + "\n")
            return
        plans, measurements = study.plans, study.measurements
        if not plans or not measurements:
            raise InputError("E143", f"study '{name}' has no measured plan yet", advice=f"mpsearch resume {name}")
        out = console()
        out.print(front_table(measurements, study.front, study.survey.layers.weights, plans[0].plan.assignment))
        out.print()
        out.print(plan_table(plans[0].plan))
        out.print()
        for line in verdict(plans[0], measurements):
            out.print(safe(line), markup=False)
    finally:
        study.store.close()


def export(
    name: Annotated[str, typer.Argument(help="Name of the study, or a plan file (.json).")],
    to: Annotated[str, typer.Option(help="native or llama.cpp.")] = "native",
    out: Annotated[Path, typer.Option(help="Folder to write to.")] = Path("exported"),
    budget: Budgets = None,
    storage: Storage = _STORAGE,
    weights: Annotated[bool, typer.Option(help="Native: write the packed weights as well.")] = True,
    model: Annotated[str, typer.Option(help="Model folder, when it is not where the study had it.")] = "",
    force: Annotated[bool, typer.Option("--force", help="Replace files that an earlier export wrote.")] = False,
) -> None:
    """Write a plan for another tool.

    mpsearch export tiny-llama --budget 'weights <= 3.5 bits' --to native --out exported
    """
    from mpsearch import registry
    from mpsearch.plan import BitPlan

    exporter = registry.make("exporters", to, force=force)
    if name.endswith(".json"):
        plan, source = BitPlan.load(name), model
    else:
        study = _open(name, storage)
        try:
            plan, source = study.plan(*(budget or [])), model or study.spec.model
        finally:
            study.store.close()
    loaded = None
    if to == "native" and weights and source:
        from mpsearch.bundled import resolve_model
        from mpsearch.model.model import load_model

        loaded = load_model(resolve_model(source, Path.cwd()))
        if loaded.digest != plan.model.get("digest"):
            raise InputError(
                "E302", f"the plan is for another model than '{source}'", advice="give the model's folder: --model"
            )
    for path in exporter.write(plan, out, loaded):
        sys.stdout.write(f"{path}\n")


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


def demo(
    storage: Storage = _STORAGE,
    out: Annotated[str, typer.Option(help="Folder of the report and the plan.")] = "mpsearch-out",
    workers: Workers = None,
    quiet: Quiet = False,
) -> None:
    """Run the whole line on the bundled model: find, score, solve, measure, report, export.

    mpsearch demo
    """
    from mpsearch.bundled import BUNDLED
    from mpsearch.spec import StudySpec

    spec = StudySpec.of(
        name="demo",
        model=BUNDLED,
        calibration="stdlib:calibration",
        validation="stdlib:validation",
        budgets=("weights <= 3.5 bits",),
        tokens=4096,
        validation_tokens=8192,
        points=6,
        workers=_workers(workers),
        storage=storage,
        out=out,
    )
    _run(spec, quiet)
