"""Commands that compute: run, resume, demo. Heavy parts are loaded when they are needed."""

from __future__ import annotations

import shlex
import sys
import time
from pathlib import Path
from typing import Annotated, Any

import typer

from mpsearch.bundled import PREFIX
from mpsearch.cli.options import (
    DEFAULT_STORAGE,
    Budgets,
    Json,
    Quiet,
    Storage,
    StudyStorage,
    Workers,
    check_name,
    open_study,
    print_json,
    storage_option,
    worker_count,
)
from mpsearch.errors import InputError, UsageError, did_you_mean


def run(
    what: Annotated[str, typer.Argument(help="A study file (.toml), a model folder, or bundled:tiny-llama.")],
    calib: Annotated[str, typer.Option(help="Calibration text: .txt, .jsonl or stdlib:calibration.")] = "",
    validation: Annotated[str, typer.Option(help="Validation text; a quarter of --calib is held out without.")] = "",
    budget: Budgets = None,
    format: Annotated[
        list[str] | None, typer.Option("--format", "-f", help="A format of the menu; again for more.")
    ] = None,
    activation: Annotated[
        list[str] | None, typer.Option("--activation", "-a", help="A format for inputs, or 16; again for more.")
    ] = None,
    kv: Annotated[list[str] | None, typer.Option("--kv", help="A format for KV caches; again for more.")] = None,
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
    storage: StudyStorage = None,
    out: Annotated[str | None, typer.Option(help="Folder of the report and the plan.")] = None,
    workers: Workers = None,
    trust_remote_code: Annotated[bool, typer.Option("--trust-remote-code", help="Run the model's own code.")] = False,
    engine: Annotated[
        str | None, typer.Option(help="Whose kernels are timed: onnxruntime, file:profile.json, … (mpsearch targets).")
    ] = None,
    energy: Annotated[str | None, typer.Option(help="Table of picojoules, for budgets of energy.")] = None,
    target: Annotated[
        str | None,
        typer.Option(help="Who will load the plan, such as vllm: only what it holds (mpsearch targets)."),
    ] = None,
    executor: Annotated[str | None, typer.Option(help="Where workers run: local, ray, or database.")] = None,
    ray: Annotated[str | None, typer.Option(help="Address of a Ray cluster; the same as --executor ray there.")] = None,
    quiet: Quiet = False,
    as_json: Json = False,
) -> None:
    """Score, solve, measure, and write the report and the plan.

    mpsearch run ./model --calib calib.txt --budget "weights <= 4.25 bits"

    mpsearch run study.toml
    """
    from mpsearch.spec import StudySpec

    check_name(name)
    given = {
        "name": name, "calibration": calib or None, "validation": validation or None, "estimator": estimator,
        "solver": solver, "tokens": tokens, "validation_tokens": validation_tokens, "length": length,
        "text_key": text_key, "points": points, "random": random, "seed": seed, "storage": storage, "out": out,
        "budgets": tuple(budget) if budget else None, "formats": tuple(format) if format else None,
        "activations": tuple(activation) if activation else None, "kv": tuple(kv) if kv else None,
        "pins": _pins(pin) if pin else None, "trust_remote_code": trust_remote_code or None, "workers": workers,
        "engine": engine, "energy": energy, "target": target, **_where(executor, ray),
    }  # fmt: skip
    values: dict[str, Any] = {key: value for key, value in given.items() if value is not None}
    if not what.startswith(PREFIX) and not Path(what).exists():
        folder = Path(what).parent
        around = [entry.name for entry in folder.iterdir()] if folder.is_dir() else []
        raise InputError(
            "E101",
            f"'{what}' not found{did_you_mean(Path(what).name, around)}",
            advice="give a study file (.toml), a model folder, or bundled:tiny-llama",
        )
    if what.endswith(".toml"):
        spec = StudySpec.load(what, **values)
    else:
        values.setdefault("workers", worker_count(None))
        spec = StudySpec.of(model=what, **values)
    _run(spec, quiet, as_json)


