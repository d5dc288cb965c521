"""torchao: a configuration for every module, and the script that quantises a model with it through transformers."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any, ClassVar

from mpsearch.exports.config_export import ConfigExporter, json_text, modules, natural, weights_of
from mpsearch.exports.transformers_script import SCRIPT, script
from mpsearch.format import Format
from mpsearch.fused import FUSED
from mpsearch.plan import BitPlan

CONFIG = "torchao.json"
MODULES = "modules.json"

# Our grids have other ends than theirs; this one has our scale wherever the largest weight is positive.
_MAPPINGS = {"": "SYMMETRIC_NO_CLIPPING_ERR", "full": "SYMMETRIC", "asym": "ASYMMETRIC"}

_BODY = '''
def untie(source, out):
    """Save the model with a head of its own: transformers does not load a quantised weight that two modules share."""
    import torch

    model = load(source, "")
    head = model.get_output_embeddings()
    head.weight = torch.nn.Parameter(head.weight.detach().clone())
    for config in (model.config, model.config.get_text_config()):
        config.tie_word_embeddings = False
    model.save_pretrained(out)


def quantise(source, out, device):
    """Quantise every module by its exact name."""
    from torchao.core.config import config_from_dict
    from torchao.utils import TorchAOBaseTensor

    plan = config_from_dict(settings("torchao.json"))
    names = settings("modules.json")["modules"]
    chosen = transformers.TorchAoConfig(plan, include_input_output_embeddings=True)
    with tempfile.TemporaryDirectory() as scratch:
        if settings("modules.json")["untie"]:
            untie(source, scratch)
            source = scratch
        model = load(source, device, quantization_config=chosen)
    found = {name: module.weight for name, module in model.named_modules() if name in names}
    stop_if(set(names) - set(found), "the model has no such module")
    quantised = {name for name, weight in found.items() if isinstance(weight.data, TorchAOBaseTensor)}
    wanted = {name for name in names if plan.fqn_to_config[name] is not None}
    stop_if(wanted - quantised, "was not quantised")
    stop_if(quantised - wanted, "was quantised, which is not planned")
    model.save_pretrained(out)
'''


@dataclass(frozen=True)
class TorchAo(ConfigExporter):
    """Writes ``torchao.json``, a `FqnToConfig` of exact names, and ``run.py``, which quantises a model with it.

    ``python run.py MODEL OUT`` loads the model with transformers, has torchao quantise every module of the plan, looks
    that each was and no other, and saves it. What stays as it is has the entry null; biases too, because transformers
    would hand a bias to the configuration of its module. A weight that embedding and head share is quantised for each
    of them, and the saved model no longer ties them. Where q, k and v, or gate and up, have one format, the names of
    the fused layers stand beside them for vLLM.

    Source: torchao 0.18, ``quantization/quant_api.py`` and ``core/config.py``.

    >>> from mpsearch.layer import Layer, Layers
    >>> layers = Layers((Layer("fc", "linear", (8, 64)),))
    >>> print(*TorchAo().refuses(BitPlan(layers, {"fc": Format.parse("nf4-b64")})))
    fc: nf4-b64 is not held by torchao; allowed int{2,3,4,5,6,7,8}-{channel,g*}{,-asym,-full}, ...
    """

    target: ClassVar[str] = "torchao"

    def refuses(self, plan: BitPlan) -> Sequence[str]:
        """Name every layer that torchao cannot hold, and names that it would read as something else."""
        found = list(super().refuses(plan))
        for layer in weights_of(plan):
            found += [f"{layer.name}: {why}" for name in modules(layer) if (why := _misread(name))]
        return found

    def notes(self, plan: BitPlan) -> Sequence[str]:
        """Say what bites, and which layers vLLM would not find."""
        split = [parent for parent, _, formats in _fused(plan) if len(formats) > 1]
        more = [f"vLLM loads these as one and would not find them: {', '.join(split[:3])}, …"] if split else []
        if any(fmt.activation and str(fmt.activation).startswith("fp8") for fmt in plan.formats.values()):
            more.append("fp8 inputs need a GPU with kernels for them; the CPU refuses")
        return [*super().notes(plan), *more]

    def texts(self, plan: BitPlan) -> Mapping[str, str]:
        """Return the configuration, the names of the plan's modules, and the script."""
        named = {name: plan.formats[layer.name] for layer in weights_of(plan) for name in modules(layer)}
        entries: dict[str, Any] = {name: config(fmt) for name, fmt in named.items()}
        for kept in plan.layers.excluded:
            if kept.name.endswith(".bias") and kept.name.removesuffix(".bias") in named:
                entries[kept.name] = None
        taken = {*entries, *(kept.name.rpartition(".")[0] for kept in plan.layers.excluded)}
        for _, name, formats in _fused(plan):
            if len(formats) == 1 and name not in taken:
                entries[name] = config(formats[0])
        body = {key: entries[key] for key in sorted(entries, key=natural)}
        whole = {"_type": "FqnToConfig", "_version": 1, "_data": {"fqn_to_config": body}}
        untie = any(layer.shared and config(plan.formats[layer.name]) for layer in weights_of(plan))
        title = "Quantise a model with torchao as torchao.json says."
        return {
            CONFIG: json_text(whole),
            MODULES: json_text({"modules": sorted(named, key=natural), "untie": untie}),
            SCRIPT: script(title, _BODY, self.source),
        }


