"""MLX: the ``quantization`` of a config.json with an exact path for every layer, and a script that converts with it."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any, ClassVar

from mpsearch.exports.config_export import json_text, modules, weights_of
from mpsearch.exports.script_exporter import ScriptExporter
from mpsearch.format import Format
from mpsearch.layer import DTYPE_BITS, Layer
from mpsearch.plan import BitPlan

#: File of settings: what becomes the ``quantization`` of config.json.
SETTINGS = "quantization.json"
#: Keys of the same dictionary that are no paths.
RESERVED = ("group_size", "bits", "mode")
_MODES = {"mxfp4": ("mxfp4", 32, 4), "mxfp8-e4m3": ("mxfp8", 32, 8)}
_DEFAULT: Mapping[str, Any] = {"group_size": 64, "bits": 4, "mode": "affine"}

_SCRIPT = '''\
def main():
    """Convert the model, and see that every planned layer was met."""
    args = arguments()
    import shutil

    from mlx_lm import convert

    scheme = read("quantization.json")
    layers = {path: how for path, how in scheme.items() if isinstance(how, (dict, bool))}
    tensors = [tensor for tensor in read("plan.json")["tensors"] if layers.get(tensor["layer"])]
    wanted = [{tensor["layer"], *tensor["shared_with"]} for tensor in tensors]
    met = set()

    def how(path, module, *_):
        met.add(path)
        return dict(layers[path]) if layers.get(path) else False

    convert(
        args.model, args.out, quantize=True, q_group_size=scheme["group_size"], q_bits=scheme["bits"],
        q_mode=scheme["mode"], quant_predicate=how,
    )
    lost = sorted(min(names) for names in wanted if not names & met)
    if lost:
        shutil.rmtree(args.out)
        sys.exit("MLX has no such layers for this model, and nothing is left written: " + ", ".join(lost[:20]))
'''


class Mlx(ScriptExporter):
    """Writes ``quantization.json``, the ``quantization`` that MLX-LM keeps in config.json, and ``run.py``.

    >>> from mpsearch.layer import Layers
    >>> layers = Layers((Layer("fc", "linear", (8, 64)),))
    >>> Mlx().refuses(BitPlan(layers, {"fc": Format.parse("int4-g64")}))
    ['fc: int4-g64 is not held by MLX; allowed int{2,3,4,5,6,8}-{g32,g64,g128}-asym, mxfp4, mxfp8-e4m3, fp32']
    """

    target: ClassVar[str] = "mlx"
    script: ClassVar[str] = _SCRIPT

    def refuses(self, plan: BitPlan) -> Sequence[str]:
        """Name every layer that MLX cannot hold, or whose name it reads as a setting."""
        taken = [
            f"{layer.name}: MLX reads a layer of this name as a setting; allowed are other names than "
            f"{', '.join(RESERVED)}"
            for layer in weights_of(plan)
            if {*modules(layer)} & {*RESERVED}
        ]
        return [*super().refuses(plan), *taken]

    def notes(self, plan: BitPlan) -> Sequence[str]:
        """Say what MLX does unless told otherwise, and how many bytes it stores."""
        weights = weights_of(plan)
        here = sum(plan.formats[layer.name].bytes(layer) for layer in weights)
        there = sum(stored_bytes(layer, plan.formats[layer.name]) for layer in weights)
        said = f"MLX stores {there} bytes for the weights of this plan, which counts {here}"
        return (*super().notes(plan), *([said] if here != there else []))

    def data(self, plan: BitPlan) -> Mapping[str, str]:
        """Return the settings: defaults, then each path in order; false for a layer that is left alone."""
        paths = {name: (layer, plan.formats[layer.name]) for layer in weights_of(plan) for name in modules(layer)}
        groups = [how["group_size"] for layer, fmt in paths.values() if (how := parameters(fmt))]
        default = {**_DEFAULT, "group_size": min(groups, default=_DEFAULT["group_size"])}
        return {
            SETTINGS: json_text({**default, **{name: parameters(fmt) or False for name, (_, fmt) in paths.items()}})
        }


def parameters(fmt: Format) -> dict[str, Any]:
    """What MLX's ``to_quantized`` takes for a format; empty for a layer that is left alone.

    >>> parameters(Format.parse("int3-g64-asym"))
    {'group_size': 64, 'bits': 3, 'mode': 'affine'}
    """
    weight: Any = fmt.weight
    if weight.family == "plain":
        return {}
    mode, group, bits = _MODES.get(str(weight)) or ("affine", weight.group, weight.bits)
    return {"group_size": group, "bits": bits, "mode": mode}


def stored_bytes(layer: Layer, fmt: Format) -> int:
    """Bytes of a layer in MLX's files.

    >>> stored_bytes(Layer("fc", "linear", (2, 64), dtype="bfloat16"), Format.parse("int4-g64-asym"))
    72
    """
    how = parameters(fmt)
    if not how:
        return layer.stored_bytes
    groups = layer.weights // int(how["group_size"])
    beside = 2 * DTYPE_BITS[layer.dtype] // 8 if how["mode"] == "affine" else 1
    return layer.weights * int(how["bits"]) // 8 + groups * beside
