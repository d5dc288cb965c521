"""From tables to plans: pins, menus, budgets, and the plans a study compares. Needs neither the model nor torch."""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from typing import Any

import numpy as np

from mpsearch.answer import Answer
from mpsearch.budget import TIMED, Budget
from mpsearch.errors import InfeasibleError, InputError, Notice
from mpsearch.feasible import check_budgets, in_unit
from mpsearch.format import Format
from mpsearch.menu import Menu
from mpsearch.plan import BitPlan, Predicted
from mpsearch.problem import Problem, Solution
from mpsearch.rules import Rules
from mpsearch.solving import shortage, solve_problem
from mpsearch.tables import Array, SensitivityTable


@dataclass(frozen=True)
class Labelled:
    """A plan and what it is to its study: ``mixed``, ``uniform FORMAT`` or ``random N``."""

    label: str
    plan: BitPlan


@dataclass(frozen=True)
class Planner(Menu):
    """Makes plans for one model from its tables; fields as those of `Menu`."""

    def check(self, budgets: Sequence[Budget]) -> None:
        """Refuse budgets that no plan can keep.

        Raises:
            InfeasibleError: E201.
        """
        for budget in budgets:
            if budget.priced_by in {table.resource for table in self.costs}:
                continue
            if budget.resource == "kv" and self.spec.kv:
                raise InputError(
                    "E420",
                    f"budget '{budget}': the model keeps no KV cache that could be rounded",
                    advice="give a causal language model of Hugging Face, not wrapped in functions of your own",
                )
            if budget.resource == "kv":
                raise InputError(
                    "E420",
                    f"budget '{budget}': no KV cache is decided in this study",
                    advice='offer formats for it, such as kv = ["kv-bf16", "kv-int8-token"]',
                )
            if budget.resource in TIMED:
                raise InputError(
                    "E420", f"budget '{budget}': this study has timed no kernels",
                    advice="start one with a budget of time, or with an engine (mpsearch targets lists them)",
                )  # fmt: skip
            if budget.resource == "energy":
                raise InputError(
                    "E420", f"budget '{budget}': there is no table of energy",
                    advice='energy = "energy.csv", with the columns format, pj_per_mac, pj_per_byte',
                )  # fmt: skip
            raise InputError("E420", f"budget '{budget}': the model has no known multiply-adds")
        check_budgets(budgets, self.costs, self.mask, self.pins)

    def holds_all(self, budgets: Sequence[Budget]) -> Notice | None:
        """Say so when the budget of weights holds the whole model at 16 bits, so that nothing is to be searched."""
        if self.able and self.able.violations(self.at_16_bits()):
            return None
        weights = self.costs[0]
        needed = max(weights.reference, self.at_16_bits().stored_bytes)
        if self.spec.rules:
            return None
        untouched = not self.companions and (not self.spec.kv or any(x in self.spec.kv for x in ("kv-bf16", "kv-fp16")))
        if (
            not untouched
            or self.spec.pins
            or any(b.resource != "weights" or b.limit(weights) < needed for b in budgets)
        ):
            return None
        return Notice(
            "W112",
            f"budget {' and '.join(map(str, budgets))} is more than the model needs at 16 bits "
            f"({needed / 2**20:.2f} MiB): nothing to search, every layer stays at 16 bits",
        )

    def _may_be_left(self) -> bool:
        """Whether the menus let inputs and caches stay as they are."""
        caches = not self.spec.kv or any(fmt in self.spec.kv for fmt in ("kv-bf16", "kv-fp16"))
        return caches and not self.companions

    def at_16_bits(self) -> BitPlan:
        """The plan that keeps every layer at 16 bits."""
        formats = {
            x.name: Format.parse(("kv-" if x.kind == "kv_cache" else "") + ("fp16" if x.dtype == "float16" else "bf16"))
            for x in self.layers
        }
        return self.priced(BitPlan(self.layers, formats, self.model, source={"uniform": "16 bits"}))

    def solve(
        self, scores: SensitivityTable, budgets: Sequence[Budget], goal: str = "loss", most_loss: float = math.inf
    ) -> tuple[Problem, Solution]:
        """Solve for the least predicted loss within budgets, or for another goal (see `mpsearch.solve`).

        Raises:
            InfeasibleError: proven that nothing fits (E201, E203).
            InputError: a decision has no score (E211); no such goal (E212); the solver cannot take the problem, or
                found nothing in its time (E210).
        """
        self.check(budgets)
        problem = self.problem(scores, budgets)
        for table in self.costs if goal != "loss" else ():
            if table.resource not in problem.resources:
                problem = problem.with_resource(table.resource, table.value, math.inf)
        rules = self.rules
        solution = solve_problem(
            problem, self.spec.solver, self.spec.solver_settings, rules=rules, goal=goal, most_loss=most_loss
        )
        if solution.status == "infeasible" and most_loss < math.inf:
            least = solve_problem(problem, self.spec.solver, self.spec.solver_settings, rules=rules)
            if least.status != "infeasible":
                raise InfeasibleError(
                    "E203",
                    f"no plan is predicted to lose at most {most_loss:.6g} {scores.unit}",
                    because=f"the best within the budgets is predicted to lose {least.loss:.6g}",
                    advice="allow more loss, or offer larger formats",
                )
        if solution.status == "infeasible":
            raise self._no_plan(problem, rules, budgets)
        if solution.status == "unsolved":
            raise InputError(
                "E210", f"solver '{solution.solver}' found no plan", advice='give it more time, or use solver = "ilp"'
            )
        return problem, solution

    def _no_plan(self, problem: Problem, rules: Rules, budgets: Sequence[Budget]) -> InfeasibleError:
        """What to tell when budgets can be kept alone and not together, or not under the rules."""
        tables = {table.resource: table for table in self.costs}
        least = shortage(problem, rules).together
        smallest = [
            f"{budget} could be {in_unit(least[budget.priced_by] + table.fixed, budget, table)} beside the others"
            for budget, table in ((b, tables[b.priced_by]) for b in budgets)
            if math.isfinite(least[budget.priced_by])
        ]
        return InfeasibleError(
            "E203",
            f"budgets {' and '.join(map(str, budgets))} cannot be kept together"
            + (" under the rules" if self.spec.rules else "")
            if budgets
            else "the rules leave no plan",
            because="; ".join(smallest) or ("each can be kept alone" if budgets else ""),
            advice="loosen one of them",
        )

    def problem(self, scores: SensitivityTable, budgets: Sequence[Budget]) -> Problem:
        """The problem of the least predicted loss within budgets, with pins.

        Raises:
            InfeasibleError: a budget below the cheapest plan (E201).
            InputError: a decision has no score (E211).
        """
        value = self.settled(scores).value + self.mask
        for i, name in enumerate(scores.layers):
            if name in self.pins:
                # There is nothing to choose, so a missing score does not matter.
                value[i] = np.where(np.isnan(self.mask[i]), np.nan, np.nan_to_num(value[i]))
        if self.spec.cautious:
            value = value + self.spec.cautious * np.nan_to_num(scores.spread)
        kept = self.unscored(scores)
        for i, j in kept:
            value[i, j] = 0.0
        without = [name for name, row in zip(scores.layers, value, strict=True) if np.isnan(row).all()]
        if without:
            row = scores.layers.index(without[0])
            lost = bool(scores.status) and "non_finite" in scores.status[row]
            raise InputError(
                "E211",
                f"{len(without)} decisions have no usable score in any format, first '{without[0]}'",
                because="its values are not finite: its weights pass what the formats hold, or the run overflows"
                if lost
                else "",
                advice="offer bf16 or fp32 as well"
                if lost
                else f"another estimator, or a pin: --pin '{without[0]}=int8-channel'",
            )
        try:
            check_budgets(budgets, self.costs, np.where(np.isnan(value), np.nan, 0.0), self.pins)
        except InfeasibleError as error:
            if not kept:
                raise
            first = scores.layers[kept[0][0]]
            raise InputError(
                "E211",
                f"{len(kept)} decisions have no score, first '{first}', and their largest formats break the budgets",
                because=error.message,
                advice=f"more calibration text, another estimator, or a pin: --pin '{first}=int8-channel'",
            ) from error
        return Problem.of(replace(scores, value=value, status=()), self.costs, budgets)

    def unscored(self, scores: SensitivityTable) -> list[tuple[int, int]]:
        """Decisions that the data did not reach, each with the only format it may then take: that of most bytes.

        Nothing is known of them, which does not make them harmless.
        """
        found = []
        for i, (name, row) in enumerate(zip(scores.layers, scores.status, strict=True)):
            offered = ~np.isnan(self.mask[i])
            blind = all(status == "not_observed" for status, may in zip(row, offered, strict=True) if may)
            if name not in self.pins and offered.any() and blind:
                found.append((i, int(np.where(offered, self.sizes[i], -np.inf).argmax())))
        return found

    def settled(self, scores: SensitivityTable) -> SensitivityTable:
        """The scores that plans are made from: none below zero, and no dearer format worse with ``clamp``."""
        found = usable(scores)
        return found.clamped(self.sizes) if self.spec.clamp else found

    def mixed(self, scores: SensitivityTable, budgets: Sequence[Budget]) -> BitPlan:
        """The plan of least predicted loss within budgets (see `solve`)."""
        return self.answer(scores, budgets).plan

    def answer(
        self, scores: SensitivityTable, budgets: Sequence[Budget], goal: str = "loss", most_loss: float = math.inf
    ) -> Answer:
        """The plan that `solve` finds, with what it was solved from."""
        problem, solution = self.solve(scores, budgets, goal, most_loss)
        source = {
            "budgets": [str(budget) for budget in budgets],
            "estimator": {"name": self.spec.estimator, **self.spec.estimator_settings},
            "solver": {"name": solution.solver, **self.spec.solver_settings},
            "status": solution.status,
            "prices": [
                {"budget": str(b), "price": price, "unit": f"{scores.unit} per unit of {b.priced_by}"}
                for b, price in zip(budgets, solution.prices[: len(budgets)], strict=True)
                if math.isfinite(price) and goal == "loss"
            ],
            "scores": scores.source.get("scope", ""),
            "costs": {table.resource: table.kind for table in self.costs},
            **({"target": self.spec.target} if self.spec.target else {}),
        }
        if goal != "loss":
            source["goal"] = {"least": goal} | ({"most_loss": most_loss} if most_loss < math.inf else {})
        if any(fmt.calibrated for fmt in self.formats):
            source["calibration"] = {
                name: getattr(self.spec, name) for name in ("calibration", "tokens", "length", "batch_size")
            }
        plan = self.from_choice(solution.choice, source)
        if any(b.resource == "weights" and plan.stored_bytes > b.limit(self.costs[0]) for b in budgets):
            wanted = " and ".join(map(str, budgets))
            raise AssertionError(f"the plan takes {plan.stored_bytes} bytes, more than {wanted}")
        settled = self.settled(scores)
        chosen = (np.arange(len(solution.choice)), solution.choice)
        # The bound is of what was solved: not of a cautious sum, nor of bytes.
        of_loss = goal == "loss" and not self.spec.cautious
        predicted = Predicted(
            solution.loss if of_loss else math.fsum(settled.value[chosen].tolist()),
            _total_spread(settled.spread[chosen]),
            scores.unit,
            solution.bound if math.isfinite(solution.bound) and of_loss else None,
            solution.gap if math.isfinite(solution.gap) and of_loss else None,
            plan.cost,
        )
        rules = self.rules
        return Answer(replace(plan, predicted=predicted), problem, solution, settled.spread, rules, self.costs)

    def predict(self, scores: SensitivityTable, plan: BitPlan) -> BitPlan:
        """Add the predicted loss to a plan that was not solved for."""
        choice = plan.choice(scores.formats)
        cells = [(i, j) for i, j in enumerate(choice) if j >= 0]
        settled = self.settled(scores)
        values = [float(settled.value[cell]) for cell in cells]
        if len(cells) < len(choice) or not all(map(math.isfinite, values)):
            return plan
        spread = _total_spread(np.array([settled.spread[cell] for cell in cells]))
        return replace(plan, predicted=Predicted(math.fsum(values), spread, scores.unit, cost=plan.cost))

    def from_choice(self, choice: Any, source: Mapping[str, Any]) -> BitPlan:
        formats = {
            layer.name: self.formats[int(column)]
            for decision, column in zip(self.layers.decisions, choice, strict=True)
            for layer in decision.layers
        }
        return self.priced(BitPlan(self.layers, formats, self.model, source=source))


def _total_spread(spread: Array) -> float | None:
    """Upper limit of the standard error of a sum: the sum of the errors.

    Every layer is scored on the same sequences, so the errors are not independent, and their root of squares would
    be too small.
    """
    return math.fsum(spread) if np.isfinite(spread).all() else None


def usable(scores: SensitivityTable) -> SensitivityTable:
    """Take the standard error of an estimate below zero in its place.

    A divergence cannot be negative; an estimate can, within its noise. Taken as it is, or as zero, it would draw bits
    away from a layer for no reason: all that is known is that the loss is within the noise. (Where the error is not
    known, the size of the estimate stands for it.) The table that is stored keeps what was estimated.
    """
    doubt = np.where(np.isfinite(scores.spread), scores.spread, np.abs(scores.value))
    return replace(scores, value=np.where(scores.value < 0, doubt, scores.value))
