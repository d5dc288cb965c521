"""Scoring a model of 1.5 billion parameters block by block: time, and peak of the memory that is the process's own.

``python -m benchmarks.streaming``. A random checkpoint of Llama's shape is written tensor by tensor, in bf16, and each
estimator scores it in a process of its own, on one thread. Memory is RssAnon of /proc/self/status, read every 5 ms:
file cache does not count, for the system takes it back when it needs it. A second model, small enough to be loaded, is
scored in both ways. Only Linux tells the memory.
"""

from __future__ import annotations

import argparse
import json
import math
import struct
import subprocess
import sys
import tempfile
import threading
import time
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any

import torch

#: Llama's shape with 1.5 billion parameters.
LARGE = {
    "vocab_size": 32000, "hidden_size": 2048, "intermediate_size": 5632, "num_hidden_layers": 27,
    "num_attention_heads": 32, "num_key_value_heads": 32,
}  # fmt: skip
SMALL = {
    "vocab_size": 512, "hidden_size": 128, "intermediate_size": 384, "num_hidden_layers": 6,
    "num_attention_heads": 4, "num_key_value_heads": 2,
}  # fmt: skip
FORMATS = ["int4-g128", "int3-g128", "int8-channel"]
ESTIMATORS = ("weight_mse", "output_mse", "layer_hessian")
BACKWARD = ("fisher",)
GIGABYTE = 10**9


def tensors(shape: Mapping[str, int]) -> Iterator[tuple[str, tuple[int, ...]]]:
    width, inner = shape["hidden_size"], shape["intermediate_size"]
    keys = width * shape["num_key_value_heads"] // shape["num_attention_heads"]
    yield "model.embed_tokens.weight", (shape["vocab_size"], width)
    for i in range(shape["num_hidden_layers"]):
        for name, rows, columns in (("q", width, width), ("k", keys, width), ("v", keys, width), ("o", width, width)):
            yield f"model.layers.{i}.self_attn.{name}_proj.weight", (rows, columns)
        for name, rows, columns in (("gate", inner, width), ("up", inner, width), ("down", width, inner)):
            yield f"model.layers.{i}.mlp.{name}_proj.weight", (rows, columns)
        for name in ("input", "post_attention"):
            yield f"model.layers.{i}.{name}_layernorm.weight", (width,)
    yield "model.norm.weight", (width,)
    yield "lm_head.weight", (shape["vocab_size"], width)


def write_checkpoint(folder: Path, shape: Mapping[str, int]) -> int:
    """Write a random checkpoint, one tensor in memory at a time; return the number of its parameters."""
    folder.mkdir()
    config = {"architectures": ["LlamaForCausalLM"], "model_type": "llama", "dtype": "bfloat16", **shape}
    config |= {"max_position_embeddings": 2048, "tie_word_embeddings": False}
    (folder / "config.json").write_text(json.dumps(config))
    header: dict[str, Any] = {}
    end = 0
    for name, size in tensors(shape):
        start, end = end, end + 2 * math.prod(size)
        header[name] = {"dtype": "BF16", "shape": size, "data_offsets": [start, end]}
    text = json.dumps(header).encode()
    generator = torch.Generator().manual_seed(0)
    with (folder / "model.safetensors").open("wb") as stream:
        stream.write(struct.pack("<Q", len(text)) + text)
        for _, size in tensors(shape):
            value = torch.ones(size) if len(size) == 1 else torch.randn(size, generator=generator) * 0.02
            stream.write(memoryview(value.to(torch.bfloat16).view(torch.uint8).reshape(-1).numpy()))
    return end // 2


def batches(shape: Mapping[str, int], tokens: int) -> list[dict[str, torch.Tensor]]:
    generator = torch.Generator().manual_seed(1)
    return [{"input_ids": torch.randint(0, shape["vocab_size"], (1, tokens // 2), generator=generator)} for _ in "ab"]


class Peak:
    """Highest RssAnon of this process while the body runs."""

    def __enter__(self) -> Peak:
        self.bytes, self._over = 0, threading.Event()
        self._thread = threading.Thread(target=self._watch, daemon=True)
        self._thread.start()
        return self

    def __exit__(self, *_: object) -> None:
        self._over.set()
        self._thread.join()

    def _watch(self) -> None:
        while not self._over.is_set():
            lines = Path("/proc/self/status").read_text().splitlines()
            now = 1024 * next(int(line.split()[1]) for line in lines if line.startswith("RssAnon:"))
            self.bytes = max(self.bytes, now)
            time.sleep(0.005)


def one(folder: Path, estimator: str, tokens: int) -> dict[str, float]:
    """Score in this process, and say what it took."""
    import mpsearch as mp
    from mpsearch.model.streaming import Stream

    torch.set_num_threads(1)
    start = time.perf_counter()
    with Peak() as peak:
        table = mp.score(folder, batches(LARGE, tokens), FORMATS, estimator, streaming=True, spill=folder.parent)
    seconds = time.perf_counter() - start
    assert all(status == "ok" for row in table.status for status in row)
    return {"seconds": seconds, "peak": peak.bytes, "rows": len(table.layers), "largest": Stream(folder).largest}


def equal(folder: Path, estimator: str) -> bool:
    """Whether streamed scores are those in memory, bit for bit."""
    import mpsearch as mp

    data = batches(SMALL, 128)
    inside, outside = (mp.score(folder, data, FORMATS, estimator, streaming=streaming) for streaming in (False, True))
    same = inside.value.tobytes() == outside.value.tobytes() and inside.spread.tobytes() == outside.spread.tobytes()
    return same and inside.layers == outside.layers and inside.status == outside.status


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--tokens", type=int, default=512)
    parser.add_argument("--folder", type=Path, help="where 3 GB can be written; the system's temporary folder without")
    parser.add_argument("--backward", action="store_true", help="also an estimator that takes gradients")
    parser.add_argument("--one", help=argparse.SUPPRESS)
    args = parser.parse_args()
    if args.one:
        print(json.dumps(one(args.folder, args.one, args.tokens)))
        return
    from mpsearch.machine import fingerprint

    print(fingerprint())
    with tempfile.TemporaryDirectory(dir=args.folder) as place:
        large, small = Path(place) / "large", Path(place) / "small"
        count = write_checkpoint(large, LARGE)
        write_checkpoint(small, SMALL)
        print(f"{count / 1e9:.2f} billion parameters, {args.tokens} tokens in 2 batches, {', '.join(FORMATS)}")
        print("| estimator | s | peak, GB | bound: 3 x largest piece + 1 GB | small model, as in memory |")
        print("|---|---|---|---|---|")
        for estimator in (*ESTIMATORS, *(BACKWARD if args.backward else ())):
            command = [sys.executable, "-m", "benchmarks.streaming", "--one", estimator]
            command += ["--folder", str(large), "--tokens", str(args.tokens)]
            found = json.loads(subprocess.run(command, check=True, capture_output=True, text=True).stdout)
            bound = 3 * found["largest"] + GIGABYTE
            same = "bit for bit" if equal(small, estimator) else "differs"
            row = f"| {estimator} | {found['seconds']:.0f} | {found['peak'] / 1e9:.2f} | {bound / 1e9:.2f} | {same} |"
            print(row, flush=True)


if __name__ == "__main__":
    main()
