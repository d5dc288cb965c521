"""GPTQModel: its ``quantize_config.json`` with one exact rule per layer, and the script that runs it."""

from __future__ import annotations

import re
from collections import Counter
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from typing import Any, ClassVar

from mpsearch.exports.config_export import json_text, natural, weights_of
from mpsearch.exports.left_alone import left_alone, unspeakable
from mpsearch.exports.script_exporter import ScriptExporter
from mpsearch.format import Format
from mpsearch.fused import FUSED
from mpsearch.layer import Layer
from mpsearch.plan import BitPlan

CONFIG = "quantize_config.json"
#: What the script must know beside the configuration.
RUN_SETTINGS = "run.json"
#: Name of the head, which the library quantises only when told so beside the rules.
HEAD = "lm_head"

_SCRIPT = '''\
def calibration(args):
    """Token numbers of the calibration data; None for rounding to nearest."""
    if args.tokens:
        return json.loads(Path(args.tokens).read_text(encoding="utf-8"))
    if not args.text:
        return None
    from transformers import AutoTokenizer

    found = AutoTokenizer.from_pretrained(args.model)(Path(args.text).read_text(encoding="utf-8"))["input_ids"]
    return [found[i : i + 2048] for i in range(0, len(found), 2048)]


def packed(folder):
    """Names of the layers that are quantised in a folder."""
    from safetensors import safe_open

    found = set()
    for path in Path(folder).glob("*.safetensors"):
        with safe_open(path, "pt") as file:
            found |= {name.removesuffix(".qweight") for name in file.keys() if name.endswith(".qweight")}
    return found


def main():
    """Quantise by GPTQ where there is calibration data, else by rounding to nearest."""
    import os

    args = arguments()
    # It starts more workers than a small machine has cores, and then stops.
    os.environ.setdefault("GPTQMODEL_CPU_WORKERS", str(min(8, os.cpu_count() or 1)))
    settings, run = read("quantize_config.json"), read("run.json")
    data = calibration(args)
    if data is None and run["calibrated"]:
        sys.exit("the plan was measured with GPTQ: give calibration data, --text FILE or --tokens FILE")
    import torch
    from gptqmodel import GPTQModel, QuantizeConfig

    if data is None:
        del settings["act_group_aware"]
        settings["weight_only"] = {"method": "rtn"}
    model = GPTQModel.load(args.model, QuantizeConfig(**settings), dtype=getattr(torch, run["dtype"]))
    model.quantize(data and [{"input_ids": row, "attention_mask": [1] * len(row)} for row in data], batch_size=1)
    model.save(args.out)
    wrong = sorted(packed(args.out) ^ set(run["layers"]))
    if wrong:
        sys.exit(f"not quantised as planned, do not use {args.out}: {', '.join(wrong)}")
'''


