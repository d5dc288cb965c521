"""A team: two users, one server, three workers that anybody may kill; see `benchmarks.team` for the long form."""

from __future__ import annotations

from pathlib import Path

from benchmarks.team import play


def test_two_users_share_what_they_compute_whatever_is_killed(database: str, small_llama: Path, tmp_path: Path) -> None:
    outcome = play(database, small_llama, tmp_path, kills=2, seed=1, tokens=512)
    assert outcome.states == {"ann": "complete", "bob": "complete"}
    assert outcome.killed == 2
    assert outcome.same_as_alone
    # What both ask for was computed once; only what was in the hands of those that were killed was begun again.
    assert outcome.done == outcome.distinct < outcome.alone
    assert outcome.given_out <= outcome.distinct + outcome.killed
    assert outcome.left_leased == 0
