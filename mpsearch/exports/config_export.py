"""What exporters of configurations share: a table of what the target holds, texts, and a folder."""

from __future__ import annotations

import json
from abc import ABC, abstractmethod
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import Any, ClassVar

from mpsearch.capabilities import Capabilities, cannot_hold, capabilities
from mpsearch.exports.folder import write_folder
from mpsearch.files import write_file
from mpsearch.layer import Layer
from mpsearch.plan import BitPlan

#: Endings of formats whose scales or codes are found by another rule than the plain one.
RULES = ("-mse", "-gptq")
_SHOWN = 3


@dataclass(frozen=True)
class ConfigExporter(ABC):
    """Writes a plan as texts that a target's own quantiser reads.

    Every tensor is named exactly, once, in sorted order; what is left alone is said. The target rounds the weights by
    its own rules, so that losses there are near those that were measured and not equal.

    Attributes:
        force: replace an earlier export in the same folder.
        version: version of the target; the tested one when empty.
        assume: version whose facts count for a version that no table speaks of.
        source: folder of the model, for the command that is written beside; empty leaves its place to be filled in.
    """

    target: ClassVar[str]

    force: bool = False
    version: str = ""
    assume: str = ""
    source: str = ""

    @property
    def able(self) -> Capabilities:
        """What the target can hold."""
        return capabilities(self.target, self.version, self.assume)

    def refuses(self, plan: BitPlan) -> Sequence[str]:
        """Name every layer that the target cannot hold: its name, what is wanted, what is allowed."""
        return self.able.violations(plan)

    def notes(self, plan: BitPlan) -> Sequence[str]:
        """Say what the target does unless told otherwise, and which layers it rounds by another rule than measured."""
        found = [name for name, fmt in plan.formats.items() if str(fmt.weight).endswith(RULES)]
        if not found or self.able.rounds == "ours":
            return self.able.defaults
        more = f" and {len(found) - _SHOWN} more" if len(found) > _SHOWN else ""
        said = (
            f"{', '.join(found[:_SHOWN])}{more}: measured with {' or '.join(RULES)}; {self.able.title} finds scales "
            "and codes by its own rule, so its loss may be higher than the plan's"
        )
        return (*self.able.defaults, said)

    @abstractmethod
    def texts(self, plan: BitPlan) -> Mapping[str, str]:
        """Return the files of an export, name -> content, for a plan that is not refused."""

    def write(self, plan: BitPlan, folder: Path, model: Any = None) -> Sequence[Path]:
        """Write the files.

        Args:
            plan: the plan.
            folder: a new or empty folder.
            model: not needed; the target reads the model itself.

        Raises:
            InputError: layers that the target cannot hold (E301), or the folder holds files (E303).
        """
        if violations := self.refuses(plan):
            raise cannot_hold(self.able.title, violations)
        writers = {name: partial(write_file, content=text) for name, text in self.texts(plan).items()}
        return write_folder(folder, self.target, {"plan.json": plan.save, **writers}, self.force)


def modules(layer: Layer) -> tuple[str, ...]:
    """Names of all modules that hold a layer's weight.

    >>> modules(Layer("embed", "embedding", (8, 4), shared=("head",)))
    ('embed', 'head')
    """
    return (layer.name, *layer.shared)


def weights_of(plan: BitPlan) -> list[Layer]:
    """The layers of a plan that hold weights, sorted by name: numbers by their size."""
    return sorted((layer for layer in plan.layers if layer.kind != "kv_cache"), key=lambda layer: natural(layer.name))


def natural(name: str) -> list[tuple[int, str]]:
    """Sort key of a name in which numbers go by their size.

    >>> sorted(["l.10", "l.9"], key=natural)
    ['l.9', 'l.10']
    """
    return [(int(part), "") if part.isdecimal() and part.isascii() else (-1, part) for part in name.split(".")]


def json_text(value: Any) -> str:
    """Write a value as JSON that people read."""
    return json.dumps(value, indent=2, ensure_ascii=False) + "\n"
