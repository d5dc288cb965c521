"""Content keys: the SHA-256 of the canonical JSON of everything that made a value."""

from __future__ import annotations

import hashlib
import json
from typing import Any


def canonical_json(value: Any) -> str:
    """Write a value as JSON in one way only: sorted keys, no spaces, shortest floats, no NaN.

    Args:
        value: dicts with text keys, lists or tuples, text, integers, finite floats, booleans, None.

    Raises:
        ValueError: for NaN or infinity, which JSON cannot hold.
        TypeError: for anything else that JSON cannot hold.

    >>> canonical_json({"b": 1, "a": [1.5, "x"]})
    '{"a":[1.5,"x"],"b":1}'
    """
    return json.dumps(value, sort_keys=True, separators=(",", ":"), ensure_ascii=False, allow_nan=False)


def content_key(value: Any) -> str:
    """Return the 64 hexadecimal digits that name a value by its content.

    >>> content_key({"a": 1}) == content_key(dict(a=1))
    True
    """
    return hashlib.sha256(canonical_json(value).encode()).hexdigest()
