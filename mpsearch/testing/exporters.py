"""What every exporter must keep."""

from __future__ import annotations

import dataclasses
from abc import ABC, abstractmethod
from collections.abc import Mapping, Sequence
from pathlib import Path

import pytest

from mpsearch.errors import InputError
from mpsearch.plan import BitPlan
from mpsearch.ports import Exporter


class ExporterSuite(ABC):
    """Tests of an exporter. Subclass it, give the three fixtures and `read_back`, and pytest runs the rest.

    The exporter is a frozen dataclass with a setting ``force``.
    """

    @pytest.fixture
    @abstractmethod
    def exporter(self) -> Exporter:
        """The exporter, not forced."""

    @pytest.fixture
    @abstractmethod
    def plan(self) -> BitPlan:
        """A plan that the target can hold, of two formats or more."""

    @pytest.fixture
    @abstractmethod
    def refused(self) -> tuple[BitPlan, Sequence[str]]:
        """A plan that the target cannot hold, and the layers that it must name."""

    @abstractmethod
    def read_back(self, folder: Path, plan: BitPlan) -> Mapping[str, str]:
        """Read layer name -> format from the written files, by the target's own rules."""

    def test_what_is_written_reads_back(self, exporter: Exporter, plan: BitPlan, tmp_path: Path) -> None:
        assert list(exporter.refuses(plan)) == []
        exporter.write(plan, tmp_path / "out")
        assert self.read_back(tmp_path / "out", plan) == {name: str(fmt) for name, fmt in plan.formats.items()}

    def test_the_files_are_named_and_stay_in_the_folder(
        self, exporter: Exporter, plan: BitPlan, tmp_path: Path
    ) -> None:
        files = exporter.write(plan, tmp_path / "out")
        assert set(files) == {path for path in tmp_path.rglob("*") if path.is_file()}
        assert all(path.parent == tmp_path / "out" for path in files)

    def test_the_same_plan_gives_the_same_bytes(self, exporter: Exporter, plan: BitPlan, tmp_path: Path) -> None:
        exporter.write(plan, tmp_path / "a")
        exporter.write(plan, tmp_path / "b")
        assert contents(tmp_path / "a") == contents(tmp_path / "b")

    def test_refuses_by_layer_name(
        self, exporter: Exporter, refused: tuple[BitPlan, Sequence[str]], tmp_path: Path
    ) -> None:
        plan, names = refused
        found = exporter.refuses(plan)
        assert len(found) == len(names) > 0
        assert all(line.startswith(f"{name}: ") for line, name in zip(found, names, strict=True))
        with pytest.raises(InputError) as caught:
            exporter.write(plan, tmp_path / "out")
        assert caught.value.code == "E301"
        assert names[0] in str(caught.value)
        assert list(tmp_path.iterdir()) == []

    def test_a_second_write_is_refused(self, exporter: Exporter, plan: BitPlan, tmp_path: Path) -> None:
        exporter.write(plan, tmp_path)
        before = contents(tmp_path)
        with pytest.raises(InputError) as caught:
            exporter.write(plan, tmp_path)
        assert caught.value.code == "E303"
        assert "nothing was written or deleted" in str(caught.value)
        assert contents(tmp_path) == before

    def test_force_replaces_its_own_and_nothing_else(self, exporter: Exporter, plan: BitPlan, tmp_path: Path) -> None:
        files = exporter.write(plan, tmp_path)
        fresh = contents(tmp_path)
        files[0].write_bytes(b"old")
        (tmp_path / "notes.txt").write_text("mine")
        forced(exporter).write(plan, tmp_path)
        assert contents(tmp_path) == {**fresh, "notes.txt": b"mine"}

    def test_force_stops_before_a_foreign_file(self, exporter: Exporter, plan: BitPlan, tmp_path: Path) -> None:
        name = exporter.write(plan, tmp_path / "elsewhere")[0].name
        folder = tmp_path / "out"
        folder.mkdir()
        (folder / name).write_text("mine")
        with pytest.raises(InputError) as caught:
            forced(exporter).write(plan, folder)
        assert caught.value.code == "E303"
        assert contents(folder) == {name: b"mine"}


def forced(exporter: Exporter) -> Exporter:
    """Return the exporter with ``force`` set."""
    changed: Exporter = dataclasses.replace(exporter, force=True)  # type: ignore[type-var]
    return changed


def contents(folder: Path) -> dict[str, bytes]:
    """Read every file of a folder: name -> bytes."""
    return {path.name: path.read_bytes() for path in folder.iterdir()}
