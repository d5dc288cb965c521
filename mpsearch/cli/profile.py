"""The commands about hardware: timing kernels on this machine, and listing what prices a plan."""

from __future__ import annotations

import json
import sys
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import typer

from mpsearch.cli.options import Json, Quiet, plain
from mpsearch.errors import InputError, UsageError

if TYPE_CHECKING:
    from mpsearch.hardware.profile import Profile
    from mpsearch.layer import Layers


def profile(
    model: Annotated[str, typer.Argument(help="A model folder, or a file of `mpsearch layers MODEL --json`.")],
    formats: Annotated[list[str] | None, typer.Option("--formats", "-f", help="Again for more.")] = None,
    workload: Annotated[
        list[str] | None, typer.Option("--workload", "-w", help="Such as 'tpot at context 2048'; again for more.")
    ] = None,
    engine: Annotated[str, typer.Option(help="Whose kernels; mpsearch targets lists them.")] = "onnxruntime",
    out: Annotated[Path, typer.Option(help="File to write.")] = Path("profile.json"),
    limit: Annotated[float, typer.Option(help="Seconds for one kernel at most.")] = 2.0,
    ray: Annotated[str, typer.Option(help="Run on a node of this Ray cluster: its address, or auto.")] = "",
    on: Annotated[str, typer.Option(help="With --ray: the custom resource that the node has.")] = "",
    quiet: Quiet = False,
    as_json: Json = False,
) -> None:
    """Time an engine's kernels for every layer and format, on this machine, into a table for studies elsewhere.

    mpsearch profile ./model -f int4-g64 -f int8-g64 -w 'tpot at context 2048' -w 'ttft at prompt 512'

    mpsearch run ./model --engine file:profile.json --budget 'tpot <= 14 ms at context 2048' …
    """
    from mpsearch.hardware.profile import Profile
    from mpsearch.hardware.requests import profile_request
    from mpsearch.spec import DEFAULT_FORMATS

    if out.suffix != ".json":
        raise UsageError("E115", f"--out '{out}'", advice="end it with .json")
    if not limit > 0:
        raise UsageError("E115", f"--limit {limit:g}", advice="give seconds above 0")
    if bool(ray) != bool(on):
        raise UsageError("E115", "--ray and --on go together", advice="--ray auto --on phone")
    request = {
        "layers": _layers(model).to_json(),
        "formats": list(formats or DEFAULT_FORMATS),
        "workloads": list(workload or ["tpot at context 512", "ttft at prompt 512"]),
        "engine": engine,
        "limit": limit,
    }
    if ray:
        from mpsearch.executors.ray import run_on

        answer = run_on(ray, on, profile_request, request)
    else:
        answer = _with_progress(request, quiet or as_json)
    found, notices = Profile.from_json(answer["profile"]), answer["notices"]
    if not any(time.status == "ok" for time in found.times):
        reason = next((time.reason for time in found.times if time.reason), "no layer takes the formats")
        raise InputError("E431", f"no kernel of {found.engine} could be timed: {reason}")
    found.save(out)
    for notice in notices:
        sys.stderr.write(f"{plain(notice)}\n")
    if as_json:
        sys.stdout.write(json.dumps(found.to_json(), indent=1) + "\n")
        return
    _print(found)
    sys.stdout.write(f"\nwritten     {out}\nuse         mpsearch run … --engine file:{out}\n")


def targets(as_json: Json = False) -> None:
    """List what prices a plan: resources that budgets can name, and the engines whose kernels can be timed.

    mpsearch targets
    """
    from rich.table import Table
    from rich.text import Text

    from mpsearch.cli.show import console

    resources, engines = list(_resources()), list(_engines())
    if as_json:
        sys.stdout.write(json.dumps({"resources": resources, "engines": engines}, indent=1) + "\n")
        return
    out = console()
    table = Table("budget", "unit", "what it counts", title="Resources", title_justify="left", box=None)
    for row in resources:
        table.add_row(Text(row["budget"]), Text(row["units"]), Text(row["what"]))
    out.print(table)
    out.print()
    table = Table("engine", "here", "what it times", title="Engines", title_justify="left", box=None)
    for row in engines:
        table.add_row(Text(row["name"]), Text(row["missing"] or "yes"), Text(row["does"]))
    out.print(table)
    out.print()
    out.print("An engine of yours on another machine: mpsearch profile there, and engine = 'file:profile.json' here.")


