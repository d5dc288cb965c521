"""Does any input end in a traceback, hang, or take the memory? Files and command lines that are nearly right.

    python -m benchmarks.fuzz --inputs 10000

For each input: it is accepted, and what was read reads back the same; or it is refused with one of our errors.
Anything else is a fault: another exception, more than 10 s, more than 1 GB more of memory. Each kind runs in a process
of its own. Inputs are drawn from a seed, so that a fault can be had again:

    python -m benchmarks.fuzz --kind study --seed 7 --only 1234
"""

from __future__ import annotations

import argparse
import contextlib
import io
import math
import os
import random
import resource
import shutil
import signal
import subprocess
import sys
import tempfile
import time
import traceback
from collections import Counter
from collections.abc import Callable, Iterator, Mapping
from pathlib import Path
from types import FrameType

from benchmarks.fuzz_inputs import NASTY, corpus, mutated, reshaped
from mpsearch.errors import MpsearchError

#: Seconds that one input may take, and bytes that the process may grow by.
SLOW, LARGE = 10, 2**30
#: Kind -> (share of the inputs, names of the files it starts from).
KINDS: Mapping[str, tuple[float, tuple[str, ...]]] = {
    "study": (0.4, ("study.toml", "study.toml", "study.toml", "rules.toml")),
    "header": (0.2, ("model.safetensors", "model.gguf")),
    "table": (
        0.2,
        ("long.csv", "wide.csv", "matrices.json", "records.json", "table.parquet", "plan.json", "plan.json",
         "profile.json", "latency.csv", "latency.json"),
    ),
    "argv": (0.1, ()),
    "calibration": (0.1, ("calibration.jsonl", "calibration.jsonl", "calibration.txt")),
}  # fmt: skip


class HangError(Exception):
    """An input took too long."""


class WrongError(Exception):
    """An input was accepted, and what was read of it does not read back, or a process ended in another way."""


def check_study(path: Path) -> None:
    from mpsearch.spec import StudySpec

    spec = StudySpec.load(path)
    if StudySpec.of_values(**spec.to_json()) != spec:
        raise WrongError("the study reads back otherwise")
    if StudySpec.from_question(spec.question(), spec.storage).question() != spec.question():
        raise WrongError("the question reads back otherwise")


def check_rules(path: Path) -> None:
    from mpsearch.cli.own_tables import read_rules
    from mpsearch.own_tables import read_tables

    rules = read_rules(path)
    rules.apply(read_tables(path.with_name("long.csv")).problem([]))


def check_safetensors(path: Path) -> None:
    from mpsearch.model.checkpoint import check_stored_types, read_header

    size = path.stat().st_size
    for name, entry in read_header(path).items():
        first, last = entry["data_offsets"]
        if not (isinstance(name, str) and 0 <= first <= last <= size and all(n >= 0 for n in entry["shape"])):
            raise WrongError(f"tensor {name!a} is outside of the file")
    check_stored_types((path,))


def check_gguf(path: Path) -> None:
    from mpsearch.imports.gguf_header import read_gguf

    for name, tensor in read_gguf(path).items():
        if not (isinstance(name, str) and tensor.shape and all(n >= 0 for n in tensor.shape)):
            raise WrongError(f"tensor {name!a} has the shape {tensor.shape}")


def check_table(path: Path) -> None:
    from mpsearch.own_tables import read_tables
    from mpsearch.solving import solve_problem

    table = read_tables(path)
    for budgets in ([], [f"{name} <= 60 %" for name in table.costs]):
        problem = table.problem(budgets)
        found = solve_problem(problem, "greedy")
        if found.status in ("optimal", "feasible") and not problem.fits(found.choice):
            raise WrongError("the choice does not fit")


def check_plan(path: Path) -> None:
    from mpsearch.imports.checking import check_file
    from mpsearch.plan import BitPlan

    check_file(path)
    plan = BitPlan.load(path)
    if BitPlan.from_json(plan.to_json()).key != plan.key:
        raise WrongError("the plan reads back otherwise")


def check_latency(path: Path) -> None:
    from mpsearch.hardware.latency_table import read_profile
    from mpsearch.hardware.profile import Profile

    profile = read_profile(path)
    if Profile.from_json(profile.to_json()).key != profile.key:
        raise WrongError("the profile reads back otherwise")


