"""Proof of a configuration for vLLM's online quantisation: vLLM's own code reads it for the model's layers.

Quantising needs a GPU. What is read back is the method that vLLM would choose for each layer, and its bits. Where its
compiled kernels do not load, empty modules stand for them: choosing needs none.
"""

import importlib
import json
import sys
import types

from _common import arguments, needs, plan_of, report

#: Compiled parts, of which choosing a method needs none.
COMPILED = ("vllm._C", "vllm._moe_C", "vllm._C_stable_libtorch")
#: Modules that vLLM loads as one, for the architectures that have them.
PACKED = {"qkv_proj": ["q_proj", "k_proj", "v_proj"], "gate_up_proj": ["gate_proj", "up_proj"]}


def fused(name, names):
    """Name under which vLLM looks a module up: that of the matrix that it is loaded into."""
    parent, dot, last = name.rpartition(".")
    for whole, parts in PACKED.items():
        if last in parts and all(f"{parent}{dot}{part}" in names for part in parts):
            return f"{parent}{dot}{whole}"
    return name


def main():
    """Resolve every layer of the plan."""
    args = arguments()
    library, version = needs("vllm", "torch")
    notes = []
    for name in COMPILED:
        try:
            importlib.import_module(name)
        except ImportError:
            sys.modules[name] = types.ModuleType(name)
            notes = ["without its compiled kernels: the choice of methods was run, not the methods"]
    from vllm.config.quantization import QuantizationConfigArgs
    from vllm.model_executor.layers.linear import LinearBase
    from vllm.model_executor.layers.quantization.online.base import OnlineQuantizationConfig

    given = json.loads((args.export / "quantization-config.json").read_text(encoding="utf-8"))
    config = OnlineQuantizationConfig(QuantizationConfigArgs(**given))
    config.packed_modules_mapping = PACKED
    plan = plan_of(args.export)["tensors"]
    names = {tensor["layer"] for tensor in plan}
    stored = {"bfloat16": 16, "float16": 16, "float32": 32}
    tensors, chosen = {}, set()
    for tensor in plan:
        found = config.resolve_quant_method_cls(LinearBase, fused(tensor["layer"], names))
        if found is None or tensor["kind"] != "linear":
            tensors[tensor["name"]] = {"bits": stored[tensor["stored_dtype"]]}
            continue
        method = found[-1].__name__
        chosen.add(f"{found[1]} by {method}")
        tensors[tensor["name"]] = {"bits": 4 if "fp4" in method.lower() else 8, "method": method}
    notes += sorted(chosen)
    report(args.out, library, version, tensors, notes=notes)


if __name__ == "__main__":
    main()
