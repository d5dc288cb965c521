"""What ``mpsearch solve --table`` does: other people's tables in, choices out."""

from __future__ import annotations

import csv
import json
import math
import sys
import tomllib
from collections.abc import Sequence
from dataclasses import asdict
from pathlib import Path
from typing import TYPE_CHECKING, Any

from mpsearch.errors import InfeasibleError, InputError, UsageError

if TYPE_CHECKING:
    from mpsearch.problem import Problem, Solution
    from mpsearch.robust import Doubt
    from mpsearch.rules import Rules


def solve_tables(
    table: Path,
    costs: Sequence[Path],
    budgets: Sequence[str],
    *,
    solver: str,
    settings: Sequence[str],
    rules: Path | None,
    goal: str,
    most_loss: float | None,
    cautious: float,
    errors: str,
    out: Path | None,
    as_json: bool,
) -> None:
    """Solve a user's own tables and print, or write, the choice.

    Raises:
        InfeasibleError: nothing fits (E203), with the smallest limits and what the rules cost.
    """
    from mpsearch.cli.lines import doubt_lines
    from mpsearch.own_tables import read_tables
    from mpsearch.robust import doubts
    from mpsearch.rules import Rules
    from mpsearch.solving import shortage, solve_problem

    _check_out(out, [table, *costs, *([rules] if rules else [])])
    found = read_tables(table, costs)
    problem = found.problem(budgets)
    held = read_rules(rules) if rules else Rules()
    solution = solve_problem(
        problem,
        solver,
        read_settings(settings),
        rules=held,
        goal=goal,
        most_loss=math.inf if most_loss is None else most_loss,
        spread=found.spread,
        by=cautious,
        errors=errors,
    )
    if solution.status == "infeasible":
        lines = shortage(problem, held).sentences
        raise InfeasibleError(
            "E203", f"nothing fits: {solution.stats.get('reason', 'the budgets cannot be kept together')}",
            because="; ".join(lines) if most_loss is None else "",
            advice="loosen a budget or a rule" if most_loss is None else "more loss, or loosen a budget or a rule",
        )  # fmt: skip
    if solution.status == "unsolved":
        raise InputError(
            "E210", f"solver '{solution.solver}' found nothing", advice="give it more time, or another solver"
        )
    doubtful: Sequence[Doubt] = ()
    if found.spread is not None and goal == "loss":
        doubtful = doubts(problem, solution, found.spread, rules=held)
    _write(out, problem, solution, doubtful)
    if as_json:
        sys.stdout.write(json.dumps(_json(problem, solution, doubtful), indent=1) + "\n")
        return
    _print(problem, solution, goal)
    for line in doubt_lines(doubtful, len(problem.names)):
        sys.stdout.write(f"{line}\n")
    if out is not None:
        sys.stdout.write(f"choice      {out}\n")


def read_settings(texts: Sequence[str]) -> dict[str, Any]:
    """Read settings such as ``time_limit=5``: numbers, true and false as such, all else as text.

    >>> read_settings(["time_limit=5", "backend=cbc"])
    {'time_limit': 5, 'backend': 'cbc'}
    """
    found: dict[str, Any] = {}
    for text in texts:
        name, sign, value = text.partition("=")
        if not sign or not name:
            raise UsageError("E115", f"--set '{text}' is not NAME=VALUE", advice="write --set time_limit=5")
        try:
            read = json.loads(value)
        except (ValueError, RecursionError):
            read = value
        found[name] = tuple(read) if isinstance(read, list) else read
    return found


def read_rules(path: Path) -> Rules:
    """Read rules from a TOML file: a key for each field of `mpsearch.Rules`.

    Raises:
        InputError: no such file (E101), not TOML (E102), an unknown key (E103) or a wrong value (E213).
    """
    from mpsearch.rules import Rules

    if not path.is_file():
        raise InputError("E101", f"'{path}' is not a file")
    try:
        data = tomllib.loads(path.read_text(encoding="utf-8"))
    except (ValueError, RecursionError) as error:
        raise InputError("E102", f"{path} is not TOML: {error}") from error
    try:
        return Rules.of(data)
    except InputError as error:
        raise InputError(error.code, error.message, where=str(path), advice=error.advice) from error


