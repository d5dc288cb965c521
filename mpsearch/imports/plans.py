"""Making a plan of ours from a file of another tool."""

from __future__ import annotations

import hashlib
import importlib
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import TYPE_CHECKING, Any, NamedTuple

from mpsearch.errors import InputError, did_you_mean
from mpsearch.format import Format
from mpsearch.imports.foreign import Foreign, Options
from mpsearch.imports.reading import TEXT_LIMIT, find_file
from mpsearch.layer import Layer, Layers
from mpsearch.plan import BitPlan, Predicted

if TYPE_CHECKING:
    from mpsearch.model.model import Model


class Form(NamedTuple):
    """A form of plans: the module that reads it, names of its file in a folder, and what it is."""

    module: str
    files: tuple[str, ...]
    title: str


#: Name of a form -> the form.
FORMS: Mapping[str, Form] = {
    "autoround": Form(
        "autoround", ("quantization_config.json", "layer_config.json", "config.json"), "configuration of AutoRound"
    ),
    "gptqmodel": Form("gptqmodel", ("quantize_config.json", "config.json"), "configuration of GPTQModel"),
    "compressed-tensors": Form("compressed_tensors", ("config.json",), "configuration of compressed-tensors"),
    "modelopt": Form("modelopt", ("hf_quant_config.json", "config.json"), "configuration of NVIDIA ModelOpt"),
    "mlx": Form("mlx", ("quantization.json", "config.json"), "configuration of mlx-lm"),
    "llama.cpp": Form("llama_cpp", ("tensor-types.txt",), "file of tensor types for llama-quantize"),
    "gguf": Form("gguf_file", (), "GGUF file"),
    "exllamav3": Form("exllamav3", ("recipe.yaml", "recipe.yml"), "recipe of exllamav3; bits alone"),
    "exllamav2": Form("exllamav2", ("job_new.json",), "job of a conversion of exllamav2; bits alone"),
    "mpsearch": Form("own", ("plan.json",), "plan file for another model"),
}
_TIES = 3


@dataclass(frozen=True)
class Imported:
    """A plan that was read, and what a user should know of it."""

    plan: BitPlan
    notes: Sequence[str]


def import_plan(path: Path, form: str, model: Model | str | Path, options: Options | None = None) -> Imported:
    """Read a plan of another tool for a model.

    Args:
        path: its file, or a folder that holds it under its usual name.
        form: whose it is; a key of `FORMS`.
        model: the original model or its folder, whose layers get the formats.
        options: what the user says beside the file.

    Returns:
        The plan with the model's digest, so that it can be compared, measured and exported like any other. Ties of
        layers that have several formats in the file are undone.

    Raises:
        InputError: no such form (E107), not such a file (E101, E307), layers without a counterpart here, all of them
            named (E307), or as `load_model`.
    """
    from mpsearch.model.find import find_layers
    from mpsearch.model.model import as_model

    read = reader(form)
    path = find_file(path, FORMS[form].files)
    loaded = as_model(model)
    chosen = replace(options or Options(), architecture=loaded.architecture)
    layers = find_layers(loaded, caches=form == "mpsearch" and _has_caches(path) and "caches" not in chosen.without)
    foreign = read(path, layers, chosen)
    entry = {"name": loaded.name, "digest": loaded.digest, "architecture": loaded.architecture}
    return assemble(foreign, layers, entry, _source(path, form, chosen))


def reader(form: str) -> Callable[[Path, Layers, Options], Foreign]:
    """Return what reads a form.

    Raises:
        InputError: no such form (E107).

    >>> reader("mlx").__module__
    'mpsearch.imports.mlx'
    """
    if form not in FORMS:
        raise InputError(
            "E107", f"no form of plans '{form}'{did_you_mean(form, FORMS)}", advice=f"there is {', '.join(FORMS)}"
        )
    found: Callable[[Path, Layers, Options], Foreign] = importlib.import_module(
        f"mpsearch.imports.{FORMS[form].module}"
    ).read
    return found


def assemble(foreign: Foreign, layers: Layers, model: Mapping[str, str], source: Mapping[str, Any]) -> Imported:
    """Make the plan of what a file says.

    Raises:
        InputError: layers without a counterpart here, all of them named (E307).
    """
    if foreign.problems:
        count = len(foreign.problems)
        raise InputError(
            "E307",
            f"{source['from']} says of {count} layer{'s' if count > 1 else ''} what has no counterpart here",
            because=("\n" + " " * 11).join(foreign.problems),
        )
    loose, undone = _untied(layers, foreign.formats)
    notes = list(foreign.notes)
    if undone:
        more = ", …" if len(undone) > _TIES else ""
        notes.append(f"{len(undone)} ties are undone, for their layers differ: {', '.join(undone[:_TIES])}{more}")
    formats = {name: Format.parse(text) for name, text in foreign.formats.items()}
    plan = BitPlan(loose, formats, model, source={"imported": {**source, **foreign.says}})
    priced = replace(plan, predicted=Predicted(cost={"weights": float(plan.bytes)}))
    return Imported(priced, notes)


def _untied(layers: Layers, formats: Mapping[str, str]) -> tuple[Layers, list[str]]:
    """Layers without the ties that their formats break, and the names of these ties."""
    undone = [row.name for row in layers.decisions if len({formats[layer.name] for layer in row.layers}) > 1]
    items: tuple[Layer, ...] = tuple(replace(layer, tie="" if layer.tie in undone else layer.tie) for layer in layers)
    return Layers(items, layers.excluded, layers.unit), undone


def _source(path: Path, form: str, options: Options) -> dict[str, Any]:
    """What a plan says of where it is from; files of weights are too large for a digest."""
    digest = {}
    if path.stat().st_size <= TEXT_LIMIT:
        with path.open("rb") as stream:
            digest["sha256"] = hashlib.file_digest(stream, "sha256").hexdigest()
    return {"from": form, "file": path.name, **digest, **options.given()}


def _has_caches(path: Path) -> bool:
    return any(layer.kind == "kv_cache" for layer in BitPlan.load(path).layers)
