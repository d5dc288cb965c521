"""Proof of a compressed-tensors checkpoint: transformers loads it, and the library's own config reads it back."""

import json

from _common import arguments, levels, needs, report, torch_logits, unpack_words


def main():
    """Read the checkpoint back."""
    args = arguments()
    library, version = needs("compressed-tensors", "transformers", "torch", "safetensors")
    import torch
    from compressed_tensors.quantization import QuantizationConfig
    from safetensors import safe_open
    from transformers import AutoModelForCausalLM

    config = json.loads((args.export / "config.json").read_text(encoding="utf-8"))
    scheme = config.get("quantization_config")
    groups = QuantizationConfig.model_validate(scheme).config_groups if scheme else {}
    of = {target: group for group in groups.values() for target in group.targets}
    held = {}
    for path in sorted(args.export.glob("*.safetensors")):
        with safe_open(path, "pt") as file:
            held.update({name: file.get_tensor(name) for name in file.keys()})  # noqa: SIM118 - no mapping
    tensors, size, notes = {}, 0, []
    for name, tensor in held.items():
        size += tensor.numel() * tensor.element_size()
        module, _, part = name.rpartition(".")
        if part == "weight_packed" and (weights := of[module].weights).type == "int":
            rows, columns = held[f"{module}.weight_shape"].tolist()
            scales = held[f"{module}.weight_scale"]
            packed = 32 * tensor.shape[1] // columns
            codes = unpack_words(tensor.numpy(), weights.num_bits, columns)
            tensors[f"{module}.weight"] = {
                "bits": packed if 32 * tensor.shape[1] % columns == 0 else weights.num_bits,
                "group": -1
                if scales.numel() == 1 < rows
                else 0
                if scales.shape[1] == 1
                else columns // scales.shape[1],
                "symmetric": f"{module}.weight_zero_point" not in held,
                "levels": levels(codes),
            }
        elif part in ("weight_packed", "weight"):
            weights = of[module].weights if module in of else None
            bits = weights.num_bits if weights else 8 * tensor.element_size()
            tensors[f"{module}.weight"] = {"bits": bits, "dtype": str(tensor.dtype).removeprefix("torch.")}
    try:
        model = AutoModelForCausalLM.from_pretrained(args.export, dtype=torch.float32)
        logits = torch_logits(model, args.tokens)
    except Exception as error:  # the library's own limits are told, and what was read back stands
        notes, logits = [f"transformers does not load it: {type(error).__name__}: {str(error)[:200]}"], None
    report(args.out, library, version, tensors, logits=logits, size=size, notes=notes)


if __name__ == "__main__":
    main()
