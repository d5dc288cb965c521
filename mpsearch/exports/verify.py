"""Proof of an export: the target's own library loads it, and what it holds is read back and compared with the plan.

A proof (`mpsearch/exports/proofs`) is a script that needs nothing of this package, so that it can run in a virtual
environment of the target's own. It is called as

    python PROOF.py --export FOLDER --model FOLDER --tokens TOKENS.json --out REPORT.json

loads (or makes, where the export is a configuration) the quantised model, and writes a report:

    {"library": "compressed-tensors", "version": "0.20.0",
     "tensors": {"model.layers.0.mlp.up_proj.weight": {"bits": 4, "group": 64, "levels": 15, "bytes": 1234}},
     "logits": "logits.npy", "bytes": 123456, "notes": []}

``bits`` are those of the packed codes, 16 or 32 for a tensor that was left alone; ``group`` is what shares a scale: 0
for a whole output channel, -1 for the tensor; ``levels`` are the distinct codes; ``symmetric``: no zero points. A fact
that the target does not have is left out. ``logits`` is (sequences, positions, vocabulary), fp32, of the tokens.
"""

from __future__ import annotations

import json
import os
import subprocess
import sys
import tempfile
from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass
from importlib.resources import files
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np

from mpsearch.errors import InputError, ResourceError
from mpsearch.format import Format
from mpsearch.layer import Layer
from mpsearch.plan import BitPlan

if TYPE_CHECKING:
    from mpsearch.model.model import Model

#: File beside an export that says what a proof found.
VERIFIED = "mpsearch-verified.json"
#: Exit code of a proof whose library is not installed.
MISSING = 77
_SEQUENCES, _LENGTH = 2, 32


@dataclass(frozen=True)
class Difference:
    """What was read back and is not what the plan says.

    Attributes:
        tensor: its name in the plan.
        what: ``bits``, ``group``, ``symmetric``, ``levels``, ``dtype``, or ``missing``.
        expected: what the plan says.
        found: what was read.
    """

    tensor: str
    what: str
    expected: str
    found: str

    def __str__(self) -> str:
        return f"{self.tensor}: {self.what} {self.found}, planned {self.expected}"


@dataclass(frozen=True)
class Verification:
    """What came of a proof.

    Attributes:
        target: name of the exporter.
        library: the target's own library.
        version: its version.
        differences: what is not as planned; empty for a passed check.
        tensors: how many tensors were read back.
        bytes: bytes of the tensors that were read back; 0 when the target does not say.
        kl: mean divergence of the loaded model from the original, in nats per token, and that of our own simulation;
            None without logits.
        largest: largest difference between the logits and those of our simulation, as a share of the largest logit.
        notes: what the proof has to say.
    """

    target: str
    library: str
    version: str
    differences: tuple[Difference, ...] = ()
    tensors: int = 0
    bytes: int = 0
    kl: tuple[float, float] | None = None
    largest: float | None = None
    notes: tuple[str, ...] = ()

    @property
    def passed(self) -> bool:
        """Whether every tensor is as planned."""
        return not self.differences

    def to_json(self) -> dict[str, Any]:
        return {**asdict(self), "passed": self.passed}


def proofs() -> tuple[str, ...]:
    """Names of the exporters that have a proof.

    >>> "compressed-tensors" in proofs()
    True
    """
    found = files("mpsearch.exports").joinpath("proofs").iterdir()
    return tuple(sorted(_exporter(x.name) for x in found if x.name.endswith(".py") and not x.name.startswith("_")))


def verify(
    target: str, plan: BitPlan, folder: Path, model: Model | str, source: str = "", python: str = "",
    bound: float | None = None,
) -> Verification:  # fmt: skip
    """Load an export with its target's own library and compare what it holds with the plan.

    Args:
        target: name of the exporter.
        plan: the plan that was exported.
        folder: the export.
        model: the original model, or its folder.
        source: its folder, when the model is given.
        python: interpreter that has the target's library; this one when empty.
        bound: largest difference of logits from our simulation, as a share of the largest logit, that passes; None
            compares none.

    Raises:
        ResourceError: the library is not installed there (E702).
        InputError: there is no proof for the target (E107), or its library does not take the export (E306).
    """
    if target not in proofs():
        raise InputError("E107", f"there is no proof for '{target}'", advice=f"there is one for {', '.join(proofs())}")
    from mpsearch.exports.simulated import simulated_logits

    original = model if isinstance(model, str) else source
    with tempfile.TemporaryDirectory() as scratch:
        tokens = _tokens(original)
        report = _run(target, folder, original, tokens, Path(scratch), python or sys.executable)
        found = _differences(plan, report["tensors"])
        kl = largest = None
        if report.get("logits"):
            theirs = np.load(Path(scratch) / report["logits"], allow_pickle=False).astype(np.float64)
            before, ours = simulated_logits(plan, model, tokens)
            kl = (_divergence(before, theirs), _divergence(before, ours))
            largest = float(np.abs(theirs - ours).max() / np.abs(ours).max())
            if bound is not None and not largest <= bound:
                found.append(Difference("logits", "differ by", f"at most {bound:.2g}", f"{largest:.2g} of the largest"))
        return Verification(
            target, str(report["library"]), str(report["version"]), tuple(found), len(report["tensors"]),
            int(report.get("bytes", 0)), kl, largest, tuple(map(str, report.get("notes", ()))),
        )  # fmt: skip


