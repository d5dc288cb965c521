"""Logs of background work: one JSON object a line, bounded in size, without secrets or control characters."""

from __future__ import annotations

import contextlib
import json
import math
import os
import re
import time
from collections.abc import Iterator, Mapping
from datetime import UTC, datetime
from pathlib import Path
from typing import Any, Literal

from mpsearch.files import inside

try:
    import fcntl
except ImportError:  # Not on Windows, where one process writes a log.
    fcntl = None  # type: ignore[assignment]

Level = Literal["debug", "info", "warning", "error"]
#: Bytes of one file of a log, and how many older ones are kept beside it: less than 10 MB in all.
FILE_BYTES, OLDER = 2_000_000, 3
#: Bytes of one line; a longer text is cut.
LINE_BYTES = 8_000
_DEEPEST = 6

# Control characters, those that change the direction of text, and halves of surrogate pairs.
_UNSAFE = re.compile("[\x00-\x1f\x7f-\x9f\u061c\u200e\u200f\u2028\u2029\u202a-\u202e\u2066-\u2069\ud800-\udfff\ufeff]")
# The password of an address; a token, key or password that is named; and tokens that tell what they are.
# Lengths are bounded, so that a text made to be slow is not.
_ADDRESS = re.compile(r"(?<=://)([^\s/?#@:'\"]{0,200}):((?:[^\s/?#'\"]|/(?=[^\s?#'\"]{0,200}@)){0,400})@")
_NAMED = re.compile(
    r"(?i)(?<![\w-])([\w-]{0,40}(?:password|passwd|pwd|secret|token|api_?key|authorization))(['\"]?\s*[=:]\s*['\"]?)"
    r"((?:bearer\s+|basic\s+)?[^\s'\",;&}]+)"
)
_BEARER = re.compile(r"(?i)\b(bearer\s+)[\w.~+/=-]{8,}|\b(hf_|ghp_|sk-)[\w-]{16,}")
_SECRET_KEY = re.compile(r"(?i)(^|_|-)(password|passwd|pwd|secret|token|api_?key|authorization)$")


def plain(text: object) -> str:
    r"""Take control and direction characters out of a text that is shown or kept.

    >>> plain("a\x1b[31mb\n")
    'a?[31mb?'
    """
    return _UNSAFE.sub("?", str(text))


def hidden(text: str) -> str:
    """Write stars for passwords and tokens in a text.

    >>> hidden("postgresql://ann:s3cret@db.lan/mp refused token=abc")
    'postgresql://ann:***@db.lan/mp refused token=***'
    """
    text = _ADDRESS.sub(r"\1:***@", text)
    text = _NAMED.sub(r"\1\2***", text)
    return _BEARER.sub(lambda found: f"{found[1] or found[2]}***", text)


