"""One study's plans, exported to every target and read back by that target's own library.

    python -m benchmarks.verify_exports [--only NAME …] [--venvs FOLDER] [--python NAME=PATH …]

A study of the bundled model scores one menu once; for each target the plan is solved from those scores with only what
the target holds, exported, and given to the target's proof. Targets whose library is not here get a virtual environment
each under ``--venvs``, with the packages of verify_packages.toml; AIMET needs a torchvision that fits torch, and runs
where ``--python`` names an interpreter; MCT quantises inputs of every layer, which this menu does not. Printed: what
was read back, bytes, and the loss of the loaded model beside that of our simulation, where the target runs here.
"""

from __future__ import annotations

import argparse
import subprocess
import sys
import tempfile
import time
import tomllib
from collections.abc import Mapping, Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

import mpsearch as mp
from mpsearch import registry
from mpsearch.bundled import bundled_model
from mpsearch.capabilities import targets
from mpsearch.errors import InfeasibleError, MpsearchError
from mpsearch.exports.proof_run import proofs
from mpsearch.exports.verify import verify
from mpsearch.machine import fingerprint
from mpsearch.plan import BitPlan

MENU = (
    "int2-g64", "int3-g64", "int4-g64", "int4-g32", "int4-g64-asym", "int4-g128", "int8-g64", "int8-g64-asym",
    "int2-channel", "int4-channel", "int8-channel", "nf4-b64", "fp8-e4m3-channel", "fp8-e4m3-b128x128", "mxfp4", "q3_K",
    "q4_K", "q6_K", "q8_0", "bf16", "int3-g64-full", "int4-g64-full", "int4-g128-full", "int8-g128-full",
    "int8-channel-full",
)  # fmt: skip
#: Bits per weight; the first at which the target holds a plan.
BUDGETS = (4.5, 6.5, 8.5, 12.0, 16.5)
#: MCT quantises inputs of every layer, and exllamav3 takes bits alone: no plan of this menu is for them.
APART = ("mct", "exllamav3")
#: Who loads the export, where that is another target: what transformers runs of compressed-tensors.
LOADED_BY = {"compressed-tensors": "transformers"}
#: Exporter -> packages of a virtual environment of its own.
PACKAGES: Mapping[str, Sequence[str]] = tomllib.loads(
    Path(__file__).with_name("verify_packages.toml").read_text(encoding="utf-8")
)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--only", nargs="*", default=())
    parser.add_argument("--venvs", type=Path, default=Path(".venv-exports"))
    parser.add_argument("--python", nargs="*", default=(), help="NAME=PATH of an interpreter that has the library")
    args = parser.parse_args()
    given = dict(text.split("=", 1) for text in args.python)
    wanted = [
        name for name in proofs() if name in targets() and name not in APART and (not args.only or name in args.only)
    ]
    print(f"{fingerprint()}\n")
    with tempfile.TemporaryDirectory() as scratch:
        study = mp.study(
            "exports", model="bundled:tiny-llama", calibration="stdlib:calibration", validation="stdlib:validation",
            estimator="fisher", formats=MENU, budgets=("weights <= 4.5 bits",), tokens=2048, validation_tokens=2048,
            points=0, storage=f"{scratch}/study.db",
        )  # fmt: skip
        study.run()
        columns = ("target", "library", "bits", "bytes", "read back", "tensors", "loss there", "simulated", "off", "s")
        print(f"| {' | '.join(columns)} |\n|{'---|' * len(columns)}")
        for name in wanted:
            python = given.get(name) or _python(name, args.venvs)
            print(_row(name, study, Path(scratch) / "out" / name, python), flush=True)


def _row(name: str, study: Any, out: Path, python: str) -> str:
    """Export to a target and have it read back; a line of the table, with the reason where it fails."""
    start = time.perf_counter()
    try:
        plan = _plan(study, LOADED_BY.get(name, name))
        exporter = registry.make("exporters", name)
        source = str(bundled_model())
        if "source" in registry.settings("exporters", name):
            exporter = replace(exporter, source=source)
        model = mp.api.load_model(source) if getattr(exporter, "reads", "") == "model" else None
        exporter.write(plan, out, model)
        bound = exporter.bound(plan) if hasattr(exporter, "bound") else None
        found = verify(name, plan, out, source, source, python, bound)
    except MpsearchError as error:
        return f"| {name} | | | | **{error.code}**: {' '.join(error.message.split())[:160]} | | | | | |"
    there, ours = (f"{x:.5f}" for x in found.kl) if found.kl else ("", "")
    off = f"{found.largest:.1e}" if found.largest is not None else ""
    state = "as planned" if found.passed else f"**{len(found.differences)} differ**: {found.differences[0]}"
    library, seconds = f"{found.library} {found.version}", f"{time.perf_counter() - start:.0f}"
    cells = (
        name,
        library,
        f"{plan.bits:.3f}",
        f"{plan.stored_bytes:,}",
        state,
        found.tensors,
        there,
        ours,
        off,
        seconds,
    )
    return f"| {' | '.join(map(str, cells))} |"


def _plan(study: Any, target: str) -> BitPlan:
    """The best plan for a target at the first budget that it can keep."""
    for bits in BUDGETS:
        try:
            return study.plan_for(target, f"weights <= {bits} bits")  # type: ignore[no-any-return]
        except InfeasibleError:
            continue
    raise InfeasibleError("E201", f"{target} holds no plan of this menu")


def _python(name: str, venvs: Path) -> str:
    """Interpreter that has a target's library: this one, or that of a virtual environment made for it."""
    if name not in PACKAGES:
        return sys.executable
    folder = venvs / name
    python = folder / "bin" / "python"
    if not (folder / ".installed").exists():
        subprocess.run([sys.executable, "-m", "venv", str(folder)], check=True)
        here = next(path for path in sys.path if path.endswith("site-packages"))
        site = next((folder / "lib").glob("python*")) / "site-packages"
        # What is installed here serves, behind what the environment has of its own.
        (site / "behind.pth").write_text(f"{here}\n", encoding="utf-8")
        subprocess.run([str(python), "-m", "pip", "install", "--quiet", "--no-deps", *PACKAGES[name]], check=True)
        (folder / ".installed").touch()
    return str(python)


if __name__ == "__main__":
    main()
