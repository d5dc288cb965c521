"""A PostgreSQL server of the tests' own: its own folder, the loopback address, a free port, settings as shipped."""

from __future__ import annotations

import os
import shutil
import socket
import subprocess
import tempfile
from collections.abc import Iterator
from contextlib import contextmanager
from itertools import count
from pathlib import Path

import psycopg
import pytest

#: Where Debian and others keep the programs, each version in a folder of its own; the newest comes first.
_FOLDERS = sorted(map(str, Path("/usr/lib/postgresql").glob("*/bin")), reverse=True)
#: Who the stores log in as: neither owner of the server nor free of its limits. Its password must never be seen.
USER, PASSWORD = "worker", "canary-of-the-tests"


def program(name: str) -> str:
    """The path of one of PostgreSQL's programs."""
    found = shutil.which(name, path=os.pathsep.join([*_FOLDERS, os.environ.get("PATH", "")]))
    if found is None:
        raise RuntimeError(f"the tests need PostgreSQL: no '{name}' below /usr/lib/postgresql nor on PATH: make server")
    return found


def _run(*command: str) -> None:
    # PostgreSQL refuses to run as root.
    user = "postgres" if os.getuid() == 0 else None
    done = subprocess.run(
        command, user=user, group=user, extra_groups=[] if user else None, check=False, cwd="/",
        stdin=subprocess.DEVNULL, stdout=subprocess.DEVNULL, stderr=subprocess.PIPE, text=True, timeout=120,
    )  # fmt: skip
    if done.returncode:
        raise RuntimeError(f"{Path(command[0]).name} failed: {done.stderr}")


def free_port() -> int:
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        return int(probe.getsockname()[1])


class Postgres:
    """A server that runs.

    Args:
        folder: an empty folder for it.
        settings: lines of its configuration.
    """

    def __init__(self, folder: Path, *settings: str) -> None:
        self.folder = folder
        self.port = free_port()
        self._numbers = count()
        if os.getuid() == 0:
            shutil.chown(folder, "postgres", "postgres")
        _run(
            program("initdb"), "-D", str(folder / "data"), "-U", "owner", "--auth=trust", "-E", "UTF8",
            "--locale=C.UTF-8", "--no-sync",
        )  # fmt: skip
        self._add("postgresql.conf", "listen_addresses = '127.0.0.1'", f"port = {self.port}", *settings)
        self._add("postgresql.conf", f"unix_socket_directories = '{folder}'")
        rules = (
            "local all owner trust",
            "host all owner 127.0.0.1/32 trust",
            f"host all {USER} 127.0.0.1/32 scram-sha-256",
        )
        (folder / "data" / "pg_hba.conf").write_text("\n".join(rules) + "\n")
        self.start()
        self.sql(f"CREATE ROLE {USER} LOGIN PASSWORD '{PASSWORD}'")

    def _add(self, name: str, *lines: str) -> None:
        with (self.folder / "data" / name).open("a") as stream:
            stream.write("\n".join(lines) + "\n")

    def start(self) -> None:
        """Start it, and return when it answers."""
        log = str(self.folder / "log")
        _run(program("pg_ctl"), "start", "-w", "-s", "-D", str(self.folder / "data"), "-l", log)

    def stop(self, mode: str = "immediate") -> None:
        """Stop it; ``immediate`` is as good as a power cut."""
        _run(program("pg_ctl"), "stop", "-w", "-s", "-m", mode, "-D", str(self.folder / "data"))

    def sql(self, statement: str, database: str = "postgres") -> list[tuple[object, ...]]:
        """Run statements as the owner, and return the rows of the last one."""
        with psycopg.connect(host="127.0.0.1", port=self.port, user="owner", dbname=database, autocommit=True) as link:
            cursor = link.execute(statement)  # type: ignore[arg-type]
            while cursor.nextset():
                pass
            return cursor.fetchall() if cursor.description else []

    def url(self, database: str) -> str:
        """The address of a database."""
        return f"postgresql://{USER}:{PASSWORD}@127.0.0.1:{self.port}/{database}"

    def create(self, template: str = "template0") -> str:
        """Make a database, empty or a copy of another one, and return its name."""
        name = f"d{next(self._numbers)}"
        self.sql(f"CREATE DATABASE {name} OWNER {USER} TEMPLATE {template} STRATEGY file_copy")
        return name

    def drop(self, name: str) -> None:
        self.sql(f"DROP DATABASE {name} WITH (FORCE)")


@contextmanager
def postgres(folder: Path, *settings: str) -> Iterator[Postgres]:
    """Run a server for as long as the body lasts.

    Without syncing to the disk a database is made in milliseconds; ``fsync = on`` where a power cut is played.
    """
    server = Postgres(folder, *(settings or ("fsync = off", "full_page_writes = off")))
    try:
        yield server
    finally:
        server.stop()


@pytest.fixture(scope="session")
def server() -> Iterator[Postgres]:
    """A server for all tests of this process."""
    # Not in pytest's folder, which another user may not enter.
    with tempfile.TemporaryDirectory(prefix="mpsearch-postgres-") as folder, postgres(Path(folder)) as found:
        yield found


@pytest.fixture
def database(server: Postgres) -> Iterator[str]:
    """The address of an empty database."""
    name = server.create()
    yield server.url(name)
    server.drop(name)
