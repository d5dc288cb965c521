"""Small floating-point numbers, of 4 to 8 bits: what each can tell apart.

Sources: E4M3 and E5M2: Micikevicius et al. 2022 (arXiv:2209.05433); E3M2, E2M3 and E2M1: OCP Microscaling Formats (MX)
v1.0, whose tables hold all five.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass


@dataclass(frozen=True, slots=True)
class Element:
    """A small float: a sign bit, ``exponent`` bits, ``mantissa`` bits, subnormals and two zeros.

    Attributes:
        name: such as ``e4m3``.
        exponent: bits of the exponent.
        mantissa: bits of the mantissa.
        bias: what is subtracted from a stored exponent.
        largest: the largest finite number.
        has_inf: whether codes stand for infinity.
        has_nan: whether codes stand for NaN.

    >>> ELEMENTS["e2m1"].bits, ELEMENTS["e2m1"].largest, ELEMENTS["e2m1"].smallest, ELEMENTS["e2m1"].top_exponent
    (4, 6.0, 0.5, 2)
    """

    name: str
    exponent: int
    mantissa: int
    bias: int
    largest: float
    has_inf: bool = False
    has_nan: bool = False

    @property
    def bits(self) -> int:
        """Bits of one code."""
        return 1 + self.exponent + self.mantissa

    @property
    def smallest_normal(self) -> float:
        """The smallest number with a full mantissa."""
        return 2.0 ** (1 - self.bias)

    @property
    def smallest(self) -> float:
        """The smallest number above 0, which is also the step of the subnormals."""
        return 2.0 ** (1 - self.bias - self.mantissa)

    @property
    def top_exponent(self) -> int:
        """Exponent of the largest number, once its bias is gone: ``emax`` in the MX specification."""
        return (1 << self.exponent) - 1 - self.bias - (1 if self.has_inf else 0)


#: The elements by name.
ELEMENTS: Mapping[str, Element] = {
    one.name: one
    for one in (
        Element("e4m3", 4, 3, 7, 448.0, has_nan=True),
        Element("e5m2", 5, 2, 15, 57344.0, has_inf=True, has_nan=True),
        Element("e3m2", 3, 2, 3, 28.0),
        Element("e2m3", 2, 3, 1, 7.5),
        Element("e2m1", 2, 1, 1, 6.0),
    )
}
#: How formats name them, such as ``fp8-e4m3``, as alternatives of a regular expression.
FLOAT_NAMES = "|".join(f"fp{one.bits}-{one.name}" for one in ELEMENTS.values())
