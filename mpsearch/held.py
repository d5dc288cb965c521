"""One rule of a table of capabilities: which layers a tool can hold in which formats."""

from __future__ import annotations

import fnmatch
import re
from collections.abc import Sequence
from dataclasses import dataclass
from functools import lru_cache

from mpsearch.format import Format
from mpsearch.layer import Layer

_RULE = re.compile(r"-(mse|gptq|fisher)$")


@dataclass(frozen=True)
class Held:
    """One rule of a table: these layers can be held in these formats.

    Patterns of formats are names in which ``*`` stands for anything up to the next ``-`` and ``{a,b}`` for one of
    several; those of layers are as in a shell.

    Attributes:
        weights: patterns of formats of weights, without the rule that finds their scales (``-mse``, ``-gptq``).
        kinds: kinds of layers.
        inputs: patterns of formats that their inputs must be rounded to; empty when inputs stay
            as they are.
        apart: patterns of names of layers that the rule leaves out.
        columns_of: the weights of an output channel must be a multiple of this.
        rows_of: the output channels must be a multiple of this.
        parts: whether parts of layers (heads, channels) can have formats of their own.
        transposed: whether weights whose output channels are not the first axis can be held.
        shared: whether weights that several modules share can be held.
    """

    weights: tuple[str, ...]
    kinds: tuple[str, ...] = ("linear",)
    inputs: tuple[str, ...] = ()
    apart: tuple[str, ...] = ()
    columns_of: int = 1
    rows_of: int = 1
    parts: bool = False
    transposed: bool = False
    shared: bool = True

    def formats(self, fmt: Format) -> bool:
        """Whether the rule speaks of a format.

        >>> Held(("int{4,8}-g*",)).formats(Format.parse("int4-g64-mse"))
        True
        """
        if not matches(layout(fmt), self.weights):
            return False
        # What rounds inputs is another kernel, and says nothing of the one that does not.
        return matches(str(fmt.activation), self.inputs) if fmt.activation else not self.inputs

    def layers(self, layer: Layer) -> bool:
        """Whether the rule speaks of a layer."""
        return layer.kind in self.kinds and not any(fnmatch.fnmatchcase(layer.owner, name) for name in self.apart)

    @property
    def limits(self) -> str:
        """What of a layer's shape or name the rule asks, for people; empty for nothing.

        >>> Held(("int4-g*",), columns_of=32).limits
        'columns a multiple of 32'
        """
        found = [f"columns a multiple of {self.columns_of}"] if self.columns_of > 1 else []
        found += [f"rows a multiple of {self.rows_of}"] if self.rows_of > 1 else []
        found += [] if self.shared else ["no shared weights"]
        return ", ".join([*found, *(f"not {name}" for name in self.apart)])

    def misfit(self, layer: Layer) -> str:
        """Say what of a layer's shape the rule cannot take; empty for nothing."""
        if layer.is_part and not self.parts:
            return "a whole layer has one format, and its parts none"
        if layer.shared and not self.shared:
            return f"it shares its weight with {', '.join(layer.shared)}"
        if layer.out_axis and layer.kind == "linear" and not self.transposed:
            return "weights of transposed linear layers are not held"
        if layer.columns % self.columns_of:
            return f"{layer.columns} weights of an output channel are no multiple of {self.columns_of}"
        if layer.rows % self.rows_of:
            return f"{layer.rows} output channels are no multiple of {self.rows_of}"
        return ""


def layout(fmt: Format) -> str:
    """Name of how weights are stored: their format without the rule that finds scales or codes.

    >>> layout(Format.parse("int4-g64-mse@int8-token"))
    'int4-g64'
    """
    return _RULE.sub("", str(fmt.weight))


def matches(text: str, patterns: Sequence[str]) -> bool:
    """Whether a name is one of those that some pattern stands for."""
    return any(pattern(each).fullmatch(text) for each in patterns)


@lru_cache(maxsize=1024)
def pattern(text: str) -> re.Pattern[str]:
    """Compile a pattern: ``*`` is anything up to a ``-``, ``{a,b}`` one of several, which may hold further braces.

    >>> [name for name in ("int4-g64", "int4-g641", "int4-g64-asym") if pattern("int{4,8}-g{64,128}").fullmatch(name)]
    ['int4-g64']
    """
    marks = {"*": "[^-]*", "{": "(?:", "}": ")", ",": "|"}
    return re.compile("".join(marks.get(character, re.escape(character)) for character in text))


def listed(patterns: Sequence[str]) -> str:
    """Patterns as text for people."""
    return ", ".join(patterns) or "nothing"
