"""Does `mp.solve` give a valid plan or one of our errors for any table? Checked in fractions, against every choice.

    python -m benchmarks.fuzz_solve --tables 10000

Tables hold NaN, infinities, negatives, zeros, ties, subnormals, 1e308 and missing cells. What is called optimal is held
against all choices; with more of every budget the optimum must not get worse; what is called infeasible must be so.
"""

from __future__ import annotations

import argparse
import itertools
import math
import random
import sys
import time
import traceback
from collections import Counter
from fractions import Fraction
from typing import NamedTuple

import mpsearch as mp
from mpsearch.errors import MpsearchError

_TIED = (0.0, 1.0, 1.0, 2.0)
_ODD = (
    math.nan,
    math.inf,
    -math.inf,
    -1.0,
    -0.0,
    5e-324,
    2.2e-308,
    1e-300,
    1e300,
    1e308,
    1.7e308,
    -1e308,
    0.1,
    2.0**53,
)
#: What a plan that is called optimal may be above the least loss, as a share of it.
_GAP = Fraction(1, 10**9)


class Table(NamedTuple):
    """A problem: (N, F) losses, (R, N, F) costs, (R,) limits."""

    loss: list[list[float]]
    cost: list[list[list[float]]]
    limit: list[float]


def number(rng: random.Random, odd: float) -> float:
    draw = rng.random()
    if draw < odd:
        return rng.choice(_ODD)
    return (
        rng.choice(_TIED) if draw < 0.6 else rng.choice((rng.random(), float(rng.randrange(100)), rng.expovariate(1)))
    )


def table(seed: int) -> Table:
    rng = random.Random(seed)
    rows, formats, resources = rng.randrange(1, 6), rng.randrange(1, 5), rng.choice((1, 1, 2))
    # Most tables are sound but for a cell or two: one of nonsense is refused for its first.
    odd, odd_cost = rng.choice((0.0, 0.05, 0.3)), rng.choice((0.0, 0.0, 0.02, 0.2))
    loss = [[number(rng, odd) for _ in range(formats)] for _ in range(rows)]
    cost = [[[number(rng, odd_cost) for _ in range(formats)] for _ in range(rows)] for _ in range(resources)]
    limit = [number(rng, odd_cost / 2) * rng.choice((1, rows)) for _ in range(resources)]
    return Table(loss, cost, limit)


def exact(given: Table, choice: tuple[int, ...]) -> tuple[Fraction, bool]:
    """Loss of a choice, and whether it keeps every limit, without any rounding."""
    loss = sum((Fraction(given.loss[i][j]) for i, j in enumerate(choice)), Fraction(0))
    kept = all(
        limit == math.inf
        or (limit > -math.inf and sum(Fraction(cost[i][j]) for i, j in enumerate(choice)) <= Fraction(limit))
        for cost, limit in zip(given.cost, given.limit, strict=True)
    )
    return loss, kept


def least(given: Table) -> Fraction | None:
    """The least loss of any choice; None when none fits."""
    offered = [[j for j, loss in enumerate(row) if math.isfinite(loss)] for row in given.loss]
    found = (exact(given, choice) for choice in itertools.product(*offered))
    return min((loss for loss, kept in found if kept), default=None)


def solved(given: Table) -> tuple[str, Fraction | None]:
    """Solve, check the answer, and return its status and loss, or the code of the error.

    Raises:
        AssertionError: the answer is wrong.
    """
    try:
        solution = mp.solve(given.loss, given.cost, given.limit)
    except MpsearchError as error:
        return error.code, None
    best = least(given)
    if solution.status not in ("optimal", "feasible"):
        assert solution.status != "infeasible" or best is None, f"{solution.status}, but {best} fits"
        return solution.status, None
    loss, kept = exact(given, tuple(solution.choice.tolist()))
    assert kept, "a limit is not kept"
    assert best is not None
    assert loss >= best
    if solution.status == "optimal":
        assert loss - best <= _GAP * abs(best) + Fraction(5e-324), (
            f"called optimal at {float(loss)}, {float(best)} is there"
        )
    return solution.status, loss


def attempt(seed: int) -> str:
    """Solve one table, and again with more of every budget; return the status, or what went wrong."""
    given = table(seed)
    try:
        status, loss = solved(given)
        more = given._replace(
            limit=[limit + abs(limit) * 0.5 if math.isfinite(limit) else limit for limit in given.limit]
        )
        again, other = solved(more) if all(map(math.isfinite, more.limit)) else ("", None)
        if status == again == "optimal" and loss is not None and other is not None:
            assert other - loss <= _GAP * abs(loss) + Fraction(5e-324), "more budget, and a worse optimum"
        assert not (status == "optimal" and again == "infeasible"), "more budget, and nothing fits"
        return status
    except Exception:
        return f"seed {seed}\n{traceback.format_exc(limit=-3)}"


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--tables", type=int, default=10_000)
    parser.add_argument("--first", type=int, default=0, help="first seed")
    args = parser.parse_args()
    start, found = time.perf_counter(), Counter[str]()
    for seed in range(args.first, args.first + args.tables):
        ended = attempt(seed)
        if "\n" in ended:
            sys.stdout.write(ended)
            ended = "fault"
        found[ended] += 1
    sys.stdout.write(f"{args.tables} tables in {time.perf_counter() - start:.0f} s\n")
    for name, count in found.most_common():
        sys.stdout.write(f"{name:<12} {count:>7}\n")
    sys.exit(1 if found["fault"] else 0)


if __name__ == "__main__":
    main()
