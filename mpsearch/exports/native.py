"""The plan as this project keeps it: ``plan.json``, and the weights packed to the byte in one safetensors file."""

from __future__ import annotations

import json
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass, replace
from functools import partial
from pathlib import Path
from typing import Any, ClassVar

import safetensors.torch
import torch
from safetensors import SafetensorError
from torch import Tensor, nn

from mpsearch.capabilities import cannot_hold
from mpsearch.errors import InputError
from mpsearch.exports.folder import check_folder, write_folder
from mpsearch.files import write_file
from mpsearch.format import Format
from mpsearch.formats.activation import Activation
from mpsearch.layer import Excluded, Layer
from mpsearch.model.activations import pack_range
from mpsearch.model.codec import Evidence
from mpsearch.model.cut import part_of, put
from mpsearch.model.evidence import Calibration
from mpsearch.model.packing import pack, unpack
from mpsearch.model.quantize import dequantize, quantize
from mpsearch.parts import wholes
from mpsearch.plan import BitPlan

PLAN = "plan.json"
WEIGHTS = "weights.safetensors"


@dataclass(frozen=True)
class Native:
    """Writes a plan and, given the model, its packed weights.

    ``weights.safetensors`` holds for a layer in a quantised format ``<tensor>.<part>`` for each part that
    ``format.itemised_bytes`` names (``payload``, ``scales``, …) as flat uint8 (see `mpsearch.model.packing`; scales of
    inputs in float32); for a layer in a plain number type ``<tensor>`` in that type; nothing for a KV cache; for every
    kept tensor its own name in its stored type. A weight that several modules share is held once. Parts of a layer are
    held one by one, with their range behind the tensor's name (``q_proj.weight[0:64].payload``). The bytes of all
    tensors add up to ``plan.bytes``. The metadata field ``plan`` names the plan by its digest.

    Memory: the packed model twice, beside the model itself.

    Attributes:
        force: replace an earlier export in the same folder.

    >>> Native()
    Native(force=False)
    """

    reads: ClassVar[str] = "model"

    force: bool = False

    def refuses(self, plan: BitPlan) -> Sequence[str]:
        """Name the layers that their format or the file cannot hold.

        That is those whose shape does not take their format, whose names would collide in the file, or of which some
        weights are in no part.
        """
        found = [
            f"{layer.name}: {problem}" for layer in plan.layers if (problem := plan.formats[layer.name].refuses(layer))
        ]
        for whole in wholes(layer for layer in plan.layers if layer.is_part):
            held = sum(layer.weights for layer in plan.layers if layer.is_part and layer.of == whole.name)
            if held < whole.weights:
                found.append(f"{whole.name}: its parts hold {held} of {whole.weights} weights, and nothing the others")
        taken = {"__metadata__": "the file's own header"}
        for owner, name in _file_names(plan):
            if name in taken:
                found.append(f"{owner}: the file needs a tensor '{name}', which is taken by {taken[name]}")
            taken[name] = owner
        return found

    def write(self, plan: BitPlan, folder: Path, model: Any = None) -> Sequence[Path]:
        """Write ``plan.json`` and, given a model, ``weights.safetensors``.

        Args:
            plan: the plan.
            folder: a new or empty folder.
            model: anything whose ``module`` is a torch module with the original weights; they are left as
                they are. For formats that are made from calibration data, a calibrated `mpsearch.model.model.Model`.

        Returns:
            The files that were written.

        Raises:
            InputError: layers that do not fit (E301), the model is not the plan's (E302), the folder holds files
                (E303), weights that cannot be stored (E410, E411, E412, E421).
        """
        violations = self.refuses(plan)
        if violations:
            raise cannot_hold("native", violations)
        writers: dict[str, Callable[[Path], object]] = {PLAN: plan.save}
        if model is not None:
            content = safetensors.torch.save(_packed(plan, model), metadata={"plan": plan.key})
            writers[WEIGHTS] = partial(write_file, content=content)
        return write_folder(folder, "native", writers, self.force)

    def read(self, folder: Path) -> tuple[BitPlan, dict[str, Tensor]]:
        """Read an export back.

        Returns:
            The plan, and tensor name -> weight: float32 for decided layers, equal to `fake_quantize` of the
            float32 weight bit for bit; the stored type for kept tensors. A shared weight comes under each of its
            names as one tensor, parts of a layer come as one tensor under its name. Empty when the export holds no
            weights.

        Raises:
            InputError: a file is missing (E101), cut or edited (E304, E404), or the weights are of another
                plan (E302).
        """
        check_folder(folder)
        plan = BitPlan.load(folder / PLAN)
        path = folder / WEIGHTS
        if not path.exists():
            return plan, {}
        payload_bytes(path)
        try:
            with safetensors.safe_open(path, framework="pt") as file:
                if (file.metadata() or {}).get("plan") != plan.key:
                    raise InputError("E302", f"'{path}' holds the weights of another plan than '{folder / PLAN}'")
            stored = safetensors.torch.load_file(path)
        except SafetensorError as error:
            raise InputError("E404", f"'{path}': broken ({error})", advice="export the plan again") from error
        return plan, _unpacked(plan, stored, path)


