"""A multiple-choice knapsack as a mixed-integer programme, through PuLP."""

from __future__ import annotations

import math
import shutil
import tempfile
from dataclasses import dataclass
from typing import Literal

import numpy as np
import pulp

from mpsearch.solvers._reduced import Bools, Floats, Ints

Status = Literal["optimal", "infeasible", "stopped", "failed"]
Terms = list[tuple[pulp.LpVariable, float]]

#: Absolute tolerance for whole numbers, in HiGHS for rows too; HiGHS also prunes what gains less than this.
_TOLERANCE = 1e-9
#: Coefficients of a budget are whole numbers up to this, or are scaled to it.
_LARGEST = 2**12


@dataclass(frozen=True, eq=False)
class Model:
    """Choose one offered cell per row: least objective, every use within its limit, no cut broken.

    Attributes:
        objective: (N, F), finite where offered.
        offered: (N, F) cells that may be chosen; at least one per row.
        use: (R, N, F) whole counts.
        limit: (R,) whole counts.
        cuts: sets of cells (N, F), each with the most of them that may be chosen together.
    """

    objective: Floats
    offered: Bools
    use: Ints
    limit: Ints
    cuts: tuple[tuple[Bools, int], ...] = ()


@dataclass(frozen=True, eq=False)
class Outcome:
    """What a backend says.

    Attributes:
        status: ``optimal``, ``infeasible``, ``stopped`` (time) or ``failed`` (no usable answer).
        choice: (N,) cell of each row, or None.
        bound: lower bound on the objective, within the backend's tolerances; -inf when it gives none.
        report: what the backend calls its status, or why it failed.
    """

    status: Status
    choice: Ints | None
    bound: float
    report: str


def solve(model: Model, backend: str, seconds: float) -> Outcome:
    """Solve with one backend, ``highs`` or ``cbc``; its failure is an outcome, not an exception."""
    # PuLP hands CBC 13 digits of every number; budgets are loosened by as much, so that no choice is lost.
    programme, variables, possible = _programme(model, loose=1e-12 if backend == "cbc" else 0.0)
    # Rows with a single cell need no variable.
    choice = model.offered.argmax(axis=1)
    settled = np.flatnonzero(model.offered.sum(axis=1) == 1)
    constant = math.fsum(model.objective[settled, choice[settled]].tolist())
    if not possible:
        return Outcome("infeasible", None, math.inf, "seen before solving")
    if not variables:
        return Outcome("optimal", choice, constant, "nothing left to choose")
    try:
        status, bound, report = (_highs if backend == "highs" else _cbc)(programme, seconds)
    # PuLP and the backends raise all sorts: PulpSolverError, OSError, IndexError after a time-out.
    except Exception as error:
        return Outcome("failed", None, -math.inf, f"{backend}: {type(error).__name__}: {error}")
    if status in ("infeasible", "failed"):
        return Outcome(status, None, -math.inf, f"{backend}: {report}")
    chosen = [cell for cell, variable in variables.items() if (variable.varValue or 0.0) > 0.5]
    complete = len(chosen) == len({i for i, _ in chosen}) == len(choice) - len(settled)
    if status == "optimal" and not complete:
        return Outcome("failed", None, -math.inf, f"{backend}: {report}, but not one cell per row")
    for i, f in chosen:
        choice[i] = f
    return Outcome(status, choice if complete else None, bound + constant, f"{backend}: {report}")


def missing(backend: str) -> str:
    """Say why a backend cannot be used; empty when it can."""
    if backend == "highs":
        return "" if pulp.HiGHS(msg=False).available() else "highspy cannot be imported"
    return "" if _cbc_path() else "there is no cbc, neither in PuLP nor in the path"


def _programme(model: Model, loose: float) -> tuple[pulp.LpProblem, dict[tuple[int, int], pulp.LpVariable], bool]:
    """Return the programme, its variables, and False if it was seen that nothing fits."""
    programme = pulp.LpProblem("allocation", pulp.LpMinimize)
    variables: dict[tuple[int, int], pulp.LpVariable] = {}
    free = model.offered.sum(axis=1) > 1
    for i in np.flatnonzero(free).tolist():
        cells = np.flatnonzero(model.offered[i]).tolist()
        for f in cells:
            variables[i, f] = programme.add_variable(f"x_{i}_{f}", cat=pulp.LpBinary)
        _add(programme, [(variables[i, f], 1.0) for f in cells], pulp.LpConstraintEQ, 1.0)
    losses = [(x, float(model.objective[cell])) for cell, x in variables.items()]
    programme.setObjective(pulp.LpAffineExpression(losses))
    possible = True
    for use, limit in zip(model.use, model.limit.tolist(), strict=True):
        # What a row spends in any case is no matter of choice.
        least = np.where(model.offered, use, np.iinfo(np.int64).max).min(axis=1)
        above = np.where(model.offered, use - least[:, None], 0)
        right = limit - int(least.sum())
        if int(above.max(axis=1).sum()) > right:
            coefficients, top = _small(above, right)
            possible &= right >= 0
            terms = [(variables[i, f], float(coefficients[i, f])) for i, f in np.argwhere(above).tolist()]
            _add(programme, terms, pulp.LpConstraintLE, top + loose * float(coefficients.max(axis=1).sum()))
    for mask, most in model.cuts:
        settled = int((mask & model.offered)[~free].sum())
        possible &= settled <= most
        chosen = np.argwhere(mask & model.offered & free[:, None]).tolist()
        terms = [(variables[i, f], 1.0) for i, f in chosen]
        _add(programme, terms, pulp.LpConstraintLE, float(most - settled))
    return programme, variables, possible


