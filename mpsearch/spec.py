"""The question a study asks: from keyword arguments or a TOML file."""

from __future__ import annotations

import math
import re
import tomllib
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field, fields, replace
from pathlib import Path
from typing import Any

from mpsearch.budget import parse_budgets
from mpsearch.bundled import model_title, named_model
from mpsearch.capabilities import capabilities
from mpsearch.errors import InputError, did_you_mean
from mpsearch.files import located
from mpsearch.format import Format, join, parse_formats
from mpsearch.model.source import LIBRARY, Source
from mpsearch.protection import Rule
from mpsearch.rules import Rules
from mpsearch.tasks import Setup
from mpsearch.toml_text import line_of, read_text, toml_error

DEFAULT_FORMATS = ("int2-g64", "int3-g64", "int4-g64", "int5-g64", "int6-g64", "int7-g64", "int8-g64", "int8-channel")
# How and where a study is computed does not change its question.
_NOT_THE_QUESTION = ("storage", "workers", "executor", "executor_settings", "out")
_LATER = ("activations", "kv", "protect", "clamp", "rules", "cautious", "engine", "energy", "target")
_LISTS = ("formats", "activations", "kv", "budgets")


@dataclass(frozen=True)
class StudySpec:
    """What is asked, and how it is answered.

    Attributes:
        name: name of the study; the model's folder name when empty.
        model: a Hugging Face folder, or ``bundled:tiny-llama``.
        calibration: text that scores are taken on: a ``.txt`` or ``.jsonl`` file, or ``stdlib:calibration``.
        validation: text that plans are measured on; when empty, the last quarter of the calibration text, which is
            then not used for scores.
        text_key: field of a ``.jsonl`` line that holds the text.
        formats: the menu of weights; with a target, what it holds of the usual ones.
        activations: what inputs of layers may be rounded to, each with every format of weights; ``16`` leaves them as
            they are. None: left as they are, but for formats that are pairs ``W@A`` already.
        kv: the menu of the KV caches, keys and values of each attention layer apart; none: left as they are.
        estimator: name of the estimator.
        estimator_settings: its settings.
        solver: name of the solver.
        solver_settings: its settings.
        rules: further rules on the choice, as `mpsearch.Rules` has them; rows are decisions.
        cautious: standard errors above their values that scores are planned with.
        budgets: all to be kept at once.
        pins: layer name or pattern -> the format it must take.
        protect: rule that pins further layers to 16 bits, such as ``activation_spikes > 6.68``; none when empty.
        ties: ``auto``, ``none``, or lists of layer names or patterns, one list per tie. With a target ``auto`` and
            ``none`` are what it needs.
        clamp: let no format of more bytes count as worse than one of fewer, where the scores say so.
        tokens: calibration tokens.
        validation_tokens: validation tokens.
        length: tokens of one sequence.
        batch_size: sequences of one batch.
        points: how many more budgets of weights are solved and measured for the front.
        random: how many random plans of the first budget are measured for comparison.
        seed: seed of all that is random.
        storage: URL or path of the results database.
        workers: processes that compute.
        executor: where they run: ``local``, ``ray``, or ``database`` for workers that join by themselves.
        executor_settings: its settings.
        out: folder of the report and the plan.
        trust_remote_code: run the model's own code.
        engine: whose kernels are timed for budgets of time, and how it keeps weights for budgets of memory: a name with
            settings (``onnxruntime:threads=2``), or ``file:PATH`` of a table that was measured elsewhere.
        energy: table of picojoules (``format, pj_per_mac, pj_per_byte``) for budgets of energy.
        target: who will load the plan, such as ``vllm``: only what it can hold is offered, what it loads as one matrix
            is tied, and weights count with the bytes that it stores; none when empty.
    """

    name: str = ""
    model: str = ""
    calibration: str = ""
    validation: str = ""
    text_key: str = "text"
    formats: tuple[str, ...] = DEFAULT_FORMATS
    activations: tuple[str, ...] = ()
    kv: tuple[str, ...] = ()
    estimator: str = "divergence"
    estimator_settings: Mapping[str, Any] = field(default_factory=dict)
    solver: str = "auto"
    solver_settings: Mapping[str, Any] = field(default_factory=dict)
    rules: Mapping[str, Any] = field(default_factory=dict)
    cautious: float = 0.0
    budgets: tuple[str, ...] = ()
    pins: Mapping[str, str] = field(default_factory=dict)
    protect: str = ""
    ties: str | tuple[tuple[str, ...], ...] = "auto"
    clamp: bool = False
    tokens: int = 8192
    validation_tokens: int = 16384
    length: int = 256
    batch_size: int = 2
    points: int = 8
    random: int = 0
    seed: int = 0
    storage: str = "sqlite:///mpsearch.db"
    workers: int = 1
    executor: str = "local"
    executor_settings: Mapping[str, Any] = field(default_factory=dict)
    out: str = "mpsearch-out"
    trust_remote_code: bool = False
    engine: str = ""
    energy: str = ""
    target: str = ""

    def __post_init__(self) -> None:
        for name in ("tokens", "validation_tokens", "length", "batch_size", "workers"):
            _whole(name, getattr(self, name), 1)
        for name in ("points", "random", "seed"):
            _whole(name, getattr(self, name), 0)
        if self.length < 2:
            raise InputError("E113", "length: got 1; a sequence needs at least 2 tokens")
        if isinstance(self.ties, str) and self.ties not in ("auto", "none"):
            raise InputError("E113", f"'ties': got '{self.ties}'; give auto, none, or lists of layer names")
        menu = parse_formats(self.formats)
        for fmt in menu:
            if fmt.family == "kv":
                raise InputError("E110", f"formats: '{fmt}' is for KV caches", advice=f'write kv = ["{fmt}"]')
        object.__setattr__(self, "formats", tuple(map(str, menu)))
        join(menu, self.activations)
        caches = parse_formats(self.kv) if self.kv else ()
        object.__setattr__(self, "kv", tuple(map(str, caches)))
        for cache in caches:
            if cache.family != "kv":
                raise InputError("E110", f"kv: '{cache}' is not for KV caches", advice="write one like kv-int8-token")
        parse_budgets(self.budgets)
        if self.target:
            capabilities(self.target)
        if not 0 <= self.cautious < math.inf:
            raise InputError("E113", f"cautious: got {self.cautious}; expected standard errors, such as 1.645")
        Rules.of(self.rules)
        for name in ("pins", "ties"):
            if name in self.rules:
                raise InputError("E113", f"rules: '{name}' is a key of its own in a study", advice=f"write {name} = …")
        if self.protect:
            Rule.parse(self.protect)
        for pattern, text in self.pins.items():
            try:
                Format.parse(text)
            except InputError as error:
                raise InputError(error.code, f"pin '{pattern}': {error.message}", advice=error.advice) from error

    @classmethod
    def of(cls, base: Path | None = None, **values: Any) -> StudySpec:
        """Make a spec from keyword arguments; lists may stand for tuples, one text for a list of one.

        Args:
            base: folder that relative paths of ``model``, ``calibration`` and ``validation`` start from.
            values: the fields; ``estimator`` and ``solver`` may be a table with ``name`` and settings.

        Raises:
            InputError: unknown or missing fields, or values that make no sense (E103, E106, E107, E111, E113).
        """
        for name in ("model", "calibration"):
            if not isinstance(values.get(name, ""), str):
                raise InputError("E113", f"'{name}' must be str, got {values[name]!r}")
        unknown = [name for name in values if name not in {f.name for f in fields(cls)}]
        missing = [name for name in ("model", "calibration") if not values.get(name)]
        if missing and not unknown:
            raise InputError("E106", f"'{missing[0]}' is missing", advice=_GIVE[missing[0]])
        found = dict(values)
        if unknown:
            return cls.of_values(**found)
        _printable(found)
        here = base or Path.cwd()
        found["model"] = named_model(str(found["model"]), here)
        for name in ("calibration", "validation"):
            text = found.get(name, "")
            if isinstance(text, str) and text and not text.startswith(LIBRARY):
                found[name] = str(located(text, here))
        for name, prefix in (("engine", "file:"), ("energy", "")):
            text = str(found.get(name, ""))
            if text.removeprefix(prefix) and text.startswith(prefix):
                found[name] = prefix + str(located(text.removeprefix(prefix), here))
        spec = cls.of_values(**found)
        return spec if spec.name else replace(spec, name=model_title(spec.model))

    @classmethod
    def of_values(cls, **values: Any) -> StudySpec:
        """Make a spec from keyword arguments as `of` does, with model and texts taken as they are."""
        known = [f.name for f in fields(cls)]
        for name in values:
            if name not in known:
                raise InputError(
                    "E103", f"unknown key '{name}'{did_you_mean(name, known)}", because=f"keys: {', '.join(known)}"
                )
        found = dict(values)
        for name in ("estimator", "solver", "executor"):
            if isinstance(found.get(name), Mapping):
                settings = dict(found[name])
                found[name] = settings.pop("name", "")
                found[f"{name}_settings"] = settings
        if found.get("target") and isinstance(found["target"], str):
            found.setdefault("formats", capabilities(found["target"]).menu)
        for name in _LISTS:
            if name in found:
                found[name] = _texts(name, found[name])
        if not isinstance(found.get("ties", "auto"), str):
            if not isinstance(found["ties"], (list, tuple)):
                raise InputError("E113", f"'ties' must be auto, none or lists of names, got {found['ties']!r}")
            found["ties"] = tuple(_texts("ties", group) for group in found["ties"])
        _check_types(found)
        return cls(**found)

    @classmethod
    def load(cls, path: str | Path, **overrides: Any) -> StudySpec:
        """Read a study file.

        Args:
            path: a TOML file; relative paths in it start from its folder.
            overrides: fields that replace those of the file.

        Raises:
            InputError: missing (E101), broken (E102), a key given twice (E104), or as `of`, with file and line.
        """
        file = Path(path)
        text = read_text(file)
        try:
            values = tomllib.loads(text)
        except (ValueError, RecursionError) as error:
            raise toml_error(file, str(error)) from error
        try:
            return cls.of(file.resolve().parent, **{**values, **overrides})
        except InputError as error:
            word = re.search(r"'([^']*)'", error.message)
            line = line_of(text, word[1]) if word else 0
            where = error.where or (f"{file}:{line}" if line else str(file))
            raise InputError(
                error.code, error.message, where=where, because=error.because, advice=error.advice
            ) from error

    @property
    def setup(self) -> Setup:
        """How workers load model and data."""
        held_out = not self.validation
        return Setup(
            self.model,
            Source(self.calibration, self.text_key, "first" if held_out else "all"),
            Source(self.calibration, self.text_key, "last") if held_out else Source(self.validation, self.text_key),
            self.tokens,
            self.validation_tokens,
            self.length,
            self.batch_size,
            self.ties_used,
            self.trust_remote_code,
            self.counts_caches,
        )

    def setup_for(self, identity: Sequence[str]) -> Setup:
        """The setup, with digests of model, calibration and validation text that must be found."""
        return replace(self.setup, identity=tuple(identity))

    @property
    def ties_used(self) -> str | tuple[tuple[str, ...], ...]:
        """What ties are found by: as the target needs them, unless they are lists; it knows what it loads as one."""
        if not self.target or not isinstance(self.ties, str):
            return self.ties
        return "auto" if capabilities(self.target).fuses else "none"

    @property
    def counts_caches(self) -> bool:
        """Whether KV caches must be found: they are decided, or a budget counts them."""
        asked = {budget.resource for budget in parse_budgets(self.budgets)}
        return bool(self.kv) or not asked.isdisjoint(("memory", "traffic", "energy"))

    def to_json(self) -> dict[str, Any]:
        """Return all fields as plain values."""
        found = {f.name: getattr(self, f.name) for f in fields(self)}
        for name in _LISTS:
            found[name] = list(found[name])
        for name in ("estimator_settings", "solver_settings", "executor_settings", "pins", "rules"):
            found[name] = dict(found[name])
        if not isinstance(self.ties, str):
            found["ties"] = [list(group) for group in self.ties]
        return found

    @classmethod
    def from_question(cls, question: Mapping[str, Any], storage: str) -> StudySpec:
        """Make the spec of a stored study from its question."""
        found = {**question, **{name: tuple(question.get(name, ())) for name in _LISTS}}
        if not isinstance(found["ties"], str):
            found["ties"] = tuple(tuple(group) for group in found["ties"])
        return cls(**found, storage=storage)

    def question(self) -> dict[str, Any]:
        """Return the fields that make the question: what two studies of one name must agree on."""
        return {
            name: value
            for name, value in self.to_json().items()
            # A field that came later and is not used leaves the questions of earlier studies as they were.
            if name not in _NOT_THE_QUESTION and not (name in _LATER and not value)
        }


