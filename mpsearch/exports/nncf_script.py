"""The script that converts a model to OpenVINO and has NNCF compress it, pass after pass."""

SCRIPT = '''\
PREFIXES = ("self.model.", "self.")


def cache_class():
    """Make a cache over given keys and values, which notes these with the new ones behind them."""
    import torch
    from transformers import DynamicCache

    class Cache(DynamicCache):
        def __init__(self, past):
            super().__init__()
            self.past, self.present = past, {}

        def update(self, key, value, layer, *more, **rest):
            before = self.past[2 * layer : 2 * layer + 2]
            self.present[layer] = tuple(torch.cat([a, b], dim=2) for a, b in zip(before, (key, value)))
            return self.present[layer]

        def get_seq_length(self, layer_idx=0):
            return self.past[0].shape[2]

        def get_mask_sizes(self, length, layer):
            return self.get_seq_length() + length, 0

    return Cache


def causal(length, past, window):
    """What each of the new tokens may look at: itself and those before it, as far back as a window (0: no limit)."""
    import torch

    query, key = torch.arange(length)[:, None] + past, torch.arange(past + length)[None]
    seen = (key <= query) & (key > query - window) if window else key <= query
    return torch.where(seen, 0.0, torch.finfo(torch.float32).min)[None, None]


def windows_of(model, config):
    """Kind of attention -> window that gives the model's own masks; "" where there is one kind."""
    import torch
    from transformers.masking_utils import create_masks_for_generate

    if (getattr(config, "rope_parameters", None) or {}).get("rope_type") in ("dynamic", "longrope"):
        sys.exit("its positions hang on the length of the text; convert it with optimum and give its folder")
    width = getattr(config, "sliding_window", None) or 0
    found = {}
    for length, past in [(4, 0), (3, 1), (3, width)]:
        positions = torch.arange(past, past + length)[None]
        cache = cache_class()([torch.zeros(1, 1, past, 1)])
        masks = create_masks_for_generate(model.config, torch.zeros(1, length, 1), None, cache, positions)
        for kind, mask in (masks if isinstance(masks, dict) else {"": masks}).items():
            fits = {w for w in (0, width) if mask is not None and torch.equal(mask == 0, causal(length, past, w) == 0)}
            found[kind] = found.get(kind, fits) & fits
    if not all(found.values()):
        sys.exit("its attention has masks of another kind; convert it with optimum and give its folder")
    return {kind: min(fits) for kind, fits in found.items()}


def wrapped(model, windows):
    """A module (tokens, past keys and values ...) -> (logits, present keys and values ...), its masks made inside."""
    import torch

    class Wrapped(torch.nn.Module):
        def __init__(self):
            super().__init__()
            self.model = model

        def forward(self, input_ids, *past):
            length, before = input_ids.shape[1], past[0].shape[2]
            masks = {kind: causal(length, before, window) for kind, window in windows.items()}
            cache = cache_class()(past)
            found = self.model(
                input_ids=input_ids, attention_mask=masks.get("", masks), past_key_values=cache, use_cache=True,
                position_ids=torch.arange(length)[None] + before,
            )
            return found.logits, *(state for layer in sorted(cache.present) for state in cache.present[layer])

    return Wrapped().eval()


def convert(folder):
    """Convert a folder of transformers, in float32: tokens and caches of any length."""
    import openvino as ov
    import torch
    from transformers import AutoModelForCausalLM

    model = AutoModelForCausalLM.from_pretrained(folder, dtype=torch.float32, attn_implementation="eager").eval()
    config = model.config.get_text_config()
    ids = torch.arange(5)[None] % config.vocab_size
    with torch.no_grad():
        expected = model(input_ids=ids, use_cache=True)
        states = [state for layer in expected.past_key_values.layers for state in (layer.keys, layer.values)]
        sizes = [(state.shape[1], state.shape[3]) for state in states]
        module = wrapped(model, windows_of(model, config))
        found = ov.convert_model(
            module, example_input=(ids.repeat(2, 1), *(torch.zeros(2, heads, 3, size) for heads, size in sizes)),
            input=[ov.PartialShape([-1, -1]), *(ov.PartialShape([-1, heads, -1, size]) for heads, size in sizes)],
        )
    sides = [f"{index}.{side}" for index in range(len(sizes) // 2) for side in ("key", "value")]
    for place, name in enumerate(["input_ids", *(f"past_key_values.{side}" for side in sides)]):
        found.inputs[place].get_tensor().set_names({name})
    for place, name in enumerate(["logits", *(f"present.{side}" for side in sides)]):
        found.outputs[place].get_tensor().set_names({name})
    ready = ov.Core().compile_model(found, "CPU", {"INFERENCE_PRECISION_HINT": "f32"})
    empty = [torch.zeros(1, heads, 0, size).numpy() for heads, size in sizes]
    logits = ready([ids.numpy(), *empty])[0]
    wanted = expected.logits.numpy()
    if not abs(logits - wanted).max() <= 1e-3 * abs(wanted).max():
        sys.exit("converted, the model gives other logits; convert it with optimum and give its folder")
    return found


def load(folder):
    """Read a model that is converted already (openvino_model.xml, in float32), or convert it."""
    import openvino as ov

    ready = Path(folder) / "openvino_model.xml"
    return ov.Core().read_model(ready) if ready.is_file() else convert(folder)


def users(model):
    """Name of a weight's constant -> the constant, and the MatMul and Gather nodes that read it."""
    found = {}
    for node in model.get_ops():
        if node.get_type_name() not in ("MatMul", "Gather"):
            continue
        for given in node.inputs():
            source = given.get_source_output().get_node()
            while source.get_type_name() in ("Convert", "Transpose"):
                source = source.input_value(0).get_node()
            if source.get_type_name() == "Constant":
                found.setdefault(source.get_friendly_name(), (source, []))[1].append(node.get_friendly_name())
    return found


def located(model, tensors):
    """Name of a tensor in the plan -> name of its constant, each found once."""
    held = users(model)
    for prefix in PREFIXES:
        names = {tensor["name"]: prefix + tensor["name"] for tensor in tensors}
        lost = [name for name, constant in names.items() if constant not in held]
        if not lost:
            break
    if lost:
        sys.exit("the converted model has no weight of this name: " + ", ".join(lost[:20]))
    for tensor in tensors:
        shape = list(held[names[tensor["name"]]][0].get_output_shape(0))
        if shape != tensor["shape"]:
            sys.exit(f"{tensor['name']}: the converted model has {shape}, the plan {tensor['shape']}")
    return names


def weighted(model):
    """Names of all nodes that NNCF may compress."""
    kinds = ("MatMul", "Gather", "Convolution", "GroupConvolution")
    return [node.get_friendly_name() for node in model.get_ops() if node.get_type_name() in kinds]


def store_plain(constant, kind):
    """Keep a weight in a number type of its own."""
    import numpy as np
    import openvino as ov
    import torch
    from openvino import opset13 as ops

    values = np.array(constant.data, dtype=np.float32)
    if kind == "fp32":
        return
    if kind == "fp16":
        stored = ops.constant(values.astype(np.float16))
    else:
        stored = ops.constant(torch.from_numpy(values).bfloat16().float().numpy(), ov.Type.bf16)
    name = constant.get_friendly_name()
    back = ops.convert(stored, "f32")
    for reader in list(constant.output(0).get_target_inputs()):
        reader.replace_source_output(back.output(0))
    stored.set_friendly_name(name)
    back.set_friendly_name(name + "/fq_weights_1/convert")


def main():
    """Convert, compress, save; nothing is saved unless every layer was met."""
    args = arguments()
    import nncf
    import openvino as ov

    out = Path(args.out)
    if out.exists() and any(out.iterdir()):
        sys.exit(f"{out} holds files; nothing was written")
    passes, tensors = read("passes.json"), [x for x in read("plan.json")["tensors"] if x["kind"] != "kv_cache"]
    model = load(args.model)
    names = located(model, tensors)
    for each in passes["compress"]:
        held = users(model)
        wanted = {node for name in each["weights"] for node in held[names[name]][1]}
        settings = {key: value for key, value in each.items() if key not in ("mode", "weights")}
        apart = sorted(set(weighted(model)) - wanted)
        model = nncf.compress_weights(
            model, mode=nncf.CompressWeightsMode[each["mode"]], ignored_scope=nncf.IgnoredScope(names=apart), **settings
        )
    held = users(model)
    for name, kind in passes["plain"].items():
        store_plain(held[names[name]][0], kind)
    out.mkdir(parents=True, exist_ok=True)
    ov.save_model(model, out / "openvino_model.xml", compress_to_fp16=False)
    for path in Path(args.model).glob("*"):
        if path.name in ("config.json", "generation_config.json") or path.name.startswith("tokenizer"):
            (out / path.name).write_bytes(path.read_bytes())
'''
