"""compressed-tensors: a Hugging Face folder that transformers, vLLM and SGLang read as a quantised checkpoint."""

from __future__ import annotations

import json
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import Any, ClassVar

import torch

from mpsearch.capabilities import cannot_hold, capabilities
from mpsearch.errors import InputError
from mpsearch.exports import ct_config
from mpsearch.exports.ct_tensors import Spec, specs, tensors
from mpsearch.exports.folder import write_folder
from mpsearch.exports.original import Original
from mpsearch.exports.shards import INDEX, LIMIT, Item, index, shards, write_shard
from mpsearch.files import write_file
from mpsearch.format import Format
from mpsearch.formats.activation import Activation
from mpsearch.layer import Excluded, Layer
from mpsearch.model.codec import Evidence
from mpsearch.model.evidence import Calibration
from mpsearch.plan import BitPlan


@dataclass(frozen=True)
class CompressedTensors:
    """Writes the quantised model as a Hugging Face folder in the layout of compressed-tensors 0.20.

    ``config.json`` with a ``quantization_config`` that names every module, ``model.safetensors`` (or several files of
    at most 5 GB and their index), and copies of the tokenizer's files and ``generation_config.json``. The files hold
    the codes, scales and zero points of the plan's own rounding; `mpsearch.exports.ct_tensors` says what of a scale a
    loader may change. The bytes of all tensors of a layer are those of ``bytes@compressed-tensors``.

    What is in a plain number type stays a plain tensor, in the type that the plan says, and is named in ``ignore``. A
    weight that an embedding and a head share is stored for each of them once it is quantised, and the configuration
    no longer ties them. A model that was made in Python has no tokenizer to copy.

    Inputs are rounded by whoever runs the model; their scheme is written. transformers rounds fp8 as we do, integers to
    one code more below zero, and MX inputs with other scales, so that losses there are not those that were measured.

    Refused are formats, layers, parts and KV caches that the layout cannot hold, and different formats for q, k and v
    or for gate and up, which engines load as one matrix.

    Memory, beside a model that was given: the largest tensor twice and 500 MB; four times for formats with a scale of
    the whole tensor (``-tensor``, fp8 without a granularity, nvfp4) and ``-gptq``, which are rounded in one piece.

    Attributes:
        source: folder of the model, read tensor by tensor, for when no model is given to `write`.
        force: replace an earlier export in the same folder.
        version: version of the target; the tested one when empty.
        assume: version whose facts count for a version that no table speaks of.

    >>> from mpsearch.layer import Layers
    >>> layers = Layers((Layer("fc", "linear", (8, 64)),))
    >>> print(*CompressedTensors().refuses(BitPlan(layers, {"fc": Format.parse("nf4-b64")})))
    fc: compressed-tensors holds integers, fp8-e4m3, mxfp4, mxfp6-e2m3, mxfp8-e4m3 and nvfp4, not nf4-b64
    """

    reads: ClassVar[str] = "folder"

    source: str = ""
    force: bool = False
    version: str = ""
    assume: str = ""

    def refuses(self, plan: BitPlan) -> Sequence[str]:
        """Name every layer that a checkpoint cannot hold as planned, and layers that engines cannot fuse."""
        capabilities("compressed-tensors", self.version, self.assume)
        found = list(ct_config.violations(plan))
        if found:
            return found
        taken = {"__metadata__": "the file's own header"}
        for owner, spec in _owned_specs(plan):
            if spec.name in taken:
                found.append(f"{owner}: the file needs a tensor '{spec.name}', which is taken by {taken[spec.name]}")
            taken[spec.name] = owner
        return found

    def notes(self, plan: BitPlan) -> Sequence[str]:
        """Say what transformers 5.23 does not load of the folder by itself, and where it computes in another way."""
        return ct_config.notes(plan)

    def bound(self, plan: BitPlan) -> float | None:
        """How far logits may be from our simulation's; None where transformers rounds inputs by rules of its own."""
        return None if any(fmt.activation for fmt in plan.formats.values()) else 1e-4

    def write(self, plan: BitPlan, folder: Path, model: Any = None) -> Sequence[Path]:
        """Write the checkpoint.

        Args:
            plan: the plan.
            folder: a new or empty folder.
            model: anything whose ``module`` is a Hugging Face model with the original weights; they are left as they
                are. For formats that are made from calibration data, a calibrated `mpsearch.model.model.Model`.

        Returns:
            The files that were written.

        Raises:
            InputError: layers that cannot be held (E301), the model is not the plan's (E302), the folder holds files
                (E303), there is no model (E101), or weights that cannot be stored (E410, E411, E412, E421, E422).
        """
        violations = self.refuses(plan)
        if violations:
            raise cannot_hold("compressed-tensors", violations)
        original = Original.of(plan, model, self.source)
        original.check(plan)
        _check_data(plan, model)
        config = json.dumps(_config(plan, original), indent=2) + "\n"
        parts = shards(_items(plan, original, model), LIMIT)
        metadata = {"format": "pt", "plan": plan.key}
        writers: dict[str, Callable[[Path], object]] = {"config.json": partial(write_file, content=config)}
        for name, path in original.beside().items():
            writers[name] = partial(_copy, source=path)
        for name, items in parts.items():
            content = partial(write_shard, items=items, metadata=metadata)
            writers[name] = partial(write_file, content=content)
        if len(parts) > 1:
            writers[INDEX] = partial(write_file, content=index(parts))
        return write_folder(folder, "compressed-tensors", writers, self.force)


