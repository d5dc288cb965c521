"""bitsandbytes: its one format, the modules to leave alone, and the script that quantises a model so."""

from __future__ import annotations

from collections import Counter
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any, ClassVar

from mpsearch.exports.config_export import ConfigExporter, json_text, modules, weights_of
from mpsearch.exports.skip_lists import skip_list
from mpsearch.exports.transformers_script import SCRIPT, script
from mpsearch.layer import Layer
from mpsearch.plan import BitPlan

CONFIG = "bitsandbytes.json"

_BODY = '''
def quantise(source, out, device):
    """Quantise every linear layer that is not left alone."""
    import bitsandbytes

    plan = settings("bitsandbytes.json")
    chosen = transformers.BitsAndBytesConfig(**plan["quantization_config"])
    model = load(source, device or "cpu", quantization_config=chosen)
    kinds = (bitsandbytes.nn.Linear4bit, bitsandbytes.nn.Linear8bitLt)
    quantised = {name for name, module in model.named_modules() if isinstance(module, kinds)}
    wanted = set(plan["quantised"])
    stop_if(wanted - quantised, "was not quantised")
    stop_if(quantised - wanted, "was quantised, which is not planned")
    model.save_pretrained(out)
'''


@dataclass(frozen=True)
class BitsAndBytes(ConfigExporter):
    """Writes ``bitsandbytes.json``, settings of a `BitsAndBytesConfig`, and ``run.py``, which quantises a model so.

    bitsandbytes has one format for a model, and a list of modules to leave alone. So a plan may have, beside layers in
    their stored type, one of nf4-b64, nf4-b64-dq256 and int8-channel@int8-token; anything else is refused.
    nf4 is rounded there as here, bit for bit. For int8 all inputs are rounded (``llm_int8_threshold=0``): with
    its default outliers would stay in 16 bits, which is not what was measured.

    Source: bitsandbytes 0.50, ``functional.py``; transformers 5.23, ``integrations/bitsandbytes.py``.

    >>> from mpsearch.format import Format
    >>> from mpsearch.layer import Layers
    >>> layers = Layers((Layer("a", "linear", (8, 64)), Layer("b", "linear", (8, 64))))
    >>> plan = BitPlan(layers, {"a": Format.parse("nf4-b64"), "b": Format.parse("nf4-b64-dq256")})
    >>> print(*BitsAndBytes().refuses(plan))
    b: bitsandbytes has one format for a model, and 1 layer is in nf4-b64; nf4-b64-dq256 cannot stand beside it
    """

    target: ClassVar[str] = "bitsandbytes"

    def refuses(self, plan: BitPlan) -> Sequence[str]:
        """Name every layer that bitsandbytes cannot hold, and those whose format is not that of most others."""
        found = list(super().refuses(plan))
        for layer in weights_of(plan):
            if "" in modules(layer):
                found.append(f"{layer.name}: transformers names modules inside a model, and the model has no name")
        held = {x.name: str(plan.formats[x.name]) for x in _quantised(plan) if not _named(found, x)}
        for name, text in held.items():
            first, count = Counter(held.values()).most_common(1)[0]
            if text != first:
                many = f"{count} layer{'s are' if count > 1 else ' is'} in {first}"
                found.append(
                    f"{name}: bitsandbytes has one format for a model, and {many}; {text} cannot stand beside it"
                )
        return found

    def texts(self, plan: BitPlan) -> Mapping[str, str]:
        """Return the settings and the script."""
        quantised = sorted(name for layer in _quantised(plan) for name in modules(layer))
        left = {name for layer in weights_of(plan) for name in modules(layer)} - set(quantised)
        # Weights that the plan keeps out are those of linear layers too, such as a router's.
        left |= {x.name.removesuffix(".weight") for x in plan.layers.excluded if _matrix(x.name, x.shape)}
        body = {"quantization_config": _settings(plan, skip_list(left, quantised)), "quantised": quantised}
        title = "Quantise a model with bitsandbytes as bitsandbytes.json says."
        return {CONFIG: json_text(body), SCRIPT: script(title, _BODY, self.source)}


def _settings(plan: BitPlan, skip: list[str]) -> dict[str, Any]:
    """Arguments of a `BitsAndBytesConfig`."""
    layers = _quantised(plan)
    text = str(plan.formats[layers[0].name]) if layers else "nf4-b64"
    if text.startswith("int8"):
        return {"load_in_8bit": True, "llm_int8_threshold": 0.0, "llm_int8_skip_modules": skip}
    return {
        "load_in_4bit": True,
        "bnb_4bit_quant_type": "nf4",
        "bnb_4bit_use_double_quant": text.endswith("-dq256"),
        # Left to itself it computes in float32 whatever the model is in.
        "bnb_4bit_compute_dtype": Counter(x.dtype for x in layers).most_common(1)[0][0] if layers else "float32",
        "llm_int8_skip_modules": skip,
    }


def _named(lines: Sequence[str], layer: Layer) -> bool:
    """Whether a layer is refused already."""
    return any(line.startswith(f"{layer.name}: ") for line in lines)


def _quantised(plan: BitPlan) -> list[Layer]:
    return [layer for layer in weights_of(plan) if plan.formats[layer.name].weight.family != "plain"]


def _matrix(name: str, shape: Sequence[int]) -> bool:
    return name.endswith(".weight") and len(shape) == 2
