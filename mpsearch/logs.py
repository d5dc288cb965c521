"""Texts that are shown or kept: without control characters, passwords and tokens."""

from __future__ import annotations

import logging
import re

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
_USER = re.compile(r"[\w.+-]+://[^:/]*(:[^@]*)@")


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


def without_password(address: str) -> str:
    """Leave the password out of the address of a database; it still is one, for who has the password elsewhere.

    >>> without_password("postgresql://ann:s3/c:ret@db.lan/mp?password=x&sslmode=require")
    'postgresql://ann@db.lan/mp?sslmode=require'
    >>> without_password("results.db")
    'results.db'
    """
    found = _USER.match(address)
    if found:
        address = address[: found.start(1)] + address[found.end(1) :]
    head, mark, query = address.partition("?")
    if mark and "://" in head:
        kept = [field for field in query.split("&") if not field.lower().startswith("password=")]
        address = "?".join(filter(None, [head, "&".join(kept)]))
    return address


def quiet() -> None:
    """Keep libraries from telling what they lack of parts that are for other machines."""
    for name in ("torchao", "torch.utils._pytree"):
        logging.getLogger(name).setLevel(logging.ERROR)
