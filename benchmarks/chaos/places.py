"""Where studies under fire live: database files, a PostgreSQL server, and a Ray cluster of their own."""

from __future__ import annotations

import os
import signal
import subprocess
import sys
import tempfile
import time
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

from benchmarks.chaos.lab import descendants, environment
from tests.postgres import Postgres, free_port, postgres


@contextmanager
def server() -> Iterator[Postgres]:
    """A PostgreSQL server that keeps what it acknowledges."""
    # Not in a folder that another user may not enter.
    with (
        tempfile.TemporaryDirectory(prefix="mpsearch-postgres-", ignore_cleanup_errors=True) as folder,
        postgres(Path(folder), "fsync = on") as found,
    ):
        yield found


class Cluster:
    """A Ray cluster of one node, of which parts can be killed.

    Args:
        settings: file of the fake model, which its workers read.
        cpus: how many it offers.
    """

    def __init__(self, settings: Path, cpus: int = 2) -> None:
        self._settings, self._cpus = settings, cpus
        self._port = free_port()
        self.address = f"127.0.0.1:{self._port}"
        self._holder: subprocess.Popen[bytes] | None = None

    def start(self) -> None:
        """Start it, and return when it answers."""
        code = (
            "import sys, ray, time\n"
            "from ray.cluster_utils import Cluster\n"
            f"args = dict(num_cpus={self._cpus}, gcs_server_port={self._port}, include_dashboard=False)\n"
            "args['object_store_memory'] = 80 * 2**20\n"
            "cluster = Cluster(initialize_head=True, head_node_args=args)\n"
            "print('up', flush=True)\n"
            "time.sleep(1e6)\n"
        )
        variables = {**environment(self._settings), "RAY_USAGE_STATS_ENABLED": "0", "RAY_DEDUP_LOGS": "0"}
        self._holder = subprocess.Popen(
            [sys.executable, "-c", code], stdout=subprocess.PIPE, stderr=subprocess.DEVNULL, env=variables,
            start_new_session=True,
        )  # fmt: skip
        assert self._holder.stdout is not None
        line = b"?"
        while line and not line.startswith(b"up"):
            line = self._holder.stdout.readline()
        assert line, "the Ray cluster did not start"

    def kill(self, part: str) -> None:
        """Kill one of its processes: ``raylet`` or ``gcs_server``."""
        assert self._holder is not None
        for pid, command in descendants(self._holder.pid).items():
            if os.path.basename(command.split(" ", 1)[0]) == part:
                os.kill(pid, signal.SIGKILL)

    def stop(self) -> None:
        """Kill all of it."""
        if self._holder is not None:
            every = list(descendants(self._holder.pid))
            self._holder.kill()
            self._holder.wait()
            for pid in every:
                try:
                    os.kill(pid, signal.SIGKILL)
                except ProcessLookupError:
                    continue
            self._holder = None

    def restart(self) -> None:
        """Kill all that is left of it and start another one."""
        self.stop()
        time.sleep(0.2)
        self.start()

    def __enter__(self) -> Cluster:
        self.start()
        return self

    def __exit__(self, *error: object) -> None:
        self.stop()
