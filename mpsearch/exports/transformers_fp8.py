"""transformers' fine-grained FP8: the modules to leave alone, and the script that quantises a model so."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import ClassVar

from mpsearch.exports.config_export import ConfigExporter, json_text, modules, weights_of
from mpsearch.exports.skip_lists import skip_list
from mpsearch.exports.transformers_script import SCRIPT, script
from mpsearch.plan import BitPlan

CONFIG = "transformers-fp8.json"

_BODY = '''
def quantise(source, out, device):
    """Quantise every linear layer that is not left alone."""
    import torch

    plan = settings("transformers-fp8.json")
    chosen = transformers.FineGrainedFP8Config(**plan["quantization_config"])
    where = device or ("cuda" if torch.cuda.is_available() else "cpu")
    model = load(source, where, quantization_config=chosen)
    scaled = ((name, getattr(module, "weight_scale_inv", None)) for name, module in model.named_modules())
    quantised = {name for name, scales in scaled if scales is not None}
    wanted = set(plan["quantised"])
    stop_if(wanted - quantised, "was not quantised")
    stop_if(quantised - wanted, "was quantised, which is not planned")
    model.save_pretrained(out)
'''


@dataclass(frozen=True)
class TransformersFp8(ConfigExporter):
    """Writes ``transformers-fp8.json``, settings of a `FineGrainedFP8Config`, and ``run.py``, which quantises so.

    A plan may have fp8-e4m3-b128x128, with or without inputs in fp8-e4m3-g128, beside layers in their stored type. The
    saved folder is what DeepSeek's checkpoints are: fp8 weights with ``weight_scale_inv``, which vLLM and SGLang read
    too.

    Source: transformers 5.23, ``integrations/finegrained_fp8.py``.

    >>> from mpsearch.format import Format
    >>> from mpsearch.layer import Layer, Layers
    >>> layers = Layers((Layer("fc", "linear", (100, 128)),))
    >>> print(*TransformersFp8().refuses(BitPlan(layers, {"fc": Format.parse("fp8-e4m3-b128x128")})))
    fc: fp8-e4m3-b128x128 is not held by transformers' FP8 here: 100 output channels are no multiple of 128; ...
    """

    target: ClassVar[str] = "transformers-fp8"

    def refuses(self, plan: BitPlan) -> Sequence[str]:
        """Name every layer that cannot be held, and layers that differ in whether their inputs are rounded."""
        found = list(super().refuses(plan))
        named = {line.partition(": ")[0] for line in found}
        layers = [x for x in weights_of(plan) if plan.formats[x.name].weight.family != "plain" and x.name not in named]
        rounded = [x.name for x in layers if plan.formats[x.name].activation]
        for layer in layers if 0 < len(rounded) < len(layers) else ():
            if layer.name not in rounded:
                found.append(
                    f"{layer.name}: transformers' FP8 rounds the inputs of all layers or of none, and here "
                    f"'{rounded[0]}' rounds them; allowed fp8-e4m3-b128x128@fp8-e4m3-g128"
                )
        for layer in weights_of(plan):
            if "" in modules(layer):
                found.append(f"{layer.name}: transformers names modules inside a model, and the model has no name")
        return found

    def texts(self, plan: BitPlan) -> Mapping[str, str]:
        """Return the settings and the script."""
        layers = weights_of(plan)
        quantised = sorted(n for x in layers if plan.formats[x.name].weight.family != "plain" for n in modules(x))
        left = {name for x in layers for name in modules(x)} - set(quantised)
        # Experts in one tensor are converted as the module that holds them.
        left |= {x.owner.rpartition(".")[0] for x in layers if x.kind == "expert"}
        kept = [x for x in plan.layers.excluded if x.name.endswith(".weight") and len(x.shape) == 2]
        left |= {x.name.removesuffix(".weight") for x in kept}
        chosen = {
            "activation_scheme": "dynamic",
            "weight_block_size": [128, 128],
            "modules_to_not_convert": skip_list(left, quantised),
        }
        body = {"quantization_config": chosen, "quantised": quantised}
        title = "Quantise a model to FP8 with transformers as transformers-fp8.json says."
        return {CONFIG: json_text(body), SCRIPT: script(title, _BODY, self.source)}
