"""Proof of a Model Optimizer export: its own script quantises and writes a checkpoint, whose tensors are read back."""

import importlib.util
import json
import subprocess
import sys

from _common import arguments, levels, needs, report, torch_logits

#: Bits of what a checkpoint stores, by the name of its algorithm.
BITS = {"W4A16_AWQ": 4, "W8A16": 8, "W8A8_SQ_PER_CHANNEL": 8, "W4A16_NVFP4": 4}


def facts(tensor, scale, how):
    """What a stored weight is: bits from its packing, group from its scales, its distinct codes."""
    import torch

    rows, columns = tensor.shape[0], tensor.shape[1]
    if tensor.dtype == torch.uint8 and how.get("quant_algo") == "W4A16_AWQ":
        codes = torch.cat([tensor & 15, tensor >> 4])
        # Two rows of codes in one row of bytes.
        return {
            "bits": 8 * rows // scale.shape[0],
            "group": columns // scale.shape[-1],
            "symmetric": True,
            "levels": levels(codes.numpy()),
        }
    if tensor.dtype == torch.int8:
        group = 0 if scale.numel() == rows else -1
        return {"bits": 8, "group": group, "symmetric": True, "levels": levels(tensor.numpy())}
    packed = 4 if tensor.dtype == torch.uint8 and "NVFP4" in how.get("quant_algo", "") else 8 * tensor.element_size()
    return {"bits": packed, "dtype": str(tensor.dtype).removeprefix("torch.")}


def main():
    """Quantise, export and read back."""
    args = arguments()
    library, version = needs("nvidia-modelopt", "transformers", "torch")
    from safetensors import safe_open

    out = args.out.parent / "modelopt"
    command = [sys.executable, str(args.export / "run.py"), "--model", str(args.model), "--out", str(out)]
    # Only static inputs need data, and some weights are rounded on a GPU as soon as there is any.
    static = '"input_quantizer' in (args.export / "quant_cfg.json").read_text(encoding="utf-8").replace(".", '"')
    given = ["--tokens", str(args.tokens)] if static else []
    done = subprocess.run([*command, *given], capture_output=True, text=True, check=False)
    if done.returncode:
        sys.exit(f"run.py: {[line for line in done.stderr.splitlines() if line.strip()][-1:]}")
    found = json.loads((out / "hf_quant_config.json").read_text(encoding="utf-8"))["quantization"]
    planned = json.loads((args.export / "hf_quant_config.json").read_text(encoding="utf-8"))["quantization"]
    layers = found.get("quantized_layers") or dict.fromkeys(planned["quantized_layers"], found)
    tensors, size = {}, 0
    for path in sorted(out.glob("*.safetensors")):
        with safe_open(path, "pt") as file:
            held = {name: file.get_tensor(name) for name in file.keys()}  # noqa: SIM118 - no mapping
        for name, tensor in held.items():
            size += tensor.numel() * tensor.element_size()
            module, _, part = name.rpartition(".")
            if part == "weight":
                tensors[name] = (
                    facts(tensor, held.get(f"{module}.weight_scale"), layers.get(module, {}))
                    if module in layers
                    else {"bits": 8 * tensor.element_size(), "dtype": str(tensor.dtype)[6:]}
                )
    spec = importlib.util.spec_from_file_location("run", args.export / "run.py")
    run = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(run)
    tokens = json.loads(args.tokens.read_text(encoding="utf-8")) if static else None
    notes, logits = ["logits are those of the quantised model in memory; no engine was run"], None
    try:
        logits = torch_logits(run.quantised(str(args.model), tokens).float(), args.tokens)
    except AssertionError as error:  # some of its rounding runs on a GPU alone; what was read back stands
        notes = [f"no logits: {str(error)[:200]}"]
    report(args.out, library, version, tensors, logits=logits, size=size, notes=notes)


if __name__ == "__main__":
    main()
