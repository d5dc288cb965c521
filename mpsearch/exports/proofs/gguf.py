"""Proof of a GGUF file: the gguf package reads it back, and llama.cpp runs it where llama-cpp-python is installed."""

import json
import sys

from _common import arguments, needs, plan_of, report

#: Weights of a tensor that are held against the model's at a time.
PIECE = 1 << 22
#: Type -> largest share of a block's size that rounding may move it by, as root mean squares: what a block of one large
#: weight among small ones can come to. Rows in another order, or a block's scale twice as large, move it by 1 or more.
MOVED = {
    "Q8_0": 0.05, "Q6_K": 0.15, "Q5_K": 0.3, "Q5_0": 0.25, "Q5_1": 0.25, "Q4_K": 0.45, "Q4_0": 0.45, "Q4_1": 0.45,
    "IQ4_NL": 0.45, "IQ4_XS": 0.5, "MXFP4": 0.6, "NVFP4": 0.5, "Q3_K": 0.7, "Q2_K": 0.95, "TQ1_0": 1.0, "TQ2_0": 1.0,
    "BF16": 0.004, "F16": 0.001, "F32": 1e-6,
}  # fmt: skip
#: Architectures whose tensors stand as in the checkpoint, but for the turned heads of the first.
AS_THEY_ARE = ("llama", "qwen2", "qwen3")


def main():
    """Read the file back."""
    args = arguments()
    library, version = needs("gguf", "numpy")
    import gguf

    path, plan = args.export / "model.gguf", plan_of(args.export)
    reader = gguf.GGUFReader(path)
    held = {tensor.name: tensor for tensor in reader.tensors}
    says = {name: field for name, field in reader.fields.items() if not name.startswith("tokenizer.")}
    kind = says["general.architecture"].contents()
    number = next(number for number, name in gguf.MODEL_ARCH_NAMES.items() if name == kind)
    names = gguf.get_tensor_name_map(number, int(says[f"{kind}.block_count"].contents()))
    heads = {}
    if kind == "llama":
        count = int(says["llama.attention.head_count"].contents())
        heads = {"attn_q": count, "attn_k": int(says["llama.attention.head_count_kv"].contents())}
    tensors, wrong = {}, []
    model = Weights(args.model)
    for each in [*plan["tensors"], *plan["kept"]]:
        name = names.get_name(each["name"], (".weight", ".bias"))
        if name is None or name not in held:
            continue
        tensors[each["name"]] = facts(held[name])
        turned = heads.get(name.split(".")[-2], 0)
        if each["name"] in model and each.get("out_axis", 0) == 0 and kind in AS_THEY_ARE:
            wrong += different(held[name], model, each["name"], turned)
    if wrong:
        sys.exit(f"its weights are not those of the model: {'; '.join(wrong[:3])}")
    notes, logits = [], None
    try:
        import llama_cpp
    except ImportError:
        notes.append("llama-cpp-python is not installed: the file was read and not run")
    else:
        library, version = "llama-cpp-python", llama_cpp.__version__
        logits = run(llama_cpp, path, json.loads(args.tokens.read_text(encoding="utf-8")))
    report(args.out, library, version, tensors, logits=logits, size=sum(t.n_bytes for t in reader.tensors), notes=notes)


class Weights:
    """Tensors of a model's folder, by name, read with numpy alone."""

    def __init__(self, folder):
        self._places = {}
        for path in sorted(folder.glob("*.safetensors")):
            with path.open("rb") as stream:
                length = int.from_bytes(stream.read(8), "little")
                header = json.loads(stream.read(length))
            self._places.update({name: (path, 8 + length, entry) for name, entry in header.items()})

    def __contains__(self, name):
        return self._places.get(name, (0, 0, {}))[2].get("dtype") in ("F32", "F16", "BF16")

    def __getitem__(self, name):
        import numpy as np

        path, start, entry = self._places[name]
        first, last = entry["data_offsets"]
        octets = np.memmap(path, np.uint8, "r", start + first, (last - first,))
        kind = {"F32": np.float32, "F16": np.float16, "BF16": np.uint16}[entry["dtype"]]
        numbers = octets.view(kind).reshape(entry["shape"])
        if kind is np.uint16:
            return (numbers.astype(np.uint32) << 16).view(np.float32)
        return numbers.astype(np.float32)