def resume(
    name: Annotated[str, typer.Argument(help="Name of the study.")],
    storage: Storage = DEFAULT_STORAGE,
    workers: Workers = None,
    out: Annotated[str, typer.Option(help="Folder of the report and the plan.")] = "mpsearch-out",
    executor: Annotated[str | None, typer.Option(help="Where workers run: local, ray, or database.")] = None,
    ray: Annotated[str | None, typer.Option(help="Address of a Ray cluster; the same as --executor ray there.")] = None,
    background: Annotated[bool, typer.Option("--background", help="Hand it over and return at once.")] = False,
    remeasure: Annotated[
        bool, typer.Option("--remeasure", help="The machine or versions changed: compute all of it again here.")
    ] = False,
    quiet: Quiet = False,
    as_json: Json = False,
) -> None:
    """Go on with a study that was stopped; what is known is not computed again.

    mpsearch resume tiny-llama

    mpsearch resume tiny-llama --background
    """
    from dataclasses import asdict, replace

    from mpsearch.submitting import submit

    found = open_study(name, storage)
    where = {key: value for key, value in _where(executor, ray).items() if value is not None}
    spec = replace(found.spec, workers=worker_count(workers), out=out, **where)
    if remeasure:
        found.store.control.unlink(name)
    if background:
        submit(spec, found.store)
    status = found.store.control.status(name)
    found.store.close()
    if not background:
        _run(spec, quiet, as_json)
        return
    after = f"mpsearch watch {shlex.quote(name)}{storage_option(storage)}"
    if as_json:
        print_json({**asdict(status), "next": after})
        return
    sys.stdout.write(f"next    {after}\n")


def _where(executor: str | None, ray: str | None) -> dict[str, Any]:
    """Fields of a study that say where its workers run."""
    if ray is None:
        return {"executor": executor}
    if executor not in (None, "ray"):
        raise UsageError("E115", f"--ray and --executor {executor} do not go together")
    return {"executor": "ray", "executor_settings": {"address": ray}}


def demo(
    storage: Storage = DEFAULT_STORAGE,
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
        workers=worker_count(workers),
        storage=storage,
        out=out,
    )
    _run(spec, quiet)
    _export_demo(spec)


def _export_demo(spec: Any) -> None:
    from mpsearch import registry
    from mpsearch.exports.native import payload_bytes
    from mpsearch.model.model import load_model
    from mpsearch.plan import BitPlan

    folder = Path(spec.out) / spec.name
    plan = BitPlan.load(folder / "plan.json")
    files = registry.make("exporters", "native", force=True).write(plan, folder / "native", load_model(spec.model))
    weights = next(path for path in files if path.suffix == ".safetensors")
    sys.stdout.write(f"export  {weights}: {payload_bytes(weights):,} bytes of tensors, {plan.bytes:,} predicted\n")


def _pins(texts: list[str]) -> dict[str, str]:
    pins = {}
    for text in texts:
        pattern, equals, fmt = text.rpartition("=")
        if not equals:
            raise UsageError("E115", f"--pin '{text}' is not LAYER=FORMAT", advice="--pin 'lm_head=int8-channel'")
        pins[pattern] = fmt
    return pins


def _run(spec: Any, quiet: bool, as_json: bool = False) -> None:
    from mpsearch import registry
    from mpsearch.cli.present import present, present_json
    from mpsearch.cli.progress import Progress
    from mpsearch.studying import Study

    progress = Progress(quiet)
    with registry.make("stores", "sql", url=spec.storage) as store:
        study = Study(spec, store)
        study.told = lambda phase, done, total: progress(phase, done, total, study.detail)
        started = time.monotonic()
        with progress.around(study, f"mpsearch resume {shlex.quote(spec.name)}{storage_option(spec.storage)}"):
            study.run()
        (present_json if as_json else present)(study, time.monotonic() - started)
        if store.study(study.name).state == "gaps":
            # Done, but for what the notices name.
            raise typer.Exit(5)
