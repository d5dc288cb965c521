"""How long solvers take on random problems with two tight budgets, how much memory, and how far from optimal they end.

python -m benchmarks.solvers [ROWS ...]

Each solver and case runs in a process of its own, with one thread. Time is that of the solver from arrays to a choice,
models built on the way included; CPU is what it took of the processor, which other work on the machine cannot
lengthen. Every choice is checked in exact arithmetic. Gaps are those to the best bound that any
solver here proved, ratios those to the loss of `mckp`.
"""

from __future__ import annotations

import json
import os
import resource
import subprocess
import sys
import time
from collections.abc import Callable
from importlib.util import find_spec

import numpy as np
from numpy.typing import NDArray

from mpsearch import registry
from mpsearch.machine import fingerprint
from mpsearch.problem import Problem

#: Seconds that a rival may take.
LIMIT = 60.0
SIZES = (1_000, 10_000, 100_000, 1_000_000)
#: The most rows that each solver is given, ours first.
SOLVERS = {"mckp": 1_000_000, "lagrangian": 1_000_000, "greedy": 100_000, "ilp": 10_000}
RIVALS = {"PuLP + CBC": 10_000, "HiGHS through scipy": 100_000, "OR-tools CP-SAT": 10_000}
#: Losses are handed to CP-SAT as whole numbers up to this.
WHOLE = 2.0**40

Choice = NDArray[np.int64]


def problem(rows: int, formats: int, seed: int) -> Problem:
    """Convex losses of random height, two costs that grow with the format, limits at 40 % of their range."""
    generator = np.random.default_rng(seed)
    bits = np.arange(2, 2 + formats)
    loss = generator.lognormal(0, 1.5, (rows, 1)) * 4.0**-bits * generator.uniform(0.7, 1.3, (rows, formats))
    size = generator.integers(1, 200, (rows, 1))
    cost = np.stack([size * bits * 8, generator.integers(1, 200, (rows, 1)) * bits]).astype(float)
    least, most = cost.min(axis=2).sum(axis=1), cost.max(axis=2).sum(axis=1)
    return Problem(loss, cost, np.floor(least + 0.4 * (most - least)))


def with_cbc(question: Problem) -> Choice | None:
    """Solve as PuLP's manual has it."""
    import pulp

    rows, formats = question.loss.shape
    model = pulp.LpProblem("allocation", pulp.LpMinimize)
    x = [[model.add_variable(f"x_{i}_{f}", cat=pulp.LpBinary) for f in range(formats)] for i in range(rows)]
    cells = [(i, f) for i in range(rows) for f in range(formats)]
    model.setObjective(pulp.LpAffineExpression([(x[i][f], float(question.loss[i, f])) for i, f in cells]))
    for row in x:
        model += pulp.lpSum(row) == 1
    for table, limit in zip(question.cost, question.limit, strict=True):
        model += pulp.LpAffineExpression([(x[i][f], float(table[i, f])) for i, f in cells]) <= float(limit)
    path = getattr(pulp.PULP_CBC_CMD, "pulp_cbc_path", None)
    model.solve(pulp.COIN_CMD(path=path, msg=False, timeLimit=LIMIT))
    value = np.array([[cell.varValue or 0.0 for cell in row] for row in x])
    return value.argmax(axis=1) if (value.max(axis=1) > 0.5).all() else None


def with_highs(question: Problem) -> Choice | None:
    """Solve with `scipy.optimize.milp` as it comes."""
    from scipy.optimize import Bounds, LinearConstraint, milp
    from scipy.sparse import eye_array, kron

    rows, formats = question.loss.shape
    one_each = kron(eye_array(rows), np.ones((1, formats)), format="csr")
    within = LinearConstraint(question.cost.reshape(len(question.limit), -1), -np.inf, question.limit)
    found = milp(
        question.loss.ravel(),
        integrality=np.ones(rows * formats),
        bounds=Bounds(0, 1),
        constraints=[LinearConstraint(one_each, 1, 1), within],
        options={"time_limit": LIMIT},
    )
    return None if found.x is None else found.x.reshape(rows, formats).argmax(axis=1)


