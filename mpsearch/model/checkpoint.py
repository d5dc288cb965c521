"""Model folders before anything is loaded: which files, whether they are whole and safe, and their digest."""

from __future__ import annotations

import hashlib
import json
import math
import struct
from pathlib import Path
from typing import Any

from mpsearch.bundled import model_folder
from mpsearch.errors import InputError, UnsafeError, did_you_mean

_HEADER_LIMIT = 100_000_000
#: Most axes of a tensor.
_AXES = 64
_PICKLES = ("*.bin", "*.pt", "*.pth", "*.ckpt", "*.pkl", "*.pickle")
_SIZES = {
    "F64": 8, "I64": 8, "U64": 8, "F32": 4, "I32": 4, "U32": 4, "F16": 2, "BF16": 2, "I16": 2, "U16": 2,
    "I8": 1, "U8": 1, "BOOL": 1, "F8_E4M3": 1, "F8_E5M2": 1,
}  # fmt: skip
_STOREABLE = {"F64", "F32", "F16", "BF16"}


def find_folder(source: str | Path) -> Path:
    """Return the folder of a model, also of a bundled one, or explain what is there instead.

    Raises:
        InputError: no such folder (E101), or no config.json in it (E406).
    """
    folder = model_folder(source)
    if not folder.exists():
        around = [p.name for p in folder.parent.iterdir() if p.is_dir()] if folder.parent.is_dir() else []
        raise InputError(
            "E101",
            f"model folder '{source}' not found{did_you_mean(folder.name, around)}",
            advice="give a Hugging Face folder",
        )
    if not folder.is_dir():
        if folder.suffix in {pattern[1:] for pattern in _PICKLES}:
            raise _pickle(folder)
        raise InputError("E406", f"'{source}' is a file; a model is a folder with config.json and safetensors files")
    if not (folder / "config.json").is_file():
        raise InputError("E406", f"'{source}' holds no config.json: not a Hugging Face model folder")
    return folder


def weight_files(folder: Path) -> tuple[Path, ...]:
    """List the safetensors files of a model folder, each checked to be whole.

    Raises:
        UnsafeError: only pickle files are there (E801).
        InputError: a shard is missing (E401), or a file is an LFS pointer (E402), a web page (E403), cut
            (E404) or broken (E405), or there are no weights at all (E407).
    """
    index = folder / "model.safetensors.index.json"
    if index.is_file():
        names = sorted(set(_read_json(index)["weight_map"].values()))
        for name in names:
            if Path(name).name != name:
                raise UnsafeError("E803", f"{index.name} names the shard '{name}', which leaves the folder: refused")
            if not (folder / name).is_file():
                raise InputError("E401", f"index names {len(names)} shards, {name} is missing", where=str(folder))
        files = tuple(folder / name for name in names)
    else:
        files = tuple(sorted(folder.glob("*.safetensors")))
    if not files:
        pickles = sorted(path for pattern in _PICKLES for path in folder.glob(pattern))
        if pickles:
            raise _pickle(pickles[0])
        raise InputError("E407", f"'{folder}' holds no safetensors file", advice="download the weights")
    for file in files:
        read_header(file)
    return files


def _pickle(file: Path) -> UnsafeError:
    return UnsafeError(
        "E801",
        f"{file.name} is a pickle: opening it can run code, so it is not opened",
        where=str(file),
        advice="get the safetensors file, or convert it in a sandbox",
    )


def read_header(file: Path) -> dict[str, Any]:
    """Read and check the header of a safetensors file.

    Returns:
        Tensor name -> ``dtype``, ``shape`` and ``data_offsets``.

    Raises:
        InputError: an LFS pointer (E402), a web page (E403), a cut file (E404), a broken header (E405).
    """
    size = file.stat().st_size
    with file.open("rb") as stream:
        start = stream.read(64)
        if start.startswith(b"version https://git-lfs"):
            raise InputError(
                "E402", f"{file.name} is a Git LFS pointer ({size} bytes), not weights", advice="git lfs pull"
            )
        if start.lstrip()[:9].lower() in (b"<!doctype", b"<html>") or start.lstrip()[:5].lower() == b"<html":
            raise InputError("E403", f"{file.name} is a web page: the download failed", advice="download it again")
        if size < 8:
            raise InputError("E404", f"{file.name} is cut: {size} bytes", advice="download it again")
        (length,) = struct.unpack("<Q", start[:8])
        if length > _HEADER_LIMIT:
            raise InputError("E405", f"{file.name}: header says {length} bytes: broken or hostile file")
        if 8 + length > size:
            raise InputError(
                "E404", f"{file.name} is cut: header of {length} bytes, {size - 8} there", advice="download it again"
            )
        stream.seek(8)
        try:
            header = json.loads(stream.read(length))
            tensors = {name: entry for name, entry in header.items() if name != "__metadata__"}
            spans = sorted((_entry(name, entry) for name, entry in tensors.items()), key=lambda span: span[:3])
        except (ValueError, KeyError, TypeError, AttributeError, RecursionError) as error:
            raise InputError("E405", f"{file.name}: the header is not readable ({type(error).__name__})") from error
    _check_spans(file, spans, size - 8 - length)
    return tensors