def _layers(model: str) -> Layers:
    """Layers of a model, or of a file that lists them: that needs neither torch nor the model."""
    from mpsearch.layer import Layers

    path = Path(model)
    if path.suffix == ".json" and path.is_file():
        try:
            return Layers.from_json(json.loads(path.read_text(encoding="utf-8")))
        except (KeyError, TypeError, ValueError) as error:
            raise InputError(
                "E433", f"'{model}' is no list of layers: {error}", advice="mpsearch layers MODEL --json > layers.json"
            ) from error
    from mpsearch import api
    from mpsearch.bundled import resolve_model

    return api.layers(resolve_model(model, Path.cwd()))


def _with_progress(request: Mapping[str, Any], quiet: bool) -> dict[str, Any]:
    from mpsearch.cli.progress import Progress
    from mpsearch.hardware.requests import profile_request

    progress = Progress(quiet)
    try:
        return profile_request(request, lambda done, total: progress("profile", done, total))
    finally:
        progress.end()


def _print(found: Profile) -> None:
    from rich.table import Table
    from rich.text import Text

    from mpsearch.cli.show import console

    table = Table("kernel", "tokens", "format", "us", "95 % interval", "", title=f"Kernels of {found.engine}", box=None)
    for column in (1, 3):
        table.columns[column].justify = "right"
    for time in found.times:
        kernel = time.kernel
        shape = f"{kernel.kind} {kernel.rows} x {kernel.columns}"
        bad = time.status != "ok"
        figures = ("", time.status) if bad else (f"{time.seconds * 1e6:,.1f}", _interval(time.low, time.high))
        table.add_row(shape, f"{kernel.tokens}", kernel.format, *figures, Text(time.reason or time.noise))
    console().print(table)


def _interval(low: float, high: float) -> str:
    return f"{low * 1e6:,.1f} to {high * 1e6:,.1f}"


def _resources() -> Iterator[dict[str, str]]:
    from mpsearch.budget import units

    rows = (
        ("weights <= 4.25 bits", "weights", "stored bytes of the whole model: exact"),
        ("memory <= 8 GiB at context 8192, batch 4", "memory", "weights and KV caches: exact; activations: modelled"),
        ("kv <= 2 GiB at context 8192", "kv", "KV caches alone: exact"),
        ("bops <= 60 %", "bops", "multiply-adds times bits of both factors: modelled"),
        ("ttft <= 180 ms at prompt 512", "ttft", "time to the first token: measured kernels"),
        ("tpot <= 14 ms at context 2048", "tpot", "time of each further token: measured kernels"),
        ("latency <= 2 s at prompt 512, output 128", "latency", "whole requests, or a mix of them: measured kernels"),
        ("traffic <= 1 GB at context 2048", "traffic", "bytes that a decode step reads: modelled"),
        ("energy <= 3 mJ at context 2048", "energy", "by your own table of picojoules: modelled"),
    )
    for budget, resource, what in rows:
        yield {"budget": budget, "units": " ".join(units(resource)), "what": what}


def _engines() -> Iterator[dict[str, Any]]:
    from mpsearch import registry

    whole = registry.names("wholes")
    for name in registry.names("engines"):
        made = registry.load("engines", name)
        # A roofline cannot be set up without its figures; it needs nothing to be installed.
        missing = "" if name == "roofline" else made().missing()
        advice = f"{missing}: pip install 'mpsearch[{made.extra}]'" if missing and made.extra else missing
        yield {
            "name": name,
            "missing": advice,
            "does": (made.__doc__ or "").strip().splitlines()[0].rstrip(".:"),
            "settings": [*registry.settings("engines", name), "threads", *(["wholes"] if name in whole else [])],
        }
