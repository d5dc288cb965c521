"""Names users type, and the code behind them, loaded on first use.

Plug-ins join through entry points of the groups ``mpsearch.estimators``, ``mpsearch.targets``, ``mpsearch.engines``,
``mpsearch.solvers``, ``mpsearch.searchers``, ``mpsearch.evaluators``, ``mpsearch.exporters``,
``mpsearch.executors`` and ``mpsearch.formats``.
"""

from __future__ import annotations

import importlib
import inspect
from collections.abc import Mapping
from functools import lru_cache
from importlib.metadata import entry_points
from typing import Any

from mpsearch.errors import InputError, did_you_mean

BUILT_IN: Mapping[str, Mapping[str, str]] = {
    "estimators": {
        "weight_mse": "mpsearch.sensitivity.weight_mse:WeightMse",
        "output_mse": "mpsearch.sensitivity.output_mse:OutputMse",
        "hessian_trace": "mpsearch.sensitivity.hessian_trace:HessianTrace",
        "hessian_eigenvalue": "mpsearch.sensitivity.hessian_eigenvalue:HessianEigenvalue",
        "hessian_vector": "mpsearch.sensitivity.hessian_vector:HessianVector",
        "gauss_newton": "mpsearch.sensitivity.gauss_newton:GaussNewton",
        "grad_loss_change": "mpsearch.sensitivity.grad_loss_change:GradLossChange",
        "grad_x_weight": "mpsearch.sensitivity.grad_x_weight:GradTimesWeight",
        "fisher": "mpsearch.sensitivity.fisher:Fisher",
        "divergence": "mpsearch.sensitivity.divergence:Divergence",
        "activation_spikes": "mpsearch.sensitivity.activation_spikes:ActivationSpikes",
        "lim": "mpsearch.sensitivity.lim:Lim",
        "zd": "mpsearch.sensitivity.zd:Zd",
        "activation_entropy": "mpsearch.sensitivity.activation_entropy:ActivationEntropy",
        "weight_outlier_ratio": "mpsearch.sensitivity.weight_outlier_ratio:WeightOutlierRatio",
        "expert_usage": "mpsearch.sensitivity.expert_usage:ExpertUsage",
        "block_cosine": "mpsearch.sensitivity.block_cosine:BlockCosine",
        "group_range": "mpsearch.sensitivity.group_range:GroupRange",
        "nncf": "mpsearch.sensitivity.nncf:Nncf",
        "activation_pca": "mpsearch.sensitivity.activation_pca:ActivationPca",
        "weight_kl": "mpsearch.sensitivity.weight_kl:WeightKl",
        "isolated_loss": "mpsearch.sensitivity.isolated_loss:IsolatedLoss",
        "layer_hessian": "mpsearch.sensitivity.layer_hessian:LayerHessian",
        "block_mse": "mpsearch.sensitivity.block_mse:BlockMse",
        "linearity": "mpsearch.sensitivity.linearity:Linearity",
        "noise": "mpsearch.sensitivity.noise:Noise",
        "lrp": "mpsearch.sensitivity.lrp:Lrp",
        "combine": "mpsearch.sensitivity.combine:Combine",
    },
    "interactions": {"pairwise": "mpsearch.sensitivity.pairwise:Pairwise"},
    "formats": {
        "plain": "mpsearch.formats.plain:Plain",
        "int": "mpsearch.formats.integer:Integer",
        "nf": "mpsearch.formats.normal_float:NormalFloat",
        "ternary": "mpsearch.formats.ternary:Ternary",
        "codebook": "mpsearch.formats.codebook:Codebook",
        "fp": "mpsearch.formats.floating:FloatingPoint",
        "mx": "mpsearch.formats.mx:Microscaling",
        "nvfp4": "mpsearch.formats.nvfp4:NvFp4",
        "kv": "mpsearch.formats.kv_cache:KvCache",
        "gguf": "mpsearch.formats.gguf_types:GgufType",
    },
    "activations": {"activation": "mpsearch.formats.activation:Activation"},
    "targets": {
        "bytes": "mpsearch.hardware.bytes:Bytes",
        "bytes@gptq": "mpsearch.hardware.bytes:gptq",
        "bytes@awq": "mpsearch.hardware.bytes:awq",
        "bytes@compressed-tensors": "mpsearch.hardware.bytes:compressed_tensors",
        "bytes@gguf": "mpsearch.hardware.bytes:gguf",
        "bytes@onnxruntime": "mpsearch.hardware.bytes:onnxruntime",
        "bops": "mpsearch.hardware.bops:Bops",
        "kv": "mpsearch.hardware.kv_bytes:KvBytes",
        "memory": "mpsearch.hardware.memory:Memory",
        "latency": "mpsearch.hardware.latency:Latency",
        "traffic": "mpsearch.hardware.traffic:Traffic",
        "energy": "mpsearch.hardware.traffic:Energy",
    },
    "engines": {
        "onnxruntime": "mpsearch.hardware.engines.onnxruntime:OnnxRuntime",
        "torch": "mpsearch.hardware.engines.torch_kernels:Torch",
        "openvino": "mpsearch.hardware.engines.openvino:OpenVino",
        "torchao-compile": "mpsearch.hardware.engines.torchao_compile:TorchAoCompile",
        "llama.cpp": "mpsearch.hardware.engines.llama_cpp:LlamaCpp",
        "roofline": "mpsearch.hardware.engines.roofline:Roofline",
        "table": "mpsearch.hardware.engines.table:Table",
    },
    "wholes": {"onnxruntime": "mpsearch.hardware.whole:OnnxRuntimeWholes"},
    "solvers": {
        "ilp": "mpsearch.solvers.ilp:Ilp",
        "greedy": "mpsearch.solvers.greedy:Greedy",
        "lagrangian": "mpsearch.solvers.lagrangian:Lagrangian",
        "mckp": "mpsearch.solvers.mckp:Mckp",
        "dp": "mpsearch.solvers.dp:DynamicProgramme",
        "pareto": "mpsearch.solvers.pareto:Pareto",
        "quadratic": "mpsearch.solvers.quadratic:Quadratic",
        "closed_form": "mpsearch.solvers.closed_form:ClosedForm",
        "threshold": "mpsearch.solvers.threshold:Threshold",
        "top_k": "mpsearch.solvers.top_k:TopK",
        "double_pointer": "mpsearch.solvers.double_pointer:DoublePointer",
        "random": "mpsearch.solvers.random_fill:RandomFill",
    },
    "searchers": {
        "refine": "mpsearch.solvers.refine:Refine",
        "evolve": "mpsearch.solvers.evolve:Evolve",
        "optuna": "mpsearch.solvers.optuna_search:Optuna",
        "surrogate": "mpsearch.solvers.surrogate:Surrogate",
        "bisection": "mpsearch.solvers.bisection:Bisection",
    },
    "evaluators": {"kl": "mpsearch.evaluate.kl:Kl"},
    "exporters": {
        "native": "mpsearch.exports.native:Native",
        "llama.cpp": "mpsearch.exports.llama_cpp:LlamaCpp",
        "compressed-tensors": "mpsearch.exports.compressed_tensors:CompressedTensors",
        "llm-compressor": "mpsearch.exports.llm_compressor:LlmCompressor",
        "gguf": "mpsearch.exports.gguf_file:GgufFile",
        "autoround": "mpsearch.exports.autoround:AutoRound",
        "gptqmodel": "mpsearch.exports.gptqmodel:GptqModel",
        "torchao": "mpsearch.exports.torchao:TorchAo",
        "bitsandbytes": "mpsearch.exports.bitsandbytes:BitsAndBytes",
        "hqq": "mpsearch.exports.hqq:Hqq",
        "transformers-fp8": "mpsearch.exports.transformers_fp8:TransformersFp8",
        "exllamav3": "mpsearch.exports.exllamav3:ExLlamaV3",
        "vllm-online": "mpsearch.exports.vllm_online:VllmOnline",
        "onnxruntime": "mpsearch.exports.onnxruntime:OnnxRuntimeExport",
        "nncf": "mpsearch.exports.nncf:Nncf",
        "mlx": "mpsearch.exports.mlx:Mlx",
        "modelopt": "mpsearch.exports.modelopt:ModelOpt",
        "aimet": "mpsearch.exports.aimet:Aimet",
        "mct": "mpsearch.exports.mct:Mct",
        "quark": "mpsearch.exports.quark:Quark",
        "mixllm": "mpsearch.exports.mixllm:MixLlm",
    },
    "executors": {
        "local": "mpsearch.executors.local:local",
        "ray": "mpsearch.executors.ray:RayWorkers",
        "database": "mpsearch.executors.inline:Nobody",
    },
    "work": {"workbench": "mpsearch.evaluate.workbench:Work"},
    "reports": {"html": "mpsearch.web.report:report_html"},
    "stores": {"sql": "mpsearch.storage.store:SqlStore"},
    "upkeep": {
        "copying": "mpsearch.storage.copying:Copying",
        "check": "mpsearch.storage.inspecting:check",
        "stats": "mpsearch.storage.inspecting:stats",
        "backup": "mpsearch.storage.inspecting:backup",
        "look": "mpsearch.storage.inspecting:look",
        "journal": "mpsearch.storage.inspecting:journal",
        "gc": "mpsearch.storage.gc:collect",
        "rescue": "mpsearch.storage.rescue:rescue",
        "same": "mpsearch.storage.place:same",
    },
}


