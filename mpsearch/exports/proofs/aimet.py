"""Proof of an AIMET export: its own script simulates the plan, and the encodings that it writes are read back."""

import importlib.util
import json
import sys

from _common import arguments, levels, needs, report


def main():
    """Simulate, write encodings and read them back."""
    args = arguments()
    library, version = needs("aimet-torch", "transformers", "torch")
    import torch

    spec = importlib.util.spec_from_file_location("run", args.export / "run.py")
    run = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(run)
    kept = []
    made = run.quantised

    def quantised(folder):
        kept.append(made(folder))
        return kept[0]

    run.quantised = quantised
    sys.argv = ["run.py", "--model", str(args.model), "--out", str(args.out.parent / "aimet")]
    run.main()
    written = json.loads((args.out.parent / "aimet" / "encodings.json").read_text(encoding="utf-8"))["param_encodings"]
    model, tensors = kept[0].model, {}
    for name, part in model.model.named_modules():
        weight = getattr(part, "weight", None)
        if not isinstance(weight, torch.Tensor):
            continue
        of = written.get(f"model.{name}.weight") or written.get(f"{name}.weight")
        if of is None:
            # It computes in fp32; numbers that 16 bits hold are those of a weight that was left alone.
            as_stored = any(bool((weight == weight.to(kind).float()).all()) for kind in (torch.bfloat16, torch.float16))
            tensors[f"{name}.weight"] = {"bits": 16 if as_stored else 32}
            continue
        rows, columns = weight.shape
        quantizer = part.param_quantizers["weight"]
        count = len(of) // rows
        scale = quantizer.get_scale().detach().reshape(rows, -1, 1)
        codes = (quantizer(weight).detach().reshape(rows, scale.shape[1], -1) / scale).round()
        tensors[f"{name}.weight"] = {
            "bits": of[0]["bitwidth"],
            "group": 0 if count == 1 else columns // count,
            "symmetric": str(of[0]["is_symmetric"]) == "True",
            "levels": max(levels(row) for row in (codes - codes.amin(-1, keepdim=True)).flatten(0, 1).numpy()),
        }
    with torch.no_grad():
        given = torch.tensor(json.loads(args.tokens.read_text(encoding="utf-8")))
        logits = model(given).float()
    notes = ["encodings of the legacy JSON were read; no runtime was run"]
    report(args.out, library, version, tensors, logits=logits, notes=notes)


if __name__ == "__main__":
    main()
