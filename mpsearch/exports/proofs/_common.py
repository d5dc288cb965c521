"""What proofs share. It is copied beside each of them, and so needs nothing but what they need."""

import argparse
import importlib.metadata
import json
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
