"""Proof of an llm-compressor recipe: its script quantises the model, and what was written is read back."""

import json
import tempfile
from pathlib import Path

from _common import (
    arguments,
    as_stored,
    levels,
    needs,
    report,
    run_script,
    stored_tensors,
    torch_logits,
    unpack_words,
)


def integers(held, module, weights):
    """What a module of integers holds, from the widths of its tensors."""
    scales = held[f"{module}.weight_scale"]
    if f"{module}.weight_packed" in held:
        words = held[f"{module}.weight_packed"]
        rows, columns = held[f"{module}.weight_shape"].tolist()
        exact = 32 * words.shape[1] % columns == 0
        bits = 32 * words.shape[1] // columns if exact else weights.num_bits
        codes = unpack_words(words.numpy(), weights.num_bits, columns)
    else:
        codes, bits = held[f"{module}.weight"].numpy(), weights.num_bits
        rows, columns = codes.shape
    groups = scales.shape[1] if scales.dim() > 1 else 1
    return {
        "bits": bits,
        "group": -1 if scales.numel() == 1 < rows else 0 if groups == 1 else columns // groups,
        "symmetric": f"{module}.weight_zero_point" not in held,
        "levels": levels(codes),
    }


def tensors_of(folder):
    """What every tensor holds, and the bytes of all."""
    from compressed_tensors.quantization import QuantizationConfig

    config = json.loads((folder / "config.json").read_text(encoding="utf-8"))
    groups = QuantizationConfig.model_validate(config["quantization_config"]).config_groups.values()
    of = {target: group.weights for group in groups for target in group.targets}
    held, size = stored_tensors(folder)
    tensors = {}
    for name, tensor in held.items():
        module, _, part = name.rpartition(".")
        if part not in ("weight", "weight_packed"):
            continue
        if f"{module}.weight_scale" not in held:
            tensors[name] = as_stored(tensor)
        elif of[module].type == "int":
            tensors[f"{module}.weight"] = integers(held, module, of[module])
        else:
            tensors[f"{module}.weight"] = {"bits": of[module].num_bits}
    return tensors, size


def main():
    """Quantise the model and read it back."""
    args = arguments()
    library, version = needs("llmcompressor", "compressed-tensors", "transformers", "torch", "safetensors")
    import torch
    from transformers import AutoModelForCausalLM

    with tempfile.TemporaryDirectory() as name:
        out = Path(name) / "quantised"
        run_script(args, args.model, out)
        tensors, size = tensors_of(out)
        notes, logits = [], None
        try:
            model = AutoModelForCausalLM.from_pretrained(out, dtype=torch.float32)
            logits = torch_logits(model, args.tokens)
        except Exception as error:  # the loader's own limits are told, and what was read back stands
            notes = [f"transformers does not load it: {type(error).__name__}: {str(error)[:200]}"]
    report(args.out, library, version, tensors, logits=logits, size=size, notes=notes)


if __name__ == "__main__":
    main()
