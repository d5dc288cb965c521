"""A model as the rest of the house sees it: a torch module in float32 with a loss and logits."""

from __future__ import annotations

import copy
import hashlib
from collections.abc import Callable, Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any, TypeVar

import torch
from torch import Tensor, nn
from torch.nn import functional

from mpsearch.errors import InputError
from mpsearch.layer import DTYPE_BITS, Layer, whole_name
from mpsearch.model.checkpoint import check_stored_types, find_folder, folder_digest, read_config, weight_files
from mpsearch.model.digest import function_digest, module_digest
from mpsearch.model.failures import told_plainly
from mpsearch.model.kv_cache import Formats, cached_logits

Batch = Any
Value = TypeVar("Value")
LossFunction = Callable[[nn.Module, Batch], Tensor]
LogitsFunction = Callable[[nn.Module, Batch], Tensor]


class Model:
    """A torch module in evaluation mode, computing in float32.

    Attributes:
        module: the module; its weights are never left changed.
        name: what the user called it.
        digest: content digest of the weights and the configuration.
        stored: parameter or buffer name -> number type it is stored in.
        architecture: class name of a Hugging Face model, else the module's class name.
        tokens: true when a batch holds ``input_ids`` and the model predicts the next token.
        vocabulary: number of tokens the model knows; 0 when it does not read tokens.
        context: longest sequence the model takes; 0 when not known.
        calibration: batches that rounding may be made from; empty when there are none.
        calibration_layers: layers that may ask for it.
        caches: what `logits` keeps keys and values in while a change is applied; empty for as they are.
    """

    def __init__(
        self,
        module: nn.Module,
        *,
        loss: LossFunction | None = None,
        logits: LogitsFunction | None = None,
        name: str = "",
        digest: str = "",
        tokens: bool = False,
        owned: bool = False,
    ) -> None:
        """Take a module.

        Args:
            module: the module. It is copied, so that the caller's own is never changed, unless ``owned``.
            loss: (module, batch) -> mean loss.
            logits: (module, batch) -> logits.
            name: what to call it.
            digest: content digest, when it is known; else made from weights and functions.
            tokens: whether it is a causal language model of Hugging Face's shape.
            owned: the caller has no further use for the module.
        """
        self.name = name or type(module).__name__
        self.stored = _stored_types(module)
        check_weights(module)
        self._functions = f"{function_digest(loss)}{function_digest(logits)}"
        self._given_digest = digest
        shared = _shared_storage(module)
        self.module = (module if owned else copy.deepcopy(module)).float().eval()
        _share_again(self.module, shared)
        # A caller may have frozen some for training; here gradients are only ever asked for, never applied.
        self.module.requires_grad_(True)
        self.digest = digest or self._content()
        self.architecture = type(module).__name__
        self.tokens = tokens
        config = getattr(module, "config", None)
        self.vocabulary = int(getattr(config, "vocab_size", 0) or 0)
        self.context = int(getattr(config, "max_position_embeddings", 0) or 0)
        self._loss = loss
        self._logits = logits
        self._memo: dict[str, tuple[object, Any]] = {}
        self.calibration: Sequence[Batch] = ()
        self.calibration_layers: Sequence[Layer] = ()
        self.caches: Formats = {}

    def _content(self) -> str:
        return hashlib.sha256(f"{module_digest(self.module)}{self.stored}{self._functions}".encode()).hexdigest()

    def refresh(self) -> None:
        """Forget what was remembered of weights that the caller has changed since.

        Only for modules that a caller gave; what was loaded from a folder is nobody's to change.
        """
        if not self._given_digest and (now := self._content()) != self.digest:
            self.digest = now
            self._memo.clear()

    def memo(self, kind: str, owner: object, make: Callable[[], Value]) -> Value:
        """Return what was made before for the same owner, or make it; one value of each kind is kept.

        Args:
            kind: what it is.
            owner: the object it was made from, compared by identity.
            make: makes it.
        """
        kept = self._memo.get(kind)
        if kept is None or kept[0] is not owner:
            self._memo.pop(kind, None)
            kept = (owner, make())
            self._memo[kind] = kept
        value: Value = kept[1]
        return value

    def forget(self) -> None:
        """Drop everything that was remembered to save work."""
        self._memo.clear()

    def logits(self, batch: Batch) -> Tensor:
        """Unnormalised log-probabilities: (sequences, positions, vocabulary), or (samples, classes).

        Raises:
            InputError: the model gives none (E508), or fails on the batch (E512), or gives something else (E514).
        """
        if self.has_logits:
            with told_plainly(self.name, batch):
                logits = self._run(batch)
            if not isinstance(logits, Tensor) or logits.ndim < 2 or not logits.is_floating_point():
                is_tensor = isinstance(logits, Tensor)
                given = f"{logits.dtype} of shape {tuple(logits.shape)}" if is_tensor else type(logits).__name__
                raise InputError(
                    "E514",
                    f"the logits of model '{self.name}' are {given}, not a float tensor (samples, …, classes)",
                    advice="return the tensor itself, with one row for each sample",
                )
            return logits
        raise InputError("E508", f"model '{self.name}' gives no logits", advice="wrap it: mp.wrap(module, logits=…)")

    def _run(self, batch: Batch) -> Tensor:
        if self._logits is not None:
            return self._logits(self.module, batch)
        if self.caches:
            return cached_logits(self.module, batch, self.caches)
        logits: Tensor = self.module(**batch, use_cache=False).logits
        return logits

    @property
    def has_logits(self) -> bool:
        """Whether `logits` can be called."""
        return self._logits is not None or self.tokens

    @property
    def has_loss(self) -> bool:
        """Whether `loss` can be called."""
        return self._loss is not None or self.tokens

    def loss(self, batch: Batch) -> Tensor:
        """Mean loss of a batch: nats per predicted token, or whatever the user's loss returns.

        Raises:
            InputError: the model has no loss (E506), fails on the batch (E512), or its function gives no single number
                (E514).
        """
        if self._loss is not None:
            with told_plainly(self.name, batch):
                loss = self._loss(self.module, batch)
            if not isinstance(loss, Tensor) or loss.numel() != 1:
                given = f"a tensor of shape {tuple(loss.shape)}" if isinstance(loss, Tensor) else type(loss).__name__
                raise InputError(
                    "E514",
                    f"the loss of model '{self.name}' is {given}, not one number",
                    because="models of Hugging Face give None without labels" if loss is None else "",
                    advice="return a tensor of one number, the mean over the batch",
                )
            if torch.is_grad_enabled() and not loss.requires_grad:
                raise InputError(
                    "E514",
                    f"the loss of model '{self.name}' has no gradient",
                    because="it was detached, or is made of whole numbers or constants",
                    advice="return what can be differentiated, or take an estimator without gradients",
                )
            return loss
        if self.tokens:
            logits = self.logits(batch)[:, :-1]
            return functional.cross_entropy(logits.flatten(0, 1), batch["input_ids"][:, 1:].flatten())
        raise InputError("E506", f"model '{self.name}' has no loss", advice="wrap it: mp.wrap(module, loss=…)")

    def predictions(self, batch: Batch) -> int:
        """How many predictions one sample of the batch makes: what the mean loss is over, per sample."""
        return int(batch["input_ids"].shape[1]) - 1 if self.tokens else 1

    def weight(self, layer_name: str) -> nn.Parameter:
        """The weight of a layer: that of the module of this name, or, of stacked experts, the parameter itself.

        Of a part of a layer it is the weight of the whole (`mpsearch.model.cut.part_of` takes the part of it).
        """
        holder, attribute = self._place(layer_name)
        parameter = getattr(holder, attribute)
        assert isinstance(parameter, nn.Parameter)
        return parameter

    def holder(self, layer_name: str) -> nn.Module:
        """The module that holds the weight of a layer."""
        return self._place(layer_name)[0]

    def _place(self, layer_name: str) -> tuple[nn.Module, str]:
        layer_name = whole_name(layer_name)
        path, _, attribute = layer_name.rpartition(".")
        outer = self.module.get_submodule(path)
        if isinstance(getattr(outer, attribute, None), nn.Parameter):
            return outer, attribute
        return self.module.get_submodule(layer_name), "weight"

    def calibrate(self, batches: Sequence[Batch], layers: Sequence[Layer] = ()) -> None:
        """Say what data rounding may be made from; what was made from other data is forgotten.

        Args:
            batches: the data.
            layers: all that may be asked for, so that one pass can serve many.
        """
        if batches is not self.calibration or layers is not self.calibration_layers:
            self.calibration, self.calibration_layers = batches, layers
            for kind in ("calibration", "deltas"):
                self._memo.pop(kind, None)