def names(kind: str) -> tuple[str, ...]:
    """List the names of a kind, built-ins first."""
    plugged = (point.name for point in entry_points(group=f"mpsearch.{kind}"))
    return tuple(dict.fromkeys([*BUILT_IN[kind], *plugged]))


def load(kind: str, name: str) -> Any:
    """Return the class behind a name.

    Raises:
        InputError: no such name (E107).

    >>> load("solvers", "greedy").__name__
    'Greedy'
    """
    path = BUILT_IN[kind].get(str(name))
    if path is not None:
        module, _, attribute = path.partition(":")
        return getattr(importlib.import_module(module), attribute)
    for point in entry_points(group=f"mpsearch.{kind}"):
        if point.name == name:
            try:
                return point.load()
            except (ImportError, AttributeError) as error:
                raise InputError(
                    "E107",
                    f"{kind}: the plug-in '{name}' ({point.value}) does not load: {error}",
                    advice="uninstall it",
                ) from error
    known = names(kind)
    raise InputError("E107", f"{kind}: no '{name}'{did_you_mean(name, known)}", advice=f"there is {', '.join(known)}")


def settings(kind: str, name: str) -> tuple[str, ...]:
    """List the settings that a component takes."""
    return tuple(_parameters(load(kind, name)))


@lru_cache(maxsize=256)
def _parameters(component: Any) -> Mapping[str, inspect.Parameter]:
    return inspect.signature(component).parameters


