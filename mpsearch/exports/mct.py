"""Sony's Model Compression Toolkit: the bits of each node by its exact name, and a script that quantises with them."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import ClassVar

from mpsearch.exports.config_export import json_text, weights_of
from mpsearch.exports.script_exporter import ScriptExporter
from mpsearch.plan import BitPlan

#: File of settings: name of a node in the traced graph -> bits of its weight.
SETTINGS = "bits.json"
_ALLOWED = "int{2,4,8}-channel-full@int8-tensor-static"
_QUANTISES = "quantises weights and inputs of all"

_SCRIPT = '''\
def quantised(model, inputs):
    """Quantise a model in memory.

    Args:
        model: a torch module that torch.fx traces.
        inputs: function that yields lists of inputs, which give the range of activations.
    """
    import model_compression_toolkit as mct
    from model_compression_toolkit.core import BitWidthConfig, CoreConfig
    from model_compression_toolkit.core.common.network_editors import NodeNameFilter

    bits = read("bits.json")
    width = BitWidthConfig()
    names = [NodeNameFilter(name) for name in bits]
    width.set_manual_weights_bit_width(names, [*bits.values()], ["weight"] * len(names))
    model, _ = mct.ptq.pytorch_post_training_quantization(
        model, inputs, core_config=CoreConfig(bit_width_config=width),
        target_platform_capabilities=mct.get_target_platform_capabilities(),
    )
    found = {
        name.replace(".", "_"): part.weights_quantizers["weight"].num_bits for name, part in model.named_modules()
        if "weight" in getattr(part, "weights_quantizers", {})
    }
    if found != bits:
        wrong = sorted(name for name in {*found, *bits} if found.get(name) != bits.get(name))
        sys.exit(f"not as planned: {wrong[:20]}")
    return model


def main():
    """Quantise the model of a Python file, which has the functions model() and inputs(), and write ONNX."""
    args = arguments()
    import importlib.util

    import model_compression_toolkit as mct

    spec = importlib.util.spec_from_file_location("given", args.model)
    given = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(given)
    mct.exporter.pytorch_export_model(quantised(given.model().eval(), given.inputs), args.out, given.inputs)
'''


class Mct(ScriptExporter):
    """Writes ``bits.json`` and ``run.py``; ``--model`` is a Python file with the functions ``model`` and ``inputs``.

    >>> from mpsearch.format import Format
    >>> from mpsearch.layer import Layer, Layers
    >>> layers = Layers((Layer("fc", "linear", (8, 64)),))
    >>> Mct().refuses(BitPlan(layers, {"fc": Format.parse("int3-channel-full")}))
    ['fc: int3-channel-full is not held by Model Compression Toolkit; allowed int{2,4,8}-channel-full@...']
    """

    target: ClassVar[str] = "mct"
    script: ClassVar[str] = _SCRIPT

    def refuses(self, plan: BitPlan) -> Sequence[str]:
        """Name every layer that cannot be held, that would be quantised and is not, or whose node has no own name."""
        found, nodes = list(super().refuses(plan)), dict[str, str]()
        for layer in weights_of(plan):
            first = nodes.setdefault(node(layer.name), layer.name)
            if first != layer.name:
                found.append(f"{layer.name}: is the node {node(layer.name)} there, and so is {first}; rename one")
            if layer.shared:
                found.append(
                    f"{layer.name}: is shared with {', '.join(layer.shared)}, and each of them is a node there"
                )
        return found

    def data(self, plan: BitPlan) -> Mapping[str, str]:
        """Return the bits of each node."""
        chosen = {layer.name: plan.formats[layer.name].weight for layer in weights_of(plan)}
        bits = {node(name): weight.bits for name, weight in chosen.items() if weight.family != "plain"}
        return {SETTINGS: json_text(bits)}


def node(name: str) -> str:
    """Name of a module's node in a graph that torch.fx has traced.

    >>> node("layers.0.fc")
    'layers_0_fc'
    """
    return name.replace(".", "_")
