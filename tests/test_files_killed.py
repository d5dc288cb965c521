"""Files under kill -9 and cut short: what is read is the old content, the new one, or refused with a code."""

from __future__ import annotations

import contextlib
import os
import random
import subprocess
import sys
import threading
from collections.abc import Callable
from pathlib import Path

import pytest

from benchmarks.files_killed import kill_writers, plan_of
from benchmarks.fuzz import check_for
from benchmarks.fuzz_inputs import corpus
from mpsearch.errors import InputError, MpsearchError, ResourceError
from mpsearch.exports.folder import check_folder, write_folder
from mpsearch.files import located, sweep, write_file
from mpsearch.plan import BitPlan

LEFT = ".mpsearch-abcdefgh.tmp"


def test_a_killed_writer_leaves_whole_files(tmp_path: Path) -> None:
    found = kill_writers(tmp_path, kills=14, layers=300)
    assert found["kills"] == 14
    assert found["fell into a write"] > 0
    wrong = ("plan broken", "report broken", "export file broken", "export mixed, not noticed", "not swept", "missing")
    assert {name: found[name] for name in wrong} == dict.fromkeys(wrong, 0)
    BitPlan.load(tmp_path / "plan.json")


def test_what_a_killed_writer_left_is_swept_when_the_next_one_starts(tmp_path: Path) -> None:
    code = (
        "import os, sys; from pathlib import Path; from mpsearch.files import write_file\n"
        "write_file(Path(sys.argv[1]), lambda stream: (stream.write(b'half'), stream.flush(), os.kill(os.getpid(), 9)))"
    )
    target = tmp_path / "plan.json"
    assert subprocess.run([sys.executable, "-c", code, str(target)], timeout=60).returncode == -9
    assert len(list(tmp_path.iterdir())) == 1
    assert not target.exists()
    code = "import sys, pathlib, mpsearch.files; mpsearch.files.write_file(pathlib.Path(sys.argv[1]), b'new')"
    subprocess.run([sys.executable, "-c", code, str(target)], timeout=60, check=True)
    assert [path.name for path in tmp_path.iterdir()] == ["plan.json"]


def test_only_what_nobody_writes_is_swept(tmp_path: Path) -> None:
    others = [".mpsearch-notes.txt", ".plan.json.abcdefgh.tmp", "mpsearch-abcdefgh.tmp"]
    for name in (*others, LEFT):
        (tmp_path / name).write_text("x")
    (tmp_path / ".mpsearch-folder.tmp").mkdir()
    (tmp_path / ".mpsearch-link12.tmp").symlink_to(tmp_path / others[0])
    begun, swept = threading.Event(), threading.Event()

    def slowly(stream: object) -> None:
        begun.set()
        assert swept.wait(30)

    thread = threading.Thread(target=write_file, args=(tmp_path / "slow.json", slowly))
    write_file(tmp_path / "first.json", b"")
    (tmp_path / LEFT).write_text("x")
    thread.start()
    assert begun.wait(30)
    # In another process, as a second program would.
    code = "import sys; from pathlib import Path; from mpsearch.files import sweep; print(sweep(Path(sys.argv[1])))"
    ended = subprocess.run([sys.executable, "-c", code, str(tmp_path)], capture_output=True, text=True, timeout=60)
    swept.set()
    thread.join()
    assert ended.stdout == "1\n"
    assert not (tmp_path / LEFT).exists()
    there = {path.name for path in tmp_path.iterdir()}
    assert there == {*others, "first.json", "slow.json", ".mpsearch-folder.tmp", ".mpsearch-link12.tmp"}


def test_sweeping_a_folder_that_is_not_there_sweeps_nothing(tmp_path: Path) -> None:
    assert sweep(tmp_path / "nowhere") == 0


def test_a_half_written_file_does_not_stop_an_export(tmp_path: Path) -> None:
    (tmp_path / LEFT).write_text("x")
    write_folder(tmp_path, "native", {"a": lambda path: write_file(path, b"a")}, force=False)
    check_folder(tmp_path)
    assert (tmp_path / "a").read_bytes() == b"a"
    assert not (tmp_path / LEFT).exists()


@pytest.mark.parametrize("name", ["a\0b", "a\ud800b"])
def test_a_name_that_no_file_can_have_is_refused(name: str, tmp_path: Path) -> None:
    with pytest.raises(InputError, match="no file can be called") as caught:
        write_file(tmp_path / name, b"")
    assert caught.value.code == "E114"


def test_a_name_that_is_too_long_is_one_plain_error(tmp_path: Path) -> None:
    with pytest.raises(ResourceError) as caught:
        write_file(tmp_path / ("a" * 300), b"")
    assert caught.value.code == "E701"
    assert list(tmp_path.iterdir()) == []


def test_the_home_of_nobody(tmp_path: Path) -> None:
    with pytest.raises(InputError, match="no such user"):
        located("~nobody-of-this-name/model", tmp_path)


def truncated(name: str, content: bytes, folder: Path) -> list[int]:
    """Read a file cut at every byte (or at many of a long one); return where it was accepted though it was cut."""
    count = len(content)
    places = range(count) if count <= 4096 else sorted(random.Random(0).sample(range(count), 300))
    path, accepted = folder / name, []
    check: Callable[[Path], None] = check_for(name)
    for place in places:
        path.write_bytes(content[:place])
        with contextlib.suppress(MpsearchError):
            check(path)
            accepted.append(place)
    return accepted


@pytest.mark.parametrize("name", sorted(set(corpus()) - {"table.parquet"}))
def test_a_file_that_was_cut_is_read_or_refused_never_a_traceback(name: str, tmp_path: Path) -> None:
    for own, content in corpus().items():
        (tmp_path / own).write_bytes(content)
    accepted = truncated(name, corpus()[name], tmp_path)
    if name in ("plan.json", "profile.json", "matrices.json", "records.json", "model.safetensors", "model.gguf"):
        assert accepted == [], "a part passes for the whole"


def test_a_long_plan_that_was_cut_or_edited_is_refused(tmp_path: Path) -> None:
    plan_of(60, 1).save(tmp_path / "plan.json")
    content = (tmp_path / "plan.json").read_bytes()
    # Without its last line break it is whole still.
    assert set(truncated("plan.json", content, tmp_path)) <= {len(content) - 1}
    (tmp_path / "plan.json").write_bytes(content.replace(b'"int4-g64"', b'"int2-g64"', 1))
    with pytest.raises(InputError, match="the digest does not match") as caught:
        BitPlan.load(tmp_path / "plan.json")
    assert caught.value.code == "E304"


def test_a_plan_is_never_read_from_a_device() -> None:
    with pytest.raises(InputError, match="is not a file"):
        BitPlan.load(os.devnull)
