"""Says in our words what a database driver reports in its own."""

from __future__ import annotations

import shutil
import sqlite3
import time
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

from sqlalchemy.exc import SQLAlchemyError
from sqlalchemy.exc import TimeoutError as PoolTimeout

from mpsearch.errors import MpsearchError, ResourceError, StorageError
from mpsearch.storage.place import Place, hide


class UnreadableError(Exception):
    """A stored value cannot be what mpsearch wrote. `translated` turns it into E603."""


class UndoneError(StorageError):
    """The database undid a transaction, as it and another waited for each other; the same call may do now."""


class AwayError(StorageError):
    """A server that answered earlier does not now, and was waited for."""


@contextmanager
def translated(place: Place) -> Iterator[None]:
    """Turn what a driver raises inside the block into one of our errors.

    Raises:
        StorageError: locked, or undone for another one's sake (E601), damaged (E603), too many connections (E607), no
            log-in (E608), the connection was lost (E609), other (E600).
        ResourceError: the disk is full or cannot be written (E701).
    """
    started = time.monotonic()
    try:
        yield
    except UnreadableError as error:
        raise _damaged(place, str(error)) from error
    except UnicodeDecodeError as error:
        # SQLite quotes the damaged text in its message, which the driver then cannot read.
        raise _damaged(place, "text that is not UTF-8") from error
    except (SQLAlchemyError, sqlite3.Error) as error:
        found = _error(error, place, time.monotonic() - started)
        # A cause is printed with a traceback, and must not bring the password along.
        leaks = bool(place.password) and place.password in str(error)
        raise found from (None if leaks else error)


def _error(error: Exception, place: Place, waited: float) -> MpsearchError:
    driver = getattr(error, "orig", None) or error
    if isinstance(error, PoolTimeout):
        return locked(place, waited)
    if isinstance(driver, sqlite3.Error):
        return _from_sqlite(driver, place, waited)
    return _from_server(driver, place, waited, gone=bool(getattr(error, "connection_invalidated", False)))


def _from_sqlite(driver: sqlite3.Error, place: Place, waited: float) -> MpsearchError:
    # Extended codes carry the kind of failure in their low byte.
    code = getattr(driver, "sqlite_errorcode", -1) & 0xFF
    if code in (sqlite3.SQLITE_BUSY, sqlite3.SQLITE_LOCKED):
        return locked(place, waited)
    if code in (sqlite3.SQLITE_CORRUPT, sqlite3.SQLITE_NOTADB, sqlite3.SQLITE_ERROR) or "decode" in str(driver):
        return _damaged(place, str(driver))
    if code == sqlite3.SQLITE_FULL:
        folder = (place.path or Path.cwd()).parent
        free = shutil.disk_usage(folder).free // 2**20
        return ResourceError(
            "E701",
            f"no space for '{place.name}' on '{folder}' ({free} MB free)",
            advice="free space and run the same command again; what was stored is safe",
        )
    if code in (sqlite3.SQLITE_READONLY, sqlite3.SQLITE_CANTOPEN, sqlite3.SQLITE_PERM, sqlite3.SQLITE_IOERR):
        return ResourceError(
            "E701",
            f"cannot read or write '{place.name}'",
            because=str(driver),
            advice="check that the file and its folder may be written; what was stored is safe",
        )
    return _unknown(driver, place)


def _from_server(driver: BaseException, place: Place, waited: float, gone: bool) -> MpsearchError:
    state = getattr(driver, "sqlstate", None) or ""
    if state in ("55P03", "57014"):
        return locked(place, waited)
    if state in ("40P01", "40001"):
        return UndoneError(
            "E601",
            f"'{place.name}': another program and this one waited for each other, time and again",
            because=one_line(driver, place),
            advice="nothing is lost; run the same command again",
        )
    if state == "23503":
        # Another one has just taken out what this belongs to, such as the scope of cells that no study names.
        return UndoneError(
            "E601",
            f"'{place.name}': another program takes out what this one stores for, time and again",
            because=one_line(driver, place),
            advice="nothing is lost; run the same command again",
        )
    if state == "53300":
        return StorageError(
            "E607",
            f"{place.shown} has no free connection",
            advice="use fewer workers, end other programs, or raise max_connections in the server's postgresql.conf",
        )
    if gone or state[:2] == "08" or state in ("57P01", "57P02", "57P03"):
        return StorageError(
            "E609",
            f"the connection to {place.shown} was lost",
            because=one_line(driver, place),
            advice="nothing that was stored is lost; see that the server runs, and run the same command again",
        )
    if state[:2] in ("28", "3D") or (not state and type(driver).__name__ == "OperationalError"):
        return _no_entry(driver, place)
    if state[:2] == "53":
        return ResourceError("E701", f"{place.shown} is out of disk or memory", because=one_line(driver, place))
    return _unknown(driver, place)


