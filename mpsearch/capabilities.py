"""What a tool that loads plans can hold, read from a table before anything is searched."""

from __future__ import annotations

import tomllib
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import asdict, dataclass
from functools import lru_cache
from importlib.metadata import entry_points
from importlib.resources import files
from pathlib import Path
from typing import Any

from packaging.specifiers import InvalidSpecifier, SpecifierSet
from packaging.version import InvalidVersion, Version

from mpsearch.errors import InputError, did_you_mean
from mpsearch.format import Format
from mpsearch.held import Held, layout, listed, matches
from mpsearch.layer import Layer
from mpsearch.plan import BitPlan

SCHEMA = "mpsearch/capabilities"
SCHEMA_VERSION = 1
#: Number types that need no rule.
PLAIN = ("bf16", "fp16", "fp32")
_NAME_OF = {"bfloat16": "bf16", "float16": "fp16", "float32": "fp32"}
#: What a study for a target offers unless it is told otherwise, as far as the target holds it.
_USUAL = (
    *(f"int{bits}-g64" for bits in range(2, 9)), "int8-channel", *(f"int{bits}-g64-asym" for bits in (2, 3, 4, 6, 8)),
    "q2_K", "q3_K", "q4_K", "q5_K", "q6_K", "q8_0", "nf4-b64", "fp8-e4m3-b128x128", "fp8-e4m3-channel@fp8-e4m3-token",
    "mxfp4", "mxfp8-e4m3", "int4-channel-full@int8-tensor-static", "int8-channel-full@int8-tensor-static",
    "int8-channel@int8-token",
)  # fmt: skip
#: Lines of a refusal that are shown.
_SHOWN = 20
#: Layers that are named for one reason.
_NAMED = 8
_KEYS = {
    "schema", "schema_version", "target", "title", "versions", "tested", "rounds", "container", "based_on", "fused",
    "alike", "kv", "plain", "leaves", "defaults", "source", "holds",
}  # fmt: skip
_RULE_KEYS = {"kinds", "weights", "inputs", "except", "columns_of", "rows_of", "parts", "transposed", "shared"}


