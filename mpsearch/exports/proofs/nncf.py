"""Proof of NNCF's passes: the export's own script runs, and OpenVINO reads back and runs what it saved."""

import json
import subprocess
import sys
from pathlib import Path

from _common import arguments, levels, needs, plan_of, report

#: Number type of OpenVINO -> bits of a code.
BITS = {
    "i8": 8, "u8": 8, "i4": 4, "u4": 4, "u3": 3, "u2": 2, "nf4": 4, "f4e2m1": 4, "f8e4m3": 8,
    "bf16": 16, "f16": 16, "f32": 32,
}  # fmt: skip


def numbers(core, constant):
    """The codes of a constant, whatever its number type, unpacked by OpenVINO itself."""
    import openvino as ov
    from openvino import opset13 as ops

    model = ov.Model([ops.convert(constant, "f32")], [])
    return core.compile_model(model, "CPU", {"INFERENCE_PRECISION_HINT": "f32"})([])[0]


def facts(core, constant, named):
    """What a weight is stored as."""
    kind, shape = constant.get_element_type().get_type_name(), list(constant.get_output_shape(0))
    name = constant.get_friendly_name()
    found = {"bits": BITS[kind], "dtype": kind, "bytes": constant.get_byte_size()}
    if BITS[kind] > 8:
        return found
    found["group"] = shape[2] if len(shape) == 3 else 0
    scales = named[f"{name}/scale"]
    found["bytes"] += scales.get_byte_size()
    if list(scales.get_output_shape(0))[:-1] != shape[:-1]:
        sys.exit(f"{name}: scales {list(scales.get_output_shape(0))} beside codes {shape}")
    zeros = named.get(f"{name}/zero_point")
    # One zero point for all is the middle of an unsigned type.
    found["symmetric"] = zeros is None or list(zeros.get_output_shape(0)) == []
    found["bytes"] += zeros.get_byte_size() if zeros is not None else 0
    if kind[0] in "iu":
        found["levels"] = levels(numbers(core, constant))
    return found


def logits_of(model, core, tokens):
    """Answers to the tokens, multiplied in fp32."""
    import numpy as np

    exact = {"INFERENCE_PRECISION_HINT": "f32", "DYNAMIC_QUANTIZATION_GROUP_SIZE": "0"}
    ready = core.compile_model(model, "CPU", exact)
    ids = np.array(tokens, np.int64)
    shapes = [given.get_partial_shape() for given in ready.inputs[1:]]
    empty = [np.zeros((len(ids), shape[1].get_length(), 0, shape[3].get_length()), np.float32) for shape in shapes]
    return ready([ids, *empty])[0]


def main():
    """Run the script and read back what it made."""
    args = arguments()
    library, version = needs("nncf", "openvino", "torch", "transformers")
    import openvino as ov

    out = Path(args.out).parent / "made"
    done = subprocess.run(
        [sys.executable, str(args.export / "run.py"), "--model", str(args.model), "--out", str(out)],
        capture_output=True, text=True, encoding="utf-8", errors="replace", check=False,
    )  # fmt: skip
    if done.returncode:
        sys.exit(f"run.py: {(done.stderr.strip().splitlines() or ['no reason given'])[-1]}")
    core = ov.Core()
    model = core.read_model(out / "openvino_model.xml")
    named = {node.get_friendly_name(): node for node in model.get_ops() if node.get_type_name() == "Constant"}
    tensors = {}
    for tensor in plan_of(args.export)["tensors"]:
        if constant := named.get(f"self.model.{tensor['name']}"):
            tensors[tensor["name"]] = facts(core, constant, named)
    size = sum(fact["bytes"] for fact in tensors.values())
    logits = logits_of(model, core, json.loads(args.tokens.read_text(encoding="utf-8")))
    report(args.out, library, version, tensors, logits=logits, size=size, notes=[f"OpenVINO {ov.__version__}"])


if __name__ == "__main__":
    main()
