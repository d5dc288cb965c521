"""AMD Quark: a configuration with one exactly named rule for each layer, and a script that quantises with it."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any, ClassVar

from mpsearch.exports.config_export import json_text, modules, weights_of
from mpsearch.exports.script_exporter import ScriptExporter, shell_pattern
from mpsearch.format import Format
from mpsearch.plan import BitPlan

#: File of settings: what ``QConfig.from_dict`` reads.
SETTINGS = "quark_config.json"
_NOTHING: Mapping[str, Any] = dict.fromkeys(("input_tensors", "output_tensors", "weight", "bias", "target_device"))
_MX = {"mxfp4": "fp4", "mxfp6-e2m3": "fp6_e2m3", "mxfp6-e3m2": "fp6_e3m2"}

_SCRIPT = '''\
def quantised(folder, tokens=None):
    """Load a model and quantise it in memory.

    Args:
        folder: the original model.
        tokens: (sequences, positions) of token numbers, which give the range of static inputs.
    """
    import torch
    from quark.torch import ModelQuantizer
    from quark.torch.quantization.config.config import QConfig
    from transformers import AutoModelForCausalLM

    rules = read("quark_config.json")
    model = AutoModelForCausalLM.from_pretrained(folder, dtype="auto").eval()
    quantizer = ModelQuantizer(QConfig.from_dict(rules))
    data = [torch.tensor([sequence]) for sequence in tokens or ([0, 1],)]
    model = quantizer.freeze(quantizer.quantize_model(model, torch.utils.data.DataLoader(data, batch_size=None)))
    import fnmatch

    on = {name for name, part in model.named_modules() if getattr(part, "_weight_quantizer", None) is not None}
    names = rules["layer_quant_config"]
    wrong = [name for name in on if not any(fnmatch.fnmatchcase(name, pattern) for pattern in names)]
    lost = [pattern for pattern in names if not any(fnmatch.fnmatchcase(name, pattern) for name in on)]
    if wrong or lost:
        sys.exit(f"not as planned: {(wrong + lost)[:20]}")
    return model


def main():
    """Quantise, and write Quark's own checkpoint."""
    args = arguments()
    import torch
    from quark.torch import export_safetensors

    rules = read("quark_config.json")["layer_quant_config"].values()
    if any(rule["input_tensors"] and not rule["input_tensors"]["is_dynamic"] for rule in rules) and not args.tokens:
        sys.exit("inputs have fixed scales, which are found on data: give lists of token numbers, --tokens FILE")
    tokens = json.loads(Path(args.tokens).read_text(encoding="utf-8")) if args.tokens else None
    with torch.no_grad():
        export_safetensors(quantised(args.model, tokens), args.out, pack_method="order")
'''


class Quark(ScriptExporter):
    """Writes ``quark_config.json``, which Quark's ``QConfig.from_dict`` reads, and ``run.py``.

    >>> from mpsearch.layer import Layer, Layers
    >>> layers = Layers((Layer("fc", "linear", (8, 64)),))
    >>> Quark().refuses(BitPlan(layers, {"fc": Format.parse("int4-g64")}))
    ['fc: int4-g64 is not held by AMD Quark; allowed int{4,8}-g*-full, ...']
    """

    target: ClassVar[str] = "quark"
    script: ClassVar[str] = _SCRIPT
    options: ClassVar[tuple[str, ...]] = ("tokens",)

    def data(self, plan: BitPlan) -> Mapping[str, str]:
        """Return the configuration: a rule for each layer, and those that are left alone among the excluded."""
        rules: dict[str, Any] = {}
        excluded: list[str] = []
        for layer in weights_of(plan):
            fmt = plan.formats[layer.name]
            for name in map(shell_pattern, modules(layer)):
                if fmt.weight.family == "plain":
                    excluded.append(name)
                else:
                    rules[name] = {**_NOTHING, **parameters(fmt)}
        body = {
            "global_quant_config": _NOTHING,
            "layer_type_quant_config": {},
            "layer_quant_config": rules,
            "kv_cache_quant_config": {},
            "exclude": excluded,
            "algo_config": None,
            "softmax_quant_spec": None,
            "quant_method": "quark",
            "quant_mode": "eager_mode",
            "version": self.able.tested,
        }
        return {SETTINGS: json_text(body)}


def parameters(fmt: Format) -> dict[str, Any]:
    """What Quark takes for the weight of a format, and for its input where that is rounded.

    >>> parameters(Format.parse("int4-g64-full"))["weight"]["dtype"]
    'int4'
    """
    found = {"weight": _spec(fmt.weight)}
    if fmt.activation:
        found["input_tensors"] = _tensor("fp8_e4m3", "per_tensor", "PerTensorMinMaxObserver")
    return found


def _spec(weight: Any) -> dict[str, Any]:
    if str(weight) in _MX:
        return _tensor(
            _MX[str(weight)], "per_group", "PerBlockMXObserver", ch_axis=-1, group_size=32, scale_format="e8m0",
            scale_calculation_mode="floor",
        )  # fmt: skip
    if weight.family == "fp":
        if weight.granularity == "tensor":
            return _tensor("fp8_e4m3", "per_tensor", "PerTensorMinMaxObserver")
        return _tensor("fp8_e4m3", "per_channel", "PerChannelMinMaxObserver", ch_axis=0, scale_type="float")
    dtype = f"{'u' if weight.asymmetric else ''}int{weight.bits}"
    settings = {"symmetric": not weight.asymmetric, "scale_type": "float"}
    if weight.granularity == "channel":
        return _tensor(dtype, "per_channel", "PerChannelMinMaxObserver", ch_axis=0, **settings)
    return _tensor(dtype, "per_group", "PerGroupMinMaxObserver", ch_axis=-1, group_size=weight.group, **settings)


def _tensor(dtype: str, scheme: str, observer: str, **settings: Any) -> dict[str, Any]:
    plain = {"ch_axis": None, "group_size": None, "symmetric": True, "round_method": "half_even", "scale_type": None}
    return {
        "dtype": dtype, "is_dynamic": False, "qscheme": scheme, "observer_cls": observer, **plain,
        "scale_format": None, "scale_calculation_mode": None, "mx_element_dtype": None, **settings,
    }  # fmt: skip
