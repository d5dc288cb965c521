"""Is a file ever seen broken, or half old and half new, when its writer is killed? Plan, report and export, in a loop.

    python -m benchmarks.files_killed --kills 500

A process writes a plan, a report and an export over and over and is killed at a random moment. After each kill
every file is read back as a user would read it. What the last writer left half-written is gone once the next one has
written.
"""

from __future__ import annotations

import argparse
import hashlib
import json
import random
import select
import subprocess
import sys
import tempfile
import time
from collections import Counter
from collections.abc import Callable
from pathlib import Path

from mpsearch.errors import InputError
from mpsearch.exports.folder import check_folder, write_folder
from mpsearch.files import write_file
from mpsearch.format import Format
from mpsearch.layer import Layer, Layers
from mpsearch.plan import BitPlan

#: Bytes of each file of the export.
_PART = 200_000


def plan_of(layers: int, turn: int) -> BitPlan:
    made = Layers(tuple(Layer(f"layers.{k}.mlp.down_proj", "linear", (64, 128)) for k in range(layers)))
    formats = [Format.parse(text) for text in ("int2-g64", "int4-g64", "int8-g64")]
    chosen = {layer.name: formats[(k + turn) % 3] for k, layer in enumerate(made)}
    return BitPlan(made, chosen, {"name": "m", "digest": "d"}, source={"turn": turn})


def sealed(body: str) -> str:
    return f"{hashlib.sha256(body.encode()).hexdigest()}\n{body}"


def write_for_ever(folder: Path, layers: int) -> None:
    """Write, and say each turn that is whole, until killed."""
    # As text, so that the time goes into writing: a kill while a plan is put into words would prove nothing.
    plans = [json.dumps(plan_of(layers, turn).to_json(), indent=1) for turn in range(3)]
    reports = [sealed(f"<html>{turn}</html>" * 40_000) for turn in range(3)]
    turn = 0
    while True:
        write_file(folder / "plan.json", plans[turn % 3])
        write_file(folder / "report.html", reports[turn % 3])
        part = bytes([turn % 256]) * _PART
        files: dict[str, Callable[[Path], object]] = {
            name: lambda path, content=part: write_file(path, content)  # type: ignore[misc]
            for name in ("model-1.bin", "model-2.bin")
        }
        write_folder(folder / "export", "native", files, force=True)
        turn += 1
        sys.stdout.write(f"{turn}\n")
        sys.stdout.flush()


def temporaries(folder: Path) -> int:
    return sum(1 for path in folder.rglob("*.tmp"))


def look(folder: Path, found: Counter[str]) -> None:
    """Count what is wrong with the files of a folder."""
    try:
        BitPlan.load(folder / "plan.json")
    except InputError as error:
        found["missing" if error.code == "E101" else "plan broken"] += 1
    report = folder / "report.html"
    if report.exists():
        digest, _, body = report.read_text().partition("\n")
        found["report broken"] += hashlib.sha256(body.encode()).hexdigest() != digest
    parts = [path.read_bytes() for path in sorted((folder / "export").glob("*.bin"))]
    found["export file broken"] += any(len(part) != _PART or len(set(part)) != 1 for part in parts)
    try:
        check_folder(folder / "export")
        found["export mixed, not noticed"] += len(set(parts)) > 1
    except InputError as error:
        found["export cut short, refused"] += error.code == "E304"


def kill_writers(folder: Path, kills: int, layers: int, seed: int = 0) -> Counter[str]:
    """Start a writer and kill it, again and again; return counts of what was seen."""
    rng = random.Random(seed)
    found: Counter[str] = Counter()
    command = [sys.executable, "-m", "benchmarks.files_killed", "--write", str(folder), "--layers", str(layers)]
    for kill in range(kills):
        left = temporaries(folder)
        with subprocess.Popen(command, stdout=subprocess.PIPE) as child:
            assert child.stdout is not None
            # From the second on, kills may fall into the first turn, where leftovers are swept.
            if kill == 0 or rng.random() < 0.8:
                assert select.select([child.stdout], [], [], 60)[0], "the writer wrote nothing in a minute"
                child.stdout.readline()
                found["not swept"] += max(0, temporaries(folder) - 1)
                found["swept"] += left
                time.sleep(rng.uniform(0, 0.1))
            else:
                time.sleep(rng.uniform(0.1, 0.25))
            child.kill()
        found["kills"] += 1
        half, before = temporaries(folder), found["export cut short, refused"]
        look(folder, found)
        found["left half-written"] += half > 0
        found["fell into a write"] += half > 0 or found["export cut short, refused"] > before
    return found


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--kills", type=int, default=500)
    parser.add_argument("--layers", type=int, default=5000, help="of the plan; 5,000 are 2 MB")
    parser.add_argument("--write", type=Path, help=argparse.SUPPRESS)
    args = parser.parse_args()
    if args.write is not None:
        write_for_ever(args.write, args.layers)
    start = time.perf_counter()
    with tempfile.TemporaryDirectory() as folder:
        found = kill_writers(Path(folder), args.kills, args.layers)
        write_file(Path(folder) / "plan.json", "")
        sys.stdout.write(f"kills of a writer: {args.kills}, {time.perf_counter() - start:.0f} s\n")
        for name, count in sorted(found.items()):
            sys.stdout.write(f"{name:<28} {count:>6}\n")
    wrong = ("plan broken", "report broken", "export file broken", "export mixed, not noticed", "not swept", "missing")
    # Kills that all miss the writes show nothing.
    vacuous = args.kills >= 50 and found["fell into a write"] < args.kills // 10
    sys.exit(1 if vacuous or any(found[name] for name in wrong) else 0)


if __name__ == "__main__":
    main()
