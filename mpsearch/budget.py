"""Budgets: ``RESOURCE <= AMOUNT UNIT [at CONDITION]``, exact from the text to the limit."""

from __future__ import annotations

import math
import re
from collections.abc import Iterable
from dataclasses import dataclass
from fractions import Fraction

from mpsearch.decimals import decimal_text
from mpsearch.errors import InputError, did_you_mean
from mpsearch.tables import CostTable
from mpsearch.workload import canonical

_BYTES = {
    "B": 1, "bytes": 1, "kB": 10**3, "KB": 10**3, "MB": 10**6, "GB": 10**9, "TB": 10**12,
    "KiB": 2**10, "MiB": 2**20, "GiB": 2**30, "TiB": 2**40,
}  # fmt: skip
_BOPS = {"BOPs": 1, "MBOPs": 10**6, "GBOPs": 10**9, "TBOPs": 10**12}
_SECONDS = {"us": Fraction(1, 10**6), "ms": Fraction(1, 10**3), "s": Fraction(1)}
_JOULES = {"uJ": Fraction(1, 10**6), "mJ": Fraction(1, 10**3), "J": Fraction(1)}
_SCALES: dict[str, Fraction] = {
    **{unit: Fraction(size) for unit, size in (_BYTES | _BOPS).items()}, **_SECONDS, **_JOULES,
}  # fmt: skip
_UNITS: dict[str, tuple[str, ...]] = {
    "weights": ("bits", "%", *_BYTES), "bops": ("%", *_BOPS), "kv": ("%", *_BYTES), "memory": ("%", *_BYTES),
    "ttft": ("%", *_SECONDS), "tpot": ("%", *_SECONDS), "latency": ("%", *_SECONDS), "traffic": ("%", *_BYTES),
    "energy": tuple(_JOULES),
}  # fmt: skip
#: Most digits of an amount, written out.
_DIGITS = 300
#: Resources whose cost is how long a pass takes.
TIMED = ("ttft", "tpot", "latency")
_PATTERN = re.compile(
    r"\s*(?:(?P<resource>[A-Za-z_]+)\s*<=)?\s*(?P<amount>[-+]?[\d./]+(?:[eE][-+]?\d+)?|[^\s%A-Za-z]+|[A-Za-z]+)\s*(?P<unit>%|[A-Za-z]+)?\s*"
    r"(?:\bat\s+(?P<at>.*))?"
)
_HELP = (
    "write one like 'weights <= 4.25 bits', 'weights <= 3.5 GiB', 'bops <= 60 %', 'kv <= 2 GiB at context 8192', "
    "'memory <= 8 GiB at context 8192' or 'tpot <= 14 ms at context 2048'"
)