def check_calibration(path: Path) -> None:
    from mpsearch.model.source import Source, read_texts

    for part in ("all", "first", "last"):
        texts = read_texts(Source(str(path), part=part))  # type: ignore[arg-type]
        if not texts:
            raise WrongError("no text")
        "".join(texts).encode()


def check_for(name: str) -> Callable[[Path], None]:
    """Who reads a file of the corpus."""
    exact = {
        "study.toml": check_study, "rules.toml": check_rules, "plan.json": check_plan, "profile.json": check_latency,
        "latency.csv": check_latency, "latency.json": check_latency,
    }  # fmt: skip
    if name in exact:
        return exact[name]
    kinds = {"calibration": check_calibration, "model": check_safetensors}
    stem, _, kind = name.partition(".")
    return check_gguf if kind == "gguf" else kinds.get(stem, check_table)


#: Commands of the shell that answer at once, with the options that they know.
_COMMANDS: Mapping[str, tuple[str, ...]] = {
    "run": ("--calib", "--budget", "--tokens", "--name", "--storage", "--formats", "--pin", "--solver", "--seed"),
    "resume": ("--storage", "--workers"),
    "solve": ("--table", "--costs", "--budget", "--solver", "--set", "--rules", "--goal", "--most-loss", "--cautious"),
    "show": ("--storage", "--json"),
    "export": ("--to", "--out", "--budget", "--storage", "--target-version", "--assume", "--set"),
    "formats": ("-f", "--json"),
    "layers": ("--json",),
    "solvers": ("--json",),
    "targets": ("--json",),
    "measure": ("--plan", "--storage", "--latency"),
    "search": ("--searcher", "--evaluations", "--set", "--storage", "--budget", "--target"),
    "profile": ("--formats", "--workload", "--engine", "--out", "--limit"),
    "plan": ("check", "diff", "import", "--model", "--to", "--from", "--out", "--rest", "--rounding"),
    "": ("--version", "--help", "--nothing"),
}
_WORDS = (
    "study.toml", "rules.toml", "long.csv", "wide.csv", "matrices.json", "plan.json", "profile.json", "model.gguf",
    "model.safetensors", "calibration.jsonl", "nothing.toml", "small", "bytes <= 60 %", "weights <= 4 bits", "int4-g64",
    "tpot <= 3 ms at context 9", "greedy", "ilp", "loss", "worst", "bytes", "time_limit=1", "gap=0", "native", "vllm",
    "gguf", "mlx", "1.0", "3", "-3", "1e400", "sqlite:///new.db", "sqlite://",
    "postgresql://x:y@", "out", ".", "/dev/null",
)  # fmt: skip


def arguments(rng: random.Random) -> list[str]:
    """Draw a command line, most of it known words in a wrong order."""
    name = rng.choice(list(_COMMANDS))
    found = [name] if name else []
    for _ in range(rng.randrange(7)):
        draw = rng.random()
        pool = _COMMANDS[name] if draw < 0.4 else _WORDS if draw < 0.8 else NASTY
        # A process cannot be given a NUL; a byte that is no text comes as one of these characters.
        found.append(rng.choice(pool).replace("\0", "").replace("\ud800", "\udc80"))
    return found


def check_arguments(given: list[str]) -> None:
    """Run a command line as the shell would, except that heavy work is never reached."""
    from mpsearch.cli.main import run

    out, err = io.StringIO(), io.StringIO()
    with contextlib.redirect_stdout(out), contextlib.redirect_stderr(err):
        code = run(given)
    if code not in (0, 2, 3, 4, 5, 6, 7, 8) or "Traceback" in err.getvalue():
        raise WrongError(f"exit code {code}: {err.getvalue()[-300:]}")
    if any(ord(character) < 32 and character != "\n" for character in err.getvalue()):
        raise WrongError(f"control characters in {err.getvalue()[-300:]!a}")


def draw(kind: str, seed: int, number: int, files: Mapping[str, bytes]) -> tuple[str, bytes, list[str]]:
    """Return the file name and content, or the command line, of one input."""
    rng = random.Random(f"{kind} {seed} {number}")
    if kind == "argv":
        return "", b"", arguments(rng)
    name = rng.choice(KINDS[kind][1])
    if rng.random() < 0.6:
        return name, reshaped(name, files[name], rng), []
    return name, mutated(files[name], rng, rng.choice(list(files.values()))), []


