"""The model that a plan is for, as an exporter of weights reads it: one tensor at a time."""

from __future__ import annotations

import json
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from mpsearch.errors import InputError
from mpsearch.layer import Excluded
from mpsearch.model.checkpoint import find_folder, folder_digest
from mpsearch.model.model import load_model
from mpsearch.model.tensor_files import TensorFiles, build_empty, names_in_file
from mpsearch.plan import BitPlan

_BESIDE = (
    "generation_config.json", "tokenizer*.json", "tokenizer*.model", "special_tokens_map.json", "added_tokens.json",
    "vocab.json", "vocab.txt", "merges.txt", "spiece.model", "*.tiktoken", "chat_template.json", "chat_template.jinja",
    "preprocessor_config.json", "processor_config.json",
)  # fmt: skip


class Original:
    """Weights, configuration and files of a model.

    Attributes:
        module: the model; without data when it is read from its folder.
        folder: where it is from; None for one that was made in Python.
    """

    def __init__(self, module: nn.Module, files: TensorFiles | None, folder: Path | None) -> None:
        self.module = module
        self.folder = folder
        self._files = files
        self._places = names_in_file(module, files) if files else {}

    @classmethod
    def of(cls, plan: BitPlan, model: Any, source: str) -> Original:
        """Return the model that was given, or the one in a folder.

        A folder is read tensor by tensor, with nothing loaded before. One whose tensors have other names than the model
        has for them (experts kept one by one), or of which parts stay in float32, is loaded as a whole.

        Args:
            plan: the plan.
            model: anything whose ``module`` is a torch module with the original weights, or None.
            source: the folder; empty for where ``model`` says that it was loaded from.

        Raises:
            InputError: neither was given (E101), the folder holds another model than the plan's (E302), or as
                `load_model`.
        """
        if model is not None:
            named = source or str(getattr(model.module, "name_or_path", ""))
            known = Path(named) if named and (Path(named) / "config.json").is_file() else None
            return cls(model.module, None, known)
        if not source:
            raise InputError(
                "E101",
                "the weights of the plan are written, and no model was given",
                advice="give the loaded model or its folder: source=…, on the command line --model",
            )
        folder = find_folder(source)
        if plan.model.get("digest", "") and plan.model["digest"] != folder_digest(folder):
            raise InputError("E302", f"the plan is for another model than '{source}'", advice="give the model's folder")
        try:
            return cls(*build_empty(folder), folder)
        except InputError as error:
            if error.code not in ("E408", "E506"):
                raise
        return cls(load_model(folder).module, None, folder)

    def check(self, plan: BitPlan) -> None:
        """Refuse a plan for another model (E302): a tensor is missing, or has another shape."""
        held: dict[str, Tensor] = dict(self.module.named_buffers(remove_duplicate=False))
        held.update(self.module.named_parameters(remove_duplicate=False))
        wanted = {layer.tensor: layer.shape for layer in plan.layers if layer.kind != "kv_cache"}
        for name, shape in {**wanted, **{kept.name: kept.shape for kept in plan.layers.excluded}}.items():
            if name not in held:
                raise InputError("E302", f"the plan has a tensor '{name}', the model has none: another model")
            if tuple(held[name].shape) != shape:
                raise InputError(
                    "E302", f"'{name}' has shape {tuple(held[name].shape)}, in the plan {shape}: another model"
                )

    def read(self, name: str) -> Tensor:
        """Return a tensor, in the number type that loading gives it; not to be changed."""
        path, _, attribute = name.rpartition(".")
        found: Tensor = getattr(self.module.get_submodule(path), attribute)
        if self._files is not None:
            return self._files.read(self._places[name]).to(found.dtype)
        return found.detach()

    def kept(self, kept: Excluded) -> Tensor:
        """Return a tensor that the plan leaves as it is, in its stored type.

        Raises:
            InputError: the model now holds numbers that the type cannot (E302).
        """
        tensor = self.read(kept.name)
        stored = tensor.to(getattr(torch, kept.dtype)).contiguous().cpu()
        if not bool(((stored.to(tensor.dtype) == tensor.cpu()) | tensor.isnan().cpu()).all()):
            raise InputError(
                "E302",
                f"'{kept.name}' holds numbers that {kept.dtype} cannot: the model was changed since it was loaded",
                advice="load the model again",
            )
        return stored

    def modules(self) -> Iterator[str]:
        """Yield the names of all linear layers and embeddings."""
        for name, module in self.module.named_modules(remove_duplicate=False):
            if isinstance(module, (nn.Linear, nn.Embedding)):
                yield name

    def config(self, plan: BitPlan) -> dict[str, Any]:
        """Return what ``config.json`` says of the model, with its class and number type.

        Raises:
            InputError: the model has no configuration of Hugging Face's (E302).
        """
        if self.folder is not None:
            config: dict[str, Any] = json.loads((self.folder / "config.json").read_text(encoding="utf-8"))
        elif hasattr(own := getattr(self.module, "config", None), "to_json_string"):
            config = json.loads(own.to_json_string())  # type: ignore[union-attr]
            # Computing in float32, the module says so; the plan knows what it was.
            config.pop("dtype", None)
        else:
            raise InputError("E302", "the model has no config: it is none of Hugging Face's")
        if not config.get("architectures"):
            config["architectures"] = [type(self.module).__name__]
        if not (config.get("dtype") or config.get("torch_dtype")):
            config["dtype"] = _main_type(plan)
        return config

    def beside(self) -> Mapping[str, Path]:
        """Files of the tokenizer and of generation, by name."""
        found = (path for pattern in _BESIDE for path in (self.folder.glob(pattern) if self.folder else ()))
        return {path.name: path for path in sorted(found) if path.is_file()}


def _main_type(plan: BitPlan) -> str:
    """Number type of most weights."""
    counts: dict[str, int] = {}
    for layer in plan.layers:
        counts[layer.dtype] = counts.get(layer.dtype, 0) + layer.weights
    return max(counts, key=lambda name: counts[name])
