"""Faults of mpsearch itself and of the system: what is told, what a report holds, and no password in it."""

from __future__ import annotations

import errno
import os
import re
import subprocess
import sys
from pathlib import Path
from typing import Any
from urllib.parse import quote

import pytest

from mpsearch.cli.faults import fault, refused
from mpsearch.cli.main import run
from mpsearch.errors import InputError
from mpsearch.logs import hidden, words_of
from mpsearch.storage.database import Database
from mpsearch.storage.place import Place

# As users have it: what is printed waits until there is much of it.
BUFFERED = {**os.environ, "PYTHONUNBUFFERED": ""}
MPSEARCH = [sys.executable, "-m", "mpsearch.cli.main"]
PASSWORDS = ["s3 canary#x", "can?ary", "can'ar\"y", "ca/nar:y", "canaryé\\n", "x1", "can&ary=%z"]


def report(call: list[str], capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch) -> str:
    """What a user sees and sends of a fault of ours, in which the driver told all that it was given."""

    def fail(self: Database) -> None:
        assert self.place.server is not None
        address = self.place.server.render_as_string(hide_password=False)
        given = {"password": self.place.password, "address": address}
        raise RuntimeError(f"{self.place.password} of {given!r}: {call}")

    monkeypatch.setattr(Database, "_open", fail)
    monkeypatch.setattr(sys, "argv", ["mpsearch", *call])
    assert run(call) == 1
    told = capsys.readouterr().err
    (path,) = re.findall(r"traceback is in (\S+)", told)
    text = Path(path).read_text(encoding="utf-8")
    Path(path).unlink()
    assert "RuntimeError" in text
    assert "db.lan" in text
    return str(told) + text


@pytest.mark.parametrize("encoded", [True, False])
@pytest.mark.parametrize("password", PASSWORDS)
def test_a_report_holds_no_password(
    password: str, encoded: bool, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    written = quote(password, safe="") if encoded else password
    address = f"postgresql://ann:{written}@db.lan/mp"
    for call in (["show", "--storage", address], ["show", f"--storage={address}"]):
        text = report(call, capsys, monkeypatch)
        for form in {password, written, repr(password)[1:-1], Place.of(address).password}:
            assert not re.search(rf"(?<!\w){re.escape(form)}(?!\w)", text)
        assert "canary" not in text


def test_a_password_of_the_query_is_left_out(
    capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    text = report(["show", "--storage", "postgresql://db.lan/mp?user=ann&password=can%20ary"], capsys, monkeypatch)
    assert "can%20ary" not in text
    assert "can ary" not in text


def test_a_report_holds_no_password_that_was_not_read_yet(monkeypatch: pytest.MonkeyPatch) -> None:
    words = ["serve", "--token", "a canary", "--storage", "postgresql://ann:a canary#?'@db.lan/mp"]
    monkeypatch.setattr(sys, "argv", ["mpsearch", *words])
    path = Path(fault(RuntimeError("x")).where.rpartition(" ")[2])
    text = path.read_text(encoding="utf-8")
    path.unlink()
    assert "mpsearch serve --token *** --storage postgresql://ann@db.lan/mp\n" in text
    assert "canary" not in text


def test_words_of_a_command_line_hide_what_an_option_calls_secret() -> None:
    assert words_of(["x", "--token", "a b", "--api-key=c d", "--token-file", "f"]) == (
        "x --token *** --api-key=*** --token-file f"
    )


@pytest.mark.parametrize(
    ("text", "shown"),
    [
        ("password='my canary, too' next", "password='***' next"),
        ('{"token": "a \\"canary\\" b", "x": 1}', '{"token": "***", "x": 1}'),
        ("token=canary; x", "token=***; x"),
        ("password: 'canary", "password: '***"),
    ],
)
def test_a_quoted_secret_is_hidden_as_a_whole(text: str, shown: str) -> None:
    assert hidden(text) == shown


def test_an_address_that_cannot_be_read_is_shown_without_its_password() -> None:
    with pytest.raises(InputError) as caught:
        Place.of("postgresql://ann:s3 can'ary#?@db.lan:port/mp")
    assert "ary" not in str(caught.value)
    assert "db.lan" in str(caught.value)


@pytest.mark.parametrize("call", [["formats", "--json"], ["--version"], ["formats"]])
def test_a_full_disk_behind_the_output_is_no_fault_of_ours(call: list[str]) -> None:
    with open("/dev/full", "w", encoding="utf-8") as full:
        done = subprocess.run(
            [*MPSEARCH, *call], stdout=full, stderr=subprocess.PIPE, text=True, check=False, env=BUFFERED
        )
    assert done.returncode == 7
    assert done.stderr.startswith("error[E701] cannot write what is printed: No space left on device")
    assert "Traceback" not in done.stderr
    assert "Exception ignored" not in done.stderr


def test_nobody_left_to_tell_ends_in_peace() -> None:
    with open("/dev/full", "w", encoding="utf-8") as full:
        done = subprocess.run([*MPSEARCH, "--version"], stdout=full, stderr=full, check=False, env=BUFFERED)
    assert done.returncode == 7


def test_a_reader_that_left_is_told_nothing() -> None:
    read, write = os.pipe()
    os.close(read)
    for call in (["formats", "--json"], ["--version"]):
        done = subprocess.run(
            [*MPSEARCH, *call], stdout=write, stderr=subprocess.PIPE, text=True, check=False, env=BUFFERED
        )
        assert done.stderr == ""
    os.close(write)


@pytest.mark.parametrize("number", [errno.ENOSPC, errno.EDQUOT, errno.EIO, errno.EMFILE, errno.ENFILE])
def test_what_the_system_refuses_is_a_lack_of_resources(number: int) -> None:
    found: Any = refused(OSError(number, os.strerror(number)))
    assert (found.code, found.exit_code) == ("E701", 7)
    assert os.strerror(number) in found.message
    assert refused(OSError(errno.ENOENT, "no")) is None