class Log:
    """The log of one study, which any number of processes write.

    Each line is an object with ``time`` (UTC), ``level``, ``study``, ``event``, ``pid`` and the event's fields. When
    the file is full it becomes ``.1``, and the oldest one goes. Writing never fails: a log is not worth a study.

    Attributes:
        path: the file that is written now.

    >>> import tempfile
    >>> folder = Path(tempfile.mkdtemp())
    >>> log = Log(folder, "small")
    >>> log("claimed", worker="w1", storage="postgresql://ann:s3cret@db/mp")
    >>> line = next(log.lines())
    >>> line["event"], line["worker"], line["storage"]
    ('claimed', 'w1', 'postgresql://ann:***@db/mp')
    """

    def __init__(self, folder: Path, study: str) -> None:
        """Choose the file.

        Args:
            folder: where logs are kept; made when the first line is written.
            study: name of the study, whatever characters it holds.
        """
        self.study = study
        # Names are labels: what a file can be called is decided here.
        stem = re.sub(r"[^A-Za-z0-9._-]", "_", study).strip(".")[:60] or "study"
        self.path = inside(folder, f"{stem}.log" if stem == study else f"{stem}-{_short(study)}.log")

    def __call__(self, event: str, level: Level = "info", **fields: Any) -> None:
        """Write a line.

        Args:
            event: what happened, in a word.
            level: ``debug``, ``info``, ``warning`` or ``error``.
            fields: plain values that belong to it.
        """
        now = datetime.fromtimestamp(time.time(), UTC).isoformat(timespec="milliseconds")
        head = {"time": now, "level": level, "study": self.study, "event": event, "pid": os.getpid()}
        own = {name if name not in head else f"{name}_": value for name, value in fields.items()}
        line = _line({**head, **own})
        with contextlib.suppress(OSError), self._held() as descriptor:
            if os.fstat(descriptor).st_size + len(line) > FILE_BYTES:
                self._rotate()
                with self._opened() as fresh:
                    os.write(fresh, line)
            else:
                os.write(descriptor, line)

    def lines(self) -> Iterator[dict[str, Any]]:
        """Yield all that is kept, oldest first; a line that was cut short is passed over."""
        for number in range(OLDER, -1, -1):
            try:
                content = self._older(number).read_bytes()
            except OSError:
                continue
            for line in content.splitlines():
                with contextlib.suppress(ValueError):
                    found = json.loads(line)
                    if isinstance(found, dict):
                        yield found

    def _older(self, number: int) -> Path:
        return self.path.with_name(f"{self.path.name}.{number}") if number else self.path

    def _rotate(self) -> None:
        for number in range(OLDER, 0, -1):
            with contextlib.suppress(FileNotFoundError):
                os.replace(self._older(number - 1), self._older(number))

    @contextlib.contextmanager
    def _opened(self) -> Iterator[int]:
        flags = os.O_WRONLY | os.O_APPEND | os.O_CREAT | getattr(os, "O_NOFOLLOW", 0)
        descriptor = os.open(self.path, flags, 0o600)
        try:
            yield descriptor
        finally:
            os.close(descriptor)

    @contextlib.contextmanager
    def _held(self) -> Iterator[int]:
        """The file that is written now, while no other process writes or changes it."""
        self.path.parent.mkdir(parents=True, exist_ok=True)
        while True:
            with self._opened() as descriptor:
                if fcntl is not None:
                    fcntl.flock(descriptor, fcntl.LOCK_EX)
                # Somebody may have moved it on between opening and holding.
                if fcntl is None or _same(descriptor, self.path):
                    yield descriptor
                    return


def _same(descriptor: int, path: Path) -> bool:
    try:
        there, held = os.stat(path, follow_symlinks=False), os.fstat(descriptor)
    except FileNotFoundError:
        return False
    return (there.st_dev, there.st_ino) == (held.st_dev, held.st_ino)


def _short(text: str) -> str:
    import hashlib

    return hashlib.sha256(text.encode("utf-8", "surrogatepass")).hexdigest()[:8]


def _line(values: Mapping[str, Any]) -> bytes:
    line = json.dumps({plain(name): _value(value, name) for name, value in values.items()}, ensure_ascii=False)
    if len(line.encode()) > LINE_BYTES:
        kept = {name: _value(value, name) for name, value in list(values.items())[:5]}
        kept = {name: value[:500] if isinstance(value, str) else value for name, value in kept.items()}
        line = json.dumps({**kept, "cut": hidden(plain(line))[:1000]}, ensure_ascii=False)
    return line.encode() + b"\n"


def _value(value: Any, name: str = "", depth: int = 0) -> Any:
    """A value as JSON can hold it, without secrets."""
    if _SECRET_KEY.search(name) and value:
        return "***"
    if value is None or isinstance(value, (bool, int)):
        return value if value is None or abs(value) < 2**63 else str(value)[:100]
    if isinstance(value, float):
        return value if math.isfinite(value) else str(value)
    if depth < _DEEPEST and isinstance(value, Mapping):
        return {plain(key): _value(item, str(key), depth + 1) for key, item in value.items()}
    if depth < _DEEPEST and isinstance(value, (list, tuple)):
        return [_value(item, name, depth + 1) for item in value]
    # Hidden before it is cut: half of a password is still one.
    return plain(hidden(str(value)[: 8 * LINE_BYTES]))[:LINE_BYTES]
