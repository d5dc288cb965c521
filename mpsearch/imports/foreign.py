"""What a file of another tool says of a model's layers, in the names of formats here."""

from __future__ import annotations

import re
from collections.abc import Callable, Collection, Iterator, Mapping, Sequence
from dataclasses import dataclass, field, replace
from typing import Any

from mpsearch.errors import InputError
from mpsearch.format import Format
from mpsearch.fused import FUSED
from mpsearch.layer import Layer, Layers

#: Number type as stored -> the format that leaves a layer as it is.
PLAIN: Mapping[str, str] = {"bfloat16": "bf16", "float16": "fp16", "float32": "fp32"}
#: What ``--rounding`` may be: how integers find their scales and codes here.
ROUNDINGS = ("", "full", "mse", "gptq")
#: What ``--without`` may leave out.
PARTS = ("inputs", "caches")
# Names under which engines load several layers as one; configurations list them beside the layers themselves.
_FUSED = {**FUSED, "w13": ("w1", "w3"), "w1w3": ("w1", "w3")}
_NAMED = 5
# Names of modules that read token numbers.
_EMBEDDING = re.compile(r"emb|wte|shared")


class UnsaidError(ValueError):
    """A layer's format has no counterpart here; the text says what it is."""


@dataclass(frozen=True)
class Options:
    """What a user says of a file beside its form.

    Attributes:
        nominal: for forms that say bits alone: the format that stands for them, with ``{bits}`` in it, such as
            ``int{bits}-g128``; bits that are no whole number are rounded to the nearest, halves up. Empty refuses.
        rest: format of layers of which the file says nothing because it leaves them to a command line.
        rounding: how integers are rounded here: empty from the largest weight, ``full``, ``mse`` or ``gptq``.
        without: what to leave out: rounding of ``inputs``, of ``caches``.
        architecture: class of the model, for names that hang on it.

    Raises:
        InputError: a rounding or a part that there is not (E113).

    >>> Options(rounding="full").rounded("int4-g64@int8-token")
    'int4-g64-full@int8-token'
    """

    nominal: str = ""
    rest: str = ""
    rounding: str = ""
    without: frozenset[str] = frozenset()
    architecture: str = ""

    def __post_init__(self) -> None:
        if self.rounding not in ROUNDINGS:
            raise InputError("E113", f"rounding is '{self.rounding}'", advice=f"one of {', '.join(ROUNDINGS[1:])}")
        if odd := sorted(self.without - set(PARTS)):
            raise InputError("E113", f"there is no '{odd[0]}' to leave out", advice=f"one of {', '.join(PARTS)}")
        if self.nominal and "{bits}" not in self.nominal:
            raise InputError("E113", f"nominal is '{self.nominal}'", advice="write {bits} for the bits: int{bits}-g128")
        if self.rest:
            Format.parse(self.rest)

    def rounded(self, text: str, kind: str = "linear") -> str:
        """Give an integer format of weights the rule that the user asked for, as far as it can have it."""
        weight, at, inputs = text.partition("@")
        if not weight.startswith("int") or not self.rounding:
            return text
        if (self.rounding == "full" and weight.endswith("-asym")) or (self.rounding == "gptq" and kind != "linear"):
            return text
        return f"{weight}-{self.rounding}{at}{inputs}"

    def given(self) -> dict[str, Any]:
        """Options that say something, for a plan's source."""
        texts = {"nominal": self.nominal, "rest": self.rest, "rounding": self.rounding}
        found: dict[str, Any] = {name: text for name, text in texts.items() if text}
        return {**found, **({"without": sorted(self.without)} if self.without else {})}


@dataclass(frozen=True)
class Foreign:
    """What a file says of all layers of a model.

    Attributes:
        formats: layer -> name of its format; those with a problem are left out.
        problems: one line for each layer that has no counterpart here, its name first.
        notes: what a user should know.
        says: what else the plan's source should hold.
    """

    formats: Mapping[str, str]
    problems: Sequence[str] = ()
    notes: Sequence[str] = ()
    says: Mapping[str, Any] = field(default_factory=dict)


Say = Callable[[str, Layer], str]


def gather(
    layers: Layers, say: Say, options: Options, named: Collection[str] = (), notes: Sequence[str] = ()
) -> Foreign:
    """Ask what a file says of every layer.

    Args:
        layers: the model's layers.
        say: (name of a module, its layer) -> a format, or empty for one that is left as it is; raises `UnsaidError`.
        options: what the user says.
        named: modules that the file names exactly; those that the model lacks are noted.
        notes: further notes.

    >>> layers = Layers((Layer("fc", "linear", (8, 64)),))
    >>> gather(layers, lambda name, layer: "int4-g64", Options(), ["fc", "gone"])
    Foreign(formats={'fc': 'int4-g64'}, problems=[], notes=["the model has no 'gone', which the file names"], says={})
    """
    formats: dict[str, str] = {}
    problems: list[str] = []
    for layer in layers:
        try:
            formats[layer.name] = _of(layer, say, options)
        except UnsaidError as error:
            problems.append(f"{layer.name}: {error}")
    return Foreign(formats, problems, [*notes, *_strangers(layers, named)])


def _of(layer: Layer, say: Say, options: Options) -> str:
    said = {name: say(name, module(layer, name)) for name in (layer.name, *layer.shared)}
    if len(set(said.values())) > 1:
        told = ", ".join(f"{name} {text or 'as it is'}" for name, text in said.items())
        raise UnsaidError(f"is one tensor in this model, and the file tells its modules apart: {told}")
    text = said[layer.name] or left(layer)
    text = options.rounded(text, layer.kind)
    try:
        problem = Format.parse(text).refuses(layer)
    except InputError as error:
        raise UnsaidError(error.message) from error
    if problem:
        raise UnsaidError(f"{text}: {problem}")
    return text


