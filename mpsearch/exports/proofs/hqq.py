"""Proof of HQQ settings: the script beside them quantises the model, the saved folder is loaded and read."""

import runpy
import sys

from _common import arguments, levels, needs, report, torch_logits

#: Bits that HQQ stores in a word of each of its packings.
PACKINGS = {"8bit_u8": (8, 1), "4bit_u8": (8, 2), "3bit_32": (32, 10), "2bit_u8": (8, 4)}


def main():
    """Quantise, load what was saved, and read every weight."""
    args = arguments()
    library, version = needs("hqq", "transformers", "torch", "safetensors")
    import torch
    import transformers
    from hqq.core.quantize import HQQLinear, Quantizer

    out = args.out.parent / "quantised"
    sys.argv = ["run.py", str(args.model), str(out)]
    runpy.run_path(str(args.export / "run.py"), run_name="__main__")
    model = runpy.run_path(str(out / "load.py"))["load"](out)
    tensors, size = {}, 0
    for name, module in model.named_modules():
        if not isinstance(module, HQQLinear):
            continue
        meta, packed = module.meta, module.W_q
        rows, columns = meta["shape"]
        width, codes_of = PACKINGS[meta["packing"]]
        assert packed.element_size() * 8 == width, (name, packed.dtype)
        codes = Quantizer.unpack[meta["packing"]](packed)[: rows * columns // meta["group_size"]]
        stored = packed.numel() * packed.element_size()
        held = codes_of * packed.numel()
        assert rows * columns <= held < rows * columns + 10 * codes.shape[1], (name, held)
        assert int(codes.max()) < 2 ** meta["nbits"], name
        tensors[f"{name}.weight"] = {
            "bits": int(meta["nbits"]),
            "group": 0 if meta["scale"].numel() == rows else rows * columns // meta["scale"].numel(),
            "levels": levels(codes.numpy()),
            "symmetric": False,
        }
        size += stored + sum(meta[part].numel() * meta[part].element_size() for part in ("scale", "zero"))
    for name, weight in model.named_parameters(remove_duplicate=False):
        if f"{name.rpartition('.')[0]}.weight" not in tensors:
            tensors[name] = {"bits": 8 * weight.element_size(), "dtype": str(weight.dtype).removeprefix("torch.")}
            size += weight.numel() * weight.element_size()
    notes = [f"transformers {transformers.__version__}, torch {torch.__version__}"]
    report(args.out, library, version, tensors, logits=torch_logits(model, args.tokens), size=size, notes=notes)


if __name__ == "__main__":
    main()
