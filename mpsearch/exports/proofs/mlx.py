"""Proof of an MLX export: its own script converts the model, MLX-LM loads the folder, and each layer is read back."""

import json
import subprocess
import sys
from pathlib import Path

from _common import arguments, levels, needs, report, unpack_words


def main():
    """Convert, load and read back."""
    args = arguments()
    library, version = needs("mlx", "mlx-lm")
    import mlx.core as mx
    import numpy as np
    from mlx_lm.utils import load_model

    out = args.out.parent / "mlx"
    done = subprocess.run(
        [sys.executable, str(args.export / "run.py"), "--model", str(args.model), "--out", str(out)],
        capture_output=True, text=True, check=False,
    )  # fmt: skip
    if done.returncode:
        sys.exit(f"run.py: {done.stderr.strip().splitlines()[-1:]}")
    model, _ = load_model(Path(out))
    tensors, size = {}, 0
    for path, module in model.named_modules():
        weight = getattr(module, "weight", None)
        if weight is None:
            continue
        if not hasattr(module, "scales"):
            bits = 8 * weight.dtype.size
            tensors[f"{path}.weight"] = {"bits": bits, "dtype": str(weight.dtype).rpartition(".")[2]}
            size += weight.nbytes
            continue
        columns = weight.shape[1] * 32 // module.bits
        codes = unpack_words(np.array(weight).view(np.int32), module.bits, columns)
        facts = {"bits": 32 * weight.shape[1] // columns, "levels": levels(codes)}
        if module.mode == "affine":
            facts |= {"group": columns // module.scales.shape[1], "symmetric": not module.biases.size}
        tensors[f"{path}.weight"] = facts
        size += sum(x.nbytes for x in (weight, module.scales, getattr(module, "biases", None)) if x is not None)
    given = mx.array(json.loads(args.tokens.read_text(encoding="utf-8")))
    logits = np.array(model(given).astype(mx.float32))
    report(args.out, library, version, tensors, logits=logits, size=size)


if __name__ == "__main__":
    main()