def make(kind: str, name: str, **values: Any) -> Any:
    """Load a component and set it up.

    Raises:
        InputError: no such name (E107) or no such setting (E107).
    """
    component = load(kind, name)
    known = _parameters(component)
    for setting in values:
        if setting not in known:
            raise InputError(
                "E107",
                f"{kind}: '{name}' has no setting '{setting}'{did_you_mean(setting, known)}",
                advice=f"settings: {', '.join(known) or 'none'}",
            )
    needed = [
        p.name for p in known.values() if p.default is p.empty and p.kind not in (p.VAR_POSITIONAL, p.VAR_KEYWORD)
    ]
    if missing := [setting for setting in needed if setting not in values]:
        raise InputError("E107", f"{kind}: '{name}' needs the setting '{missing[0]}'")
    if kind in ("solvers", "searchers"):
        _check_types(kind, name, component, values)
    return component(**values)


_KINDS: Mapping[str, tuple[tuple[type, ...], str]] = {
    "int": ((int,), "a whole number"),
    "float": ((int, float), "a number"),
    "bool": ((bool,), "true or false"),
    "str": ((str,), "a text"),
}


def _check_types(kind: str, name: str, component: Any, values: Mapping[str, Any]) -> None:
    """Refuse settings of the wrong kind, of fields that say which they take (E107)."""
    annotations = getattr(component, "__annotations__", {}) if inspect.isclass(component) else {}
    for setting, value in values.items():
        types, what = _KINDS.get(str(annotations.get(setting, "")), ((), ""))
        number = isinstance(value, bool) and "bool" not in str(annotations.get(setting))
        if types and (not isinstance(value, types) or number or value != value):
            raise InputError("E107", f"{kind}: '{name}': {setting} is {value!r}", advice=f"give {what}")
