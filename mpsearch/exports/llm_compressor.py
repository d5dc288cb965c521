"""llm-compressor: a recipe with exact names, and the script that runs it."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any, ClassVar

from mpsearch.exports import ct_config
from mpsearch.exports.config_export import json_text, modules, natural, weights_of
from mpsearch.exports.left_alone import left_alone, unspeakable
from mpsearch.exports.script_exporter import ScriptExporter
from mpsearch.format import Format
from mpsearch.keys import canonical_json
from mpsearch.plan import BitPlan

RECIPE = "recipe.yaml"
#: What the script must know beside the recipe.
RUN_SETTINGS = "run.json"
#: Settings of GPTQ: columns in their order, damping as ours.
GPTQ: Mapping[str, Any] = {"block_size": 128, "dampening_frac": 0.01, "actorder": None}
#: Names that are read as a class of modules, and not as one of them.
_CLASSES = ("Linear", "Embedding")

_SCRIPT = '''\
def calibration(args):
    """What oneshot is told of calibration data; nothing where there is none."""
    if not args.tokens and not args.text:
        return {}
    from datasets import Dataset
    from transformers import AutoTokenizer

    if args.tokens:
        rows = json.loads(Path(args.tokens).read_text(encoding="utf-8"))
    else:
        found = AutoTokenizer.from_pretrained(args.model)(Path(args.text).read_text(encoding="utf-8"))["input_ids"]
        rows = [found[i : i + 2048] for i in range(0, len(found), 2048)]
    data = Dataset.from_dict({"input_ids": rows, "attention_mask": [[1] * len(row) for row in rows]})
    return {"dataset": data, "num_calibration_samples": len(rows), "max_seq_length": max(map(len, rows))}


def quantised(folder):
    """Names of the modules that have scales in a folder."""
    from safetensors import safe_open

    found = set()
    for path in Path(folder).glob("*.safetensors"):
        with safe_open(path, "pt") as file:
            found |= {name.removesuffix(".weight_scale") for name in file.keys() if name.endswith(".weight_scale")}
    return found


def main():
    """Quantise in one shot."""
    import shutil

    args = arguments()
    run = read("run.json")
    data = calibration(args)
    if not data and run["calibrated"]:
        sys.exit("the plan was measured with GPTQ: give calibration data, --text FILE or --tokens FILE")
    from llmcompressor import oneshot
    from transformers import AutoModelForCausalLM

    model = AutoModelForCausalLM.from_pretrained(args.model, dtype="auto")
    missing = sorted(set(run["modules"]) - {name for name, _ in model.named_modules()})
    if missing:
        sys.exit(f"the model has no such module: {', '.join(missing)}")
    oneshot(model=model, recipe=str(HERE / "recipe.yaml"), output_dir=args.out, **data)
    for path in Path(args.model).iterdir():
        if path.name.startswith(("tokenizer", "special_tokens", "vocab", "merges", "chat_template")):
            shutil.copy(path, args.out)
    wrong = sorted(quantised(args.out) ^ set(run["modules"]))
    if wrong:
        sys.exit(f"not quantised as planned, do not use {args.out}: {', '.join(wrong)}")
'''


@dataclass(frozen=True)
class LlmCompressor(ScriptExporter):
    """Writes ``recipe.yaml`` for llm-compressor, and ``run.py``, which quantises a model with it.

    A group of the recipe has one scheme of compressed-tensors and the exact names of its modules; what is left alone is
    in ``ignore``. Formats that end in ``-gptq`` are in a modifier of their own, which needs calibration data; those
    that end in ``-mse`` have an observer that looks for the scale of least squared error.

    ``python run.py --model FOLDER --out FOLDER`` writes a compressed-tensors checkpoint; with ``-gptq`` formats it asks
    for ``--text FILE`` or ``--tokens FILE``. The exporter ``compressed-tensors`` writes such a folder by itself, with
    the codes that were measured; this one is for who wants llm-compressor's own rounding.

    Source: llm-compressor 0.14.0.1, compressed-tensors 0.19.

    >>> from mpsearch.layer import Layer, Layers
    >>> layers = Layers((Layer("fc", "linear", (64, 64)),))
    >>> print(*LlmCompressor().refuses(BitPlan(layers, {"fc": Format.parse("nf4-b64")})))  # doctest: +ELLIPSIS
    fc: nf4-b64 is not held by llm-compressor; allowed int{2,3,4,5,6,7,8}-{tensor,channel,g*}{,-asym,-full}, ...
    """

    target: ClassVar[str] = "llm-compressor"
    script: ClassVar[str] = _SCRIPT
    options: ClassVar[tuple[str, ...]] = ("tokens", "text")

    def refuses(self, plan: BitPlan) -> Sequence[str]:
        """Name every layer that llm-compressor cannot hold or be told of."""
        title = self.able.title
        found = [*super().refuses(plan), *unspeakable(plan, title)]
        for layer in weights_of(plan):
            odd = [name for name in modules(layer) if name.startswith("re:") or name in _CLASSES]
            found += [f"{layer.name}: {title} reads the name '{name}' as a pattern or a class" for name in odd]
        return found

    def notes(self, plan: BitPlan) -> Sequence[str]:
        """Say what bites, and what the script asks for."""
        if not _calibrated(plan):
            return super().notes(plan)
        asks = "formats that end in -gptq: run.py asks for calibration data, --text FILE or --tokens FILE"
        return [*super().notes(plan), asks]

    def data(self, plan: BitPlan) -> Mapping[str, str]:
        """Return the recipe, which is JSON and so YAML, and what the script must know."""
        ignore, modifiers = left_alone(plan), {}
        for name, calibrated in (("QuantizationModifier", False), ("GPTQModifier", True)):
            if groups := _groups(plan, calibrated):
                more = GPTQ if calibrated else {}
                modifiers[name] = {**more, "ignore": ignore, "config_groups": groups}
        targets = [layer.name for layer in weights_of(plan) if _scheme(plan.formats[layer.name])]
        run = {"calibrated": _calibrated(plan), "modules": sorted(targets, key=natural)}
        return {
            RECIPE: json_text({"quant_stage": {"quant_modifiers": modifiers}}),
            RUN_SETTINGS: json_text(run),
        }


def _groups(plan: BitPlan, calibrated: bool) -> dict[str, dict[str, Any]]:
    """Groups of one modifier: a scheme, and the names of all modules that have it."""
    found: dict[str, dict[str, Any]] = {}
    for layer in weights_of(plan):
        fmt = plan.formats[layer.name]
        made = _scheme(fmt)
        if made and _by_gptq(fmt) == calibrated:
            found.setdefault(canonical_json(made), {"targets": [], **made})["targets"].append(layer.name)
    start = "gptq" if calibrated else "group"
    return {f"{start}_{i}": group for i, group in enumerate(found.values())}


def _scheme(fmt: Format) -> dict[str, Any] | None:
    """What llm-compressor calls a format that it holds; None for a plain one.

    >>> _scheme(Format.parse("int8-channel-full@int8-token"))["input_activations"]["strategy"]
    'token'
    >>> _scheme(Format.parse("int4-g64-mse"))["weights"]["observer"]
    'memoryless_mse'
    """
    made = ct_config.scheme(fmt)
    if made is None:
        return None
    weights = {key: value for key, value in made["weights"].items() if value is not None}
    if str(fmt.weight).endswith("-mse"):
        weights["observer"] = "memoryless_mse"
    inputs = made["input_activations"]
    return {"weights": weights, **({"input_activations": inputs} if inputs else {})}


def _by_gptq(fmt: Format) -> bool:
    return str(fmt.weight).endswith("-gptq")


def _calibrated(plan: BitPlan) -> bool:
    return any(_by_gptq(fmt) for fmt in plan.formats.values())