def _shared_storage(module: nn.Module) -> list[list[str]]:
    """Names of parameters that are one tensor in memory, though they may be several objects."""
    places: dict[tuple[Any, ...], list[str]] = {}
    for name, parameter in module.named_parameters(remove_duplicate=False):
        if not parameter.is_meta and parameter.numel():
            storage = parameter.untyped_storage().data_ptr()
            place = (storage, parameter.storage_offset(), tuple(parameter.shape), parameter.stride(), parameter.dtype)
            places.setdefault(place, []).append(name)
    return [names for names in places.values() if len(names) > 1]


def _share_again(module: nn.Module, groups: Sequence[Sequence[str]]) -> None:
    """Make each group of names one parameter again, for copying and casting part what was one tensor."""
    for first, *others in groups:
        parameter = module.get_parameter(first)
        for name in others:
            path, _, attribute = name.rpartition(".")
            setattr(module.get_submodule(path), attribute, parameter)


def _stored_types(module: nn.Module) -> dict[str, str]:
    stored = {}
    for name, parameter in module.named_parameters():
        dtype = str(parameter.dtype).removeprefix("torch.")
        if not parameter.dtype.is_floating_point or dtype not in DTYPE_BITS:
            raise InputError("E411", f"'{name}' holds {dtype} weights", advice="start from the 16- or 32-bit weights")
        stored[name] = dtype
    stored |= {name: str(buffer.dtype).removeprefix("torch.") for name, buffer in module.named_buffers()}
    return stored