def facts(tensor):
    """What a tensor is, by its type alone."""
    import re

    name = tensor.tensor_type.name
    plain = {"F32": "float32", "F16": "float16", "BF16": "bfloat16"}
    if name in plain:
        # Norms and biases are stored in 32 bits whatever they were.
        return {"bits": int(name[-2:]), **({} if len(tensor.shape) < 2 else {"dtype": plain[name]})}
    return {"bits": {"MXFP4": 4, "NVFP4": 4, "TQ1_0": 2}.get(name) or int(re.search(r"\d", name)[0]), "type": name}


def different(tensor, model, name, heads):
    """Say where a tensor's values are further from the model's than its type explains."""
    import gguf
    import numpy as np

    weight, block = model[name], gguf.GGML_QUANT_SIZES[tensor.tensor_type][0]
    if heads:
        # Rows of a head: its first and second half in turn.
        weight = weight.reshape(heads, 2, -1, *weight.shape[1:]).swapaxes(1, 2).reshape(weight.shape)
    if weight.shape != tuple(reversed(tensor.shape.tolist())):
        return [f"{tensor.name} has shape {tuple(tensor.shape)}, in the model {weight.shape}"]
    limit, kind = MOVED[tensor.tensor_type.name], tensor.tensor_type
    rows = max(1, PIECE // weight.shape[-1]) if weight.ndim > 1 else len(weight)
    for start in range(0, len(weight), rows):
        theirs = gguf.quants.dequantize(tensor.data[start : start + rows], kind).astype(np.float64)
        ours = weight[start : start + rows].astype(np.float64)
        ours = ours.reshape(-1, block if ours.ndim > 1 else ours.size)
        moved = np.sqrt(((theirs.reshape(ours.shape) - ours) ** 2).mean(1))
        size = np.sqrt((ours**2).mean(1))
        bad = moved > limit * size + 1e-7
        if bad.any():
            place = int(np.flatnonzero(bad)[0])
            share = moved[place] / size[place] if size[place] else float("inf")
            place += start * len(ours) // len(theirs)
            return [f"{tensor.name} ({kind.name}): block {place} is moved by {share:.2g} of its size"]
    return []


def run(llama_cpp, path, tokens):
    """Answers of llama.cpp to the tokens, with a cache in 32 bits."""
    import ctypes

    import numpy as np

    llama_cpp.llama_backend_init()
    quiet = llama_cpp.llama_log_callback(lambda *_: None)
    llama_cpp.llama_log_set(quiet, ctypes.c_void_p(0))
    settings = llama_cpp.llama_model_default_params()
    settings.n_gpu_layers = 0
    model = llama_cpp.llama_model_load_from_file(str(path).encode(), settings)
    if not model:
        sys.exit(f"llama.cpp {llama_cpp.__version__} does not load the file")
    size = llama_cpp.llama_vocab_n_tokens(llama_cpp.llama_model_get_vocab(model))
    found = []
    for row in tokens:
        wanted = llama_cpp.llama_context_default_params()
        wanted.n_ctx = wanted.n_batch = wanted.n_ubatch = max(64, len(row))
        wanted.n_threads = wanted.n_threads_batch = 1
        wanted.type_k = wanted.type_v = wanted.flash_attn_type = 0
        context = llama_cpp.llama_init_from_model(model, wanted)
        batch = llama_cpp.llama_batch_init(len(row), 0, 1)
        batch.n_tokens = len(row)
        for place, token in enumerate(row):
            batch.token[place], batch.pos[place], batch.logits[place] = token, place, 1
            batch.n_seq_id[place], batch.seq_id[place][0] = 1, 0
        if llama_cpp.llama_decode(context, batch):
            sys.exit(f"llama.cpp {llama_cpp.__version__} does not run the file")
        answers = llama_cpp.llama_get_logits(context)
        found.append(np.ctypeslib.as_array(answers, shape=(len(row), size)).copy())
        llama_cpp.llama_batch_free(batch)
        llama_cpp.llama_free(context)
    llama_cpp.llama_model_free(model)
    return np.stack(found)


if __name__ == "__main__":
    main()