def _entry(name: str, entry: Any) -> tuple[int, int, str, dict[str, Any]]:
    """First and last byte of a tensor, after a look at every field that is used."""
    shape, offsets = entry["shape"], entry["data_offsets"]
    numbers = [*shape, *offsets]
    whole = all(isinstance(n, int) and not isinstance(n, bool) and 0 <= n < 2**63 for n in numbers)
    if not (isinstance(shape, list) and isinstance(entry["dtype"], str) and whole and len(shape) <= _AXES):
        raise ValueError(name)
    first, last = offsets
    if last < first:
        raise ValueError(name)
    return first, last, name, entry


def _check_spans(file: Path, spans: list[tuple[int, int, str, dict[str, Any]]], there: int) -> None:
    end = 0
    previous = ""
    for first, last, name, entry in spans:
        if first < end:
            raise InputError(
                "E405",
                f"{file.name}: tensors '{previous}' and '{name}' overlap at byte {first}: broken or hostile file",
            )
        count = math.prod(entry["shape"])
        if entry["dtype"] in _SIZES and count * _SIZES[entry["dtype"]] != last - first:
            raise InputError(
                "E405", f"{file.name}: tensor '{name}' has {last - first} bytes, its shape needs another number"
            )
        end, previous = last, name
    if end > there:
        raise InputError("E404", f"{file.name} is cut: {end} bytes promised, {there} there", advice="download it again")


def check_stored_types(files: tuple[Path, ...]) -> None:
    """Refuse checkpoints that are quantised already.

    Raises:
        InputError: a weight is stored as integers or 8-bit floats (E411).
    """
    for file in files:
        for name, entry in read_header(file).items():
            if name.endswith("weight") and entry["dtype"] not in _STOREABLE:
                raise InputError(
                    "E411", f"'{name}' holds {entry['dtype']} weights", advice="start from the 16- or 32-bit checkpoint"
                )


def read_config(folder: Path, remote_code: bool = False) -> dict[str, Any]:
    """Read config.json and refuse what would run foreign code or is quantised already.

    Raises:
        UnsafeError: the model wants to run code of its own (E802).
        InputError: not JSON (E406), or a quantised checkpoint (E411).
    """
    config = _read_json(folder / "config.json")
    if _wants_code(config) and not remote_code:
        raise UnsafeError(
            "E802",
            f"'{folder}' wants to run its own code (auto_map); not run",
            advice="read the code, then pass --trust-remote-code",
        )
    if "quantization_config" in config:
        raise InputError("E411", f"'{folder}' is quantised already", advice="start from the 16- or 32-bit checkpoint")
    return config


def _wants_code(value: Any, depth: int = 0) -> bool:
    if depth > 64 or not isinstance(value, dict):
        return False
    return "auto_map" in value or any(_wants_code(item, depth + 1) for item in value.values())


def _read_json(file: Path) -> dict[str, Any]:
    try:
        value = json.loads(file.read_text(encoding="utf-8"))
    except (OSError, ValueError, RecursionError) as error:
        raise InputError("E406", f"'{file}' is not readable JSON ({type(error).__name__})") from error
    if not isinstance(value, dict):
        raise InputError("E406", f"'{file}' is not a JSON object")
    return value


def folder_digest(folder: Path) -> str:
    """Return the SHA-256 over the names and contents of all that makes the model: config, weights, tokenizer."""
    total = hashlib.sha256()
    extra = [
        folder / "config.json",
        folder / "tokenizer.json",
        folder / "tokenizer_config.json",
        folder / "tokenizer.model",
    ]
    for file in (*weight_files(folder), *(path for path in extra if path.is_file())):
        with file.open("rb") as stream:
            content = hashlib.file_digest(stream, "sha256").hexdigest()
        total.update(f"{file.name}\0{content}\n".encode())
    return total.hexdigest()