@contextlib.contextmanager
def limited(seconds: int) -> Iterator[None]:
    """Raise `HangError` in the body once its time is over."""

    def ring(number: int, frame: FrameType | None) -> None:
        raise HangError(f"more than {seconds} s")

    before = signal.signal(signal.SIGALRM, ring)
    signal.alarm(seconds)
    try:
        yield
    finally:
        signal.alarm(0)
        signal.signal(signal.SIGALRM, before)


def attempt(kind: str, seed: int, number: int, files: Mapping[str, bytes], folder: Path) -> str:
    """Read one input; return ``accepted``, ``refused``, or what went wrong."""
    name, content, given = draw(kind, seed, number, files)
    for own in files if kind == "argv" else ("long.csv",):
        # A study that could be run would be.
        (folder / own).write_bytes(files[own].replace(b"bundled:tiny-llama", b"nothing"))
    if name:
        (folder / name).write_bytes(content)
    try:
        with limited(SLOW):
            check_arguments(given) if kind == "argv" else check_for(name)(folder / name)
        return "accepted"
    except MpsearchError as error:
        return "refused" if error.code[0] == "E" and error.exit_code > 1 else f"no code: {error}"
    except Exception:
        return f"{name or given}\n{traceback.format_exc(limit=-4)}"


def fuzz(kind: str, count: int, seed: int, first: int = 0) -> tuple[Counter[str], list[str], int]:
    """Read so many inputs of a kind; return how they ended, the faults, and the bytes that the process grew by."""
    files, found, faults = corpus(), Counter[str](), []
    folder, before = Path(tempfile.mkdtemp()), Path.cwd()
    os.chdir(folder)
    start = 0
    try:
        for number in range(first, first + count):
            ended = attempt(kind, seed, number, files, folder)
            if ended not in ("accepted", "refused"):
                faults.append(f"--kind {kind} --seed {seed} --only {number}: {ended}")
                ended = "fault"
            found[ended] += 1
            # What the first inputs import is not theirs.
            if number == first + 20:
                start = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
    finally:
        os.chdir(before)
        shutil.rmtree(folder, ignore_errors=True)
    grown = (resource.getrusage(resource.RUSAGE_SELF).ru_maxrss - start) * 1024 if start else 0
    return found, faults, grown


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--inputs", type=int, default=10_000)
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--kind", choices=KINDS)
    parser.add_argument("--only", type=int, help="this input alone")
    args = parser.parse_args()
    if args.kind:
        one = args.only is not None
        count = 1 if one else max(1, math.ceil(args.inputs * KINDS[args.kind][0]))
        began = time.perf_counter()
        found, faults, grown = fuzz(args.kind, count, args.seed, args.only or 0)
        took = time.perf_counter() - began
        sys.stdout.write(
            f"{args.kind:<12} {count:>7} {found['accepted']:>9} {found['refused']:>8} {len(faults):>7}"
            f" {grown / 2**20:>8.0f} {took:>7.0f}\n"
        )
        for fault in faults[:20]:
            sys.stdout.write(f"{fault}\n")
        sys.exit(1 if faults or grown > LARGE else 0)
    heads = ("inputs", "accepted", "refused", "faults", "grew MB", "s")
    sys.stdout.write("{:<12} {:>7} {:>9} {:>8} {:>7} {:>8} {:>7}\n".format("kind", *heads))
    sys.stdout.flush()
    line = [sys.executable, "-m", "benchmarks.fuzz", "--inputs", str(args.inputs), "--seed", str(args.seed)]
    # A process that dies of its input, or hangs where no signal reaches it, is a fault like any other.
    codes = {}
    for kind in KINDS:
        codes[kind] = subprocess.run([*line, "--kind", kind], preexec_fn=_bounded).returncode
    sys.exit(1 if any(codes.values()) else 0)


def _bounded() -> None:
    resource.setrlimit(resource.RLIMIT_DATA, (6 * LARGE, 6 * LARGE))


if __name__ == "__main__":
    main()
