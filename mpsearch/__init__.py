"""mpsearch decides how many bits each part of a neural network gets.

All names below are loaded on first use, so that ``import mpsearch`` is quick and loads neither torch nor a database.
"""

from __future__ import annotations

import importlib
from typing import TYPE_CHECKING, Any

__version__ = "0.1.0"

if TYPE_CHECKING:
    from mpsearch import plot
    from mpsearch.ablation import Ablation, ablate, protect
    from mpsearch.api import batches, cost, interactions, layers, measure, score, search, study, wrap
    from mpsearch.budget import Budget
    from mpsearch.bundles.sharing import bundle, merge, unbundle
    from mpsearch.client.connection import connect
    from mpsearch.errors import (
        InfeasibleError,
        InputError,
        MpsearchError,
        ResourceError,
        StorageError,
        UnsafeError,
        UsageError,
    )
    from mpsearch.format import Format
    from mpsearch.front import Measurement, ParetoFront
    from mpsearch.layer import Layer, Layers
    from mpsearch.pairs import PairTable
    from mpsearch.parts import split
    from mpsearch.plan import BitPlan
    from mpsearch.problem import Problem, Solution
    from mpsearch.robust import Doubt, doubts
    from mpsearch.rules import Aligned, Balance, Family, Peak, Rules
    from mpsearch.solving import solve
    from mpsearch.spec import StudySpec
    from mpsearch.structure import PairTerms
    from mpsearch.studying import Study
    from mpsearch.tables import CostTable, SensitivityTable
    from mpsearch.views.difference import difference
    from mpsearch.views.why import why

_WHERE = {
    **dict.fromkeys(
        ("batches", "cost", "interactions", "layers", "measure", "score", "search", "study", "wrap"),
        "mpsearch.api",
    ),
    "Budget": "mpsearch.budget",
    **dict.fromkeys(("bundle", "merge", "unbundle"), "mpsearch.bundles.sharing"),
    "connect": "mpsearch.client.connection",
    **dict.fromkeys(
        (
            "InfeasibleError",
            "InputError",
            "MpsearchError",
            "ResourceError",
            "StorageError",
            "UnsafeError",
            "UsageError",
        ),
        "mpsearch.errors",
    ),
    "Format": "mpsearch.format",
    "Measurement": "mpsearch.front",
    "ParetoFront": "mpsearch.front",
    "Layer": "mpsearch.layer",
    "Layers": "mpsearch.layer",
    "PairTable": "mpsearch.pairs",
    "split": "mpsearch.parts",
    "BitPlan": "mpsearch.plan",
    "Problem": "mpsearch.problem",
    "Solution": "mpsearch.problem",
    **dict.fromkeys(("Ablation", "ablate", "protect"), "mpsearch.ablation"),
    **dict.fromkeys(("Doubt", "doubts"), "mpsearch.robust"),
    **dict.fromkeys(("Aligned", "Balance", "Family", "Peak", "Rules"), "mpsearch.rules"),
    "solve": "mpsearch.solving",
    "PairTerms": "mpsearch.structure",
    "StudySpec": "mpsearch.spec",
    "Study": "mpsearch.studying",
    "CostTable": "mpsearch.tables",
    "SensitivityTable": "mpsearch.tables",
    "difference": "mpsearch.views.difference",
    "why": "mpsearch.views.why",
}

__all__ = [
    "Ablation",
    "Aligned",
    "Balance",
    "BitPlan",
    "Budget",
    "CostTable",
    "Doubt",
    "Family",
    "Format",
    "InfeasibleError",
    "InputError",
    "Layer",
    "Layers",
    "Measurement",
    "MpsearchError",
    "PairTable",
    "PairTerms",
    "ParetoFront",
    "Peak",
    "Problem",
    "ResourceError",
    "Rules",
    "SensitivityTable",
    "Solution",
    "StorageError",
    "Study",
    "StudySpec",
    "UnsafeError",
    "UsageError",
    "ablate",
    "batches",
    "bundle",
    "connect",
    "cost",
    "difference",
    "doubts",
    "interactions",
    "layers",
    "measure",
    "merge",
    "plot",
    "protect",
    "score",
    "search",
    "solve",
    "split",
    "study",
    "unbundle",
    "why",
    "wrap",
]


def __getattr__(name: str) -> Any:
    if name == "plot":
        return importlib.import_module("mpsearch.plot")
    if name not in _WHERE:
        raise AttributeError(f"module 'mpsearch' has no attribute '{name}'")
    value = getattr(importlib.import_module(_WHERE[name]), name)
    globals()[name] = value
    return value


def __dir__() -> list[str]:
    return sorted([*__all__, "__version__"])