def _add(programme: pulp.LpProblem, terms: Terms, sense: int, right: float) -> None:
    if terms:
        programme.addConstraint(pulp.LpConstraint(pulp.LpAffineExpression(terms), sense=sense, rhs=right))


def _small(use: Ints, limit: int) -> tuple[Floats, float]:
    """Divide by the common divisor, and by a power of two where that leaves large numbers; cuts no choice off."""
    step = int(np.gcd.reduce(use, axis=None)) or 1
    use, limit = use // step, limit // step
    shift = max(0, int(use.max()).bit_length() - _LARGEST.bit_length())
    # Floats hold the counts exactly; the limit may need rounding, which is upwards.
    top = float(limit) if int(float(limit)) >= limit else math.nextafter(float(limit), math.inf)
    return np.ldexp(use.astype(np.float64), -shift), math.ldexp(top, -shift)


def _highs(programme: pulp.LpProblem, seconds: float) -> tuple[Status, float, str]:
    options: dict[str, object] = {
        "random_seed": 1,
        "mip_feasibility_tolerance": _TOLERANCE,
        "dual_feasibility_tolerance": _TOLERANCE,
    }
    solver = pulp.HiGHS(msg=False, gapRel=0.0, gapAbs=0.0, threads=1, timeLimit=seconds, **options)
    programme.solve(solver)
    highs = programme.solverModel
    # PuLP calls a time-out optimal; the backend's own word is taken.
    report = str(highs.modelStatusToString(highs.getModelStatus()))
    bound = float(highs.getInfo().mip_dual_bound)
    if report == "Optimal":
        return "optimal", bound, report
    if report == "Infeasible":
        return "infeasible", math.inf, report
    if report == "Time limit reached":
        return "stopped", bound if math.isfinite(bound) else -math.inf, report
    return "failed", -math.inf, report


def _cbc(programme: pulp.LpProblem, seconds: float) -> tuple[Status, float, str]:
    # With its preprocessing, CBC was seen to call choices optimal that are not, and problems infeasible that are not,
    # where the best choice meets a limit exactly. Without it, CBC is right, but crashes when nothing fits.
    try:
        return _ask_cbc(programme, seconds, "preprocess off")
    except pulp.PulpSolverError:
        status, bound, report = _ask_cbc(programme, seconds)
        return ("stopped", -math.inf, report) if status == "optimal" else (status, bound, report)


def _ask_cbc(programme: pulp.LpProblem, seconds: float, *options: str) -> tuple[Status, float, str]:
    # Without the increment, CBC passes over what gains less than 1e-5.
    settings = ["randomSeed 1", "increment 1e-9", f"integerTolerance {_TOLERANCE}", *options]
    # No threads are asked for: with one, CBC waits 10 seconds now and then.
    solver = pulp.COIN_CMD(
        path=_cbc_path(), msg=False, gapRel=0.0, gapAbs=0.0, timeLimit=min(max(seconds, 0.01), 1e9), options=settings
    )
    # PuLP leaves its files behind when CBC crashes.
    with tempfile.TemporaryDirectory() as folder:
        solver.tmpDir = folder
        programme.solve(solver)
    report = f"{pulp.LpStatus[programme.status]}, {pulp.LpSolution[programme.sol_status]}"
    # PuLP calls a time-out optimal in the one, and a proof that no whole numbers fit "not found" in the other.
    if programme.sol_status == pulp.LpSolutionOptimal:
        return "optimal", float(pulp.value(programme.objective)), report
    if programme.status == pulp.LpStatusInfeasible:
        return "infeasible", math.inf, report
    return "stopped", -math.inf, report


def _cbc_path() -> str:
    bundled = getattr(getattr(pulp, "PULP_CBC_CMD", None), "pulp_cbc_path", "")
    return shutil.which(bundled) or shutil.which("cbc") or ""
