"""A causal language model without weights, what it is made of, and loading a part of it."""

from __future__ import annotations

import ctypes
import os
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from mpsearch.errors import InputError
from mpsearch.layer import Layer
from mpsearch.model.model import Batch
from mpsearch.model.pieces import Piece
from mpsearch.model.tensor_files import build_empty, names_in_file


class EmptyModel:
    """A model whose parameters have no data until a part is loaded.

    Attributes:
        module: the model.
        name: name of its folder.
        blocks: the longest of its outermost lists of modules.
        around: the modules outside of the blocks that hold tensors; none lies within another.
        tied: whether two of them hold the same tensor.
    """

    def __init__(self, folder: str | Path) -> None:
        """Build the model of a folder (errors as `build_empty` and `names_in_file`).

        Raises:
            InputError: it has no blocks, or holds tensors in places that belong to no part (E506).
        """
        self.name = Path(folder).resolve().name
        self.module, self._files = build_empty(folder)
        self._in_file = names_in_file(self.module, self._files)
        self._paths: dict[nn.Module, str] = {module: path for path, module in self.module.named_modules()}
        self._use_float_buffers()
        self.blocks = self._find_blocks()
        self.around = self._find_around()
        self.tied = self._check_sharing()
        names = [name for name, _ in self._places()]
        self._order = {name: i for i, name in enumerate(names)}

    def path(self, module: nn.Module) -> str:
        """Name of a module."""
        return self._paths[module]

    def order(self, tensor: str) -> int:
        """Place of a parameter or buffer in the model's order."""
        return self._order[tensor]

    def size(self, modules: Sequence[nn.Module]) -> int:
        """Bytes of the weights of modules in float32."""
        return 4 * sum({id(x): x.numel() for module in modules for x in module.parameters()}.values())

    def holds(self, modules: Sequence[nn.Module], layer: Layer) -> bool:
        """Whether modules hold a layer."""
        name = layer.whole.name
        return any(name == path or name.startswith(f"{path}.") for path in map(self.path, modules))

    @contextmanager
    def loaded(
        self, modules: Sequence[nn.Module], run: Callable[[Batch], Tensor], blocks: Sequence[nn.Module]
    ) -> Iterator[Piece]:
        """Hold the weights of modules in memory meanwhile, as a model in which they have their own names.

        Args:
            modules: what to load, in the model's order.
            run: gives the output of the part for a batch.
            blocks: which of them are blocks.
        """
        before: list[tuple[dict[str, Any], str, Any]] = []
        real: dict[int, Any] = {}
        try:
            for module in modules:
                for path, part in module.named_modules(prefix=self.path(module)):
                    for table in (part._parameters, part._buffers):
                        for name, value in table.items():
                            full = f"{path}.{name}" if path else name
                            if value is None or full not in self._in_file:
                                continue
                            before.append((table, name, value))
                            if id(value) not in real:
                                read = self._files.read(self._in_file[full]).to(value.dtype)
                                real[id(value)] = nn.Parameter(read) if isinstance(value, nn.Parameter) else read
                            table[name] = real[id(value)]
            real.clear()
            piece = Piece(self._skeleton(modules), self.name, run, blocks)
            try:
                yield piece
            finally:
                piece.close()
        finally:
            for table, name, value in before:
                table[name] = value
            _return_freed_memory()

    def _skeleton(self, modules: Sequence[nn.Module]) -> nn.Module:
        """A module that holds only these, under the names that they have in the whole model."""
        root = nn.Module()
        for module in modules:
            parts = self.path(module).split(".")
            place, path = root, ""
            for part in parts[:-1]:
                path = f"{path}.{part}" if path else part
                if part not in place._modules:
                    kind = type(self.module.get_submodule(path))
                    # Estimators look for blocks in lists of modules.
                    plain = next((x for x in (nn.ModuleList, nn.Sequential) if issubclass(kind, x)), nn.Module)
                    place.add_module(part, plain())
                place = place.get_submodule(part)
            place.add_module(parts[-1], module)
        return root

    def _use_float_buffers(self) -> None:
        for module in self.module.modules():
            for name in module._non_persistent_buffers_set:
                value = module._buffers.get(name)
                if value is not None and value.is_floating_point():
                    module._buffers[name] = value.float()

    def _find_blocks(self) -> list[nn.Module]:
        inner = {x for x in self.module.modules() if isinstance(x, nn.ModuleList) for x in list(x.modules())[1:]}
        lists = [list(x) for x in self.module.modules() if isinstance(x, nn.ModuleList) and x not in inner]
        blocks = max(lists, key=len, default=[])
        if len(set(blocks)) < 2 or len(set(blocks)) < len(blocks):
            raise self.unusual("it has no list of blocks that run one after the other")
        return blocks

    def _find_around(self) -> list[nn.Module]:
        inside = {x for block in self.blocks for x in block.modules()}
        outer = {m for m in self.module.modules() if any(x in inside for x in m.modules())} - inside
        found: list[nn.Module] = []
        for module in self.module.modules():
            if module in inside or not self._own(module) or any(module in set(x.modules()) for x in found):
                continue
            if module in outer:
                raise self.unusual(f"'{self.path(module)}' holds weights of its own beside its blocks")
            found.append(module)
        return found

    def _own(self, module: nn.Module) -> bool:
        path = self.path(module)
        names = (*module._parameters, *module._buffers)
        return any((f"{path}.{name}" if path else name) in self._in_file for name in names)

    def _check_sharing(self) -> bool:
        owner: dict[int, set[int]] = {}
        places = [*self.blocks, *self.around]
        for i, module in enumerate(places):
            for value in module.parameters():
                owner.setdefault(id(value), set()).add(i)
        shared = [parts for parts in owner.values() if len(parts) > 1]
        if any(min(parts) < len(self.blocks) for parts in shared):
            raise self.unusual("its blocks share weights")
        return bool(shared)

    def _places(self) -> Iterator[tuple[str, Tensor]]:
        for path, module in self.module.named_modules():
            for name, value in (*module._parameters.items(), *module._buffers.items()):
                if value is not None:
                    yield (f"{path}.{name}" if path else name), value

    def unusual(self, reason: str) -> InputError:
        """Say why this model cannot be streamed."""
        return InputError("E506", f"'{self.name}' cannot be streamed: {reason}", advice="score it in memory")

    def called_first(self, batch: Batch) -> list[nn.Module]:
        """The modules around the blocks that run before the first of them.

        They compute shapes only.
        """
        called: list[nn.Module] = []
        own = {module: module.__dict__.get("forward") for module in self.around}

        def shapes_of(module: nn.Module) -> Callable[..., Any]:
            forward = module.forward

            def answer(*args: Any, **kwargs: Any) -> Any:
                called.append(module)
                given = [x.to("meta") if isinstance(x, Tensor) else x for x in args]
                named = {name: x.to("meta") if isinstance(x, Tensor) else x for name, x in kwargs.items()}
                output = forward(*given, **named)
                return torch.zeros_like(output, device="cpu") if isinstance(output, Tensor) else output

            return answer

        def stop(*_: Any) -> None:
            raise _FirstBlock

        handle = self.blocks[0].register_forward_pre_hook(stop)
        try:
            for module in self.around:
                module.forward = shapes_of(module)
            with torch.no_grad():
                self.module(**batch, use_cache=False)
            raise self.unusual("its first block is not called")
        except _FirstBlock:
            return [module for module in self.around if module in called]
        finally:
            handle.remove()
            for module, forward in own.items():
                module.__dict__.pop("forward", None)
                if forward is not None:
                    module.forward = forward


def _return_freed_memory() -> None:
    """Give freed memory back to the system where the C library would keep it for later (glibc)."""
    trim = getattr(ctypes.CDLL(None), "malloc_trim", None) if os.name == "posix" else None
    if trim is not None:
        trim(0)


class _FirstBlock(Exception):
    """The first block was reached."""
