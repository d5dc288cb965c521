"""Text that is shown: characters that nobody sees, and that could forge what is seen, are taken out of it."""

from __future__ import annotations

import unicodedata

#: Control and direction characters, lone surrogates, line ends, and places of no character.
_UNSEEN = frozenset({"Cc", "Cf", "Cs", "Co", "Cn", "Zl", "Zp"})


def seen_only(text: str, instead: str = "\N{REPLACEMENT CHARACTER}", keep: str = "") -> str:
    r"""Return a text with another character in place of each that is not seen.

    Args:
        text: it.
        instead: what stands in their place.
        keep: unseen characters that stay, such as ends of lines.

    >>> seen_only("a\u202eb\u200bc\nd", "?"), seen_only("a\nb", keep="\n")
    ('a?b?c?d', 'a\nb')
    """
    # No printable text holds any; the rest of the unprintable ones are spaces of other widths.
    if text.isprintable():
        return text
    return "".join(c if c in keep or unicodedata.category(c) not in _UNSEEN else instead for c in text)
