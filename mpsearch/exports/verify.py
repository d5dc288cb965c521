"""Proof of an export: the target's own library loads it, and what it holds is read back and compared with the plan.

A proof (`mpsearch/exports/proofs`) is a script that needs nothing of this package, so that it can run in a virtual
environment of the target's own. It is called as

    python PROOF.py --export FOLDER --model FOLDER --tokens TOKENS.json --out REPORT.json

loads (or makes, where the export is a configuration) the quantised model, and writes a report:

    {"library": "compressed-tensors", "version": "0.20.0",
     "tensors": {"model.layers.0.mlp.up_proj.weight": {"bits": 4, "group": 64, "levels": 15, "bytes": 1234}},
     "logits": "logits.npy", "bytes": 123456, "everything": true, "notes": []}

``bits`` are those of the packed codes, 16 or 32 for a tensor that was left alone; ``group`` is what shares a scale: 0
for a whole output channel, -1 for the tensor; ``levels`` are the distinct codes; ``symmetric``: no zero points. A fact
that the target does not have is left out. ``distance`` is the norm of what rounding changed over that of the original
weight, from the decoded numbers: rows in another order or a wrong scale are far off. ``everything``: each tensor of the
export is listed, so that none may be missing and ``bytes`` are those of the export. ``logits`` is (sequences,
positions, vocabulary), fp32, of the tokens.
"""

from __future__ import annotations

import sys
import tempfile
from collections.abc import Mapping
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np

from mpsearch.capabilities import capabilities, targets
from mpsearch.errors import InputError
from mpsearch.exports.proof_run import drawn_tokens, proofs, run_proof
from mpsearch.format import Format
from mpsearch.layer import Layer
from mpsearch.plan import BitPlan

if TYPE_CHECKING:
    from mpsearch.model.model import Model

#: A target that rounds by rules of its own may lose so many times what our rounding loses, and so much more.
_COARSE, _SLACK = 4.0, 0.02
#: How far the distance of a weight from the original may be from that of our rounding, as a share of it.
_NEAR = 0.05


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
        plan: key of the plan.
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
    plan: str
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

    @property
    def ran(self) -> bool:
        """Whether the loaded model ran and gave logits; else stored tensors were read alone."""
        return self.kl is not None

    def to_json(self) -> dict[str, Any]:
        return {**asdict(self), "passed": self.passed, "ran": self.ran}


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
    check_model(plan, original)
    with tempfile.TemporaryDirectory() as scratch:
        tokens = drawn_tokens(original)
        report = run_proof(target, folder, original, tokens, Path(scratch), python or sys.executable)
        found = _differences(plan, report["tensors"], bool(report.get("everything")))
        found += _moved(plan, model, report["tensors"])
        kl = largest = None
        if report.get("logits"):
            theirs = np.load(Path(scratch) / report["logits"], allow_pickle=False).astype(np.float64)
            before, ours = simulated_logits(plan, model, tokens)
            kl = (_divergence(before, theirs), _divergence(before, ours))
            largest = float(np.abs(theirs - ours).max() / np.abs(ours).max())
            found += _far(kl, largest, bound)
        if report.get("everything") and (size := _stored(target, plan)) not in (None, int(report["bytes"])):
            found.append(Difference("all tensors", "bytes", f"{size:,}", f"{report['bytes']:,}"))
        return Verification(
            target, plan.key, str(report["library"]), str(report["version"]), tuple(found), len(report["tensors"]),
            int(report.get("bytes", 0)), kl, largest, tuple(map(str, report.get("notes", ()))),
        )  # fmt: skip


def check_model(plan: BitPlan, folder: str) -> None:
    """Refuse a plan that is not for the model in a folder (E302)."""
    from mpsearch.model.checkpoint import find_folder, folder_digest

    digest = plan.model.get("digest", "")
    if digest and digest != folder_digest(find_folder(folder)):
        raise InputError(
            "E302", f"the plan is for another model than '{folder}'", advice="give the model's folder: --model"
        )