def expected(layer: Layer, fmt: Format) -> dict[str, Any]:
    """What a tensor must be read back as.

    >>> expected(Layer("fc", "linear", (8, 64)), Format.parse("int4-g32-asym"))
    {'bits': 4, 'group': 32, 'symmetric': False, 'levels': 16}
    """
    weight: Any = fmt.weight
    if weight.family == "plain":
        return {"bits": weight.bits}
    found: dict[str, Any] = {"bits": weight.bits}
    if weight.family == "int":
        found["group"] = {"channel": 0, "tensor": -1, "group": weight.group}[weight.granularity]
        found["symmetric"] = not weight.asymmetric
        found["levels"] = 2**weight.bits
    return found


def _differences(plan: BitPlan, tensors: Mapping[str, Mapping[str, Any]]) -> list[Difference]:
    found = []
    for layer in plan.layers:
        if layer.kind == "kv_cache":
            continue
        wanted, got = expected(layer, plan.formats[layer.name]), tensors.get(layer.tensor)
        if got is None:
            found.append(Difference(layer.tensor, "missing", str(plan.formats[layer.name]), "not read back"))
            continue
        for what, value in wanted.items():
            if what == "levels" and "levels" in got:
                if got["levels"] > value:
                    found.append(Difference(layer.tensor, what, f"at most {value}", str(got["levels"])))
            elif what in got and got[what] != value and not _same_group(what, value, got[what], layer):
                found.append(Difference(layer.tensor, what, str(value), str(got[what])))
        if "bits" not in got:
            found.append(Difference(layer.tensor, "bits", str(wanted["bits"]), "not read back"))
    for kept in plan.layers.excluded:
        stored = tensors.get(kept.name, {}).get("dtype")
        if stored is not None and stored != kept.dtype:
            found.append(Difference(kept.name, "dtype", kept.dtype, str(stored)))
    return found


def _same_group(what: str, wanted: int, got: int, layer: Layer) -> bool:
    """A group of a whole output channel is a scale per channel."""
    return what == "group" and {wanted, got} == {0, layer.columns}


def _run(target: str, folder: Path, model: str, tokens: list[list[int]], scratch: Path, python: str) -> dict[str, Any]:
    (scratch / "tokens.json").write_text(json.dumps(tokens), encoding="utf-8")
    report = scratch / "report.json"
    here = files("mpsearch.exports").joinpath("proofs")
    # The script's own folder goes first on the path, and modules there must not hide the target's packages.
    script = scratch / f"proof_{_module(target)}.py"
    script.write_bytes(here.joinpath(f"{_module(target)}.py").read_bytes())
    (scratch / "_common.py").write_bytes(here.joinpath("_common.py").read_bytes())
    if not Path(python).exists():
        raise InputError("E101", f"--python: there is no '{python}'", advice="give the path of an interpreter")
    done = subprocess.run(
        [python, str(script), "--export", str(folder.resolve()), "--model", str(Path(model).resolve()),
         "--tokens", str(scratch / "tokens.json"), "--out", str(report)],
        capture_output=True, text=True, encoding="utf-8", errors="replace", check=False, cwd=scratch,
        env={**os.environ, "HF_HUB_OFFLINE": "1", "TOKENIZERS_PARALLELISM": "false"},
    )  # fmt: skip
    said = [line for line in done.stderr.strip().splitlines() if line.strip()]
    last = said[-1][:500] if said else ""
    if done.returncode == MISSING:
        raise ResourceError(
            "E702", f"written, not verified: {last}", advice="or name an interpreter that has it: --python PATH"
        )
    if done.returncode or not report.is_file():
        raise InputError("E306", f"{target} does not take the export: {last or f'exit code {done.returncode}'}")
    found: dict[str, Any] = json.loads(report.read_text(encoding="utf-8"))
    return found


def _tokens(model: str) -> list[list[int]]:
    """Tokens that any model of that vocabulary can read, the same on every machine."""
    config = json.loads((Path(model) / "config.json").read_text(encoding="utf-8"))
    size = int(config.get("vocab_size") or config.get("text_config", {}).get("vocab_size") or 2)
    drawn = np.random.default_rng(0).integers(0, size, (_SEQUENCES, _LENGTH))
    return [[int(x) for x in row] for row in drawn]


def _divergence(original: Any, other: Any) -> float:
    """Mean KL(original || other) over all positions, in nats per token."""
    p, q = (_log_softmax(x) for x in (original, other))
    return float((np.exp(p) * (p - q)).sum(-1).mean())


def _log_softmax(logits: Any) -> Any:
    shifted = logits - logits.max(-1, keepdims=True)
    return shifted - np.log(np.exp(shifted).sum(-1, keepdims=True))


def _module(target: str) -> str:
    return target.replace("-", "_").replace(".", "_")


def _exporter(file: str) -> str:
    """Name of the exporter that a proof is of."""
    from mpsearch import registry

    stem = file.removesuffix(".py")
    known: Sequence[str] = registry.names("exporters")
    return next((name for name in known if _module(name) == stem), stem)
