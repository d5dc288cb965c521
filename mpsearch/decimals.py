"""Exact amounts as text."""

from __future__ import annotations

from fractions import Fraction


def decimal_text(amount: Fraction) -> str:
    """Write an exact amount as a decimal when it is one, else as a fraction.

    >>> decimal_text(Fraction(17, 4)), decimal_text(Fraction(1, 3))
    ('4.25', '1/3')
    """
    rest = amount.denominator
    for prime in (2, 5):
        while rest % prime == 0:
            rest //= prime
    if rest != 1:
        return str(amount)
    digits = 0
    while (amount * 10**digits).denominator != 1:
        digits += 1
    whole = str(int(amount * 10**digits)).rjust(digits + 1, "0")
    return whole if not digits else f"{whole[:-digits]}.{whole[-digits:]}"
