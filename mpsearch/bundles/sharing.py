"""Studies written to one file, read from one, and taken over from another database."""

from __future__ import annotations

import re
import shlex
from collections.abc import Iterator, Mapping
from dataclasses import replace
from pathlib import Path, PurePosixPath
from typing import Any

from mpsearch import registry
from mpsearch.bundles import kinds
from mpsearch.bundles.archive import Archive, save
from mpsearch.bundles.portion import Asked, Belongs, Copied, Portion, Refused
from mpsearch.bundles.reach import Reach
from mpsearch.errors import InputError, StudyNameError, UnsafeError, UsageError, did_you_mean
from mpsearch.records import CellRow, ValueRow
from mpsearch.spec import StudySpec

DEFAULT = "sqlite:///mpsearch.db"


def bundle(
    study: Any, path: str | Path, storage: str = DEFAULT, *, strip_paths: bool = False, force: bool = False
) -> Path:
    """Write a study to one file: question, survey, scores, costs, plans, measurements, profiles, origin, conflicts.

    The same study gives the same bytes. There is no pickle in it, and no time, user or host.

    Args:
        study: a `Study`, or the name of one in ``storage``.
        path: the file.
        storage: the database, when a name is given.
        strip_paths: of the folder of the model and of files only the last name; the question is then another one.
        force: replace a file that is there.

    Returns:
        The path.

    Raises:
        InputError: no database (E101), or the file is there already (E303).
        StorageError: no such study (E141).
        ResourceError: the file cannot be written (E701).
    """
    target = Path(path)
    if target.exists() and not force:
        raise InputError(
            "E303", f"'{target}' is there already; nothing was written", advice="name another file, or give --force"
        )
    if isinstance(study, str):
        store = registry.make("stores", "sql", url=storage, create=False, read_only=True)
        try:
            return _bundle(store, study, target, strip_paths)
        finally:
            store.close()
    return _bundle(study.store, study.name, target, strip_paths)


def _bundle(store: Any, name: str, path: Path, strip_paths: bool) -> Path:
    with registry.make("upkeep", "copying", store=store).reading(name) as portion:
        studies = [_without_paths(row) if strip_paths else row for row in portion.studies]
        save(
            path,
            {
                "studies.jsonl": ({"name": x.name, "spec": dict(x.spec), "state": x.state} for x in studies),
                "links.jsonl": (
                    [x.study, x.kind, x.key, x.label, x.position] for x in portion.links if x.kind in kinds.KINDS
                ),
                "values.jsonl": (_value_row(x) for x in portion.values if x.kind in kinds.KINDS),
                "cells.jsonl": _cell_rows(portion),
                "conflicts.jsonl": (
                    [x.kind, x.key, dict(x.stored), dict(x.offered)]
                    for x in portion.conflicts
                    if x.kind in (*kinds.KINDS, "cell")
                ),
            },
        )
    return path


def _value_row(value: ValueRow) -> dict[str, Any]:
    row: dict[str, Any] = {"kind": value.kind, "key": value.key, "body": dict(value.body)}
    return row if value.volatile is None else {**row, "volatile": dict(value.volatile)}


def _cell_rows(portion: Portion) -> Iterator[Any]:
    last = None
    for scope, cell in portion.cells:
        if scope != last:
            last = scope
            yield {"scope": scope}
        yield [
            cell.layer, cell.format, cell.batch, cell.status, cell.value, cell.spread, cell.samples, cell.reason,
            cell.seconds,
        ]  # fmt: skip


def _without_paths(row: Asked) -> Asked:
    spec = dict(row.spec)
    for name in ("model", "calibration", "validation", "energy", "engine"):
        text = str(spec.get(name, ""))
        head, colon, rest = text.partition(":")
        # `bundled:`, `stdlib:` and engines with settings are no paths; `file:` goes before one.
        if colon and head in ("file",):
            spec[name] = f"file:{PurePosixPath(rest).name}"
        elif "/" in text or "\\" in text:
            spec[name] = re.split(r"[/\\]", text.rstrip("/\\"))[-1]
    return replace(row, spec=spec)