def check_weights(module: nn.Module) -> None:
    """Refuse weights that are not there or not finite.

    Raises:
        InputError: meta weights (E410), or NaN or infinite ones (E412), with the first position.
    """
    empty = [name for name, parameter in module.named_parameters() if parameter.is_meta]
    if empty:
        raise InputError(
            "E410",
            f"{len(empty)} weights have no data (meta device), first '{empty[0]}'",
            because="the model was built empty and never filled",
        )
    for name, parameter in module.named_parameters():
        finite = torch.isfinite(parameter.detach())
        if not bool(finite.all()):
            bad = (~finite).nonzero()
            first = bad[0].tolist()
            value = parameter.detach()[tuple(first)].item()
            raise InputError(
                "E412",
                f"'{name}': {len(bad)} of {parameter.numel()} weights are not finite (first {first} = {value})",
                because="one of them spoils its whole row",
                advice="repair the checkpoint",
            )


def load_model(source: str | Path, *, trust_remote_code: bool = False) -> Model:
    """Load a causal language model from a Hugging Face folder, safetensors only, without running its code.

    Args:
        source: the folder.
        trust_remote_code: run the model's own code; only on the user's word.

    Raises:
        InputError: missing, cut, broken, quantised or unknown files (E101, E401 to E412).
        UnsafeError: pickles (E801) or foreign code (E802).
    """
    folder = find_folder(source)
    config = read_config(folder, trust_remote_code)
    check_stored_types(weight_files(folder))
    architecture = (config.get("architectures") or ["?"])[0]
    import transformers

    transformers.utils.logging.disable_progress_bar()  # type: ignore[no-untyped-call]
    transformers.utils.logging.set_verbosity_error()  # type: ignore[no-untyped-call]
    try:
        loaded: Any = transformers.AutoModelForCausalLM.from_pretrained(
            folder,
            dtype="auto",
            use_safetensors=True,
            local_files_only=True,
            trust_remote_code=trust_remote_code,
            output_loading_info=True,
        )
    except (ValueError, OSError, KeyError) as error:
        raise InputError(
            "E408",
            f"'{folder}' ({architecture}) does not load as a causal language model",
            because=str(error).splitlines()[0],
            advice="load it yourself and give the torch module: mp.wrap(module, loss=…, logits=…)",
        ) from error
    module, report = loaded
    missing = sorted(report["missing_keys"])
    if missing:
        raise InputError(
            "E408",
            f"'{folder}' ({architecture}) lacks {len(missing)} tensors of a causal language model: '{missing[0]}' …",
            because="they would be random numbers",
            advice="load what it is yourself and give the torch module: mp.wrap(module, loss=…, logits=…)",
        )
    return Model(module, name=folder.resolve().name, digest=folder_digest(folder), tokens=True, owned=True)


def as_model(model: Model | nn.Module | str | Path, **functions: Any) -> Model:
    """Turn what a user may give (a folder, a torch module, a `Model`) into a `Model`.

    Args:
        model: the model.
        functions: ``loss`` and ``logits`` for a torch module: each takes (module, batch).

    Raises:
        InputError: none of these (E409).
    """
    if isinstance(model, Model):
        model.refresh()
        return model
    if isinstance(model, nn.Module):
        is_causal = type(model).__name__.endswith(("ForCausalLM", "LMHeadModel")) and not functions
        return Model(model, tokens=is_causal, **functions)
    if isinstance(model, (str, Path)):
        return load_model(model)
    raise InputError("E409", f"a model is a folder, a torch module or mp.wrap(…), got {type(model).__name__}")


def samples_of(batch: Batch) -> Iterator[Batch]:
    """Split a batch into batches of one sample, along the first axis of every tensor in it.

    >>> [tuple(x.shape) for x in samples_of(torch.zeros(2, 3))]
    [(1, 3), (1, 3)]
    """
    for i in range(batch_size(batch)):
        yield _slice(batch, i)


def _slice(batch: Batch, i: int) -> Batch:
    if isinstance(batch, Tensor):
        return batch[i : i + 1]
    if isinstance(batch, Mapping):
        return {name: _slice(value, i) for name, value in batch.items()}
    if isinstance(batch, Sequence) and not isinstance(batch, str):
        return type(batch)(_slice(value, i) for value in batch)  # type: ignore[call-arg]
    return batch


def batch_size(batch: Batch) -> int:
    """Number of samples of a batch: the length of its first tensor."""
    if isinstance(batch, Tensor):
        return int(batch.shape[0])
    values = batch.values() if isinstance(batch, Mapping) else batch
    return batch_size(next(iter(values)))
