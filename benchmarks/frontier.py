"""Does mixing pay, and which scores predict? On the bundled model, every estimator at five budgets.

    python -m benchmarks.frontier --workers 2

For each budget: the measured KL of the plan of each estimator, of the best uniform plan of at most the same bytes, of
the next larger uniform plan, and of 20 random plans of the same budget. Then, per estimator, the rank correlation of
predicted and measured KL over all random plans, with a bootstrap interval. Everything is kept in a database, so the
benchmark can be stopped and run again.
"""

from __future__ import annotations

import argparse
import time
from collections.abc import Sequence

import numpy as np
from scipy.stats import spearmanr

import mpsearch as mp
from mpsearch.bundled import BUNDLED
from mpsearch.machine import fingerprint
from mpsearch.studying import Study
from mpsearch.verdict import best_uniform, next_uniform

BUDGETS = ("2.5", "3", "3.5", "4.25", "6")
ESTIMATORS = ("divergence", "fisher", "hessian_trace", "output_mse", "weight_mse")


def study_of(estimator: str, bits: str, args: argparse.Namespace) -> Study:
    return mp.study(
        f"{estimator}-{bits}",
        model=BUNDLED,
        calibration="stdlib:calibration",
        validation="stdlib:validation",
        budgets=[f"weights <= {bits} bits"],
        estimator=estimator,
        tokens=args.tokens,
        validation_tokens=args.validation_tokens,
        points=0,
        random=args.random,
        workers=args.workers,
        storage=args.storage,
    )


def interval(predicted: Sequence[float], measured: Sequence[float]) -> tuple[float, float, float]:
    """Spearman's correlation and its 95 % bootstrap interval over plans."""
    x, y = np.array(predicted), np.array(measured)
    generator = np.random.default_rng(0)
    draws = [generator.integers(0, len(x), len(x)) for _ in range(2000)]
    low, high = np.percentile([spearmanr(x[d], y[d])[0] for d in draws], [2.5, 97.5])
    return float(spearmanr(x, y)[0]), float(low), float(high)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--workers", type=int, default=2)
    parser.add_argument("--tokens", type=int, default=8192)
    parser.add_argument("--validation-tokens", type=int, default=16384)
    parser.add_argument("--random", type=int, default=20)
    parser.add_argument("--storage", default="frontier.db")
    args = parser.parse_args()
    print(f"{fingerprint()}\n")
    pairs: dict[str, list[tuple[float, float, float]]] = {name: [] for name in ESTIMATORS}
    rows = []
    for bits in BUDGETS:
        row: dict[str, str] = {"budget": bits}
        for estimator in ESTIMATORS:
            start = time.perf_counter()
            study = study_of(estimator, bits, args)
            study.run()
            measured = study.measurements
            mixed = measured[0]
            fits = best_uniform(measured, study.budgets[0].limit(study.costs[0]))
            larger = next_uniform(measured, mixed.cost["weights"])
            assert fits is not None
            assert larger is not None
            weights = study.survey.layers.weights
            share = 100 * (1 - mixed.loss / fits.loss)
            row[estimator] = f"{mixed.loss:.4f} ± {mixed.spread:.4f} ({share:+.0f} %)"
            row["uniform"] = (
                f"{fits.loss:.4f} ± {fits.spread:.4f} ({fits.label[8:]}, {8 * fits.cost['weights'] / weights:.3f})"
            )
            row["larger"] = f"{larger.loss:.4f} ({larger.label[8:]}, {8 * larger.cost['weights'] / weights:.3f})"
            drawn = [m.loss for m in measured if m.label.startswith("random")]
            row["random"] = f"{np.median(drawn):.4f} ({min(drawn):.4f} to {max(drawn):.4f})"
            predicted = {item.plan.assignment: item.plan.predicted.loss for item in study.plans}
            for m in measured:
                value = predicted[m.plan]
                if m.label.startswith("random") and value is not None:
                    pairs[estimator].append((value, m.loss, float(bits)))
            print(f"{bits} {estimator}: {time.perf_counter() - start:.0f} s, {study.computed} tasks", flush=True)
            study.store.close()
        rows.append(row)
    columns = ("budget", *ESTIMATORS, "uniform", "larger", "random")
    print("\n| " + " | ".join(columns) + " |\n|" + "---|" * len(columns))
    for row in rows:
        print("| " + " | ".join(row[name] for name in columns) + " |")
    print("\n| estimator | all random plans | within one budget, mean |\n|---|---|---|")
    for name, found in pairs.items():
        rho, low, high = interval([p for p, _, _ in found], [m for _, m, _ in found])
        inside = [
            spearmanr([p for p, _, b in found if b == float(bits)], [m for _, m, b in found if b == float(bits)])[0]
            for bits in BUDGETS
        ]
        print(f"| {name} | {rho:.3f} ({low:.3f} to {high:.3f}, n = {len(found)}) | {np.mean(inside):.3f} |")


if __name__ == "__main__":
    main()
