"""Loaded by every Python process of a harness: gives them a model that costs milliseconds instead of seconds."""

import os

if os.environ.get("MPSEARCH_CHAOS"):
    from mpsearch import registry

    registry.BUILT_IN["work"]["workbench"] = "benchmarks.chaos.fake:Cells"  # type: ignore[index]
    registry.BUILT_IN["estimators"]["chaos"] = "benchmarks.chaos.fake:Chaos"  # type: ignore[index]
