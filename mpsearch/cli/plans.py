"""``mpsearch plan``: plan files checked, compared, and made of those of other tools."""

from __future__ import annotations

import json
import sys
from collections import Counter
from collections.abc import Iterator
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import typer

from mpsearch.cli.options import Json
from mpsearch.errors import InputError, UsageError
from mpsearch.spread import at_most

if TYPE_CHECKING:
    from mpsearch.plan import BitPlan

app = typer.Typer(name="plan", help="Check, compare and import plan files.", no_args_is_help=True)

#: What was looked at -> the code of what is wrong there.
_CODES = {"file": "E304", "model": "E302", "target": "E301"}


@app.command("import")
def import_(
    file: Annotated[Path, typer.Argument(help="File of another tool, or the folder that holds it.")],
    form: Annotated[str, typer.Option("--from", help="Whose it is: autoround, gptqmodel, compressed-tensors, …")],
    model: Annotated[str, typer.Option(help="Folder of the original model, or bundled:tiny-llama.")],
    out: Annotated[Path, typer.Option(help="Plan file to write.")] = Path("plan.json"),
    nominal: Annotated[str, typer.Option(help="For bits alone: the format that stands for them: int{bits}-g128.")] = "",
    rest: Annotated[str, typer.Option(help="Format of layers that the file leaves to a command line.")] = "",
    rounding: Annotated[str, typer.Option(help="How integers are rounded here: full, mse or gptq.")] = "",
    without: Annotated[list[str] | None, typer.Option(help="Leave out rounding of inputs or caches.")] = None,
) -> None:
    """Make a plan of a file of another tool, so that it can be measured and compared beside ours.

    mpsearch plan import quantised/config.json --from compressed-tensors --model ./model --out theirs.json

    mpsearch plan import model-q4_k_m.gguf --from gguf --model ./model --out theirs.json
    """
    from mpsearch.bundled import resolve_model
    from mpsearch.cli.show import safe
    from mpsearch.imports.foreign import Options
    from mpsearch.imports.plans import import_plan

    if out.exists() and file.exists() and out.samefile(file):
        raise UsageError("E113", f"--out '{out}' is the file that is read", advice="name another file")
    if out.exists():
        raise InputError("E303", f"'{out}' is there already; nothing was written", advice="name another file: --out")
    options = Options(nominal, rest, rounding, frozenset(without or ()))
    found = import_plan(file, form, resolve_model(model, Path.cwd()), options)
    found.plan.save(out)
    for note in found.notes:
        sys.stderr.write(f"note: {safe(note)}\n")
    counts = Counter(str(fmt) for fmt in found.plan.formats.values())
    for text, count in sorted(counts.items()):
        sys.stdout.write(f"{text:<24} {count:>6} layer{'s' if count > 1 else ''}\n")
    sys.stdout.write(f"bytes       {found.plan.bytes:,} ({found.plan.bits:.4f} bits per weight)\n")
    sys.stdout.write(f"plan        {out}\n")


@app.command()
def check(
    plan: Annotated[Path, typer.Argument(help="Plan file.")],
    model: Annotated[str, typer.Option(help="Hold it against this model folder.")] = "",
    to: Annotated[str, typer.Option(help="Hold it against what this target can hold.")] = "",
    target_version: Annotated[str, typer.Option(help="Version of the target; the tested one by default.")] = "",
    assume: Annotated[str, typer.Option(help="Version whose facts count where none are known.")] = "",
    as_json: Json = False,
) -> None:
    """Say everything that is wrong with a plan file: in itself, for a model, for a target. Exit 3 if anything is.

    mpsearch plan check plan.json --model ./model --to vllm
    """
    from mpsearch.cli.show import safe
    from mpsearch.imports.checking import check_file

    if (target_version or assume) and not to:
        raise UsageError("E115", "--target-version and --assume are for --to", advice="name the target: --to vllm")
    read, faults, notes = check_file(plan)
    wrong = [("file", fault) for fault in faults]
    if read is not None:
        wrong += [("model", fault) for fault in _model_faults(read, model)]
        wrong += [("target", fault) for fault in _target_faults(read, to, target_version, assume)]
    if as_json:
        entries = [{"where": where, "what": what} for where, what in wrong]
        sys.stdout.write(json.dumps({"plan": read.key if read else None, "wrong": entries, "notes": notes}) + "\n")
    else:
        for where, what in wrong:
            sys.stdout.write(f"{where:<7} {safe(what)}\n")
        for note in notes:
            sys.stderr.write(f"note: {safe(note)}\n")
    if wrong:
        count = len(wrong)
        raise InputError(_CODES[wrong[0][0]], f"{plan}: {count} thing{'s are' if count > 1 else ' is'} wrong")
    if not as_json and read is not None:
        looked = ", ".join(filter(None, ("in itself", model and "against the model", to and f"for {to}")))
        sys.stdout.write(f"fine: {len(read.layers)} layers, {read.bytes:,} bytes, checked {looked}\n")