_GIVE = {
    "model": "give a Hugging Face folder, or bundled:tiny-llama",
    "calibration": "give a .txt or .jsonl file, or stdlib:calibration (on the command line: --calib)",
}


def _printable(values: Mapping[str, Any]) -> None:
    """Refuse texts that no file can be called, and that no database stores (E114)."""
    for name, value in values.items():
        odd = next((x for x in value if x == "\0" or "\ud800" <= x <= "\udfff"), "") if isinstance(value, str) else ""
        if odd:
            raise InputError("E114", f"'{name}' holds U+{ord(odd):04X}, which is not text")


_TYPES: Mapping[str, type] = {
    "int": int, "str": str, "bool": bool,
}  # fmt: skip


def _check_types(values: Mapping[str, Any]) -> None:
    for f in fields(StudySpec):
        if f.name not in values:
            continue
        value, kind = values[f.name], str(f.type)
        if kind == "float" and (isinstance(value, bool) or not isinstance(value, (int, float))):
            raise InputError("E113", f"'{f.name}' must be a number, got {value!r}")
        if kind in _TYPES and (not isinstance(value, _TYPES[kind]) or (kind == "int" and isinstance(value, bool))):
            raise InputError("E113", f"'{f.name}' must be {kind}, got {value!r}")
        if kind.startswith("Mapping") and not isinstance(value, Mapping):
            raise InputError("E113", f"'{f.name}' must be a table of names and values, got {value!r}")
        if f.name == "pins" and not all(isinstance(x, str) for x in value.values()):
            raise InputError("E113", f"'pins' must give each layer a format as text, got {dict(value)!r}")


def _texts(name: str, value: Any) -> tuple[str, ...]:
    if isinstance(value, str):
        return (value,)
    if not isinstance(value, (list, tuple)) or not all(isinstance(x, str) for x in value):
        raise InputError("E113", f"'{name}' must be a text or a list of texts, got {value!r}")
    return tuple(value)


def _whole(name: str, value: int, least: int) -> None:
    if not least <= value < 2**63:
        raise InputError("E113", f"'{name}': got {value}; expected a whole number from {least} that fits in 64 bits")
