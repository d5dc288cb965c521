"""Means and their standard errors, honest for few samples."""

from __future__ import annotations

import math
from collections.abc import Sequence

_NORMAL = 1.959963984540054
# Student's 97.5 % quantile where the expansion below is not good enough.
_FEW = {1: 12.706204736432095, 2: 4.302652729911275, 3: 3.182446305284263, 4: 2.7764451051977987}


def student_factor(freedom: int) -> float:
    """How much wider Student's 95 % interval is than the normal one.

    Standard errors are multiplied by it, so that plus or minus 1.96 of them covers 95 % for few samples as well.

    Args:
        freedom: degrees of freedom, samples - 1.

    >>> round(student_factor(7), 3), round(student_factor(1000), 3)
    (1.206, 1.001)
    """
    if freedom in _FEW:
        return _FEW[freedom] / _NORMAL
    # Cornish and Fisher's expansion in 1 / freedom; within 0.2 % from 5 on.
    z, n = _NORMAL, freedom
    quantile = (
        z
        + (z**3 + z) / (4 * n)
        + (5 * z**5 + 16 * z**3 + 3 * z) / (96 * n**2)
        + (3 * z**7 + 19 * z**5 + 17 * z**3 - 15 * z) / (384 * n**3)
    )
    return quantile / z


def mean_and_error(values: Sequence[float]) -> tuple[float, float]:
    """Mean of independent samples and its standard error, widened for few samples (`student_factor`).

    The error of a single sample is NaN: it is not known.

    >>> mean, error = mean_and_error([1.0, 2.0, 3.0])
    >>> mean, round(error / student_factor(2), 4)
    (2.0, 0.5774)
    """
    count = len(values)
    mean = math.fsum(values) / count
    if count < 2:
        return mean, math.nan
    variance = math.fsum((x - mean) ** 2 for x in values) / (count - 1)
    return mean, math.sqrt(variance / count) * student_factor(count - 1)


def plus_minus(error: float | None, digits: int = 2) -> str:
    """A standard error as it stands behind its number; nothing where it is not known.

    Args:
        error: it, NaN or None where unknown.
        digits: of it that are written.

    >>> f"0.5{plus_minus(0.0123)}", plus_minus(math.nan)
    ('0.5 ± 0.012', '')
    """
    return "" if error is None or not math.isfinite(error) else f" ± {error:.{digits}g}"


def at_most(error: float | None, digits: int = 2) -> str:
    """A sum of standard errors, which is the most that the error of a sum can be, as it stands behind its number.

    >>> f"0.5{at_most(0.0123)}", at_most(None)
    ('0.5, at most ± 0.012', '')
    """
    told = plus_minus(error, digits)
    return told and f", at most{told}"
