"""What a study that was run here leaves: tables for people or one JSON object, the report and the plan."""

from __future__ import annotations

import math
import shlex
import sys
from pathlib import Path
from typing import TYPE_CHECKING

from mpsearch.cli.options import print_json, storage_option

if TYPE_CHECKING:
    from mpsearch.studying import Study


def present(study: Study, seconds: float) -> None:
    """Print what a study found, write its report and plan, and say what to type next.

    Args:
        study: one that has run.
        seconds: how long that took.
    """
    from mpsearch.cli.lines import price_lines
    from mpsearch.cli.show import console, front_table, layer_lines, safe
    from mpsearch.verdict import verdict

    out = console()
    layers = study.survey.layers
    out.print(
        f"{len(layers)} layers in {len(layers.decisions)} decisions, {layers.weights:,} weights; "
        f"{study.computed} tasks computed in {seconds:.1f} s",
        markup=False,
    )
    for line in layer_lines(layers):
        out.print(safe(f"  {line}"), markup=False)
    for notice in study.notices:
        out.print(safe(notice), markup=False)
    chosen, measurements = study.plans[0], study.measurements
    out.print()
    out.print(front_table(measurements, study.front, layers.weights, chosen.plan.assignment))
    out.print()
    for line in verdict(chosen, measurements, study.costs):
        out.print(safe(line), markup=False)
    for line in price_lines(chosen.plan):
        sys.stdout.write(f"{line}\n")
    report, plan = _outputs(study)
    solve, export = _next(study)
    after = f"{solve}\n        {export}" if solve else export
    sys.stdout.write(f"\nreport  {report}\nplan    {plan}\nnext    {after}\n")


def present_json(study: Study, seconds: float) -> None:
    """The same as one JSON object: what `mpsearch show NAME --json` prints, and how the run went.

    Args:
        study: one that has run.
        seconds: how long that took.
    """
    from mpsearch.cli.show import study_json

    report, plan = _outputs(study)
    print_json(
        {
            **study_json(study),
            "state": study.store.study(study.name).state,
            "computed": study.computed,
            "seconds": seconds,
            "notices": [{"code": notice.code, "message": notice.message} for notice in study.notices],
            "report": str(report),
            "plan_file": str(plan),
            "next": [line for line in _next(study) if line],
        }
    )


def _outputs(study: Study) -> tuple[Path, Path]:
    from mpsearch.outputs import write_outputs

    return write_outputs(study)


def _next(study: Study) -> tuple[str, str]:
    """Commands that go on from here: solve for another budget, where there are scores, and export."""
    storage, name = storage_option(study.spec.storage), shlex.quote(study.name)
    # Half a bit more than the chosen plan has can always be kept.
    budget = f"weights <= {math.ceil(10 * study.plans[0].plan.bits) / 10 + 0.5:.1f} bits"
    solve = f"mpsearch solve {name} --budget '{budget}'{storage}" if study.scored else ""
    return solve, f"mpsearch export {name} --to {_exporter_for(study.spec.target)} --out exported{storage}"


def _exporter_for(target: str) -> str:
    """Name of the exporter that writes what a target loads."""
    from mpsearch import registry
    from mpsearch.capabilities import capabilities

    if not target or target in registry.names("exporters"):
        return target or "native"
    return capabilities(target).based_on[0].target