def _check_data(plan: BitPlan, model: Any) -> None:
    """Refuse formats that are made from calibration data where there is none."""
    name = next((name for name, fmt in plan.formats.items() if fmt.calibrated), None)
    if name is not None and not getattr(model, "calibration", ()):
        raise InputError(
            "E422",
            f"layer '{name}': {plan.formats[name]} is made from calibration data, and there is none",
            advice="give a calibrated model",
        )


def _owned_specs(plan: BitPlan) -> list[tuple[str, Spec]]:
    """Pairs of a layer or kept tensor and a tensor of the files, in their order."""
    weights = [layer for layer in plan.layers if layer.kind != "kv_cache"]
    found = [(layer.name, spec) for layer in weights for spec in specs(layer, plan.formats[layer.name])]
    kept = plan.layers.excluded
    return found + [(each.name, Spec(each.name, getattr(torch, each.dtype), each.shape)) for each in kept]


def _items(plan: BitPlan, original: Original, model: Any) -> list[Item]:
    items = [
        Item(specs(layer, fmt), partial(_make, layer, fmt, original, model))
        for layer in plan.layers
        if (fmt := plan.formats[layer.name]) and layer.kind != "kv_cache"
    ]
    for kept in plan.layers.excluded:
        spec = Spec(kept.name, getattr(torch, kept.dtype), kept.shape)
        items.append(Item([spec], partial(_keep, kept, original)))
    return items


def _keep(kept: Excluded, original: Original) -> dict[str, torch.Tensor]:
    return {kept.name: original.kept(kept)}


def _make(layer: Layer, fmt: Format, original: Original, model: Any) -> dict[str, torch.Tensor]:
    """Round one layer."""
    calibration = Calibration.of(model) if fmt.calibrated else None
    evidence = calibration.evidence(layer, fmt.weight) if calibration else Evidence()
    seen = None
    if calibration and isinstance(fmt.activation, Activation) and fmt.activation.static:
        seen = calibration.input_range(layer, fmt.activation)
    return tensors(original.read(layer.tensor), layer, fmt, evidence, seen)


def _config(plan: BitPlan, original: Original) -> dict[str, Any]:
    config = original.config(plan)
    quantised = [
        layer for layer in plan.layers if layer.kind != "kv_cache" and ct_config.scheme(plan.formats[layer.name])
    ]
    changed = {name for layer in quantised for name in (layer.name, *layer.shared)}
    config.pop("quantization_config", None)
    if made := ct_config.quantization_config(plan, set(original.modules()) - changed):
        config["quantization_config"] = made
    if any(layer.shared for layer in quantised):
        for place in (config, config.get("text_config")):
            if isinstance(place, dict):
                place["tie_word_embeddings"] = False
    return config


def _copy(path: Path, source: Path) -> None:
    write_file(path, source.read_bytes())
