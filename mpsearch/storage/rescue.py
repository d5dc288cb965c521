"""Takes what can be read of a damaged SQLite file into a new database."""

from __future__ import annotations

import shutil
import sqlite3
import stat
import tempfile
from collections.abc import Mapping
from contextlib import closing
from dataclasses import dataclass, field
from pathlib import Path

from mpsearch.errors import InputError, ResourceError, StorageError
from mpsearch.storage.inspecting import KeyOf
from mpsearch.storage.layouts import layouts
from mpsearch.storage.pages import Pages
from mpsearch.storage.refill import Found
from mpsearch.storage.schema import metadata
from mpsearch.storage.sound import Sound
from mpsearch.storage.store import SqlStore


@dataclass(frozen=True)
class Rescued:
    """What a rescue brought.

    Attributes:
        whole: the file was not damaged.
        rows: table -> rows in the new database.
        lost: what is known to be missing, one line each.
    """

    whole: bool
    rows: Mapping[str, int] = field(default_factory=dict)
    lost: tuple[str, ...] = ()


def rescue(damaged: str | Path, out: str | Path, key_of: KeyOf) -> Rescued:
    """Read a damaged file row by row, after truncation or overwritten pages, into a new database.

    The damaged file stays as it is. Every row is checked as if it were put anew: a value whose content has another key
    than it stands under is left behind.

    Args:
        damaged: the SQLite file; its log ``-wal`` is read as well if it is there.
        out: file of the new database.
        key_of: the key that a value of a kind must stand under; None where that cannot be told.

    Raises:
        InputError: no such file (E101), or ``out`` is there already (E303).
        StorageError: nothing that mpsearch wrote can be read (E603).
        ResourceError: the new file cannot be written (E701).
    """
    source, target = _file(damaged), _file(out)
    _check_paths(source, target)
    sound = Sound(key_of)
    try:
        found = _from_tables(source, sound)
        whole = found is not None
        found = found or _from_pages(source, sound)
    except OSError as error:
        raise ResourceError(
            "E701", f"'{source}' cannot be read: {error.strerror}", advice="copy it elsewhere"
        ) from error
    if not any(found.rows.values()):
        raise StorageError(
            "E603",
            f"'{source}' holds nothing that mpsearch wrote and that can still be read",
            advice="go back to a copy, such as the one that `mpsearch db upgrade` made",
        )
    try:
        with SqlStore(str(target)) as store, store.writing() as connection:
            lost = found.fill(connection, whole)
    except BaseException:
        for end in ("", "-wal", "-shm"):
            Path(f"{target}{end}").unlink(missing_ok=True)
        raise
    return Rescued(whole, {name: len(rows) for name, rows in sorted(found.rows.items())}, tuple(lost))


def _file(given: str | Path) -> Path:
    """The path that was given, if it is one."""
    # An address that was made a path has one slash where it had two. Its password must not be shown.
    family, slash, rest = str(given).partition(":/")
    if slash and family.partition("+")[0] in ("postgresql", "postgres"):
        raise InputError(
            "E101",
            f"{family}:// is the address of a server, and a rescue reads a file and writes another one",
            advice="bring the server back from a copy, such as one of pg_dump",
        )
    if slash and family == "sqlite":
        path = rest.lstrip("/")
        raise InputError("E101", f"sqlite:// is an address, and a rescue takes paths: '{path}' or '/{path}'")
    return Path(given)


def _check_paths(source: Path, target: Path) -> None:
    try:
        mode = source.stat().st_mode
    except OSError as error:
        raise InputError(
            "E101", f"'{source}' cannot be read: {error.strerror}", advice="give a database file"
        ) from error
    if not stat.S_ISREG(mode):
        raise StorageError("E603", f"'{source}' is not a plain file", advice="give the file of a database")
    if target.exists():
        raise InputError("E303", f"'{target}' is there already; nothing was written", advice="name a new file")


def _from_tables(source: Path, sound: Sound) -> Found | None:
    """Read the tables of a file that is whole; None if it is not."""
    found = Found(sound)
    with tempfile.TemporaryDirectory(prefix="mpsearch-rescue-") as folder:
        copy = Path(folder) / "copy.db"
        shutil.copyfile(source, copy)
        if Path(f"{source}-wal").exists():
            shutil.copyfile(f"{source}-wal", f"{copy}-wal")
        try:
            with closing(sqlite3.connect(copy)) as file:
                file.execute("PRAGMA trusted_schema=OFF")
                if file.execute("PRAGMA integrity_check(1)").fetchone() != ("ok",):
                    return None
                there = {name for (name,) in file.execute("SELECT name FROM sqlite_master WHERE type = 'table'")}
                for table in metadata.sorted_tables:
                    if table.name in there:
                        cursor = file.execute(f'SELECT * FROM "{table.name}"')
                        names = [column[0] for column in cursor.description]
                        for row in cursor:
                            found.take(table, dict(zip(names, row, strict=True)))
        except (sqlite3.Error, UnicodeDecodeError):
            return None
    return found if any(found.rows.values()) else None


def _from_pages(source: Path, sound: Sound) -> Found:
    """Read every record of every page, and tell by its shape and its content which table it is of."""
    known, found = list(layouts()), Found(sound)
    pages = Pages(source)
    try:
        for numbered, number, values in pages.records():
            for layout in known:
                if layout.numbered == numbered:
                    row = layout.read(number, values)
                    if row is not None and found.take(layout.table, row):
                        break
    finally:
        pages.close()
    return found
