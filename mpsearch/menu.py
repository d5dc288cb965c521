"""What each decision of a model may take, under the menus and pins of a study, and what that costs."""

from __future__ import annotations

import math
from collections import Counter
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field, replace
from functools import cached_property
from typing import Any

import numpy as np

from mpsearch import registry
from mpsearch.budget import TIMED, Budget, conditions
from mpsearch.capabilities import Capabilities, cannot_hold, capabilities, own_type
from mpsearch.errors import InputError
from mpsearch.feasible import allowed
from mpsearch.format import Format, join
from mpsearch.hardware.calls import refuses
from mpsearch.hardware.profile import Profile
from mpsearch.layer import Layer, Layers
from mpsearch.plan import BitPlan, Predicted
from mpsearch.rules import Rules
from mpsearch.spec import StudySpec
from mpsearch.tables import Array, CostTable


@dataclass(frozen=True)
class Menu:
    """The formats on offer to each decision of one model, and their prices.

    Attributes:
        spec: the question.
        layers: what is decided.
        model: ``name``, ``digest`` and ``architecture`` of the model.
        budgets: further budgets than the spec's that plans will be made for.
        protected: decision name -> format, of decisions that a rule pins; the spec's own pins go before it.
        caches: KV caches that nothing is decided of.
        profile: how long kernels take; none when nothing is timed.
        energy: format -> (picojoules of a multiply-add, of a byte), of the user's table; none without one.
    """

    spec: StudySpec
    layers: Layers
    model: Mapping[str, str]
    budgets: tuple[Budget, ...] = ()
    protected: Mapping[str, str] = field(default_factory=dict)
    caches: tuple[Layer, ...] = ()
    profile: Profile | None = None
    energy: Mapping[str, tuple[float, float]] = field(default_factory=dict)

    @cached_property
    def weights(self) -> tuple[str, ...]:
        """Formats of weights on offer: those of the question, and with a target's own menu what layers are stored in.

        That menu is made without a model, and knows none but those in bf16.
        """
        if self.able is None or self.spec.formats != self.able.menu:
            return self.spec.formats
        stored = ((layer, own_type(layer)) for layer in self.layers)
        kept = (own for layer, own in stored if own and not self.refuses(layer, Format.parse(own)))
        return tuple(dict.fromkeys([*self.spec.formats, *kept]))

    @cached_property
    def menu(self) -> tuple[Format, ...]:
        """The formats that are offered, each to the layers that can take it."""
        weights = join(map(Format.parse, self.weights), self.spec.activations)
        return (*weights, *(Format.parse(text) for text in self.spec.kv))

    @cached_property
    def able(self) -> Capabilities | None:
        """What the target can hold; none without a target."""
        return capabilities(self.spec.target) if self.spec.target else None

    def refuses(self, layer: Layer, fmt: Format) -> str:
        """Say why a layer cannot take a format, by its shape or for the target's sake; empty when it can."""
        return fmt.refuses(layer) or (self.able.refuses(layer, fmt) if self.able else "")

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
                if problem := self.refuses(layer, wanted):
                    raise InputError("E130", f"pin '{pattern}': layer '{layer.name}': {problem}")
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
        return tuple(target.cost(self.layers, self.formats) for target, _ in self.targets())

    def targets(self) -> list[tuple[Any, Sequence[Layer]]]:
        """Who prices what, and the layers that cost anything there; weights first."""
        container = (self.able.container if self.able else "") or "native"
        found: list[tuple[Any, Sequence[Layer]]] = [
            (registry.make("targets", "bytes", container=container), self.layers)
        ]
        if multiplied := [layer for layer in self.layers if layer.macs]:
            found.append((registry.make("targets", "bops"), multiplied))
        if caches := [layer for layer in self.layers if layer.kind == "kv_cache"]:
            asked = [b.condition for b in (*self.asked, *self.budgets) if b.resource == "kv"]
            for condition in dict.fromkeys(asked or [f"at context {self.spec.length}"]):
                found.append((registry.make("targets", "kv", **conditions(condition)), caches))
        return [*found, *((target, self.layers) for target in self._served())]

    def _served(self) -> list[Any]:
        """What prices the resources that budgets name beside weights, bops and kv."""
        engine = self.profile.made if self.profile else None
        named = dict.fromkeys((b.resource, b.condition) for b in (*self.asked, *self.budgets))
        found = []
        for resource, condition in named:
            made: dict[str, Any] = {"condition": condition}
            if resource in TIMED and self.profile is not None:
                found.append(registry.make("targets", "latency", profile=self.profile, resource=resource, **made))
                continue
            made["caches"] = self.caches
            if resource == "memory":
                found.append(registry.make("targets", "memory", profile=self.profile, **made))
            elif resource == "traffic":
                found.append(registry.make("targets", "traffic", engine=engine, **made))
            elif resource == "energy" and self.energy:
                found.append(registry.make("targets", "energy", prices=self.energy, engine=engine, **made))
        return found

    @property
    def asked(self) -> tuple[Budget, ...]:
        return tuple(map(Budget.parse, self.spec.budgets))

    @cached_property
    def mask(self) -> Array:
        """(L, F): 0 where a format may be chosen, NaN elsewhere.

        Raises:
            InputError: a layer can take no format of the menu (E130).
        """
        mask = allowed(self.costs, self.pins, [str(fmt) for fmt in self.menu])
        self._bar_for_target(mask)
        for text in self.spec.activations:
            pairs = [fmt for fmt in self.menu if str(fmt).endswith(f"@{text}")]
            if pairs and all(fmt in self.misfits for fmt in pairs):
                raise InputError("E130", f"activation '{text}' fits no layer: {self.why_not(pairs[0])}")
        if self.spec.activations and "16" not in self.spec.activations:
            self._ask_for_activations(mask)
        for i, (decision, row) in enumerate(zip(self.layers.decisions, mask, strict=True)):
            if np.isnan(row).all():
                cache = decision.layers[0].kind == "kv_cache"
                offered = [fmt for fmt in self.menu if (fmt.family == "kv") == cache]
                layer = next(
                    (x for x in decision.layers if all(self.refuses(x, fmt) for fmt in offered)), decision.layers[-1]
                )
                shapes = [self.refuses(layer, fmt) for fmt in offered]
                kernels = [self._no_kernel(i, j) for j, fmt in enumerate(self.formats) if fmt in offered]
                reason = next(filter(None, [*shapes, *kernels]), "no format is offered")
                raise InputError("E130", f"layer '{layer.name}': {reason}", advice="offer another format as well")
        return mask

    def _bar_for_target(self, mask: Array) -> None:
        """Take off the menu what the target cannot hold."""
        if self.able is None:
            return
        for i, decision in enumerate(self.layers.decisions):
            for j, fmt in enumerate(self.formats):
                if not np.isnan(mask[i, j]) and any(self.able.refuses(layer, fmt) for layer in decision.layers):
                    mask[i, j] = np.nan

    @cached_property
    def rules(self) -> Rules:
        """The rules of the study, and ties of decisions that the target loads with one format."""
        rules = Rules.of(self.spec.rules)
        if self.able is None:
            return rules
        row_of = {layer.name: i for i, row in enumerate(self.layers.decisions) for layer in row.layers}
        groups = [sorted({row_of[name] for name in names}) for names in self.able.groups(self.layers)]
        return replace(rules, ties=(*rules.ties, *(rows for rows in groups if len(rows) > 1)))

    def _ask_for_activations(self, mask: Array) -> None:
        """Take weights alone off the menu of decisions that can take the same weights with an activation."""
        for row in mask:
            taken = {fmt.weight for fmt, m in zip(self.formats, row, strict=True) if fmt.activation and not np.isnan(m)}
            for j, fmt in enumerate(self.formats):
                if fmt.activation is None and fmt in taken:
                    row[j] = np.nan

    @cached_property
    def companions(self) -> frozenset[Format]:
        """Weights alone that are on the menu only for layers whose input cannot be rounded."""
        if not self.spec.activations or "16" in self.spec.activations:
            return frozenset()
        return frozenset(fmt.weight for fmt in self.menu if fmt.activation is not None)

    @cached_property
    def misfits(self) -> tuple[Format, ...]:
        """Formats of the menu that no layer can take."""
        return tuple(fmt for fmt in self.menu if all(self.refuses(layer, fmt) for layer in self.layers))

    def why_not(self, fmt: Format) -> str:
        """The reason for which most layers of its kind refuse a format."""
        concerned = [layer for layer in self.layers if (layer.kind == "kv_cache") == (fmt.family == "kv")]
        return Counter(self.refuses(layer, fmt) for layer in concerned or self.layers).most_common(1)[0][0]

    @cached_property
    def sizes(self) -> Array:
        """(L, F) bytes that put the formats of a decision in order: of its weights, or of its cache."""
        found = self.costs[0].value.copy()
        cache = next((table for table in self.costs if table.resource.startswith("kv ")), None)
        for i, row in enumerate(self.layers.decisions):
            if cache is not None and row.layers[0].kind == "kv_cache":
                found[i] = cache.value[i]
        return found

    def priced(self, plan: BitPlan) -> BitPlan:
        """Add what a plan costs; a resource that its formats have no price in, for want of a kernel, is left out."""
        cost: dict[str, float] = {"weights": self._total(plan, self.targets()[0][0], self.costs[0])}
        if self.able and not math.isfinite(cost["weights"]):
            raise cannot_hold(self.able.title, self.able.violations(plan))
        for (target, concerned), table in zip(self.targets()[1:], self.costs[1:], strict=True):
            if table.resource == "bops" or table.resource.startswith("kv "):
                each = [target.cost([x], [plan.formats[x.name]]) for x in concerned]
                cost[table.resource] = math.fsum(one.value[0, 0] for one in each)
            elif math.isfinite(total := self._total(plan, target, table)):
                cost[table.resource] = total
        return replace(plan, predicted=Predicted(cost=cost))

    def _total(self, plan: BitPlan, target: Any, table: CostTable) -> float:
        """What a plan costs in one resource, what is fixed included; NaN where it has no price."""
        wanted = tuple(dict.fromkeys(plan.formats.values()))
        if not set(wanted) <= set(self.formats):
            try:
                table = target.cost(self.layers, wanted)
            except InputError:
                # A profile need not hold formats that are not on the menu.
                return math.nan
        return math.fsum(table.value[np.arange(len(table.layers)), plan.choice(table.formats)]) + table.fixed

    @cached_property
    def without_kernel(self) -> Mapping[Format, str]:
        """Formats of the menu that some layer could take and the engine has no kernel for, each with the reason."""
        if self.profile is None:
            return {}
        found = {}
        for j, fmt in enumerate(self.menu):
            rows = [
                i for i, row in enumerate(self.layers.decisions) if not any(self.refuses(x, fmt) for x in row.layers)
            ]
            lacks = [self._no_kernel(i, j) for i in rows]
            if rows and all(lacks):
                found[fmt] = Counter(lacks).most_common(1)[0][0]
        return found

    def _no_kernel(self, i: int, j: int) -> str:
        """Why decision i has no kernel, or no time, in format j; empty when it has or nothing is timed."""
        if self.profile is None:
            return ""
        row, fmt = self.layers.decisions[i], self.formats[j]
        reasons = [refuses(layer, fmt, self.profile.made) for layer in row.layers]
        tables = (table.source["refused"] for table in self.costs if "refused" in table.source)
        reasons += [why for table in tables for why, cells in table.items() if [i, j] in cells]
        return next(filter(None, reasons), "")
