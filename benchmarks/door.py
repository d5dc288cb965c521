"""How long do `mpsearch --help` and `mpsearch --version` take from the shell? Medians of 20 runs, in seconds.

python -m benchmarks.door --runs 20
"""

from __future__ import annotations

import argparse
import statistics
import subprocess
import sys
import time

#: Command line -> most seconds.
AIMS = {("--version",): 0.2, ("--help",): 0.4, ("run", "--help"): 0.4, ("plan", "--help"): 0.4}


def seconds(arguments: tuple[str, ...]) -> float:
    start = time.perf_counter()
    command = [sys.executable, "-c", "from mpsearch.cli.main import main; main()", *arguments]
    subprocess.run(command, check=True, stdout=subprocess.DEVNULL)
    return time.perf_counter() - start


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--runs", type=int, default=20)
    args = parser.parse_args()
    late = 0
    sys.stdout.write(f"{'command':<24} {'median':>8} {'least':>8} {'most':>8} {'aim':>6}\n")
    for arguments, aim in AIMS.items():
        seconds(arguments)
        took = sorted(seconds(arguments) for _ in range(args.runs))
        median = statistics.median(took)
        late += median > aim
        name = "mpsearch " + " ".join(arguments)
        sys.stdout.write(f"{name:<24} {median:8.3f} {took[0]:8.3f} {took[-1]:8.3f} {aim:6.1f}\n")
    sys.exit(1 if late else 0)


if __name__ == "__main__":
    main()
