"""Proof of an AMD Quark export: its own script quantises and writes a checkpoint, whose tensors are read back."""

import importlib.util
import json
import sys

from _common import arguments, levels, needs, plan_of, report, torch_logits


def facts(tensor, scale, zero, rows, columns):
    """What a stored weight is: bits from its bytes, group from its scales, its distinct codes."""
    import numpy as np
    import torch

    bits = 8 * tensor.numel() * tensor.element_size() // (rows * columns)
    if tensor.is_floating_point():
        return {"bits": bits, "dtype": str(tensor.dtype).removeprefix("torch.")}
    if scale.dtype == torch.uint8:
        return {"bits": bits}
    held = np.ascontiguousarray(tensor.numpy()).view(np.uint8)
    codes = np.stack([held & 15, held >> 4]) if bits == 4 else held
    group = {1: -1, rows: 0}.get(scale.numel(), rows * columns // scale.numel())
    return {"bits": bits, "group": group, "symmetric": zero is None or not bool(zero.any()), "levels": levels(codes)}


def main():
    """Quantise, export and read back."""
    args = arguments()
    library, version = needs("amd-quark", "transformers", "torch")
    import torch
    from safetensors import safe_open

    out = args.out.parent / "quark"
    spec = importlib.util.spec_from_file_location("run", args.export / "run.py")
    run = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(run)
    sys.argv = ["run.py", "--model", str(args.model), "--out", str(out), "--tokens", str(args.tokens)]
    kept = []
    made = run.quantised

    def quantised(*given):
        model = made(*given)
        kept.append(torch_logits(model, args.tokens))
        return model

    run.quantised = quantised
    run.main()
    shapes = {tensor["name"]: tensor["shape"] for tensor in plan_of(args.export)["tensors"]}
    tensors, size = {}, 0
    for path in sorted(out.glob("*.safetensors")):
        with safe_open(path, "pt") as file:
            held = {name: file.get_tensor(name) for name in file.keys()}  # noqa: SIM118 - no mapping
        for name, tensor in held.items():
            size += tensor.numel() * tensor.element_size()
            if name in shapes and f"{name}_scale" in held:
                rows, columns = shapes[name]
                scale, zero = held[f"{name}_scale"], held.get(f"{name}_zero_point")
                tensors[name] = facts(
                    tensor.view(torch.uint8) if tensor.dtype == torch.int8 else tensor, scale, zero, rows, columns
                )
            elif name.endswith(".weight"):
                tensors[name] = {"bits": 8 * tensor.element_size(), "dtype": str(tensor.dtype).removeprefix("torch.")}
    excluded = json.loads((args.export / "quark_config.json").read_text(encoding="utf-8"))["exclude"]
    report(
        args.out,
        library,
        version,
        tensors,
        logits=kept[0],
        size=size,
        notes=[f"left alone: {len(excluded)} layers; logits are those of the model in memory, no engine was run"],
    )


if __name__ == "__main__":
    main()
