"""Names in pictures: text only, whatever a drawing library would make of it."""

from __future__ import annotations

import html
from collections.abc import Iterable, Sequence
from functools import lru_cache

from mpsearch.spelling import seen_only

#: Characters of a name in a picture; the middle of longer ones is left out.
_MOST = 40


def plain(text: object, most: int = _MOST) -> str:
    r"""Return a name as it may stand in a picture: nothing unseen in it, and not too long.

    Args:
        text: the name.
        most: characters that it may have.

    >>> plain("a\u202eb\nc"), plain("model.layers.3.mlp.down_proj", 16)
    ('a\ufffdb\ufffdc', 'model.l…own_proj')
    """
    seen = seen_only(str(text)[:4096])
    if len(seen) <= most:
        return seen
    tail = most // 2
    return f"{seen[: most - 1 - tail]}…{seen[-tail:]}"


def for_plotly(text: object, most: int = _MOST) -> str:
    """Escape a name for Plotly, which reads tags, entities and formulas in every text that it draws.

    >>> for_plotly("<b>$x$</b>")
    '&lt;b&gt;&#36;x&#36;&lt;/b&gt;'
    """
    return html.escape(plain(text, most), quote=False).replace("$", "&#36;")


def for_matplotlib(text: object, most: int = _MOST) -> str:
    r"""Escape a name for matplotlib, which reads formulas; what its font cannot draw becomes a box.

    >>> for_matplotlib("cost $5 to $6")
    'cost \\$5 to \\$6'
    """
    known = _drawable()
    return "".join(c if ord(c) in known else "\N{WHITE SQUARE}" for c in plain(text, most)).replace("$", r"\$")


def parted(lines: Iterable[object], escape: str = "<br>") -> str:
    """Join lines of a label that Plotly draws; each is escaped.

    >>> parted(["a < b", "c"])
    'a &lt; b<br>c'
    """
    return escape.join(for_plotly(line, 120) for line in lines)


def thinned(count: int, room: int) -> range:
    """Numbers of the labels that find room: every one, or every second, fifth, tenth, ….

    Args:
        count: how many labels there are.
        room: how many can be read.

    >>> list(thinned(6, 10)), list(thinned(20, 5))
    ([0, 1, 2, 3, 4, 5], [0, 5, 10, 15])
    """
    steps = (base * 10**power for power in range(9) for base in (1, 2, 5))
    return range(0, count, next(step for step in steps if -(-count // step) <= max(room, 1)))


def named(names: Sequence[str], most: int = 3) -> str:
    """Name the first few, and how many more there are.

    >>> named(["a", "b"]), named(["a", "b", "c", "d", "e"])
    ("'a', 'b'", "'a', 'b', 'c' and 2 more")
    """
    shown = ", ".join(f"'{plain(name)}'" for name in names[:most])
    return shown if len(names) <= most else f"{shown} and {len(names) - most} more"


def stemless(names: Sequence[str]) -> list[str]:
    """Leave out the path before the number of the block where it is the same in all names that have one.

    >>> stemless(["embed", "model.layers.0.up", "model.layers.11.up"]), stemless(["a.0.up", "b.0.up"])
    (['embed', '0.up', '11.up'], ['a.0.up', 'b.0.up'])
    """
    stems = [_stem(name) for name in names]
    known = {stem for stem in stems if stem is not None}
    if len(known) != 1:
        return list(names)
    return [name if stem is None else name[len(stem) :] for name, stem in zip(names, stems, strict=True)]


def _stem(name: str) -> str | None:
    parts = name.split(".")
    block = next((i for i, part in enumerate(parts) if part.isdecimal()), None)
    return None if block is None else "".join(f"{part}." for part in parts[:block])


@lru_cache(maxsize=1)
def _drawable() -> frozenset[int]:
    from matplotlib.font_manager import FontProperties, findfont, get_font

    return frozenset(get_font(findfont(FontProperties(family="DejaVu Sans"))).get_charmap())
