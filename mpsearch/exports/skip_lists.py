"""Lists of modules that transformers leaves alone, of which no entry matches any other module."""

from __future__ import annotations

import re
from collections.abc import Collection

# What transformers puts after each entry: the match must end at a dot or at the end of the name.
_BOUNDARY = r"(?:(?<=\.)|(?=\.|$))"


def skips(name: str, entry: str) -> bool:
    """Whether transformers 5.23 leaves a module alone for an entry of a list.

    An entry is a pattern from the start of the name up to a dot or the end, or a plain ending of the name.
    Source: ``transformers/quantizers/quantizers_utils.py``, ``should_convert_module``.

    >>> skips("a.lm_head", "lm_head"), skips("layers.11", "layers.1"), skips("layers.1.fc", "layers.1")
    (True, False, True)
    """
    return bool(re.match(rf"(?:{entry}){_BOUNDARY}", name)) or name.endswith(entry)


def skip_list(left: Collection[str], others: Collection[str]) -> list[str]:
    """Return one entry for each module to leave alone, and none that matches another.

    An entry is the plain name where that is enough, because other engines read these lists as names; else a pattern
    of that name alone.

    Args:
        left: modules to leave alone.
        others: modules to quantise.

    >>> skip_list(["lm_head"], ["layers.0.fc"]), skip_list(["fc"], ["layers.0.fc"])
    (['lm_head'], ['^fc$'])
    """
    known = {*left, *others}
    return sorted(name if _plain(name, known) else _pattern(name, known) for name in left)


def _pattern(name: str, known: Collection[str]) -> str:
    """Return a pattern of one name alone, in letters with which no module's name ends."""
    entry = f"^{re.escape(name)}$"
    while any(other.endswith(entry) for other in known):
        entry = f"(?:{entry})"
    return entry


def _plain(name: str, known: Collection[str]) -> bool:
    """Whether a name as an entry matches itself alone."""
    if re.fullmatch(r"[\w.-]+", name, re.ASCII) is None:
        return False
    return not any(skips(other, name) for other in known if other != name)
