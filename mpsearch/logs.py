"""Texts that are shown or kept: without control characters, passwords and tokens."""

from __future__ import annotations

import logging
import re
from collections.abc import Iterable, Iterator
from urllib.parse import quote, quote_plus, unquote

# Control characters, those that change the direction of text, and halves of surrogate pairs.
_UNSAFE = re.compile("[\x00-\x1f\x7f-\x9f\u061c\u200e\u200f\u2028\u2029\u202a-\u202e\u2066-\u2069\ud800-\udfff\ufeff]")
# The password of an address; a token, key or password that is named; and tokens that tell what they are.
# Lengths are bounded, so that a text made to be slow is not.
_ADDRESS = re.compile(r"(?<=://)([^\s/?#@:'\"]{0,200}):((?:[^\s/?#'\"]|/(?=[^\s?#'\"]{0,200}@)){0,400})@")
# Of one that is quoted all up to the end of its quotes.
_NAMED = re.compile(
    r"(?i)(?<![\w-])([\w-]{0,40}(?:password|passwd|pwd|secret|token|api_?key|authorization))(['\"]?\s*[=:]\s*)"
    r"(?:\"(?:[^\"\\]|\\.){1,400}(?=\")|'(?:[^'\\]|\\.){1,400}(?=')|['\"]?(?:bearer\s+|basic\s+)?[^\s'\",;&}]+)"
)
_OPTION = re.compile(r"(?i)--?(?:[\w-]*-)?(?:password|passwd|pwd|secret|token|api-?key)")
_BEARER = re.compile(r"(?i)\b(bearer\s+)[\w.~+/=-]{8,}|\b(hf_|ghp_|sk-)[\w-]{16,}")
_USER = re.compile(r"[\w.+-]+://[^:/]*(:[^@]*)@")
_UP_TO_HOST = re.compile(r"(?s)(://[^:/]*):.*@")
#: Passwords of the addresses that this process has read.
_KNOWN: set[str] = set()
#: A shorter password is looked for as a word of its own only, or little of a text would be left.
_SHORT = 6


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
    text = _NAMED.sub(lambda found: f"{found[1]}{found[2]}{_quote_of(found)}***", text)
    return _BEARER.sub(lambda found: f"{found[1] or found[2]}***", text)


def _quote_of(named: re.Match[str]) -> str:
    """The quote that the value begins with, if it has one."""
    first = named[0][len(named[1]) + len(named[2]) :][:1]
    return first if first in ("'", '"') else ""


def remember(secret: str) -> None:
    """Note a password of this process, for `without_secrets`."""
    if secret:
        _KNOWN.add(secret)


def without_secrets(text: str) -> str:
    """Write stars also for the passwords that were given to `remember`, as they are and as addresses write them."""
    for form in sorted({form for secret in _KNOWN for form in _forms(secret)}, key=len, reverse=True):
        whole = re.escape(form) if len(form) >= _SHORT else rf"(?<!\w){re.escape(form)}(?!\w)"
        text = re.sub(whole, "***", text)
    return hidden(text)


def _forms(secret: str) -> Iterator[str]:
    for text in {secret, unquote(secret)} - {""}:
        # In quotes a program writes it as it can be read back.
        yield from (text, quote(text, safe=""), quote(text, safe=" +"), quote_plus(text), repr(text)[1:-1])
        yield text.replace("\\", "\\\\").replace('"', '\\"')


def words_of(line: Iterable[str]) -> str:
    """Join the words of a command line without passwords and tokens.

    >>> words_of(["show", "--storage=postgresql://ann:s3 cr#t@db.lan/mp", "--token", "abc"])
    'show --storage=postgresql://ann@db.lan/mp --token ***'
    """
    shown, before = [], ""
    for word in line:
        name, mark, value = word.partition("=") if word.startswith("-") else ("", "", word)
        secret = _OPTION.fullmatch(name if mark else before)
        shown.append(f"{name}{mark}{'***' if secret else without_password(value)}")
        before = word
    return " ".join(shown)


def address(text: str) -> str:
    """Write stars for the password in what was meant for an address, and may be none.

    >>> address("postgresql://ann:s3 cr@t@db.lan:port/mp")
    'postgresql://ann:***@db.lan:port/mp'
    """
    return hidden(_UP_TO_HOST.sub(r"\1:***@", text))


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