@dataclass(frozen=True)
class Capabilities:
    """What one target can hold, for a range of its versions.

    Attributes:
        target: name of the target, as in ``--to`` and ``target = …``.
        title: what its own people call it.
        versions: versions that the facts hold for, such as ``>=0.19,<0.21``.
        tested: version that they were checked with.
        holds: rules, of which one must take a layer and its format.
        plain: number types that a layer can be cast to; it can also stay in its own.
        leaves: kinds of layers that it leaves alone when told so; empty for all.
        fused: names of modules of one parent that are loaded as one matrix and so need one format.
        alike: kinds of layers that must all have one format, such as ``kv_cache``.
        kv: patterns of the formats of KV caches; those of 16 bits are always held.
        rounds: ``ours`` when the plan's own codes are written, ``theirs`` when the target rounds again by its rules.
        container: how it stores weights (`mpsearch.hardware.containers`); empty when there is no rule for its bytes.
        based_on: targets whose rules hold as well, the file's own first.
        defaults: what it does unless told otherwise.
        source: where the facts are from.
    """

    target: str
    title: str
    versions: str
    tested: str
    holds: tuple[Held, ...]
    plain: tuple[str, ...] = PLAIN
    leaves: tuple[str, ...] = ()
    fused: tuple[frozenset[str], ...] = ()
    alike: tuple[str, ...] = ()
    kv: tuple[str, ...] = ()
    rounds: str = "theirs"
    container: str = ""
    based_on: tuple[Capabilities, ...] = ()
    defaults: tuple[str, ...] = ()
    source: str = ""

    def refuses(self, layer: Layer, fmt: Format) -> str:
        """Say why a layer cannot be held in a format: what is wanted and what is allowed; empty when it can.

        >>> capabilities("gptqmodel").refuses(Layer("fc", "linear", (64, 64)), Format.parse("int5-g32"))
        'int5-g32 is not held by GPTQModel; allowed int{2,3,4,8}-{channel,g*}{,-asym,-full}, fp32'
        """
        return self._refuses(layer, fmt) or next(filter(None, (b.refuses(layer, fmt) for b in self.based_on)), "")

    def _refuses(self, layer: Layer, fmt: Format) -> str:
        problem = fmt.refuses(layer)
        if problem:
            return problem
        if layer.kind == "kv_cache":
            allowed = ("kv-bf16", "kv-fp16", *self.kv)
            return "" if matches(str(fmt), allowed) else f"{fmt} is not held by {self.title}; allowed {listed(allowed)}"
        if fmt.weight.family == "plain" and fmt.activation is None:
            # A layer that is not touched needs no rule.
            if str(fmt) in self._left(layer):
                return ""
            return f"{fmt} is not held by {self.title}; allowed {listed(self._allowed(layer))}"
        fitting = [rule for rule in self.holds if rule.layers(layer) and rule.formats(fmt)]
        misfits = [rule.misfit(layer) for rule in fitting]
        if fitting and not all(misfits):
            return ""
        allowed_here = listed(self._allowed(layer))
        if misfits:
            return f"{fmt} is not held by {self.title} here: {misfits[0]}; allowed {listed(self._left(layer))}"
        kind = "" if any(rule.layers(layer) for rule in self.holds) else f" for this {layer.kind} layer"
        return f"{fmt} is not held by {self.title}{kind}; allowed {allowed_here}"

    def _allowed(self, layer: Layer) -> list[str]:
        """Patterns of all that a layer may have."""
        found: list[str] = []
        for rule in self.holds:
            if rule.layers(layer) and not rule.misfit(layer):
                found += [f"{w}@{a}" for w in rule.weights for a in rule.inputs] if rule.inputs else rule.weights
        return list(dict.fromkeys([*found, *self._left(layer)]))

    def _left(self, layer: Layer) -> list[str]:
        """Number types in which a layer can stay: its own, and those that it can be cast to."""
        if self.leaves and layer.kind not in self.leaves:
            return []
        own = own_type(layer)
        return list(dict.fromkeys([own, *self.plain] if own else self.plain))

    def violations(self, plan: BitPlan) -> list[str]:
        """List every reason for which a plan cannot be held; one line each, the layer first."""
        wrong = {layer.name: self.refuses(layer, plan.formats[layer.name]) for layer in plan.layers}
        found = [f"{name}: {reason}" for name, reason in wrong.items() if reason]
        for names in self.groups(plan.layers):
            formats = [str(plan.formats[name]) for name in names]
            # How codes were found does not change what is stored.
            layouts = {(layout(plan.formats[x]), str(plan.formats[x].activation)) for x in names}
            if len(layouts) > 1 and not any(wrong[name] for name in names):
                given = ", ".join(f"{name} {fmt}" for name, fmt in zip(names, formats, strict=True))
                found.append(f"{names[0]}: {self.title} loads these as one, which has one format: {given}; tie them")
        return found

    def groups(self, layers: Sequence[Layer] | Any) -> Iterator[list[str]]:
        """Yield the names of layers that must have one format together."""
        found: dict[tuple[str, str, str], list[str]] = {}
        for each in (self, *self.based_on):
            for place, names in enumerate(each.fused):
                for layer in layers:
                    parent, _, name = layer.owner.rpartition(".")
                    if layer.kind == "linear" and name in names:
                        found.setdefault((each.target, parent, str(place)), []).append(layer.name)
            for kind in each.alike:
                names_of_kind = [layer.name for layer in layers if layer.kind == kind]
                found.setdefault((each.target, "", kind), []).extend(names_of_kind)
        seen = set()
        for group in found.values():
            if len(group) > 1 and tuple(group) not in seen:
                seen.add(tuple(group))
                yield group

    def to_json(self) -> dict[str, Any]:
        """Return the table as plain values."""
        found = {**asdict(self), "based_on": [other.target for other in self.based_on]}
        return {**found, "fused": [sorted(names) for names in self.fused]}

    @property
    def menu(self) -> tuple[str, ...]:
        """The usual formats that it holds for some layer, and bf16 for what it leaves alone.

        >>> capabilities("mlx").menu[:3]
        ('int2-g64-asym', 'int3-g64-asym', 'int4-g64-asym')
        """
        layers = [Layer("layer", kind, (512, 512), dtype="bfloat16") for kind in ("linear", "embedding")]
        held = (text for text in _USUAL if not all(self.refuses(layer, Format.parse(text)) for layer in layers))
        return (*held, *(() if self.leaves and "linear" not in self.leaves else ("bf16",)))

    @property
    def fuses(self) -> bool:
        """Whether some layers are loaded as one matrix."""
        return bool(self.fused) or any(each.fuses for each in self.based_on)


def own_type(layer: Layer) -> str:
    """Name of the format in which a layer stays as it is; empty for number types that are no format.

    >>> own_type(Layer("fc", "linear", (8, 8), dtype="float16"))
    'fp16'
    """
    return "" if layer.kind == "kv_cache" else _NAME_OF.get(layer.dtype, "")


def targets() -> tuple[str, ...]:
    """List the names of all targets, built-ins first.

    >>> "vllm" in targets()
    True
    """
    return tuple(_tables())


def capabilities(target: str, version: str = "", assume: str = "") -> Capabilities:
    """Read what a target can hold.

    Args:
        target: its name.
        version: version that the plan is for; the tested one when empty.
        assume: version whose facts to take where the tables do not reach; with it no version is refused.

    Raises:
        InputError: no such target (E107), not a version, or one that no table speaks of (E305).

    >>> capabilities("onnxruntime").refuses(Layer("fc", "linear", (64, 64)), Format.parse("int3-g64"))
    'int3-g64 is not held by ONNX Runtime; allowed int{2,4,8}-g{16,32,64,128,256}{,-asym}, ...'
    """
    tables = _tables()
    if target not in tables:
        raise InputError(
            "E107", f"no target '{target}'{did_you_mean(target, tables)}", advice=f"there is {', '.join(tables)}"
        )
    every = tables[target]
    if not (wanted := assume or version):
        return every[-1]
    try:
        found = Version(wanted)
    except InvalidVersion as error:
        raise InputError("E305", f"'{wanted}' is not a version; write one like {every[-1].tested}") from error
    for table in every:
        if SpecifierSet(table.versions, prereleases=True).contains(found):
            return table
    known = ", ".join(table.versions for table in every)
    raise InputError(
        "E305",
        f"what {every[-1].title} {wanted} can hold is not known here; known are versions {known}",
        advice=f"--assume {every[-1].tested} takes the facts of that version",
    )


