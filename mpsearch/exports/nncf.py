"""NNCF: passes of ``compress_weights`` with exact names, and a script that converts a model and runs them."""

from __future__ import annotations

import re
from collections import Counter
from collections.abc import Mapping, Sequence
from typing import Any, ClassVar

from mpsearch.exports.config_export import json_text, weights_of
from mpsearch.exports.nncf_script import SCRIPT
from mpsearch.exports.script_exporter import ScriptExporter
from mpsearch.format import Format
from mpsearch.plan import BitPlan

#: File of settings: the passes in their order.
PASSES = "passes.json"
_MX = {"mxfp4": "MXFP4", "mxfp8-e4m3": "MXFP8_E4M3", "nvfp4": "NVFP4"}
#: A pass fails once a weight has this mode: its number type (u3) is unknown to NNCF itself.
_LAST = "INT3_SYM"
_FIRST = ("INT8_SYM", "INT8_ASYM")


class Nncf(ScriptExporter):
    """Writes ``passes.json``, one pass of NNCF for each mode and group size, and ``run.py``.

    ``python run.py --model FOLDER --out FOLDER`` converts a folder of transformers to OpenVINO (or takes one that holds
    an ``openvino_model.xml`` in fp32), compresses the weights that each pass names and no others, and saves
    ``openvino_model.xml``. Weights are found by the exact names of their constants; NNCF is given the exact names of
    all nodes to leave alone. Layers in plain formats are stored in that type.

    8 bits come first and int3 last: NNCF runs no pass on a model with int3 in it, and so int3 has one group size.

    >>> from mpsearch.layer import Layer, Layers
    >>> layers = Layers((Layer("fc", "linear", (8, 64)),))
    >>> Nncf().refuses(BitPlan(layers, {"fc": Format.parse("int8-g64")}))
    ['fc: int8-g64 is not held by NNCF; allowed int8-channel{,-asym,-full}, ...']
    """

    target: ClassVar[str] = "nncf"
    script: ClassVar[str] = SCRIPT

    def refuses(self, plan: BitPlan) -> Sequence[str]:
        """Name every layer that NNCF cannot hold, and those whose int3 has another group size than most."""
        found = list(super().refuses(plan))
        groups = {
            layer.name: how["group_size"]
            for layer in weights_of(plan)
            if (how := mode(plan.formats[layer.name])) and how["mode"] == _LAST
        }
        if len(set(groups.values())) < 2:
            return found
        most = Counter(groups.values()).most_common(1)[0][0]
        shown = "int3-channel" if most == -1 else f"int3-g{most}"
        return found + [
            f"{name}: {plan.formats[name]} does not go with {shown}: {self.able.title} makes int3 in one pass, "
            f"the last; allowed {shown}"
            for name, size in groups.items()
            if size != most
        ]

    def data(self, plan: BitPlan) -> Mapping[str, str]:
        """Return ``passes.json``: ``compress``, passes in their order, and ``plain``, weight -> number type."""
        passes: dict[tuple[Any, ...], dict[str, Any]] = {}
        plain = {}
        for layer in weights_of(plan):
            how = mode(plan.formats[layer.name])
            if how is None:
                plain[layer.tensor] = str(plan.formats[layer.name])
            else:
                passes.setdefault(tuple(how.items()), {**how, "weights": []})["weights"].append(layer.tensor)
        order = sorted(passes.values(), key=lambda each: (rank(each["mode"]), each["mode"], each.get("group_size", 0)))
        return {PASSES: json_text({"compress": order, "plain": plain})}


def mode(fmt: Format) -> dict[str, Any] | None:
    """Arguments of ``compress_weights`` for a format that NNCF holds; None for a plain one, or one that it does not.

    >>> mode(Format.parse("int4-g64-asym-mse"))
    {'mode': 'INT4_ASYM', 'group_size': 64, 'ratio': 1.0, 'all_layers': True}
    >>> mode(Format.parse("int8-channel")), mode(Format.parse("bf16"))
    ({'mode': 'INT8_SYM'}, None)
    """
    text = re.sub(r"-(mse|gptq|fisher|full)\b", "", str(fmt.weight))
    rest = {"ratio": 1.0, "all_layers": True}
    if text in _MX:
        return {"mode": _MX[text], "group_size": 16 if text == "nvfp4" else 32, **rest}
    found = re.fullmatch(r"(int[2348]|nf4|fp8-e4m3)-(channel|[gb]\d+)(-asym)?", text)
    if found is None:
        return None
    if found[1].startswith("int"):
        name = f"{found[1].upper()}_{'ASYM' if found[3] else 'SYM'}"
    else:
        name = found[1].upper().replace("-", "_")
    if name in _FIRST:
        return {"mode": name}
    return {"mode": name, "group_size": -1 if found[2] == "channel" else int(found[2][1:]), **rest}


def rank(name: str) -> int:
    """Place of a mode among the passes.

    >>> sorted(["INT3_SYM", "NF4", "INT8_SYM"], key=rank)
    ['INT8_SYM', 'NF4', 'INT3_SYM']
    """
    return 0 if name in _FIRST else 2 if name == _LAST else 1
