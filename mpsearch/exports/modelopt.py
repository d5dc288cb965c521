"""NVIDIA Model Optimizer: a list of exactly named quantisers, and what its checkpoint must then say of itself."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any, ClassVar

from mpsearch.exports.config_export import json_text, modules, weights_of
from mpsearch.exports.script_exporter import ScriptExporter, shell_pattern, without_rule
from mpsearch.format import Format
from mpsearch.plan import BitPlan

#: File of settings: the list of quantisers.
SETTINGS = "quant_cfg.json"
#: What the checkpoint's file of the same name must hold.
EXPECTED = "hf_quant_config.json"

_FP8 = {"num_bits": [4, 3], "axis": None}
#: Format -> quantisers and the name of the algorithm in a checkpoint.
_KNOWN: Mapping[str, tuple[Mapping[str, Any], Mapping[str, Any]]] = {
    "int8-channel": ({"weight": {"num_bits": 8, "axis": 0}}, {"quant_algo": "W8A16"}),
    "int8-channel@int8-tensor-static": (
        {"weight": {"num_bits": 8, "axis": 0}, "input": {"num_bits": 8, "axis": None}},
        {"quant_algo": "W8A8_SQ_PER_CHANNEL"},
    ),
    "fp8-e4m3": ({"weight": _FP8}, {"quant_algo": "FP8"}),
    "fp8-e4m3@fp8-e4m3-tensor-static": ({"weight": _FP8, "input": _FP8}, {"quant_algo": "FP8"}),
    "nvfp4": (
        {"weight": {"num_bits": [2, 1], "block_sizes": {"-1": 16, "type": "dynamic", "scale_bits": [4, 3]}}},
        {"quant_algo": "W4A16_NVFP4", "group_size": 16},
    ),
}  # fmt: skip

_SCRIPT = '''\
def quantisers():
    """The list of quantisers, with numbers for keys and pairs where JSON has texts and lists."""

    def pairs(value):
        if isinstance(value, dict):
            return {int(key) if key.lstrip("-").isdigit() else key: pairs(item) for key, item in value.items()}
        return tuple(value) if isinstance(value, list) else value

    return [{key: pairs(value) for key, value in entry.items()} for entry in read("quant_cfg.json")]


def quantised(folder, tokens=None):
    """Load a model and quantise it in memory.

    Args:
        folder: the original model.
        tokens: (sequences, positions) of token numbers, which give the range of static inputs.
    """
    import re

    import modelopt.torch.quantization as mtq
    import torch
    from transformers import AutoModelForCausalLM

    entries = quantisers()
    model = AutoModelForCausalLM.from_pretrained(folder, dtype="auto")

    def run(given):
        with torch.no_grad():
            for sequence in tokens or ():
                given(torch.tensor([sequence], device=given.device))

    model = mtq.quantize(model, {"quant_cfg": entries, "algorithm": "max"}, run if tokens else None)
    every = ((name, part) for name, part in model.named_modules() if hasattr(part, "num_bits"))
    on = {name for name, part in every if part.is_enabled}
    wanted = {re.sub(r"\\[([*?[])\\]", r"\\1", entry["quantizer_name"]) for entry in entries[1:]}
    if on != wanted:
        sys.exit(f"not as planned: {sorted(on ^ wanted)[:20]}")
    return model


def tokens_of(path):
    """Read lists of token numbers for static inputs."""
    if path:
        return json.loads(Path(path).read_text(encoding="utf-8"))
    static = [e for e in read("quant_cfg.json")[1:] if "input" in e["quantizer_name"].rpartition(".")[2]]
    if static:
        sys.exit("inputs have fixed scales, which are found on data: give lists of token numbers, --tokens FILE")
    return None


def main():
    """Quantise, write a checkpoint, and see that it says of itself what was planned."""
    args = arguments()
    from modelopt.torch.export import export_hf_checkpoint

    export_hf_checkpoint(quantised(args.model, tokens_of(args.tokens)), export_dir=args.out)
    found = json.loads((Path(args.out) / "hf_quant_config.json").read_text(encoding="utf-8"))["quantization"]
    planned = read("hf_quant_config.json")["quantization"]
    layers = found.get("quantized_layers") or {name: None for name in planned["quantized_layers"]}
    plain = {name: {**how, "quant_algo": how["quant_algo"]} for name, how in layers.items() if how}
    wrong = sorted(
        name for name, how in planned["quantized_layers"].items()
        if name not in layers or (plain and any(plain[name].get(key) != value for key, value in how.items()))
    )
    more = sorted({*layers} - {*planned["quantized_layers"]})
    if found["quant_algo"] != planned["quant_algo"] or wrong or more:
        sys.exit(f"the checkpoint is not as planned: {found['quant_algo']}, {wrong[:20]}, {more[:20]}")
'''


class ModelOpt(ScriptExporter):
    """Writes ``quant_cfg.json`` and ``hf_quant_config.json``, and ``run.py``, which quantises and checks the result.

    >>> from mpsearch.layer import Layer, Layers
    >>> layers = Layers((Layer("fc", "linear", (8, 64)),))
    >>> ModelOpt().refuses(BitPlan(layers, {"fc": Format.parse("int4-g64-asym")}))
    ['fc: int4-g64-asym is not held by NVIDIA Model Optimizer; allowed int4-g*, int8-channel, fp8-e4m3, ...']
    """

    target: ClassVar[str] = "modelopt"
    script: ClassVar[str] = _SCRIPT
    options: ClassVar[tuple[str, ...]] = ("tokens",)

    def data(self, plan: BitPlan) -> Mapping[str, str]:
        """Return the quantisers, all off and then each by its name, and what a checkpoint of them says."""
        entries: list[Mapping[str, Any]] = [{"quantizer_name": "*", "enable": False}]
        layers: dict[str, Mapping[str, Any]] = {}
        for layer in weights_of(plan):
            fmt = plan.formats[layer.name]
            if fmt.weight.family == "plain":
                continue
            quantisers, algorithm = parameters(fmt)
            for name in modules(layer):
                layers[name] = algorithm
                entries += [
                    {"quantizer_name": f"{shell_pattern(name)}.{part}_quantizer", "cfg": cfg, "enable": True}
                    for part, cfg in quantisers.items()
                ]
        kinds = {tuple(how.items()): how["quant_algo"] for how in layers.values()}
        whole = "MIXED_PRECISION" if len(kinds) > 1 else next(iter(kinds.values()), None)
        body = {"quantization": {"quant_algo": whole, "quantized_layers": layers}}
        return {SETTINGS: json_text(entries), EXPECTED: json_text(body)}


def parameters(fmt: Format) -> tuple[Mapping[str, Any], Mapping[str, Any]]:
    """The quantisers of a format, and what a checkpoint says of a layer that has it.

    >>> parameters(Format.parse("int4-g64"))
    ({'weight': {'num_bits': 4, 'block_sizes': {'-1': 64}}}, {'quant_algo': 'W4A16_AWQ', 'group_size': 64})
    """
    weight: Any = fmt.weight
    known = _KNOWN.get(without_rule(fmt))
    if known:
        return known
    return (
        {"weight": {"num_bits": weight.bits, "block_sizes": {"-1": weight.group}}},
        {"quant_algo": "W4A16_AWQ", "group_size": weight.group},
    )
