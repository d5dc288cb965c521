"""The profile of a study: its engine's kernels timed for the passes that its budgets name."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

from mpsearch import registry
from mpsearch.budget import TIMED, Budget
from mpsearch.errors import Notice
from mpsearch.format import Format
from mpsearch.hardware.latency_table import read_profile
from mpsearch.hardware.profile import Profile
from mpsearch.hardware.profiling import Timekeeper, check_offers
from mpsearch.hardware.requests import parse_engine
from mpsearch.wholes import Runner, corrected
from mpsearch.workload import Step, Workload

if TYPE_CHECKING:
    from mpsearch.planning import Planner
    from mpsearch.ports import Store

#: Whose kernels are timed when budgets of time name no engine.
DEFAULT_ENGINE = "onnxruntime"
_FILE = "file:"


def timed_steps(budgets: Sequence[Budget], engine: str) -> tuple[Step, ...]:
    """The passes that budgets of time are made of, and the decode steps of budgets of memory on an engine."""
    steps = [step for b in budgets if b.resource in TIMED for _, step in Workload.parse(b.resource, b.condition).steps]
    if steps or engine:
        # What an engine holds beside the weights is seen in a run of the whole model.
        served = [Workload.parse("tpot", b.condition) for b in budgets if b.resource == "memory"]
        steps += [step for workload in served for _, step in workload.steps]
    return tuple(dict.fromkeys(steps))


def study_profile(
    planner: Planner,
    store: Store,
    report: Callable[[str, int, int], None],
    model: Any = None,
    identity: str = "",
    before: Profile | None = None,
) -> tuple[Profile | None, tuple[Notice, ...]]:
    """Time what the study's budgets need; times that the store holds already are not taken again.

    Args:
        planner: of the study.
        store: where times are kept.
        report: called with (phase, done, total).
        model: folder of the model, for runs of the whole; none for a model that only this process has.
        identity: digest of the model.
        before: the study's own profile of an earlier run.

    Returns:
        The profile, none when nothing is timed and no engine is named, and what to know about it.

    Raises:
        InputError: an engine that is not installed (E432), a table that cannot be read (E101, E433) or lacks layers
            (E434), a layer without any kernel (E431), too many threads (E435).
    """
    steps = timed_steps((*planner.asked, *planner.budgets), planner.spec.engine)
    text = planner.spec.engine or (DEFAULT_ENGINE if steps else "")
    if not text:
        return None, ()
    formats = tuple(dict.fromkeys([*planner.formats, Format.parse("bf16")]))
    if text.startswith(_FILE):
        profile = read_profile(Path(text.removeprefix(_FILE)))
        check_offers(planner.layers, planner.menu, profile.made, planner.pins)
        return profile, (_of_another(profile),)
    name, settings, threads, count = parse_engine(text)
    check_offers(planner.layers, planner.menu, registry.make("engines", name, **settings), planner.pins)

    keeper = Timekeeper(
        threads=threads,
        before=before,
        known=lambda key: store.get("kernel_time", key),
        # A time is never the same twice, so two that are taken at once are no conflict.
        keep=lambda key, body: store.put("kernel_time", key, {"kernel": body["kernel"]}, volatile=body),
        report=lambda done, total: report("profile", done, total),
    )
    profile, notices = keeper.profile(name, settings, planner.layers, formats, steps)
    if profile.origin == "modelled":
        return profile, notices
    if steps and (model is None or name not in registry.names("wholes")):
        why = f"{name} runs no whole models here" if model is not None else "the model is not a folder"
        return profile, (*notices, Notice("W431", f"latency is the sum of kernels, not corrected: {why}"))
    runner = Runner(
        model,
        identity,
        threads,
        before=before if before and before.identity == profile.identity else None,
        known=lambda key: store.get("whole_time", key),
        keep=lambda key, body: store.put("whole_time", key, {"step": body["step"]}, volatile=body),
        report=lambda done, total: report("whole", done, total),
    )
    profile, more = corrected(runner, profile, planner.layers, planner.formats, steps, count)
    return profile, (*notices, *more)


def _of_another(profile: Profile) -> Notice:
    machine = profile.identity.get("processor") or profile.identity.get("table", "a table")
    gpu = profile.identity.get("gpu", "none")
    where = machine if gpu == "none" else gpu
    return Notice("W434", f"latency is that of the named table ({profile.engine}, {where}), whatever this machine is")
