"""Plans of a few layers without a model, and the scripts that exports write, run on stand-ins."""

from __future__ import annotations

import sys
from collections.abc import Mapping
from pathlib import Path
from types import ModuleType
from typing import Any

import pytest

from mpsearch.format import Format
from mpsearch.layer import Layer, Layers
from mpsearch.plan import BitPlan

#: Names that patterns, shells, JSON and Python could read as something else.
HOSTILE = (
    "a[0].*", "a0.x", "l?yer", "layer", "quote'\"\\", "../up", "größe.层", "n" * 300, "{x}", "$(touch x)", "re:.*", "*",
)  # fmt: skip


def plan_of(formats: Mapping[str, str], **settings: Any) -> BitPlan:
    """A plan of linear layers of 64 × 256 in bf16; one that is called embed is an embedding."""
    layers = [
        Layer(name, "embedding" if name.endswith("embed") else "linear", (64, 256), dtype="bfloat16", **settings)
        for name in formats
    ]
    chosen = {name: Format.parse(text) for name, text in formats.items()}
    return BitPlan(Layers(tuple(layers)), chosen, {"name": "small", "digest": "d"})


def script(folder: Path) -> dict[str, Any]:
    """Run a written script without its ``main``; the names in it."""
    path = folder / "run.py"
    scope: dict[str, Any] = {"__name__": "run", "__file__": str(path)}
    exec(compile(path.read_text(encoding="utf-8"), str(path), "exec"), scope)
    return scope


def stand_in(monkeypatch: pytest.MonkeyPatch, name: str, **things: Any) -> None:
    """Put a module in the place of a library that is not needed here."""
    module = ModuleType(name)
    vars(module).update(things)
    monkeypatch.setitem(sys.modules, name, module)
