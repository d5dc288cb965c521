"""Proof of bitsandbytes settings: the script beside them quantises the model, and what it saved is loaded and read."""

import runpy
import sys

from _common import arguments, levels, needs, report, torch_logits


def nibbles(packed):
    """Codes of 4 bits, two to a byte."""
    import numpy as np

    flat = packed.reshape(-1).numpy().view(np.uint8)
    return np.concatenate([flat >> 4, flat & 15])


def main():
    """Quantise, load what was saved, and read every weight."""
    args = arguments()
    library, version = needs("bitsandbytes", "transformers", "torch", "safetensors", "accelerate")
    import bitsandbytes as bnb
    import torch
    import transformers

    out = args.out.parent / "quantised"
    sys.argv = ["run.py", str(args.model), str(out)]
    runpy.run_path(str(args.export / "run.py"), run_name="__main__")
    config = transformers.AutoConfig.from_pretrained(out)
    kind = getattr(transformers, config.architectures[0])
    model = kind.from_pretrained(out, dtype="auto", device_map="cpu")
    tensors, size = {}, 0
    for name, weight in model.named_parameters(remove_duplicate=False):
        module = model.get_submodule(name.rpartition(".")[0])
        size += weight.numel() * weight.element_size()
        if isinstance(module, bnb.nn.Linear4bit) and name.endswith("weight"):
            state = weight.quant_state
            codes = nibbles(weight.data)
            rows, columns = state.shape
            tensors[name] = {
                "bits": codes.size // (rows * columns) * 4,
                "group": state.blocksize,
                "levels": levels(codes),
                "codebook": state.quant_type,
                "nested": state.state2.blocksize if state.nested else 0,
            }
            size += state.absmax.numel() * state.absmax.element_size()
        elif isinstance(module, bnb.nn.Linear8bitLt) and name.endswith("weight"):
            codes = weight.data if weight.data.dtype == torch.int8 else module.state.CB
            scales = weight.SCB if weight.SCB is not None else module.state.SCB
            tensors[name] = {
                "bits": 8 * codes.element_size(),
                "group": 0 if scales.numel() == codes.shape[0] else -1,
                "levels": levels(codes.numpy()),
                "symmetric": True,
            }
            size += scales.numel() * scales.element_size()
        else:
            tensors[name] = {"bits": 8 * weight.element_size(), "dtype": str(weight.dtype).removeprefix("torch.")}
    notes = [f"transformers {transformers.__version__}, torch {torch.__version__}"]
    blocks = {fact["codebook"] + f" in blocks of {fact['group']}" for fact in tensors.values() if "codebook" in fact}
    notes += sorted(blocks) + [
        f"absmax nested in blocks of {x}" for x in {f.get("nested") for f in tensors.values()} if x
    ]
    report(args.out, library, version, tensors, logits=torch_logits(model, args.tokens), size=size, notes=notes)


if __name__ == "__main__":
    main()