def payload_bytes(path: Path) -> int:
    """Add up the bytes of all tensors in a safetensors file, from its header alone.

    Raises:
        InputError: the file is cut, or its header is broken (E404).
    """
    size = path.stat().st_size
    with path.open("rb") as stream:
        start = stream.read(8)
        length = int.from_bytes(start, "little")
        if len(start) < 8 or length > size - 8:
            raise InputError("E404", f"'{path}' is cut: {size} bytes are there, its header alone promises {length + 8}")
        header = stream.read(length)
    try:
        spans = [entry["data_offsets"] for name, entry in json.loads(header).items() if name != "__metadata__"]
        end = max((stop for _, stop in spans), default=0)
        total = sum(stop - start for start, stop in spans)
    except (ValueError, KeyError, TypeError, AttributeError, RecursionError) as error:
        raise InputError("E404", f"'{path}': the header is not one of safetensors") from error
    if size != 8 + length + end:
        raise InputError("E404", f"'{path}' is cut: {size} bytes are there, {8 + length + end} are promised")
    return int(total)


def _file_names(plan: BitPlan) -> Iterator[tuple[str, str]]:
    """Yield (layer or kept tensor, name of a tensor in the file)."""
    for layer in plan.layers:
        for name in _names(layer, plan.formats[layer.name]).values():
            yield layer.name, name
    for kept in plan.layers.excluded:
        yield kept.name, kept.name


def _names(layer: Layer, fmt: Format) -> dict[str, str]:
    """Part -> its name in the file, for the parts that hold bytes."""
    if fmt.weight.family == "plain" and len(fmt.itemised_bytes(layer)) == 1:
        return {"payload": layer.tensor}
    return {part: f"{layer.tensor}.{part}" for part, size in fmt.itemised_bytes(layer).items() if size}


def _packed(plan: BitPlan, model: Any) -> dict[str, Tensor]:
    tensors: dict[str, Tensor] = {}
    for layer in plan.layers:
        fmt = plan.formats[layer.name]
        if layer.kind == "kv_cache":
            continue
        weight = part_of(_find(model.module, layer.whole.tensor, layer.whole.shape), layer)
        calibration = Calibration.of(model) if fmt.calibrated else None
        evidence = calibration.evidence(layer, fmt.weight) if calibration else Evidence()
        quantized = quantize(weight, fmt, layer.row_axes, name=layer.name, evidence=evidence)
        names = _names(layer, fmt)
        if names.get("payload") == layer.tensor:
            numbers = replace(quantized, dtype=quantized.parts["payload"].dtype)
            tensors[layer.tensor] = dequantize(numbers).cpu()
            continue
        parts = pack(quantized, fmt)
        if calibration and isinstance(fmt.activation, Activation) and fmt.activation.static:
            parts |= pack_range(calibration.input_range(layer, fmt.activation), fmt.activation)
        for part, name in names.items():
            tensors[name] = torch.from_numpy(parts[part])
    for kept in plan.layers.excluded:
        tensors[kept.name] = _kept(_find(model.module, kept.name, kept.shape), kept)
    return tensors


def _unpacked(plan: BitPlan, stored: Mapping[str, Tensor], path: Path) -> dict[str, Tensor]:
    weights: dict[str, Tensor] = {}
    parts_of: dict[Layer, dict[Layer, Tensor]] = {}
    try:
        for layer in plan.layers:
            fmt = plan.formats[layer.name]
            if layer.kind == "kv_cache":
                continue
            if _names(layer, fmt).get("payload") == layer.tensor:
                weight = stored[layer.tensor].to(torch.float32)
            else:
                parts = {part: stored[name].numpy() for part, name in _names(layer, fmt).items()}
                # Not in the stored type: rounding to bfloat16 again would not be what was measured.
                weight = dequantize(replace(unpack(parts, fmt, layer), dtype=torch.float32))
            weights |= _input_parts(layer, fmt, stored)
            if layer.is_part:
                parts_of.setdefault(layer.whole, {})[layer] = weight
                continue
            weights |= dict.fromkeys((layer.tensor, *(f"{module}.weight" for module in layer.shared)), weight)
        for layer, together in parts_of.items():
            weight = put(together, torch.zeros(layer.shape))
            weights |= dict.fromkeys((layer.tensor, *(f"{module}.weight" for module in layer.shared)), weight)
        for kept in plan.layers.excluded:
            weights[kept.name] = stored[kept.name]
    except KeyError as error:
        raise InputError("E304", f"'{path}': tensor {error} is missing", advice="export the plan again") from error
    return weights


def _input_parts(layer: Layer, fmt: Format, stored: Mapping[str, Tensor]) -> dict[str, Tensor]:
    """Scales and zero points of a static input, under their names in the file."""
    names = {part: name for part, name in _names(layer, fmt).items() if part.startswith("input_")}
    return {name: stored[name].view(torch.float32) if part == "input_scales" else stored[name]
            for part, name in names.items()}  # fmt: skip


def _find(module: nn.Module, name: str, shape: tuple[int, ...]) -> Tensor:
    try:
        tensor: Tensor = module.get_parameter(name)
    except AttributeError:
        try:
            tensor = module.get_buffer(name)
        except AttributeError as error:
            raise InputError("E302", f"the plan has a tensor '{name}', the model has none: another model") from error
    if tuple(tensor.shape) != shape:
        raise InputError("E302", f"'{name}' has shape {tuple(tensor.shape)}, in the plan {shape}: another model")
    return tensor.detach()


def _kept(tensor: Tensor, kept: Excluded) -> Tensor:
    """Return a tensor in its stored type, refusing one that this would change."""
    stored = tensor.to(getattr(torch, kept.dtype), copy=True).contiguous()
    if not bool(((stored.to(tensor.dtype) == tensor) | tensor.isnan()).all()):
        raise InputError(
            "E302",
            f"'{kept.name}' holds numbers that {kept.dtype} cannot: the model was changed since it was loaded",
            advice="load the model again",
        )
    return stored.cpu()
