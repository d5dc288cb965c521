"""Proof of an AutoRound configuration: its script quantises the model, and what was packed is read back."""

import json
import shutil
import subprocess
import sys
import tempfile
from pathlib import Path

from _common import arguments, levels, needs, plan_of, report, torch_logits, unpack_words


def with_tokenizer(model, scratch):
    """A folder of the model that has a tokenizer, which the library asks for even where it reads no text."""
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
    command = [sys.executable, str(args.export / "run.py"), "--model", str(with_tokenizer(args.model, scratch))]
    # What the script says last is the reason when it fails.
    if code := subprocess.run(
        [*command, "--out", str(scratch / "quantised")], check=False, stdout=sys.stderr
    ).returncode:
        sys.exit(code)
    return next((scratch / "quantised").rglob("config.json")).parent


def tensors_of(folder, columns_of):
    """What every tensor holds, and the bytes of all.

    Args:
        folder: a quantised model.
        columns_of: name of a tensor -> weights of an output channel.
    """
    from safetensors import safe_open

    held = {}
    for path in sorted(folder.glob("*.safetensors")):
        with safe_open(path, "pt") as file:
            held.update({name: file.get_tensor(name) for name in file.keys()})  # noqa: SIM118 - no mapping
    tensors = {}
    for name, tensor in held.items():
        module, _, part = name.rpartition(".")
        if part == "qweight":
            scales = held[f"{module}.scales"]
            columns, groups = columns_of[f"{module}.weight"], len(scales)
            bits = 32 * len(tensor) // columns
            zeros = unpack_words(held[f"{module}.qzeros"].numpy(), bits, scales.shape[1])
            tensors[f"{module}.weight"] = {
                "bits": bits,
                "group": 0 if groups == 1 else columns // groups,
                # Of an asymmetric layer all groups would have to have the middle as their zero point.
                "symmetric": set(zeros.flat) in ({2 ** (bits - 1) - 1}, {2 ** (bits - 1)}),
                "levels": levels(unpack_words(tensor.T.contiguous().numpy(), bits, columns)),
            }
        elif part not in ("scales", "qzeros"):
            dtype = str(tensor.dtype).removeprefix("torch.")
            tensors[name] = {"bits": 8 * tensor.element_size(), "dtype": dtype}
    return tensors, sum(tensor.numel() * tensor.element_size() for tensor in held.values())


def main():
    """Quantise the model and read it back."""
    args = arguments()
    library, version = needs("auto-round", "transformers", "torch", "safetensors")
    columns = {tensor["name"]: tensor["shape"][-1] for tensor in plan_of(args.export)["tensors"]}
    with tempfile.TemporaryDirectory() as name:
        out = quantised(args, Path(name))
        tensors, size = tensors_of(out, columns)
        from transformers import AutoModelForCausalLM

        notes, logits = [], None
        try:
            model = AutoModelForCausalLM.from_pretrained(out, device_map="cpu")
            logits, notes = torch_logits(model, args.tokens), [f"it computes in {model.dtype}".replace("torch.", "")]
        except Exception as error:  # its kernels' own limits are told, and what was read back stands
            notes = [f"transformers does not load it: {type(error).__name__}: {str(error)[:200]}"]
    report(args.out, library, version, tensors, logits=logits, size=size, notes=notes)


if __name__ == "__main__":
    main()