def _far(kl: tuple[float, float], largest: float, bound: float | None) -> list[Difference]:
    """What logits say: as ours where the arithmetic is ours, else no loss that other rounding cannot explain."""
    theirs, ours = kl
    if not np.isfinite(theirs):
        return [Difference("logits", "not finite", "finite numbers", "NaN or infinity")]
    if bound is not None and not largest <= bound:
        return [Difference("logits", "differ by", f"at most {bound:.2g}", f"{largest:.2g} of the largest")]
    if bound is None and theirs > _COARSE * ours + _SLACK:
        return [Difference("logits", "lose", f"about {ours:.3g} nats/token", f"{theirs:.3g}")]
    return []


def _moved(plan: BitPlan, model: Model | str, tensors: Mapping[str, Mapping[str, Any]]) -> list[Difference]:
    """Weights that are further from the original, or nearer, than their rounding is."""
    told = {name: float(fact["distance"]) for name, fact in tensors.items() if "distance" in fact}
    if not told:
        return []
    from mpsearch.exports.simulated import distances

    found = []
    for name, ours in distances(plan, model).items():
        theirs = told.get(name, ours)
        if not abs(theirs - ours) <= _NEAR * ours + 2.0**-8:
            found.append(Difference(name, "moved by", f"{ours:.3g} of itself", f"{theirs:.3g}"))
    return found


def _stored(target: str, plan: BitPlan) -> int | None:
    """Bytes that the plan takes in the target's container; None where there is no rule for them."""
    from mpsearch.hardware.containers import kept_bytes, stored_bytes

    container = capabilities(target).container if target in targets() else ""
    if not container:
        return None
    layers = [layer for layer in plan.layers if layer.kind != "kv_cache"]
    return sum(sum(stored_bytes(plan.formats[x.name], x, container).values()) for x in layers) + sum(
        kept_bytes(kept, container) for kept in plan.layers.excluded
    )


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
    elif weight.family == "gguf":
        found["type"] = weight.type_name
    elif weight.family in ("mx", "nvfp4"):
        found["group"] = 32 if weight.family == "mx" else 16
    elif weight.family == "fp" and weight.granularity != "block":
        found["group"] = {"channel": 0, "tensor": -1, "group": weight.group}[weight.granularity]
    return found


def _differences(plan: BitPlan, tensors: Mapping[str, Mapping[str, Any]], everything: bool) -> list[Difference]:
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
            elif what == "type":
                if str(got.get(what, value)).lower() != value.lower():
                    found.append(Difference(layer.tensor, what, value, str(got[what])))
            elif what in got and got[what] != value and not _same_group(what, value, got[what], layer):
                found.append(Difference(layer.tensor, what, str(value), str(got[what])))
        if "bits" not in got:
            found.append(Difference(layer.tensor, "bits", str(wanted["bits"]), "not read back"))
    for kept in plan.layers.excluded:
        stored = tensors.get(kept.name, {}).get("dtype")
        if stored is None and everything:
            found.append(Difference(kept.name, "missing", kept.dtype, "not read back"))
        elif stored is not None and stored != kept.dtype:
            found.append(Difference(kept.name, "dtype", kept.dtype, str(stored)))
    return found


def _same_group(what: str, wanted: int, got: int, layer: Layer) -> bool:
    """A group of a whole output channel is a scale per channel."""
    return what == "group" and {wanted, got} == {0, layer.columns}


def _divergence(original: Any, other: Any) -> float:
    """Mean KL(original || other) over all positions, in nats per token."""
    p, q = (_log_softmax(x) for x in (original, other))
    return float((np.exp(p) * (p - q)).sum(-1).mean())


def _log_softmax(logits: Any) -> Any:
    shifted = logits - logits.max(-1, keepdims=True)
    return shifted - np.log(np.exp(shifted).sum(-1, keepdims=True))
