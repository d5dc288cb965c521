"""Number formats: what a part of a model can be stored or computed in, and what that costs to the byte.

This file holds what all formats share. Each family has a file in `mpsearch.formats`, which says how its names read,
what fits it and what it takes, and a codec in `mpsearch.model.codecs`, which rounds to it. Plug-ins add families
through entry points of the group ``mpsearch.formats``.
"""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Iterable, Iterator, Mapping
from dataclasses import dataclass
from fractions import Fraction
from functools import lru_cache
from typing import TYPE_CHECKING, Any, ClassVar, Literal

from mpsearch import registry
from mpsearch.errors import InputError, did_you_mean
from mpsearch.layer import Layer

#: What rounding to a format must know beside the weight: nothing, ``2 X X^T`` of the layer's inputs, or how much the
#: loss hangs on each weight.
Needs = Literal["", "hessian", "importance"]


class Format(ABC):
    """A number format and its layout.

    A format is a value: equal ones compare equal, and ``Format.parse(str(fmt)) == fmt``. The classes of
    `mpsearch.formats` are its families; `Joined` gives a layer's weight one format and its input another.

    >>> str(Format.parse("int4-g128-asym"))
    'int4-g128-asym'
    >>> Format.parse("int4-g128").bytes(Layer("fc", "linear", (4096, 4096)))
    8650752
    """

    __slots__ = ()

    #: Name of the family, as in the registry.
    family: ClassVar[str]
    #: Where its codec is: ``module:class``.
    codec: ClassVar[str] = ""
    #: Names that show the family's grammar.
    examples: ClassVar[tuple[str, ...]] = ()
    #: What it is for, in one line.
    purpose: ClassVar[str] = ""
    #: Raised with every change of what its codec gives: it is part of the key of scores and measurements.
    version: ClassVar[int] = 1

    if TYPE_CHECKING:

        @property
        def bits(self) -> int:
            """Bits of one code, scales left out."""

    @staticmethod
    def parse(text: str) -> Format:
        """Read a format as it prints.

        Args:
            text: such as ``int4-g128``, ``nf4-b64``, ``mxfp4``, ``int4-g128@int8-token``, ``kv-int8-token``.

        Raises:
            InputError: unknown name (E109), or an impossible one (E110).
        """
        return _parse(text)

    @classmethod
    @abstractmethod
    def read(cls, text: str) -> Format | None:
        """Read a name of this family; None when it is not one of its names.

        Raises:
            InputError: a name of this family for something impossible (E110).
        """

    @abstractmethod
    def __str__(self) -> str: ...

    @property
    def needs(self) -> Needs:
        """What rounding must know beside the weight."""
        return ""

    @property
    def key(self) -> str:
        """Its name, and the versions of the codecs behind it where they are not the first."""
        versions = [type(fmt).version for fmt in self.behind]
        return str(self) if set(versions) == {1} else f"{self} v{'.'.join(map(str, versions))}"

    @property
    def behind(self) -> tuple[Format, ...]:
        """The formats whose codecs do the rounding."""
        return (self,)

    @property
    def idempotent(self) -> bool:
        """Whether rounding twice changes nothing, bit for bit."""
        return True

    @property
    def calibrated(self) -> bool:
        """Whether what is stored depends on calibration data."""
        return bool(self.needs)

    @property
    def weight(self) -> Format:
        """The format of the weight."""
        return self

    @property
    def activation(self) -> Format | None:
        """The format of the layer's input; None when it stays as it is."""
        return None

    def refuses(self, layer: Layer) -> str:
        """Say why a layer cannot take this format, and what it could take; empty when it can.

        >>> Format.parse("int4-g128").refuses(Layer("fc", "linear", (10, 100)))
        '100 weights per output channel cannot be cut into groups of 128; use g100, g50, g25, g20 or channel'
        """
        if layer.kind == "kv_cache":
            return "a KV cache takes formats that begin with kv-, such as kv-int8-token"
        return self.misfit(layer)

    def misfit(self, layer: Layer) -> str:
        """Say why a weight's shape cannot take this format; empty when it can."""
        return ""

    @abstractmethod
    def itemised_bytes(self, layer: Layer) -> dict[str, int]:
        """Bytes of a layer's weight in this format by part, padding included: ``payload``, ``scales``, …."""

    def bytes(self, layer: Layer) -> int:
        """Exact bytes of a layer's weight in this format, padding included."""
        return sum(self.itemised_bytes(layer).values())

    def effective_bits(self, layer: Layer) -> Fraction:
        """Exact stored bits per weight of a layer.

        >>> Format.parse("int4-g128-asym").effective_bits(Layer("fc", "linear", (512, 1024)))
        Fraction(133, 32)
        """
        return Fraction(8 * self.bytes(layer), layer.weights)

    def catalogue(self) -> Iterator[Format]:
        """Yield the formats that a list of all should show beside this one; none unless a family has many."""
        return iter(())


#: Characters of an unknown name that a message repeats.
_SHOWN = 60