def with_cp_sat(question: Problem) -> Choice | None:
    """Solve with CP-SAT, losses rounded to whole numbers."""
    from ortools.sat.python import cp_model

    rows, formats = question.loss.shape
    whole = np.rint(question.loss * (WHOLE / question.loss.max())).astype(np.int64)
    model = cp_model.CpModel()
    x = [[model.new_bool_var("") for _ in range(formats)] for _ in range(rows)]
    for row in x:
        model.add_exactly_one(row)
    flat = [cell for row in x for cell in row]
    for table, limit in zip(question.cost, question.limit, strict=True):
        model.add(cp_model.LinearExpr.weighted_sum(flat, table.astype(np.int64).ravel().tolist()) <= int(limit))
    model.minimize(cp_model.LinearExpr.weighted_sum(flat, whole.ravel().tolist()))
    solver = cp_model.CpSolver()
    solver.parameters.num_workers = 1
    solver.parameters.max_time_in_seconds = LIMIT
    if solver.solve(model) not in (cp_model.OPTIMAL, cp_model.FEASIBLE):
        return None
    return np.array([[solver.boolean_value(cell) for cell in row] for row in x]).argmax(axis=1)


def with_ours(name: str, question: Problem) -> tuple[Choice | None, float]:
    solution = registry.make("solvers", name).solve(question)
    return (solution.choice if len(solution.choice) else None), solution.bound


def run(name: str, rows: int, seed: int) -> None:
    """Solve one case and print the outcome; this is what the child process does."""
    question = problem(rows, 8, seed)
    rivals: dict[str, Callable[[Problem], Choice | None]] = {
        "PuLP + CBC": with_cbc,
        "HiGHS through scipy": with_highs,
        "OR-tools CP-SAT": with_cp_sat,
    }
    if name in SOLVERS:
        registry.load("solvers", name)
    start, before, bound = time.perf_counter(), sum(os.times()[:4]), -np.inf
    if name in rivals:
        choice = rivals[name](question)
    else:
        choice, bound = with_ours(name, question)
    seconds, busy = time.perf_counter() - start, sum(os.times()[:4]) - before
    # In kB; a backend that is a program of its own holds its memory beside ours.
    memory = sum(resource.getrusage(who).ru_maxrss for who in (resource.RUSAGE_SELF, resource.RUSAGE_CHILDREN))
    loss = None if choice is None else question.total_loss(choice)
    fits = choice is not None and question.fits(choice)
    outcome = {"seconds": seconds, "busy": busy, "memory": memory * 1024, "loss": loss, "fits": fits, "bound": bound}
    print(json.dumps(outcome))


def measure(name: str, rows: int, seed: int) -> dict[str, float] | None:
    """Run one case in a child process; None when it fails."""
    command = [sys.executable, "-m", "benchmarks.solvers", "--one", name, str(rows), str(seed)]
    threads = dict.fromkeys(("OMP_NUM_THREADS", "OPENBLAS_NUM_THREADS", "MKL_NUM_THREADS"), "1")
    done = subprocess.run(command, capture_output=True, text=True, env={**os.environ, **threads}, check=False)
    outcome: dict[str, float] | None = json.loads(done.stdout.splitlines()[-1]) if done.returncode == 0 else None
    return outcome


def lines(rows: int, seed: int) -> list[str]:
    """Lines of the table for one problem, ours first."""
    names = [name for name, most in {**SOLVERS, **RIVALS}.items() if rows <= most]
    found = {name: measure(name, rows, seed) for name in names if name != "OR-tools CP-SAT" or find_spec("ortools")}
    bound = max(outcome["bound"] for outcome in found.values() if outcome)
    ours = found["mckp"]
    assert ours is not None
    table = []
    for name, outcome in found.items():
        start = f"| {rows:,} | {seed} | {name} |"
        if outcome is None or outcome["loss"] is None:
            table.append(
                f"{start} {'failed' if outcome is None else format(outcome['seconds'], '.2f')} | - | - | - | - | - |"
            )
            continue
        loss, seconds = outcome["loss"], outcome["seconds"]
        gap = f"{max(0.0, (loss - bound) / loss):.1e}" if outcome["fits"] else "over budget"
        speed = f"{seconds:.3f} | {outcome['busy']:.2f} | {seconds / ours['seconds']:,.1f}"
        table.append(f"{start} {speed} | {outcome['memory'] / 1e6:,.0f} | {gap} | {loss / ours['loss']:.9f} |")
    return table


def main() -> None:
    if sys.argv[1:2] == ["--one"]:
        run(sys.argv[2], int(sys.argv[3]), int(sys.argv[4]))
        return
    print(fingerprint())
    if not find_spec("ortools"):
        print("OR-tools is not installed: CP-SAT is left out.")
    titles = ("rows x 8, 2 budgets", "seed", "solver", "s", "CPU s", "x mckp", "MB", "gap", "loss / mckp")
    print(f"| {' | '.join(titles)} |\n{'|---' * len(titles)}|")
    for rows in [int(size) for size in sys.argv[1:]] or SIZES:
        for seed in range(3 if rows <= 1000 else 1):
            print("\n".join(lines(rows, seed)), flush=True)


if __name__ == "__main__":
    main()