def _model_faults(plan: BitPlan, model: str) -> Iterator[str]:
    if not model:
        return
    from mpsearch.bundled import resolve_model
    from mpsearch.imports.checking import check_model
    from mpsearch.model.find import find_layers
    from mpsearch.model.model import load_model

    loaded = load_model(resolve_model(model, Path.cwd()))
    caches = any(layer.kind == "kv_cache" for layer in plan.layers)
    yield from check_model(plan, find_layers(loaded, caches=caches), loaded.digest)


def _target_faults(plan: BitPlan, target: str, version: str, assume: str) -> list[str]:
    """What the table of a target refuses, and what its exporter refuses beside."""
    if not target:
        return []
    from mpsearch import registry
    from mpsearch.capabilities import capabilities, targets

    tabled = target in targets()
    exported = target in registry.names("exporters")
    found: list[str] = []
    if tabled or not exported:
        found += capabilities(target, version, assume).violations(plan)
    if exported:
        known = registry.settings("exporters", target)
        given = {"version": version, "assume": assume}
        made = registry.make("exporters", target, **{key: text for key, text in given.items() if key in known and text})
        named = {line.partition(": ")[0] for line in found}
        found += [line for line in made.refuses(plan) if line.partition(": ")[0] not in named]
    return found


@app.command()
def diff(
    first: Annotated[Path, typer.Argument(help="Plan file.")],
    second: Annotated[Path, typer.Argument(help="Another for the same model.")],
    as_json: Json = False,
) -> None:
    """List the layers on which two plans for one model differ, and what both take and are predicted to lose.

    mpsearch plan diff ours.json theirs.json
    """
    from mpsearch.plan import BitPlan

    ours, theirs = BitPlan.load(first), BitPlan.load(second)
    layers = {layer.name: layer for layer in ours.layers}
    rows = [(name, str(f), str(g), f.bytes(layers[name]), g.bytes(layers[name])) for name, f, g in ours.compare(theirs)]
    if as_json:
        keys = ("layer", "first", "second", "first_bytes", "second_bytes")
        body = {
            "layers": [dict(zip(keys, row, strict=True)) for row in rows],
            "first": _summary(ours),
            "second": _summary(theirs),
        }
        sys.stdout.write(json.dumps(body, indent=1) + "\n")
        return
    _print(rows, len(layers), (str(first), ours), (str(second), theirs))


def _summary(plan: BitPlan) -> dict[str, Any]:
    told = plan.predicted
    return {"bytes": plan.bytes, "loss": told.loss, "spread": told.spread, "unit": told.unit, "plan": plan.key}


def _print(
    rows: list[tuple[str, str, str, int, int]], count: int, first: tuple[str, BitPlan], second: tuple[str, BitPlan]
) -> None:
    from rich.table import Table
    from rich.text import Text

    from mpsearch.cli.show import console, safe

    if rows:
        table = Table("layer", "first", "second", "bytes", box=None, pad_edge=False)
        table.columns[3].justify = "right"
        for name, mine, theirs, mine_bytes, theirs_bytes in rows:
            table.add_row(Text(safe(name)), mine, theirs, f"{theirs_bytes - mine_bytes:+,}")
        console().print(table)
    sys.stdout.write(f"{len(rows)} of {count} layers differ\n")
    for which, (name, plan) in (("first", first), ("second", second)):
        told = plan.predicted
        spread = at_most(told.spread)
        loss = "no loss predicted" if told.loss is None else f"predicted {told.loss:.5g} {told.unit}{spread}"
        sys.stdout.write(f"{which:<7} {plan.bytes:,} bytes ({8 * plan.bytes / plan.layers.weights:.4f} bits), {loss}  ")
        sys.stdout.write(f"{safe(name)}\n")