@dataclass(frozen=True, slots=True)
class Joined(Format):
    """A format for a layer's weight and one for its input, printed ``W@A``.

    Attributes:
        weight_format: format of the weight.
        input_format: format that the input is rounded to on every call.

    >>> fmt = Format.parse("int4-g128@int8-token")
    >>> str(fmt.weight), str(fmt.activation), fmt.refuses(Layer("e", "embedding", (8, 128)))
    ('int4-g128', 'int8-token', 'an embedding reads token numbers, which cannot be rounded; use int4-g128')
    """

    family: ClassVar[str] = "joined"
    examples: ClassVar[tuple[str, ...]] = ("int4-g128@int8-token", "fp8-e4m3@fp8-e4m3-tensor")
    purpose: ClassVar[str] = "weights and activations together"

    weight_format: Format
    input_format: Format

    @classmethod
    def read(cls, text: str) -> Format | None:
        first, at, second = text.partition("@")
        if not at:
            return None
        if not first:
            raise InputError(
                "E109", f"format '{text}': nothing stands before the @", advice=f"write one like int4-g128{text}"
            )
        weight = Format.parse(first)
        if weight.family in ("joined", "kv"):
            raise InputError("E110", f"format '{text}': '{first}' is not a format of weights")
        if second in ("16", ""):
            raise InputError("E110", f"format '{text}': nothing is rounded after the @; write {first}")
        activation: Format | None = registry.load("activations", "activation").read(second)
        if activation is None:
            examples = registry.load("activations", "activation").examples
            raise InputError(
                "E109",
                f"format '{text}': activation format '{second}' is not known{did_you_mean(second, examples)}",
                advice=f"write one like {', '.join(examples)}",
            )
        return cls(weight, activation)

    def __str__(self) -> str:
        return f"{self.weight_format}@{self.input_format}"

    @property
    def bits(self) -> int:
        return self.weight_format.bits

    @property
    def needs(self) -> Needs:
        return self.weight_format.needs

    @property
    def calibrated(self) -> bool:
        return self.weight_format.calibrated or self.input_format.calibrated

    @property
    def weight(self) -> Format:
        return self.weight_format

    @property
    def activation(self) -> Format | None:
        return self.input_format

    @property
    def behind(self) -> tuple[Format, ...]:
        return *self.weight_format.behind, *self.input_format.behind

    def misfit(self, layer: Layer) -> str:
        if layer.kind == "embedding":
            return f"an embedding reads token numbers, which cannot be rounded; use {self.weight_format}"
        return self.weight_format.misfit(layer) or self.input_format.misfit(layer)

    def itemised_bytes(self, layer: Layer) -> dict[str, int]:
        return self.weight_format.itemised_bytes(layer) | self.input_format.itemised_bytes(layer)


@lru_cache(maxsize=4096)
def _parse(text: str) -> Format:
    families: list[type[Format]] = [*(_family(name) for name in registry.names("formats")), Joined]
    if text.isascii():
        for family in reversed(families):
            found = family.read(text)
            if found is not None:
                return found
    examples = [example for family in families for example in family.examples]
    shown = text if len(text) <= _SHOWN else f"{text[:_SHOWN]}…"
    raise InputError(
        "E109",
        f"format '{shown}' is not known{did_you_mean(shown, examples)}",
        advice="`mpsearch formats` lists all; write one like int4-g128, int8-channel, nf4-b64, mxfp4, q4_K, bf16",
    )


@lru_cache(maxsize=64)
def _family(name: str) -> type[Format]:
    """Load a family; one of a plug-in that is none is an error that names it."""
    found: Any = registry.load("formats", name)
    if not (isinstance(found, type) and issubclass(found, Format) and bool(getattr(found, "family", ""))):
        raise InputError(
            "E107",
            f"the plug-in of the family '{name}' is not a subclass of mpsearch.format.Format with a `family`",
            advice="uninstall it, or see docs/formats.md",
        )
    return found


def all_formats() -> Mapping[str, tuple[Format, ...]]:
    """List the formats worth showing, by family: each family's examples and what its catalogue adds.

    >>> [str(fmt) for fmt in all_formats()["plain"]]
    ['bf16', 'fp16', 'fp32']
    """
    found: dict[str, tuple[Format, ...]] = {}
    for name in registry.names("formats"):
        examples = [Format.parse(text) for text in _family(name).examples]
        more = [other for fmt in examples[:1] for other in fmt.catalogue()]
        found[name] = tuple(dict.fromkeys([*examples, *more]))
    return found


def parse_formats(texts: Iterable[str | Format] | str) -> tuple[Format, ...]:
    """Read a menu of formats, given by name or as they are; the same one twice is an error.

    Raises:
        InputError: unknown (E109), impossible (E110), given twice or none at all (E108).
    """
    names = [texts] if isinstance(texts, str) or not isinstance(texts, Iterable) else list(texts)
    if not all(isinstance(text, (str, Format)) for text in names):
        raise InputError("E109", f"formats: expected names such as int4-g128, got {names!r}")
    if not names:
        raise InputError("E108", "formats: the list is empty", advice="give at least one, such as int4-g128")
    found: list[Format] = []
    for text in names:
        parsed = text if isinstance(text, Format) else Format.parse(text)
        if parsed in found:
            raise InputError("E108", f"formats: '{text}' is given twice")
        found.append(parsed)
    return tuple(found)


def join(weights: Iterable[Format], activations: Iterable[str]) -> tuple[Format, ...]:
    """Give every format of weights every format of activations; ``16`` leaves them as they are.

    A format that is a pair already stays one. A weight alone is always there, after its pairs, for layers whose input
    cannot be rounded.

    Raises:
        InputError: as `Format.parse`; or an activation is given twice (E108).

    >>> [str(fmt) for fmt in join([Format.parse("int4-g64")], ["int8-token"])]
    ['int4-g64@int8-token', 'int4-g64']
    """
    inputs = list(activations)
    if len(set(inputs)) < len(inputs):
        twice = next(text for text in inputs if inputs.count(text) > 1)
        raise InputError("E108", f"activations: '{twice}' is given twice")
    found: list[Format] = []
    for fmt in weights:
        pairs = [Format.parse(f"{fmt}@{text}") for text in inputs if text != "16"] if fmt.activation is None else []
        found += [*pairs, fmt]
    return tuple(dict.fromkeys(found))
