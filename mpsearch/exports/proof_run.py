"""Which exporters have a proof, and how one is run: as a script, in an interpreter that has the target's library."""

from __future__ import annotations

import json
import os
import shutil
import subprocess
from collections.abc import Sequence
from importlib.resources import files
from pathlib import Path
from typing import Any

import numpy as np

from mpsearch.errors import InputError, ResourceError

#: Exit code of a proof whose library is not installed.
MISSING = 77
_SEQUENCES, _LENGTH = 2, 32


def proofs() -> tuple[str, ...]:
    """Names of the exporters that have a proof.

    >>> "compressed-tensors" in proofs()
    True
    """
    found = files("mpsearch.exports").joinpath("proofs").iterdir()
    return tuple(sorted(_exporter(x.name) for x in found if x.name.endswith(".py") and not x.name.startswith("_")))


def run_proof(
    target: str, folder: Path, model: str, tokens: list[list[int]], scratch: Path, python: str
) -> dict[str, Any]:
    """Run the proof of a target in an interpreter, and read its report.

    Args:
        target: name of the exporter.
        folder: the export.
        model: folder of the original model.
        tokens: sequences for the logits.
        scratch: folder for the script, its report and its logits.
        python: interpreter that has the target's library.

    Raises:
        ResourceError: the library is not installed there (E702).
        InputError: that is no interpreter (E101), or the library does not take the export (E306).
    """
    (scratch / "tokens.json").write_text(json.dumps(tokens), encoding="utf-8")
    report = scratch / "report.json"
    here = files("mpsearch.exports").joinpath("proofs")
    # The script's own folder goes first on the path, and modules there must not hide the target's packages.
    script = scratch / f"proof_{_module(target)}.py"
    script.write_bytes(here.joinpath(f"{_module(target)}.py").read_bytes())
    (scratch / "_common.py").write_bytes(here.joinpath("_common.py").read_bytes())
    interpreter = _interpreter(python)
    done = subprocess.run(
        [interpreter, str(script), "--export", str(folder.resolve()), "--model", str(Path(model).resolve()),
         "--tokens", str(scratch / "tokens.json"), "--out", str(report)],
        capture_output=True, text=True, encoding="utf-8", errors="replace", check=False, cwd=scratch,
        env={**os.environ, "HF_HUB_OFFLINE": "1", "TOKENIZERS_PARALLELISM": "false"},
    )  # fmt: skip
    said = [line for line in done.stderr.strip().splitlines() if line.strip()]
    last = said[-1][:500] if said else ""
    if done.returncode == MISSING:
        advice = "or name an interpreter that has it: --python PATH" if last.startswith("install ") else ""
        raise ResourceError("E702", f"written, not verified: {last}", advice=advice)
    if done.returncode or not report.is_file():
        raise InputError("E306", f"{target} does not take the export: {last or f'exit code {done.returncode}'}")
    found: dict[str, Any] = json.loads(report.read_text(encoding="utf-8"))
    return found


def _interpreter(python: str) -> str:
    """Return the path of an interpreter, as it was named: what a link in a virtual environment points at is another.

    Raises:
        InputError: it is none (E101).
    """
    path = shutil.which(python)
    said = ""
    if path is not None:
        try:
            done = subprocess.run([path, "-c", "print(6 * 7)"], capture_output=True, text=True, timeout=60, check=False)
            said = done.stdout.strip()
        except (OSError, subprocess.TimeoutExpired):
            path = None
    if path is None or said != "42":
        raise InputError(
            "E101", f"--python: '{python}' is no Python interpreter", advice="give the path of one that has the library"
        )
    return os.path.abspath(path)


def drawn_tokens(model: str) -> list[list[int]]:
    """Tokens that any model of that vocabulary can read, the same on every machine."""
    config = json.loads((Path(model) / "config.json").read_text(encoding="utf-8"))
    size = int(config.get("vocab_size") or config.get("text_config", {}).get("vocab_size") or 2)
    drawn = np.random.default_rng(0).integers(0, size, (_SEQUENCES, _LENGTH))
    return [[int(x) for x in row] for row in drawn]


def _module(target: str) -> str:
    return target.replace("-", "_").replace(".", "_")


def _exporter(file: str) -> str:
    """Name of the exporter that a proof is of."""
    from mpsearch import registry

    stem = file.removesuffix(".py")
    known: Sequence[str] = registry.names("exporters")
    return next((name for name in known if _module(name) == stem), stem)
