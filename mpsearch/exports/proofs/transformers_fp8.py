"""Proof of FP8 settings: the script beside them quantises the model, and the saved files are read and loaded.

transformers refuses to quantise without a GPU, though rounding needs none. Where there is none, that check is passed
over; the saved model is then loaded as transformers loads it on a CPU, dequantised, so kernels are not run.
"""

import runpy
import sys

from _common import arguments, as_stored, levels, needs, report, stored_tensors, torch_logits


def main():
    """Quantise, read every stored tensor, and load the folder."""
    args = arguments()
    library, version = needs("transformers", "torch", "safetensors", "accelerate")
    import torch
    import transformers
    from transformers.quantizers.quantizer_finegrained_fp8 import FineGrainedFP8HfQuantizer

    notes = [f"torch {torch.__version__}"]
    check = FineGrainedFP8HfQuantizer.validate_environment
    if not torch.cuda.is_available():
        FineGrainedFP8HfQuantizer.validate_environment = lambda *_, **__: None
        notes.append(
            "no GPU: rounded on the CPU, and loaded dequantised; its kernels and its rounding of inputs not run"
        )
    out = args.out.parent / "quantised"
    sys.argv = ["run.py", str(args.model), str(out)]
    runpy.run_path(str(args.export / "run.py"), run_name="__main__")
    FineGrainedFP8HfQuantizer.validate_environment = check
    held, size = stored_tensors(out)
    tensors = {}
    for name, tensor in held.items():
        scales = held.get(name + "_scale_inv")
        if scales is None:
            if not name.endswith("_scale_inv"):
                tensors[name] = as_stored(tensor)
            continue
        block = [a // b for a, b in zip(tensor.shape, scales.shape, strict=True)]
        if tensor.dtype != torch.float8_e4m3fn or block != [128, 128]:
            raise ValueError(f"{name}: {tensor.dtype} in blocks of {block}")
        tensors[name] = {"bits": 8 * tensor.element_size(), "levels": levels(tensor.view(torch.uint8).numpy())}
    config = transformers.AutoConfig.from_pretrained(out)
    kind = getattr(transformers, config.architectures[0])
    model = kind.from_pretrained(out, dtype="auto")
    report(args.out, library, version, tensors, logits=torch_logits(model, args.tokens), size=size, notes=notes)


if __name__ == "__main__":
    main()
