"""Proof of an AutoRound configuration: its script quantises the model, and what was packed is read back."""

import tempfile
from pathlib import Path

from _common import (
    arguments,
    gptq_tensors,
    needs,
    plan_of,
    report,
    run_script,
    stored_tensors,
    torch_logits,
    with_tokenizer,
)


def main():
    """Quantise the model and read it back."""
    args = arguments()
    library, version = needs("auto-round", "transformers", "torch", "safetensors")
    columns = {tensor["name"]: tensor["shape"][-1] for tensor in plan_of(args.export)["tensors"]}
    with tempfile.TemporaryDirectory() as name:
        made = Path(name) / "quantised"
        run_script(args, with_tokenizer(args.model, Path(name)), made)
        # It writes a folder in the folder, named after the model.
        out = next(made.rglob("config.json")).parent
        held, size = stored_tensors(out)
        tensors = gptq_tensors(held, lambda module: columns[f"{module}.weight"])
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
