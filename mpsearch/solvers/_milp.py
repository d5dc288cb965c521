"""A choice of one cell per row as a mixed-integer programme: what it is, how it is written down, and who solves it."""

from __future__ import annotations

import math
from dataclasses import dataclass, field, replace
from typing import Literal

import numpy as np
from scipy.optimize import Bounds, LinearConstraint
from scipy.optimize import milp as scipy_milp
from scipy.sparse import csr_array

from mpsearch.solvers._reduced import Bools, Floats, Ints

Status = Literal["optimal", "infeasible", "stopped", "failed"]

BACKENDS = ("highs", "cbc", "scipy")
#: Coefficients of a budget are whole numbers up to this, or are scaled to it.
_LARGEST = 2**12
#: scipy leaves HiGHS its absolute gap of 1e-6; losses are multiplied by this, so that the gap shrinks with it.
_LOUDER = 2.0**8


@dataclass(frozen=True, eq=False)
class Model:
    """Choose one offered cell per row: least objective, every use within its limit, no cut broken, all counts kept.

    Attributes:
        objective: (N, F), finite where offered.
        offered: (N, F) cells that may be chosen; at least one per row.
        use: (R, N, F) whole counts.
        limit: (R,) whole counts.
        cuts: sets of cells (N, F), each with the most of them that may be chosen together.
        counts: sets of cells (N, F), each with the number of which the chosen ones must be a multiple.
        pairs: two rows and the objective (F, F) that their cells add together; infinite where both are barred.
    """

    objective: Floats
    offered: Bools
    use: Ints
    limit: Ints
    cuts: tuple[tuple[Bools, int], ...] = ()
    counts: tuple[tuple[Bools, int], ...] = ()
    pairs: tuple[tuple[int, int, Floats], ...] = ()


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


@dataclass(eq=False)
class Programme:
    """Least sum of cost times value; values lie between 0 and ``most``, and sums of them between two numbers.

    Attributes:
        cost: of each variable.
        most: largest value of each variable.
        whole: which variables are whole numbers.
        sums: variables, their coefficients, and the least and the most of each sum.
    """

    cost: list[float] = field(default_factory=list)
    most: list[float] = field(default_factory=list)
    whole: list[bool] = field(default_factory=list)
    sums: list[tuple[list[int], list[float], float, float]] = field(default_factory=list)

    def variable(self, cost: float, most: float = 1.0, *, whole: bool = False) -> int:
        """Add a variable and return its number."""
        self.cost.append(cost)
        self.most.append(most)
        self.whole.append(whole)
        return len(self.cost) - 1

    def add(self, variables: list[int], values: list[float], least: float, most: float) -> None:
        """Add a sum, unless it is empty."""
        if variables:
            self.sums.append((variables, values, least, most))


def solve(model: Model, backend: str, seconds: float) -> Outcome:
    """Solve with one of `BACKENDS`; its failure is an outcome, not an exception."""
    model, constant = _folded(model)
    # PuLP hands CBC 13 digits of every number; budgets are loosened by as much, so that no choice is lost.
    programme, cells, possible = _programme(model, loose=1e-12 if backend == "cbc" else 0.0)
    # Rows with a single cell need no variable.
    choice = model.offered.argmax(axis=1)
    settled = np.flatnonzero(model.offered.sum(axis=1) == 1)
    constant = math.fsum([constant, *model.objective[settled, choice[settled]].tolist()])
    if not possible:
        return Outcome("infeasible", None, math.inf, "seen before solving")
    if not cells:
        return Outcome("optimal", choice, constant, "nothing left to choose")
    try:
        status, bound, report, values = _ask(programme, backend, seconds)
    # PuLP and the backends raise all sorts: PulpSolverError, OSError, IndexError after a time-out.
    except Exception as error:
        return Outcome("failed", None, -math.inf, f"{backend}: {type(error).__name__}: {error}")
    if status in ("infeasible", "failed"):
        return Outcome(status, None, -math.inf, f"{backend}: {report}")
    chosen = [cell for cell, variable in cells.items() if values and values[variable] > 0.5]
    complete = len(chosen) == len({i for i, _ in chosen}) == len(choice) - len(settled)
    if status == "optimal" and not complete:
        return Outcome("failed", None, -math.inf, f"{backend}: {report}, but not one cell per row")
    for i, f in chosen:
        choice[i] = f
    return Outcome(status, choice if complete else None, bound + constant, f"{backend}: {report}")


