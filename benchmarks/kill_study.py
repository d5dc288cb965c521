"""Kill a running study thirty times at random moments, and check that nothing acknowledged is lost.

    python -m benchmarks.kill_study --kills 30

After each kill -9 (the driver alone or the whole process group) the database is read: every row that was there before
must still be there with the same value, and no key may be there twice. Then the study goes on with `mpsearch resume`.
At last the plan must be byte for byte that of an uninterrupted run, whose database is another.
"""

from __future__ import annotations

import argparse
import os
import random
import signal
import sqlite3
import subprocess
import sys
import tempfile
import time
from pathlib import Path


def command(folder: Path, fresh: bool) -> list[str]:
    shell = [sys.executable, "-m", "mpsearch.cli.main"]
    common = ["--storage", str(folder / "study.db"), "--out", str(folder / "out"), "--workers", "2", "--quiet"]
    if not fresh:
        return [*shell, "resume", "kills", *common]
    return [
        *shell, "run", "bundled:tiny-llama", "--name", "kills", "--calib", "stdlib:calibration",
        "--validation", "stdlib:validation", "--budget", "weights <= 3.5 bits", "--tokens", "2048",
        "--validation-tokens", "2048", "--points", "4", "--random", "4", *common,
    ]  # fmt: skip


def rows(folder: Path) -> dict[tuple[str, ...], object]:
    """All rows by key; fails on a key that is there twice."""
    database = folder / "study.db"
    if not database.exists():
        return {}
    connection = sqlite3.connect(database)
    try:
        tables = {name for (name,) in connection.execute("SELECT name FROM sqlite_master")}
        if not {"cell", "value"} <= tables:
            return {}
        assert connection.execute("PRAGMA integrity_check").fetchone() == ("ok",)
        found = [
            (("cell", *map(str, r[:4])), r[4])
            for r in connection.execute("SELECT scope, layer, format, batch, value FROM cell")
        ]
        found += [
            (("value", kind, key), body) for kind, key, body in connection.execute("SELECT kind, key, body FROM value")
        ]
    finally:
        connection.close()
    assert len(found) == len(dict(found)), "a key is there twice"
    return dict(found)


def has_study(folder: Path) -> bool:
    """Whether the study was noted, so that `mpsearch resume` knows it."""
    if not (folder / "study.db").exists():
        return False
    connection = sqlite3.connect(folder / "study.db")
    try:
        return bool(connection.execute("SELECT count(*) FROM study").fetchone()[0])
    except sqlite3.OperationalError:
        return False
    finally:
        connection.close()


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--kills", type=int, default=30)
    parser.add_argument("--seed", type=int, default=0)
    args = parser.parse_args()
    dice = random.Random(args.seed)
    with tempfile.TemporaryDirectory() as name:
        whole, broken = Path(name) / "whole", Path(name) / "broken"
        for folder in (whole, broken):
            folder.mkdir()
        start = time.perf_counter()
        subprocess.run(command(whole, True), check=True, stdout=subprocess.DEVNULL)
        print(f"uninterrupted run: {time.perf_counter() - start:.0f} s, {len(rows(whole))} rows")
        kills, ended, known = 0, 0, {}
        while kills < args.kills:
            process = subprocess.Popen(
                command(broken, not has_study(broken)),
                start_new_session=True, stdout=subprocess.DEVNULL,
            )  # fmt: skip
            try:
                process.wait(dice.uniform(0.5, 16.0))
                assert process.returncode == 0
                ended += 1
                # It ran to its end: start over, so that there is something to kill again.
                for file in broken.glob("study.db*"):
                    file.unlink()
                known = {}
                continue
            except subprocess.TimeoutExpired:
                if kills % 2:
                    os.killpg(process.pid, signal.SIGKILL)
                else:
                    process.kill()
                process.wait()
            kills += 1
            now = rows(broken)
            lost = [key for key, value in known.items() if now.get(key, object()) != value]
            assert not lost, f"lost or changed: {lost[:3]}"
            known = now
            print(f"kill {kills}: {len(known)} rows kept", flush=True)
        subprocess.run(command(broken, not has_study(broken)), check=True, stdout=subprocess.DEVNULL)
        plans = [(folder / "out" / "kills" / "plan.json").read_bytes() for folder in (whole, broken)]
        lost = [key for key, value in known.items() if rows(broken).get(key) != value]
        print(
            f"{kills} kills ({ended} runs reached their end between): {len(lost)} rows lost, "
            f"plan equal: {plans[0] == plans[1]}"
        )
        assert plans[0] == plans[1]
        assert not lost


if __name__ == "__main__":
    main()
