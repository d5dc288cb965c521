"""What proofs share. It is copied beside each of them, and so needs nothing but what they need."""

import argparse
import importlib.metadata
import json
import shutil
import subprocess
import sys
from pathlib import Path

#: Exit code for a library that is not installed.
MISSING = 77


def arguments():
    """Read the command line: export, model, tokens, out, all paths."""
    parser = argparse.ArgumentParser()
    for name in ("export", "model", "tokens", "out"):
        parser.add_argument(f"--{name}", type=Path, required=True)
    return parser.parse_args()


def needs(*packages, extra=()):
    """Leave with `MISSING` where a package is not installed; name and version of the first.

    Args:
        packages: what to install, the target's own first.
        extra: further modules that must import.
    """
    missing = []
    for package in packages:
        try:
            importlib.metadata.version(package)
        except importlib.metadata.PackageNotFoundError:
            missing.append(package)
    if missing:
        sys.stderr.write(f"install {' '.join(missing)}\n")
        sys.exit(MISSING)
    return packages[0], importlib.metadata.version(packages[0])


def report(out, library, version, tensors, *, logits=None, size=0, notes=(), everything=False):
    """Write what was read back.

    Args:
        out: where to.
        library: the target's library.
        version: its version.
        tensors: name of a tensor in the plan -> facts.
        logits: (sequences, positions, vocabulary), numpy or torch; none when the target does not run.
        size: bytes of all tensors that were read.
        notes: what else should be known.
        everything: whether every tensor of the export is among them, so that what is missing is missing, and their
            bytes are those of the export.
    """
    body = {"library": library, "version": version, "tensors": tensors, "bytes": int(size), "notes": list(notes)}
    body["everything"] = everything
    if logits is not None:
        import numpy as np

        found = logits.detach().float().cpu().numpy() if hasattr(logits, "detach") else np.asarray(logits, np.float32)
        np.save(out.parent / "logits.npy", found)
        body["logits"] = "logits.npy"
    out.write_text(json.dumps(body, allow_nan=False), encoding="utf-8")


def plan_of(export):
    """The plan beside an export: names and shapes of tensors."""
    return json.loads((export / "plan.json").read_text(encoding="utf-8"))


def torch_logits(model, tokens):
    """Answers of a transformers model to the tokens."""
    import torch

    with torch.no_grad():
        given = torch.tensor(json.loads(Path(tokens).read_text(encoding="utf-8")))
        return model(input_ids=given, use_cache=False).logits.float()


def levels(codes):
    """How many different codes there are."""
    import numpy as np

    return int(np.unique(np.asarray(codes)).size)


def unpack_words(words, bits, count):
    """Codes of rows that are packed in int32 words without gaps, the lowest bits first.

    Args:
        words: (rows, words) int32.
        bits: bits of a code.
        count: codes in a row.
    """
    import numpy as np

    rows = np.ascontiguousarray(np.asarray(words, dtype=np.int32))
    stream = np.unpackbits(rows.view(np.uint8), axis=1, bitorder="little")[:, : bits * count]
    return (stream.reshape(len(rows), count, bits) << np.arange(bits, dtype=np.uint8)).sum(-1, dtype=np.int64)


def with_tokenizer(model, scratch):
    """A folder of the model that has a tokenizer, without which some libraries load none, even where they read no text.

    Args:
        model: folder of the model.
        scratch: where a copy with a tokenizer of made-up words goes, when the model has none.
    """
    if any((model / name).exists() for name in ("tokenizer.json", "tokenizer.model", "tokenizer_config.json")):
        return model
    from tokenizers import Tokenizer, models
    from transformers import PreTrainedTokenizerFast

    folder = scratch / "model"
    shutil.copytree(model, folder)
    count = json.loads((model / "config.json").read_text(encoding="utf-8"))["vocab_size"]
    words = Tokenizer(models.WordLevel({f"t{i}": i for i in range(count)}, unk_token="t0"))
    PreTrainedTokenizerFast(tokenizer_object=words, unk_token="t0", pad_token="t0").save_pretrained(folder)
    return folder


def run_script(args, model, out):
    """Quantise a model by the script of the export, with the tokens where it calibrates; leave where that fails.

    Args:
        args: the command line of the proof.
        model: folder of the model.
        out: folder for what it writes.
    """
    facts = args.export / "run.json"
    calibrated = facts.exists() and json.loads(facts.read_text(encoding="utf-8"))["calibrated"]
    data = ["--tokens", str(args.tokens)] if calibrated else []
    command = [sys.executable, str(args.export / "run.py"), "--model", str(model), "--out", str(out), *data]
    # What the script says last is the reason when it fails.
    if code := subprocess.run(command, check=False, stdout=sys.stderr).returncode:
        sys.exit(code)


def stored_tensors(folder):
    """All tensors of the safetensors files of a folder, by name, and their bytes."""
    from safetensors import safe_open

    held = {}
    for path in sorted(folder.glob("*.safetensors")):
        with safe_open(path, "pt") as file:
            held.update({name: file.get_tensor(name) for name in file.keys()})  # noqa: SIM118 - no mapping
    return held, sum(tensor.numel() * tensor.element_size() for tensor in held.values())


def as_stored(tensor):
    """What there is to say of a tensor that was left alone."""
    return {"bits": 8 * tensor.element_size(), "dtype": str(tensor.dtype).removeprefix("torch.")}


def gptq_tensors(held, columns_of):
    """What every tensor of a checkpoint in GPTQ's layout holds.

    Args:
        held: its tensors by name: ``qweight``, ``qzeros``, ``scales``, perhaps ``g_idx``, and those left alone.
        columns_of: name of a module -> weights of an output channel.
    """
    tensors = {}
    for name, tensor in held.items():
        module, _, part = name.rpartition(".")
        if part == "qweight":
            scales, columns = held[f"{module}.scales"], columns_of(module)
            bits, groups = 32 * len(tensor) // columns, len(scales)
            zeros = unpack_words(held[f"{module}.qzeros"].numpy(), bits, scales.shape[1])
            tensors[f"{module}.weight"] = {
                "bits": bits,
                "group": 0 if groups == 1 else columns // groups,
                # Of an asymmetric layer all groups would have to have the middle as their zero point.
                "symmetric": set(zeros.flat) in ({2 ** (bits - 1) - 1}, {2 ** (bits - 1)}),
                "levels": levels(unpack_words(tensor.T.contiguous().numpy(), bits, columns)),
            }
        elif part not in ("scales", "qzeros", "g_idx"):
            tensors[name] = as_stored(tensor)
    return tensors
