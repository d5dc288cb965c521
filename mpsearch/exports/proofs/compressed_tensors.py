"""Proof of a compressed-tensors checkpoint: its config is read, every tensor decoded, and transformers runs it."""

import json

from _common import arguments, as_stored, levels, needs, report, stored_tensors, torch_logits, unpack_words

#: Values of E2M1, by code.
E2M1 = (0.0, 0.5, 1.0, 1.5, 2.0, 3.0, 4.0, 6.0)


def main():
    """Read the checkpoint back."""
    args = arguments()
    library, version = needs("compressed-tensors", "transformers", "torch", "safetensors")
    import torch
    from compressed_tensors.quantization import QuantizationConfig
    from transformers import AutoModelForCausalLM

    config = json.loads((args.export / "config.json").read_text(encoding="utf-8"))
    scheme = config.get("quantization_config")
    groups = QuantizationConfig.model_validate(scheme).config_groups if scheme else {}
    of = {target: group for group in groups.values() for target in group.targets}
    (held, size), (original, _) = stored_tensors(args.export), stored_tensors(args.model)
    tensors = {}
    for name in held:
        module, _, part = name.rpartition(".")
        if part not in ("weight_packed", "weight") and (part.startswith("weight_") or part.startswith("input_")):
            continue
        group = of.get(module) if part in ("weight_packed", "weight") else None
        fact, weight = quantised(held, module, part, group) if group else (as_stored(held[name]), held[name].float())
        tensor = f"{module}.weight" if group else name
        if weight is not None and tensor in original:
            before = original[tensor].double()
            norm = float(before.norm())
            fact["distance"] = float((weight.double() - before).norm()) / norm if norm else 0.0
        tensors[tensor] = fact
    logits, notes = None, []
    try:
        logits = torch_logits(AutoModelForCausalLM.from_pretrained(args.export, dtype=torch.float32), args.tokens)
    except Exception as error:  # the library's own limits are told, and what was read back stands
        notes = [f"transformers does not load it by default ({type(error).__name__}); its tensors were read"]
    report(args.out, library, version, tensors, logits=logits, size=size, notes=notes, everything=True)


def quantised(held, module, part, group):
    """Facts of a quantised weight, taken from its tensors, and the numbers that it stands for."""
    import torch

    tensor, scales = held[f"{module}.{part}"], held[f"{module}.weight_scale"]
    zero = held.get(f"{module}.weight_zero_point")
    if group.weights.type == "int":
        return integers(held, module, tensor, scales, zero, group.weights.num_bits)
    if part == "weight":
        fact, values = {"bits": 8 * tensor.element_size()}, tensor.float()
        factor = torch.exp2(scales.float() - 127) if scales.dtype == torch.uint8 else scales.float()
    elif 2 * tensor.shape[1] != 16 * scales.shape[1] and 2 * tensor.shape[1] != 32 * scales.shape[1]:
        # Six bits: three bytes hold four codes.
        return {"bits": 8 * tensor.shape[1] // (32 * scales.shape[1]), "group": 32}, None
    else:
        codes = torch.stack([tensor & 15, tensor >> 4], -1).flatten(1)
        values = torch.tensor(E2M1)[(codes & 7).long()] * torch.where(codes > 7, -1.0, 1.0)
        fact = {"bits": 8 * tensor.shape[1] // codes.shape[1], "group": codes.shape[1] // scales.shape[1]}
        nested = held.get(f"{module}.weight_global_scale")
        factor = scales.float() / nested if nested is not None else torch.exp2(scales.float() - 127)
    if factor.ndim < 2:
        return {**fact, "group": -1}, values * factor
    height, width = (size // count for size, count in zip(values.shape, factor.shape, strict=True))
    if height == 1:
        fact["group"] = 0 if factor.shape[1] == 1 else width
    return fact, values * factor.repeat_interleave(height, 0).repeat_interleave(width, 1)


def integers(held, module, tensor, scales, zero, told):
    """Facts and numbers of an integer weight, packed or a byte for each code."""
    import torch

    symmetric, shape = zero is None, held.get(f"{module}.weight_shape")
    if shape is not None:
        rows, columns = shape.tolist()
        bits = 32 * tensor.shape[1] // columns
        codes = torch.from_numpy(unpack_words(tensor.numpy(), bits, columns)).float()
        if symmetric:
            codes -= 2 ** (bits - 1)
        elif zero.dtype == torch.int32:
            zero = torch.from_numpy(unpack_words(zero.T.contiguous().numpy(), bits, rows)).T
        else:
            zero = zero.float() + 2 ** (bits - 1)
    else:
        (rows, columns), bits, codes = tensor.shape, told, tensor.float()
    one = scales.numel() == 1 and rows > 1
    fact = {
        "bits": bits, "symmetric": symmetric, "levels": levels(codes),
        "group": -1 if one else 0 if scales.shape[1] == 1 else columns // scales.shape[1],
    }  # fmt: skip
    width = columns if one else columns // scales.shape[1]
    spread = (lambda x: x.float()) if one else (lambda x: x.float().repeat_interleave(width, 1))
    return fact, (codes if symmetric else codes - spread(zero)) * spread(scales)


if __name__ == "__main__":
    main()
