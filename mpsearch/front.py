"""Measurements of plans, and the Pareto front they form."""

from __future__ import annotations

import math
from collections.abc import Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Any, overload

from mpsearch.keys import content_key

if TYPE_CHECKING:
    from mpsearch.plot.figure import Figure


@dataclass(frozen=True, slots=True)
class Metric:
    """A measured number: mean, standard error and unit."""

    value: float
    spread: float
    unit: str

    def to_json(self) -> dict[str, Any]:
        return {"value": self.value, "spread": self.spread if math.isfinite(self.spread) else None, "unit": self.unit}

    @classmethod
    def from_json(cls, data: Mapping[str, Any]) -> Metric:
        spread = data["spread"]
        return cls(float(data["value"]), math.nan if spread is None else float(spread), str(data["unit"]))


@dataclass(frozen=True)
class Measurement:
    """A plan that was run for real.

    Attributes:
        plan: key of the plan.
        label: what the plan is to its study, such as ``mixed`` or ``uniform int4-g64``.
        loss: mean divergence from the original model, in ``unit``; lower is better.
        spread: its standard error over the sequences of the data.
        unit: such as ``nats/token``.
        cost: resource -> total cost of the plan, what is not decided included.
        metrics: further measured numbers, such as ``cross_entropy``.
        machine: where it ran.
        data: key of the data it ran on, and how much of it.
        seconds: how long it took.
        samples: loss of each sequence; two plans on the same data are compared sequence by sequence.
    """

    plan: str
    label: str
    loss: float
    spread: float
    unit: str
    cost: Mapping[str, float]
    metrics: Mapping[str, Metric] = field(default_factory=dict)
    machine: str = ""
    data: Mapping[str, Any] = field(default_factory=dict)
    seconds: float = 0.0
    samples: tuple[float, ...] = ()

    def to_json(self) -> dict[str, Any]:
        return {
            "plan": self.plan,
            "label": self.label,
            "loss": self.loss,
            "spread": self.spread if math.isfinite(self.spread) else None,
            "unit": self.unit,
            "cost": dict(self.cost),
            "metrics": {name: metric.to_json() for name, metric in self.metrics.items()},
            "machine": self.machine,
            "data": dict(self.data),
            "seconds": self.seconds,
            "samples": list(self.samples),
        }

    @classmethod
    def from_json(cls, data: Mapping[str, Any]) -> Measurement:
        return cls(
            plan=str(data["plan"]),
            label=str(data["label"]),
            loss=float(data["loss"]),
            spread=math.nan if data["spread"] is None else float(data["spread"]),
            unit=str(data["unit"]),
            cost=dict(data["cost"]),
            metrics={name: Metric.from_json(metric) for name, metric in data["metrics"].items()},
            machine=str(data["machine"]),
            data=dict(data["data"]),
            seconds=float(data["seconds"]),
            samples=tuple(data.get("samples", ())),
        )


@dataclass(frozen=True)
class ParetoFront(Sequence[Measurement]):
    """The measurements no other one beats in both cost and loss, cheapest first.

    Attributes:
        points: the front.
        dominated: the measurements that are beaten.
        resource: which cost the front is drawn over.

    >>> a = Measurement("a", "", 3.0, 0.1, "nats/token", {"weights": 10})
    >>> b = Measurement("b", "", 1.0, 0.1, "nats/token", {"weights": 20})
    >>> c = Measurement("c", "", 4.0, 0.1, "nats/token", {"weights": 20})
    >>> [m.plan for m in ParetoFront.of([a, b, c])]
    ['a', 'b']
    """

    points: tuple[Measurement, ...]
    dominated: tuple[Measurement, ...] = ()
    resource: str = "weights"

    @classmethod
    def of(cls, measurements: Iterable[Measurement], resource: str = "weights") -> ParetoFront:
        """Sort measurements into the front and the beaten ones.

        Of two with equal cost and loss the one with the smaller plan key stays.
        """
        front: list[Measurement] = []
        beaten: list[Measurement] = []
        for point in sorted(measurements, key=lambda m: (m.cost[resource], m.loss, m.plan, m.label)):
            (front if not front or point.loss < front[-1].loss else beaten).append(point)
        return cls(tuple(front), tuple(beaten), resource)

    def __len__(self) -> int:
        return len(self.points)

    @overload
    def __getitem__(self, index: int) -> Measurement: ...
    @overload
    def __getitem__(self, index: slice) -> Sequence[Measurement]: ...
    def __getitem__(self, index: int | slice) -> Measurement | Sequence[Measurement]:
        return self.points[index]

    def __iter__(self) -> Iterator[Measurement]:
        return iter(self.points)

    @property
    def knee(self) -> Measurement | None:
        """The point farthest below the straight line between both ends, in units of the ends' distance."""
        if len(self.points) < 3:
            return None
        first, last = self.points[0], self.points[-1]
        width = last.cost[self.resource] - first.cost[self.resource]
        height = first.loss - last.loss
        return max(
            self.points[1:-1],
            key=lambda m: (first.loss - m.loss) / height - (m.cost[self.resource] - first.cost[self.resource]) / width,
        )

    def hypervolume(self, cost: float, loss: float) -> float:
        """Area that the front dominates below a reference point (``cost``, ``loss``); larger is better."""
        area = 0.0
        upper = loss
        for point in self.points:
            if point.cost[self.resource] < cost and point.loss < upper:
                area += (cost - point.cost[self.resource]) * (upper - point.loss)
                upper = point.loss
        return area

    def plot(self) -> Figure:
        """Draw measured loss over cost (see `mpsearch.plot.front`)."""
        from mpsearch.plot import front

        return front(self, self.resource)

    def _repr_html_(self) -> str:
        from mpsearch.plot.notebook import front_html

        return front_html(self)

    @property
    def key(self) -> str:
        """Content key of the front's points."""
        return content_key([point.to_json() for point in self.points])
