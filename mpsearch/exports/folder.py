"""Export folders: nothing foreign is replaced, and a manifest says what is ours.

``mpsearch-export.json`` lists the files of an export with their SHA-256. It is written first, with the
digests left open, and again when every file is there: an export that was cut short is told from a whole one.
"""

from __future__ import annotations

import hashlib
import json
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path

from mpsearch.errors import InputError
from mpsearch.files import inside, sweep, write_file

MANIFEST = "mpsearch-export.json"
#: What a proof found, beside the export that it is of.
VERIFIED = "mpsearch-verified.json"


def write_folder(
    folder: Path, exporter: str, writers: Mapping[str, Callable[[Path], object]], force: bool
) -> tuple[Path, ...]:
    """Write the files of an export and their manifest.

    Args:
        folder: made when missing; must be empty, unless forced.
        exporter: name of the exporter, for the manifest.
        writers: file name -> function that writes that file, given its path.
        force: replace the files that the folder's own manifest lists. Any other file stays, and one that is in
            the way still stops the export.

    Returns:
        The files, the manifest last.

    Raises:
        InputError: the folder holds files (E303), or its manifest is broken (E304).
        UnsafeError: a file name leaves the folder (E803).
        ResourceError: the folder cannot be written (E701).
    """
    known = (folder / MANIFEST).exists()
    ours = _claim(folder, list(writers), force)
    targets = {name: inside(folder, name) for name in writers}
    stale = {inside(folder, name): digest for name, digest in ours.items() if name not in writers}
    manifest = inside(folder, MANIFEST)
    write_file(manifest, _manifest(exporter, dict.fromkeys([*writers, *ours])))
    # A proof is of the files that it saw. Without a manifest before, a file of that name is not ours.
    if known:
        inside(folder, VERIFIED).unlink(missing_ok=True)
    for name, write in writers.items():
        write(targets[name])
    for path, digest in stale.items():
        # A file of the earlier export goes with it, unless someone has worked on it since.
        if path.is_file() and digest in (None, _digest(path)):
            path.unlink()
    write_file(manifest, _manifest(exporter, {name: _digest(path) for name, path in targets.items()}))
    return (*targets.values(), manifest)


def check_folder(folder: Path) -> None:
    """Refuse an export that was cut short or changed since it was written.

    A folder without a manifest passes: its files were copied out of an export.

    Raises:
        InputError: a file is missing or is not what was written (E304).
        UnsafeError: the manifest names a file outside the folder (E803).
    """
    for name, digest in _read_manifest(folder).items():
        path = inside(folder, name)
        if not path.is_file() or _digest(path) != digest:
            raise InputError(
                "E304",
                f"'{path}': not the file that was exported: it was cut, edited or lost",
                advice="export the plan again",
            )


def _claim(folder: Path, names: Sequence[str], force: bool) -> dict[str, str | None]:
    """Return the earlier files that are ours to replace, with their digests."""
    if not folder.exists():
        return {}
    if not folder.is_dir():
        raise InputError("E303", f"'{folder}' is a file, not a folder; nothing was written or deleted")
    # What a killed export left half-written is in nobody's way.
    sweep(folder)
    found = sorted(path.name for path in folder.iterdir() if path.name != VERIFIED or not (folder / MANIFEST).exists())
    if not found:
        return {}
    if not force:
        raise InputError(
            "E303",
            f"'{folder}' holds {len(found)} file{'s' if len(found) > 1 else ''}; nothing was written or deleted",
            advice="choose another folder; --force replaces only files in its own manifest",
        )
    ours = _read_manifest(folder)
    for name in names:
        if name in found and name not in ours:
            raise InputError(
                "E303",
                f"'{folder / name}' is not listed in '{MANIFEST}'; nothing was written or deleted",
                advice="choose another folder; --force replaces only files in its own manifest",
            )
    return ours


def _read_manifest(folder: Path) -> dict[str, str | None]:
    path = folder / MANIFEST
    if not path.exists():
        return {}
    try:
        files = json.loads(path.read_text(encoding="utf-8"))["files"]
        return {str(name): None if digest is None else str(digest) for name, digest in files.items()}
    except (OSError, ValueError, KeyError, TypeError, AttributeError, RecursionError) as error:
        raise InputError("E304", f"'{path}': not an export manifest ({type(error).__name__})") from error


def _manifest(exporter: str, files: Mapping[str, str | None]) -> str:
    body = {"schema": "mpsearch/export", "schema_version": 1, "exporter": exporter, "files": dict(files)}
    return json.dumps(body, indent=1) + "\n"


def _digest(path: Path) -> str:
    with path.open("rb") as stream:
        return hashlib.file_digest(stream, "sha256").hexdigest()
