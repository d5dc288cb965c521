"""Proof of an ONNX file: ONNX Runtime runs it, in one pass and with its cache, and its operators' tensors are read."""

import json
import sys

from _common import arguments, levels, needs, plan_of, report


def codes_of(packed, bits, rows, columns):
    """Codes of rows that are packed in bytes, the lowest bits first."""
    import numpy as np

    stream = np.unpackbits(packed.reshape(rows, -1), axis=1, bitorder="little")[:, : bits * columns]
    return (stream.reshape(rows, columns, bits) << np.arange(bits, dtype=np.uint8)).sum(-1, dtype=np.int64)


def blocks(inputs, held, rows, columns, codes, scales, zeros):
    """What an operator with packed codes holds, read from the shapes of its tensors alone."""
    packed, groups = held[inputs[codes]], held[inputs[scales]].size // rows
    bits = 8 * packed.size // (rows * columns)
    return {
        "bits": bits,
        "group": columns // groups,
        "symmetric": len(inputs) <= zeros or not inputs[zeros],
        "levels": levels(codes_of(packed, bits, rows, columns)),
        "bytes": sum(held[name].nbytes for name in inputs if name in held),
    }


def whole_bytes(inputs, held):
    """What an operator with a byte for each weight holds."""
    names = [name for name in inputs if name in held]
    codes = held[next(name for name in names if name.endswith(".codes"))]
    scales = held[next(name for name in names if name.endswith(".scales"))]
    found = {"bits": 8 * codes.itemsize, "group": -1 if scales.size == 1 < codes.shape[1] else 0, "symmetric": True}
    return {**found, "levels": levels(codes), "bytes": sum(held[name].nbytes for name in names)}


def plain(values, planned):
    """Bits of the narrowest number type, planned or fp32, that holds the numbers."""
    import numpy as np

    if planned == "bf16":
        fits = not (values.view(np.uint32) & 0xFFFF).any()
    else:
        fits = planned == "fp16" and np.array_equal(values.astype(np.float16).astype(np.float32), values)
    return {"bits": 16 if fits else 32, "dtype": str(values.dtype), "bytes": values.nbytes}


def read(graph, held, planned):
    """Tensor of the plan -> what each node that reads it holds."""
    found = {}
    for node in graph.node:
        owner = next((name for given in node.input if (name := owner_of(given, planned)) and given in held), None)
        if owner is None:
            continue
        facts = {item.name: item.i for item in node.attribute}
        rows, columns = planned[owner]["rows"], planned[owner]["columns"]
        if node.op_type == "MatMulNBits":
            made = blocks(node.input, held, rows, columns, 1, 2, 3)
            if (facts["N"], facts["K"], facts["bits"], facts["block_size"]) != (
                rows,
                columns,
                made["bits"],
                made["group"],
            ):
                sys.exit(f"{owner}: attributes {facts} are not those of its tensors")
        elif node.op_type == "GatherBlockQuantized":
            made = blocks(node.input, held, rows, columns, 0, 2, 3)
        elif node.op_type in ("DynamicQuantizeMatMul", "MatMulIntegerToFloat"):
            made = whole_bytes(node.input, held)
        elif node.op_type in ("MatMul", "Gather"):
            made = plain(next(held[name] for name in node.input if name in held), planned[owner]["format"])
        else:
            continue
        before = found.get(owner, made)
        if any(before.get(what) != made.get(what) for what in ("bits", "group", "symmetric", "levels")):
            sys.exit(f"{owner}: its look-up and its product hold different numbers")
        found[owner] = made
    return found


def sized(tensor):
    """A tensor of the plan with its output channels and the weights of each."""
    import math

    rows = tensor["shape"][tensor["out_axis"]]
    return {**tensor, "rows": rows, "columns": math.prod(tensor["shape"]) // rows}


def owner_of(name, planned):
    """Tensor of the plan that a tensor of the file was made from."""
    for part in (name, name.rpartition(".")[0]):
        if part.removeprefix("model.") in planned:
            return part.removeprefix("model.")
    return None


def rounds_inputs(node):
    """Whether a product rounds its inputs."""
    levels_of = [item.i for item in node.attribute if item.name == "accuracy_level"]
    return node.op_type in ("DynamicQuantizeMatMul", "MatMulIntegerToFloat") or 4 in levels_of


def run(session, tokens):
    """Logits of all tokens in one pass, and in two: the second with the cache of the first."""
    import numpy as np

    ids, names = np.array(tokens, np.int64), [made.name for made in session.get_outputs()]
    shapes = {x.name: (len(ids), x.shape[1], 0, x.shape[3]) for x in session.get_inputs() if x.name != "input_ids"}
    empty = {name: np.zeros(shape, np.float32) for name, shape in shapes.items()}
    whole = session.run(None, {"input_ids": ids, **empty})[0]
    first = dict(zip(names, session.run(None, {"input_ids": ids[:, :-3], **empty}), strict=True))
    logits = [first["logits"]]
    for place in range(ids.shape[1] - 3, ids.shape[1]):
        cache = {name: first[name.replace("past_key_values", "present")] for name in empty}
        answers = session.run(None, {"input_ids": ids[:, place : place + 1], **cache})
        first = dict(zip(names, answers, strict=True))
        logits.append(first["logits"])
    stepwise = np.concatenate(logits, axis=1)
    return whole, float(np.abs(stepwise - whole).max() / np.abs(whole).max())


def main():
    """Read the file back and run it."""
    args = arguments()
    library, version = needs("onnxruntime", "onnx", "numpy")
    import onnx
    import onnxruntime as ort
    from onnx import numpy_helper

    path = args.export / "model.onnx"
    graph = onnx.load(path).graph
    held = {tensor.name: numpy_helper.to_array(tensor) for tensor in graph.initializer}
    planned = {each["name"]: sized(each) for each in plan_of(args.export)["tensors"] if each["kind"] != "kv_cache"}
    tensors = read(graph, held, planned)
    options = ort.SessionOptions()
    options.intra_op_num_threads, options.log_severity_level = 1, 3
    session = ort.InferenceSession(str(path), options, providers=["CPUExecutionProvider"])
    logits, apart = run(session, json.loads(args.tokens.read_text(encoding="utf-8")))
    # Rounded inputs that lie between two codes fall to either side.
    exact = not any(rounds_inputs(node) for node in graph.node)
    if apart > 1e-3 and exact:
        sys.exit(f"with a cache its logits are others, by {apart:.2g} of the largest")
    size = sum(array.nbytes for name, array in held.items() if name.startswith("model."))
    notes = [f"three tokens with the cache of those before: logits differ by {apart:.2g} of the largest"]
    if any(fact.get("dtype") and fact["bits"] == 16 for fact in tensors.values()):
        notes.append("weights in 16 bits are held in fp32: their numbers are of 16 bits, their bytes are not")
    report(args.out, library, version, tensors, logits=logits, size=size, notes=notes)


if __name__ == "__main__":
    main()
