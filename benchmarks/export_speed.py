"""Writing a 4-bit checkpoint: our compressed-tensors exporter beside llm-compressor's rounding to nearest.

``python -m benchmarks.export_speed --python PATH``, where PATH is an interpreter that has llm-compressor. A random
checkpoint of Llama's shape is written in bf16; each way reads that folder and writes a quantised one, in a process of
its own, on one thread, in turns. Seconds are without imports; memory is the highest resident size of the process, and
what it was after the imports. A plain copy of the file says what the disk takes. Only Linux tells the memory.
"""

from __future__ import annotations

import argparse
import json
import os
import shutil
import statistics
import subprocess
import sys
import tempfile
import time
from collections.abc import Mapping
from pathlib import Path

from benchmarks.streaming import write_checkpoint
from mpsearch.format import Format
from mpsearch.model.find import find_layers
from mpsearch.model.model import load_model
from mpsearch.plan import BitPlan
from mpsearch.registry import make

#: Llama's shape with 0.2 billion parameters.
SHAPE = {
    "vocab_size": 16000, "hidden_size": 1024, "intermediate_size": 2816, "num_hidden_layers": 13,
    "num_attention_heads": 16, "num_key_value_heads": 16,
}  # fmt: skip
FORMAT = "int4-g128-full"

_WATCH = """
import json, re, sys, time

def status(key):
    # Not getrusage: its peak is that of the parent where that was larger.
    return 1024 * int(re.search(key + r":\\s+(\\d+)", open("/proc/self/status").read()).group(1))

def told(seconds, before, cpu, **more):
    found = {"seconds": seconds, "cpu": time.process_time() - cpu, "peak": status("VmHWM"), "before": before}
    print("FOUND" + json.dumps({**found, **more}))
"""
_OURS = """
import torch
import mpsearch.exports.compressed_tensors
import transformers.models.llama.modeling_llama
from pathlib import Path
from mpsearch.plan import BitPlan
from mpsearch.registry import make

torch.set_num_threads(1)
folder, plan, out = sys.argv[1:4]
exporter, before = make("exporters", "compressed-tensors", source=folder), status("VmRSS")
cpu, start = time.process_time(), time.perf_counter()
exporter.write(BitPlan.load(plan), Path(out))
told(time.perf_counter() - start, before, cpu)
"""
_THEIRS = """
import torch
from llmcompressor import oneshot
from transformers import AutoModelForCausalLM

torch.set_num_threads(1)
folder, recipe, out = sys.argv[1:4]
before, cpu, start = status("VmRSS"), time.process_time(), time.perf_counter()
model = AutoModelForCausalLM.from_pretrained(folder, dtype="auto")
loaded = time.perf_counter()
oneshot(model=model, recipe=recipe, output_dir=out)
told(time.perf_counter() - start, before, cpu, load=loaded - start)
"""


def planned(folder: Path) -> BitPlan:
    """Linear layers of the blocks in 4 bits, embedding and head as they are."""
    model = load_model(folder)
    layers = find_layers(model)
    formats = {x.name: Format.parse(FORMAT if ".layers." in x.name else "bf16") for x in layers}
    return BitPlan(layers, formats, {"name": "large", "digest": model.digest})


def ran(python: str, script: str, *arguments: Path) -> Mapping[str, float]:
    """Run a script in a process of its own; what it tells."""
    done = subprocess.run(
        [python, "-c", _WATCH + script, *map(str, arguments)], capture_output=True, text=True, check=False,
        env={**os.environ, "OMP_NUM_THREADS": "1", "HF_HUB_OFFLINE": "1"},
    )  # fmt: skip
    told = [line for line in done.stdout.splitlines() if line.startswith("FOUND")]
    if done.returncode or not told:
        raise SystemExit(done.stderr[-2000:])
    found: dict[str, float] = json.loads(told[-1].removeprefix("FOUND"))
    return found


def copied(source: Path, target: Path) -> Mapping[str, float]:
    """Copy a file, and wait for the disk."""
    start = time.perf_counter()
    with source.open("rb") as reader, target.open("wb") as writer:
        shutil.copyfileobj(reader, writer, 1 << 24)
        writer.flush()
        os.fsync(writer.fileno())
    return {"seconds": time.perf_counter() - start}


def main() -> None:
    """Print a table."""
    parser = argparse.ArgumentParser(description=(__doc__ or "").splitlines()[0])
    parser.add_argument("--python", required=True, help="interpreter that has llm-compressor")
    parser.add_argument("--turns", type=int, default=3)
    parser.add_argument("--folder", type=Path, help="where 1.5 GB can be written; a temporary one without")
    args = parser.parse_args()
    from mpsearch.machine import fingerprint

    print(fingerprint())
    with tempfile.TemporaryDirectory(dir=args.folder) as name:
        place = Path(name)
        write_checkpoint(place / "model", SHAPE)
        plan = planned(place / "model")
        plan.save(place / "plan.json")
        make("exporters", "llm-compressor").write(plan, place / "recipe")
        size = (place / "model" / "model.safetensors").stat().st_size
        print(f"{size / 1e6:.0f} MB in bf16, {FORMAT} for every linear layer of the blocks, {args.turns} turns")
        found: dict[str, list[Mapping[str, float]]] = {}
        for turn in range(args.turns):
            outs = [place / f"{way}{turn}" for way in ("copy", "ours", "theirs")]
            found.setdefault("copy of the file", []).append(copied(place / "model" / "model.safetensors", outs[0]))
            ours = ran(sys.executable, _OURS, place / "model", place / "plan.json", outs[1])
            found.setdefault("compressed-tensors, ours", []).append(ours)
            theirs = ran(args.python, _THEIRS, place / "model", place / "recipe" / "recipe.yaml", outs[2])
            found.setdefault("llm-compressor, one shot", []).append(theirs)
            outs[0].unlink()
            for out in outs[1:]:
                shutil.rmtree(out)
        table(found)


def table(found: Mapping[str, list[Mapping[str, float]]]) -> None:
    """Print what was found."""
    print("| | median s | lowest to highest s | x copy | CPU s | peak, MB | after imports, MB | of it loading, s |")
    print("|---|---|---|---|---|---|---|---|")
    copy = statistics.median(turn["seconds"] for turn in found["copy of the file"])
    for name, turns in found.items():
        seconds = sorted(turn["seconds"] for turn in turns)
        middle = statistics.median(seconds)
        more = [
            f"{statistics.median(turn[key] for turn in turns) / unit:.{digits}f}" if key in turns[0] else ""
            for key, unit, digits in (("cpu", 1, 1), ("peak", 1e6, 0), ("before", 1e6, 0), ("load", 1, 1))
        ]
        spread = f"{seconds[0]:.2f} to {seconds[-1]:.2f}"
        print(f"| {name} | {middle:.2f} | {spread} | {middle / copy:.1f} | {' | '.join(more)} |")


if __name__ == "__main__":
    main()
