"""KV caches: what the keys or the values of an attention layer are kept in."""

from __future__ import annotations

import re
from collections import Counter
from collections.abc import Iterable
from dataclasses import dataclass
from fractions import Fraction
from typing import ClassVar, Literal

from mpsearch.errors import InputError, did_you_mean
from mpsearch.format import Format
from mpsearch.formats.elements import FLOAT_NAMES
from mpsearch.formats.mx import Microscaling
from mpsearch.formats.plain import Plain
from mpsearch.layer import Layer

_NAME = re.compile(
    rf"(?P<number>int\d+|{FLOAT_NAMES})-"
    r"(?:(?P<token>token)(?:-g(?P<group>-?\d+))?|channel-g(?P<tokens>-?\d+))(?P<asym>-asym)?"
)
_PLAIN = ("bf16", "fp16", "fp32")
# Not nvfp4: its scale of the whole tensor would change with every token that is written.
_BLOCKS = Microscaling.examples
_NEWEST_BYTES = 2


@dataclass(frozen=True, slots=True)
class KvCache(Format):
    """Keys or values of one attention layer, printed ``kv-<number>-<granularity>[-asym][-recent<tokens>]``.

    Rounded after the rotary embedding, as engines keep them. ``token``: one scale for each token and head (or for each
    ``group`` channels of them), rounded as the token is written. ``channel``: one scale for each channel of a head over
    ``tokens`` consecutive tokens; a group is rounded when it is complete, and is in 16 bits until then (KIVI, Liu et
    al. 2024). The newest ``recent`` tokens stay in 16 bits.

    Attributes:
        number: the format of the rows that share scales: of a token's channels in a head, or of a channel's tokens.
        along: ``token`` or ``channel``.
        tokens: tokens of a group, for ``channel``; else 0.
        recent: how many of the newest tokens stay in 16 bits.

    >>> fmt = Format.parse("kv-int4-token")
    >>> fmt.cache_bytes(Layer("k", "kv_cache", (2, 64)), tokens=10)  # 10 * 2 * (32 + 2)
    {'payload': 640, 'scales': 40}
    """

    family: ClassVar[str] = "kv"
    examples: ClassVar[tuple[str, ...]] = (
        "kv-int8-token", "kv-int4-token", "kv-int4-token-g32-asym", "kv-int4-channel-g32",
        "kv-int2-channel-g32-asym-recent32", "kv-fp8-e4m3-token", "kv-mxfp8-e4m3", "kv-bf16", "kv-fp16",
    )  # fmt: skip
    purpose: ClassVar[str] = "KV caches: keys and values apart, per token or per channel"

    number: Format
    along: Literal["token", "channel"] = "token"
    tokens: int = 0
    recent: int = 0

    @classmethod
    def read(cls, text: str) -> KvCache | None:
        if not text.startswith("kv-"):
            return None
        name, _, recent = text[3:].partition("-recent")
        if "-recent" in text and not recent.isdecimal():
            raise InputError("E110", f"format '{text}': -recent takes a number of tokens, such as -recent32")
        if name in _PLAIN:
            if recent:
                raise InputError("E110", f"format '{text}': nothing is rounded, so no tokens need to be left out")
            return cls(Format.parse(name))
        if name in _BLOCKS:
            return cls(Format.parse(name), recent=int(recent or 0))
        match = _NAME.fullmatch(name)
        if name == "nvfp4":
            raise InputError(
                "E110",
                f"format '{text}': its scale of the whole tensor would change with every token that is written",
                advice="write one like kv-mxfp4 or kv-fp4-e2m1-token",
            )
        if name.endswith("-channel"):
            raise InputError(
                "E110", f"format '{text}': how many tokens share a scale?", advice=f"write one like {text}-g32"
            )
        if match is None:
            raise InputError(
                "E109",
                f"format '{text}': not a format of KV caches{did_you_mean(text, cls.examples)}",
                advice=f"write one like {', '.join(cls.examples)}",
            )
        for size in (match["group"], match["tokens"]):
            if size is not None and int(size) < 1:
                raise InputError("E110", f"format '{text}': a group of {size} is impossible")
        grain = f"g{match['group']}" if match["group"] else "channel"
        number = Format.parse(f"{match['number']}-{grain}{match['asym'] or ''}")
        along: Literal["token", "channel"] = "token" if match["token"] else "channel"
        return cls(number, along, int(match["tokens"] or 0), int(recent or 0))

    def __str__(self) -> str:
        text = str(self.number)
        newest = f"-recent{self.recent}" if self.recent else ""
        if text in (*_PLAIN, *_BLOCKS):
            return f"kv-{text}{newest}"
        if self.along == "channel":
            return f"kv-{text.replace('-channel', f'-channel-g{self.tokens}')}{newest}"
        group = re.search(r"-g\d+", text)
        name = text.replace(group[0], f"-token{group[0]}") if group else text.replace("-channel", "-token")
        return f"kv-{name}{newest}"

    @property
    def bits(self) -> int:
        return self.number.bits

    @property
    def behind(self) -> tuple[Format, ...]:
        return self, self.number

    @property
    def stepwise(self) -> bool:
        """Whether what a query sees depends on how many tokens came after, so that tokens must be fed in steps."""
        return self.along == "channel" or self.recent > 0

    def leaves(self, layer: Layer) -> bool:
        """Whether a cache stays as the model keeps it: the format is the number type that the model is stored in."""
        return isinstance(self.number, Plain) and self.number.dtype == layer.dtype

    def refuses(self, layer: Layer) -> str:
        if layer.kind != "kv_cache":
            return f"{self} is for KV caches, not for a weight ({layer.kind})"
        if layer.window and self.stepwise:
            return "a sliding window forgets tokens; it takes formats per token without -recent, such as kv-int8-token"
        return self.number.refuses(self._rows(layer, 1))

    def _rows(self, layer: Layer, tokens: int) -> Layer:
        heads, channels = layer.shape
        if self.along == "token":
            return Layer(layer.name, "linear", (heads * tokens, channels))
        return Layer(layer.name, "linear", (heads * channels * max(tokens // self.tokens, 1), self.tokens))

    def itemised_bytes(self, layer: Layer) -> dict[str, int]:
        return {}

    def cache_bytes(self, layer: Layer, tokens: int) -> dict[str, int]:
        """Bytes of one sequence's cache by part; ``newest`` is what is in 16 bits.

        Args:
            layer: the cache of keys or values.
            tokens: length of the sequence; a sliding window holds no more than its own.
        """
        tokens = min(tokens, layer.window) if layer.window else tokens
        size = self.tokens or 1
        rounded = max(0, tokens - self.recent) // size * size
        found: Counter[str] = Counter()
        if rounded:
            found.update(self.number.itemised_bytes(self._rows(layer, rounded)))
        if tokens > rounded:
            found["newest"] = (tokens - rounded) * layer.rows * layer.columns * _NEWEST_BYTES
        return dict(found)

    def effective_bits(self, layer: Layer) -> Fraction:
        """Stored bits per number of a long cache."""
        rows = self._rows(layer, self.tokens or 1)
        return Fraction(8 * self.number.bytes(rows), rows.weights)


def check_length(formats: Iterable[KvCache], length: int) -> None:
    """Refuse sequences in which nothing would be rounded: a format would look harmless because it was never used.

    Args:
        formats: formats of caches.
        length: tokens of a sequence.

    Raises:
        InputError: E424.
    """
    for fmt in formats:
        left = fmt.recent + fmt.tokens
        if fmt.stepwise and left >= length:
            raise InputError(
                "E424",
                f"{fmt} leaves up to {left} tokens in 16 bits, and sequences have {length}: nothing would be rounded",
                advice=f"use sequences of {4 * left} tokens or more (length), or a smaller group or -recent",
            )
