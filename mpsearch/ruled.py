"""Problems with rules in them: rows that are tied, cells that are barred, and budgets and counts that rules make."""

from __future__ import annotations

import fnmatch
import math
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, replace
from numbers import Integral
from typing import TYPE_CHECKING, Any

import numpy as np
from numpy.typing import NDArray

from mpsearch.errors import InputError, did_you_mean
from mpsearch.problem import Outcome, Problem, Solution, relative_gap
from mpsearch.structure import Alignment
from mpsearch.tables import Array
from mpsearch.ties import tied

if TYPE_CHECKING:
    from mpsearch.rules import Rules

#: More numbers than this are not built into one problem.
_MOST_CELLS = 300_000_000
#: A gap up to this is a proof.
_PROVEN = 1e-9


@dataclass(frozen=True, eq=False)
class Ruled:
    """A problem with rules in it.

    Attributes:
        given: the problem as it was.
        whole: the same rows, with cells barred and rules as budgets after those that were given.
        problem: the one to solve, in which tied rows are one row; sums of costs that no float holds are rounded up.
        below: the same with such sums rounded down: what bounds it bounds the rows; ``problem`` where all are exact.
        group: (N,) row of ``problem`` of each row that was given.
    """

    given: Problem
    whole: Problem
    problem: Problem
    below: Problem
    group: NDArray[np.int64]

    @property
    def worst(self) -> Array:
        """(N', F) largest loss of a row that was given, in each row to solve."""
        worst = np.full(self.problem.loss.shape, -np.inf)
        np.maximum.at(worst, self.group, self.whole.loss)
        return worst

    def solve(self, answer: Callable[[Problem], Solution]) -> Solution:
        """Answer for the rows to solve.

        Where sums of tied rows are not exact, the sums rounded down are solved as well: a choice of them that fits the
        rows is the answer, and their bound is the one that counts.
        """
        if self.below is self.problem:
            return answer(self.problem)
        relaxed = answer(self.below)
        if relaxed.status == "infeasible":
            return relaxed
        if len(relaxed.choice) and self.whole.fits(relaxed.choice[self.group]):
            return relaxed
        found = answer(self.problem)
        if found.status in ("infeasible", "unsolved"):
            return Solution.without(self.problem, "unsolved", found.solver, lower_bound=relaxed.bound)
        bound = min(found.bound, relaxed.bound, found.loss)
        gap = relative_gap(found.loss, bound)
        status: Outcome = found.status if gap <= _PROVEN else "feasible"
        return replace(found, bound=bound, gap=gap, status=status)

    def spread(self, spread: Array, errors: str) -> Array:
        """Errors of the rows to solve, of those of the rows that were given: tied ones add up, or their squares do."""
        spread = np.asarray(spread, dtype=np.float64)
        if len(self.problem.loss) == len(self.given.loss) or spread.shape != self.given.loss.shape:
            return spread
        power = 1 if errors == "shared" else 2
        total = np.zeros(self.problem.loss.shape)
        np.add.at(total, self.group, np.nan_to_num(spread) ** power)
        found: Array = total ** (1 / power)
        return found

    def back(self, solution: Solution) -> Solution:
        """Put a solution into the rows and resources that were given; prices of rules go to ``stats["rules"]``."""
        count = len(self.given.limit)
        if solution.status in ("infeasible", "unsolved"):
            return replace(solution, cost=solution.cost[:count], prices=solution.prices[:count])
        choice = solution.choice[self.group]
        names, prices = self.problem.resources[count:], solution.prices[count:]
        rules = {name: price for name, price in zip(names, prices, strict=True) if price > 0}
        loss = self.given.total_loss(choice)
        bound = min(solution.bound, loss)
        return replace(
            solution,
            choice=choice,
            loss=loss,
            bound=bound,
            gap=relative_gap(loss, bound),
            cost=tuple(float(total) for total in self.given.totals(choice)),
            prices=solution.prices[:count],
            stats={**solution.stats, "rules": rules} if rules else solution.stats,
        )


def build(problem: Problem, rules: Rules) -> Ruled:
    """Make the problem that has rules in it (see `mpsearch.rules.Rules.apply`)."""
    return _Builder(problem, rules).build()


