"""Proof of a list of tensor types: ``llama-quantize`` makes the file by it, and the gguf package reads the types back.

``LLAMA_QUANTIZE`` names the program, when it is not on the path. The GGUF file that it starts from is the one that
``LLAMA_BASE_GGUF`` names, or is made by the ``convert_hf_to_gguf.py`` that ``LLAMA_CONVERT`` names.
"""

import os
import re
import shutil
import subprocess
import sys

from _common import MISSING, arguments, needs, plan_of, report

PLAIN = {"F32": "float32", "F16": "float16", "BF16": "bfloat16"}


def main():
    """Make the file and read it back."""
    args = arguments()
    needs("gguf")
    import gguf

    program = shutil.which(os.environ.get("LLAMA_QUANTIZE", "llama-quantize"))
    if program is None:
        missing("there is no llama-quantize: name it in LLAMA_QUANTIZE")
    base, made = base_file(args.model, args.out.parent), args.out.parent / "quantised.gguf"
    script = ["sh", str(args.export / "quantize.sh"), str(base), str(made)]
    done = run(script, {**os.environ, "LLAMA_QUANTIZE": program})
    said = done.stdout + done.stderr
    if done.returncode or not made.is_file():
        sys.exit(f"llama-quantize failed: {said.strip().splitlines()[-1:]}")
    notes = [line.strip() for line in said.splitlines() if "fallback" in line.lower()]
    version = re.search(r"(?:^version:|build =)\s*(.+)", said, re.MULTILINE)
    held = {tensor.name: tensor for tensor in gguf.GGUFReader(made).tensors}
    tensors = read_back(gguf, plan_of(args.export), held, args.export / "tensor-types.txt")
    report(
        args.out, "llama-quantize", version[1] if version else "of unknown version", tensors,
        size=sum(tensor.n_bytes for tensor in held.values()), notes=notes,
    )  # fmt: skip


def read_back(gguf, plan, held, listed):
    """Types of the plan's tensors; stops where one is not the listed one or has other bytes than the plan."""
    types = dict(re.findall(r"\^(\S+)\$=(\w+)", listed.read_text(encoding="utf-8").replace("\\.", ".")))
    wrong = [f"{name} is not {kind}" for name, kind in types.items() if type_of(held.get(name)) != kind.upper()]
    wrong += [
        f"{tensor.name} is {tensor.tensor_type.name} and not listed"
        for tensor in held.values()
        if tensor.name not in types and type_of(tensor) != "F32"
    ]
    names = name_map(gguf, held, plan)
    found = {}
    for each in [*plan["tensors"], *plan["kept"]]:
        tensor = held.get(names.get_name(each["name"], (".weight", ".bias")) or "")
        if tensor is None:
            continue
        kind = type_of(tensor)
        if "format" in each and tensor.n_bytes != each["bytes"]:
            wrong.append(f"{tensor.name} has {tensor.n_bytes} bytes, planned {each['bytes']}")
        bits = int(kind[-2:]) if kind in PLAIN else {"MXFP4": 4, "NVFP4": 4}.get(kind) or bits_of(kind)
        found[each["name"]] = {"bits": bits}
        if kind in PLAIN and len(tensor.shape) > 1:
            found[each["name"]]["dtype"] = PLAIN[kind]
    if wrong:
        sys.exit(f"{len(wrong)} tensors are not as planned: {'; '.join(wrong[:3])}")
    return found


def name_map(gguf, held, plan):
    """Names of the architecture whose table knows the plan's tensors."""
    blocks = 1 + max((int(name.split(".")[1]) for name in held if name.startswith("blk.")), default=0)
    wanted = [each["name"] for each in plan["tensors"]]
    tables = (gguf.get_tensor_name_map(each, blocks) for each in gguf.MODEL_ARCH)
    return max(tables, key=lambda t: sum((t.get_name(name, (".weight", ".bias")) or "") in held for name in wanted))


def bits_of(kind):
    """Bits of a code: those in the name, but ternary ones are two."""
    return 2 if kind.startswith("TQ") else int(re.search(r"\d", kind)[0])


def type_of(tensor):
    """Name of a tensor's type; empty for none."""
    return tensor.tensor_type.name if tensor is not None else ""


def base_file(model, folder):
    """The model as it was, in 32 bits."""
    if os.environ.get("LLAMA_BASE_GGUF"):
        return os.environ["LLAMA_BASE_GGUF"]
    if not os.environ.get("LLAMA_CONVERT"):
        missing("name a GGUF file of the model in LLAMA_BASE_GGUF, or convert_hf_to_gguf.py in LLAMA_CONVERT")
    made = folder / "base.gguf"
    done = run([sys.executable, os.environ["LLAMA_CONVERT"], "--outtype", "f32", "--outfile", str(made), str(model)])
    if done.returncode:
        sys.exit(f"convert_hf_to_gguf.py failed: {done.stderr.strip().splitlines()[-1:]}")
    return made


def run(command, environment=None):
    """Run a program and keep what it says."""
    return subprocess.run(
        command, capture_output=True, text=True, encoding="utf-8", errors="replace", check=False, env=environment
    )


def missing(what):
    """Leave as a proof does whose library is not installed."""
    sys.stderr.write(f"{what}\n")
    sys.exit(MISSING)


if __name__ == "__main__":
    main()