def missing(backend: str) -> str:
    """Say why a backend cannot be used; empty when it can."""
    if backend == "scipy":
        return ""
    from mpsearch.solvers import _pulp

    return _pulp.missing(backend)


def _ask(programme: Programme, backend: str, seconds: float) -> tuple[Status, float, str, list[float]]:
    """Return the backend's status, bound, own word, and value of each variable; none when it found no choice."""
    if backend == "scipy":
        return _scipy(programme, seconds)
    from mpsearch.solvers import _pulp

    return _pulp.ask(programme, backend, seconds)


def _scipy(programme: Programme, seconds: float) -> tuple[Status, float, str, list[float]]:
    variables = [v for found, _, _, _ in programme.sums for v in found]
    values = [x for _, found, _, _ in programme.sums for x in found]
    starts = np.cumsum([0, *(len(found) for found, _, _, _ in programme.sums)])
    matrix = csr_array((values, variables, starts), shape=(len(programme.sums), len(programme.cost)))
    least, most = ([row[place] for row in programme.sums] for place in (2, 3))
    found = scipy_milp(
        np.array(programme.cost) * _LOUDER,
        integrality=np.array(programme.whole, dtype=np.int64),
        bounds=Bounds(0.0, np.array(programme.most)),
        constraints=LinearConstraint(matrix, np.array(least), np.array(most)),
        options={"time_limit": seconds, "mip_rel_gap": 0.0},
    )
    report = str(found.message).partition("HiGHS Status")[2].strip(" :)0123456789") or str(found.message)
    bound = -math.inf if found.mip_dual_bound is None else float(found.mip_dual_bound) / _LOUDER
    taken = [] if found.x is None else found.x.tolist()
    status: Status = {0: "optimal", 1: "stopped", 2: "infeasible"}.get(found.status, "failed")  # type: ignore[assignment]
    return status, bound if math.isfinite(bound) else -math.inf, report, taken


def _folded(model: Model) -> tuple[Model, float]:
    """Put pairs of rows of which one has a single cell into the objective, and of which both have into a constant."""
    constants = []
    while model.pairs:
        settled = model.offered.sum(axis=1) == 1
        cell = model.offered.argmax(axis=1)
        objective, offered = model.objective.copy(), model.offered.copy()
        pairs = []
        for i, j, value in model.pairs:
            if not settled[i] and not settled[j]:
                pairs.append((i, j, value))
                continue
            row, added = (j, value[cell[i]]) if settled[i] else (i, value[:, cell[j]])
            barred = np.isinf(added)
            offered[row] &= ~barred
            if not settled[row]:
                objective[row] += np.where(barred, 0.0, added)
            elif not barred[cell[row]]:
                constants.append(float(added[cell[row]]))
        if len(pairs) == len(model.pairs):
            break
        # Barred cells may have left a row with a single one.
        model = replace(model, objective=objective, offered=offered, pairs=tuple(pairs))
    return model, math.fsum(constants)


