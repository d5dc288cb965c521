"""Every solver on the bundled model under two budgets, weights and BOPs: gap, time and measured loss of its plans.

    python -m benchmarks.solver_fronts

Scores are those of `fisher`; inputs may be rounded to int8. Plans are measured on 16,384 validation tokens, each once.
"""

from __future__ import annotations

import argparse
import time

import mpsearch as mp
from mpsearch import registry
from mpsearch.budget import parse_budgets
from mpsearch.bundled import BUNDLED
from mpsearch.front import Measurement
from mpsearch.machine import fingerprint
from mpsearch.planning import Labelled

BUDGETS = ((2.5, 14), (3.0, 16), (3.5, 18), (4.25, 21), (6.0, 30))


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--workers", type=int, default=2)
    parser.add_argument("--storage", default="sqlite://")
    args = parser.parse_args()
    print(f"{fingerprint()}\n")
    study = mp.study(
        "fronts",
        model=BUNDLED,
        calibration="stdlib:calibration",
        validation="stdlib:validation",
        formats=[f"int{bits}-g64" for bits in range(2, 9)],
        activations=["16", "int8-token"],
        budgets=["weights <= 4.25 bits", "bops <= 21 %"],
        estimator="fisher",
        points=0,
        workers=args.workers,
        storage=args.storage,
    )
    print("| weights, bits; BOPs, % | solver | status | gap | predicted | seconds | measured KL |")
    print("|---|---|---|---:|---:|---:|---:|")
    with study.session() as session:
        scores, _ = session.score("fisher")
        measured: dict[str, Measurement] = {}
        for bits, share in BUDGETS:
            budgets = parse_budgets([f"weights <= {bits} bits", f"bops <= {share} %"])
            problem = session.planner.problem(scores, budgets)
            for name in registry.names("solvers"):
                title = f"| {bits}; {share} | {name}"
                solver = registry.make("solvers", name)
                if reason := solver.refuses(problem):
                    print(f"{title} | refuses: {reason} | | | | |", flush=True)
                    continue
                start = time.perf_counter()
                solution = solver.solve(problem)
                seconds = time.perf_counter() - start
                if not len(solution.choice):
                    print(f"{title} | {solution.status} | | | {seconds:.3f} | |", flush=True)
                    continue
                plan = session.planner.from_choice(solution.choice, {"solver": name})
                if plan.assignment not in measured:
                    measured[plan.assignment] = session.measure([Labelled(name, plan)], phase="")[plan.key]
                found = measured[plan.assignment]
                figures = f"{solution.status} | {solution.gap:.1e} | {solution.loss:.4f} | {seconds:.3f}"
                print(f"{title} | {figures} | {found.loss:.4f} ± {found.spread:.4f} |", flush=True)


if __name__ == "__main__":
    main()
