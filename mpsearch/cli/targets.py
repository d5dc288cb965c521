"""``mpsearch targets``: what prices plans, what times them, and what loads them."""

from __future__ import annotations

import json
import sys
from collections.abc import Iterator, Sequence
from typing import TYPE_CHECKING, Annotated, Any

import typer

from mpsearch.cli.options import Json

if TYPE_CHECKING:
    from rich.console import Console

    from mpsearch.capabilities import Capabilities


def targets(
    name: Annotated[str, typer.Argument(help="A target of plans, such as vllm: what it can hold.")] = "",
    as_json: Json = False,
) -> None:
    """List what prices a plan, the engines whose kernels can be timed, and the tools that load plans.

    mpsearch targets

    mpsearch targets vllm
    """
    from mpsearch.capabilities import capabilities
    from mpsearch.cli.show import console

    if name:
        _one(capabilities(name), as_json)
        return
    resources, engines, tools = list(_resources()), list(_engines()), list(_tools())
    if as_json:
        sys.stdout.write(json.dumps({"resources": resources, "engines": engines, "tools": tools}, indent=1) + "\n")
        return
    out = console()
    rows = [(row["budget"], row["units"], row["what"]) for row in resources]
    _table(out, "Resources", ("budget", "unit", "what it counts"), rows)
    rows = [(row["name"], row["missing"] or "yes", row["does"]) for row in engines]
    _table(out, "Engines", ("engine", "here", "what it times"), rows)
    out.print("An engine of yours on another machine: mpsearch profile there, and engine = 'file:profile.json' here.\n")
    columns = ("target", "versions", "export --to", "rounds", "proof")
    keys = ("name", "versions", "export", "rounds", "proof")
    _table(out, "Tools", columns, [tuple(row[key] for key in keys) for row in tools])
    out.print("With target = 'NAME' a study offers only what that tool can hold; mpsearch targets NAME lists it.")


def _table(out: Console, title: str, columns: tuple[str, ...], rows: Sequence[tuple[str, ...]]) -> None:
    from rich.table import Table
    from rich.text import Text

    table = Table(title=title, title_justify="left", box=None)
    for column in columns:
        table.add_column(column, overflow="fold")
    for row in rows:
        table.add_row(*map(Text, row))
    out.print(table)
    out.print()


def _one(able: Capabilities, as_json: bool) -> None:
    """What one target can hold."""
    from mpsearch.cli.show import console

    if as_json:
        sys.stdout.write(json.dumps(able.to_json(), indent=1) + "\n")
        return
    out = console()
    out.print(f"{able.title} {able.versions}, checked with {able.tested}", highlight=False, markup=False)
    own = "our own file's" if not able.container else f"those of {able.container}"
    out.print(f"budgets of weights count bytes: {own}", highlight=False, markup=False)
    cast = f", or cast to {', '.join(able.plain)}" if able.plain else ""
    kinds = f" (only {', '.join(able.leaves)} layers)" if able.leaves else ""
    out.print(f"layers can be left in their own number type{kinds}{cast}\n", highlight=False, markup=False)
    rows = [
        (", ".join(rule.kinds), "\n".join(rule.weights), "\n".join(rule.inputs), rule.limits) for rule in able.holds
    ]
    _table(out, "Holds", ("layers", "weights", "inputs", "only"), rows)
    for names in able.fused:
        out.print(f"loaded as one, so with one format: {', '.join(sorted(names))}", highlight=False, markup=False)
    if able.kv:
        out.print(f"KV caches: {', '.join(able.kv)}", highlight=False, markup=False)
    for other in able.based_on:
        out.print(
            f"of that only what {other.title} holds too (mpsearch targets {other.target})",
            highlight=False,
            markup=False,
        )
    for line in able.defaults:
        out.print(f"- {line}", highlight=False, markup=False)


def _tools() -> Iterator[dict[str, str]]:
    """The tools that load plans, with how an export is written and proven."""
    from mpsearch import registry
    from mpsearch.capabilities import capabilities
    from mpsearch.capabilities import targets as able_targets
    from mpsearch.exports.proof_run import proofs

    exporters, proven = registry.names("exporters"), proofs()
    for name in dict.fromkeys([*able_targets(), *exporters]):
        able = capabilities(name) if name in able_targets() else None
        based = [other.target for other in able.based_on if other.target in exporters] if able else []
        yield {
            "name": name,
            "versions": able.versions if able else "",
            "export": name if name in exporters else next(iter(based), ""),
            "rounds": {"ours": "as planned", "theirs": "by itself"}.get(able.rounds, "") if able else "",
            "proof": "yes" if name in proven else "",
        }


def _resources() -> Iterator[dict[str, str]]:
    from mpsearch.budget import units

    rows = (
        ("weights <= 4.25 bits", "weights", "stored bytes of the whole model: exact"),
        ("memory <= 8 GiB at context 8192, batch 4", "memory", "weights and KV caches: exact; activations: modelled"),
        ("kv <= 2 GiB at context 8192", "kv", "KV caches alone: exact"),
        ("bops <= 60 %", "bops", "multiply-adds times bits of both factors: modelled"),
        ("ttft <= 180 ms at prompt 512", "ttft", "time to the first token: measured kernels"),
        ("tpot <= 14 ms at context 2048", "tpot", "time of each further token: measured kernels"),
        ("latency <= 2 s at prompt 512, output 128", "latency", "whole requests, or a mix of them: measured kernels"),
        ("traffic <= 1 GB at context 2048", "traffic", "bytes that a decode step reads: modelled"),
        ("energy <= 3 mJ at context 2048", "energy", "by your own table of picojoules: modelled"),
    )
    for budget, resource, what in rows:
        yield {"budget": budget, "units": " ".join(units(resource)), "what": what}


def _engines() -> Iterator[dict[str, Any]]:
    from mpsearch import registry

    whole = registry.names("wholes")
    for name in registry.names("engines"):
        made = registry.load("engines", name)
        # A roofline cannot be set up without its figures; it needs nothing to be installed.
        missing = "" if name == "roofline" else made().missing()
        advice = f"{missing}: pip install 'mpsearch[{made.extra}]'" if missing and made.extra else missing
        yield {
            "name": name,
            "missing": advice,
            "does": (made.__doc__ or "").strip().splitlines()[0].rstrip(".:").replace("``", ""),
            "settings": [*registry.settings("engines", name), "threads", *(["wholes"] if name in whole else [])],
        }
