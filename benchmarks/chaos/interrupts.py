"""Ctrl-C in a terminal, at any moment: a study stops at once, says how to go on, and goes on like that."""

from __future__ import annotations

import random
import shlex
import signal
import sys
import time
from collections import Counter
from collections.abc import Mapping
from pathlib import Path

import pexpect  # type: ignore[import-untyped]

from benchmarks.chaos.drivers import Maker
from benchmarks.chaos.lab import Lab

#: Seconds that a study may take to stop.
_LIMIT = 2.0


def interrupt(
    make: Maker, folder: Path, calm: Mapping[str, str], *, times: int, window: float, seed: int = 0
) -> Counter[str]:
    """Press Ctrl-C at random moments; what is printed then is typed next.

    Args:
        make: makes a lab.
        folder: for the labs.
        calm: what an untroubled run leaves.
        times: how often.
        window: each comes within so many seconds of the start.
        seed: of the moments.
    """
    dice = random.Random(seed)
    found: Counter[str] = Counter()
    while found["interrupts"] < times:
        found["rounds"] += 1
        lab, here = make(folder / f"round-{found['rounds']}"), 0
        first = [*lab.command()]
        first.remove("--quiet")
        command = first
        whole = False
        while found["interrupts"] < times and not whole:
            command, whole = _press(lab, command, first, dice.uniform(0.1, window), found)
            here += 1
        if not whole:
            lab.finish()
        found += lab.check(calm, kills=here, workers=2)
    return found


def _heed() -> None:
    # What is started in the background is told to ignore Ctrl-C.
    signal.signal(signal.SIGINT, signal.SIG_DFL)


def _press(lab: Lab, command: list[str], first: list[str], after: float, found: Counter[str]) -> tuple[list[str], bool]:
    """Start a command, press Ctrl-C, and return the command that was printed, and whether it had come to its end."""
    child = pexpect.spawn(
        command[0], command[1:], env=lab.environment, cwd=str(lab.folder), timeout=120, encoding="utf-8",
        dimensions=(24, 200), preexec_fn=_heed,
    )  # fmt: skip
    ended = child.expect([pexpect.EOF, pexpect.TIMEOUT], timeout=after)
    if ended == 0:
        child.close()
        found["came to its end"] += 1
        found["other code"] += child.exitstatus != 0
        return command, True
    pressed = time.monotonic()
    child.sendintr()
    child.expect(pexpect.EOF)
    child.wait()
    found["slow"] += time.monotonic() - pressed > _LIMIT
    child.close()
    text = (child.before or "").replace("\r", "\n")
    found["interrupts"] += 1
    if child.exitstatus == 0:
        found["came to its end"] += 1
        return command, True
    if child.signalstatus == signal.SIGINT:
        # Python itself was being loaded.
        found["before it began"] += 1
        return command, False
    if child.exitstatus != 130 or "Traceback" in text:
        found["other code"] += 1
        sys.stderr.write(f"ended with {child.exitstatus}, {child.signalstatus}: {text[-600:]}\n")
    found["not paused"] += lab.state() not in ("paused", "complete", "")
    found["lost"] += len(lab.lost())
    _, words, again = text.partition("go on with: ")
    again = again.split("\n", 1)[0].strip()
    if not lab.state() or again == "the same command":
        found["before it had a name"] += 1
        return command, False
    if not words:
        # Before the first line of ours, only the shell's user knows the command.
        found["no command"] += 1
        return first, False
    program, *rest = shlex.split(again)
    return [str(Path(sys.executable).parent / program), *rest, "--out", str(lab.folder / "out")], False
