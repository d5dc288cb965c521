"""Proof of an MCT export: its own script quantises the plan's layers, each on an input of its own, and bits are read.

torch.fx does not trace language models of transformers, so the layers stand side by side in one module, under their
own names and with their own weights. There are no logits to compare.
"""

import importlib.util

from _common import arguments, levels, needs, plan_of, report


def side_by_side(shapes, weights):
    """A module that holds each layer under its name and runs it on an input of its own."""
    import torch

    class Layers(torch.nn.Module):
        def __init__(self):
            super().__init__()
            for name, shape in shapes.items():
                parent = self
                *path, last = name.split(".")
                for part in path:
                    if not hasattr(parent, part):
                        parent.add_module(part, torch.nn.Module())
                    parent = getattr(parent, part)
                layer = torch.nn.Linear(shape[1], shape[0], bias=False)
                layer.weight.data = weights[f"{name}.weight"].float()
                parent.add_module(last, layer)

        def forward(self, *inputs):
            return [self.get_submodule(name)(given) for name, given in zip(shapes, inputs, strict=False)]

    # torch.fx does not trace a variable number of arguments.
    names = ", ".join(f"x{place}" for place in range(len(shapes)))
    scope = {"run": Layers.forward}
    exec(f"def forward(self, {names}):\n    return run(self, {names})", scope)
    Layers.forward = scope["forward"]
    return Layers().eval()


def main():
    """Quantise and read back."""
    args = arguments()
    library, version = needs("model-compression-toolkit", "torch", "safetensors")
    import torch
    from safetensors.torch import load_file

    spec = importlib.util.spec_from_file_location("run", args.export / "run.py")
    run = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(run)
    weights = {}
    for path in sorted(args.model.glob("*.safetensors")):
        weights.update(load_file(path))
    shapes = {
        tensor["layer"]: tensor["shape"] for tensor in plan_of(args.export)["tensors"] if tensor["kind"] == "linear"
    }

    def inputs():
        drawn = torch.Generator().manual_seed(0)
        yield [torch.randn(4, shape[1], generator=drawn) for shape in shapes.values()]

    model = run.quantised(side_by_side(shapes, weights), inputs)
    of = {name.replace(".", "_"): name for name in shapes}
    tensors = {}
    for name, part in model.named_modules():
        if "weight" not in getattr(part, "weights_quantizers", {}):
            continue
        quantizer = part.weights_quantizers["weight"]
        held = part.get_quantized_weights()["weight"].detach().numpy()
        tensors[f"{of[name.replace('.', '_')]}.weight"] = {
            "bits": quantizer.num_bits,
            "group": 0 if quantizer.per_channel else -1,
            "symmetric": "Symmetric" in type(quantizer).__name__,
            "levels": max(levels(row) for row in held),
        }
    for name, tensor in weights.items():
        tensors.setdefault(name, {"bits": 8 * tensor.element_size(), "dtype": str(tensor.dtype).removeprefix("torch.")})
    report(args.out, library, version, tensors, notes=["each layer ran on an input of its own; no model was run"])


if __name__ == "__main__":
    main()
