"""Rows and errors as plain values, without the passwords that their texts may hold."""

from __future__ import annotations

from dataclasses import asdict
from typing import Any

from mpsearch.errors import MpsearchError
from mpsearch.storage.place import hide
from mpsearch.web.server.refusals import body_of


def plain(row: Any) -> dict[str, Any]:
    """The fields of a row."""
    return {name: hide(value) if isinstance(value, str) else value for name, value in asdict(row).items()}


def failed(error: MpsearchError) -> dict[str, Any]:
    """The body of an answer that is an error.

    >>> from mpsearch.errors import InputError
    >>> failed(InputError("E107", "cannot read 'x://ann:secret@db/mp'"))["error"]["message"]
    "cannot read 'x://ann:***@db/mp'"
    """
    return {"error": {name: hide(text) for name, text in body_of(error)["error"].items()}}
