"""Pages of estimators, solvers, searchers and targets, made of their docstrings and of what the registry knows."""

from __future__ import annotations

import inspect
from collections.abc import Iterator, Mapping
from typing import Any

from make_text import cell, fenced, markdown, plain, table

from mpsearch import registry
from mpsearch.capabilities import Capabilities, capabilities, targets


def estimators() -> Iterator[tuple[str, str]]:
    """Yield the name and the page of every estimator."""
    for name in registry.BUILT_IN["estimators"]:
        made = registry.make("estimators", name)
        streams = {"": "no", "forward": "yes, forward", "backward": "yes, with a second pass backward"}
        facts = {
            "needs": ", ".join(made.needs) or "nothing but the weights",
            "takes": made.cost,
            "sees rounding of": ", ".join(made.covers),
            "parts of layers": "yes" if getattr(made, "parts", False) else "no",
            "larger than memory": streams[getattr(made, "streams", "")],
        }
        use = f"--estimator {name}", f'estimator = "{name}"'
        yield name, _page("estimators", name, type(made), facts, use, "../estimators.md")


def solvers() -> Iterator[tuple[str, str, str]]:
    """Yield the kind (``solvers`` or ``searchers``), the name and the page of each."""
    for kind in ("solvers", "searchers"):
        for name in registry.BUILT_IN[kind]:
            made = registry.load(kind, name)
            facts = {"takes": made.takes, "proves": made.proves, "costs": made.cost}
            one = kind[:-1]
            use = (f"--{one} {name}", f'{one} = "{name}"' if kind == "solvers" else "")
            yield kind, name, _page(kind, name, made, facts, use, "../solvers.md")


def _page(kind: str, name: str, made: Any, facts: Mapping[str, str], use: tuple[str, str], above: str) -> str:
    lead = (inspect.getdoc(made) or "").split("\n\n")[0]
    settings = ", ".join(f"`{item}`" for item in registry.settings(kind, name)) or "none"
    module = made.__module__.replace(".", "/")
    how = " or ".join(f"`{text}`" for text in use if text)
    rows = [(f"**{key}**", cell(value)) for key, value in facts.items()]
    rows += [("**settings**", settings), ("**chosen by**", how), ("**in the code**", f"`{module}.py`")]
    return "\n".join(
        [
            f"# {name}\n",
            plain(lead) + "\n",
            table(("", ""), rows),
            markdown(made, skip=1),
            f"All of them, and which to take: [{kind}]({above}).\n",
        ]
    )


def target_names() -> tuple[str, ...]:
    """Return the names of all tools that plans are exported for, and of the exporters without a table."""
    return tuple(dict.fromkeys([*registry.BUILT_IN["exporters"], *targets()]))


def target(name: str) -> str:
    """Return the page of a target that nobody wrote one for."""
    able = capabilities(name) if name in targets() else None
    writer = _writer(name, able)
    found = [f"# {name}\n"]
    if able:
        found.append(f"{plain(able.title)}, versions `{able.versions}`, checked with {able.tested}.\n")
    if writer:
        study = f"mpsearch run ./model --name NAME --calib calib.txt --target {name}\n" if able else ""
        found += ["## How to\n", fenced(f"{study}mpsearch export NAME --to {writer} --out out", "sh")]
        found += ["## What is written\n", markdown(registry.load("exporters", writer))]
    if name == "tensorrt-llm":
        found.append("The export of [modelopt](modelopt.md) is what it loads.\n")
    return "\n".join([*found, holds(name), "All targets: [exports](../exports.md).\n"])


def _writer(name: str, able: Capabilities | None) -> str:
    if name in registry.BUILT_IN["exporters"]:
        return name
    based = [other.target for other in able.based_on] if able else []
    return next((other for other in based if other in registry.BUILT_IN["exporters"]), "")


def holds(name: str) -> str:
    """Return what a target can hold by its table, as a section; empty without a table."""
    if name not in targets():
        return ""
    able = capabilities(name)
    rows = [
        [
            ", ".join(rule.kinds),
            ", ".join(f"`{text}`" for text in rule.weights),
            ", ".join(f"`@{text}`" for text in rule.inputs) or "as they are",
            cell(rule.limits),
        ]
        for rule in able.holds
    ]
    found = ["## By the table that plans are checked with\n", table(("layers", "weights", "inputs", "only"), rows)]
    own = f"those of {able.container}" if able.container else "our own file's"
    found.append(f"- budgets of weights count bytes: {own}")
    found += [f"- loaded as one, so with one format: {', '.join(f'`{x}`' for x in sorted(n))}" for n in able.fused]
    if able.kv:
        found.append(f"- KV caches: {', '.join(f'`{text}`' for text in able.kv)}")
    found += [f"- of that only what {plain(other.title)} holds too" for other in able.based_on]
    found += [f"- {plain(text)}" for text in able.defaults]
    if able.source:
        found.append(f"- facts from: {plain(able.source)}")
    return "\n".join(found) + "\n"
