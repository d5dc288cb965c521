"""How numbers are written: with their doubt, their unit, and no digit that means nothing."""

from __future__ import annotations

import math

from mpsearch.web.markup import Html, tag

MIB = 2**20
MINUS = "\N{MINUS SIGN}"


def _plain(value: float, decimals: int | None) -> str:
    text = f"{value:.4g}" if decimals is None else f"{value:.{decimals}f}"
    return text.replace("-", MINUS)


def with_spread(value: float, spread: float | None = None) -> str:
    """Write a number and its standard error: two digits of the error, and the number just as far.

    >>> with_spread(0.0123456, 0.00056)
    '0.01235 ± 0.00056'
    >>> with_spread(0.25, math.nan), with_spread(0.0)
    ('0.25', '0')
    """
    if spread is None or not math.isfinite(spread) or spread <= 0 or not math.isfinite(value):
        return _plain(value, None)
    decimals = 1 - math.floor(math.log10(spread))
    if decimals > 7:
        return f"{_plain(value, None)} ± {spread:.1e}".replace("-", MINUS)
    decimals = max(decimals, 0)
    return f"{_plain(value, decimals)} ± {_plain(spread, decimals)}"


def size(count: float) -> str:
    """Write bytes in MiB.

    >>> size(3 * 2**20), size(1234)
    ('3.000 MiB', '0.001177 MiB')
    """
    text = f"{count / MIB:.4g} MiB" if abs(count) < MIB else f"{count / MIB:,.3f} MiB"
    return text.replace("-", MINUS)


def whole_bytes(count: float) -> str:
    """Write exact bytes.

    >>> whole_bytes(1234567)
    '1,234,567 bytes'
    """
    return f"{int(count):,} bytes"


def number(value: float, text: str | None = None) -> Html:
    """Write a number for reading, and in full for programs that read the page.

    >>> number(0.125)
    '<data value="0.125">0.125</data>'
    """
    return tag("data", with_spread(value) if text is None else text, value=repr(value))
