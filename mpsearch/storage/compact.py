"""Plans as they are stored: what all plans of a model share is kept once.

A plan's file names and describes every tensor. Of it stand in the row of a plan only its formats, a character for each
layer, what was predicted, and the keys of its parts: values of the kind `PART` that hold the layers, and the bytes of
each layer in one format. The bytes are kept, not worked out again, so that a plan can be read back when the plug-in
that made its format is gone. Nobody outside of this package sees any of it: a plan comes back as it was put.
"""

from __future__ import annotations

import hashlib
import json
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from functools import lru_cache
from typing import Any

import numpy as np
from numpy.typing import NDArray

from mpsearch.errors import MpsearchError
from mpsearch.format import Format
from mpsearch.keys import canonical_json, content_key
from mpsearch.layer import Layer
from mpsearch.plan import SCHEMA, SCHEMA_VERSION
from mpsearch.records import StoredPlan
from mpsearch.storage.failures import UnreadableError
from mpsearch.storage.text import decode

#: Kind of the values that plans share.
PART = "plan_part"
#: How the row of such a plan begins: with a list, where a value that is stored whole is an object.
_MARK = "plan/1"
_BEGINS = f'["{_MARK}",'
_DIGITS = "0123456789ABCDEFGHIJKLMNOPQRSTUVWXYZabcdefghijklmnopqrstuvwxyz-_"
_VALUES = np.full(256, len(_DIGITS), dtype=np.uint16)
_VALUES[np.frombuffer(_DIGITS.encode(), dtype=np.uint8)] = np.arange(len(_DIGITS))
_SHARED = ("kept", "model", "schema", "schema_version")
_FIELDS = frozenset((*_SHARED, "tensors", "predicted", "source", "digest"))
_TENSOR = frozenset((
    *("name", "layer", "kind", "shape", "out_axis", "stored_dtype", "macs", "tie", "shared_with", "format", "bytes"),
    *("groups", "window", "channels", "inputs", "of", "of_shape", "of_axis"),
))  # fmt: skip
#: What a body raises that is no plan of ours.
_ODD = (MpsearchError, LookupError, TypeError, ValueError, AttributeError, ArithmeticError)


@dataclass(frozen=True, slots=True)
class Compact:
    """A plan as it is stored.

    Attributes:
        text: what stands in its row.
        parts: key -> text of the values that it shares with other plans.
    """

    text: str
    parts: Mapping[str, str]


@dataclass(frozen=True)
class _Shared:
    """The layers of a model, and the bytes of each in the formats that were asked for."""

    key: str
    text: str
    layers: tuple[Layer, ...]
    columns: dict[str, tuple[str, str]] = field(default_factory=dict)

    def column(self, name: str) -> tuple[str, str]:
        """Key and text of the part that holds a format's bytes, null for a layer that cannot take it."""
        if name not in self.columns:
            fmt = Format.parse(name)
            sizes = [None if fmt.refuses(layer) else fmt.bytes(layer) for layer in self.layers]
            body = {"bytes": sizes, "format": name}
            self.columns[name] = content_key(body), canonical_json(body)
        return self.columns[name]


# All plans of a study have one text, and so take one string.
@lru_cache(maxsize=8)
def _shared(text: str) -> _Shared:
    tensors = json.loads(text)["tensors"]
    layers = [
        Layer.from_json({**x, "name": x["layer"], "dtype": x["stored_dtype"], "shared": x["shared_with"]})
        for x in tensors
    ]
    if len({layer.name for layer in layers}) < len(layers):
        raise ValueError("two layers of one name")
    return _Shared(hashlib.sha256(text.encode()).hexdigest(), text, tuple(layers))


def pack(body: Mapping[str, Any], whole: str) -> Compact | None:
    """Return a plan as it is stored; None for one that must be stored whole, as it would not come back the same.

    Args:
        body: the plan's file.
        whole: the same as canonical JSON.
    """
    try:
        if set(body) != _FIELDS or body["schema"] != SCHEMA or body["schema_version"] != SCHEMA_VERSION:
            return None
        tensors = body["tensors"]
        if not all(set(tensor) <= _TENSOR for tensor in tensors):
            return None
        bare = [{**tensor, "bytes": None, "format": None} for tensor in tensors]
        shared = _shared(canonical_json({"tensors": bare, **{name: body[name] for name in _SHARED}}))
        formats = {tensor["layer"]: tensor["format"] for tensor in tensors}
        names = list(dict.fromkeys(formats.values()))
        if len(names) > len(_DIGITS):
            return None
        digit = dict(zip(names, _DIGITS, strict=False))
        columns = [shared.column(name) for name in names]
        parts = {shared.key: shared.text, **dict(columns)}
        assignment = content_key([body["model"].get("digest", ""), formats])
        choice = "".join(digit[name] for name in formats.values())
        rest = [body["digest"], assignment, names, choice, body["predicted"], body["source"]]
        text = canonical_json([_MARK, [shared.key, *(key for key, _ in columns)], *rest])
        same = canonical_json(expand(text, parts)) == whole
    except (*_ODD, UnreadableError):
        return None
    return Compact(text, parts) if same else None