@dataclass(frozen=True)
class GptqModel(ScriptExporter):
    """Writes ``quantize_config.json`` for GPTQModel, and ``run.py``, which quantises a model with it.

    ``dynamic`` has one rule for every layer: its name, escaped and anchored at both ends, so that no rule matches
    another layer. Layers that are left alone come first, as negative rules. Where q, k and v, or gate and up, have one
    format, a rule for the fused name stands beside theirs, because vLLM and SGLang look up nothing else. The base of
    the configuration is the most frequent format; no layer of the plan falls back to it.

    ``python run.py --model FOLDER --out FOLDER`` rounds to nearest; with ``--text FILE`` or ``--tokens FILE`` it runs
    GPTQ, without reordering columns, as our ``-gptq`` does. A plan with ``-gptq`` formats asks for one of them.

    Source: GPTQModel 7.7, ``quantization/config.py``: negative rules first, then the first that matches.

    >>> from mpsearch.layer import Layers
    >>> layers = Layers((Layer("fc", "linear", (64, 64)),))
    >>> print(*GptqModel().refuses(BitPlan(layers, {"fc": Format.parse("nf4-b64")})))
    fc: nf4-b64 is not held by GPTQModel; allowed int{2,3,4,8}-{channel,g*}{,-asym,-full}, fp32
    """

    target: ClassVar[str] = "gptqmodel"
    script: ClassVar[str] = _SCRIPT
    options: ClassVar[tuple[str, ...]] = ("tokens", "text")

    def refuses(self, plan: BitPlan) -> Sequence[str]:
        """Name every layer that GPTQModel cannot hold or be told of."""
        found = [*super().refuses(plan), *unspeakable(plan, self.able.title)]
        dtypes = Counter(layer.dtype for layer in weights_of(plan)).most_common()
        for layer in weights_of(plan):
            if len(dtypes) > 1 and layer.dtype != dtypes[0][0]:
                found.append(
                    f"{layer.name}: stored in {layer.dtype}; GPTQModel loads a model in one number type, here "
                    f"{dtypes[0][0]}; allowed {dtypes[0][0]}"
                )
        if not any(_quantised(plan)):
            found += [f"{layer.name}: GPTQModel needs a layer to quantise" for layer in plan.layers[:1]]
        return found

    def notes(self, plan: BitPlan) -> Sequence[str]:
        """Say what bites, and which layers vLLM and SGLang would read with the base format."""
        split = [f"{parent}.{name}" for parent, name, formats in _fused(plan) if len(formats) > 1]
        more = [f"vLLM and SGLang read the base format for these, not the plan's: {', '.join(split[:3])}"][: len(split)]
        if _calibrated(plan):
            more.append("formats that end in -gptq: run.py asks for calibration data, --text FILE or --tokens FILE")
        return [*super().notes(plan), *more]

    def data(self, plan: BitPlan) -> Mapping[str, str]:
        """Return the configuration and what the script must know."""
        chosen = {layer.name: _rule(plan.formats[layer.name]) for layer in _quantised(plan)}
        base = Counter(tuple(rule.items()) for rule in chosen.values()).most_common(1)[0][0]
        taken = {layer.name for layer in plan.layers} | {kept.name.rpartition(".")[0] for kept in plan.layers.excluded}
        named, left = dict(chosen), set(left_alone(plan)) - set(chosen)
        for parent, name, formats in _fused(plan):
            alias = f"{parent}.{name}" if parent else name
            if len(formats) > 1 or alias in taken:
                continue
            if formats[0].weight.family == "plain":
                left.add(alias)
            else:
                named[alias] = _rule(formats[0])
        rules: dict[str, Any] = {f"-:{_exactly(name)}": {} for name in sorted(left, key=natural)}
        rules |= {f"+:{_exactly(name)}": named[name] for name in sorted(named, key=natural)}
        config = {
            **dict(base), "desc_act": False, "act_group_aware": False, "lm_head": HEAD in chosen, "dynamic": rules,
        }  # fmt: skip
        run = {
            "dtype": next(iter(_quantised(plan))).dtype,
            "calibrated": _calibrated(plan),
            "layers": sorted(chosen, key=natural),
        }
        return {CONFIG: json_text(config), RUN_SETTINGS: json_text(run)}


def _exactly(name: str) -> str:
    r"""A pattern that one name matches alone.

    >>> print(_exactly("model.layers.1.fc"))
    ^model\.layers\.1\.fc$
    """
    return f"^{re.escape(name)}$"


def _rule(fmt: Format) -> dict[str, Any]:
    """What GPTQModel calls a format that it holds.

    >>> _rule(Format.parse("int4-channel-asym"))
    {'bits': 4, 'group_size': -1, 'sym': False}
    """
    weight: Any = fmt.weight
    return {"bits": weight.bits, "group_size": weight.group or -1, "sym": not weight.asymmetric}


def _quantised(plan: BitPlan) -> Iterator[Layer]:
    yield from (layer for layer in weights_of(plan) if plan.formats[layer.name].weight.family != "plain")


def _calibrated(plan: BitPlan) -> bool:
    return any(str(fmt.weight).endswith("-gptq") for fmt in plan.formats.values())


def _fused(plan: BitPlan) -> Iterator[tuple[str, str, list[Format]]]:
    """Yield parent, name of the fused layer, and the different formats of its members, for those that are all there."""
    owned = {layer.name for layer in weights_of(plan) if layer.kind == "linear"}
    for parent in sorted({name.rpartition(".")[0] for name in owned}, key=natural):
        for alias, members in FUSED.items():
            names = [f"{parent}.{name}" if parent else name for name in members]
            if owned.issuperset(names):
                found = {tuple(sorted(_said(plan.formats[name]).items())): plan.formats[name] for name in names}
                yield parent, alias, list(found.values())


def _said(fmt: Format) -> dict[str, Any]:
    return {"plain": str(fmt)} if fmt.weight.family == "plain" else _rule(fmt)
