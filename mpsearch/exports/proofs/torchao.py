"""Proof of a torchao configuration: its own script quantises the model, and the saved folder is loaded and read."""

import json
import runpy
import sys

from _common import arguments, levels, needs, report, torch_logits


def main():
    """Quantise, load what was saved, and read every weight."""
    args = arguments()
    library, version = needs("torchao", "transformers", "torch", "safetensors")
    import torch
    import transformers
    from torchao.utils import TorchAOBaseTensor

    out = args.out.parent / "quantised"
    sys.argv = ["run.py", str(args.model), str(out)]
    runpy.run_path(str(args.export / "run.py"), run_name="__main__")
    config = transformers.AutoConfig.from_pretrained(out)
    model = getattr(transformers, config.architectures[0]).from_pretrained(out, dtype="auto")
    tensors, size = {}, 0
    for name, weight in model.named_parameters(remove_duplicate=False):
        weight = weight.data
        if not isinstance(weight, TorchAOBaseTensor):
            tensors[name] = {"bits": 8 * weight.element_size(), "dtype": str(weight.dtype).removeprefix("torch.")}
            size += weight.numel() * weight.element_size()
            continue
        rows, columns = weight.shape
        scales = weight.scale
        codes, kind = weight.qdata, str(getattr(weight, "target_dtype", weight.qdata.dtype)).removeprefix("torch.")
        group = 0 if scales.numel() == rows else columns * rows // scales.numel()
        found = {"bits": int(kind[3:]) if kind.startswith("int") else 8, "group": -1 if scales.numel() == 1 else group}
        zeros = getattr(weight, "zero_point", None)
        if kind.startswith("int"):
            found |= {"levels": levels(codes.numpy()), "symmetric": zeros is None or not bool(zeros.any())}
        tensors[name] = found
        held = [part for part in (codes, scales, zeros) if part is not None]
        size += sum(part.numel() * part.element_size() for part in held)
    notes = [f"transformers {transformers.__version__}, torch {torch.__version__}"]
    saved = json.loads((out / "config.json").read_text(encoding="utf-8"))["quantization_config"]
    notes.append(f"config.json names {len(saved['quant_type']['default']['_data']['fqn_to_config'])} modules")
    report(args.out, library, version, tensors, logits=torch_logits(model, args.tokens), size=size, notes=notes)


if __name__ == "__main__":
    main()
