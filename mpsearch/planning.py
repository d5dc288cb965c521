"""From tables to plans: pins, menus, budgets, and the plans a study compares. Needs neither the model nor torch."""

from __future__ import annotations

import math
from collections import Counter
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, field, replace
from fractions import Fraction
from functools import cached_property
from typing import Any

import numpy as np

from mpsearch import registry
from mpsearch.budget import Budget, conditions
from mpsearch.errors import InfeasibleError, InputError, Notice
from mpsearch.feasible import allowed, check_budgets, in_unit
from mpsearch.format import Format, join
from mpsearch.layer import Layer, Layers
from mpsearch.plan import BitPlan, Predicted
from mpsearch.problem import Problem, Solution
from mpsearch.rules import Rules
from mpsearch.solving import shortage, solve_problem
from mpsearch.spec import StudySpec
from mpsearch.tables import Array, CostTable, SensitivityTable


@dataclass(frozen=True)
class Labelled:
    """A plan and what it is to its study: ``mixed``, ``uniform FORMAT`` or ``random N``."""

    label: str
    plan: BitPlan


@dataclass(frozen=True)
class Planner:
    """Makes plans for one model from its tables.

    Attributes:
        spec: the question.
        layers: what is decided.
        model: ``name``, ``digest`` and ``architecture`` of the model.
        budgets: further budgets than the spec's that plans will be made for.
        protected: decision name -> format, of decisions that a rule pins; the spec's own pins go before it.
    """

    spec: StudySpec
    layers: Layers
    model: Mapping[str, str]
    budgets: tuple[Budget, ...] = ()
    protected: Mapping[str, str] = field(default_factory=dict)

    @cached_property
    def menu(self) -> tuple[Format, ...]:
        """The formats that are offered, each to the layers that can take it."""
        weights = join(map(Format.parse, self.spec.formats), self.spec.activations)
        return (*weights, *(Format.parse(text) for text in self.spec.kv))

    @cached_property
    def pins(self) -> Mapping[str, str]:
        """Decision name -> the format it must take.

        Raises:
            InputError: a pattern matches nothing (E120), two pins split a fused group (E121), or a layer cannot take
                the format (E130).
        """
        found: dict[str, tuple[str, str]] = {}
        for pattern, fmt in self.spec.pins.items():
            wanted = Format.parse(fmt)
            for layer in self.layers.match(pattern):
                if wanted.refuses(layer):
                    raise InputError("E130", f"pin '{pattern}': layer '{layer.name}': {wanted.refuses(layer)}")
                decision = layer.tie or layer.name
                other, first = found.setdefault(decision, (str(wanted), layer.name))
                if other != str(wanted):
                    raise InputError(
                        "E121",
                        f"'{first}' is pinned to {other} and '{layer.name}' to {wanted}, but they are one decision",
                        advice=f"give one format to '{decision}', or set ties = \"none\"",
                    )
        return {**self.protected, **{decision: text for decision, (text, _) in found.items()}}

    @cached_property
    def formats(self) -> tuple[Format, ...]:
        """The menu and the formats that only pins name: the columns of every table."""
        return tuple(dict.fromkeys([*self.menu, *(Format.parse(text) for text in sorted(set(self.pins.values())))]))

    @cached_property
    def costs(self) -> tuple[CostTable, ...]:
        """Cost of every decision in every format, one table per resource, weights first."""
        return tuple(target.cost(self.layers, self.formats) for target, _ in self._targets())

    def _targets(self) -> list[tuple[Any, Sequence[Layer]]]:
        """Who prices what, and the layers that cost anything there; weights first."""
        found: list[tuple[Any, Sequence[Layer]]] = [(registry.make("targets", "bytes"), self.layers)]
        if multiplied := [layer for layer in self.layers if layer.macs]:
            found.append((registry.make("targets", "bops"), multiplied))
        if caches := [layer for layer in self.layers if layer.kind == "kv_cache"]:
            asked = [b.condition for b in (*self._asked, *self.budgets) if b.condition]
            for condition in dict.fromkeys(asked or [f"at context {self.spec.length}"]):
                found.append((registry.make("targets", "kv", **conditions(condition)), caches))
        return found

    @property
    def _asked(self) -> tuple[Budget, ...]:
        return tuple(map(Budget.parse, self.spec.budgets))

    @cached_property
    def mask(self) -> Array:
        """(L, F): 0 where a format may be chosen, NaN elsewhere.

        Raises:
            InputError: a layer can take no format of the menu (E130).
        """
        mask = allowed(self.costs, self.pins, [str(fmt) for fmt in self.menu])
        for text in self.spec.activations:
            pairs = [fmt for fmt in self.menu if str(fmt).endswith(f"@{text}")]
            if pairs and all(fmt in self.misfits for fmt in pairs):
                raise InputError("E130", f"activation '{text}' fits no layer: {self.why_not(pairs[0])}")
        if self.spec.activations and "16" not in self.spec.activations:
            self._ask_for_activations(mask)
        for decision, row in zip(self.layers.decisions, mask, strict=True):
            if np.isnan(row).all():
                cache = decision.layers[0].kind == "kv_cache"
                offered = [fmt for fmt in self.menu if (fmt.family == "kv") == cache]
                layer = next(
                    (x for x in decision.layers if all(fmt.refuses(x) for fmt in offered)), decision.layers[-1]
                )
                reason = next((fmt.refuses(layer) for fmt in offered if fmt.refuses(layer)), "no format is offered")
                raise InputError("E130", f"layer '{layer.name}': {reason}", advice="offer another format as well")
        return mask

    def _ask_for_activations(self, mask: Array) -> None:
        """Take weights alone off the menu of decisions that can take the same weights with an activation."""
        for row in mask:
            taken = {fmt.weight for fmt, m in zip(self.formats, row, strict=True) if fmt.activation and not np.isnan(m)}
            for j, fmt in enumerate(self.formats):
                if fmt.activation is None and fmt in taken:
                    row[j] = np.nan

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
            raise InputError("E420", f"budget '{budget}': the model has no known multiply-adds")
        check_budgets(budgets, self.costs, self.mask, self.pins)

    def holds_all(self, budgets: Sequence[Budget]) -> Notice | None:
        """Say so when the budget of weights holds the whole model at 16 bits, so that nothing is to be searched."""
        weights = self.costs[0]
        needed = max(weights.reference, self.at_16_bits().bytes)
        if self.spec.rules:
            return None
        untouched = not self._companions and (
            not self.spec.kv or any(x in self.spec.kv for x in ("kv-bf16", "kv-fp16"))
        )
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
        return caches and not self._companions

    def at_16_bits(self) -> BitPlan:
        """The plan that keeps every layer at 16 bits."""
        formats = {
            x.name: Format.parse(("kv-" if x.kind == "kv_cache" else "") + ("fp16" if x.dtype == "float16" else "bf16"))
            for x in self.layers
        }
        return self._priced(BitPlan(self.layers, formats, self.model, source={"uniform": "16 bits"}))

    def solve(self, scores: SensitivityTable, budgets: Sequence[Budget]) -> tuple[Problem, Solution]:
        """Solve for the least predicted loss within budgets.

        Raises:
            InfeasibleError: proven that nothing fits (E201, E203).
            InputError: a decision has no score (E211); the solver cannot take the problem, or found nothing in its
                time (E210).
        """
        self.check(budgets)
        problem = self.problem(scores, budgets)
        rules = Rules.of(self.spec.rules)
        solution = solve_problem(problem, self.spec.solver, self.spec.solver_settings, rules=rules)
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
            + (" under the rules" if self.spec.rules else ""),
            because="; ".join(smallest) or "each can be kept alone",
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

    @cached_property
    def sizes(self) -> Array:
        """(L, F) bytes that put the formats of a decision in order: of its weights, or of its cache."""
        found = self.costs[0].value.copy()
        cache = next((table for table in self.costs if table.resource.startswith("kv ")), None)
        for i, row in enumerate(self.layers.decisions):
            if cache is not None and row.layers[0].kind == "kv_cache":
                found[i] = cache.value[i]
        return found

    def mixed(self, scores: SensitivityTable, budgets: Sequence[Budget]) -> BitPlan:
        """The plan of least predicted loss within budgets (see `solve`)."""
        _, solution = self.solve(scores, budgets)
        source = {
            "budgets": [str(budget) for budget in budgets],
            "estimator": {"name": self.spec.estimator, **self.spec.estimator_settings},
            "solver": {"name": solution.solver, **self.spec.solver_settings},
            "status": solution.status,
            "prices": [
                {"budget": str(b), "price": price, "unit": f"{scores.unit} per unit of {b.priced_by}"}
                for b, price in zip(budgets, solution.prices, strict=True)
                if math.isfinite(price)
            ],
            "scores": scores.source.get("scope", ""),
        }
        if any(fmt.calibrated for fmt in self.formats):
            source["calibration"] = {
                name: getattr(self.spec, name) for name in ("calibration", "tokens", "length", "batch_size")
            }
        plan = self._from_choice(solution.choice, source)
        if any(b.resource == "weights" and plan.bytes > b.limit(self.costs[0]) for b in budgets):
            raise AssertionError(f"the plan takes {plan.bytes} bytes, more than {' and '.join(map(str, budgets))}")
        expected = solution.loss
        if self.spec.cautious:
            settled = self.settled(scores).value[np.arange(len(solution.choice)), solution.choice]
            expected = math.fsum(settled.tolist())
        predicted = Predicted(
            expected,
            _total_spread(self.settled(scores).spread[np.arange(len(solution.choice)), solution.choice]),
            scores.unit,
            solution.bound if math.isfinite(solution.bound) and not self.spec.cautious else None,
            solution.gap if math.isfinite(solution.gap) and not self.spec.cautious else None,
            plan.cost,
        )
        return replace(plan, predicted=predicted)

    def predict(self, scores: SensitivityTable, plan: BitPlan) -> BitPlan:
        """Add the predicted loss to a plan that was not solved for."""
        columns = {name: j for j, name in enumerate(scores.formats)}
        choice = [columns.get(str(plan.formats[row.layers[0].name]), -1) for row in self.layers.decisions]
        cells = [(i, j) for i, j in enumerate(choice) if j >= 0]
        settled = self.settled(scores)
        values = [float(settled.value[cell]) for cell in cells]
        if len(cells) < len(choice) or not all(map(math.isfinite, values)):
            return plan
        spread = _total_spread(np.array([settled.spread[cell] for cell in cells]))
        return replace(plan, predicted=Predicted(math.fsum(values), spread, scores.unit, cost=plan.cost))

    def uniform(self) -> Iterator[Labelled]:
        """One plan per format of the menu that fits some layer; pins hold in it as in every plan.

        A decision that cannot take the format gets the weights' format alone, or else the next larger one that it can.
        KV caches all get the format of most bits with which the budgets of kv are kept. A plan that breaks a budget of
        anything but weights, or a rule, is no rival, and is left out.
        """
        by_size = sorted((fmt for fmt in self.menu if fmt.family != "kv"), key=lambda fmt: fmt.bits)
        caches = self._uniform_cache()
        for fmt in self.menu:
            if fmt in self.misfits or fmt.family == "kv" or fmt in self._companions:
                continue
            larger = [f for f in by_size if f.bits >= fmt.bits] + [f for f in reversed(by_size) if f.bits < fmt.bits]
            plan = BitPlan.uniform(self.layers, fmt, [fmt.weight, *larger, *caches], self.model)
            pinned = {
                layer.name: Format.parse(self.pins[row.name])
                for row in self.layers.decisions
                if row.name in self.pins
                for layer in row.layers
            }
            priced = self._priced(replace(plan, formats={**plan.formats, **pinned}))
            others = [b for b in self._asked if b.resource != "weights"]
            if self._keeps(priced, others) and self._keeps_rules(priced):
                yield Labelled(" ".join(map(str, ["uniform", fmt, *caches])), priced)

    def _keeps_rules(self, plan: BitPlan) -> bool:
        """Whether a plan is one that the rules allow, whatever it costs."""
        if not self.spec.rules:
            return True
        columns = {fmt: j for j, fmt in enumerate(self.formats)}
        choice = [columns.get(plan.formats[row.layers[0].name], -1) for row in self.layers.decisions]
        free = np.where(np.isnan(self.costs[0].value), np.nan, 0.0)
        names = tuple(row.name for row in self.layers.decisions)
        problem = Problem(
            free,
            np.array([table.value for table in self.costs]),
            np.full(len(self.costs), np.inf),
            names,
            tuple(map(str, self.formats)),
            tuple(table.resource for table in self.costs),
        )
        return -1 not in choice and Rules.of(self.spec.rules).apply(problem).whole.fits(np.array(choice))

    def _keeps(self, plan: BitPlan, budgets: Sequence[Budget]) -> bool:
        tables = {table.resource: table for table in self.costs}
        return all(plan.cost[b.priced_by] <= b.limit(tables[b.priced_by]) for b in budgets)

    def _uniform_cache(self) -> tuple[Format, ...]:
        """The format that all KV caches get in a uniform plan; none when they are not decided."""
        caches = [layer for layer in self.layers if layer.kind == "kv_cache"]
        if not caches:
            return ()
        offered = [Format.parse(text) for text in self.spec.kv]
        offered = [fmt for fmt in offered if not any(fmt.refuses(layer) for layer in caches)]
        offered.sort(key=lambda fmt: fmt.effective_bits(caches[0]), reverse=True)
        budgets = [b for b in self._asked if b.resource == "kv"]
        for fmt in offered:
            tables = [registry.make("targets", "kv", **conditions(b.condition)).cost(caches, [fmt]) for b in budgets]
            if all(table.value.sum() <= b.limit(table) for b, table in zip(budgets, tables, strict=True)):
                return (fmt,)
        return tuple(offered[-1:])

    @cached_property
    def _companions(self) -> frozenset[Format]:
        """Weights alone that are on the menu only for layers whose input cannot be rounded."""
        if not self.spec.activations or "16" in self.spec.activations:
            return frozenset()
        return frozenset(fmt.weight for fmt in self.menu if fmt.activation is not None)

    def why_not(self, fmt: Format) -> str:
        """The reason for which most layers of its kind refuse a format."""
        concerned = [layer for layer in self.layers if (layer.kind == "kv_cache") == (fmt.family == "kv")]
        return Counter(fmt.refuses(layer) for layer in concerned or self.layers).most_common(1)[0][0]

    @cached_property
    def misfits(self) -> tuple[Format, ...]:
        """Formats of the menu that no layer can take."""
        return tuple(fmt for fmt in self.menu if all(fmt.refuses(layer) for layer in self.layers))

    def sweep(self, scores: SensitivityTable, budgets: Sequence[Budget], points: int) -> Iterator[Labelled]:
        """Plans for budgets of weights at even distances, strictly between the least and the most possible."""
        weights = self.costs[0]
        others = [b for b in budgets if b.resource != "weights"]
        table = weights.value + self.mask
        least = math.fsum(np.nanmin(table, axis=1)) + weights.fixed
        most = math.fsum(np.nanmax(table, axis=1)) + weights.fixed
        for k in range(points):
            limit = int(least + (most - least) * (k + 1) / (points + 1))
            try:
                yield Labelled("mixed", self.mixed(scores, [Budget("weights", Fraction(limit), "B"), *others]))
            except InfeasibleError:
                continue  # another budget leaves no plan this small; the front starts further on

    def random(self, scores: SensitivityTable, budgets: Sequence[Budget], count: int) -> Iterator[Labelled]:
        """Random plans that fill the budgets, for comparison."""
        ruled = Rules.of(self.spec.rules).apply(self.problem(scores, budgets))
        for k in range(count):
            solver = registry.make("solvers", "random", seed=self.spec.seed + k)
            if reason := solver.refuses(ruled.problem):
                raise InputError("E210", f"no random plans can be drawn: {reason}", advice="random = 0")
            solution = solver.solve(ruled.problem)
            if solution.status == "feasible":
                plan = self._from_choice(solution.choice[ruled.group], {"random": self.spec.seed + k})
                yield Labelled(f"random {k}", self.predict(scores, plan))

    def _from_choice(self, choice: Any, source: Mapping[str, Any]) -> BitPlan:
        formats = {
            layer.name: self.formats[int(column)]
            for decision, column in zip(self.layers.decisions, choice, strict=True)
            for layer in decision.layers
        }
        return self._priced(BitPlan(self.layers, formats, self.model, source=source))

    def _priced(self, plan: BitPlan) -> BitPlan:
        cost: dict[str, float] = {"weights": plan.bytes}
        for target, concerned in self._targets()[1:]:
            tables = [target.cost([x], [plan.formats[x.name]]) for x in concerned]
            cost[tables[0].resource] = math.fsum(table.value[0, 0] for table in tables)
        return replace(plan, predicted=Predicted(cost=cost))


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
