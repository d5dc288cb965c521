"""AIMET: the quantiser of each layer by its exact name, and a script that simulates them and writes encodings."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any, ClassVar

from mpsearch.exports.config_export import json_text, modules, weights_of
from mpsearch.exports.script_exporter import ScriptExporter
from mpsearch.format import Format
from mpsearch.plan import BitPlan

#: File of settings: layer -> its quantiser.
SETTINGS = "quantizers.json"

_SCRIPT = '''\
def quantised(folder):
    """Load a model, simulate it, and leave only the quantisers of the plan on; the simulation."""
    import torch
    from aimet_torch.quantization.affine import QuantizeDequantize
    from aimet_torch.quantsim import QuantizationSimModel
    from transformers import AutoModelForCausalLM

    class Logits(torch.nn.Module):
        def __init__(self, model):
            super().__init__()
            self.model = model

        def forward(self, tokens):
            return self.model(input_ids=tokens, use_cache=False).logits

    model = AutoModelForCausalLM.from_pretrained(folder, dtype=torch.float32, attn_implementation="eager").eval()
    tokens = torch.arange(8)[None]
    sim = QuantizationSimModel(Logits(model), dummy_input=tokens, default_param_bw=8, default_output_bw=16)
    planned = read("quantizers.json")
    met = set()
    for name, part in sim.model.model.named_modules():
        for kind in ("input_quantizers", "output_quantizers", "param_quantizers"):
            places = getattr(part, kind, None)
            for place in range(len(places or ())) if kind != "param_quantizers" else list(places or ()):
                places[place] = None
        how = planned.get(name)
        if how and "weight" in getattr(part, "param_quantizers", {}):
            rows, columns = part.weight.shape
            group = how["group"] or columns
            part.param_quantizers["weight"] = QuantizeDequantize(
                shape=(rows, columns // group), bitwidth=how["bits"], symmetric=how["symmetric"], block_size=(1, group)
            )
            met.add(name)
    if lost := sorted({*planned} - met):
        sys.exit(f"AIMET has no such layers: {lost[:20]}")
    sim.compute_encodings(lambda given: given(tokens))
    return sim


def main():
    """Simulate, and write the encodings."""
    args = arguments()
    out = Path(args.out)
    out.mkdir(parents=True)
    quantised(args.model).save_encodings_to_json(str(out), "encodings")
'''


class Aimet(ScriptExporter):
    """Writes ``quantizers.json`` and ``run.py``, which simulates the plan and writes ``encodings.json``.

    >>> from mpsearch.layer import Layer, Layers
    >>> layers = Layers((Layer("fc", "linear", (8, 64)),))
    >>> Aimet().refuses(BitPlan(layers, {"fc": Format.parse("int4-g64")}))
    ['fc: int4-g64 is not held by AIMET; allowed int{2,3,4,5,6,7,8}-{channel,g*}-full, ...']
    """

    target: ClassVar[str] = "aimet"
    script: ClassVar[str] = _SCRIPT

    def data(self, plan: BitPlan) -> Mapping[str, str]:
        """Return the quantiser of each layer that has one."""
        chosen = [(layer, plan.formats[layer.name]) for layer in weights_of(plan)]
        held = {
            name: parameters(fmt) for layer, fmt in chosen if fmt.weight.family != "plain" for name in modules(layer)
        }
        return {SETTINGS: json_text(held)}


def parameters(fmt: Format) -> dict[str, Any]:
    """Bits, weights that share a scale (0 for an output channel), and whether there are no offsets.

    >>> parameters(Format.parse("int3-g64-asym"))
    {'bits': 3, 'group': 64, 'symmetric': False}
    """
    weight: Any = fmt.weight
    return {"bits": weight.bits, "group": weight.group, "symmetric": not weight.asymmetric}
