"""HQQ: bits and group of every layer, and scripts that quantise a model so and load it again."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any, ClassVar

from mpsearch.exports.config_export import ConfigExporter, json_text, modules, weights_of
from mpsearch.exports.transformers_script import SCRIPT, script
from mpsearch.format import Format
from mpsearch.layer import Layer
from mpsearch.plan import BitPlan

CONFIG = "hqq.json"
LOADER = "load.py"
#: Bits -> groups that are packed together, of which the number of groups must be a multiple. 3 bits are padded.
PACKED: Mapping[int, int] = {4: 2, 2: 4}

_BODY = '''
def quantise(source, out, device):
    """Replace every layer by its exact name."""
    from hqq.core.quantize import BaseQuantizeConfig, HQQLinear
    from safetensors.torch import save_file

    plan = settings("hqq.json")["layers"]
    model = load(source, "")
    named = dict(model.named_modules())
    stop_if(set(plan) - set(named), "the model has no such module")
    for name, chosen in plan.items():
        parent, _, child = name.rpartition(".")
        weight = named[name].weight
        if model.get_input_embeddings().weight is weight:
            stop_if([name], "shares its weight with the embedding, which HQQ does not quantise")
        made = HQQLinear(
            named[name], BaseQuantizeConfig(axis=1, **chosen), compute_dtype=weight.dtype, device=device or "cpu"
        )
        setattr(model.get_submodule(parent), child, made)
    model.config.save_pretrained(out)
    shared, stored = set(), {}
    for name, tensor in model.state_dict().items():
        if tensor.data_ptr() not in shared or not tensor.numel():
            stored[name] = tensor.detach().cpu().contiguous().clone()
            shared.add(tensor.data_ptr())
    save_file(stored, str(Path(out) / "model.safetensors"), {"format": "pt"})
    for name in ("hqq.json", "load.py"):
        shutil.copyfile(HERE / name, Path(out) / name)
'''

_LOADER = '''"""Load a model that run.py saved: from load import load; model = load(FOLDER, DEVICE)."""

import json
from pathlib import Path

import torch
import transformers
from hqq.core.quantize import HQQLinear
from safetensors.torch import load_file


def load(folder, device="cpu"):
    """Return the quantised model, ready to run."""
    folder = Path(folder)
    plan = json.loads((folder / "hqq.json").read_text(encoding="utf-8"))["layers"]
    config = transformers.AutoConfig.from_pretrained(folder)
    dtype = config.dtype or torch.float32
    model = getattr(transformers, config.architectures[0])._from_config(config, dtype=dtype)
    held = load_file(str(folder / "model.safetensors"))
    for name in plan:
        parent, _, child = name.rpartition(".")
        layer = HQQLinear(None, None, compute_dtype=dtype, device=device)
        parts = [key for key in held if key.startswith(name + ".")]
        layer.load_state_dict({key.removeprefix(name + "."): held.pop(key) for key in parts})
        setattr(model.get_submodule(parent), child, layer)
    missing, unexpected = model.load_state_dict(held, strict=False)
    tied = set(getattr(model, "all_tied_weights_keys", None) or {})
    wrong = [key for key in missing if key.rpartition(".")[0] not in plan and key not in tied] + list(unexpected)
    if wrong:
        raise ValueError(f"not as saved: {wrong[:5]}")
    model.tie_weights()
    return model.to(device).eval()
'''


@dataclass(frozen=True)
class Hqq(ConfigExporter):
    """Writes ``hqq.json``, bits and group of every layer, ``run.py``, which quantises a model so, and ``load.py``.

    HQQ's own configuration tells kinds of layers apart, not layers. So the script replaces each layer by its exact name
    and saves the model as safetensors, which ``load.py`` reads.

    HQQ looks for scales and zero points by itself, and its zero points are real numbers: a plan's format is taken for
    its bits, its group and that it has zero points. Embeddings, and heads that share their weight, stay as they are.

    Source: hqq 0.2.8, ``core/quantize.py``.

    >>> from mpsearch.layer import Layers
    >>> layers = Layers((Layer("fc", "linear", (8, 64)),))
    >>> print(*Hqq().refuses(BitPlan(layers, {"fc": Format.parse("int4-g4-asym")})))
    fc: int4-g4-asym is not held by HQQ here: groups of 4 are no multiple of 8; allowed int4-g64-asym, ...
    """

    target: ClassVar[str] = "hqq"

    def refuses(self, plan: BitPlan) -> Sequence[str]:
        """Name every layer that HQQ cannot hold: its name, what is wanted, what is allowed."""
        found = list(super().refuses(plan))
        named = {line.partition(": ")[0] for line in found}
        for layer in weights_of(plan):
            why = "" if layer.name in named else _misfit(layer, plan.formats[layer.name])
            if why:
                found.append(f"{layer.name}: {plan.formats[layer.name]} is not held by HQQ here: {why}")
        return found

    def texts(self, plan: BitPlan) -> Mapping[str, str]:
        """Return the settings and the scripts."""
        formats = {x.name: plan.formats[x.name] for x in weights_of(plan)}
        quantised = {name: fmt for name, fmt in formats.items() if fmt.weight.family != "plain"}
        left = {name for x in weights_of(plan) if x.name not in quantised for name in modules(x)}
        body = {"layers": {name: settings(fmt) for name, fmt in quantised.items()}, "left": sorted(left)}
        title = "Quantise a model with HQQ as hqq.json says."
        return {CONFIG: json_text(body), SCRIPT: script(title, _BODY, self.source), LOADER: _LOADER}


def settings(fmt: Format) -> dict[str, Any]:
    """Return the arguments of HQQ's ``BaseQuantizeConfig`` for a format that it holds.

    >>> settings(Format.parse("int3-g64-asym")), settings(Format.parse("int8-channel-asym"))
    ({'nbits': 3, 'group_size': 64}, {'nbits': 8, 'group_size': None})
    """
    weight: Any = fmt.weight
    return {"nbits": weight.bits, "group_size": weight.group or None}


def _misfit(layer: Layer, fmt: Format) -> str:
    """Say what of a layer HQQ cannot pack; empty when it can."""
    weight: Any = fmt.weight
    if weight.family == "plain":
        return ""
    if not layer.name or layer.shared:
        return "it shares its weight, or has no name; allowed its stored type"
    group = weight.group or layer.columns
    if weight.group % 8:
        fits = [f"int{weight.bits}-g{size}-asym" for size in (128, 64, 32, 16, 8) if layer.columns % size == 0]
        return f"groups of {weight.group} are no multiple of 8; allowed {', '.join([*fits, 'channel'])}"
    groups, together = layer.weights // group, PACKED.get(weight.bits, 1)
    if groups % together:
        return (
            f"{groups} groups are no multiple of {together}, as {weight.bits} bits are packed; allowed 3, 5, 6, 8 bits"
        )
    return ""
