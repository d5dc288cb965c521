"""The commands about hardware: timing kernels on this machine, and listing what prices a plan."""

from __future__ import annotations

import json
import sys
from collections.abc import Mapping
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

    mpsearch run ./model --engine file:profile.json --budget 'tpot <= 14 ms at context 2048'
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
