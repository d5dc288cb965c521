"""HiGHS and CBC through PuLP."""

from __future__ import annotations

import math
import shutil
import tempfile

import pulp

from mpsearch.solvers._milp import Programme, Status

#: Absolute tolerance for whole numbers, in HiGHS for rows too; HiGHS also prunes what gains less than this.
_TOLERANCE = 1e-9


def missing(backend: str) -> str:
    """Say why a backend cannot be used; empty when it can."""
    if backend == "highs":
        return "" if pulp.HiGHS(msg=False).available() else "highspy cannot be imported"
    return "" if _cbc_path() else "there is no cbc, neither in PuLP nor in the path"


def ask(programme: Programme, backend: str, seconds: float) -> tuple[Status, float, str, list[float]]:
    """Return the status, the bound, the backend's own word, and the value of each variable."""
    written, variables = _written(programme)
    status, bound, report = (_highs if backend == "highs" else _cbc)(written, seconds)
    return status, bound, report, [variable.varValue or 0.0 for variable in variables]


def _written(programme: Programme) -> tuple[pulp.LpProblem, list[pulp.LpVariable]]:
    problem = pulp.LpProblem("allocation", pulp.LpMinimize)
    variables = [
        problem.add_variable(f"x_{k}", lowBound=0, upBound=most, cat=pulp.LpInteger if whole else pulp.LpContinuous)
        for k, (most, whole) in enumerate(zip(programme.most, programme.whole, strict=True))
    ]
    problem.setObjective(pulp.LpAffineExpression(list(zip(variables, programme.cost, strict=True))))
    for found, values, least, most in programme.sums:
        terms = pulp.LpAffineExpression([(variables[k], value) for k, value in zip(found, values, strict=True)])
        sense = pulp.LpConstraintEQ if least == most else pulp.LpConstraintLE
        problem.addConstraint(pulp.LpConstraint(terms, sense=sense, rhs=most))
    return problem, variables


def _highs(problem: pulp.LpProblem, seconds: float) -> tuple[Status, float, str]:
    options: dict[str, object] = {
        "random_seed": 1,
        "mip_feasibility_tolerance": _TOLERANCE,
        "dual_feasibility_tolerance": _TOLERANCE,
    }
    solver = pulp.HiGHS(msg=False, gapRel=0.0, gapAbs=0.0, threads=1, timeLimit=seconds, **options)
    problem.solve(solver)
    highs = problem.solverModel
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


def _cbc(problem: pulp.LpProblem, seconds: float) -> tuple[Status, float, str]:
    # With its preprocessing, CBC was seen to call choices optimal that are not, and problems infeasible that are not,
    # where the best choice meets a limit exactly. Without it, CBC is right, but crashes when nothing fits.
    try:
        return _ask_cbc(problem, seconds, "preprocess off")
    except pulp.PulpSolverError:
        status, bound, report = _ask_cbc(problem, seconds)
        return ("stopped", -math.inf, report) if status == "optimal" else (status, bound, report)


def _ask_cbc(problem: pulp.LpProblem, seconds: float, *options: str) -> tuple[Status, float, str]:
    # Without the increment, CBC passes over what gains less than 1e-5.
    settings = ["randomSeed 1", "increment 1e-9", f"integerTolerance {_TOLERANCE}", *options]
    # No threads are asked for: with one, CBC waits 10 seconds now and then.
    solver = pulp.COIN_CMD(
        path=_cbc_path(), msg=False, gapRel=0.0, gapAbs=0.0, timeLimit=min(max(seconds, 0.01), 1e9), options=settings
    )
    # PuLP leaves its files behind when CBC crashes.
    with tempfile.TemporaryDirectory() as folder:
        solver.tmpDir = folder
        problem.solve(solver)
    report = f"{pulp.LpStatus[problem.status]}, {pulp.LpSolution[problem.sol_status]}"
    # PuLP calls a time-out optimal in the one, and a proof that no whole numbers fit "not found" in the other.
    if problem.sol_status == pulp.LpSolutionOptimal:
        return "optimal", float(pulp.value(problem.objective)), report
    if problem.status == pulp.LpStatusInfeasible:
        return "infeasible", math.inf, report
    return "stopped", -math.inf, report


def _cbc_path() -> str:
    bundled = getattr(getattr(pulp, "PULP_CBC_CMD", None), "pulp_cbc_path", "")
    return shutil.which(bundled) or shutil.which("cbc") or ""
