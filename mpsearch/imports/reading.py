"""Reading files of other tools: of bounded size, of the right kind, every fault told with its file."""

from __future__ import annotations

import importlib
import json
import math
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from mpsearch.errors import InputError

#: Bytes that a text file may have. Measurements of a large model, the largest of these files, have a few million.
TEXT_LIMIT = 64 * 2**20
YAML_LIMIT = 2**20


def find_file(path: Path, names: Sequence[str]) -> Path:
    """Return a file, or of a folder the first of these names that it holds.

    Raises:
        InputError: there is none (E101).
    """
    if path.is_dir():
        found = next((path / name for name in names if (path / name).is_file()), None)
        if found is None:
            raise InputError("E101", f"folder '{path}' holds no {' and no '.join(names) or 'file of one name'}")
        return found
    if not path.is_file():
        raise InputError("E101", f"'{path}' is not there")
    return path


def read_text(path: Path, limit: int = TEXT_LIMIT) -> str:
    """Read a text file.

    Raises:
        InputError: not readable (E101), too large or no text (E307).
    """
    try:
        size = path.stat().st_size
        if size > limit:
            raise InputError("E307", f"'{path}' has {size} bytes; at most {limit} are read")
        return path.read_text(encoding="utf-8")
    except OSError as error:
        raise InputError("E101", f"'{path}' cannot be read: {error.strerror}") from error
    except UnicodeDecodeError as error:
        raise InputError("E307", f"'{path}' is not a text file") from error


def read_json(path: Path) -> Mapping[str, Any]:
    """Read a JSON object.

    Raises:
        InputError: not readable (E101), or no JSON object (E307).
    """
    try:
        value = json.loads(read_text(path))
    except (ValueError, RecursionError) as error:
        raise InputError("E307", f"'{path}' is not JSON: {str(error)[:200]}") from error
    return mapping(value, "it", path)


def read_yaml(path: Path) -> Mapping[str, Any]:
    """Read a YAML mapping of plain values.

    Raises:
        InputError: not readable (E101), or no such YAML (E307).
    """
    yaml: Any = importlib.import_module("yaml")
    try:
        value = yaml.safe_load(read_text(path, YAML_LIMIT))
    except (yaml.YAMLError, ValueError, RecursionError) as error:
        raise InputError("E307", f"'{path}' is not YAML: {str(error)[:200]}") from error
    return mapping(value, "it", path)


def mapping(value: Any, what: str, path: Path) -> Mapping[str, Any]:
    """Return a mapping from texts, or refuse what is none (E307)."""
    if not isinstance(value, dict) or not all(isinstance(key, str) for key in value):
        raise _wrong(path, what, value, "names and what they mean")
    return value


def texts(value: Any, what: str, path: Path) -> list[str]:
    """Return a list of texts, or refuse what is none (E307); None is an empty one."""
    if value is None:
        return []
    if not isinstance(value, list) or not all(isinstance(each, str) for each in value):
        raise _wrong(path, what, value, "a list of texts")
    return value


def text(value: Any, what: str, path: Path) -> str:
    """Return a text, or refuse what is none (E307)."""
    if not isinstance(value, str):
        raise _wrong(path, what, value, "a text")
    return value


def whole(value: Any, what: str, path: Path) -> int:
    """Return a whole number of at most 9 digits, or refuse what is none (E307)."""
    if isinstance(value, bool) or not isinstance(value, int) or abs(value) >= 10**9:
        raise _wrong(path, what, value, "a whole number")
    return value


def number(value: Any, what: str, path: Path) -> float:
    """Return a finite number, or refuse what is none (E307)."""
    if isinstance(value, bool) or not isinstance(value, (int, float)) or not math.isfinite(value) or abs(value) > 1e9:
        raise _wrong(path, what, value, "a number")
    return float(value)


def truth(value: Any, what: str, path: Path) -> bool:
    """Return true or false, or refuse what is neither (E307)."""
    if not isinstance(value, bool):
        raise _wrong(path, what, value, "true or false")
    return value


def shown(value: Any) -> str:
    """Write a value for a message, short whatever it is.

    >>> shown("x" * 100), shown([1]), shown(10**30), shown(None)
    ('a long text', 'a list', 'a huge number', 'None')
    """
    if isinstance(value, str):
        return repr(value) if len(value) <= 60 else "a long text"
    if isinstance(value, (list, dict)):
        return "a list" if isinstance(value, list) else "an object"
    return "a huge number" if isinstance(value, int) and abs(value) >= 10**12 else str(value)


def _wrong(path: Path, what: str, value: Any, wanted: str) -> InputError:
    return InputError("E307", f"'{path}': {what} is {shown(value)}; expected {wanted}")
