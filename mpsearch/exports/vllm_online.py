"""vLLM's online quantisation: a target for every layer, and the command that serves the original model so."""

from __future__ import annotations

import re
import shlex
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import ClassVar

from mpsearch.errors import InputError
from mpsearch.exports.config_export import ConfigExporter, json_text, modules, natural, weights_of
from mpsearch.format import Format
from mpsearch.plan import BitPlan

CONFIG = "quantization-config.json"
SCRIPT = "run.sh"
#: Format of the weights -> what vLLM calls it.
SHORTHANDS: Mapping[str, str] = {
    "fp8-e4m3": "fp8_per_tensor",
    "fp8-e4m3-channel": "fp8_per_channel",
    "fp8-e4m3-b128x128": "fp8_per_block",
    "mxfp8-e4m3": "mxfp8",
    "mxfp4": "mxfp4",
}
# vLLM reads names with these as patterns of a shell.
_GLOB = re.compile(r"[*?\[\]]")

_SCRIPT = """#!/bin/sh
# Serve MODEL, the original model, quantised while it is loaded: sh {name} [MODEL] [more arguments of vllm serve]
set -eu
here=$(CDPATH= cd -- "$(dirname -- "$0")" && pwd)
{model}
exec "${{VLLM:-vllm}}" serve "$model" --quantization online \\
    --quantization-config "$(cat "$here/{config}")" "$@"
"""


@dataclass(frozen=True)
class VllmOnline(ConfigExporter):
    """Writes ``quantization-config.json``, one target for every layer, and ``run.sh``, which serves the model with it.

    No weights are written: vLLM quantises the original model while it loads it. Layers that it loads as one matrix are
    named one by one, and it looks that all of them have one target. Layers that stay as they are stand in ``ignore``.

    Source: vLLM 0.33.0, ``config/quantization.py``.

    >>> from mpsearch.layer import Layer, Layers
    >>> layers = Layers((Layer("fc", "linear", (8, 64)),))
    >>> print(*VllmOnline().refuses(BitPlan(layers, {"fc": Format.parse("nvfp4")})))
    fc: nvfp4 is not held by vLLM's online quantisation; allowed fp8-e4m3@fp8-e4m3-token, ...
    """

    target: ClassVar[str] = "vllm-online"

    def refuses(self, plan: BitPlan) -> Sequence[str]:
        """Name every layer that vLLM cannot quantise so, and a layer without a name."""
        found = list(super().refuses(plan))
        for layer in weights_of(plan):
            if "" in modules(layer):
                found.append(f"{layer.name}: vLLM names modules inside a model, and the model itself has no name")
        return found

    def texts(self, plan: BitPlan) -> Mapping[str, str]:
        """Return the configuration and the command.

        Raises:
            InputError: nothing is quantised, which vLLM refuses (E301).
        """
        targets: dict[str, str] = {}
        left = []
        for layer in weights_of(plan):
            fmt = plan.formats[layer.name]
            for name in sorted(modules(layer), key=natural):
                if fmt.weight.family != "plain":
                    targets[entry(name)] = shorthand(fmt)
                elif layer.kind == "linear":
                    left.append(entry(name))
        if not targets:
            raise InputError("E301", "vLLM's online quantisation needs a layer to quantise", advice="serve the model")
        model = "model=${1:?name the folder of the model}\nshift"
        if self.source:
            known = shlex.quote(self.source)
            model = f'model={known}\nif [ "$#" -gt 0 ]; then\n    model=$1\n    shift\nfi'
        return {
            CONFIG: json_text({"targets": targets, "ignore": left}),
            SCRIPT: _SCRIPT.format(name=SCRIPT, config=CONFIG, model=model),
        }


def shorthand(fmt: Format) -> str:
    """Return what vLLM calls a format that it holds.

    >>> shorthand(Format.parse("fp8-e4m3-channel@fp8-e4m3-token"))
    'fp8_per_channel'
    """
    return SHORTHANDS[str(fmt.weight).removesuffix("-mse")]


def entry(name: str) -> str:
    r"""Return a target that matches one name alone: the name, or a pattern of it where vLLM would read a pattern.

    >>> print(entry("layers.0.fc"), entry("a[0]"))
    layers.0.fc re:a\[0\]$
    """
    return f"re:{re.escape(name)}$" if _GLOB.search(name) or name.startswith("re:") else name
