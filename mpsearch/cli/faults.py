"""What a user is told when mpsearch itself is at fault: one line, and a file that can be sent."""

from __future__ import annotations

import errno
import os
import platform
import sys
import tempfile
import traceback
from contextlib import suppress

from mpsearch import __version__
from mpsearch.errors import MpsearchError, ResourceError
from mpsearch.logs import plain, without_secrets, words_of

_FILES = (errno.EMFILE, errno.ENFILE)
_DISK = (errno.ENOSPC, errno.EDQUOT, errno.EIO)


def refused(error: OSError) -> ResourceError | None:
    """Return what to tell of an error of the system's that is nobody's fault here; None for another one.

    Args:
        error: such as a full disk, which is met wherever something is written, printed lines included.

    Returns:
        E701, whose exit code is 7.
    """
    if error.errno in _FILES:
        return ResourceError(
            "E701",
            f"no further file can be opened: {error.strerror}",
            advice="use fewer workers, or raise the limit: ulimit -n 4096; what was stored is safe",
        )
    if error.errno not in _DISK:
        return None
    what = f"'{error.filename}'" if error.filename else "what is printed"
    return ResourceError(
        "E701",
        f"cannot write {what}: {error.strerror}",
        advice="free space, or write to another place; what was stored is safe",
    )


def fault(error: Exception) -> MpsearchError:
    """Write the traceback of an error that nobody expected into a file, and return what to tell of it.

    The file is its owner's alone, in the folder for temporary files, and holds no passwords.

    Args:
        error: what was raised.

    Returns:
        E699, whose exit code is 1.
    """
    path = ""
    with suppress(OSError):
        path = _written(error)
    first = (str(error).splitlines() or [""])[0]
    report = "please report it with that file" if path else "run it again with `mpsearch --debug …`, and report it"
    return MpsearchError(
        "E699",
        "internal error: a fault of mpsearch, not of what was asked; please report it",
        where=f"the traceback is in {path}" if path else "",
        because=plain(without_secrets(f"{type(error).__name__}: {first}"))[:300],
        advice=f"{report}; what was stored is safe, and the same command goes on from there",
    )


def _written(error: Exception) -> str:
    versions = f"mpsearch {__version__}, Python {platform.python_version()}, {platform.platform()}"
    # Words of the command line, for they may hold an address; not the environment, which holds more.
    words = words_of(sys.argv[1:])
    text = "".join(traceback.format_exception(error))
    descriptor, path = tempfile.mkstemp(prefix="mpsearch-fault-", suffix=".txt")
    with os.fdopen(descriptor, "w", encoding="utf-8", errors="backslashreplace") as file:
        file.write(without_secrets(f"{versions}\nmpsearch {words}\n\n{text}"))
    return path
