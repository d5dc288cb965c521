"""Bit plans: which format each layer gets, and what was predicted of it."""

from __future__ import annotations

import json
import math
import sys
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field, fields
from pathlib import Path
from typing import TYPE_CHECKING, Any

from mpsearch.errors import InputError
from mpsearch.files import write_file
from mpsearch.format import Format
from mpsearch.keys import canonical_json, content_key
from mpsearch.layer import Layer, Layers
from mpsearch.parts import check_apart

if TYPE_CHECKING:
    from mpsearch.plot.figure import Figure

SCHEMA = "mpsearch/plan"
SCHEMA_VERSION = 1


@dataclass(frozen=True)
class Predicted:
    """What was predicted of a plan before it ran.

    Attributes:
        loss: predicted loss increase, in ``unit``.
        spread: upper limit of its standard error: the sum of those of the layers, which are not independent.
        unit: such as ``nats/token``.
        bound: no plan within the budgets is predicted to lose less; ``None`` for a plan that was not solved for.
        gap: relative distance between ``loss`` and ``bound``.
        cost: resource -> total cost, what is not decided included.
    """

    loss: float | None = None
    spread: float | None = None
    unit: str = ""
    bound: float | None = None
    gap: float | None = None
    cost: Mapping[str, float] = field(default_factory=dict)

    def to_json(self) -> dict[str, Any]:
        return {
            "loss": self.loss,
            "spread": self.spread,
            "unit": self.unit,
            "bound": self.bound,
            "gap": self.gap,
            "cost": {name: whole(value) for name, value in self.cost.items()},
        }

    @classmethod
    def from_json(cls, data: Mapping[str, Any]) -> Predicted:
        if not isinstance(data, Mapping):
            raise ValueError(f"predicted is {str(data)[:40]!r}")
        # What a later writer of this schema says beside is passed over.
        known = {each.name: data[each.name] for each in fields(cls) if each.name in data}
        for name, value in known.items():
            if name == "cost":
                known[name] = {str(resource): _figure(amount) for resource, amount in value.items()}
            elif name != "unit" and value is not None:
                _figure(value)
            elif name == "unit" and not isinstance(value, str):
                raise ValueError(f"the unit is {str(value)[:40]!r}")
        return cls(**known)


def _figure(value: Any) -> float:
    if isinstance(value, bool) or not isinstance(value, (int, float)) or abs(value) > sys.float_info.max:
        raise ValueError(f"{str(value)[:40]!r} is no finite number")
    return value


def whole(value: float) -> float | int:
    """Return an integer where a number is one, so that bytes print as bytes.

    >>> whole(3.0), whole(0.5)
    (3, 0.5)
    """
    return int(value) if math.isfinite(value) and value == int(value) else value