def is_compact(text: Any) -> bool:
    """Whether a stored text is a plan that `pack` made."""
    # Another program may have left anything there.
    return isinstance(text, str) and text.startswith(_BEGINS)


def parts_of(text: str) -> list[str]:
    """Return the keys of the parts of a plan that `pack` made.

    Raises:
        UnreadableError: it is none.
    """
    return [str(key) for key in _read(text)[1]]


def expand(text: str, parts: Mapping[str, str]) -> dict[str, Any]:
    """Return the whole plan.

    Args:
        text: a plan that `pack` made.
        parts: at least its own.

    Raises:
        UnreadableError: a part is not there, or it is no such plan.
    """
    _, keys, digest, _, names, choice, predicted, source = _read(text)
    lost = [key for key in keys if key not in parts]
    if lost:
        raise UnreadableError(f"what a stored plan shares with others is not there ({ascii(lost[0])[:20]})")
    try:
        found = decode(parts[keys[0]])
        columns = [decode(parts[key])["bytes"] for key in keys[1:]]
        numbers = _numbers(choice, len(names)).tolist()
        for i, (tensor, j) in enumerate(zip(found["tensors"], numbers, strict=True)):
            tensor["bytes"], tensor["format"] = columns[j][i], names[j]
        found |= {"digest": digest, "predicted": predicted, "source": source}
    except _ODD as error:
        raise UnreadableError(f"a stored plan does not fit its parts ({type(error).__name__})") from error
    return dict(sorted(found.items()))


def checked(text: str, parts: Mapping[str, str]) -> dict[str, Any]:
    """Return the whole plan as `expand` does, and trust nothing that is said twice.

    Raises:
        UnreadableError: also for one that `pack` would not have written so.
    """
    body = expand(text, parts)
    told, found = outline(text), outline(canonical_json(body))
    if canonical_json(_read(text)) != text or (told.assignment, told.formats) != (found.assignment, found.formats):
        raise UnreadableError("a stored plan is not as it was written")
    return body


def outline(text: str) -> StoredPlan:
    """Return what is drawn of a stored plan, whole or not, without its layers.

    Raises:
        UnreadableError: it is no plan.
    """
    try:
        if is_compact(text):
            _, _, digest, assignment, names, choice, predicted, source = _read(text)
            _typed([digest, assignment, *names], predicted, source)
            return StoredPlan(digest, assignment, tuple(names), _numbers(choice, len(names)), predicted, source)
        body = decode(text)
        formats = {str(tensor["layer"]): str(tensor["format"]) for tensor in body["tensors"]}
        assignment = content_key([body["model"].get("digest", ""), formats])
        names = list(dict.fromkeys(formats.values()))
        place = {name: j for j, name in enumerate(names)}
        numbers = np.array([place[name] for name in formats.values()], dtype=np.uint16)
        _typed([body["digest"]], body["predicted"], body["source"])
        return StoredPlan(str(body["digest"]), assignment, tuple(names), numbers, body["predicted"], body["source"])
    except _ODD as error:
        raise UnreadableError(f"a stored plan is not one ({type(error).__name__})") from error


def _typed(texts: Sequence[Any], predicted: Any, source: Any) -> None:
    """Refuse what is of another kind than a plan's file has there."""
    if not all(isinstance(text, str) for text in texts):
        raise TypeError("a key or a format that is not text")
    if not (isinstance(predicted, dict) and isinstance(source, dict) and isinstance(predicted.get("cost", {}), dict)):
        raise TypeError("a prediction or a source without fields")
    values = [predicted.get(name) for name in ("loss", "spread", "bound", "gap")]
    for value in (*(x for x in values if x is not None), *predicted.get("cost", {}).values()):
        if isinstance(value, bool) or not isinstance(value, int | float):
            raise TypeError("a prediction that is no number")


def _numbers(choice: str, formats: int) -> NDArray[np.uint16]:
    """(L,) number of each layer's format."""
    found: NDArray[np.uint16] = _VALUES[np.frombuffer(choice.encode(), dtype=np.uint8)]
    if found.size and int(found.max()) >= formats:
        raise ValueError("a format that is not named")
    return found


def _read(text: str) -> Sequence[Any]:
    try:
        found = json.loads(text)
        _, keys, *_, names, choice, _, _ = found
        fine = len(found) == 8 and len(keys) == len(names) + 1 and isinstance(choice, str)
    except (ValueError, TypeError, RecursionError) as error:
        raise UnreadableError(f"a stored plan is not JSON ({type(error).__name__})") from error
    if not (fine and is_compact(text)):
        raise UnreadableError("a stored plan has another shape")
    return list(found)
