"""JSON objects as the text that the database keeps."""

from __future__ import annotations

import json
from collections.abc import Mapping
from typing import Any

from mpsearch.errors import InputError
from mpsearch.keys import canonical_json
from mpsearch.storage.failures import UnreadableError


def encode(what: str, value: Mapping[str, Any]) -> str:
    """Write a value as canonical JSON that can be stored as UTF-8.

    Raises:
        InputError: text with half a surrogate pair (E114).
        ValueError: NaN or infinity.
        TypeError: something that JSON cannot hold.
    """
    text = canonical_json(dict(value))
    try:
        text.encode()
    except UnicodeEncodeError as error:
        character = ord(text[error.start])
        raise InputError(
            "E114", f"{what}: holds U+{character:04X}, half of a surrogate pair, which is not text"
        ) from None
    return text


def decode(text: Any) -> dict[str, Any]:
    """Read a stored JSON object.

    Raises:
        UnreadableError: it is none, so something else has written to the database.
    """
    try:
        value = json.loads(text)
    except (ValueError, TypeError, RecursionError) as error:
        raise UnreadableError(f"a stored value is not JSON ({type(error).__name__})") from error
    if not isinstance(value, dict):
        raise UnreadableError("a stored value is not a JSON object")
    return value