def cannot_hold(target: str, violations: Sequence[str]) -> InputError:
    """Return the error for a plan that a target cannot hold as it is.

    Args:
        target: name of the target.
        violations: one line per layer that does not fit, as ``layer: reason``; layers of one reason share a line.

    >>> print(cannot_hold("llama.cpp", ["a: int3-g64 …", "b: int3-g64 …"]))
    error[E301] llama.cpp cannot hold this plan, for 2 reasons
      because  a, b: int3-g64 …
      try      --substitute solves again with what it holds; a study with target = … searches with that alone
    """
    layers: dict[str, list[str]] = {}
    for line in violations:
        name, _, reason = line.partition(": ")
        layers.setdefault(reason, []).append(name)
    lines = []
    for reason, names in layers.items():
        more = f" and {len(names) - _NAMED} more" if len(names) > _NAMED else ""
        lines.append(f"{', '.join(names[:_NAMED])}{more}: {reason}")
    count, hidden = len(violations), len(lines) - _SHOWN
    if hidden > 0:
        lines = [*lines[:_SHOWN], f"and {hidden} more reasons; mpsearch plan check --to lists all"]
    return InputError(
        "E301",
        f"{target} cannot hold this plan, for {count} reason{'s' if count > 1 else ''}",
        because=("\n" + " " * 11).join(lines),
        advice="--substitute solves again with what it holds; a study with target = … searches with that alone",
    )


@lru_cache(maxsize=1)
def _tables() -> Mapping[str, tuple[Capabilities, ...]]:
    """All tables by target, each target's in the order of versions.

    Plug-ins add folders of tables through entry points of the group ``mpsearch.capabilities``: a function that
    returns the folder.
    """
    texts: dict[str, str] = {}
    built_in = files("mpsearch.exports").joinpath("targets")
    texts.update({x.name: x.read_text(encoding="utf-8") for x in built_in.iterdir() if x.name.endswith(".toml")})
    for point in entry_points(group="mpsearch.capabilities"):
        texts.update({str(x): x.read_text(encoding="utf-8") for x in sorted(Path(point.load()()).glob("*.toml"))})
    bodies = {name: _body(name, text) for name, text in sorted(texts.items())}
    found: dict[str, list[Capabilities]] = {}
    for wave in (False, True):
        for name, body in bodies.items():
            if bool(body.get("based_on")) == wave:
                made = _made(name, body, found)
                found.setdefault(made.target, []).append(made)
    return {target: tuple(sorted(tables, key=lambda t: Version(t.tested))) for target, tables in sorted(found.items())}


def _body(name: str, text: str) -> Mapping[str, Any]:
    try:
        body = tomllib.loads(text)
    except tomllib.TOMLDecodeError as error:
        raise InputError("E102", f"capabilities '{name}': not TOML: {error}") from error
    wrong = sorted({*body} - _KEYS) or [key for rule in body.get("holds", ()) for key in sorted({*rule} - _RULE_KEYS)]
    if body.get("schema") != SCHEMA or body.get("schema_version") != SCHEMA_VERSION or wrong:
        what = f"unknown key '{wrong[0]}'" if wrong else f"not a table of {SCHEMA} {SCHEMA_VERSION}"
        raise InputError("E102", f"capabilities '{name}': {what}")
    return body


def _made(name: str, body: Mapping[str, Any], known: Mapping[str, Sequence[Capabilities]]) -> Capabilities:
    rest = {key: _value(value) for key, value in body.items() if key not in ("schema", "schema_version", "holds")}
    rest["fused"] = tuple(frozenset(names) for names in body.get("fused", ()))
    try:
        rules = tuple(
            Held(**{"apart" if key == "except" else key: _value(value) for key, value in rule.items()})
            for rule in body.get("holds", ())
        )
        if any(not isinstance(x, tuple) for rule in rules for x in (rule.weights, rule.kinds, rule.inputs, rule.apart)):
            raise TypeError("weights, kinds, inputs and except are lists")
        Version(body["tested"])
        rest["based_on"] = tuple(known[other][-1] for other in body.get("based_on", ()))
        SpecifierSet(body["versions"])
        return Capabilities(holds=rules, **rest)
    except (KeyError, TypeError, AttributeError, InvalidSpecifier, InvalidVersion) as error:
        raise InputError("E102", f"capabilities '{name}': {type(error).__name__}: {error}") from error


def _value(value: Any) -> Any:
    return tuple(value) if isinstance(value, list) else value
