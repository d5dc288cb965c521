"""Patterns of other people's files, matched so that none can hang or fill the machine."""

from __future__ import annotations

import fnmatch
import importlib
import math
import re
import time
import warnings
from typing import Any

from mpsearch.errors import InputError

#: Characters that a pattern may have.
LONGEST = 2000
#: What the upper ends of all counted repeats of a pattern may multiply to; they are written out before they run.
REPEATS = 10_000
_COUNTED = re.compile(r"\{(\d*)(?:,(\d*))?\}")
_SHOWN = 60


class Patterns:
    r"""Matches regular expressions of one file.

    The standard library's expressions cannot be stopped, and ``(a+)+$`` takes longer than anyone lives. The package
    ``regex``, which transformers needs, has the same syntax and a clock. What it reads otherwise (sets of sets, near
    matches) is refused.

    Args:
        where: name of the file, for messages.
        seconds: what all matches together may take.

    >>> Patterns("a.json").match(r"model\.\d+", "model.12.up")
    True
    """

    def __init__(self, where: str, seconds: float = 20.0) -> None:
        self._where = where
        self._left = seconds
        self._compiled: dict[str, Any] = {}

    def match(self, pattern: str, name: str) -> bool:
        """Whether a pattern fits the beginning of a name.

        Raises:
            InputError: not a regular expression, one that could fill memory, or one that takes too long (E307).
        """
        return self._run("match", pattern, name)

    def search(self, pattern: str, name: str) -> bool:
        """Whether a pattern fits anywhere in a name (errors as `match`)."""
        return self._run("search", pattern, name)

    def glob(self, pattern: str, name: str) -> bool:
        """Whether a shell's pattern fits a name whole, in its case (errors as `match`)."""
        return self._run("match", fnmatch.translate(pattern), name)

    def _run(self, how: str, pattern: str, name: str) -> bool:
        compiled = self._compiled.get(pattern)
        if compiled is None:
            compiled = self._compiled[pattern] = self._compile(pattern)
        start = time.monotonic()
        try:
            return getattr(compiled, how)(name, timeout=max(self._left, 1e-3)) is not None
        except (TimeoutError, MemoryError, RecursionError) as error:
            raise self._refused(pattern, "takes too long to match") from error
        finally:
            self._left -= time.monotonic() - start

    def _compile(self, pattern: str) -> Any:
        if len(pattern) > LONGEST:
            raise self._refused(pattern, f"has {len(pattern)} characters; at most {LONGEST} are read")
        bare = re.sub(r"\\.", "", pattern, flags=re.DOTALL)
        counts = [found.group(2) or found.group(1) or "1" for found in _COUNTED.finditer(bare)]
        if (
            any(len(count) > len(str(REPEATS)) for count in counts)
            or math.prod(max(int(count), 1) for count in counts) > REPEATS
        ):
            raise self._refused(pattern, f"repeats something more than {REPEATS} times")
        if "{" in _COUNTED.sub("", bare):
            raise self._refused(pattern, "holds a brace that counts nothing; write \\{ for a brace")
        regex: Any = importlib.import_module("regex")
        try:
            with warnings.catch_warnings():
                warnings.simplefilter("error")
                re.compile(pattern)
                return regex.compile(pattern)
        except (re.error, regex.error, OverflowError, RecursionError, MemoryError, Warning) as error:
            raise self._refused(pattern, f"is no regular expression: {str(error)[:100]}") from error

    def _refused(self, pattern: str, why: str) -> InputError:
        shown = pattern if len(pattern) <= _SHOWN else f"{pattern[:_SHOWN]}…"
        return InputError("E307", f"'{self._where}': pattern '{shown}' {why}", advice="name the layers exactly")
