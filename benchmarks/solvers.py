"""How long solvers take on random problems with two tight budgets, and how far from the bound they end.

python -m benchmarks.solvers
"""

from __future__ import annotations

import statistics
import time

import numpy as np

from mpsearch import registry
from mpsearch.machine import fingerprint
from mpsearch.problem import Problem


def problem(rows: int, formats: int, seed: int) -> Problem:
    """Convex losses of random height, two costs that grow with the format, limits at 40 % of their range."""
    generator = np.random.default_rng(seed)
    bits = np.arange(2, 2 + formats)
    loss = generator.lognormal(0, 1.5, (rows, 1)) * 4.0**-bits * generator.uniform(0.7, 1.3, (rows, formats))
    size = generator.integers(1, 200, (rows, 1))
    cost = np.stack([size * bits * 8, generator.integers(1, 200, (rows, 1)) * bits]).astype(float)
    least, most = cost.min(axis=2).sum(axis=1), cost.max(axis=2).sum(axis=1)
    return Problem(loss, cost, np.floor(least + 0.4 * (most - least)))


def main() -> None:
    print(fingerprint())
    print("| rows x formats, 2 budgets | solver | median s | worst s | worst gap | proven |\n|---|---|---|---|---|---|")
    cases = [
        (rows, name, settings, 5)
        for rows in (25, 300, 1000)
        for name, settings in (("ilp", {}), ("ilp", {"backend": "cbc"}), ("greedy", {}), ("bound", {}))
    ]
    cases += [(100_000, name, {}, 1) for name in ("greedy", "bound")]
    for rows, name, settings, repeat in cases:
        times, gaps, proven = [], [], 0
        for seed in range(repeat):
            question = problem(rows, 8, seed)
            start = time.perf_counter()
            solution = registry.make("solvers", name, **settings).solve(question)
            times.append(time.perf_counter() - start)
            gaps.append(solution.gap)
            proven += solution.status == "optimal"
        title = f"{name} ({settings['backend']})" if settings else name
        print(
            f"| {rows:,} x 8 | {title} | {statistics.median(times):.2f} | {max(times):.2f} | {max(gaps):.1e} | "
            f"{proven} of {repeat} |",
            flush=True,
        )


if __name__ == "__main__":
    main()
