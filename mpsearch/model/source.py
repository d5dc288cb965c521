"""Where text comes from: a file, or a part of the standard library's sources. Knows no torch."""

from __future__ import annotations

import hashlib
import json
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal

from mpsearch.errors import InputError, did_you_mean
from mpsearch.model.corpus import SPLITS, library_texts

#: Name under which the standard library's sources are asked for, such as ``stdlib:calibration``.
LIBRARY = "stdlib:"


@dataclass(frozen=True, slots=True)
class Source:
    """A text and which part of it.

    Attributes:
        text: path of a ``.jsonl`` file (one object per line) or of a plain text file, or ``stdlib:calibration``,
            ``stdlib:validation`` or ``stdlib:train``.
        key: field of a ``.jsonl`` line that holds the text.
        part: ``all``; or ``first`` and ``last`` for the first three quarters and the last quarter of the text.
    """

    text: str
    key: str = "text"
    part: Literal["all", "first", "last"] = "all"

    def to_json(self) -> dict[str, Any]:
        return {"text": self.text, "key": self.key, "part": self.part}

    @classmethod
    def from_json(cls, data: Mapping[str, Any]) -> Source:
        return cls(data["text"], data["key"], data["part"])


def read_texts(source: Source) -> list[str]:
    """Read the texts of a source.

    Raises:
        InputError: missing (E101), empty (E501), or a line without the field (E502).
    """
    if source.text.startswith(LIBRARY):
        split = source.text.removeprefix(LIBRARY)
        if split not in SPLITS:
            known = [LIBRARY + name for name in SPLITS]
            raise InputError("E101", f"text '{source.text}' is not known{did_you_mean(source.text, known)}")
        texts = library_texts(split)
    else:
        texts = _read_file(Path(source.text), source.key)
    if not texts:
        raise InputError("E501", f"{source.text} has no text", advice="give a file with text")
    for number, text in enumerate(texts, start=1):
        if not _is_text(text):
            raise InputError("E502", f"{source.text}: text {number} holds half of a surrogate pair, which is no text")
    return _part(texts, source.part)


def _is_text(text: str) -> bool:
    # A tokenizer takes UTF-8, which JSON's escapes need not be.
    try:
        text.encode()
    except UnicodeEncodeError:
        return False
    return True


def _part(texts: Sequence[str], part: str) -> list[str]:
    if part == "all":
        return list(texts)
    if len(texts) >= 4:
        cut = len(texts) * 3 // 4
        return list(texts[:cut] if part == "first" else texts[cut:])
    whole = "\n".join(texts)
    at = whole.rfind("\n", 0, len(whole) * 3 // 4)
    at = at if at > 0 else len(whole) * 3 // 4
    return [whole[:at] if part == "first" else whole[at:]]


def _read_file(path: Path, key: str) -> list[str]:
    if not path.is_file():
        around = [p.name for p in path.parent.iterdir()] if path.parent.is_dir() else []
        raise InputError("E101", f"text file '{path}' not found{did_you_mean(path.name, around)}")
    try:
        content = path.read_text(encoding="utf-8")
    except UnicodeDecodeError as error:
        raise InputError(
            "E501", f"{path} is not UTF-8 text (byte {error.start})", advice="give a .txt or .jsonl file"
        ) from error
    if path.suffix != ".jsonl":
        return [content] if content.strip() else []
    texts = []
    lines = content.splitlines()
    for number, line in enumerate(lines, start=1):
        if not line.strip():
            continue
        try:
            row = json.loads(line)
        except (ValueError, RecursionError) as error:
            raise InputError("E502", f"{path}:{number} is not JSON ({error})") from error
        if not isinstance(row, dict) or not isinstance(row.get(key), str):
            fields = sorted(row) if isinstance(row, dict) else []
            raise InputError(
                "E502",
                f"{path}:{number} has no text field '{key}' (fields: {', '.join(fields) or 'none'})",
                advice=f'set text_key = "{fields[0]}"' if fields else "write one JSON object with a text per line",
            )
        if row[key].strip():
            texts.append(row[key])
    if not texts:
        raise InputError("E501", f"{path} has 0 usable rows ({len(lines)} lines, all empty)")
    return texts


def source_digest(source: Source) -> str:
    """Return the SHA-256 of the text that a source gives, so that a changed file is another source."""
    total = hashlib.sha256()
    for text in read_texts(source):
        total.update(text.encode("utf-8", "surrogatepass") + b"\0")
    return total.hexdigest()