def unbundle(path: str | Path, storage: str = DEFAULT, *, name: str = "", strip_remote_code: bool = False) -> Copied:
    """Read a bundle into a database: all of it, or nothing.

    What is there already and the same is fine. Measurements, scores and surveys are taken as they are: nobody can tell
    whether they were measured, and a later study here of the same model, text and versions takes them as known.

    Args:
        path: the file.
        storage: the database; made if there is none.
        name: what to call the study here.
        strip_remote_code: open a study that would run the model's own code as one that does not.

    Raises:
        InputError: no such file (E101), not a whole bundle (E304), numbers of another machine or version than those of
            the study of this name (E142), a name that is not printable (E114).
        UnsafeError: the study would run the model's own code (E802).
        StorageError: a study of this name asks something else (E140), or other values for the same keys (E521).
    """
    with Archive(Path(path)) as archive:
        portion = _portion(archive)
        if name:
            portion = portion.renamed({row.name: name for row in portion.studies})
        portion = _harmless(portion, str(path), strip_remote_code)
        with registry.make("stores", "sql", url=storage) as store:
            try:
                found: Copied = registry.make("upkeep", "copying", store=store).write(portion)
            except (ValueError, TypeError) as error:
                raise archive.broken(f"{type(error).__name__}: {ascii(str(error))[1:-1][:200]}") from error
    return found


def merge(
    other: str, into: str = DEFAULT, *, names: Mapping[str, str] | None = None, strip_remote_code: bool = False
) -> Copied:
    """Take over every study and value of another database: all, or nothing.

    Args:
        other: the database that is read.
        into: the database that is written.
        names: study of the other database -> its name here.
        strip_remote_code: as for `unbundle`.

    Raises:
        as `unbundle`, a name in ``names`` that the other database has not (E141), and a database that is to be joined
            with itself (E115).
    """
    source = registry.make("stores", "sql", url=other, create=False, read_only=True)
    _check_apart(source, into)
    with source, registry.make("upkeep", "copying", store=source).reading(None) as portion:
        there = [row.name for row in portion.studies]
        for name in names or {}:
            # Not asked of the store: it has one connection to read by, which is at work here.
            if name not in there:
                raise StudyNameError(
                    "E141", f"no study '{name}' in {source.place.shown}{did_you_mean(name, there)}",
                    advice=f"mpsearch show --storage {shlex.quote(source.place.name)}",
                )  # fmt: skip
        checked = replace(portion, values=map(_checked_value, portion.values))
        checked = _harmless(checked.renamed(names or {}), other, strip_remote_code)
        with registry.make("stores", "sql", url=into) as store:
            try:
                found: Copied = registry.make("upkeep", "copying", store=store).write(checked)
            except (ValueError, TypeError) as error:
                raise _unusable("a value of the other database", error) from error
    return found


def _check_apart(source: Any, into: str) -> None:
    """Refuse to join a database with itself, under whatever spelling of its address (E115)."""
    if registry.load("upkeep", "same")(source.place, into):
        source.close()
        raise UsageError(
            "E115", f"'{source.place.name}' would be joined with itself", because="other and --into are one database",
            advice="mpsearch db merge OTHER --into THIS",
        )  # fmt: skip


def _harmless(portion: Portion, where: str, strip: bool) -> Portion:
    """Refuse questions that nobody could ask here, and such as would run somebody's code."""
    studies = []
    for row in portion.studies:
        spec = dict(row.spec)
        if spec.get("trust_remote_code") and not strip:
            raise UnsafeError(
                "E802",
                f"study '{row.name}' would run the model's own code, which somebody else allowed: refused",
                where=where,
                advice="take it over as one that does not: --strip-remote-code",
            )
        if "trust_remote_code" in spec:
            spec["trust_remote_code"] = False
        try:
            StudySpec.from_question(spec, DEFAULT)
        except (KeyError, TypeError, ValueError, AttributeError, InputError) as error:
            raise _unusable(f"the question of study '{row.name}'", error) from error
        if spec.get("name") != row.name:
            raise _unusable(f"study '{row.name}'", ValueError(f"its question is called {spec.get('name')!a}"))
        studies.append(replace(row, spec=spec))
    return replace(portion, studies=studies)