def config(fmt: Format) -> dict[str, Any] | None:
    """Return torchao's configuration of a format that it holds, as its own JSON; None to leave a module alone.

    >>> config(Format.parse("int4-g64"))["_data"]["granularity"]
    {'_type': 'PerGroup', '_version': 1, '_data': {'group_size': 64}}
    >>> config(Format.parse("bf16")) is None
    True
    """
    weight: Any = fmt.weight
    if weight.family == "plain":
        return None
    inputs = str(fmt.activation or "")
    if weight.family == "fp":
        element = {"e4m3": "float8_e4m3fn", "e5m2": "float8_e5m2"}[weight.element]
        grain = _grain(weight, "PerRow", {"dim": -1})
        if inputs:
            types = {"activation_dtype": _dtype(element), "weight_dtype": _dtype(element)}
            return _config("Float8DynamicActivationFloat8WeightConfig", {**types, "granularity": [grain, grain]})
        return _config("Float8WeightOnlyConfig", {"weight_dtype": _dtype(element), "granularity": grain})
    if weight.granularity == "tensor" or inputs == "int8-token":
        grain = _grain(weight, "PerRow", {"dim": -1})
        name = "Int8DynamicActivationInt8WeightConfig" if inputs else "Int8WeightOnlyConfig"
        return _config(name, {"granularity": grain})
    given = {
        "dtype": _dtype(f"int{weight.bits}"),
        "granularity": _grain(weight, "PerAxis", {"axis": 0}),
        "mapping_type": {"_type": "MappingType", "_data": _MAPPINGS[weight.grid]},
    }
    if inputs:
        return _config("Int8DynamicActivationIntxWeightConfig", {f"weight_{key}": x for key, x in given.items()})
    return _config("IntxWeightOnlyConfig", {"weight_dtype": given.pop("dtype"), **given})


def _config(name: str, data: Mapping[str, Any]) -> dict[str, Any]:
    return {"_type": name, "_version": 2, "_data": dict(data)}


def _dtype(name: str) -> dict[str, str]:
    return {"_type": "torch.dtype", "_data": name}


def _grain(weight: Any, channel: str, data: Mapping[str, int]) -> dict[str, Any]:
    """What shares a scale, as torchao names it."""
    name, size = {
        "tensor": ("PerTensor", {}),
        "channel": (channel, dict(data)),
        "group": ("PerGroup", {"group_size": weight.group}),
    }[weight.granularity]
    return {"_type": name, "_version": 1, "_data": size}


def _fused(plan: BitPlan) -> list[tuple[str, str, list[Format]]]:
    """Parents whose parts vLLM loads as one: parent, name of the fused module, the formats of its parts, each once."""
    linear = {layer.owner: layer.name for layer in weights_of(plan) if layer.kind == "linear"}
    found = []
    for name in linear:
        parent, dot, last = name.rpartition(".")
        for fused, parts in FUSED.items():
            members = [f"{parent}{dot}{part}" for part in parts]
            if last == parts[0] and all(member in linear for member in members):
                formats = list(dict.fromkeys(plan.formats[linear[member]] for member in members))
                alike = {str(config(fmt)): fmt for fmt in formats}
                found.append((parent, f"{parent}{dot}{fused}", list(alike.values())))
    return found


def _misread(name: str) -> str:
    """Say what torchao would take a module's name for; empty when it takes it as a name."""
    if name.startswith("re:"):
        return f"torchao reads '{name[:60]}' as a pattern, because it begins with re:"
    if name == "_default":
        return "torchao reads '_default' as the rule of all other modules"
    return "" if name else "torchao names modules inside a model, and the model itself has no name"