@dataclass(frozen=True, slots=True)
class Budget:
    """A resource and the most of it that a plan may use.

    Attributes:
        resource: ``weights`` (every stored byte of the model), ``bops``, ``kv`` (the KV caches), ``memory`` (all that
            serving takes), ``ttft`` (seconds to the first token), ``tpot`` (seconds of each further one), ``latency``
            (of whole requests), ``traffic`` (bytes that a decode step reads) or ``energy`` (joules of a decode step).
        amount: exact number in ``unit``.
        unit: ``bits`` per weight of the whole model, bytes such as ``GiB``, ``BOPs`` with a prefix, ``us``, ``ms`` or
            ``s``, ``J`` with a prefix, or ``%`` of the model with 16-bit weights, activations and caches.
        condition: what it holds for: ``at context 8192, batch 4``, ``at prompt 512``, ``at prompt 512, output 128``
            (see `mpsearch.workload`).

    >>> str(Budget.parse("weights<=4.25bits"))
    'weights <= 4.25 bits'
    >>> Budget.parse("28%").amount
    Fraction(28, 1)
    """

    resource: str
    amount: Fraction
    unit: str
    condition: str = ""

    @classmethod
    def parse(cls, text: str) -> Budget:
        """Read a budget; a bare amount means weights, a bare number means bits per weight.

        Raises:
            InputError: not a budget, or not a positive finite amount (E111); unknown resource or unit (E112).
        """
        match = _PATTERN.fullmatch(text)
        if match is None:
            raise InputError("E111", f"budget: got '{text}'", advice=_HELP)
        resource = match["resource"] or "weights"
        if resource not in _UNITS:
            raise InputError(
                "E112",
                f"budget '{text}': no target gives a cost called '{resource}'{did_you_mean(resource, _UNITS)}",
                advice=f"resources: {', '.join(_UNITS)}",
            )
        try:
            amount = _fraction(match["amount"])
        except (ValueError, ZeroDivisionError):
            raise InputError(
                "E111", f"budget: got '{match['amount']}', expected a number", where=text, advice=_HELP
            ) from None
        if amount <= 0:
            raise InputError("E111", f"budget: got '{match['amount']}', expected more than 0", where=text, advice=_HELP)
        unit = match["unit"] or {"weights": "bits", "bops": "%", "kv": "%"}.get(resource, "")
        if not unit:
            raise InputError("E112", f"budget '{text}': no unit", advice=f"give one of {', '.join(_UNITS[resource])}")
        if unit not in _UNITS[resource]:
            raise InputError(
                "E112",
                f"budget '{text}': unit '{unit}' does not fit '{resource}'{did_you_mean(unit, _UNITS[resource])}",
                advice=f"units of {resource}: {', '.join(_UNITS[resource])}",
            )
        return cls(resource, amount, unit, canonical(resource, match["at"]))

    def __str__(self) -> str:
        return f"{self.resource} <= {decimal_text(self.amount)} {self.unit} {self.condition}".rstrip()

    @property
    def priced_by(self) -> str:
        """``resource`` of the cost table that the budget is read off: with its condition, where it has one."""
        return f"{self.resource} {self.condition}".rstrip()

    @property
    def scale(self) -> Fraction:
        """What one of its unit is in bytes, BOPs, seconds or joules; not for bits and %, which depend on the model."""
        return _SCALES[self.unit]

    def limit(self, cost: CostTable) -> float:
        """Return the largest cost, in the table's unit, that keeps the budget; a whole number of bytes and BOPs.

        Predicted times must be below by the margin of their table, for they are not exact.

        Raises:
            ValueError: the table is of another resource.
        """
        if cost.resource != self.priced_by:
            raise ValueError(f"a budget of {self.priced_by} cannot be read off a table of {cost.resource}")
        if self.unit == "%" and not cost.reference:
            raise InputError(
                "E112", f"budget '{self}': what 100 % would be is not known: there are no times of the model as it is",
                advice=f"give {_UNITS[self.resource][-2]}, or a table with times in bf16 or fp32",
            )  # fmt: skip
        if self.unit == "%":
            exact = self.amount * Fraction(cost.reference) / 100
        elif self.unit == "bits":
            exact = self.amount * cost.weights / 8
        else:
            exact = self.amount * self.scale
        if cost.unit == "s":
            return float(exact / Fraction(cost.source.get("margin", 1.0)))
        return float(exact) if cost.unit == "J" else math.floor(exact)


def _fraction(text: str) -> Fraction:
    # Written out, 1e99999999 would have a hundred million digits.
    exponent = text.lower().partition("e")[2]
    if len(text) > _DIGITS or (exponent and abs(int(exponent)) > _DIGITS):
        raise ValueError("too many digits")
    return Fraction(text)


def units(resource: str) -> tuple[str, ...]:
    """Units of a resource.

    >>> units("tpot")
    ('%', 'us', 'ms', 's')
    """
    return _UNITS[resource]


def conditions(condition: str) -> dict[str, int]:
    """Read a condition into settings of a target.

    >>> conditions("at context 8192, batch 4")
    {'context': 8192, 'batch': 4}
    """
    return {name: int(count) for name, count in re.findall(r"(context|batch) (\d+)", condition)}


def parse_budgets(texts: Iterable[str]) -> tuple[Budget, ...]:
    """Read a list of budgets; none at all is an error (E111)."""
    found = tuple(Budget.parse(text) for text in texts)
    if not found:
        raise InputError("E111", "budgets: the list is empty", advice=_HELP)
    return found
