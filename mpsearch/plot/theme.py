"""Colours of pictures: told apart with any colour vision, in grey, and on a light and a dark ground."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass

from mpsearch.errors import InputError, did_you_mean

#: Bits of one code -> colour of a cell, and of the digits in it: one hue from light to dark, as in the report.
BITS: Mapping[int, tuple[str, str]] = {
    2: ("#dcebf7", "#0b2545"),
    3: ("#b7d5ec", "#0b2545"),
    4: ("#86b9dd", "#0b2545"),
    5: ("#63a2d0", "#07192f"),
    6: ("#4a90c4", "#07192f"),
    7: ("#2b6ca8", "#ffffff"),
    8: ("#1b5795", "#ffffff"),
    16: ("#0d3566", "#ffffff"),
    32: ("#06203f", "#ffffff"),
}
#: Groups of points, from the darkest to the lightest on a light ground: each has a shape and a grey of its own.
GROUPS = ("chosen", "mixed", "uniform", "searched", "imported", "random")


@dataclass(frozen=True)
class Theme:
    """Colours of one ground.

    Attributes:
        name: ``light`` or ``dark``.
        ground: behind everything.
        text: of titles and labels.
        muted: of ticks and rules.
        line: of grids.
        groups: group of points -> colour.
        ramp: two ends of the colours of lines that have an order, such as formats by bits.
        worse: of what raises the loss.
        better: of what lowers it.
    """

    name: str
    ground: str
    text: str
    muted: str
    line: str
    groups: Mapping[str, str]
    ramp: tuple[str, str]
    worse: str
    better: str

    def colour(self, role: str) -> str:
        """Return the colour of a role: a group, a name of an attribute, ``bits:4`` or ``ramp:0.5``.

        >>> LIGHT.colour("bits:4"), LIGHT.colour("ramp:0"), LIGHT.colour("text")
        ('#86b9dd', '#74add8', '#1b2330')
        """
        kind, _, value = role.partition(":")
        if kind == "bits":
            return BITS[step_of(int(value))][0]
        if kind == "ramp":
            return _between(*self.ramp, float(value))
        return self.groups[role] if role in self.groups else str(getattr(self, role))


LIGHT = Theme(
    "light", "#ffffff", "#1b2330", "#566070", "#dfe3e8",
    dict(zip(GROUPS, ("#101418", "#0a4d8c", "#b04800", "#0a8a66", "#cc78aa", "#a9b1bb"), strict=True)),
    ("#74add8", "#06203f"), "#b04800", "#0a4d8c",
)  # fmt: skip
DARK = Theme(
    "dark", "#12161b", "#e7ebf0", "#a2adba", "#2c343d",
    dict(zip(GROUPS, ("#f4f6f8", "#9fd0f5", "#eda052", "#2fae86", "#bd6e9c", "#66717e"), strict=True)),
    ("#e3effa", "#2f74b3"), "#eda052", "#9fd0f5",
)  # fmt: skip


def theme_of(name: str) -> Theme:
    """Return a theme by its name.

    Raises:
        InputError: there is none of this name (E113).

    >>> theme_of("dark").ground
    '#12161b'
    """
    themes = {theme.name: theme for theme in (LIGHT, DARK)}
    if name not in themes:
        advice = f"give 'light' or 'dark'{did_you_mean(str(name), themes)}"
        raise InputError("E113", f"theme: got {str(name)[:40]!r}", advice=advice)
    return themes[name]


def step_of(bits: int) -> int:
    """Return the bits whose colour a format of so many bits has.

    >>> step_of(4), step_of(12)
    (4, 8)
    """
    return min(BITS, key=lambda known: abs(known - bits))


def luminance(colour: str) -> float:
    """Relative luminance of a colour, in [0, 1]: what is left of it in grey.

    >>> luminance("#ffffff"), luminance("#000000")
    (1.0, 0.0)
    """
    parts = (int(colour[i : i + 2], 16) / 255 for i in (1, 3, 5))
    red, green, blue = (x / 12.92 if x <= 0.04045 else ((x + 0.055) / 1.055) ** 2.4 for x in parts)
    return round(0.2126 * red + 0.7152 * green + 0.0722 * blue, 12)


def _between(first: str, last: str, share: float) -> str:
    ends = [[int(colour[i : i + 2], 16) for i in (1, 3, 5)] for colour in (first, last)]
    return "#" + "".join(f"{round(a + (b - a) * share):02x}" for a, b in zip(*ends, strict=True))