#: What the server or the system says -> what was found, and what to do. The first that fits counts.
_NO_ENTRY: tuple[tuple[tuple[str, ...], str, str], ...] = (
    (
        ("refused", "no such file"),
        "no PostgreSQL server answers at {host}:{port}",
        "start it, or correct host and port; `pg_isready -h {host} -p {port}` tells whether it is there",
    ),
    (
        ("resolve host", "translate host name"),
        "no machine is called '{host}'",
        "correct the host in the address, or see that this machine's network is up",
    ),
    (
        ("timeout", "timed out", "unreachable", "no route to host"),
        "{host} does not answer",
        "see that the machine is up and that no firewall is before its port {port}",
    ),
    (
        ("does not exist",),
        "{host}:{port} has no such user or database",
        "correct them; or `createuser -h {host} -p {port} {user}`, `createdb -h {host} -p {port} -O {user} {database}`",
    ),
    (
        ("pg_hba.conf",),
        "{host}:{port} lets user '{user}' in from elsewhere only",
        "add a line for this machine to the server's pg_hba.conf, and have it reload that",
    ),
    (
        ("password", "authentication"),
        "{host}:{port} refused user '{user}' ({given})",
        "put the line {host}:{port}:{database}:{user}:PASSWORD into ~/.pgpass, and chmod 600 ~/.pgpass",
    ),
)


def _no_entry(driver: BaseException, place: Place) -> StorageError:
    """The error for a server that is not there, or lets nobody in: which of the two, and what to do."""
    said = str(driver).lower()
    for words, message, advice in _NO_ENTRY:
        if place.server is not None and any(word in said for word in words):
            url = place.server
            names = {
                "host": url.host or "localhost", "port": url.port or 5432, "user": url.username or "USER",
                "database": url.database or "NAME",
                "given": "a password was given, not shown" if place.password else "no password in the address",
            }  # fmt: skip
            return StorageError(
                "E608", message.format(**names), where=place.shown, because=one_line(driver, place),
                advice=advice.format(**names),
            )  # fmt: skip
    return StorageError(
        "E608",
        f"cannot log in to {place.shown}",
        because=one_line(driver, place),
        advice="check the host, the port, the user, the password and the name of the database",
    )


def away(driver: BaseException, place: Place) -> AwayError:
    """The error for a server that cannot be reached any more; it has no cause, which might show the password."""
    return AwayError(
        "E609",
        f"{place.shown} does not answer any more",
        because=one_line(driver, place),
        advice="nothing that was stored is lost; see that the server runs, and run the same command again",
    )


def _damaged(place: Place, detail: str) -> StorageError:
    """The error for a database whose content cannot be what mpsearch wrote."""
    return StorageError(
        "E603",
        f"'{place.name}' is damaged or was changed by another program",
        because=ascii(detail)[1:-1][:200],
        advice="go back to a copy; `mpsearch db rescue FILE OUT` saves what can be read",
    )


def locked(place: Place, waited: float) -> StorageError:
    """The error for a database that others have held for too long."""
    return StorageError(
        "E601",
        f"'{place.name}' has been locked for {max(1, round(waited))} s{_holder(place.path)}",
        advice="nothing is lost; wait, or end the other program, and run the same command again",
    )


def _unknown(driver: BaseException, place: Place) -> StorageError:
    return StorageError(
        "E600",
        f"'{place.name}': the database reports a failure that mpsearch does not know",
        because=f"{type(driver).__name__}: {one_line(driver, place)}",
        advice="nothing that was stored is lost; run the same command again",
    )


def one_line(driver: BaseException, place: Place) -> str:
    """What a driver says, without the password."""
    text = " ".join(hide(str(driver)).split())[:300]
    return text.replace(place.password, "***") if place.password else text


def _holder(path: Path | None) -> str:
    """Name the process that holds a write lock, as far as the kernel's list tells (Linux)."""
    try:
        inodes = {str(file.stat().st_ino) for file in (path, Path(f"{path}-shm")) if file and file.exists()}
        for line in Path("/proc/locks").read_text().splitlines():
            fields = line.split()
            if "->" not in fields and fields[3] == "WRITE" and fields[5].rpartition(":")[2] in inodes:
                command = Path(f"/proc/{int(fields[4])}/comm").read_text().strip()
                return f" by pid {int(fields[4])} ({ascii(command)[1:-1]})"
    except (OSError, IndexError, ValueError):
        pass
    return ""
