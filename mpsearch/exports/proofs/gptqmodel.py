"""Proof of a GPTQModel configuration: its script quantises the model, and what was packed is read back."""

import json
import shutil
import subprocess
import sys
import tempfile
from pathlib import Path

from _common import arguments, levels, needs, report, torch_logits, unpack_words


def with_tokenizer(model, scratch):
    """A folder of the model that has a tokenizer, without which the library does not load one."""
    if any((model / name).exists() for name in ("tokenizer.json", "tokenizer.model", "tokenizer_config.json")):
        return model
    from tokenizers import Tokenizer, models
    from transformers import PreTrainedTokenizerFast

    folder = scratch / "model"
    shutil.copytree(model, folder)
    count = json.loads((model / "config.json").read_text(encoding="utf-8"))["vocab_size"]
    words = Tokenizer(models.WordLevel({f"t{i}": i for i in range(count)}, unk_token="t0"))
    PreTrainedTokenizerFast(tokenizer_object=words, unk_token="t0", pad_token="t0").save_pretrained(folder)
    return folder


def quantised(args, scratch):
    """Run the script of the export; the folder that it wrote."""
    run = json.loads((args.export / "run.json").read_text(encoding="utf-8"))
    out = scratch / "quantised"
    data = ["--tokens", str(args.tokens)] if run["calibrated"] else []
    command = [sys.executable, str(args.export / "run.py"), "--model", str(with_tokenizer(args.model, scratch))]
    # What the script says last is the reason when it fails.
    if code := subprocess.run([*command, "--out", str(out), *data], check=False, stdout=sys.stderr).returncode:
        sys.exit(code)
    return out


def tensors_of(folder):
    """What every tensor holds, and the bytes of all."""
    from safetensors import safe_open

    held = {}
    for path in sorted(folder.glob("*.safetensors")):
        with safe_open(path, "pt") as file:
            held.update({name: file.get_tensor(name) for name in file.keys()})  # noqa: SIM118 - no mapping
    tensors = {}
    for name, tensor in held.items():
        module, _, part = name.rpartition(".")
        if part == "qweight":
            columns, groups = len(held[f"{module}.g_idx"]), len(held[f"{module}.scales"])
            bits = 32 * len(tensor) // columns
            zeros = unpack_words(held[f"{module}.qzeros"].numpy(), bits, held[f"{module}.scales"].shape[1])
            tensors[f"{module}.weight"] = {
                "bits": bits,
                "group": 0 if groups == 1 else columns // groups,
                # Of an asymmetric layer all groups would have to have the middle as their zero point.
                "symmetric": set(zeros.flat) in ({2 ** (bits - 1) - 1}, {2 ** (bits - 1)}),
                "levels": levels(unpack_words(tensor.T.contiguous().numpy(), bits, columns)),
            }
        elif part not in ("scales", "qzeros", "g_idx"):
            dtype = str(tensor.dtype).removeprefix("torch.")
            tensors[name] = {"bits": 8 * tensor.element_size(), "dtype": dtype}
    return tensors, sum(tensor.numel() * tensor.element_size() for tensor in held.values())


def main():
    """Quantise the model and read it back."""
    args = arguments()
    library, version = needs("gptqmodel", "transformers", "torch", "safetensors")
    with tempfile.TemporaryDirectory() as name:
        out = quantised(args, Path(name))
        tensors, size = tensors_of(out)
        from gptqmodel import BACKEND, GPTQModel

        model = GPTQModel.load(str(out), device="cpu", backend=BACKEND.TORCH).model
        # It loads in 16 bits; in 32 the logits show the rounding alone.
        logits = torch_logits(model.float(), args.tokens)
    report(args.out, library, version, tensors, logits=logits, size=size)


if __name__ == "__main__":
    main()
