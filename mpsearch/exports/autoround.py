"""AutoRound: a ``layer_config`` with one exact name per layer, and the script that runs it."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any, ClassVar

from mpsearch.exports.config_export import json_text, natural, weights_of
from mpsearch.exports.left_alone import left_alone, unspeakable
from mpsearch.exports.script_exporter import ScriptExporter
from mpsearch.format import Format
from mpsearch.plan import BitPlan

CONFIG = "layer_config.json"
#: What AutoRound calls a layer that it leaves alone.
LEFT: Mapping[str, Any] = {"bits": 16, "data_type": "float", "act_bits": 16, "act_data_type": "float"}

_SCRIPT = '''\
def checked(model, planned):
    """The layers that the model has; the script ends where a name would be read as a pattern."""
    import torch

    linear = {name for name, module in model.named_modules() if type(module) is torch.nn.Linear}
    missing = sorted(name for name, entry in planned.items() if entry["bits"] < 16 and name not in linear)
    if missing:
        sys.exit(f"no linear layers of this model, and so patterns to AutoRound: {', '.join(missing)}")
    unplanned = sorted(name for name in linear - set(planned) if not tied(model, name))
    if unplanned:
        sys.exit(f"linear layers that the plan does not know, so another model: {', '.join(unplanned)}")
    return {name: entry for name, entry in planned.items() if name in linear and not tied(model, name)}


def tied(model, name):
    """Whether a layer is a head that shares the embedding's weight: AutoRound leaves it alone, and warns if named."""
    embedding = model.get_input_embeddings()
    return embedding is not None and model.get_submodule(name).weight is embedding.weight


def packed(folder):
    """Names of the layers that are quantised in a folder."""
    from safetensors import safe_open

    found = set()
    for path in Path(folder).rglob("*.safetensors"):
        with safe_open(path, "pt") as file:
            found |= {name.removesuffix(".qweight") for name in file.keys() if name.endswith(".qweight")}
    return found


def main():
    """Round to nearest; with --iters 200 AutoRound tunes the rounding on data that it downloads, or on --dataset."""
    args = arguments()
    planned = read("layer_config.json")
    from auto_round import AutoRound
    from transformers import AutoModelForCausalLM, AutoTokenizer

    model = AutoModelForCausalLM.from_pretrained(args.model, dtype="auto")
    settings = {"iters": int(args.iters or 0), "disable_opt_rtn": True}
    head = next((name for name, module in model.named_modules() if module is model.get_output_embeddings()), "")
    # Written block by block, the head would come out unquantised.
    settings["low_cpu_mem_usage"] = planned.get(head, {}).get("bits", 16) >= 16
    if args.dataset:
        settings["dataset"] = args.dataset
    quantiser = AutoRound(
        model,
        AutoTokenizer.from_pretrained(args.model),
        scheme="W4A16",
        layer_config=checked(model, planned),
        **settings,
    )
    quantiser.quantize_and_save(args.out, format="auto_round")
    wrong = sorted(packed(args.out) ^ {name for name, entry in planned.items() if entry["bits"] < 16})
    if wrong:
        sys.exit(f"not quantised as planned, do not use {args.out}: {', '.join(wrong)}")
'''


@dataclass(frozen=True)
class AutoRound(ScriptExporter):
    r"""Writes ``layer_config.json`` for AutoRound, and ``run.py``, which quantises a model with it.

    Every linear layer is named exactly, with bits, group and symmetry; those that are left alone have 16 bits.
    AutoRound reads a name that is no linear layer as a part of names or as a regular expression and overwrites what it
    matches: ``run.py`` looks first whether the model has every layer, and afterwards whether each was quantised.
    Formats with zero points are refused: AutoRound writes them, and its loader leaves them random in a mix.

    ``python run.py --model FOLDER --out FOLDER`` rounds to nearest; with ``--iters 200`` AutoRound tunes the rounding.
    It writes a folder in a folder, named after the model.

    Source: auto-round 0.16.1, ``compressors/layer_config_resolver.py`` and ``schemes.py``.

    >>> from mpsearch.layer import Layer, Layers
    >>> layers = Layers((Layer("fc", "linear", (64, 64)), Layer("odd", "linear", (61, 64))))
    >>> formats = {"fc": Format.parse("int8-g32-asym"), "odd": Format.parse("int4-g64")}
    >>> print(*AutoRound().refuses(BitPlan(layers, formats)), sep="\n")
    fc: int8-g32-asym is not held by AutoRound; allowed int{2,3,4,8}-{channel,g*}{,-full}, fp32
    odd: int4-g64 is not held by AutoRound here: 61 output channels are no multiple of 32; allowed fp32
    """

    target: ClassVar[str] = "autoround"
    script: ClassVar[str] = _SCRIPT
    options: ClassVar[tuple[str, ...]] = ("iters", "dataset")

    def refuses(self, plan: BitPlan) -> Sequence[str]:
        """Name every layer that AutoRound cannot hold or be told of."""
        return [*super().refuses(plan), *unspeakable(plan, self.able.title)]

    def data(self, plan: BitPlan) -> Mapping[str, str]:
        """Return the configuration of the layers."""
        entries = {name: dict(LEFT) for name in left_alone(plan)}
        for layer in weights_of(plan):
            if plan.formats[layer.name].weight.family != "plain":
                entries[layer.name] = entry(plan.formats[layer.name])
        return {CONFIG: json_text({name: entries[name] for name in sorted(entries, key=natural)})}


def entry(fmt: Format) -> dict[str, Any]:
    """What AutoRound calls a format that it holds.

    >>> entry(Format.parse("int3-g64"))
    {'bits': 3, 'group_size': 64, 'sym': True, 'data_type': 'int', 'act_bits': 16}
    """
    weight: Any = fmt.weight
    return {
        "bits": weight.bits,
        "group_size": weight.group or -1,
        "sym": True,
        "data_type": "int",
        "act_bits": 16,
    }