class _Builder:
    """Turns rules into the rows, cells, budgets and counts of a problem."""

    def __init__(self, problem: Problem, rules: Rules) -> None:
        self.problem, self.rules = problem, rules
        self.rows = {name: i for i, name in enumerate(problem.names)}

    def build(self) -> Ruled:
        loss = self._barred()
        rules = self.rules
        more = len(rules.at_most) + len(rules.at_least) + len(rules.families) + 2 * len(rules.balances)
        more += sum(len(peak.steps) for peak in rules.peaks)
        if (len(self.problem.limit) + more) * loss.size > _MOST_CELLS:
            raise InputError(
                "E212", f"{more} budgets that rules make, of {loss.size:,} cells each, do not fit in memory",
                advice="fewer groups, or rows in larger parts",
            )  # fmt: skip
        extra = list(self._budgets())
        tables = [np.where(np.isfinite(loss), table, 0.0) for _, table, _ in extra]
        aligned = [
            Alignment(tuple(self._several(rule.rows)), tuple(map(self._column, rule.formats)), rule.multiple)
            for rule in self.rules.aligned
        ]
        whole = replace(
            self.problem,
            loss=loss,
            cost=np.concatenate([self.problem.cost, np.array(tables)]) if tables else self.problem.cost,
            limit=np.r_[self.problem.limit, [limit for *_, limit in extra]],
            resources=(*self.problem.resources, *(name for name, *_ in extra)),
            aligned=(*self.problem.aligned, *aligned),
        )
        group = self._groups()
        apart = group.max(initial=-1) + 1 == len(group)
        return Ruled(self.problem, whole, *((whole, whole) if apart else tied(whole, group)), group)

    def _barred(self) -> Array:
        loss: Array = np.array(self.problem.loss)
        for rows, column in self.rules.pins.items():
            kept = self._column(column)
            for row in self._matching(rows):
                loss[row, np.arange(loss.shape[1]) != kept] = np.inf
        for rows, columns in self.rules.bars.items():
            for row in self._matching(rows):
                loss[row, [self._column(column) for column in columns]] = np.inf
        for rows, column in self.rules.floors.items():
            if not len(self.problem.cost):
                raise InputError("E213", "a floor needs a resource that puts formats in order, and there is none")
            cost = self.problem.cost[0]
            floor = self._column(column)
            for row in self._matching(rows):
                if math.isinf(self.problem.loss[row, floor]):
                    raise InputError(
                        "E213",
                        f"row '{self.problem.names[row]}' is not offered its floor '{self.problem.formats[floor]}'",
                    )
                loss[row, cost[row] < cost[row, floor]] = np.inf
        empty = np.flatnonzero(np.isinf(loss).all(axis=1) & np.isfinite(self.problem.loss).any(axis=1))
        if empty.size:
            raise InputError(
                "E213",
                f"the rules leave row '{self.problem.names[empty[0]]}' no format",
                advice="take back a pin, a bar or a floor of it",
            )
        return loss

    def _budgets(self) -> Iterator[tuple[str, Array, float]]:
        """Name, (N, F) cost and limit of each budget that the rules make."""
        shape = self.problem.loss.shape
        for column, most in self.rules.at_most.items():
            table = np.zeros(shape)
            table[:, self._column(column)] = 1.0
            yield f"at most {most} of {self._format_name(column)}", table, float(most)
        for resource, least in self.rules.at_least.items():
            r = self._resource(resource)
            yield f"at least {least:g} of {self.problem.resources[r]}", -self.problem.cost[r], -float(least)
        for family in self.rules.families:
            r = self._resource(family.resource)
            yield (
                f"{self.problem.resources[r]} of {_some(family.rows)}",
                self._only(r, family.rows),
                float(family.limit),
            )
        for balance in self.rules.balances:
            table = np.zeros(shape)
            rows = self._several(balance.rows)
            for sign, columns in ((1.0, balance.up), (-1.0, balance.down)):
                for column in columns:
                    table[rows, self._column(column)] += sign
            yield f"balance of {_some(balance.rows)}, up", table, 0.0
            yield f"balance of {_some(balance.rows)}, down", -table, 0.0
        for peak in self.rules.peaks:
            r = self._resource(peak.resource)
            for number, live in enumerate(peak.steps):
                yield f"{self.problem.resources[r]} at step {number}", self._only(r, live), float(peak.limit)

    def _only(self, resource: int, rows: Sequence[str | int]) -> Array:
        table = np.zeros(self.problem.loss.shape)
        found = self._several(rows)
        table[found] = self.problem.cost[resource][found]
        return table

    def _groups(self) -> NDArray[np.int64]:
        """(N,) number of the row that each row becomes, in the order of their first members."""
        first = np.arange(len(self.problem.loss))
        for tie in self.rules.ties:
            members = self._several(tie)
            roots = np.unique(first[members])
            first[np.isin(first, roots)] = roots.min(initial=len(first))
        return np.unique(first, return_inverse=True)[1].astype(np.int64)

    def _several(self, rows: Sequence[str | int]) -> list[int]:
        return list(dict.fromkeys(row for given in rows for row in self._matching(given)))

    def _matching(self, given: str | int) -> list[int]:
        names = self.problem.names
        if isinstance(given, str):
            found = [self.rows[given]] if given in self.rows else _numbers_matching(names, given)
            if found:
                return found
        elif isinstance(given, Integral) and 0 <= given < len(names):
            return [int(given)]
        close = did_you_mean(str(given), names[:1000])
        raise InputError("E213", f"rules: no row '{given}' among {len(names)} rows{close}")

    def _column(self, given: str | int) -> int:
        return _place(given, self.problem.formats, "format")

    def _resource(self, given: str | int) -> int:
        return _place(given, self.problem.resources, "resource")

    def _format_name(self, given: str | int) -> str:
        return self.problem.formats[self._column(given)]


def _numbers_matching(names: Sequence[str], pattern: str) -> list[int]:
    if not any(sign in pattern for sign in "*?["):
        return []
    return [i for i, name in enumerate(names) if fnmatch.fnmatchcase(name, pattern)]


def _place(given: str | int, names: Sequence[str], what: str) -> int:
    if isinstance(given, str):
        if given in names:
            return names.index(given)
    elif isinstance(given, Integral) and 0 <= given < len(names):
        return int(given)
    close = did_you_mean(str(given), names)
    raise InputError("E213", f"rules: no {what} '{given}'{close}", advice=f"there is {', '.join(names)}")


def _some(rows: Sequence[Any]) -> str:
    return str(rows[0]) + (f" and {len(rows) - 1} more" if len(rows) > 1 else "") if rows else "nothing"
