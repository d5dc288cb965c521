"""Hidden states kept between the pieces of a model: in memory, or beyond a limit in files."""

from __future__ import annotations

import tempfile
from collections.abc import Callable, Hashable
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

#: Hidden states are kept in memory up to this many bytes, the rest in files.
KEEP_BYTES = 2**28


class ActivationStore:
    """Values of tensors, and of tuples and lists of them, under keys.

    What is over the limit lies in memory-mapped files of a temporary folder, which counts as file cache and not as
    memory of the process. `close` removes the folder.

    >>> store = ActivationStore(keep_bytes=0)
    >>> store["a"] = torch.ones(3)
    >>> store["a"].tolist(), store.spilled_bytes
    ([1.0, 1.0, 1.0], 12)
    >>> store.close()
    """

    def __init__(self, folder: Path | None = None, keep_bytes: int = KEEP_BYTES) -> None:
        """Keep values.

        Args:
            folder: where the temporary folder is made; the system's own place when left out.
            keep_bytes: how much is kept in memory.
        """
        self._folder = folder
        self._files: tempfile.TemporaryDirectory[str] | None = None
        self._values: dict[Hashable, Any] = {}
        self._sizes: dict[Hashable, int] = {}
        self._paths: dict[Hashable, list[Path]] = {}
        self._room = keep_bytes
        self._count = 0
        self.spilled_bytes = 0

    def __contains__(self, key: Hashable) -> bool:
        return key in self._values

    def __getitem__(self, key: Hashable) -> Any:
        return self._values[key]

    def __setitem__(self, key: Hashable, value: Any) -> None:
        self.drop(key)
        self._sizes[key] = 0
        self._paths[key] = []
        self._values[key] = mapped(value, lambda x: self._kept(key, x.detach()))

    def drop(self, key: Hashable) -> None:
        """Forget a value; none there is fine."""
        if key in self._values:
            self._room += self._sizes.pop(key)
            del self._values[key]
            for path in self._paths.pop(key):
                path.unlink()

    def drop_all(self, *start: Hashable) -> None:
        """Forget the values whose key is a tuple that starts so."""
        for key in list(self._values):
            if isinstance(key, tuple) and key[: len(start)] == start:
                self.drop(key)

    def close(self) -> None:
        """Forget everything and remove the files."""
        self._values.clear()
        self._sizes.clear()
        self._paths.clear()
        if self._files is not None:
            self._files.cleanup()
            self._files = None

    def _kept(self, key: Hashable, value: Tensor) -> Tensor:
        size = value.numel() * value.element_size()
        if size <= self._room or not size:
            self._room -= size
            self._sizes[key] += size
            return value.clone(memory_format=torch.contiguous_format)
        if self._files is None:
            if self._folder is not None:
                self._folder.mkdir(parents=True, exist_ok=True)
            self._files = tempfile.TemporaryDirectory(prefix="mpsearch-", dir=self._folder)
        path = Path(self._files.name) / str(self._count)
        self._count += 1
        self._paths[key].append(path)
        self.spilled_bytes += size
        file = torch.from_file(str(path), shared=True, size=value.numel(), dtype=value.dtype).reshape(value.shape)
        return file.copy_(value)


def mapped(value: Any, change: Callable[[Tensor], Any]) -> Any:
    """Change every tensor in a value of tensors, tuples, lists and other things, which stay."""
    if isinstance(value, Tensor):
        return change(value)
    if type(value) in (tuple, list):
        return type(value)(mapped(item, change) for item in value)
    return value
