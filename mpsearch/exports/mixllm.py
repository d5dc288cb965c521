"""MixLLM: bits of each output channel of each linear layer, as its searcher hands them to its quantiser."""

from __future__ import annotations

import re
from collections.abc import Mapping, Sequence
from typing import Any, ClassVar

from mpsearch.exports.config_export import json_text, weights_of
from mpsearch.exports.script_exporter import ScriptExporter
from mpsearch.layer import Layer
from mpsearch.plan import BitPlan

#: File of settings: layer -> bits -> group, zero points and output channels.
SETTINGS = "linear_config_map.json"
_DECODER = re.compile(r"(^|\.)layers\.\d+\.")
#: Its code leaves linear layers alone that have no more rows or columns than this.
_SMALL = 64
_GROUP = 128
_INPUTS = {"bit_width": 8, "group_size": _GROUP, "asymmetric": False}

_SCRIPT = '''\
def config():
    """The plan as MixLLM's own configuration."""
    from mixllm.quantization.quantizer import MixLLMConfig, QuantConfig

    plan = read("linear_config_map.json")
    chosen = {name: {int(bits): how for bits, how in widths.items()} for name, widths in plan["layers"].items()}
    weights = {bits: {key: value for key, value in how.items() if key != "indices"}
               for widths in chosen.values() for bits, how in widths.items()}
    # The shares serve its own search, which the plan takes the place of; they must only add up.
    shares = {bits: 100 // len(weights) for bits in weights}
    made = MixLLMConfig(shares, weights, plan["inputs"])
    made.linear_config_map = {name: QuantConfig(widths) for name, widths in chosen.items()}
    return made


def main():
    """Check the configuration against the model's shapes, and write the file that MixLLMConfig.load reads."""
    args = arguments()
    made = config()
    for tensor in read("plan.json")["tensors"]:
        name = tensor.get("of") or tensor["layer"]
        if name in made.linear_config_map:
            made.linear_config_map[name].verify(tensor.get("of_shape") or tensor["shape"])
    made.save(args.out)
'''


class MixLlm(ScriptExporter):
    """Writes ``linear_config_map.json`` and ``run.py``, which makes MixLLM's configuration of it.

    >>> from mpsearch.format import Format
    >>> from mpsearch.layer import Layers
    >>> layers = Layers((Layer("lm_head", "linear", (128, 128)),))
    >>> MixLlm().refuses(BitPlan(layers, {"lm_head": Format.parse("int4-g128-asym")}))
    ['lm_head: int4-g128-asym is not held by MixLLM, which leaves this layer alone']
    """

    target: ClassVar[str] = "mixllm"
    script: ClassVar[str] = _SCRIPT

    def refuses(self, plan: BitPlan) -> Sequence[str]:
        """Name every layer that cannot be held, and those that would be quantised, or left alone, against the plan."""
        found = list(super().refuses(plan))
        for layer in weights_of(plan):
            fmt, whole = plan.formats[layer.name], layer.whole
            taken = whole.kind == "linear" and bool(_DECODER.search(whole.name)) and min(whole.shape) > _SMALL
            if layer.inputs is not None:
                found.append(f"{layer.name}: {self.able.title} gives bits to output channels, not to their columns")
            elif self.able.refuses(layer, fmt):
                continue
            elif fmt.weight.family == "plain" and taken:
                found.append(f"{layer.name}: {fmt} is not held by {self.able.title}, which quantises it")
            elif fmt.weight.family != "plain" and not taken:
                found.append(f"{layer.name}: {fmt} is not held by {self.able.title}, which leaves this layer alone")
        kinds = {bool(plan.formats[x.name].activation) for x in weights_of(plan) if not _plain(plan, x)}
        if len(kinds) > 1:
            found += [
                f"{layer.name}: leaves inputs alone, and {self.able.title} rounds all inputs or none"
                for layer in weights_of(plan)
                if not _plain(plan, layer) and not plan.formats[layer.name].activation
            ]
        return found

    def data(self, plan: BitPlan) -> Mapping[str, str]:
        """Return the channels of each number of bits, 8 first as its code lists them."""
        found: dict[str, dict[int, list[int]]] = {}
        for layer in weights_of(plan):
            weight: Any = plan.formats[layer.name].weight
            if weight.family != "plain":
                first, end = layer.channels or (0, layer.rows)
                found.setdefault(layer.owner, {}).setdefault(weight.bits, []).extend(range(first, end))
        inputs = any(fmt.activation for fmt in plan.formats.values())
        layers = {
            name: {str(bits): _settings(bits, sorted(widths[bits])) for bits in sorted(widths, reverse=True)}
            for name, widths in found.items()
        }
        return {SETTINGS: json_text({"inputs": _INPUTS if inputs else None, "layers": layers})}


def _plain(plan: BitPlan, layer: Layer) -> bool:
    return plan.formats[layer.name].weight.family == "plain"


def _settings(bits: int, channels: Sequence[int]) -> dict[str, Any]:
    return {"group_size": _GROUP, "asymmetric": bits == 4, "gptq": True, "clip_shrink": False, "indices": channels}