def _programme(model: Model, loose: float) -> tuple[Programme, dict[tuple[int, int], int], bool]:
    """Return the programme, the variable of each cell, and False if it was seen that nothing fits."""
    programme = Programme()
    cells: dict[tuple[int, int], int] = {}
    offered = model.offered
    free = offered.sum(axis=1) > 1
    for i in np.flatnonzero(free).tolist():
        here = np.flatnonzero(offered[i]).tolist()
        for f in here:
            cells[i, f] = programme.variable(float(model.objective[i, f]), whole=True)
        programme.add([cells[i, f] for f in here], [1.0] * len(here), 1.0, 1.0)
    possible = bool(offered.any(axis=1).all())
    for use, limit in zip(model.use, model.limit.tolist(), strict=True):
        # What a row spends in any case is no matter of choice.
        least = np.where(offered, use, np.iinfo(np.int64).max).min(axis=1)
        above = np.where(offered, use - least[:, None], 0)
        right = limit - int(least.sum())
        if int(above.max(axis=1).sum()) > right:
            coefficients, top = _small(above, right)
            possible &= right >= 0
            terms = np.argwhere(above).tolist()
            top += loose * float(coefficients.max(axis=1).sum())
            values = [float(coefficients[i, f]) for i, f in terms]
            programme.add([cells[i, f] for i, f in terms], values, -math.inf, top)
    for mask, most in model.cuts:
        chosen, settled = _members(mask & offered, free, cells)
        possible &= settled <= most
        programme.add(chosen, [1.0] * len(chosen), -math.inf, float(most - settled))
    for mask, multiple in model.counts:
        chosen, settled = _members(mask & offered, free, cells)
        possible &= bool(chosen) or settled % multiple == 0
        if chosen and multiple > 1:
            times = programme.variable(0.0, float((len(chosen) + settled) // multiple), whole=True)
            programme.add([*chosen, times], [1.0] * len(chosen) + [-float(multiple)], -float(settled), -float(settled))
    in_row: dict[int, dict[int, int]] = {}
    for (i, f), x in cells.items():
        in_row.setdefault(i, {})[f] = x
    for i, j, value in model.pairs:
        _add_pair(programme, value, in_row[i], in_row[j])
    return programme, cells, possible


def _members(mask: Bools, free: Bools, cells: dict[tuple[int, int], int]) -> tuple[list[int], int]:
    """Return the variables of a set of cells, and how many of it rows with a single cell take."""
    chosen = [cells[i, f] for i, f in np.argwhere(mask & free[:, None]).tolist()]
    return chosen, int(mask[~free].sum())


def _add_pair(programme: Programme, value: Floats, left: dict[int, int], right: dict[int, int]) -> None:
    """Add what two rows cost together.

    Few terms: one variable each, which is no less than both cells less one, and no more than either, where its value
    calls for it. Many: one variable for each two cells, which add up to the variables of the cells row by row.
    """
    terms = [(f, g, float(value[f, g])) for f in left for g in right if value[f, g] != 0.0]
    if 2 * len(terms) <= len(left) + len(right):
        for f, g, worth in terms:
            if worth == math.inf:
                programme.add([left[f], right[g]], [1.0, 1.0], -math.inf, 1.0)
                continue
            both = programme.variable(worth)
            if worth > 0:
                programme.add([left[f], right[g], both], [1.0, 1.0, -1.0], -math.inf, 1.0)
            else:
                programme.add([both, left[f]], [1.0, -1.0], -math.inf, 0.0)
                programme.add([both, right[g]], [1.0, -1.0], -math.inf, 0.0)
        return
    both_of = {(f, g): programme.variable(float(value[f, g])) for f in left for g in right if value[f, g] < math.inf}
    for f, x in left.items():
        found = [both_of[f, g] for g in right if (f, g) in both_of]
        programme.add([*found, x], [1.0] * len(found) + [-1.0], 0.0, 0.0)
    for g, x in right.items():
        found = [both_of[f, g] for f in left if (f, g) in both_of]
        programme.add([*found, x], [1.0] * len(found) + [-1.0], 0.0, 0.0)


def _small(use: Ints, limit: int) -> tuple[Floats, float]:
    """Divide by the common divisor, and by a power of two where that leaves large numbers; cuts no choice off."""
    step = int(np.gcd.reduce(use, axis=None)) or 1
    use, limit = use // step, limit // step
    shift = max(0, int(use.max()).bit_length() - _LARGEST.bit_length())
    # Floats hold the counts exactly; the limit may need rounding, which is upwards.
    top = float(limit) if int(float(limit)) >= limit else math.nextafter(float(limit), math.inf)
    return np.ldexp(use.astype(np.float64), -shift), math.ldexp(top, -shift)