def _unusable(what: str, error: Exception) -> InputError:
    text = error.message if isinstance(error, InputError) else f"{type(error).__name__}: {ascii(str(error))[1:-1]}"
    return InputError(
        "E304",
        f"{what} cannot be used",
        because=text[:200],
        advice="take it from an intact copy, written by this version or an earlier one; nothing was stored",
    )


def _portion(archive: Archive) -> Portion:
    studies = list(archive.rows("studies.jsonl", _read_study))
    links = list(archive.rows("links.jsonl", _read_link))
    try:
        reach = Reach.of(studies, links, archive.rows("values.jsonl", _named))
    except InputError as error:
        # That of a row says where it stands.
        raise error if error.where else archive.broken(error.message) from error
    return Portion(
        studies,
        links,
        archive.rows("values.jsonl", lambda row: reach.value(_read_value(row))),
        _cells(archive, reach),
        archive.rows("conflicts.jsonl", lambda row: reach.conflict(_read_conflict(row))),
    )


def _named(row: Any) -> tuple[str, str, Mapping[str, Any]]:
    kind, key, body = _typed(row["kind"], str), _typed(row["key"], str), _typed(row["body"], dict)
    if kind not in kinds.KINDS:
        raise ValueError(f"values of kind {ascii(kind)[:40]} do not travel")
    return kind, key, body


def _read_study(row: Any) -> Asked:
    return Asked(_typed(row["name"], str), _typed(row["spec"], dict), _typed(row["state"], str))


def _read_link(row: Any) -> Belongs:
    study, kind, key, label, position = _typed(row, list)
    texts = [str(_typed(x, str)) for x in (study, kind, key, label)]
    return Belongs(texts[0], texts[1], texts[2], texts[3], _typed(position, int))


def _read_value(row: Any) -> ValueRow:
    volatile = row.get("volatile")
    value = ValueRow(
        _typed(row["kind"], str),
        _typed(row["key"], str),
        _typed(row["body"], dict),
        None if volatile is None else _typed(volatile, dict),
    )
    return _checked_value(value)


def _checked_value(value: ValueRow) -> ValueRow:
    try:
        key = kinds.key_of(value.kind, value.body)
        kinds.read(value.kind, {**value.body, **(value.volatile or {})})
    except (KeyError, TypeError, ValueError, AttributeError, IndexError, OverflowError, AssertionError) as error:
        raise _unusable(f"{value.kind} '{value.key[:12]}'", error) from error
    if key is not None and key != value.key:
        raise InputError("E304", f"{value.kind} '{value.key[:12]}' is not what its key says: it was edited")
    return value


def _read_conflict(row: Any) -> Refused:
    kind, key, stored, offered = _typed(row, list)
    return Refused(_typed(kind, str), _typed(key, str), _typed(stored, dict), _typed(offered, dict))


def _cells(archive: Archive, reach: Reach) -> Iterator[tuple[str, CellRow]]:
    scope = ""

    def read(row: Any) -> tuple[str, CellRow] | None:
        nonlocal scope
        if isinstance(row, dict):
            scope = reach.scope(_typed(row["scope"], str))
            return None
        reach.scope(scope)
        layer, fmt, batch, status, value, spread, samples, reason, seconds = _typed(row, list)
        texts = [_typed(x, str) for x in (layer, fmt, status, reason)]
        numbers = [None if x is None else float(_typed(x, (int, float))) for x in (value, spread)]
        count, number = _typed(batch, int), _typed(samples, int)
        took = float(_typed(seconds, (int, float)))
        return scope, CellRow(texts[0], texts[1], count, texts[2], numbers[0], numbers[1], number, texts[3], took)

    yield from archive.rows("cells.jsonl", read)


def _typed(value: Any, kind: type | tuple[type, ...]) -> Any:
    # In Python a truth value is a whole number as well.
    if not isinstance(value, kind) or isinstance(value, bool):
        raise ValueError(f"got {ascii(value)[:60]}, which is of another type")
    return value
