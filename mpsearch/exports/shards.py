"""Safetensors files written tensor by tensor: what is in which file, and a file that is never whole in memory."""

from __future__ import annotations

import json
from collections.abc import Callable, Iterator, Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from typing import BinaryIO

import torch
from torch import Tensor

from mpsearch.exports.ct_tensors import Spec

#: Bytes of tensors in one file, unless one tensor alone is larger.
LIMIT = 5 * 10**9
INDEX = "model.safetensors.index.json"

_CODES: Mapping[torch.dtype, str] = {
    torch.float64: "F64", torch.float32: "F32", torch.float16: "F16", torch.bfloat16: "BF16",
    torch.float8_e4m3fn: "F8_E4M3", torch.int64: "I64", torch.int32: "I32", torch.int16: "I16", torch.int8: "I8",
    torch.uint8: "U8", torch.bool: "BOOL",
}  # fmt: skip


@dataclass(frozen=True)
class Item:
    """Tensors that are made together.

    Attributes:
        specs: what they are.
        make: makes them, by name.
    """

    specs: Sequence[Spec]
    make: Callable[[], Mapping[str, Tensor]]

    @property
    def bytes(self) -> int:
        """Size of all tensors."""
        return sum(spec.bytes for spec in self.specs)


def shards(items: Sequence[Item], limit: int = LIMIT) -> dict[str, list[Item]]:
    """Divide items among files, in their order: file name -> items.

    >>> one = Item([Spec("a", torch.uint8, (60,))], dict)
    >>> list(shards([one, one, one], limit=120))
    ['model-00001-of-00002.safetensors', 'model-00002-of-00002.safetensors']
    """
    parts: list[list[Item]] = [[]]
    size = 0
    for item in items:
        if parts[-1] and size + item.bytes > limit:
            parts.append([])
            size = 0
        parts[-1].append(item)
        size += item.bytes
    if len(parts) == 1:
        return {"model.safetensors": parts[0]}
    return {f"model-{i:05d}-of-{len(parts):05d}.safetensors": part for i, part in enumerate(parts, start=1)}


def index(parts: Mapping[str, Sequence[Item]]) -> str:
    """Return the index of several files, as Hugging Face writes it."""
    total = sum(item.bytes for part in parts.values() for item in part)
    places = {spec.name: name for name, part in parts.items() for item in part for spec in item.specs}
    return json.dumps({"metadata": {"total_size": total}, "weight_map": places}, indent=2) + "\n"


def write_shard(stream: BinaryIO, items: Sequence[Item], metadata: Mapping[str, str]) -> None:
    """Write a safetensors file; while an item is written the next is made, so that two are in memory.

    Tensors of wide numbers stand first, so that each begins at a multiple of its own width, as readers expect.

    Args:
        stream: a new file.
        items: what it holds.
        metadata: texts for the header.
    """
    wanted = sorted((spec for item in items for spec in item.specs), key=lambda spec: (-spec.dtype.itemsize, spec.name))
    places: dict[str, int] = {}
    header: dict[str, object] = {"__metadata__": dict(metadata)}
    end = 0
    for spec in wanted:
        places[spec.name], start, end = end, end, end + spec.bytes
        header[spec.name] = {
            "dtype": _CODES[spec.dtype], "shape": list(spec.shape), "data_offsets": [start, end]
        }  # fmt: skip
    text = json.dumps(header, separators=(",", ":")).encode()
    text += b" " * (-len(text) % 8)
    stream.write(len(text).to_bytes(8, "little") + text)
    for item, made in _ahead(items):
        for spec in item.specs:
            value = made[spec.name]
            if value.dtype != spec.dtype or tuple(value.shape) != spec.shape:
                raise ValueError(f"'{spec.name}' is {value.dtype} {tuple(value.shape)}, announced as {spec}")
            stream.seek(8 + len(text) + places[spec.name])
            stream.write(memoryview(value.contiguous().reshape(-1).view(torch.uint8).numpy()))  # type: ignore[arg-type]


def _ahead(items: Sequence[Item]) -> Iterator[tuple[Item, Mapping[str, Tensor]]]:
    """Make the items one by one in another thread, one ahead of what is taken."""
    with ThreadPoolExecutor(1) as maker:
        coming = maker.submit(items[0].make) if items else None
        for item, following in zip(items, [*items[1:], None], strict=True):
            assert coming is not None
            made = coming.result()
            coming = maker.submit(following.make) if following else None
            yield item, made