def left(layer: Layer) -> str:
    """Format of a layer that is left as it is.

    Raises:
        UnsaidError: it is stored in a number type that no format here leaves alone.

    >>> left(Layer("fc", "linear", (8, 64), dtype="bfloat16"))
    'bf16'
    """
    if layer.dtype not in PLAIN:
        raise UnsaidError(f"is left in {layer.dtype}, which is no format here")
    return PLAIN[layer.dtype]


def integer(bits: int, group: int, symmetric: bool) -> str:
    """Name of an integer format: a group of -1 is an output channel, of 0 the tensor.

    Raises:
        UnsaidError: there is none.

    >>> integer(4, 64, False), integer(8, -1, True)
    ('int4-g64-asym', 'int8-channel')
    """
    if not 2 <= bits <= 8:
        raise UnsaidError(f"{bits}-bit integers are no format here; there are those of 2 to 8 bits")
    if group < -1:
        raise UnsaidError(f"a group of {group} weights is impossible")
    grain = {-1: "channel", 0: "tensor"}.get(group, f"g{group}")
    return f"int{bits}-{grain}{'' if symmetric else '-asym'}"


def joined(weight: str, inputs: Callable[[], str], options: Options) -> str:
    """Join the formats of a weight and of its input, which is not asked for where the user leaves inputs out.

    >>> joined("fp8-e4m3", lambda: "fp8-e4m3-token", Options())
    'fp8-e4m3@fp8-e4m3-token'
    """
    found = "" if "inputs" in options.without else inputs()
    return f"{weight}@{found}" if found else weight


def nominal(bits: float, options: Options) -> str:
    """Name of the format that stands for bits alone; empty for 16.

    Raises:
        UnsaidError: the user did not say which, or there is none of so many bits.

    >>> nominal(3.5, Options(nominal="int{bits}-g128"))
    'int4-g128'
    """
    if bits == 16:
        return ""
    if not options.nominal:
        raise UnsaidError(f"{bits:g} bits of a code book that is no format here")
    whole = int(bits + 0.5)
    if not 1 <= whole <= 16:
        raise UnsaidError(f"{bits:g} bits are no format here")
    return options.nominal.replace("{bits}", str(whole))


def module(layer: Layer, name: str) -> Layer:
    """Return a layer as one of its modules: a head that shares an embedding's weight is a linear layer.

    >>> layer = Layer("model.embed_tokens", "embedding", (64, 8), shared=("lm_head",))
    >>> module(layer, "lm_head").kind, module(layer, "model.embed_tokens").kind
    ('linear', 'embedding')
    """
    if layer.kind != "embedding" or name == layer.name or _EMBEDDING.search(name.rpartition(".")[2]):
        return layer
    return replace(layer, kind="linear")


def in_blocks(name: str) -> bool:
    """Whether a module lies in one of a model's numbered blocks, and not before or behind them.

    >>> in_blocks("model.layers.3.mlp.up_proj"), in_blocks("lm_head")
    (True, False)
    """
    return re.search(r"(?:^|\.)\d+\.", name) is not None


def only_linear(layer: Layer) -> bool:
    """Whether a tool that quantises linear layers alone takes a layer.

    Raises:
        UnsaidError: it stacks experts, which such tools name one by one.
    """
    if layer.kind == "expert":
        raise UnsaidError("stacks experts, which the file names one by one; no counterpart here")
    return layer.kind == "linear"


def idle(what: str, patterns: Sequence[str]) -> list[str]:
    """Say in one note which rules of a file fit nothing.

    >>> idle("rule", ["a", "b"])
    ["no layer is left for 2 rules: 'a', 'b'"]
    """
    if not patterns:
        return []
    return [f"no layer is left for {len(patterns)} {what}{'s' if len(patterns) > 1 else ''}: {_listed(patterns)}"]


def fused(layers: Layers) -> list[str]:
    """Names under which engines would load layers of the model as one.

    >>> fused(Layers((Layer("mlp.gate_proj", "linear", (8, 8)), Layer("mlp.up_proj", "linear", (8, 8)))))
    ['mlp.gate_up_proj']
    """
    known = {name for layer in layers for name in (layer.owner, *layer.shared)}
    parents = dict.fromkeys(name.rpartition(".")[0] for name in known)
    found = [(f"{parent}.{name}" if parent else name, parent, members) for parent in parents
             for name, members in _FUSED.items()]  # fmt: skip
    return sorted(
        name for name, parent, members in found
        if known.issuperset(f"{parent}.{member}" if parent else member for member in members)
    )  # fmt: skip


def _strangers(layers: Layers, named: Collection[str]) -> Iterator[str]:
    """Say which names of a file the model has not; a fused name whose members it has is no stranger."""
    known = {name for layer in layers for name in (layer.owner, *layer.shared)} | set(fused(layers))
    known |= {kept.name.rpartition(".")[0] for kept in layers.excluded} | {kept.name for kept in layers.excluded}
    gone = [name for name in dict.fromkeys(named) if name not in known]
    if gone:
        yield f"the model has no {_listed(gone)}, which the file names"


def _listed(names: Sequence[str]) -> str:
    more = f" and {len(names) - _NAMED} more" if len(names) > _NAMED else ""
    return ", ".join(f"'{name[:80]}'" for name in names[:_NAMED]) + more
