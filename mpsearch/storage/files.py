"""Looks at the file of an SQLite database before SQLite does, and makes it if asked."""

from __future__ import annotations

import os
import stat
from itertools import takewhile
from pathlib import Path

from mpsearch.errors import InputError, ResourceError, StorageError, did_you_mean

_MAGIC = b"SQLite format 3\0"
#: File systems whose locks or shared memory do not reach every machine that can open the file.
NETWORK = frozenset(
    {
        "9p",
        "afs",
        "beegfs",
        "ceph",
        "cifs",
        "davfs",
        "fuse.ceph",
        "fuse.gcsfuse",
        "fuse.glusterfs",
        "fuse.goofys",
        "fuse.rclone",
        "fuse.s3fs",
        "fuse.sshfs",
        "glusterfs",
        "gpfs",
        "lustre",
        "ncpfs",
        "nfs",
        "nfs3",
        "nfs4",
        "smb2",
        "smb3",
        "smbfs",
        "sshfs",
    }
)


def prepare(path: Path, name: str, *, create: bool) -> None:
    """Refuse a file that cannot be a results database; make an empty one if there is none.

    Args:
        path: the file.
        name: what messages call it.
        create: make the file, readable by its owner only.

    Raises:
        InputError: no such file or folder (E101).
        StorageError: on a network disk (E602), or not a database (E603).
        ResourceError: the file cannot be opened or made (E701).
    """
    kind = mount_type(path)
    if kind in NETWORK:
        raise StorageError(
            "E602",
            f"'{name}' is on {kind}, where SQLite locks are not safe",
            advice="use a path on a local disk, or a postgresql:// address",
        )
    try:
        mode = path.stat().st_mode
    except FileNotFoundError:
        _create(path, name, create=create)
        return
    except OSError as error:
        raise _unusable(name, error) from error
    if not stat.S_ISREG(mode):
        what = "a folder" if stat.S_ISDIR(mode) else "not a plain file"
        raise StorageError("E603", f"'{name}' is not a study database (it is {what})", advice="give a file name")
    _check_start(path, name)


def _create(path: Path, name: str, *, create: bool) -> None:
    if not create:
        near = [other.name for other in path.parent.glob("*.db")] if path.parent.is_dir() else []
        raise InputError("E101", f"results database '{name}' not found{did_you_mean(path.name, near)}")
    if not path.parent.is_dir():
        raise InputError(
            "E101",
            f"results database '{name}': folder '{path.parent}' not found",
            advice=f"mkdir -p '{path.parent}'",
        )
    try:
        os.close(os.open(path, os.O_RDWR | os.O_CREAT | os.O_CLOEXEC, 0o600))
    except OSError as error:
        raise _unusable(name, error) from error


def _check_start(path: Path, name: str) -> None:
    try:
        with path.open("rb") as stream:
            start = stream.read(len(_MAGIC))
    except OSError as error:
        raise _unusable(name, error) from error
    # After a crash the first page may still be in the journal, and SQLite puts it back.
    if start in (b"", _MAGIC) or Path(f"{path}-journal").exists():
        return
    shown = "".join(takewhile(str.isprintable, start.decode("latin-1")))
    what = f"'{shown}'" if shown.isascii() and shown else f"the bytes {start[:8].hex(' ')}"
    raise StorageError(
        "E603",
        f"'{name}' is not a study database (starts with {what})",
        advice="give the file that earlier runs wrote, or a new name; nothing was changed",
    )


def _unusable(name: str, error: OSError) -> ResourceError:
    return ResourceError(
        "E701", f"cannot open '{name}': {error.strerror}", advice="give a file that you may read and write"
    )


def mount_type(path: Path, table: Path = Path("/proc/self/mountinfo")) -> str:
    """Return the type of the file system that holds a path, or an empty string where nobody says.

    Args:
        path: a file that need not exist.
        table: the kernel's list of mounts, see proc_pid_mountinfo(5).
    """
    try:
        lines = table.read_text(encoding="utf-8", errors="surrogateescape").splitlines()
    except OSError:
        return ""
    place = os.path.realpath(path)
    best, kind = -1, ""
    for line in lines:
        fields, _, rest = line.partition(" - ")
        columns = fields.split(" ")
        if len(columns) < 5 or not rest:
            continue
        mount = _unescape(columns[4])
        # A later mount on the same folder hides the earlier one.
        if (place == mount or place.startswith(mount.rstrip("/") + "/")) and len(mount) >= best:
            best, kind = len(mount), rest.split(" ")[0]
    return kind


def _unescape(text: str) -> str:
    for octal, character in (("\\040", " "), ("\\011", "\t"), ("\\012", "\n"), ("\\134", "\\")):
        text = text.replace(octal, character)
    return text
