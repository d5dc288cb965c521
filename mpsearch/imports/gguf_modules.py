"""The GGUF names of a model's modules."""

from __future__ import annotations

from mpsearch.errors import InputError, did_you_mean
from mpsearch.exports.gguf_names import ARCHITECTURES, GgufNames
from mpsearch.imports.foreign import UnsaidError
from mpsearch.layer import Layer, Layers


class GgufModules:
    """What GGUF calls the layers of one model.

    Args:
        layers: the model's layers.
        architecture: its class.

    Raises:
        InputError: a class whose names are not known (E307).

    >>> layers = Layers((Layer("model.layers.0.mlp.up_proj", "linear", (8, 64)),))
    >>> GgufModules(layers, "LlamaForCausalLM").find("model.layers.0.mlp.up_proj", layers[0])
    'blk.0.ffn_up.weight'
    """

    def __init__(self, layers: Layers, architecture: str) -> None:
        if architecture not in ARCHITECTURES:
            close = did_you_mean(architecture, ARCHITECTURES)
            raise InputError(
                "E307",
                f"the GGUF names of '{architecture}' are not known{close}",
                advice=f"known are {', '.join(ARCHITECTURES)}",
            )
        self._names = GgufNames(architecture, [*(x.tensor for x in layers), *(x.name for x in layers.excluded)])

    def find(self, name: str, layer: Layer) -> str:
        """Return the GGUF name of a module's weight; of a head that is the embedding again the embedding's.

        Raises:
            UnsaidError: GGUF has no such tensor.
        """
        modules = (layer.name, *layer.shared)
        found = {self._names.find(f"{module}.weight") for module in modules}
        if layer.kind in ("linear", "embedding") and "token_embd.weight" in found:
            return "token_embd.weight"
        tensor = self._names.find(f"{name}.weight") if layer.kind in ("linear", "embedding") else ""
        if not tensor:
            raise UnsaidError("GGUF has no tensor of this name")
        return tensor

    def kept(self, tensor: str) -> str:
        """Return the GGUF name of a tensor that is kept; empty when there is none."""
        return self._names.find(tensor)
