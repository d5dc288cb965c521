"""Errors and notices: what was found, what was expected, what to do next.

    MpsearchError
    ├── UsageError        2  the command line or a call is wrong
    ├── InputError        3  a file, a value, a model or data cannot be used
    ├── InfeasibleError   4  no plan fits the budgets
    ├── StorageError      6  the results database
    │   └── StudyNameError  3  the name of a study: not there, or another question's; an InputError too
    ├── ResourceError     7  memory, disk or an optional package is missing
    └── UnsafeError       8  refused because it could run foreign code or leave its folder

The number is the exit code of the command line; 1 is a fault of mpsearch itself. An error stops before any work is
lost; a `Notice` is something worth knowing about work that went on.
"""

from __future__ import annotations

import difflib
from collections.abc import Iterable
from dataclasses import dataclass


class MpsearchError(Exception):
    """An error a user can act on.

    Args:
        code: stable code such as ``E201``.
        message: one sentence: what was found and what was expected.
        where: file and line, layer or setting that it concerns.
        because: the reason, when the message alone does not give it.
        advice: what to do next.

    >>> print(InputError("E111", "budget: got 'nan'", advice="give bits, bytes or a percentage"))
    error[E111] budget: got 'nan'
      try      give bits, bytes or a percentage
    """

    exit_code = 1

    def __init__(self, code: str, message: str, *, where: str = "", because: str = "", advice: str = "") -> None:
        super().__init__(message)
        self.code = code
        self.message = message
        self.where = where
        self.because = because
        self.advice = advice

    def __str__(self) -> str:
        lines = [f"error[{self.code}] {self.message}"]
        for label, text in (("where", self.where), ("because", self.because), ("try", self.advice)):
            if text:
                lines.append(f"  {label:<8} {text}")
        return "\n".join(lines)

    def __reduce__(self) -> tuple[object, ...]:
        # Keyword-only fields must survive the way back from a worker process.
        return _rebuild, (type(self), self.code, self.message, self.where, self.because, self.advice)


def _rebuild(
    kind: type[MpsearchError], code: str, message: str, where: str, because: str, advice: str
) -> MpsearchError:
    return kind(code, message, where=where, because=because, advice=advice)


class UsageError(MpsearchError):
    """The command line or a call is wrong."""

    exit_code = 2


class InputError(MpsearchError):
    """A file, a value, a model or data cannot be used."""

    exit_code = 3


class InfeasibleError(MpsearchError):
    """No plan fits the budgets."""

    exit_code = 4


class StorageError(MpsearchError):
    """The results database cannot be used as asked."""

    exit_code = 6


class StudyNameError(InputError, StorageError):
    """The name of a study is not in the database, or is another question's: the mistake is in what was typed."""


class ResourceError(MpsearchError):
    """Memory, disk or an optional package is missing."""

    exit_code = 7


class UnsafeError(MpsearchError):
    """Refused because it could run foreign code or leave its folder."""

    exit_code = 8


@dataclass(frozen=True, slots=True)
class Notice:
    """Something worth knowing about work that went on: ``W…`` a warning, ``N…`` a note.

    >>> print(Notice("N415", "65 norm and bias vectors stay as they are"))
    note[N415] 65 norm and bias vectors stay as they are
    """

    code: str
    message: str

    def __str__(self) -> str:
        return f"{'warning' if self.code.startswith('W') else 'note'}[{self.code}] {self.message}"


def did_you_mean(word: str, known: Iterable[str]) -> str:
    """Return ``"; did you mean 'x'?"`` for the closest known word, or an empty string.

    >>> did_you_mean("budgte", ["budget", "formats"])
    "; did you mean 'budget'?"
    """
    close = difflib.get_close_matches(word, list(known), n=1)
    return f"; did you mean '{close[0]}'?" if close else ""
