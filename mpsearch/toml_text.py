"""Reading study files, and saying where in them a mistake stands."""

from __future__ import annotations

import re
from pathlib import Path

from mpsearch.errors import InputError, did_you_mean


def read_text(file: Path) -> str:
    """Read a study file.

    Raises:
        InputError: missing, with the closest name (E101), larger than 1 MiB or not UTF-8 (E102).
    """
    if not file.is_file():
        around = [p.name for p in file.parent.iterdir()] if file.parent.is_dir() else []
        raise InputError("E101", f"study file '{file}' not found{did_you_mean(file.name, around)}")
    if file.stat().st_size > 2**20:
        raise InputError("E102", f"{file}: {file.stat().st_size} bytes; a study file has at most 1 MiB")
    try:
        return file.read_text(encoding="utf-8")
    except UnicodeDecodeError as error:
        raise InputError("E102", f"{file}: not UTF-8 text (byte {error.start})") from error


def toml_error(file: Path, text: str) -> InputError:
    """Make the error of a file that is not TOML (E102), or gives a key twice (E104), from what the parser says."""
    twice = "overwrite" in text or "twice" in text or "already" in text
    place = re.search(r"line (\d+), column (\d+)", text)
    where = f"{file}:{place[1]}:{place[2]}" if place else str(file)
    if twice:
        return InputError("E104", f"a key is given twice ({text})", where=where, advice="keep one")
    return InputError("E102", f"not TOML: {text}", where=where)


def line_of(text: str, word: str) -> int:
    """Number of the first line that sets or holds a word; 0 when none does."""
    lines = text.splitlines()
    for pattern in (rf'^\s*"?{re.escape(word)}"?\s*=', rf"{re.escape(word)}"):
        for number, line in enumerate(lines, start=1):
            if word and re.search(pattern, line):
                return number
    return 0
