"""What somebody wants of a plan for a moment, beside budgets: pins, bars and floors, which only take formats away."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field, replace

from mpsearch.errors import InputError, did_you_mean
from mpsearch.layer import Layers
from mpsearch.problem import Problem
from mpsearch.rules import Column, Rows, Rules


@dataclass(frozen=True)
class Wish:
    """What somebody wants of a plan beside budgets; patterns are those of layers, the last one that names it counts.

    Attributes:
        pins: pattern -> the only format its layers may take.
        bars: pattern -> formats that its layers may not take.
        floors: pattern -> format: nothing cheaper than this in the first budget's resource.
    """

    pins: Mapping[str, str] = field(default_factory=dict)
    bars: Mapping[str, Sequence[str]] = field(default_factory=dict)
    floors: Mapping[str, str] = field(default_factory=dict)

    def __bool__(self) -> bool:
        return bool(self.pins or self.bars or self.floors)

    def pinned(self, layers: Layers) -> dict[str, str]:
        """Decision name -> the format that a pin gives it (raises E120 as `rules`)."""
        return {row: fmt for pattern, fmt in self.pins.items() for row in _rows(layers, pattern)}

    def rules(self, layers: Layers, problem: Problem, base: Rules, own: Mapping[str, str]) -> Rules:
        """The wish as further rules: what the study's own rules and pins take away stays away.

        Args:
            layers: of the model.
            problem: of the budgets; its first resource puts formats in order for floors.
            base: rules of the study.
            own: decision name -> format, of the study's own pins.

        Raises:
            InputError: a pattern that matches nothing (E120), a format that was not scored, or another format than
                the study's own pin (E213).
        """
        pins = self.pinned(layers)
        for row, fmt in pins.items():
            _check(fmt, problem)
            given = base.pins.get(row)
            held = own.get(row) or (problem.formats[given] if isinstance(given, int) else given)
            if held is not None and held != fmt:
                raise InputError(
                    "E213", f"'{row}' is pinned to {held} by the study, and cannot take {fmt}",
                    advice="take back the pin, or start another study",
                )  # fmt: skip
        # A row may stand in both tables; of bars all count, and a floor is a bar of all that is cheaper.
        bars: dict[Rows, list[Column]] = {row: list(formats) for row, formats in base.bars.items()}
        for pattern, formats in self.bars.items():
            for row in _rows(layers, pattern):
                bars.setdefault(row, []).extend(formats)
        for row, fmt in {row: fmt for pattern, fmt in self.floors.items() for row in _rows(layers, pattern)}.items():
            bars.setdefault(row, []).extend(_cheaper(row, fmt, problem))
        all_pins: dict[Rows, Column] = {**base.pins, **{row: fmt for row, fmt in pins.items() if row not in base.pins}}
        return replace(base, pins=all_pins, bars=bars)


def _rows(layers: Layers, pattern: str) -> list[str]:
    return list(dict.fromkeys(layer.tie or layer.name for layer in layers.match(pattern)))


def _check(fmt: str, problem: Problem) -> int:
    if fmt not in problem.formats:
        known = ", ".join(problem.formats)
        close = did_you_mean(fmt, problem.formats)
        raise InputError("E213", f"rules: no format '{fmt}'{close}", advice=f"there is {known}")
    return problem.formats.index(fmt)


def _cheaper(row: str, fmt: str, problem: Problem) -> list[str]:
    cost = problem.cost[0][problem.names.index(row)]
    return [problem.formats[j] for j in (cost < cost[_check(fmt, problem)]).nonzero()[0].tolist()]
