"""`mpsearch worker --study`: whose code it runs, and which options go with it."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest

import mpsearch as mp
from mpsearch.spec import StudySpec
from mpsearch.submitting import start, submit
from tests.service_shell import Shell, shell, state, study, until

# Fixtures.
__all__ = ["shell", "study"]


def test_code_of_a_model_runs_only_where_the_command_says_so(shell: Shell, study: dict[str, Any]) -> None:
    asked = mp.study(**study, trust_remote_code=True)
    submit(asked.spec, asked.store, background=False)
    assert shell("worker", "--study", "small") == 8
    assert "E802" in shell.err
    assert "--trust-remote-code" in shell.err
    # Nothing was begun, and its log says why.
    assert state() == "submitted"
    (line,) = asked.store.control.lines("small")
    assert (line.kind, line.text[:4]) == ("declined", "E802")
    asked.store.close()
    assert shell("worker", "--study", "small", "--trust-remote-code") == 0
    assert state() == "complete"


@pytest.mark.parametrize("trusts", [True, False])
def test_the_word_of_who_submits_counts_for_the_process_that_it_starts(tmp_path: Path, trusts: bool) -> None:
    asked = StudySpec.of(
        name="s", model="m", calibration="c", validation="v", budgets=["4"], trust_remote_code=trusts, out=str(tmp_path)
    )
    number = start(asked, f"sqlite:///{tmp_path / 'none.db'}")
    told = Path(f"/proc/{number}/cmdline")
    # Empty for a moment, while the system puts the new program in the place of this one.
    until(lambda: told.read_text(encoding="utf-8") != "")
    words = told.read_text(encoding="utf-8").split("\0")
    assert "--study" in words
    assert ("--trust-remote-code" in words) == trusts
    # It finds no database and ends.
    until(lambda: "E101" in (tmp_path / "s.log").read_text(encoding="utf-8"))


@pytest.mark.parametrize(
    "words", [("--study", "s", "--idle", "1"), ("--workers", "2"), ("--executor", "ray"), ("--set", "address=auto")]
)
def test_options_that_would_do_nothing_are_refused(words: tuple[str, ...], shell: Shell) -> None:
    assert shell("worker", *words) == 2
    assert "E115" in shell.err
    assert not Path("mpsearch.db").exists()
