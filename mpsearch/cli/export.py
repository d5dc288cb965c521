"""``mpsearch export``: a plan in the language of another tool, and the proof that the tool takes it."""

from __future__ import annotations

import json
import sys
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import typer

from mpsearch.cli.options import DEFAULT_STORAGE, Budgets, Storage, open_study
from mpsearch.errors import InputError, UsageError

if TYPE_CHECKING:
    from collections.abc import Sequence

    from mpsearch.plan import BitPlan
    from mpsearch.studying import Study
    from mpsearch.tasks import Setup


def export(
    name: Annotated[str, typer.Argument(help="Name of the study, or a plan file (.json).")],
    to: Annotated[str, typer.Option(help="Name of the exporter; `mpsearch targets` lists them.")] = "native",
    out: Annotated[Path, typer.Option(help="Folder to write to.")] = Path("exported"),
    budget: Budgets = None,
    storage: Storage = DEFAULT_STORAGE,
    weights: Annotated[bool, typer.Option(help="Write the packed weights as well, where the export has them.")] = True,
    model: Annotated[str, typer.Option(help="Model folder, when it is not where the study had it.")] = "",
    force: Annotated[bool, typer.Option("--force", help="Replace files that an earlier export wrote.")] = False,
    verify: Annotated[
        bool, typer.Option("--verify", help="Have the target's own library read the export back.")
    ] = False,
    python: Annotated[str, typer.Option(help="With --verify: interpreter that has the target's library.")] = "",
    target_version: Annotated[str, typer.Option(help="Version of the target; the tested one by default.")] = "",
    assume: Annotated[str, typer.Option(help="Version whose facts count where none are known.")] = "",
    substitute: Annotated[
        bool, typer.Option("--substitute", help="Solve again with only what the target holds, and say what changed.")
    ] = False,
    setting: Annotated[list[str] | None, typer.Option("--set", help="Setting of the exporter, NAME=VALUE.")] = None,
) -> None:
    """Write a plan for another tool, and have that tool read it back.

    mpsearch export tiny-llama --budget 'weights <= 3.5 bits' --to native --out exported

    mpsearch export tiny-llama --to compressed-tensors --out quantised --verify
    """
    from dataclasses import replace

    from mpsearch import registry
    from mpsearch.capabilities import capabilities
    from mpsearch.capabilities import targets as able_targets
    from mpsearch.cli.own_tables import read_settings
    from mpsearch.exports.verify import check_model
    from mpsearch.plan import BitPlan

    if python and not verify:
        raise UsageError("E115", "--python says who reads the export back", advice="add --verify")
    if to not in registry.names("exporters") and to in able_targets():
        writers = [other.target for other in capabilities(to).based_on]
        raise InputError("E107", f"{to} loads what another exporter writes", advice=f"--to {' or '.join(writers)}")
    chosen: dict[str, Any] = {"force": force, "version": target_version, "assume": assume}
    known = registry.settings("exporters", to)
    given = {key: value for key, value in chosen.items() if value and (key in known or key != "force")}
    exporter = registry.make("exporters", to, **given, **read_settings(setting or []))
    if name.endswith(".json") and substitute:
        raise UsageError(
            "E115",
            "--substitute solves again, and a plan file holds no scores to solve on",
            advice="export by the name of its study",
        )
    if name.endswith(".json"):
        plan, source, setup = BitPlan.load(name), model, None
    else:
        study = open_study(name, storage)
        try:
            plan, source = study.plan(*(budget or [])), model or study.spec.model
            if substitute:
                plan = _substituted(study, plan, to, budget or [])
            setup = replace(study.spec.setup, model=source)
        finally:
            study.store.close()
    folder = _folder(source) if source else ""
    reads = getattr(exporter, "reads", "")
    # Who reads the model looks whose it is; a configuration needs none, and one that has moved does not stop it.
    if folder and not reads and Path(folder).is_dir():
        check_model(plan, folder)
    calibrated = any(fmt.calibrated for fmt in plan.formats.values())
    loaded = None
    if folder and weights and (reads == "model" or (reads == "folder" and calibrated)):
        loaded = _load(name, plan, folder, setup, calibrated)
    elif folder and "source" in known:
        # It reads the folder itself, and looks whether it is the plan's.
        exporter = replace(exporter, source=folder)
    if reads == "model" and weights and loaded is None:
        sys.stderr.write("no weights are written: name the model's folder with --model, or pass --no-weights\n")
    for path in exporter.write(plan, out, loaded):
        sys.stdout.write(f"{path}\n")
    for note in exporter.notes(plan) if hasattr(exporter, "notes") else ():
        sys.stderr.write(f"note: {note}\n")
    if verify:
        if not folder:
            raise UsageError("E113", "--verify needs the model to compare with", advice="name its folder: --model")
        _verify(to, exporter, plan, out, loaded or _model_for(name, plan, folder, setup, calibrated), folder, python)


