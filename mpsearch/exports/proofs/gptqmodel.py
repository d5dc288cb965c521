"""Proof of a GPTQModel configuration: its script quantises the model, and what was packed is read back."""

import tempfile
from pathlib import Path

from _common import arguments, gptq_tensors, needs, report, run_script, stored_tensors, torch_logits, with_tokenizer


def main():
    """Quantise the model and read it back."""
    args = arguments()
    library, version = needs("gptqmodel", "transformers", "torch", "safetensors")
    with tempfile.TemporaryDirectory() as name:
        out = Path(name) / "quantised"
        run_script(args, with_tokenizer(args.model, Path(name)), out)
        held, size = stored_tensors(out)
        tensors = gptq_tensors(held, lambda module: len(held[f"{module}.g_idx"]))
        from gptqmodel import BACKEND, GPTQModel

        model = GPTQModel.load(str(out), device="cpu", backend=BACKEND.TORCH).model
        # It loads in 16 bits; in 32 the logits show the rounding alone.
        logits = torch_logits(model.float(), args.tokens)
    report(args.out, library, version, tensors, logits=logits, size=size)


if __name__ == "__main__":
    main()