@dataclass(frozen=True)
class BitPlan:
    """A format for every layer of one model.

    Attributes:
        layers: the model's layers and what is left out.
        formats: layer name -> format, for every layer.
        model: ``name`` and ``digest`` of the model.
        predicted: predicted loss and costs.
        source: how the plan was made: study, budgets, estimator, solver, ….

    Raises:
        InputError: parts of a layer that have weights in common, or stand beside the whole layer (E122).

    >>> from mpsearch.layer import Layer
    >>> layers = Layers((Layer("fc", "linear", (8, 64)),))
    >>> plan = BitPlan(layers, {"fc": Format.parse("int4-g64")})
    >>> plan.bytes, BitPlan.from_json(plan.to_json()) == plan
    (272, True)
    """

    layers: Layers
    formats: Mapping[str, Format]
    model: Mapping[str, str] = field(default_factory=dict)
    predicted: Predicted = field(default_factory=Predicted)
    source: Mapping[str, Any] = field(default_factory=dict)

    def __post_init__(self) -> None:
        names = [layer.name for layer in self.layers]
        if set(names) != set(self.formats):
            wrong = sorted(set(names) ^ set(self.formats))
            raise ValueError(f"a plan needs a format for each layer and no other; wrong or missing: {wrong[:5]}")
        check_apart(self.layers)
        object.__setattr__(self, "formats", {name: self.formats[name] for name in names})

    def choice(self, formats: Sequence[str]) -> list[int]:
        """Column of each decision's format in a table; -1 where the table has none.

        >>> from mpsearch.layer import Layer
        >>> plan = BitPlan(Layers((Layer("fc", "linear", (8, 64)),)), {"fc": Format.parse("int4-g64")})
        >>> plan.choice(["int8-g64", "int4-g64"]), plan.choice(["bf16"])
        ([1], [-1])
        """
        columns = {name: j for j, name in enumerate(formats)}
        return [columns.get(str(self.formats[row.layers[0].name]), -1) for row in self.layers.decisions]

    @property
    def loss(self) -> float | None:
        """Predicted loss increase."""
        return self.predicted.loss

    @property
    def cost(self) -> Mapping[str, float]:
        """Predicted total costs."""
        return self.predicted.cost

    @property
    def bytes(self) -> int:
        """Exact bytes of the whole model in our own file under this plan, left-out tensors included."""
        return self.layers.excluded_bytes + sum(self.formats[layer.name].bytes(layer) for layer in self.layers)

    @property
    def stored_bytes(self) -> int:
        """Bytes of the whole model as the plan's target stores it; `bytes` for a plan without a target."""
        return int(self.cost.get("weights", self.bytes))

    @property
    def counted_in(self) -> str:
        """Where bytes of single layers are counted, when they do not add up to `stored_bytes`; else empty."""
        return "" if self.bytes == self.stored_bytes else "in our own file"

    @property
    def bits(self) -> float:
        """Stored bits per weight of the whole model."""
        return 8 * self.stored_bytes / self.layers.weights

    @property
    def key(self) -> str:
        """Content key: the digest inside the file."""
        return content_key(self._body())

    @property
    def assignment(self) -> str:
        """Key of what the plan does (model and formats), whatever was predicted of it."""
        return content_key([self.model.get("digest", ""), {name: str(fmt) for name, fmt in self.formats.items()}])

    def _body(self) -> dict[str, Any]:
        return {
            "schema": SCHEMA,
            "schema_version": SCHEMA_VERSION,
            "model": {**self.model, "weights": self.layers.weights, "macs_per": self.layers.unit},
            "tensors": [
                {
                    "name": layer.tensor,
                    "layer": layer.name,
                    "kind": layer.kind,
                    "shape": list(layer.shape),
                    "out_axis": layer.out_axis,
                    "stored_dtype": layer.dtype,
                    "macs": layer.macs,
                    "tie": layer.tie,
                    "shared_with": list(layer.shared),
                    **layer.rarities(),
                    "format": str(self.formats[layer.name]),
                    "bytes": self.formats[layer.name].bytes(layer),
                }
                for layer in self.layers
            ],
            "kept": [{**kept.to_json(), "bytes": kept.stored_bytes} for kept in self.layers.excluded],
            "predicted": {**self.predicted.to_json(), "bytes": self.bytes},
            "source": dict(self.source),
        }

    def to_json(self) -> dict[str, Any]:
        """Return the plan as plain values, with its digest."""
        return {**self._body(), "digest": self.key}

    @classmethod
    def from_json(cls, data: Mapping[str, Any], where: str = "plan") -> BitPlan:
        """Read a plan.

        Args:
            data: what `to_json` returned.
            where: name of the file, for messages.

        Raises:
            InputError: not a plan, of a newer schema, or changed since it was written (E304).
        """
        try:
            if data["schema"] != SCHEMA:
                raise KeyError("schema")
            version = data["schema_version"]
            if version != SCHEMA_VERSION:
                raise InputError(
                    "E304",
                    f"{where}: plan schema {version}; this version reads {SCHEMA_VERSION}",
                    advice="update mpsearch",
                )
            rest = {name: value for name, value in data.items() if name != "digest"}
            if content_key(rest) != data["digest"]:
                raise InputError("E304", f"{where}: the digest does not match: the file was cut or edited")
            return cls._from_body(data)
        except (LookupError, TypeError, ValueError, AttributeError, ArithmeticError, RecursionError) as error:
            raise InputError("E304", f"{where}: not a bit plan ({type(error).__name__}: {error})") from error

    @classmethod
    def _from_body(cls, data: Mapping[str, Any]) -> BitPlan:
        items = [
            {**t, "name": t["layer"], "dtype": t["stored_dtype"], "shared": t["shared_with"]} for t in data["tensors"]
        ]
        model = {name: str(value) for name, value in data["model"].items() if name not in ("weights", "macs_per")}
        return cls(
            Layers.from_json({"layers": items, "excluded": data["kept"], "unit": data["model"]["macs_per"]}),
            {t["layer"]: Format.parse(t["format"]) for t in data["tensors"]},
            model,
            Predicted.from_json(data["predicted"]),
            dict(data["source"]),
        )

    def plot(self) -> Figure:
        """Draw the bits of each layer (see `mpsearch.plot.plan_heatmap`)."""
        from mpsearch.plot import plan_heatmap

        return plan_heatmap(self)

    def _repr_html_(self) -> str:
        from mpsearch.plot.notebook import plan_html

        return plan_html(self)

    def save(self, path: str | Path) -> None:
        """Write the plan as JSON, whole or not at all."""
        write_file(Path(path), json.dumps(self.to_json(), indent=1, ensure_ascii=False, allow_nan=False) + "\n")

    @classmethod
    def load(cls, path: str | Path) -> BitPlan:
        """Read a plan file.

        Raises:
            InputError: the file is missing (E101) or not a whole plan (E304).
        """
        try:
            # A device or a pipe has no end.
            if Path(path).exists() and not Path(path).is_file():
                raise InputError("E101", f"plan file '{path}' is not a file")
            text = Path(path).read_text(encoding="utf-8")
        except OSError as error:
            raise InputError("E101", f"plan file '{path}' cannot be read: {error.strerror}") from error
        except UnicodeDecodeError as error:
            raise InputError("E304", f"{path}: not a text file") from error
        try:
            data = json.loads(text)
        except (ValueError, RecursionError) as error:
            raise InputError("E304", f"{path}: not JSON ({error}): the file was cut or edited") from error
        if not isinstance(data, dict):
            raise InputError("E304", f"{path}: not a bit plan")
        return cls.from_json(data, str(path))

    def compare(self, other: BitPlan) -> list[tuple[str, Format, Format]]:
        """List the layers on which two plans of one model differ: name, this format, the other's.

        Raises:
            InputError: the plans are for different models (E302).
        """
        mine, theirs = list(self.formats), list(other.formats)
        if self.model.get("digest") != other.model.get("digest") or mine != theirs:
            raise InputError("E302", "the plans are for different models")
        return [(name, f, other.formats[name]) for name, f in self.formats.items() if f != other.formats[name]]

    @classmethod
    def uniform(
        cls,
        layers: Layers,
        fmt: Format,
        fallback: Sequence[Format],
        model: Mapping[str, str],
        refuses: Callable[[Layer, Format], str] = lambda layer, fmt: fmt.refuses(layer),
    ) -> BitPlan:
        """Make the plan that gives every decision one format, or the first fallback that all its layers can take.

        Args:
            layers: the layers.
            fmt: the format.
            fallback: formats for layers that cannot take it.
            model: the model.
            refuses: says why a layer cannot take a format; empty when it can.

        Raises:
            InputError: a layer can take none of them (E130).
        """
        formats: dict[str, Format] = {}
        for decision in layers.decisions:
            options = (f for f in (fmt, *fallback) if not any(refuses(layer, f) for layer in decision.layers))
            taken = next(options, None)
            if taken is None:
                layer = next(x for x in decision.layers if refuses(x, fmt))
                raise InputError("E130", f"layer '{layer.name}': {refuses(layer, fmt)}")
            formats |= {layer.name: taken for layer in decision.layers}
        return cls(layers, formats, model, source={"uniform": str(fmt)})

    def __hash__(self) -> int:
        return hash(canonical_json(self._body()))
