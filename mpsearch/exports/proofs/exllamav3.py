"""Proof of an ExLlamaV3 recipe: the library's own function reads it for the model's layers.

Converting needs a GPU. What is read back is the bits that the conversion would give each tensor.
"""

import importlib.util
import math
import sys
import types

from _common import arguments, needs, plan_of, report


class Linear:
    """What the function asks of a layer."""

    def __init__(self, key, shape, kind):
        self.key, self.shape, self.qmap, self.qbits_key = key, shape, "block", kind
        self.modules = []

    def weights_numel(self):
        """Weights of the layer."""
        return math.prod(self.shape)


def strategy():
    """Load the function alone: the package itself imports CUDA kernels."""
    root = next(iter(importlib.util.find_spec("exllamav3").submodule_search_locations))
    for name in ("exllamav3", "exllamav3.modules", "exllamav3.conversion", "exllamav3.modules.linear"):
        sys.modules[name] = types.ModuleType(name)
        sys.modules[name].__path__ = []
    sys.modules["exllamav3.modules.linear"].Linear = Linear
    place = f"{root}/conversion/allocation.py"
    spec = importlib.util.spec_from_file_location("exllamav3.conversion.allocation", place)
    module = importlib.util.module_from_spec(spec)
    sys.modules[spec.name] = module
    spec.loader.exec_module(module)
    return module.create_q_strategy_from_recipe


def main():
    """Read the recipe for the layers of the plan."""
    args = arguments()
    library, version = needs("exllamav3", "pyyaml")
    import yaml

    recipe = yaml.safe_load((args.export / "recipe.yaml").read_text(encoding="utf-8"))
    words = (args.export / "run.sh").read_text(encoding="utf-8").split()
    head, embed = (int(words[words.index(name) + 1]) for name in ("--head_bits", "--embed_bits"))
    layers, tensors = [], {}
    for tensor in plan_of(args.export)["tensors"]:
        if tensor["kind"] == "embedding":
            tensors[tensor["name"]] = {"bits": embed}
        elif tensor["kind"] == "linear":
            is_head = tensor["layer"].rpartition(".")[2] in ("lm_head", "output")
            layers.append(Linear(tensor["layer"], tensor["shape"], "head_bits" if is_head else "bits"))
    if head != recipe["head_bits"]:
        raise ValueError(f"head_bits {recipe['head_bits']} in the recipe, {head} in the command")
    model = types.SimpleNamespace(modules=layers)
    found, mean = strategy()(model, None, None, recipe["tensors"], head, None)
    tensors.update({f"{name}.weight": {"bits": int(bits)} for name, bits in found.items()})
    notes = [f"{mean:.4f} bits per weight of the decoder by its own count; the conversion needs a GPU and was not run"]
    report(args.out, library, version, tensors, notes=notes)


if __name__ == "__main__":
    main()
