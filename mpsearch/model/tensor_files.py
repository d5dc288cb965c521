"""Checkpoints read one tensor at a time, and models built without weights."""

from __future__ import annotations

import math
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from mpsearch.errors import InputError
from mpsearch.model.checkpoint import check_stored_types, find_folder, read_config, read_header, weight_files

_TYPES = {
    "F64": torch.float64, "F32": torch.float32, "F16": torch.float16, "BF16": torch.bfloat16,
    "I64": torch.int64, "I32": torch.int32, "I16": torch.int16, "I8": torch.int8, "U8": torch.uint8,
    "BOOL": torch.bool,
}  # fmt: skip


class TensorFiles:
    """The tensors of a model folder, read on demand.

    Files are opened for each tensor and read into memory of their own: a mapped file would count towards the process
    page by page until it were all there.
    """

    def __init__(self, folder: Path) -> None:
        """List the tensors of a folder, whose files are checked to be whole (E401 to E407, E411, E801)."""
        self.folder = folder
        files = weight_files(folder)
        check_stored_types(files)
        self._place: dict[str, tuple[Path, int, dict[str, Any]]] = {}
        for file in files:
            with file.open("rb") as stream:
                start = 8 + int.from_bytes(stream.read(8), "little")
            for name, entry in read_header(file).items():
                self._place.setdefault(name, (file, start + entry["data_offsets"][0], entry))

    def __contains__(self, name: str) -> bool:
        return name in self._place

    def names(self) -> tuple[str, ...]:
        """Names of all tensors, in the order of the files."""
        return tuple(self._place)

    def dtype(self, name: str) -> torch.dtype:
        """Number type of a tensor as it is stored (E411 for one that is not supported)."""
        kind = self._place[name][2]["dtype"]
        if kind not in _TYPES:
            raise InputError("E411", f"'{name}' holds {kind} numbers", advice="start from the 16- or 32-bit checkpoint")
        return _TYPES[kind]

    def shape(self, name: str) -> tuple[int, ...]:
        """Shape of a tensor."""
        return tuple(self._place[name][2]["shape"])

    def read(self, name: str) -> Tensor:
        """Read one tensor, in the number type that it is stored in."""
        file, start, entry = self._place[name]
        dtype = self.dtype(name)
        raw = torch.empty(math.prod(entry["shape"]) * dtype.itemsize, dtype=torch.uint8)
        with file.open("rb", buffering=0) as stream:
            stream.seek(start)
            view = memoryview(raw.numpy())  # type: ignore[arg-type]
            while len(view):
                count = stream.readinto(view)
                if not count:
                    raise InputError("E404", f"{file.name} was cut while it was read", advice="download it again")
                view = view[count:]
        return raw.view(dtype).reshape(entry["shape"])


@contextmanager
def _without_storage() -> Iterator[None]:
    """Let modules be built with parameters on the meta device; buffers, which are small, are real."""
    original = nn.Module.register_parameter

    def register(self: nn.Module, name: str, param: nn.Parameter | None) -> None:
        if param is not None and not param.is_meta:
            param = nn.Parameter(param.to("meta"), requires_grad=param.requires_grad)
        original(self, name, param)

    nn.Module.register_parameter = register  # type: ignore[method-assign]
    try:
        yield
    finally:
        nn.Module.register_parameter = original  # type: ignore[method-assign]


def build_empty(source: str | Path) -> tuple[nn.Module, TensorFiles]:
    """Build the causal language model of a folder without its weights.

    Returns:
        The module in evaluation mode, parameters on the meta device in the number type that loading would give
        them, and the files with the weights.

    Raises:
        InputError: as `load_model`, or parts that transformers keeps in another number type than the rest (E506).
    """
    folder = find_folder(source)
    architecture = (read_config(folder).get("architectures") or ["?"])[0]
    files = TensorFiles(folder)
    import transformers

    transformers.utils.logging.set_verbosity_error()  # type: ignore[no-untyped-call]
    try:
        config: Any = transformers.AutoConfig.from_pretrained(folder, local_files_only=True)
        dtype = getattr(config, "dtype", None) or _first_float(files)
        with _without_storage():
            auto: Any = transformers.AutoModelForCausalLM
            module = auto.from_config(config, dtype=dtype)
    except (ValueError, OSError, KeyError) as error:
        raise InputError(
            "E408",
            f"'{folder}' ({architecture}) does not load as a causal language model",
            because=str(error).splitlines()[0],
        ) from error
    strict = getattr(module, "_keep_in_fp32_modules_strict", None)
    if (strict and dtype != torch.float32) or (
        getattr(module, "_keep_in_fp32_modules", None) and dtype == torch.float16
    ):
        raise InputError(
            "E506", f"'{folder}' cannot be streamed: {architecture} keeps parts in float32", advice="score it in memory"
        )
    return module.eval().requires_grad_(True), files


def _first_float(files: TensorFiles) -> torch.dtype:
    found = (files.dtype(name) for name in files.names())
    return next((dtype for dtype in found if dtype.is_floating_point), torch.float32)


def names_in_file(module: nn.Module, files: TensorFiles) -> dict[str, str]:
    """Where each parameter and stored buffer of a module is in its files: name in the module -> name of the tensor.

    A checkpoint may leave out the name of the inner model, and all but one name of what is shared.

    Raises:
        InputError: a tensor is missing, or has another shape (E408); or two names of one parameter hold different
            tensors (E506).
    """
    prefix = f"{getattr(module, 'base_model_prefix', '')}."
    aliases: dict[int, list[str]] = {}
    shapes: dict[int, tuple[int, ...]] = {}
    for name, value in module.state_dict(keep_vars=True).items():
        aliases.setdefault(id(value), []).append(name)
        shapes[id(value)] = tuple(value.shape)
    found: dict[str, str] = {}
    for key, names in aliases.items():
        spelled = (x for name in names for x in (name, name.removeprefix(prefix)))
        there = list(dict.fromkeys(x for x in spelled if x in files))
        if not there:
            raise InputError(
                "E408",
                f"'{files.folder}' lacks the tensor '{names[0]}'",
                because="streaming reads tensors by the names that the model has for them, one by one",
                advice="score it in memory, where transformers renames and merges tensors as it loads them",
            )
        first = files.read(there[0]) if len(there) > 1 else None
        if first is not None and not all(torch.equal(first, files.read(other)) for other in there[1:]):
            raise InputError(
                "E506",
                f"'{files.folder}' cannot be streamed: '{there[0]}' and '{there[1]}' differ, and the config ties them",
                advice="set tie_word_embeddings to false in config.json",
            )
        shape = files.shape(there[0])
        if shape != shapes[key]:
            raise InputError("E408", f"'{there[0]}' has the shape {shape}, the model needs {shapes[key]}")
        found |= dict.fromkeys(names, there[0])
    return found
