"""The studies of a database, one line each: what it is called, where it stands, how far it is, since when."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from datetime import UTC, datetime
from typing import TYPE_CHECKING, Any

from mpsearch.pace import span

if TYPE_CHECKING:
    from mpsearch.records import StudyRow, StudyStatus

#: Columns of a line.
_WIDTH = 80
_NAME = 38


def study_lines(statuses: Sequence[StudyStatus], now: datetime | None = None) -> Iterator[str]:
    """One line of at most 80 columns for each study.

    Args:
        statuses: of the studies.
        now: the time; of this machine when None.

    >>> from mpsearch.records import StudyStatus
    >>> row = StudyStatus("tiny", "running", "run", "score", 3, 40, "", "", "", True, "2026-01-01T10:00:00+00:00")
    >>> list(study_lines([row], datetime(2026, 1, 1, 10, 5, tzinfo=UTC)))
    ['tiny  running      score 3/40         5m00s']
    """
    from mpsearch.cli.show import safe

    moment = now or datetime.now(UTC)
    width = min(_NAME, max((len(safe(row.name)) for row in statuses), default=0))
    for row in statuses:
        name = safe(row.name)
        name = name if len(name) <= width else f"{name[: width - 1]}…"
        age = span((moment - datetime.fromisoformat(row.updated)).total_seconds())
        yield f"{name:<{width}}  {standing(row):<11}  {_progress(row):<18} {age:>6}"[:_WIDTH]


def standing(row: StudyStatus) -> str:
    """Where a study stands, in a word; one that is asked to stop and has not yet done so is ``stopping``."""
    return "stopping" if row.state == "running" and row.wanted != "run" else row.state


def _progress(row: StudyStatus) -> str:
    """How far a phase is, of a study that is in one."""
    from mpsearch.cli.show import safe

    if row.state not in ("running", "interrupted", "paused") or not row.phase:
        return ""
    return f"{safe(row.phase)} {row.done}/{row.total}"[:18]


def outcome(row: StudyStatus) -> int:
    """Exit code that tells how a study has ended: 0, 5 with gaps, of one that failed that of its error."""
    from mpsearch.explaining import exit_code

    if row.state == "failed":
        return exit_code(row.reason)
    return 5 if row.state == "gaps" else 0


def listed(rows: Sequence[StudyRow], statuses: Sequence[StudyStatus]) -> list[dict[str, Any]]:
    """The same as plain values."""
    found = {row.name: row for row in statuses}
    return [
        {
            "name": row.name,
            "state": found[row.name].state,
            "wanted": found[row.name].wanted,
            "phase": found[row.name].phase,
            "done": found[row.name].done,
            "total": found[row.name].total,
            "reason": found[row.name].reason,
            "home": found[row.name].home,
            "created": row.created,
            "updated": row.updated,
        }
        for row in rows
        if row.name in found
    ]