def _substituted(study: Study, plan: BitPlan, to: str, budgets: Sequence[str]) -> BitPlan:
    """The plan of the same budgets with only what the target holds; prints what that changes and what it costs."""
    from mpsearch.capabilities import capabilities

    target = study.spec.target
    # A study for an engine stays one for that engine.
    for_engine = target and to in [other.target for other in capabilities(target).based_on]
    found = study.plan_for(target if for_engine else to, *budgets)
    differs = plan.compare(found)
    for layer, before, after in differs:
        sys.stderr.write(f"instead: {layer}: {after}, not {before}\n")
    if differs and plan.loss is not None and found.loss is not None:
        cost = f"{found.loss - plan.loss:+.4g} {plan.predicted.unit} of predicted loss"
        sys.stderr.write(
            f"{len(differs)} layers differ; {to} costs {cost} ({plan.loss:.4g} to {found.loss:.4g}); "
            f"{found.stored_bytes:,} bytes as stored there\n"
        )
    return found


def _folder(source: str) -> str:
    from mpsearch.bundled import resolve_model

    return resolve_model(source, Path.cwd())


def _model_for(name: str, plan: BitPlan, folder: str, setup: Setup | None, calibrated: bool) -> Any:
    """The model to compare with: its folder will do unless rounding needs calibration data."""
    return _load(name, plan, folder, setup, calibrated) if calibrated else folder


def _load(name: str, plan: BitPlan, folder: str, setup: Setup | None, calibrated: bool) -> Any:
    from dataclasses import replace

    from mpsearch.evaluate.workbench import Workbench
    from mpsearch.model.model import load_model

    if calibrated and setup is None:
        raise InputError(
            "E422",
            f"'{name}' has formats that are made from calibration data, which a plan does not hold",
            advice="export it by the name of its study",
        )
    loaded = Workbench.load(replace(setup, model=folder)).model if calibrated and setup else load_model(folder)
    if loaded.digest != plan.model.get("digest"):
        raise InputError(
            "E302", f"the plan is for another model than '{folder}'", advice="give the model's folder: --model"
        )
    return loaded


def _verify(to: str, exporter: Any, plan: BitPlan, out: Path, model: Any, folder: str, python: str) -> None:
    from mpsearch.exports.folder import VERIFIED
    from mpsearch.exports.verify import verify
    from mpsearch.files import write_file

    bound = exporter.bound(plan) if hasattr(exporter, "bound") else None
    found = verify(to, plan, out, model, folder, python, bound)
    write_file(out / VERIFIED, json.dumps(found.to_json(), indent=1) + "\n")
    for difference in found.differences[:20]:
        sys.stderr.write(f"not as planned: {difference}\n")
    for note in found.notes:
        sys.stderr.write(f"note: {note}\n")
    if found.kl is not None:
        theirs, ours = found.kl
        limit = f" (at most {bound:.2g} passes)" if bound is not None else "; they need not be ours"
        sys.stdout.write(
            f"loss    {theirs:.6g} nats/token from the original there, {ours:.6g} in our simulation, on 64 random "
            f"tokens; logits differ by {found.largest:.2g} of the largest{limit}\n"
        )
    if not found.passed:
        raise InputError(
            "E308",
            f"{found.library} {found.version} reads {len(found.differences)} things that are not as planned",
            because=str(found.differences[0]),
            advice="do not ship it; export again, and report it if that does not help",
        )
    ran = "verified by" if found.ran else "read back, not run, by"
    sys.stdout.write(f"{ran} {found.library} {found.version}: {found.tensors} tensors as planned\n")