def _check_out(out: Path | None, inputs: Sequence[Path]) -> None:
    """Refuse, before any work, a file that cannot be written or that holds what is read.

    Raises:
        InputError: E113.
    """
    if out is None:
        return
    if out.suffix not in (".csv", ".json"):
        raise InputError("E113", f"--out '{out}'", advice="end it with .csv or .json")
    if not out.resolve().parent.is_dir():
        raise InputError("E113", f"--out '{out}': there is no folder '{out.parent}'", advice="make it first")
    if any(out.resolve() == path.resolve() for path in inputs):
        raise InputError("E113", f"--out '{out}' is a table that is read", advice="name another file")


def _print(problem: Problem, solution: Solution, goal: str) -> None:
    from rich.table import Table
    from rich.text import Text

    from mpsearch.cli.show import console, safe

    table = Table("row", "format", "loss", *problem.resources, title="Choice", box=None)
    for column in table.columns[2:]:
        column.justify = "right"
    shown = list(enumerate(solution.choice.tolist()))
    for i, j in shown if len(shown) <= 200 else shown[:50]:
        costs = [f"{cost[i, j]:,.10g}" for cost in problem.cost]
        table.add_row(Text(safe(problem.names[i])), Text(safe(problem.formats[j])), f"{problem.loss[i, j]:.5g}", *costs)
    out = console()
    out.print(table)
    if len(shown) > 200:
        out.print(f"… and {len(shown) - 50:,} more rows; --out writes all")
    unit = "loss" if goal in ("loss", "worst") else goal
    loss = problem.total_loss(solution.choice)
    sys.stdout.write(f"\nloss        {loss:.6g}\n")
    for name, total, limit, price in zip(
        problem.resources, solution.cost, problem.limit.tolist(), solution.prices, strict=True
    ):
        of = "" if math.isinf(limit) else f" of {limit:,.10g}; one more would save {price:.4g} {unit}"
        sys.stdout.write(f"{safe(name):<11} {total:,.10g}{of}\n")
    for name, price in solution.stats.get("rules", {}).items():
        sys.stdout.write(f"rule        {safe(name)}: one more would save {price:.4g} {unit}\n")
    proven = "proven" if solution.status == "optimal" else f"gap {solution.gap:.2g}, bound {solution.bound:.6g}"
    sys.stdout.write(f"solver      {solution.solver}: {proven}\n")
    if "why" in solution.stats:
        sys.stdout.write(f"            {solution.stats['why']}\n")


def _json(problem: Problem, solution: Solution, doubtful: Sequence[Doubt]) -> dict[str, Any]:
    def finite(value: float) -> float | None:
        return value if math.isfinite(value) else None

    return {
        "choice": {name: problem.formats[j] for name, j in zip(problem.names, solution.choice.tolist(), strict=True)},
        "status": solution.status,
        "loss": finite(solution.loss),
        "bound": finite(solution.bound),
        "gap": finite(solution.gap),
        "cost": dict(zip(problem.resources, solution.cost, strict=True)),
        "prices": dict(zip(problem.resources, map(finite, solution.prices), strict=True)),
        "in_doubt": [
            {key: finite(x) if isinstance(x, float) else x for key, x in asdict(doubt).items()} for doubt in doubtful
        ],
        "solver": solution.solver,
        "stats": {key: value for key, value in solution.stats.items() if isinstance(value, (str, int, float, dict))},
    }


def _write(out: Path | None, problem: Problem, solution: Solution, doubtful: Sequence[Doubt]) -> None:
    if out is None:
        return
    if out.suffix == ".json":
        out.write_text(json.dumps(_json(problem, solution, doubtful), indent=1) + "\n", encoding="utf-8")
        return
    with out.open("w", encoding="utf-8", newline="") as file:
        writer = csv.writer(file)
        writer.writerow(["row", "format", "loss", *problem.resources])
        for i, j in enumerate(solution.choice.tolist()):
            costs = [repr(float(cost[i, j])) for cost in problem.cost]
            writer.writerow([problem.names[i], problem.formats[j], repr(float(problem.loss[i, j])), *costs])
